"""A lane serves every station of its device, however much waits for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiotime.dynamic import Network, Stage

ROUNDS = 100


class TwoWays(Network):
    """Positive instances need the second stage once, the others the first one a hundred times."""

    def __init__(self, device: Any, max_batch: int) -> None:
        self.first = Stage(lambda x: x, device=device, max_batch=max_batch)
        self.second = Stage(lambda x: x, device=device, max_batch=max_batch)

    async def forward(self, x: Any) -> Any:
        if x > 0:
            return await self.second(x)
        for _ in range(ROUNDS):
            x = await self.first(x)
        return x


@pytest.mark.asyncio
@pytest.mark.parametrize("device", ["inline", "cpu:0"])
@pytest.mark.parametrize("max_batch", [2, 64])
async def test_a_lone_call_is_not_passed_over_for_ever(device: str, max_batch: int) -> None:
    """It waits for some full batches of another stage, not until nobody wants that any more."""
    source = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    async with TwoWays(device, max_batch).run(source, max_active_keys=8, ordered=False) as run:
        first = await anext(run)
        assert first.index == 7

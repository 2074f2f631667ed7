"""What comes out for one instance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiotime import Prediction
from aiotime.dynamic import Stage, Step
from tests.dynamic.nets import Coded, linear, taught


def test_a_step_is_a_prediction() -> None:
    """With the number of calls and a path beside."""
    step = Step(1.0, 3, key="k")
    assert isinstance(step, Prediction)
    assert (step.output, step.index, step.key, step.calls, step.path, step.delay) == (1.0, 3, "k", 0, None, None)


@pytest.mark.asyncio
async def test_outputs_are_cut_off_and_made_before_learning() -> None:
    """Nested outputs come without any graph; they are those of the weights before the update."""

    async def code(net: Any, x: torch.Tensor) -> Any:
        h = await net.stage(x)
        return {"h": h, "both": (h * 2, "text")}

    network = Coded(code, stage=Stage(linear(), device="inline"))
    module = linear()
    steps = await taught(
        network,
        [torch.ones(3)] * 2,
        loss=lambda output: output["h"].sum() + output["both"][0].sum(),
        supervised=False,
        max_active_keys=1,
        min_update_frequency=1,
        update_per="instance",
    )
    first, second = (step.output for step in steps)
    assert not first["h"].requires_grad
    assert not first["both"][0].requires_grad
    assert first["both"][1] == "text"
    assert torch.allclose(first["h"], module(torch.ones(3)))
    assert not torch.allclose(first["h"], second["h"])

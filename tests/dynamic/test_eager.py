"""`Network.eager`: the same forward in plain PyTorch."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from aiotime.dynamic import Stage
from aiotime.errors import ConfigurationError
from tests.dynamic.nets import Coded, TreeNet, linear, modules, plain_tree, trees


@pytest.mark.asyncio
@pytest.mark.parametrize("max_batch", [1, 8])
async def test_values_and_gradients(max_batch: int) -> None:
    """One graph from end to end, whose gradients are those of the network written without aiotime."""
    network = TreeNet(max_batch=max_batch)
    parts = modules(network)
    for sample in trees(3):
        loss, expected = await network.eager(sample), plain_tree(parts, sample)
        assert torch.allclose(loss, expected)
        loss.backward()
        expected.backward()  # type: ignore[no-untyped-call]
    for name, part in parts.items():
        for own, plain in zip(network.stages[name].fn.parameters(), part.parameters(), strict=True):  # type: ignore[attr-defined]
            assert plain.grad is not None
            assert torch.allclose(own.grad, plain.grad, atol=1e-5)


@pytest.mark.asyncio
async def test_cat_and_stack() -> None:
    """A batching stage is given a batch of one; a joining one is given the rows as they are."""
    shapes: list[torch.Size] = []

    def note(x: torch.Tensor, *, y: torch.Tensor) -> Any:
        shapes.append(x.shape)
        return {"sum": x + y}

    async def code(net: Any, x: torch.Tensor) -> Any:
        one = await net.stack(x, y=x)
        other = await net.cat(x, y=x)
        return one["sum"] + other["sum"]

    network = Coded(
        code,
        stack=Stage(note, device="inline", max_batch=4),
        cat=Stage(note, device="inline", max_batch=4, group="cat"),
    )
    out = await network.eager(torch.ones(2, 3))
    assert shapes == [(1, 2, 3), (2, 3)]
    assert out.tolist() == [[4.0] * 3] * 2


@pytest.mark.asyncio
async def test_errors_are_plain_and_the_context_stays() -> None:
    """The exception of a module comes as it is; afterwards a call is outside of an instance as before."""

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("plainly")

    async def code(net: Any, x: torch.Tensor) -> Any:
        return await net.fail(x)

    network = Coded(code, fail=Stage(fail, device="inline"), layer=Stage(linear(), device="inline"))
    with pytest.raises(ArithmeticError, match="plainly"):
        await network.eager(torch.ones(1))
    with pytest.raises(ConfigurationError, match="outside of an instance"):
        network.layer(torch.ones(3))
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and "eager" in repr(task)]

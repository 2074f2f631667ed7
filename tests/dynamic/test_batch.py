"""Calls joined, computed and taken apart again: nested outputs, ragged rows, mixed shapes, and what does not fit."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from aiotime.dynamic import Stage
from aiotime.errors import InputError, StageError
from tests.dynamic.nets import SGD, Coded, check_empty, close, gathered, linear, put, taught

kinds = pytest.mark.parametrize("kind", ["inline", "cpu", "simulated"])
pytestmark = pytest.mark.usefixtures("double")


async def same_as_eager(network: Coded, source: list[Any], **options: Any) -> Any:
    """Losses and gradients are those of plain PyTorch; returns the statistics."""
    losses = []
    for sample in source:
        loss = await network.eager(sample)
        loss.backward()
        losses.append(loss.item())
    expected = {
        f"{name}.{key}": p.grad
        for name, stage in network.stages.items()
        if isinstance(stage.fn, nn.Module)
        for key, p in stage.fn.named_parameters()
        if p.grad is not None
    }
    async with network:
        steps = await taught(network, source, min_update_frequency=10**9, **options)
        assert [step.loss for step in steps] == pytest.approx(losses)
        close(gathered(network), expected)
        check_empty(network)
        return network.stats().stages


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(3, 6)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        index = y.argmax(-1)  # no gradient
        return {"halves": (y[..., :3], [y[..., 3:]]), "index": index, "said": "hello", "none": None}


@pytest.mark.asyncio
@kinds
@pytest.mark.parametrize("max_batch", [1, 5])
async def test_nested_outputs(kind: str, max_batch: int) -> None:
    """Tuples, lists and dicts with non-tensors among them come out per call, with gradients where there are any."""

    async def code(net: Any, x: torch.Tensor) -> Any:
        found = await net.nested(x)
        assert found["said"] == "hello"
        assert found["none"] is None
        assert found["index"].dtype == torch.int64
        assert found["index"].shape == ()
        one, (other,) = found["halves"]
        again = await net.nested(one * 2)  # its "halves" 1 stays unused
        return (other**2).sum() + again["halves"][0].sum() * float(found["index"])

    network = put(Coded(code, nested=Stage(Nested(), max_batch=max_batch)), kind)
    assert isinstance(network, Coded)
    (station,) = await same_as_eager(network, [torch.rand(3) for _ in range(7)])
    assert station.gradients == 14
    assert (station.batch_mean > 1) == (max_batch > 1)


class Graph(nn.Module):
    """Of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(3, 3)

    def forward(self, nodes: torch.Tensor, *, kinds: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(nodes)) * kinds.unsqueeze(-1)


@pytest.mark.asyncio
@kinds
async def test_ragged_rows(kind: str) -> None:
    """group="cat": calls with any number of rows are one batch, and each gets its own rows back; also none at all."""

    async def code(net: Any, n: int) -> Any:
        nodes, kinds = torch.linspace(0, 1, 3 * n).reshape(n, 3), torch.arange(1.0, n + 1)
        h = nodes
        for _ in range(2):
            h = await net.graph(h, kinds=kinds)
            assert h.shape == (n, 3)
            h = h + h.mean(0, keepdim=True) if n else h
        return (h**2).sum() + (await net.head(torch.ones(3))).sum()

    network = put(
        Coded(code, graph=Stage(Graph(), max_batch=8, group="cat"), head=Stage(linear(3, 1, seed=2), max_batch=8)),
        kind,
    )
    assert isinstance(network, Coded)
    graph, _ = await same_as_eager(network, [1, 4, 0, 2, 7, 1, 3, 2, 5, 6])
    assert graph.batch_mean > 2


@pytest.mark.asyncio
@kinds
async def test_mixed_shapes(kind: str) -> None:
    """Calls of one stage with different shapes are batched with their like."""
    sizes: Counter[tuple[int, ...]] = Counter()

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes[tuple(x.shape)] += 1
            return x / (1 + (x**2).sum(-1, keepdim=True)) * self.scale

    async def code(net: Any, n: int) -> Any:
        x = torch.arange(1.0, n + 1)
        return (await net.norm(await net.norm(x))).sum()

    network = put(Coded(code, norm=Stage(Norm(), max_batch=4)), kind)
    assert isinstance(network, Coded)
    await same_as_eager(network, [2, 3, 2, 3, 2, 3, 2, 3, 5], max_active_keys=9)
    assert sum(times for shape, times in sizes.items() if shape[0] == 4) >= 2
    assert all(shape[0] == 1 for shape in sizes if shape[1] == 5)


@pytest.mark.asyncio
@kinds
async def test_some_rows_have_no_gradient(kind: str) -> None:
    """Rows whose result is used for nothing, or without a way to the loss, share batches with rows that learn."""

    async def code(net: Any, n: int) -> Any:
        h = await net.first(torch.full((3,), float(n)))
        if n % 3 == 1:
            return (await net.second(h.detach())).sum()
        other = await net.second(h)
        return h.sum() if n % 3 == 2 else other.sum()

    network = put(
        Coded(code, first=Stage(linear(seed=1), max_batch=4), second=Stage(linear(seed=2), max_batch=4)), kind
    )
    assert isinstance(network, Coded)
    first, second = await same_as_eager(network, list(range(9)))
    assert (first.gradients, second.gradients) == (6, 6)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fn", "group", "said"),
    [
        (lambda x: x.sum(), "stack", "cannot be divided among them"),
        (lambda x: torch.cat([x, x]), "cat", "cannot be divided among them"),
        (lambda x: 5, "stack", "returned a int without any tensor"),
        (lambda x: {"a": None}, "stack", "returned a dict without any tensor"),
    ],
)
async def test_outputs_that_do_not_fit(fn: Any, group: Any, said: str) -> None:
    """A batch whose output has not a row per call is refused, with what to do."""

    async def code(net: Any, n: int) -> Any:
        return await net.stage(torch.ones(2))

    network = Coded(code, stage=Stage(fn, device="inline", max_batch=4, group=group))
    async with network:
        with pytest.raises(InputError, match=said):
            async with network.run(range(4)) as run:
                async for _ in run:
                    pass
        check_empty(network)


@pytest.mark.asyncio
async def test_an_output_that_is_an_input() -> None:
    """A stage may hand its input through, or the same tensor twice."""

    async def code(net: Any, x: torch.Tensor) -> Any:
        h = await net.first(x)
        one, other, whole = await net.hand(h)
        return one.sum() + 2 * other.sum() + (whole * h).sum()

    def hand(x: torch.Tensor) -> Any:
        y = x * 2
        return y, y, x

    for max_batch in (1, 3):
        network = Coded(
            code,
            first=Stage(linear(), device="inline", max_batch=max_batch),
            hand=Stage(hand, device="inline", max_batch=max_batch),
        )
        await same_as_eager(network, [torch.rand(3) for _ in range(4)])


@pytest.mark.asyncio
@kinds
async def test_one_bad_row(kind: str) -> None:
    """A batch that fails is run again one by one: only the culprit fails, in prediction, too."""
    tried: list[int] = []

    def picky(x: torch.Tensor) -> torch.Tensor:
        tried.append(len(x))
        if (x == 2).any():
            raise ArithmeticError("two")
        return x * 10

    async def code(net: Any, n: int) -> Any:
        return await net.stage(torch.tensor([float(n)]))

    network = put(Coded(code, stage=Stage(picky, max_batch=5)), kind)
    errors: list[Any] = []
    async with network:
        run = network.run(range(5), on_error=lambda frame, error: errors.append(error))
        assert [(step.index, step.output.item()) async for step in run] == [(0, 0), (1, 10), (3, 30), (4, 40)]
        (error,) = errors
        assert isinstance(error, StageError)
        assert (error.stage, error.frame) == ("stage", 2)
        assert isinstance(error.__cause__, ArithmeticError)
        assert tried[0] > 1
        check_empty(network)


@pytest.mark.asyncio
@kinds
async def test_rows_that_wait_for_nothing_go_back_alone(kind: str) -> None:
    """Where one instance of a batch waits for something outside, the others learn meanwhile; gradients are the same."""
    gate = asyncio.Event()

    async def code(net: Any, n: int) -> Any:
        h = await net.first(torch.full((3,), float(n)))
        h = await net.second(h + 1)
        if n == 1:
            await gate.wait()
        return (h**2).sum()

    def made() -> Coded:
        return Coded(code, first=Stage(linear(seed=1), max_batch=4), second=Stage(linear(seed=2), max_batch=4))

    sums = []
    for blocks in (False, True):
        gate.clear() if blocks else gate.set()
        network = put(made(), kind)
        async with network:
            out = []
            async for step in network.learn(
                range(4), optimizer=SGD, min_update_frequency=10**9, ordered=False, unused="ignore"
            ):
                out.append(step.index)
                if len(out) == 3:
                    gate.set()  # only now: three of the batch were learned from before
            assert out[-1] == 1 or not blocks
            if blocks:
                for station in network.stats().stages:
                    assert sum(size * times for size, times in station.back_sizes) == 4
                    assert len(station.back_sizes) > 1 or kind == "cpu"
            sums.append(gathered(network))
            check_empty(network)
    close(*sums)

"""Learning on a real GPU: the numbers of the host, under load, across devices. Not yet run: written without a GPU.

In double precision, so that host and device differ by rounding alone. `torch.cuda._sleep` keeps streams busy for some
cycles: what should wait is then seen waiting, and memory that is let go too early is overwritten.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from aiotime import LATER, Pipeline, Sample, Stage
from aiotime.learning import Delayed, Exact
from aiotime.learning.learner import StageLearner
from aiotime.learning.rule import Rule

pytestmark = pytest.mark.cuda

SHORT = 200_000  # cycles, around 100 µs
ADAM = partial(torch.optim.Adam, lr=0.01)
FRAMES = 40


class Busy(nn.Module):
    """Identity that keeps its stream busy first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            torch.cuda._sleep(SHORT)  # type: ignore[no-untyped-call]
        return x


def stages_of(count: int, *, width: int = 64) -> list[nn.Sequential]:
    torch.manual_seed(0)
    sizes = [16, *[width] * (count - 1), 4]
    made = [nn.Sequential(Busy(), nn.Linear(before, after), nn.Tanh()) for before, after in pairwise(sizes)]
    return [part.double() for part in made]


def data() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(FRAMES, 8, 16, generator=generator, dtype=torch.float64)
    ys = torch.randint(0, 4, (FRAMES, 8), generator=generator)
    return list(xs), list(ys)


def reference(parts: list[nn.Sequential], delays: list[int]) -> tuple[list[float], list[torch.Tensor]]:
    """Plain PyTorch on the host; gradients reach their optimizer through queues of length D_k."""
    parts = copy.deepcopy(parts)
    optimizers = [ADAM(part.parameters()) for part in parts]
    queues: list[deque[tuple[torch.Tensor, ...]]] = [deque() for _ in parts]
    losses = []

    def step(k: int) -> None:
        for parameter, grad in zip(parts[k].parameters(), queues[k].popleft(), strict=True):
            parameter.grad = grad
        optimizers[k].step()

    for x, y in zip(*data(), strict=True):
        for k, queue in enumerate(queues):
            while len(queue) > delays[k]:
                step(k)
        value = x
        for part in parts:
            value = part(value)
        loss = functional.cross_entropy(value, y)
        losses.append(float(loss.detach()))
        parameters = [list(part.parameters()) for part in parts]
        grads = iter(torch.autograd.grad(loss, [p for own in parameters for p in own]))
        for own, queue in zip(parameters, queues, strict=True):
            queue.append(tuple(next(grads) for _ in own))
    for k, queue in enumerate(queues):
        while queue:
            step(k)
    return losses, [p.detach() for part in parts for p in part.parameters()]


def rule(order: str, **settings: Any) -> Rule:
    settings = {"loss": functional.cross_entropy, "optimizer": ADAM, **settings}
    return Exact(**settings) if order == "exact" else Delayed(order=order, **settings)  # type: ignore[arg-type]


async def built(places: list[str], learner: Rule, parts: list[nn.Sequential] | None = None) -> Pipeline:
    parts = parts or stages_of(len(places))
    stages = [Stage(part, device=places[k], name=f"s{k}") for k, part in enumerate(parts)]
    return await asyncio.to_thread(Pipeline.from_stages, stages, learner=learner)


def samples() -> list[Sample]:
    return [Sample(x, y) for x, y in zip(*data(), strict=True)]


def on_host(pipeline: Pipeline) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in pipeline.state_dict().values()]


def kept(pipeline: Pipeline) -> int:
    return sum(len(spec.hands.kept) for spec in pipeline._specs if isinstance(spec.hands, StageLearner))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "places",
    [
        ["cuda:0"],
        ["cuda:0", "cuda:0", "cuda:0"],
        ["cpu:0", "cuda:0", "cuda:0"],
        ["cuda:0", "cuda:0", "cpu:0"],
        ["cuda:0", "cpu:0", "cuda:0"],
        pytest.param(["cuda:0", "cuda:1", "cuda:0"], marks=pytest.mark.cuda(devices=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("order", "factor"), [("exact", 0), ("1f1b", 1), ("lockstep", 2)])
async def test_the_numbers_are_the_hosts(places: list[str], order: str, factor: int) -> None:
    """Losses, outputs' places, delays and weights after a stream, whatever lies where."""
    delays = [factor * (len(places) - 1 - k) for k in range(len(places))]
    losses, weights = reference(stages_of(len(places)), delays)
    async with await built(places, rule(order)) as pipeline, asyncio.timeout(60):
        preds = [pred async for pred in pipeline.run(samples())]
        assert not any(pred.output.is_cuda for pred in preds)
        assert [pred.loss for pred in preds] == pytest.approx(losses, rel=1e-8)
        assert preds[-1].delay == tuple(delays)
        assert kept(pipeline) == 0
        for found, expected in zip(on_host(pipeline), weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.asyncio
async def test_the_same_bits_on_every_run() -> None:
    """A strict order on one device: two runs from the same weights end in the same weights."""
    found = []
    for _ in range(2):
        async with await built(["cuda:0"] * 3, rule("1f1b")) as pipeline, asyncio.timeout(60):
            async for _ in pipeline.run(samples()):
                pass
            found.append(on_host(pipeline))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.asyncio
async def test_event_order_learns_from_everything_and_lets_go() -> None:
    """Several runs of one opening: memory on the device does not grow, and is given back at the end."""
    pipeline = await built(["cuda:0"] * 3, rule("event"), stages_of(3, width=512))
    async with pipeline, asyncio.timeout(120):
        levels = []
        for _ in range(4):
            async for pred in pipeline.run(samples()):
                assert pred.delay is not None and all(d <= 2 - k for k, d in enumerate(pred.delay))
            await pipeline.drain()
            pipeline.resume()
            assert kept(pipeline) == 0
            torch.cuda.synchronize()
            levels.append(torch.cuda.memory_allocated())
        assert max(levels[1:]) <= levels[1] * 1.1


@pytest.mark.asyncio
async def test_old_weights_are_stashed_and_new_ones_are_current() -> None:
    """The two differ on the device as on the host: a middle stage sends gradients down through one or the other."""
    found = {}
    for weights in ("stashed", "current"):
        async with await built(["cuda:0"] * 3, rule("lockstep", weights=weights)) as pipeline, asyncio.timeout(60):
            async for _ in pipeline.run(samples()):
                pass
            found[weights] = on_host(pipeline)
    assert not all(torch.equal(a, b) for a, b in zip(found["stashed"], found["current"], strict=True))


@pytest.mark.asyncio
async def test_weights_are_replaced_between_two_frames() -> None:
    """Under load, while streams are busy: frames behind see the new weights, learning goes on from them."""
    async with await built(["cuda:0"] * 2, rule("1f1b", optimizer=partial(torch.optim.SGD, lr=0.0))) as pipeline:
        async with asyncio.timeout(60):
            first, second = samples()[:20], samples()[20:]
            before = [pred.output async for pred in pipeline.run(first)]
            state = {key: value.cpu() * 0.5 for key, value in pipeline.state_dict().items()}
            loading = asyncio.ensure_future(pipeline.load_state_dict(state))
            await asyncio.sleep(0)
            after = [pred.output async for pred in pipeline.run(second)]
            await loading
            parts = stages_of(2)
            for part in parts:
                part.load_state_dict({key: value * 0.5 for key, value in part.state_dict().items()})
            with torch.no_grad():
                expected = [parts[1](parts[0](sample.input)) for sample in second]
        assert len(before) == 20
        for output, wanted in zip(after, expected, strict=True):
            torch.testing.assert_close(output, wanted)


@pytest.mark.asyncio
async def test_a_late_target_and_its_loss() -> None:
    """The loss comes back as a number of the host, the one that plain PyTorch gives."""
    async with await built(["cuda:0"] * 2, rule("event")) as pipeline, asyncio.timeout(60):
        (x, *_), (y, *_) = data()
        pred = await pipeline.submit(Sample(x, LATER, key="k"))
        assert pred.loss is None
        loss = await pipeline.feedback("k", y)
        assert loss == pytest.approx(float(functional.cross_entropy(pred.output, y)))
        assert kept(pipeline) == 0


@pytest.mark.asyncio
async def test_frames_without_a_target_in_between() -> None:
    """Predicted in eval mode without a graph; their neighbours are learned from as if they were not there."""
    parts = stages_of(2)
    losses, _ = reference(parts, [0, 0])
    async with await built(["cuda:0"] * 2, rule("exact"), parts) as pipeline, asyncio.timeout(60):
        mixed = [each for sample in samples() for each in (sample, sample.input)]
        preds = [pred async for pred in pipeline.run(mixed)]
        assert [pred.loss for pred in preds[::2]] == pytest.approx(losses, rel=1e-8)
        assert all(pred.loss is None for pred in preds[1::2])


@pytest.mark.asyncio
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
async def test_mixed_precision(precision: torch.dtype) -> None:
    """Masters stay in single precision, and the loss goes down."""
    parts = [part.float() for part in stages_of(2)]
    xs, ys = data()
    same = [Sample(xs[0].float(), ys[0])] * FRAMES
    async with await built(["cuda:0"] * 2, rule("event", precision=precision), parts) as pipeline:
        async with asyncio.timeout(60):
            preds = [pred async for pred in pipeline.run(same)]
    assert preds[-1].loss is not None and preds[0].loss is not None
    assert preds[-1].loss < preds[0].loss
    assert {tensor.dtype for tensor in pipeline.state_dict().values()} == {torch.float32}


@pytest.mark.asyncio
async def test_a_planned_model_opened_twice() -> None:
    """Weights made by one opening are used, and replaced, by the streams of the next."""
    model = nn.Sequential(*[layer for part in stages_of(3) for layer in part])
    pipeline = await asyncio.to_thread(
        Pipeline,
        model,
        example=data()[0][0],
        devices=["cuda:0"] * 3,
        balance=[3, 3, 3],
        learner=rule("1f1b"),
    )
    async with asyncio.timeout(120):
        first = [pred.loss async for pred in pipeline.run(samples())]
        second = [pred.loss async for pred in pipeline.run(samples())]
    losses, _ = reference(stages_of(3), [2, 1, 0])
    assert first == pytest.approx(losses, rel=1e-8)
    assert sum(value for value in second if value) < sum(losses)

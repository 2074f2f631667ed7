"""Learning through an open pipeline: no wake-up lost, no frame learned from twice or never, nothing left behind.

Stages are a weight or two, so that a run is all hand-over and no work: what goes wrong between threads shows here.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime import LATER, Pipeline, Sample, Stage
from aiotime.devices import worker as worker_module
from aiotime.errors import FeedbackError, InputError, SourceError, StageError
from aiotime.learning import Delayed, Exact
from aiotime.learning.learner import StageLearner
from aiotime.learning.rule import Rule
from tests.learning.reference import fifo, pieces, ribbon, stream

if TYPE_CHECKING:
    from tests.conftest import Settle

SGD = partial(torch.optim.SGD, lr=0.01)
LAYOUTS: dict[str, list[str]] = {
    "four threads": ["cpu:0", "cpu:1", "cpu:2", "cpu:3"],
    "two threads": ["cpu:0", "cpu:1", "cpu:0", "cpu:1"],
    "two halves": ["cpu:0", "cpu:0", "cpu:1", "cpu:1"],
    "one thread": ["cpu:0"] * 4,
    "inline": ["inline"] * 4,
    "inline and threads": ["inline", "cpu:0", "inline", "cpu:1"],
    "threads and inline": ["cpu:0", "inline", "cpu:0", "inline"],
}
on_asyncio = pytest.mark.asyncio(loop_factories=["asyncio"])  # where the loop makes no difference
on_both = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def no_second_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that missed its bell would be woken by its look at the main thread: not here."""
    monkeypatch.setattr(worker_module, "ORPHAN_CHECK", 1000.0)


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns in the middle of everything."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-6)
    yield
    sys.setswitchinterval(before)


class Scale(nn.Module):
    """y = w x."""

    def __init__(self, w: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), w))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x


class Raising(torch.autograd.Function):
    """Identity; its backward raises where the value is negative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        if (x < 0).any():
            raise ValueError("no gradient for the negative")
        return grad


class Touchy(Scale):
    """Its forward raises at 13, its backward at negative values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x == 13).any():
            raise ValueError("not 13")
        y: torch.Tensor = Raising.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return y


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).sum()


def rule(order: str = "event", **settings: Any) -> Rule:
    settings = {"loss": loss, "optimizer": partial(torch.optim.SGD, lr=1e-3), **settings}
    return Exact(**settings) if order == "exact" else Delayed(order=order, **settings)  # type: ignore[arg-type]


ORDERS = ["event", "1f1b", "lockstep", "exact"]
orders = pytest.mark.parametrize("order", ORDERS)


async def chain(devices: list[str], learner: Rule, module: Callable[[], nn.Module] = Scale, **options: Any) -> Pipeline:
    stages = [Stage(module(), device=device, name=f"s{k}") for k, device in enumerate(devices)]
    return await asyncio.to_thread(Pipeline.from_stages, stages, learner=learner, **options)


def hands(pipeline: Pipeline) -> list[StageLearner]:
    return [spec.hands for spec in pipeline._specs if isinstance(spec.hands, StageLearner)]


def learned(pipeline: Pipeline) -> list[int]:
    return [each.learned for each in hands(pipeline)]


def samples(count: int, *, targets: Callable[[int], float | None] = float) -> list[Sample]:
    """x = 1 with target i, or without where ``targets`` gives None."""
    found = []
    for i in range(count):
        target = targets(i)
        found.append(Sample(torch.ones(1), None if target is None else torch.tensor([target / count])))
    return found


async def taken(run: Any) -> list[Any]:
    return [pred async for pred in run]


def check_nothing_kept(pipeline: Pipeline) -> None:
    assert not any(each.kept for each in hands(pipeline))


# ---------------------------------------------------------------------- no wake-up is lost


@on_asyncio
@pytest.mark.parametrize(
    ("order", "layout"),
    [("event", layout) for layout in LAYOUTS]
    + [(order, layout) for order in ("1f1b", "exact") for layout in ("four threads", "inline and threads")],
)
async def test_many_short_frames(order: str, layout: str, hasty_threads: None) -> None:
    """Every frame comes out in order and is learned from once by every stage, over two runs of one opening."""
    async with await chain(LAYOUTS[layout], rule(order)) as pipeline, asyncio.timeout(40):
        for run in range(2):
            preds = await taken(pipeline.run(samples(100)))
            assert [pred.index for pred in preds] == list(range(100))
            assert learned(pipeline) == [100 * (run + 1)] * 4
            check_nothing_kept(pipeline)


@on_asyncio
@pytest.mark.parametrize("layout", ["four threads", "threads and inline"])
async def test_some_thousand_short_frames(layout: str, hasty_threads: None) -> None:
    """The same for longer, in the order that asks what is ready first."""
    async with await chain(LAYOUTS[layout], rule("event")) as pipeline, asyncio.timeout(50):
        count = 0
        async for _ in pipeline.run(samples(500, targets=lambda i: None if i % 7 == 3 else float(i))):
            count += 1
        assert count == 500
        assert learned(pipeline) == [500 - len(range(3, 500, 7))] * 4


@on_both
@orders
async def test_two_hundred_clients(order: str) -> None:
    """Requests at once, with and without targets: all are answered, those with one are learned from by the end."""
    pipeline = await chain(LAYOUTS["two threads"], rule(order))
    async with pipeline, asyncio.timeout(30):

        async def client(i: int) -> float | None:
            pred = await pipeline.submit(Sample(torch.ones(1), torch.zeros(1) if i % 2 else None, key=i))
            assert pred.key == i
            return pred.loss

        losses = await asyncio.gather(*(client(i) for i in range(200)))
        assert [value is not None for value in losses] == [i % 2 == 1 for i in range(200)]
        await pipeline.drain()
        assert learned(pipeline) == [100] * 4
        check_nothing_kept(pipeline)


@on_asyncio
async def test_opening_and_closing_many_times() -> None:
    """Each opening begins anew and goes on learning; what was in flight at a hard close is let go."""
    pipeline = await chain(LAYOUTS["two threads"], rule("lockstep"))
    async with asyncio.timeout(40):
        for turn in range(20):
            async with pipeline:
                if turn % 2:
                    await taken(pipeline.run(samples(5)))
                else:
                    for _ in range(3):
                        await pipeline.submit(samples(1)[0])
            check_nothing_kept(pipeline)
    assert learned(pipeline)[3] >= 10 * 5
    assert learned(pipeline)[0] >= 10 * 5


# ---------------------------------------------------------------------- the same bits as without a pipeline


@on_asyncio
@pytest.mark.parametrize("layout", ["inline and threads", "two halves"])
@pytest.mark.parametrize(("order", "delays"), [("1f1b", [3, 2, 1, 0]), ("lockstep", [6, 4, 2, 0]), ("exact", [0] * 4)])
async def test_strict_orders_equal_gradients_through_queues(layout: str, order: str, delays: list[int]) -> None:
    """Losses, weights and delays on mixed devices are those of plain training with queues between the gradients."""
    model, balance = ribbon(4), [2, 2, 2, 2]
    frames, targets = stream(30)
    adam = partial(torch.optim.Adam, lr=0.01)
    expected, state = fifo(pieces(ribbon(4), balance), frames, targets, functional.cross_entropy, adam, delays)
    pipeline = await asyncio.to_thread(
        Pipeline,
        model,
        example=frames[0],
        devices=LAYOUTS[layout],
        balance=balance,
        learner=rule(order, loss=functional.cross_entropy, optimizer=adam),
    )
    async with asyncio.timeout(30):
        preds = await taken(pipeline.run([Sample(x, y) for x, y in zip(frames, targets, strict=True)]))
    assert [pred.loss for pred in preds] == expected
    assert [pred.delay for pred in preds] == [tuple(min(i, d) for d in delays) for i in range(30)]
    found = pipeline.state_dict()
    assert all(torch.equal(found[key], value) for key, value in zip(found, state.values(), strict=True))


class Counting(torch.optim.SGD):
    """Writes down its updates among the forwards of its stage."""

    def __init__(self, params: Any, log: list[str]) -> None:
        super().__init__(params, lr=0.01)
        self.log = log

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.log.append("update")
        super().step()


class Tagged(Scale):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append("forward")
        return super().forward(x)


@on_asyncio
@orders
@pytest.mark.parametrize("layout", ["four threads", "one thread", "inline"])
async def test_the_delay_told_is_the_true_one(order: str, layout: str) -> None:
    """Counted: frames that went forward at the stage so far, less the updates that had been made there."""
    logs: list[list[str]] = [[] for _ in range(4)]
    learner = rule(order, optimizer=[partial(Counting, log=log) for log in logs])
    stages = [Stage(Tagged(logs[k]), device=device) for k, device in enumerate(LAYOUTS[layout])]
    pipeline = await asyncio.to_thread(Pipeline.from_stages, stages, learner=learner)
    async with asyncio.timeout(20):
        preds = await taken(pipeline.run(samples(25, targets=lambda i: None if i % 5 == 4 else float(i))))
    for k, log in enumerate(logs):
        with_target = [pred.index % 5 != 4 for pred in preds]
        forwards = updates = before = 0
        told = []
        for entry in log:
            if entry == "update":
                updates += 1
            else:
                told.append(before - updates)
                before += with_target[forwards]
                forwards += 1
        assert [pred.delay[k] for pred in preds] == told
        assert updates == sum(with_target)


# ---------------------------------------------------------------------- what is data and what is not


@on_asyncio
@orders
async def test_warm_up_and_predictions_train_nothing(order: str) -> None:
    """Copies of the example, and frames without a target: weights and statistics are the very same afterwards."""
    with pytest.warns(UserWarning, match="BatchNorm1d"):
        pipeline = await asyncio.to_thread(
            Pipeline,
            nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)),
            example=torch.zeros(4, 2),
            devices=["cpu:0", "cpu:1"],
            balance=[2, 2],
            warm_up=5,
            learner=rule(order, loss=lambda output: output.sum()) if order == "event" else rule(order),
        )
    before = pipeline.state_dict()
    async with pipeline, asyncio.timeout(20):
        if order != "event":  # there every real frame is learned from
            preds = await taken(pipeline.run([torch.randn(4, 2) for _ in range(8)]))
            assert all(pred.loss is None for pred in preds)
    after = pipeline.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert learned(pipeline) == [0, 0]
    assert all(each.updater is not None and each.updater.updates == 0 for each in hands(pipeline))


@on_asyncio
@orders
async def test_draining_learns_from_each_sample_once(order: str, settle: Settle) -> None:
    """Whatever was accepted when the drain began is learned from in every stage by its end, and no sample twice."""
    seen: list[list[float]] = [[], []]

    class Noting(Scale):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.k = k

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            if y.requires_grad:
                value = float(x) if self.k == 0 else 0.0
                y.register_hook(lambda grad: seen[self.k].append(value))  # type: ignore[no-untyped-call]
            return y

    stages = [Stage(Noting(k), device=f"cpu:{k}") for k in range(2)]
    pipeline = await asyncio.to_thread(Pipeline.from_stages, stages, learner=rule(order))
    async with pipeline, asyncio.timeout(20):
        source = [Sample(torch.tensor([float(i)]), torch.zeros(1)) for i in range(30)]
        run = pipeline.run(source, window=40)
        await anext(run)
        consumer = asyncio.ensure_future(taken(run))
        await pipeline.drain()
        preds = await consumer
        assert seen[0] == [float(i) for i in range(len(preds) + 1)]
        assert len(seen[1]) == len(preds) + 1
        pipeline.resume()
        await taken(pipeline.run(source[:3]))
        assert len(seen[0]) == len(preds) + 4


@on_both
async def test_a_strict_order_finishes_when_the_stream_idles(settle: Settle) -> None:
    """What was held back for alternation is learned from after ``idle`` seconds, without a further frame."""
    async with await chain(["cpu:0", "cpu:1"], rule("lockstep", idle=0.01)) as pipeline, asyncio.timeout(20):
        for _ in range(2):
            await pipeline.submit(samples(1)[0])
            await settle(until=lambda: learned(pipeline) in ([1, 1], [2, 2]))
        await settle(until=lambda: learned(pipeline) == [2, 2])
        check_nothing_kept(pipeline)


@on_asyncio
async def test_the_idle_timer_waits_for_quiet(settle: Settle) -> None:
    """It looks again as long as frames came meanwhile, and is gone when the pipeline is closed."""
    pipeline = await chain(["cpu:0", "cpu:1"], rule("1f1b", idle=1000.0))
    async with pipeline:
        await pipeline.submit(samples(1)[0])
        engine = pipeline._engine
        assert engine is not None and engine.course is not None
        course, timer = engine.course, engine.course._timer
        assert timer is not None
        timer.cancel()
        course._look(engine._flush_idle)  # too early: a new timer
        await settle(until=lambda: learned(pipeline) == [0, 1])
        assert course._timer is not None and course._timer is not timer
        course._timer.cancel()
        course.touched -= 1000.0
        course._look(engine._flush_idle)
        await settle(until=lambda: learned(pipeline) == [1, 1])
        await pipeline.submit(samples(1)[0])
    last = course._timer
    assert last.cancelled()
    course.quiet(engine._flush_idle)
    assert course._timer is last


# ---------------------------------------------------------------------- new weights between two frames


@on_asyncio
@orders
@pytest.mark.parametrize("layout", ["two threads", "inline"])
async def test_weights_loaded_between_two_frames(order: str, layout: str) -> None:
    """Frames before are learned from with the old weights, those behind meet the new, the optimizer goes on.

    With momentum m, one weight per stage and gradient g: the first step after loading is m v + g, not g alone.
    """
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    pipeline = await chain(LAYOUTS[layout][:2], rule(order, optimizer=momentum, loss=lambda output: output.sum()))
    async with pipeline, asyncio.timeout(20):
        first = await pipeline.submit(torch.ones(1))
        await pipeline.load_state_dict({"s0.w": torch.tensor([3.0]), "s1.w": torch.tensor([5.0])})
        assert learned(pipeline) == [1, 1]
        second = await pipeline.submit(torch.ones(1))
        await pipeline.drain()
        state = pipeline.state_dict()
    assert (float(first.output), float(second.output)) == (1.0, 15.0)
    # before: both gradients 1, so v = 1 in both; after: dw0 = w1 x = 5, dw1 = w0 x = 3
    assert state["s0.w"].item() == pytest.approx(3 - 0.1 * (0.5 * 1 + 5))
    assert state["s1.w"].item() == pytest.approx(5 - 0.1 * (0.5 * 1 + 3))


@on_asyncio
async def test_weights_loaded_into_a_planned_model_that_learns() -> None:
    """Through generated code as well, running or not, and again after updates."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    pipeline = await asyncio.to_thread(
        Pipeline, model, example=torch.zeros(1, 2), devices=["cpu:0", "cpu:1"], balance=[2, 1], learner=rule("event")
    )
    ones = {key: torch.ones_like(value) for key, value in pipeline.state_dict().items()}
    await pipeline.load_state_dict(ones)
    async with pipeline, asyncio.timeout(20):
        x = torch.ones(1, 2)
        for _ in range(2):
            expected = 2 * torch.tanh(torch.tensor(3.0)) + 1
            assert (await pipeline.submit(Sample(x, torch.zeros(1, 1)))).output.item() == pytest.approx(float(expected))
            await pipeline.submit(Sample(x, torch.zeros(1, 1)))
            await pipeline.load_state_dict(ones)
    assert all(torch.equal(value, ones[key]) for key, value in pipeline.state_dict().items())


# ---------------------------------------------------------------------- errors


@on_asyncio
@orders
@pytest.mark.parametrize("layout", ["four threads", "inline and threads"])
async def test_failing_frames_are_skipped_and_the_others_learned_from(order: str, layout: str) -> None:
    """Forwards that raise, losses that raise, backwards that raise: told or skipped, and nothing is kept of them."""

    def picky(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.item() == 0.5:
            raise ValueError("this target is no good")
        return loss(output, target)

    values = [13.0 if i % 7 == 2 else -1.0 if i % 7 == 4 else 1.0 for i in range(42)]
    targets = [0.5 if i % 7 == 6 else 0.0 for i in range(42)]
    source = [Sample(torch.tensor([v]), torch.tensor([t])) for v, t in zip(values, targets, strict=True)]
    learner = rule(order, loss=picky, optimizer=partial(torch.optim.SGD, lr=0.0))
    async with await chain(LAYOUTS[layout], learner, Touchy) as pipeline, asyncio.timeout(30):
        preds = await taken(pipeline.run(source, on_error="skip"))
        good = [i for i in range(42) if i % 7 not in (2, 6)]
        assert [pred.index for pred in preds] == good
        # the backward raises in the topmost stage: below it those frames are lost, without a further word
        assert learned(pipeline) == [42 - 3 * 6] * 4
        assert pipeline._engine is not None and pipeline._engine.course is not None
        assert pipeline._engine.course.failed == 6
        check_nothing_kept(pipeline)
        assert (await pipeline.submit(source[0])).loss is not None


@on_both
@orders
async def test_a_backward_that_raises_ends_the_run_once(order: str) -> None:
    """With stage, frame and cause, behind the frames that were predicted before; the next run is fine."""
    source = [Sample(torch.tensor([-1.0 if i in (5, 7) else 1.0]), torch.zeros(1)) for i in range(12)]
    async with await chain(["cpu:0", "cpu:1"], rule(order), Touchy) as pipeline, asyncio.timeout(20):
        run = pipeline.run(source)
        indices: list[int] = []
        said = "learning from frame 5 failed at stage 's1': ValueError: no gradient"
        with pytest.raises(StageError, match=said) as told:
            async for pred in run:
                indices.append(pred.index)  # noqa: PERF401 - what came before the error counts
        assert told.value.frame == 5 and isinstance(told.value.__cause__, ValueError)
        assert indices[:6] == list(range(6))
        with pytest.raises(StopAsyncIteration):
            await anext(run)
        assert len(await taken(pipeline.run(source[:4]))) == 4
        await pipeline.drain()
        check_nothing_kept(pipeline)


@on_asyncio
async def test_a_backward_that_raises_at_the_very_end_is_told() -> None:
    """In a strict order the last frames are learned from when the stream has ended; errors are still the run's."""
    source = [Sample(torch.tensor([-1.0 if i == 3 else 1.0]), torch.zeros(1)) for i in range(4)]
    stages: list[nn.Module] = [Touchy(), Scale(-1.0)]
    made = [Stage(stage, device=f"cpu:{k}", name=f"s{k}") for k, stage in enumerate(stages)]
    pipeline = await asyncio.to_thread(Pipeline.from_stages, made, learner=rule("lockstep"))
    async with asyncio.timeout(20):
        indices: list[int] = []
        with pytest.raises(StageError, match="learning from frame 3 failed at stage 's0'"):
            async for pred in pipeline.run(source):
                indices.append(pred.index)  # noqa: PERF401 - what came before the error counts
        assert indices == [0, 1, 2, 3]


@on_asyncio
async def test_a_stages_own_policy_holds_for_its_backward() -> None:
    """``on_error="skip"`` at the stage: a backward that raises there does not end the run."""
    stage = Stage(Touchy(), device="cpu:0", name="s0", on_error="skip")
    pipeline = await asyncio.to_thread(Pipeline.from_stages, [stage], learner=rule("event"))
    source = [Sample(torch.tensor([v]), torch.zeros(1)) for v in (1.0, -1.0, 13.0, 1.0)]
    async with asyncio.timeout(20):
        assert [pred.index for pred in await taken(pipeline.run(source))] == [0, 1, 3]


@on_asyncio
@orders
async def test_an_optimizer_that_raises_is_told_and_forwards_go_on(order: str) -> None:
    """The weights that are read stay those that are updated."""

    class Fails(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            Fails.calls += 1
            if Fails.calls == 2:
                raise ValueError("the second update fails")
            super().step()

    pipeline = await chain(["cpu:0"], rule(order, optimizer=partial(Fails, lr=0.1)))
    async with pipeline, asyncio.timeout(20):
        assert len(await taken(pipeline.run(samples(6), on_error="skip"))) == 6
        (mine,) = hands(pipeline)
        assert torch.equal(mine.weights.masters[0], mine.weights.working[0])
        assert Fails.calls == 6


@on_asyncio
@orders
async def test_a_source_that_raises(order: str) -> None:
    """What it gave is learned from, then its error comes; the pipeline serves on."""

    async def source() -> AsyncIterator[Sample]:
        for sample in samples(7):
            yield sample
        raise OSError("the camera is gone")

    async with await chain(["cpu:0", "cpu:1"], rule(order)) as pipeline, asyncio.timeout(20):
        count = 0
        with pytest.raises(SourceError, match="the camera is gone"):
            async for _ in pipeline.run(source()):
                count += 1
        assert count == 7
        await taken(pipeline.run(samples(3)))
        assert learned(pipeline) == [10, 10]


@on_asyncio
@orders
@pytest.mark.parametrize("leaves", ["break", "error"])
async def test_a_consumer_that_leaves_in_the_middle(order: str, leaves: str) -> None:
    """Frames of a run that was left are passed over; a later run is complete, and nothing is kept in the end."""

    def endless() -> Iterator[Sample]:
        while True:
            yield samples(1)[0]

    async with await chain(LAYOUTS["two threads"], rule(order)) as pipeline, asyncio.timeout(20):
        for _ in range(5):
            try:
                async with pipeline.run(endless()) as run:
                    async for pred in run:
                        if pred.index == 9:
                            if leaves == "error":
                                raise KeyError("mine")
                            break
            except KeyError:
                pass
        before = learned(pipeline)
        assert len(await taken(pipeline.run(samples(10)))) == 10
        assert min(learned(pipeline)) >= 5 * 10 + 10
        assert min(learned(pipeline)) >= min(before) + 10
        check_nothing_kept(pipeline)
    with pytest.raises(KeyError):  # nobody opened it: the run closes it
        async with pipeline.run(samples(10)) as run:
            async for _ in run:
                raise KeyError("mine")
    assert pipeline._engine is None
    check_nothing_kept(pipeline)


@on_both
@orders
async def test_closing_in_full_flight(order: str) -> None:
    """Consumers are told, threads end, no graph is left."""
    pipeline = await chain(LAYOUTS["four threads"], rule(order))
    async with asyncio.timeout(20):
        for _ in range(5):
            async with pipeline:
                run = pipeline.run(samples(1000))
                for _ in range(3):
                    await anext(run)
                requests = [asyncio.ensure_future(pipeline.submit(samples(1)[0])) for _ in range(20)]
                await asyncio.sleep(0)
                await pipeline.aclose()
                await asyncio.gather(*requests, return_exceptions=True)
                await run.aclose()
            check_nothing_kept(pipeline)


@on_asyncio
async def test_no_activation_outlives_its_run() -> None:
    """Weak references to what crossed the cut are dead after the run, with the pipeline still open."""
    refs: list[weakref.ref[torch.Tensor]] = []

    class Watching(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            refs.append(weakref.ref(y))
            return y

    async with await chain(["cpu:0", "cpu:1"], rule("lockstep"), Watching) as pipeline, asyncio.timeout(20):
        await taken(pipeline.run(samples(20)))
        gc.collect()
        assert len(refs) == 40
        assert [ref for ref in refs if ref() is not None] == []


# ---------------------------------------------------------------------- stages that only compute


@on_asyncio
@orders
@pytest.mark.parametrize("devices", [["cpu:0"] * 3, ["cpu:0", "cpu:1", "cpu:0"], ["inline"] * 3], ids=str)
async def test_frozen_stages_below_share_a_thread_with_learning_ones(order: str, devices: list[str]) -> None:
    """In a strict order a job that waits would hold up the very stage it waits for; and modes are the frame's."""
    bottom = nn.Sequential(Scale(), nn.Dropout(0.5)).requires_grad_(False)
    stages = [Stage(bottom, device=devices[0], name="bottom", timeout=10.0)]
    stages += [Stage(Scale(), device=device) for device in devices[1:]]
    pipeline = await asyncio.to_thread(Pipeline.from_stages, stages, learner=rule(order))
    x = torch.ones(64)
    async with pipeline, asyncio.timeout(20):
        async for pred in pipeline.run([Sample(x, x if i % 3 else None) for i in range(30)]):
            assert bool((pred.output == 0).any()) is (pred.index % 3 != 0)
        assert learned(pipeline) == [0, 20, 20]
        await pipeline.load_state_dict(pipeline.state_dict())


@on_asyncio
async def test_a_decoder_of_several_workers_below() -> None:
    """A function with workers of its own stays what it is."""
    threads = set()

    def decode(i: int) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        return torch.full((1,), float(i))

    stages = [Stage(decode, device="cpu:0", workers=3, name="decode"), Stage(Scale(), device="cpu:0")]
    pipeline = await asyncio.to_thread(Pipeline.from_stages, stages, learner=rule("1f1b"))
    async with asyncio.timeout(20):
        preds = await taken(pipeline.run([Sample(i, torch.zeros(1)) for i in range(20)]))
    assert len(preds) == 20
    assert learned(pipeline) == [20]


# ---------------------------------------------------------------------- targets that come later


@on_both
@pytest.mark.parametrize("layout", ["two threads", "inline"])
async def test_late_targets_while_frames_flow(layout: str) -> None:
    """Each is learned from when it comes, in whatever order; those that never come are let go."""
    async with await chain(LAYOUTS[layout][:2], rule("event", late=8)) as pipeline, asyncio.timeout(20):
        source = [Sample(torch.ones(1), LATER if i % 2 else torch.zeros(1), key=i) for i in range(40)]
        told: dict[int, float] = {}

        async def answer(key: int) -> None:
            told[key] = await pipeline.feedback(key, torch.zeros(1))

        run = pipeline.run(source, window=4)
        answers = [asyncio.ensure_future(answer(pred.index)) async for pred in run if pred.index % 4 == 3]
        await asyncio.gather(*answers)
        assert learned(pipeline) == [30, 30]
        assert sorted(told) == list(range(3, 40, 4))
        await pipeline.submit(samples(1)[0])  # a stage forgets with its next job
        with pytest.raises(FeedbackError, match="given up after 8 newer ones"):
            await pipeline.feedback(1, torch.zeros(1))
    check_nothing_kept(pipeline)


@on_asyncio
async def test_a_late_target_after_the_end_is_refused() -> None:
    """Where the streams have ended nobody would ever answer: an error, not a wait."""
    pipeline = await chain(["cpu:0", "cpu:1"], rule("event"))
    async with pipeline, asyncio.timeout(20):
        await pipeline.submit(Sample(torch.ones(1), LATER, key="k"))
        engine = pipeline._engine
        assert engine is not None and engine.course is not None
        course = engine.course
        for stream in engine.streams:
            stream.close()
        with pytest.raises(FeedbackError, match="the pipeline has ended"):
            await course.feedback("k", torch.zeros(1))


@on_asyncio
async def test_closing_with_a_late_target_under_way() -> None:
    """Whoever waits for it is told, and nothing is kept for the others."""
    gate = threading.Event()

    class Gated(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if (x == 13).any():
                gate.wait(10)
            return super().forward(x)

    pipeline = await chain(["cpu:0", "cpu:1"], rule("event"), Gated)
    async with asyncio.timeout(20):
        async with pipeline:
            await pipeline.submit(Sample(torch.ones(1), LATER, key="never"))
            await pipeline.submit(Sample(torch.ones(1), LATER, key="k"))
            stuck = asyncio.ensure_future(pipeline.submit(torch.tensor([13.0])))
            await asyncio.sleep(0)
            waiting = asyncio.ensure_future(pipeline.feedback("k", torch.zeros(1)))
            await asyncio.sleep(0)
            closing = asyncio.ensure_future(pipeline.aclose())
            await asyncio.sleep(0)
            gate.set()
            await closing
            await asyncio.gather(stuck, return_exceptions=True)
            outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
            assert isinstance(outcome, float | FeedbackError | aiotime.errors.ClosedError)
    check_nothing_kept(pipeline)


@on_asyncio
async def test_a_late_target_of_a_failed_frame() -> None:
    """Its forward had failed: the feedback says so, and names it."""
    async with await chain(["cpu:0", "cpu:1"], rule("event"), Touchy) as pipeline, asyncio.timeout(20):
        with pytest.raises(StageError):
            await pipeline.submit(Sample(torch.tensor([13.0]), LATER, key="k"))
        with pytest.raises(FeedbackError, match=r"with key 'k' could not be learned from: .*not 13"):
            await pipeline.feedback("k", torch.zeros(1))
        with pytest.raises(InputError, match="found by its key"):
            await pipeline.submit(Sample(torch.ones(1), LATER))


# ---------------------------------------------------------------------- cancelled anywhere


class Interrupted:
    """Awaits a coroutine and cancels the task that it runs in at its k-th suspension."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], k: int) -> None:
        self.coroutine, self.k = coroutine, k

    def __await__(self) -> Generator[Any, Any, None]:
        task = asyncio.current_task()
        assert task is not None
        error: BaseException | None = None
        for suspensions in itertools.count(1):
            try:
                future = self.coroutine.send(None) if error is None else self.coroutine.throw(error)
            except StopIteration:
                return
            if suspensions == self.k:
                task.cancel()
            try:
                yield future
                error = None
            except BaseException as thrown:  # handed to the coroutine
                error = thrown


async def for_every_k(scenario: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run the scenario cancelled at every suspension; returns how many there were."""

    async def interrupted(k: int) -> None:
        await Interrupted(scenario(), k)

    for k in range(1, 200):
        task = asyncio.ensure_future(interrupted(k))
        await asyncio.wait([task], timeout=20)
        assert task.done(), f"hung after a cancellation at suspension {k}"
        if not task.cancelled():
            task.result()
            return k
    raise AssertionError("more than 200 suspensions")


@on_both
@orders
async def test_a_consumer_cancelled_anywhere(order: str) -> None:
    """Also in the wait for the last backwards at the end of the stream: the next run is whole, nothing is kept."""
    async with await chain(["cpu:0", "cpu:1"], rule(order)) as pipeline:

        async def scenario() -> None:
            async with pipeline.run(samples(6), window=2) as run:
                async for _ in run:
                    pass

        assert await for_every_k(scenario) > 3
        before = learned(pipeline)
        async with asyncio.timeout(20):
            assert len(await taken(pipeline.run(samples(5)))) == 5
        assert min(learned(pipeline)) >= min(before) + 5
        check_nothing_kept(pipeline)


@on_both
async def test_feedback_cancelled_anywhere(settle: Settle) -> None:
    """Nobody waits any more, but what has begun goes on: the frame is learned from once, or its target is still due."""
    async with await chain(["cpu:0", "cpu:1"], rule("event")) as pipeline:
        given = 0

        async def scenario() -> None:
            nonlocal given
            given += 1
            await asyncio.shield(asyncio.ensure_future(pipeline.submit(Sample(torch.ones(1), LATER, key=given))))
            await pipeline.feedback(given, torch.zeros(1))

        assert await for_every_k(scenario) >= 2
        async with asyncio.timeout(20):
            for key in range(1, given + 1):
                try:
                    await pipeline.feedback(key, torch.zeros(1))
                except FeedbackError:
                    pass  # it was given
            await settle(until=lambda: learned(pipeline) == [given, given])
        check_nothing_kept(pipeline)


@on_both
@orders
async def test_loading_weights_cancelled_anywhere(order: str) -> None:
    """Between learned frames: the swap is whole, and learning goes on from it."""
    async with await chain(["cpu:0", "cpu:1"], rule(order)) as pipeline:

        async def scenario() -> None:
            await asyncio.shield(asyncio.ensure_future(pipeline.submit(samples(1)[0])))
            await pipeline.load_state_dict({"s0.w": torch.tensor([3.0]), "s1.w": torch.tensor([3.0])})

        assert await for_every_k(scenario) >= 2
        async with asyncio.timeout(20):
            await pipeline.drain()
            state = pipeline.state_dict()
            assert state["s0.w"].item() == pytest.approx(3.0, abs=0.2)
            assert state["s1.w"].item() == pytest.approx(3.0, abs=0.2)
        check_nothing_kept(pipeline)

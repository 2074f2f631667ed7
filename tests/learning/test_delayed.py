"""Delayed: the same losses and weights as a sequential network whose gradients wait in queues."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import ConfigurationError, StageError
from aiotime.learning import Delayed
from aiotime.learning.corrections import (
    DelayScaling,
    DiscrepancyCorrection,
    GapAware,
    HybridFinish,
    LearningRateRescheduling,
    SpikeCompensation,
    WeightPrediction,
)
from aiotime.learning.delayed import DelayedLearner
from aiotime.learning.learner import Site
from aiotime.learning.ticket import Ticket
from tests.learning.reference import fifo, pieces, ribbon, stream

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01),
}
ORDERS: dict[str, Callable[[int, int], int]] = {
    "1f1b": lambda k, stages: stages - 1 - k,
    "lockstep": lambda k, stages: 2 * (stages - 1 - k),
}
WEIGHTS: tuple[Literal["stashed", "current"], ...] = ("stashed", "current")
PATIENCE = 20.0

both_loops = pytest.mark.asyncio
one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


@dataclass
class Course:
    """What came of a run."""

    losses: list[float] = field(default_factory=list)
    delays: list[tuple[int, ...]] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    hands: list[Any] = field(default_factory=list)


async def learn(
    rule: Delayed,
    model: nn.Sequential,
    balance: Sequence[int],
    frames: Sequence[torch.Tensor],
    targets: Sequence[Any],
    *,
    devices: Sequence[Any] | None = None,
    watch: Callable[[list[Any]], None] | None = None,
    example: torch.Tensor | None = None,
) -> Course:
    """Run the whole stream through a pipeline that learns."""
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline,
        model,
        example=frames[0] if example is None else example,
        devices=list(devices or [f"cpu:{k}" for k in range(len(balance))]),
        balance=list(balance),
        learner=rule,
    )
    course = Course(hands=[spec.hands for spec in pipeline._specs])
    async with asyncio.timeout(PATIENCE):
        async for prediction in pipeline.run(map(aiotime.Sample, frames, targets)):
            assert prediction.loss is not None and prediction.delay is not None
            course.losses.append(prediction.loss)
            course.delays.append(prediction.delay)
            if watch is not None:
                watch(course.hands)
    course.state = pipeline.state_dict()
    return course


def rule_with(optimizer: str = "sgd", **settings: Any) -> Delayed:
    return Delayed(loss=functional.cross_entropy, optimizer=OPTIMIZERS[optimizer], **settings)


def same(course: Course, losses: Sequence[float], state: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return course.losses == losses and all(torch.equal(course.state[key], state[key]) for key in state)


def close(course: Course, losses: Sequence[float], state: dict[str, torch.Tensor]) -> None:
    """To rounding."""
    torch.testing.assert_close(course.losses, list(losses), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(course.state, state, rtol=1e-4, atol=1e-5)


class Load:
    """Seconds of virtual time for each job of a stage."""

    def __init__(self, forward: float, backward: float, weights: float = 0.0) -> None:
        self.seconds = {"forward": forward, "backward": backward, "weights": weights}

    def __call__(self, work: Any, frame: Any) -> float:
        return self.seconds[work.phase]


# ------------------------------------------------------------------------------------------------ against the queues


@one_loop
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weights", ["stashed", "current"])
async def test_strict_orders_equal_queues(weights: Any, order: Any) -> None:
    """Losses and final weights have the bits of the sequential reference, and each delay is the one promised."""
    frames, targets = stream(25)
    for stages, optimizer in itertools.product((2, 3, 4), OPTIMIZERS):
        delays = [ORDERS[order](k, stages) for k in range(stages)]
        parts, own = pieces(ribbon(stages), [2] * stages), OPTIMIZERS[optimizer]
        expected = fifo(parts, frames, targets, functional.cross_entropy, own, delays, weights=weights)
        rule = rule_with(optimizer, weights=weights, order=order)
        course = await learn(rule, ribbon(stages), [2] * stages, frames, targets)
        assert same(course, *expected), (stages, optimizer)
        assert course.delays[-1] == tuple(delays)
        assert course.delays[0] == (0,) * stages


@both_loops
async def test_where_stages_run_changes_nothing() -> None:
    """On the loop's thread, on one thread, or on shared ones: the same bits."""
    frames, targets = stream(20)
    parts = pieces(ribbon(3), [2] * 3)
    expected = fifo(parts, frames, targets, functional.cross_entropy, OPTIMIZERS["momentum"], [2, 1, 0])
    ways: list[dict[str, Any]] = [{}, {"split": True}, {"split": True, "recompute": True}]
    for devices, way in zip((["inline"] * 3, ["cpu:0"] * 3, ["cpu:0", "cpu:1", "cpu:0"]), ways, strict=True):
        for settings in ({}, way):
            rule = rule_with("momentum", order="1f1b", **settings)
            course = await learn(rule, ribbon(3), [2] * 3, frames, targets, devices=devices)
            assert same(course, *expected), (devices, settings)


@one_loop
async def test_simulated_devices_do_the_same() -> None:
    """In virtual time too, whatever the stages take."""
    frames, targets = stream(20)
    clock = VirtualClock()
    devices = [SimulatedDevice(k, seconds=Load(k + 1, 3 * k + 1, 2), clock=clock) for k in range(3)]
    parts = pieces(ribbon(3), [2] * 3)
    expected = fifo(parts, frames, targets, functional.cross_entropy, OPTIMIZERS["sgd"], [2, 1, 0])
    rule = rule_with(order="1f1b", split=True)
    course = await learn(rule, ribbon(3), [2] * 3, frames, targets, devices=devices)
    assert same(course, *expected)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weights": "current"},
    {"weights": "predicted"},
    {"weights": "predicted", "optimizer": "adam"},
    {"recompute": True},
    {"recompute": True, "weights": "current"},
    {"split": True},
    {"split": True, "recompute": True},
    {"corrections": [WeightPrediction("difference")]},
    {"corrections": [WeightPrediction()], "weights": "current"},
    {"corrections": [SpikeCompensation()], "optimizer": "momentum"},
    {"corrections": [LearningRateRescheduling(steps=10)]},
    {"corrections": [DelayScaling()]},
    {"corrections": [DiscrepancyCorrection()], "weights": "current"},
    {"corrections": [GapAware(), SpikeCompensation(), WeightPrediction(), DelayScaling()], "optimizer": "momentum"},
    {"corrections": [HybridFinish(after=5)]},
]


@one_loop
@pytest.mark.parametrize("order", ["event", "1f1b", "lockstep"])
async def test_one_stage_is_plain_training(order: Any) -> None:
    """With S = 1 there is no delay, so every option gives the bits of plain torch training."""
    frames, targets = stream(12)
    expected = {}
    for name, optimizer in OPTIMIZERS.items():
        plain, losses = ribbon(2), []
        own = optimizer(plain.parameters())
        for x, y in zip(frames, targets, strict=True):
            own.zero_grad()
            loss = functional.cross_entropy(plain(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            own.step()
            losses.append(loss.item())
        expected[name] = losses, plain.state_dict()
    for options in OPTIONS:
        settings = {**options}
        optimizer_name = settings.pop("optimizer", "sgd")
        rule = rule_with(optimizer_name, order=order, **settings)
        course = await learn(rule, ribbon(2), [4], frames, targets, devices=["inline"])
        assert same(course, *expected[optimizer_name]), options


def by_hand(frames: Sequence[torch.Tensor], targets: Sequence[Any], lr: float) -> list[float]:
    """Two stages (linear, tanh each), delay 1 at the first, current weights; every derivative written out."""
    model = ribbon(2)
    w1, b1, w2, b2 = (p.detach().clone() for p in model.parameters())
    waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    losses = []
    for x, y in zip(frames, targets, strict=True):
        if len(waiting) > 1:  # backward of stage 0, with the weights and biases that it has now
            x0, h0, delta, _, _ = waiting.pop(0)
            below = delta * (1 - h0**2)
            w1, b1 = w1 - lr * below.T @ x0, b1 - lr * below[0]
        h = torch.tanh(x @ w1.T + b1)
        out = torch.tanh(h @ w2.T + b2)
        p = torch.softmax(out, 1)
        losses.append(-torch.log(p[0, y[0]]).item())
        p[0, y[0]] -= 1
        top = p * (1 - out**2)
        waiting.append((x, h, top @ w2, w1, b1))
        w2, b2 = w2 - lr * top.T @ h, b2 - lr * top[0]
    return losses


@one_loop
async def test_current_weights_by_hand() -> None:
    """Two stages written out: a stage's own activation, its newest weights."""
    frames, targets = stream(20)
    course = await learn(rule_with(order="1f1b", weights="current"), ribbon(2), [2, 2], frames, targets)
    torch.testing.assert_close(course.losses, by_hand(frames, targets, 0.1), rtol=1e-4, atol=1e-5)


@one_loop
async def test_current_and_stashed_differ() -> None:
    """A stage of two layers sends a gradient down through its weights: those of the forward or the newest."""
    frames, targets = stream(20)
    found = {
        weights: await learn(rule_with(order="1f1b", weights=weights), ribbon(4), [4, 4], frames, targets)
        for weights in WEIGHTS
    }
    assert not same(found["stashed"], found["current"].losses, found["current"].state)
    for weights, course in found.items():
        parts = pieces(ribbon(4), [4, 4])
        expected = fifo(parts, frames, targets, functional.cross_entropy, OPTIMIZERS["sgd"], [1, 0], weights=weights)
        assert same(course, *expected)


# ------------------------------------------------------------------------------------------------ accumulation


@one_loop
async def test_accumulated_gradients() -> None:
    """Gradients of three frames are averaged into one update; what is left at the end is not thrown away."""
    frames, targets = stream(20)
    for weights in WEIGHTS:
        expected = fifo(
            pieces(ribbon(3), [2] * 3), frames, targets, functional.cross_entropy, OPTIMIZERS["adam"], [2, 1, 0],
            weights=weights, every=3,
        )  # fmt: skip
        rule = rule_with("adam", order="1f1b", weights=weights, update_every=3)
        course = await learn(rule, ribbon(3), [2] * 3, frames, targets)
        assert same(course, *expected), weights
        assert [hands.updater.gathered for hands in course.hands] == [2, 2, 2]


# ------------------------------------------------------------------------------------------------ the event order


@one_loop
async def test_event_order_is_never_later_than_promised() -> None:
    """Whatever the stages take, the weights of stage k lack at most S-1-k earlier frames; all are learned from."""
    frames, targets = stream(30)
    last = []
    for loads in ([1, 1, 1, 1], [4, 1, 1, 1], [1, 1, 1, 4], [1, 3, 0.5, 2]):
        clock = VirtualClock()
        devices = [SimulatedDevice(k, seconds=Load(load, 2 * load), clock=clock) for k, load in enumerate(loads)]
        course = await learn(rule_with(), ribbon(4), [2] * 4, frames, targets, devices=devices)
        assert all(delay <= 3 - k for delays in course.delays for k, delay in enumerate(delays)), loads
        assert [hands.learned for hands in course.hands] == [30] * 4
        last.append(course.delays[-1][0])
    assert last[0] == 3  # all equally busy
    assert last[1] < 3  # a slow first stage finds most gradients back before its next forward


@one_loop
async def test_a_stream_that_leaves_time_is_learned_exactly() -> None:
    """In event order a frame that comes after everything is learned meets no delay: plain training, bit for bit."""
    frames, targets = stream(10)
    parts = pieces(ribbon(3), [2] * 3)
    expected = fifo(parts, frames, targets, functional.cross_entropy, OPTIMIZERS["adam"], [0, 0, 0])
    for weights in ("stashed", "predicted", "current"):
        pipeline = await asyncio.to_thread(
            aiotime.Pipeline, ribbon(3), example=frames[0], devices=["cpu:0", "cpu:1", "cpu:0"], balance=[2] * 3,
            learner=rule_with("adam", weights=weights),
        )  # fmt: skip
        losses = []
        async with asyncio.timeout(PATIENCE), pipeline:
            for x, y in zip(frames, targets, strict=True):
                prediction = await pipeline.submit(aiotime.Sample(x, y))
                assert prediction.delay == (0, 0, 0)
                losses.append(prediction.loss)
                assert pipeline._engine is not None
                await pipeline._engine.flush()
        assert losses == expected[0], weights
        assert all(torch.equal(pipeline.state_dict()[key], expected[1][key]) for key in expected[1])


# ------------------------------------------------------------------------------------------------ memory


@one_loop
@pytest.mark.parametrize("order", ["event", "1f1b"])
async def test_no_more_versions_than_promised(order: Any) -> None:
    """While busy, stage k holds at most S-k graphs and versions of its weights; afterwards none."""
    stages = 4
    most = [0] * stages

    def watch(hands: list[Any]) -> None:
        for k, one in enumerate(hands):
            kept = list(one.kept.values())
            versions = {tensors[0].data_ptr() for tensors in [item.weights for item in kept] + [one.weights.working]}
            most[k] = max(most[k], len(versions), len(kept))

    frames, targets = stream(40)
    course = await learn(rule_with(order=order), ribbon(stages), [2] * stages, frames, targets, watch=watch)
    assert all(count <= stages - k + 1 for k, count in enumerate(most))  # one more while a backward is under way
    assert all(not hands.kept and hands.kept_nbytes() == 0 for hands in course.hands)


def test_no_copy_where_no_graph_reads_the_version() -> None:
    """An update moves the weights to new storage only if some kept graph reads the old one."""
    hands = stage_of(rule_with())
    first, second = tickets(2)
    x = torch.randn(1, 6)
    hands.forward(first, x)
    before = hands.weights.masters[0].data_ptr()
    hands.backward(first, None)
    assert hands.weights.masters[0].data_ptr() == before
    hands.forward(first, x)
    hands.forward(second, x)
    hands.backward(first, None)
    assert hands.weights.masters[0].data_ptr() != before


def stage_of(rule: Delayed, **site: Any) -> DelayedLearner:
    """Hands of the only stage, to be led by hand: two layers, a loss of its own."""
    model = site.pop("model", None) or ribbon(1)
    made = rule.stage(Site(0, 1, "only", model, [("", model)], **site))
    assert isinstance(made, DelayedLearner)
    return made


def tickets(count: int, *, delay: int = 0) -> list[Ticket]:
    """Frames of class 1."""
    made = [Ticket(at, 1, learn=True, target=torch.tensor([1])) for at in range(count)]
    for ticket in made:
        ticket.delays = [delay]
    return made


def test_versions_are_stated() -> None:
    """What a plan is told of the versions that a stage holds."""

    def of(**settings: Any) -> list[int]:
        return [rule_with(**settings).versions(k, 4) for k in range(4)]

    assert of() == of(order="1f1b") == of(recompute=True) == [4, 3, 2, 1]
    assert of(order="lockstep") == [7, 5, 3, 1]
    assert of(weights="current") == [1, 1, 1, 1]
    assert of(weights="predicted") == [5, 4, 3, 1]
    assert of(weights="double-buffered", update_every=4) == [2, 2, 2, 2]
    assert of(weights="current", corrections=[DiscrepancyCorrection()]) == [2, 2, 2, 2]


# ------------------------------------------------------------------------------------------------ two versions


def buffered(model: nn.Sequential, balance: list[int], frames: Any, targets: Any, optimizer: Any, m: int) -> Any:
    """PipeDream-2BW by its definition: mini-batch j goes forward and backward with version max(j-1, 0)."""
    parts = pieces(model, balance)
    optimizers = [optimizer(part.parameters()) for part in parts]
    params = list(model.parameters())
    versions = [[p.detach().clone() for p in params]]
    names = [name for name, _ in model.named_parameters()]
    losses, mean = [], [torch.zeros_like(p) for p in params]
    for n, (x, y) in enumerate(zip(frames, targets, strict=True)):
        used = [tensor.clone().requires_grad_() for tensor in versions[max(n // m - 1, 0)]]
        loss = functional.cross_entropy(torch.func.functional_call(model, dict(zip(names, used, strict=True)), (x,)), y)
        losses.append(loss.item())
        mean = [total + grad / m for total, grad in zip(mean, torch.autograd.grad(loss, used), strict=True)]
        if (n + 1) % m == 0:
            for p, grad in zip(params, mean, strict=True):
                p.grad = grad
            for own in optimizers:
                own.step()
            versions.append([p.detach().clone() for p in params])
            mean = [torch.zeros_like(p) for p in params]
    return losses, model.state_dict()


@one_loop
@pytest.mark.parametrize("order", ["event", "1f1b", "lockstep"])
async def test_double_buffered(order: Any) -> None:
    """W(t+1) = W(t) - ν∇f(W(t-1)): every stage one update late, even where the order depends on timing."""
    frames, targets = stream(26)
    for (stages, m), optimizer in itertools.product([(1, 2), (2, 2), (3, 4)], OPTIMIZERS):
        expected = buffered(ribbon(stages), [2] * stages, frames, targets, OPTIMIZERS[optimizer], m)
        rule = rule_with(optimizer, weights="double-buffered", update_every=m, order=order)
        course = await learn(rule, ribbon(stages), [2] * stages, frames, targets)
        close(course, *expected)
        lacking = [n if n < m else m + n % m for n in range(26)]  # updates of so many earlier frames
        assert course.delays == [(count,) * stages for count in lacking]


@one_loop
async def test_double_buffered_goes_on_after_a_failure() -> None:
    """A frame that fails is no part of a mini-batch: the next one takes its place, at every stage alike."""
    frames, targets = stream(24)
    bad = 9
    targets[bad] = torch.tensor([7])  # no such class
    rule = rule_with(weights="double-buffered", update_every=3, order="1f1b")
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline, ribbon(3), example=frames[0], devices=["cpu:0", "cpu:1", "cpu:0"], balance=[2] * 3,
        learner=rule,
    )  # fmt: skip
    stream_of = map(aiotime.Sample, frames, targets)
    async with asyncio.timeout(PATIENCE):
        losses = [prediction.loss async for prediction in pipeline.run(stream_of, on_error="skip")]
    good = [at for at in range(24) if at != bad]
    expected = buffered(
        ribbon(3), [2] * 3, [frames[at] for at in good], [targets[at] for at in good], OPTIMIZERS["sgd"], 3
    )
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-5)
    assert [spec.hands.updater.updates for spec in pipeline._specs] == [7, 7, 7]  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ prediction


@one_loop
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
async def test_predicted(optimizer: str) -> None:
    """A forward reads θ - D·η·v, and its gradient is that of the function so made."""
    frames, targets = stream(25)

    def forward(k: int, params: list[torch.Tensor], own: torch.optim.Optimizer) -> list[torch.Tensor]:
        behind = min(counts[k], 2 - k)  # the pipeline fills first
        counts[k] += 1
        return [p if behind == 0 or not own.state[p] else p - behind * step_of(p, own) for p in params]

    counts = [0, 0, 0]
    parts, own = pieces(ribbon(3), [2] * 3), OPTIMIZERS[optimizer]
    expected = fifo(parts, frames, targets, functional.cross_entropy, own, [2, 1, 0], forward=forward)
    course = await learn(rule_with(optimizer, order="1f1b", weights="predicted"), ribbon(3), [2] * 3, frames, targets)
    close(course, *expected)


def step_of(p: torch.Tensor, own: torch.optim.Optimizer) -> torch.Tensor:
    """What SGD with momentum, or Adam, would take from ``p`` again."""
    group, state = own.param_groups[0], own.state[p]
    found: torch.Tensor
    if isinstance(own, torch.optim.SGD):
        found = group["lr"] * state["momentum_buffer"]
        return found
    steps, (beta1, beta2) = state["step"].item(), group["betas"]
    mean, square = state["exp_avg"] / (1 - beta1**steps), state["exp_avg_sq"] / (1 - beta2**steps)
    found = group["lr"] * mean / (square.sqrt() + group["eps"])
    return found


# ------------------------------------------------------------------------------------------------ checkpoints


CHECKPOINTED: list[dict[str, Any]] = [
    {},
    {"weights": "double-buffered", "update_every": 3},
    {"weights": "predicted"},
    {"weights": "current", "corrections": [DiscrepancyCorrection()]},
    {"corrections": [GapAware(), WeightPrediction("difference"), LearningRateRescheduling(steps=20)]},
    {"corrections": [HybridFinish(after=16)]},
]


@one_loop
@pytest.mark.parametrize("number", range(len(CHECKPOINTED)))
async def test_state_goes_on(number: int) -> None:
    """Learners that take over weights and state after 11 frames go on as if nothing had happened."""
    frames, targets = stream(22)
    rule = rule_with("momentum", order="1f1b", **CHECKPOINTED[number])

    async def losses_of(pipeline: aiotime.Pipeline, first: int, last: int) -> list[Any]:
        samples = map(aiotime.Sample, frames[first:last], targets[first:last])
        return [prediction.loss async for prediction in pipeline.run(samples)]

    async def part(first: int, last: int, taken: tuple[Any, Any] | None) -> tuple[list[float], Any, Any]:
        pipeline = await asyncio.to_thread(
            aiotime.Pipeline, ribbon(3), example=frames[0], devices=["inline"] * 3, balance=[2] * 3, learner=rule
        )
        hands: list[Any] = [spec.hands for spec in pipeline._specs]
        if taken is not None:
            await pipeline.load_state_dict(taken[0])
            for one, state in zip(hands, taken[1], strict=True):
                one.load_state_dict(state)
        async with asyncio.timeout(PATIENCE):
            losses = await losses_of(pipeline, first, last)
        return losses, pipeline.state_dict(), [plain(one.state_dict()) for one in hands]

    async def drained_at_11() -> tuple[list[float], Any]:
        pipeline = await asyncio.to_thread(
            aiotime.Pipeline, ribbon(3), example=frames[0], devices=["inline"] * 3, balance=[2] * 3, learner=rule
        )
        async with asyncio.timeout(PATIENCE), pipeline:
            losses = [*await losses_of(pipeline, 0, 11), *await losses_of(pipeline, 11, 22)]
        return losses, pipeline.state_dict()

    before, weights, state = await part(0, 11, None)
    after, final, _ = await part(11, 22, (weights, state))
    losses, whole = await drained_at_11()
    assert [*before, *after] == losses
    assert all(torch.equal(final[key], whole[key]) for key in whole)


def plain(value: Any) -> Any:
    """A copy; fails for what is neither tensor nor plain value."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    assert value is None or isinstance(value, bool | int | float | str), value
    return value


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_work_is_refused() -> None:
    """Settings that contradict each other are refused when the rule is made, with a way out."""
    refused: list[tuple[dict[str, Any], str]] = [
        ({"weights": "newest"}, "weights must be one of 'stashed', 'current'"),
        ({"order": "2f2b"}, 'order must be "event"'),
        ({"corrections": SpikeCompensation()}, r"corrections is a list: corrections=\[SpikeCompensation"),
        ({"corrections": ["spike"]}, "takes instances such as"),
        ({"corrections": [DelayScaling(), LearningRateRescheduling(steps=5)]}, "both change the learning rate"),
        ({"corrections": [WeightPrediction()], "weights": "predicted"}, "is WeightPrediction"),
        ({"corrections": [WeightPrediction()], "weights": "double-buffered"}, "decides which version"),
        ({"corrections": [DiscrepancyCorrection()]}, 'use it with weights="current"'),
        ({"corrections": [DiscrepancyCorrection(), WeightPrediction()], "weights": "current"}, "keep one of them"),
        ({"corrections": [GapAware()], "weights": "current"}, 'use weights="stashed"'),
        ({"corrections": [HybridFinish(after=3)], "weights": "double-buffered"}, "one update late"),
    ]
    for settings, message in refused:
        with pytest.raises(ConfigurationError, match=message):
            rule_with(**settings)


def test_double_buffered_needs_frames_enough() -> None:
    """With fewer frames per update than in flight, a third version would be needed."""
    for order, enough in (("1f1b", 4), ("event", 4), ("lockstep", 6)):
        with pytest.raises(ConfigurationError, match=f"needs update_every={enough} or more, not {enough - 1}"):
            rule_with(weights="double-buffered", order=order, update_every=enough - 1).check(4)
        rule_with(weights="double-buffered", order=order, update_every=enough).check(4)


@one_loop
async def test_a_failing_optimizer_is_told_with_split_too() -> None:
    """An error in the second part of a backward reaches the consumer and names the stage."""

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["lr"] > 0:  # else it is only tried out, for the plan
                raise RuntimeError("no more")

    frames, targets = stream(6)
    rule = Delayed(loss=functional.cross_entropy, optimizer=partial(Failing, lr=0.1), split=True)
    with pytest.raises(StageError, match="no more"):
        await learn(rule, ribbon(2), [2, 2], frames, targets)

"""Chimera: whole-batch gradients from two directions, equal replicas, and fewer idle ticks than one direction has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import aiotime
from aiotime.devices.base import Work
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import ConfigurationError
from aiotime.frame import Frame
from aiotime.learning.chimera import DOWN, UP, Crossing, Meeting
from aiotime.learning.synchronous import Synchronous
from aiotime.learning.ticket import Ticket
from tests.learning.reference import batches, ribbon, stream

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01)


def chimera(size: int, optimizer: Any = SGD, **settings: Any) -> Synchronous:
    """The rule with mini-batches of ``size``."""
    return Synchronous(micro_batches=size, schedule="chimera", loss=cross_entropy, optimizer=optimizer, **settings)


async def opened(
    rule: Synchronous, stages: int, devices: Any = None, model: nn.Module | None = None, example: Any = None
) -> aiotime.Pipeline:
    """A pipeline of so many stages that learns by ``rule``."""
    return await asyncio.to_thread(
        aiotime.Pipeline,
        ribbon(stages) if model is None else model,
        example=stream(1)[0][0] if example is None else example,
        devices=devices or [f"cpu:{k}" for k in range(stages)],
        balance=[2] * stages,
        learner=rule,
    )


def labelled(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> list[aiotime.Sample]:
    """Samples of a stream."""
    return [aiotime.Sample(x, y) for x, y in zip(xs, ys, strict=True)]


async def run(pipeline: aiotime.Pipeline, samples: Sequence[aiotime.Sample]) -> list[aiotime.Prediction]:
    """All predictions, in order."""
    async with asyncio.timeout(20):
        predictions = [pred async for pred in pipeline.run(samples)]
    assert [pred.index for pred in predictions] == list(range(len(samples)))
    return predictions


def check_replicas(pipeline: aiotime.Pipeline) -> None:
    """Both replicas of every stage have the same bits."""
    for spec in pipeline._specs:
        assert spec.replica is not None
        first, second = spec.hands.weights.masters, spec.replica.hands.weights.masters  # type: ignore[union-attr]
        assert len(first) > 0 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check(
    pipeline: aiotime.Pipeline,
    predictions: Sequence[aiotime.Prediction],
    expected: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    """The losses and weights of plain training, to rounding, in both replicas."""
    torch.testing.assert_close([pred.loss for pred in predictions], expected[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(pipeline.state_dict(), expected[1], atol=2e-6, rtol=1e-5)
    check_replicas(pipeline)


@pytest.mark.asyncio
@pytest.mark.parametrize("devices", [None, "inline", "cpu:0"])
async def test_equals_plain_training_on_whole_batches(devices: str | None) -> None:
    """Half of the frames each way make the gradient of all of them."""
    xs, ys = stream(16)
    for stages, size in [(2, 2), (2, 4), (4, 2), (4, 8)]:
        pipeline = await opened(chimera(size, ADAM), stages, devices and [devices] * stages)
        predictions = await run(pipeline, labelled(xs, ys))
        check(pipeline, predictions, batches(stages, xs, ys, [size] * (16 // size), ADAM))
        assert [pred.delay for pred in predictions] == [(t % size,) * stages for t in range(16)]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_what_is_left_at_the_end_is_applied() -> None:
    """A mini-batch cut short at any point, also one that went one way alone, has the mean of its own frames."""
    for frames in range(1, 8):
        xs, ys = stream(frames)
        pipeline = await opened(chimera(4), 2)
        predictions = await run(pipeline, labelled(xs, ys))
        check(pipeline, predictions, batches(2, xs, ys, [min(4, frames - at) for at in range(0, frames, 4)]))


@pytest.mark.asyncio
async def test_the_same_bits_on_every_run() -> None:
    """The sum is taken in a fixed order, whichever replica comes first."""
    xs, ys = stream(16)
    states = []
    for devices in (None, ["cpu:0"] * 4, ["cpu:1", "cpu:0", "cpu:0", "cpu:1"]):
        pipeline = await opened(chimera(8, ADAM), 4, devices)
        await run(pipeline, labelled(xs, ys))
        states.append(pipeline.state_dict())
    assert all(torch.equal(states[0][key], state[key]) for state in states for key in state)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_frames_without_target_and_frames_that_fail() -> None:
    """Frames that are predicted only count in no mini-batch; one whose loss fails leaves its mini-batch smaller."""
    xs, ys = stream(12)
    samples = [s for sample in labelled(xs, ys) for s in (sample, aiotime.Sample(sample.input))]
    pipeline = await opened(chimera(4), 4)
    predictions = await run(pipeline, samples)
    check(pipeline, predictions[::2], batches(4, xs, ys, [4] * 3))
    samples = labelled(xs, ys)
    samples[5] = aiotime.Sample(xs[5], torch.zeros(3, dtype=torch.long))
    pipeline = await opened(chimera(4), 4)
    async with asyncio.timeout(20):
        predictions = [pred async for pred in pipeline.run(samples, on_error="skip")]
    del xs[5], ys[5]
    check(pipeline, predictions, batches(4, xs, ys, [4, 3, 4]))


@pytest.mark.asyncio
async def test_drained_loaded_and_opened_again() -> None:
    """Weights loaded while it is open or closed reach both replicas, and learning goes on from them."""
    xs, ys = stream(8)
    pipeline = await opened(chimera(4, partial(torch.optim.SGD, lr=0.1, momentum=0.9)), 2)
    start = pipeline.state_dict()
    async with asyncio.timeout(20), pipeline:
        await asyncio.gather(*(pipeline.submit(sample) for sample in labelled(xs[:3], ys[:3])))
        await pipeline.drain()
        pipeline.resume()
        check_replicas(pipeline)
        await pipeline.load_state_dict(start)
        check_replicas(pipeline)
    pipeline = await opened(chimera(4), 2)
    await run(pipeline, labelled(xs[:4], ys[:4]))
    await pipeline.load_state_dict(start)
    predictions = await run(pipeline, labelled(xs, ys))
    check(pipeline, predictions, batches(2, xs, ys, [4, 4]))


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_optimizer_state_is_each_replicas_own() -> None:
    """Across drains and openings, and from a checkpoint on, the optimizer goes on as on one device."""
    xs, ys = stream(19)
    parts = [slice(0, 4), slice(4, 7), slice(7, 15), slice(15, 19)]
    pipeline = await opened(chimera(4, ADAM), 2)
    predictions = await run(pipeline, labelled(xs[parts[0]], ys[parts[0]]))
    async with asyncio.timeout(20), pipeline:
        for part in parts[1:]:
            predictions += await asyncio.gather(*(pipeline.submit(sample) for sample in labelled(xs[part], ys[part])))
            await pipeline.drain()
            pipeline.resume()
        check(pipeline, predictions, batches(2, xs, ys, [4, 3, 4, 4, 4], ADAM))
        lessons = [stage.learning for stage in pipeline.stats().stages]
        assert [(each.frames, each.updates) for each in lessons if each is not None] == [(19, 5)] * 2
        assert lessons[0] is not None and dict(lessons[0].delays) == {0: 4, 1: 4, 2: 4, 3: 3}  # since it was opened


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_stages_by_hand_and_modules_with_buffers() -> None:
    """Stages made of modules have replicas too; running statistics are each replica's own, never the user's model's."""
    norm = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.Tanh())
    with pytest.warns(UserWarning, match="statistics"):
        pipeline = await opened(chimera(2), 2, model=norm, example=torch.randn(5, 6))
    frames = [aiotime.Sample(torch.randn(5, 6), torch.randint(0, 4, (5,))) for _ in range(6)]
    await run(pipeline, frames)
    assert norm[1].num_batches_tracked == 0
    check_replicas(pipeline)
    parts = [ribbon(2)[:2], ribbon(2)[2:]]
    by_hand = await asyncio.to_thread(aiotime.Pipeline.from_stages, parts, learner=chimera(4))
    xs, ys = stream(8)
    predictions = await run(by_hand, labelled(xs, ys))
    torch.testing.assert_close([p.loss for p in predictions], batches(2, xs, ys, [4, 4])[0], atol=2e-6, rtol=1e-5)
    check_replicas(by_hand)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_closing_in_the_middle_leaves_nothing_waiting() -> None:
    """Replicas that wait for each other when the pipeline is closed end."""
    xs, ys = stream(40)
    pipeline = await opened(chimera(8), 4)
    async with asyncio.timeout(20), pipeline, pipeline.run(labelled(xs, ys)) as running:
        async for pred in running:
            if pred.index == 5:
                await pipeline.aclose()
                break


def spent(work: Work, frame: Frame) -> float:
    """A forward 1, a backward 2; updates are free."""
    return {"forward": 1.0, "backward": 2.0, "weights": 0.0}[work.phase]


def even(work: Work, frame: Frame) -> float:
    """Forward and backward 1."""
    return {"forward": 1.0, "backward": 1.0, "weights": 0.0}[work.phase]


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("stages", [2, 4, 8])
async def test_virtual_time_is_that_of_the_theory(stages: int) -> None:
    """For M = S the paper's critical path: 3M + 2(S - 2) ticks (backward 2) or 2M + S - 2 (backward 1)."""
    rounds = 3
    xs, ys = stream(rounds * stages)
    taken = {}
    for seconds, schedule in [(spent, "chimera"), (even, "chimera"), (spent, "1f1b")]:
        clock = VirtualClock()
        devices = [SimulatedDevice(k, seconds=seconds, clock=clock) for k in range(stages)]
        rule = Synchronous(micro_batches=stages, schedule=schedule, loss=cross_entropy, optimizer=SGD)  # type: ignore[arg-type]
        await run(await opened(rule, stages, devices), labelled(xs, ys))
        taken[seconds.__name__, schedule] = clock.now() / rounds
    assert taken == {
        ("spent", "chimera"): 3 * stages + 2 * (stages - 2),
        ("even", "chimera"): 2 * stages + stages - 2,
        ("spent", "1f1b"): 3 * (2 * stages - 1),
    }


def test_odd_stages_are_refused() -> None:
    """Every device holds two stages, so their number must be even."""
    with pytest.raises(ConfigurationError, match="even number of stages"):
        aiotime.Pipeline(
            ribbon(3), example=stream(1)[0][0], devices=["cpu:0"] * 3, balance=[2, 2, 2], learner=chimera(4)
        )


def test_meeting_sums_in_one_order_and_wakes_both() -> None:
    """Down + up to the last bit, whoever comes first; a side may be a round ahead of the other one's taking."""
    a, b = torch.tensor([1e8, 1.0]), torch.tensor([-1e8, 1e-8])
    for first in (DOWN, UP):
        meeting = Meeting()
        rang = threading.Event()
        meeting.pendings[DOWN].bell = Ring(rang)
        offers = {DOWN: ([a, None], 2), UP: ([b, b], 1)}
        meeting.offer(first, offers[first])  # type: ignore[arg-type]
        assert not meeting.pendings[DOWN].done and not rang.is_set()
        meeting.offer(1 - first, offers[1 - first])  # type: ignore[arg-type]
        assert rang.is_set() and all(pending.done for pending in meeting.pendings)
        down = meeting.take(DOWN)
        meeting.offer(DOWN, ([a, a], 1))
        up = meeting.take(UP)
        assert down is not None and up is not None and down[1] == up[1] == 3
        for one, other, expected in zip(down[0], up[0], [a + b, b], strict=True):
            assert one is not None and other is not None and one is not other
            assert torch.equal(one, expected) and torch.equal(other, expected)
        assert not meeting.pendings[UP].done


class Ring:
    """A bell."""

    def __init__(self, event: threading.Event) -> None:
        self.ring = event.set


def test_crossing_sends_frames_by_turns() -> None:
    """Frames with targets alternate within their mini-batch, which a barrier begins anew."""
    crossing = Crossing(4)
    tickets = [Ticket(t, 2, learn=True) for t in range(7)]
    assert [crossing.place(ticket) for ticket in tickets[:5]] == [0, 1, 2, 3, 0]
    assert crossing.place(tickets[2]) == 2
    crossing.end()
    assert [crossing.place(ticket) for ticket in tickets[5:]] == [0, 1]
    assert [crossing.place(Ticket(t, 2, learn=False)) % 2 for t in range(3)] == [1, 0, 1]

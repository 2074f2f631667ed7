"""Synchronous micro-batches: the whole batch's gradient, whatever the schedule, and schedules exact to the tick."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import aiotime
from aiotime.devices.base import Work
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import ConfigurationError, StageError
from aiotime.frame import Frame
from aiotime.learning.learner import StageLearner
from aiotime.learning.synchronous import Schedule, Synchronous
from tests.learning.reference import batches, ribbon, stream

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01)
SCHEDULES: list[Schedule] = ["gpipe", "1f1b"]


async def opened(rule: Synchronous, stages: int, example: torch.Tensor, devices: Any = None) -> aiotime.Pipeline:
    """A pipeline of so many stages that learns by ``rule``."""
    names = devices or [f"cpu:{k}" for k in range(stages)]
    return await asyncio.to_thread(
        aiotime.Pipeline, ribbon(stages), example=example, devices=names, balance=[2] * stages, learner=rule
    )


async def learn(
    rule: Synchronous, stages: int, samples: Sequence[aiotime.Sample], devices: Any = None
) -> tuple[list[aiotime.Prediction], dict[str, torch.Tensor]]:
    """Everything the pipeline said, and its weights afterwards."""
    pipeline = await opened(rule, stages, samples[0].input, devices)
    async with asyncio.timeout(20):
        return [pred async for pred in pipeline.run(samples)], pipeline.state_dict()


def labelled(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> list[aiotime.Sample]:
    """Samples of a stream."""
    return [aiotime.Sample(x, y) for x, y in zip(xs, ys, strict=True)]


def close(
    predictions: Sequence[aiotime.Prediction],
    state: dict[str, torch.Tensor],
    expected: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    """The same losses and weights, to rounding."""
    torch.testing.assert_close([pred.loss for pred in predictions], expected[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(state, expected[1], atol=2e-6, rtol=1e-5)


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
async def test_equals_plain_training_on_whole_batches(optimizer: Any) -> None:
    """Each mini-batch is one update with the mean gradient; what is left at the end is one with its own mean."""
    xs, ys = stream(22)
    for stages in (1, 2, 3, 4):
        for schedule in SCHEDULES:
            rule = Synchronous(micro_batches=4, schedule=schedule, loss=cross_entropy, optimizer=optimizer)
            close(*await learn(rule, stages, labelled(xs, ys)), batches(stages, xs, ys, [4] * 5 + [2], optimizer))


@pytest.mark.asyncio
async def test_schedules_agree_to_the_bit_wherever_they_run() -> None:
    """The order of jobs changes when a gradient comes, not what it is."""
    xs, ys = stream(20)
    states = []
    for schedule in SCHEDULES:
        for devices in (None, ["inline"] * 3, ["cpu:0"] * 3):
            rule = Synchronous(micro_batches=5, schedule=schedule, loss=cross_entropy, optimizer=ADAM)
            states.append((await learn(rule, 3, labelled(xs, ys), devices))[1])
    assert all(torch.equal(states[0][key], state[key]) for state in states for key in state)


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_delay_counts_the_earlier_frames_of_the_mini_batch(schedule: Schedule) -> None:
    """The weights of a frame lack the updates of those before it in its mini-batch and of no others."""
    xs, ys = stream(11)
    rule = Synchronous(micro_batches=4, schedule=schedule, loss=cross_entropy, optimizer=SGD)
    predictions, _ = await learn(rule, 3, labelled(xs, ys))
    assert [pred.delay for pred in predictions] == [(t % 4,) * 3 for t in range(11)]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_frames_without_target_are_not_part_of_a_mini_batch() -> None:
    """Only frames with targets count; the others are predicted in their turn."""
    xs, ys = stream(12)
    samples = [s for sample in labelled(xs, ys) for s in (sample, aiotime.Sample(sample.input))]
    rule = Synchronous(micro_batches=3, loss=cross_entropy, optimizer=SGD)
    predictions, state = await learn(rule, 2, samples)
    assert len(predictions) == 24 and all(pred.loss is None for pred in predictions[1::2])
    close(predictions[::2], state, batches(2, xs, ys, [3] * 4, SGD))


@pytest.mark.asyncio
async def test_drain_applies_what_is_left() -> None:
    """A mini-batch that a drain cuts short is applied; the next one begins anew."""
    xs, ys = stream(9)
    rule = Synchronous(micro_batches=4, loss=cross_entropy, optimizer=SGD, idle=None)
    pipeline = await opened(rule, 2, xs[0])
    predictions = []
    async with asyncio.timeout(20), pipeline:
        for part in (slice(0, 3), slice(3, 9)):
            samples = labelled(xs[part], ys[part])
            predictions += await asyncio.gather(*(pipeline.submit(sample) for sample in samples))
            await pipeline.drain()
            pipeline.resume()
        close(predictions, pipeline.state_dict(), batches(2, xs, ys, [3, 4, 2], SGD))


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("bad", [2, 3], ids=["inside", "last of its mini-batch"])
async def test_frame_that_fails_leaves_a_smaller_mini_batch(bad: int) -> None:
    """The mini-batch of a frame whose loss cannot be computed is the mean of the others, and the next one is whole."""
    xs, ys = stream(8)
    samples = labelled(xs, ys)
    samples[bad] = aiotime.Sample(xs[bad], torch.zeros(3, dtype=torch.long))
    rule = Synchronous(micro_batches=4, loss=cross_entropy, optimizer=SGD)
    pipeline = await opened(rule, 3, xs[0])
    async with asyncio.timeout(20):
        predictions = [pred async for pred in pipeline.run(samples, on_error="skip")]
    good = [t for t in range(8) if t != bad]
    close(predictions, pipeline.state_dict(), batches(3, [xs[t] for t in good], [ys[t] for t in good], [3, 4], SGD))


@pytest.mark.asyncio
async def test_backward_that_fails_ends_no_later_mini_batch() -> None:
    """An error in the very backward that closes a mini-batch is raised, and the pipeline learns on."""
    xs, ys = stream(8)
    pipeline = await opened(Synchronous(micro_batches=4, loss=broken, optimizer=SGD), 2, xs[0])
    samples = [aiotime.Sample(x, (y, t == 3)) for t, (x, y) in enumerate(zip(xs, ys, strict=True))]
    async with asyncio.timeout(20), pipeline:
        with pytest.raises(StageError, match="learning from frame 3"):
            async for _ in pipeline.run(samples[:4]):
                pass
        predictions = [pred async for pred in pipeline.run(samples[4:])]
    assert len(predictions) == 4


def broken(output: torch.Tensor, target: tuple[torch.Tensor, bool]) -> torch.Tensor:
    """Cross entropy; its backward raises where the target says so."""
    label, fails = target
    loss = cross_entropy(output, label)
    return Broken.apply(loss) if fails else loss  # type: ignore[no-untyped-call]


class Broken(torch.autograd.Function):
    """Has no backward worth the name."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("no gradient today")


def spent(work: Work, frame: Frame) -> float:
    """A forward 1, a backward 2; updates are free."""
    return {"forward": 1.0, "backward": 2.0, "weights": 0.0}[work.phase]


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_virtual_time_is_that_of_the_theory(schedule: Schedule) -> None:
    """n mini-batches of M take n · 3(M + S - 1), for both schedules."""
    for stages, size in [(2, 2), (4, 1), (4, 4), (4, 8)]:
        xs, ys = stream(3 * size)
        clock = VirtualClock()
        devices = [SimulatedDevice(k, seconds=spent, clock=clock) for k in range(stages)]
        rule = Synchronous(micro_batches=size, schedule=schedule, loss=cross_entropy, optimizer=SGD)
        await learn(rule, stages, labelled(xs, ys), devices)
        assert clock.now() == 3 * 3.0 * (size + stages - 1), (stages, size)


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize(("schedule", "graphs"), [("gpipe", [6, 6, 6]), ("1f1b", [3, 2, 1])])
async def test_graphs_kept_are_those_promised(
    schedule: Schedule, graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPipe keeps a whole mini-batch at every stage, 1F1B S - k frames."""
    most = [0] * 3
    forward = StageLearner.forward

    def counted(self: StageLearner, ticket: Any, value: Any) -> Any:
        result = forward(self, ticket, value)
        most[self.site.index] = max(most[self.site.index], len(self.kept))
        return result

    monkeypatch.setattr(StageLearner, "forward", counted)
    xs, ys = stream(12)
    rule = Synchronous(micro_batches=6, schedule=schedule, loss=cross_entropy, optimizer=SGD)
    await learn(rule, 3, labelled(xs, ys))
    assert most == graphs


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"micro_batches": 0}, "from 1"),
        ({"micro_batches": 4, "schedule": "zigzag"}, "gpipe"),
        ({"micro_batches": 4, "update_every": 2}, "micro_batches=8"),
        ({"micro_batches": 3, "schedule": "chimera"}, "even"),
        ({"micro_batches": 4, "schedule": "chimera", "clip_norm": 1.0, "clip": "global"}, "1f1b"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    """Each refusal says what would work."""
    with pytest.raises(ConfigurationError, match=said):
        Synchronous(loss=cross_entropy, optimizer=SGD, **settings)

"""Sideways: the same losses and weights as a literal simulation of PARTIME's ticks, and what happens at both ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import aiotime
from aiotime.devices.base import Work
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import InputError, StageError
from aiotime.frame import Frame
from aiotime.learning.learner import Site
from aiotime.learning.sideways import Sideways, SidewaysLearner
from aiotime.learning.ticket import Ticket
from tests.learning.reference import pieces, ribbon, stream

SGD = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


class Clockwork:
    """The rule tick by tick: every stage acts on what its neighbours showed at the tick before, and updates at once.

    Nothing is shown before it is data. After the last frame the ticks go on, a stage without a new frame running on the
    one it has, until no gradient is under way. With ``cuts``: a gradient from an earlier scene ends where the
    activation is of a later one.
    """

    def __init__(self, parts: Sequence[nn.Module], optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        self.optimizers = [optimizer(part.parameters()) for part in parts]
        self.mismatches: list[list[int]] = [[] for _ in parts]
        self.straddled = 0

    def run(self, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], cuts: Sequence[int] = ()) -> list[float]:
        """The loss of each frame."""
        stages, top = len(self.parts), len(self.parts) - 1
        scene = [sum(cut <= t for cut in cuts) for t in range(len(xs))]
        losses = [0.0] * len(xs)
        shown: dict[int, tuple[int, torch.Tensor]] = {}  # by stage: (frame, output) of the tick before
        sent: dict[int, tuple[int, torch.Tensor]] = {}  # by stage: (frame of the loss, gradient for the stage below)
        held: dict[int, tuple[int, torch.Tensor]] = {}  # by stage: (frame, input), newest
        tick = 0
        while tick < len(xs) or shown or sent:
            now_shown, now_sent = {}, {}
            for k in range(stages):
                incoming = (tick, xs[tick]) if k == 0 and tick < len(xs) else shown.get(k - 1)
                gradient = sent.get(k + 1)
                if incoming is not None:
                    held[k] = incoming
                elif gradient is None:
                    continue
                frame, value = held[k]
                x = value.detach().requires_grad_(k > 0)
                z = self.parts[k](x)
                if incoming is not None:
                    now_shown[k] = frame, z.detach()
                if k == top:
                    loss = cross_entropy(z, ys[frame])
                    losses[frame] = loss.item()
                    origin, roots, seed = frame, loss, None
                elif gradient is not None:
                    (origin, seed), roots = gradient, z
                    if scene[origin] != scene[frame]:
                        self.straddled += k + 1  # here and at every stage below
                        continue
                else:
                    continue
                self.mismatches[k].append(frame - origin)
                params = list(self.parts[k].parameters())
                grads = torch.autograd.grad(roots, [*params, x] if k > 0 else params, seed)
                if k > 0:
                    now_sent[k] = origin, grads[-1]
                for p, grad in zip(params, grads, strict=False):
                    p.grad = grad
                self.optimizers[k].step()
            shown, sent = now_shown, now_sent
            shown.pop(top, None)
            tick += 1
        return losses


async def learn(
    rule: Sideways, stages: int, samples: Sequence[aiotime.Sample], devices: Sequence[Any] | None = None
) -> tuple[list[aiotime.Prediction], dict[str, torch.Tensor]]:
    """Everything a pipeline of so many stages said, and its weights afterwards."""
    names = devices or [f"cpu:{k}" for k in range(stages)]
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline, ribbon(stages), example=samples[0].input, devices=names, balance=[2] * stages, learner=rule
    )
    async with asyncio.timeout(20):
        return [pred async for pred in pipeline.run(samples)], pipeline.state_dict()


def labelled(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], cuts: Sequence[int] = ()) -> list[aiotime.Sample]:
    """Samples of a stream with scene cuts before the frames ``cuts``."""
    return [aiotime.Sample(x, y, cut=t in cuts) for t, (x, y) in enumerate(zip(xs, ys, strict=True))]


def same(state: dict[str, torch.Tensor], model: nn.Module) -> bool:
    """Bit-equal weights."""
    return all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
async def test_pipeline_equals_the_ticks(optimizer: str) -> None:
    """Losses and final weights have the bits of the simulation, from the first frame to the last gradient."""
    xs, ys = stream(24)
    for stages in (1, 2, 3, 4):
        rule = Sideways(loss=cross_entropy, optimizer=OPTIMIZERS[optimizer])
        predictions, state = await learn(rule, stages, labelled(xs, ys))
        model = ribbon(stages)
        ticks = Clockwork(pieces(model, [2] * stages), OPTIMIZERS[optimizer])
        assert [pred.loss for pred in predictions] == ticks.run(xs, ys)
        assert same(state, model)
        for k in range(stages):  # the simulation is what we say it is
            assert set(ticks.mismatches[k][: 24 - 2 * (stages - 1 - k)]) == {2 * (stages - 1 - k)}
            assert len(ticks.mismatches[k]) == 24


@pytest.mark.asyncio
async def test_same_bits_wherever_it_runs() -> None:
    """Stages that share a thread, or run on the loop, give what the ticks give."""
    xs, ys = stream(20)
    model = ribbon(3)
    Clockwork(pieces(model, [2] * 3), SGD).run(xs, ys)
    for devices in (["inline"] * 3, ["cpu:0"] * 3, ["cpu:0", "cpu:1", "cpu:0"]):
        _, state = await learn(Sideways(loss=cross_entropy, optimizer=SGD), 3, labelled(xs, ys), devices)
        assert same(state, model)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_delay_is_that_of_the_ticks() -> None:
    """Once the pipeline is full, stage k lacks the updates of 2(S-1-k) frames; before, of those that were there."""
    xs, ys = stream(12)
    predictions, _ = await learn(Sideways(loss=cross_entropy, optimizer=SGD), 3, labelled(xs, ys))
    assert [pred.delay for pred in predictions] == [(min(t, 4), min(t, 2), 0) for t in range(12)]


@pytest.mark.asyncio
async def test_nothing_is_lost_at_either_end() -> None:
    """Every frame is predicted and every gradient used once at every stage, also where the stream never fills it."""
    for frames in (1, 2, 5):
        xs, ys = stream(frames)
        rule = Sideways(loss=cross_entropy, optimizer=SGD)
        predictions, state = await learn(rule, 4, labelled(xs, ys))
        assert len(predictions) == frames
        assert {learner.learned for learner in rule._learners} == {frames}
        model = ribbon(4)
        Clockwork(pieces(model, [2] * 4), SGD).run(xs, ys)
        assert same(state, model)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_cut_costs_no_wrong_update() -> None:
    """A gradient from before a cut is not pushed through an activation from after it, and is counted."""
    xs, ys = stream(30)
    cuts = [7, 8, 20]
    rule = Sideways(loss=cross_entropy, optimizer=SGD)
    predictions, state = await learn(rule, 3, labelled(xs, ys, cuts))
    model = ribbon(3)
    ticks = Clockwork(pieces(model, [2] * 3), SGD)
    assert [pred.loss for pred in predictions] == ticks.run(xs, ys, cuts)
    assert same(state, model)
    assert rule.straddled == ticks.straddled > 0


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_frames_without_target_change_nothing() -> None:
    """Frames to be predicted only pass between the ticks."""
    xs, ys = stream(16)
    samples = [s for sample in labelled(xs, ys) for s in (sample, aiotime.Sample(sample.input))]
    predictions, state = await learn(Sideways(loss=cross_entropy, optimizer=SGD), 3, samples)
    model = ribbon(3)
    losses = Clockwork(pieces(model, [2] * 3), SGD).run(xs, ys)
    assert [pred.loss for pred in predictions[::2]] == losses
    assert [pred.loss for pred in predictions[1::2]] == [None] * 16
    assert same(state, model)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_per_clip_updates_once_per_scene() -> None:
    """With one stage and per_clip, a clip is one update with the mean gradient of its frames."""
    xs, ys = stream(12)
    rule = Sideways(loss=cross_entropy, optimizer=SGD, per_clip=True)
    predictions, state = await learn(rule, 1, labelled(xs, ys, [5, 8]))
    model = ribbon(1)
    optimizer = SGD(model.parameters())
    losses: list[float] = []
    for clip in (slice(0, 5), slice(5, 8), slice(8, 12)):
        each = [cross_entropy(model(x), y) for x, y in zip(xs[clip], ys[clip], strict=True)]
        losses += [loss.item() for loss in each]
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(each).mean())
        optimizer.step()
    torch.testing.assert_close([pred.loss for pred in predictions], losses)
    torch.testing.assert_close(state, dict(model.state_dict()))


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_per_clip_of_a_pipeline() -> None:
    """Weights stand still within a clip at every stage, and every stage updates once per clip."""
    xs, ys = stream(20)
    rule = Sideways(loss=cross_entropy, optimizer=SGD, per_clip=True)
    await learn(rule, 3, labelled(xs, ys, [10]))
    assert [learner.weights.version for learner in rule._learners] == [2, 2, 2]
    every = Sideways(loss=cross_entropy, optimizer=SGD, per_clip=True, update_every=4)
    await learn(every, 1, labelled(xs, ys, [10]))
    assert [learner.weights.version for learner in every._learners] == [6]  # 4 4 2 | 4 4 2


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_gradient_of_another_shape_is_refused() -> None:
    """A frame of another batch size cannot lend its activation to an older gradient; the error says what to do."""
    xs, ys = stream(12)
    samples = labelled(xs, ys)
    samples[6] = aiotime.Sample(torch.randn(2, 6), torch.tensor([0, 1]))
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline,
        ribbon(2),
        example=xs[0],
        devices=["cpu:0", "cpu:1"],
        balance=[2, 2],
        dynamic=(0,),
        learner=Sideways(loss=cross_entropy, optimizer=SGD),
    )
    with pytest.raises(StageError, match="all frames must have one shape") as caught:
        async with asyncio.timeout(20):
            async for _ in pipeline.run(samples):
                pass
    assert isinstance(caught.value.__cause__, InputError)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_frame_that_fails_takes_no_other_with_it() -> None:
    """A frame whose loss cannot be computed is skipped; the newest activation serves the gradients that follow."""
    xs, ys = stream(14)
    samples = labelled(xs, ys)
    samples[5] = aiotime.Sample(xs[5], torch.zeros(3, dtype=torch.long))  # a target of the wrong shape
    rule = Sideways(loss=cross_entropy, optimizer=SGD)
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline, ribbon(3), example=xs[0], devices=["cpu:0"] * 3, balance=[2] * 3, learner=rule
    )
    async with asyncio.timeout(20):
        predictions = [pred async for pred in pipeline.run(samples, on_error="skip")]
    assert [pred.index for pred in predictions] == [t for t in range(14) if t != 5]
    assert {learner.learned for learner in rule._learners} == {13}


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_tick_lasts_as_long_as_the_slowest_stage() -> None:
    """In virtual time a full pipeline takes one forward and one backward per frame, whatever its depth."""
    taken = {}
    for frames in (20, 30):
        xs, ys = stream(frames)
        clock = VirtualClock()
        devices = [SimulatedDevice(k, seconds=spent, clock=clock) for k in range(4)]
        await learn(Sideways(loss=cross_entropy, optimizer=SGD), 4, labelled(xs, ys), devices)
        taken[frames] = clock.now()
    assert taken[30] - taken[20] == 30.0


def spent(work: Work, frame: Frame) -> float:
    """A forward 1, a backward 2."""
    return {"forward": 1.0, "backward": 2.0}[work.phase]


def test_one_graph_is_kept_and_buffers_are_left_alone() -> None:
    """A stage holds its newest forward only; running it again for a last gradient does not count in running means."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    site = Site(0, 2, "lower", model, [("", model)])
    learner = Sideways(loss=cross_entropy, optimizer=SGD).stage(site)
    assert isinstance(learner, SidewaysLearner)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d) and norm.num_batches_tracked is not None and norm.running_mean is not None
    tickets, generator = [Ticket(t, 2, learn=True) for t in range(3)], torch.Generator().manual_seed(3)
    for ticket in tickets:
        learner.forward(ticket, torch.randn(3, 4, generator=generator))
        assert len(learner.kept) == 1
    mean, weight = norm.running_mean.clone(), learner.weights.snapshot()[0]
    for ticket in tickets:
        learner.backward(ticket, [torch.randn(3, 4, generator=generator)])
    assert learner.reruns == 2
    assert norm.num_batches_tracked == 3 and torch.equal(norm.running_mean, mean)
    assert not torch.equal(weight, learner.weights.snapshot()[0])
    learner.load_state_dict(learner.state_dict())
    assert learner.learned == 3

"""Penalty: back-propagation where it must be, the written equations elsewhere, and the same bits on every device."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime import LATER, Sample
from aiotime.devices.base import Work
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import ConfigurationError, InputError
from aiotime.frame import Frame
from aiotime.learning import Delayed
from aiotime.learning.auxiliary import AuxiliaryLearner, Start
from aiotime.learning.order import Order
from aiotime.learning.penalty import Penalty
from tests.learning.joints import PATIENCE, Course, Recorder, aided, build, close, follow, learn, same, swept
from tests.learning.reference import fifo, pieces, ribbon, stream

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01)
STARTS: list[Start] = ["output", "previous", "aux"]

one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])
both_loops = pytest.mark.asyncio


class OneAtATime(Penalty):
    """No frame enters a stage before it has learned from the one before."""

    def order(self, stage: int, stages: int) -> Order:
        return Order(0)


def rule_with(kind: type[Penalty] = Penalty, **settings: Any) -> Penalty:
    return kind(**{"beta": 4.0, "loss": functional.cross_entropy, "optimizer": SGD, "order": "1f1b", **settings})


def fixed_grads(course: Course) -> list[list[list[torch.Tensor]]]:
    """Per stage and frame, what the recorders saw."""
    return [hand.updater.optimizer.grads for hand in course.hands]


# ------------------------------------------------------------------------------------------------ back-propagation


@one_loop
@pytest.mark.parametrize("start", STARTS)
async def test_a_single_stage_is_plain_training(start: Start) -> None:
    """With one stage there is nothing to join: losses and weights have the bits of plain PyTorch."""
    frames, targets = stream(30)
    expected = fifo(pieces(ribbon(1), [2]), frames, targets, functional.cross_entropy, ADAM, [0])
    course = await learn(rule_with(optimizer=ADAM, start=start), ribbon(1), [2], frames, targets)
    assert course.losses == expected[0]
    assert all(torch.equal(course.state[key], tensor) for key, tensor in expected[1].items())


@one_loop
@pytest.mark.parametrize("stages", [2, 3, 4])
async def test_one_sweep_from_the_output_with_unit_step_is_back_propagation(stages: int) -> None:
    """With λ starting at x⁻ and ηβ = 1 the terminal gradient is p: the bits of Delayed, whatever β is."""
    frames, targets = stream(30)
    balance = [2] * stages
    delayed = await learn(
        Delayed(order="1f1b", loss=functional.cross_entropy, optimizer=ADAM), ribbon(stages), balance, frames, targets
    )
    for beta in (0.25, 2.0**20):
        assert same(
            await learn(rule_with(beta=beta, optimizer=ADAM), ribbon(stages), balance, frames, targets), delayed
        )


@one_loop
async def test_a_large_beta_approaches_the_gradient_of_back_propagation() -> None:
    """On a frame seen before, λ lies p/β off x⁻: the gradient errs by O(1/β) against back-propagation's."""
    torch.manual_seed(0)
    model = ribbon(3).double()
    frame, target = torch.randn(1, 6, dtype=torch.float64), torch.tensor([2])
    exact = torch.autograd.grad(functional.cross_entropy(model(frame), target), list(model.parameters()))
    errors, angles = [], []
    for beta in (1e1, 1e2, 1e3, 1e4):
        rule = rule_with(OneAtATime, beta=beta, start="previous", optimizer=Recorder)
        course = await learn(rule, model, [2, 2, 2], [frame] * 2, [target] * 2)
        found = torch.cat([grad.flatten() for stage in fixed_grads(course)[:2] for grad in stage[1]])
        wanted = torch.cat([grad.flatten() for grad in exact[:4]])
        errors.append(float((found - wanted).norm() / wanted.norm()))
        angles.append(float(1 - functional.cosine_similarity(found, wanted, dim=0)))
    assert 1e-6 < errors[-1] < 1e-3
    assert all(0.08 < small / large < 0.12 for large, small in pairwise(errors[1:]))
    assert all(small < large for large, small in pairwise(angles))


# ------------------------------------------------------------------------------------------------ the equations


@one_loop
@pytest.mark.parametrize(("stages", "sweeps"), [(2, 1), (3, 1), (4, 1), (3, 3)])
@pytest.mark.parametrize("start", ["output", "previous"])
async def test_sweeps_equal_the_loops(stages: int, start: Start, sweeps: int) -> None:
    """Weights after the stream are those of explicit loops over frames, blocks and sweeps; a cut starts λ anew."""
    frames, targets = stream(25)
    settings: dict[str, Any] = {"beta": 3.0, "rate": 0.2, "sweeps": sweeps}
    expected = swept(
        pieces(ribbon(stages), [2] * stages), frames, targets, functional.cross_entropy, lr=0.1, cuts={12},
        previous=start == "previous", **settings,
    )  # fmt: skip
    rule = rule_with(OneAtATime, start=start, **settings)
    course = await learn(rule, ribbon(stages), [2] * stages, frames, targets, cuts={12})
    close(course, *expected)
    assert [hand.learned for hand in course.hands] == [25] * stages


@one_loop
async def test_a_cut_matters() -> None:
    """Without the cut the weights come out otherwise: the test above sees it."""
    frames, targets = stream(25)
    rule = rule_with(OneAtATime, start="previous")
    uncut = await learn(rule, ribbon(3), [2] * 3, frames, targets)
    cut = await learn(rule, ribbon(3), [2] * 3, frames, targets, cuts={12})
    assert not same(cut, uncut)


@one_loop
@pytest.mark.parametrize("stages", [2, 3, 4])
async def test_aux_nets_equal_the_loops(stages: int) -> None:
    """Every block learns right after its forward from predicted λ; AuxNets learn of a frame one frame later."""
    frames, targets = stream(40)
    settings: dict[str, Any] = {"beta": 3.0, "rate": 0.2}
    expected = aided(
        pieces(ribbon(stages), [2] * stages), frames, targets, functional.cross_entropy, lr=0.1, **settings
    )
    course = await learn(rule_with(start="aux", **settings), ribbon(stages), [2] * stages, frames, targets)
    close(course, *expected)
    assert set(course.delays) == {(0,) * stages}


@one_loop
@pytest.mark.parametrize("start", STARTS)
async def test_predictions_are_the_models_own(start: Start) -> None:
    """What comes out, and its loss, are the model's forward of the frame, not that of λ."""
    frames, targets = stream(12)
    model = ribbon(3)
    course = await learn(rule_with(start=start, optimizer=Recorder), model, [2] * 3, frames, targets)
    with torch.no_grad():
        expected = [model(frame) for frame in frames]
    assert all(torch.equal(output, own) for output, own in zip(course.outputs, expected, strict=True))
    losses = [float(functional.cross_entropy(own, target)) for own, target in zip(expected, targets, strict=True)]
    assert course.losses == pytest.approx(losses)


# ------------------------------------------------------------------------------------------------ boundaries


class Skips(nn.Module):
    """What crosses a cut between the middle layers is two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        found: torch.Tensor = self.third(a + b)
        return found


class Marked(nn.Module):
    """Hands on a floating tensor and one of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.layer(x)), torch.tensor([1])


class Picking(nn.Module):
    """Adds the row that the index names."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.layer = nn.Embedding(3, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x + self.rows(index))
        return found


def skipping() -> Skips:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Skips()


@one_loop
async def test_skips_across_a_cut() -> None:
    """Two tensors cross: from the output with unit step still back-propagation; otherwise each has its λ."""
    frames, targets = stream(20)
    balance = [3, 3]  # linear, tanh, linear | tanh, add, linear
    delayed = await learn(
        Delayed(order="1f1b", loss=functional.cross_entropy, optimizer=SGD), skipping(), balance, frames, targets
    )
    assert same(await learn(rule_with(), skipping(), balance, frames, targets), delayed)
    for start in ("previous", "aux"):
        course = await learn(rule_with(start=start), skipping(), balance, frames, targets)
        assert all(bool(tensor.isfinite().all()) for tensor in course.state.values())
        if start == "previous":
            assert [tuple(lam.shape) for lam in course.hands[0].previous] == [(1, 8), (1, 8)]
    reference = skipping()
    assert not torch.equal(course.state["first.weight"], reference.first.weight)


@one_loop
@pytest.mark.parametrize("start", STARTS)
async def test_indices_pass_through(start: Start) -> None:
    """A tensor of integers has no λ and reaches the block above as it is."""
    frames, targets = stream(10)
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline.from_stages, [Marked(), Picking()], learner=rule_with(start=start)
    )
    before = {key: tensor.clone() for key, tensor in pipeline.state_dict().items()}
    course = await follow(pipeline, frames, targets)
    assert not torch.equal(course.state["Picking.rows.weight"][1], before["Picking.rows.weight"][1])
    assert torch.equal(course.state["Picking.rows.weight"][0], before["Picking.rows.weight"][0])
    assert not torch.equal(course.state["Marked.layer.weight"], before["Marked.layer.weight"])


@one_loop
async def test_frames_of_another_shape_start_anew() -> None:
    """λ of a frame with other rows does not fit, and is not used."""
    frames, targets = stream(6)
    frames[3:] = [frame.repeat(2, 1) for frame in frames[3:]]
    targets[3:] = [target.repeat(2) for target in targets[3:]]
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline.from_stages, pieces(ribbon(2), [2, 2]), learner=rule_with(start="previous")
    )
    course = await follow(pipeline, frames, targets)
    assert course.hands[0].previous[0].shape == (2, 8)


@one_loop
@pytest.mark.filterwarnings("ignore:BatchNorm1d")
@pytest.mark.parametrize("start", STARTS)
async def test_running_statistics_count_each_frame_once(start: Start) -> None:
    """A second forward on the same frame uses batch statistics, and does not count them again."""
    frames, targets = stream(8)
    frames, targets = [frame.repeat(3, 1) + torch.randn(3, 6) for frame in frames], [t.repeat(3) for t in targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    course = await learn(rule_with(start=start, sweeps=2), model, [2, 3], frames, targets)
    assert course.state["3.num_batches_tracked"] == 8


# ------------------------------------------------------------------------------------------------ devices and orders


def simulated(stages: int, seconds: Callable[[Work, Frame], float] = lambda work, frame: 1.0) -> list[SimulatedDevice]:
    clock = VirtualClock()
    return [SimulatedDevice(k, seconds=seconds, clock=clock) for k in range(stages)]


@one_loop
@pytest.mark.parametrize("start", STARTS)
async def test_the_same_bits_everywhere(start: Start) -> None:
    """In strict order: CPU streams, shared ones, inline and simulated devices give the same losses and weights."""
    frames, targets = stream(30)
    courses = [
        await learn(rule_with(start=start), ribbon(3), [2] * 3, frames, targets, devices=devices)
        for devices in (
            ["cpu:0", "cpu:1", "cpu:2"], ["cpu:0", "cpu:1", "cpu:0"], ["inline"] * 3, simulated(3),
        )
    ]  # fmt: skip
    assert all(same(course, courses[0]) for course in courses[1:])


@both_loops
@pytest.mark.parametrize("start", STARTS)
async def test_event_order_learns_from_every_frame_once(start: Start) -> None:
    """As soon as it can: every stage learns from every frame, whose delay is at most S-1-k, with AuxNets 0."""
    frames, targets = stream(60)
    devices = ["cpu:0", "cpu:1", "cpu:2"]
    course = await learn(rule_with(start=start, order="event"), ribbon(3), [2] * 3, frames, targets, devices=devices)
    assert [hand.learned for hand in course.hands] == [60] * 3
    assert all(delay[k] <= (0 if start == "aux" else 2 - k) for delay in course.delays for k in range(3))
    assert not any(hand.carried or hand.unheard or hand.kept for hand in course.hands)


@one_loop
@pytest.mark.parametrize("order", ["event", "1f1b"])
async def test_with_aux_nets_no_stage_waits(order: str) -> None:
    """Four stages of one second forward and two backward take three seconds a frame, with delay 0."""
    frames, targets = stream(40)
    devices = simulated(4, lambda work, frame: 2.0 if work.phase == "backward" else 1.0)
    rule = rule_with(start="aux", order=order)
    course = await learn(rule, ribbon(4), [2] * 4, frames, targets, devices=devices)
    assert set(course.delays) == {(0, 0, 0, 0)}
    assert devices[0].clock.now() <= 3 * 40 + 3 * 4
    steps = [hand.nets.steps for hand in course.hands[:-1]]
    assert all(35 <= count < 40 for count in steps)  # what comes down after the last frame is not heard


@one_loop
async def test_late_targets() -> None:
    """In event order from the output a target may come later; where frames follow from each other it may not."""
    frames, targets = stream(3)
    pipeline = await build(rule_with(order="event", sweeps=2), ribbon(2), [2, 2], frames[0], ["cpu:0", "cpu:1"])
    async with asyncio.timeout(PATIENCE), pipeline:
        output = (await pipeline.submit(Sample(frames[0], LATER, key="a"))).output
        assert await pipeline.feedback("a", targets[0]) == pytest.approx(
            float(functional.cross_entropy(output, targets[0]))
        )
    pipeline = await build(rule_with(order="event", start="previous"), ribbon(2), [2, 2], frames[0])
    async with asyncio.timeout(PATIENCE), pipeline:
        with pytest.raises(InputError, match="no late targets"):
            await pipeline.submit(Sample(frames[0], LATER, key="a"))


@one_loop
@pytest.mark.parametrize("start", STARTS)
async def test_frames_without_target_change_nothing(start: Start) -> None:
    """They are predicted; λ, the AuxNets and the weights are as if they had not come."""
    frames, targets = stream(20)
    mixed_frames = [x for frame in frames for x in (frame, -frame)]
    mixed_targets: list[Any] = [y for target in targets for y in (target, None)]
    one = await build(rule_with(OneAtATime, start=start), ribbon(3), [2] * 3, frames[0])
    async with asyncio.timeout(PATIENCE):
        async for _ in one.run(map(Sample, mixed_frames, mixed_targets)):
            pass
    other = await learn(rule_with(OneAtATime, start=start), ribbon(3), [2] * 3, frames, targets)
    assert all(torch.equal(tensor, other.state[key]) for key, tensor in one.state_dict().items())


# ------------------------------------------------------------------------------------------------ state and mishaps


@one_loop
@pytest.mark.parametrize("start", STARTS)
async def test_state_is_all_that_is_needed_to_go_on(start: Start) -> None:
    """Weights and learner states put into a new pipeline continue to the bit; the model's keys stay its own."""
    frames, targets = stream(30)
    first = await build(rule_with(optimizer=ADAM, start=start), ribbon(3), [2] * 3, frames[0])
    await follow(first, frames[:15], targets[:15])
    weights = first.state_dict()
    assert set(weights) == set(ribbon(3).state_dict())
    states = [copy.deepcopy(spec.hands.state_dict()) for spec in first._specs]  # type: ignore[union-attr]
    second = await build(rule_with(optimizer=ADAM, start=start), ribbon(3), [2] * 3, frames[0])
    await second.load_state_dict(weights)
    for spec, state in zip(second._specs, states, strict=True):
        assert isinstance(spec.hands, AuxiliaryLearner)
        spec.hands.load_state_dict(state)
    one = await follow(first, frames[15:], targets[15:])
    other = await follow(second, frames[15:], targets[15:])
    assert same(one, other)


@one_loop
@pytest.mark.parametrize("start", STARTS)
async def test_a_target_that_is_not_finite_spoils_nothing(start: Start) -> None:
    """The guard skips the update, and λ starts anew instead of staying NaN."""
    frames, _ = stream(12)
    targets = [torch.ones(1, 4) for _ in frames]
    targets[5] = torch.full((1, 4), torch.nan)
    rule = rule_with(loss=functional.mse_loss, start=start)
    pipeline = await build(rule, ribbon(3), [2] * 3, frames[0])
    course = await follow(pipeline, frames, targets)
    assert all(bool(tensor.isfinite().all()) for tensor in course.state.values())
    assert course.losses[-1] < course.losses[0]
    assert all(hand.updater.skipped <= 1 for hand in course.hands)


@one_loop
@pytest.mark.parametrize("order", ["event", "1f1b"])
@pytest.mark.parametrize("start", STARTS)
async def test_frames_that_fail_at_the_top_are_left_out(start: Start, order: str) -> None:
    """Where the loss refuses a frame no p comes down for it; the others are learned from, and nothing is kept."""
    frames, targets = stream(20)
    targets[4] = targets[5] = targets[19] = torch.zeros(7, dtype=torch.long)
    rule = rule_with(start=start, order=order)
    pipeline = await build(rule, ribbon(3), [2] * 3, frames[0], ["cpu:0", "cpu:1", "cpu:2"])
    hands: list[Any] = [spec.hands for spec in pipeline._specs]
    async with asyncio.timeout(PATIENCE):
        run = pipeline.run(map(Sample, frames, targets), on_error="skip")
        unheard = [max(len(hand.unheard) for hand in hands) async for _ in run]
    assert len(unheard) == 17
    assert order == "event" or max(unheard) <= 2  # what never comes down is not waited for
    assert hands[2].learned == 17
    assert not any(hand.carried or hand.unheard or hand.kept for hand in hands)
    if start == "aux":
        assert hands[0].learned == 20  # a block needs nothing from above
        assert hands[1].nets.steps <= 17


@one_loop
async def test_half_precision_keeps_small_gaps() -> None:
    """Under bfloat16 autocast λ - x⁻ is kept in float32: β of a million still gives a useful gradient."""
    frames, targets = stream(15)
    rule = rule_with(beta=2.0**20, precision=torch.bfloat16)
    course = await learn(rule, ribbon(3), [2] * 3, frames, targets)
    delayed = Delayed(order="1f1b", loss=functional.cross_entropy, optimizer=SGD, precision=torch.bfloat16)
    expected = await learn(delayed, ribbon(3), [2] * 3, frames, targets)
    torch.testing.assert_close(course.state, expected.state, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"rate": -1.0}, "rate"),
        ({"sweeps": 0}, "sweeps"),
        ({"start": "zero"}, "start"),
        ({"aux": "linear"}, 'start="aux"'),
        ({"aux": "deep", "start": "aux"}, "aux must be"),
        ({"order": "lockstep"}, "order"),
        ({"start": "aux", "precision": torch.float16}, "bfloat16"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], why: str) -> None:
    """Each is refused when the rule is made, with its name."""
    with pytest.raises(ConfigurationError, match=why):
        rule_with(**settings)


def test_what_a_plan_asks() -> None:
    """With AuxNets a stage waits for none above and keeps one frame; else as back-propagation."""
    assert [rule_with(start="aux").reach(k, 3) for k in range(3)] == [0, 0, 0]
    assert [rule_with(start="aux").graphs(k, 3) for k in range(3)] == [1, 1, 1]
    assert [rule_with().reach(k, 3) for k in range(3)] == [2, 1, 0]
    assert [rule_with().graphs(k, 3) for k in range(3)] == [3, 2, 1]

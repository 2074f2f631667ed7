"""AugmentedLagrangian: its equations, and what it is for: no gap is left where the penalty alone leaves one."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional

from aiotime.errors import ConfigurationError
from aiotime.learning import Delayed
from aiotime.learning.augmented_lagrangian import AugmentedLagrangian
from aiotime.learning.auxiliary import AuxiliaryLearner, AuxiliaryRule
from aiotime.learning.order import Order
from aiotime.learning.penalty import Penalty
from tests.learning.joints import Recorder, aided, build, close, follow, learn, same, swept
from tests.learning.reference import fifo, pieces, ribbon, stream

SGD = partial(torch.optim.SGD, lr=0.1)
STARTS = ["output", "previous", "aux"]

one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


class OneAtATime(AugmentedLagrangian):
    """No frame enters a stage before it has learned from the one before."""

    def order(self, stage: int, stages: int) -> Order:
        return Order(0)


class PenaltyOneAtATime(Penalty):
    """The same without multipliers."""

    def order(self, stage: int, stages: int) -> Order:
        return Order(0)


def rule_with(kind: type[AuxiliaryRule] = AugmentedLagrangian, **settings: Any) -> AuxiliaryRule:
    return kind(**{"beta": 4.0, "loss": functional.cross_entropy, "optimizer": SGD, "order": "1f1b", **settings})


@one_loop
async def test_a_single_stage_is_plain_training() -> None:
    """With one stage there is no multiplier: the bits of plain PyTorch."""
    frames, targets = stream(30)
    losses, state = fifo(pieces(ribbon(1), [2]), frames, targets, functional.cross_entropy, SGD, [0])
    course = await learn(rule_with(), ribbon(1), [2], frames, targets)
    assert course.losses == losses
    assert all(torch.equal(course.state[key], tensor) for key, tensor in state.items())


@one_loop
@pytest.mark.parametrize(("stages", "sweeps"), [(2, 1), (3, 1), (4, 1), (3, 3)])
@pytest.mark.parametrize("start", ["output", "previous"])
async def test_sweeps_equal_the_loops(stages: int, start: str, sweeps: int) -> None:
    """Weights after the stream are those of explicit loops over frames, blocks and sweeps; a cut starts λ, κ anew."""
    frames, targets = stream(25)
    settings: dict[str, Any] = {"beta": 3.0, "rate": 0.2, "sweeps": sweeps, "dual_rate": 0.5}
    expected = swept(
        pieces(ribbon(stages), [2] * stages), frames, targets, functional.cross_entropy, lr=0.1, cuts={12},
        previous=start == "previous", **settings,
    )  # fmt: skip
    rule = rule_with(OneAtATime, start=start, **settings)
    close(await learn(rule, ribbon(stages), [2] * stages, frames, targets, cuts={12}), *expected)


@one_loop
@pytest.mark.parametrize("stages", [2, 4])
async def test_aux_nets_equal_the_loops(stages: int) -> None:
    """With multipliers too, every block learns right after its forward."""
    frames, targets = stream(40)
    settings: dict[str, Any] = {"beta": 3.0, "rate": 0.2, "dual_rate": 0.1}
    expected = aided(
        pieces(ribbon(stages), [2] * stages), frames, targets, functional.cross_entropy, lr=0.1, **settings
    )
    close(await learn(rule_with(start="aux", **settings), ribbon(stages), [2] * stages, frames, targets), *expected)


@one_loop
async def test_from_the_output_with_unit_step_multipliers_change_nothing() -> None:
    """With ηβ = 1 the terminal gradient is p whatever κ is: back-propagation to rounding."""
    frames, targets = stream(30)
    delayed = Delayed(order="1f1b", loss=functional.cross_entropy, optimizer=SGD)
    expected = await learn(delayed, ribbon(3), [2] * 3, frames, targets)
    close(await learn(rule_with(), ribbon(3), [2] * 3, frames, targets), expected.losses, expected.state)


@one_loop
async def test_multipliers_close_the_gap_that_the_penalty_leaves() -> None:
    """On one frame with weights held, ‖λ - x⁻‖ of the penalty stalls at ‖p‖/β, the augmented Lagrangian's goes to 0."""
    model = ribbon(3).double()
    frame, target = torch.linspace(-1, 1, 6, dtype=torch.float64)[None], torch.tensor([2])
    sweeps = 80

    async def violations(kind: type[AuxiliaryRule], beta: float) -> list[list[float]]:
        found: list[list[float]] = []
        rule = rule_with(kind, beta=beta, rate=0.5 / beta, start="previous", optimizer=Recorder)
        pipeline = await build(rule, model, [2] * 3, frame)
        await follow(
            pipeline, [frame] * sweeps, [target] * sweeps,
            watch=lambda hands: found.append([hand.violation for hand in hands[:-1]]),
        )  # fmt: skip
        return found

    penalty = {beta: await violations(PenaltyOneAtATime, beta) for beta in (4.0, 40.0)}
    lagrangian = await violations(OneAtATime, 4.0)
    for boundary in range(2):
        stalled = penalty[4.0][-1][boundary]
        assert stalled == pytest.approx(penalty[4.0][-10][boundary], rel=1e-6)
        assert stalled / penalty[40.0][-1][boundary] == pytest.approx(10, rel=0.15)
        assert lagrangian[-1][boundary] < 1e-8 < 1e-3 < stalled


@one_loop
async def test_at_rest_the_multiplier_is_the_gradient() -> None:
    """Where the gap is closed, κ = -p and the block below gets back-propagation's gradient."""
    model = ribbon(2).double()
    frame, target = torch.linspace(-1, 1, 6, dtype=torch.float64)[None], torch.tensor([2])
    rule = rule_with(OneAtATime, rate=0.5 / 4.0, start="previous", optimizer=Recorder)
    course = await learn(rule, model, [2, 2], [frame] * 60, [target] * 60)
    middle = model[:2](frame).detach().requires_grad_()
    (p,) = torch.autograd.grad(functional.cross_entropy(model[2:](middle), target), middle)
    torch.testing.assert_close(course.hands[0].dual[0], -p)
    exact = torch.autograd.grad(functional.cross_entropy(model(frame), target), list(model[:2].parameters()))
    torch.testing.assert_close(course.hands[0].updater.optimizer.grads[-1], list(exact))


@one_loop
@pytest.mark.parametrize("start", STARTS)
async def test_the_same_bits_everywhere_and_after_a_stop(start: str) -> None:
    """In strict order: CPU streams and inline agree; λ, κ and the AuxNets go on in another pipeline to the bit."""
    frames, targets = stream(24)
    threads = await learn(
        rule_with(start=start), ribbon(3), [2] * 3, frames, targets, devices=["cpu:0", "cpu:1", "cpu:2"]
    )
    assert same(await learn(rule_with(start=start), ribbon(3), [2] * 3, frames, targets), threads)
    first = await build(rule_with(start=start), ribbon(3), [2] * 3, frames[0])
    await follow(first, frames[:12], targets[:12])
    states = [copy.deepcopy(spec.hands.state_dict()) for spec in first._specs]  # type: ignore[union-attr]
    second = await build(rule_with(start=start), ribbon(3), [2] * 3, frames[0])
    await second.load_state_dict(first.state_dict())
    for spec, state in zip(second._specs, states, strict=True):
        assert isinstance(spec.hands, AuxiliaryLearner)
        spec.hands.load_state_dict(state)
    one = await follow(first, frames[12:], targets[12:])
    assert same(await follow(second, frames[12:], targets[12:]), one)


def test_the_step_of_the_multipliers() -> None:
    """It is 1, with AuxNets small, and refused outside (0, 1]."""
    assert rule_with().dual_rate == 1.0
    assert rule_with(start="aux").dual_rate == 0.01
    assert rule_with(start="aux", dual_rate=0.5).dual_rate == 0.5
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigurationError, match="dual_rate"):
            rule_with(dual_rate=wrong)

"""BlockADMM: its equations against loops, exact solutions against the optimum's conditions, and that it learns."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from aiotime import LATER, Sample
from aiotime.errors import ConfigurationError
from aiotime.learning.block_admm import BlockADMM, BlockLearner
from aiotime.learning.order import Order
from tests.learning.joints import Loss, Recorder, build, close, descend, follow, learn, same, state_of
from tests.learning.reference import fifo, pieces, ribbon, stream

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01)

one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


class OneAtATime(BlockADMM):
    """No frame enters a stage before it has learned from the one before."""

    def order(self, stage: int, stages: int) -> Order:
        return Order(0)


def rule_with(kind: type[BlockADMM] = BlockADMM, **settings: Any) -> BlockADMM:
    base = {"rho": 4.0, "loss": functional.cross_entropy, "optimizer": SGD, "order": "1f1b"}
    return kind(**{**base, **settings})


def alternated(
    parts: Sequence[nn.Module],
    frames: Sequence[torch.Tensor],
    targets: Sequence[Any],
    loss: Loss,
    *,
    lr: float,
    rho: float,
    rate: float,
    inner_steps: int,
    prox: float,
    cuts: Collection[int] = (),
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """From the top down: z, its dual, the weights; plain gradient steps."""
    top = len(parts) - 1
    duals: list[torch.Tensor | None] = [None] * len(parts)
    losses = []
    for t, (frame, target) in enumerate(zip(frames, targets, strict=True)):
        if t in cuts:
            duals = [None] * len(parts)
        entries = [frame]
        with torch.no_grad():
            for part in parts:
                entries.append(part(entries[-1]))
            losses.append(float(loss(entries[-1], target)))
        wanted = torch.zeros(())
        for k in reversed(range(len(parts))):
            part = parts[k]

            def objective(y: torch.Tensor, last: bool = k == top, tau: torch.Tensor = wanted, y_t: Any = target) -> Any:
                return loss(y, y_t) if last else rho / 2 * ((y - tau) ** 2).sum()

            z, x = entries[k], entries[k]
            if k > 0:
                old = duals[k]
                u = torch.zeros_like(x) if old is None else old
                for _ in range(inner_steps):
                    leaf = z.clone().requires_grad_()
                    (p,) = torch.autograd.grad(objective(part(leaf)), leaf)
                    z = z - rate * (p + rho * (z - x - u))
                wanted = z - u
                duals[k] = u + x - z
            anchors = [p.detach().clone() for p in part.parameters()]
            for _ in range(inner_steps):
                params = list(part.parameters())
                grads = torch.autograd.grad(objective(part(z)), params)
                held = [g + prox * (p.detach() - a) for g, p, a in zip(grads, params, anchors, strict=True)]
                descend(part, held, lr)
    return losses, state_of(parts)


# ------------------------------------------------------------------------------------------------ the equations


@one_loop
async def test_a_single_stage_is_plain_training() -> None:
    """With one stage and one step there is nothing to alternate: the bits of plain PyTorch."""
    frames, targets = stream(30)
    losses, state = fifo(pieces(ribbon(1), [2]), frames, targets, functional.cross_entropy, ADAM, [0])
    course = await learn(rule_with(optimizer=ADAM), ribbon(1), [2], frames, targets)
    assert course.losses == losses
    assert all(torch.equal(course.state[key], tensor) for key, tensor in state.items())


@one_loop
@pytest.mark.parametrize(("inner_steps", "prox"), [(1, 0.0), (3, 0.5)])
@pytest.mark.parametrize("stages", [2, 3, 4])
async def test_alternation_equals_the_loops(stages: int, inner_steps: int, prox: float) -> None:
    """Weights after the stream are those of explicit loops over frames, blocks and steps; a cut starts duals anew."""
    frames, targets = stream(20)
    settings: dict[str, Any] = {"rho": 2.0, "rate": 0.3, "inner_steps": inner_steps, "prox": prox}
    expected = alternated(
        pieces(ribbon(stages), [2] * stages), frames, targets, functional.cross_entropy, lr=0.1, cuts={9}, **settings
    )
    rule = rule_with(OneAtATime, **settings)
    close(await learn(rule, ribbon(stages), [2] * stages, frames, targets, cuts={9}), *expected)


@one_loop
async def test_a_cut_matters() -> None:
    """Without the cut the weights come out otherwise."""
    frames, targets = stream(20)
    uncut, cut = [
        await learn(rule_with(OneAtATime, rate=0.1), ribbon(3), [2] * 3, frames, targets, cuts=cuts)
        for cuts in ((), {9})
    ]
    assert not same(cut, uncut)


@one_loop
@pytest.mark.parametrize("rho", [1.0, 2.0**16])
async def test_with_one_unit_step_the_block_below_receives_p(rho: float) -> None:
    """With ηρ = 1 the first frame's gradient of the block below is back-propagation's, whatever ρ is."""
    frames, targets = stream(1)
    model = ribbon(2)
    course = await learn(rule_with(rho=rho, optimizer=Recorder), model, [2, 2], frames, targets)
    exact = torch.autograd.grad(functional.cross_entropy(model(frames[0]), targets[0]), list(model[:2].parameters()))
    torch.testing.assert_close(course.hands[0].updater.optimizer.grads[0], list(exact))


@one_loop
async def test_duals_close_the_gap() -> None:
    """On one frame with weights held, ‖x⁻ - z‖ goes to 0 and ρu to the gradient at the boundary."""
    model = ribbon(2).double()
    frame, target = torch.linspace(-1, 1, 6, dtype=torch.float64)[None], torch.tensor([2])
    rule = rule_with(OneAtATime, rate=0.5 / 4.0, optimizer=Recorder)
    course = await learn(rule, model, [2, 2], [frame] * 60, [target] * 60)
    middle = model[:2](frame).detach().requires_grad_()
    (p,) = torch.autograd.grad(functional.cross_entropy(model[2:](middle), target), middle)
    assert course.hands[1].residual < 1e-8
    torch.testing.assert_close(4.0 * course.hands[1].dual[0], p)


# ------------------------------------------------------------------------------------------------ exactly, at the top


def regression(frames: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """y = tanh(x A) B, two rows a frame."""
    generator = torch.Generator().manual_seed(4)
    xs = torch.randn(frames, 2, 6, generator=generator)
    first, second = torch.randn(6, 8, generator=generator) / 2, torch.randn(8, 4, generator=generator) / 2
    return list(xs), list(torch.tanh(xs @ first) @ second)


def line(*, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=bias))


@one_loop
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
async def test_the_exact_top_is_at_the_optimum(reduction: str, bias: bool) -> None:
    """The gradients of both of its problems, taken by autograd, are zero at what it found."""
    frames, targets = regression(1)
    model, loss = line(bias=bias).double(), nn.MSELoss(reduction=reduction)
    frame, target = frames[0].double(), targets[0].double()
    rule = rule_with(loss=loss, rho=3.0, prox=0.7, exact_top=True, optimizer=Recorder)
    course = await learn(rule, model, [2, 1], [frame], [target])
    with torch.no_grad():
        x = model[:2](frame)
    z = (x - course.hands[1].dual[0]).requires_grad_()  # u was 0, so u ← x⁻ - z
    old = [p.detach() for p in model[2].parameters()]
    objective = loss(functional.linear(z, *old), target) + 3.0 / 2 * ((z - x) ** 2).sum()
    (slope,) = torch.autograd.grad(objective, z)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)
    new = [course.state[key].clone().requires_grad_() for key in ["2.weight", "2.bias"][: 1 + bias]]
    held = sum(((now - before) ** 2).sum() for now, before in zip(new, old, strict=True))
    objective = loss(functional.linear(z.detach(), *new), target) + 0.7 / 2 * held
    for slope in torch.autograd.grad(objective, new):
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)


@one_loop
async def test_a_frozen_bias_stays() -> None:
    """The exact solution is that of the weight alone."""
    frames, targets = regression(3)
    model = line()
    assert isinstance(model[2], nn.Linear)
    model[2].bias.requires_grad_(False)
    rule = rule_with(loss=functional.mse_loss, prox=0.1, exact_top=True)
    course = await learn(rule, model, [2, 1], frames, targets)
    assert torch.equal(course.state["2.bias"], model[2].bias)
    assert not torch.equal(course.state["2.weight"], model[2].weight)


@one_loop
@pytest.mark.parametrize("exact_top", [False, True])
async def test_it_learns_a_regression(exact_top: bool) -> None:
    """The loss before learning from each frame falls to a fraction of what it was."""
    frames, targets = regression(300)
    rule = rule_with(loss=functional.mse_loss, rho=1.0, inner_steps=2, prox=0.5, exact_top=exact_top, optimizer=ADAM)
    course = await learn(rule, line(), [2, 1], frames, targets)
    assert sum(course.losses[-40:]) < 0.25 * sum(course.losses[:40])


@one_loop
async def test_an_exact_top_must_be_one_linear_layer() -> None:
    """More than that, or another loss, is refused with what to do."""
    frames, _ = regression(1)
    rule = rule_with(loss=functional.mse_loss, prox=0.1, exact_top=True)
    with pytest.raises(ConfigurationError, match=r"one trainable nn\.Linear.*balance"):
        await build(rule, line(), [1, 2], frames[0])

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.last(self.first(x)) * 2
            return found

    with pytest.raises(ConfigurationError, match="computes more"):
        await build(rule, Doubled(), [1, 2], frames[0])
    with pytest.raises(ConfigurationError, match="mse_loss"):
        rule_with(prox=0.1, exact_top=True)
    with pytest.raises(ConfigurationError, match="prox > 0"):
        rule_with(loss=functional.mse_loss, exact_top=True)


# ------------------------------------------------------------------------------------------------ devices and state


@one_loop
async def test_the_same_bits_everywhere_and_after_a_stop() -> None:
    """In strict order CPU streams and inline agree; duals go on in another pipeline to the bit."""
    frames, targets = stream(24)
    rule = partial(rule_with, optimizer=ADAM, inner_steps=2, prox=0.1)
    threads = await learn(rule(), ribbon(3), [2] * 3, frames, targets, devices=["cpu:0", "cpu:1", "cpu:2"])
    assert same(await learn(rule(), ribbon(3), [2] * 3, frames, targets), threads)
    first = await build(rule(), ribbon(3), [2] * 3, frames[0])
    await follow(first, frames[:12], targets[:12])
    states = [copy.deepcopy(spec.hands.state_dict()) for spec in first._specs]  # type: ignore[union-attr]
    second = await build(rule(), ribbon(3), [2] * 3, frames[0])
    await second.load_state_dict(first.state_dict())
    for spec, state in zip(second._specs, states, strict=True):
        assert isinstance(spec.hands, BlockLearner)
        spec.hands.load_state_dict(state)
    one = await follow(first, frames[12:], targets[12:])
    assert same(await follow(second, frames[12:], targets[12:]), one)


@pytest.mark.asyncio
async def test_event_order_learns_from_every_frame_once() -> None:
    """On CPU streams every stage learns from every frame, and keeps nothing."""
    frames, targets = stream(60)
    devices = ["cpu:0", "cpu:1", "cpu:2"]
    course = await learn(rule_with(order="event"), ribbon(3), [2] * 3, frames, targets, devices=devices)
    assert [hand.learned for hand in course.hands] == [60] * 3
    assert not any(hand.inputs or hand.kept for hand in course.hands)


@one_loop
async def test_late_targets() -> None:
    """In event order a target may come later."""
    frames, targets = stream(1)
    pipeline = await build(rule_with(order="event"), ribbon(2), [2, 2], frames[0], ["cpu:0", "cpu:1"])
    async with pipeline:
        output = (await pipeline.submit(Sample(frames[0], LATER, key="a"))).output
        loss = await pipeline.feedback("a", targets[0])
    assert loss == pytest.approx(float(functional.cross_entropy(output, targets[0])))


@one_loop
async def test_a_target_that_is_not_finite_spoils_nothing() -> None:
    """The guard skips the update, and the duals start anew instead of staying NaN."""
    frames, targets = regression(12)
    targets[5] = torch.full((2, 4), torch.nan)
    for exact_top in (False, True):
        rule = rule_with(loss=functional.mse_loss, prox=0.5, exact_top=exact_top)
        course = await learn(rule, line(), [2, 1], frames, targets)
        assert all(bool(tensor.isfinite().all()) for tensor in course.state.values())
        assert all(hand.updater.skipped <= 1 for hand in course.hands)


@one_loop
async def test_frozen_layers_below_have_no_z() -> None:
    """Below the first stage that learns nothing is sent, and nothing changes."""
    frames, targets = stream(10)
    model = ribbon(3)
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)
    course = await learn(rule_with(), model, [2, 2, 2], frames, targets)
    assert torch.equal(course.state["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(course.state["2.weight"], model.state_dict()["2.weight"])
    assert course.hands[1].dual is None


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rho": 0.0}, "rho"),
        ({"rate": 0.0}, "rate"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"prox": -1.0}, "prox"),
        ({"order": "lockstep"}, "order"),
        ({"precision": torch.float16}, "bfloat16"),
        ({"update_every": 2}, "update_every"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], why: str) -> None:
    """Each is refused when the rule is made, with its name."""
    with pytest.raises(ConfigurationError, match=why):
        rule_with(**settings)

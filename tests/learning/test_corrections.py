"""Corrections against their equations, written out on the sequential reference."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.errors import ConfigurationError
from aiotime.learning import Delayed
from aiotime.learning.corrections import (
    Correction,
    DelayScaling,
    DiscrepancyCorrection,
    GapAware,
    HybridFinish,
    LearningRateRescheduling,
    SpikeCompensation,
    WeightPrediction,
    asynchronous_nesterov,
    from_batch_recipe,
)
from aiotime.learning.learner import Site
from aiotime.learning.order import Order
from aiotime.learning.ticket import Ticket
from tests.learning.reference import fifo, pieces, ribbon, stream

PATIENCE = 20.0
LR = 0.05
STAGES = 3
BALANCE = [4] * STAGES  # two layers each, so that every backward reads weights
SGD = partial(torch.optim.SGD, lr=LR)
MOMENTUM = partial(torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=0.02)

one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])

Found = tuple[list[float], dict[str, torch.Tensor]]


async def corrected(
    corrections: Sequence[Correction], optimizer: Any, frames: Any, targets: Any, **settings: Any
) -> tuple[Found, list[tuple[int, ...]]]:
    """((losses, state), delays) of a pipeline of three stages in the order 1f1b."""
    settings = {"order": "1f1b", **settings}
    rule = Delayed(loss=functional.cross_entropy, optimizer=optimizer, corrections=corrections, **settings)
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline, ribbon(2 * STAGES), example=frames[0], devices=["cpu:0", "cpu:1", "cpu:0"], balance=BALANCE,
        learner=rule,
    )  # fmt: skip
    losses, delays = [], []
    async with asyncio.timeout(PATIENCE):
        async for prediction in pipeline.run(map(aiotime.Sample, frames, targets)):
            assert prediction.loss is not None and prediction.delay is not None
            losses.append(prediction.loss)
            delays.append(prediction.delay)
    return (losses, pipeline.state_dict()), delays


def queued(optimizer: Any, frames: Any, targets: Any, **hooks: Any) -> Found:
    """The sequential reference with the equations of a correction hooked in."""
    delays = hooks.pop("delays", [STAGES - 1 - k for k in range(STAGES)])
    parts = pieces(ribbon(2 * STAGES), BALANCE)
    return fifo(parts, frames, targets, functional.cross_entropy, optimizer, delays, **hooks)


def close(found: Found, expected: Found) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def differ(found: Found, other: Found) -> None:
    """The correction is not a no-op."""
    assert any(not torch.allclose(found[1][key], other[1][key], atol=1e-4) for key in other[1])


class Delays:
    """D at stage k for its n-th call: the pipeline fills first."""

    def __init__(self) -> None:
        self.calls = [0] * STAGES

    def __call__(self, k: int) -> int:
        self.calls[k] += 1
        return min(self.calls[k] - 1, STAGES - 1 - k)


# ------------------------------------------------------------------------------------------------ step


def spike(delays: Delays) -> Callable[[int, list[torch.Tensor], torch.optim.Optimizer], None]:
    velocity: dict[torch.Tensor, torch.Tensor] = {}

    def step(k: int, params: list[torch.Tensor], own: torch.optim.Optimizer) -> None:
        late = delays(k)
        m, decay = own.param_groups[0]["momentum"], own.param_groups[0]["weight_decay"]
        a, b = m**late, (1 - m**late) / (1 - m)
        for p in params:
            assert p.grad is not None
            g = p.grad + decay * p.detach()
            v = velocity[p] = m * velocity[p] + g if p in velocity else g
            p.data -= LR * (a * v + b * g)
            own.state[p]["momentum_buffer"] = v

    return step


@one_loop
async def test_spike_compensation() -> None:
    """v ← m v + g; θ ← θ - η (a v + b g), a = m^D, b = (1-m^D)/(1-m)."""
    frames, targets = stream(25)
    found, _ = await corrected([SpikeCompensation()], MOMENTUM, frames, targets)
    close(found, queued(MOMENTUM, frames, targets, step=spike(Delays())))
    differ(found, queued(MOMENTUM, frames, targets))


# ------------------------------------------------------------------------------------------------ forward


def ahead(delays: Delays) -> Callable[[int, list[torch.Tensor], torch.optim.Optimizer], list[torch.Tensor]]:
    def forward(k: int, params: list[torch.Tensor], own: torch.optim.Optimizer) -> list[torch.Tensor]:
        late = delays(k)
        return [p - late * LR * own.state[p]["momentum_buffer"] if own.state[p] else p for p in params]

    return forward


@one_loop
async def test_prediction_by_velocity() -> None:
    """θ̂ = θ - D η v, the gradient at θ̂; and with the newest weights in the backward under "current"."""
    frames, targets = stream(25)
    found, _ = await corrected([WeightPrediction()], MOMENTUM, frames, targets)
    close(found, queued(MOMENTUM, frames, targets, forward=ahead(Delays())))
    differ(found, queued(MOMENTUM, frames, targets))
    current, _ = await corrected([WeightPrediction()], MOMENTUM, frames, targets, weights="current")
    close(
        current,
        queued(MOMENTUM, frames, targets, forward=ahead(Delays()), backward_reads=lambda k, params, lag: params),
    )
    differ(current, found)


@one_loop
async def test_prediction_by_difference() -> None:
    """θ̂ = θ + D (θ_t - θ_{t-1}), with any optimizer; for SGD without momentum the same as "velocity"."""
    frames, targets = stream(25)
    for optimizer in (SGD, partial(torch.optim.NAdam, lr=0.01)):
        last: dict[torch.Tensor, torch.Tensor] = {}
        delays = Delays()

        def step(k: int, params: list[torch.Tensor], own: torch.optim.Optimizer, last: Any = last) -> None:
            before = [p.detach().clone() for p in params]
            own.step()
            last.update({p: p.detach() - was for p, was in zip(params, before, strict=True)})

        def forward(k: int, params: list[torch.Tensor], own: Any, last: Any = last, delays: Any = delays) -> Any:
            late = delays(k)
            return [p + late * last[p] if p in last else p for p in params]

        expected = queued(optimizer, frames, targets, forward=forward, step=step)
        close((await corrected([WeightPrediction("difference")], optimizer, frames, targets))[0], expected)
        if optimizer is SGD:
            close((await corrected([], optimizer, frames, targets, weights="predicted"))[0], expected)


@one_loop
async def test_prediction_and_spike_compensation_together() -> None:
    """Two corrections that change different things are both at work."""
    frames, targets = stream(25)
    found, _ = await corrected([WeightPrediction(), SpikeCompensation()], MOMENTUM, frames, targets)
    close(found, queued(MOMENTUM, frames, targets, forward=ahead(Delays()), step=spike(Delays())))


def lead(optimizer: Any, correction: Correction, delay: int) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """A stage after three updates: (hands, weights before the last one, what a forward with ``delay`` reads)."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    rule = Delayed(loss=functional.cross_entropy, optimizer=optimizer, corrections=[correction])
    hands: Any = rule.stage(Site(0, 1, "one", model, [("", model)]))
    before: list[torch.Tensor] = []
    for at in range(4):
        ticket = Ticket(at, 1, learn=True, target=torch.tensor([at % 3]))
        ticket.delays = [delay if at == 3 else 0]
        hands.forward(ticket, torch.randn(1, 4))
        if at == 3:
            return hands, before, hands.kept[ticket].weights
        before = hands.weights.snapshot()
        hands.backward(ticket, None)
    raise AssertionError


def test_velocities() -> None:
    """What each optimizer's next step would be like, by its own state."""

    def adam(p: torch.Tensor, state: Any, decoupled: float = 0.0, maximum: bool = False) -> torch.Tensor:
        second = state["max_exp_avg_sq" if maximum else "exp_avg_sq"]
        mean, square = state["exp_avg"] / (1 - 0.9**3), second / (1 - 0.999**3)
        step: torch.Tensor = LR * (mean / (square.sqrt() + 1e-8) + decoupled * p)
        return step

    def buffer(p: torch.Tensor, state: Any) -> torch.Tensor:
        step: torch.Tensor = LR * state["momentum_buffer"]
        return step

    cases: list[tuple[Any, Any]] = [
        (MOMENTUM, buffer),
        (partial(MOMENTUM, nesterov=True), buffer),
        (partial(torch.optim.RMSprop, lr=LR, momentum=0.5), buffer),
        (partial(torch.optim.Adam, lr=LR), adam),
        (partial(torch.optim.Adam, lr=LR, amsgrad=True), partial(adam, maximum=True)),
        (partial(torch.optim.Adam, lr=LR, maximize=True), adam),
        (partial(torch.optim.AdamW, lr=LR, weight_decay=0.1), partial(adam, decoupled=0.1)),
        (SGD, None),
        (partial(torch.optim.RMSprop, lr=LR), None),
    ]
    for optimizer, step in cases:
        hands, before, read = lead(optimizer, WeightPrediction(), 3)
        for master, was, seen in zip(hands.weights.masters, before, read, strict=True):
            p = master.detach()
            move = was - p if step is None else step(p, hands.updater.optimizer.state[master])
            torch.testing.assert_close(seen.detach(), p - 3 * move)
            assert not torch.equal(seen, p)


def test_prediction_follows_the_rate() -> None:
    """Where another correction slows the steps down, as far is predicted as they will go."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    rule = Delayed(
        loss=functional.cross_entropy, optimizer=MOMENTUM, corrections=[WeightPrediction(), DelayScaling(power=2.0)]
    )
    hands: Any = rule.stage(Site(0, 1, "one", model, [("", model)]))
    for at, delay in ((0, 0), (1, 2)):
        ticket = Ticket(at, 1, learn=True, target=torch.tensor([1]))
        ticket.delays = [delay]
        hands.forward(ticket, torch.ones(1, 4))
        if at == 0:
            hands.backward(ticket, None)
            continue
        p = hands.weights.masters[0]
        step = LR * hands.updater.optimizer.state[p]["momentum_buffer"] / 9
        torch.testing.assert_close(hands.kept[ticket].weights[0].detach(), p.detach() - 2 * step)


# ------------------------------------------------------------------------------------------------ rate


@one_loop
@pytest.mark.parametrize(
    ("correction", "factor"),
    [
        (LearningRateRescheduling(steps=10), lambda late, step: max(late, 1) ** -(1 - min(step / 10, 1))),
        (DelayScaling(), lambda late, step: 1 / (1 + late)),
        (DelayScaling(power=0.5), lambda late, step: (1 + late) ** -0.5),
    ],
    ids=["rescheduling", "scaling", "root"],
)
async def test_rates(correction: Correction, factor: Callable[[int, int], float]) -> None:
    """η / D^(1-min(step/K,1)), and η (1+D)^-power; the user's own rate comes back after each step."""
    frames, targets = stream(25)
    delays = Delays()

    def step(k: int, params: list[torch.Tensor], own: torch.optim.Optimizer) -> None:
        late = delays(k)
        own.param_groups[0]["lr"] = LR * factor(late, delays.calls[k] - 1)
        own.step()

    found, _ = await corrected([correction], MOMENTUM, frames, targets)
    close(found, queued(MOMENTUM, frames, targets, step=step))
    differ(found, queued(MOMENTUM, frames, targets))


# ------------------------------------------------------------------------------------------------ backward


@one_loop
@pytest.mark.parametrize("recompute", [False, True])
async def test_discrepancy_correction(recompute: bool) -> None:
    """The backward reads θ - D δ, with δ ← γδ + (1-γ)(θ_{t+1}-θ_t), γ = d^(1/D)."""
    frames, targets = stream(25)
    optimizer = partial(torch.optim.SGD, lr=0.5)
    drift: dict[torch.Tensor, torch.Tensor] = {}
    lags = [0] * STAGES

    def reads(k: int, params: list[torch.Tensor], lag: int) -> list[torch.Tensor]:
        lags[k] = lag
        return [p - lag * drift[p] if p in drift else p for p in params]

    def step(k: int, params: list[torch.Tensor], own: torch.optim.Optimizer) -> None:
        before = [p.detach().clone() for p in params]
        own.step()
        gamma = 0.2 ** (1 / lags[k]) if lags[k] else 0.0
        for p, was in zip(params, before, strict=True):
            drift[p] = gamma * drift.get(p, torch.zeros_like(was)) + (1 - gamma) * (p.detach() - was)

    kind: Any = "recomputed" if recompute else "stashed"
    expected = queued(optimizer, frames, targets, backward_reads=reads, step=step, weights=kind)
    found, _ = await corrected(
        [DiscrepancyCorrection(d=0.2)], optimizer, frames, targets, weights="current", recompute=recompute
    )
    close(found, expected)
    differ(found, queued(optimizer, frames, targets, weights="recomputed" if recompute else "current"))
    differ(found, queued(optimizer, frames, targets))


def test_discrepancy_needs_two_versions_only() -> None:
    """However many frames are in flight, there are δ and one scratch version beside the weights."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    rule = Delayed(
        loss=functional.cross_entropy, optimizer=SGD, weights="current", corrections=[DiscrepancyCorrection()]
    )
    hands: Any = rule.stage(Site(0, 1, "one", model, [("", model)]))
    made = [Ticket(at, 1, learn=True, target=torch.tensor([1])) for at in range(9)]
    for ticket in made[:6]:
        hands.forward(ticket, torch.randn(1, 4))
    for old, new in zip(made, made[6:], strict=False):
        hands.backward(old, None)
        hands.forward(new, torch.randn(1, 4))
    activations = sum(4 * 4 + 4 * 3 for _ in hands.kept)  # bytes of (1, 4) inputs and (1, 3) outputs
    assert hands.kept_nbytes() == activations + 2 * hands.weights.nbytes()


# ------------------------------------------------------------------------------------------------ gradient


@one_loop
async def test_gap_aware() -> None:
    """g / (1 + |θ_now - θ_forward| / root mean square step), the mean corrected for its start."""
    frames, targets = stream(25)
    then: list[list[list[torch.Tensor]]] = [[] for _ in range(STAGES)]
    squares: dict[torch.Tensor, torch.Tensor] = {}
    delays = Delays()

    def forward(k: int, params: list[torch.Tensor], own: Any) -> list[torch.Tensor]:
        then[k].append([p.detach().clone() for p in params])
        return params

    def step(k: int, params: list[torch.Tensor], own: torch.optim.Optimizer) -> None:
        late, used, count = delays(k), then[k].pop(0), delays.calls[k] - 1
        before = [p.detach().clone() for p in params]
        for p, was in zip(params, used, strict=True):
            assert p.grad is not None
            if late:
                usual = (squares[p] / (1 - 0.9**count)).sqrt() + LR * 1e-3
                p.grad = p.grad / (1 + (p.detach() - was).abs() / usual)
        own.step()
        for p, was in zip(params, before, strict=True):
            squares[p] = 0.9 * squares.get(p, torch.zeros_like(was)) + 0.1 * (p.detach() - was) ** 2

    found, _ = await corrected([GapAware(decay=0.9, eps=1e-3)], MOMENTUM, frames, targets)
    close(found, queued(MOMENTUM, frames, targets, forward=forward, step=step))
    differ(found, queued(MOMENTUM, frames, targets))


# ------------------------------------------------------------------------------------------------ order


@one_loop
@pytest.mark.parametrize("over", [0, 8])
async def test_hybrid_finish(over: int) -> None:
    """From a frame on fewer frames are in flight, at last one: the reference with queues that shrink, bit for bit."""
    frames, targets = stream(30)

    def delays(t: int) -> list[int]:
        return [Order(STAGES - 1 - k, after=12, over=over).ahead_at(t) for k in range(STAGES)]

    found, seen = await corrected([HybridFinish(after=12, over=over)], MOMENTUM, frames, targets)
    expected = queued(MOMENTUM, frames, targets, delays=delays)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], expected[1][key]) for key in expected[1])
    assert seen[11] == (2, 1, 0)
    assert seen[12 + over] == (0, 0, 0) == seen[-1]
    differ(found, queued(MOMENTUM, frames, targets))


@one_loop
async def test_hybrid_finish_in_event_order() -> None:
    """However busy, no frame after the given one meets a delay."""
    frames, targets = stream(30)
    _, seen = await corrected([HybridFinish(after=10)], SGD, frames, targets, order="event")
    assert set(seen[10:]) == {(0, 0, 0)}


def test_the_way_down() -> None:
    """Frames ahead fall in equal steps, rounded up, and never rise."""
    order = HybridFinish(after=4, over=6).order(Order(3, strict=True))
    assert [order.ahead_at(n) for n in range(12)] == [3, 3, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0]
    assert [HybridFinish(after=2).order(Order(3)).ahead_at(n) for n in range(4)] == [3, 3, 0, 0]
    assert order.strict and order.ahead == 3


# ------------------------------------------------------------------------------------------------ recipes


@one_loop
async def test_asynchronous_nesterov() -> None:
    """NAdam with a long memory on stashed weights, as the reference runs it."""
    frames, targets = stream(20)
    optimizer = asynchronous_nesterov(lr=0.01)
    made = optimizer([nn.Parameter(torch.ones(1))])
    assert isinstance(made, torch.optim.NAdam) and made.param_groups[0]["betas"] == (0.99, 0.999)
    found, _ = await corrected([], optimizer, frames, targets)
    expected = queued(partial(torch.optim.NAdam, lr=0.01, betas=(0.99, 0.999)), frames, targets)
    assert found[0] == expected[0]


def test_from_batch_recipe() -> None:
    """The momentum decays as fast per sample, and a sample moves the weights as far in the end."""
    assert from_batch_recipe(0.9, lr=0.1, batch=1) == pytest.approx((0.9, 0.1))
    m, lr = from_batch_recipe(0.9, lr=0.1, batch=128)
    assert m**128 == pytest.approx(0.9)
    assert lr * 128 / (1 - m) == pytest.approx(0.1 / (1 - 0.9))
    assert from_batch_recipe(0.0, lr=0.1, batch=10) == pytest.approx((0.0, 0.01))
    for bad in ({"momentum": 1.0}, {"lr": 0.0}, {"batch": 0}):
        with pytest.raises(ConfigurationError, match="must be"):
            from_batch_recipe(**{"momentum": 0.9, "lr": 0.1, "batch": 8, **bad})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ refusals


def test_settings_out_of_range() -> None:
    """A correction that could not work is refused where it is written."""
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: WeightPrediction("linear"), 'must be "velocity" or "difference"'),  # type: ignore[arg-type]
        (lambda: LearningRateRescheduling(steps=0), "steps is a number of updates"),
        (lambda: DelayScaling(power=-1), "power must not be negative"),
        (lambda: DiscrepancyCorrection(d=1.0), "d must be between 0 and 1"),
        (lambda: GapAware(decay=1.0), "decay must be"),
        (lambda: GapAware(eps=0.0), "eps must be positive"),
        (lambda: HybridFinish(after=-1), "numbers of frames from 0"),
    ]
    for make, message in refused:
        with pytest.raises(ConfigurationError, match=message):
            make()


def test_optimizers_that_do_not_fit() -> None:
    """A correction that is defined for some optimizers says which, and names the stage."""
    model = nn.Linear(2, 2)
    site = Site(0, 1, "one", model, [("", model)])
    cases: list[tuple[Correction, Any, str]] = [
        (SpikeCompensation(), torch.optim.Adam, "stage 'one'.* rather than Adam"),
        (SpikeCompensation(), SGD, "rather than SGD without momentum"),
        (SpikeCompensation(), partial(MOMENTUM, nesterov=True), "leave out nesterov"),
        (WeightPrediction(), torch.optim.NAdam, r"velocity of NAdam is not known.*WeightPrediction\(\"difference\"\)"),
    ]
    for correction, optimizer, message in cases:
        rule = Delayed(loss=functional.cross_entropy, optimizer=optimizer, corrections=[correction])
        with pytest.raises(ConfigurationError, match=message):
            rule.stage(site)


def test_loaded_weights_have_no_past() -> None:
    """After weights came from outside, nothing is predicted from how the old ones moved."""
    hands, _, read = lead(SGD, WeightPrediction(), 2)
    assert not torch.equal(read[0], hands.weights.working[0])
    hands.reset()
    hands.adopt()
    ticket = Ticket(9, 1, learn=True, target=torch.tensor([0]))
    ticket.delays = [2]
    hands.forward(ticket, torch.ones(1, 4))
    assert torch.equal(hands.kept[ticket].weights[0], hands.weights.working[0])

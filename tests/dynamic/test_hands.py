"""When a stage updates, with which gradients, how late they are, and what corrections make of that.

The reference is written out by hand, derivatives included, and replays the order of forwards and backwards that a run
really had: what the modules themselves saw, noted by autograd hooks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage, Step
from aiotime.errors import ConfigurationError
from aiotime.learning.corrections import (
    DelayScaling,
    GapAware,
    LearningRateRescheduling,
    SpikeCompensation,
    WeightPrediction,
)
from tests.dynamic.nets import (
    ADAM,
    MOMENTUM,
    SGD,
    Coded,
    TreeNet,
    check_empty,
    close,
    double_precision,
    floor_of,
    linear,
    put,
    taught,
    trees,
)
from tests.scenarios import play

RATE = 0.1


class Noted(nn.Module):
    """tanh(W x), or W x; notes the forwards and backwards of its instances, which it knows by a number beside x."""

    def __init__(self, name: str, notes: list[tuple[str, str, int]], *, bent: bool, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))
        self.name, self.notes, self.bent = name, notes, bent

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        y = torch.tanh(y) if self.bent else y
        who = int(number)
        if y.requires_grad:
            self.notes.append(("forward", self.name, who))
            y.register_hook(lambda grad: self.notes.append(("backward", self.name, who)))  # type: ignore[no-untyped-call]
        return y


async def two(net: Any, sample: tuple[int, torch.Tensor]) -> torch.Tensor:
    number, x = sample
    h = await net.low(x, torch.tensor(number))
    z: torch.Tensor = await net.high(h, torch.tensor(number))
    return (z**2).sum() / 2


def pair(seconds: Callable[..., float], notes: list[tuple[str, str, int]]) -> Coded:
    clock = VirtualClock()
    return Coded(
        two,
        low=Stage(Noted("low", notes, bent=True, seed=1), device=SimulatedDevice(0, seconds=seconds, clock=clock)),
        high=Stage(Noted("high", notes, bent=False, seed=2), device=SimulatedDevice(1, seconds=seconds, clock=clock)),
    )


class Replay:
    """Two layers trained in a noted order, with derivatives by hand."""

    def __init__(self, weights: dict[str, torch.Tensor], source: list[Any], frequency: int, *, stashed: bool) -> None:
        self.weights = {name: value.clone() for name, value in weights.items()}
        self.source, self.frequency, self.stashed = dict(source), frequency, stashed
        self.updates: Counter[str] = Counter()
        self.late: dict[str, Counter[int]] = {"low": Counter(), "high": Counter()}
        self.delays: dict[tuple[str, int], int] = {}
        self.losses: dict[int, float] = {}
        self.kept: dict[tuple[str, int], Any] = {}
        self.down: dict[int, torch.Tensor] = {}
        self.sums: dict[str, list[torch.Tensor]] = {"low": [], "high": []}

    def play(self, notes: list[tuple[str, str, int]]) -> None:
        for what, stage, who in notes:
            (self.forward if what == "forward" else self.backward)(stage, who)

    def forward(self, stage: str, who: int) -> None:
        x = self.source[who] if stage == "low" else self.kept["low", who][1]
        y = self.weights[stage] @ x
        y = torch.tanh(y) if stage == "low" else y
        self.kept[stage, who] = (x, y, self.weights[stage], self.updates[stage])
        if stage == "high":
            self.losses[who] = float((y**2).sum() / 2)

    def backward(self, stage: str, who: int) -> None:
        x, y, weight, version = self.kept[stage, who]
        if not self.stashed:
            weight = self.weights[stage]
        grad = y if stage == "high" else self.down[who] * (1 - y**2)
        self.down[who] = weight.T @ grad
        self.late[stage][self.updates[stage] - version] += 1
        self.delays[stage, who] = self.updates[stage] - version
        self.sums[stage].append(torch.outer(grad, x))
        if len(self.sums[stage]) == self.frequency:
            self.weights[stage] = self.weights[stage] - RATE * sum(self.sums[stage]) / self.frequency
            self.sums[stage] = []
            self.updates[stage] += 1


@given(
    times=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    keys=st.integers(1, 8),
    frequency=st.integers(1, 3),
    stashed=st.booleans(),
)
@hypothesis_settings(max_examples=25)
def test_delayed_learning_is_the_replay_of_its_order(
    times: list[int],
    keys: int,
    frequency: int,
    stashed: bool,
) -> None:
    """Whatever order the devices bring about: losses, weights and delays are those of that order, played by hand."""

    async def scenario() -> None:
        notes: list[tuple[str, str, int]] = []
        asked = 0

        def seconds(work: Any, frame: Any) -> float:
            nonlocal asked
            asked += 1
            return float(times[asked % len(times)])

        network = pair(seconds, notes)
        generator = torch.Generator().manual_seed(3)
        source = [(n, torch.randn(3, generator=generator)) for n in range(12)]
        before = {name: stage.fn.weight.detach().clone() for name, stage in network.stages.items()}  # type: ignore[attr-defined]
        async with network:
            steps = await taught(
                network,
                source,
                optimizer=partial(torch.optim.SGD, lr=RATE),
                max_active_keys=keys,
                min_update_frequency=frequency,
                weights="stashed" if stashed else "current",
            )
            stats = {station.name: station for station in network.stats().stages}
            check_empty(network)
        replay = Replay(before, source, frequency, stashed=stashed)
        replay.play(notes)
        for step in steps:
            assert step.loss == pytest.approx(replay.losses[step.index], rel=1e-9)
            assert step.delay == (replay.delays["low", step.index], replay.delays["high", step.index])
        close(network.state_dict(), {f"{name}.weight": value for name, value in replay.weights.items()})
        for name, station in stats.items():
            assert dict(station.delays) == dict(replay.late[name])
            assert station.updates == replay.updates[name] == 12 // frequency
            assert station.gradients == 12
        if keys == 1 and frequency == 1:
            assert all(dict(station.delays) == {0: 12} for station in stats.values())

    with double_precision():
        play(scenario())


@pytest.mark.asyncio
@pytest.mark.parametrize("max_batch", [1, 8])
async def test_gradients_are_counted_one_per_use(max_batch: int) -> None:
    """Each use of a stage is a gradient; each stage updates once it has enough, whatever the others have."""
    uses: Counter[str] = Counter()

    async def code(net: Any, n: int) -> Any:
        h = await net.once(torch.full((3,), float(n)))
        for _ in range(n):
            h = await net.often(h)
            uses["often"] += 1
        uses["once"] += 1
        return h.sum()

    network = Coded(
        code,
        once=Stage(linear(seed=1), device="inline", max_batch=max_batch),
        often=Stage(linear(seed=2), device="inline", max_batch=max_batch),
    )
    async with network:
        await taught(network, range(10), min_update_frequency=7)
        once, often = network.stats().stages
        assert (once.gradients, often.gradients) == (uses["once"], uses["often"]) == (10, 45)
        if max_batch == 1:
            assert (once.updates, often.updates) == (1, 6)
        else:  # a batch brings several at once: the update takes all of them
            assert once.updates == 1
            assert 3 <= often.updates <= 6
        for station in floor_of(network).stations:
            assert station.hands is not None and station.hands.updater is not None
            assert station.hands.updater.gathered < 7


@pytest.mark.asyncio
async def test_instances_are_counted_one_per_instance() -> None:
    """With update_per="instance" an instance counts once, however often it used the stage, and only where it did."""

    async def code(net: Any, n: int) -> Any:
        h = await net.all(torch.full((3,), float(n)))
        if n % 2:
            h = await net.odd(await net.odd(h))
        return h.sum()

    network = Coded(code, all=Stage(linear(seed=1), device="inline"), odd=Stage(linear(seed=2), device="inline"))
    async with network:
        await taught(network, range(12), min_update_frequency=3, update_per="instance")
        every, odd = network.stats().stages
        assert (every.gradients, every.updates) == (12, 4)
        assert (odd.gradients, odd.updates) == (12, 2)


# ---------------------------------------------------------------------- corrections

CORRECTIONS: dict[str, Any] = {
    "gap": (lambda: [GapAware()], MOMENTUM),
    "spike": (lambda: [SpikeCompensation()], MOMENTUM),
    "rescheduling": (lambda: [LearningRateRescheduling(steps=50)], MOMENTUM),
    "scaling": (lambda: [DelayScaling(power=1.0)], SGD),
    "prediction": (lambda: [WeightPrediction()], MOMENTUM),
    "prediction of Adam": (lambda: [WeightPrediction()], ADAM),
    "difference": (lambda: [WeightPrediction("difference")], SGD),
    "all": (lambda: [WeightPrediction(), SpikeCompensation(), GapAware(), DelayScaling()], MOMENTUM),
}


async def final(network: Any, **options: Any) -> tuple[dict[str, torch.Tensor], int]:
    """(weights after a lesson, the longest delay in it)."""
    async with network:
        await taught(network, trees(16), min_update_frequency=1, **options)
        late = max(delay for station in network.stats().stages for delay, _ in station.delays)
        return network.state_dict(), late


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("name", CORRECTIONS)
async def test_corrections(name: str) -> None:
    """Without delay all are plain training, bit for bit; with delay they change what comes out, the same each time."""
    made, optimizer = CORRECTIONS[name]
    one: dict[str, Any] = {"optimizer": optimizer, "max_active_keys": 1, "update_per": "instance"}
    plain, late = await final(put(TreeNet(), "simulated"), **one)
    corrected, _ = await final(put(TreeNet(), "simulated"), corrections=made(), **one)
    assert late == 0
    assert all(torch.equal(value, corrected[key]) for key, value in plain.items())
    many: dict[str, Any] = {"optimizer": optimizer, "max_active_keys": 6}
    plain, late = await final(put(TreeNet(), "simulated"), **many)
    corrected, _ = await final(put(TreeNet(), "simulated"), corrections=made(), **many)
    again, _ = await final(put(TreeNet(), "simulated"), corrections=made(), **many)
    assert late > 1
    assert any(not torch.equal(value, corrected[key]) for key, value in plain.items())
    assert all(torch.equal(value, again[key]) for key, value in corrected.items())
    assert all(value.isfinite().all() for value in corrected.values())


class Known(nn.Module):
    """w · x, of which a gradient is x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x


async def known(net: Any, x: float) -> torch.Tensor:
    y: torch.Tensor = (await net.stage(torch.tensor([x]))).sum()
    return y


async def moves(optimizer: Any, *, keys: int = 3, **options: Any) -> list[tuple[float, int]]:
    """(what the weight was after each update, how late its gradient) where three instances at a time go forward first.

    One device, backward before forward, and the losses computed on the loop: with ``keys`` in flight the gradients of
    the first instances come 0, 1, 2, … updates late.
    """
    network = Coded(known, stage=Stage(Known(), device=SimulatedDevice(0, seconds=1.0, clock=VirtualClock())))
    seen: list[float] = []
    late: list[int] = []
    async with network:
        async for step in network.learn(
            [1.0] * 4, optimizer=optimizer, max_active_keys=keys, min_update_frequency=1, unused="ignore", **options
        ):
            seen.append(network.state_dict()["stage.w"].item())
            assert step.delay is not None
            late += step.delay
    return list(zip(seen, late, strict=True))


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_delay_scaling_scales_by_the_delay() -> None:
    """A gradient of 1 that is D updates late moves the weight by η / (1 + D)."""
    plain = await moves(SGD)
    scaled = await moves(SGD, corrections=[DelayScaling(power=1.0)])
    assert [late for _, late in plain] == [late for _, late in scaled]
    assert max(late for _, late in plain) >= 1
    weight = 0.0
    for (found, late), (unscaled, _), at in zip(scaled, plain, range(1, 5), strict=True):
        weight -= 0.1 / (1 + late)
        assert found == pytest.approx(weight)
        assert unscaled == pytest.approx(-0.1 * at)


def test_corrections_that_a_network_cannot_have() -> None:
    """Those of a pipeline's order or backward are refused, and so is what does not fit the weights."""
    from aiotime.learning.corrections import Correction

    class Order(Correction):
        changes = "order"

    network = TreeNet()
    with pytest.raises(ConfigurationError, match="changes the order"):
        network.learn([], optimizer=SGD, corrections=[Order()])
    with pytest.raises(ConfigurationError, match="corrections is a list"):
        network.learn([], optimizer=SGD, corrections=GapAware())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="stashed"):
        network.learn([], optimizer=SGD, weights="current", corrections=[GapAware()])


# ---------------------------------------------------------------------- what every rule has


async def one_layer(net: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = (await net.stage(x)).sum()
    return y


def layer(**options: Any) -> Coded:
    return Coded(one_layer, stage=Stage(linear(3, 1), device="inline", **options))


PLAIN: dict[str, Any] = {"max_active_keys": 1, "min_update_frequency": 1, "update_per": "instance"}


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_clip_norm() -> None:
    """The mean gradient of a stage is scaled down to the norm, as torch's own clipping does."""
    network = layer()
    expected = linear(3, 1)
    optimizer = SGD(expected.parameters())
    for scale in (0.1, 100.0):
        optimizer.zero_grad()
        expected(torch.full((3,), scale)).sum().backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.5)
        optimizer.step()
    await taught(network, [torch.full((3,), 0.1), torch.full((3,), 100.0)], clip_norm=1.5, **PLAIN)
    close(network.state_dict(), {f"stage.{key}": value for key, value in expected.state_dict().items()}, atol=1e-7)


@pytest.mark.asyncio
@pytest.mark.parametrize("update_per", ["gradient", "instance"])
async def test_guard(update_per: Any) -> None:
    """A loss that is not a number skips the update, is counted, and changes nothing; without guard it does."""
    bad = torch.full((3,), float("nan"))
    network = layer()
    async with network:
        before = network.state_dict()
        options = {**PLAIN, "update_per": update_per}
        (step,) = await taught(network, [bad], **options)
        assert step.loss != step.loss
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
        await taught(network, [torch.ones(3)], **options)
        (station,) = network.stats().stages
        assert (station.updates, station.skipped, station.gradients) == (1, 1, 2)
        await taught(network, [bad], guard=False, **options)
        assert network.state_dict()["stage.weight"].isnan().all()


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_scheduler_and_param_groups() -> None:
    """The scheduler steps once per update of its stage; groups get what they are said to."""
    network = layer()
    expected = linear(3, 1)

    def groups(named: Any) -> list[dict[str, Any]]:
        named = dict(named)
        return [{"params": [named["weight"]]}, {"params": [named["bias"]], "lr": 0.5}]

    optimizer = torch.optim.SGD(groups(expected.named_parameters()), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        expected(torch.ones(3)).sum().backward()
        optimizer.step()
        scheduler.step()
    await taught(
        network,
        [torch.ones(3)] * 5,
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1),
        param_groups=groups,
        **PLAIN,
    )
    close(network.state_dict(), {f"stage.{key}": value for key, value in expected.state_dict().items()})


@pytest.mark.asyncio
async def test_an_optimizer_for_each_stage() -> None:
    """A mapping by the stages' names, with "*" for the others."""
    network = TreeNet()
    frozen = partial(torch.optim.SGD, lr=0.0)
    async with network:
        before = network.state_dict()
        await taught(network, trees(4), optimizer={"head": SGD, "join": ADAM, "*": frozen}, **PLAIN)
        moved = {
            key.split(".")[0] for key, value in network.state_dict().items() if not torch.equal(before[key], value)
        }
        assert moved == {"head", "join"}
        kinds = [type(s.hands.updater.optimizer) for s in floor_of(network).stations if s.hands and s.hands.updater]
        assert kinds == [torch.optim.SGD, torch.optim.Adam, torch.optim.SGD, torch.optim.SGD]
    with pytest.raises(ConfigurationError, match="gate"):
        await taught(TreeNet(), trees(1), optimizer={"head": SGD, "join": SGD, "leaf": SGD})


@pytest.mark.asyncio
async def test_bfloat16() -> None:
    """Stages compute in bfloat16 and learn in float32, near to what float32 learns."""
    kinds: set[torch.dtype] = set()

    async def code(net: Any, x: torch.Tensor) -> Any:
        h = await net.stage(x)
        kinds.add(h.dtype)
        return h.float().sum()

    found = []
    for precision in (None, torch.bfloat16):
        network = layer(max_batch=4)
        network.code = code
        await taught(network, [torch.full((3,), 0.1 * n) for n in range(8)], precision=precision, **PLAIN)
        found.append(network.state_dict())
    assert kinds == {torch.float32, torch.bfloat16}
    for key, value in found[0].items():
        assert found[1][key].dtype == torch.float32
        assert torch.allclose(value, found[1][key], atol=0.02)
        assert not torch.equal(value, found[1][key]) or key.endswith("bias")


@pytest.mark.asyncio
async def test_a_stage_without_parameters_has_nothing_to_learn() -> None:
    """Gradients pass through it and it counts none; where nothing can be learned at all, it is said."""

    async def code(net: Any, x: torch.Tensor) -> Any:
        y: torch.Tensor = (await net.bend(await net.stage(x))).sum()
        return y

    network = layer()
    network.bend = Stage(torch.tanh, device="inline")  # type: ignore[attr-defined]
    network.code = code
    async with network:
        steps = await taught(network, [torch.ones(3)] * 3, **PLAIN)
        assert isinstance(steps[0], Step)
        stage, bend = network.stats().stages
        assert (stage.updates, bend.gradients, bend.updates) == (3, 0, 0)
    with pytest.raises(ConfigurationError):
        await taught(Coded(one_layer, stage=Stage(torch.tanh, device="inline")), [torch.ones(3)])


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_frozen_parameters_stay() -> None:
    """What does not require grad is left alone, in the middle of a stage and as a whole stage."""

    async def code(net: Any, x: torch.Tensor) -> Any:
        y: torch.Tensor = (await net.head(await net.frozen(await net.stage(x)))).sum()
        return y

    network = Coded(
        code,
        stage=Stage(linear(seed=1), device="inline"),
        frozen=Stage(linear(seed=2).requires_grad_(False), device="inline"),
        head=Stage(linear(seed=3), device="inline"),
    )
    network.head.fn.bias.requires_grad_(False)  # type: ignore[attr-defined]
    parts = [linear(seed=n) for n in (1, 2, 3)]
    x = torch.ones(3)
    parts[2](parts[1](parts[0](x))).sum().backward()
    await taught(network, [x], **PLAIN)
    state = network.state_dict()
    for name, part, learned in (("stage", parts[0], True), ("frozen", parts[1], False), ("head", parts[2], True)):
        assert part.weight.grad is not None
        expected = part.weight - 0.1 * part.weight.grad if learned else part.weight
        assert torch.allclose(state[f"{name}.weight"], expected)
    assert torch.equal(state["head.bias"], parts[2].bias)

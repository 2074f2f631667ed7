"""Local losses: the same bits as blocks that are trained one by one, nobody waits, and what a first frame shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime import LATER, Sample
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import ConfigurationError, FeedbackError, InputError, StageError
from aiotime.learning.delayed import Delayed
from aiotime.learning.exact import Exact
from aiotime.learning.local import Local
from aiotime.learning.order import Order, interlocking
from tests.learning.reference import pieces, ribbon, stream
from tests.learning.windows import assisted, heads_for, windowed

SGD = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}
PLACES: dict[str, Callable[[int], list[Any]]] = {
    "cpu": lambda stages: [f"cpu:{k}" for k in range(stages)],
    "shared": lambda stages: ["cpu:0", "cpu:1", "cpu:0", "cpu:1"][:stages],
    "inline": lambda stages: ["inline"] * stages,
    "simulated": lambda stages: simulated(stages),
}


def simulated(stages: int) -> list[Any]:
    """Stages of unequal speed on one virtual clock."""
    clock = VirtualClock()
    return [SimulatedDevice(k, seconds=1.0 + (k * 7 % 3), clock=clock) for k in range(stages)]


def greedy(
    parts: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    xs: Sequence[torch.Tensor],
    ys: Sequence[torch.Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
) -> list[float]:
    """Each block trained with its head on what the block below gave, cut from its graph; the model's losses."""
    last = len(parts) - 1
    optimizers = [
        optimizer([*part.parameters(), *(heads[k].parameters() if k < last else [])]) for k, part in enumerate(parts)
    ]
    losses = []
    for x, y in zip(xs, ys, strict=True):
        h = x
        for k, part in enumerate(parts):
            h = part(h.detach())
            loss = functional.cross_entropy(h if k == last else heads[k](h), y)
            optimizers[k].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers[k].step()
        losses.append(float(loss.detach()))
    return losses


def build(rule: Any, model: nn.Module, x: torch.Tensor, devices: Sequence[Any]) -> aiotime.Pipeline:
    """A pipeline of two layers per stage."""
    return aiotime.Pipeline(model, example=x, devices=devices, balance=[2] * len(devices), learner=rule)


async def learn(pipeline: aiotime.Pipeline, samples: Sequence[Sample]) -> list[aiotime.Prediction]:
    """All predictions."""
    async with asyncio.timeout(20):
        return [pred async for pred in pipeline.run(samples)]


def samples_of(xs: Sequence[torch.Tensor], ys: Sequence[Any]) -> list[Sample]:
    """Frames with their targets."""
    return [Sample(x, y) for x, y in zip(xs, ys, strict=True)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("place", "optimizer"),
    [("cpu", "sgd"), ("cpu", "momentum"), ("cpu", "adam"), *((p, "adam") for p in PLACES if p != "cpu")],
)
async def test_greedy_learning_equals_blocks_trained_one_by_one(place: str, optimizer: str) -> None:
    """Losses, weights and heads have the reference's bits on every kind of device, and no delay."""
    xs, ys = stream(24)
    rule = Local(loss=functional.cross_entropy, optimizer=OPTIMIZERS[optimizer], seed=5)
    pipeline = await asyncio.to_thread(build, rule, ribbon(4), xs[0], PLACES[place](4))
    found = await learn(pipeline, samples_of(xs, ys))
    model = ribbon(4)
    parts = pieces(model, [2] * 4)
    heads = heads_for(parts, xs[0], seed=5)
    assert [pred.loss for pred in found] == greedy(parts, heads, xs, ys, OPTIMIZERS[optimizer])
    assert {pred.delay for pred in found} == {(0, 0, 0, 0)}
    state = pipeline.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    for spec, head in zip(pipeline._specs, heads, strict=False):
        own = spec.hands.state_dict()["head"]  # type: ignore[union-attr]
        assert all(torch.equal(own[key], value) for key, value in head.state_dict().items())


@pytest.mark.asyncio
@pytest.mark.parametrize(("place", "stages"), [("cpu", 2), *((place, 4) for place in PLACES)])
async def test_overlapping_equals_a_reference(place: str, stages: int) -> None:
    """In strict order: the gradients of a stage's own loss and of the next one's, the latter one update late."""
    xs, ys = stream(24)
    rule = Local(overlapping=True, order="1f1b", loss=functional.cross_entropy, optimizer=OPTIMIZERS["adam"])
    pipeline = await asyncio.to_thread(build, rule, ribbon(stages), xs[0], PLACES[place](stages))
    found = await learn(pipeline, samples_of(xs, ys))
    model = ribbon(stages)
    parts = pieces(model, [2] * stages)
    losses = windowed(
        parts, heads_for(parts, xs[0]), xs, ys, functional.cross_entropy, OPTIMIZERS["adam"], n=2, own=True
    )  # fmt: skip
    assert [pred.loss for pred in found] == pytest.approx(losses, abs=1e-6)
    assert found[12].delay == (1,) * (stages - 1) + (0,)
    state = pipeline.state_dict()
    assert all(torch.allclose(state[key], value, atol=1e-6) for key, value in model.state_dict().items())


@pytest.mark.asyncio
@pytest.mark.parametrize("overlapping", [False, True])
async def test_one_stage_is_plain_training(overlapping: bool) -> None:
    """With S = 1 there is the model's loss alone, and the bits are those of torch."""
    xs, ys = stream(20)
    rule = Local(overlapping=overlapping, loss=functional.cross_entropy, optimizer=OPTIMIZERS["momentum"])
    pipeline = await asyncio.to_thread(build, rule, ribbon(1), xs[0], ["cpu:0"])
    found = await learn(pipeline, samples_of(xs, ys))
    model = ribbon(1)
    assert [pred.loss for pred in found] == greedy([model], [], xs, ys, OPTIMIZERS["momentum"])
    assert all(torch.equal(pipeline.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.asyncio
async def test_stages_learn_at_the_same_time() -> None:
    """In virtual time a frame per two jobs comes out, whatever the number of stages: nobody waits for anybody above."""
    xs, ys = stream(20)
    clock = VirtualClock()
    devices = [SimulatedDevice(k, seconds=1.0, clock=clock) for k in range(4)]
    rule = Local(loss=functional.cross_entropy, optimizer=SGD)
    pipeline = await asyncio.to_thread(build, rule, ribbon(4), xs[0], devices)
    await learn(pipeline, samples_of(xs, ys))
    assert clock.now() <= 2 * 20 + 4 + 1


@pytest.mark.asyncio
@pytest.mark.parametrize("place", ["cpu", "slow top"])
async def test_targets_may_come_late_and_in_any_order(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With targets given after their forwards, every stage learns from each at once, and all have when that is told."""
    monkeypatch.setattr("aiotime.devices.worker.ORPHAN_CHECK", 60.0)  # a worker that nobody woke shall not wake
    clock = VirtualClock()
    slow = [SimulatedDevice(k, seconds=10.0**k, clock=clock) for k in range(3)]
    xs, ys = stream(6)
    rule = Local(loss=functional.cross_entropy, optimizer=SGD)
    pipeline = await asyncio.to_thread(build, rule, ribbon(3), xs[0], slow if place == "slow top" else PLACES[place](3))
    async with asyncio.timeout(20), pipeline:
        for key, x in enumerate(xs):
            assert (await pipeline.submit(Sample(x, target=LATER, key=key))).loss is None
        before = pipeline.state_dict()
        for key in (3, 0, 5):
            assert await pipeline.feedback(key, ys[key]) > 0
        with pytest.raises(FeedbackError, match="had its target"):
            await pipeline.feedback(3, ys[3])
        with pytest.raises(FeedbackError, match="could not be learned from"):
            await pipeline.feedback(1, torch.tensor([77]))
        after = pipeline.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert [spec.hands.learned for spec in pipeline._specs] == [3, 3, 3]  # type: ignore[union-attr]


def parts_of(model: nn.Sequential, stages: int, devices: Sequence[Any]) -> list[aiotime.Stage]:
    """The pipeline's stages as a user would list them."""
    parts = pieces(model, [2] * stages)
    return [
        aiotime.Stage(part, device=device, name=f"s{k}")
        for k, (part, device) in enumerate(zip(parts, devices, strict=True))
    ]


@pytest.mark.asyncio
@pytest.mark.parametrize("place", PLACES)
async def test_without_an_example_the_first_frame_shows_the_shapes(place: str) -> None:
    """Heads made at the first frame are those that an example would have given, and learn from that frame already."""
    xs, ys = stream(16)
    rule = Local(loss=functional.cross_entropy, optimizer=OPTIMIZERS["adam"])
    pipeline = await asyncio.to_thread(
        lambda: aiotime.Pipeline.from_stages(parts_of(ribbon(4), 4, PLACES[place](4)), learner=rule)
    )
    found = await learn(pipeline, [Sample(xs[0]), *samples_of(xs, ys)])
    model = ribbon(4)
    parts = pieces(model, [2] * 4)
    losses = greedy(parts, heads_for(parts, xs[0]), xs, ys, OPTIMIZERS["adam"])
    assert [pred.loss for pred in found] == [None, *losses]
    assert {pred.delay for pred in found} == {(0, 0, 0, 0)}
    assert {key.split(".", 1)[0] for key in pipeline.state_dict()} == {"s0", "s1", "s2", "s3"}


@pytest.mark.asyncio
@pytest.mark.parametrize("known", [True, False])
async def test_checkpoints_hold_the_heads(tmp_path: Path, known: bool) -> None:
    """A run from a checkpoint has the uninterrupted run's bits, also where heads exist from the first frame on only."""
    xs, ys = stream(18)

    def start() -> aiotime.Pipeline:
        rule = Delayed(loss=functional.cross_entropy, optimizer=OPTIMIZERS["adam"], order="1f1b", local=0.5)
        if known:
            return build(rule, ribbon(3), xs[0], ["inline"] * 3)
        return aiotime.Pipeline.from_stages(parts_of(ribbon(3), 3, ["inline"] * 3), learner=rule)

    first, second, third = [await asyncio.to_thread(start) for _ in range(3)]
    await learn(first, samples_of(xs[:8], ys[:8]))
    async with asyncio.timeout(20):
        await first.checkpoint(tmp_path / "one")
        await second.restore(tmp_path / "one")
        await second.checkpoint(tmp_path / "two")  # before its heads were made
        await third.restore(tmp_path / "two")
    ahead = await learn(first, samples_of(xs[8:], ys[8:]))
    for other in (second, third):
        again = await learn(other, samples_of(xs[8:], ys[8:]))
        assert [pred.loss for pred in ahead] == [pred.loss for pred in again]
        assert all(torch.equal(first.state_dict()[key], value) for key, value in other.state_dict().items())


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("place", "settings"),
    [
        ("cpu", {}),
        ("simulated", {}),
        ("cpu", {"split": True}),
        ("cpu", {"fresh": False}),
        ("simulated", {"fresh": False}),
        ("shared", {"recompute": True}),
        ("cpu", {"split": True, "fresh": False}),
    ],
)
async def test_a_local_loss_beside_the_delayed_gradient_equals_a_reference(
    place: str, settings: dict[str, Any], known: bool
) -> None:
    """Fresh or as late as the gradient from above; also with recomputation, with the split backward, and with heads
    that are made while frames are under way.
    """
    xs, ys = stream(20)
    rule = Delayed(
        loss=functional.cross_entropy, optimizer=OPTIMIZERS["adam"], order="1f1b", local=0.5, seed=3, **settings
    )
    pipeline = await asyncio.to_thread(
        lambda: (
            build(rule, ribbon(4), xs[0], PLACES[place](4))
            if known
            else aiotime.Pipeline.from_stages(parts_of(ribbon(4), 4, PLACES[place](4)), learner=rule)
        )
    )
    found = await learn(pipeline, samples_of(xs, ys))
    model = ribbon(4)
    parts = pieces(model, [2] * 4)
    heads = heads_for(parts, xs[0], seed=3)
    fresh = settings.get("fresh", "recompute" not in settings)
    adam = OPTIMIZERS["adam"]
    losses = assisted(parts, heads, xs, ys, functional.cross_entropy, adam, share=0.5, fresh=fresh, blind=not known)
    assert [pred.loss for pred in found] == pytest.approx(losses, abs=1e-6)
    assert found[10].delay == (3, 2, 1, 0)
    values = pipeline.state_dict().values()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values, model.state_dict().values(), strict=True))
    for spec, head in zip(pipeline._specs, heads, strict=False):
        own = spec.hands.state_dict()["head"]  # type: ignore[union-attr]
        assert all(torch.allclose(own[key], value, atol=1e-6) for key, value in head.state_dict().items())


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "current"},
        {"weights": "current", "recompute": True},
        {"weights": "predicted"},
        {"weights": "double-buffered", "update_every": 3},
        {"order": "event", "recompute": True, "split": True},
    ],
)
async def test_a_local_loss_goes_with_every_choice_of_weights(settings: dict[str, Any], known: bool) -> None:
    """Every stage and every head learns from every frame."""
    xs, ys = stream(24)
    rule = Delayed(loss=functional.cross_entropy, optimizer=SGD, local=1.0, **{"order": "1f1b", **settings})
    pipeline = await asyncio.to_thread(
        lambda: (
            build(rule, ribbon(3), xs[0], ["cpu:0", "cpu:1", "cpu:2"])
            if known
            else aiotime.Pipeline.from_stages(parts_of(ribbon(3), 3, ["cpu:0", "cpu:1", "cpu:2"]), learner=rule)
        )
    )
    before = list(pipeline.state_dict().values())
    await learn(pipeline, samples_of(xs, ys))
    assert all(not torch.equal(a, b) for a, b in zip(before, pipeline.state_dict().values(), strict=True))
    hands: list[Any] = [spec.hands for spec in pipeline._specs]
    assert [learner.learned for learner in hands] == [24, 24, 24]
    fresh = heads_for(pieces(ribbon(3), [2] * 3), xs[0])
    for learner, head in zip(hands, fresh, strict=False):
        own = learner.state_dict()["head"]
        assert all(not torch.equal(own[key], value) for key, value in head.state_dict().items())


@pytest.mark.asyncio
async def test_with_one_stage_a_local_loss_changes_nothing() -> None:
    """S = 1 has no head: `Delayed(local=...)` is plain training."""
    xs, ys = stream(12)
    rule = Delayed(loss=functional.cross_entropy, optimizer=SGD, local=1.0)
    pipeline = await asyncio.to_thread(build, rule, ribbon(1), xs[0], ["cpu:0"])
    found = await learn(pipeline, samples_of(xs, ys))
    assert [pred.loss for pred in found] == greedy([ribbon(1)], [], xs, ys, SGD)


@pytest.mark.asyncio
@pytest.mark.parametrize("fails", [1, 2, 3])
async def test_a_first_frame_that_fails_shows_its_shapes_all_the_same(fails: int) -> None:
    """Whichever stage's loss fails for it, every stage that it passed has its head and learns from the next frame."""
    xs, ys = stream(8)
    calls = 0

    def picky(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise ValueError("not today")
        return functional.cross_entropy(output, target)

    def start() -> aiotime.Pipeline:
        clock = VirtualClock()
        stages = [
            aiotime.Stage(module, device=SimulatedDevice(k, seconds=10.0 ** (k // 3), clock=clock), name=f"s{k}")
            for k, module in enumerate([nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)])
        ]
        return aiotime.Pipeline.from_stages(stages, learner=Local(loss=picky, optimizer=SGD))

    pipeline = await asyncio.to_thread(start)
    async with asyncio.timeout(20), pipeline:
        await pipeline.submit(Sample(xs[0], target=LATER, key="bad"))
        with pytest.raises(FeedbackError, match="not today"):
            await pipeline.feedback("bad", ys[0])
        for x, y in zip(xs[1:], ys[1:], strict=True):
            assert (await pipeline.submit(Sample(x, y))).loss is not None
    hands: list[Any] = [spec.hands for spec in pipeline._specs]
    first = [0, 0, 0, 0] if fails == 1 else [0, 0, 0, 1] if fails == 2 else [0, 1, 1, 1]
    assert [learner.learned for learner in hands] == [7 + more for more in first]
    assert [learner.head is not None for learner in hands] == [True, False, True, False]  # a Tanh has nothing to learn
    assert not any(learner.unformed for learner in hands)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_gradients_are_averaged_over_several_frames() -> None:
    """``update_every`` holds for the head and the stage alike, and shows in the delay."""
    xs, ys = stream(12)
    rule = Local(loss=functional.cross_entropy, optimizer=SGD, update_every=3)
    pipeline = await asyncio.to_thread(build, rule, ribbon(2), xs[0], ["inline"] * 2)
    found = await learn(pipeline, samples_of(xs, ys))
    assert [pred.delay for pred in found[:4]] == [(0, 0), (1, 1), (2, 2), (0, 0)]
    model = ribbon(2)
    parts = pieces(model, [2, 2])
    heads = heads_for(parts, xs[0])
    params = [[*parts[0].parameters(), *heads[0].parameters()], list(parts[1].parameters())]
    optimizers = [SGD(own) for own in params]
    for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
        h = parts[0](x)
        (functional.cross_entropy(heads[0](h), y) / 3).backward()  # type: ignore[no-untyped-call]
        (functional.cross_entropy(parts[1](h.detach()), y) / 3).backward()  # type: ignore[no-untyped-call]
        if t % 3 == 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    state = pipeline.state_dict()
    assert all(torch.allclose(state[key], value, atol=1e-6) for key, value in model.state_dict().items())


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
async def test_heads_run_in_the_precision_of_their_stage(precision: torch.dtype) -> None:
    """Under autocast the heads learn as well, in float32, and a scaled loss is scaled back."""
    xs, ys = stream(30)
    ys = [torch.tensor([1])] * 30
    rule = Local(loss=functional.cross_entropy, optimizer=SGD, precision=precision)
    pipeline = await asyncio.to_thread(build, rule, ribbon(2), xs[0], ["inline"] * 2)
    found = await learn(pipeline, samples_of(xs, ys))
    assert found[-1].loss < 0.5 * found[0].loss  # type: ignore[operator]
    plain = await asyncio.to_thread(
        build, Local(loss=functional.cross_entropy, optimizer=SGD), ribbon(2), xs[0], ["inline"] * 2
    )  # fmt: skip
    await learn(plain, samples_of(xs, ys))
    own, other = pipeline.state_dict(), plain.state_dict()
    assert all(own[key].dtype is torch.float32 for key in own)
    assert all(torch.allclose(own[key], other[key], atol=0.05) for key in own)


@pytest.mark.asyncio
async def test_a_refused_target_is_told_by_the_stage_it_met_first() -> None:
    """The frame fails with the stage's name; the stages go on with the next one."""
    xs, ys = stream(6)
    ys[2] = torch.tensor([77])
    rule = Local(loss=functional.cross_entropy, optimizer=SGD)
    pipeline = await asyncio.to_thread(build, rule, ribbon(2), xs[0], ["cpu:0", "cpu:1"])
    async with asyncio.timeout(20), pipeline:
        for at, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if at == 2:
                with pytest.raises((InputError, StageError), match="77"):
                    await pipeline.submit(Sample(x, y))
            else:
                await pipeline.submit(Sample(x, y))
    assert [spec.hands.learned for spec in pipeline._specs] == [5, 5]  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_a_model_that_ends_in_nothing_to_learn_is_refused() -> None:
    """The model's loss would teach nobody; frozen stages further down are fine."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.Tanh())
    xs, ys = stream(6)

    def start(rule: Any) -> aiotime.Pipeline:
        return aiotime.Pipeline(model, example=xs[0], devices=["inline"] * 3, balance=[1, 1, 1], learner=rule)

    settings: dict[str, Any] = {"loss": functional.cross_entropy, "optimizer": SGD}
    with pytest.raises(ConfigurationError, match=r"last stage, .* cut further down"):
        await asyncio.to_thread(start, Local(**settings))
    overlapping = await asyncio.to_thread(start, Local(overlapping=True, order="1f1b", **settings))
    before = overlapping.state_dict()
    await learn(overlapping, samples_of(xs, ys))
    assert all(not torch.equal(before[key], value) for key, value in overlapping.state_dict().items())
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 4))
    frozen = await asyncio.to_thread(start, Local(**settings))
    before = frozen.state_dict()
    await learn(frozen, samples_of(xs, ys))
    changed = {key for key, value in frozen.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert frozen._specs[1].hands.head is None  # type: ignore[union-attr]


def test_what_cannot_work_is_refused() -> None:
    """An order or a factor that makes no sense, and late targets where a stage needs its neighbour."""
    with pytest.raises(ConfigurationError, match='order must be "event" or "1f1b"'):
        Local(loss=functional.cross_entropy, optimizer=SGD, order="lockstep")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="local is a factor"):
        Delayed(loss=functional.cross_entropy, optimizer=SGD, local=-1.0)
    with pytest.raises(ConfigurationError, match=r"such as local=1\.0"):
        Delayed(loss=functional.cross_entropy, optimizer=SGD, head=lambda k, cut, output: nn.Linear(1, 1))
    assert Local(loss=functional.cross_entropy, optimizer=SGD).accepts_late
    assert not Local(loss=functional.cross_entropy, optimizer=SGD, overlapping=True).accepts_late
    assert not Local(loss=functional.cross_entropy, optimizer=SGD, order="1f1b").accepts_late


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("own", [False, True])
def test_every_relay_is_wanted_and_every_want_is_served(stages: int, n: int, own: bool) -> None:
    """Walking down from each loss, the stages relay it exactly as far as the one stage that learns from it."""
    orders = [interlocking(k, stages, n=n, own=own) for k in range(stages)]
    last = stages - 1
    relays = {(k, loss) for k, order in enumerate(orders) for loss in order.relays}
    wanted = {(k, k) for k in range(last)} if own and n > 1 else set()
    for k, order in enumerate(orders):
        assert order.ahead == min(n - 1, last - k)
        assert order.reach in (None, n - 1)
        assert (order.reach is None) == (k + n - 1 >= last)
        if order.reach:
            wanted |= {(at, k + order.reach) for at in range(k + 1, k + order.reach + 1)}
    assert relays >= wanted
    assert relays == wanted or own
    assert n > 1 or own or orders == [Order(0, reach=0)] * last + [Order(0)]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_local_learning_learns() -> None:
    """On a stream with something to be found, the second half's loss is far below the first frames'."""
    generator = torch.Generator().manual_seed(0)
    xs = list(torch.randn(200, 1, 6, generator=generator))
    ys = [x[0, :4].argmax().reshape(1) for x in xs]
    totals = []
    for rule in (Local, partial(Local, overlapping=True), partial(Delayed, local=1.0), Exact):
        pipeline = await asyncio.to_thread(
            build, rule(loss=functional.cross_entropy, optimizer=OPTIMIZERS["adam"]), ribbon(3), xs[0], ["inline"] * 3
        )
        losses = [pred.loss or 0.0 for pred in await learn(pipeline, samples_of(xs, ys))]
        totals.append(sum(losses[100:]) / 100)
    assert max(totals) < 1.0

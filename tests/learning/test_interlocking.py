"""Interlocking: back-propagation at one end, local learning at the other, and a hand-written reference between."""

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
from aiotime import LATER, Sample
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import ConfigurationError, InputError, StageError
from aiotime.learning.delayed import Delayed
from aiotime.learning.interlocking import Interlocking
from aiotime.learning.local import Local
from tests.learning.reference import pieces, ribbon, stream
from tests.learning.windows import heads_for, windowed

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01)
PLACES: dict[str, Callable[[int], list[Any]]] = {
    "cpu": lambda stages: [f"cpu:{k}" for k in range(stages)],
    "shared": lambda stages: ["cpu:0", "cpu:1", "cpu:0", "cpu:1"][:stages],
    "inline": lambda stages: ["inline"] * stages,
    "simulated": lambda stages: simulated(stages),
}


def simulated(stages: int, seconds: Any = None) -> list[Any]:
    """Stages on one virtual clock, of unequal speed unless told."""
    clock = VirtualClock()
    return [SimulatedDevice(k, seconds=seconds or 1.0 + (k * 7 % 3), clock=clock) for k in range(stages)]


async def learn(
    rule: Any, stages: int, devices: Sequence[Any], samples: Sequence[Sample]
) -> tuple[list[aiotime.Prediction], dict[str, torch.Tensor]]:
    """All predictions, and the weights at the end."""
    pipeline = await asyncio.to_thread(
        partial(
            aiotime.Pipeline,
            ribbon(stages),
            example=samples[0].input,
            devices=devices,
            balance=[2] * stages,
            learner=rule,
        )
    )
    async with asyncio.timeout(20):
        found = [pred async for pred in pipeline.run(samples)]
    return found, pipeline.state_dict()


def samples_of(frames: int) -> list[Sample]:
    """Frames with their targets."""
    return [Sample(x, y) for x, y in zip(*stream(frames), strict=True)]


@pytest.mark.asyncio
@pytest.mark.parametrize(("stages", "more"), [(1, 0), (2, 0), (2, 3), (3, 0), (4, 0)])
async def test_with_all_stages_it_is_back_propagation(stages: int, more: int) -> None:
    """With n >= S no head is made, and losses and weights have the bits of `Delayed` in the same order."""
    samples = samples_of(20)
    settings: dict[str, Any] = {"loss": functional.cross_entropy, "optimizer": ADAM, "order": "1f1b"}
    devices = [f"cpu:{k}" for k in range(stages)]
    found, state = await learn(Interlocking(stages + more, **settings), stages, devices, samples)
    expected, other = await learn(Delayed(**settings), stages, devices, samples)
    assert [(pred.loss, pred.delay) for pred in found] == [(pred.loss, pred.delay) for pred in expected]
    assert all(torch.equal(state[key], other[key]) for key in other)


@pytest.mark.asyncio
async def test_with_one_stage_it_is_local_learning() -> None:
    """n = 1 has the bits of `Local`."""
    samples = samples_of(20)
    settings: dict[str, Any] = {"loss": functional.cross_entropy, "optimizer": ADAM, "seed": 2}
    found, state = await learn(Interlocking(1, **settings), 3, PLACES["cpu"](3), samples)
    expected, other = await learn(Local(**settings), 3, PLACES["cpu"](3), samples)
    assert [(pred.loss, pred.delay) for pred in found] == [(pred.loss, pred.delay) for pred in expected]
    assert all(torch.equal(state[key], other[key]) for key in other)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("place", "stages", "n"),
    [("cpu", 2, 2), ("cpu", 4, 2), ("shared", 4, 2), ("cpu", 4, 3), ("inline", 4, 3), ("simulated", 4, 3)],
)
async def test_between_the_two_it_equals_a_reference(place: str, stages: int, n: int) -> None:
    """In strict order: the loss n-1 stages up, through weights of the frame's own forward, min(n-1, S-1-k) late."""
    samples = samples_of(20)
    rule = Interlocking(n, order="1f1b", loss=functional.cross_entropy, optimizer=ADAM)
    found, state = await learn(rule, stages, PLACES[place](stages), samples)
    model = ribbon(stages)
    parts = pieces(model, [2] * stages)
    xs, ys = [sample.input for sample in samples], [sample.target for sample in samples]
    losses = windowed(parts, heads_for(parts, xs[0]), xs, ys, functional.cross_entropy, ADAM, n=n)
    assert [pred.loss for pred in found] == pytest.approx(losses, abs=1e-6)
    assert found[10].delay == tuple(min(n - 1, stages - 1 - k) for k in range(stages))
    assert all(torch.allclose(state[key], value, atol=1e-6) for key, value in model.state_dict().items())


@pytest.mark.asyncio
@pytest.mark.parametrize("place", ["cpu", "shared", "simulated"])
async def test_in_event_order_the_delay_is_at_most_that_of_the_window(place: str) -> None:
    """A backward runs as soon as its gradient is there; every stage learns from every frame."""
    rule = Interlocking(3, loss=functional.cross_entropy, optimizer=SGD)
    found, state = await learn(rule, 4, PLACES[place](4), samples_of(20))
    delays = [pred.delay for pred in found]
    assert all(d <= most for delay in delays for d, most in zip(delay or (), (2, 2, 1, 0), strict=True))
    assert all(not torch.equal(state[key], value) for key, value in ribbon(4).state_dict().items())


@pytest.mark.asyncio
@pytest.mark.parametrize(("n", "expected"), [(1, 8), (2, 4), (3, 2), (4, 0)])
async def test_a_stage_waits_for_its_window_and_not_for_the_top(n: int, expected: int) -> None:
    """Until a very slow last stage has ended its first forward, stage 0 learns as often as the windows let it."""
    learned: list[int] = []
    by_then: list[int] = []

    def takes(work: Any, frame: Any) -> float:
        if work.index == 0 and work.phase == "backward":
            learned.append(frame.index)
        elif work.index == 3 and work.phase == "backward" and frame.index == 0:
            by_then.extend(learned)
        return 1000.0 if work.index == 3 else 1.0

    await learn(Interlocking(n, loss=functional.cross_entropy, optimizer=SGD), 4, simulated(4, takes), samples_of(8))
    assert by_then == list(range(expected))
    assert learned == list(range(8))


class Fussy(nn.Module):
    """A layer whose backward fails for the frame that it is told."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.at = at
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.at:
                y.register_hook(self.fail)  # type: ignore[no-untyped-call]
        return y

    def fail(self, grad: torch.Tensor) -> None:
        """Called in the backward."""
        raise ArithmeticError("no gradient today")


@pytest.mark.asyncio
@pytest.mark.parametrize("place", ["cpu", "inline"])
async def test_a_relay_that_fails_costs_its_frame_alone(place: str) -> None:
    """The stages that wait for it are told, and go on with the next frame."""
    xs, ys = stream(8)
    modules = [nn.Linear(6, 8), nn.Linear(8, 8), Fussy(3), nn.Linear(8, 4)]
    pipeline = await asyncio.to_thread(
        lambda: aiotime.Pipeline.from_stages(
            [
                aiotime.Stage(module, device=device, name=f"s{k}")
                for k, (module, device) in enumerate(zip(modules, PLACES[place](4), strict=True))
            ],
            learner=Interlocking(
                2,
                loss=functional.cross_entropy,
                optimizer=SGD,
                order="1f1b",
                head=lambda k, cut, output: nn.Linear(8, 4),
            ),
        )
    )
    failed: list[int] = []
    async with asyncio.timeout(20), pipeline:
        for at, (x, y) in enumerate(zip(xs, ys, strict=True)):
            try:
                await pipeline.submit(Sample(x, y))
            except (StageError, InputError):
                failed.append(at)
        await pipeline.drain()
    learned = [spec.hands.learned for spec in pipeline._specs]  # type: ignore[union-attr]
    assert learned == [8, 7, 7, 8]  # s2 fails its relay and its backward; s1 wants the relay; s0 the one of s1
    assert all(not spec.hands.kept and not spec.hands._own for spec in pipeline._specs)  # type: ignore[union-attr]
    assert set(failed) <= set(range(8))


@pytest.mark.asyncio
async def test_closing_in_the_middle_leaves_nothing() -> None:
    """A pipeline that is closed with relays under way ends, and learns again when it is opened anew."""
    samples = samples_of(30)
    rule = Interlocking(2, loss=functional.cross_entropy, optimizer=SGD)
    pipeline = await asyncio.to_thread(
        partial(
            aiotime.Pipeline,
            ribbon(4),
            example=samples[0].input,
            devices=[f"cpu:{k}" for k in range(4)],
            balance=[2] * 4,
            learner=rule,
        )
    )
    async with asyncio.timeout(20):
        async with pipeline.run(samples) as run:
            async for pred in run:
                if pred.index == 7:
                    break
        assert len([pred async for pred in pipeline.run(samples)]) == 30
    assert all(not spec.hands.kept for spec in pipeline._specs)  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_weights_loaded_between_two_frames_are_what_is_learned_on() -> None:
    """A swap waits for the relays under way as for the backwards."""
    samples = samples_of(10)
    devices = ["cpu:0", "cpu:1", "cpu:2"]
    rule = Interlocking(2, order="1f1b", loss=functional.cross_entropy, optimizer=SGD)
    fresh, _ = await learn(rule, 3, devices, samples)
    pipeline = await asyncio.to_thread(
        partial(
            aiotime.Pipeline, ribbon(3), example=samples[0].input, devices=devices, balance=[2] * 3,
            learner=Interlocking(2, order="1f1b", loss=functional.cross_entropy, optimizer=SGD),
        )
    )  # fmt: skip
    heads = [spec.hands.state_dict() for spec in pipeline._specs]  # type: ignore[union-attr]
    async with asyncio.timeout(20), pipeline:
        _ = [pred async for pred in pipeline.run(samples)]
        await pipeline.load_state_dict(ribbon(3).state_dict())
        for spec, state in zip(pipeline._specs, heads, strict=True):
            spec.hands.load_state_dict(state)  # type: ignore[union-attr]
        again = [pred async for pred in pipeline.run(samples)]
    assert [pred.loss for pred in again] == [pred.loss for pred in fresh]


@pytest.mark.asyncio
async def test_what_cannot_work_is_refused() -> None:
    """No stages at all, an order that makes no sense, no example for default heads, late targets."""
    settings: dict[str, Any] = {"loss": functional.cross_entropy, "optimizer": SGD}
    with pytest.raises(ConfigurationError, match="from 1, not 0"):
        Interlocking(0, **settings)
    with pytest.raises(ConfigurationError, match='order must be "event" or "1f1b"'):
        Interlocking(2, order="lockstep", **settings)  # type: ignore[arg-type]
    stages = [aiotime.Stage(part, device="inline") for part in pieces(ribbon(3), [2] * 3)]
    with pytest.raises(ConfigurationError, match=r"no example .* Pipeline\(model, example=\.\.\.\)"):
        await asyncio.to_thread(partial(aiotime.Pipeline.from_stages, stages, learner=Interlocking(2, **settings)))
    pipeline = await asyncio.to_thread(
        partial(aiotime.Pipeline.from_stages, stages, learner=Interlocking(3, **settings))
    )
    async with asyncio.timeout(20), pipeline:
        with pytest.raises(InputError, match="no late targets"):
            await pipeline.submit(Sample(torch.zeros(1, 6), target=LATER, key=1))

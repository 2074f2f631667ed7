"""Clipping by the whole model's norm equals torch's on the uncut model; where it cannot be, that is said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import aiotime
from aiotime.errors import ConfigurationError, StageError
from aiotime.learning.delayed import Delayed
from aiotime.learning.exact import Exact
from aiotime.learning.rule import Rule
from aiotime.learning.sideways import Sideways
from aiotime.learning.synchronous import Synchronous
from tests.learning.reference import ribbon, stream

SGD = partial(torch.optim.SGD, lr=0.1)
LIMIT = 0.3

RULES: dict[str, tuple[int, Callable[..., Rule]]] = {
    "exact": (1, Exact),
    "exact, 3 frames": (3, partial(Exact, update_every=3)),
    "gpipe": (4, partial(Synchronous, micro_batches=4, schedule="gpipe")),
    "1f1b": (4, partial(Synchronous, micro_batches=4, schedule="1f1b")),
}


def clipped(
    stages: int, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], sizes: Sequence[int]
) -> tuple[dict[str, torch.Tensor], int]:
    """Plain training on batches of these sizes with torch's own clipping; and how often that had something to do."""
    model, clips, at = ribbon(stages), 0, 0
    optimizer = SGD(model.parameters())
    for size in sizes:
        loss = cross_entropy(model(torch.cat(list(xs[at : at + size]))), torch.cat(list(ys[at : at + size])))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clips += bool(torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT) > LIMIT)
        optimizer.step()
        at += size
    assert at == len(xs)
    return dict(model.state_dict()), clips


async def opened(rule: Rule, stages: int, devices: Any = None) -> aiotime.Pipeline:
    """A pipeline of so many stages that learns by ``rule``."""
    names = devices or [f"cpu:{k}" for k in range(stages)]
    example = stream(1)[0][0]
    return await asyncio.to_thread(
        aiotime.Pipeline, ribbon(stages), example=example, devices=names, balance=[2] * stages, learner=rule
    )


async def learn(pipeline: aiotime.Pipeline, xs: Sequence[torch.Tensor], ys: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The weights after this stream."""
    async with asyncio.timeout(20):
        async for _ in pipeline.run([aiotime.Sample(x, y) for x, y in zip(xs, ys, strict=True)]):
            pass
    return pipeline.state_dict()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", RULES)
async def test_equals_clipping_the_whole_model(name: str) -> None:
    """Every stage scales its gradient by the norm of all of them, also in the shorter mini-batch at the end."""
    size, make = RULES[name]
    sizes = [size] * 5 + ([] if name.startswith("exact") else [size - 1])
    xs, ys = stream(sum(sizes))
    for stages in (1, 2, 4):
        for devices in (None, ["inline"] * stages, ["cpu:0"] * stages):
            rule = make(loss=cross_entropy, optimizer=SGD, clip_norm=LIMIT, clip="global")
            state = await learn(await opened(rule, stages, devices), xs, ys)
            expected, clips = clipped(stages, xs, ys, sizes)
            assert clips > 2
            torch.testing.assert_close(state, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_late_targets_wait_their_turn() -> None:
    """With Exact, a target that comes later is learned from and clipped like any other."""
    xs, ys = stream(4)
    rule = Exact(loss=cross_entropy, optimizer=SGD, clip_norm=LIMIT, clip="global")
    pipeline = await opened(rule, 3)
    async with asyncio.timeout(20), pipeline:
        for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
            await pipeline.submit(aiotime.Sample(x, aiotime.LATER, key=t))
            await pipeline.feedback(t, y)
        await pipeline.drain()
        torch.testing.assert_close(pipeline.state_dict(), clipped(3, xs, ys, [1] * 4)[0], atol=2e-6, rtol=1e-5)


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("name", ["exact", "1f1b"])
async def test_an_infinite_gradient_is_skipped_by_every_stage(name: str) -> None:
    """One frame whose gradient is not finite costs one update at all stages, so that they stay together."""
    size, make = RULES[name]
    xs, ys = stream(3 * size)
    targets = [(y, 1.0) for y in ys]
    targets[size] = ys[size], float("inf")
    rule = make(loss=scaled, optimizer=SGD, clip_norm=LIMIT, clip="global")
    state = await learn(await opened(rule, 3), xs, targets)
    expected, _ = clipped(3, xs[:size] + xs[2 * size :], ys[:size] + ys[2 * size :], [size, size])
    torch.testing.assert_close(state, expected, atol=2e-6, rtol=1e-5)


def scaled(output: torch.Tensor, target: tuple[torch.Tensor, float]) -> torch.Tensor:
    """Cross entropy times a factor."""
    return cross_entropy(output, target[0]) * target[1]


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("name", RULES)
async def test_frame_that_fails_is_not_part_of_the_norm(name: str) -> None:
    """A frame without a loss leaves the norm of the others; nothing waits for it."""
    size, make = RULES[name]
    xs, ys = stream(2 * size + 1)
    bad = size  # the first of the second update
    targets = [y if t != bad else torch.zeros(3, dtype=torch.long) for t, y in enumerate(ys)]
    rule = make(loss=cross_entropy, optimizer=SGD, clip_norm=LIMIT, clip="global")
    pipeline = await opened(rule, 3)
    samples = [aiotime.Sample(x, y) for x, y in zip(xs, targets, strict=True)]
    async with asyncio.timeout(20):
        assert len([p async for p in pipeline.run(samples, on_error="skip")]) == 2 * size
    left = xs[:bad] + xs[bad + 1 :], ys[:bad] + ys[bad + 1 :]
    sizes = {"exact": [1, 1], "exact, 3 frames": [3, 3]}.get(name, [size, size - 1, 1])
    expected = clipped(3, *left, sizes)[0]
    torch.testing.assert_close(pipeline.state_dict(), expected, atol=2e-6, rtol=1e-5)


class Stubborn(torch.optim.SGD):
    """Refuses its third step."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        """Raise once."""
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("not this one")
        return super().step(closure)


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("name", ["exact", "1f1b"])
async def test_stages_above_one_that_cannot_update_do_not_either(name: str) -> None:
    """An optimizer that raises is reported; the stages above it leave that update out, and learning goes on."""
    size, make = RULES[name]
    xs, ys = stream(4 * size)
    plain = partial(torch.optim.SGD, lr=0.1)
    rule = make(loss=cross_entropy, optimizer=[plain, partial(Stubborn, lr=0.1), plain], clip_norm=LIMIT, clip="global")
    pipeline = await opened(rule, 3)
    async with asyncio.timeout(20), pipeline:
        with pytest.raises(StageError, match="not this one"):
            await learn(pipeline, xs, ys)
        await learn(pipeline, xs[:size], ys[:size])
    updates = [spec.hands.updater.updates for spec in pipeline._specs]  # type: ignore[union-attr]
    assert updates[0] - 1 == updates[1] == updates[2]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_closing_in_the_middle_leaves_nothing_waiting() -> None:
    """A pipeline closed while stages wait for each other's norms ends."""
    xs, ys = stream(40)
    for make in (RULES["exact"][1], RULES["1f1b"][1]):
        pipeline = await opened(make(loss=cross_entropy, optimizer=SGD, clip_norm=LIMIT, clip="global"), 4)
        samples = [aiotime.Sample(x, y) for x, y in zip(xs, ys, strict=True)]
        async with asyncio.timeout(20), pipeline, pipeline.run(samples) as run:
            async for pred in run:
                if pred.index == 5:
                    await pipeline.aclose()
                    break


@pytest.mark.parametrize("rule", [Sideways, Delayed])
def test_rules_with_a_delay_refuse(rule: Callable[..., Rule]) -> None:
    """They say why, and what to use."""
    with pytest.raises(ConfigurationError, match="Exact, Synchronous"):
        rule(loss=cross_entropy, optimizer=SGD, clip_norm=1.0, clip="global")


@pytest.mark.parametrize("settings", [{"clip": "global"}, {"clip": "model", "clip_norm": 1.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    """A global clip needs a norm, and there are two kinds of clipping."""
    with pytest.raises(ConfigurationError, match="clip"):
        Exact(loss=cross_entropy, optimizer=SGD, **settings)

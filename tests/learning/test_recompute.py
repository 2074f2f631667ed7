"""Recomputation: the graph that is made again is the first one, and leaves no trace."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.frame import LATER
from aiotime.learning import Delayed
from aiotime.learning.learner import Site
from aiotime.learning.recompute import Recomputation
from aiotime.learning.ticket import Ticket
from tests.learning.reference import fifo, pieces, ribbon, stream

PATIENCE = 20.0
SGD = partial(torch.optim.SGD, lr=0.1)

one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


async def learn(
    model: nn.Sequential, balance: Sequence[int], frames: Any, targets: Any, *, devices: Sequence[str], **settings: Any
) -> tuple[list[Any], dict[str, torch.Tensor], list[Any]]:
    """(losses, final state, the stages' hands) of a run in the order 1f1b."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "BatchNorm")
        pipeline = await asyncio.to_thread(
            aiotime.Pipeline, model, example=frames[0], devices=list(devices), balance=list(balance),
            learner=Delayed(loss=functional.cross_entropy, optimizer=SGD, order="1f1b", **settings),
        )  # fmt: skip
    torch.manual_seed(7)
    async with asyncio.timeout(PATIENCE):
        losses = [prediction.loss async for prediction in pipeline.run(map(aiotime.Sample, frames, targets))]
    return losses, pipeline.state_dict(), [spec.hands for spec in pipeline._specs]


def noisy() -> nn.Sequential:
    """Noise in one stage (between two the order of draws would depend on timing), running statistics in all."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8),
        nn.Linear(8, 8), nn.RReLU(), nn.Dropout(0.5), nn.BatchNorm1d(8),
        nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=0.5), nn.Tanh(), nn.Linear(8, 4),
    )  # fmt: skip


def pairs(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Frames of three rows each, which BatchNorm can work with."""
    generator = torch.Generator().manual_seed(2)
    return list(torch.randn(count, 3, 6, generator=generator)), list(
        torch.randint(0, 4, (count, 3), generator=generator)
    )


@one_loop
@pytest.mark.parametrize("split", [False, True])
async def test_noise_and_statistics_are_those_of_the_first_time(split: bool) -> None:
    """With dropout and BatchNorm, losses and final state (running statistics too) are the same bits as without."""
    frames, targets = pairs(15)
    settings: dict[str, Any] = {"devices": ["cpu:0", "cpu:1", "cpu:2"], "split": split}
    kept = await learn(noisy(), [4, 4, 4], frames, targets, **settings)
    again = await learn(noisy(), [4, 4, 4], frames, targets, recompute=True, **settings)
    assert kept[0] == again[0]
    assert all(torch.equal(kept[1][key], again[1][key]) for key in kept[1])
    assert kept[1]["1.num_batches_tracked"] == kept[1]["7.num_batches_tracked"] == 15
    assert [hands.recomputation.draws for hands in again[2]] == [False, True, False]


@one_loop
async def test_recomputed_with_the_newest_weights() -> None:
    """With current weights the graph is made of the kept input and the newest weights; so says the reference."""
    frames, targets = stream(20)
    parts = pieces(ribbon(6), [4] * 3)
    expected = fifo(parts, frames, targets, functional.cross_entropy, SGD, [2, 1, 0], weights="recomputed")
    losses, state, _ = await learn(
        ribbon(6), [4] * 3, frames, targets, devices=["cpu:0", "cpu:1", "cpu:0"], recompute=True, weights="current"
    )
    assert losses == expected[0]
    assert all(torch.equal(state[key], expected[1][key]) for key in state)


@one_loop
async def test_recomputed_with_the_weights_of_the_forward() -> None:
    """Stashed, predicted and double-buffered weights are read again: the same bits as without recomputation."""
    frames, targets = stream(20)
    cases: list[dict[str, Any]] = [
        {"weights": "stashed"}, {"weights": "predicted"}, {"weights": "double-buffered", "update_every": 3}
    ]  # fmt: skip
    devices = ["cpu:0", "cpu:1", "cpu:0"]
    for settings in cases:
        found = [
            await learn(ribbon(6), [4] * 3, frames, targets, devices=devices, recompute=recompute, **settings)
            for recompute in (False, True)
        ]
        assert found[0][0] == found[1][0], settings
        assert all(torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])


@one_loop
async def test_stages_that_draw_take_turns() -> None:
    """On threads of their own, every stage's second run has the noise of its first."""
    seen: dict[str, list[torch.Tensor]] = {}

    class Seen(nn.Module):
        """Notes what it passes on."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.drop = nn.Dropout(0.5)
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.drop(self.layer(x))
            if self.training:
                seen.setdefault(self.name, []).append((y != 0).detach())
            return y

    frames, targets = stream(30)
    modules = {name: Seen(name) for name in ("a", "b", "c")}
    rule = Delayed(loss=functional.cross_entropy, optimizer=SGD, order="1f1b", recompute=True)
    stages = [aiotime.Stage(module, device=f"cpu:{k}", name=name) for k, (name, module) in enumerate(modules.items())]
    pipeline = await asyncio.to_thread(aiotime.Pipeline.from_stages, stages, learner=rule)
    async with asyncio.timeout(PATIENCE):
        async for _ in pipeline.run(map(aiotime.Sample, frames, targets)):
            pass
    for name, ahead in (("a", 2), ("b", 1)):
        masks = seen[name]
        order = [("F", t) for t in range(ahead)]
        for t in range(30):
            order += [("F", t + ahead)] if t + ahead < 30 else []
            order.append(("B", t))
        assert len(masks) == 60
        found = dict(zip(order, masks, strict=True))
        assert all(torch.equal(found["F", t], found["B", t]) for t in range(30)), name
    assert len(seen["c"]) == 30  # the last stage's backward comes at once: nothing to save


def stage_of(module: nn.Module, index: int = 0, **settings: Any) -> Any:
    rule = Delayed(loss=functional.cross_entropy, optimizer=SGD, recompute=True, **settings)
    return rule.stage(Site(index, 2, "one", module, [("", module)], passes_down=index > 0))


def test_only_the_input_is_kept() -> None:
    """Between forward and backward a stage holds its input; after it, nothing."""
    model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(6, 6), nn.Tanh())])
    hands = stage_of(model, 1)
    hands.top = False
    ticket = Ticket(0, 2, learn=True, target=torch.tensor([1]))
    x = torch.randn(1, 6)
    output = hands.forward(ticket, x)
    kept = hands.kept[ticket]
    assert kept.outputs == [] and kept.entry == [] and kept.loss is None
    assert hands.kept_nbytes() == x.numel() * 4
    message = hands.backward(ticket, [torch.ones_like(output)])
    assert message[0].shape == x.shape
    assert hands.kept_nbytes() == 0


@one_loop
async def test_late_targets() -> None:
    """A frame whose target comes later keeps an input at every stage, the last one too, until it is there."""
    frames, targets = stream(6)
    found = []
    for recompute in (False, True):
        pipeline = await asyncio.to_thread(
            aiotime.Pipeline, ribbon(2), example=frames[0], devices=["cpu:0", "cpu:1"], balance=[2, 2],
            learner=Delayed(loss=functional.cross_entropy, optimizer=SGD, recompute=recompute),
        )  # fmt: skip
        losses = []
        async with asyncio.timeout(PATIENCE), pipeline:
            for at, x in enumerate(frames):
                await pipeline.submit(aiotime.Sample(x, LATER, key=at))
            for at, y in enumerate(targets):
                losses.append(await pipeline.feedback(at, y))
        found.append((losses, pipeline.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])


class Counting(nn.Module):
    """Its buffers move in every way: in place, replaced, and a constant one."""

    seen: torch.Tensor
    newest: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("newest", torch.zeros(3))
        self.register_buffer("constant", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.newest = self.newest + x.detach()[0]
        y: torch.Tensor = self.layer(x) * self.seen + self.newest
        return y


def test_buffers_come_back() -> None:
    """The second run sees the buffers as the first one found them; what they have become meanwhile stays."""
    module = Counting()
    again = Recomputation(Site(0, 1, "one", module, [("", module)]))
    inputs = torch.randn(4, 1, 3)
    recipes, firsts = [], []
    for x in inputs:
        with again.first() as recipe:
            firsts.append(module(x))
        recipes.append(recipe)
    after = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for x, recipe, first in zip(inputs, recipes, firsts, strict=True):
        with again.again(recipe):
            assert torch.equal(module(x), first)
    assert all(torch.equal(buffer, after[name]) for name, buffer in module.named_buffers())
    assert {name for _, name, _ in recipes[-1].buffers} == {"seen", "newest", "constant"}  # a module's go together
    assert again.draws is False


def test_random_numbers_go_on_where_they_were() -> None:
    """Running again uses up no random numbers."""
    drop = nn.Dropout(0.5)
    again = Recomputation(Site(0, 1, "one", drop, [("", drop)]))
    x = torch.ones(1, 64)
    torch.manual_seed(0)
    with again.first() as recipe:
        first = drop(x)
    expected = torch.get_rng_state()
    torch.rand(3)
    later = torch.get_rng_state()
    with again.again(recipe):
        assert torch.equal(drop(x), first)
    assert torch.equal(torch.get_rng_state(), later)
    assert not torch.equal(expected, later)


def test_one_draws_at_a_time() -> None:
    """While a stage that draws is at it, another one waits; one that does not draw goes on."""
    drop, plain = nn.Dropout(0.5), nn.Linear(2, 2)
    drawing, calm = (Recomputation(Site(0, 1, "one", module, [("", module)])) for module in (drop, plain))
    for one, module in ((drawing, drop), (calm, plain)):
        with one.first():
            module(torch.ones(1, 2))
    assert drawing.draws and not calm.draws
    passed: list[str] = []

    def enter(one: Recomputation, name: str) -> threading.Thread:
        def go() -> None:
            with one.first():
                passed.append(name)

        thread = threading.Thread(target=go)
        thread.start()
        return thread

    with drawing.first():
        waiting = enter(drawing, "drawing")
        enter(calm, "calm").join(PATIENCE)
        assert passed == ["calm"]
    waiting.join(PATIENCE)
    assert passed == ["calm", "drawing"]

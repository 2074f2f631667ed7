"""Taps: the gradient of a long skip takes one tick, as a literal simulation does it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import aiotime
from aiotime.learning.sideways import Sideways
from tests.learning.reference import stream

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
STAGES = 5

Values = dict[str, torch.Tensor]


class Skipping(nn.Module):
    """Five stages; what the first makes is used by the second, the fourth and the last, the second's by the fourth."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            sizes = [(6, 8), (8, 8), (8, 8), (24, 8), (16, 4)]
            self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def stage(self, k: int, h: Values) -> torch.Tensor:
        """What stage k makes of what the others made."""
        inputs = [["x"], ["0"], ["1"], ["2", "0", "1"], ["3", "0"]][k]
        return torch.tanh(self.layers[k](torch.cat([h[name] for name in inputs], dim=1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All stages."""
        h = {"x": x}
        for k in range(STAGES):
            h[str(k)] = self.stage(k, h)
        return h["4"]


def ticks(
    model: Skipping, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], cuts: Sequence[int] = ()
) -> list[float]:
    """PARTIME's ticks, with gradients that go to where their tensor was made. Values travel along the chain.

    A stage acts once its neighbour above has sent it a gradient; taps that come before that are not used.
    """
    top = STAGES - 1
    wants = {0: ["x"], 1: ["0"], 2: ["1"], 3: ["2", "0", "1"], 4: ["3", "0"]}
    scene = [sum(cut <= t for cut in cuts) for t in range(len(xs))]
    optimizers = [SGD(layer.parameters()) for layer in model.layers]
    losses = [0.0] * len(xs)
    shown: dict[int, tuple[int, Values]] = {}
    sent: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}  # (from, to): (frame of the loss, gradient)
    held: dict[int, tuple[int, Values]] = {}
    alive: dict[int, int] = {}  # (by stage above) frame whose chain message is under way, also where it is empty
    tick = 0
    while tick < len(xs) or shown or alive:
        now_shown, now_sent, now_alive = {}, {}, {}
        for k in range(STAGES):
            incoming = (tick, {"x": xs[tick]}) if k == 0 and tick < len(xs) else shown.get(k - 1)
            if incoming is not None:
                held[k] = incoming
            elif k + 1 not in alive:
                continue
            frame, values = held[k]
            leaves = {name: values[name].detach().requires_grad_(k > 0) for name in wants[k]}
            z = model.stage(k, leaves)
            if incoming is not None and k < top:
                now_shown[k] = frame, {**values, str(k): z.detach()}
            if k == top:
                loss = cross_entropy(z, ys[frame])
                losses[frame] = loss.item()
                origin, root, seed = frame, loss, None
            elif k + 1 in alive:
                origin = alive[k + 1]
                now_alive[k] = origin
                if scene[origin] != scene[frame]:
                    continue
                found = [sent[K, k] for K in range(k + 1, STAGES) if (K, k) in sent]
                grads = [grad for t, grad in found if scene[t] == scene[frame]]
                root, seed = z, sum(grads[1:], grads[0])
            else:
                continue
            now_alive[k] = origin
            params = list(model.layers[k].parameters())
            inner = list(leaves.values()) if k > 0 else []
            grads = list(torch.autograd.grad(root, [*inner, *params], seed))
            for name, grad in zip(wants[k] if k > 0 else [], grads, strict=False):
                now_sent[k, int(name)] = origin, grad
            for p, grad in zip(params, grads[len(inner) :], strict=True):
                p.grad = grad
            optimizers[k].step()
        shown, sent, alive = now_shown, now_sent, now_alive
        alive.pop(0, None)
        tick += 1
    return losses


async def learn(
    samples: Sequence[aiotime.Sample], devices: Any = None, *, taps: bool = True, on_error: Any = "raise"
) -> tuple[list[aiotime.Prediction], dict[str, torch.Tensor]]:
    """What a pipeline of five stages said, and its weights."""
    rule = Sideways(loss=cross_entropy, optimizer=SGD, taps=taps)
    parts = [Part(k) for k in range(STAGES)]
    places = devices or [None] * STAGES
    stages = [aiotime.Stage(part, device=places[k], name=f"s{k}") for k, part in enumerate(parts)]
    pipeline = await asyncio.to_thread(aiotime.Pipeline.from_stages, stages, learner=rule)
    async with asyncio.timeout(20):
        predictions = [pred async for pred in pipeline.run(samples, on_error=on_error)]
    return predictions, pipeline.state_dict()


class Part(nn.Module):
    """One stage of `Skipping` with what it hands on: a tuple of all tensors that are still wanted."""

    NEEDS = (("x",), ("0",), ("0", "1"), ("0", "1", "2"), ("0", "3"))

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.whole = Skipping()
        for other in range(STAGES):
            if other != k:
                self.whole.layers[other] = nn.Identity()

    def forward(self, *values: torch.Tensor) -> Any:
        """Tensors in, tensors out."""
        h = dict(zip(self.NEEDS[self.k], values, strict=True))
        h[str(self.k)] = self.whole.stage(self.k, h)
        if self.k == STAGES - 1:
            return h["4"]
        return tuple(h[name] for name in self.NEEDS[self.k + 1])


def labelled(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], cuts: Sequence[int] = ()) -> list[aiotime.Sample]:
    """Samples of a stream with scene cuts before the frames ``cuts``."""
    return [aiotime.Sample(x, y, cut=t in cuts) for t, (x, y) in enumerate(zip(xs, ys, strict=True))]


def check(state: dict[str, torch.Tensor], model: Skipping) -> None:
    """The weights of the stages are those of the whole."""
    for k, layer in enumerate(model.layers):
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(state[f"s{k}.whole.layers.{k}.{name}"], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.asyncio
@pytest.mark.parametrize("devices", [None, ["inline"] * STAGES, ["cpu:0", "cpu:1", "cpu:0", "cpu:1", "cpu:0"]])
async def test_pipeline_equals_the_ticks(devices: Any) -> None:
    """Losses and weights are those of the simulation, whatever the stages share."""
    xs, ys = stream(30)
    predictions, state = await learn(labelled(xs, ys), devices)
    model = Skipping()
    torch.testing.assert_close([pred.loss for pred in predictions], ticks(model, xs, ys), atol=1e-6, rtol=1e-5)
    check(state, model)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_taps_make_a_difference_and_cuts_hold_for_them() -> None:
    """Without taps the result is another; with cuts, gradients from before one are used neither way after it."""
    xs, ys = stream(40)
    _, plain = await learn(labelled(xs, ys), taps=False)
    _, tapped = await learn(labelled(xs, ys))
    assert not torch.allclose(plain["s0.whole.layers.0.weight"], tapped["s0.whole.layers.0.weight"], atol=1e-6)
    cuts = [15, 27]
    predictions, state = await learn(labelled(xs, ys, cuts))
    model = Skipping()
    torch.testing.assert_close([pred.loss for pred in predictions], ticks(model, xs, ys, cuts), atol=1e-6, rtol=1e-5)
    check(state, model)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_frames_that_fail_or_are_few_leave_nobody_waiting() -> None:
    """A tap whose frame failed is empty; a stream shorter than the pipeline is learned from to its end."""
    xs, ys = stream(20)
    samples = labelled(xs, ys)
    for t in (0, 9):
        samples[t] = aiotime.Sample(xs[t], torch.zeros(3, dtype=torch.long))
    predictions, _ = await learn(samples, on_error="skip")
    assert len(predictions) == 18
    for frames in (1, 2, 4):
        predictions, state = await learn(labelled(xs[:frames], ys[:frames]))
        model = Skipping()
        assert len(predictions) == frames
        ticks(model, xs[:frames], ys[:frames])
        check(state, model)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_model_cut_by_the_plan_has_its_taps_found() -> None:
    """In a traced model the skips are found as well; taps change its weights, never its outputs for given weights."""
    xs, ys = stream(24)
    states = []
    for taps in (True, False):
        pipeline = await asyncio.to_thread(
            aiotime.Pipeline,
            Skipping(),
            example=xs[0],
            devices=["cpu:0", "cpu:1", "cpu:0", "cpu:1", "cpu:0"],
            balance="even",
            learner=Sideways(loss=cross_entropy, optimizer=SGD, taps=taps),
        )
        async with asyncio.timeout(20):
            predictions = [pred async for pred in pipeline.run(labelled(xs, ys))]
        torch.testing.assert_close(predictions[0].output, Skipping()(xs[0]).detach())
        states.append(pipeline.state_dict())
    assert not torch.allclose(states[0]["layers.0.weight"], states[1]["layers.0.weight"], atol=1e-6)

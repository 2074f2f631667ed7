"""Four layers on digits: do 1, 2, 4 and 8 instances in flight need the same number of epochs?

A stage per layer, an update per 100 gradients at each (Gaunt et al., AMPNet 2017): what is compared is how many passes
over the training set it takes until enough of the validation set are right. Plain PyTorch takes one instance at a time,
too, and updates after 100.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean, median

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.dynamic import Network, Stage
from aiotime.frame import Sample
from benchmarks._harness import Report, progress
from benchmarks.dynamic import picture
from benchmarks.dynamic.race import Curve, Way

TARGET = 0.93
EPOCHS = 8
FREQUENCY = 100
KEYS = (1, 2, 4, 8)
RATE = 5e-3
WIDTH = 64
VALIDATION = 360  # of 1,797 digits
SAME = 1.1  # epochs, times those of one instance in flight


class Perceptron(Network):
    """Layer by layer."""

    def __init__(self, *, seed: int) -> None:
        torch.manual_seed(seed)
        sizes = [WIDTH, WIDTH, WIDTH, WIDTH, 10]
        self.layers = [
            Stage(
                nn.Sequential(nn.Linear(enter, leave), nn.ReLU()) if at < 3 else nn.Linear(enter, leave),
                device="inline",
                name=f"layer{at}",
                max_batch=max(KEYS),
            )
            for at, (enter, leave) in enumerate(pairwise(sizes))
        ]

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(64,) -> logits (10,)."""
        for layer in self.layers:
            x = await layer(x)
        return x


@dataclass(frozen=True)
class Data:
    """Digits, pixels from 0 to 1."""

    train: Sequence[Sample]
    validation: torch.Tensor  # (360, 64)
    labels: torch.Tensor  # (360,)

    def epoch(self, seed: int, number: int) -> list[Sample]:
        """The training set in an order of its own."""
        order = list(self.train)
        random.Random(1_000 * seed + number).shuffle(order)
        return order


def digits(number: int | None = None) -> Data:
    """Those that come with scikit-learn; ``number``: of the training set, at most."""
    bunch = load_digits()
    frames = torch.tensor(bunch.data, dtype=torch.float32) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))
    held, train = order[:VALIDATION], order[VALIDATION:][:number]
    samples = [Sample(frames[at], labels[at]) for at in train]
    return Data(samples, frames[held], labels[held])


def accuracy(network: Perceptron, data: Data) -> float:
    """Of the whole validation set at once, in plain PyTorch."""
    with torch.inference_mode():
        x = data.validation
        for layer in network.layers:
            x = layer.replicas[0].fn(x)
        return float((x.argmax(1) == data.labels).float().mean())


class Plain:
    """Gradients of 100 instances, one after the other, then a step."""

    def __init__(self, way: Way, seed: int) -> None:
        self.network = Perceptron(seed=seed)
        self._model = nn.Sequential(*(layer.replicas[0].fn for layer in self.network.layers))
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=way.rate, fused=True)
        self._gathered = 0

    async def learn(self, samples: Sequence[Sample]) -> None:
        """One pass."""
        model, optimizer = self._model, self._optimizer
        for sample in samples:
            loss = functional.cross_entropy(model(sample.input), sample.target) / FREQUENCY
            loss.backward()
            self._gathered += 1
            if self._gathered == FREQUENCY:
                self._gathered = 0
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


class Learner:
    """The network."""

    def __init__(self, way: Way, seed: int) -> None:
        self.network = Perceptron(seed=seed)
        self._way = way

    async def learn(self, samples: Sequence[Sample]) -> None:
        """One pass."""
        run = self.network.learn(
            samples,
            loss=functional.cross_entropy,
            optimizer=partial(torch.optim.Adam, lr=self._way.rate, fused=True),
            max_active_keys=self._way.keys,
            min_update_frequency=FREQUENCY,
            ordered=False,
        )
        async with run:
            async for _ in run:
                pass


async def study(ways: Sequence[Way], data: Data, *, seed: int, epochs: int) -> list[Curve]:
    """Each way from the same weights, in turns, pass by pass."""
    curves = [Curve(way) for way in ways]
    contenders = [Learner(way, seed) if way.keys else Plain(way, seed) for way in ways]
    for contender in contenders:
        await contender.network.__aenter__()
    for number in range(epochs):
        samples = data.epoch(seed, number)
        order = list(zip(contenders, curves, strict=True))
        for contender, curve in order if number % 2 == 0 else reversed(order):
            progress(f"seed {seed}, epoch {number + 1}: {curve.way.name}")
            gc.collect()
            begun = time.perf_counter()
            await contender.learn(samples)
            seconds = time.perf_counter() - begun
            curve.instances.append((curve.instances[-1] if curve.instances else 0) + len(samples))
            curve.seconds.append((curve.seconds[-1] if curve.seconds else 0.0) + seconds)
            curve.speeds.append(len(samples) / seconds)
            curve.accuracy.append(accuracy(contender.network, data))
    for contender, curve in zip(contenders, curves, strict=True):
        if isinstance(contender, Learner):
            curve.delay = max(stage.delay_mean for stage in contender.network.stats().stages)
        await contender.network.aclose()
    progress("")
    return curves


def setup(arguments: argparse.Namespace) -> str:
    """In words."""
    return (
        f"Four layers of {WIDTH}, ReLU, one stage each, inline; {len(digits().train):,} digits to learn from, "
        f"{VALIDATION} to validate on after each pass; Adam {RATE:g}, fused, an update per {FREQUENCY} gradients; one "
        f"thread; {_seeds(arguments)} seeds."
    )


def _seeds(arguments: argparse.Namespace) -> int:
    return 1 if arguments.quick else arguments.rounds or 3


def passes(curve: Sequence[float], target: float) -> float:
    """How many passes it takes until the target, straight lines between them; infinite where it is not reached."""
    before = 0.0
    for number, now in enumerate(curve):
        if now >= target:
            return number + (target - before) / (now - before)
        before = now
    return math.inf


def main(arguments: argparse.Namespace, report: Report) -> None:
    """Plain PyTorch, and 1, 2, 4, 8 instances in flight."""
    data, epochs = (digits(100), 2) if arguments.quick else (digits(), EPOCHS)
    ways = [
        Way("plain PyTorch", RATE),
        *(Way(f"{keys} in flight", RATE, keys=keys, frequency=FREQUENCY) for keys in KEYS),
    ]
    seeds = [aiotime.run(study(ways, data, seed=seed, epochs=epochs)) for seed in range(_seeds(arguments))]
    means = [[fmean(each) for each in zip(*(curves[at].accuracy for curves in seeds), strict=True)] for at in range(5)]
    needed = [passes(mean, TARGET) for mean in means]
    rows: list[list[str | float]] = [
        [
            way.name,
            needed[at],
            100 * means[at][-1],
            100 * max(abs(one - two) for one, two in zip(means[at], means[1], strict=True)),
            median(speed for curves in seeds for speed in curves[at].speeds if speed is not None),
            _times(seeds, at, 0),
            _times(seeds, at, 1),
            median(curves[at].delay for curves in seeds),
        ]
        for at, way in enumerate(ways)
    ]
    report.table(
        f"Epochs until {100 * TARGET:g} % of the validation set are right (mean curve of the seeds)",
        ["way", "epochs", "% at the end", "points off", "instances/s", "× plain", "× one in flight", "delay"],
        rows,
    )
    report.say("", "Points off: the most that the curve differs from that of one in flight.")
    for keys, own in zip(KEYS[1:], needed[2:], strict=True):
        report.target(f"{keys} in flight: epochs, times those of 1", own / needed[1], SAME, unit=" ×", at_most=True)
    worst = min(max(mean) for mean in means)
    report.target("validation accuracy, the worst way", 100 * worst, 100 * TARGET, unit=" %")
    path = report.figure_path()
    if path is not None:
        picture.curves(path, seeds[0], target=TARGET, title="perceptron")


def _times(seeds: Sequence[Sequence[Curve]], at: int, other: int) -> float:
    ratios = [
        one / two
        for curves in seeds
        for one, two in zip(curves[at].speeds, curves[other].speeds, strict=True)
        if one is not None and two is not None
    ]
    return median(ratios)

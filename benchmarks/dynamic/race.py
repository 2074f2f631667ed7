"""Race: plain PyTorch and networks learn the same instances in turns, until each is as good as was asked.

    for each seed, for each leg:   plain learns n instances │ network learns the same n │ …     (timed)
                                   every contender's averaged weights meet the validation set   (not timed)

What is compared within a leg was measured within seconds of each other. A contender that is there stops.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch

from aiotime.dynamic import Network
from aiotime.frame import Sample
from benchmarks._harness import progress

AVERAGE_EVERY = 100  # instances
AVERAGE_OVER = 4_000  # instances, the time constant of the running mean of the weights
VALIDATED_AT_ONCE = 256  # instances

Forward = Callable[[Any, Any], torch.Tensor]  # (network, input) -> output, in plain PyTorch
LossOf = Callable[[torch.Tensor, Any], torch.Tensor]


class Problem(Protocol):
    """What is learned, by whom."""

    name: str
    target: float  # accuracy on the validation set
    validation: Sequence[Sample]
    loss: LossOf

    def network(self, *, seed: int, max_batch: int, replicas: int = 1) -> Network:
        """With first weights that depend on the seed alone; ``forward((input, None))`` is its output,
        ``forward((input, target))`` its loss.
        """

    def plain(self, network: Network, given: Any) -> torch.Tensor:
        """The network's forward as a synchronous function of its modules."""

    def samples(self, number: int, *, seed: int) -> list[Sample]:
        """Fresh instances."""

    def right(self, output: torch.Tensor, target: Any) -> bool:
        """Is it the answer?"""


@dataclass(frozen=True)
class Way:
    """How a contender learns."""

    name: str
    rate: float  # of Adam
    keys: int = 0  # instances in flight; 0: plain PyTorch, no network
    frequency: int = 1  # min_update_frequency
    per: str = "gradient"
    max_batch: int = 1
    replicas: int = 1
    share: float = 1.0  # of each leg; less: only its speed is of interest


@dataclass
class Curve:
    """What a contender has shown so far."""

    way: Way
    instances: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of learning
    accuracy: list[float] = field(default_factory=list)
    speeds: list[float | None] = field(default_factory=list)  # instances per second, per leg; None: it had arrived
    delay: float = 0.0  # updates that a gradient was late by, mean over the stage with the latest
    batch: float = 1.0  # calls per batch, of the stage with most calls
    arrived: int | None = None  # instances until the target


class Mean:
    """A running mean of weights (Polyak and Juditsky 1992), the same for every contender."""

    def __init__(self) -> None:
        self._mean: dict[str, torch.Tensor] = {}
        self._times = 0

    def add(self, state: dict[str, torch.Tensor]) -> None:
        """One more state of the weights; they are copied."""
        self._times += 1
        if not self._mean:
            self._mean = {key: value.clone() for key, value in state.items()}
            return
        share = max(1 / self._times, AVERAGE_EVERY / AVERAGE_OVER)
        torch._foreach_lerp_(list(self._mean.values()), [state[key] for key in self._mean], share)

    def state(self) -> dict[str, torch.Tensor]:
        """The mean."""
        return self._mean


class Plain:
    """A hand-written loop over the instances: no event loop, no batches, one update for each."""

    def __init__(self, problem: Problem, way: Way, *, seed: int) -> None:
        self.problem, self.way, self.mean = problem, way, Mean()
        self.network = problem.network(seed=seed, max_batch=1)
        modules = {name: stage.fn for name, stage in self.network.stages.items()}
        self._named = {f"{name}.{key}": p for name, m in modules.items() for key, p in m.named_parameters()}
        self._optimizer = torch.optim.Adam(list(self._named.values()), lr=way.rate, fused=True)

    async def learn(self, samples: Sequence[Sample]) -> None:
        """One after the other."""
        network, forward, loss_of, optimizer = self.network, self.problem.plain, self.problem.loss, self._optimizer
        for number, sample in enumerate(samples, start=1):
            loss = loss_of(forward(network, sample.input), sample.target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if number % AVERAGE_EVERY == 0:
                self.mean.add({key: p.detach() for key, p in self._named.items()})

    def look(self, curve: Curve) -> None:
        """Nothing is late, nothing is batched."""

    async def aclose(self) -> None:
        """Nothing is open."""


class Learner:
    """A network with instances in flight."""

    def __init__(self, problem: Problem, way: Way, *, seed: int) -> None:
        self.problem, self.way, self.mean = problem, way, Mean()
        self.network = problem.network(seed=seed, max_batch=way.max_batch, replicas=way.replicas)
        self._optimizer = partial(torch.optim.Adam, lr=way.rate, fused=True)
        self._opened = False

    async def learn(self, samples: Sequence[Sample]) -> None:
        """Many at once; the end of it waits for the last."""
        if not self._opened:
            self._opened = True
            await self.network.__aenter__()
        way, number = self.way, 0
        run = self.network.learn(
            [Sample((sample.input, sample.target)) for sample in samples],
            optimizer=self._optimizer,
            max_active_keys=way.keys,
            min_update_frequency=way.frequency,
            update_per=way.per,  # type: ignore[arg-type]
            ordered=False,
        )
        async with run:
            async for _ in run:
                number += 1
                if number % AVERAGE_EVERY == 0:
                    self.mean.add(self.network.state_dict())

    def look(self, curve: Curve) -> None:
        """What its stages say."""
        stages = self.network.stats().stages
        curve.delay = max(stage.delay_mean for stage in stages)
        curve.batch = max(stages, key=lambda stage: stage.calls).batch_mean

    async def aclose(self) -> None:
        """End its threads."""
        await self.network.aclose()


class Judge:
    """The validation set, for whoever's weights."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._network = problem.network(seed=0, max_batch=VALIDATED_AT_ONCE)

    async def accuracy(self, weights: dict[str, torch.Tensor], samples: Sequence[Sample] | None = None) -> float:
        """The share of right answers."""
        problem, network = self._problem, self._network
        samples = problem.validation if samples is None else samples
        async with network:
            await network.load_state_dict(weights)
            run = network.run([(sample.input, None) for sample in samples], max_active_keys=VALIDATED_AT_ONCE)
            outputs = [step.output async for step in run]
        answers = zip(outputs, samples, strict=True)
        return sum(problem.right(output, sample.target) for output, sample in answers) / len(samples)


@dataclass
class Result:
    """Of one seed."""

    seed: int
    curves: list[Curve]
    weights: list[dict[str, torch.Tensor]]  # the averaged ones, at the end


async def race(problem: Problem, ways: Sequence[Way], *, seed: int, leg: int, legs: int) -> Result:
    """All ways, from the same first weights, on the same fresh instances.

    Args:
        problem: what is learned.
        ways: how.
        seed: of weights and instances.
        leg: instances between two looks at the validation set.
        legs: at most.
    """
    judge = Judge(problem)
    contenders = [(Learner if way.keys else Plain)(problem, way, seed=seed) for way in ways]
    curves = [Curve(way) for way in ways]
    for number in range(legs):
        samples = problem.samples(leg, seed=1_000 * (seed + 1) + number)
        order = list(zip(contenders, curves, strict=True))
        for contender, curve in order if number % 2 == 0 else reversed(order):
            if curve.arrived is not None:
                curve.speeds.append(None)
                continue
            progress(f"{problem.name}, seed {seed}, {number * leg:,} instances: {curve.way.name}")
            await _leg(contender, curve, samples[: max(1, round(len(samples) * curve.way.share))], judge)
        if all(curve.arrived is not None or curve.way.share < 1 for curve in curves):
            break
    for contender in contenders:
        await contender.aclose()
    progress("")
    return Result(seed, curves, [contender.mean.state() for contender in contenders])


async def _leg(contender: Plain | Learner, curve: Curve, samples: Sequence[Sample], judge: Judge) -> None:
    gc.collect()
    begun = time.perf_counter()
    await contender.learn(samples)
    seconds = time.perf_counter() - begun
    curve.instances.append((curve.instances[-1] if curve.instances else 0) + len(samples))
    curve.seconds.append((curve.seconds[-1] if curve.seconds else 0.0) + seconds)
    curve.speeds.append(len(samples) / seconds)
    contender.look(curve)
    if curve.way.share < 1:
        return
    curve.accuracy.append(await judge.accuracy(contender.mean.state()))
    if curve.accuracy[-1] >= contender.problem.target:
        curve.arrived = curve.instances[-1]


def speed(results: Sequence[Result], at: int) -> float:
    """Instances per second, the median over all legs of all seeds."""
    return median(each for result in results for each in result.curves[at].speeds if each is not None)


def times(results: Sequence[Result], at: int, other: int) -> float:
    """How many times as fast as ``other``: the median of the ratios within each leg."""
    ratios = []
    for result in results:
        for one, two in zip(result.curves[at].speeds, result.curves[other].speeds, strict=False):
            if one is not None and two is not None:
                ratios.append(one / two)
    return median(ratios)

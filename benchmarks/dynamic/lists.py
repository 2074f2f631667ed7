"""List reduction: a recurrent cell, an operation for each list, replicas; what do instances in flight gain and cost?

A list is an operation and 1 to 10 digits (Gaunt et al., AMPNet, 2017): their mean, the mean of even positions minus
that of odd positions, maximum minus minimum, or how many there are; rounded (halves up), modulo 10. Two coroutines read
its even and its odd positions with the same cell; then the head answers for every beginning of the list, and all of
these answers are learned from. What counts in validation is the answer for the whole list.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from aiotime.dynamic import Network, Stage
from aiotime.frame import Sample
from benchmarks._harness import Report
from benchmarks.dynamic import contest
from benchmarks.dynamic.race import Way

OPERATIONS = ("mean", "even minus odd", "maximum minus minimum", "length")
LONGEST = 10  # digits
WIDTH = 128


def answer(operation: int, digits: Sequence[int]) -> int:
    """What a list reduces to: 0..9."""
    if operation == 0:
        value = _mean(digits)
    elif operation == 1:
        value = _mean(digits[0::2]) - _mean(digits[1::2])
    elif operation == 2:
        value = max(digits) - min(digits)
    else:
        value = len(digits)
    return math.floor(value + 0.5) % 10


def _mean(digits: Sequence[int]) -> float:
    return sum(digits) / len(digits) if digits else 0.0


def one_list(rng: random.Random) -> tuple[int, list[int]]:
    """(operation, digits)."""
    length = rng.randint(1, LONGEST)
    return rng.randrange(len(OPERATIONS)), [rng.randrange(10) for _ in range(length)]


def as_sample(operation: int, digits: Sequence[int]) -> Sample:
    """Input: (operation, digits), tensors without dimensions. Target: the answers for all beginnings, (length,)."""
    answers = [answer(operation, digits[:length]) for length in range(1, len(digits) + 1)]
    return Sample((torch.tensor(operation), torch.tensor(digits).unbind(0)), torch.tensor(answers))


class Cell(nn.Module):
    """A GRU over digits that are told the operation with each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.operation, self.digit = nn.Embedding(len(OPERATIONS), 16), nn.Embedding(10, 16)
        self.gru = nn.GRUCell(32, width)
        with torch.no_grad():
            self.digit.weight.mul_(0.1)
            self.digit.weight[:, 0] = torch.linspace(-1, 1, 10)  # a digit is also a number

    def forward(self, operation: torch.Tensor, digit: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """(n,), (n,), (n, width) -> (n, width)."""
        new: torch.Tensor = self.gru(torch.cat([self.operation(operation), self.digit(digit)], -1), h)
        return new


class Head(nn.Module):
    """The answer, from what was read of the even and of the odd positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.operation = nn.Embedding(len(OPERATIONS), 16)
        self.layers = nn.Sequential(nn.Linear(16 + 2 * width, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(
        self, operation: torch.Tensor, even: torch.Tensor, odd: torch.Tensor, answers: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(n,), (n, width), (n, width) -> logits (n, 10); with answers (n,) -> losses (n,)."""
        logits: torch.Tensor = self.layers(torch.cat([self.operation(operation), even, odd], -1))
        return logits if answers is None else functional.cross_entropy(logits, answers, reduction="none")


class ListNet(Network):
    """Lists of any length."""

    def __init__(self, *, seed: int, max_batch: int, replicas: int = 1, devices: Any = "inline") -> None:
        torch.manual_seed(seed)
        self.start = torch.zeros(WIDTH)
        cell, head = Cell(WIDTH), Head(WIDTH)
        self.cell = Stage(cell, device=devices, max_batch=max_batch, replicas=replicas)
        self.head = Stage(head, device="inline", max_batch=max_batch, group="cat")

    async def read(self, operation: torch.Tensor, digits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The cell's states, the first one included."""
        states = [self.start]
        for digit in digits:
            states.append(await self.cell(operation, digit, states[-1]))
        return states

    async def forward(self, given: tuple[Any, torch.Tensor | None]) -> torch.Tensor:
        """Logits (length, 10), of every beginning; with the answers (length,): the loss."""
        (operation, digits), answers = given
        even, odd = await asyncio.gather(self.read(operation, digits[0::2]), self.read(operation, digits[1::2]))
        lengths = range(1, len(digits) + 1)
        rows = (
            operation.expand(len(digits)),
            torch.stack([even[(length + 1) // 2] for length in lengths]),
            torch.stack([odd[length // 2] for length in lengths]),
        )
        if answers is None:
            logits: torch.Tensor = await self.head(*rows)
            return logits
        losses: torch.Tensor = await self.head(*rows, answers)  # a batch of many instances' losses
        return losses.sum() / LONGEST


def plain(network: Any, given: Any) -> torch.Tensor:
    """The same in plain PyTorch."""
    operation, digits = given
    cell, operations = network.cell.fn, operation.view(1)
    read = []
    for half in (digits[0::2], digits[1::2]):
        h = network.start.view(1, -1)
        states = [h]
        for digit in half:
            h = cell(operations, digit.view(1), h)
            states.append(h)
        read.append(states)
    even, odd = read
    lengths = range(1, len(digits) + 1)
    logits: torch.Tensor = network.head.fn(
        operations.expand(len(digits)),
        torch.cat([even[(length + 1) // 2] for length in lengths]),
        torch.cat([odd[length // 2] for length in lengths]),
    )
    return logits


@dataclass
class Lists:
    """The problem."""

    validation: Sequence[Sample]
    name: str = "lists"
    target: float = 0.97

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of all beginnings alike; a longer list counts for more."""
        return functional.cross_entropy(output, target, reduction="sum") / LONGEST

    def network(self, *, seed: int, max_batch: int, replicas: int = 1) -> ListNet:
        """A `ListNet`; replicas share two CPU workers."""
        devices = "inline" if replicas == 1 else [f"cpu:{number % 2}" for number in range(replicas)]
        return ListNet(seed=seed, max_batch=max_batch, replicas=replicas, devices=devices)

    def plain(self, network: Any, given: Any) -> torch.Tensor:
        """See `plain`."""
        return plain(network, given)

    def samples(self, number: int, *, seed: int) -> list[Sample]:
        """Fresh lists."""
        rng = random.Random(seed)
        return [as_sample(*one_list(rng)) for _ in range(number)]

    def right(self, output: torch.Tensor, target: torch.Tensor) -> bool:
        """Of the whole list."""
        return int(output[-1].argmax()) == int(target[-1])


RATES = {contest.PLAIN: (5e-4, 1e-3, 2e-3), contest.NETWORK: (1.5e-3, 3e-3, 6e-3)}
WAYS = (
    Way(contest.PLAIN, rate=1e-3),
    Way(contest.NETWORK, rate=3e-3, keys=32, frequency=8, per="instance", max_batch=64),
)
ONE = Way(contest.ONE, rate=1e-3, keys=1, per="instance", max_batch=64, share=0.1)


def sizes(arguments: argparse.Namespace) -> contest.Sizes:
    """What is run."""
    if arguments.quick:
        return contest.Sizes(leg=100, legs=2, validation=50, seeds=1)
    return contest.Sizes(leg=2_500, legs=40, validation=2_000, seeds=arguments.rounds or 2, first=arguments.seed)


def setup(arguments: argparse.Namespace) -> str:
    """In words."""
    size = sizes(arguments)
    return (
        f"A GRU of {WIDTH}, fresh lists (no training set), {size.seeds} seeds from {size.first}, "
        f"{size.validation:,} to validate on every {size.leg:,}, "
        "with a running mean of the weights; Adam, fused, one thread. The network: inline stages, "
        f"{WAYS[1].keys} instances in flight, an update of each stage per {WAYS[1].frequency} of them; replicas on two "
        "CPU workers, in the first seed only."
    )


def main(arguments: argparse.Namespace, report: Report) -> None:
    """Plain PyTorch, the network, one instance at a time, 2 and 4 replicas."""
    size = sizes(arguments)
    problem = Lists(validation=[])
    problem.validation = problem.samples(size.validation, seed=0)
    ways = contest.tuned(report, problem, WAYS, RATES, size) if arguments.tune else list(WAYS)
    network = ways[1]
    replicas = [replace(network, name=f"{contest.NETWORK}, {number} replicas", replicas=number) for number in (2, 4)]
    contest.told(report, problem, contest.held(problem, [*ways, ONE], replicas, size))

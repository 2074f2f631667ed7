"""Trees: a network that follows the expression it is given; what do instances in flight gain and cost?

An expression is a digit from 0 to 5, or an operation on two expressions: maximum, minimum, distance |a - b|, or mean
(halves up), so that every value is a digit again. The network embeds the leaves and joins from the bottom to the top,
the two branches of a node at the same time; the head names the value of every node with children, and all of these
answers are learned from, as in the sentiment treebank. What counts in validation is the root. Training and validation
have trees of depth 2 to 5; deeper ones are tried afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.dynamic import Network, Stage
from aiotime.frame import Sample
from benchmarks._harness import Report
from benchmarks.dynamic import contest
from benchmarks.dynamic.race import Judge, Way

OPERATIONS = ("maximum", "minimum", "distance", "mean")
VALUES = 6
DEPTHS = (2, 3, 4, 5)  # in training
NODES = 10  # that the loss is divided by
WIDTH = 192


class Node(NamedTuple):
    """A leaf has a digit; other nodes have an operation and two children."""

    token: torch.Tensor  # of a digit or operation, without dimensions
    children: tuple[Node, Node] | None = None
    number: int = -1  # among the nodes with children, those below first


def expression(rng: random.Random, depth: int) -> Any:
    """A digit, or (operation, left, right); one of its leaves at least is as deep as ``depth``."""
    if depth == 0:
        return rng.randrange(VALUES)
    deep, other = expression(rng, depth - 1), expression(rng, rng.randrange(depth))
    left, right = (deep, other) if rng.random() < 0.5 else (other, deep)
    return rng.choice(OPERATIONS), left, right


def value(tree: Any) -> int:
    """What it comes to: 0..5."""
    if isinstance(tree, int):
        return tree
    operation, left, right = tree[0], value(tree[1]), value(tree[2])
    if operation == "maximum":
        return max(left, right)
    if operation == "minimum":
        return min(left, right)
    if operation == "distance":
        return abs(left - right)
    return (left + right + 1) // 2


def as_node(tree: Any, values: list[int]) -> Node:
    """With tensors, for the network; the values of its nodes with children are added to ``values``, its own last."""
    if isinstance(tree, int):
        return Node(torch.tensor(tree))
    children = as_node(tree[1], values), as_node(tree[2], values)
    values.append(value(tree))
    return Node(torch.tensor(OPERATIONS.index(tree[0])), children, len(values) - 1)


def as_sample(tree: Any) -> Sample:
    """Input: the root. Target: the values of all nodes with children, (nodes,); that of the root is the last."""
    values: list[int] = []
    root = as_node(tree, values)
    return Sample(root, torch.tensor(values))


class Join(nn.Module):
    """A binary Tree-LSTM's cell (Tai, Socher and Manning 2015, equations 9 to 14), told the operation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.operation = nn.Embedding(len(OPERATIONS), width)
        self.gates = nn.Linear(3 * width, 5 * width)

    def forward(self, operation: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(n,), (n, 2 width), (n, 2 width) -> (n, 2 width): h beside c."""
        h_left, c_left = left.chunk(2, -1)
        h_right, c_right = right.chunk(2, -1)
        gates = self.gates(torch.cat([self.operation(operation), h_left, h_right], -1))
        enter, keep_left, keep_right, show, new = gates.chunk(5, -1)
        c = torch.sigmoid(keep_left) * c_left + torch.sigmoid(keep_right) * c_right + enter.sigmoid() * new.tanh()
        return torch.cat([torch.sigmoid(show) * torch.tanh(c), c], -1)


class Head(nn.Module):
    """The values of nodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.out = nn.Linear(width, VALUES)

    def forward(self, state: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        """(n, 2 width) -> logits (n, 6); with values (n,) -> losses (n,)."""
        logits: torch.Tensor = self.out(state[..., : self.width])
        return logits if values is None else functional.cross_entropy(logits, values, reduction="none")


class TreeNet(Network):
    """Trees of any shape."""

    def __init__(self, *, seed: int, max_batch: int) -> None:
        torch.manual_seed(seed)
        leaf, join, head = nn.Embedding(VALUES, 2 * WIDTH), Join(WIDTH), Head(WIDTH)
        with torch.no_grad():
            leaf.weight.mul_(0.1)
            leaf.weight[:, :8] = torch.linspace(-1, 1, VALUES)[:, None]  # a digit is also a number
        self.leaf = Stage(leaf, device="inline", max_batch=max_batch)
        self.join = Stage(join, device="inline", max_batch=max_batch)
        self.head = Stage(head, device="inline", max_batch=max_batch, group="cat")

    def node(self, node: Node, states: dict[int, torch.Tensor]) -> Awaitable[torch.Tensor]:
        """What stands for a subtree: (2 width,)."""
        return self.leaf(node.token) if node.children is None else self.joined(node, *node.children, states)

    async def joined(self, node: Node, left: Node, right: Node, states: dict[int, torch.Tensor]) -> torch.Tensor:
        """Both branches at the same time, then the node itself."""
        both = self.node(left, states), self.node(right, states)
        if left.children is None or right.children is None:  # a leaf is under way once called: no task is needed
            branches = [await both[0], await both[1]]
        else:
            branches = await asyncio.gather(*both)
        state: torch.Tensor = await self.join(node.token, *branches)
        states[node.number] = state
        return state

    async def forward(self, given: tuple[Node, torch.Tensor | None]) -> torch.Tensor:
        """Logits (nodes, 6), those of the root are the last; with the values (nodes,): the loss."""
        tree, values = given
        states: dict[int, torch.Tensor] = {}
        await self.node(tree, states)
        rows = torch.stack([states[number] for number in range(len(states))])
        if values is None:
            logits: torch.Tensor = await self.head(rows)
            return logits
        losses: torch.Tensor = await self.head(rows, values)  # a batch of many instances' losses
        return losses.sum() / NODES


def plain(network: Any, tree: Node) -> torch.Tensor:
    """The same in plain PyTorch: logits (nodes, 6)."""
    leaf, join = network.leaf.fn, network.join.fn
    states: list[torch.Tensor] = []

    def state(node: Node) -> torch.Tensor:
        found: torch.Tensor
        if node.children is None:
            found = leaf(node.token.view(1))
        else:
            found = join(node.token.view(1), state(node.children[0]), state(node.children[1]))
            states.append(found)
        return found

    state(tree)
    logits: torch.Tensor = network.head.fn(torch.cat(states))
    return logits


@dataclass
class Trees:
    """The problem."""

    validation: Sequence[Sample]
    name: str = "trees"
    target: float = 0.97

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of all nodes alike; a larger tree counts for more."""
        return functional.cross_entropy(output, target, reduction="sum") / NODES

    def network(self, *, seed: int, max_batch: int, replicas: int = 1) -> TreeNet:
        """A `TreeNet`."""
        return TreeNet(seed=seed, max_batch=max_batch)

    def plain(self, network: Any, given: Any) -> torch.Tensor:
        """See `plain`."""
        return plain(network, given)

    def samples(self, number: int, *, seed: int, depths: Sequence[int] = DEPTHS) -> list[Sample]:
        """Fresh expressions."""
        rng = random.Random(seed)
        trees = [expression(rng, rng.choice(depths)) for _ in range(number)]
        return [as_sample(tree) for tree in trees]

    def right(self, output: torch.Tensor, target: torch.Tensor) -> bool:
        """Of the root."""
        return int(output[-1].argmax()) == int(target[-1])


RATES = {contest.PLAIN: (5e-4, 1e-3, 2e-3), contest.NETWORK: (3e-3, 6e-3, 1e-2)}
WAYS = (
    Way(contest.PLAIN, rate=1e-3),
    Way(contest.NETWORK, rate=6e-3, keys=40, frequency=16, per="instance", max_batch=64),
)
ONE = Way(contest.ONE, rate=1e-3, keys=1, per="instance", max_batch=64, share=0.1)
DEEPER = (6, 7, 8)


def sizes(arguments: argparse.Namespace) -> contest.Sizes:
    """What is run."""
    if arguments.quick:
        return contest.Sizes(leg=100, legs=2, validation=50, seeds=1)
    return contest.Sizes(leg=1_000, legs=30, validation=1_000, seeds=arguments.rounds or 3, first=arguments.seed)


def setup(arguments: argparse.Namespace) -> str:
    """In words."""
    size = sizes(arguments)
    return (
        f"A Tree-LSTM of {WIDTH}, fresh expressions (no training set), {size.seeds} seeds from {size.first}, "
        f"{size.validation:,} to validate on every {size.leg:,}, "
        "with a running mean of the weights; Adam, fused, one thread. The network: "
        f"inline stages, {WAYS[1].keys} instances in flight, an update of each stage per {WAYS[1].frequency} of them."
    )


def main(arguments: argparse.Namespace, report: Report) -> None:
    """Plain PyTorch, the network, one instance at a time; then deeper trees."""
    size = sizes(arguments)
    problem = Trees(validation=[])
    problem.validation = problem.samples(size.validation, seed=0)
    ways = contest.tuned(report, problem, WAYS, RATES, size) if arguments.tune else list(WAYS)
    results = contest.held(problem, [*ways, ONE], [], size)
    contest.told(report, problem, results)
    rows: list[list[str | float]] = []
    for depth in (*DEPTHS, *DEEPER):
        samples = problem.samples(len(problem.validation), seed=depth, depths=[depth])
        of_way = [
            median(aiotime.run(Judge(problem).accuracy(result.weights[at], samples)) for result in results)
            for at in range(len(ways))
        ]
        rows.append([f"{depth}{' (unseen)' if depth in DEEPER else ''}", *(100 * accuracy for accuracy in of_way)])
    report.table("Accuracy (%) by depth, at the end", ["depth", *(way.name for way in ways)], rows)

"""A network that follows each tree it is given: a branch is `if`, a tree is recursion, a join is `asyncio.gather`.

Expressions like ((1 and 0) or 1) are learned from their values alone. Every expression is a coroutine of its own; many
are under way at once, and what waits for the same stage runs as one batch. Backward messages retrace each instance's
own tree, and each stage updates by itself. Prints the stages' table and how many of 200 fresh expressions are named
rightly.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import aiotime
from aiotime.dynamic import Network, Stage

WIDTH, LEARNED, TRIED = 32, 2_000, 200
OPERATIONS = (lambda a, b: a and b, lambda a, b: a or b, lambda a, b: a != b)


class Tree(NamedTuple):
    """A leaf, whose token is its value, or an operation on two trees."""

    token: Tensor
    value: bool
    branches: tuple[Tree, Tree] | None = None


def tree(rng: random.Random, depth: int) -> Tree:
    """At most so deep."""
    if depth == 0 or rng.random() < 0.2:
        value = rng.random() < 0.5
        return Tree(torch.tensor(int(value)), value)
    left, right, which = tree(rng, depth - 1), tree(rng, depth - 1), rng.randrange(3)
    return Tree(torch.tensor(which), OPERATIONS[which](left.value, right.value), (left, right))


class Join(nn.Module):
    """Two branches become one, by the operation: (n,), (n, width), (n, width) -> (n, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.operation = nn.Embedding(3, WIDTH)
        self.layers = nn.Sequential(nn.Linear(3 * WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, which: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """One row per node."""
        joined: Tensor = self.norm(self.layers(torch.cat([self.operation(which), left, right], -1)))
        return joined


class TreeNet(Network):
    """Leaves, joins, and what stands at the root."""

    def __init__(self) -> None:
        self.leaf = Stage(nn.Embedding(2, WIDTH), device="inline", max_batch=64)
        self.join = Stage(Join(), device="inline", max_batch=64)
        self.head = Stage(nn.Linear(WIDTH, 2), device="inline", max_batch=64)

    async def node(self, tree: Tree) -> Tensor:
        """What stands for a tree: (width,)."""
        state: Tensor
        if tree.branches is None:
            state = await self.leaf(tree.token)
        else:
            left, right = await asyncio.gather(*map(self.node, tree.branches))
            state = await self.join(tree.token, left, right)
        return state

    async def forward(self, tree: Tree) -> Tensor:
        """Logits of false and true: (2,)."""
        logits: Tensor = await self.head(await self.node(tree))
        return logits


async def main() -> int:
    """How many of 200 fresh expressions are named rightly."""
    torch.manual_seed(0)
    rng = random.Random(0)
    learned = [tree(rng, rng.randint(1, 3)) for _ in range(LEARNED)]
    tried = [tree(rng, 3) for _ in range(TRIED)]
    network = TreeNet()
    async with network:
        samples = [aiotime.Sample(each, torch.tensor(int(each.value))) for each in learned]
        optimizer = partial(torch.optim.Adam, lr=5e-3)
        run = network.learn(samples, loss=cross_entropy, optimizer=optimizer, max_active_keys=16)
        losses = [step.loss or 0.0 async for step in run]
        print(f"loss of the first 100: {sum(losses[:100]) / 100:.3f}, of the last: {sum(losses[-100:]) / 100:.3f}")
        named = [int(step.output.argmax()) async for step in network.run(tried)]
        print(network.stats())
    right = sum(bool(name) == each.value for name, each in zip(named, tried, strict=True))
    print(f"expressions named rightly: {right} of {TRIED}")
    return right


if __name__ == "__main__":
    torch.set_num_threads(1)
    aiotime.run(main())

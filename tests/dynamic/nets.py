"""Networks that the tests share, each with the same computation written in plain PyTorch."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from aiotime.dynamic import Network, Stage
from aiotime.frame import Sample


class Join(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, width)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.both(torch.cat([left, right], -1)))
        return torch.tanh(self.out(hidden)) + hidden


class Cell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        new: torch.Tensor = self.cell(x, h)
        return new


class TreeNet(Network):
    """Trees of tokens; a stage used twice on the way, tensor code between the calls, a result that nobody uses."""

    def __init__(self, *, width: int = 8, device: Any = "inline", max_batch: int = 1, **options: Any) -> None:
        torch.manual_seed(0)
        options = {"device": device, "max_batch": max_batch, **options}
        self.leaf = Stage(nn.Embedding(20, width), **options)
        self.join = Stage(Join(width), **options)
        self.gate = Stage(nn.Sequential(nn.Linear(width, 1), nn.Sigmoid()), **options)
        self.head = Stage(nn.Linear(width, 3), **options)

    async def node(self, tree: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if isinstance(tree, int):
            leaf = await self.leaf(torch.tensor(tree))
            return leaf, [leaf]
        (left, some), (right, more) = await asyncio.gather(self.node(tree[0]), self.node(tree[1]))
        h = await self.join(left, right)
        g = await self.gate(h)
        h = g * h + (1 - g) * (left + right) / 2
        h = h / (1e-6 + h.norm())
        return h, some + more + [h]

    async def forward(self, sample: Any) -> torch.Tensor:
        tree, label = sample
        h, every = await self.node(tree)
        if label == 2:
            await self.gate(h)
        first, second = await asyncio.gather(self.head(h), self.head(torch.stack(every).mean(0)))
        y = torch.tensor(label)
        loss: torch.Tensor = functional.cross_entropy(first, y) + 0.3 * functional.cross_entropy(second, y)
        return loss + 0.01 * sum((each**2).sum() for each in every[:2])


class RnnNet(Network):
    """Sequences of any length; skips through time, a maximum over all states."""

    def __init__(self, *, width: int = 8, device: Any = "inline", max_batch: int = 1, **options: Any) -> None:
        torch.manual_seed(0)
        options = {"device": device, "max_batch": max_batch, **options}
        self.width = width
        self.emb = Stage(nn.Embedding(14, width), **options)
        self.cell = Stage(Cell(width), **options)
        self.head = Stage(nn.Linear(width, 10), **options)

    async def forward(self, sequence: Any) -> torch.Tensor:
        h = torch.zeros(self.width)
        states: list[torch.Tensor] = []
        for token in sequence:
            h = await self.cell(await self.emb(torch.tensor(token)), h)
            states.append(h)
            if len(states) > 2:
                h = h + 0.1 * states[-3]
        out: torch.Tensor = await self.head(torch.stack(states).max(0).values + h)
        return out


def random_tree(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.25:
        return rng.randrange(20)
    return (random_tree(rng, depth - 1), random_tree(rng, depth - 1))


def trees(number: int, *, depth: int = 3, seed: int = 0) -> list[Any]:
    rng = random.Random(seed)
    return [(random_tree(rng, depth), rng.randrange(3)) for _ in range(number)]


def sequences(number: int, *, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [
        Sample([rng.randrange(14) for _ in range(rng.randrange(1, 9))], torch.tensor(rng.randrange(10)))
        for _ in range(number)
    ]

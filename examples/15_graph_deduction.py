"""Deduction over graphs: wolves are afraid of cats, Gertrude is a wolf; what is Gertrude afraid of? (bAbI task 15)

A story is a graph: a node per name and per species, an edge per statement. Nodes have no names, only the one that is
asked about is marked, so there is nothing to learn by heart. A gated graph network (Li et al. 2016) passes messages
along the edges, as often as the story needs: the loop is a `for`. Stories of any size share a batch (group="cat").
Every story is told once, 16 of them in flight; prints for how many of 500 new ones the answer is right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

import aiotime
from aiotime.dynamic import Network, Stage

WIDTH, SPECIES = 16, 4
IS, FEARS = 0, 1  # kinds of edges; against their direction: 2 more


def stories(seed: int) -> Iterator[aiotime.Sample]:
    """(marks [nodes, 1], messages come from [nodes, nodes · 4], steps), and the answer's node."""
    rng = random.Random(seed)
    while True:
        nodes = SPECIES + rng.randint(1, 8)
        node = rng.sample(range(nodes), nodes)  # numbered at random: first the species, then the names
        others = [rng.choice([other for other in range(SPECIES) if other != one]) for one in range(SPECIES)]
        edges = [(node[one], FEARS, node[other]) for one, other in enumerate(others)]
        edges += [(node[name], IS, node[rng.randrange(SPECIES)]) for name in range(SPECIES, nodes)]
        sources = torch.zeros(nodes, nodes, 4)
        for one, kind, other in edges:
            sources[other, one, kind] = sources[one, other, kind + 2] = 1
        asked, _, species = edges[-1]
        answer = next(other for one, kind, other in edges if (one, kind) == (species, FEARS))
        marks = torch.zeros(nodes, 1)
        marks[asked] = 1
        yield aiotime.Sample((marks, sources.flatten(1), reach(edges, asked)), torch.tensor(answer))


def reach(edges: list[tuple[int, int, int]], start: int) -> int:
    """Steps until the news from ``start`` is everywhere that edges lead to, in either direction."""
    heard, before, steps = {start}, 0, -1
    while len(heard) > before:
        before, steps = len(heard), steps + 1
        heard |= {b for one, _, other in edges for a, b in ((one, other), (other, one)) if a in heard}
    return steps


class Read(nn.Module):
    """A score per node."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH + 1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1, bias=False))

    def forward(self, h: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """[nodes, width] and [nodes, 1] to [nodes, 1]."""
        scores: torch.Tensor = self.layers(torch.cat([h, marks], 1))
        return scores


class Deduction(Network):
    """Scores of a story's nodes."""

    def __init__(self) -> None:
        self.send = Stage(nn.Linear(WIDTH, 4 * WIDTH), device="inline", max_batch=64, group="cat")  # a map per kind
        self.update = Stage(nn.GRUCell(WIDTH, WIDTH), device="inline", max_batch=64, group="cat")
        self.read = Stage(Read(), device="inline", max_batch=64, group="cat")

    async def forward(self, story: tuple[torch.Tensor, torch.Tensor, int]) -> torch.Tensor:
        """[nodes]."""
        marks, sources, steps = story
        h = pad(marks, (0, WIDTH - 1))
        for _ in range(steps):
            messages = await self.send(h)
            h = await self.update(sources @ messages.view(-1, WIDTH), h)
        scores: torch.Tensor = await self.read(h, marks)
        return scores.squeeze(1)


async def main(told: int = 1000, asked: int = 500) -> int:
    """How many of ``asked`` new stories it understands."""
    torch.manual_seed(0)
    network, adam, source = Deduction(), partial(torch.optim.Adam, lr=1e-2), stories(1)
    telling = [next(source) for _ in range(told)]
    async with network:
        async for step in network.learn(telling, loss=cross_entropy, optimizer=adam, update_per="instance"):
            if step.index % 200 == 0:
                print(f"story {step.index}: {len(step.output)} nodes, {step.calls} calls, loss {step.loss:.3f}")
        right = 0
        new = stories(2)
        async for step in network.run([next(new) for _ in range(asked)]):
            right += int(step.output.argmax() == step.target)
        print(network.stats())
    print(f"new stories understood: {right} of {asked}")
    return right


if __name__ == "__main__":
    aiotime.run(main())

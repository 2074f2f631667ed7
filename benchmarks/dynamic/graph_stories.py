"""Stories of basic deduction, made afresh: bAbI task 15 (Weston et al. 2015, arXiv:1502.05698) as graphs.

Mice are afraid of cats.  Gertrude is a mouse.  …  What is Gertrude afraid of?  ── cat

    Gertrude ──is──▶ mouse ──has_fear──▶ cat          a node per entity, an edge per statement

Every species is afraid of another one, every entity is of some species, and the statements come in any order. Nodes are
numbered at random in every story and have no names: what is asked about is marked, nothing else tells them apart, so
there is nothing to learn by heart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from aiotime.frame import Sample

IS, FEARS = "is", "has_fear"
KINDS = {(IS, False): 0, (IS, True): 1, (FEARS, False): 2, (FEARS, True): 3}  # (relation, against it?): kind of edge
SPECIES = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"}
ACTORS = ("Gertrude", "Winona", "Jessica", "Emily", "Julius", "Bernhard", "Lily", "Greg")


@dataclass(frozen=True, slots=True)
class Statement:
    """``subject`` ──relation──▶ ``thing``."""

    subject: str
    relation: str
    thing: str

    def __str__(self) -> str:
        if self.relation == IS:
            return f"{self.subject} is a {self.thing}."
        return f"{_plural(self.subject).capitalize()} are afraid of {_plural(self.thing)}."


@dataclass(frozen=True, slots=True)
class Story:
    """What is said, what is asked, and what is true."""

    statements: tuple[Statement, ...]
    about: str
    answer: str

    def __str__(self) -> str:
        return " ".join([*map(str, self.statements), f"What is {self.about} afraid of?"])


@dataclass(frozen=True, slots=True)
class Graph:
    """A story for the network.

    Attributes:
        marked: float32 [nodes, 1], 1 at the node that is asked about.
        adjacency: float32 [nodes, nodes · 4], row v: 1 at u · 4 + kind for an edge of that kind from u to v.
        steps: until every node that can hear of the marked one has heard of it.
    """

    marked: torch.Tensor
    adjacency: torch.Tensor
    steps: int


def tell(rng: random.Random, *, species: int = 4, actors: tuple[int, int] = (1, 8)) -> Story:
    """A new story. Of more than four species, and of more than eight actors, the others are numbered."""
    animals = [*SPECIES, *(f"species{number}" for number in range(len(SPECIES), species))][:species]
    names = [*ACTORS, *(f"Actor{number}" for number in range(len(ACTORS), actors[1]))]
    fears = {animal: rng.choice([other for other in animals if other != animal]) for animal in animals}
    kinds = {name: rng.choice(animals) for name in rng.sample(names, rng.randint(*actors))}
    statements = [Statement(one, FEARS, other) for one, other in fears.items()]
    statements += [Statement(name, IS, animal) for name, animal in kinds.items()]
    rng.shuffle(statements)
    about = rng.choice(list(kinds))
    return Story(tuple(statements), about, fears[kinds[about]])


def as_graph(story: Story, rng: random.Random) -> tuple[Graph, int]:
    """(graph with nodes numbered at random, the number of the answer's node)."""
    entities = list(dict.fromkeys(name for each in story.statements for name in (each.subject, each.thing)))
    rng.shuffle(entities)
    node = {name: number for number, name in enumerate(entities)}
    marked = torch.zeros(len(node), 1)
    marked[node[story.about]] = 1
    adjacency = torch.zeros(len(node), len(node) * len(KINDS))
    for each in story.statements:
        one, other = node[each.subject], node[each.thing]
        adjacency[other, one * len(KINDS) + KINDS[each.relation, False]] = 1
        adjacency[one, other * len(KINDS) + KINDS[each.relation, True]] = 1
    return Graph(marked, adjacency, _reach(story.statements, story.about)), node[story.answer]


def samples(seed: int, *, species: int = 4, actors: tuple[int, int] = (1, 8)) -> Iterator[Sample]:
    """`Graph` and, as target, the answer's node; for ever, each story told once."""
    rng = random.Random(seed)
    while True:
        graph, answer = as_graph(tell(rng, species=species, actors=actors), rng)
        yield Sample(graph, torch.tensor(answer))


def _reach(statements: Sequence[Statement], start: str) -> int:
    """Edges to the farthest node that can be reached from ``start``, in whichever direction the edges point."""
    reached, front, steps = {start}, {start}, 0
    while True:
        front = {
            far
            for each in statements
            for near, far in ((each.subject, each.thing), (each.thing, each.subject))
            if near in front and far not in reached
        }
        if not front:
            return steps
        reached |= front
        steps += 1


def _plural(animal: str) -> str:
    return SPECIES.get(animal, f"{animal}s")

"""Networks that the tests share, each with the same computation written in plain PyTorch."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Network, Stage, Step
from aiotime.dynamic.floor import Floor
from aiotime.frame import Sample

SGD = partial(torch.optim.SGD, lr=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


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


# ---------------------------------------------------------------------- the same in plain PyTorch


def modules(network: Network) -> dict[str, nn.Module]:
    """Copies of its modules, by stage."""
    return {name: copy.deepcopy(stage.replicas[0].fn) for name, stage in network.stages.items()}  # type: ignore[misc]


def plain_tree(parts: dict[str, nn.Module], sample: Any) -> torch.Tensor:
    """`TreeNet`, written once more without any aiotime."""
    every: list[torch.Tensor] = []

    def node(tree: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if isinstance(tree, int):
            leaf = parts["leaf"](torch.tensor(tree))
            return leaf, [leaf]
        left, some = node(tree[0])
        right, more = node(tree[1])
        h = parts["join"](left, right)
        g = parts["gate"](h)
        h = g * h + (1 - g) * (left + right) / 2
        h = h / (1e-6 + h.norm())
        return h, some + more + [h]

    tree, label = sample
    h, every = node(tree)
    y = torch.tensor(label)
    first, second = parts["head"](h), parts["head"](torch.stack(every).mean(0))
    loss: torch.Tensor = functional.cross_entropy(first, y) + 0.3 * functional.cross_entropy(second, y)
    return loss + 0.01 * sum((each**2).sum() for each in every[:2])


def plain_rnn(parts: dict[str, nn.Module], sample: Any) -> torch.Tensor:
    """`RnnNet` and its loss, likewise."""
    h = torch.zeros(parts["head"].in_features)  # type: ignore[call-overload]
    states: list[torch.Tensor] = []
    for token in sample.input:
        h = parts["cell"](parts["emb"](torch.tensor(token)), h)
        states.append(h)
        if len(states) > 2:
            h = h + 0.1 * states[-3]
    out = parts["head"](torch.stack(states).max(0).values + h)
    return functional.cross_entropy(out, sample.target)


def weights_of(parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """As `Network.state_dict` has them."""
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


# ---------------------------------------------------------------------- what tests do with networks


class Coded(Network):
    """A network whose forward is a function of the test's: ``forward(network, sample)``."""

    def __init__(self, code: Callable[[Any, Any], Awaitable[Any]], **stages: Any) -> None:
        self.code = code
        for name, stage in stages.items():
            setattr(self, name, stage)

    def __getattr__(self, name: str) -> Stage:
        raise AttributeError(name)

    async def forward(self, sample: Any) -> Any:
        return await self.code(self, sample)


def linear(inputs: int = 3, outputs: int = 3, *, seed: int = 0) -> nn.Linear:
    """Always the same weights for a seed."""
    layer, generator = nn.Linear(inputs, outputs), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.6, 0.6, generator=generator)
    return layer


def put(network: Network, kind: str) -> Network:
    """Place the stages of a network that was not open yet: "inline", "cpu" (two workers) or "simulated"."""
    from aiotime.devices import resolve

    clock = VirtualClock()
    places: Iterator[Any] = cycle(
        ["inline"]
        if kind == "inline"
        else [resolve("cpu:0"), resolve("cpu:1")]
        if kind == "cpu"
        else [SimulatedDevice(k, seconds=1.0 + k, clock=clock) for k in range(2)]
    )
    for stage in network.stages.values():
        for replica in stage.replicas:
            replica.device = resolve(next(places))
    network._house()._find_devices()
    return network


async def taught(network: Network, source: Any, **options: Any) -> list[Step]:
    """The steps of one learn(), plain SGD unless said otherwise."""
    steps = []
    async with network.learn(source, **{"optimizer": SGD, "unused": "ignore", **options}) as run:
        async for step in run:
            assert isinstance(step, Step)
            steps.append(step)
    return steps


def floor_of(network: Network) -> Floor:
    """Of an open network."""
    floor = network._house()._floor
    assert floor is not None
    return floor


def check_empty(network: Network) -> None:
    """Nothing is in flight and nothing is kept: no graphs, calls, instances, jobs; every credit is back."""
    house = network._house()
    if house._requests is not None:
        assert not house._requests.door.used
        assert not house._requests.door.waiting
    floor = house._floor
    if floor is None:
        return
    assert not floor.entries
    assert not floor.runs
    assert not floor.jobs
    for station in floor.stations:
        assert not station.kept
        assert not len(station.inbox)
        assert not station.inbox._groups
    for lane in floor.lanes:
        assert not lane.running
        assert not lane.waiting


def gathered(network: Network) -> dict[str, torch.Tensor]:
    """Sums of the gradients that wait for an update in an open network, as `Network.state_dict` names them."""
    found = {}
    for station in floor_of(network).stations:
        hands = station.hands
        if hands is None or hands.updater is None:
            continue
        for name, total in zip(hands.weights.names, hands.updater._sum, strict=True):
            if total is not None:
                found[f"{station.name}.{name}"] = total
    return found


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, atol: float = 1e-9) -> None:
    """Assert that both hold the same, to rounding."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.allclose(value, other[key], rtol=1e-9, atol=atol), (key, value, other[key])


@contextmanager
def double_precision() -> Iterator[None]:
    """New tensors have 64 bits: what is left between two ways of adding up is 1e-16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

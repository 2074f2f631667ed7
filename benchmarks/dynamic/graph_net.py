"""The gated graph network (Li et al. 2016, arXiv:1511.05493) as a network of stages, and in plain PyTorch.

marks ── states h [nodes, width]
            │  ┌──────────── steps times, as many as the story needs ────────────┐
            └──┴▶ send: W_kind h ──▶ adjacency @ messages ──▶ update: GRU(m, h) ─┴──▶ read: a score per node
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from aiotime.dynamic import Network, Stage
from benchmarks.dynamic.graph_stories import KINDS, Graph

WIDTH = 16


class Send(nn.Module):
    """A linear map per kind of edge: [nodes, width] to [nodes, kinds, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.Linear(width, len(KINDS) * width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """What every node would send along an edge of each kind."""
        messages: torch.Tensor = self.maps(h)
        return messages.unflatten(1, (len(KINDS), -1))


class Update(nn.Module):
    """A gated recurrent unit per node."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, message: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """[nodes, width] twice to [nodes, width]."""
        new: torch.Tensor = self.cell(message, h)
        return new


class Read(nn.Module):
    """A score per node, from its state and its mark."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width + 1, width), nn.Tanh(), nn.Linear(width, 1, bias=False))

    def forward(self, h: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
        """[nodes, width] and [nodes, 1] to [nodes, 1]."""
        scores: torch.Tensor = self.score(torch.cat([h, marked], 1))
        return scores


def modules(seed: int, width: int = WIDTH) -> dict[str, nn.Module]:
    """The three modules, the same for the same seed."""
    torch.manual_seed(seed)
    return {"send": Send(width), "update": Update(width), "read": Read(width)}


class GraphNet(Network):
    """Stories of any size share a batch: nodes of all of them along the first dimension."""

    def __init__(self, parts: dict[str, nn.Module], *, device: Any = "inline", max_batch: int = 64) -> None:
        options: dict[str, Any] = {"device": device, "max_batch": max_batch, "group": "cat"}
        self.send = Stage(parts["send"], **options)
        self.update = Stage(parts["update"], **options)
        self.read = Stage(parts["read"], **options)

    async def forward(self, graph: Graph) -> torch.Tensor:
        """Scores [nodes]."""
        h = start(graph.marked)
        for _ in range(graph.steps):
            messages = await self.send(h)
            h = await self.update(graph.adjacency @ messages.flatten(0, 1), h)
        scores = await self.read(h, graph.marked)
        return scores.squeeze(1)


class PlainGraphNet(nn.Module):
    """The same in plain PyTorch, one story at a time."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.send, self.update, self.read = parts["send"], parts["update"], parts["read"]

    def forward(self, graph: Graph) -> torch.Tensor:
        """Scores [nodes]."""
        h = start(graph.marked)
        for _ in range(graph.steps):
            h = self.update(graph.adjacency @ self.send(h).flatten(0, 1), h)
        scores: torch.Tensor = self.read(h, graph.marked)
        return scores.squeeze(1)


def start(marked: torch.Tensor, width: int = WIDTH) -> torch.Tensor:
    """First states: the mark and zeros, [nodes, width]."""
    return functional.pad(marked, (0, width - 1))


def loss(scores: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the story's nodes."""
    return functional.cross_entropy(scores, answer)

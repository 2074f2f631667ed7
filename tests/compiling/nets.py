"""Modules to compile: small, and few, as each takes a compiler ten seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aiotime.compiling.graph import Captured, Recorder

CPU = torch.device("cpu")


def mlp(seed: int = 0) -> nn.Sequential:
    """Matrix products, whose weights the compiler packs."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)).eval()


class Everything(nn.Module):
    """A dict with a pair in it goes in, a dict comes out; weights of every kind that has gone wrong anywhere."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.norm1 = nn.LayerNorm(3)  # equal when it is made
        self.norm2 = nn.LayerNorm(3)
        self.precise1 = nn.LayerNorm(3, dtype=torch.float64)
        self.precise2 = nn.LayerNorm(3, dtype=torch.float64)
        self.brief = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.full((2,), 1.0))
        self.strided = nn.Parameter(torch.randn(6, 4)[1:4, 1:4].t())
        self.batch = nn.BatchNorm1d(3)
        self.order: Tensor
        self.flag: Tensor
        self.mask: Tensor
        self.twin: Tensor
        self.register_buffer("order", torch.tensor([0, 2, 1]))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]), persistent=False)
        self.register_buffer("twin", torch.tensor([1.0, 0.0, 1.0]), persistent=False)
        self.eval()

    def forward(self, value: dict[str, Any]) -> dict[str, Any]:
        x, (y, ids) = value["x"], value["pair"]
        z = self.norm2(self.norm1(self.tied(self.first(x))) * self.scale) @ self.strided
        precise = self.precise2(self.precise1(y) * 2)[:, self.order]
        z = torch.where(self.flag, self.batch(z), -z) * self.mask + self.twin
        z[:, :2] += self.shift
        return {
            "z": z,
            "again": z,
            "precise": precise,
            "brief": self.brief * 3,
            "bias": self.first.bias,
            "weight": self.first.weight.t(),
            "same": x,
            "view": y[1:],
            "ids": ids + 1,
            "odd": ids % 2 == 1,
            "none left": x[:0],
            "number": x.sum(),
        }

    @staticmethod
    def example(seed: int = 1) -> dict[str, Any]:
        """A value that it takes."""
        torch.manual_seed(seed)
        return {"x": torch.randn(2, 3), "pair": (torch.randn(2, 3, dtype=torch.float64), torch.arange(4))}


class Sum(nn.Module):
    """Two sizes that must be the same once it is compiled; long calls for long frames."""

    def forward(self, value: tuple[Tensor, Tensor]) -> Any:
        return (value[0].sin() + value[1]).tanh()

    @staticmethod
    def examples() -> list[tuple[Tensor, Tensor]]:
        """Of two sizes."""
        return [(torch.randn(size, 4), torch.randn(size, 4)) for size in (2, 3)]


class Counter(nn.Module):
    """Keeps how many frames there were, by way of a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Tensor
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Any:
        self.count.view(2, 1)[0].add_(1)
        return x + self.count[0]


class StandIn(Recorder):
    """Captures by keeping the call, replays by calling again into the same outputs, as a CUDA graph does."""

    def __init__(self) -> None:
        self.captures = 0
        self.ended = 0

    def capture(self, call: Callable[[], Any]) -> Captured:
        self.captures += 1
        made = call()

        def replay() -> None:
            for old, new in zip(pytree.tree_leaves(made), pytree.tree_leaves(call()), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)

        return Captured(replay, made, self._end)

    def follow(self) -> None:
        """There is one stream."""

    def _end(self) -> None:
        self.ended += 1

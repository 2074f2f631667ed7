"""Eager: an instance whose stages are called at once, in plain PyTorch; what debugging and comparisons use."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from aiotime.dynamic.stage import Stage


class Eager:
    """Stands where an `Instance` stands; autograd sees one graph from end to end."""

    def call(self, stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Any]:
        """The stage's module (of replicas: the first), called here."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if stage.max_batch > 1 and stage.group == "stack":
            args, kwargs = pytree.tree_map(_as_batch, (args, kwargs))
            future.set_result(pytree.tree_map(_first_row, stage.replicas[0].fn(*args, **kwargs)))
        else:
            future.set_result(stage.replicas[0].fn(*args, **kwargs))
        return future


def _as_batch(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, torch.Tensor) else leaf


def _first_row(leaf: Any) -> Any:
    return leaf[0] if isinstance(leaf, torch.Tensor) else leaf

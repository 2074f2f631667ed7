"""The boundary of a stage: where a value stops being somebody's output and starts being a leaf of our graph.

upstream's output ── detached, may be an inference tensor ──▶ enter ──▶ leaves that require grad ──▶ fn
                                                               gradients ◀── one per tensor, in order
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a pytree, in its order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def detached(value: Any) -> Any:
    """The same value with every tensor cut from its graph."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, value)


def nbytes_of(value: Any) -> int:
    """Bytes of the tensors in a pytree."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))


class Boundary:
    """Turns what comes in into leaves of a stage's own graph.

    Args:
        differentiable: somebody upstream learns, so floating tensors must require grad.
        own: the graph keeps copies. On an accelerator what comes in was allocated on another stream, and goes back to
            that stream the moment a graph lets go of it, while this stream may still have to run the backward.
    """

    def __init__(self, *, differentiable: bool, own: bool = False) -> None:
        self._differentiable = differentiable
        self._own = own
        self._mutates: bool | None = None  # does the stage write into what it is given? found out with the first value

    def enter(self, value: Any) -> tuple[Any, list[torch.Tensor]]:
        """(what to call the stage with, its tensors); autograd recording must be on."""
        found: list[torch.Tensor] = []
        copy = self._mutates is not False

        def leaf_of(tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor):
                return tensor
            leaf = tensor.detach()
            if self._own or leaf.is_inference():  # which cannot be saved for a backward
                leaf = leaf.clone()
            if self._differentiable and (leaf.is_floating_point() or leaf.is_complex()):
                leaf.requires_grad_()
            found.append(leaf)
            return leaf.clone() if copy else leaf

        if isinstance(value, torch.Tensor):
            return leaf_of(value), found
        return pytree.tree_map(leaf_of, value), found

    def watch(self, given: Any) -> list[tuple[torch.Tensor, int]]:
        """What `learned` compares with; nothing once it is known whether the stage writes into its input."""
        if self._mutates is not None:
            return []
        return [(tensor, tensor._version) for tensor in tensors_of(given)]

    def learned(self, watched: Sequence[tuple[torch.Tensor, int]]) -> None:
        """After the first call: a stage that wrote into its input keeps getting a copy.

        What it is given belongs to the graph of the stage above (an activation may be saved there).
        """
        if watched:
            self._mutates = any(tensor._version != before for tensor, before in watched)

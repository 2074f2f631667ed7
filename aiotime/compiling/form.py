"""Form: what a compiled program may be called with: structure, dtypes, shapes, strides.

Compiled code does not look at what it gets: a tensor of another shape makes it read what is not there. So this does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from aiotime.compiling.program import CompileError

_ALIGNED = 16  # bytes; code for accelerators takes the alignment of the example's memory for granted


@dataclass(frozen=True, slots=True)
class Size:
    """A size that may vary: of which tensor and dimension, under which name, and how far.

    Sizes of one name are equal. Compiled code takes that for granted: where one of them is another, it reads beyond
    the end of a tensor.
    """

    tensor: int
    dim: int
    name: str
    least: int
    most: int


class Form:
    """Of the values that look like ``examples``.

    Args:
        examples: values of one structure, all leaves tensors. Dimensions in which they differ may vary.

    Attributes:
        leaves: how many tensors a value has.
        varying: per tensor, its dimensions that may vary.

    Raises:
        CompileError: not all leaves are tensors, or the examples differ in more than sizes.
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        flat = [pytree.tree_flatten(example) for example in examples]
        (first, self._spec), others = flat[0], flat[1:]
        for leaf in first:
            if not isinstance(leaf, torch.Tensor):
                raise CompileError(
                    f"a {type(leaf).__name__} travels with the frame, and only tensors can be compiled for"
                )
            if leaf.layout is not torch.strided:
                raise CompileError(f"a frame has a tensor of layout {leaf.layout}")
        # laid out as a clone of it is: a view with gaps has none there, and that is what gets compiled
        likes = [torch.empty_like(leaf.detach()) for leaf in first]
        self.varying: list[tuple[int, ...]] = [() for _ in first]
        for leaves, spec in others:
            if spec != self._spec or any(a.dim() != b.dim() for a, b in zip(first, leaves, strict=True)):
                raise CompileError("the structure of what this stage gets depends on the frame's size")
            self.varying = [
                tuple(dim for dim in range(one.dim()) if dim in before or one.shape[dim] != other.shape[dim])
                for before, one, other in zip(self.varying, first, leaves, strict=True)
            ]
        for tensor, dims in zip(likes, self.varying, strict=True):
            if dims and not tensor.is_contiguous():
                raise CompileError("a tensor of varying size is not contiguous")
        self.leaves = len(first)
        self._single = self._spec.is_leaf()
        self._checks = [_check(tensor, dims) for tensor, dims in zip(likes, self.varying, strict=True)]
        self._sizes: tuple[Size, ...] = ()

    def limit(self, sizes: Sequence[Size]) -> None:
        """Hold the sizes that vary to what was found out about them when the program was made."""
        self._sizes = tuple(sizes)

    def tensors(self, value: Any) -> list[torch.Tensor] | None:
        """The tensors of ``value``, laid out as compiled code wants them; None where it was not compiled for this."""
        if self._single:
            found = [value]
        else:
            found, spec = pytree.tree_flatten(value)
            if spec != self._spec:
                return None
        result = []
        for tensor, check in zip(found, self._checks, strict=True):
            fit = check(tensor)
            if fit is None:
                return None
            result.append(fit)
        if self._sizes:
            found_sizes: dict[str, int] = {}
            for each in self._sizes:
                size = result[each.tensor].shape[each.dim]
                if not each.least <= size <= each.most or found_sizes.setdefault(each.name, size) != size:
                    return None
        return result


def _check(like: torch.Tensor, varying: tuple[int, ...]) -> Callable[[Any], torch.Tensor | None]:
    """``tensor`` if it is like the example, laid out like it if it was not, None if it is another kind of thing."""
    shape, stride, dtype, device = like.shape, like.stride(), like.dtype, like.device
    aligned = device.type != "cpu"

    # a negative or conjugate bit says what the memory means, and compiled code looks only at the memory
    def alike(tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.dtype is dtype
            and tensor.layout is torch.strided
            and tensor.device == device
        )

    def usual(tensor: Any) -> torch.Tensor | None:
        if not alike(tensor) or tensor.shape != shape:
            return None
        if tensor.stride() != stride or tensor.is_neg() or tensor.is_conj():
            return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(tensor)
        return _moved(tensor) if aligned and tensor.data_ptr() % _ALIGNED else tensor

    def of_any_size(tensor: Any) -> torch.Tensor | None:
        if not alike(tensor) or tensor.dim() != len(shape):
            return None
        for dim, size in enumerate(tensor.shape):
            if size != shape[dim] and dim not in varying:
                return None
        tensor = tensor.resolve_neg().resolve_conj().contiguous()
        return _moved(tensor) if aligned and tensor.data_ptr() % _ALIGNED else tensor

    return of_any_size if varying else usual


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same in memory of its own, which is aligned."""
    return tensor.clone(memory_format=torch.preserve_format)

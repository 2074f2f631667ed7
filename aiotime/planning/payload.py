"""The payload of a frame and the arguments of the model it stands for.

A tensor is the model's one argument, a tuple its positional arguments, a dict its keyword arguments. What is not
a tensor in the example (a flag, an int, None) is fixed by the trace: the model may have chosen its path by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from aiotime.errors import InputError, TraceError

Path = tuple[pytree.KeyEntry, ...]  # how to get from the payload to one of its leaves


class Payload:
    """The structure of ``example``: where its tensors are, what is fixed.

    Args:
        example: a tensor, a tuple (positional arguments) or a dict (keyword arguments).
        whole: take each argument as one input, whatever is in it (an nn.Sequential passes it on unread).
    """

    def __init__(self, example: Any, *, whole: bool = False) -> None:
        if not isinstance(example, torch.Tensor) and type(example) not in (tuple, dict):
            raise TraceError(
                "example must be a tensor (the model's one argument), a tuple (positional arguments) or a dict "
                f"(keyword arguments), got {type(example).__name__}"
            )
        self.example = example
        self.whole = whole
        is_leaf = self._is_argument if whole else None
        leaves, self._spec = pytree.tree_flatten_with_path(example, is_leaf=is_leaf)
        self.leaves: list[tuple[Path, Any]] = leaves
        self.inputs: list[tuple[Path, Any]] = [
            (path, leaf) for path, leaf in leaves if whole or isinstance(leaf, torch.Tensor)
        ]
        fixed = [(path, leaf) for path, leaf in leaves if not whole and not isinstance(leaf, torch.Tensor)]
        self.check: Callable[[Any], Any] | None = None
        if not isinstance(example, torch.Tensor):
            self.check = _checker(example, fixed, self._spec, flat=all(len(path) == 1 for path, _ in leaves))

    def _is_argument(self, value: Any) -> bool:
        return value is not self.example or isinstance(value, torch.Tensor)

    def replaced(self, value: Callable[[Any], Any]) -> Any:
        """The example with each input ``x`` replaced by ``value(x)``."""
        inputs = iter(self.inputs)
        chosen = next(inputs, None)
        leaves: list[Any] = []
        for path, leaf in self.leaves:
            if chosen is not None and path == chosen[0]:
                leaves.append(value(leaf))
                chosen = next(inputs, None)
            else:
                leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self._spec)


def arguments(payload: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that ``payload`` stands for."""
    if isinstance(payload, tuple):
        return payload, {}
    if isinstance(payload, dict):
        return (), payload
    return (payload,), {}


def call(model: Callable[..., Any], payload: Any) -> Any:
    """``model`` on the arguments that ``payload`` stands for."""
    args, kwargs = arguments(payload)
    return model(*args, **kwargs)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in ``value``, whatever its structure."""
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                yield leaf


def nbytes(value: Any) -> int:
    """Bytes of the tensors in ``value``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def cloned(value: Any) -> Any:
    """``value`` with every tensor copied, on its device."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), value)


def _checker(example: Any, fixed: list[tuple[Path, Any]], spec: pytree.TreeSpec, *, flat: bool) -> Callable[[Any], Any]:
    """A function that returns its payload, or raises `InputError` where its structure or what is fixed differs."""
    size = len(example)
    names = frozenset(example) if isinstance(example, dict) else None

    def refuse(value: Any) -> InputError:
        if names is not None:
            came = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            return InputError(f"expected a dict with {sorted(map(str, names))}, got {came}")
        came = f"{len(value)}" if isinstance(value, tuple | list) else type(value).__name__
        return InputError(f"expected a tuple of {size} arguments, got {came}")

    def check(value: Any) -> Any:
        if len(value) != size or (names is not None and value.keys() != names):
            raise refuse(value)
        for path, leaf in fixed:
            came = value
            for key in path:
                came = key.get(came)
            if came is not leaf and came != leaf:
                raise InputError(
                    f"{pytree.keystr(path)} was {leaf!r} when the model was traced and is fixed; got {came!r}. "
                    "Hand it in as a tensor where it has to vary"
                )
        return value

    def check_nested(value: Any) -> Any:
        check(value)
        leaves = pytree.tree_structure(value).num_leaves
        if leaves != spec.num_leaves:
            raise InputError(f"expected a payload with {spec.num_leaves} values in it, got {leaves}")
        return value

    return check if flat else check_nested

"""Is this a frame the model takes? Wrong ones are refused at the door, with what was expected and what came."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError, InputError

Dynamic = Sequence[int] | None


class _Leaf:
    """What one tensor of a frame must look like; ``shape`` has None where any size is welcome."""

    __slots__ = ("any_size", "dtype", "path", "shape")

    def __init__(self, path: str, example: torch.Tensor, dynamic: Sequence[int]) -> None:
        self.path = path
        self.dtype = example.dtype
        rank = example.dim()
        free = {d % rank for d in dynamic if -rank <= d < rank} if rank else set()
        self.any_size = bool(free)
        self.shape: tuple[int | None, ...] = tuple(None if d in free else n for d, n in enumerate(example.shape))

    def expected(self) -> str:
        shape = ", ".join("any" if n is None else str(n) for n in self.shape)
        return f"a {_short(self.dtype)} tensor of shape ({shape})"

    def admits(self, shape: torch.Size) -> bool:
        if not self.any_size:
            return shape == self.shape
        return len(shape) == len(self.shape) and all(
            want is None or want == got for want, got in zip(self.shape, shape, strict=True)
        )


class InputSpec:
    """What frames look like, learnt from an example: structure, shapes, dtypes.

    Args:
        example: one frame's payload (tensor, tuple, dict, nested).
        dynamic: dims of every tensor that may differ from the example's.
    """

    def __init__(self, example: Any, *, dynamic: Dynamic = None) -> None:
        leaves, self._structure = pytree.tree_flatten_with_path(_to_tensors(example))
        self._skeleton = pytree.tree_unflatten([None] * len(leaves), self._structure)
        self._leaves: list[_Leaf | Any] = []
        for path, leaf in leaves:
            where = pytree.keystr(path)
            self._leaves.append(_Leaf(where, leaf, dynamic or ()) if isinstance(leaf, torch.Tensor) else leaf)
        if not any(isinstance(leaf, _Leaf) for leaf in self._leaves):
            raise ConfigurationError(
                f"example holds no tensor (it is a {type(example).__name__}); hand in one frame as the model takes it: "
                "a tensor, a tuple of arguments or a dict of keyword arguments"
            )
        first = self._leaves[0]
        self._single: _Leaf | None = first if isinstance(example, torch.Tensor) or is_array(example) else None

    def check(self, payload: Any, index: int | None = None, key: Hashable = None) -> Any:
        """The payload with numpy arrays turned into tensors (sharing memory).

        Raises:
            InputError: wrong structure, shape, dtype or device, or not a tensor.
        """
        single = self._single
        if (
            single is not None
            and type(payload) is torch.Tensor
            and payload.dtype is single.dtype
            and payload.device.type == "cpu"
            and single.admits(payload.shape)
        ):
            return payload
        return self._check_slowly(payload, index, key)

    def _check_slowly(self, payload: Any, index: int | None, key: Hashable) -> Any:
        def refuse(expected: str, came: str, where: str = "") -> InputError:
            name = "the request" if index is None else f"frame {index}"
            at = f" at {where}" if where else ""
            return InputError(f"{name} was refused{at}: expected {expected}, got {came}", frame=index, key=key)

        try:
            payload = _to_tensors(payload)
        except (TypeError, ValueError) as error:
            raise refuse(self.expected(), f"an array torch cannot hold ({error})") from None
        leaves, structure = pytree.tree_flatten(payload)
        if structure != self._structure:
            payload = _in_order(payload, self._skeleton)
            leaves, structure = pytree.tree_flatten(payload)
        if structure != self._structure:
            raise refuse(self.expected(), _describe(payload))
        for want, got in zip(self._leaves, leaves, strict=True):
            if not isinstance(want, _Leaf):
                if type(got) is not type(want):
                    raise refuse(f"a {type(want).__name__}", _describe(got))
                continue
            if not isinstance(got, torch.Tensor):
                raise refuse(want.expected(), _describe(got), want.path)
            if got.dtype != want.dtype or not want.admits(got.shape):
                hint = ""
                if got.dtype == want.dtype and got.dim() == len(want.shape) - 1:
                    hint = " (a missing batch dimension? use x.unsqueeze(0))"
                raise refuse(want.expected(), _describe(got) + hint, want.path)
            if got.device.type != "cpu":
                raise refuse("a tensor in host memory", f"one on {got.device}", want.path)
        return payload

    def expected(self) -> str:
        """In words, for messages."""
        if self._single is not None:
            return self._single.expected()
        shown = [leaf.expected() if isinstance(leaf, _Leaf) else type(leaf).__name__ for leaf in self._leaves]
        return _describe(pytree.tree_unflatten(shown, self._structure))


def require_finite(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``fn`` behind a check that no tensor of its value holds NaN or infinity (run on the first stage's device)."""

    def checked(value: Any) -> Any:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                bad = int((~torch.isfinite(leaf)).sum())
                raise InputError(f"expected finite values, got {bad} NaN or infinite of {leaf.numel()}")
        return fn(value)

    return checked


def payload_bytes(payload: Any) -> int:
    """Bytes of the tensors, arrays and byte strings in a payload."""
    if type(payload) is torch.Tensor:
        return _leaf_bytes(payload)
    leaves = pytree.tree_leaves(payload)
    return sum(map(_leaf_bytes, leaves))


def _leaf_bytes(leaf: Any) -> int:
    if isinstance(leaf, torch.Tensor):
        return leaf.numel() * leaf.element_size()  # a sparse tensor has no nbytes
    if isinstance(leaf, bytes | bytearray):  # an encoded image, say
        return len(leaf)
    return int(leaf.nbytes) if is_array(leaf) or isinstance(leaf, memoryview) else 0


def is_array(value: Any) -> bool:
    """Is it a numpy array? (numpy is not required: who hands in arrays has imported it.)"""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _to_tensors(payload: Any) -> Any:
    if isinstance(payload, torch.Tensor):
        return payload
    if is_array(payload):
        return torch.from_numpy(payload)
    if isinstance(payload, dict | tuple | list):
        return pytree.tree_map(lambda x: torch.from_numpy(x) if is_array(x) else x, payload)
    return payload


def _in_order(value: Any, like: Any) -> Any:
    """``value`` with the keys of its dicts in the order of those of ``like``; other differences stay."""
    if type(value) is dict and type(like) is dict and value.keys() == like.keys():
        return {key: _in_order(value[key], like[key]) for key in like}
    if type(value) in (list, tuple) and type(value) is type(like) and len(value) == len(like):
        return type(value)(map(_in_order, value, like))
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, torch.Tensor):
        return f"a {_short(value.dtype)} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of [" + ", ".join(_describe(v) for v in value) + "]"
    if isinstance(value, dict):
        return "a dict of {" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in value.items()) + "}"
    return f"a {type(value).__name__}"

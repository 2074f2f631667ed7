"""Joining: tensors of several calls or frames to one batch, and back; what may be joined.

    rows x₁ x₂ x₃ ── join ──▶ X ── module ──▶ Y ── part ──▶ rows y₁ y₂ y₃

``"cat"`` joins along the first dimension there is, whose size may differ; ``"stack"`` makes that dimension.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError, InputError

Group = Literal["stack", "cat"]


def check_batching(name: str, max_batch: int, max_wait: float, group: str, *, of: str) -> None:
    """Raise `ConfigurationError` unless these make sense for stage ``name``, which joins ``of`` ("calls", "frames")."""
    if not _is_whole(max_batch) or max_batch < 1:
        raise ConfigurationError(f"max_batch is a number of {of} from 1, not {max_batch!r}")
    if not max_wait >= 0:
        raise ConfigurationError(f"stage {name!r}: max_wait is a number of seconds from 0, not {max_wait!r}")
    if max_wait and max_batch == 1:
        raise ConfigurationError(f"stage {name!r}: max_wait={max_wait} waits for company: set max_batch, too")
    if group not in ("stack", "cat"):
        raise ConfigurationError(f'stage {name!r}: group must be "stack" or "cat", not {group!r}')


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------ of tensors


def join(rows: Sequence[torch.Tensor], *, cat: bool) -> torch.Tensor:
    """One tensor of ``rows``: (n₁, …), (n₂, …) to (n₁ + n₂, …), or (…), (…) to (2, …)."""
    return torch.cat(list(rows)) if cat else torch.stack(list(rows))


def part(joined: torch.Tensor, sizes: Sequence[int] | None) -> Sequence[torch.Tensor]:
    """The rows of what was joined, as views: of these ``sizes`` where it was joined by "cat", else None."""
    return joined.unbind(0) if sizes is None else torch.split(joined, list(sizes))


def signature(name: str, tensors: Sequence[torch.Tensor], *, cat: bool, of: str) -> tuple[Hashable, ...]:
    """Equal for what stage ``name`` may join; ``of`` is what it joins, "calls" or "frames".

    Raises:
        InputError: it can be joined with nothing.
    """
    first = 1 if cat else 0
    found: list[Hashable] = []
    for tensor in tensors:
        if first and tensor.dim() == 0:
            raise InputError(
                f'stage {name!r} joins its {of} along their first dimension (group="cat"), and was given '
                "a tensor without dimensions"
            )
        found += (tensor.shape[first:], tensor.dtype, tensor.device)
    if first and len(tensors) > 1 and len({tensor.shape[0] for tensor in tensors}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise InputError(
            f'stage {name!r} joins its {of} along their first dimension (group="cat"), which must have '
            f"the same size in every tensor of a {of[:-1]}, not {shapes}"
        )
    return tuple(found)


def no_tensor(name: str, output: Any, *, of: str) -> InputError:
    """For stage ``name``, which returned nothing that could be divided."""
    where = "in the network's forward" if of == "calls" else "in a stage behind it, one frame at a time"
    return InputError(
        f"stage {name!r} returned a {type(output).__name__} without any tensor; return tensors, and "
        f"turn them into numbers {where} (.item())"
    )


def check_divisible(name: str, found: Sequence[torch.Tensor], rows: int, *, cat: bool, of: str) -> None:
    """Raise `InputError` unless every tensor that stage ``name`` returned can be divided among ``rows``."""
    for tensor in found:
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            what = f"rows of all its {of}" if cat else of
            raise InputError(
                f"stage {name!r} was given a batch of {rows} ({what} along the first dimension) and "
                f"returned a tensor of shape {tuple(tensor.shape)}, which cannot be divided among them; keep "
                "that dimension, or give the stage max_batch=1"
            )


# ------------------------------------------------------------------ of structures


class Flat(NamedTuple):
    """A value as tensors and what stands beside them."""

    structure: Any  # of pytree
    constants: tuple[tuple[int, Any], ...]  # (position among the leaves, leaf), in order
    tensors: list[torch.Tensor]

    @property
    def same(self) -> tuple[tuple[type, Any], ...]:
        """What must be equal in a batch: 1, 1.0 and True are equal, and are not the same."""
        return tuple((type(leaf), leaf) for _, leaf in self.constants)


def flatten(value: Any) -> Flat:
    """``value`` taken apart."""
    leaves, structure = pytree.tree_flatten(value)
    constants = tuple((at, leaf) for at, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor))
    return Flat(structure, constants, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])


def unflatten(structure: Any, constants: Sequence[tuple[int, Any]], tensors: Sequence[Any]) -> Any:
    """What `flatten` took apart, with ``tensors`` in place of its own."""
    leaves: list[Any] = list(tensors)
    for at, constant in constants:  # in order of position
        leaves.insert(at, constant)
    return pytree.tree_unflatten(leaves, structure)


def check_constants(name: str, constants: Sequence[tuple[int, Any]], *, of: str) -> None:
    """Raise `InputError` where one cannot be compared, and so not be the same for a batch."""
    for _, constant in constants:
        try:
            hash(constant)
        except TypeError:
            raise InputError(
                f"stage {name!r} runs waiting {of} as one batch and cannot do so with a "
                f"{type(constant).__name__}: hand in tensors (torch.as_tensor), or give the stage max_batch=1"
            ) from None


# ------------------------------------------------------------------ of the frames of a linear pipeline


class Joiner(Protocol):
    """How the payloads of frames become one."""

    def look(self, value: Any) -> tuple[Hashable, int]:
        """(equal for values that may be joined, rows of the value). Raises `InputError`."""

    def join(self, values: Sequence[Any]) -> Any:
        """One value of those that may be joined."""

    def check(self, output: Any, sizes: Sequence[int]) -> None:
        """Raise `InputError` unless `part` can divide it."""

    def part(self, output: Any, sizes: Sequence[int]) -> list[Any]:
        """What was made of the joined value, as one for each of ``sizes`` rows."""

    @property
    def plain(self) -> bool:
        """Is one value by itself joined as it is?"""


class Alike:
    """Every tensor of a payload is joined in the same way: for functions and modules that somebody wrote for it.

    Args:
        name: of the stage, for errors.
        group: "cat" or "stack".
    """

    def __init__(self, name: str, group: Group) -> None:
        self._name = name
        self.plain = group == "cat"

    def look(self, value: Any) -> tuple[Hashable, int]:
        if type(value) is torch.Tensor:  # the common case in short
            if not self.plain:
                return (value.shape, value.dtype, value.device), 1
            if value.dim():
                return (value.shape[1:], value.dtype, value.device), value.shape[0]
        flat = flatten(value)
        if not flat.tensors:
            raise InputError(
                f"stage {self._name!r} runs waiting frames as one batch and cannot do so with a "
                f"{type(value).__name__}: hand in tensors (torch.as_tensor), or give the stage max_batch=1"
            )
        check_constants(self._name, flat.constants, of="frames")
        found = signature(self._name, flat.tensors, cat=self.plain, of="frames")
        return (flat.structure, flat.constants, flat.same, found), flat.tensors[0].shape[0] if self.plain else 1

    def join(self, values: Sequence[Any]) -> Any:
        if type(values[0]) is torch.Tensor:
            return join(values, cat=self.plain)
        flats = [flatten(value) for value in values]
        columns = zip(*(flat.tensors for flat in flats), strict=True)
        return unflatten(flats[0].structure, flats[0].constants, [join(column, cat=self.plain) for column in columns])

    def check(self, output: Any, sizes: Sequence[int]) -> None:
        found = [output] if isinstance(output, torch.Tensor) else flatten(output).tensors
        if not found:
            raise no_tensor(self._name, output, of="frames")
        check_divisible(self._name, found, sum(sizes), cat=self.plain, of="frames")

    def part(self, output: Any, sizes: Sequence[int]) -> list[Any]:
        among = sizes if self.plain else None
        if isinstance(output, torch.Tensor):
            return list(part(output, among))
        flat = flatten(output)
        columns = [part(tensor, among) for tensor in flat.tensors]
        return [unflatten(flat.structure, flat.constants, row) for row in zip(*columns, strict=True)]

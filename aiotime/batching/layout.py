"""Layout: how a value that travels between the pieces of a model is joined, learned from three of them.

A piece hands on what the next one needs: rows, but also what is the same for every frame (a mask), numbers that count
rows (a size that the graph reads), and tensors with several rows per row of the input (heads folded into the batch).

    values of a, of b, and of a and b joined ──▶ for each leaf: rows, the same for all, or a count
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError, InputError

LOOSE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest value; other floats: kernels differ by batch size
LOOSEST = 3e-2


Kind = Literal["rows", "same", "count"]


class Layout:
    """Joins and divides values of one structure.

    Args:
        where: for errors, as in "what stage 2 hands on".
        one: the value of a frame of ``rows`` rows.
        two: the value of another.
        both: that of the two joined.
        rows: of each of the two.
        exact: join only values of equal shape, the first dimension included: where another one may differ, too, the
            first may be a product of both.

    Raises:
        ConfigurationError: the joined value is not those of the two; the message names the first leaf.
    """

    def __init__(self, where: str, one: Any, two: Any, both: Any, rows: int, *, exact: bool = False) -> None:
        self._where = where
        self._first = 0 if exact else 1  # dimension that must be equal
        named, self._structure = pytree.tree_flatten_with_path(one)
        others, second = pytree.tree_flatten(two)
        joined, third = pytree.tree_flatten(both)
        if not self._structure == second == third:
            raise ConfigurationError(f"{where} has another structure for a batch of two frames than for one")
        self._kinds = [
            _kind(f"{where}{pytree.keystr(path)}", leaf, other, whole, rows)
            for (path, leaf), other, whole in zip(named, others, joined, strict=True)
        ]
        if "rows" not in self._kinds:
            raise ConfigurationError(f"{where} holds no tensor whose first dimension is that of the batch")

    def look(self, value: Any) -> tuple[Hashable, int]:
        """(equal for values that may be joined, the size that its part of the whole is measured by)."""
        first = self._first
        if type(value) is torch.Tensor:
            return (value.shape[first:], value.dtype, value.device), value.shape[0]
        found: list[Hashable] = []
        size = 0  # of the first leaf that has rows; what the others have is in proportion
        for leaf, kind in zip(self._flat(value), self._kinds, strict=True):
            if kind == "rows":
                size = size or leaf.shape[0]
                found.append((leaf.shape[first:], leaf.dtype, leaf.device))
            elif kind == "same":
                found.append((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf)
        return tuple(found), size

    def join(self, values: Sequence[Any]) -> Any:
        """One value of several."""
        if type(values[0]) is torch.Tensor:
            return torch.cat(list(values))
        made: list[Any] = []
        columns = zip(*map(self._flat, values), strict=True)
        for column, kind in zip(columns, self._kinds, strict=True):
            made.append(torch.cat(column) if kind == "rows" else sum(column) if kind == "count" else column[0])
        return pytree.tree_unflatten(made, self._structure)

    def check(self, output: Any, sizes: Sequence[int]) -> None:
        """Raise `InputError` unless it can be divided in these proportions."""
        whole = max(1, sum(sizes))
        for leaf, kind in zip(self._flat(output), self._kinds, strict=True):
            if kind == "rows" and (leaf.dim() == 0 or any(leaf.shape[0] * size % whole for size in sizes)):
                raise InputError(
                    f"{self._where} is a tensor of shape {tuple(leaf.shape)} for a batch of {len(sizes)} frames, "
                    "which cannot be divided among them; build the pipeline with max_batch=1"
                )

    def part(self, output: Any, sizes: Sequence[int]) -> list[Any]:
        """It divided in these proportions; rows are views."""
        whole = max(1, sum(sizes))
        columns: list[Sequence[Any]] = []
        for leaf, kind in zip(self._flat(output), self._kinds, strict=True):
            if kind == "rows":
                columns.append(torch.split(leaf, [leaf.shape[0] * size // whole for size in sizes]))
            elif kind == "count":
                columns.append([leaf * size // whole for size in sizes])
            elif isinstance(leaf, torch.Tensor):  # a stage may write into what it got
                columns.append([leaf, *(leaf.clone() for _ in sizes[1:])])
            else:
                columns.append([leaf] * len(sizes))
        if isinstance(output, torch.Tensor):
            return list(columns[0])
        return [pytree.tree_unflatten(list(row), self._structure) for row in zip(*columns, strict=True)]

    def _flat(self, value: Any) -> list[Any]:
        leaves, structure = pytree.tree_flatten(value)
        if structure != self._structure:
            raise InputError(f"{self._where} has another structure than it had for the example")
        return leaves


class Across:
    """A `aiotime.batching.joining.Joiner` for a piece: the layouts of what it takes and of what it hands on."""

    plain = True

    def __init__(self, before: Layout, behind: Layout) -> None:
        self.look, self.join = before.look, before.join
        self.check, self.part = behind.check, behind.part


def _kind(where: str, one: Any, two: Any, both: Any, rows: int) -> Kind:
    """How the leaf of both frames came from those of each."""
    if not all(isinstance(leaf, torch.Tensor) for leaf in (one, two, both)):
        if isinstance(one, int) and not isinstance(one, bool) and (one + two, one % rows) == (both, 0) and one:
            return "count"
        if isinstance(one, torch.Tensor) or hasattr(one, "__dict__") or not one == two == both:
            raise ConfigurationError(
                f"{where}, a {type(one).__name__}, cannot be divided among the frames of a batch: {one!r} and {two!r} "
                f"for the two frames, {both!r} for both"
            )
        return "same"
    if (
        one.dim()
        and one.shape[0] > 0
        and one.shape[0] % rows == 0
        and both.shape[:1] == (one.shape[0] + two.shape[0],)
        and _near(both, torch.cat([one, two]))
    ):
        return "rows"
    if _near(one, two) and _near(one, both):
        return "same"
    raise ConfigurationError(
        f"{where} differs: a tensor of shape {tuple(both.shape)} for a batch of two frames{_distance(one, two, both)}, "
        f"where the frames by themselves give {tuple(one.shape)} each"
    )


def _near(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, two)
    loose = LOOSE.get(one.dtype, LOOSEST)
    finite = one[torch.isfinite(one)].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    return torch.allclose(one, two, rtol=loose, atol=loose * scale, equal_nan=True)


def _distance(one: torch.Tensor, two: torch.Tensor, both: torch.Tensor) -> str:
    """By how much, in words, where that can be said."""
    if not one.dim() or one.shape[1:] != two.shape[1:] or both.shape != (one.shape[0] + two.shape[0], *one.shape[1:]):
        return ""
    most = (both.double() - torch.cat([one, two]).double()).abs().max() if both.numel() else 0.0
    return f", off by {float(most):.3g}"

"""Does a model treat the frames of a batch apart? Found out before a pipeline batches them, and how to join them.

frames a, b ──▶ piece 0 ──▶ piece 1 ──▶ output     each by itself, one after the other
a and b joined ──▶ piece 0 ──▶ piece 1 ──▶ output  must give the same, row for row, at every arrow: its `Layout`
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from aiotime.batching.layout import Across, Layout
from aiotime.errors import ConfigurationError, TraceError
from aiotime.planning.payload import cloned
from aiotime.planning.piece import Piece
from aiotime.planning.trace import trace
from aiotime.planning.traced import Traced
from aiotime.planning.untouched import repeatable, untouched


def no_learning_in_batches(name: str) -> ConfigurationError:
    """For a pipeline or stage ``name`` that learns and has ``max_batch``."""
    return ConfigurationError(
        f"{name!r} learns frame by frame and cannot batch them: leave max_batch=1 where there is a learner (rules of "
        "learning gather gradients over frames instead)"
    )


def check_rows_apart(name: str, fn: Any) -> None:
    """Refuse a module whose output for a row depends on the other rows: normalisation over the batch."""
    if not isinstance(fn, nn.Module):
        return
    for path, module in fn.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            place = f" at {path!r}" if path else ""
            why = "is in training mode" if module.training else "keeps no running statistics"
            raise ConfigurationError(
                f"stage {name!r} cannot batch frames: its {type(module).__name__}{place} {why} and normalises over "
                "the batch, so that a frame's result would depend on its company; leave max_batch=1"
            )


def trace_for_batches(model: nn.Module, example: Any, dynamic: Sequence[int] | None) -> Traced:
    """`trace` with the first dimension of every tensor free, whatever else is.

    Raises:
        TraceError: the model has one size only for it.
    """
    _rows(example)
    free = sorted({0, *(dynamic or ())})
    try:
        return trace(model, example, dynamic=free)
    except TraceError as error:
        if dynamic is None:
            trace(model, example)  # that it can be traced at all; else that error is the one to show
        raise TraceError(
            f"max_batch joins frames along their first dimension, which must be free. Leave max_batch=1, or: {error}"
        ) from error


def layouts(model: nn.Module, pieces: Sequence[Piece], example: Any, dynamic: Sequence[int] | None) -> list[Across]:
    """For each piece how values are joined before it and divided behind it.

    Runs two frames (the example and one made from it) through the pieces, one by one and as one.

    Raises:
        ConfigurationError: that is not the same; the message names the first value that differs.
    """
    rows = _rows(example)
    other = pytree.tree_map_only(torch.Tensor, _another, example)
    tensors, structure = pytree.tree_flatten(example)
    pairs = zip(tensors, pytree.tree_leaves(other), strict=True)
    leaves = [torch.cat([one, two]) if isinstance(one, torch.Tensor) else one for one, two in pairs]
    both = pytree.tree_unflatten(leaves, structure)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(mode=False), torch.no_grad():
        with untouched(model), repeatable(device):
            one, two = _journey(pieces, example), _journey(pieces, other)
        with untouched(model), repeatable(device):
            try:
                whole = _journey(pieces, both)
            except Exception as error:
                raise ConfigurationError(
                    f"{type(model).__name__} does not take two frames at once, joined along the first dimension: "
                    f"{type(error).__name__}: {error}. Leave max_batch=1, or give it an example with a batch dimension "
                    "and code for any size of it"
                ) from error
    exact = bool(set(dynamic or ()) - {0})
    names = ["the input", *(f"what stage {at} hands on" for at in range(len(pieces) - 1)), "output"]
    try:
        # the output first: it is what the user knows
        values = list(zip(names, one, two, whole, strict=True))
        found = [
            Layout(name, first, second, joined, rows, exact=exact) for name, first, second, joined in reversed(values)
        ]
        found.reverse()
        return [Across(before, behind) for before, behind in pairwise(found)]
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{type(model).__name__} does not treat the frames of a batch apart: {error}. Leave max_batch=1"
        ) from None


def _rows(example: Any) -> int:
    """The first dimension of every tensor of a frame."""
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1 or shapes[0][0] == 0:
        raise ConfigurationError(
            "max_batch joins frames along their first dimension, which every tensor of a frame must have in one size; "
            f"the example's are {', '.join(map(str, shapes))}. Leave max_batch=1"
        )
    return int(shapes[0][0])


def _journey(pieces: Sequence[Piece], value: Any) -> list[Any]:
    """The values before, between and behind the pieces; a piece may write into what it gets."""
    found = [cloned(value)]
    value = cloned(value)
    for piece in pieces:
        value = piece(value)
        found.append(cloned(value))
    return found


def _another(leaf: torch.Tensor) -> torch.Tensor:
    """Another frame of the same kind of values: reversed, or, where that changes nothing, moved a little."""
    turned = leaf.flip(tuple(range(leaf.dim())))
    if not torch.equal(turned, leaf) or not leaf.is_floating_point():
        return turned
    generator = torch.Generator().manual_seed(0)
    return leaf + torch.rand(leaf.shape, generator=generator).to(leaf)

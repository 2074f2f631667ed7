"""Compilation: the stages of a plan, compiled; each for what reaches it when the example goes through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from aiotime.compiling import Outcome, compile_module
from aiotime.devices.base import Device
from aiotime.planning.piece import Piece


def compile_pieces(
    pieces: Sequence[Piece],
    devices: Sequence[Device],
    example: Any,
    ways: Sequence[str | None],
    *,
    dynamic: Sequence[int] | None = None,
    learning: bool = False,
) -> list[Outcome]:
    """How each piece runs, once compiled the way asked for (None: eagerly).

    Blocks for as long as compilers take: not for use on a running loop.

    Args:
        pieces: placed on their devices.
        devices: one per piece.
        example: a frame.
        ways: one per piece.
        dynamic: dimensions of every input tensor whose size varies.
        learning: gradients pass through them.
    """
    outcomes: list[Outcome] = []
    values = [example] if not dynamic else [example, _larger(example, dynamic)]
    for piece, device, way in zip(pieces, devices, ways, strict=True):
        place = piece.module.piece_device
        values = [_moved(value, place) for value in values]
        if way is None:
            outcomes.append(Outcome(None))
        else:
            outcomes.append(
                compile_module(piece.module, values, way=way, device=device, place=place, learning=learning)
            )
        if any(following is not None for following in ways[len(outcomes) :]):
            with torch.inference_mode():
                values = [piece(value) for value in values]
    return outcomes


def _larger(example: Any, dynamic: Sequence[int]) -> Any:
    """``example`` with one more of everything in each dynamic dimension (repeating the first)."""

    def larger(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        for dim in {dim % leaf.dim() for dim in dynamic if -leaf.dim() <= dim < leaf.dim()}:
            leaf = torch.cat([leaf, leaf.narrow(dim, 0, 1)], dim)
        return leaf

    return pytree.tree_map(larger, example)


def _moved(value: Any, place: torch.device) -> Any:
    """Copies at ``place``: what the pieces write into is nobody else's."""
    return pytree.tree_map(lambda leaf: leaf.to(place, copy=True) if isinstance(leaf, torch.Tensor) else leaf, value)


def described(outcomes: Sequence[Outcome]) -> str | None:
    """A sentence for people about how the stages run; None where nothing was to be compiled."""
    found = {outcome.way for outcome in outcomes}
    problems = dict.fromkeys(f"{way}: {reason}" for outcome in outcomes for way, reason in outcome.problems.items())
    said = []
    if len(found) == 1 and (way := next(iter(found))) is not None:
        said.append(f"Compiled: {way}.")
    elif len(found) > 1:
        said.append(
            "Compiled: " + ", ".join(f"stage {at} {outcome.way or 'not'}" for at, outcome in enumerate(outcomes)) + "."
        )
    timed = [outcome for outcome in outcomes if outcome.seconds and outcome.way is None]
    if timed and len(timed) == len(outcomes):
        said.append("Not compiled: eager calls were as fast.")
    if problems:
        said.append("Could not be compiled: " + "; ".join(problems) + ".")
    return " ".join(said) or None

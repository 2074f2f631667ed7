"""Step: what comes out for one instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiotime.frame import Prediction

if TYPE_CHECKING:
    from aiotime.dynamic.path import Path


@dataclass(slots=True, eq=False)
class Step(Prediction):
    """A `Prediction` by a network.

    Attributes:
        output: what the network's forward returned, cut off from any graph; made before anything was learned from it.
        delay: where it was learned from, per stage (and replica, in the order of ``network.stats()``): the most updates
            between one of its forwards there and the backward of it.
        calls: of stages that it made.
        path: which, when and how batched; where the run was asked for it.
    """

    calls: int = 0
    path: Path | None = None

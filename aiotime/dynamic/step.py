"""Step: what comes out for one instance; Steps: one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiotime.frame import Prediction
from aiotime.runs import Run

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


class Steps(Run):
    """A `Run` of a network, an async iterator of `Step`."""

    if TYPE_CHECKING:

        async def __anext__(self) -> Step: ...

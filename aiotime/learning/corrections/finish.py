"""HybridFinish: a run that begins pipelined ends with exact back-propagation."""

from __future__ import annotations

from dataclasses import replace

from aiotime.errors import ConfigurationError
from aiotime.learning.corrections.contract import Correction
from aiotime.learning.order import Order


class HybridFinish(Correction):
    """From a given frame on fewer frames are in flight, at last one: every delay is 0 from then on.

    Pipelined training first, exact training to finish (Chen et al., arXiv 1912.12675: on CIFAR-10 it ends above both).
    Frames are counted by the forwards of each stage, so a strict order gives the same bits as ever:

        ahead(n) = ahead                                    n < after
                   ⌈ahead · (1 - (n - after) / over)⌉       until n = after + over
                   0                                        from there on

    Args:
        after: frames learned from (also before a checkpoint that was restored) until it begins.
        over: frames that the way down takes; 0: at once.
    """

    changes = "order"

    def __init__(self, after: int, over: int = 0) -> None:
        if after < 0 or over < 0:
            raise ConfigurationError(f"after and over are numbers of frames from 0, not {after} and {over}")
        self.after, self.over = after, over

    def check(self, weights: str) -> None:
        """Two versions are one update late by definition."""
        if weights == "double-buffered":
            raise ConfigurationError(
                'weights="double-buffered" is one update late however few frames are in flight; HybridFinish goes with '
                "the other kinds of weights"
            )

    def order(self, order: Order) -> Order:
        """The same, with an end to the frames ahead."""
        return replace(order, after=self.after, over=self.over)

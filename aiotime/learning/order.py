"""Order: in which order a stage takes the forward and backward jobs that could run; pure numbers, no torch.

With S stages and stage k, counted from the input:

    exact        ahead 0 everywhere: one frame in flight
    event        a backward as soon as its gradient is there, forwards while at most S-1-k frames are ahead
    1f1b         S-1-k forwards first, then strictly one forward, one backward: the same on every run
    lockstep     the same with 2(S-1-k): what synchronous ticks give
    local        ahead 0: the backward is the stage's own and follows its forward at once
    mini-batch   strict, and after ``batch`` forwards no further one until as many backwards are done
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one stage's jobs.

    Args:
        ahead: a forward may begin while at most this many earlier frames have not been learned from here.
        strict: decide by count alone, never by what is ready first: every run gives the same bits.
        batch: frames per update in a synchronous rule; None: the stream has no batches.
        split: the weight gradient is a job of its own, after the input gradient was sent upstream.
    """

    ahead: int = 0
    strict: bool = False
    batch: int | None = None
    split: bool = False


def event(stage: int, stages: int, *, split: bool = False) -> Order:
    """Delay at most S-1-k, less where the stream leaves time."""
    return Order(stages - 1 - stage, split=split)


def one_forward_one_backward(stage: int, stages: int, *, split: bool = False) -> Order:
    """Delay exactly S-1-k once the pipeline is full."""
    return Order(stages - 1 - stage, strict=True, split=split)


def lockstep(stage: int, stages: int, *, split: bool = False) -> Order:
    """Delay exactly 2(S-1-k) once the pipeline is full."""
    return Order(2 * (stages - 1 - stage), strict=True, split=split)

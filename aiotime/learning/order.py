"""Order: in which order a stage takes the forward and backward jobs that could run; pure numbers, no torch.

With S stages and stage k, counted from the input:

    exact        ahead 0 everywhere: one frame in flight
    event        forwards while at most S-1-k frames are ahead, a backward as soon as its gradient is there; where
                 both could run they take turns, or the backward goes first when two gradients are there
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
        reach: how many stages further up the loss lies that a backward starts from; 0: the stage's own, so that no
            message is waited for; None: the model's, whose gradient comes down through every stage.
        relays: stages (this one or some above) whose losses' gradients pass through here on their way down, each as a
            job of its own that changes no weights.
        echo: with ``reach`` 0: a backward is handed what the stage above sent about an earlier frame
            (`aiotime.learning.desk.Echo`): with ``strict`` the frame before, waited for; else the oldest, if it came.
        after: from so many forwards on, over the next ``over`` of them, ``ahead`` goes down to 0; None: it stays.
        meet: an update waits for other stages, or for a replica (`aiotime.learning.meeting.MeetingDesk`).
        taps: a backward waits for gradients that came the short way (`aiotime.learning.taps.TapDesk`).
    """

    ahead: int = 0
    strict: bool = False
    batch: int | None = None
    split: bool = False
    reach: int | None = None
    relays: tuple[int, ...] = ()
    echo: bool = False
    meet: bool = False
    taps: bool = False
    after: int | None = None
    over: int = 0

    def ahead_at(self, forwards: int) -> int:
        """``ahead`` after so many forwards."""
        if self.after is None or forwards < self.after:
            return self.ahead
        left = self.over - (forwards - self.after)  # of the way down
        return -(-self.ahead * left // self.over) if left > 0 else 0


def event(stage: int, stages: int, *, split: bool = False) -> Order:
    """Delay at most S-1-k, less where the stream leaves time."""
    return Order(stages - 1 - stage, split=split)


def one_forward_one_backward(stage: int, stages: int, *, split: bool = False) -> Order:
    """Delay exactly S-1-k once the pipeline is full."""
    return Order(stages - 1 - stage, strict=True, split=split)


def lockstep(stage: int, stages: int, *, split: bool = False) -> Order:
    """Delay exactly 2(S-1-k) once the pipeline is full."""
    return Order(2 * (stages - 1 - stage), strict=True, split=split)


def interlocking(stage: int, stages: int, *, n: int, strict: bool = False, own: bool = False) -> Order:
    """A backward starts from the loss n-1 stages further up, or the model's where that is nearer.

        S = 4, n = 2      stage    learns from loss    relays losses    ahead
                            0             1                 -             1
                            1             2                 1             1
                            2             3                 2             1
                            3             3                 -             0

    The loss of stage m is wanted by stage m - n + 1 alone; the model's by every stage from S - n on, and its gradient
    is the message of their backwards.

    Args:
        stage: counted from the input.
        stages: how many there are.
        n: stages that a gradient may pass through; 1: greedy local learning, S: back-propagation.
        strict: see `Order`.
        own: a stage learns from its own loss as well (overlapping local losses).
    """
    last = stages - 1
    loss = min(stage + n - 1, last)
    relays = range(max(stage, 0 if own else n - 1), min(stage + n - 1, last))
    return Order(loss - stage, strict=strict, reach=None if loss == last else loss - stage, relays=tuple(relays))

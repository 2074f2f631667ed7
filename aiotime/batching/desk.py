"""Desk: the frames that wait at one stage, which of them run as one job, and that job.

    launch ─▶ seats in order ── next ──▶ Batch ── compute (where the device stream runs its jobs)
                               └──▶ passed on at once: failed upstream, cancelled, expired

A batch is formed as late as possible, when the stream could run it, of the frames at the head whose values are there:
order is kept, and nothing waits for what has not come unless ``max_wait`` says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aiotime.batching.batch import Batch, Seat, Shared
from aiotime.batching.joining import Joiner
from aiotime.devices.base import Completions, Job, Work, passed_over, stage_failed
from aiotime.errors import BrokenError
from aiotime.observe.meter import Tally

CONTROL_LOOK = 1e-4  # seconds


@dataclass(frozen=True, slots=True)
class Batching:
    """What a stage does with frames that wait.

    Attributes:
        most: frames of one job.
        wait: seconds that a stream which could start waits for company of the first.
        joiner: how payloads become one.
        once: the stage's function without its retries; None: it has none.
    """

    most: int
    wait: float
    joiner: Joiner
    once: Callable[[Any], Any] | None = None


class Desk:
    """The seats of one open stage.

    Args:
        batching: what the user said.
        work: the stage's; it is made to compute batches.
        now: seconds on the pipeline's clock.
        completions: on their way to the loop.
        on_host: the device's values live in the host's memory.
        alone: with that many frames waiting here, can no further one come?
    """

    def __init__(
        self,
        batching: Batching,
        work: Work,
        *,
        now: Callable[[], float],
        completions: Completions,
        on_host: bool,
        alone: Callable[[int], bool],
    ) -> None:
        self.joiner = batching.joiner
        self.work = work
        self.completions = completions
        self.seats: deque[Seat] = deque()
        self.hurry = False  # the pipeline ends: wait for nobody
        self.tally = work.tally = Tally()
        self._most = batching.most
        self._wait = batching.wait
        self._each = work.fn  # one frame by itself
        self._once = batching.once or work.fn
        self._now = now
        self._on_host = on_host
        self._alone = alone
        work.fn = self.compute

    # ------------------------------------------------------------------ which frames, on the stream's thread

    def next(self) -> tuple[Job | None, int, float | None]:
        """(the next job, seats that are dealt with, until when the head waits for company).

        Seats may be dealt with and no job be left: frames that failed upstream, or that nobody wants.
        """
        found, company, scanned = self._head()
        if found and company and self._wait > 0 and not self.hurry and not self._alone(len(found)):
            since = found[0].since
            if since is None:
                since = found[0].since = self._now()
            if (until := since + self._wait) > self._now():
                return None, self._pass_on(self._dead_ahead()), until
        dead = [seat for seat in (self.seats.popleft() for _ in range(scanned)) if seat.error is not None]
        self._pass_on(dead)
        if not found:
            return None, scanned, self._control_ahead()
        self.tally.joined += len(found) - 1
        batch = Batch(self, found)
        batch.up.value = [batch, *self._given(found)]
        return (self.work, batch.up, batch, Shared(batch), None), scanned, None

    def _control_ahead(self) -> float | None:
        """When to look again where another worker is about to end a control frame: that rings nobody."""
        head = self.seats[0] if self.work.workers > 1 and self.seats else None
        return self._now() + CONTROL_LOOK if head is not None and head.up.done and not _servable(head) else None

    def _head(self) -> tuple[list[Seat], bool, int]:
        """(the first seats that may share a job, whether a further one could join them, how many were looked at)."""
        seats, found = self.seats, list[Seat]()
        for at in range(len(seats)):
            seat = seats[at]
            if not _servable(seat):
                # a frame behind a control frame is of another time
                return found, seat.after is None or seat.after.done, at
            self._look(seat)
            if seat.error is not None:
                continue
            if found and seat.signature != found[0].signature:
                return found, False, at
            found.append(seat)
            if len(found) == self._most:
                return found, False, at + 1
        return found, True, len(seats)

    def _look(self, seat: Seat) -> None:
        """What it is, once; whether it is still wanted, each time."""
        error = seat.up.error or passed_over(seat.frame, self._now)
        if error is None and seat.signature is None:
            try:
                seat.signature, seat.size = self.joiner.look(seat.up.value)
            except Exception as cause:
                error = stage_failed(self.work, seat.frame, cause)
        seat.error = error

    def _dead_ahead(self) -> list[Seat]:
        """Take those off the head that will not run."""
        found = []
        while self.seats and self.seats[0].error is not None:
            found.append(self.seats.popleft())
        return found

    def _pass_on(self, dead: Sequence[Seat]) -> int:
        """Settle frames that do not run."""
        for seat in dead:
            self.tally.passed += 1
            mine = seat.mine
            mine.error = seat.error
            seat.up.value = None
            mine.done = True
            if mine.bell is not None:
                mine.bell.ring()
            if mine.frame is not None or mine.waiter is not None:
                self.completions.put(mine)
                self.completions.ring()
        return len(dead)

    def _given(self, seats: Sequence[Seat]) -> tuple[Any, list[Any]]:
        """(the joined payload, where one copy to the device is better than one per frame; else the payloads)."""
        values = [seat.up.value for seat in seats]
        if self._on_host or len(seats) == 1 or any(seat.up.event is not None for seat in seats):
            return None, values
        if any(leaf.device.type != "cpu" for leaf in _tensors(values)):
            return None, values
        return self.joiner.join(values), []

    # ------------------------------------------------------------------ the job

    def compute(self, value: Any) -> Any:
        """The joined output of the batch, or, where it failed, that of each frame by itself.

        So a frame that fails costs its neighbours time: the batch is computed in vain, and then they are, one by one.
        """
        batch: Batch = value[0]
        joined, values = value[1:]
        seats, sizes = batch.seats, batch.sizes
        if len(seats) == 1:
            batch.whole = self.joiner.plain
            return self._each(values[0]) if batch.whole else self._through(self._each, values, sizes)
        try:
            if joined is None:
                return self._through(self._once, values, sizes)
            output = self._once(joined)
            self.joiner.check(output, sizes)
            return output
        except BrokenError:
            raise  # the device is lost
        except Exception:
            values = values or [self._moved(seat.up.value, joined) for seat in seats]
        outputs: list[Any] = []
        errors: list[BaseException | None] = []
        for seat, size in zip(seats, sizes, strict=True):
            output = None
            error: BaseException | None = passed_over(seat.frame, self._now)
            if error is None:
                try:
                    output = self._by_itself(values[len(errors)], size)
                except BrokenError:
                    raise
                except Exception as cause:
                    error = stage_failed(self.work, seat.frame, cause)
            outputs.append(output)
            errors.append(error)
        batch.errors = errors
        return outputs

    def _through(self, fn: Callable[[Any], Any], values: Sequence[Any], sizes: Sequence[int]) -> Any:
        output = fn(self.joiner.join(values))
        self.joiner.check(output, sizes)
        return output

    def _by_itself(self, value: Any, size: int) -> Any:
        if self.joiner.plain:
            return self._each(value)
        return self.joiner.part(self._through(self._each, [value], [size]), [size])[0]

    @staticmethod
    def _moved(value: Any, joined: Any) -> Any:
        """A host payload where ``joined`` is: what was joined there may have been written into by what failed."""
        device = next(leaf.device for leaf in _tensors([joined]))
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), value)


def _servable(seat: Seat) -> bool:
    """Is its value on its way to be read, and has the control frame before it been through?"""
    return seat.up.done and (seat.after is None or seat.after.done)


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(list(values)) if isinstance(leaf, torch.Tensor)]

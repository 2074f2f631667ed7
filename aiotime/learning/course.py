"""Course: the learning of an open pipeline: tickets for frames, late targets, errors, barriers.

Lives on the loop, beside the engine; the work is done by desks on the device streams.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from aiotime.devices.base import DeviceStream, Pending
from aiotime.errors import AiotimeError, FeedbackError, InputError, StageError
from aiotime.frame import LATER, Frame
from aiotime.learning.desk import Desk, Lost
from aiotime.learning.learner import StageLearner
from aiotime.learning.rule import Rule
from aiotime.learning.ticket import Ticket
from aiotime.observe.lessons import Lessons, lessons
from aiotime.observe.log import get_logger

log = get_logger()


class Barrier:
    """A control frame that changes nothing: when it has left the last stage, every earlier frame was learned from."""

    def __init__(self, done: asyncio.Future[None] | None = None) -> None:
        self.done = done

    def apply(self, stage: int) -> None:
        """Nothing; coming here is the point."""

    def settled(self, frame: Frame) -> None:
        """It is through, or the pipeline ended."""
        if self.done is not None and not self.done.done():
            self.done.set_result(None)


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


class Course:
    """What the engine keeps of learning.

    Args:
        rule: the user's.
        stages: how many.
        loop: the engine's.
    """

    def __init__(self, rule: Rule, stages: int, loop: asyncio.AbstractEventLoop) -> None:
        self.rule = rule
        self.stages = stages
        self.loop = loop
        self.desks: list[tuple[Desk, DeviceStream]] = []
        self.strict = False
        self.failed = 0
        self.touched = 0.0  # when a frame settled last, on the loop's clock
        self._late: OrderedDict[Hashable, Ticket] = OrderedDict()
        self._scene = 0
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def add(self, desk: Desk, stream: DeviceStream) -> None:
        """One more learning stage, from the input on."""
        self.desks.append((desk, stream))
        self.strict = self.strict or desk.order.strict

    # ------------------------------------------------------------------ frames

    def enrol(self, frame: Frame, *, cut: bool = False) -> None:
        """Give ``frame`` its ticket: is it learned from, now or later?

        Raises:
            InputError: its target is to come later, and nothing could find it then.
        """
        target = frame.target
        late = target is LATER
        if late:
            if not self.rule.accepts_late:
                raise InputError(
                    f"frame {frame.index} was refused: {type(self.rule).__name__} takes no late targets in this order; "
                    'use Delayed(order="event")',
                    frame=frame.index,
                    key=frame.key,
                )
            if frame.key is None or not _hashable(frame.key):
                raise InputError(
                    f"frame {frame.index} was refused: a target that comes later is found by its key, and "
                    f"{frame.key!r} cannot be one; yield Sample(x, target=LATER, key=...)",
                    frame=frame.index,
                )
        learn = late or target is not None or not self.rule.supervised
        if cut:
            self._scene += 1
        ticket = frame.ticket = Ticket(
            frame.index, self.stages, key=frame.key, learn=learn, target=None if late else target, late=late
        )
        ticket.scene = self._scene
        ticket.owner = frame.owner
        if learn and self.rule.clip == "global":
            ticket.norms = [0.0] * self.stages
            ticket.updates = [Pending() for _ in range(self.stages + 1)]
        if self.rule.wants_raw and frame.tail is not None:
            ticket.raw = frame.tail.value

    def expect(self, ticket: Ticket) -> None:
        """A frame whose target comes later went in; one that never does cannot be learned from."""
        older = self._late.pop(ticket.key, None)
        self._late[ticket.key] = ticket
        if len(self._late) > self.rule.late:
            _, older = self._late.popitem(last=False)
        if older is not None:
            self._expire(older)

    def _expire(self, ticket: Ticket) -> None:
        ticket.expired = True
        for desk, _ in self.desks:
            desk.expire(ticket)

    async def feedback(self, key: Hashable, target: Any) -> float:
        """The target of a late frame; returns its loss once every stage has learned from it.

        Raises:
            FeedbackError: no such frame is kept (any more), it had failed, or the loss refuses the target: the frame's
                graph is gone then, too.
        """
        if target is None or target is LATER:
            raise FeedbackError(f"the target for key {key!r} is {target!r}; hand in what the loss is to compare with")
        ticket = self._late.pop(key, None)
        if ticket is None:
            raise FeedbackError(
                f"no frame with key {key!r} waits for its target: it never came with target=LATER, had its target "
                f"already, or was given up after {self.rule.late} newer ones (late={self.rule.late})"
            )
        ticket.target = target
        taken = [desk.release_late(stream, ticket) for desk, stream in self.desks]
        if not all(taken):  # nobody would ever settle what is awaited below
            raise FeedbackError(f"frame {ticket.index} with key {key!r} cannot be learned from: the pipeline has ended")
        for desk, _ in reversed(self.desks):  # with losses of their own the lower stages may be the first to end
            learned = ticket.grads[desk.index]
            await learned.finished()
            error = learned.error or (learned.value.error if isinstance(learned.value, Lost) else None)
            if error is not None:
                raise FeedbackError(
                    f"frame {ticket.index} with key {key!r} could not be learned from: {error}"
                ) from error
        return float(ticket.loss.detach())

    def lessons(self, stage: int, elapsed: float) -> Lessons | None:
        """What ``stage`` learned, ``elapsed`` seconds after the opening; None where it does not learn."""
        desks = [desk for desk, _ in self.desks if desk.index == stage]  # two where the stage has a replica
        hands = [desk.hands for desk in desks if isinstance(desk.hands, StageLearner) and desk.hands.learns]
        if not hands:
            return None
        updater = hands[0].updater
        delays: Counter[int] = Counter()
        for desk in desks:
            delays.update(dict(desk.delays))
        return lessons(
            [recorder for desk in desks for work in desk.works[1:] for recorder in work.recorders],
            elapsed=elapsed,
            frames=sum(each.learned for each in hands),
            updates=updater.updates if updater is not None else 0,
            skipped=updater.skipped if updater is not None else 0,
            delays=delays,
            kept_bytes=sum(each.kept_nbytes() for each in hands),
        )

    # ------------------------------------------------------------------ errors and the end

    def backward_failed(self, stage: str) -> Callable[[Ticket, BaseException], None]:
        """For a desk, which calls it on its device stream's thread."""

        def failed(ticket: Ticket, cause: BaseException) -> None:
            error = StageError(
                f"learning from frame {ticket.index} failed at stage {stage!r}: {type(cause).__name__}: {cause}",
                stage=stage,
                frame=ticket.index,
                key=ticket.key,
            )
            error.__cause__ = cause.with_traceback(None)
            try:
                self.loop.call_soon_threadsafe(self._tell, ticket, error)
            except RuntimeError:
                pass  # the loop is closed: nobody is left to tell

        return failed

    def _tell(self, ticket: Ticket, error: AiotimeError) -> None:
        self.failed += 1
        log.error("learning.failed", frame=ticket.index, error=str(error))
        if ticket.late:
            return  # whoever brought the target is told
        told = getattr(ticket.owner, "learning_failed", None)
        if told is not None:
            told(error)

    def abort(self, error: BaseException) -> None:
        """The pipeline ends: gradients that are under way will not arrive."""
        for desk, _ in self.desks:
            desk.abort(error)
        self._over = True
        if self._timer is not None:
            self._timer.cancel()

    def forget(self) -> None:
        """The device streams have ended: nothing is kept for targets that never came."""
        self._late.clear()
        for desk, _ in self.desks:
            desk.forget()

    def quiet(self, flush: Callable[[], None]) -> None:
        """Nothing is in flight: a strict order finishes what it has once that has lasted for ``rule.idle``."""
        idle = self.rule.idle
        if not self.strict or idle is None or self._over:
            return
        self.touched = self.loop.time()
        if self._timer is None:
            self._timer = self.loop.call_later(idle, self._look, flush)

    def _look(self, flush: Callable[[], None]) -> None:
        self._timer = None
        idle = self.rule.idle
        assert idle is not None
        rest = self.touched + idle - self.loop.time()
        if rest > 0:
            self._timer = self.loop.call_later(rest, self._look, flush)
        else:
            flush()

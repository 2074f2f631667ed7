"""Desk: which job of a learning stage comes next. Agenda: the desks of the stages that share a device stream.

    loop ── launch ──▶ [forward lane] ─┐
                                       ├─▶ take() ──▶ the device stream runs it ──▶ next stage's forward lane
    grads[k+1] done ─▶ [backward lane]─┘            └─▶ grads[k] ──▶ backward lane of stage k-1

The loop appends to the forward lane and posts as many tokens to the device stream as there will be jobs; for each
token the stream asks the agenda which job it is, at the moment when it can run it. Everything but `launch`,
`release_late`, `expire` and `abort` is called where the device stream runs its jobs, so nothing here takes a lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from aiotime.devices.base import Bell, DeviceStream, Job, Pending, Work
from aiotime.errors import ClosedError
from aiotime.frame import Frame
from aiotime.learning.order import Order
from aiotime.learning.ticket import Ticket


class Hands(Protocol):
    """What a desk needs of the rule's half of a stage (`aiotime.learning.learner.StageLearner`)."""

    def predict(self, value: Any) -> Any:
        """Forward without learning."""

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """Forward, keeping what the backward will need."""

    def backward(self, ticket: Ticket, message: Any) -> Any:
        """Learn from ``message``; the message for the stage below."""

    def finish(self, ticket: Ticket) -> None:
        """The part of a backward that does not hold up the stage below (``Order.split``)."""

    def drop(self, ticket: Ticket) -> None:
        """Forget what was kept for this frame: there will be no backward."""

    def batch_end(self, frames: int) -> None:
        """A mini-batch of ``frames`` is through (``Order.batch``)."""

    def flush(self) -> None:
        """Every frame so far was learned from, and the stream pauses or ends."""

    def pending_updates(self) -> int:
        """Frames whose gradients are here but not yet in the weights (accumulation)."""

    def adopt(self) -> None:
        """The stage's weights were replaced from outside."""

    def reset(self) -> None:
        """A new engine begins: nothing is in flight."""


class Lost:
    """A message that never came: what the backward would have started from failed, and why."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Agenda:
    """What one device stream asks for its next job; the stages that share the stream have a desk each."""

    __slots__ = ("_waiting", "desks")

    def __init__(self) -> None:
        self.desks: list[Desk] = []
        self._waiting: Bell | None = None

    def take(self, bell: Bell) -> Job | None:
        """The job to run now; None where none can: ``bell`` rings when that may have changed."""
        self._waiting = bell  # before looking: what comes while we look rings
        while True:
            for desk in reversed(self.desks):
                job = desk.due()
                if job is not None:
                    self._waiting = None
                    return job
            for desk in reversed(self.desks):
                job = desk.next_forward()
                if job is not None:
                    self._waiting = None
                    return job
            news = False
            for desk in self.desks:
                news = desk.listen(bell) or news
            if not news:
                return None

    def poke(self) -> None:
        """Something was added or changed; any thread."""
        bell = self._waiting
        if bell is not None:
            bell.ring()


class Desk:
    """The lanes of one stage.

    Args:
        hands: what computes.
        order: in which order.
        stage: its name; index: its position among ``stages``.
        agenda: of the device stream that runs it.
        host_below: the stage below reads gradients on the host.
        failed: told, on the device stream's thread, of an error in a backward.
    """

    def __init__(
        self,
        hands: Hands,
        order: Order,
        *,
        stage: str,
        index: int,
        stages: int,
        agenda: Agenda,
        host_below: bool,
        failed: Callable[[Ticket, BaseException], None],
    ) -> None:
        self.hands = hands
        self.order = order
        self.index = index
        self.top = index == stages - 1
        self.agenda = agenda
        self.delays: dict[int, int] = {}  # how often a frame met which delay
        self._failed = failed
        self._forward: deque[tuple[Pending, Frame, Pending, Callable[[], None] | None]] = deque()
        self._backward: deque[tuple[Ticket, Pending]] = deque()  # with the pending of its forward
        self._kept_late: dict[Ticket, Pending] = {}
        self._released: deque[Ticket] = deque()  # late targets that have come
        self._expired: deque[Ticket] = deque()
        self._owed: Ticket | None = None  # whose weight gradient comes next
        self._lost: BaseException | None = None  # why there is nothing to do in the job taken last
        self._outstanding = 0
        self._in_batch = 0  # forwards of the present mini-batch
        self._learned = 0  # and its backwards
        self._aborted: BaseException | None = None
        self._at: Ticket | None = None  # whose job was taken last
        self._frame: Frame | None = None
        self.works = (
            Work(self._run_forward, stage=stage, index=index, grad=True),
            Work(
                self._run_backward, stage=f"{stage} backward", index=index, host_output=host_below, grad=True,
                phase="backward",
            ),
            Work(
                self._run_finish, stage=f"{stage} weights", index=index, host_output=False, grad=True, phase="weights"
            ),
        )  # fmt: skip
        agenda.desks.append(self)

    # ------------------------------------------------------------------ called on the loop

    def launch(
        self, stream: DeviceStream, frame: Frame, action: Callable[[], None] | None = None, *, last: bool
    ) -> Pending:
        """Add a frame to the forward lane, and its backward to what the stream will run.

        With ``action`` it is a barrier: every earlier frame is learned from, then ``action`` runs, then the lane
        goes on.
        """
        mine = Pending(frame=frame if last else None)
        up, ticket = frame.tail, frame.ticket
        assert up is not None, "a settled frame is never launched"
        jobs = 1
        if action is None and ticket.learn and not ticket.late:
            jobs += self._backward_jobs()
        self._forward.append((up, frame, mine, action))
        if not stream.post(self.agenda, jobs):
            self._forward.pop()
            mine.error, mine.done = ClosedError(f"device stream {stream.name} is closed"), True
        return mine

    def _backward_jobs(self) -> int:
        return 2 if self.order.split else 1

    def release_late(self, stream: DeviceStream, ticket: Ticket) -> None:
        """The target of a late frame is here: learn from it as soon as its gradient arrives."""
        self._released.append(ticket)
        stream.post(self.agenda, self._backward_jobs())

    def expire(self, ticket: Ticket) -> None:
        """The target of a late frame will not be taken any more."""
        self._expired.append(ticket)

    def abort(self, error: BaseException) -> None:
        """Wait for no gradient any more: the pipeline ends."""
        self._aborted = error
        self.agenda.poke()

    # ------------------------------------------------------------------ called by the agenda

    def due(self) -> Job | None:
        """A job that goes before any forward: a weight gradient owed, a backward whose turn it is and that is ready."""
        while self._expired:
            gone = self._expired.popleft()
            if self._kept_late.pop(gone, None) is not None:
                self.hands.drop(gone)
        owed = self._owed
        if owed is not None:
            self._owed = None
            self._at = owed
            assert owed.shadow is not None
            return self.works[2], Pending(done=True), owed.shadow, Pending(), None
        if self._released:
            ticket = self._released[0]
            up = self._message(ticket)
            if self._aborted is not None and ticket not in self._kept_late:  # it never came as far as here
                self._kept_late[ticket] = up = _failed_with(self._aborted)
            if up is not None and ticket in self._kept_late:
                self._released.popleft()
                return self._take_backward(ticket, self._kept_late.pop(ticket), up)
        if self._backward and self._wants_backward():
            ticket, forward = self._backward[0]
            if (up := self._message(ticket)) is not None:
                self._backward.popleft()
                self._outstanding -= 1
                self._learned += 1
                return self._take_backward(ticket, forward, up)
        return None

    def next_forward(self) -> Job | None:
        """The head of the forward lane, if its turn has come and it is ready."""
        if not self._forward:
            return None
        up, frame, mine, action = self._forward[0]
        if not up.done:
            return None
        if action is not None:
            if self._outstanding or self._released:
                return None
            self._forward.popleft()
            return self.works[0], up, frame, mine, self._barrier(action)
        ticket: Ticket = frame.ticket
        counted = ticket.learn and not ticket.late
        if (counted or self.order.strict) and not self._wants_forward():
            return None
        self._forward.popleft()
        self._at, self._frame = ticket, frame
        lacking = self._outstanding + self.hands.pending_updates()
        ticket.delays[self.index] = lacking
        self.delays[lacking] = self.delays.get(lacking, 0) + 1
        if counted:
            self._outstanding += 1
            self._in_batch += 1
            self._backward.append((ticket, mine))
        elif ticket.learn:
            self._kept_late[ticket] = mine
        return self.works[0], up, frame, mine, None

    def listen(self, bell: Bell) -> bool:
        """Have ``bell`` rung by whatever we wait for; True where something came meanwhile."""
        awaited = []
        if self._backward and not self.top:
            awaited.append(self._backward[0][0].grads[self.index + 1])
        if self._released and not self.top:
            awaited.append(self._released[0].grads[self.index + 1])
        if self._forward:
            awaited.append(self._forward[0][0])
        news = False
        for pending in awaited:
            if not pending.done and pending.bell is not bell:
                pending.bell = bell
                news = news or pending.done  # it may have been settled before it could see the bell
        return news

    # ------------------------------------------------------------------ the rules of order

    def _wants_forward(self) -> bool:
        batch = self.order.batch
        return self._outstanding <= self.order.ahead and (batch is None or self._in_batch < batch)

    def _wants_backward(self) -> bool:
        if not self.order.strict or self._aborted is not None:
            return True
        if self._forward and self._forward[0][3] is not None:
            return True  # a barrier: no further forward comes before it
        return not self._wants_forward()

    def _message(self, ticket: Ticket) -> Pending | None:
        """What the backward of ``ticket`` starts from, once it is there."""
        if self.top:
            return Pending(done=True)
        up = ticket.grads[self.index + 1]
        if up.done:
            return up
        return None if self._aborted is None else _failed_with(self._aborted)

    def _take_backward(self, ticket: Ticket, forward: Pending, up: Pending) -> Job:
        """A backward that has lost its forward or its message still runs: it passes that on and keeps the counts."""
        self._at = ticket
        if self.order.split:
            self._owed = ticket
        self._lost = forward.error or up.error
        if self._lost is not None:
            up = Pending(done=True)
        assert ticket.shadow is not None
        return self.works[1], up, ticket.shadow, ticket.grads[self.index], None

    def _barrier(self, action: Callable[[], None]) -> Callable[[], None]:
        def act() -> None:
            self._close_batch()
            self.hands.flush()
            action()

        return act

    def _close_batch(self) -> None:
        if self.order.batch is not None and self._learned:
            self.hands.batch_end(self._learned)
        self._in_batch = self._learned = 0

    # ------------------------------------------------------------------ the jobs

    def _run_forward(self, value: Any) -> Any:
        ticket = self._at
        assert ticket is not None
        if not ticket.learn:
            return self.hands.predict(value)
        return self.hands.forward(ticket, value)

    def _run_backward(self, message: Any) -> Any:
        ticket = self._at
        assert ticket is not None
        if isinstance(message, Lost):
            self._lost = message.error
        try:
            if self._lost is None:
                result = self.hands.backward(ticket, message)
            else:
                self.hands.drop(ticket)
                result = Lost(self._lost)
            if self.order.batch is not None and self._learned == self.order.batch:
                self._close_batch()
            return result
        except BaseException as error:
            self._lost = error
            self._failed(ticket, error)
            raise

    def _run_finish(self, _: Any) -> None:
        ticket = self._at
        assert ticket is not None
        lost, self._lost = self._lost, None
        if lost is not None:
            return
        try:
            self.hands.finish(ticket)
        except BaseException as error:
            self._failed(ticket, error)
            raise


def _failed_with(error: BaseException) -> Pending:
    pending = Pending(done=True)
    pending.error = error
    return pending

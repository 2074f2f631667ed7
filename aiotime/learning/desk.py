"""Desk: which job of a learning stage comes next. Agenda: the desks of the stages that share a device stream.

    loop ── launch ──▶ [forward lane] ─┐
                                       ├─▶ take() ──▶ the device stream runs it ──▶ next stage's forward lane
    grads[k+1] done ─▶ [backward lane]─┘            └─▶ grads[k] ──▶ backward lane of stage k-1

The loop appends to the forward lane and posts as many tokens to the device stream as there will be jobs; for each
token the stream asks the agenda which job it is, at the moment when it can run it. Everything but `launch`,
`release_late`, `expire` and `abort` is called where the device stream runs its jobs, so nothing here takes a lock.

Longer than most modules: which job may come next is one decision over all lanes, made in one place.
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

    learns: bool  # False: it only computes, and nothing comes back to it
    learned: int  # frames learned from
    unformed: bool  # has no loss of its own yet: it takes the model's output of a first frame to make one

    def predict(self, value: Any) -> Any:
        """Forward without learning."""

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """Forward, keeping what the backward will need."""

    def backward(self, ticket: Ticket, message: Any) -> Any:
        """Learn from ``message``; the message for the stage below."""

    def relay(self, ticket: Ticket, loss: int, message: Any) -> Any:
        """Take the gradient of another stage's loss (or begin that of the own) one stage further down."""

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


class Echo:
    """A message from above about an earlier frame, for which that frame's own backward did not wait (`Order.echo`)."""

    __slots__ = ("message", "ticket")

    def __init__(self, ticket: Ticket, message: Any) -> None:
        self.ticket = ticket
        self.message = message


class Agenda:
    """What one device stream asks for its next job; the stages that share the stream have a desk each."""

    __slots__ = ("_waiting", "desks")

    def __init__(self) -> None:
        self.desks: list[Desk] = []
        self._waiting: Bell | None = None

    def take(self, bell: Bell) -> Job | None:
        """The job to run now; None where none can: ``bell`` rings when that may have changed."""
        self._waiting = bell  # before looking: what comes while we look rings
        job = self._look()
        if job is None:
            for desk in self.desks:
                desk.listen(bell)
            job = self._look()  # once more: what was settled before it could see the bell rang nobody
        if job is not None:
            self._waiting = None
        return job

    def _look(self) -> Job | None:
        for desk in reversed(self.desks):
            job = desk.due()
            if job is not None:
                return job
        for desk in reversed(self.desks):
            job = desk.next_forward()
            if job is not None:
                return job
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
        self._relays: dict[int, deque[tuple[Ticket, Pending]]] = {loss: deque() for loss in order.relays}
        self._relayed = index  # whose loss the relay taken last is of
        self._released: deque[Ticket] = deque()  # late targets that have come
        self._expired: deque[Ticket] = deque()
        self._owed: Ticket | None = None  # whose weight gradient comes next
        self._unheard: deque[Ticket] = deque()  # learned from before the message from above had come (`Order.echo`)
        self._heard: Ticket | None = None  # whose message goes with the backward taken last
        self._lost: BaseException | None = None  # why there is nothing to do in the job taken last
        self._outstanding = 0
        self._back = False  # the newest forward or backward was a backward
        self._in_batch = 0  # forwards of the present mini-batch
        self._learned = 0  # and its backwards
        self._closer: Ticket | None = None  # the newest of a mini-batch: what fails at its end is told as its error
        self._aborted: BaseException | None = None
        self._at: Ticket | None = None  # whose job was taken last
        self.works: tuple[Work, ...] = (
            Work(self._run_forward, stage=stage, index=index, grad=True),
            Work(
                self._run_backward, stage=f"{stage} backward", index=index, host_output=host_below, grad=True,
                phase="backward",
            ),
            Work(
                self._run_finish, stage=f"{stage} weights", index=index, host_output=False, grad=True, phase="weights"
            ),
        )  # fmt: skip
        if order.relays:
            relay = Work(
                self._run_relay, stage=f"{stage} relay", index=index, host_output=host_below, grad=True,
                phase="backward",
            )  # fmt: skip
            self.works = (*self.works, relay)
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
        if action is None and self.hands.learns and ticket.learn and not ticket.late:
            jobs += self._backward_jobs()
        self._forward.append((up, frame, mine, action))
        if not stream.post(self.agenda, jobs):
            self._forward.pop()
            mine.error, mine.done = ClosedError(f"device stream {stream.name} is closed"), True
        return mine

    def _backward_jobs(self) -> int:
        return (2 if self.order.split else 1) + len(self.order.relays)

    def release_late(self, stream: DeviceStream, ticket: Ticket) -> bool:
        """The target of a late frame is here: learn from it as soon as its gradient arrives. False: it is all over."""
        self._released.append(ticket)
        posted = stream.post(self.agenda, self._backward_jobs())
        stream.ring()  # a worker that sleeps for want of jobs has no bell at the agenda
        return posted

    def expire(self, ticket: Ticket) -> None:
        """The target of a late frame will not be taken any more."""
        self._expired.append(ticket)

    def abort(self, error: BaseException) -> None:
        """Wait for no gradient any more: the pipeline ends."""
        self._aborted = error
        self.agenda.poke()

    def forget(self) -> None:
        """The device stream has ended: let go of what was kept for targets that never came."""
        for ticket in self._kept_late:
            self.hands.drop(ticket)
        self._kept_late.clear()

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
        if self._batch_is_full():  # its last job was never run: the device is lost
            self._in_batch = self._learned = 0
        # a frame's relays are over before its backward is due: the gradient of a nearer loss comes first
        for loss, lane in self._relays.items():
            if lane and (up := self._arrived(self._relay_source(lane[0][0], loss))) is not None:
                return self._take_relay(*lane.popleft(), loss, up)
        for at in range(len(self._released)):  # by position, as the loop may append meanwhile
            ticket = self._released[at]
            kept = self._kept_late.get(ticket)
            if kept is None and self._aborted is not None:
                kept = _failed_with(self._aborted)  # it never came as far as here
            if kept is not None and (up := self._message(ticket)) is not None:
                del self._released[at]
                self._kept_late.pop(ticket, None)
                return self._take_backward(ticket, kept, up)
        if self._backward and self._wants_backward():
            ticket, forward = self._backward[0]
            if (up := self._message(ticket)) is not None:
                self._backward.popleft()
                self._outstanding -= 1
                self._learned += 1
                if self.order.batch is not None:
                    self._closer = ticket
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
            if self._outstanding or self._owes_late():
                return None
            self._forward.popleft()
            return self.works[0], up, frame, mine, self._barrier(action)
        ticket: Ticket = frame.ticket
        counted = self._counts(ticket)
        if (counted or self.order.strict) and not self._wants_forward():
            return None
        self._forward.popleft()
        self._back = False
        self._at = ticket
        lacking = self._lacking(ticket)
        ticket.delays[self.index] = lacking
        self.delays[lacking] = self.delays.get(lacking, 0) + 1
        if counted:
            self._outstanding += 1
            self._in_batch += 1
            self._backward.append((ticket, mine))
            for lane in self._relays.values():
                lane.append((ticket, mine))
        elif self.hands.learns and ticket.learn and not ticket.expired:  # it may have been given up on its way here
            self._kept_late[ticket] = mine
        return self.works[0], up, frame, mine, None

    def listen(self, bell: Bell) -> None:
        """Have ``bell`` rung by whatever we wait for."""
        awaited = []
        if self._backward and (up := self._source(self._backward[0][0])) is not None:
            awaited.append(up)
        waiting = [self._released[at] for at in range(len(self._released))]  # by position, as the loop may append
        awaited += [up for ticket in waiting if (up := self._source(ticket)) is not None]
        for loss, lane in self._relays.items():
            if lane and (up := self._relay_source(lane[0][0], loss)) is not None:
                awaited.append(up)
        if self._forward:
            awaited.append(self._forward[0][0])
        for pending in awaited:
            if not pending.done:
                pending.bell = bell

    # ------------------------------------------------------------------ the rules of order

    def _lacking(self, ticket: Ticket) -> int:
        """Earlier frames whose updates the present weights lack."""
        return self._outstanding + self.hands.pending_updates()

    def _counts(self, ticket: Ticket) -> bool:
        """Will its gradient be waited for?"""
        return self.hands.learns and ticket.learn and not ticket.late

    def _may_forward(self) -> bool:
        """Is there a frame that could go forward now?"""
        if not self._forward:
            return False
        up, frame, _, action = self._forward[0]
        return action is None and up.done and (not self._counts(frame.ticket) or self._wants_forward())

    def _gradients_pile_up(self) -> bool:
        """Are those of the two oldest frames there?"""
        if len(self._backward) < 2:
            return False
        up = self._source(self._backward[1][0])
        return up is None or up.done

    def _wants_forward(self) -> bool:
        batch, ahead = self.order.batch, self.order.ahead
        if self.order.after is not None:
            ahead = self.order.ahead_at(self.hands.learned + self._outstanding)
        return self._outstanding <= ahead and (batch is None or self._in_batch < batch)

    def _wants_backward(self) -> bool:
        if self._aborted is not None:
            return True
        if not self.order.strict:
            # two in a row starve the stages above of frames, and soon this one of gradients; unless those pile up
            return not (self._back and self._may_forward()) or self._gradients_pile_up()
        if self._forward and self._forward[0][3] is not None:
            return True  # a barrier: no further forward comes before it
        return not self._wants_forward()

    def _message(self, ticket: Ticket) -> Pending | None:
        """What the backward of ``ticket`` starts from, once it is there."""
        up = self._source(ticket)
        return self._echo(up) if self.order.echo and up is not None else self._arrived(up)

    def _source(self, ticket: Ticket) -> Pending | None:
        """Where the gradient for the backward of ``ticket`` comes from; None: from a loss of this stage."""
        reach = self.order.reach
        if self.order.echo and not self.top:
            return self._unheard[0].grads[self.index + 1] if self._unheard else None
        if self.top or (reach == 0 and not self.hands.unformed):
            return None
        return ticket.relayed(self.index + 1, self.index + reach) if reach else ticket.grads[self.index + 1]

    def _relay_source(self, ticket: Ticket, loss: int) -> Pending | None:
        return None if loss == self.index else ticket.relayed(self.index + 1, loss)

    def _arrived(self, up: Pending | None) -> Pending | None:
        if up is None:
            return Pending(done=True)
        if up.done:
            return up
        return None if self._aborted is None else _failed_with(self._aborted)

    def _echo(self, up: Pending) -> Pending | None:
        """The message about an earlier frame, where it has come; a backward can do without."""
        if not up.done:
            return None if self.order.strict and self._aborted is None else Pending(done=True)
        heard = self._unheard.popleft()
        if up.error is not None:
            self.hands.drop(heard)
            return Pending(done=True)
        self._heard = heard
        return up

    def _take_backward(self, ticket: Ticket, forward: Pending, up: Pending) -> Job:
        """A backward that has lost its forward or its message still runs: it passes that on and keeps the counts."""
        self._at = ticket
        self._back = True
        if self.order.split:
            self._owed = ticket
        self._lost = forward.error or up.error
        if self._lost is not None:
            up = Pending(done=True)
            if self._heard is not None:  # for the next one, then
                self._unheard.appendleft(self._heard)
                self._heard = None
        elif self.order.echo and not self.top:
            self._unheard.append(ticket)
        assert ticket.shadow is not None
        return self.works[1], up, ticket.shadow, ticket.grads[self.index], None

    def _take_relay(self, ticket: Ticket, forward: Pending, loss: int, up: Pending) -> Job:
        self._at, self._relayed = ticket, loss
        self._lost = forward.error or up.error
        if self._lost is not None:
            up = Pending(done=True)
        assert ticket.shadow is not None
        return self.works[3], up, ticket.shadow, ticket.relayed(self.index, loss), None

    def _owes_late(self) -> bool:
        """Has a late frame its target by now that went forward before what is the head of the lane?"""
        return any(self._released[at] in self._kept_late for at in range(len(self._released)))

    def _barrier(self, action: Callable[[], None]) -> Callable[[], None]:
        def act() -> None:
            try:
                self._close_batch()
            except Exception as error:  # noqa: BLE001 - told; the barrier itself did not fail
                assert self._closer is not None, "there was a mini-batch"
                self._failed(self._closer, error)
            self._unheard.clear()
            self.hands.flush()
            action()

        return act

    def _batch_is_full(self) -> bool:
        return self.order.batch is not None and self._learned == self.order.batch

    def _close_batch(self) -> None:
        frames, self._in_batch, self._learned = self._learned, 0, 0
        if self.order.batch is not None and frames and self._aborted is None:  # else some of its gradients are missing
            self.hands.batch_end(frames)

    # ------------------------------------------------------------------ the jobs

    def _run_forward(self, value: Any) -> Any:
        ticket, self._at = self._at, None
        assert ticket is not None
        if not ticket.learn or ticket.expired:
            return self.hands.predict(value)
        return self.hands.forward(ticket, value)

    def _run_backward(self, message: Any) -> Any:
        ticket, self._at = self._at, None
        assert ticket is not None
        heard, self._heard = self._heard, None
        if heard is not None and isinstance(message, Lost):
            self.hands.drop(heard)
            message = None
        elif heard is not None:
            message = Echo(heard, message)
        elif isinstance(message, Lost):
            self._lost = message.error
        try:
            try:
                if self._lost is None:
                    return self.hands.backward(ticket, message)
                self.hands.drop(ticket)
                return Lost(self._lost)
            finally:  # a mini-batch ends with its last frame, whatever became of that
                if self._batch_is_full() and not self.order.split:
                    self._close_batch()
        except BaseException as error:
            self._lost = error
            self.hands.drop(ticket)
            self._failed(ticket, error)
            raise

    def _run_relay(self, message: Any) -> Any:
        ticket, lost, self._at = self._at, self._lost, None
        assert ticket is not None
        if isinstance(message, Lost):
            lost = message.error
        if lost is not None:
            return Lost(lost)
        try:
            return self.hands.relay(ticket, self._relayed, message)
        except BaseException as error:
            self._failed(ticket, error)
            raise

    def _run_finish(self, _: Any) -> None:
        ticket, self._at = self._at, None
        assert ticket is not None
        lost, self._lost = self._lost, None
        try:
            try:
                if lost is None:
                    self.hands.finish(ticket)
            finally:
                if self._batch_is_full():
                    self._close_batch()
        except BaseException as error:
            self._failed(ticket, error)
            raise


def _failed_with(error: BaseException) -> Pending:
    pending = Pending(done=True)
    pending.error = error
    return pending

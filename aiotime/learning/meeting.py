"""Meeting desk: an update that waits for others: for the whole model's gradient norm, or for a stage's replica.

    backward, backward, …, the one that closes the update ─▶ offer ─▶ agreed? ─▶ update ─▶ next forward
                                                                      ▲
                              other stages (aiotime.learning.norm), the other replica (aiotime.learning.chimera)

The update is a job of its own (``phase="weights"``). Nothing else of this stage runs between the closing backward and
the update; other desks of the device stream go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from aiotime.devices.base import Bell, DeviceStream, Job, Pending
from aiotime.frame import Frame
from aiotime.learning.desk import Desk, Hands, Lost
from aiotime.learning.ticket import Ticket


class MeetingHands(Hands, Protocol):
    """What this desk needs beyond `Hands`."""

    def offer(self) -> None:
        """The gradients of an update are all gathered here: show them to whoever waits for them."""

    def agreement(self, ticket: Ticket | None) -> tuple[Pending, Pending]:
        """(what the update that ``ticket`` closes waits for, what its end settles); None: no frame was learned from."""

    def discard(self) -> None:
        """Forget what was gathered: there will be no agreement."""


class MeetingDesk(Desk):
    """A desk for ``Order(meet=True)``; arguments as for `Desk`."""

    hands: MeetingHands

    def __init__(self, hands: MeetingHands, *args: Any, **settings: Any) -> None:
        super().__init__(hands, *args, **settings)
        self._settling: Frame | None = None  # of the job that comes next: the update, or nothing yet
        self._newest: Ticket | None = None  # learned from last
        self._blank: Frame | None = None  # a barrier found nothing to settle: the job meant for that is empty
        self._ended = False  # a barrier has cut the present mini-batch short

    def launch(
        self, stream: DeviceStream, frame: Frame, action: Callable[[], None] | None = None, *, last: bool
    ) -> Pending:
        """As `Desk.launch`; a barrier is preceded by the end of an unfinished mini-batch and its update."""
        if action is not None:
            stream.post(self.agenda, 2)
        return super().launch(stream, frame, action, last=last)

    def _backward_jobs(self) -> int:
        return super()._backward_jobs() + 1

    # ------------------------------------------------------------------ called by the agenda

    def due(self) -> Job | None:
        """The update comes before anything else of this stage."""
        if self._blank is not None:
            frame, self._blank = self._blank, None
            return self._empty(frame)
        if self._settling is not None:
            return self._settle(self._settling)
        return super().due()

    def next_forward(self) -> Job | None:
        """Nothing passes an update; a barrier ends the mini-batch first."""
        if self._settling is not None or self._blank is not None:
            return None
        if self._forward and not self._ended and not self._outstanding and not self._released:
            _, frame, _, action = self._forward[0]
            if action is not None:
                self._ended = True
                return self._end_early(frame)
        job = super().next_forward()
        if job is not None and job[4] is not None:
            self._ended = False
        return job

    def listen(self, bell: Bell) -> None:
        """Listens for the agreement as well."""
        super().listen(bell)
        if self._settling is not None and self._closes():
            up, _ = self.hands.agreement(self._newest)
            if not up.done:
                up.bell = bell

    # ------------------------------------------------------------------ the update

    def _closes(self) -> bool:
        return self.order.batch is None or self._ended or self._learned == self.order.batch

    def _settle(self, frame: Frame) -> Job | None:
        if not self._closes():
            self._settling = None
            return self._empty(frame)
        up, mine = self.hands.agreement(self._newest)
        if not up.done and self._aborted is None:
            return None
        self._settling = None
        self._at = self._newest
        self._lost = self._aborted if not up.done else up.value.error if isinstance(up.value, Lost) else up.error
        return self.works[2], up if self._lost is None else Pending(done=True), frame, mine, None

    def _end_early(self, frame: Frame) -> Job:
        """Before a barrier: what there is of a mini-batch is offered (a job), then settled (another)."""
        if self._unfinished():
            self._settling = frame
            return self.works[0], Pending(done=True), frame, Pending(), self.hands.offer
        self._blank = frame
        return self._empty(frame)

    def _unfinished(self) -> bool:
        """Does the barrier at hand cut a mini-batch short?"""
        return self._learned > 0 and self.order.batch is not None

    def _empty(self, frame: Frame) -> Job:
        return self.works[2], Pending(done=True), frame, Pending(), _nothing

    def _take_backward(self, ticket: Ticket, forward: Pending, up: Pending) -> Job:
        self._settling, self._newest = ticket.shadow, ticket
        return super()._take_backward(ticket, forward, up)

    def _close_batch(self) -> None:
        if self._learned and self._learned == self.order.batch:
            self.hands.offer()

    def _run_finish(self, _: Any) -> Any:
        ticket = self._newest
        lost, self._lost = self._lost, None
        frames, self._in_batch, self._learned = self._learned, 0, 0
        try:
            if lost is not None:
                self.hands.discard()
                return Lost(lost)
            if self.order.batch is not None:
                self.hands.batch_end(frames)
            elif ticket is not None:
                self.hands.finish(ticket)
        except BaseException as error:
            if ticket is not None:
                self._failed(ticket, error)
            raise
        return None


def _nothing() -> None:
    pass

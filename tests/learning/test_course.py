"""Course: which frames are learned from, which wait for a target and for how long, who is told of an error, quiet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional

from aiotime.devices.base import Pending
from aiotime.errors import FeedbackError, InputError, StageError
from aiotime.frame import LATER, Frame
from aiotime.learning import Delayed
from aiotime.learning.course import Barrier, Course
from aiotime.learning.desk import Lost
from aiotime.learning.order import Order
from aiotime.learning.rule import Rule
from aiotime.learning.ticket import Ticket

SGD = partial(torch.optim.SGD, lr=0.1)


class Owner:
    """A run, as far as learning knows it."""

    def __init__(self) -> None:
        self.told: list[BaseException] = []

    def settled(self, frame: Frame) -> None: ...

    def learning_failed(self, error: BaseException) -> None:
        self.told.append(error)


class FakeDesk:
    """Notes what it is told."""

    def __init__(self, index: int, *, strict: bool = False, open: bool = True) -> None:
        self.index, self.order, self.open = index, Order(strict=strict), open
        self.expired: list[int] = []
        self.released: list[int] = []
        self.aborted: BaseException | None = None
        self.forgotten = False

    def expire(self, ticket: Ticket) -> None:
        self.expired.append(ticket.index)

    def release_late(self, stream: Any, ticket: Ticket) -> bool:
        self.released.append(ticket.index)
        return self.open

    def abort(self, error: BaseException) -> None:
        self.aborted = error

    def forget(self) -> None:
        self.forgotten = True


def made(rule: Rule, *desks: FakeDesk) -> Course:
    course = Course(rule, max(len(desks), 2), asyncio.get_running_loop())
    for desk in desks or (FakeDesk(0), FakeDesk(1)):
        course.add(desk, None)  # type: ignore[arg-type]
    return course


def rule(loss: Any = functional.mse_loss, **settings: Any) -> Delayed:
    return Delayed(loss=loss, optimizer=SGD, **settings)


def frame(index: int = 0, target: Any = None, key: Any = None) -> Frame:
    made = Frame(Owner(), index, Pending(torch.ones(1), done=True), 0.0)
    made.target, made.key = target, key
    return made


@pytest.mark.asyncio
async def test_who_is_learned_from() -> None:
    """Frames with a target now or later; all of them where the loss wants none."""
    course, alone = made(rule()), made(rule(lambda output: output.sum()))
    for of, target, learn, late in [
        (course, torch.zeros(1), True, False),
        (course, None, False, False),
        (course, LATER, True, True),
        (alone, None, True, False),
    ]:
        each = frame(3, target, key="k")
        of.enrol(each)
        ticket = each.ticket
        assert (ticket.learn, ticket.late) == (learn, late)
        assert (ticket.index, ticket.key, ticket.owner) == (3, "k", each.owner)
        assert ticket.target is (None if late else target)
        assert len(ticket.grads) == (3 if learn else 0)
        assert ticket.raw is None


@pytest.mark.asyncio
async def test_late_targets_need_a_key_and_an_order_that_takes_them() -> None:
    """Refused at the door otherwise, saying what to do."""
    with pytest.raises(InputError, match="found by its key"):
        made(rule()).enrol(frame(0, LATER))
    with pytest.raises(InputError, match=r'takes no late targets in this order; use Delayed\(order="event"\)'):
        made(rule(order="1f1b")).enrol(frame(0, LATER, key="k"))


@pytest.mark.asyncio
async def test_scenes_are_counted() -> None:
    """A cut begins the next one; the frame that brings it belongs to that."""
    course = made(rule())
    scenes = []
    for cut in (False, True, False, True):
        each = frame(0, torch.zeros(1))
        course.enrol(each, cut=cut)
        scenes.append(each.ticket.scene)
    assert scenes == [0, 1, 1, 2]


@pytest.mark.asyncio
async def test_the_oldest_expectations_are_given_up() -> None:
    """Beyond ``late`` frames, and where a key comes again: every stage is told to forget the graph."""
    desk = FakeDesk(0)
    course = made(rule(late=2), desk)
    frames = [frame(i, LATER, key=key) for i, key in enumerate("abcb")]
    for each in frames:
        course.enrol(each)
        course.expect(each.ticket)
    assert desk.expired == [0, 1]
    assert [each.ticket.expired for each in frames] == [True, True, False, False]
    with pytest.raises(FeedbackError, match=r"no frame with key 'a'.*given up after 2 newer ones"):
        await course.feedback("a", torch.zeros(1))


@pytest.mark.asyncio
async def test_feedback_waits_for_every_stage(settle: Any) -> None:
    """It releases the frame everywhere, and returns the loss when the last gradient is there; a second is refused."""
    desks = [FakeDesk(0), FakeDesk(1)]
    course = made(rule(), *desks)
    each = frame(5, LATER, key="k")
    course.enrol(each)
    course.expect(each.ticket)
    waiting = asyncio.ensure_future(course.feedback("k", torch.zeros(1)))
    await settle()
    assert [desk.released for desk in desks] == [[5], [5]]
    ticket = each.ticket
    ticket.loss = torch.tensor(2.5)
    for pending in reversed(ticket.grads[:2]):
        assert not waiting.done()
        pending.done = True
        if pending.waiter is not None:
            pending.waiter.set_result(None)
        await settle()
    assert await waiting == 2.5
    with pytest.raises(FeedbackError, match="had its target already"):
        await course.feedback("k", torch.zeros(1))


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["lost", "error", "over"])
async def test_feedback_that_cannot_be_learned_from(how: str) -> None:
    """The forward had failed, the backward failed, or the streams have ended: an error, never a wait."""
    course = made(rule(), FakeDesk(0, open=how != "over"))
    each = frame(5, LATER, key="k")
    course.enrol(each)
    course.expect(each.ticket)
    first = each.ticket.grads[0]
    if how == "lost":
        first.value, first.done = Lost(ValueError("the reason")), True
    elif how == "error":
        first.error, first.done = ValueError("the reason"), True
    reason = "pipeline has ended" if how == "over" else "could not be learned.*the reason"
    with pytest.raises(FeedbackError, match=reason):
        async with asyncio.timeout(5):
            await course.feedback("k", torch.zeros(1))


@pytest.mark.asyncio
async def test_errors_are_told_to_whoever_sent_the_frame(settle: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With stage, frame, key and cause, on the loop; an owner that cannot be told is no reason to fail."""
    course = made(rule())
    each = frame(7, torch.zeros(1), key="k")
    course.enrol(each)
    failed = course.backward_failed("mid")
    await asyncio.to_thread(failed, each.ticket, ValueError("no"))
    await settle(until=lambda: course.failed == 1)
    (error,) = each.owner.told  # type: ignore[attr-defined]
    assert isinstance(error, StageError)
    assert (error.stage, error.frame, error.key) == ("mid", 7, "k")
    assert isinstance(error.__cause__, ValueError) and error.__cause__.__traceback__ is None
    each.ticket.owner = object()
    failed(each.ticket, ValueError("again"))
    await settle(until=lambda: course.failed == 2)


def test_an_error_after_the_loop_has_gone_is_nobodys() -> None:
    """A device's thread may be the last to know."""
    loop = asyncio.new_event_loop()
    course = Course(rule(), 1, loop)
    loop.close()
    course.backward_failed("s")(Ticket(0, 1, learn=True), ValueError("no"))
    assert course.failed == 0


@pytest.mark.asyncio
async def test_quiet_is_for_strict_orders_with_an_idle_time() -> None:
    """One timer for many frames; none where nothing is held back, nobody wants it, or all is over."""

    def flush() -> Iterator[None]:
        raise AssertionError("not in this test")

    for of, timed in [
        (made(rule(order="1f1b"), FakeDesk(0, strict=True)), True),
        (made(rule(order="1f1b", idle=None), FakeDesk(0, strict=True)), False),
        (made(rule()), False),
    ]:
        of.quiet(flush)  # type: ignore[arg-type]
        timer = of._timer
        assert (timer is not None) is timed
        of.quiet(flush)  # type: ignore[arg-type]
        assert of._timer is timer
        of.abort(ValueError("the end"))
        assert timer is None or timer.cancelled()
        of._timer = None
        of.quiet(flush)  # type: ignore[arg-type]
        assert of._timer is None


@pytest.mark.asyncio
async def test_the_end_reaches_every_stage() -> None:
    """Abort and forget go to all desks; expectations are gone."""
    desks = [FakeDesk(0), FakeDesk(1)]
    course = made(rule(), *desks)
    each = frame(0, LATER, key="k")
    course.enrol(each)
    course.expect(each.ticket)
    error = ValueError("the end")
    course.abort(error)
    course.forget()
    assert all(desk.aborted is error and desk.forgotten for desk in desks)
    with pytest.raises(FeedbackError):
        await course.feedback("k", None)


@pytest.mark.asyncio
async def test_a_barrier_tells_once_that_it_is_through() -> None:
    """Also where the pipeline ended under way, and where nobody waits any more."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    barrier = Barrier(done)
    barrier.apply(0)
    assert not done.done()
    barrier.settled(frame())
    barrier.settled(frame())
    assert done.done()
    Barrier().settled(frame())

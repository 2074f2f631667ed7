"""Which calls run as one, in which order, and how many may wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotime.dynamic.inbox import PASSED_OVER, Inbox


class Waiting:
    """As much of a call as an inbox looks at."""

    def __init__(self, signature: Any, asked: float, future: Any) -> None:
        self.signature, self.asked, self.future = signature, asked, future


class Open:
    """A future that nobody has settled."""

    def __init__(self) -> None:
        self.settled = False

    def done(self) -> bool:
        return self.settled


def call(signature: Any, asked: float = 0.0) -> Any:
    return Waiting(signature, asked, Open())


def test_the_largest_group_first() -> None:
    """A batch is of one signature, in the order of arrival, and never larger than `most`."""
    inbox = Inbox(100, 3)
    calls = [call("ab"[n % 5 == 0], n) for n in range(10)]
    for each in calls:
        inbox.put(each)
    assert len(inbox) == 10
    assert inbox.largest == 3
    assert inbox.take() == [calls[1], calls[2], calls[3]]
    assert inbox.take() == [calls[4], calls[6], calls[7]]
    assert [each.asked for each in inbox.take()] == [0, 5]
    assert [each.asked for each in inbox.take()] == [8, 9]
    assert inbox.take() == []
    assert len(inbox) == 0


def test_a_rare_shape_is_not_starved() -> None:
    """The oldest call is passed over a stated number of times, and then its group comes first."""
    inbox = Inbox(1000, 4)
    rare = call("rare", 0.0)
    inbox.put(rare)
    now, taken = 1.0, []
    for _ in range(PASSED_OVER + 5):
        for _ in range(8):  # twice as many as one batch takes
            inbox.put(call("common", now))
            now += 1
        taken.append(inbox.take())
        if rare in taken[-1]:
            break
    assert taken[-1] == [rare]
    assert len(taken) == PASSED_OVER + 1


def test_the_bound() -> None:
    """What finds no room waits outside, is counted, and enters in order as room is made."""
    inbox = Inbox(2, 2)
    calls = [call("a", n) for n in range(5)]
    for each in calls:
        inbox.put(each)
    assert (inbox.blocked, inbox.peak, len(inbox)) == (3, 2, 5)
    assert inbox.take() == calls[:2]
    assert (inbox.peak, len(inbox)) == (2, 3)
    assert inbox.take() == calls[2:4]
    assert inbox.take() == calls[4:]
    assert inbox.blocked == 3


def test_withdrawn_calls_are_dropped() -> None:
    """They take no place in a batch, wherever they wait."""
    inbox = Inbox(3, 2)
    calls = [call("a", n) for n in range(6)]
    for each in calls:
        inbox.put(each)
    for at in (0, 1, 4):
        calls[at].future.settled = True
    assert inbox.take() == [calls[2]]  # all others were outside
    assert inbox.take() == [calls[3], calls[5]]
    assert len(inbox) == 0
    assert inbox.oldest is None


def test_the_oldest() -> None:
    """When the call was made that has waited longest."""
    inbox = Inbox(10, 2)
    for at, signature in enumerate("aab"):
        inbox.put(call(signature, float(at)))
    assert inbox.oldest == 0.0
    inbox.take()
    assert inbox.oldest == 2.0


@given(
    events=st.lists(st.one_of(st.integers(0, 3), st.none(), st.just("withdraw")), max_size=60),
    limit=st.integers(1, 9),
    most=st.integers(1, 5),
)
def test_every_call_comes_out_once(events: list[Any], limit: int, most: int) -> None:
    """Whatever order calls are put, withdrawn and taken in: once each, in order within a signature, bounded inside."""
    inbox = Inbox(limit, most)
    put: list[Any] = []
    out: list[Any] = []

    def take() -> list[Any]:
        batch: list[Any] = inbox.take()
        assert len(batch) <= most
        assert len({each.signature for each in batch}) <= 1
        out.extend(batch)
        return batch

    for now, event in enumerate(events):
        if event is None:
            take()
        elif event == "withdraw":
            waiting = [each for each in put if each not in out and not each.future.settled]
            if waiting:
                waiting[now % len(waiting)].future.settled = True
        else:
            put.append(call(event, float(now)))
            inbox.put(put[-1])
        assert inbox._inside <= limit
    while take():
        pass
    assert len(inbox) == 0
    wanted = [each for each in put if not (each.future.settled and each not in out)]
    assert sorted(each.asked for each in out) == [each.asked for each in wanted]
    for signature in range(4):
        times = [each.asked for each in out if each.signature == signature]
        assert times == sorted(times)


@pytest.mark.asyncio
async def test_a_settled_future_counts_as_withdrawn() -> None:
    """Also one with a result."""
    inbox = Inbox(3, 2)
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    waiting: Any = Waiting("a", 0.0, future)
    inbox.put(waiting)
    future.set_result(1)
    assert inbox.take() == []

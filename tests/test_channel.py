"""Tests of aiotime.channel: order, policies, closing, counters, and cancelled waiters."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotime.channel import Channel, Overflow, check_overflow
from aiotime.errors import BrokenError, ClosedError, ConfigurationError, WouldBlock

if TYPE_CHECKING:
    from tests.conftest import Settle


def full(*items: int, overflow: Overflow = "wait") -> Channel[int]:
    channel: Channel[int] = Channel(len(items), overflow=overflow)
    for item in items:
        channel.put_nowait(item)
    return channel


# ---------------------------------------------------------------------------------------------- without waiting


def test_first_in_first_out() -> None:
    """Items come out in the order in which they went in."""
    channel = full(1, 2, 3)
    assert [channel.get_nowait() for _ in range(3)] == [1, 2, 3]


def test_full_and_empty_would_block() -> None:
    """put_nowait into a full channel and get_nowait from an empty one raise WouldBlock and change nothing."""
    channel = full(1)
    with pytest.raises(WouldBlock, match="1 of 1"):
        channel.put_nowait(2)
    assert channel.get_nowait() == 1
    with pytest.raises(WouldBlock):
        channel.get_nowait()


def test_drop_oldest_sheds_the_head() -> None:
    """With drop_oldest a put into a full channel returns the oldest item, shed."""
    channel = full(1, 2, overflow="drop_oldest")
    assert channel.put_nowait(3) == 1
    assert list(channel.items) == [2, 3]
    assert channel.statistics().shed == 1


def test_drop_newest_sheds_what_comes() -> None:
    """With drop_newest a put into a full channel returns the new item itself."""
    channel = full(1, 2, overflow="drop_newest")
    assert channel.put_nowait(3) == 3
    assert list(channel.items) == [1, 2]


def test_latest_holds_one() -> None:
    """With latest the capacity is one item, the newest, whatever was asked for."""
    channel: Channel[int] = Channel(5, overflow="latest")
    assert [channel.put_nowait(i) for i in range(4)] == [None, 0, 1, 2]
    assert channel.get_nowait() == 3


def test_unbounded_never_sheds() -> None:
    """Without a capacity nothing is ever full."""
    channel: Channel[int] = Channel(None, overflow="drop_oldest")
    assert [channel.put_nowait(i) for i in range(1000)] == [None] * 1000
    assert len(channel) == 1000


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_must_be_positive(capacity: int) -> None:
    """A channel that could hold nothing is refused."""
    with pytest.raises(ConfigurationError, match="at least 1"):
        Channel(capacity)


def test_unknown_policy_lists_the_choices() -> None:
    """A misspelt policy is refused with the list of those there are."""
    with pytest.raises(ConfigurationError, match="'wait', 'drop_oldest', 'drop_newest', 'latest'"):
        check_overflow("newest")


# ------------------------------------------------------------------------------------------------------ closing


def test_close_lets_the_rest_out_then_ends() -> None:
    """After close the receiver gets what is left, then ClosedError; senders are refused at once."""
    channel = full(1, 2)
    channel.close()
    assert channel.closed
    with pytest.raises(ClosedError):
        channel.put_nowait(3)
    assert [channel.get_nowait(), channel.get_nowait()] == [1, 2]
    with pytest.raises(ClosedError):
        channel.get_nowait()


def test_close_with_an_error_hands_it_on() -> None:
    """The closer's error is what both sides see at the end; the first close wins."""
    channel = full(1)
    channel.close(KeyError("camera"))
    channel.close(ValueError("later"))
    assert channel.get_nowait() == 1
    with pytest.raises(KeyError, match="camera"):
        channel.get_nowait()
    with pytest.raises(KeyError, match="camera"):
        channel.put_nowait(2)


def test_abort_tells_the_sender_and_returns_what_nobody_takes() -> None:
    """After abort senders get BrokenError, and the caller gets the items that were on their way."""
    channel = full(1, 2)
    assert channel.abort() == [1, 2]
    with pytest.raises(BrokenError, match="receiver"):
        channel.put_nowait(3)
    assert channel.abort() == []


def test_abort_after_close_keeps_the_closing() -> None:
    """A channel that its sender closed is not broken by the receiver's leaving."""
    channel = full(1)
    channel.close()
    assert channel.abort() == [1]
    with pytest.raises(ClosedError):
        channel.put_nowait(2)


@pytest.mark.asyncio
async def test_close_wakes_everybody(settle: Settle) -> None:
    """Senders and receivers that wait are told when the channel closes."""
    putting = asyncio.create_task(full(1).put(2))
    channel = full(1)
    waiting = asyncio.create_task(channel.put(2))
    empty: Channel[int] = Channel(1)
    getting = [asyncio.create_task(empty.get()) for _ in range(3)]
    await settle()
    channel.abort()
    empty.close()
    done = await asyncio.gather(waiting, *getting, return_exceptions=True)
    assert [type(x) for x in done] == [BrokenError, ClosedError, ClosedError, ClosedError]
    assert not putting.done()
    putting.cancel()
    await asyncio.wait([putting])


@pytest.mark.asyncio
async def test_iteration_ends_with_the_channel() -> None:
    """``async for`` takes what is left and ends at a close; an error of the closer is raised."""
    channel = full(1, 2)
    channel.close()
    assert [item async for item in channel] == [1, 2]
    channel = full(1, 2)
    channel.close(KeyError("x"))
    got: list[int] = []
    with pytest.raises(KeyError):
        async for item in channel:
            got.append(item)  # noqa: PERF401 - what came before the error matters
    assert got == [1, 2]


# ------------------------------------------------------------------------------------------------------ waiting


@pytest.mark.asyncio
async def test_put_waits_for_room(settle: Settle) -> None:
    """A put into a full channel ends when an item was taken, not before."""
    channel = full(1)
    put = asyncio.create_task(channel.put(2))
    await settle()
    assert not put.done()
    assert await channel.get() == 1
    assert await put is None
    assert await channel.get() == 2


@pytest.mark.asyncio
async def test_get_waits_for_an_item(settle: Settle) -> None:
    """Receivers are served in the order in which they came."""
    channel: Channel[int] = Channel(1)
    gets = [asyncio.create_task(channel.get()) for _ in range(3)]
    await settle()
    for i in range(3):
        await channel.put(i)
    assert await asyncio.gather(*gets) == [0, 1, 2]


@pytest.mark.asyncio
async def test_a_woken_getter_that_is_cancelled_passes_the_wake_up_on(settle: Settle) -> None:
    """Cancelling the receiver that was just woken loses no item: the next receiver gets it."""
    channel: Channel[int] = Channel(1)
    first, second = asyncio.create_task(channel.get()), asyncio.create_task(channel.get())
    await settle()
    channel.put_nowait(7)  # wakes the first
    first.cancel()
    assert await asyncio.wait_for(second, 5) == 7
    assert first.cancelled()


@pytest.mark.asyncio
async def test_a_woken_putter_that_is_cancelled_passes_the_wake_up_on(settle: Settle) -> None:
    """Cancelling the sender that was just woken leaves its room to the next sender, and its item outside."""
    channel = full(1)
    first, second = asyncio.create_task(channel.put(2)), asyncio.create_task(channel.put(3))
    await settle()
    assert channel.get_nowait() == 1  # wakes the first
    first.cancel()
    await asyncio.wait_for(second, 5)
    assert list(channel.items) == [3]


@pytest.mark.asyncio
async def test_a_cancelled_waiter_leaves_no_trace(settle: Settle) -> None:
    """A receiver cancelled in its sleep is not woken for an item that another could have had."""
    channel: Channel[int] = Channel(2)
    gone = asyncio.create_task(channel.get())
    await settle()
    gone.cancel()
    await asyncio.wait([gone])
    stays = asyncio.create_task(channel.get())
    await settle()
    channel.put_nowait(1)
    assert await asyncio.wait_for(stays, 5) == 1


# ----------------------------------------------------------------------------------------------------- counters


@pytest.mark.asyncio
async def test_counters(settle: Settle) -> None:
    """Puts, gets, shed items, occupancy and the time spent blocked are counted."""
    channel: Channel[int] = Channel(2)
    for i in range(2):
        channel.put_nowait(i)
    blocked = asyncio.create_task(channel.put(2))
    await settle()
    channel.get_nowait()
    await blocked
    stats = channel.statistics()
    assert (stats.puts, stats.gets, stats.shed, stats.occupancy, stats.occupancy_max) == (3, 1, 0, 2, 2)
    assert stats.occupancy_mean == pytest.approx((0 + 1 + 1) / 3)
    assert stats.blocked_on_put > 0.0
    assert stats.blocked_on_get == 0.0


@given(
    overflow=st.sampled_from(["wait", "drop_oldest", "drop_newest", "latest"]),
    capacity=st.integers(1, 4),
    moves=st.lists(st.sampled_from(["put", "get", "abort"]), max_size=40),
)
def test_counters_add_up(overflow: Any, capacity: int, moves: list[str]) -> None:
    """Whatever is done, what went in is what came out, was shed, is inside or was left behind; never over capacity."""
    channel: Channel[int] = Channel(capacity, overflow=overflow)
    offered, got, shed, left = 0, [], 0, 0
    for number, move in enumerate(moves):
        try:
            if move == "put":
                shed += channel.put_nowait(number) is not None
                offered += 1
            elif move == "get":
                got.append(channel.get_nowait())
            else:
                left += len(channel.abort())
        except (WouldBlock, ClosedError, BrokenError):
            pass
        assert len(channel) <= capacity
    stats = channel.statistics()
    assert offered == len(got) + shed + len(channel) + left
    assert (stats.gets, stats.shed, stats.occupancy) == (len(got), shed, len(channel))
    assert got == sorted(got)

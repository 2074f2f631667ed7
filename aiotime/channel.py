"""A bounded channel between two tasks of one loop: what to do when it is full, closing, counters.

    sender ──put──▶ [ oldest … newest ] ──get──▶ receiver
           close(): no more will come; the receiver gets the rest, then the end
           abort(): the receiver is gone; the sender is told

Wake-ups carry no item: whoever is woken looks again, so a cancelled waiter can lose nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

from aiotime.errors import BrokenError, ClosedError, ConfigurationError, WouldBlock

T = TypeVar("T")

Overflow = Literal["wait", "drop_oldest", "drop_newest", "latest"]


def check_overflow(overflow: str) -> None:
    """Raise `ConfigurationError` unless ``overflow`` is a policy."""
    if overflow not in get_args(Overflow):
        choices = ", ".join(map(repr, get_args(Overflow)))
        raise ConfigurationError(f"overflow must be one of {choices}, not {overflow!r}")


@dataclass(frozen=True, slots=True)
class ChannelStats:
    """Counters of one channel. Little ``blocked_on_get`` and much ``blocked_on_put``: the receiver is the slow side.

    ``occupancy_mean`` is the mean number of items that a put found waiting.
    """

    puts: int
    gets: int
    shed: int
    occupancy: int
    occupancy_mean: float
    occupancy_max: int
    blocked_on_put: float  # seconds
    blocked_on_get: float  # seconds


class Channel(Generic[T]):
    """A first-in first-out channel.

    Args:
        capacity: items it holds; None where something else bounds it (a pipeline's credits).
        overflow: what a put into a full channel does: ``"wait"``; ``"drop_oldest"`` or ``"drop_newest"``
            sheds one item; ``"latest"`` holds nothing but the newest item.
    """

    __slots__ = (
        "_blocked_get",
        "_blocked_put",
        "_broken",
        "_closed",
        "_error",
        "_getters",
        "_left",
        "_occupancy_max",
        "_occupancy_sum",
        "_puts",
        "_putters",
        "_shed",
        "capacity",
        "items",
        "overflow",
    )

    def __init__(self, capacity: int | None = None, *, overflow: Overflow = "wait") -> None:
        check_overflow(overflow)
        if capacity is not None and capacity < 1:
            raise ConfigurationError(f"a channel needs a capacity of at least 1, not {capacity}")
        self.capacity = 1 if overflow == "latest" else capacity
        self.overflow = overflow
        self.items: deque[T] = deque()
        self._getters: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._broken = False
        self._puts = 0
        self._shed = 0
        self._left = 0  # items that nobody took before the end
        self._occupancy_sum = 0
        self._occupancy_max = 0
        self._blocked_put = 0.0
        self._blocked_get = 0.0

    def __len__(self) -> int:
        return len(self.items)

    @property
    def closed(self) -> bool:
        """True once `close` or `abort` was called."""
        return self._closed

    def put_nowait(self, item: T) -> T | None:
        """Put without waiting; returns the item that was shed for it (perhaps ``item`` itself), else None.

        Raises:
            WouldBlock: full, and the policy is ``"wait"``.
            ClosedError, BrokenError: the channel was closed, or its receiver is gone.
        """
        if self._closed:
            self._refuse()
        items, shed = self.items, None
        if self.capacity is not None and len(items) >= self.capacity:
            if self.overflow == "wait":
                raise WouldBlock(f"the channel holds {len(items)} of {self.capacity} items")
            self._shed += 1
            if self.overflow == "drop_newest":
                return item
            shed = items.popleft()
        waiting = len(items)
        self._puts += 1
        self._occupancy_sum += waiting
        if waiting >= self._occupancy_max:
            self._occupancy_max = waiting + 1
        items.append(item)
        if self._getters:
            _wake_one(self._getters)
        return shed

    async def put(self, item: T) -> T | None:
        """Put, waiting for room where the policy says so. Cancelled: the item was not put."""
        if self.overflow == "wait" and self.capacity is not None and len(self.items) >= self.capacity:
            start = time.perf_counter()
            try:
                while len(self.items) >= self.capacity and not self._closed:
                    await _sleep_in(self._putters)
            finally:
                self._blocked_put += time.perf_counter() - start
        return self.put_nowait(item)

    def get_nowait(self) -> T:
        """The oldest item; `WouldBlock` when there is none yet, `ClosedError` (or the closer's error) at the end."""
        if self.items:
            item = self.items.popleft()
            if self._putters:
                _wake_one(self._putters)
            return item
        if self._closed:
            self._refuse()
        raise WouldBlock("the channel is empty")

    async def get(self) -> T:
        """The oldest item, waiting for one. Cancelled: no item was taken."""
        if not self.items and not self._closed:
            start = time.perf_counter()
            try:
                while not self.items and not self._closed:
                    await _sleep_in(self._getters)
            finally:
                self._blocked_get += time.perf_counter() - start
        return self.get_nowait()

    def close(self, error: BaseException | None = None) -> None:
        """No more will come: the receiver gets what is left, then ``error`` or `ClosedError`. The first call wins."""
        if not self._closed:
            self._closed, self._error = True, error
            _wake_all(self._getters)
            _wake_all(self._putters)

    def abort(self, error: BaseException | None = None) -> list[T]:
        """The receiver is gone: senders get `BrokenError`; returns the items nobody will take."""
        left = list(self.items)
        self.items.clear()
        self._left += len(left)
        if not self._closed:
            self._broken = True
        self.close(error)
        return left

    def statistics(self) -> ChannelStats:
        """A snapshot of the counters."""
        return ChannelStats(
            puts=self._puts,
            gets=self._puts - len(self.items) - self._left - (self._shed if self.overflow != "drop_newest" else 0),
            shed=self._shed,
            occupancy=len(self.items),
            occupancy_mean=self._occupancy_sum / self._puts if self._puts else 0.0,
            occupancy_max=self._occupancy_max,
            blocked_on_put=self._blocked_put,
            blocked_on_get=self._blocked_get,
        )

    def __aiter__(self) -> Channel[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.get()
        except ClosedError:
            if self._error is None:
                raise StopAsyncIteration from None
            raise

    def _refuse(self) -> None:
        if self._error is not None:
            raise self._error
        if self._broken:
            raise BrokenError("the receiver of this channel is gone")
        raise ClosedError("this channel is closed")


async def _sleep_in(sleepers: deque[asyncio.Future[None]]) -> None:
    """Wait to be woken; a wake-up that meets a cancelled sleeper is passed on."""
    future = asyncio.get_running_loop().create_future()
    sleepers.append(future)
    try:
        await future
    except asyncio.CancelledError:
        if future.done() and not future.cancelled():
            _wake_one(sleepers)
        elif future in sleepers:
            sleepers.remove(future)
        raise


def _wake_one(sleepers: deque[asyncio.Future[None]]) -> None:
    while sleepers:
        future = sleepers.popleft()
        if not future.done():
            future.set_result(None)
            return


def _wake_all(sleepers: deque[asyncio.Future[None]]) -> None:
    while sleepers:
        _wake_one(sleepers)

"""Poller: tells the loop that device events have passed, without blocking it. One per loop for all events.

    watch ── query ──▶ passed: told at once
               │ no
               ├─ waits are short here ──▶ one task: sleep(0), query the heads … ── too long ──┐
               └─ waits are long here ─────────────────────────────────────────────────────────┴▶ waiter thread:
                                                        loop ◀── one wake-up for many ──────────── synchronize()

Why a ladder: a timer cannot do it (any sleep between 0 and 1 ms lasts about 1 ms on asyncio and spins on uvloop). Turns
of ``sleep(0)`` see an event within microseconds but burn the core, so they are for short waits only; a thread
in ``synchronize()`` of a blocking event costs a thread switch (10-20 µs) and nothing while it waits.
How long to spin is learnt per queue of events (`Pace`), from the time that an event took after the one before it:
what it waited behind others says how many there are, not how long they take. Above `SPIN_LIMIT` there is no spinning.

One waiter thread per queue of events, not per device: events of one queue pass in order, so waiting in order is
right; events of two queues do not, and the short stage's would be stuck behind the long one's. A waiter ends when
its queue is forgotten or has been quiet for `QUIET` seconds. The task is absent while nothing spins.

The figures are of a CPU; the balance is to be measured on a GPU. Not yet run on a GPU.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

from aiotime.devices.base import Event

SPIN_LIMIT = 200e-6  # seconds; where waits last longer, spinning burns more than the thread switch costs
SLACK = 30e-6  # seconds of spinning granted beyond twice the usual wait
QUIET = 1.0  # seconds after which a waiter without work ends
GRACE = 5.0  # seconds that forget() waits for a waiter to end

Told = Callable[[BaseException | None], None]


class Pace:
    """How long the events of one queue take lately. Its owner attaches it to them as ``event.pace``."""

    __slots__ = ("__weakref__", "expected", "name", "newest")

    def __init__(self, name: str = "events") -> None:
        self.name = name
        self.expected = 0.0  # seconds from one to the next, or from watched to told; a moving average
        self.newest = 0.0  # when the last one was told

    def told(self, watched: float, now: float) -> None:
        """One that has been watched since ``watched`` is told."""
        self.learn(now - max(watched, self.newest))
        self.newest = now

    def until(self, watched: float) -> float:
        """When to stop spinning for the next one."""
        return max(watched, self.newest) + self.patience()

    def learn(self, seconds: float) -> None:
        self.expected += (seconds - self.expected) / 8

    def patience(self) -> float:
        """Seconds worth spinning for the next one."""
        return 0.0 if self.expected > SPIN_LIMIT else 2 * self.expected + SLACK


class Watch:
    """One event and who wants to know."""

    __slots__ = ("event", "pace", "since", "told")

    def __init__(self, event: Event, told: Told, pace: Pace, since: float) -> None:
        self.event = event
        self.told = told
        self.pace = pace
        self.since = since


class Poller:
    """Events of one loop; get it from `of`. Every method is called on that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._loop = weakref.ref(loop)  # a strong one would keep the loop, the key of the registry, alive
        self._now = now
        self._others = Pace()  # for events that have no pace of their own
        self._spinning: dict[Pace, deque[Watch]] = {}
        self._task: asyncio.Task[None] | None = None
        self._waiters: dict[Pace, Waiter] = {}
        self._seen: deque[tuple[Watch, BaseException | None]] = deque()  # filled by waiters
        self._armed = False

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> Poller:
        """The one poller of ``loop``."""
        found = _POLLERS.get(loop)
        if found is None:
            found = _POLLERS[loop] = Poller(loop)
        return found

    def watch(self, event: Event, told: Told) -> None:
        """Call ``told(None)`` on the loop once ``event`` has passed, ``told(error)`` if asking it fails.

        If it has passed already, at once. Events of one queue are to be watched in the order of the queue.
        """
        pace: Pace = getattr(event, "pace", None) or self._others
        watch = Watch(event, told, pace, self._now())
        if self._settled(watch):
            return
        if pace.patience() > 0.0:
            self._spinning.setdefault(pace, deque()).append(watch)
            if self._task is None:
                loop = asyncio.get_running_loop()
                self._task = loop.create_task(self._spin(), name="poller")
        else:
            self._park(watch)

    async def forget(self, pace: Pace) -> None:
        """No event of this queue will be watched any more; what is being waited for is still told."""
        self._park_all(pace)
        waiter = self._waiters.pop(pace, None)
        if waiter is not None:
            waiter.end()
            patience = time.monotonic() + GRACE
            while waiter.thread.is_alive() and time.monotonic() < patience:  # noqa: ASYNC110 - a thread's end is no event
                await asyncio.sleep(0.001)

    @property
    def spinning(self) -> bool:
        """Is the task there?"""
        return self._task is not None

    @property
    def waiting(self) -> int:
        """Waiter threads alive."""
        return sum(waiter.thread.is_alive() for waiter in self._waiters.values())

    # ------------------------------------------------------------------ the fast rung

    async def _spin(self) -> None:
        try:
            while self._spinning:
                await asyncio.sleep(0)
                self._sweep()
        finally:
            self._task = None
            for pace in list(self._spinning):  # cancelled from outside: the waiters take over
                self._park_all(pace)

    def _sweep(self) -> None:
        """Ask the head of each queue; those behind it cannot have passed before it."""
        now = self._now()
        for pace, queue in list(self._spinning.items()):
            while queue:
                watch = queue[0]
                passed, error = _ask(watch.event)
                if not passed:
                    if now >= pace.until(watch.since):
                        self._park_all(pace)
                    break
                queue.popleft()
                self._tell(watch, error)
            if not queue and self._spinning.get(pace) is queue:
                del self._spinning[pace]

    def _settled(self, watch: Watch) -> bool:
        passed, error = _ask(watch.event)
        if passed:
            self._tell(watch, error)
        return passed

    # ------------------------------------------------------------------ the slow rung

    def _park_all(self, pace: Pace) -> None:
        for watch in self._spinning.pop(pace, ()):
            self._park(watch)

    def _park(self, watch: Watch) -> None:
        waiter = self._waiters.get(watch.pace)
        if waiter is None or not waiter.take(watch):
            self._waiters[watch.pace] = Waiter(self, watch)

    def passed(self, watch: Watch, error: BaseException | None) -> None:
        """A waiter has seen it; any thread."""
        self._seen.append((watch, error))
        if not self._armed:
            self._armed = True
            loop = self._loop()
            try:
                if loop is not None:
                    loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                pass  # the loop is closed: nobody is left to tell

    def _drain(self) -> None:
        self._armed = False  # before the queue is emptied, or one put in between is never announced
        while self._seen:
            watch, error = self._seen.popleft()
            self._tell(watch, error)

    def _tell(self, watch: Watch, error: BaseException | None) -> None:
        watch.pace.told(watch.since, self._now())
        try:
            watch.told(error)
        except Exception as failure:
            loop = self._loop()
            if loop is not None:  # the others must still be told
                context = {"message": "whoever watched a device event failed to take the news", "exception": failure}
                loop.call_exception_handler(context)


class Waiter:
    """A thread that sleeps in ``synchronize()`` for the events of one queue, in order.

    Not a daemon: it ends by itself when told to, or soon after nothing is left to wait for.
    """

    def __init__(self, poller: Poller, first: Watch) -> None:
        self._poller = poller
        self._watches: SimpleQueue[Watch | None] = SimpleQueue()
        self._ending = threading.Lock()  # held while it decides to end
        self._ended = False
        self._watches.put(first)  # before it starts, or it might end for want of work at once
        self.thread = threading.Thread(target=self._wait, name=f"waiter:{first.pace.name}")
        self.thread.start()

    def take(self, watch: Watch) -> bool:
        """Wait for one more; False when the thread has ended for want of work."""
        with self._ending:
            if self._ended:
                return False
            self._watches.put(watch)
            return True

    def end(self) -> None:
        """End after what was taken."""
        self._watches.put(None)

    def _wait(self) -> None:
        while True:
            try:
                watch = self._watches.get(timeout=QUIET)
            except Empty:
                with self._ending:
                    self._ended = self._watches.empty()
                if self._ended:
                    return
                continue
            if watch is None:
                return
            error: BaseException | None = None
            try:
                watch.event.synchronize()
            except Exception as failure:
                error = failure
            self._poller.passed(watch, error)
            del watch, error  # hold nothing while asleep


_POLLERS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Poller] = weakref.WeakKeyDictionary()


def _ask(event: Event) -> tuple[bool, BaseException | None]:
    try:
        return event.query(), None
    except Exception as error:
        return True, error  # nothing more will be heard of it

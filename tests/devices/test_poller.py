"""Poller: the ladder from a query over spinning to a waiter thread, on events that tests let pass."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from aiotime.devices.poller import SLACK, SPIN_LIMIT, Pace, Poller

Settle = Callable[..., Awaitable[None]]


class Gate:
    """An event that passes when the test says so, and counts who asks."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace
        self.queries = 0
        self.error: Exception | None = None
        self.asleep = threading.Event()  # somebody sleeps in synchronize()
        self._passed = threading.Event()

    def go(self, error: Exception | None = None) -> None:
        self.error = error
        self._passed.set()

    def query(self) -> bool:
        self.queries += 1
        if self._passed.is_set() and self.error is not None:
            raise self.error
        return self._passed.is_set()

    def synchronize(self) -> None:
        self.asleep.set()
        self._passed.wait()
        if self.error is not None:
            raise self.error


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds


def slow() -> Pace:
    """A queue whose waits are worth a thread."""
    pace = Pace("slow")
    pace.expected = 1.0
    return pace


@pytest.fixture
def clock() -> Clock:
    """Time that stands still."""
    return Clock()


@pytest_asyncio.fixture
async def poller(clock: Clock) -> AsyncIterator[Poller]:
    """A poller of the running loop on a clock of the test's; its threads end with the test."""
    poller = Poller(asyncio.get_running_loop(), now=clock.now)
    yield poller
    for pace in list(poller._waiters):
        await poller.forget(pace)
    assert not poller.spinning


@pytest.mark.asyncio
async def test_a_passed_event_is_told_at_once(poller: Poller) -> None:
    """One query, no task, no thread."""
    gate, told = Gate(), list[object]()
    gate.go()
    poller.watch(gate, told.append)
    assert told == [None]
    assert gate.queries == 1
    assert not poller.spinning
    assert poller.waiting == 0


@pytest.mark.asyncio
async def test_short_waits_spin(poller: Poller, settle: Settle) -> None:
    """One named task asks once a turn, and is gone when nothing is pending."""
    gate, told = Gate(), list[object]()
    poller.watch(gate, told.append)
    assert [task.get_name() for task in asyncio.all_tasks()].count("poller") == 1
    await settle(10)
    assert 8 <= gate.queries <= 12
    assert poller.waiting == 0
    gate.go()
    await settle(3)
    assert told == [None]
    assert not poller.spinning


@pytest.mark.asyncio
async def test_one_task_spins_for_all(poller: Poller, settle: Settle) -> None:
    """However many queues and events, only the head of each queue is asked."""
    queues = [Pace(), Pace()]
    gates, told = [Gate(pace) for pace in queues for _ in range(5)], list[int]()
    for number, gate in enumerate(gates):
        poller.watch(gate, lambda error, number=number: told.append(number))  # type: ignore[misc]
    await settle(10)
    assert [task.get_name() for task in asyncio.all_tasks()].count("poller") == 1
    assert [gate.queries > 1 for gate in gates] == [True, False, False, False, False] * 2
    for gate in gates:
        gate.go()
    await settle(3)
    assert told == list(range(10))


@pytest.mark.asyncio
async def test_a_wait_that_grows_long_is_parked(poller: Poller, clock: Clock, settle: Settle) -> None:
    """When patience is at its end the whole queue goes to a waiter thread, and the task ends."""
    pace = Pace()
    gates, told = [Gate(pace) for _ in range(3)], list[object]()
    for gate in gates:
        poller.watch(gate, told.append)
    clock.seconds = 2 * SLACK
    await settle(until=lambda: not poller.spinning)
    assert poller.waiting == 1
    assert gates[0].asleep.wait(10)
    asked = gates[0].queries
    await settle(20)
    assert gates[0].queries == asked
    for gate in gates:
        gate.go()
    await settle(until=lambda: len(told) == 3)


@pytest.mark.asyncio
async def test_long_waits_are_parked_at_once(poller: Poller, settle: Settle) -> None:
    """Where waits last longer than a thread switch is worth there is no spinning."""
    gate, told = Gate(slow()), list[object]()
    poller.watch(gate, told.append)
    assert not poller.spinning
    assert poller.waiting == 1
    gate.go()
    await settle(until=lambda: told == [None])


@pytest.mark.asyncio
async def test_wake_ups_of_the_loop_are_coalesced(
    poller: Poller, settle: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst of events that pass while the loop is busy costs one wake-up."""
    pace, told = slow(), list[object]()
    gates = [Gate(pace) for _ in range(20)]
    wake_ups = 0
    loop = asyncio.get_running_loop()

    class Counting:
        def call_soon_threadsafe(self, *args: object) -> None:
            nonlocal wake_ups
            wake_ups += 1
            loop.call_soon_threadsafe(*args)  # type: ignore[arg-type]

    counting = Counting()
    monkeypatch.setattr(poller, "_loop", lambda: counting)
    for gate in gates:
        poller.watch(gate, told.append)
    for gate in gates:
        gate.go()
    while len(poller._seen) < len(gates):
        pass  # the loop is busy until the last one has been seen
    monkeypatch.undo()
    await settle(until=lambda: len(told) == len(gates))
    assert wake_ups == 1


@pytest.mark.asyncio
async def test_a_short_queue_is_not_stuck_behind_a_long_one(poller: Poller, settle: Settle) -> None:
    """Each queue has a waiter of its own."""
    long, short, told = Gate(slow()), Gate(slow()), list[str]()
    poller.watch(long, lambda error: told.append("long"))
    poller.watch(short, lambda error: told.append("short"))
    short.go()
    await settle(until=lambda: told == ["short"])
    long.go()
    await settle(until=lambda: told == ["short", "long"])


@pytest.mark.asyncio
@pytest.mark.parametrize("pace", [Pace, slow], ids=["spinning", "waiting"])
async def test_a_failing_event_is_told_as_an_error(poller: Poller, settle: Settle, pace: Callable[[], Pace]) -> None:
    """What query() or synchronize() raises reaches whoever watched; the next event is told as well."""
    one = pace()
    gates, told = [Gate(one), Gate(one)], list[object]()
    for gate in gates:
        poller.watch(gate, told.append)
    lost = RuntimeError("lost")
    gates[0].go(lost)
    gates[1].go()
    await settle(until=lambda: len(told) == 2)
    assert told == [lost, None]


@pytest.mark.asyncio
async def test_an_event_that_fails_when_first_asked_is_told(poller: Poller) -> None:
    """A device that was lost before is news at once."""
    gate, told = Gate(), list[object]()
    lost = RuntimeError("lost")
    gate.go(lost)
    poller.watch(gate, told.append)
    assert told == [lost]


@pytest.mark.asyncio
@pytest.mark.parametrize("pace", [Pace, slow], ids=["spinning", "waiting"])
async def test_a_failing_listener_does_not_keep_the_news_from_others(
    poller: Poller, settle: Settle, loop_errors: list[dict[str, object]], pace: Callable[[], Pace]
) -> None:
    """It is reported to the loop, and the next one is told."""
    one = pace()
    gates, told = [Gate(one), Gate(one)], list[object]()

    def fails(error: BaseException | None) -> None:
        raise ValueError("listener")

    poller.watch(gates[0], fails)
    poller.watch(gates[1], told.append)
    for gate in gates:
        gate.go()
    while pace is slow and len(poller._seen) < 2:
        pass  # so that one wake-up of the loop tells both
    await settle(until=lambda: told == [None])
    assert [str(context["exception"]) for context in loop_errors] == ["listener"]
    loop_errors.clear()


@pytest.mark.asyncio
async def test_a_listener_may_watch_the_next_event(poller: Poller, settle: Settle) -> None:
    """Watching from within the news keeps the one task going."""
    gates, told = [Gate(), Gate()], list[object]()
    poller.watch(gates[0], lambda error: poller.watch(gates[1], told.append))
    await settle(2)
    gates[0].go()
    await settle(3)
    assert poller.spinning
    gates[1].go()
    await settle(3)
    assert told == [None]
    assert not poller.spinning


@pytest.mark.asyncio
async def test_a_cancelled_task_hands_over_to_waiters(poller: Poller, settle: Settle) -> None:
    """Nobody is forgotten when somebody cancels every task of the loop."""
    gate, told = Gate(), list[object]()
    poller.watch(gate, told.append)
    await settle(2)
    assert poller._task is not None
    poller._task.cancel()
    await settle(2)
    assert not poller.spinning
    assert poller.waiting == 1
    gate.go()
    await settle(until=lambda: told == [None])


@pytest.mark.asyncio
async def test_forgetting_a_queue_ends_its_thread(poller: Poller, settle: Settle) -> None:
    """What was being waited for is told first."""
    pace = slow()
    gate, told = Gate(pace), list[object]()
    poller.watch(gate, told.append)
    gate.go()
    await poller.forget(pace)
    assert poller.waiting == 0
    await settle(until=lambda: told == [None])
    await poller.forget(pace)


@pytest.mark.asyncio
async def test_a_quiet_waiter_ends_and_another_takes_over(
    poller: Poller, settle: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread without work does not stay for ever; the next wait finds another."""
    monkeypatch.setattr("aiotime.devices.poller.QUIET", 0.0)
    pace, told = slow(), list[object]()
    for _ in range(3):
        gate = Gate(pace)
        poller.watch(gate, told.append)
        assert poller.waiting == 1
        gate.go()
        await settle(until=lambda: poller.waiting == 0)
    await settle(until=lambda: told == [None] * 3)


@pytest.mark.asyncio
async def test_there_is_one_poller_per_loop() -> None:
    """`Poller.of` finds it again."""
    loop = asyncio.get_running_loop()
    assert Poller.of(loop) is Poller.of(loop)


def test_a_poller_does_not_keep_its_loop_alive() -> None:
    """A closed loop is collected, and its poller with it."""
    loop = asyncio.new_event_loop()
    poller = weakref.ref(Poller.of(loop))
    loop.close()
    del loop
    gc.collect()
    assert poller() is None


@pytest.mark.asyncio
async def test_a_queue_of_short_events_is_not_taken_for_a_long_one(
    poller: Poller, clock: Clock, settle: Settle
) -> None:
    """Four in flight, 60 us each: every one waits for 240 us, and once that is learnt no thread is asked."""
    pace, told, each, flying = Pace(), list[object](), 60e-6, deque[Gate]()

    def launch() -> None:
        flying.append(Gate(pace))
        poller.watch(flying[-1], told.append)

    for _ in range(4):
        launch()
    for done in range(1, 200):
        before = clock.seconds
        for part in (0.5, 0.9, 1.0):
            clock.seconds = before + part * each
            await settle(2)
        flying.popleft().go()
        await settle(until=lambda: len(told) == done)  # noqa: B023 - awaited in this turn
        assert poller.spinning or done < 50
        launch()
    assert pace.expected == pytest.approx(each, rel=1e-3)
    while flying:
        flying.popleft().go()
    await settle(until=lambda: len(told) == 203)


def test_patience_is_learnt() -> None:
    """Twice the usual wait and some slack; none where waits are long; and it finds back."""
    pace = Pace()
    assert pace.patience() == SLACK
    for _ in range(100):
        pace.learn(50e-6)
    assert pace.patience() == pytest.approx(100e-6 + SLACK, rel=1e-3)
    for _ in range(100):
        pace.learn(10 * SPIN_LIMIT)
    assert pace.patience() == 0.0
    for _ in range(100):
        pace.learn(10e-6)
    assert pace.patience() == pytest.approx(20e-6 + SLACK, rel=1e-3)

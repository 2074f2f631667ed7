"""What this machine charges for the two things no pipeline of threads can avoid: waking a thread, waking a loop.

    loop ── lock.release ──▶ thread ── call_soon_threadsafe ──▶ loop: the task goes on
            (thread wake)              (loop wake)

They bound the latency of one idle frame, and what a hop costs where every frame is handed over on its own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

from benchmarks._harness import Loop, percentile, run_on


@dataclass(frozen=True, slots=True)
class WakeUps:
    """Seconds."""

    thread_p50: float
    loop_p50: float
    round_trip_p50: float
    round_trip_p99: float


def ping_pong(number: int) -> float:
    """Seconds of one hand-over between two threads that wake each other by locks (half a round trip)."""
    ping, pong = threading.Lock(), threading.Lock()
    ping.acquire()
    pong.acquire()

    def answer() -> None:
        for _ in range(number):
            ping.acquire()
            pong.release()

    thread = threading.Thread(target=answer, name="pong")
    thread.start()
    start = time.perf_counter()
    for _ in range(number):
        ping.release()
        pong.acquire()
    spent = time.perf_counter() - start
    thread.join()
    return spent / (2 * number)


def wake_ups(loop: Loop, number: int, *, pause: float = 0.0) -> WakeUps:
    """Wake an idle thread from the loop and the loop from the thread, ``number`` times, ``pause`` seconds apart."""
    return run_on(loop, _wake_ups(number, pause))


async def _wake_ups(number: int, pause: float) -> WakeUps:
    loop, parker, box = asyncio.get_running_loop(), threading.Lock(), list[asyncio.Future[float] | None]()
    parker.acquire()
    woken: list[float] = []

    def answer() -> None:
        while True:
            parker.acquire()
            now = time.perf_counter()
            future = box.pop()
            if future is None:
                return
            woken.append(now)
            loop.call_soon_threadsafe(future.set_result, time.perf_counter())

    thread = threading.Thread(target=answer, name="answer")
    thread.start()
    to_thread, to_loop, both = [], [], []
    for _ in range(number):
        await asyncio.sleep(pause)
        future: asyncio.Future[float] = loop.create_future()
        box.append(future)
        start = time.perf_counter()
        parker.release()
        called = await future
        end = time.perf_counter()
        to_thread.append(woken.pop() - start)
        to_loop.append(end - called)
        both.append(end - start)
    box.append(None)
    parker.release()
    thread.join()
    return WakeUps(percentile(to_thread, 0.5), percentile(to_loop, 0.5), percentile(both, 0.5), percentile(both, 0.99))

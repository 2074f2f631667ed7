"""What single calls cost, and what they do to other threads: events, launches, graphs, host functions, the GIL."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Self

import torch

from benchmarks._harness import percentile, run_on
from benchmarks.gpu.hostcalls import Semaphore
from benchmarks.gpu.part import Part
from benchmarks.gpu.runtime import Runtime
from benchmarks.gpu.waits import WAYS
from benchmarks.gpu.wakeup import cell

CALLS = 300  # in a row: below the 1024 launches that the driver queues before it blocks
ROUNDS = 7
INTERVALS = (0.005, 0.0005, 0.0001)  # seconds: Python's switch interval and two shorter ones


def per_call(call: Callable[[], Any], settle: Callable[[], None], *, calls: int = CALLS, rounds: int = ROUNDS) -> float:
    """Seconds a call, the median over rounds; ``settle`` empties the device in between, untimed."""
    spent = []
    for _ in range(rounds):
        settle()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        spent.append((time.perf_counter() - start) / calls)
    settle()
    return median(spent)


def calls(runtime: Runtime) -> dict[str, Callable[[], Any]]:
    """Name -> one call of it, on one stream."""
    stream, other = runtime.stream(), runtime.stream()
    pool = [runtime.event(blocking=True) for _ in range(8)]
    passed, semaphore = runtime.event(), Semaphore()
    for event in [*pool, passed]:
        stream.record_event(event)
    runtime.synchronize()
    counter = runtime.counter(4)
    one, hundred = runtime.replayed(stream, 1), runtime.replayed(stream, 100)

    def fresh() -> None:
        stream.record_event(runtime.event(blocking=True))  # made at its record, destroyed at once

    def pooled() -> None:
        event = pool.pop()
        stream.record_event(event)
        pool.append(event)

    def waited() -> None:
        other.wait_event(passed)

    def context() -> None:
        with runtime.on(stream):
            pass

    return {
        "nothing (the loop around each call)": lambda: None,
        "event: made, recorded, destroyed": fresh,
        "event: from a pool, recorded, given back": pooled,
        "event.query(), passed": passed.query,
        "stream.wait_event": waited,
        "stream.wait_stream (a fresh event)": lambda: other.wait_stream(stream),
        "with stream: (enter and leave)": context,
        "a tiny kernel": lambda: runtime.tiny(stream),
        "a graph of 1 kernel": one,
        "a graph of 100 kernels": hundred,
        "pinned counter: the copy": lambda: counter.arm(stream, 1),
        "pinned counter: the look": counter.read,
        "host function: the launch": lambda: runtime.call_host(stream, Semaphore.function, semaphore.argument),
    }


def pending_query(runtime: Runtime, seconds: float) -> float:
    """Seconds that ``query()`` takes while the answer is no."""
    stream, event = runtime.stream(), runtime.event()
    runtime.spin(stream, seconds)
    stream.record_event(event)
    asked, start = 0, time.perf_counter()
    while not event.query():
        asked += 1
    spent = time.perf_counter() - start
    runtime.synchronize()
    return spent / max(1, asked)


class Neighbour:
    """A thread that does something over and over while others are measured."""

    def __init__(self, turn: Callable[[], Any]) -> None:
        self.turns = 0
        self._turn = turn
        self._over = False
        self._thread = threading.Thread(target=self._work, name="neighbour")

    def _work(self) -> None:
        while not self._over:
            self._turn()
            self.turns += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._thread.join()


def count() -> None:
    """A turn of pure Python, some microseconds of it."""
    for _ in range(100):
        pass


def beside(turn: Callable[[], Any] | None, seconds: float) -> float:
    """Turns of `count` a second on a thread, while another thread does ``turn`` over and over."""
    with Neighbour(count) as counting:
        if turn is None:
            start, before = time.perf_counter(), counting.turns
            time.sleep(seconds)
        else:
            with Neighbour(turn):
                start, before = time.perf_counter(), counting.turns
                time.sleep(seconds)
        return (counting.turns - before) / (time.perf_counter() - start)


def gil(part: Part, runtime: Runtime, seconds: float) -> None:
    """How much of a Python thread's speed is left next to each way to wait, and to launching."""
    stream = runtime.stream()
    sleeping, spinning, plain = runtime.event(blocking=True), runtime.event(), runtime.event()
    semaphore = Semaphore()

    def wait(event: Any) -> None:
        runtime.spin(stream, 1e-3)
        stream.record_event(event)
        event.synchronize()

    def ask() -> None:
        runtime.spin(stream, 1e-3)
        stream.record_event(plain)
        while not plain.query():
            pass

    def native() -> None:
        runtime.spin(stream, 1e-3)
        runtime.call_host(stream, Semaphore.function, semaphore.argument)
        semaphore.wait()

    def launch() -> None:
        for _ in range(100):
            runtime.tiny(stream)
        stream.synchronize()

    neighbours: dict[str, Callable[[], Any] | None] = {
        "nobody": None,
        "query() in a loop, 1 ms stages": ask,
        "synchronize(), blocking event": lambda: wait(sleeping),
        "synchronize(), spinning event": lambda: wait(spinning),
        "sem_wait, posted by the GPU": native,
        "eager launches of tiny kernels": launch,
    }
    alone = 0.0
    for name, turn in neighbours.items():
        rate = beside(turn, seconds)
        alone = alone or rate
        part.put("gil", name, value={"turns_per_s": rate, "share_of_alone": rate / alone})
    runtime.synchronize()


def full_queue(runtime: Runtime, launches: int) -> dict[str, Any]:
    """How long does ``query()``, which holds the GIL, take while another thread stands in a launch without room?"""
    stream, other, event = runtime.stream(), runtime.stream(), runtime.event()
    runtime.synchronize()
    ready = threading.Event()

    def fill() -> None:
        runtime.spin(stream, 0.2)
        ready.set()
        for _ in range(launches):
            runtime.tiny(stream)

    filler = threading.Thread(target=fill, name="filler")
    filler.start()
    ready.wait()
    runtime.spin(other, 0.1)
    other.record_event(event)
    times: list[float] = []
    while len(times) < 200_000:
        start = time.perf_counter()
        passed = event.query()
        times.append(time.perf_counter() - start)
        if passed:
            break
    filler.join()
    runtime.synchronize()
    return {
        "queries": len(times),
        "p50_us": percentile(times, 0.5) * 1e6,
        "p99_us": percentile(times, 0.99) * 1e6,
        "largest_us": max(times) * 1e6,
    }


def contended(part: Part, runtime: Runtime) -> None:
    """Wake-up beside a thread that launches eagerly, at several switch intervals."""
    stream, theirs = runtime.stream(), runtime.stream()
    frames, stage = (6, 1e-3) if part.dry else (150, 300e-6)
    chosen = [way for way in WAYS if way.name != "sleep(1 ms) + query"]

    def launch() -> None:
        for _ in range(100):
            runtime.tiny(theirs)
        theirs.synchronize()

    before = sys.getswitchinterval()
    try:
        for interval in INTERVALS:
            sys.setswitchinterval(interval)
            for kind in chosen:
                if part.budget.left < 1.0:
                    part.put("contended", f"{interval * 1e3:g} ms", kind.name, value={"skipped": "no time left"})
                    continue
                with part.guard("contended", f"{interval * 1e3:g} ms", kind.name), Neighbour(launch):
                    way = kind(runtime, stream, frames + 10)
                    found = run_on("asyncio", cell(runtime, way, stage, frames))
                    part.put("contended", f"{interval * 1e3:g} ms", kind.name, value=found)
    finally:
        sys.setswitchinterval(before)
    part.say("wake-up beside a launching thread is measured")


def pinned_memory(part: Part) -> None:
    """Pinned allocations by size: the first of a size, and one that the allocator has kept."""
    for size in (1 << 16, 1 << 20, 1 << 24, 1 << 27):
        start = time.perf_counter()
        first = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        fresh = time.perf_counter() - start
        start = time.perf_counter()
        first.is_pinned()
        asked = time.perf_counter() - start
        del first
        start = time.perf_counter()
        torch.empty(size, dtype=torch.uint8, pin_memory=True)
        kept = time.perf_counter() - start
        value = {"first_us": fresh * 1e6, "kept_us": kept * 1e6, "is_pinned_us": asked * 1e6}
        part.put("pinned", f"{size >> 10} KiB", value=value)


def run(part: Part) -> None:
    """All of it."""
    runtime = part.runtime()
    try:
        names = calls(runtime)
        gc.disable()
        try:
            for name, call in names.items():
                with part.guard("calls", name):
                    number = 20 if part.dry else 10 if "100 kernels" in name else CALLS
                    rounds = 2 if part.dry else ROUNDS
                    seconds = per_call(call, runtime.synchronize, calls=number, rounds=rounds)
                    part.put("calls", name, value={"us": seconds * 1e6})
        finally:
            gc.enable()
        with part.guard("calls", "event.query(), pending"):
            seconds = pending_query(runtime, 0.01)
            part.put("calls", "event.query(), pending", value={"us": seconds * 1e6})
        part.say("single calls are measured")
        with part.guard("gil", "failed"):
            gil(part, runtime, 0.02 if part.dry else 0.4)
        with part.guard("full_queue"):
            part.put("full_queue", value=full_queue(runtime, 50 if part.dry else 3000))
        part.say("the GIL and the full queue are measured")
        if not part.dry:
            with part.guard("pinned", "failed"):
                pinned_memory(part)
        contended(part, runtime)
    finally:
        runtime.close()

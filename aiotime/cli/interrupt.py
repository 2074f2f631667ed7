"""Ctrl-C (and SIGTERM) while a stream runs: the first one drains, the second aborts at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupt:
    """What was asked for so far.

    Attributes:
        received: the signal that asked to stop, None while none came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it; 0 when none came."""
        return 0 if self.received is None else 128 + self.received


@contextmanager
def stop_on_signals(stop: Callable[[], None], abort: Callable[[], None]) -> Iterator[Interrupt]:
    """While the block runs, the first signal calls ``stop`` on the loop, the second ``abort`` and ends the process.

    Ending the process does not wait for threads: a stage or a source may be stuck, and the user has asked twice.
    """
    interrupt = Interrupt()
    loop = asyncio.get_running_loop()

    def handle(number: signal.Signals) -> None:
        if interrupt.received is None:
            interrupt.received = number
            stop()
            return
        try:
            abort()
        finally:
            os._exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in numbers:
            loop.add_signal_handler(number, handle, number)
    except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread: as without us
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)

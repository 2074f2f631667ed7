"""Frames arrive: the runner writes a stamp into a contender's pipe whenever one is due."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from itertools import repeat

from benchmarks.peers.stream import STAMP

FINEST = 2e-4  # seconds: where frames are due more often, several arrive at once
PR_SET_TIMERSLACK = 29


def sharpen() -> None:
    """Let this thread wake within a microsecond of the time it asked for, instead of fifty, where Linux does that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)


def pace(pipe: int, *, rate: float, number: int) -> None:
    """Announce ``number`` frames at ``rate`` per second, evenly; a stamp says when its frame was really there.

    Raises:
        BlockingIOError: the contender has left a whole pipe full of frames behind; BrokenPipeError: it is gone.
    """
    together = max(1, round(FINEST * rate))
    start = time.perf_counter()
    sent = 0
    while sent < number:
        due = start + sent / rate
        left = due - time.perf_counter()
        if left > 0:
            time.sleep(left)
        count = min(together, number - sent)
        os.write(pipe, b"".join(repeat(STAMP.pack(time.perf_counter()), count)))
        sent += count

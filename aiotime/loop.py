"""``aiotime.run(main())``: asyncio.run on uvloop where the platform has it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiotime.heap import keep_freed_memory

T = TypeVar("T")


def run(
    main: Coroutine[Any, Any, T],
    *,
    debug: bool | None = None,
    switch_interval: float | None = None,
    keep_memory: bool = True,
) -> T:
    """Run ``main`` to its end on a new event loop, uvloop's where it is installed, and return its result.

    The same as ``asyncio.run``: Ctrl-C cancels ``main``, remaining tasks are cancelled at the end.
    aiotime works inside any running asyncio or uvloop loop; this is a convenience for scripts.

    Args:
        main: the coroutine.
        debug: asyncio's debug mode.
        switch_interval: seconds after which a thread that computes in pure Python must let go of the GIL
            (``sys.setswitchinterval``; CPython's default is 0.005). Lower it, to 0.0005 say, where such a
            thread must live beside eager stages; it is set back at the end.
        keep_memory: call `aiotime.keep_freed_memory` first. On by default, because who calls ``run`` owns the process
            and frames come faster for it; it is not set back at the end, because nothing can. Turn it off where
            the process shall give memory back after its peak.

    Example:
        >>> async def main():
        ...     return 42
        >>> aiotime.run(main())
        42
    """
    if keep_memory:
        keep_freed_memory()
    before = sys.getswitchinterval()
    if switch_interval is not None:
        sys.setswitchinterval(switch_interval)
    try:
        return _run(main, debug)
    finally:
        sys.setswitchinterval(before)


def _run(main: Coroutine[Any, Any, T], debug: bool | None) -> T:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main, debug=debug)
    with asyncio.Runner(debug=debug, loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)

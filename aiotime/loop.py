"""``aiotime.run(main())``: asyncio.run on uvloop where the platform has it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run ``main`` to its end on a new event loop, uvloop's where it is installed, and return its result.

    The same as ``asyncio.run``: Ctrl-C cancels ``main``, remaining tasks are cancelled at the end.
    aiotime works inside any running asyncio or uvloop loop; this is a convenience for scripts.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main, debug=debug)
    with asyncio.Runner(debug=debug, loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)

"""A frame with a task: cancelling the one cancels the other, once it runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aiotime.devices.base import Pending
from aiotime.dynamic.entry import Entry
from aiotime.frame import NOBODY


def entry() -> Entry:
    session: Any = None
    return Entry(session, NOBODY, 0, Pending(None, done=True), 0.0)


@pytest.mark.asyncio
async def test_only_a_task_that_has_begun_is_cancelled() -> None:
    """One that has not would end without telling anybody: it looks at `cancelled` when it begins."""
    began: list[bool] = []

    async def live(mine: Entry) -> None:
        mine.begun = True
        began.append(mine.cancelled)
        await asyncio.Event().wait()

    early, late = entry(), entry()
    early.task = asyncio.create_task(live(early))
    early.cancelled = True
    late.task = asyncio.create_task(live(late))
    await asyncio.sleep(0)
    late.cancelled = True
    await asyncio.wait([late.task])
    assert late.task.cancelled()
    assert began == [True, False]
    assert not early.task.done()
    early.cancelled = False
    assert not early.cancelled
    early.cancelled = True
    await asyncio.wait([early.task])
    assert early.task.cancelled()


def test_an_entry_without_a_task() -> None:
    """Is cancelled as any frame is."""
    one = entry()
    assert not one.cancelled
    one.cancelled = True
    assert one.cancelled
    assert (one.loss, one.instance, one.task) == (None, None, None)

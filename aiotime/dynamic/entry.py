"""Entry: a frame that is an instance: its coroutine, from the door to its outcome."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiotime.devices.base import Pending
from aiotime.frame import Frame, Owner

if TYPE_CHECKING:
    from aiotime.dynamic.instance import Instance
    from aiotime.dynamic.session import Session


class Entry(Frame):
    """A frame with a task of its own, which is cancelled with it."""

    __slots__ = ("_cancelled", "begun", "instance", "loss", "session", "task")

    def __init__(self, session: Session, owner: Owner, index: int, tail: Pending, arrived: float) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.begun = False  # the task runs; cancelled before that, it would never tell anybody how it ended
        self.instance: Instance | None = None
        self.session = session
        self.loss: float | None = None
        super().__init__(owner, index, tail, arrived)

    @property
    def cancelled(self) -> bool:
        """Nobody wants the result any more."""
        return self._cancelled

    @cancelled.setter
    def cancelled(self, gone: bool) -> None:
        self._cancelled = gone
        if gone and self.begun and self.task is not None:
            self.task.cancel()

"""A pipeline that stands still for a moment: nothing enters, everything that entered has been learned from.

    hold the door ─▶ visit every stage, in the order of the stream, on its own device stream ─▶ let go

What a visit reads is one consistent cut, and what it writes no frame sees half of. A closed pipeline is visited at
once; one that is opened meanwhile keeps its door shut.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch

from aiotime.engine import Engine
from aiotime.frame import Frame

Action = Callable[[int], Any]


class Visit:
    """A control frame that calls ``action(stage)`` when the turn of each stage comes, and its owner."""

    def __init__(self, action: Action) -> None:
        self._action = action
        self.found: dict[int, Any] = {}
        self.done: asyncio.Future[None] | None = None

    def apply(self, stage: int) -> None:
        """On the stage's device stream; tensors made there are ordinary ones, fit for learning."""
        with torch.inference_mode(mode=False):
            self.found[stage] = self._action(stage)

    def settled(self, frame: Frame) -> None:
        """All stages were visited, one failed, or the pipeline ended under way."""
        if self.done is not None and not self.done.done():
            if frame.error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(frame.error)


class Standstill:
    """The standing still of one pipeline.

    Args:
        engine: the engine that is open, None while there is none.
        steady: the same, once one that is ending has ended.
        stages: how many.
    """

    def __init__(
        self,
        *,
        engine: Callable[[], Engine | None],
        steady: Callable[[], Awaitable[Engine | None]],
        stages: int,
    ) -> None:
        self._engine = engine
        self._steady = steady
        self._stages = stages
        self._holders: list[asyncio.Task[Any] | None] = []

    @property
    def engine(self) -> Engine | None:
        """The engine that is open."""
        return self._engine()

    def attach(self, engine: Engine) -> None:
        """A new engine opens: whoever holds the pipeline holds it too."""
        for holder in self._holders:
            engine.hold(holder)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Admit nothing inside the block; cancelled or failed, the door is opened again."""
        me = asyncio.current_task()
        engine = await self._steady()
        self._holders.append(me)
        if engine is not None:
            engine.hold(me)
        try:
            yield
        finally:
            self._holders.remove(me)
            if (engine := self._engine()) is not None:  # perhaps another one than at the beginning
                engine.let_go(me)

    async def visit(self, action: Action) -> dict[int, Any]:
        """What ``action`` returned, by stage. Cancelled: the visit goes on; nobody waits for it."""
        visit = Visit(action)
        engine = await self._steady()
        if engine is None:
            for stage in range(self._stages):
                visit.apply(stage)
            return visit.found
        visit.done = engine.loop.create_future()
        engine.enter_control(visit, visit)
        await asyncio.shield(visit.done)
        return visit.found

"""What properties of pipelines and networks share: a scenario on a loop of its own, one cancelled at every await."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

LIMIT = 20.0  # seconds after which a scenario has hung


def play(scenario: Coroutine[Any, Any, None]) -> None:
    """Run ``scenario`` on a new loop: it must end in time, leave no task, and no error nobody handled."""
    errors: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        await asyncio.wait_for(scenario, LIMIT)
        for _ in range(100):
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if not left:
                break
            await asyncio.sleep(0)
        assert not left, left

    asyncio.run(watched())
    assert not errors, errors


class Interrupted:
    """Awaits ``coroutine`` and cancels the task it runs in at its ``k``-th suspension."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], k: int, *, late: bool) -> None:
        self.coroutine, self.k, self.late = coroutine, k, late

    @types.coroutine
    def run(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        suspensions = 0
        error: BaseException | None = None
        while True:
            try:
                future = self.coroutine.send(None) if error is None else self.coroutine.throw(error)
            except StopIteration as end:
                return end.value
            suspensions += 1
            if suspensions == self.k:
                if not self.late:
                    task.cancel()
                elif future is None:
                    asyncio.get_running_loop().call_soon(task.cancel)
                else:  # before the task is woken with the result
                    future.add_done_callback(lambda _: task.cancel())
            try:
                yield future
                error = None
            except BaseException as thrown:  # handed to the coroutine
                error = thrown


async def for_every_k(scenario: Callable[[], Coroutine[Any, Any, None]], *, late: bool, most: int = 400) -> int:
    """Run the scenario cancelled at every suspension, fewer than ``most``; returns how many there were."""
    for k in range(1, most):
        task = asyncio.ensure_future(_coroutine(Interrupted(scenario(), k, late=late)))
        await asyncio.wait([task], timeout=LIMIT)
        assert task.done(), f"hung after a cancellation at suspension {k}"
        if not task.cancelled():
            task.result()
            return k
    raise AssertionError(f"more than {most} suspensions")


async def _coroutine(interrupted: Interrupted) -> Any:
    return await interrupted.run()

"""What the properties share: playing a scenario on a loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

import pytest

LIMIT = 20.0  # seconds after which a scenario has hung


class Play(Protocol):
    """The type of the fixture `play`."""

    def __call__(self, scenario: Coroutine[Any, Any, None]) -> None:
        """Run it on a new loop, and look at what it left there; see the fixture."""


@pytest.fixture(scope="session")
def play() -> Play:
    """Run a scenario on a loop of its own: it must end in time, leave no task, and no error nobody handled."""

    def run(scenario: Coroutine[Any, Any, None]) -> None:
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

    return run

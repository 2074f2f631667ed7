"""What the properties share: playing a scenario on a loop of its own."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol

import pytest

from tests import scenarios


class Play(Protocol):
    """The type of the fixture `play`."""

    def __call__(self, scenario: Coroutine[Any, Any, None]) -> None:
        """Run it on a new loop, and look at what it left there; see the fixture."""


@pytest.fixture(scope="session")
def play() -> Play:
    """Run a scenario on a loop of its own: it must end in time, leave no task, and no error nobody handled."""
    return scenarios.play

"""Tests of aiotime.compiling.program: the ways there are."""

from __future__ import annotations

from typing import Any

import pytest

from aiotime.compiling import WAYS, check_way
from aiotime.errors import ConfigurationError


@pytest.mark.parametrize("way", [None, *WAYS])
def test_ways(way: str | None) -> None:
    check_way(way)


@pytest.mark.parametrize("way", [None, "auto", "inductor"])
def test_ways_to_learn(way: str | None) -> None:
    check_way(way, learning=True)


@pytest.mark.parametrize("way", ["fast", "", True, 1])
def test_no_way(way: Any) -> None:
    with pytest.raises(ConfigurationError, match="'auto', 'aot', 'inductor', 'cudagraph'"):
        check_way(way)


@pytest.mark.parametrize("way", ["aot", "cudagraph"])
def test_no_way_to_learn(way: str) -> None:
    with pytest.raises(ConfigurationError, match="has no backward"):
        check_way(way, learning=True)

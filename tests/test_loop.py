"""Tests of aiotime.loop: run() and the switch interval."""

from __future__ import annotations

import asyncio
import builtins
import sys
from typing import Any

import pytest

import aiotime


async def loop_name() -> str:
    return type(asyncio.get_running_loop()).__module__


def test_returns_the_result_on_uvloop() -> None:
    """run() returns what the coroutine returns, on uvloop where there is one."""
    pytest.importorskip("uvloop")
    assert aiotime.run(loop_name()).startswith("uvloop")


def test_falls_back_to_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without uvloop the standard loop does."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "uvloop":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert aiotime.run(loop_name()).startswith("asyncio")


def test_the_switch_interval_is_set_back() -> None:
    """The interval holds during the run, also one that fails, and not after it."""
    before = sys.getswitchinterval()

    async def failing() -> None:
        assert sys.getswitchinterval() == pytest.approx(0.0005)
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        aiotime.run(failing(), switch_interval=0.0005)
    assert sys.getswitchinterval() == pytest.approx(before)


def test_debug() -> None:
    """asyncio's debug mode is handed on."""

    async def debug() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert aiotime.run(debug(), debug=True)

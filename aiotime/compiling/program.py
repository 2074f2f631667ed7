"""Program: what a compiled stage is, whichever way it was compiled."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from aiotime.errors import ConfigurationError

WAYS = ("auto", "aot", "inductor", "cudagraph")


class CompileError(Exception):
    """A stage cannot be compiled this way here; the text says why, and the stage can still run eagerly."""


class Program(Protocol):
    """Callable ``program(value) -> value``: what the module returns for it.

    Attributes:
        way: "aot", "inductor" or "cudagraph".
        module: whose weights it uses.
    """

    way: str
    module: nn.Module

    def __call__(self, value: Any) -> Any:
        """What ``module(value)`` returns."""

    def refresh(self) -> None:
        """Use the tensors that the module has now; not while it runs."""


def check_way(way: Any, *, learning: bool = False) -> None:
    """Raise `ConfigurationError` unless ``way`` is None or one of `WAYS`, and fit for a stage that learns."""
    if learning and way in ("aot", "cudagraph"):
        raise ConfigurationError(
            f'compile={way!r} has no backward; a pipeline that learns takes compile="inductor" (or "auto", or None)'
        )
    if way is not None and way not in WAYS:
        raise ConfigurationError(f"compile must be None or one of {', '.join(map(repr, WAYS))}, not {way!r}")

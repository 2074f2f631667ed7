"""Log events of the library: structlog where the application configured it, else the stdlib logger "aiotime".

    application configured structlog      → its processors get the event and its values
    it did not, stdlib logging has a handler → the logger "aiotime" gets "pipeline.opened pipeline='p' stages=['a']"
    neither                               → silence

A library configures neither. structlog left alone would print to stdout, so it is asked only once an application
has called ``structlog.configure``. Events are few (a pipeline opens, a source fails): there is none per frame.
"""

from __future__ import annotations

import logging
from typing import Any

import structlog

NAME = "aiotime"

_stdlib = logging.getLogger(NAME)
_stdlib.addHandler(logging.NullHandler())  # without it, logging would write warnings to stderr unasked


class Logger:
    """A logger with values bound to it; where its events go is decided anew at each of them."""

    __slots__ = ("_bound", "_structured")

    def __init__(self, **bound: Any) -> None:
        self._bound = bound
        self._structured = structlog.get_logger(NAME, **bound)  # a lazy proxy: follows the configuration

    def bind(self, **values: Any) -> Logger:
        """A logger with ``values`` bound on top of its own."""
        return Logger(**self._bound | values)

    def debug(self, event: str, /, **values: Any) -> None:
        """Log ``event`` for who looks for a fault."""
        self._log(logging.DEBUG, event, values)

    def info(self, event: str, /, **values: Any) -> None:
        """Log ``event``, part of normal life."""
        self._log(logging.INFO, event, values)

    def warning(self, event: str, /, **values: Any) -> None:
        """Log ``event``, after which work goes on."""
        self._log(logging.WARNING, event, values)

    def error(self, event: str, /, **values: Any) -> None:
        """Log ``event``, after which something has ended; ``exc_info=error`` adds a traceback."""
        self._log(logging.ERROR, event, values)

    def _log(self, level: int, event: str, values: dict[str, Any]) -> None:
        if structlog.is_configured():
            getattr(self._structured, logging.getLevelName(level).lower())(event, **values)
        elif _stdlib.isEnabledFor(level):
            exc_info = values.pop("exc_info", None)
            context = structlog.contextvars.get_contextvars() | self._bound | values
            line = " ".join([event, *(f"{key}={value!r}" for key, value in context.items())])
            # a JSON formatter finds the values apart in record.aiotime; the caller's line is two frames up
            extra = {NAME: {"event": event, **context}}
            _stdlib.log(level, "%s", line, exc_info=exc_info, extra=extra, stacklevel=3)


def get_logger(**bound: Any) -> Logger:
    """A logger of the library with ``bound`` in each of its events.

    Events are named ``"<thing>.<what happened>"``: ``"pipeline.opened"``, ``"source.failed"``, with the run
    and the error as values. Call it at module level; the application may configure logging later.
    """
    return Logger(**bound)

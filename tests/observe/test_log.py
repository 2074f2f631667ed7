"""Log events: silent unless the application configured structlog or stdlib logging."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog
from structlog.testing import LogCapture

from aiotime.observe.log import get_logger


@pytest.fixture
def unconfigured() -> Iterator[None]:
    """The state in which an application finds structlog, before and after."""
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_silent_by_default() -> None:
    """A program that configures nothing sees nothing, not even an error, on either stream."""
    code = (
        "from aiotime.observe.log import get_logger; log = get_logger(stage='s');"
        "[method('stage.failed', frame=1) for method in (log.debug, log.info, log.warning, log.error)]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.usefixtures("unconfigured")
def test_structlog_once_configured() -> None:
    """A logger made before the application configures structlog follows it, with its bound values."""
    log = get_logger(stage="decode")
    capture = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    structlog.contextvars.bind_contextvars(request="r1")
    log.warning("stage.failed", frame=7)
    log.bind(device="cpu:0").info("stage.opened", stage="model")
    assert capture.entries == [
        {"event": "stage.failed", "stage": "decode", "frame": 7, "request": "r1", "log_level": "warning"},
        {"event": "stage.opened", "stage": "model", "device": "cpu:0", "request": "r1", "log_level": "info"},
    ]


@pytest.mark.usefixtures("unconfigured")
def test_structlog_capture_logs() -> None:
    """The way structlog offers for tests sees our events."""
    log = get_logger()
    with structlog.testing.capture_logs() as events:
        for method in (log.debug, log.info, log.warning, log.error):
            method("pipeline.opened", pipeline="p")
    assert [event["log_level"] for event in events] == ["debug", "info", "warning", "error"]
    assert {event["event"] for event in events} == {"pipeline.opened"}


@pytest.mark.usefixtures("unconfigured")
def test_stdlib_where_structlog_is_left_alone(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """An application on stdlib logging gets a line from the logger "aiotime"; structlog's printing does not start."""
    structlog.contextvars.bind_contextvars(request="r1")
    log = get_logger(stage="decode")
    with caplog.at_level(logging.INFO, logger="aiotime"):
        log.debug("stage.looked")
        log.error("stage.failed", frame=7, error="50 % of it")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("aiotime", "ERROR")
    assert record.getMessage() == "stage.failed request='r1' stage='decode' frame=7 error='50 % of it'"
    assert record.aiotime == {  # type: ignore[attr-defined]
        "event": "stage.failed",
        "request": "r1",
        "stage": "decode",
        "frame": 7,
        "error": "50 % of it",
    }
    assert record.funcName == "test_stdlib_where_structlog_is_left_alone"
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("unconfigured")
def test_exc_info(caplog: pytest.LogCaptureFixture) -> None:
    """``exc_info`` brings a traceback and is no value of the event."""
    with caplog.at_level(logging.ERROR, logger="aiotime"):
        get_logger().error("pipeline.broken", exc_info=ValueError("broken"))
    (record,) = caplog.records
    assert record.getMessage() == "pipeline.broken"
    assert record.exc_info is not None and isinstance(record.exc_info[1], ValueError)


@pytest.mark.usefixtures("unconfigured")
def test_disabled_events_are_not_formatted() -> None:
    """A value of an event that nobody wants is not even turned into text."""

    class Loud:
        def __repr__(self) -> str:
            raise AssertionError("formatted although nobody listens")

    get_logger().info("pipeline.opened", value=Loud())


@pytest.mark.usefixtures("unconfigured")
def test_bind_does_not_change_the_original(caplog: pytest.LogCaptureFixture) -> None:
    """bind() gives another logger."""
    log = get_logger(stage="a")
    log.bind(stage="b")
    with caplog.at_level(logging.WARNING, logger="aiotime"):
        log.warning("x.happened")
    assert caplog.records[0].getMessage() == "x.happened stage='a'"

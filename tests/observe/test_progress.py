"""The live display: plain lines by an injected clock, pictures on a terminal, feeding by hand and by a task."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from typing import Any

import pytest

from aiotime.errors import ClosedError, ConfigurationError
from aiotime.observe.progress import Progress
from aiotime.observe.stats import StageStats, Stats


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def snapshot(elapsed: float, frames: int, **changes: Any) -> Stats:
    """What a pipeline of two stages shows after ``elapsed`` seconds and ``frames`` frames."""
    stages = tuple(
        StageStats(name, device, 1, frames, 0, busy, 1 - busy, 0.0, 0.01, 0.02, 0.03, queue, 1.0, 4)
        for name, device, busy, queue in (("decode", "cpu:0", 0.97, 3), ("model", "cpu:1", 0.25, 0))
    )
    values: dict[str, Any] = {
        "name": "p",
        "stages": stages,
        "elapsed": elapsed,
        "frames_in": frames + 5,
        "frames_out": frames,
        "frames_shed": 0,
        "frames_failed": 0,
        "in_flight": 5,
        "waiting": 0,
        "budget_frames": 8,
        "budget_bytes": None,
        "bytes_in_flight": 0,
        "latency_p50": 0.05,
        "latency_p99": 0.08,
    }
    return Stats(**values | changes)


def plain_text(written: str) -> str:
    """Without control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)


# ------------------------------------------------------------------ plain lines


def test_plain_lines_every_few_seconds() -> None:
    """Away from a terminal: nothing at once, a line when its time has come, one at the end; no control codes."""
    clock, file = Clock(), io.StringIO()
    with Progress(1437, description="digits", file=file, every=5.0, clock=clock) as progress:
        progress.update(snapshot(0.0, 0))
        assert file.getvalue() == ""
        clock.now += 4.9
        progress.update(snapshot(4.0, 400))
        assert file.getvalue() == ""
        clock.now += 0.1
        progress.update(snapshot(5.0, 500))
        first = "digits: 500/1,437, 100 frames/s, 5 in flight, busy decode 97 % model 25 %\n"
        assert file.getvalue() == first
        clock.now += 1.0
        progress.update(snapshot(10.0, 1437, in_flight=0))
        assert file.getvalue() == first
    assert file.getvalue().splitlines()[1] == (
        "digits: 1,437/1,437, 187 frames/s, 0 in flight, busy decode 97 % model 25 %"
    )
    assert "\x1b" not in file.getvalue()


def test_the_last_line_is_not_written_twice() -> None:
    """What was shown already is not shown again at the end."""
    clock, file = Clock(), io.StringIO()
    with Progress(file=file, every=1.0, clock=clock) as progress:
        clock.now += 1.0
        progress.update(snapshot(1.0, 10))
    assert len(file.getvalue().splitlines()) == 1


def test_exit_twice() -> None:
    """Who ends the display early, to say something of his own, need not care that the block ends later."""
    file = io.StringIO()
    with Progress(file=file) as progress:
        progress.description = "stopping"
        progress.update(snapshot(2.0, 10, stages=()))
        progress.__exit__(None, None, None)
        progress.update(snapshot(3.0, 20, stages=()))
    assert file.getvalue() == "stopping: 10, 5 frames/s, 5 in flight\n"


def test_nothing_to_say() -> None:
    """Without an update there is no line."""
    file = io.StringIO()
    with Progress(file=file):
        pass
    assert file.getvalue() == ""


def test_shed_and_failed_are_told_when_there_are_some() -> None:
    """Losses are named; the total may be unknown."""
    file = io.StringIO()
    with Progress(file=file) as progress:
        progress.update(snapshot(2.0, 10, frames_shed=3, frames_failed=1, stages=()))
    assert file.getvalue() == "frames: 10, 5 frames/s, 5 in flight, 3 shed, 1 failed\n"


def test_rate_is_that_of_the_newest_seconds() -> None:
    """A stream that became faster shows how fast it is now, not its average."""
    file = io.StringIO()
    with Progress(file=file) as progress:
        for tenth in range(100):
            progress.update(snapshot(tenth / 10, tenth, stages=()))
        for tenth in range(100, 130):
            progress.update(snapshot(tenth / 10, 100 + 100 * (tenth - 100), stages=()))
    assert ", 1,000 frames/s" in file.getvalue()


def test_reopened_pipeline() -> None:
    """Counters that start anew are not compared with the old ones."""
    file = io.StringIO()
    with Progress(file=file) as progress:
        progress.update(snapshot(50.0, 1000, stages=()))
        progress.update(snapshot(2.0, 10, stages=()))
    assert file.getvalue() == "frames: 10, 5 frames/s, 5 in flight\n"


def test_updates_outside_the_block_write_nothing() -> None:
    """Only between enter and exit is the file ours."""
    clock, file = Clock(), io.StringIO()
    progress = Progress(file=file, clock=clock)
    progress.update(snapshot(1.0, 1))
    with progress:
        pass
    shown = file.getvalue()
    clock.now += 100
    progress.update(snapshot(2.0, 2))
    assert file.getvalue() == shown


def test_standard_error_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output belongs to the results."""
    with Progress() as progress:
        progress.update(snapshot(2.0, 10))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("frames: 10, ")


@pytest.mark.parametrize("options", [{"total": -1}, {"every": 0.0}, {"every": float("nan")}])
def test_arguments_are_checked(options: dict[str, Any]) -> None:
    """Nonsense is refused at once."""
    with pytest.raises(ConfigurationError):
        Progress(**options)


# ------------------------------------------------------------------ on a terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 120 columns that can move its cursor."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_picture_on_a_terminal(terminal: Terminal) -> None:
    """Counters, a bar for the whole, the time left, and for each stage a bar and its queue."""
    clock = Clock()
    with Progress(1000, description="digits", file=terminal, clock=clock) as progress:
        progress.update(snapshot(2.0, 200, frames_shed=2, frames_failed=1))
        shown = plain_text(terminal.getvalue())
    for part in ("digits", "200/1,000", "100 frames/s", "7.85 s left", "5 in flight", "2 shed", "1 failed", "━"):
        assert part in shown
    (decode,) = (line for line in shown.splitlines() if "decode" in line)
    assert "cpu:0" in decode and "97 % busy" in decode and "queue 3" in decode
    assert decode.count("━") > 20
    assert "\x1b[" in terminal.getvalue()


def test_picture_with_unknown_total(terminal: Terminal) -> None:
    """Without a total there is neither a bar for the whole nor a time left."""
    with Progress(file=terminal, clock=Clock()) as progress:
        progress.update(snapshot(2.0, 200))
    shown = plain_text(terminal.getvalue())
    assert "200 " in shown and "left" not in shown and "/1" not in shown


def test_redrawn_at_most_ten_times_a_second(terminal: Terminal) -> None:
    """Updates between two pictures cost no drawing; the last is drawn at the end."""
    clock = Clock()
    with Progress(file=terminal, clock=clock) as progress:
        progress.update(snapshot(1.0, 11))
        size = len(terminal.getvalue())
        clock.now += 0.0625
        progress.update(snapshot(1.05, 22))
        assert len(terminal.getvalue()) == size
        clock.now += 0.0625
        progress.update(snapshot(1.1, 33))
        assert len(terminal.getvalue()) > size
        progress.update(snapshot(1.11, 44))
    shown = plain_text(terminal.getvalue())
    drawn = [line.split()[1] for line in shown.splitlines() if line.startswith("frames")]
    assert list(dict.fromkeys(drawn)) == ["11", "33", "44"]


def test_plain_lines_without_rich(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets lines where the extra that brings rich is not installed."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with Progress(file=terminal) as progress:
        progress.update(snapshot(2.0, 10))
    assert terminal.getvalue().startswith("frames: 10, ")


def test_plain_lines_on_a_dumb_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot move its cursor gets lines."""
    monkeypatch.setenv("TERM", "dumb")
    with Progress(file=terminal) as progress:
        progress.update(snapshot(2.0, 10))
    assert terminal.getvalue().startswith("frames: 10, ")


def test_terminal_can_be_said(terminal: Terminal) -> None:
    """``terminal`` overrules what the file says of itself."""
    with Progress(file=terminal, terminal=False) as progress:
        progress.update(snapshot(2.0, 10))
    assert "\x1b" not in terminal.getvalue()
    file = io.StringIO()
    with Progress(file=file, terminal=True) as progress:
        progress.update(snapshot(2.0, 10))
    assert "\x1b" in file.getvalue()


def test_terminal_is_given_back_after_an_error(terminal: Terminal) -> None:
    """Whatever ends the block, the cursor is shown again."""
    with pytest.raises(ZeroDivisionError), Progress(file=terminal):
        raise ZeroDivisionError
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


# ------------------------------------------------------------------ fed by a task


@pytest.mark.asyncio
async def test_follow(settle: Any) -> None:
    """The task takes a snapshot at once, and one more is shown at the end."""
    file = io.StringIO()
    taken: list[Stats] = []

    def take() -> Stats:
        taken.append(snapshot(1.0 + len(taken), 10 * (len(taken) + 1), stages=()))
        return taken[-1]

    async with Progress(file=file).follow(take) as progress:
        assert isinstance(progress, Progress)
        await settle()
        assert len(taken) == 1
        assert "progress" in {task.get_name() for task in asyncio.all_tasks()}
    assert len(taken) == 2
    assert file.getvalue() == "frames: 20, 10 frames/s, 5 in flight\n"
    assert "progress" not in {task.get_name() for task in asyncio.all_tasks()}


@pytest.mark.asyncio
async def test_follow_ends_with_the_body(settle: Any) -> None:
    """An error of the body is the one that is raised; the task ends."""

    async def body() -> None:
        async with Progress(file=io.StringIO()).follow(lambda: snapshot(1.0, 10)):
            await settle()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    assert "progress" not in {task.get_name() for task in asyncio.all_tasks()}


@pytest.mark.asyncio
async def test_follow_tells_of_a_failing_snapshot(settle: Any) -> None:
    """A snapshot that raises is not swallowed, but it does not disturb the body."""
    asked, done = [], []

    def take() -> Stats:
        asked.append(True)
        if len(asked) == 1:
            raise LookupError("no statistics")
        return snapshot(1.0, 10)

    async def body() -> None:
        async with Progress(file=io.StringIO()).follow(take):
            await settle()
            done.append(True)

    with pytest.raises(LookupError, match="no statistics"):
        await body()
    assert done


@pytest.mark.asyncio
async def test_follow_passes_over_a_closed_pipeline(settle: Any) -> None:
    """Before run() has opened the pipeline and after it has closed it there is nothing to show, and no error."""
    file = io.StringIO()

    def take() -> Stats:
        raise ClosedError("not open")

    async with Progress(file=file).follow(take):
        await settle()
    assert file.getvalue() == ""

"""A live display of a running pipeline for the command line: rich on a terminal, plain lines elsewhere.

    async with pipeline, Progress(total=1437).follow(pipeline.stats):
        async for pred in pipeline.run(source):
            ...

Rates and shares are those of the newest seconds, counters those of the whole time.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from aiotime.errors import ClosedError, ConfigurationError
from aiotime.observe.stats import Stats
from aiotime.observe.tables import count, duration, share

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

REDRAW = 0.1  # seconds between two pictures on a terminal: drawing takes milliseconds of the loop
RECENT = 2.0  # seconds over which rate and shares are taken
BAR = 24  # columns


class Progress:
    """Shows frames done, rate, in flight, shed and failed, and for each stage its busy share and queue.

    On a terminal the picture is redrawn in place, at most ten times a second; elsewhere, and where rich is not
    installed, a plain line is written every few seconds and at the end. It has no thread and no timer of its
    own: it shows what `update` is given. Inside an event loop `follow` is simplest. A snapshot costs a
    good part of a millisecond, so take some per second, not one per frame.

    Args:
        total: frames that will come; None where that is not known.
        description: what is being done.
        file: where to write; None: standard error.
        every: seconds between two plain lines.
        clock: seconds for both intervals.
        terminal: None: ask ``file``.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        description: str = "frames",
        file: TextIO | None = None,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        terminal: bool | None = None,
    ) -> None:
        if total is not None and total < 0:
            raise ConfigurationError(f"total is a number of frames or None, not {total}")
        if not every > 0:
            raise ConfigurationError(f"every is the number of seconds between two lines, more than 0, not {every}")
        self.total = total
        self.description = description
        self._file = file if file is not None else sys.stderr
        self._every = every
        self._clock = clock
        self._terminal = terminal
        self._live: Live | None = None
        self._open = False
        self._shown: float | None = None  # when, on the clock
        self._recent: deque[Stats] = deque()  # snapshots of the newest seconds
        self._written: Stats | None = None  # what the newest line or picture shows

    def __enter__(self) -> Self:
        self._open = True
        self._live = _live_on(self._file, self._terminal)
        if self._live is not None:
            self._live.start()
        self._shown = None if self._live is not None else self._clock()  # no line before there is something to say
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        self._open = False
        try:
            if self._recent and self._written is not self._recent[-1]:
                self._show()
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def update(self, stats: Stats) -> None:
        """Take a new snapshot; it is shown if enough time has passed since the last one was."""
        recent = self._recent
        recent.append(stats)
        while len(recent) > 2 and stats.elapsed - recent[1].elapsed >= RECENT:
            recent.popleft()
        now = self._clock()
        interval = self._every if self._live is None else REDRAW
        if self._open and (self._shown is None or now - self._shown >= interval):
            self._shown = now
            self._show()

    @asynccontextmanager
    async def follow(self, snapshot: Callable[[], Stats], *, interval: float = REDRAW) -> AsyncIterator[Self]:
        """Open the display and update it with ``snapshot()`` every ``interval`` seconds, and at the end.

        It is done by a task of its own, which ends with the ``async with`` block however that is left. A
        pipeline that is not open is passed over; to see the last numbers too, leave this block before the
        pipeline is closed. An error of ``snapshot`` is raised at the end of the block.
        """
        with self:
            task = asyncio.create_task(self._follow(snapshot, interval), name="progress")
            try:
                yield self
            finally:
                task.cancel()
                await asyncio.wait([task])
                failed = None if task.cancelled() else task.exception()
            if failed is not None:
                raise failed
            self._take(snapshot)

    async def _follow(self, snapshot: Callable[[], Stats], interval: float) -> None:
        while True:
            self._take(snapshot)
            await asyncio.sleep(interval)

    def _take(self, snapshot: Callable[[], Stats]) -> None:
        try:
            stats = snapshot()
        except ClosedError:
            return  # run() opens the pipeline with the first frame and closes it after the last
        self.update(stats)

    def _show(self) -> None:
        newest, recent = self._recent[-1], self._now()
        self._written = newest
        if self._live is not None:
            self._live.update(picture(newest, recent, description=self.description, total=self.total), refresh=True)
        else:
            self._file.write(line(newest, recent, description=self.description, total=self.total) + "\n")
            self._file.flush()

    def _now(self) -> Stats:
        """The newest seconds alone; the whole time where there is nothing to compare with."""
        newest, oldest = self._recent[-1], self._recent[0]
        try:
            return newest.since(oldest) if newest.elapsed != oldest.elapsed else newest
        except ConfigurationError:  # another opening of the pipeline: its counters start anew
            self._recent.clear()
            self._recent.append(newest)
            return newest


def line(stats: Stats, recent: Stats, *, description: str, total: int | None = None) -> str:
    """One plain line: the counters of ``stats`` with the rate and the bottleneck of ``recent``."""
    parts = [
        f"{description}: {_done(stats, total)}",
        f"{count(_rounded(recent.frames_per_second))} frames/s",
        f"{count(stats.in_flight)} in flight",
    ]
    if stats.frames_shed:
        parts.append(f"{count(stats.frames_shed)} shed")
    if stats.frames_failed:
        parts.append(f"{count(stats.frames_failed)} failed")
    if recent.stages:
        parts.append("busy " + " ".join(f"{stage.name} {share(stage.busy)}" for stage in recent.stages))
    return ", ".join(parts)


def picture(stats: Stats, recent: Stats, *, description: str, total: int | None = None) -> RenderableType:
    """What a terminal shows, in 80 columns: two lines of counters, a row per stage with its busy share and queue."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    cells: list[RenderableType] = [Text(description, style="bold")]
    if total:
        cells.append(ProgressBar(total=total, completed=min(total, _ended(stats)), width=BAR))
    cells += [Text(_done(stats, total)), Text(f"{count(_rounded(recent.frames_per_second))} frames/s", style="cyan")]
    if total and recent.frames_out and total > _ended(stats):
        ended_per_second = _ended(recent) / recent.elapsed
        cells.append(Text(f"{duration((total - _ended(stats)) / ended_per_second)} left", style="dim"))
    head.add_row(*cells)
    losses = Text.assemble(
        f"  {count(stats.in_flight)} in flight  ",
        (f"{count(stats.frames_shed)} shed  ", "yellow" if stats.frames_shed else "dim"),
        (f"{count(stats.frames_failed)} failed", "red" if stats.frames_failed else "dim"),
    )
    body = Table.grid(padding=(0, 2))
    limiting = recent.bottleneck
    for stage in recent.stages:
        hot = stage.name == limiting
        body.add_row(
            Text("  " + stage.name, style="bold" if hot else ""),
            Text(stage.device, style="dim"),
            ProgressBar(total=1.0, completed=stage.busy, width=BAR, complete_style="red" if hot else "green"),
            Text(f"{share(stage.busy):>5} busy"),
            Text(f"queue {count(stage.queue)}", style="dim"),
        )
    return Group(head, losses, body)


def _done(stats: Stats, total: int | None) -> str:
    return count(stats.frames_out) if total is None else f"{count(stats.frames_out)}/{count(total)}"


def _ended(stats: Stats) -> int:
    return stats.frames_out + stats.frames_shed + stats.frames_failed


def _rounded(rate: float) -> float:
    return round(rate) if rate >= 100 else round(rate, 1)


def _live_on(file: TextIO, terminal: bool | None) -> Live | None:
    """A rich display on ``file``; None where that is no terminal, or rich is not installed."""
    if terminal is False or (terminal is None and not file.isatty()):
        return None
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return None
    console = Console(file=file, force_terminal=True if terminal else None)
    if console.is_dumb_terminal and not terminal:
        return None
    # no refresh thread: pictures are drawn by update()
    return Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

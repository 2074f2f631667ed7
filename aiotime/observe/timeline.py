"""A trace as a picture (matplotlib) or as text: lanes downwards, time to the right, one colour or digit per frame.

    cpu:0  01234.  83 %
    cpu:1  .01234  83 %

Both show the same stretch of time: what was asked for, else a steady one of about 40 frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Protocol

from aiotime.errors import ConfigurationError
from aiotime.observe.tables import duration, share
from aiotime.observe.trace import Slice, flows, lanes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES = 40  # shown unless a stretch is asked for
ALL_UP_TO = 60  # frames up to which everything is shown
CANDIDATES = 24  # stretches compared for steadiness


class Recorded(Protocol):
    """What has slices: a `Trace`."""

    @property
    def slices(self) -> list[Slice]:
        """By their start."""


def render_timeline(
    trace: Recorded | Sequence[Slice], *, width: int = 100, tick: float | None = None, last: float | None = None
) -> str:
    """The trace as text: one row per lane, one column per ``tick`` seconds.

    A digit is the last digit of the frame that had most of the column, ``#`` work for no frame, ``.`` an idle
    column: one that was idle for more than half of its time, unless it is the main one of a short job. At the
    end of the row stands how much of the time the lane was busy, below the time from the left edge.

    Args:
        trace: a `Trace`, or slices.
        width: columns for the time, where ``tick`` does not say how many it takes.
        tick: seconds per column; None: the stretch spread over ``width`` columns.
        last: show the newest ``last`` seconds; None: a steady stretch of about 40 frames.
    """
    if width < 1 or (tick is not None and tick <= 0):
        raise ConfigurationError(f"a timeline needs width >= 1 and tick > 0, not width={width}, tick={tick}")
    slices = _slices(trace)
    if not slices:
        return "(no slices were recorded)"
    start, end = _stretch(slices, last)
    step = tick or (end - start) / width or 1.0
    columns = max(1, ceil((end - start) / step - 1e-6)) if tick else width
    shown = [piece for piece in slices if piece.end > start and piece.start < end] or slices
    order = lanes(shown)
    margin = max(map(len, order))
    rows = []
    for lane in order:
        row, busy = _row([piece for piece in shown if piece.lane == lane], start, step, columns)
        rows.append(f"{lane.ljust(margin)}  {row}  {share(busy):>5}")
    left, right = "0", duration(step * columns)
    ruler = left + " " * max(1, columns - len(left) - len(right)) + right
    return "\n".join([*rows, " " * margin + "  " + ruler])


def _row(slices: Sequence[Slice], start: float, step: float, columns: int) -> tuple[str, float]:
    """The characters of a lane, and its busy share."""
    busy, most, sign, main = [0.0] * columns, [0.0] * columns, ["."] * columns, [False] * columns
    for piece in slices:
        begin, end = (piece.start - start) / step, (piece.end - start) / step
        largest, home = 0.0, None
        for column in range(max(0, int(begin)), min(columns, int(end) + 1)):
            part = min(end, column + 1) - max(begin, column)
            busy[column] += part
            if part > largest + 1e-9:  # the first of equals: a rounding error does not decide
                largest, home = part, column
            if part > most[column] + 1e-9:
                most[column] = part
                sign[column] = "#" if piece.frame is None else str(piece.frame % 10)
        if home is not None:
            main[home] = True
    row = "".join(
        char if home or part >= 0.5 - 1e-6 else "." for char, home, part in zip(sign, main, busy, strict=True)
    )
    return row, min(1.0, sum(busy) / columns)


def plot_timeline(
    trace: Recorded | Sequence[Slice],
    path: str | Path | None = None,
    *,
    last: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw lanes downwards and time to the right; each frame has a colour by which it can be followed.

    One frame in the middle is outlined on its way. At the right stands how much of the time each lane was busy.
    No global state of matplotlib is touched, so this works on a server and on any thread; it takes about half
    a second, so with a loop running use ``asyncio.to_thread``.

    Args:
        trace: a `Trace`, or slices.
        path: where to write the picture; its suffix says the format (png, svg, pdf).
        last: draw the newest ``last`` seconds; None: a steady stretch of about 40 frames.
        title: above the picture.

    Raises:
        ConfigurationError: matplotlib is missing, nothing was recorded, or it draws no such format.
    """
    try:
        from aiotime.observe import picture
    except ImportError as missing:
        raise ConfigurationError("plot_timeline() draws with matplotlib: pip install 'aiotime[plot]'") from missing
    slices = _slices(trace)
    if not slices:
        raise ConfigurationError("the trace holds no slices: record one while frames run, then plot it")
    start, end = _stretch(slices, last)
    shown = [piece for piece in slices if piece.end > start and piece.start < end] or slices
    figure = picture.draw(shown, lanes(shown), start, end, title=title)
    if path is not None:
        formats = figure.canvas.get_supported_filetypes()
        if Path(path).suffix.removeprefix(".").lower() not in formats:
            raise ConfigurationError(f"the suffix of {str(path)!r} is no picture's; use one of .{', .'.join(formats)}")
        figure.savefig(path)
    return figure


def _slices(trace: Recorded | Sequence[Slice]) -> list[Slice]:
    return sorted(trace, key=lambda piece: piece.start) if isinstance(trace, Sequence) else trace.slices


def _stretch(slices: Sequence[Slice], last: float | None) -> tuple[float, float]:
    """Which seconds to show."""
    first, newest = slices[0].start, max(piece.end for piece in slices)
    if last is not None:
        if not last > 0:
            raise ConfigurationError(f"last is the number of newest seconds to show, more than 0, not {last}")
        return max(first, newest - last), newest
    paths = flows(slices)
    if len(paths) <= ALL_UP_TO:
        return first, newest
    # the stage with most jobs stands for all: its jobs come as regularly as frames do
    stage, _ = Counter(piece.name for path in paths for piece in path).most_common(1)[0]
    starts = [piece.start for piece in slices if piece.name == stage and piece.frame is not None]
    if len(starts) <= FRAMES:
        return first, newest
    room = len(starts) - FRAMES - 1
    middle = room / 2
    places = sorted({round(room * (0.1 + 0.8 * part / (CANDIDATES - 1))) for part in range(CANDIDATES)})
    place = min(places, key=lambda at: (round(_unsteadiness(starts[at : at + FRAMES + 1]), 1), abs(at - middle)))
    return starts[place], starts[place + FRAMES]


def _unsteadiness(starts: Sequence[float]) -> float:
    """Spread of the times between neighbours relative to their mean."""
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    mean = fmean(gaps)
    return pstdev(gaps) / mean if mean > 0 else 0.0

"""The drawing behind `plot_timeline`. Imported only by it, for here matplotlib is imported at once.

Only matplotlib's objects are used, never pyplot: no global figure, no display, any thread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from aiotime.observe.meter import LOOP_LANE
from aiotime.observe.tables import count, duration, share
from aiotime.observe.trace import Slice, flows

INK = "#1f2430"
FAINT = "#7a8194"
TRACK = "#f1f3f7"  # an idle lane
NO_FRAME = "#aab1c0"  # work for no frame
HUES = 12  # frames until a colour comes again
WIDTH, LANE, FRAME = 12.0, 0.46, 1.5  # inches: the picture, each lane, title and axis together
LABEL, SMALL = 7.0, 5.6  # points, size of the labels in slices, and where there is less room
HAIR = 0.012  # inches, the least width of a slice: what is narrower than a pixel would come and go


def colour(frame: int | None) -> tuple[float, float, float]:
    """The colour of a frame: equally light hues around the circle, a neighbour 30 degrees on."""
    if frame is None:
        return _rgb(NO_FRAME)
    return _oklch(0.78, 0.115, 2 * math.pi * (frame % HUES) / HUES)


def draw(slices: Sequence[Slice], lanes: Sequence[str], start: float, end: float, *, title: str | None) -> Figure:
    """A picture of ``slices`` on ``lanes`` between ``start`` and ``end`` seconds."""
    span = (end - start) or 1e-9
    unit, scale = ("s", 1.0) if span >= 10 else ("ms", 1e3) if span >= 1e-3 else ("µs", 1e6)
    height = LANE * len(lanes) + FRAME
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    left = 0.3 + 0.075 * max(map(len, lanes)) + 0.1  # inches for the names of the lanes
    axes = figure.add_axes((left / WIDTH, 0.55 / height, (WIDTH - left - 1.0) / WIDTH, LANE * len(lanes) / height))
    axes.set_xlim(0, span * scale)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    _frame_axes(axes, lanes, unit)
    inches = (WIDTH - left - 1.0) / (span * scale)  # per unit of time
    beside = axes.get_yaxis_transform()  # x in shares of the width, y in lanes
    for row, lane in enumerate(lanes):
        pieces = [piece for piece in slices if piece.lane == lane]
        _draw_lane(axes, row, pieces, start, scale, inches, thin=lane == LOOP_LANE)
        busy = sum(min(piece.end, end) - max(piece.start, start) for piece in pieces) / span
        axes.text(1.012, row, share(min(1.0, busy)), transform=beside, va="center", color=INK, size=9)
    axes.text(1.012, -0.62, "busy", transform=beside, va="bottom", color=FAINT, size=8)
    followed = _follow(axes, slices, lanes, start, end, scale)
    frames = _finished(slices, end)
    heading = 1 - 0.34 / height
    figure.text(0.3 / WIDTH, heading, title or "Timeline", size=13, weight="bold", color=INK, va="center")
    summary = f"{count(frames)} frames in {duration(span)}"
    if frames:
        summary += f": {count(_three(frames / span))} frames/s"
    figure.text(0.3 / WIDTH, 1 - 0.6 / height, summary + followed, size=9, color=FAINT, va="center")
    return figure


def _frame_axes(axes: Axes, lanes: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(lanes)), lanes, color=INK, size=9)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
    axes.set_xlabel(f"time ({unit})", color=FAINT, size=8)
    axes.grid(axis="x", color="#dfe3ea", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_lane(
    axes: Axes, row: int, pieces: Sequence[Slice], start: float, scale: float, inches: float, *, thin: bool
) -> None:
    half = 0.2 if thin else 0.36
    low, high = axes.get_xlim()
    axes.add_patch(Rectangle((low, row - half), high - low, 2 * half, facecolor=TRACK, zorder=0.4))
    ends = []
    for piece in pieces:
        begin, end = max(low, (piece.start - start) * scale), min(high, (piece.end - start) * scale)
        ends.append((begin, max(end, begin + HAIR / inches)))
    boxes = [((begin, row - half), (begin, row + half), (end, row + half), (end, row - half)) for begin, end in ends]
    mean = sum(end - begin for begin, end in ends) * inches / max(1, len(ends))
    edge = 0.6 if mean > 0.06 else 0.25 if mean > 0.02 else 0.0  # a white rim would swallow what is thin
    colours = [colour(piece.frame) for piece in pieces]
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="white", linewidths=edge, zorder=1))
    if thin:
        return
    labels, points = _labels(pieces, [(end - begin) * inches for begin, end in ends])
    for label, (begin, end) in zip(labels, ends, strict=True):
        if label:
            axes.text((begin + end) / 2, row, label, ha="center", va="center", size=points, color=INK, clip_on=True)


def _labels(pieces: Sequence[Slice], rooms: Sequence[float]) -> tuple[list[str], float]:
    """A label for each slice of a lane, "" where it does not fit into its room (inches), and one size for all."""
    several = len({piece.name for piece in pieces}) > 1  # the lane is shared by stages: say which

    def choose(piece: Slice, room: float, points: float) -> str:
        index = "" if piece.frame is None else str(piece.frame)
        for label in (f"{piece.name} {index}".strip() if several or not index else index, index):
            if len(label) * points * 0.64 / 72 + 0.02 <= room:
                return label
        return ""

    large = [choose(piece, room, LABEL) for piece, room in zip(pieces, rooms, strict=True)]
    if sum(map(bool, large)) >= 0.75 * len(large):
        return large, LABEL
    return [choose(piece, room, SMALL) for piece, room in zip(pieces, rooms, strict=True)], SMALL


def _finished(slices: Sequence[Slice], end: float) -> int:
    """How many frames left their last stage before ``end``."""
    paths = flows(slices)
    longest = max(map(len, paths), default=0)
    lasts = Counter(path[-1].name for path in paths if len(path) == longest)
    last = max(lasts, key=lasts.__getitem__, default="")
    return sum(piece.name == last and piece.frame is not None and piece.end <= end for piece in slices)


def _follow(axes: Axes, slices: Sequence[Slice], lanes: Sequence[str], start: float, end: float, scale: float) -> str:
    """Outline the way of one frame in the middle; returns what to say about it."""
    whole = [path for path in flows(slices) if path[0].start >= start and path[-1].end <= end]
    longest = max(map(len, whole), default=0)
    middle = (start + end) / 2
    whole = [path for path in whole if len(path) == longest]
    if longest < 2:
        return ""
    path = min(whole, key=lambda path: abs((path[0].start + path[-1].end) / 2 - middle))
    row = {lane: number for number, lane in enumerate(lanes)}
    for piece in path:
        corner = ((piece.start - start) * scale, row[piece.lane] - 0.36)
        width = (piece.end - piece.start) * scale
        axes.add_patch(Rectangle(corner, width, 0.72, fill=False, edgecolor=INK, linewidth=1.1, zorder=3))
    for one, following in pairwise(path):
        step = 1 if row[following.lane] > row[one.lane] else -1 if row[following.lane] < row[one.lane] else 0
        axes.plot(
            [(one.end - start) * scale, (following.start - start) * scale],
            [row[one.lane] + 0.36 * step, row[following.lane] - 0.36 * step],
            color=INK,
            linewidth=1.0,
            zorder=2,
        )
    spent = duration(path[-1].end - path[0].start)
    return f"  ·  outlined: frame {path[0].frame}, {spent} from its first stage to the end of its last"


def _three(number: float) -> float:
    return float(f"{number:.3g}")


def _rgb(code: str) -> tuple[float, float, float]:
    red, green, blue = (int(code[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def _oklch(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """OKLCH to sRGB (B. Ottosson, "A perceptual color space for image processing", 2020); ``hue`` in radians."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (
        min(1.0, max(0.0, 12.92 * part if part <= 0.0031308 else 1.055 * part ** (1 / 2.4) - 0.055)) for part in linear
    )
    return red, green, blue

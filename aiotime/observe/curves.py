"""The drawing behind `PrequentialResult.plot`. Imported only by it, for here matplotlib is imported at once.

Only matplotlib's objects are used, never pyplot: no global figure, no display, any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aiotime.errors import ConfigurationError

HUES = ("#2a6fbb", "#c0504d", "#444b5d", "#2e9e6b", "#8a63b8", "#c98a1b")


def draw(lines: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, *, x: str, y: str, title: str) -> None:
    """Lines of (x, y) points by name, written to ``path``.

    Raises:
        ConfigurationError: matplotlib draws no such format.
    """
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    suffix = Path(path).suffix.removeprefix(".").lower()
    formats = canvas.get_supported_filetypes()
    if suffix not in formats:
        raise ConfigurationError(f"the suffix of {str(path)!r} is no picture's; use one of .{', .'.join(formats)}")
    axes = figure.subplots()
    for at, (name, points) in enumerate(lines.items()):
        marker = "o" if len(points) == 1 else None
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            label=name,
            color=HUES[at % len(HUES)],
            marker=marker,
            linewidth=1.4,
        )
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)

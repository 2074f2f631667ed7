"""Learning curves, of `PrequentialResult.plot` and the demo. Imported late, for here matplotlib is imported at once.

Only matplotlib's objects are used, never pyplot: no global figure, no display, any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aiotime.errors import ConfigurationError

HUES = ("#2a6fbb", "#c0504d", "#444b5d", "#2e9e6b", "#8a63b8", "#c98a1b")


Lines = Mapping[str, Sequence[tuple[float, float]]]  # (x, y) points by name


def draw(lines: Lines, path: str | Path, *, x: str, y: str, title: str) -> None:
    """Lines of (x, y) points by name, written to ``path``.

    Raises:
        ConfigurationError: matplotlib draws no such format.
    """
    draw_panels({title: lines}, path, x=x, y=y)


def draw_panels(panels: Mapping[str, Lines], path: str | Path, *, x: str, y: str) -> None:
    """A panel for each title, side by side; a name has the same colour in all, and one legend.

    Raises:
        ConfigurationError: matplotlib draws no such format.
    """
    width = 7.2 if len(panels) == 1 else 5.4 * len(panels)
    figure = Figure(figsize=(width, 4.0), dpi=150, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    suffix = Path(path).suffix.removeprefix(".").lower()
    formats = canvas.get_supported_filetypes()
    if suffix not in formats:
        raise ConfigurationError(f"the suffix of {str(path)!r} is no picture's; use one of .{', .'.join(formats)}")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    found = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(found, panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot(
                [point[0] for point in points],
                [point[1] for point in points],
                label=name,
                color=HUES[names.index(name) % len(HUES)],
                marker="o" if len(points) == 1 else None,
                linewidth=1.4,
            )
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(x)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    found[0].set_ylabel(y)
    if len(names) > 1:
        found[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)

"""The picture of ``aiotime demo learn``: prequential accuracy over frames, a panel for each stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from aiotime.errors import ConfigurationError

if TYPE_CHECKING:
    from aiotime.cli.learning import Curve

COLOURS = ("#444b5d", "#c0504d", "#2a6fbb", "#2e9e6b", "#8a63b8")


def plot_curves(curves: Sequence[Curve], path: Path, *, window: int = 200) -> None:
    """Draw accuracy, each point the mean of the ``window`` frames before it.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError('pictures need matplotlib: pip install "aiotime[plot]"') from error
    names = list(dict.fromkeys(curve.stream for curve in curves))
    rules = list(dict.fromkeys(curve.rule for curve in curves))
    figure = Figure(figsize=(5.2 * len(names), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for curve in (curve for curve in curves if curve.stream == name):
            sums = [0, *accumulate(curve.right)]
            means = [(sums[at] - sums[max(0, at - window)]) / min(at, window) for at in range(1, len(sums))]
            panel.plot(means, label=curve.rule, color=COLOURS[rules.index(curve.rule) % len(COLOURS)], linewidth=1.3)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("frames seen")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"accuracy before learning, last {window}")
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)

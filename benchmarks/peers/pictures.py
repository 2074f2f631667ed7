"""The plots. Matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import ENTRIES, PLAIN
from benchmarks.peers.race import Outcome

COLOURS = {"sequential": "0.55", "compiled": "tab:brown", "by hand": "tab:green", "framework": "tab:blue"}
OURS = "tab:orange"


def bars(path: Path, works: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Per work, throughput over that of the plain loop; whoever failed is named with an empty bar."""
    plt = _pyplot()
    columns = 2
    rows = (len(works) + columns - 1) // columns
    tallest = max(len(outcomes) for outcomes in works.values())
    figure, grid = plt.subplots(
        rows, columns, figsize=(14, rows * (1.2 + 0.24 * tallest)), layout="constrained", squeeze=False
    )
    for axes, (title, outcomes) in zip(grid.flat, works.items(), strict=False):
        base = outcomes[PLAIN]
        names = list(outcomes)[::-1]
        for place, name in enumerate(names):
            outcome = outcomes[name]
            if outcome.failed or base.failed:
                axes.text(0, place, " failed", va="center", fontsize=7, color="tab:red")
                continue
            times = sorted(a / b for a, b in zip(outcome.rates, base.rates, strict=True))
            middle = times[len(times) // 2]
            colour = COLOURS.get(ENTRIES[name].family, OURS)
            axes.barh(place, middle, color=colour, xerr=[[middle - times[0]], [times[-1] - middle]], ecolor="0.3")
            axes.text(times[-1], place, f"  {middle:.2f}", va="center", fontsize=7)
        axes.set_yticks(range(len(names)), [ENTRIES[name].title for name in names], fontsize=7)
        axes.axvline(1.0, color="0.7", linewidth=0.8)
        axes.set_title(title, fontsize=8)
        axes.margins(x=0.12)
    for axes in grid.flat[len(works) :]:
        axes.set_axis_off()
    figure.supxlabel("× plain loop on 1 thread", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes: a line per contender."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: str = "xy"


def lines(path: Path, panels: Sequence[Panel]) -> None:
    """Curves, side by side."""
    plt = _pyplot()
    columns = min(3, len(panels))
    rows = (len(panels) + columns - 1) // columns
    figure, grid = plt.subplots(rows, columns, figsize=(5.4 * columns, 4.2 * rows), layout="constrained", squeeze=False)
    seen: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        for name, points in panel.lines.items():
            if not points:
                continue
            entry = ENTRIES[name]
            ours = entry.family == "aiotime"
            style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 2.2 if ours else 1.1}
            if name in seen:
                style["color"] = seen[name]
            (line,) = axes.plot(*zip(*points, strict=True), label=entry.title, **style)
            seen.setdefault(name, line.get_color())
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.title.set_fontsize(9)
        if "x" in panel.logarithmic:
            axes.set_xscale("log", base=2)
        if "y" in panel.logarithmic:
            axes.set_yscale("log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=6)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt

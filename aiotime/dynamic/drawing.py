"""The drawing behind `Path.draw`. Imported only by it, for here matplotlib is imported at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from aiotime.dynamic.path import Path

FORWARD, BACKWARD = 0.34, 0.2  # heights of the bars, in rows


def draw(path: Path, title: str) -> Figure:
    """Stages as rows, time to the right, an arrow for each result that another call was given."""
    visits = path.visits
    start = min((visit.asked for visit in visits), default=0.0)
    end = max((visit.ended for visit in visits), default=0.0)
    unit, scale = ("s", 1.0) if end - start >= 10 else ("ms", 1e3)
    rows = {stage: row for row, stage in enumerate(path.stages)}
    figure = Figure(figsize=(11, 1.2 + 0.7 * max(1, len(rows))), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends: dict[int, tuple[float, float]] = {}
    for visit in visits:
        row = rows[visit.stage]
        colour = f"C{row % 10}"
        asked, begun, ended = ((second - start) * scale for second in (visit.asked, visit.begun, visit.ended))
        axes.plot([asked, begun], [row, row], color=colour, lw=0.8, ls=":")
        axes.barh(row, ended - begun, left=begun, height=FORWARD, color=colour)
        if visit.size > 1:
            axes.annotate(f"×{visit.size}", ((begun + ended) / 2, row - 0.2), ha="center", va="bottom", fontsize=6)
        if visit.back is not None:
            left, right = ((second - start) * scale for second in visit.back)
            axes.barh(row + 0.3, right - left, left=left, height=BACKWARD, fill=False, edgecolor=colour, lw=0.8)
        ends[visit.number] = (ended, row)
        for parent in visit.parents:
            if parent in ends:
                arrow = {"arrowstyle": "->", "lw": 0.5, "color": "0.5"}
                axes.annotate("", xy=(begun, row), xytext=ends[parent], arrowprops=arrow)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{unit} since the first call   (dotted: waiting · ×n: calls in the batch · outlined: backward)")
    axes.set_title(title)
    return figure

"""Pictures of one JSON: python -m benchmarks.gpu.plots gpu.json. They are drawn from the file alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLOURS = {"plain": "tab:gray", "lock-step": "tab:orange", "aiotime": "tab:blue"}


def figures(data: dict[str, Any], part: str) -> dict[str, Any]:
    """What a part has found."""
    found: dict[str, Any] = data.get("parts", {}).get(part, {}).get("figures", {})
    return found


def curves(cells: dict[str, Any], key: str) -> dict[str, tuple[list[float], list[float]]]:
    """Way -> (stage durations, values) of what was measured, in µs."""
    found = {}
    for way, durations in cells.items():
        points = sorted((float(at), cell[key]) for at, cell in durations.items() if cell.get(key) is not None)
        if points:
            found[way] = ([at for at, _ in points], [value for _, value in points])
    return found


def bars(task: dict[str, Any], *keys: str) -> list[tuple[str, str, float]]:
    """(contender, family, value) of those that have one."""
    found = []
    for name, each in task.get("contenders", {}).items():
        value: Any = each
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append((name, each["family"], float(value)))
    return found


def wake_up(data: dict[str, Any], plot: Any) -> Any:
    """Latency and CPU of every way, per loop."""
    loops = figures(data, "wake-up").get("cells", {})
    if not loops:
        return None
    figure, axes = plot.subplots(3, len(loops), figsize=(7 * len(loops), 13), squeeze=False, sharex=True)
    rows = (("p50_us", "p50, µs"), ("p99_us", "p99, µs"), ("cpu_us_per_frame", "CPU per frame, µs"))
    for column, (loop, cells) in enumerate(loops.items()):
        for row, (key, label) in enumerate(rows):
            axis = axes[row][column]
            for way, (at, values) in curves(cells, key).items():
                axis.plot(at, [max(value, 0.1) for value in values], marker="o", label=way)
            axis.set(xscale="log", yscale="log", ylabel=label)
            if row == 0:
                axis.axhline(30, color="black", linewidth=0.8, linestyle=":")
                axis.set_title(f"wake-up on {loop}")
        axes[-1][column].set_xlabel("duration of the stage, µs")
    axes[0][0].legend(fontsize=7)
    return figure


def contest(data: dict[str, Any], plot: Any) -> Any:
    """Frames/s, idle share and p99 of every contender in every task."""
    tasks = {
        name: task
        for name, task in figures(data, "partime").get("tasks", {}).items()
        if bars(task, "saturated", "per_s")
    }
    if not tasks:
        return None
    figure, axes = plot.subplots(len(tasks), 3, figsize=(18, 3.2 * len(tasks)), squeeze=False)
    columns: tuple[tuple[str, tuple[str, ...], float], ...] = (
        ("frames/s, saturated", ("saturated", "per_s"), 1.0),
        ("GPU idle, %, saturated", ("trace", "idle"), 100.0),
        ("p99, ms, half load", ("paced", "p99_ms"), 1.0),
    )
    for row, (name, task) in enumerate(tasks.items()):
        for column, (label, keys, factor) in enumerate(columns):
            axis, found = axes[row][column], bars(task, *keys)
            axis.barh([each[0] for each in found], [each[2] * factor for each in found])
            for bar, each in zip(axis.patches, found, strict=True):
                bar.set_color(COLOURS[each[1]])
            axis.tick_params(labelsize=7)
            axis.invert_yaxis()
            axis.set_title(f"{name}: {label}", fontsize=9)
    return figure


def transfers(data: dict[str, Any], plot: Any) -> Any:
    """GB/s and the launching thread's µs, by size."""
    sizes = figures(data, "transfers").get("copies", {})
    names = {name for cells in sizes.values() for name, cell in cells.items() if "gb_per_s" in cell}
    if not names:
        return None
    figure, axes = plot.subplots(1, 2, figsize=(13, 4.5))
    for axis, key, label in zip(axes, ("gb_per_s", "host_us"), ("GB/s", "launching thread, µs a frame"), strict=True):
        for name in sorted(names):
            axis.plot(list(sizes), [cells.get(name, {}).get(key) for cells in sizes.values()], marker="o", label=name)
        axis.set(yscale="log", ylabel=label, xlabel="frame")
    axes[0].legend(fontsize=8)
    return figure


def sharing(data: dict[str, Any], plot: Any) -> Any:
    """Stages that share the GPU, against one stream."""
    sizes = figures(data, "sharing").get("ways", {})
    sizes = {size: ways for size, ways in sizes.items() if ways.get("one stream", {}).get("per_s")}
    if not sizes:
        return None
    figure, axis = plot.subplots(figsize=(9, 4.5))
    for name in next(iter(sizes.values())):
        values = [(ways.get(name, {}).get("per_s") or 0.0) / ways["one stream"]["per_s"] for ways in sizes.values()]
        axis.plot(list(sizes), values, marker="o", label=name)
    axis.set(ylabel="× one stream", xlabel="picture", title="four stages on one GPU, frames/s")
    axis.legend(fontsize=7)
    return figure


PLOTS: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "wake-up": wake_up,
    "contest": contest,
    "transfers": transfers,
    "sharing": sharing,
}


def draw(data: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write every picture that there is something for; name -> what became of it."""
    try:
        import matplotlib as mpl
    except ImportError:
        return {"plots": "matplotlib is not installed; draw them later: python -m benchmarks.gpu.plots gpu.json"}
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    told = {}
    for name, plot in PLOTS.items():
        try:
            figure = plot(data, plt)
            if figure is None:
                told[name] = "nothing to draw"
                continue
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=110)
            plt.close(figure)
            told[name] = f"{name}.png"
        except Exception as error:  # noqa: BLE001 - a picture must not cost the figures
            told[name] = f"failed: {type(error).__name__}: {error}"
    return told


def main() -> None:
    path = Path(sys.argv[1])
    print(draw(json.loads(path.read_text()), path.parent))


if __name__ == "__main__":
    main()

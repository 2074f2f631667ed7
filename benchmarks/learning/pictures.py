"""The pictures of the study; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMOOTHED = 5  # blocks that a curve is averaged over
Points = Sequence[tuple[float, float]]


def _axes(number: int) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, number, figsize=(7 * number, 4.5), layout="constrained", squeeze=False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(path: Path, by_rule: Mapping[str, Sequence[float]], *, title: str, block: int) -> None:
    """Prequential accuracy over frames: a running mean over `SMOOTHED` blocks."""
    figure, (axes,) = _axes(1)
    for name, values in by_rule.items():
        means = [sum(values[at : at + SMOOTHED]) / SMOOTHED for at in range(len(values) - SMOOTHED + 1)]
        axes.plot([(at + SMOOTHED) * block for at in range(len(means))], means, label=name)
    axes.set(title=title, xlabel="frames", ylabel=f"accuracy of the last {SMOOTHED * block} predictions", ylim=(0, 1))
    axes.legend(loc="lower right")
    _save(figure, path)


def against_delay(path: Path, by_stream: Mapping[str, Mapping[str, Points]], *, exact: Mapping[str, float]) -> None:
    """Accuracy against the updates that the first stage's weights lack; every rule over 2, 4 and 8 stages."""
    figure, all_axes = _axes(max(1, len(by_stream)))
    for axes, (stream, by_rule) in zip(all_axes, by_stream.items(), strict=False):
        for name, points in by_rule.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        if stream in exact:
            axes.axhline(exact[stream], color="0.5", linestyle=":", label="exact")
        axes.set(title=stream, xlabel="delay at the first stage (updates)", ylabel="accuracy", ylim=(0, 1))
        axes.legend(loc="lower left")
    _save(figure, path)


def against_correlation(path: Path, by_rule: Mapping[str, Points]) -> None:
    """Accuracy against frames per scene."""
    figure, (axes,) = _axes(1)
    for name, points in by_rule.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="frames from cut to cut", ylabel="accuracy", ylim=(0, 1), title="digits-smooth, 4 stages")
    axes.legend(loc="lower right")
    _save(figure, path)

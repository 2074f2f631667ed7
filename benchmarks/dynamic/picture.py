"""The picture of a part: accuracy over instances and over seconds. Matplotlib is imported when it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.dynamic.race import Curve


def curves(path: Path, found: Sequence[Curve], *, target: float, title: str) -> None:
    """One line per way, of the first seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for curve in found:
        left.plot(curve.instances, curve.accuracy, label=curve.way.name)
        right.plot(curve.seconds, curve.accuracy, label=curve.way.name)
    for axes, label in ((left, "instances learned from"), (right, "seconds of learning")):
        axes.axhline(target, color="0.6", linestyle=":")
        axes.set_xlabel(label)
    left.set(ylabel="accuracy on the validation set", title=title)
    left.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)

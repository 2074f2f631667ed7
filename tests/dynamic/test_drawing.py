"""The figure behind `Path.draw`: a row per stage, a bar per forward, an outline per backward, an arrow per parent."""

from __future__ import annotations

import pytest

from aiotime.dynamic import Path, Visit

pytest.importorskip("matplotlib")

VISITS = (
    Visit(0, "one", 0.0, 1.0, 2.0, 1, 1, (), (6.0, 7.0)),
    Visit(1, "two", 2.0, 2.0, 3.0, 1, 3, (0,), (5.0, 6.0)),
    Visit(2, "one", 3.0, 3.0, 4.0, 2, 1, (0, 1), None),
)


def test_bars_arrows_and_rows() -> None:
    """As many of each as there are, in milliseconds below ten seconds."""
    from aiotime.dynamic.drawing import draw

    figure = draw(Path(0, VISITS), "title")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert len(axes.patches) == 3 + 2
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("×3") == 1
    assert texts.count("") == 3
    assert axes.get_title() == "title"
    widths = sorted(patch.get_width() for patch in axes.patches)  # type: ignore[attr-defined]
    assert widths == pytest.approx([1000.0] * 5)


def test_long_paths_are_in_seconds_and_empty_ones_are_drawn() -> None:
    """From ten seconds on; without a call there is an empty picture."""
    from aiotime.dynamic.drawing import draw

    late = Visit(0, "one", 0.0, 1.0, 20.0, 1, 1, ())
    assert draw(Path(0, (late,)), "").axes[0].get_xlabel().startswith("s since")
    assert not draw(Path(0, ()), "").axes[0].patches

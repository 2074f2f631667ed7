"""Text timelines to the exact character; pictures by what was drawn into them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from aiotime.errors import ConfigurationError
from aiotime.observe.picture import HUES, colour
from aiotime.observe.timeline import plot_timeline, render_timeline
from aiotime.observe.trace import Slice, Trace


def schedule(stages: Sequence[float], frames: int) -> Trace:
    """A frame enters a stage as soon as it has left the one before and the stage is free."""
    trace, free = Trace(), [0.0] * len(stages)
    for frame in range(frames):
        at = 0.0
        for stage, seconds in enumerate(stages):
            start = max(at, free[stage])
            at = free[stage] = start + seconds
            trace.slice(f"cpu:{stage}", f"stage {stage}", start, at, frame)
    return trace


# ------------------------------------------------------------------ text


def test_render_a_staircase() -> None:
    """A column per tick: three equal stages work on three frames at once."""
    assert render_timeline(schedule([1, 1, 1], 5), tick=1.0).splitlines() == [
        "cpu:0  01234..   71 %",
        "cpu:1  .01234.   71 %",
        "cpu:2  ..01234   71 %",
        "       0 7.00 s",
    ]


def test_render_a_bottleneck() -> None:
    """A slow stage in the middle is seen: the one after it idles."""
    assert render_timeline(schedule([1, 2, 1], 4), tick=1.0).splitlines()[:3] == [
        "cpu:0  0123......   40 %",
        "cpu:1  .00112233.   80 %",
        "cpu:2  ...0.1.2.3   40 %",
    ]


def test_render_spreads_over_the_width() -> None:
    """Without a tick the stretch fills the width; the ruler stands under it."""
    lines = render_timeline(schedule([1, 1], 3), width=8).splitlines()
    assert lines == ["cpu:0  001122..   75 %", "cpu:1  ..001122   75 %", "       0 4.00 s"]


def test_render_short_and_long_jobs() -> None:
    """A short job has one column, a column has the job that had most of it; the rest of a job counts from half on."""
    slices = [
        Slice("cpu:0", "s", 0.0, 1.0, 17),
        Slice("cpu:0", "s", 1.9, 2.3, 18),
        Slice("cpu:0", "s", 4.0, 4.6, 19),
        Slice("cpu:0", "s", 4.6, 6.5, 20),
        Slice("cpu:0", "s", 7.2, 8.4, 21),
        Slice("loop", "settle", 1.0, 2.0),
    ]
    assert render_timeline(slices, tick=1.0).splitlines()[:2] == ["cpu:0  7.8.9001.   57 %", "loop   .#.......   11 %"]


def test_render_does_not_trip_over_rounding() -> None:
    """A tenth of a second is no binary fraction: ends and starts that meet give no stray columns."""
    trace = Trace()
    now = 0.0
    for frame in range(30):
        trace.slice("cpu:0", "s", now, now + 0.1, frame)
        now += 0.1
    assert render_timeline(trace, tick=0.1).splitlines()[0] == "cpu:0  " + "0123456789" * 3 + "  100 %"
    # 1.1 - 1 is greater than 1 - 0.9, in the last binary digit: a job around an edge belongs to the column before it
    around = [Slice("cpu:0", "s", 0.0, 2.0, 4), Slice("cpu:1", "s", 0.9, 1.1, 5)]
    assert render_timeline(around, tick=1.0).splitlines()[1] == "cpu:1  5.   10 %"


@given(
    st.lists(st.floats(0.01, 5), min_size=1, max_size=4), st.integers(1, 80), st.integers(1, 130), st.floats(0.01, 3)
)
def test_render_always_fits(stages: list[float], frames: int, width: int, last: float) -> None:
    """A row per lane, each as wide as asked, of the characters that were promised."""
    trace = schedule(stages, frames)
    for text in (render_timeline(trace, width=width), render_timeline(trace, width=width, last=last)):
        *rows, _ = text.splitlines()
        assert {len(row) for row in rows} == {len("cpu:0  " + "  100 %") + width}
        assert set("".join(row[7 : 7 + width] for row in rows)) <= set("0123456789.")


def test_render_the_newest() -> None:
    """``last`` cuts off what came before."""
    trace = schedule([1, 1], 6)
    assert render_timeline(trace, tick=1.0, last=3).splitlines()[:2] == ["cpu:0  45.   67 %", "cpu:1  345  100 %"]


def test_render_a_steady_stretch_of_many() -> None:
    """Of a thousand frames about forty are shown, from where they came regularly."""
    trace = Trace()
    now = 0.0
    for frame in range(1000):
        now += 1.0 if 300 <= frame < 420 else 1.0 + (frame * 7919 % 13)  # steady only between 300 and 420
        trace.slice("cpu:0", "s", now, now + 1.0, frame)
    row = render_timeline(trace, tick=1.0).splitlines()[0]
    assert row.startswith("cpu:0  ") and row.endswith("  100 %") and "." not in row
    assert len(row) == 7 + 40 + 7


def test_render_nothing() -> None:
    """An empty trace says so."""
    assert render_timeline(Trace()) == "(no slices were recorded)"
    assert render_timeline([Slice("cpu:0", "s", 1.0, 1.0, 3)], width=3).startswith("cpu:0  ")


@pytest.mark.parametrize(("width", "tick"), [(0, None), (10, 0.0), (10, -1.0)])
def test_render_checks(width: int, tick: float | None) -> None:
    """Nonsense is refused before anything is drawn."""
    with pytest.raises(ConfigurationError, match="width >= 1 and tick > 0"):
        render_timeline(schedule([1], 1), width=width, tick=tick)


@pytest.mark.parametrize("last", [0.0, -1.0, float("nan")])
def test_last_is_checked(last: float) -> None:
    """Both kinds of timeline want a positive number of seconds."""
    for show in (render_timeline, plot_timeline):
        with pytest.raises(ConfigurationError, match="newest seconds"):
            show(schedule([1], 1), last=last)


# ------------------------------------------------------------------ picture


def test_plot_writes_a_png(tmp_path: Path) -> None:
    """The file is a PNG; the figure comes back for who wants to change it."""
    path = tmp_path / "timeline.png"
    figure = plot_timeline(schedule([1e-3, 2e-3], 20), path, title="two stages")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert figure.texts[0].get_text() == "two stages"
    assert figure.texts[1].get_text().startswith("20 frames in 41.0 ms: 488 frames/s")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("frames", [1, 10, 250])
def test_plot_lanes_labels_and_slices(stages: int, frames: int) -> None:
    """A box for each slice of the stretch, a row per lane from top to bottom, labels only inside their slices."""
    trace = schedule([1e-3] * stages, frames)
    trace.slice("loop", "settle", 0.0, 1e-6)
    figure = plot_timeline(trace, last=1.0)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [*(f"cpu:{s}" for s in range(stages)), "loop"]
    boxes = sum(len(collection.get_paths()) for collection in axes.collections)
    assert boxes == stages * frames + 1
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.draw(renderer)
    per_frame = axes.get_window_extent().width / (frames + stages - 1)
    labels = [text for text in axes.texts if text.get_text().isdecimal()]
    assert all(text.get_window_extent(renderer).width < per_frame for text in labels)
    if frames <= 10:
        assert len(labels) == stages * frames


def test_plot_follows_one_frame() -> None:
    """The heading says which frame is outlined and what it took."""
    figure = plot_timeline(schedule([1e-3, 1e-3], 11))
    assert "outlined: frame 5, 2.00 ms from its first stage" in figure.texts[1].get_text()
    assert "outlined" not in plot_timeline(schedule([1e-3], 11)).texts[1].get_text()


def test_plot_shows_a_steady_stretch() -> None:
    """Two thousand slices are not all drawn unless asked for."""
    (axes,) = plot_timeline(schedule([1e-3] * 4, 500)).axes
    low, high = axes.get_xlim()
    assert high - low == pytest.approx(40)  # ms
    assert axes.get_xlabel() == "time (ms)"


@pytest.mark.parametrize(("seconds", "unit"), [(1e-6, "µs"), (1e-3, "ms"), (2.0, "s")])
def test_plot_chooses_the_unit(seconds: float, unit: str) -> None:
    """The axis counts in what the stretch is long in."""
    (axes,) = plot_timeline(schedule([seconds], 10)).axes
    assert axes.get_xlabel() == f"time ({unit})"


def test_plot_names_stages_where_a_lane_has_several() -> None:
    """On a shared lane the index alone would not say what was done."""
    slices = [
        Slice("cpu:0", "encode", 0.0, 1.0, 3),
        Slice("cpu:0", "decode", 1.0, 2.0, 3),
        Slice("cpu:1", "m", 0, 1, 4),
    ]
    (axes,) = plot_timeline(slices).axes
    assert {"encode 3", "decode 3", "4"} <= {text.get_text() for text in axes.texts}


def test_colours_cycle_and_differ() -> None:
    """Neighbours are told apart, and a frame has one colour on each lane."""
    assert colour(3) == colour(3 + HUES)
    assert len({colour(frame) for frame in range(HUES)}) == HUES
    for frame in range(HUES):
        assert to_rgb(colour(frame)) == colour(frame)
        brightness = sum(part * weight for part, weight in zip(colour(frame), (0.2126, 0.7152, 0.0722), strict=True))
        assert 0.55 < brightness < 0.85  # dark labels are legible on each


def test_plot_nothing() -> None:
    """An empty trace is an error that says what to do."""
    with pytest.raises(ConfigurationError, match="record one while frames run"):
        plot_timeline(Trace())


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where matplotlib is missing the error names the extra."""
    monkeypatch.delitem(sys.modules, "aiotime.observe.picture", raising=False)
    monkeypatch.delattr("aiotime.observe.picture", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'aiotime\[plot\]'"):
        plot_timeline(schedule([1], 2))

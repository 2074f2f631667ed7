"""What a stage learned: means, differences between two snapshots, and the cells of its row."""

from __future__ import annotations

from typing import Any

import pytest

from aiotime.observe.lessons import LESSON_COLUMNS, Lessons, lessons
from aiotime.observe.meter import Recorder


def learned(**changes: Any) -> Lessons:
    """Eight frames in four seconds."""
    values: dict[str, Any] = {
        "frames": 8,
        "updates": 4,
        "skipped": 1,
        "delays": ((0, 2), (3, 6)),
        "backward": 0.5,
        "backward_p50": 0.25,
        "kept_bytes": 2048,
    }
    return Lessons(**values | changes)


def test_shares_are_of_the_elapsed_time_and_quantiles_of_backwards() -> None:
    """Weight jobs count as backward too; delays are put in order."""
    backward, weights = Recorder("s backward", "cpu:0"), Recorder("s weights", "cpu:0")
    backward.add(0.0, 0.5, 0)
    backward.add(1.0, 1.5, 1)
    weights.add(2.0, 3.0, 1)
    made = lessons([backward, weights], elapsed=4.0, frames=2, updates=2, skipped=0, delays={2: 1, 0: 1}, kept_bytes=0)
    assert (made.backward, made.backward_p50) == (0.5, 0.5)
    assert made.delays == ((0, 1), (2, 1))
    assert lessons([], elapsed=0.0, frames=0, updates=0, skipped=0, delays={}, kept_bytes=0).backward == 0.0


def test_delays_have_a_mean_and_a_greatest() -> None:
    """0 before the first frame."""
    assert (learned().delay_mean, learned().delay_max) == (2.25, 3)
    assert (learned(delays=()).delay_mean, learned(delays=()).delay_max) == (0.0, 0)


def test_the_difference_of_two_snapshots_is_what_was_learned_between() -> None:
    """Counters subtracted, shares of the time between; a checkpoint restored meanwhile makes nothing negative."""
    between = learned(backward=0.75).since(learned(frames=5, updates=2, delays=((0, 2), (3, 1))), 8.0, 4.0)
    assert (between.frames, between.updates, between.skipped) == (3, 2, 0)
    assert between.delays == ((3, 5),)
    assert between.backward == pytest.approx(1.0)
    assert learned(frames=1).since(learned(), 4.0, 4.0) == learned(
        frames=0, updates=0, skipped=0, delays=(), backward=0.0
    )


def test_a_row_fits_its_columns() -> None:
    """In the units of the other tables."""
    assert learned().row("head") == ["head", "8", "4", "1", "2.25", "3", "50 %", "250 ms", "2.00 KiB"]
    assert len(learned().row("head")) == len(LESSON_COLUMNS)

"""Tests of aiotime.frame: what a source may yield, what comes out, what travels."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from aiotime.devices.base import Pending
from aiotime.frame import Frame, Prediction, Sample


class Nobody:
    def settled(self, frame: Frame) -> None: ...


def test_a_sample_is_a_frozen_value() -> None:
    """A Sample holds what goes beside a payload and cannot be changed on its way; tensors are not compared."""
    sample = Sample(1, key="camera")
    assert (sample.target, sample.deadline, sample.ack) == (None, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.key = "other"  # type: ignore[misc]
    assert sample != Sample(1, key="camera")


def test_a_frame_begins_unsettled() -> None:
    """A new frame carries its payload as a finished pending value and has no outcome."""
    frame = Frame(Nobody(), 4, Pending("payload", done=True), 1.5)
    frame.key = "camera"
    assert frame.tail is not None
    assert (frame.tail.value, frame.index, frame.arrived) == ("payload", 4, 1.5)
    assert not frame.settled
    assert not frame.cancelled
    assert frame.error is None
    assert repr(frame) == "<Frame 4 key='camera'>"
    with pytest.raises(AttributeError):
        frame.other = 1  # type: ignore[attr-defined]


def test_a_prediction_says_what_it_has() -> None:
    """Without a learner there is neither loss nor delay."""
    prediction = Prediction("output", 3)
    assert (prediction.loss, prediction.delay, prediction.dropped_before, prediction.latency) == (None, None, 0, 0.0)


def test_the_control_plane_does_without_torch() -> None:
    """Frames, errors and channels can be imported where torch is not."""
    code = "import sys; sys.modules['torch'] = None; import aiotime.frame, aiotime.errors, aiotime.channel"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Tests of aiotime.errors: the tree, and what a frame's error carries."""

from __future__ import annotations

import inspect

import pytest

from aiotime import errors

EVERY = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", EVERY)
def test_one_root(cls: type[Exception]) -> None:
    """Everything aiotime raises can be caught as AiotimeError, and each error says when it is raised."""
    assert issubclass(cls, errors.AiotimeError)
    assert cls.__doc__
    assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.InputError, ValueError),
        (errors.StageTimeout, TimeoutError),
        (errors.DeadlineExceeded, TimeoutError),
    ],
)
def test_also_what_python_would_raise(cls: type[Exception], base: type[Exception]) -> None:
    """Who knows only Python's own errors can catch these as such."""
    assert issubclass(cls, base)


def test_a_frame_error_carries_stage_frame_and_key() -> None:
    """The place is told in attributes, not only in the text."""
    error = errors.StageTimeout("late", stage="encoder", frame=3, key="camera")
    assert (str(error), error.stage, error.frame, error.key) == ("late", "encoder", 3, "camera")

"""The settings of a lesson: what is refused, and when an optimizer lives on."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from aiotime.dynamic.lesson import Lesson, itself
from aiotime.errors import ConfigurationError
from aiotime.learning.corrections import DelayScaling, GapAware

SETTINGS: dict[str, Any] = {
    "loss": None,
    "optimizer": partial(torch.optim.SGD, lr=0.1),
    "min_update_frequency": 8,
    "update_per": "gradient",
    "weights": "stashed",
    "corrections": (),
    "unused": "warn",
    "scheduler": None,
    "param_groups": None,
    "clip_norm": None,
    "guard": True,
    "precision": None,
    "supervised": None,
}


def lesson(**options: Any) -> Lesson:
    return Lesson(**{**SETTINGS, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_update_frequency": 0}, "min_update_frequency"),
        ({"min_update_frequency": 2.5}, "min_update_frequency"),
        ({"update_per": "epoch"}, "update_per"),
        ({"weights": "predicted"}, "weights"),
        ({"unused": "shout"}, "unused"),
        ({"corrections": [GapAware(), GapAware()]}, "both change"),
        ({"corrections": ["gap"]}, "corrections"),
        ({"clip_norm": -1.0}, "clip_norm"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    """With the argument's name."""
    with pytest.raises(ConfigurationError, match=said):
        lesson(**options)


def test_when_an_optimizer_lives_on() -> None:
    """Equal partials, schedulers, groups and corrections; the counts, the clipping and the weights may change."""
    one = lesson()
    assert one.continues(lesson(optimizer=partial(torch.optim.SGD, lr=0.1), min_update_frequency=1, clip_norm=1.0))
    assert one.continues(lesson(weights="current", update_per="instance"))
    assert not one.continues(lesson(optimizer=partial(torch.optim.SGD, lr=0.2)))
    assert not one.continues(lesson(optimizer=partial(torch.optim.Adam, lr=0.1)))
    assert not one.continues(lesson(optimizer=lambda params: torch.optim.SGD(params, lr=0.1)))
    assert not one.continues(lesson(scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1)))
    assert not one.continues(lesson(corrections=[DelayScaling()]))
    assert lesson(corrections=[DelayScaling()]).continues(lesson(corrections=[DelayScaling()]))
    assert not lesson(corrections=[DelayScaling(1.0)]).continues(lesson(corrections=[DelayScaling(2.0)]))


def test_without_a_loss_the_output_is_the_loss() -> None:
    """And nothing needs a target."""
    one = lesson()
    assert not one.supervised
    x = torch.ones((), requires_grad=True)
    assert itself(x) is x
    assert lesson(loss=torch.nn.functional.mse_loss).supervised

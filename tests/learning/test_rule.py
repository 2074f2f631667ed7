"""Rule: settings that cannot work are refused with what would; the loss is checked, and moved to."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from aiotime.errors import ConfigurationError, InputError
from aiotime.learning import Delayed
from aiotime.learning.learner import Site
from aiotime.learning.weights import Weights, slots_of

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": 3}, "loss must be a callable"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)}, r"functools\.partial\(torch\.optim\.SGD"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"update_every": 0}, "update_every is a number of frames from 1"),
        ({"precision": torch.float64}, "precision must be"),
        ({"late": -1}, "late is a number of frames"),
        ({"idle": 0.0}, "idle must be positive seconds or None"),
        ({"weights": "predicted?"}, "weights must be"),
        ({"order": "fast"}, "order must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    """Refused when the rule is made, saying what to hand in."""
    with pytest.raises(ConfigurationError, match=message):
        Delayed(**{"loss": functional.mse_loss, "optimizer": SGD, **settings})


def test_whether_a_loss_wants_a_target_is_seen() -> None:
    """Two arguments needed: yes; one needed: no; where it cannot be seen: yes."""

    def reconstruction(output: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        return output.sum() * weight

    assert Delayed(loss=functional.mse_loss, optimizer=SGD).supervised
    assert Delayed(loss=nn.MSELoss(), optimizer=SGD).supervised
    assert Delayed(loss=partial(functional.cross_entropy, label_smoothing=0.1), optimizer=SGD).supervised
    assert not Delayed(loss=reconstruction, optimizer=SGD).supervised
    assert not Delayed(loss=lambda output: output.sum(), optimizer=SGD).supervised


def value_of(loss: Any, output: Any, target: Any = None) -> torch.Tensor:
    return Delayed(loss=loss, optimizer=SGD).loss_value(output, target, frame=7, key="cat")


def test_the_loss_is_one_number_with_a_graph() -> None:
    """Of shape () or (1,); anything else is refused with frame, key and what to do."""
    x = torch.ones(1, 2, requires_grad=True)
    assert value_of(functional.mse_loss, x, torch.zeros(1, 2)).shape == ()
    assert value_of(lambda y, t: (y - t).sum(1), x, torch.zeros(1, 2)).shape == ()
    for loss, message in [
        (lambda y, t: (y - t) ** 2, r"shape \(1, 2\), not one number; reduce it"),
        (lambda y, t: 3.0, "returned float, not one number"),
        (lambda y, t: (y.detach() - t).sum(), "does not depend on any parameter"),
        (lambda y, t: y @ t, r"output.*\(1, 2\).*against target.*\(1, 2\).*: RuntimeError"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            value_of(loss, x, torch.zeros(1, 2))
        assert (caught.value.frame, caught.value.key) == (7, "cat")


def test_targets_may_be_pytrees_and_inference_tensors() -> None:
    """A target made in inference mode can be saved for the backward, wherever in the tree it is."""
    x = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        target = {"a": torch.full((2,), 3.0), "name": "text"}
    loss = value_of(lambda y, t: (y * t["a"]).sum(), x, target)
    assert torch.equal(torch.autograd.grad(loss, [x])[0], torch.full((2,), 3.0))


def optimizer_of(given: Any, index: int, name: str = "mid") -> type[torch.optim.Optimizer]:
    module = nn.Linear(1, 1)
    site = Site(index, 3, name, module, [("", module)])
    rule = Delayed(loss=functional.mse_loss, optimizer=given)
    return type(rule.updater(site, Weights(slots_of(site.modules))).optimizer)


def test_each_stage_may_have_an_optimizer_of_its_own() -> None:
    """One for all, a list by position, a mapping by name with "*" for the others."""
    adam = partial(torch.optim.Adam, lr=0.1)
    assert optimizer_of(adam, 1) is torch.optim.Adam
    assert [optimizer_of([SGD, adam, SGD], k) for k in range(3)] == [torch.optim.SGD, torch.optim.Adam, torch.optim.SGD]
    assert optimizer_of({"mid": adam, "*": SGD}, 1) is torch.optim.Adam
    assert optimizer_of({"mid": adam, "*": SGD}, 1, "top") is torch.optim.SGD
    with pytest.raises(ConfigurationError, match="2 optimizers for 3 stages"):
        optimizer_of([SGD, adam], 0)
    with pytest.raises(ConfigurationError, match=r"no optimizer for stage 'mid'.*add it"):
        optimizer_of({"top": adam}, 0)


def test_mixed_precision_runs_the_forward_in_it() -> None:
    """Half the bits in the matrix products, whole ones in masters and gradients; float16 losses are scaled."""
    module = nn.Linear(4, 4)
    for precision, scale in ((torch.bfloat16, 1.0), (torch.float16, 2.0**12)):
        rule = Delayed(loss=functional.mse_loss, optimizer=SGD, precision=precision)
        with rule.autocast(torch.device("cpu")):
            assert module(torch.ones(1, 4)).dtype is precision
        assert rule.loss_scale() == scale
    with Delayed(loss=functional.mse_loss, optimizer=SGD).autocast(torch.device("cpu")):
        assert module(torch.ones(1, 4)).dtype is torch.float32

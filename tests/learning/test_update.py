"""The updater: mean, guard, clipping, optimizer, scheduler, and its state."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from aiotime.errors import ConfigurationError
from aiotime.learning.update import Updater
from aiotime.learning.weights import Weights, slots_of

SGD = partial(torch.optim.SGD, lr=1.0)


def updater(module: nn.Module | None = None, optimizer: Any = SGD, **settings: Any) -> Updater:
    module = module or nn.Linear(2, 1)
    return Updater(Weights(slots_of([("", module)])), optimizer, stage="s", **settings)


def grads(value: float = 1.0) -> list[torch.Tensor | None]:
    return [torch.full((1, 2), value), torch.full((1,), value)]


def change(of: Updater, *added: list[torch.Tensor | None], **options: Any) -> list[torch.Tensor]:
    """What one step on the mean of ``added`` does to the weights."""
    before = of.weights.snapshot()
    for each in added:
        of.add(each)
    of.step(keep_old=False, **options)
    return [after - was for after, was in zip(of.weights.snapshot(), before, strict=True)]


def test_the_optimizer_takes_the_mean() -> None:
    """Several gradients are averaged; what a frame did not use is not counted as a zero of another shape."""
    mine = updater(every=3)
    moved = change(mine, grads(1.0), [torch.full((1, 2), 5.0), None], grads(3.0))
    assert torch.allclose(moved[0], torch.full((1, 2), -3.0))
    assert torch.allclose(moved[1], torch.full((1,), -4.0 / 3))
    assert (mine.updates, mine.gathered) == (1, 0)


def test_due_after_as_many_as_asked_for() -> None:
    """The caller steps when it is due, or earlier where a stream ends."""
    mine = updater(every=2)
    due = []
    for _ in range(4):
        mine.add(grads())
        due.append(mine.due)
        if mine.due:
            assert mine.step(keep_old=False)
    assert due == [False, True, False, True]


def test_a_step_without_gradients_is_none() -> None:
    """Nothing was added, or no frame used a parameter: momentum and schedule stay where they are."""
    mine = updater(optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.9))
    change(mine, grads())
    assert not mine.step(keep_old=False)
    assert all(not delta.any() for delta in change(mine, [None, None]))
    assert mine.updates == 1


def test_a_parameter_that_no_frame_used_is_left_alone() -> None:
    """Its gradient is None, not zero: no weight decay, no momentum."""
    mine = updater(optimizer=partial(torch.optim.SGD, lr=1.0, weight_decay=0.5))
    moved = change(mine, [torch.ones(1, 2), None])
    assert moved[0].any() and not moved[1].any()


def test_gradients_handed_in_are_not_written_to() -> None:
    """The first of a sum and the clipped one are the very tensors that went to the stage below."""
    mine = updater(every=2, clip_norm=0.1, optimizer=partial(torch.optim.Adam, lr=0.1, maximize=True))
    first, second = grads(), grads(2.0)
    change(mine, first, second)
    assert torch.equal(first[0], torch.ones(1, 2)) and torch.equal(second[0], torch.full((1, 2), 2.0))  # type: ignore[arg-type]
    assert all(master.grad is None for master in mine.weights.masters)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_guard_skips_what_is_not_finite(bad: float) -> None:
    """Weights, optimizer state and schedule stay; it is counted; the next one is taken."""
    mine = updater(optimizer=partial(torch.optim.Adam, lr=0.1))
    change(mine, grads())
    state = [value.clone() for entry in mine.optimizer.state.values() for value in entry.values()]
    assert all(not delta.any() for delta in change(mine, [torch.tensor([[1.0, bad]]), torch.ones(1)]))
    after = [value for entry in mine.optimizer.state.values() for value in entry.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    assert (mine.updates, mine.skipped) == (1, 1)
    assert any(delta.any() for delta in change(mine, grads()))


def test_without_the_guard_it_goes_through() -> None:
    """Who turned it off gets what PyTorch would give."""
    mine = updater(guard=False)
    assert change(mine, [torch.full((1, 2), math.nan), None])[0].isnan().all()


def test_clipping_is_that_of_torch() -> None:
    """By the norm over all of the stage's parameters; what is short enough is not touched."""
    mine = updater(clip_norm=1.0)
    expected = nn.Linear(2, 1)
    for parameter, grad in zip(expected.parameters(), grads(3.0), strict=True):
        parameter.grad = grad.clone() if grad is not None else None
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    moved = change(mine, grads(3.0))
    for delta, parameter in zip(moved, expected.parameters(), strict=True):
        assert torch.allclose(-delta, parameter.grad)  # type: ignore[arg-type]
    assert mine.norm == pytest.approx(float(norm))
    assert torch.allclose(change(mine, grads(0.1))[0], torch.full((1, 2), -0.1))


def test_a_scaled_loss_is_scaled_back() -> None:
    """Before the norm is taken."""
    mine = updater(clip_norm=100.0)
    assert torch.allclose(change(mine, grads(8.0), scale=8.0)[0], torch.full((1, 2), -1.0))
    assert mine.norm == pytest.approx(math.sqrt(3))


def test_the_schedule_steps_with_the_updates() -> None:
    """Not with frames, and not where an update was skipped."""
    mine = updater(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), every=2)
    rates = []
    for value in (1.0, 1.0, math.nan, 1.0):
        rates.append(mine.optimizer.param_groups[0]["lr"])
        change(mine, grads(value), grads(value))
    assert rates == [1.0, 0.5, 0.25, 0.25]


def test_a_factor_on_the_rate_is_for_one_step() -> None:
    """The groups' own rates come back, also after an optimizer that raised."""
    mine = updater()
    mine.rate = lambda: 0.5
    assert torch.allclose(change(mine, grads())[0], torch.full((1, 2), -0.5))
    assert mine.optimizer.param_groups[0]["lr"] == 1.0

    def fails(closure: Any = None) -> None:
        raise ValueError("no")

    mine.optimizer.step = fails  # type: ignore[method-assign, assignment]
    mine.add(grads())
    with pytest.raises(ValueError, match="no"):
        mine.step(keep_old=True)
    assert mine.optimizer.param_groups[0]["lr"] == 1.0


def test_groups_of_the_users_own() -> None:
    """Named parameters in, groups out: one rate for weights, none for biases."""

    def groups(named: Any) -> list[dict[str, Any]]:
        named = dict(named)
        return [{"params": [named["weight"]], "lr": 2.0}, {"params": [named["bias"]], "lr": 0.0}]

    moved = change(updater(param_groups=groups), grads())
    assert torch.allclose(moved[0], torch.full((1, 2), -2.0)) and not moved[1].any()


def test_sparse_gradients() -> None:
    """An embedding's, with the optimizer made for them: the guard can look at them too."""
    mine = updater(nn.Embedding(4, 2, sparse=True), partial(torch.optim.SparseAdam, lr=0.1), clip_norm=10.0, every=2)
    for _ in range(2):
        table = mine.weights.working[0]
        loss = torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum()
        mine.add(torch.autograd.grad(loss, [table]))
    before = mine.weights.snapshot()[0]
    assert mine.step(keep_old=False)
    assert (mine.weights.snapshot()[0] != before).any(1).tolist() == [False, True, False, False]


def test_in_inference_mode_as_a_barrier_calls_it() -> None:
    """The rest of a mini-batch is applied by a thread in inference mode; nothing becomes an inference tensor."""
    mine = updater(optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.9, weight_decay=0.1), every=4)
    seen: list[bool] = []
    mine.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(master.grad.is_inference() for master in mine.weights.masters)  # type: ignore[union-attr]
    )
    mine.add(grads())
    mine.add(grads())
    with torch.inference_mode():
        assert mine.step(keep_old=True)
    assert seen == [False, False]
    change(mine, grads())
    state = [value for entry in mine.optimizer.state.values() for value in entry.values()]
    assert not any(tensor.is_inference() for tensor in [*mine.weights.masters, *state])


def test_state_goes_on_where_it_was() -> None:
    """Optimizer, schedule, counters and what was gathered: the continued one makes the same weights."""

    def made() -> Updater:
        torch.manual_seed(0)
        return updater(
            optimizer=partial(torch.optim.Adam, lr=0.1),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            every=2,
        )

    one, other = made(), made()
    for value in (1.0, 2.0, 3.0):
        one.add(grads(value))
        if one.due:
            one.step(keep_old=False)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for master, source in zip(other.weights.masters, one.weights.masters, strict=True):
        master.data = source.data.clone()
    assert other.gathered == 1
    for mine in (one, other):
        mine.add(grads(4.0))
        mine.step(keep_old=False)
    for a, b in zip(one.weights.masters, other.weights.masters, strict=True):
        assert torch.equal(a, b)
    assert one.updates == other.updates == 2


def test_what_cannot_be_an_optimizer_is_named() -> None:
    """With the stage, the cause, and what to hand in."""
    with pytest.raises(ConfigurationError, match=r"stage 's'.*no parameters|stage 's'.*empty parameter list"):
        Updater(Weights([]), SGD, stage="s")
    with pytest.raises(ConfigurationError, match=r"returned a list, not a torch\.optim\.Optimizer"):
        updater(optimizer=list)

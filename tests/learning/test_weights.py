"""Weights in versions: what an update changes, and what graphs made before it still see."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from aiotime.learning.weights import Weights, slots_of


def weights_of(*modules: nn.Module) -> Weights:
    return Weights(slots_of([(f"m{at}.", module) for at, module in enumerate(modules)]))


def step(weights: Weights, change: Callable[[torch.Tensor], object], *, keep_old: bool) -> None:
    def act() -> None:
        with torch.no_grad():
            for master in weights.masters:
                change(master)

    weights.update(act, keep_old=keep_old)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_slots_are_named_and_tied_ones_occur_twice() -> None:
    """Prefix, path and attribute; a user's own names where they are given; a tied tensor has two slots, one master."""
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    slots = slots_of([("a.", tied)], {"a.1.weight": "head.weight"})
    assert [slot.name for slot in slots] == ["a.0.weight", "head.weight"]
    weights = Weights(slots)
    assert len(weights.masters) == 1
    assert tied[0].weight is tied[1].weight is weights.working[0]


def test_what_was_handed_in_is_never_written_to(layer: nn.Linear) -> None:
    """The tensors found are copied: whoever holds them keeps them as they are."""
    mine = layer.weight
    before = mine.detach().clone()
    weights = weights_of(layer)
    step(weights, lambda w: w.add_(1), keep_old=False)
    assert torch.equal(mine, before)
    assert torch.equal(layer.weight, before + 1)


def test_frozen_parameters_are_left_alone(layer: nn.Linear) -> None:
    """No master, and the slot keeps the very tensor it had."""
    layer.bias.requires_grad_(False)
    bias = layer.bias
    weights = weights_of(layer)
    assert weights.names == ["m0.weight"]
    assert layer.bias is bias


@pytest.mark.parametrize("keep_old", [True, False], ids=["stashed", "current"])
def test_a_delayed_backward_sees_old_or_new_weights_as_asked(layer: nn.Linear, keep_old: bool) -> None:
    """Autograd would refuse a backward whose weights were changed in place; here it takes those the rule wants.

    y = W x with y's gradient 1: dy/dx = sum of the rows of W, of the old one or of the new one.
    """
    weights = weights_of(layer)
    old = weights.snapshot()[0]
    x = torch.randn(1, 3, requires_grad=True)
    y = layer(x)
    used = weights.working
    step(weights, lambda w: w.mul_(3), keep_old=keep_old)
    down, *grads = torch.autograd.grad(y.sum(), [x, *used])
    assert torch.allclose(down, (old if keep_old else 3 * old).sum(0, keepdim=True))
    assert torch.equal(grads[0], x.detach().expand(2, 3))
    assert torch.equal(layer.weight, 3 * old)
    assert weights.version == 1


def test_plain_autograd_would_have_refused(layer: nn.Linear) -> None:
    """The trap itself, so that the test above is known to test something."""
    x = torch.randn(1, 3, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), [x])


def test_several_versions_live_side_by_side(layer: nn.Linear) -> None:
    """Each graph keeps the weights of its own forward over many updates, and the newest are those of all updates."""
    weights = weights_of(layer)
    x = torch.randn(1, 3, requires_grad=True)
    expected, graphs = [], []
    for _ in range(4):
        expected.append(weights.snapshot()[0].sum(0, keepdim=True))
        graphs.append(layer(x).sum())
        step(weights, lambda w: w.add_(1), keep_old=True)
    for graph, rows in zip(graphs, expected, strict=True):
        assert torch.allclose(torch.autograd.grad(graph, [x])[0], rows)
    assert torch.allclose(layer.weight.sum(0), expected[0][0] + 4 * 2)


def test_versions_cost_nothing_unless_asked_for(layer: nn.Linear) -> None:
    """Without ``keep_old`` the storage stays; with it the masters move and the old storage goes with its last graph."""
    weights = weights_of(layer)
    place = layer.weight.data_ptr()
    step(weights, lambda w: w.add_(1), keep_old=False)
    assert layer.weight.data_ptr() == weights.masters[0].data_ptr() == place
    step(weights, lambda w: w.add_(1), keep_old=True)
    assert layer.weight.data_ptr() == weights.masters[0].data_ptr() != place
    assert weights.nbytes() == 4 * (6 + 2)


@pytest.mark.parametrize("keep_old", [True, False])
def test_a_step_that_raises_leaves_one_truth(layer: nn.Linear, keep_old: bool) -> None:
    """What forwards read and what the optimizer updates stay the same tensors, before and after the next update."""
    weights = weights_of(layer)

    def fails() -> None:
        with torch.no_grad():
            weights.masters[0].add_(1)
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        weights.update(fails, keep_old=keep_old)
    assert torch.equal(layer.weight, weights.masters[0])
    step(weights, lambda w: w.mul_(2), keep_old=False)
    assert torch.equal(layer.weight, weights.masters[0])
    assert torch.equal(layer.bias, weights.masters[1])


def test_masters_keep_their_identity_when_weights_are_loaded(layer: nn.Linear) -> None:
    """An optimizer made for them goes on with its state; what the slots hold is taken over, not shared."""
    weights = weights_of(layer)
    masters = list(weights.masters)
    state = {key: torch.full_like(value, 7.0) for key, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    weights.adopt()
    assert all(now is before for now, before in zip(weights.masters, masters, strict=True))
    assert all((master == 7).all() for master in weights.masters)
    step(weights, lambda w: w.add_(1), keep_old=False)
    assert (state["weight"] == 7).all()


def test_a_module_takes_a_state_in_place_of_working_tensors(layer: nn.Linear) -> None:
    """What an update has put into the slots are parameters: nothing else can be replaced through the module."""
    weights = weights_of(layer)
    step(weights, lambda w: w.add_(1), keep_old=True)
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight = nn.Parameter(torch.zeros(2, 3))
    layer.load_state_dict({key: torch.ones_like(value) for key, value in layer.state_dict().items()})
    assert (layer.weight == 1).all()


def test_using_reads_other_tensors_inside_the_block(layer: nn.Linear) -> None:
    """Predicted weights are read and differentiated; outside, and after an error, the working ones are back."""
    weights = weights_of(layer)
    working = weights.working
    predicted = [torch.zeros_like(master).requires_grad_() for master in weights.masters]
    x = torch.ones(1, 3)
    with weights.using(predicted):
        y = layer(x)
        assert weights.working[0] is predicted[0]
    assert torch.equal(y, torch.zeros(1, 2))
    assert torch.equal(torch.autograd.grad(y.sum(), predicted)[0], torch.ones(2, 3))
    with pytest.raises(ValueError, match="inside"), weights.using(predicted):
        raise ValueError("inside")
    assert layer.weight is weights.working[0] is working[0]


def test_recurrent_layers_read_what_was_installed() -> None:
    """They keep a list of their own, which is renewed with every version."""
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4)
    reference = copy.deepcopy(layer)
    weights = weights_of(layer)
    x = torch.randn(2, 1, 3)
    step(weights, lambda w: w.add_(0.1), keep_old=True)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1)
    assert torch.equal(layer(x)[0], reference(x)[0])


def test_rebind_is_told_of_every_new_version(layer: nn.Linear) -> None:
    """Generated code that holds the tensors themselves gets the new ones; an update in place needs no word."""
    held: list[torch.Tensor] = []
    weights = Weights(slots_of([("", layer)]), rebind=lambda: held.append(layer.weight))
    step(weights, lambda w: w.add_(1), keep_old=True)
    assert held[-1] is layer.weight
    told = len(held)
    step(weights, lambda w: w.add_(1), keep_old=False)
    assert len(held) == told


def test_the_thread_may_be_in_inference_mode(layer: nn.Linear) -> None:
    """A device's thread is: masters, versions and gradients are ordinary tensors all the same."""
    with torch.inference_mode():
        weights = weights_of(layer)
        optimizer = torch.optim.Adam(weights.masters)
        for master in weights.masters:
            with torch.inference_mode(mode=False):
                master.grad = torch.ones_like(master)
        weights.update(optimizer.step, keep_old=True)
    assert not any(tensor.is_inference() for tensor in [*weights.masters, *weights.working])
    functional.mse_loss(layer(torch.ones(1, 3)), torch.ones(1, 2)).backward()  # type: ignore[no-untyped-call]

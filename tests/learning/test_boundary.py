"""The boundary of a stage: what becomes a leaf, what is copied, and what the stage above is protected from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from aiotime.learning.boundary import Boundary, detached, nbytes_of, tensors_of


def through(boundary: Boundary, fn: Any, value: Any) -> tuple[Any, list[torch.Tensor]]:
    """One call as a learner makes it."""
    given, entry = boundary.enter(value)
    watched = boundary.watch(given)
    output = fn(given)
    boundary.learned(watched)
    return output, entry


def test_tensors_become_leaves_in_order() -> None:
    """Through a pytree: floats (and complex numbers) require grad, whole numbers and other things stay as they are."""
    boundary = Boundary(differentiable=True)
    value = {"a": (torch.ones(2), torch.tensor([1, 2])), "b": "text", "c": [torch.ones(1, dtype=torch.complex64)]}
    given, entry = boundary.enter(value)
    assert [leaf.requires_grad for leaf in entry] == [True, False, True]
    assert all(leaf.is_leaf for leaf in entry)
    assert given["b"] == "text"
    assert given["a"][0].requires_grad


def test_nothing_requires_grad_where_nobody_upstream_learns() -> None:
    """The first stage that learns differentiates for its weights alone."""
    _, entry = Boundary(differentiable=False).enter(torch.ones(2))
    assert not entry[0].requires_grad


def test_what_comes_in_is_cut_from_its_own_graph() -> None:
    """A gradient never crosses by autograd: messages do that."""
    upstream = torch.ones(2, requires_grad=True) * 2
    given, entry = Boundary(differentiable=True).enter(upstream)
    (grad,) = torch.autograd.grad((given * 3).sum(), entry)
    assert torch.equal(grad, torch.full((2,), 3.0))
    assert entry[0].grad_fn is None


def test_inference_tensors_can_be_saved() -> None:
    """What another device made in inference mode is copied, since autograd refuses it."""
    with torch.inference_mode():
        value = torch.ones(2)
    boundary = Boundary(differentiable=True)
    for _ in range(2):  # the first value is copied anyway
        output, entry = through(boundary, lambda x: (x * x).sum(), value)
        assert torch.equal(torch.autograd.grad(output, entry)[0], torch.full((2,), 2.0))


@pytest.mark.parametrize("own", [False, True])
def test_memory_of_another_stream_is_not_kept(own: bool) -> None:
    """On an accelerator a graph keeps copies; on the host the very memory that came in, but for the first value."""
    boundary = Boundary(differentiable=True, own=own)
    through(boundary, lambda x: x * 2, torch.ones(2))
    value = torch.ones(2)
    given, entry = boundary.enter(value)
    shared = entry[0].data_ptr() == value.data_ptr()
    assert shared is not own
    assert given.data_ptr() == entry[0].data_ptr()


def test_a_stage_that_writes_into_its_input_keeps_getting_a_copy() -> None:
    """Else it would corrupt what the graph of the stage above has saved; found out with the first value."""
    stage = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))
    boundary = Boundary(differentiable=True)
    for _ in range(3):
        value = torch.tensor([[-1.0, 1.0]])
        output, entry = through(boundary, stage, value)
        assert torch.equal(value, torch.tensor([[-1.0, 1.0]]))
        (grad,) = torch.autograd.grad(output.sum(), entry)
        assert grad[0, 0] == 0


def test_a_stage_that_begins_to_write_later_is_told_so() -> None:
    """The first value decided that no copy is needed; a write into a leaf is then an error, never silent damage."""
    boundary = Boundary(differentiable=True)
    through(boundary, lambda x: x * 2, torch.ones(2))
    with pytest.raises(RuntimeError, match="in-place operation"):
        through(boundary, lambda x: x.mul_(2), torch.ones(2))


def test_a_first_call_that_fails_decides_nothing() -> None:
    """Whether the stage writes is found out with the first value that gets through."""
    boundary = Boundary(differentiable=True)
    given, _ = boundary.enter(torch.ones(2))
    boundary.watch(given)  # the stage raised: `learned` is not called
    through(boundary, lambda x: x.mul_(2), torch.ones(2))
    value = torch.ones(2)
    through(boundary, lambda x: x.mul_(2), value)
    assert torch.equal(value, torch.ones(2))


def test_a_view_of_the_input_is_protected_as_well() -> None:
    """A write through a view counts as a write."""
    boundary = Boundary(differentiable=True)
    for _ in range(2):
        value = torch.ones(2, 2)
        through(boundary, lambda x: x.view(-1).mul_(2), value)
        assert torch.equal(value, torch.ones(2, 2))


def test_small_things() -> None:
    """Tensors of a pytree, its size in bytes, and the same value without its graph."""
    x = torch.ones(2, requires_grad=True)
    value = {"y": x * 2, "n": 3, "z": (torch.zeros(4, dtype=torch.int64),)}
    assert [tuple(t.shape) for t in tensors_of(value)] == [(2,), (4,)]
    assert nbytes_of(value) == 8 + 32
    free = detached(value)
    assert not free["y"].requires_grad and free["n"] == 3
    assert tensors_of("nothing") == []

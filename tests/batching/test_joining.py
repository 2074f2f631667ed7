"""Joining and dividing values: what goes in comes out again, and what cannot be joined is told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiotime.batching.joining import Alike, Group, check_batching, flatten, unflatten
from aiotime.errors import ConfigurationError, InputError


@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    group=st.sampled_from(["cat", "stack"]),
    nested=st.booleans(),
)
def test_there_and_back(sizes: list[int], group: Group, nested: bool) -> None:
    """Whatever is joined can be divided again, in structure and values."""
    joiner = Alike("stage", group)

    def value(at: int) -> Any:
        rows = sizes[at] if group == "cat" else 2
        tensor = torch.full((rows, 3), float(at))
        return {"a": (tensor, "same"), "b": [tensor + 0.5]} if nested else tensor

    values = [value(at) for at in range(len(sizes))]
    looks = [joiner.look(each) for each in values]
    assert len({signature for signature, _ in looks}) == 1
    found = [size for _, size in looks]
    joined = joiner.join(values)
    joiner.check(joined, found)
    back = joiner.part(joined, found)
    for one, other in zip(values, back, strict=True):
        left, right = flatten(one), flatten(other)
        assert (left.structure, left.constants) == (right.structure, right.constants)
        assert all(map(torch.equal, left.tensors, right.tensors))


def test_constants_that_are_equal_and_not_the_same() -> None:
    """1, 1.0 and True: a function may tell them apart, so they are not joined."""
    joiner = Alike("stage", "cat")
    found = {joiner.look((torch.ones(1), one))[0] for one in (1, 1.0, True, "1")}
    assert len(found) == 4


def test_unflatten_is_the_inverse() -> None:
    """Constants stand where they stood."""
    flat = flatten({"x": [1, torch.ones(2), None], "y": (torch.zeros(1), "z")})
    again = unflatten(flat.structure, flat.constants, flat.tensors)
    assert again["x"][0] == 1 and again["x"][2] is None and again["y"][1] == "z"


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (torch.ones(()), r"returned a tensor of shape \(\)"),
        (torch.ones(3), r"returned a tensor of shape \(3,\), which cannot be divided"),
        ("nothing", "a str without any tensor"),
    ],
)
def test_what_cannot_be_divided(output: Any, why: str) -> None:
    """Refused with the stage's name and the way out."""
    with pytest.raises(InputError, match=f"stage 'net' .*{why}"):
        Alike("net", "cat").check(output, [2, 2])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((0, 0.0, "cat"), "max_batch is a number of frames from 1, not 0"),
        ((True, 0.0, "cat"), "max_batch is a number of frames from 1, not True"),
        ((2, -1.0, "cat"), "max_wait is a number of seconds from 0"),
        ((2, float("nan"), "cat"), "max_wait is a number of seconds from 0"),
        ((1, 1.0, "cat"), "waits for company: set max_batch, too"),
        ((2, 0.0, "row"), 'group must be "stack" or "cat"'),
    ],
)
def test_what_makes_no_sense(arguments: tuple[Any, Any, Any], why: str) -> None:
    """The message says what would."""
    with pytest.raises(ConfigurationError, match=why):
        check_batching("net", *arguments, of="frames")

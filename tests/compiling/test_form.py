"""Tests of aiotime.compiling.form: compiled code never gets what it would misread."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiotime.compiling.form import Form, Size
from aiotime.compiling.program import CompileError


def taken(form: Form, value: Any) -> torch.Tensor | None:
    found = form.tensors(value)
    return None if found is None else found[0]


def test_passes_on_what_is_like_the_example() -> None:
    x = torch.randn(2, 3)
    assert taken(Form([torch.zeros(2, 3)]), x) is x


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3, 2),
        torch.zeros(2, 3, 1),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3).to_sparse(),
        torch.zeros(2, 3).numpy(),
        1.0,
        None,
        (torch.zeros(2, 3),),
    ],
)
def test_refuses_another_kind_of_value(value: Any) -> None:
    assert Form([torch.zeros(2, 3)]).tensors(value) is None


def test_refuses_another_structure() -> None:
    form = Form([{"a": torch.zeros(2), "b": (torch.zeros(3), torch.zeros(1))}])
    assert form.leaves == 3
    assert form.tensors({"a": torch.zeros(2), "b": (torch.zeros(3), torch.zeros(1))}) is not None
    assert form.tensors({"a": torch.zeros(2), "b": [torch.zeros(3), torch.zeros(1)]}) is None
    assert form.tensors({"a": torch.zeros(2)}) is None
    assert form.tensors(torch.zeros(2)) is None


def test_lays_out_what_has_other_strides() -> None:
    x = torch.randn(3, 2).t()
    found = taken(Form([torch.zeros(2, 3)]), x)
    assert found is not None and found.is_contiguous() and torch.equal(found, x)


def test_lays_out_as_a_dense_example_is() -> None:
    example = torch.zeros(1, 2, 4, 4).to(memory_format=torch.channels_last)
    x = torch.randn(1, 2, 4, 4)
    found = taken(Form([example]), x)
    assert found is not None and found.stride() == example.stride() and torch.equal(found, x)


@pytest.mark.parametrize("example", [torch.zeros(5, 10)[:, :4], torch.zeros(1, 4).expand(5, 4)])
def test_an_example_with_gaps_is_compiled_for_without_them(example: torch.Tensor) -> None:
    """What is compiled is a clone of it, and code for that would read the gaps."""
    for x in (torch.randn(5, 10)[:, :4], torch.randn(5, 4), torch.randn(1, 4).expand(5, 4)):
        found = taken(Form([example]), x)
        assert found is not None and found.stride() == example.clone().stride() and torch.equal(found, x)


def test_a_view_into_larger_memory_is_passed_on() -> None:
    x = torch.randn(4, 2, 3)[2]
    assert taken(Form([torch.zeros(2, 3)]), x) is x


@pytest.mark.parametrize("examples", [[torch.zeros(2)], [torch.zeros(2), torch.zeros(3)]])
def test_a_negative_bit_is_put_into_the_memory(examples: list[torch.Tensor]) -> None:
    found = taken(Form(examples), torch._neg_view(torch.ones(2)))
    assert found is not None and not found.is_neg() and found.tolist() == [-1, -1]


@pytest.mark.parametrize("sizes", [(2,), (2, 3)])
def test_a_conjugate_bit_is_put_into_the_memory(sizes: tuple[int, ...]) -> None:
    form = Form([torch.zeros(size, dtype=torch.complex64) for size in sizes])
    found = taken(form, torch.tensor([1j, 2j]).conj())
    assert found is not None and not found.is_conj() and found.tolist() == [-1j, -2j]


def test_inference_tensors_are_taken() -> None:
    with torch.inference_mode():
        x, turned = torch.randn(2, 3), torch.randn(3, 2).t()
    form = Form([torch.zeros(2, 3)])
    assert taken(form, x) is x
    found = taken(form, turned)
    assert found is not None and torch.equal(found, turned)


def test_a_parameter_that_wants_a_gradient_is_no_example_that_matters() -> None:
    x = torch.nn.Parameter(torch.zeros(2))
    assert taken(Form([x]), x) is x


def test_nothing_and_empty_values() -> None:
    assert Form([()]).tensors(()) == []
    assert taken(Form([torch.zeros(0, 3)]), torch.zeros(0, 3)) is not None
    assert taken(Form([torch.zeros(())]), torch.ones(())) == 1


def test_sizes_in_which_the_examples_differ_may_vary() -> None:
    form = Form([(torch.zeros(2, 4), torch.zeros(3)), (torch.zeros(3, 4), torch.zeros(3))])
    assert form.varying == [(0,), ()]
    assert form.tensors((torch.zeros(9, 4), torch.zeros(3))) is not None
    assert form.tensors((torch.zeros(9, 5), torch.zeros(3))) is None
    assert form.tensors((torch.zeros(9, 4), torch.zeros(4))) is None
    x = torch.randn(4, 9).t()
    found = form.tensors((x, torch.zeros(3)))
    assert found is not None and found[0].is_contiguous() and torch.equal(found[0], x)


def test_sizes_that_belong_together_are_the_same() -> None:
    form = Form([(torch.zeros(n, 4), torch.zeros(n, 4)) for n in (2, 3)])
    form.limit([Size(0, 0, "s", 2, 8), Size(1, 0, "s", 2, 8)])
    assert form.tensors((torch.zeros(5, 4), torch.zeros(5, 4))) is not None
    assert form.tensors((torch.zeros(5, 4), torch.zeros(1, 4))) is None  # eager code would repeat the one
    assert form.tensors((torch.zeros(1, 4), torch.zeros(1, 4))) is None
    assert form.tensors((torch.zeros(9, 4), torch.zeros(9, 4))) is None


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([(torch.zeros(1), 2)], "int travels"),
        ([torch.zeros(2).to_sparse()], "layout"),
        ([(torch.zeros(1),), (torch.zeros(1), torch.zeros(1))], "depends on the frame's size"),
        ([torch.zeros(2), torch.zeros(2, 1)], "depends on the frame's size"),
        ([torch.zeros(4, 2).t(), torch.zeros(4, 3).t()], "not contiguous"),
    ],
)
def test_says_what_cannot_be_compiled_for(examples: list[Any], said: str) -> None:
    with pytest.raises(CompileError, match=said):
        Form(examples)

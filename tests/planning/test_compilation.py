"""Tests of aiotime.planning.compilation: what each piece is compiled for, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.compiling import Outcome
from aiotime.devices import CpuDevice
from aiotime.planning import compilation, trace
from aiotime.planning.compilation import compile_pieces, described


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The examples and options that modules were to be compiled with."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def compile_module(module: nn.Module, examples: Any, **options: Any) -> Outcome:
        seen.append((examples, options))
        return Outcome(None, problems={options["way"]: "not today"})

    monkeypatch.setattr(compilation, "compile_module", compile_module)
    return seen


def compile_all(
    net: nn.Module, example: Any, ways: list[str | None], *, dynamic: tuple[int, ...] | None = None
) -> list[Outcome]:
    """One layer a piece."""
    pieces = trace(net, example, dynamic=dynamic).cut([1] * len(ways))
    return compile_pieces(pieces, [CpuDevice(at) for at in range(len(ways))], example, ways, dynamic=dynamic)


def test_each_piece_is_compiled_for_what_reaches_it(compiled: list[Any]) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 4)).eval()
    example = torch.randn(5, 2)
    kept = example.clone()
    outcomes = compile_all(net, example, ["aot", None, "inductor"])
    assert [outcome.problems for outcome in outcomes] == [{"aot": "not today"}, {}, {"inductor": "not today"}]
    (first, _), (last, options) = compiled
    with torch.inference_mode():
        torch.testing.assert_close(first, [example])
        torch.testing.assert_close(last, [(net[:2](example),)])
    assert torch.equal(example, kept) and first[0] is not example
    assert options["way"] == "inductor" and options["device"].name == "cpu:2" and options["learning"] is False


def test_sizes_that_vary_are_seen_in_two_examples(compiled: list[Any]) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Flatten(0)).eval()
    compile_all(net, torch.randn(5, 2), ["aot", "aot"], dynamic=(0,))
    assert [
        [tuple(*(leaf.shape for leaf in pytree.tree_leaves(value))) for value in examples] for examples, _ in compiled
    ] == [
        [(5, 2), (6, 2)],
        [(5, 3), (6, 3)],
    ]


def test_larger_in_every_dimension_named() -> None:
    larger = compilation._larger({"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": 1}, (0, -1, 2))
    assert (larger["a"].shape, larger["b"].shape, larger["c"]) == ((3, 4), (5,), 1)


def test_nothing_is_computed_where_nothing_is_compiled(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(piece: Any, value: Any) -> Any:
        raise AssertionError("computed")

    pieces = trace(nn.Sequential(nn.ReLU(), nn.Tanh()), torch.zeros(1)).cut([1, 1])
    monkeypatch.setattr(type(pieces[0]), "__call__", never)
    devices = [CpuDevice(0), CpuDevice(1)]
    assert compile_pieces(pieces, devices, torch.zeros(1), [None, None]) == [Outcome(None), Outcome(None)]
    assert not compiled


class Made:
    def __init__(self, way: str) -> None:
        self.way = way
        self.module: nn.Module = nn.ReLU()

    def __call__(self, value: Any) -> Any:
        return value

    def refresh(self) -> None: ...


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([], None),
        ([Outcome(None)], None),
        ([Outcome(Made("aot")), Outcome(Made("aot"))], "Compiled: aot."),
        ([Outcome(Made("aot")), Outcome(None)], "Compiled: stage 0 aot, stage 1 not."),
        ([Outcome(None, {"eager": 1.0, "aot": 2.0})], "Not compiled: eager calls were as fast."),
        (
            [Outcome(None, problems={"aot": "no compiler"}), Outcome(None, problems={"aot": "no compiler"})],
            "Could not be compiled: aot: no compiler.",
        ),
    ],
)
def test_what_is_said(outcomes: list[Outcome], said: str | None) -> None:
    assert described(outcomes) == said

"""Tests of aiotime.compiling.choice: what is taken and why, with programs that need no compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from aiotime.compiling import CompileError, choice, compile_module
from aiotime.compiling.graph import CudaRecorder, Replay
from aiotime.compiling.jit import JustInTime
from aiotime.devices import CpuDevice
from tests.compiling.nets import CPU, StandIn, mlp

CUDA = torch.device("cuda", 0)


class Timed(CpuDevice):
    """Says what it was told a program takes."""

    def __init__(self, **seconds: float) -> None:
        super().__init__()
        self.says = seconds

    def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
        fn(value)
        return self.says[Stub.last], value


class Stub:
    """Stands for a program of either way."""

    last = "eager"

    def __init__(self, way: str, module: nn.Module) -> None:
        self.way, self.module = way, module

    def __call__(self, value: Any) -> Any:
        Stub.last = self.way
        return value

    def refresh(self) -> None: ...


class Eager(nn.Module):
    def forward(self, x: Any) -> Any:
        Stub.last = "eager"
        return x


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ways that fail."""
    failing: set[str] = set()

    def made(way: str, module: nn.Module, examples: Any, **_: Any) -> Any:
        if way in failing:
            raise CompileError(f"no {way} today")
        return Stub(way, module)

    monkeypatch.setattr(choice, "_made", made)
    return failing


def outcome(device: Timed, place: torch.device = CPU, way: str = "auto") -> choice.Outcome:
    return compile_module(Eager(), [torch.zeros(1)], way=way, device=device, place=place)


@pytest.mark.parametrize(
    ("place", "seconds", "way"),
    [
        (CPU, {"eager": 1.0, "aot": 0.5}, "aot"),
        (CPU, {"eager": 1.0, "aot": 0.97}, None),
        (CPU, {"eager": 1.0, "aot": 2.0}, None),
        (CUDA, {"eager": 1.0, "cudagraph": 0.5, "aot": 0.3}, "aot"),
        (CUDA, {"eager": 1.0, "cudagraph": 0.5, "aot": 0.49}, "cudagraph"),
        (CUDA, {"eager": 1.0, "cudagraph": 2.0, "aot": 0.9}, "aot"),
    ],
)
@pytest.mark.usefixtures("stubs")
def test_auto_takes_what_gains(place: torch.device, seconds: dict[str, float], way: str | None) -> None:
    found = outcome(Timed(**seconds), place)
    assert (found.way, found.seconds, found.problems) == (way, seconds, {})


def test_auto_goes_on_where_one_way_fails(stubs: set[str]) -> None:
    stubs.add("cudagraph")
    found = outcome(Timed(eager=1.0, aot=0.5), CUDA)
    assert found.way == "aot" and found.problems == {"cudagraph": "no cudagraph today"}
    stubs.add("aot")
    found = outcome(Timed(eager=1.0))
    assert found.way is None and found.problems == {"aot": "no aot today"} and found.seconds == {"eager": 1.0}


def test_the_way_asked_for_is_taken_untimed(stubs: set[str]) -> None:
    assert outcome(Timed(), way="aot").way == "aot"
    stubs.add("aot")
    found = outcome(Timed(), way="aot")
    assert found.program is None and found.problems == {"aot": "no aot today"}


def test_auto_leaves_learning_stages_as_they_are() -> None:
    found = compile_module(mlp(), [torch.zeros(2, 16)], way="auto", device=CpuDevice(), place=CPU, learning=True)
    assert found == choice.Outcome(None)


@pytest.mark.parametrize(
    ("way", "options", "said"),
    [
        ("aot", {"learning": True}, "no backward"),
        ("cudagraph", {"learning": True}, "no backward"),
        ("cudagraph", {}, "need a CUDA device, and the stage runs on cpu:0"),
        ("cudagraph", {"place": CUDA, "models": 2}, "one frame at a time; use workers=1"),
    ],
)
def test_says_what_cannot_be(way: str, options: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"device": CpuDevice(), "place": CPU} | options
    found = compile_module(mlp(), [torch.zeros(2, 16)], way=way, **arguments)
    assert found.program is None and said in found.problems[way]


def test_cuda_graphs_are_made_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaRecorder, "on", lambda place: StandIn())
    found = compile_module(mlp(), [torch.zeros(2, 16)], way="cudagraph", device=CpuDevice(), place=CUDA)
    assert isinstance(found.program, Replay)


def test_a_stage_that_learns_is_compiled_at_its_first_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(JustInTime, "check", lambda self, examples: checked.append(examples))
    for learning in (True, False):
        found = compile_module(
            mlp(), [torch.zeros(2, 16)], way="inductor", device=CpuDevice(), place=CPU, learning=learning
        )
        assert isinstance(found.program, JustInTime) and len(checked) == (0 if learning else 1)

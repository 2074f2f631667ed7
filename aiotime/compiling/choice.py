"""Choice: which way a stage is compiled, by measurement where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.compiling.ahead import Ahead
from aiotime.compiling.graph import CudaRecorder, Replay
from aiotime.compiling.jit import JustInTime
from aiotime.compiling.program import CompileError, Program
from aiotime.devices.base import Device

GAIN = 0.95  # a way must take at most this share of what it is compared with
MEASURED = 0.1  # seconds spent on timing each way


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage runs.

    Attributes:
        program: the compiled stage; None where it runs eagerly.
        seconds: per way that was timed, one call alone; "eager" among them.
        problems: per way that cannot be taken, why.
    """

    program: Program | None
    seconds: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def way(self) -> str | None:
        """Of the program, None for eager."""
        return None if self.program is None else self.program.way


def compile_module(
    module: nn.Module,
    examples: Sequence[Any],
    *,
    way: str,
    device: Device,
    place: torch.device,
    models: int = 1,
    learning: bool = False,
) -> Outcome:
    """Compile ``module`` the way asked for; "auto" times those that make sense on ``device`` and takes the fastest.

    Takes seconds to a minute where nothing is cached, and blocks: not for use on a running loop.

    Args:
        module: called with one value, where it will run and in the mode it will run in.
        examples: values it will be called with; dimensions in which they differ may vary.
        way: one of `WAYS`.
        device: its stage's.
        place: where the module's tensors are.
        models: how many calls may run at the same time.
        learning: gradients pass through it; only "inductor" can do that.
    """
    if way != "auto":
        try:
            return Outcome(_made(way, module, examples, device=device, place=place, models=models, learning=learning))
        except CompileError as error:
            return Outcome(None, problems={way: str(error)})
    if learning:
        return Outcome(None)
    outcome = Outcome(None, {"eager": _timed(module, examples[-1], device)})
    best: Program | None = None
    for candidate in ("cudagraph", "aot") if place.type == "cuda" else ("aot",):
        try:
            program = _made(candidate, module, examples, device=device, place=place, models=models, learning=False)
            outcome.seconds[candidate] = _timed(program, examples[-1], device)
        except CompileError as error:
            outcome.problems[candidate] = str(error)
            continue
        if outcome.seconds[candidate] <= GAIN * min(
            spent for other, spent in outcome.seconds.items() if other != candidate
        ):
            best = program
    return Outcome(best, outcome.seconds, outcome.problems)


def _made(
    way: str,
    module: nn.Module,
    examples: Sequence[Any],
    *,
    device: Device,
    place: torch.device,
    models: int,
    learning: bool,
) -> Program:
    threads = int(getattr(device, "threads", 1))
    if learning and way != "inductor":
        raise CompileError(f'{way!r} has no backward; a stage that learns is compiled with compile="inductor"')
    if way == "aot":
        return Ahead(module, examples, device=place, threads=threads, models=models)
    if way == "cudagraph":
        if place.type != "cuda":
            raise CompileError(f"CUDA graphs need a CUDA device, and the stage runs on {device.name}")
        if models > 1:
            raise CompileError("a CUDA graph computes in memory of its own, one frame at a time; use workers=1")
        return Replay(module, examples, recorder=CudaRecorder.on(place))
    program = JustInTime(module, examples, threads=threads)
    if not learning:
        program.check(examples)
    return program


def _timed(act: Callable[[Any], Any], value: Any, device: Device) -> float:
    seconds, _ = device.measure(lambda given: act(_copied(given)), value, seconds=MEASURED)
    return seconds


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)

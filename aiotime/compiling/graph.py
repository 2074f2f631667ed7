"""Replay: a stage captured once as a CUDA graph and launched as a whole from then on ("cudagraph").

    value ── copy in ──▶ static inputs ── replay ──▶ static outputs ── copy out ──▶ value      all on one stream

The copies run on the stage's own stream, so a replay never meets a frame that still reads or writes the static buffers,
and who takes the output owns it. They cost two passes over a stage's input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.compiling.form import Form
from aiotime.compiling.program import CompileError

_WARM_UP = 3  # calls before the capture: libraries choose their algorithms and allocate in the first ones


class Recorder(Protocol):
    """Captures launches and replays them (`CudaRecorder`, or a stand-in for tests)."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays ``call``'s launches on the current stream, and what the capture returned."""


class CudaRecorder:
    """CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture in thread-local mode: other threads go on with the device meanwhile."""
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            made = call()
        torch.cuda.current_stream(self._device).wait_stream(side)
        return graph.replay, made


class Replay:
    """Callable ``program(value) -> value``; what it was not captured for runs eagerly.

    Args:
        module: called with one value.
        examples: one value; graphs have fixed shapes.
        recorder: captures and replays.

    Attributes:
        eager_calls: how many values were not of the form it was captured for.

    Raises:
        CompileError: it cannot be captured.
    """

    way = "cudagraph"

    def __init__(self, module: nn.Module, examples: Sequence[Any], *, recorder: Recorder) -> None:
        self.module = module
        self.eager_calls = 0
        self._form = Form(examples)
        self._recorder = recorder
        if any(self._form.varying):
            raise CompileError("a CUDA graph has fixed shapes, and the sizes of frames vary")
        with torch.inference_mode():
            self._value = pytree.tree_map(lambda leaf: leaf.clone(memory_format=torch.preserve_format), examples[0])
            found = self._form.tensors(self._value)
        assert found is not None
        self._inputs = found
        self.refresh()

    def __call__(self, value: Any) -> Any:
        """What ``module(value)`` returns, in memory of its own."""
        tensors = self._form.tensors(value)
        if tensors is None:
            self.eager_calls += 1
            return self.module(value)
        for static, tensor in zip(self._inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._replay()
        return pytree.tree_map(
            lambda leaf: leaf.clone(memory_format=torch.preserve_format) if isinstance(leaf, torch.Tensor) else leaf,
            self._output,
        )

    def refresh(self) -> None:
        """Capture again: a graph holds the addresses of the weights; not while it runs."""
        try:
            with torch.inference_mode():
                self._replay, self._output = self._recorder.capture(lambda: self.module(self._value))
        except Exception as error:
            said = str(error).strip().splitlines()
            raise CompileError(f"it cannot be captured: {said[0] if said else type(error).__name__}") from error

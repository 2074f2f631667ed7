"""Replay: a stage captured once as a CUDA graph and launched as a whole from then on ("cudagraph").

    value ── copy in ──▶ static inputs ── replay ──▶ static outputs ── copy out ──▶ value      all on one stream

The copies run on the stage's own stream, so a replay never meets a frame that still reads or writes the static buffers,
and who takes the output owns it. They cost two passes over a stage's input and output, on the device.

Not yet run on a GPU; the logic is tested on a pretended one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.compiling.form import Form
from aiotime.compiling.program import CompileError
from aiotime.devices.accelerator import Accelerator
from aiotime.devices.backend import RawStream, torch_backend

_WARM_UP = 3  # calls before the capture: libraries choose their algorithms and allocate in the first ones
_TRIES = 3  # captures, where user code on another thread voids them by waiting for the whole device


class Captured:
    """A graph and the memory it computes in, until it is ended.

    Args:
        replay: queues it on the current stream.
        output: what the capture returned; overwritten by each replay.
        ended: called once the graph is gone.
    """

    def __init__(self, replay: Callable[[], None], output: Any, ended: Callable[[], None]) -> None:
        self.replay: Callable[[], None] | None = replay
        self.output = output
        self._ended: Callable[[], None] | None = ended

    def end(self) -> None:
        """Give everything back; no replay is under way."""
        self.replay = self.output = None  # the graph first, then its stream: see `Accelerator.capture`
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()

    __del__ = end


class Recorder(Protocol):
    """Captures launches and replays them, for one `Replay` (`CudaRecorder`, or a stand-in for tests)."""

    def capture(self, call: Callable[[], Any]) -> Captured:
        """The launches of ``call``."""

    def follow(self) -> None:
        """What is queued next waits for what was queued after the last `follow`, on whichever stream that was."""


class CudaRecorder:
    """CUDA graphs of one device. Other threads go on with the device during a capture, on streams of their own."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._last: RawStream | None = None

    @classmethod
    def on(cls, place: torch.device) -> CudaRecorder:
        """For the stage at ``place``."""
        return cls(Accelerator.of(torch_backend(place.type), place.index))

    def capture(self, call: Callable[[], Any]) -> Captured:
        """Capture on a stream that belongs to this graph alone, once what ``call`` does is warm."""
        accelerator = self._accelerator
        backend = accelerator.backend
        with accelerator.quiet:
            # not on the stream of the capture: the scratch memory of cuBLAS is to come from the graph's own memory
            for _ in range(_WARM_UP):
                call()
            backend.current(accelerator.index).synchronize()
            stream = accelerator.borrow("capture")
            for tries in range(_TRIES):
                try:
                    graph, output = accelerator.capture(call, stream)
                    break
                except Exception as error:
                    if tries + 1 == _TRIES or not backend.forbidden(error):
                        raise
        return Captured(graph.replay, output, lambda: accelerator.return_stream("capture", stream))

    def follow(self) -> None:
        """An event between the two streams, where they are not the same."""
        here, last = self._accelerator.backend.current(self._accelerator.index), self._last
        if last is not None and here != last:
            event = self._accelerator.event()
            last.record_event(event)
            here.wait_event(event)
            self._accelerator.return_event(event)
        self._last = here


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
        self._captured: Captured | None = None
        if any(self._form.varying):
            raise CompileError("a CUDA graph has fixed shapes, and the sizes of frames vary")
        with torch.inference_mode():
            value = pytree.tree_map(lambda leaf: leaf.clone(memory_format=torch.preserve_format), examples[0])
            found = self._form.tensors(value)
        assert found is not None
        self._inputs = found
        self._value = pytree.tree_unflatten(found, pytree.tree_structure(value))  # what is captured is what is filled
        self.refresh()

    def __call__(self, value: Any) -> Any:
        """What ``module(value)`` returns, in memory of its own."""
        tensors = self._form.tensors(value)
        captured = self._captured
        if tensors is None or captured is None or captured.replay is None:
            self.eager_calls += 1
            return self.module(value)
        self._recorder.follow()  # a stage that was given up may have left a frame on another stream
        for static, tensor in zip(self._inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        captured.replay()
        return pytree.tree_map(
            lambda leaf: leaf.clone(memory_format=torch.preserve_format) if isinstance(leaf, torch.Tensor) else leaf,
            captured.output,
        )

    def refresh(self) -> None:
        """Capture again: a graph holds the addresses of the weights; not while it runs.

        The old graph goes first: there is room for one. Where the new one fails, the stage runs eagerly.
        """
        again = ""
        if self._captured is not None:
            again = " again, and runs eagerly from now on"
            self._captured.end()
            self._captured = None
        try:
            with torch.inference_mode():
                self._captured = self._recorder.capture(lambda: self.module(self._value))
        except Exception as error:
            said = str(error).strip().splitlines()
            raise CompileError(f"it cannot be captured{again}: {said[0] if said else type(error).__name__}") from error

"""Replay: static buffers, refreshing, and what happens where a capture fails; CUDA graphs played by stand-ins."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from aiotime.compiling.graph import Captured, CudaRecorder, Replay
from aiotime.compiling.program import CompileError
from aiotime.devices.accelerator import Accelerator
from aiotime.devices.pretend import PretendBackend
from aiotime.devices.pretend_captures import Refused


class Tape:
    """A recorder on the host: a replay calls again and writes into the captured output's memory."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.follows = 0
        self.alive = 0  # graphs not yet ended
        self.most = 0

    def capture(self, call: Callable[[], Any]) -> Captured:
        if self.failure is not None:
            raise self.failure
        output = call()
        self.alive += 1
        self.most = max(self.most, self.alive)

        def replay() -> None:
            output.copy_(call())

        return Captured(replay, output, self._ended)

    def follow(self) -> None:
        self.follows += 1

    def _ended(self) -> None:
        self.alive -= 1


def module() -> nn.Linear:
    """One weight of 2."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    layer.eval()
    return layer


def test_who_takes_an_output_owns_it() -> None:
    """The next replay does not write into it, and an input of another form runs eagerly."""
    replay = Replay(module(), [torch.ones(1, 1)], recorder=Tape())
    with torch.inference_mode():
        outputs = [replay(torch.full((1, 1), float(i))) for i in range(4)]
        assert [output.item() for output in outputs] == [0, 2, 4, 6]
        assert replay(torch.ones(3, 1)).tolist() == [[2], [2], [2]]
    assert replay.eager_calls == 1


def test_the_old_graph_goes_before_the_new_one_is_captured() -> None:
    """There is room for one; new weights are used."""
    tape, layer = Tape(), module()
    replay = Replay(layer, [torch.ones(1, 1)], recorder=tape)
    nn.init.constant_(layer.weight, 5.0)
    replay.refresh()
    with torch.inference_mode():
        assert replay(torch.ones(1, 1)).item() == 5
    assert (tape.alive, tape.most, replay.eager_calls) == (1, 1, 0)
    del replay
    gc.collect()  # the stand-in's graph holds the call, which a real one does not
    assert tape.alive == 0


def test_a_refresh_that_fails_leaves_an_eager_stage() -> None:
    """The old graph would go on with the old weights: it is gone, and the next refresh may bring a new one."""
    tape, layer = Tape(), module()
    replay = Replay(layer, [torch.ones(1, 1)], recorder=tape)
    nn.init.constant_(layer.weight, 5.0)
    tape.failure = RuntimeError("no memory\nand more")
    with pytest.raises(CompileError, match=r"captured again, and runs eagerly from now on: no memory$"):
        replay.refresh()
    with torch.inference_mode():
        assert replay(torch.ones(1, 1)).item() == 5
    assert (tape.alive, replay.eager_calls) == (0, 1)
    tape.failure = None
    replay.refresh()
    with torch.inference_mode():
        assert replay(torch.ones(1, 1)).item() == 5
    assert replay.eager_calls == 1


def test_what_cannot_be_captured_is_said() -> None:
    """When it is made, by the first line of what the capture said."""
    tape = Tape()
    tape.failure = RuntimeError("not while capturing\nmore")
    with pytest.raises(CompileError, match=r"^it cannot be captured: not while capturing$"):
        Replay(module(), [torch.ones(1, 1)], recorder=tape)


# ---------------------------------------------------------------------- the recorder, on a pretended accelerator


def test_a_frame_on_another_stream_waits_for_the_one_before() -> None:
    """A launcher that was given up leaves a replay on its stream: the next one, on another, comes after it."""
    backend = PretendBackend(choose=lambda n: n - 1)  # the stream made last is eager
    recorder = CudaRecorder(Accelerator.of(backend, 0))
    one, two = backend.new_stream(0), backend.new_stream(0)
    order: list[str] = []
    for stream, name in ((one, "one"), (two, "two"), (two, "two again"), (one, "back on one")):
        with backend.on(stream):
            recorder.follow()
            stream.push(lambda name=name: order.append(name))  # type: ignore[misc]
    events = backend.events
    backend.finish()
    assert order == ["one", "two", "two again", "back on one"]
    assert events <= 2  # pooled, and none where the stream is the same


def test_a_capture_that_user_code_voids_is_made_again() -> None:
    """Somebody waited for the whole device while it captured: another try, and only then is it a failure."""
    backend = PretendBackend()
    recorder, calls = CudaRecorder(Accelerator.of(backend, 0)), [0]
    static = backend.send(torch.ones(1), 0)
    backend.finish()

    def call(*, times: int) -> Any:
        calls[0] += 1
        if 3 < calls[0] <= 3 + times:  # not while warming up
            with pytest.raises(Refused):
                backend.synchronize(0)
        return static * 2

    graph = recorder.capture(lambda: call(times=1))
    assert graph.replay is not None
    graph.replay()
    host = backend.download(graph.output)
    backend.finish()
    assert host.tolist() == [2]
    calls[0] = 0
    with pytest.raises(Refused):
        recorder.capture(lambda: call(times=100))
    assert backend.violations == []


def test_each_graph_has_a_capturing_stream_of_its_own() -> None:
    """PyTorch lets go of what cuBLAS computes in with the first graph of a stream that dies."""
    backend = PretendBackend()
    accelerator = Accelerator.of(backend, 0)
    static = backend.send(torch.ones(1), 0)
    backend.finish()
    used: list[Any] = []
    capture = backend.capture

    def noted(call: Callable[[], Any], stream: Any) -> Any:
        used.append(stream)
        return capture(call, stream)

    backend.capture = noted  # type: ignore[method-assign, assignment]
    one = CudaRecorder(accelerator).capture(lambda: static + 1)
    two = CudaRecorder(accelerator).capture(lambda: static + 2)
    assert used[0] is not used[1]
    two.end()
    three = CudaRecorder(accelerator).capture(lambda: static + 3)
    assert used[2] is used[1]
    two.end()  # once more does no harm
    assert one.replay is not None
    assert three.replay is not None

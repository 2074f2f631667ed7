"""What each layer of a model costs on each kind of device, measured.

Every device times the layers itself (`Device.measure`), one after the other on the example; devices of one speed
class are measured once. The model is not changed: tensors that a frame changes are copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aiotime.devices.base import Device
from aiotime.planning.payload import call, cloned
from aiotime.planning.rehearsal import has_real_calls, on_a_copy
from aiotime.planning.stopwatch import Stopwatch
from aiotime.planning.traced import Traced
from aiotime.planning.untouched import untouched

_LONGEST = 0.05  # seconds spent on one layer; more calls would not tell more
_PASSES = 3  # over the whole model; the fastest counts, so that one disturbance does not


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds, all for one frame.

    Attributes:
        layers: per speed class, each layer's.
        whole: per speed class, all layers as one piece: less than their sum, which counts every call's overhead.
        sequential: the model itself, called directly on the fastest of the devices (on the host: on one thread
            unless the device has more).
    """

    layers: dict[str, tuple[float, ...]]
    whole: dict[str, float]
    sequential: float


def profile(traced: Traced, example: Any, devices: Sequence[Device], *, seconds: float = 2.0) -> Profile:
    """Measure ``traced`` on ``devices`` in about ``seconds``, longer where a few calls of each layer take longer.

    Blocks: not for use on a running loop.
    """
    classes = {device.speed_class: device for device in reversed(devices)}
    share = seconds / len(classes)
    layers: dict[str, tuple[float, ...]] = {}
    whole: dict[str, float] = {}
    direct: dict[str, float] = {}
    for name, device in classes.items():
        direct[name] = _direct(traced, example, device, share / 5)
        whole[name] = _whole(traced, example, device, share / 5)
        layers[name] = _layers(traced, example, device, share * 3 / 5, whole[name])
    return Profile(layers, whole, min(direct.values()))


def _direct(traced: Traced, example: Any, device: Device, seconds: float) -> float:
    model = traced.model
    if traced.has_state or not device.on_host or any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return _whole(traced, example, device, seconds)  # the model itself must stay where and as it is
    with untouched(model):
        return _timed(lambda value: call(model, value), example, device, seconds)


def _whole(traced: Traced, example: Any, device: Device, seconds: float) -> float:
    piece = traced.piece(0, len(traced.layers), apart=True)
    device.place(piece.module)
    return _timed(piece, example, device, seconds)


def _timed(fn: Callable[[Any], Any], example: Any, device: Device, seconds: float) -> float:
    """By a stopwatch where it can look at each call, so that it compares with a rehearsal."""
    watch = Stopwatch(fn)
    said, _ = device.measure(watch, cloned(example), seconds=seconds)
    return (watch.seconds() or said) if has_real_calls(device) else said


def _layers(traced: Traced, example: Any, device: Device, seconds: float, whole: float) -> tuple[float, ...]:
    count = len(traced.layers)
    passes = _PASSES if 5 * _PASSES * whole < seconds else 1
    share = min(_LONGEST, seconds / (passes * count))
    best = [float("inf")] * count
    pieces = [traced.piece(at, at + 1, apart=True) for at in range(count)]
    for piece in pieces:
        device.place(piece.module)
    for _ in range(passes):
        value = cloned(example)
        for at, piece in enumerate(pieces):
            watch = Stopwatch(piece)
            if traced.writes_input(at):
                # measured on a copy that is written again and again; handed on as one call leaves it
                with torch.inference_mode():
                    said, _ = device.measure(watch, cloned(value), seconds=share)
                    _, value = device.measure(on_a_copy(piece), value, seconds=0.0)
            else:
                said, value = device.measure(watch, value, seconds=share)
            spent = watch.fastest() if has_real_calls(device) else None
            best[at] = min(best[at], said, said if spent is None else spent)
    return tuple(best)

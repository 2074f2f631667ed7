"""What each layer of a model costs on each kind of device, measured.

Every device times the layers itself (`Device.measure`), one after the other on the example; devices of one speed
class are measured once. The model is not changed: tensors that a frame changes are copied first. For a model that
learns, each layer's forward (with a graph), backward and update are timed, on copies of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from aiotime.devices.base import Device
from aiotime.learning.rule import Rule
from aiotime.planning.pace import Phases, added
from aiotime.planning.payload import call, cloned
from aiotime.planning.piece import Piece
from aiotime.planning.practice import Practice, frames_per_update
from aiotime.planning.rehearsal import can_rehearse, has_real_calls, on_a_copy
from aiotime.planning.stopwatch import Stopwatch
from aiotime.planning.traced import Traced
from aiotime.planning.twin import twin
from aiotime.planning.untouched import unspent, untouched

_LONGEST = 0.05  # seconds spent on one layer; more calls would not tell more
Acts = Sequence[Callable[[Any], Any]]
_PASSES = 3  # over the whole model; the fastest counts, so that one disturbance does not


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds, all for one frame.

    Attributes:
        layers: per speed class, each layer's.
        whole: per speed class, all layers as one piece: less than their sum, which counts every call's overhead.
        sequential: the model itself, called directly on the fastest of the devices (on the host: on one thread
            unless the device has more).
        layer_phases: per speed class, what each layer's seconds are made of, where the model learns.
        whole_phases: per speed class, what those of the whole are made of, where it learns.
    """

    layers: dict[str, tuple[float, ...]]
    whole: dict[str, float]
    sequential: float
    layer_phases: dict[str, tuple[Phases, ...]] = field(default_factory=dict)
    whole_phases: dict[str, Phases] = field(default_factory=dict)


def profile(
    traced: Traced, example: Any, devices: Sequence[Device], *, seconds: float = 2.0, learner: Rule | None = None
) -> Profile:
    """Measure ``traced`` on ``devices`` in about ``seconds``, longer where a few calls of each layer take longer.

    With ``learner``, everything is the time of forward, backward and update. Blocks: not for use on a running loop.
    """
    classes = {device.speed_class: device for device in reversed(devices)}
    share = seconds / len(classes)
    measured = Profile({}, {}, 0.0)
    direct: dict[str, float] = {}
    with untouched(traced.model), unspent(traced.model, [device.name for device in devices]):
        for name, device in classes.items():
            direct[name] = _direct(traced, example, device, share / 5, learner)
            if learner is None:
                measured.whole[name] = _whole(traced, example, device, share / 5, None)
                layers = _layers(traced, example, device, share * 3 / 5, measured.whole[name])
                measured.layers[name] = tuple(phases.total for phases in layers)
                continue
            rest = share * 4 / 5
            measured.whole[name] = _whole(traced, example, device, rest / 4, learner)
            measured.whole_phases[name] = whole = _whole_phases(traced, example, device, rest / 4, learner)
            layers = _layers(traced, example, device, rest / 2, measured.whole[name], learner)
            if can_rehearse([device]):
                layers = _shared_out(layers, whole)
            measured.layer_phases[name] = layers
            measured.layers[name] = tuple(phases.total for phases in layers)
    return replace(measured, sequential=min(direct.values()))


def _direct(traced: Traced, example: Any, device: Device, seconds: float, learner: Rule | None) -> float:
    model = traced.model
    if traced.has_state or not device.on_host or any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return _whole(traced, example, device, seconds, learner)  # the model itself must stay where and as it is
    if learner is None:
        return _timed(lambda value: call(model, value), example, device, seconds)
    own = twin(model, {})
    practice = Practice(lambda value: call(own, value), own, learner, differentiable=False, label=type(model).__name__)
    return _timed(practice, example, device, seconds)


def _whole(traced: Traced, example: Any, device: Device, seconds: float, learner: Rule | None) -> float:
    piece = traced.piece(0, len(traced.layers), apart=True)
    device.place(piece.module)
    if learner is None:
        return _timed(piece, example, device, seconds)
    return _timed(_practice(piece, learner, differentiable=False, stages=1), example, device, seconds)


def _whole_phases(traced: Traced, example: Any, device: Device, seconds: float, learner: Rule) -> Phases:
    """Its forward, backward and update, one by one."""
    piece = traced.piece(0, len(traced.layers), apart=True)
    device.place(piece.module)
    practice = _practice(piece, learner, differentiable=False, stages=1)
    value = cloned(example)
    acts = _acts(practice)
    spent = [_timed(act, value, device, seconds / len(acts)) for act in acts]
    return _phases(spent, learner)


def _timed(fn: Callable[[Any], Any], example: Any, device: Device, seconds: float) -> float:
    """By a stopwatch where it can look at each call, so that it compares with a rehearsal."""
    watch = Stopwatch(fn)
    said, _ = device.measure(watch, cloned(example), seconds=seconds)
    return (watch.seconds() or said) if has_real_calls(device) else said


def _layers(
    traced: Traced, example: Any, device: Device, seconds: float, whole: float, learner: Rule | None = None
) -> tuple[Phases, ...]:
    count = len(traced.layers)
    passes = _PASSES if 5 * _PASSES * whole < seconds else 1
    pieces = [traced.piece(at, at + 1, apart=True) for at in range(count)]
    for piece in pieces:
        device.place(piece.module)
    practices: list[Practice | None] = [None] * count
    if learner is not None:
        first = next((at for at in range(count) if traced.trainable(at)), count)
        practices = [_practice(piece, learner, differentiable=at > first, stages=2) for at, piece in enumerate(pieces)]
    acts: list[Acts] = [
        [piece] if practice is None else _acts(practice) for piece, practice in zip(pieces, practices, strict=True)
    ]
    share = min(_LONGEST, seconds / (passes * sum(map(len, acts))))
    best = [[float("inf")] * len(each) for each in acts]
    for _ in range(passes):
        value = cloned(example)
        for at, practice in enumerate(practices):
            following: Any = None
            for number, act in enumerate(acts[at]):
                watch = Stopwatch(act)
                if practice is None and traced.writes_input(at):
                    # measured on a copy that is written again and again; handed on as one call leaves it
                    with torch.inference_mode():
                        said, _ = device.measure(watch, cloned(value), seconds=share)
                        _, result = device.measure(on_a_copy(pieces[at]), value, seconds=0.0)
                else:
                    said, result = device.measure(watch, value, seconds=share)
                following = result if number == 0 else following
                spent = watch.fastest() if has_real_calls(device) else None
                best[at][number] = min(best[at][number], said, said if spent is None else spent)
            value = following
            if practice is not None:
                practice.release()
    return tuple(_phases(spent, learner) for spent in best)


def _practice(piece: Piece, learner: Rule, *, differentiable: bool, stages: int) -> Practice:
    keep_old = learner.versions(0, stages) > 1
    return Practice.of(piece, learner, differentiable=differentiable, keep_old=keep_old)


def _acts(practice: Practice) -> Acts:
    """What is timed one by one: where there is no backward, the forward alone."""
    if not practice.active:
        return [practice.forward]
    return [practice.forward, practice.backward, practice.update][: 3 if practice.learns else 2]


def _phases(spent: Sequence[float], learner: Rule | None) -> Phases:
    forward, backward, update = [*spent, 0.0, 0.0][:3]
    return Phases(forward, backward, update if learner is None else update / frames_per_update(learner))


def _shared_out(layers: Sequence[Phases], whole: Phases) -> tuple[Phases, ...]:
    """Where all layers together take longer than the whole, that is the price of many calls, paid once in a stage."""
    every = added(layers)
    forward, backward, update = (
        min(1.0, theirs / ours) if ours else 1.0
        for ours, theirs in (
            (every.forward, whole.forward),
            (every.backward, whole.backward),
            (every.update, whole.update),
        )
    )
    return tuple(layer.scaled(forward, backward, update) for layer in layers)

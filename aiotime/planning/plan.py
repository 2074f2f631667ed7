"""The plan: which layers form which stage on which device, and the measured costs it rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from aiotime.compiling import check_way
from aiotime.devices import default_devices, resolve, resolve_all
from aiotime.devices.base import Device
from aiotime.errors import PlanError
from aiotime.learning.enrolment import check_rule
from aiotime.learning.learner import nothing_to_learn
from aiotime.learning.rule import Rule
from aiotime.planning.balance import Division, compiled_by_hand, divide_by_hand, divide_measured
from aiotime.planning.footprint import Footprint, StageLearning
from aiotime.planning.partition import even
from aiotime.planning.trace import trace
from aiotime.planning.traced import Traced

if TYPE_CHECKING:
    from rich.console import Group

    from aiotime.planning.layers import Layer

VERSION = 1  # of the JSON form


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer.

    Attributes:
        name: the model's own name for it.
        seconds: one frame on the device it was given to; None where nothing was measured.
        output_bytes: that leave it with each frame.
        parameter_bytes: it holds.
        backward_seconds: of ``seconds``, where the plan is for learning.
        update_seconds: of ``seconds``, where the plan is for learning.
    """

    name: str
    seconds: float | None
    output_bytes: int
    parameter_bytes: int
    backward_seconds: float | None = None
    update_seconds: float | None = None

    @property
    def forward_seconds(self) -> float | None:
        """Of ``seconds``, the forward's; None where nothing was measured."""
        if self.seconds is None:
            return None
        return self.seconds - (self.backward_seconds or 0.0) - (self.update_seconds or 0.0)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage.

    Attributes:
        name: of the stage, from its first and last layer.
        layers: names of its layers.
        device: where it runs.
        seconds: one frame, measured while the other stages ran, with backward and update where it learns; None
            where nothing was measured.
        transfer_seconds: to bring a frame to this device from the one before, and its gradient back; None where
            nothing was measured.
        output_bytes: that leave it with each frame.
        parameter_bytes: it holds.
        learning: what learning adds; None where the plan is not for learning.
        compiled: the way it is compiled ("aot", "inductor", "cudagraph"); None: eager.
    """

    name: str
    layers: tuple[str, ...]
    device: str
    seconds: float | None
    transfer_seconds: float | None
    output_bytes: int
    parameter_bytes: int
    learning: StageLearning | None = None
    compiled: str | None = None

    @property
    def forward_seconds(self) -> float | None:
        """Of ``seconds``, the forward's; None where nothing was measured."""
        if self.seconds is None:
            return None
        return self.seconds - (self.backward_seconds or 0.0) - (self.update_seconds or 0.0)

    @property
    def backward_seconds(self) -> float | None:
        """Of ``seconds``, the backward's; None where nothing was measured, or nothing learns."""
        return None if self.learning is None else self.learning.backward_seconds

    @property
    def update_seconds(self) -> float | None:
        """Of ``seconds``, the update's; None where nothing was measured, or nothing learns."""
        return None if self.learning is None else self.learning.update_seconds

    @property
    def memory_bytes(self) -> int:
        """It holds at most: parameters, and what learning adds."""
        return self.parameter_bytes + (0 if self.learning is None else self.learning.nbytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """A model divided into stages; prints as a table.

    Attributes:
        stages: in order.
        layers: every layer with what it costs.
        sequential_seconds: the model itself, one frame at a time on one device (where the plan is for learning:
            trained there); None where nothing was measured.
        advice: a sentence for people, None where there is nothing to say.
        rule: the learning rule that it is for, by name; None where nothing is learned.
        paced_seconds: between two frames, where that is for the rule's order to say; None: for the slowest stage.
    """

    stages: tuple[StagePlan, ...]
    layers: tuple[LayerCost, ...]
    sequential_seconds: float | None = None
    advice: str | None = None
    rule: str | None = None
    paced_seconds: float | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers per stage: what ``balance=[…]`` takes."""
        return tuple(len(stage.layers) for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Between two frames: the slowest stage with the transfer into it, or what the learning rule's order makes of
        the stages. None where nothing was measured.
        """
        if self.paced_seconds is not None:
            return self.paced_seconds
        slowest = 0.0
        for stage in self.stages:
            if stage.seconds is None:
                return None
            slowest = max(slowest, stage.seconds + (stage.transfer_seconds or 0.0))
        return slowest

    @property
    def frames_per_second(self) -> float | None:
        """Predicted; None where nothing was measured."""
        return 1.0 / self.seconds if self.seconds else None

    @property
    def speed_up(self) -> float | None:
        """Predicted, over the model called (trained) frame by frame on one device; None where nothing was measured."""
        if self.sequential_seconds is None or not self.seconds:
            return None
        return self.sequential_seconds / self.seconds

    def check(self, layers: Sequence[Layer]) -> None:
        """Refuse a plan that was made for other layers.

        Raises:
            PlanError: naming the first difference.
        """
        planned, there = [layer.name for layer in self.layers], [layer.name for layer in layers]
        if planned == there:
            return
        at = next((at for at, (one, other) in enumerate(zip(planned, there, strict=False)) if one != other), None)
        if at is None:
            difference = f"it has {len(planned)} layers, the model {len(there)}"
        else:
            difference = f"its layer {at} is {planned[at]!r}, the model's {there[at]!r}"
        raise PlanError(f"the plan was made for another model: {difference}; make a new one with aiotime.plan(...)")

    def place(self, devices: Sequence[Device] = ()) -> list[Device]:
        """The device of each stage: one of ``devices`` by that name (each once, in order), or else by its name."""
        left = list(devices)
        placed: list[Device] = []
        for stage in self.stages:
            at = next((at for at, device in enumerate(left) if device.name == stage.device), None)
            placed.append(resolve(stage.device) if at is None else left.pop(at))
        return placed

    def to_json(self, *, indent: int | None = 2) -> str:
        """As JSON text that `from_json` reads."""
        return json.dumps({"aiotime_plan": VERSION, **asdict(self)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: it is not a plan, or one of another version.
        """
        from aiotime.planning.saved import read_plan

        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"this is not a plan: {error}") from error
        if not isinstance(data, dict) or "aiotime_plan" not in data:
            raise PlanError("this is not a plan: it lacks the key 'aiotime_plan'; write one with Plan.to_json()")
        version = data.pop("aiotime_plan")
        if type(version) is not int or version != VERSION:
            raise PlanError(f"this plan has version {version!r}, this aiotime reads {VERSION}; make a new one")
        try:
            return read_plan(data)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this plan is damaged: {type(error).__name__}: {error}") from error

    def table(self, *, layers: bool = False) -> str:
        """As aligned text: one line a stage, or one line a layer."""
        from aiotime.planning.table import text

        return text(self, layers=layers)

    def __str__(self) -> str:
        return self.table()

    def __rich__(self) -> Group:
        from aiotime.planning.table import rich_table

        return rich_table(self)


def plan(
    model: nn.Module,
    *,
    example: Any,
    devices: Sequence[str | Device] | None = None,
    balance: str | Sequence[int] = "measured",
    dynamic: Sequence[int] | None = None,
    memory: int | Mapping[str, int] | None = None,
    seconds: float = 2.0,
    learner: Rule | None = None,
    compile: str | None = None,
) -> Plan:
    """Divide ``model`` into stages on ``devices``.

    Runs the model for about ``seconds`` and blocks: not for use on a running loop. The model is not changed; it is
    measured in the mode it is in, so call ``model.eval()`` first where that is how it will run.

    Args:
        model: an nn.Sequential, or any module that torch.fx or torch.export can trace.
        example: a frame: a tensor (one argument), a tuple (positional arguments) or a dict (keyword arguments).
        devices: names such as "cpu:0", or `Device` objects, in the order frames pass them; by default every CUDA
            device, or else a worker for each core.
        balance: "measured" takes as many of the devices as pay; "even" gives each as many layers; or the number
            of layers of each stage.
        dynamic: dimensions whose size varies from frame to frame, None for the example's shapes.
        memory: bytes of parameters a device may hold, for all or by device name; with a learner, of parameters and
            all that learning adds (`StagePlan.memory_bytes`).
        seconds: to spend on measuring.
        learner: a rule of `aiotime.learning`: layers are timed forward, backward and in their update, on copies
            of the parameters, and the plan says what the rule needs of memory. The loss, and the heads of rules that
            have losses of their own, are not in the figures.
        compile: how stages are compiled, see `aiotime.Pipeline`; those that are compared are compiled first, which
            takes minutes the first time.

    Raises:
        TraceError: the model cannot be divided.
        PlanError: ``balance`` does not fit the model, or the model the memory.
        ConfigurationError: the learner has nothing to learn, or cannot work with these stages.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> cut = aiotime.plan(model, example=torch.zeros(1, 4), devices=["cpu:0", "cpu:1"], balance="even")
        >>> [(stage.device, stage.layers) for stage in cut.stages]
        [('cpu:0', ('0', '1')), ('cpu:1', ('2',))]
    """
    resolved = default_devices() if devices is None else resolve_all(devices)
    traced = trace(model, example, dynamic=dynamic)
    return make_plan(
        traced, example, resolved, balance=balance, memory=memory, seconds=seconds, learner=learner, way=compile
    )


def make_plan(
    traced: Traced,
    example: Any,
    devices: Sequence[Device],
    *,
    balance: str | Sequence[int] = "measured",
    memory: int | Mapping[str, int] | None = None,
    seconds: float = 2.0,
    learner: Rule | None = None,
    way: str | None = None,
) -> Plan:
    """`plan` for a model already traced and devices already resolved.

    Raises:
        PlanError: ``balance`` does not fit the model, or the model the memory.
        ConfigurationError: the learner has nothing to learn, or cannot work with these stages.
    """
    check_way(way, learning=learner is not None)
    if not devices:
        raise PlanError("a plan needs at least one device")
    limits = _limits(devices, memory)
    count = len(traced.layers)
    footprint = None if learner is None else _footprint(traced, example, learner)
    if balance == "measured":
        division = divide_measured(traced, example, devices, limits, seconds=seconds, footprint=footprint, way=way)
    elif balance == "even":
        stages = min(len(devices), count)
        fewer = f"The model has {count} layers, so {count} of {len(devices)} devices are used."
        advice = fewer if stages < len(devices) else None
        division = divide_by_hand(traced, devices, limits, even(count, stages), advice=advice, footprint=footprint)
    elif isinstance(balance, str | int | float | None):
        raise PlanError(f'balance is "measured", "even" or a list of layers per stage, not {balance!r}')
    else:
        division = divide_by_hand(traced, devices, limits, tuple(balance), footprint=footprint)
    if way is not None and division.ways is None:
        division = compiled_by_hand(traced, example, devices, division, way, learning=learner is not None)
    return _assembled(traced, division, footprint)


def _footprint(traced: Traced, example: Any, learner: Rule) -> Footprint:
    check_rule(learner)
    footprint = Footprint(traced, example, learner)
    if footprint.first == len(traced.layers):
        raise nothing_to_learn([layer.name for layer in traced.layers])
    return footprint


def _limits(devices: Sequence[Device], memory: int | Mapping[str, int] | None) -> list[int | None]:
    if memory is None or isinstance(memory, int):
        return [memory] * len(devices)
    unknown = memory.keys() - {device.name for device in devices}
    if unknown:
        raise PlanError(f"memory names {sorted(unknown)}, which is not among the devices")
    return [memory.get(device.name) for device in devices]


def _assembled(traced: Traced, division: Division, footprint: Footprint | None) -> Plan:
    leaving = [*traced.cut_bytes[1:], traced.output_bytes]
    costs: list[LayerCost] = []
    stages: list[StagePlan] = []
    for stage, size in enumerate(division.sizes):
        first, stop = len(costs), len(costs) + size
        inside = traced.layers[first:stop]
        for at in range(first, stop):
            seconds = None if division.layer_seconds is None else division.layer_seconds[at]
            phases = None if division.layer_phases is None else division.layer_phases[at]
            costs.append(
                LayerCost(
                    traced.layers[at].name,
                    seconds,
                    leaving[at],
                    traced.layers[at].parameter_bytes,
                    None if phases is None else phases.backward,
                    None if phases is None else phases.update,
                )
            )
        names = tuple(layer.name for layer in inside)
        learning = None
        if footprint is not None:
            whole = None if division.phases is None else division.phases[stage]
            spent = None if whole is None else (whole.backward, whole.update)
            learning = footprint.stage(first, stop, stage, len(division.sizes), seconds=spent)
        stages.append(
            StagePlan(
                name=names[0] if len(names) == 1 else f"{names[0]}…{names[-1]}",
                layers=names,
                device=division.devices[stage],
                seconds=None if division.seconds is None else division.seconds[stage],
                transfer_seconds=None if division.transfers is None else division.transfers[stage],
                output_bytes=leaving[stop - 1],
                parameter_bytes=sum(layer.parameter_bytes for layer in inside),
                learning=learning,
                compiled=None if division.ways is None else division.ways[stage],
            )
        )
    rule = None if footprint is None else type(footprint.rule).__name__
    return Plan(tuple(stages), tuple(costs), division.sequential, division.advice, rule, division.period)

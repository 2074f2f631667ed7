"""Tests of aiotime.planning.plan and what it decides by: profile, rehearsal, balance, table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aiotime.planning as planning
from aiotime.devices.base import Completions, Device, DeviceStream
from aiotime.devices.cpu import CpuDevice
from aiotime.devices.inline import InlineDevice
from aiotime.devices.simulated import VirtualClock
from aiotime.errors import PlanError
from aiotime.planning import Layer, Plan, StagePlan, make_plan, plan, trace
from aiotime.planning.profile import profile
from aiotime.planning.rehearsal import rehearse
from aiotime.planning.stopwatch import Stopwatch

ticks = 0.0  # what the `Tick` layers run so far have cost


class Tick(nn.Module):
    """A layer that costs ``seconds`` on a `Fake` device of speed 1."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(25))  # 100 bytes

    def forward(self, x: Tensor) -> Tensor:
        global ticks  # noqa: PLW0603
        ticks += self.seconds
        return x + 0.0


class Fake(Device):
    """Measures `Tick` layers exactly; its clock is not real, so nothing is rehearsed."""

    clock = VirtualClock(auto=False)

    def __init__(self, name: str, *, speed: float = 1.0, hop: float = 0.0, on_host: bool = True) -> None:
        self.name = name
        self.speed = speed
        self.speed_class = f"fake×{speed}"
        self.hop = hop
        self.on_host = on_host
        self.measured = 0

    def open(self, completions: Completions, *, workers: int = 1, label: str | None = None) -> DeviceStream:
        raise AssertionError("a plan opens no streams")

    def place(self, module: Any) -> Any:
        return module

    def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
        self.measured += 1
        before = ticks
        result = fn(value)
        return (ticks - before) / self.speed, result

    def transfer_seconds(self, nbytes: int, to: Device) -> float:
        return self.hop


def ticking(*seconds: float) -> nn.Sequential:
    """A model of layers with these costs."""
    return nn.Sequential(*[Tick(each) for each in seconds])


FRAME = torch.zeros(2, 3)


def test_the_slowest_stage_is_made_as_short_as_it_can_be() -> None:
    """Layers of 1, 1, 1 and 3 seconds on two devices: three each."""
    made = plan(ticking(1, 1, 1, 3), example=FRAME, devices=[Fake("a"), Fake("b")])
    assert made.sizes == (3, 1)
    assert [stage.device for stage in made.stages] == ["a", "b"]
    assert [stage.seconds for stage in made.stages] == pytest.approx([3.0, 3.0])
    assert made.sequential_seconds == pytest.approx(6.0)
    assert made.frames_per_second == pytest.approx(1 / 3)
    assert made.speed_up == pytest.approx(2.0)
    assert made.advice is None


def test_devices_of_different_speed_get_what_they_can_do() -> None:
    """Twice the speed, twice the layers; each kind is measured once."""
    fast, slow, other = Fake("fast", speed=2.0), Fake("slow"), Fake("other")
    made = plan(ticking(*[1.0] * 8), example=FRAME, devices=[fast, slow, other])
    assert made.sizes == (4, 2, 2)
    assert [layer.seconds for layer in made.layers] == pytest.approx([0.5] * 4 + [1.0] * 4)
    assert other.measured == 0


def test_fewer_stages_where_more_do_not_pay() -> None:
    """A transfer that costs more than it gives; the advice says how many devices are idle."""
    made = plan(ticking(1, 1), example=FRAME, devices=[Fake("a", hop=5.0), Fake("b", hop=5.0)])
    assert made.sizes == (2,)
    assert made.advice is not None
    assert "1 of 2 devices is used" in made.advice


def test_a_gain_below_the_margin_is_not_taken() -> None:
    """Two stages that are 2 % faster are not worth a second device."""
    made = plan(ticking(98, 2), example=FRAME, devices=[Fake("a"), Fake("b")])
    assert made.sizes == (2,)


def test_more_devices_than_layers() -> None:
    """As many stages as there are layers, and a word about it, however the balance is asked for."""
    devices: list[str | Device] = [Fake("a"), Fake("b"), Fake("c")]
    for balance in ("measured", "even"):
        made = plan(ticking(1, 1), example=FRAME, devices=devices, balance=balance)
        assert made.sizes == (1, 1)
        assert made.advice is not None
        assert "2 of 3 devices are used" in made.advice


def test_memory_limits_are_kept_and_named_where_they_cannot_be() -> None:
    """By device or for all; also for a division by hand."""
    model, devices = ticking(1, 1, 1, 1), [Fake("a"), Fake("b")]
    made = plan(model, example=FRAME, devices=devices, memory={"a": 100})
    assert made.sizes == (1, 3)
    with pytest.raises(PlanError, match="raise the memory"):
        plan(model, example=FRAME, devices=devices, memory=150)
    with pytest.raises(PlanError, match="'0' to '1' hold 200 bytes"):
        plan(model, example=FRAME, devices=devices, memory=150, balance="even")
    with pytest.raises(PlanError, match="not among the devices"):
        plan(model, example=FRAME, devices=devices, memory={"c": 1})


def test_a_division_by_hand_is_taken_as_it_is_and_nothing_is_measured() -> None:
    """All devices named are used; the table says that there are no figures."""
    fake = Fake("a")
    made = plan(ticking(1, 1, 1), example=FRAME, devices=[fake, Fake("b")], balance=[1, 2])
    assert made.sizes == (1, 2)
    assert fake.measured == 0
    assert made.frames_per_second is None
    assert made.speed_up is None
    assert str(made).splitlines()[2].split()[-6:] == ["–", "–", "24", "B", "100", "B"]
    assert "Nothing was measured" in str(made)
    assert made.stages[0].output_bytes == 24
    assert made.stages[1].parameter_bytes == 200
    assert plan(ticking(1, 1, 1), example=FRAME, devices=[fake, Fake("b")], balance="even").sizes == (2, 1)


@pytest.mark.parametrize("balance", ["fast", 3, None, [1, 1], [3, 0], [1, 1, 1], []])
def test_a_balance_that_does_not_fit_is_refused(balance: Any) -> None:
    """A word nobody knows, sizes that do not add up, more stages than devices."""
    with pytest.raises(PlanError, match="balance"):
        plan(ticking(1, 1, 1), example=FRAME, devices=[Fake("a"), Fake("b")], balance=balance)


def test_no_devices_are_refused() -> None:
    """A plan needs one."""
    with pytest.raises(PlanError, match="at least one"):
        make_plan(trace(ticking(1), FRAME), FRAME, [])


def test_a_plan_survives_json() -> None:
    """Measured and not."""
    for balance in ("measured", "even"):
        made = plan(ticking(1, 2, 3), example=FRAME, devices=[Fake("a"), Fake("b")], balance=balance)
        assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("aiotime_plan"), "lacks"),
        (lambda data: data.update(aiotime_plan=99), "version 99"),
        (lambda data: data.update(aiotime_plan=True), "version True"),
        (lambda data: data.update(sequential_seconds=float("nan")), "damaged"),
        (lambda data: data.pop("stages"), "damaged"),
        (lambda data: data["stages"].pop(), "damaged"),
        (lambda data: data["layers"][0].update(seconds="fast"), "damaged"),
        (lambda data: data["layers"][0].update(output_bytes=-1), "damaged"),
        (lambda data: data["stages"][0].update(device=7), "damaged"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(change: Callable[[dict[str, Any]], Any], said: str) -> None:
    """With what is wrong with it."""
    made = plan(ticking(1, 2), example=FRAME, devices=[Fake("a"), Fake("b")])
    data = json.loads(made.to_json())
    change(data)
    with pytest.raises(PlanError, match=said):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    """With a PlanError, not a parser's."""
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(text)


def test_a_plan_for_another_model_is_refused() -> None:
    """Naming the first difference."""
    made = plan(ticking(1, 2), example=FRAME, devices=[Fake("a")])
    made.check(trace(ticking(5, 6), FRAME).layers)
    with pytest.raises(PlanError, match="2 layers, the model 3"):
        made.check(trace(ticking(1, 2, 3), FRAME).layers)
    with pytest.raises(PlanError, match="layer 1 is '1', the model's 'other'"):
        made.check([Layer("0", 0), Layer("other", 0)])


def test_stages_find_their_devices() -> None:
    """Among those given, each once; by name where none is given."""
    made = plan(ticking(1, 1), example=FRAME, devices=["cpu:0", "cpu:0"], balance="even")
    mine = [CpuDevice(0, threads=2), CpuDevice(0)]
    assert made.place(mine) == mine
    assert [device.name for device in made.place()] == ["cpu:0", "cpu:0"]


def test_a_plan_prints_as_an_aligned_table() -> None:
    """One row a stage, or one row a layer, and the prediction underneath."""
    made = plan(ticking(1, 1, 1, 3), example=FRAME, devices=[Fake("a"), Fake("b")])
    assert str(made).splitlines() == [
        "stage  device  layers        ms  transfer ms  bytes across the cut  parameters",
        "─────  ──────  ─────────  ─────  ───────────  ────────────────────  ──────────",
        "0      a       0 … 2 (3)  3,000        0.000                  24 B       300 B",
        "1      b       3 (1)      3,000        0.000                  24 B       100 B",
        "Predicted: 0.333 frames/s, 2.00 × the model by itself (0.167 frames/s)",
    ]
    lines = made.table(layers=True).splitlines()
    assert len(lines) == 2 + 4 + 1
    assert lines[5].split() == ["3", "3,000", "24", "B", "100", "B", "1", "b"]


def test_a_plan_prints_with_rich() -> None:
    """As a table with the same figures; rich is not needed for anything else."""
    rich = pytest.importorskip("rich.console")
    made = plan(ticking(1, 3), example=FRAME, devices=[Fake("a"), Fake("b")])
    out = StringIO()
    rich.Console(file=out, width=80).print(made)
    lines = out.getvalue().splitlines()
    assert lines[1].split() == ["stage", "device", "layers", "ms", "ms", "the", "cut", "parameters"]
    assert lines[2].split() == ["0", "a", "0", "(1)", "1,000", "0.000", "24", "B", "100", "B"]
    assert "0.333 frames/s" in out.getvalue()


def test_planning_does_not_import_rich() -> None:
    """It is an extra."""
    assert all("rich" not in vars(sys.modules[name]) for name in sys.modules if name.startswith(planning.__name__))


def test_one_device_needs_no_list() -> None:
    """As for a Pipeline."""
    assert plan(ticking(1), example=FRAME, devices="cpu:0", balance="even").stages[0].device == "cpu:0"


def test_the_default_is_a_worker_for_each_core() -> None:
    """Without a GPU; here one layer, so one stage."""
    made = plan(nn.Sequential(nn.Linear(3, 3)), example=FRAME, seconds=0.05)
    assert len(made.stages) == 1


# What follows measures real devices; it asserts what holds on any machine, however busy.


def test_a_short_model_stays_one_stage_on_the_loop() -> None:
    """Layers of microseconds, side by side, get in each other's way: one stage, inline, and the plan says why."""
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())]).eval()
    made = plan(model, example=torch.randn(1, 8), devices=["cpu:0", "cpu:1"], seconds=0.3)
    assert made.sizes == (8,)
    assert made.stages[0].device == "inline"
    assert made.advice is not None
    assert "inline" in made.advice


def test_a_profile_changes_nothing_and_measures_each_kind_of_device_once(make: Callable[[str], Any]) -> None:
    """Not the weights, not batch norm's statistics in training mode, not the mode, not the example."""
    case = make("residual")
    case.model.train()
    state = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}
    example = case.example.clone()
    traced = trace(case.model, case.example)
    found = profile(traced, case.example, [CpuDevice(0), CpuDevice(1), InlineDevice()], seconds=0.2)
    assert found.layers.keys() == {"cpu×1", "inline"}
    assert all(len(seconds) == len(traced.layers) for seconds in found.layers.values())
    assert all(second > 0 for seconds in found.layers.values() for second in seconds)
    assert found.sequential > 0
    torch.testing.assert_close(dict(case.model.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(case.example, example)
    assert case.model.training


def test_an_in_place_layer_does_not_change_what_the_next_is_measured_on() -> None:
    """A layer called many times on one value would otherwise hand on something absurd."""
    seen: list[float] = []

    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2.0)

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(float(x.flatten()[0]))
            return x

    traced = trace(nn.Sequential(nn.Identity(), Doubles(), Looks()), torch.ones(3))
    seen.clear()
    profile(traced, torch.ones(3), [InlineDevice()], seconds=0.01)
    assert set(seen[-3:]) == {2.0}


def test_a_rehearsal_runs_every_stage_on_its_own_input(make: Callable[[str], Any]) -> None:
    """All at once; one figure a stage."""
    case = make("unet")
    traced = trace(case.model, case.example)
    pieces = traced.cut([2, len(traced.layers) - 2])
    seconds = rehearse(pieces, [CpuDevice(0), CpuDevice(1)], case.example, seconds=0.02)
    assert len(seconds) == 2
    assert all(second > 0 for second in seconds)


def test_an_error_in_a_rehearsal_reaches_the_caller() -> None:
    """And every thread ends."""

    class Fails(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Fails.calls += 1
            if Fails.calls > 9:
                raise RuntimeError("worn out")
            return x

    traced = trace(nn.Sequential(nn.Linear(3, 3), Fails()), FRAME)
    with pytest.raises(RuntimeError, match="worn out"):
        rehearse(traced.cut([1, 1]), [CpuDevice(0), CpuDevice(1)], FRAME, seconds=0.02)


def test_a_stopwatch_divides_time_by_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less the time that the thread waited for a core; the first call of all is only a start."""
    now = [0.0]
    late = [0.0]
    monkeypatch.setattr("aiotime.planning.stopwatch.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("aiotime.planning.stopwatch.waited", lambda thread: late[0])
    watch = Stopwatch(lambda value: value + 1)
    assert watch.seconds() is None
    for spent, delayed in [(2.0, 0.0), (3.0, 2.0), (6.0, 0.0), (1.0, 0.0)]:
        assert watch(1) == 2
        now[0] += spent
        late[0] += delayed
    assert watch.seconds() == pytest.approx((2.0 + 1.0 + 6.0) / 3)
    assert watch.seconds(2.0) == pytest.approx((1.0 + 6.0) / 2)
    assert watch.fastest() == pytest.approx(1.0)


def test_a_wait_between_two_clocks_makes_no_call_faster_than_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept from running after the time was read and before the wait was, a thread looks at both again."""
    now = [0.0]
    late = [0.0]
    looks = [0]

    def waited(thread: int) -> float:
        looks[0] += 1
        if looks[0] % 3 == 0:  # sooner or later between any two looks
            now[0] += 0.75
            late[0] += 0.75
        return late[0]

    monkeypatch.setattr("aiotime.planning.stopwatch.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("aiotime.planning.stopwatch.waited", waited)
    watch = Stopwatch(lambda value: value)
    for _ in range(12):
        watch(1)
        now[0] += 1.0
    assert watch.fastest() == pytest.approx(1.0)


def test_a_plan_is_a_value() -> None:
    """Frozen, and equal to another of the same content."""
    made = plan(ticking(1, 2), example=FRAME, devices=[Fake("a")])
    assert isinstance(made.stages[0], StagePlan)
    with pytest.raises(AttributeError):
        made.advice = "none"  # type: ignore[misc]

"""Tests of plans for models that learn: practice, footprint, pace, and what profile, balance and table make of them."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from functools import partial
from io import StringIO
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import aiotime
from aiotime.devices.base import Completions, Device, DeviceStream
from aiotime.devices.cpu import CpuDevice
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import ConfigurationError, PlanError
from aiotime.learning import Delayed, Exact
from aiotime.learning.order import Order
from aiotime.learning.rule import Rule
from aiotime.planning import Plan, StageLearning, make_plan, plan, trace
from aiotime.planning.footprint import Footprint
from aiotime.planning.pace import Phases, added, period
from aiotime.planning.practice import Practice
from aiotime.planning.profile import profile
from aiotime.planning.rehearsal import rehearse

ticks = 0.0  # what has been run so far has cost


class Backward(torch.autograd.Function):
    """x + weight[0], whose backward costs something."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x + weight[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        global ticks  # noqa: PLW0603
        ticks += ctx.seconds
        return grads[0], grads[0].sum().reshape(1), None


class Tick(nn.Module):
    """A layer that costs so many seconds forward and backward on a `Fake` device; its update costs 0.25."""

    def __init__(self, forward: float, backward: float, *, frozen: bool = False) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=not frozen)

    def forward(self, x: Tensor) -> Tensor:
        global ticks  # noqa: PLW0603
        ticks += self.seconds[0]
        return Backward.apply(x, self.weight, self.seconds[1])  # type: ignore[no-any-return, no-untyped-call]


class TickingSgd(torch.optim.SGD):
    """A step costs 0.25 for each parameter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        global ticks  # noqa: PLW0603
        ticks += 0.25 * sum(len(group["params"]) for group in self.param_groups)
        super().step(closure)


class Fake(Device):
    """Measures `Tick` layers exactly; its clock is not real, so nothing is rehearsed."""

    clock = VirtualClock(auto=False)
    speed_class = "fake"

    def __init__(self, name: str, *, hop: float = 0.0) -> None:
        self.name = name
        self.hop = hop
        self.moved: set[int] = set()

    def open(self, completions: Completions, *, workers: int = 1, label: str | None = None) -> DeviceStream:
        raise AssertionError("a plan opens no streams")

    def place(self, module: Any) -> Any:
        return module

    def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
        before = ticks
        result = fn(value)
        return ticks - before, result

    def transfer_seconds(self, nbytes: int, to: Device) -> float:
        self.moved.add(nbytes)
        return self.hop


FRAME = torch.zeros(2, 3)
DEVICES: list[str | Device] = [Fake("a"), Fake("b")]


def ticking(*layers: tuple[float, float]) -> nn.Sequential:
    """A model of layers with these costs forward and backward."""
    return nn.Sequential(*[Tick(*each) for each in layers])


def delayed(**settings: Any) -> Delayed:
    """The rule of most tests."""
    return Delayed(**{"loss": F.mse_loss, "optimizer": partial(TickingSgd, lr=0.1), **settings})


def adam(**settings: Any) -> Delayed:
    """The same with an optimizer that has a state."""
    return delayed(optimizer=torch.optim.Adam, **settings)


# ---------------------------------------------------------------------- where to cut


def test_the_cut_moves_to_where_the_backward_is_heavy() -> None:
    """Four equal forwards are halved; a first layer with a long backward gets a stage of its own."""
    model = ticking((1, 5), (1, 1), (1, 1), (1, 1))
    assert plan(model, example=FRAME, devices=DEVICES).sizes == (2, 2)
    made = plan(model, example=FRAME, devices=DEVICES, learner=delayed())
    assert made.sizes == (1, 3)
    assert [stage.seconds for stage in made.stages] == pytest.approx([6.25, 6.75])
    assert [stage.forward_seconds for stage in made.stages] == pytest.approx([1, 3])
    assert [stage.backward_seconds for stage in made.stages] == pytest.approx([5, 3])
    assert [stage.update_seconds for stage in made.stages] == pytest.approx([0.25, 0.75])
    assert [layer.backward_seconds for layer in made.layers] == pytest.approx([5, 1, 1, 1])
    assert made.sequential_seconds == pytest.approx(13)
    assert made.frames_per_second == pytest.approx(1 / 6.75)
    assert made.speed_up == pytest.approx(13 / 6.75)
    assert made.rule == "Delayed"


def test_below_the_first_layer_that_learns_there_is_a_forward_alone() -> None:
    """Frozen layers there cost no backward; one further up hands the gradient on and has nothing to update."""
    model = nn.Sequential(Tick(4, 9, frozen=True), Tick(4, 9, frozen=True), Tick(1, 2), Tick(1, 2, frozen=True))
    made = plan(model, example=FRAME, devices=DEVICES, learner=delayed())
    assert made.sizes == (2, 2)
    assert [layer.backward_seconds for layer in made.layers] == pytest.approx([0, 0, 2, 2])
    assert [layer.update_seconds for layer in made.layers] == pytest.approx([0, 0, 0.25, 0])
    below = made.stages[0].learning
    assert below == StageLearning(0.0, 0.0, 0, 0, 0, False, 0, 1, 0)
    assert made.stages[0].memory_bytes == made.stages[0].parameter_bytes


def test_an_update_is_shared_by_the_frames_that_it_is_made_of() -> None:
    """With update_every=5, a fifth of it each."""
    made = plan(ticking((1, 1)), example=FRAME, devices=[Fake("a")], learner=delayed(update_every=5))
    assert made.stages[0].update_seconds == pytest.approx(0.05, rel=0.3)
    assert made.layers[0].update_seconds == pytest.approx(0.05)


def test_to_recompute_costs_a_second_forward() -> None:
    """In the backward."""
    made = plan(ticking((3, 1), (3, 1)), example=FRAME, devices=DEVICES, learner=delayed(recompute=True))
    assert [stage.backward_seconds for stage in made.stages] == pytest.approx([4, 4])


def test_exact_learning_stays_on_one_device() -> None:
    """One frame at a time: stages would take turns, and the plan says so."""
    rule = Exact(loss=F.mse_loss, optimizer=partial(TickingSgd, lr=0.1))
    made = plan(ticking(*[(1, 2)] * 4), example=FRAME, devices=DEVICES, learner=rule)
    assert made.sizes == (4,)
    assert made.advice is not None
    assert "Exact learns from each frame before it takes the next" in made.advice


def test_a_disturbed_measurement_does_not_part_what_learns_one_by_one() -> None:
    """Where the whole seemed slower than its parts."""

    class Disturbed(Fake):
        calls = 0

        def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
            self.calls += 1
            said, result = super().measure(fn, value, seconds=seconds)
            return said * (2 if self.calls <= 5 else 1), result

    rule = Exact(loss=F.mse_loss, optimizer=partial(TickingSgd, lr=0.1))
    made = plan(ticking(*[(1, 2)] * 4), example=FRAME, devices=[Disturbed("a"), Disturbed("b")], learner=rule)
    assert made.sizes == (4,)
    assert made.stages[0].seconds == pytest.approx(26)


def test_layers_that_share_a_parameter_stay_together() -> None:
    """Two stages cannot both update it, so there is no cut between them."""
    shared = Tick(1, 1)
    model = nn.Sequential(Tick(1, 1), shared, Tick(1, 1), shared)
    assert plan(model, example=FRAME, devices=DEVICES).sizes == (2, 2)
    made = plan(model, example=FRAME, devices=DEVICES, learner=delayed(optimizer=torch.optim.Adam))
    assert made.sizes == (1, 3)
    assert made.stages[1].learning is not None
    assert made.stages[1].learning.weight_bytes == 8
    assert made.stages[1].learning.optimizer_bytes == 8 * 3
    tied = plan(nn.Sequential(shared, Tick(1, 1), shared), example=FRAME, devices=DEVICES, learner=delayed())
    assert tied.sizes == (3,)
    assert tied.advice is not None
    assert "share parameters" in tied.advice
    shared.weight.requires_grad_(False)
    assert plan(model, example=FRAME, devices=DEVICES, learner=delayed()).sizes == (2, 2)


def test_gradients_that_cross_a_cut_are_moved_as_well() -> None:
    """The way back counts, with the bytes of what has a gradient; below all that learns nothing comes back."""

    class Numbered(Tick):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), torch.arange(6).reshape(2, 3)

    class Joined(Tick):
        def forward(self, pair: Any) -> Any:
            return super().forward(pair[0]) + pair[1]

    near, far = Fake("a", hop=0.2), Fake("b", hop=0.3)
    model = nn.Sequential(Numbered(1, 1), Joined(1, 1))
    made = plan(model, example=FRAME, devices=[near, far], learner=delayed())
    assert made.sizes == (1, 1)
    assert made.stages[1].transfer_seconds == pytest.approx(0.5)
    assert (near.moved, far.moved) == ({24 + 48}, {24})
    frozen = nn.Sequential(Tick(2.25, 0, frozen=True), Tick(1, 1))
    made = plan(frozen, example=FRAME, devices=[near, far], learner=delayed())
    assert made.stages[1].transfer_seconds == pytest.approx(0.2)


def test_a_rule_may_refuse_a_number_of_stages() -> None:
    """Another is taken; where it refuses every number, it is heard."""

    class Picky(Delayed):
        def check(self, stages: int) -> None:
            if stages not in self.good:
                raise ConfigurationError(f"not with {stages} stages")

        good: tuple[int, ...] = (1, 3)

    rule = Picky(loss=F.mse_loss, optimizer=torch.optim.SGD)
    three: list[str | Device] = [Fake("a"), Fake("b"), Fake("c")]
    model = ticking(*[(1, 1)] * 4)
    assert plan(model, example=FRAME, devices=three[:2], learner=rule).sizes == (4,)
    assert len(plan(model, example=FRAME, devices=three, learner=rule).stages) == 3
    rule.good = ()
    with pytest.raises(ConfigurationError, match="not with"):
        plan(model, example=FRAME, devices=three, learner=rule)


# ---------------------------------------------------------------------- memory


def linear(*widths: int) -> nn.Sequential:
    """A stack of linear layers."""
    return nn.Sequential(*[nn.Linear(wide, narrow) for wide, narrow in itertools.pairwise(widths)])


def stages(made: Plan) -> list[StageLearning]:
    """What learning adds to each."""
    found = [stage.learning for stage in made.stages if stage.learning is not None]
    assert len(found) == len(made.stages)
    return found


def test_activations_are_those_of_a_linear_stack_counted_by_hand() -> None:
    """A linear layer keeps its input; a stage also keeps what it hands on. Shared memory counts once."""
    batch = 2
    model, example = linear(16, 32, 8, 4), torch.zeros(batch, 16)
    bytes_of = {width: batch * width * 4 for width in (16, 32, 8, 4)}
    for balance, kept in {
        (3,): [16 + 32 + 8 + 4],
        (1, 2): [16 + 32, 32 + 8 + 4],
        (2, 1): [16 + 32 + 8, 8 + 4],
        (1, 1, 1): [16 + 32, 32 + 8, 8 + 4],
    }.items():
        made = plan(model, example=example, devices=["cpu:0"] * 3, balance=balance, learner=adam())
        assert [stage.activation_bytes for stage in stages(made)] == [batch * 4 * width for width in kept]
    assert [stage.input_bytes for stage in stages(made)] == [bytes_of[16], bytes_of[32], bytes_of[8]]


def test_what_an_activation_function_keeps_is_not_counted_twice() -> None:
    """A ReLU keeps its output, which is the next layer's input; what comes into it is kept by nobody."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    example = torch.zeros(1, 16)
    made = plan(model, example=example, devices=["cpu:0"] * 3, balance=[3], learner=adam())
    assert stages(made)[0].activation_bytes == 4 * (16 + 32 + 8)
    made = plan(model, example=example, devices=["cpu:0"] * 3, balance=[1, 1, 1], learner=adam())
    assert [stage.activation_bytes for stage in stages(made)] == [4 * (16 + 32), 4 * (32 + 32), 4 * (32 + 8)]


def test_what_is_frozen_below_all_that_learns_keeps_nothing() -> None:
    """Its stage keeps what came in, and what the first layer that learns was given."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 24), nn.Linear(24, 8))
    model[:3].requires_grad_(False)
    made = plan(model, example=torch.zeros(1, 16), devices=["cpu:0"], balance=[4], learner=adam())
    assert stages(made)[0].activation_bytes == 4 * (16 + 24 + 8)


@pytest.mark.parametrize(
    ("settings", "graphs", "versions"),
    [
        ({}, [3, 2, 1], [3, 2, 1]),
        ({"weights": "current"}, [3, 2, 1], [1, 1, 1]),
        ({"order": "lockstep"}, [5, 3, 1], [5, 3, 1]),
        ({"update_every": 2}, [3, 2, 1], [2, 2, 1]),
    ],
)
def test_graphs_and_versions_are_those_of_the_rule(
    settings: dict[str, Any], graphs: list[int], versions: list[int]
) -> None:
    """Three equal layers on three devices, with Adam: two tensors of state and a counter for each parameter."""
    model, example = linear(16, 16, 16, 16), torch.zeros(1, 16)
    made = plan(model, example=example, devices=["cpu:0"] * 3, balance="even", learner=adam(**settings))
    assert [stage.graphs for stage in stages(made)] == graphs
    assert [stage.versions for stage in stages(made)] == versions
    weights = 4 * (16 * 16 + 16)
    state = 2 * weights + 2 * 4
    for stage, frames, kept in zip(made.stages, graphs, versions, strict=True):
        assert stage.learning is not None
        assert (stage.parameter_bytes, stage.learning.weight_bytes) == (weights, weights)
        assert stage.learning.optimizer_bytes == state
        older, gradient = (kept - 1) * weights, weights
        assert stage.memory_bytes == weights + older + gradient + state + frames * 4 * (16 + 16)


def test_to_recompute_keeps_inputs_and_one_graph() -> None:
    """What it costs in seconds it saves in bytes."""
    model = nn.Sequential(linear(8, 64), linear(64, 64), linear(64, 8), linear(8, 8))
    made = plan(model, example=torch.zeros(1, 8), devices=DEVICES, balance=[3, 1], learner=adam(recompute=True))
    first = stages(made)[0]
    assert first.recompute
    assert first.kept_bytes == 2 * 4 * 8 + 4 * (8 + 64 + 64 + 8)


def test_dropout_keeps_its_mask_and_parameters_are_no_activations() -> None:
    """Whatever autograd kept counts, but what is a parameter, a version of it, or a buffer."""
    model = nn.Sequential(nn.Linear(10, 20), nn.Dropout(0.5), nn.Linear(20, 5)).train()
    made = plan(model, example=torch.zeros(1, 10), devices=["cpu:0"], balance=[3], learner=adam())
    mask = stages(made)[0].activation_bytes - 4 * (10 + 20 + 5)
    assert mask in (20, 4 * 20)  # a mask of bytes, or of the scale


def test_limits_count_what_learning_holds() -> None:
    """A model whose parameters fit anywhere is cut where its graphs and versions do."""
    model, example = linear(16, 16, 16, 16, 16), torch.zeros(1, 16)
    each, edge = 4 * (16 * 16 + 16), 4 * 16  # bytes of a layer's parameters, and between two layers
    rule = delayed(optimizer=torch.optim.SGD)
    even = plan(model, example=example, devices=DEVICES, balance="even", learner=rule)
    first, second = (stage.memory_bytes for stage in even.stages)
    assert first == 3 * (2 * each) + 2 * 3 * edge  # with the gradient and an older version, and two graphs
    assert second == 2 * (2 * each) + 3 * edge
    limit = first - 1
    assert plan(model, example=example, devices=DEVICES, memory=limit).sizes == (4,)
    made = plan(model, example=example, devices=DEVICES, memory=limit, learner=rule)
    assert made.sizes == (1, 3)
    assert max(stage.memory_bytes for stage in made.stages) == 2 * (3 * each) + 4 * edge <= limit
    with pytest.raises(PlanError, match=f"hold {first:,} bytes while they learn, a may hold {limit:,}"):
        plan(model, example=example, devices=DEVICES, memory=limit, balance="even", learner=rule)
    with pytest.raises(PlanError, match="bytes to learn"):
        plan(model, example=example, devices=DEVICES, memory=4 * each, learner=rule)


# ---------------------------------------------------------------------- the pace


def test_the_pace_is_that_of_the_slowest_stage_where_enough_frames_are_ahead() -> None:
    """Without a rule, in event order, and with local losses."""

    class Own(Delayed):
        def order(self, stage: int, stages: int) -> Order:
            return Order(0, reach=0)

    settings: dict[str, Any] = {"loss": F.mse_loss, "optimizer": torch.optim.SGD}
    for seconds in ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 2.0, 2.0]):
        for rule in (None, Delayed(**settings), Delayed(order="lockstep", **settings), Own(**settings)):
            assert period(seconds, rule) == max(seconds)


def test_few_frames_ahead_set_the_pace() -> None:
    """Exact takes the sum of what learns; a mini-batch fills and empties the pipeline."""

    class Batch(Delayed):
        def order(self, stage: int, stages: int) -> Order:
            return Order(3, strict=True, batch=4)

    settings: dict[str, Any] = {"loss": F.mse_loss, "optimizer": torch.optim.SGD}
    assert period([1.0, 2.0, 3.0], Exact(**settings)) == 6.0
    assert period([7.0, 2.0, 3.0], Exact(**settings), first=1) == 7.0
    assert period([4.0, 2.0, 3.0], Exact(**settings), first=1) == 5.0
    assert period([2.0, 2.0, 2.0], Batch(**settings)) == pytest.approx(2.0 * (4 + 3 - 1) / 4)


def test_phases_add_up() -> None:
    """One after the other."""
    both = added([Phases(1, 2, 3), Phases(4)])
    assert both == Phases(5, 2, 3)
    assert both.total == 10
    assert both.scaled(1, 2, 0) == Phases(5, 4, 0)


# ---------------------------------------------------------------------- what is measured


def state_of(model: nn.Module) -> list[Any]:
    """Everything that a plan might have changed."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    slots = [(id(module), dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    return [{name: tensor.detach().clone() for name, tensor in tensors.items()}, slots, torch.get_rng_state()]


@pytest.mark.parametrize("balance", ["measured", "even"])
def test_the_model_is_untouched(make: Callable[[str], Any], balance: str) -> None:
    """Parameters, gradients, batch norm's statistics, mode, hooks' view of it, and the caller's random numbers."""
    case = make("residual")
    model = nn.Sequential(case.model, nn.Dropout(0.5), nn.Linear(5, 3)).train()
    before = state_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    plan(model, example=case.example, devices=["cpu:0", "cpu:1"], balance=balance, seconds=0.2, learner=adam())
    after = state_of(model)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2])
    assert model.training
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_every_kind_of_model_can_be_planned(case: Any) -> None:
    """Several inputs, structures, indices, outputs without a gradient, tied and recurrent weights."""
    if not any(parameter.requires_grad for parameter in case.model.parameters()):
        return
    traced = trace(case.model, case.example)
    made = make_plan(traced, case.example, [CpuDevice(0)], balance=[len(traced.layers)], learner=adam())
    (learning,) = stages(made)
    trainable = {id(p): p.numel() * p.element_size() for p in case.model.parameters() if p.requires_grad}
    assert learning.weight_bytes == sum(trainable.values())
    assert learning.activation_bytes > 0
    practice = Practice.of(traced.piece(0, len(traced.layers), apart=True), adam(), differentiable=False)
    torch.testing.assert_close(practice(case.example), case())


def test_a_profile_of_learning_has_three_phases() -> None:
    """All positive where something learns, and their sum is the layer's; on a real device."""
    traced = trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 8))
    found = profile(traced, torch.randn(1, 8), [CpuDevice(0)], seconds=0.2, learner=adam())
    (layers,) = found.layer_phases.values()
    assert [layer.update > 0 for layer in layers] == [True, False, True]
    assert all(layer.forward > 0 and layer.backward > 0 for layer in layers)
    assert found.layers["cpu×1"] == tuple(layer.total for layer in layers)
    assert found.whole_phases["cpu×1"].update > 0
    assert min(found.sequential, found.whole["cpu×1"]) > 0
    assert profile(traced, torch.randn(1, 8), [CpuDevice(0)], seconds=0.1).layer_phases == {}


def test_a_practice_computes_the_gradients_of_plain_pytorch() -> None:
    """Of a sum of the outputs; weights stay where they are, however often it learns."""
    torch.manual_seed(0)
    model, x = linear(4, 5, 2), torch.randn(3, 4)
    piece = trace(model, x).piece(0, 2, apart=True)
    seen: list[list[Tensor]] = []

    class Sees(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            super().step(closure)

    practice = Practice.of(piece, delayed(optimizer=partial(Sees, lr=0.5)), differentiable=True)
    for _ in range(3):
        output = practice(x)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert len(seen) == 3
    torch.testing.assert_close(seen[-1], list(expected))
    torch.testing.assert_close(output, model(x).detach())
    assert not output.requires_grad
    practice.release()
    assert practice.entry == practice.outputs == []


def test_a_layer_that_writes_into_its_input_learns_on_a_copy() -> None:
    """The value that it is measured on stays as it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    traced = trace(model, torch.ones(2, 4))
    practice = Practice.of(traced.piece(1, 2, apart=True), adam(), differentiable=True)
    value = torch.randn(2, 4)
    before = value.clone()
    for _ in range(3):
        practice(value)
    assert torch.equal(value, before)
    assert not practice.learns
    assert practice.active


def test_what_cannot_be_differentiated_is_named() -> None:
    """An in-place change of what a backward needs: the layers, torch's own words, and a way out."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.ReLU(inplace=True))
    traced = trace(model, torch.ones(2, 4))
    practice = Practice.of(traced.piece(0, 3, apart=True), adam(), differentiable=False)
    with pytest.raises(PlanError, match=r"0 … 2 cannot be learned .*inplace=False"):
        practice(torch.ones(2, 4))


def test_settings_by_stage_are_taken_as_they_fit() -> None:
    """A list or mapping of optimizers: one of them; groups that a single layer cannot give: none."""

    def weights_only(named: Any) -> list[dict[str, Any]]:
        found = dict(named)
        return [{"params": [found["0.weight"], found["1.weight"]]}]

    sgd, adam_ = partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam
    model, example = linear(4, 4, 4), torch.zeros(1, 4)
    each = 4 * (16 + 4)
    for optimizer, state in (([sgd, adam_], each), ({"0": adam_, "*": sgd}, each), ({"0": adam_}, 2 * each + 8)):
        rule = delayed(optimizer=optimizer)
        made = plan(model, example=example, devices=DEVICES, balance="even", learner=rule)
        assert [stage.optimizer_bytes for stage in stages(made)] == [state, state]
    plan(model, example=example, devices=DEVICES, learner=adam(param_groups=weights_only, clip_norm=1.0))


def test_simulated_devices_say_their_own_seconds() -> None:
    """Each phase of each layer takes what they state."""
    clock = VirtualClock(auto=False)
    device = SimulatedDevice(0, seconds=2.0, clock=clock)
    made = plan(linear(4, 4), example=torch.zeros(1, 4), devices=[device], learner=adam())
    assert made.layers[0].seconds == pytest.approx(6.0)
    assert made.stages[0].seconds == pytest.approx(2.0)


def test_a_rehearsal_of_learning_runs_every_stage(make: Callable[[str], Any]) -> None:
    """Each with its own backward and update, on copies; one figure a stage."""
    case = make("unet")
    traced = trace(case.model, case.example)
    before = state_of(case.model)
    pieces = [traced.piece(0, 2, apart=True), traced.piece(2, len(traced.layers), apart=True)]
    seconds = rehearse(pieces, [CpuDevice(0), CpuDevice(1)], case.example, seconds=0.02, learner=adam())
    assert len(seconds) == 2
    assert all(second > 0 for second in seconds)
    torch.testing.assert_close(state_of(case.model)[0], before[0], rtol=0, atol=0)


def test_a_short_model_that_learns_stays_on_the_loop() -> None:
    """Layers of microseconds: one stage, inline where all of it is short enough."""
    made = plan(linear(4, 4), example=torch.zeros(1, 4), devices=["cpu:0", "cpu:1"], seconds=0.2, learner=delayed())
    assert made.sizes == (1,)
    assert made.stages[0].device == "inline"


def test_what_does_not_learn_is_refused() -> None:
    """No rule; nothing that requires grad."""
    wrong: Any = "adam"
    with pytest.raises(ConfigurationError, match="learner must be a rule"):
        plan(linear(4, 4), example=torch.zeros(1, 4), devices=DEVICES, learner=wrong)
    with pytest.raises(ConfigurationError, match="nothing to learn"):
        plan(linear(4, 4).requires_grad_(False), example=torch.zeros(1, 4), devices=DEVICES, learner=adam())


def test_a_pipeline_plans_for_its_learner() -> None:
    """Measured or by hand, its plan says what learning takes."""
    model, example = linear(4, 8, 2), torch.zeros(1, 4)
    by_hand = aiotime.Pipeline(model, example=example, devices=["cpu:0", "cpu:1"], balance=[1, 1], learner=adam())
    assert by_hand.plan is not None
    assert [stage.versions for stage in stages(by_hand.plan)] == [2, 1]
    measured = aiotime.Pipeline(model, example=example, devices=["cpu:0"], learner=adam())
    assert measured.plan is not None
    assert measured.plan.stages[0].backward_seconds is not None
    predicting = aiotime.Pipeline(model, example=example, devices=["cpu:0"], balance=[2])
    assert predicting.plan is not None
    assert predicting.plan.stages[0].learning is None


def test_the_default_of_a_rule_follows_its_order() -> None:
    """Graphs by how far ahead it goes, versions by whether it stashes, reach by where the loss is."""

    class Some(Rule):
        given = Order(3)

        def order(self, stage: int, stages: int) -> Order:
            return self.given

    rule = Some(loss=F.mse_loss, optimizer=torch.optim.SGD)
    assert (rule.graphs(0, 4), rule.versions(0, 4), rule.reach(0, 4), rule.reach(3, 4)) == (4, 4, 3, 0)
    rule.stashes = False
    assert rule.versions(0, 4) == 1
    rule.stashes, rule.given = True, Order(3, batch=4)
    assert rule.versions(0, 4) == 1
    rule.given = Order(1, reach=1)
    assert (rule.reach(0, 4), rule.reach(3, 4)) == (1, 0)


# ---------------------------------------------------------------------- the plan as a value, a file, a table


def test_a_plan_for_learning_survives_json() -> None:
    """Measured, by hand, and below what learns; a file of before plans knew of learning still loads."""
    model = nn.Sequential(Tick(3, 1, frozen=True), Tick(1, 1), Tick(1, 1))
    for balance in ("measured", "even"):
        made = plan(model, example=FRAME, devices=DEVICES, balance=balance, learner=delayed(recompute=True))
        assert len(made.stages) == 2
        assert Plan.from_json(made.to_json()) == made
    data = json.loads(made.to_json())
    for gone in ("rule", "paced_seconds"):
        del data[gone]
    for stage in data["stages"]:
        del stage["learning"]
    for layer in data["layers"]:
        del layer["backward_seconds"], layer["update_seconds"]
    old = Plan.from_json(json.dumps(data))
    assert old.sizes == made.sizes
    assert old.rule is None
    assert old.stages[0].learning is None


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: stage.update(graphs=-1),
        lambda stage: stage.update(recompute=1),
        lambda stage: stage.update(backward_seconds="long"),
        lambda stage: stage.pop("versions"),
    ],
)
def test_a_damaged_file_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    """Whatever it says of learning is looked at."""
    made = plan(ticking((1, 1)), example=FRAME, devices=[Fake("a")], learner=delayed())
    data = json.loads(made.to_json())
    change(data["stages"][0]["learning"])
    with pytest.raises(PlanError, match="damaged"):
        Plan.from_json(json.dumps(data))


def test_a_plan_for_learning_prints_its_phases_and_its_memory() -> None:
    """One row a stage, or one row a layer; the prediction, and of what the memory consists."""
    made = plan(ticking((1, 1), (1, 1), (1, 1), (1, 1)), example=FRAME, devices=DEVICES, learner=adam())
    assert str(made).splitlines() == [
        "stage  device  layers     forward ms  backward ms  update ms  transfer ms  bytes across the cut  memory",
        "─────  ──────  ─────────  ──────────  ───────────  ─────────  ───────────  ────────────────────  ──────",
        "0      a       0 … 1 (2)       2,000        2,000      0.000        0.000                  24 B   144 B",
        "1      b       2 … 3 (2)       2,000        2,000      0.000        0.000                  24 B    88 B",
        "Predicted: 0.25 frames/s, learned from with Delayed, 2.00 × the model trained by itself (0.125 frames/s)",
        "Memory of stage 0: parameters 8 B + 2 graphs × 48 B + 1 older version × 8 B + gradient 8 B + optimizer 24 B",
        "Memory of stage 1: parameters 8 B + 1 graph × 48 B + gradient 8 B + optimizer 24 B",
    ]
    lines = made.table(layers=True).splitlines()
    assert lines[0].split()[:7] == ["layer", "forward", "ms", "backward", "ms", "update", "ms"]
    assert lines[5].split() == ["3", "1,000", "1,000", "0.000", "24", "B", "4", "B", "1", "b"]
    again = plan(ticking((1, 1)), example=FRAME, devices=DEVICES, balance="even", learner=adam(recompute=True))
    assert "1 input × 24 B + 1 graph × 48 B" in str(again)
    assert "Nothing was measured" in str(again)


def test_a_plan_for_learning_prints_with_rich() -> None:
    """Within 80 columns as far as numbers go."""
    rich = pytest.importorskip("rich.console")
    made = plan(ticking((1, 1), (1, 1)), example=FRAME, devices=DEVICES, learner=adam())
    out = StringIO()
    rich.Console(file=out, width=80).print(made)
    table = out.getvalue().splitlines()[:4]
    assert all(len(line) <= 80 for line in table)
    assert table[2].split() == ["0", "a", "0", "(1)", "1,000", "1,000", "0.000", "0.000", "24", "B", "120", "B"]


def test_batch_norm_in_training_is_planned_without_a_warning() -> None:
    """That is for the pipeline to give; and its statistics are no activations."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = trace(model, torch.randn(2, 1, 8, 8))
        footprint = Footprint(traced, torch.randn(2, 1, 8, 8), adam())
    image, kept = 2 * 64 * 4, 2 * 2 * 36 * 4
    found = footprint.stage(0, 2, 0, 1).activation_bytes
    assert image + 2 * kept <= found <= image + 2 * kept + 64  # the batch's own mean and deviation

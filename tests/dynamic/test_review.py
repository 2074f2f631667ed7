"""What a reviewer tried: slips that must not pass in silence, and code that plain PyTorch takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from aiotime.devices import SimulatedDevice, VirtualClock
from aiotime.dynamic import Network, Stage
from aiotime.errors import ConfigurationError, InputError, StageError
from aiotime.frame import Sample
from aiotime.learning.corrections import DiscrepancyCorrection

SGD = partial(torch.optim.SGD, lr=0.1)


def linear(**options: Any) -> Stage:
    return Stage(nn.Linear(3, 3), device="inline", **options)


class Coded(Network):
    """A network whose forward is a function."""

    def __init__(self, code: Callable[[Any, Any], Awaitable[Any]], **stages: Stage) -> None:
        self.code = code
        vars(self).update(stages)

    async def forward(self, sample: Any) -> Any:
        return await self.code(self, sample)


class OfRelu(nn.Module):
    """Does not keep its input for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x.relu()))


async def compare(make: Callable[[], Network], samples: list[Any]) -> None:
    """One instance at a time is plain PyTorch's loop."""
    torch.manual_seed(0)
    ours = make()
    torch.manual_seed(0)
    plain = make()
    parameters = [p for stage in plain.stages.values() for p in stage.fn.parameters()]  # type: ignore[attr-defined]
    optimizer = SGD(parameters)
    losses = []
    for sample in samples:
        loss = await plain.eager(sample)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    options: dict[str, Any] = {"min_update_frequency": 1, "update_per": "instance", "max_active_keys": 1}
    steps = [step async for step in ours.learn(samples, optimizer=SGD, **options)]
    assert [step.loss for step in steps] == pytest.approx(losses, abs=1e-5)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], tensor, atol=1e-6), name


@pytest.mark.asyncio
@pytest.mark.parametrize("max_batch", [1, 4])
async def test_an_input_changed_in_place_later_keeps_its_gradient(max_batch: int) -> None:
    async def code(net: Any, x: torch.Tensor) -> Any:
        h = (await net.a(x)) * 1.0
        y = await net.b(h)
        h.mul_(0.25)
        return ((h - y - 1) ** 2).sum()

    def make() -> Network:
        return Coded(code, a=linear(max_batch=max_batch), b=Stage(OfRelu(), device="inline", max_batch=max_batch))

    torch.manual_seed(1)
    await compare(make, list(torch.randn(6, 3)))


@pytest.mark.asyncio
async def test_an_input_changed_before_its_turn_is_refused() -> None:
    async def code(net: Any, x: torch.Tensor) -> Any:
        h = (await net.a(x)) * 1.0
        later = net.b(h)
        h.mul_(0.5)
        return (await later).sum()

    network = Coded(code, a=linear(max_batch=2), b=linear(max_batch=2))
    with pytest.raises(InputError, match="changed in place before"):
        [step async for step in network.learn([torch.ones(3)], optimizer=SGD)]


@pytest.mark.asyncio
async def test_a_stage_is_not_awaited_while_autograd_is_off() -> None:
    async def code(net: Any, x: torch.Tensor) -> Any:
        h = await net.a(x)
        if x[0] > 0:
            with torch.no_grad():
                h = h - await net.a(x)
        return (h**2).sum()

    network = Coded(code, a=linear(max_batch=4))
    samples = [torch.ones(3) * sign for sign in (1, -1, -1, 1, -1)]
    failed: list[int] = []
    run = network.learn(samples, optimizer=SGD, on_error=lambda frame, error: failed.append(frame.index))
    assert [step.index async for step in run] == [1, 2, 4]
    assert failed == [0, 3]
    assert torch.is_grad_enabled()


@pytest.mark.asyncio
async def test_what_hides_a_result_from_its_gradient_is_refused() -> None:
    @dataclass
    class State:
        h: torch.Tensor

    class Reads(nn.Linear):
        def forward(self, state: State) -> torch.Tensor:  # type: ignore[override]
            return super().forward(state.h)

    async def hidden(net: Any, x: torch.Tensor) -> Any:
        return ((await net.b(State(await net.a(x)))) ** 2).sum()

    network = Coded(hidden, a=linear(), b=Stage(Reads(3, 3), device="inline"))
    with pytest.raises(InputError, match="Hand in the tensors"):
        [step async for step in network.learn([torch.ones(3)], optimizer=SGD)]

    async def forgotten(net: Any, x: torch.Tensor) -> Any:
        return (await net.b(net.a(x))).sum()

    with pytest.raises(InputError, match="await stage"):
        [step async for step in Coded(forgotten, a=linear(), b=linear()).learn([torch.ones(3)], optimizer=SGD)]


@pytest.mark.asyncio
async def test_errors_inside_a_task_group_are_those_of_the_stage() -> None:
    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not this one")

    async def code(net: Any, x: torch.Tensor) -> Any:
        async def one(stage: Stage) -> Any:
            return await stage(x)

        async with asyncio.TaskGroup() as group:
            first, _ = group.create_task(one(net.a)), group.create_task(one(net.b))
        return first.result()

    with pytest.raises(StageError, match="not this one") as caught:
        [step async for step in Coded(code, a=linear(), b=Stage(refuses, device="inline")).run([torch.ones(3)])]
    assert caught.value.stage == "b"

    clock = VirtualClock()

    async def slow(net: Any, x: torch.Tensor) -> Any:
        async def one() -> Any:
            await clock.sleep(0.02)
            return await net.a(x)

        async with asyncio.TaskGroup() as group:
            task = group.create_task(one())
        return task.result()

    late = Coded(slow, a=Stage(nn.Linear(3, 3), device=SimulatedDevice(0, seconds=0.001, clock=clock)))
    assert [step async for step in late.run([torch.ones(3)], deadline=0.01)] == []


@pytest.mark.asyncio
async def test_code_in_place_says_what_to_write() -> None:
    async def code(net: Any, x: torch.Tensor) -> Any:
        h: torch.Tensor = await net.a(x)
        h += 1
        return h.sum()

    for network in (Coded(code, a=linear()), Coded(code, a=linear(max_batch=2))):
        with pytest.raises(StageError, match=r"write h = h \+ 1"):
            [step async for step in network.learn([torch.ones(3)], optimizer=SGD)]
        with pytest.raises(StageError, match=r"write h = h \+ 1"):
            [step async for step in network.run([torch.ones(3)])]


@pytest.mark.asyncio
async def test_forward_must_be_a_coroutine_and_return_the_loss() -> None:
    class Plain(Network):
        def __init__(self) -> None:
            self.a = linear()

        def forward(self, sample: Any) -> Any:
            return sample

    with pytest.raises(ConfigurationError, match="async def forward"):
        [step async for step in Plain().run([1])]

    async def nothing(net: Any, x: torch.Tensor) -> None:
        await net.a(x)

    with pytest.raises(InputError, match="must return the loss"):
        [step async for step in Coded(nothing, a=linear()).learn([torch.ones(3)], optimizer=SGD)]


@pytest.mark.asyncio
async def test_parameters_outside_of_the_stages_are_warned_of() -> None:
    async def code(net: Any, x: torch.Tensor) -> Any:
        result: torch.Tensor = await net.a(x)
        return result

    network = Coded(code, a=linear(), loose=nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="loose is a Linear outside of the stages"):
        assert list(network.state_dict()) == ["a.weight", "a.bias"]
    assert repr(network) == "<Coded: a@inline>"


@pytest.mark.asyncio
async def test_a_sample_without_target_is_predicted_in_eval_mode() -> None:
    modes: list[bool] = []

    class Watch(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append(self.training)
            return super().forward(x)

    async def code(net: Any, x: torch.Tensor) -> Any:
        result: torch.Tensor = await net.a(x)
        return result

    network = Coded(code, a=Stage(Watch(3, 3), device="inline"))
    samples = [Sample(torch.ones(3), torch.zeros(3) if index % 2 else None) for index in range(4)]
    run = network.learn(samples, loss=functional.mse_loss, optimizer=SGD, max_active_keys=1)
    losses = [step.loss async for step in run]
    assert [loss is not None for loss in losses] == [False, True, False, True]
    assert modes == [False, True, False, True]


@pytest.mark.asyncio
async def test_a_result_that_nobody_uses_is_warned_of_once() -> None:
    async def code(net: Any, x: torch.Tensor) -> Any:
        h = await net.a(x)
        return (await net.b(h.detach())).sum()

    network = Coded(code, a=linear(), b=linear())
    with pytest.warns(UserWarning, match="called stage 'a' and used its result neither") as seen:
        [step async for step in network.learn([torch.ones(3)] * 5, optimizer=SGD)]
    assert len(seen) == 1
    assert network.stats()["a"].unused == 5
    assert "\na " in str(network.stats()).partition("gradients")[2]  # the table of learning names it


@pytest.mark.asyncio
async def test_counters_begin_anew_with_each_opening() -> None:
    async def code(net: Any, x: torch.Tensor) -> Any:
        result: torch.Tensor = await net.a(x)
        return result

    def total(output: torch.Tensor) -> torch.Tensor:
        return output.sum()

    network = Coded(code, a=linear())
    for instances in (40, 16):
        run = network.learn([torch.ones(3)] * instances, loss=total, optimizer=SGD, supervised=False)
        assert len([step async for step in run]) == instances
        own = network.stats()["a"]
        assert (own.calls, own.gradients, own.updates) == (instances, instances, instances // 8)
        assert sum(times for _, times in own.delays) == instances
    assert len([step async for step in network.run([torch.ones(3)] * 2)]) == 2
    own = network.stats()["a"]
    assert (own.calls, own.gradients, own.updates, own.delays, own.back_sizes) == (2, 0, 0, (), ())


def test_a_correction_of_the_backward_is_refused_for_what_it_is() -> None:
    async def code(net: Any, x: torch.Tensor) -> Any:
        result: torch.Tensor = await net.a(x)
        return result

    with pytest.raises(ConfigurationError, match="changes the backward of a pipeline's stage"):
        Coded(code, a=linear()).learn([], optimizer=SGD, corrections=[DiscrepancyCorrection()])

"""What can go wrong in an instance: a clear error for it alone; the others go on, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from torch import nn

from aiotime import Sample, SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage
from aiotime.dynamic.instance import gather
from aiotime.errors import ConfigurationError, InputError, StageError
from tests.conftest import Settle
from tests.dynamic.nets import SGD, Coded, check_empty, close, gathered, linear, put, taught

kinds = pytest.mark.parametrize("kind", ["inline", "cpu", "simulated"])
batched = pytest.mark.parametrize("max_batch", [1, 4])

BAD = 3  # the instance that fails


class Raising(torch.autograd.Function):
    """Nothing forwards, an error backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("no way back")


class Fragile(nn.Module):
    """Raises where a row is not finite: forwards, or on the way back where it is negative infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x == float("inf")).any():
            raise ArithmeticError("a bad row")
        y: torch.Tensor = self.layer(x.nan_to_num())
        if x.isinf().any():
            y = Raising.apply(y)  # type: ignore[no-untyped-call]
        return y


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x.sum().item() if x.isinf().any() else x * 2


def fragile(code: Callable[[Any, Any], Awaitable[Any]], *, max_batch: int = 1, kind: str = "inline") -> Coded:
    network = Coded(
        code,
        first=Stage(linear(seed=1), max_batch=max_batch),
        stage=Stage(Fragile(), max_batch=max_batch),
        number=Stage(Detached(), max_batch=1),
        head=Stage(linear(3, 1, seed=2), max_batch=max_batch),
    )
    put(network, kind)
    return network


async def usual(net: Any, n: int) -> torch.Tensor:
    """What every instance but the bad one does."""
    h = await net.first(torch.full((3,), float(n)))
    h = await net.stage(h + 1)
    out: torch.Tensor = (await net.head(h)).sum()
    return out


# each: what instance BAD does in place of `usual`, the error's type, what it says


async def raises(net: Any, n: int) -> Any:
    await usual(net, n)
    raise LookupError("user code")


async def bad_row(net: Any, n: int) -> Any:
    h = await net.first(torch.zeros(3))
    return (await net.stage(h + float("inf"))).sum()


async def bad_backward(net: Any, n: int) -> Any:
    h = await net.first(torch.zeros(3))
    return (await net.stage(h - float("inf"))).sum()


async def own_backward(net: Any, n: int) -> Any:
    h = await net.first(torch.zeros(3))
    return (await net.head(Raising.apply(h))).sum()  # type: ignore[no-untyped-call]


async def own_backward_at_the_loss(net: Any, n: int) -> Any:
    return Raising.apply(await net.first(torch.zeros(3))).sum()  # type: ignore[no-untyped-call]


async def non_tensor(net: Any, n: int) -> Any:
    return await net.number(torch.full((3,), float("inf")))


async def detached(net: Any, n: int) -> Any:
    return (await usual(net, n)).detach()


async def not_one_number(net: Any, n: int) -> Any:
    return await net.first(torch.zeros(3))


async def nothing(net: Any, n: int) -> Any:
    await usual(net, n)


async def unawaited(net: Any, n: int) -> Any:
    out = await usual(net, n)
    net.first(torch.zeros(3))
    return out


async def unawaited_deep(net: Any, n: int) -> Any:
    h = await net.first(torch.zeros(3))
    out = await usual(net, n)
    net.stage(h)
    return out


STRANGER = Stage(linear(), device="inline")


async def stranger(net: Any, n: int) -> Any:
    return (await STRANGER(torch.zeros(3))).sum()


OUTSIDE = nn.Parameter(torch.ones(3))


async def parameter(net: Any, n: int) -> Any:
    return (await net.first(OUTSIDE * 2)).sum()


async def parameter_in_the_loss(net: Any, n: int) -> Any:
    return (await net.first(torch.zeros(3)) * OUTSIDE).sum()


async def bare_parameter(net: Any, n: int) -> Any:
    return (await net.first(OUTSIDE)).sum()


async def cancels_itself(net: Any, n: int) -> Any:
    h = await net.first(torch.zeros(3))
    net.stage(h)
    raise asyncio.CancelledError


async def mixed_shapes(net: Any, n: int) -> Any:
    return (await net.first(torch.zeros(5))).sum()


FAILURES: dict[str, Any] = {
    "raises": (raises, StageError, "LookupError: user code"),
    "bad_row": (bad_row, StageError, "'stage' failed at frame 3: ArithmeticError: a bad row"),
    "own_backward": (own_backward, StageError, "ArithmeticError: no way back"),
    "own_backward_at_the_loss": (own_backward_at_the_loss, StageError, "ArithmeticError: no way back"),
    "non_tensor": (non_tensor, InputError, "returned a float without any tensor"),
    "detached": (detached, InputError, "does not depend on any parameter"),
    "not_one_number": (not_one_number, InputError, "not one number"),
    "nothing": (nothing, InputError, "forward returned a NoneType"),
    "unawaited": (unawaited, StageError, "calls of 'first' were still under way"),
    "unawaited_deep": (unawaited_deep, StageError, "calls of 'stage' were still under way"),
    "stranger": (stranger, StageError, "is no part of network"),
    "parameter": (parameter, StageError, "a parameter of shape"),
    "parameter_in_the_loss": (parameter_in_the_loss, StageError, "a parameter of shape"),
    "bare_parameter": (bare_parameter, StageError, "a parameter of shape"),
    "cancels_itself": (cancels_itself, StageError, "CancelledError"),
    "mixed_shapes": (mixed_shapes, StageError, "'first' failed at frame 3: RuntimeError"),
}


def bare(error: BaseException) -> BaseException:
    """Without tracebacks, whose frames hold what the failing code held."""
    if error.__cause__ is not None:
        bare(error.__cause__)
    return error.with_traceback(None)


async def outcomes(network: Coded, failing: Any, *, count: int = 8, **options: Any) -> tuple[set[int], list[Any]]:
    """(instances that came out, errors) of a lesson in which instance BAD does as ``failing`` does."""
    held: list[weakref.ref[Any]] = []

    async def code(net: Any, n: int) -> Any:
        found = await (failing if n == BAD else usual)(net, n)
        if isinstance(found, torch.Tensor):
            held.append(weakref.ref(found))
        return found

    network.code = code
    errors: list[Any] = []
    options = {"min_update_frequency": 2, "unused": "ignore", "optimizer": SGD, **options}
    out = set()
    async with network:
        run = network.learn(range(count), on_error=lambda frame, error: errors.append(bare(error)), **options)
        async for step in run:
            out.add(step.index)
        del step
        check_empty(network)
        assert run._state.engine is not None
        assert not run._state.engine.door.used
        gc.collect()
        assert not any(ref() is not None for ref in held)
        # what follows works
        network.code = usual
        assert len(await taught(network, range(3))) == 3
        check_empty(network)
    return out, errors


@pytest.mark.asyncio
@pytest.mark.parametrize("failure", FAILURES)
@batched
async def test_one_instance_fails_alone(failure: str, max_batch: int) -> None:
    """Whatever one instance does wrong, it is named, its batch mates are learned from, and nothing is left."""
    code, kind, said = FAILURES[failure]
    out, errors = await outcomes(fragile(code, max_batch=max_batch), code)
    assert out == set(range(8)) - {BAD}
    (error,) = errors
    assert type(error) is kind
    assert said in str(error)
    assert error.frame == BAD


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("failure", ["raises", "bad_row", "own_backward", "unawaited", "cancels_itself"])
async def test_one_instance_fails_alone_elsewhere(failure: str, kind: str) -> None:
    """The same where devices take their time."""
    code, error_type, said = FAILURES[failure]
    out, errors = await outcomes(fragile(code, max_batch=4, kind=kind), code)
    assert out == set(range(8)) - {BAD}
    assert [type(error) for error in errors] == [error_type]
    assert said in str(errors[0])


@pytest.mark.asyncio
@kinds
async def test_a_backward_that_raises(kind: str) -> None:
    """Not batched, only its instance fails; batched, those that share the batch; the others are learned from."""
    out, errors = await outcomes(fragile(bad_backward, kind=kind), bad_backward)
    assert out == set(range(8)) - {BAD}
    assert "stage" in str(errors[0]) and "no way back" in str(errors[0])
    out, errors = await outcomes(fragile(bad_backward, max_batch=4, kind=kind), bad_backward)
    assert len(out) + len(errors) == 8
    assert 1 <= len(errors) <= 4
    assert BAD not in out
    assert all(isinstance(error, StageError) for error in errors)


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
@batched
async def test_a_failed_instance_teaches_nothing(max_batch: int) -> None:
    """The gradients of the others are those of a run without it, unless it failed half way back."""
    for code in (raises, bad_row, own_backward_at_the_loss, unawaited_deep, detached):
        sums = []
        for skipped in (False, True):
            network = fragile(code, max_batch=max_batch)

            async def forward(net: Any, n: int, code: Any = code) -> Any:
                return await (code if n == BAD else usual)(net, n)

            network.code = forward
            async with network:
                source = [n for n in range(6) if not (skipped and n == BAD)]
                await taught(network, source, on_error="skip", min_update_frequency=10**9)
                sums.append(gathered(network))
        close(*sums)


@pytest.mark.asyncio
@kinds
@batched
async def test_user_code_may_go_on_after_an_error(kind: str, max_batch: int) -> None:
    """An instance that catches a stage's error goes on, and is learned from by what it did use."""

    async def code(net: Any, n: int) -> Any:
        h = await net.first(torch.full((3,), float(n)))
        try:
            h = await net.stage(h + float("inf"))
        except StageError as error:
            assert error.frame == n  # noqa: PT017 - of this instance, not of a batch mate
        return (await net.head(h)).sum()

    network = fragile(code, max_batch=max_batch, kind=kind)
    async with network:
        assert len(await taught(network, range(6), min_update_frequency=1)) == 6
        stats = {station.name: station for station in network.stats().stages}
        assert stats["first"].gradients == stats["head"].gradients == 6
        assert stats["stage"].gradients == 0
        assert stats["stage"].failed >= 6
        check_empty(network)


@pytest.mark.asyncio
async def test_a_loss_that_raises() -> None:
    """The instance fails with the cause; the others are learned from."""
    network = fragile(usual)

    def loss(output: torch.Tensor, target: int) -> torch.Tensor:
        if target == BAD:
            raise KeyError("loss")
        return output

    errors: list[Any] = []
    async with network:
        out = [
            step.index
            async for step in network.learn(
                [Sample(n, n) for n in range(6)],
                loss=loss,
                optimizer=SGD,
                on_error=lambda frame, error: errors.append(error),
            )
        ]
        check_empty(network)
    assert out == [0, 1, 2, 4, 5]
    assert isinstance(errors[0].__cause__, KeyError)


class Halting(torch.optim.SGD):
    """Raises at its second step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 2:
            raise OSError("no step")
        return super().step()


@pytest.mark.asyncio
@pytest.mark.parametrize("update_per", ["gradient", "instance"])
@kinds
async def test_an_optimizer_that_raises(kind: str, update_per: Any) -> None:
    """The instance whose gradient set the step off fails, in both ways of counting; later steps are taken."""
    network = fragile(usual, kind=kind)
    options: dict[str, Any] = {"min_update_frequency": 1, "update_per": update_per, "max_active_keys": 1}
    errors: list[Any] = []
    async with network:
        run = network.learn(
            range(4),
            optimizer={"head": Halting, "*": SGD},
            on_error=lambda frame, error: errors.append(error),
            unused="ignore",
            **options,
        )
        bias = [network.state_dict()["head.bias"].item()]
        found = []
        async for step in run:
            found.append(step.index)
            bias.append(network.state_dict()["head.bias"].item())
        assert found == [0, 2, 3]
        steps = [before - after for before, after in itertools.pairwise(bias)]
        assert steps == pytest.approx([0.1] * 3)  # the gradient that was lost is not counted in the next mean
        (error,) = errors
        assert error.frame == 1
        assert "no step" in str(error) and "head" in str(error)
        head = network.stats().stages[-1]
        assert head.updates == 3
        assert head.gradients == 4
        check_empty(network)


@pytest.mark.asyncio
@pytest.mark.parametrize("unused", ["warn", "raise", "ignore"])
async def test_unused_results(unused: Any) -> None:
    """A result that nothing is made of: counted and said, refused, or let pass; one without a gradient is none."""

    async def code(net: Any, n: int) -> Any:
        route = await net.constant(torch.ones(3))  # no parameter, no gradient: free to be used for a branch
        assert route.sum() == 6
        if n == 1:
            await net.stage(torch.zeros(3))
        return await usual(net, n)

    network = fragile(code)
    network.constant = Stage(lambda x: x * 2, device="inline")  # type: ignore[attr-defined]
    network._house()._stages = None
    errors: list[Any] = []
    async with network:
        run = network.learn(range(3), optimizer=SGD, unused=unused, on_error=lambda frame, error: errors.append(error))
        assert len([step async for step in run]) == (2 if unused == "raise" else 3)
        stats = {station.name: station.unused for station in network.stats().stages}
        assert stats == {**dict.fromkeys(stats, 0), "stage": 0 if unused == "ignore" else 1}
        check_empty(network)
    if unused == "raise":
        assert "instance 1 called stage 'stage' and used its result neither" in str(errors[0])
        assert errors[0].stage == "stage"


@pytest.mark.asyncio
async def test_a_tensor_of_another_instance() -> None:
    """Where a result travels from one instance to the other, the second is told to detach it; detached it may."""
    kept: list[torch.Tensor] = []

    async def code(net: Any, n: int) -> Any:
        h = await net.first(torch.zeros(3))
        if n == 0:
            kept.append(h)
        elif n == 1:
            h = kept[0] * 2
        else:
            h = h + kept[0].detach()
        return (await net.head(h)).sum()

    network = fragile(code)
    with pytest.raises(StageError, match=r"instance 1 .*a result of one instance into no other"):
        await taught(network, range(3), max_active_keys=1)
    steps = await taught(network, range(3), max_active_keys=1, on_error="skip")
    assert [step.index for step in steps] == [0, 2]


@pytest.mark.asyncio
async def test_late_calls(settle: Settle) -> None:
    """A task that forward left behind is told so at its next call; nothing is left of it."""
    told: list[str] = []
    gate = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def code(net: Any, n: int) -> Any:
        async def behind() -> None:
            await gate.wait()
            try:
                await net.first(torch.zeros(3))
            except ConfigurationError as error:
                told.append(str(error))

        tasks.append(asyncio.create_task(behind(), name="behind"))
        return await usual(net, n)

    network = fragile(code)
    async with network:
        await taught(network, range(1))
        await network.submit(1)
        gate.set()
        await asyncio.gather(*tasks)
        check_empty(network)
    assert len(told) == 2
    assert "after its forward had returned" in told[0]


def test_a_call_outside_of_an_instance() -> None:
    """It says who may call."""
    with pytest.raises(ConfigurationError, match="outside of an instance"):
        STRANGER(torch.zeros(3))


@pytest.mark.asyncio
@kinds
async def test_calls_that_user_code_gives_up(kind: str) -> None:
    """Racing stages and cancelling the loser is allowed: the loser's row is passed over, its batch mates are not."""

    async def code(net: Any, n: int) -> Any:
        h = await net.first(torch.full((3,), float(n)))
        racing = [asyncio.ensure_future(net.stage(h)), asyncio.ensure_future(net.head(h))]
        if n % 2:
            racing[0].cancel()
            await asyncio.wait(racing)
            return racing[1].result().sum()
        await asyncio.wait(racing)
        return sum(each.result().sum() for each in racing)

    network = fragile(code, max_batch=4, kind=kind)
    async with network:
        assert len(await taught(network, range(12), min_update_frequency=1)) == 12
        assert len([step async for step in network.run(range(12))]) == 12
        stats = {station.name: station for station in network.stats().stages}
        assert stats["head"].gradients == 12
        assert stats["stage"].gradients == 6
        check_empty(network)


@pytest.mark.asyncio
async def test_forward_that_swallows_cancellation(settle: Settle) -> None:
    """A coroutine that catches CancelledError and calls on is refused at its next call, and the network closes."""
    caught: list[str] = []

    async def code(net: Any, n: int) -> Any:
        try:
            return await usual(net, n)
        except asyncio.CancelledError:
            caught.append("cancelled")
        try:
            return await usual(net, n)
        except Exception as error:
            caught.append(type(error).__name__)
            raise

    clock = VirtualClock(auto=False)
    network = fragile(code)
    for stage in network.stages.values():
        stage.replicas[0].device = SimulatedDevice(0, seconds=1.0, clock=clock)
    network._house()._find_devices()
    await network.__aenter__()
    task = asyncio.create_task(taught(network, range(2)))
    await settle()
    clock._auto = True
    clock.touch()
    closing = asyncio.create_task(network.aclose())
    with pytest.raises(Exception, match="closed"):
        await task
    await closing
    check_empty(network)
    assert caught == ["cancelled", "FrameCancelled"] * 2


@pytest.mark.asyncio
@batched
async def test_a_module_that_writes_into_its_input(max_batch: int) -> None:
    """While it learns, a module that works in place changes neither what others read nor the gradients."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(seed=5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x.mul_(2).relu_())
            return y

    class Copying(InPlace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.clone())

    async def code(net: Any, x: torch.Tensor) -> Any:
        h = await net.first(x)
        one, two = await asyncio.gather(net.stage(h), net.stage(h))
        return (one + two + await net.stage(x) + h).sum()

    x = torch.tensor([1.0, -2.0, 3.0])
    sums = []
    for module in (InPlace, Copying):
        network = Coded(
            code,
            first=Stage(linear(seed=1), device="inline", max_batch=max_batch),
            stage=Stage(module(), device="inline", max_batch=max_batch),
        )
        async with network:
            await taught(network, [x, x], min_update_frequency=10**9)
            sums.append(gathered(network))
    close(*sums)
    assert x.tolist() == [1.0, -2.0, 3.0]


def test_gather_never_adds_in_place() -> None:
    """What came back first may be a view that others hold."""
    one, other = torch.zeros(2), torch.zeros(2)
    shared = torch.ones(2)
    gather(one, shared)
    gather(other, shared)
    gather(one, torch.ones(2))
    assert one.grad is not None and one.grad.tolist() == [2, 2]
    assert other.grad is shared and shared.tolist() == [1, 1]


@pytest.mark.asyncio
async def test_lessons_that_begin_while_others_run_survive_a_cancellation(settle: Settle) -> None:
    """Several instances wait for a lesson's beginning; one of them cancelled does not end it for the others."""
    clock = VirtualClock(auto=False)
    network = fragile(usual)
    for stage in network.stages.values():
        stage.replicas[0].device = SimulatedDevice(0, seconds=1.0, clock=clock)
    network._house()._find_devices()
    async with network:
        request = asyncio.create_task(network.submit(0))
        await settle()  # a job runs, so the lesson has to wait
        task = asyncio.create_task(taught(network, range(4), on_error="skip"))
        await settle()
        floor = network._house()._floor
        assert floor is not None
        waiting = [entry for entry in floor.entries if entry.session.lesson is not None]
        assert len(waiting) == 4
        waiting[0].cancelled = True
        clock._auto = True
        clock.touch()
        await request
        assert len(await task) == 3
        check_empty(network)


@pytest.mark.asyncio
async def test_an_instance_cancelled_before_it_began(settle: Settle) -> None:
    """It never ran a line, and still its credit comes back and the network closes."""
    network = fragile(usual)
    async with network:
        house = network._house()
        task = asyncio.create_task(network.submit(1))
        floor = house._floor
        assert floor is not None
        begin = floor.begin

        def at_once(entry: Any) -> None:
            begin(entry)
            entry.cancelled = True

        floor.begin = at_once  # type: ignore[method-assign]
        with pytest.raises(Exception, match="cancelled"):
            await task
        floor.begin = begin  # type: ignore[method-assign]
        await settle()
        check_empty(network)
        await network.submit(1)

"""The proof: with one instance at a time a network learns as plain PyTorch does; and the promises of its methods."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime import Sample, SimulatedDevice, VirtualClock
from aiotime.dynamic import Network, Stage, Step
from aiotime.errors import (
    BusyError,
    ClosedError,
    ConfigurationError,
    DeadlineExceeded,
    FailureBudgetExceeded,
    SourceError,
    StageError,
)
from tests.conftest import Settle
from tests.dynamic.nets import (
    ADAM,
    MOMENTUM,
    SGD,
    Coded,
    RnnNet,
    TreeNet,
    check_empty,
    close,
    floor_of,
    gathered,
    linear,
    modules,
    plain_rnn,
    plain_tree,
    put,
    sequences,
    taught,
    trees,
    weights_of,
)

kinds = pytest.mark.parametrize("kind", ["inline", "cpu", "simulated"])
batched = pytest.mark.parametrize("max_batch", [1, 16])
optimizers = pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])

CASES: dict[str, Any] = {
    "tree": (TreeNet, plain_tree, None, trees),
    "rnn": (RnnNet, plain_rnn, functional.cross_entropy, sequences),
}
nets = pytest.mark.parametrize("case", CASES)


def plain_loop(
    parts: dict[str, nn.Module], plain: Callable[..., torch.Tensor], source: Any, optimizer: Any
) -> list[float]:
    """One instance after the other: forward, backward, step."""
    steps = [optimizer(part.parameters()) for part in parts.values()]
    losses = []
    for sample in source:
        loss = plain(parts, sample)
        for step in steps:
            step.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for step in steps:
            step.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------------- the proof


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
@nets
@kinds
@batched
@optimizers
async def test_one_key_is_plain_pytorch(case: str, kind: str, max_batch: int, optimizer: Any) -> None:
    """max_active_keys=1 and an update per instance: the losses and weights of a plain loop over the same instances."""
    make, plain, loss, data = CASES[case]
    network, source = make(max_batch=max_batch), data(12)
    parts = modules(network)
    expected = plain_loop(parts, plain, source, optimizer)
    put(network, kind)
    steps = await taught(
        network,
        source,
        loss=loss,
        optimizer=optimizer,
        max_active_keys=1,
        min_update_frequency=1,
        update_per="instance",
    )
    torch.testing.assert_close(torch.tensor([step.loss for step in steps]), torch.tensor(expected))
    close(network.state_dict(), weights_of(parts), atol=1e-8)
    assert all(step.delay is not None and not any(step.delay) for step in steps)


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
@nets
@batched
async def test_one_key_is_the_eager_network(case: str, max_batch: int) -> None:
    """The same, with `Network.eager` as the plain PyTorch to compare with."""
    make, _, loss, data = CASES[case]
    source = data(10, seed=3)
    reference, network = make(max_batch=max_batch), make(max_batch=max_batch)
    steps_of = [ADAM(stage.fn.parameters()) for stage in reference.stages.values()]
    losses = []
    for sample in source:
        output = await reference.eager(sample.input if isinstance(sample, Sample) else sample)
        value = output if loss is None else loss(output, sample.target)
        for step in steps_of:
            step.zero_grad()
        value.backward()
        for step in steps_of:
            step.step()
        losses.append(value.item())
    steps = await taught(
        network,
        source,
        loss=loss,
        optimizer=ADAM,
        max_active_keys=1,
        min_update_frequency=1,
        update_per="instance",
    )
    torch.testing.assert_close(torch.tensor([step.loss for step in steps]), torch.tensor(losses))
    close(network.state_dict(), reference.state_dict(), atol=1e-8)


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
@nets
@kinds
@batched
async def test_sixteen_in_flight_gather_the_same_gradients(case: str, kind: str, max_batch: int) -> None:
    """Without updates, the sums of the gradients of many instances at once are plain PyTorch's."""
    make, plain, loss, data = CASES[case]
    network, source = put(make(max_batch=max_batch), kind), data(24, seed=1)
    parts = modules(network)
    expected = [plain(parts, sample).item() for sample in source]
    for sample in source:
        plain(parts, sample).backward()
    async with network:
        steps = await taught(network, source, loss=loss, max_active_keys=16, min_update_frequency=10**9)
        found = gathered(network)
        stats = network.stats()
        check_empty(network)
    torch.testing.assert_close(torch.tensor([step.loss for step in steps]), torch.tensor(expected))
    grads = {
        f"{name}.{key}": p.grad
        for name, part in parts.items()
        for key, p in part.named_parameters()
        if p.grad is not None
    }
    close(found, grads)
    assert all(station.updates == 0 for station in stats.stages)
    if max_batch > 1:
        assert max(station.batch_mean for station in stats.stages) > 3


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_an_update_per_three_instances() -> None:
    """min_update_frequency=3 per instance, one key: plain PyTorch with the mean of three gradients."""
    network, source = TreeNet(), [sample for sample in trees(30) if not isinstance(sample[0], int)][:9]
    parts = modules(network)
    steps = [SGD(part.parameters()) for part in parts.values()]
    for at, sample in enumerate(source):
        (plain_tree(parts, sample) / 3).backward()  # type: ignore[no-untyped-call]
        if at % 3 == 2:
            for step in steps:
                step.step()
                step.zero_grad()
    await taught(network, source, max_active_keys=1, min_update_frequency=3, update_per="instance")
    close(network.state_dict(), weights_of(parts))


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_what_shares_storage_on_the_way_back_stays_apart() -> None:
    """Two inputs of a sum have one gradient tensor, and a sum's input one of stride 0: neither is added to in place."""

    async def code(net: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = await net.a(x), await net.b(x)
        short = (await net.plus(a, b)).sum() + await net.total(a)
        long = a * 3, b * 2
        for _ in range(4):  # their gradients come long after that of the sum
            long = await net.head(long[0]), await net.head(long[1])
        result: torch.Tensor = short + long[0].sum() + 2 * long[1].sum()
        return result

    for max_batch in (1, 4):
        network = Coded(
            code,
            a=Stage(linear(seed=1), device="inline", max_batch=max_batch),
            b=Stage(linear(seed=2), device="inline", max_batch=max_batch),
            head=Stage(linear(seed=3), device="inline", max_batch=max_batch),
            plus=Stage(lambda a, b: a + b, device="inline", max_batch=max_batch),
            total=Stage(lambda a: a.sum(-1), device="inline", max_batch=max_batch),
        )
        x = torch.rand(3)
        (await network.eager(x)).backward()
        expected = {
            f"{name}.{key}": p.grad
            for name in ("a", "b", "head")
            for key, p in network.stages[name].fn.named_parameters()  # type: ignore[attr-defined]
        }
        async with network:
            await taught(network, [x], min_update_frequency=10**9)
            close(gathered(network), expected)


# ---------------------------------------------------------------------- long and deep


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_five_thousand_steps() -> None:
    """A sequence of 5,000 steps goes forward and back without recursion, and leaves nothing."""

    async def code(net: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(5000):
            x = await net.cell(x)
        return x.sum()

    network = Coded(code, cell=Stage(nn.Tanh(), device="inline"), first=Stage(linear(2, 2), device="inline"))

    async def whole(net: Any, x: torch.Tensor) -> torch.Tensor:
        return await code(net, await net.first(x))

    network.code = whole
    async with network:
        (step,) = await taught(network, [torch.rand(2)], min_update_frequency=1)
        assert step.calls == 5001
        assert network.stats().stages[0].gradients in (0, 1)
        check_empty(network)


# ---------------------------------------------------------------------- inference


def slow(clock: VirtualClock, seconds: Any = 1.0, index: int = 0) -> SimulatedDevice:
    return SimulatedDevice(index, seconds=seconds, clock=clock)


async def steps_deep(net: Any, x: torch.Tensor) -> torch.Tensor:
    """As many calls as the input says."""
    for _ in range(int(x)):
        x = await net.stage(x)
    return x


def deep(clock: VirtualClock | None = None, **options: Any) -> Coded:
    device: Any = "inline" if clock is None else slow(clock)
    return Coded(steps_deep, stage=Stage(lambda x: x.clone(), device=device, **options))


@pytest.mark.asyncio
async def test_predictions_keep_the_order() -> None:
    """Instances of any length leave in the order of the source."""
    lengths = [5, 1, 4, 1, 1, 3, 2, 1]
    network = deep(VirtualClock())
    found: list[Any] = [step async for step in network.run([torch.tensor(n) for n in lengths], max_active_keys=4)]
    assert [int(step.output) for step in found] == lengths
    assert [step.index for step in found] == list(range(8))
    assert [step.calls for step in found] == lengths
    assert all(step.loss is None and step.delay is None and step.path is None for step in found)


@pytest.mark.asyncio
async def test_an_early_exit_has_lower_latency() -> None:
    """With ordered=False an instance that makes fewer calls leaves sooner, by exactly their time."""
    clock = VirtualClock()
    network = Coded(steps_deep, stage=Stage(lambda x: x.clone(), device=slow(clock), max_batch=4))
    lengths, arrivals = [6, 1, 3, 6], []
    async for step in network.run([torch.tensor(n) for n in lengths], ordered=False):
        arrivals.append((step.index, step.latency, clock.now()))  # noqa: PERF401
    assert sorted(arrivals[:1] + arrivals[1:2]) == [(1, 1.0, 1.0), (2, 3.0, 3.0)]
    assert sorted(arrivals[2:]) == [(0, 6.0, 6.0), (3, 6.0, 6.0)]
    ordered = [clock.now() async for _ in network.run([torch.tensor(n) for n in lengths])]
    assert ordered == [12.0] * 4  # behind the first, which takes six seconds more


@pytest.mark.asyncio
async def test_the_source_is_pulled_no_faster(settle: Settle) -> None:
    """Nothing is pulled that max_active_keys and the window have no room for."""
    clock = VirtualClock(auto=False)
    network = deep(clock)
    pulled = 0

    async def source() -> AsyncIterator[torch.Tensor]:
        nonlocal pulled
        while True:
            pulled += 1
            yield torch.tensor(1)

    async with network, network.run(source(), max_active_keys=3, window=5) as run:
        await settle()
        assert pulled <= 4  # three in flight, one in hand
        assert len(floor_of(network).entries) == 3
        for _ in range(3):
            clock.advance(1.0)
            await settle()
        assert pulled <= 6  # three wait to be taken
        await run.__anext__()
        clock.advance(1.0)
        await settle()
        assert pulled <= 7
        clock.advance(1.0)  # what has begun ends before the run does
        await settle()
        asyncio.get_running_loop().call_later(0, clock.advance, 1.0)
    check_empty(network)


@pytest.mark.asyncio
async def test_a_deadline_sheds_instances() -> None:
    """An instance that makes a call after its deadline is shed, before it is computed; the others come out."""
    network = deep(VirtualClock())
    lengths = [1, 9, 2, 9, 1]
    run = network.run([torch.tensor(n) for n in lengths], deadline=7.5, max_active_keys=8)
    found = [(step.index, step.dropped_before) async for step in run]
    assert found == [(0, 0), (2, 1), (4, 1)]
    assert run.stats().frames_shed == 2
    assert network.stats().instances_shed == 2
    check_empty(network)


async def fails_at_three(net: Any, x: torch.Tensor) -> torch.Tensor:
    if int(x) == 3:
        raise ValueError("three")
    result: torch.Tensor = await net.stage(x)
    return result


def fragile(**options: Any) -> Coded:
    return Coded(fails_at_three, stage=Stage(lambda x: x + 1, device="inline", **options))


@pytest.mark.asyncio
async def test_on_error_raise() -> None:
    """An exception in an instance is raised in its turn, named, with its cause."""
    network, found = fragile(), []
    with pytest.raises(StageError, match="instance 3: ValueError: three") as caught:
        async for step in network.run([torch.tensor(n) for n in range(6)]):
            found.append(int(step.output))  # noqa: PERF401 - what came before the error
    assert found == [1, 2, 3]
    assert caught.value.frame == 3
    assert isinstance(caught.value.__cause__, ValueError)
    check_empty(network)


@pytest.mark.asyncio
async def test_on_error_skip_and_callable() -> None:
    """on_error="skip" leaves the failed ones out; a callable is told of each."""
    network = fragile()
    data = [torch.tensor(n) for n in (1, 3, 2, 3)]
    assert [int(s.output) async for s in network.run(data, on_error="skip")] == [2, 3]
    told: list[tuple[int, str]] = []
    run = network.run(data, on_error=lambda frame, error: told.append((int(frame.input), type(error).__name__)))
    assert [int(s.output) async for s in run] == [2, 3]
    assert told == [(3, "StageError")] * 2
    assert run.stats().frames_failed == 2


@pytest.mark.asyncio
async def test_failure_budget() -> None:
    """More failures than the budget end the run."""
    network = fragile()
    with pytest.raises(FailureBudgetExceeded):
        async for _ in network.run([torch.tensor(3)] * 4, on_error="skip", failure_budget=2):
            pass
    check_empty(network)


@pytest.mark.asyncio
@pytest.mark.parametrize(("overflow", "last"), [("latest", 19), ("drop_newest", None), ("drop_oldest", 19)])
async def test_overflow(overflow: Any, last: int | None) -> None:
    """A source that does not wait has what is too much shed, by the policy; nothing is lost uncounted."""
    network = deep(VirtualClock())
    run = network.run([torch.tensor(1)] * 20, overflow=overflow, max_active_keys=1, window=2)
    found = [step.index async for step in run]
    assert found == sorted(found)
    assert len(found) + run.stats().frames_shed == 20
    assert 0 < len(found) < 20
    if last is not None:
        assert found[-1] == last


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "network"])
async def test_leaving_early(how: str, settle: Settle) -> None:
    """Left by break, aclose, a cancelled consumer or a closed network: nothing is left behind."""
    network = deep(VirtualClock(), max_batch=2)
    seen: list[int] = []

    async def consume() -> None:
        async with network.run(iter(lambda: torch.tensor(2), None), max_active_keys=5) as run:
            async for step in run:
                seen.append(step.index)
                if how == "break" and step.index == 3:
                    break
                if how == "aclose" and step.index == 3:
                    await run.aclose()

    async with network:
        task = asyncio.create_task(consume())
        if how == "cancel":
            await settle(until=lambda: len(seen) > 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "network":
            await settle(until=lambda: len(seen) > 3)
            await network.aclose()
            with pytest.raises(ClosedError):
                await task
        else:
            await task
        check_empty(network)
        assert [s.index async for s in network.run([torch.tensor(1)])] == [0]


@pytest.mark.asyncio
async def test_a_source_that_crashes() -> None:
    """What came before it leaves first, then its error."""

    def source() -> Iterator[torch.Tensor]:
        yield torch.tensor(1)
        yield torch.tensor(2)
        raise OSError("unplugged")

    network, found = deep(), []
    with pytest.raises(SourceError, match="unplugged"):
        async for step in network.run(source()):
            found.append(step.index)  # noqa: PERF401 - what came before the error
    assert found == [0, 1]
    check_empty(network)


@pytest.mark.asyncio
@kinds
async def test_learning_and_predicting_at_once(kind: str) -> None:
    """Two runs that predict and one that learns share the stages; each gets what is its own."""
    network = put(RnnNet(max_batch=8), kind)
    plain = modules(network)
    async with network:

        async def predict(number: int) -> int:
            count = 0
            async for step in network.run([s.input for s in sequences(number)]):
                assert step.index == count
                assert step.output.shape == (10,)
                count += 1
            return count

        learned, first, second = await asyncio.gather(
            taught(network, sequences(20), loss=functional.cross_entropy, min_update_frequency=10**9),
            predict(10),
            predict(15),
        )
        assert (len(learned), first, second) == (20, 10, 15)
        for step, sample in zip(learned, sequences(20), strict=True):
            assert step.loss == pytest.approx(plain_rnn(plain, sample).item(), abs=1e-5)
        check_empty(network)


# ---------------------------------------------------------------------- submit


@pytest.mark.asyncio
async def test_a_thousand_requests() -> None:
    """Each of a thousand at once gets its own answer; more than there are credits wait."""
    network = Coded(steps_deep, stage=Stage(lambda x: x.clone(), device="inline", max_batch=64))
    async with network:
        answers = await asyncio.gather(*(network.submit(torch.tensor(1 + n % 3)) for n in range(1300)))
        assert [int(step.output) for step in answers] == [1 + n % 3 for n in range(1300)]
        assert network.stats().instances_out == 1300
        check_empty(network)


@pytest.mark.asyncio
async def test_requests_with_deadlines_and_cancellations(settle: Settle) -> None:
    """A request that is late is told so, one that is cancelled is passed over, and the others are answered."""
    network = deep(VirtualClock(), max_batch=4)
    async with network:
        late = [asyncio.create_task(network.submit(torch.tensor(9), deadline=2.5)) for _ in range(3)]
        fine = [asyncio.create_task(network.submit(Sample(torch.tensor(4), key=n))) for n in range(5)]
        gone = [asyncio.create_task(network.submit(torch.tensor(5))) for _ in range(5)]
        for turns, task in enumerate(gone):
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
        found = await asyncio.gather(*late, *gone, return_exceptions=True)
        assert [type(each) for each in found[:3]] == [DeadlineExceeded] * 3
        assert [type(each) for each in found[3:]] == [asyncio.CancelledError] * 5
        assert [step.key for step in await asyncio.gather(*fine)] == list(range(5))
        await settle(until=lambda: not floor_of(network).entries and not floor_of(network).jobs)
        check_empty(network)


@pytest.mark.asyncio
async def test_a_request_fails_alone() -> None:
    """The error of one goes to its caller."""
    async with fragile() as network:
        with pytest.raises(StageError, match="three"):
            await network.submit(torch.tensor(3))
        assert int((await network.submit(torch.tensor(1))).output) == 2
        check_empty(network)


# ---------------------------------------------------------------------- life


@pytest.mark.asyncio
async def test_drain_finishes_and_then_refuses() -> None:
    """What was accepted comes out; what is new is refused until the network is opened again."""
    network = deep(VirtualClock())
    async with network:
        requests = [asyncio.create_task(network.submit(torch.tensor(2))) for _ in range(5)]
        await asyncio.sleep(0)
        await network.drain()
        assert all(int(step.output) == 2 for step in await asyncio.gather(*requests))
        with pytest.raises(ClosedError, match="draining"):
            await network.submit(torch.tensor(1))
        with pytest.raises(ClosedError, match="draining"):
            async for _ in network.run([torch.tensor(1)]):
                pass
    async with network:
        assert int((await network.submit(torch.tensor(1))).output) == 1


@pytest.mark.asyncio
async def test_drain_of_learning_leaves_every_update_in_the_weights() -> None:
    """After a drain nothing is in flight, and what was learned is in the weights."""
    network = put(TreeNet(max_batch=4), "simulated")
    async with network:
        run = network.learn(iter(lambda: trees(1)[0], None), optimizer=SGD, min_update_frequency=4, unused="ignore")
        count = 0
        async for _ in run:
            count += 1
            if count == 10:
                await network.drain()
        assert count >= 10
        check_empty(network)
        floor = floor_of(network)
        assert all(
            each.hands is None or each.hands.updater is None or each.hands.updater.gathered < 4
            for each in floor.stations
        )


@pytest.mark.asyncio
async def test_submit_needs_an_open_network() -> None:
    """Outside of `async with` it says so."""
    with pytest.raises(ClosedError, match="async with"):
        await deep().submit(torch.tensor(1))


def test_one_loop_after_the_other() -> None:
    """A network runs on one loop, then on the next; what it learned stays."""
    network = TreeNet(device="cpu:0", max_batch=4)

    async def once() -> None:
        async with network:
            await taught(network, trees(4), min_update_frequency=2)

    asyncio.run(once())
    before = network.state_dict()
    asyncio.run(once())
    assert any(not torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert network.stats().instances_out == 4


def test_a_loop_that_ended_without_closing() -> None:
    """The next loop opens the stages anew, in the mode that they had."""
    seen: list[bool] = []

    class Mode(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.training)
            return super().forward(x)

    async def code(net: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (await net.stage(x)).sum()
        return out

    network = Coded(code, stage=Stage(Mode(2, 2), device="inline"))

    async def leave_open() -> None:
        await network.__aenter__()
        await network.submit(torch.rand(2))

    async def learn() -> None:
        await taught(network, [torch.rand(2)])

    asyncio.run(leave_open())
    asyncio.run(learn())
    assert seen == [False, True]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_two_loops_at_once_are_refused() -> None:
    """A network is open on one loop at a time."""
    async with deep() as network:

        def elsewhere() -> None:
            asyncio.run(network.submit(torch.tensor(1)))

        with pytest.raises(ConfigurationError, match="another event loop"):
            await asyncio.to_thread(elsewhere)


@pytest.mark.asyncio
async def test_a_stage_is_in_one_open_network() -> None:
    """Another network that has it is refused until the first is closed."""
    stage = Stage(lambda x: x, device="inline")
    one, other = Coded(steps_deep, stage=stage), Coded(steps_deep, stage=stage)
    async with one:
        with pytest.raises(ConfigurationError, match="another network"):
            async with other:
                pass
    async with other:
        await other.submit(torch.tensor(1))


# ---------------------------------------------------------------------- modes and graphs


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["inline", "cpu"])
async def test_inference_is_in_eval_mode_and_without_graphs(kind: str) -> None:
    """Predictions see dropout off and no autograd; learning sees the module's own mode; both may alternate."""
    seen: list[tuple[bool, bool]] = []

    class Mode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(2, 2)
            self.frozen = nn.BatchNorm1d(2).eval()
            self.frozen.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            assert not self.frozen.training
            seen.append((self.training, y.requires_grad))
            return y

    async def code(net: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = (await net.stage(x)).sum()
        return y

    network = put(Coded(code, stage=Stage(Mode(), max_batch=2)), kind)
    for _ in range(2):  # opened by the run, and anew
        async for step in network.run([torch.rand(2)]):
            assert not step.output.requires_grad
        await taught(network, [torch.rand(2)])
    assert seen == [(False, False), (True, True)] * 2
    async with network:
        await network.submit(torch.rand(2))
        await taught(network, [torch.rand(2)])
        await network.submit(torch.rand(2))
    assert seen[4:] == [(False, False), (True, True), (False, False)]
    module: Any = network.stages["stage"].fn
    assert module.training
    assert not module.frozen.training


# ---------------------------------------------------------------------- weights and optimizers


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_the_optimizer_lives_on_over_two_lessons() -> None:
    """Equal partials go on with the same momentum; another optimizer starts afresh."""
    source = trees(8)
    whole, halves, fresh = TreeNet(), TreeNet(), TreeNet()
    options: dict[str, Any] = {"max_active_keys": 1, "min_update_frequency": 1, "update_per": "instance"}
    await taught(whole, source, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), **options)
    for part in (source[:4], source[4:]):
        await taught(halves, part, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), **options)
    close(whole.state_dict(), halves.state_dict())
    parts = modules(fresh)
    plain_loop(parts, plain_tree, source[:4], MOMENTUM)
    plain_loop(parts, plain_tree, source[4:], partial(torch.optim.SGD, lr=0.05, momentum=0.8))
    for part, momentum in ((source[:4], 0.9), (source[4:], 0.8)):
        await taught(fresh, part, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=momentum), **options)
    close(fresh.state_dict(), weights_of(parts))


@pytest.mark.asyncio
async def test_another_lesson_meanwhile_is_refused() -> None:
    """Two runs may learn at once in the same way, not in two ways."""
    network = put(TreeNet(), "simulated")
    async with network, network.learn(trees(4), optimizer=SGD, unused="ignore") as run:
        await run.__anext__()
        with pytest.raises(BusyError):
            await taught(network, trees(1), optimizer=ADAM)
        assert len(await taught(network, trees(2))) == 2
        assert len([step async for step in run]) == 3
        check_empty(network)


@pytest.mark.asyncio
async def test_state_dict_and_load_while_running(settle: Settle) -> None:
    """Weights loaded while instances are in flight hold from the next batch of each stage on."""
    clock = VirtualClock(auto=False)
    network = Coded(steps_deep, stage=Stage(linear(1, 1), device=slow(clock)))

    async def thrice(net: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = await net.stage(x)
        return x

    network.code = thrice
    async with network:
        await network.load_state_dict({"stage.weight": torch.tensor([[2.0]]), "stage.bias": torch.zeros(1)})
        request = asyncio.create_task(network.submit(torch.ones(1)))
        await settle()
        clock.advance(1.0)  # 2
        await settle()  # the second call runs with the old weights
        load = asyncio.create_task(
            network.load_state_dict({"stage.weight": torch.tensor([[5.0]]), "stage.bias": torch.zeros(1)})
        )
        await settle()
        for _ in range(2):
            clock.advance(1.0)
            await settle()
        await load
        assert (await request).output.item() == 2 * 2 * 5
        with pytest.raises(ConfigurationError, match="missing keys"):
            await network.load_state_dict({})
        with pytest.raises(ConfigurationError, match="shape"):
            await network.load_state_dict({"stage.weight": torch.zeros(2, 2), "stage.bias": torch.zeros(1)})
        assert float(network.state_dict()["stage.weight"]) == 5


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_load_during_learning() -> None:
    """Loaded weights are what the optimizer goes on from, with its state; a saved state has the same future."""
    source = trees(10)
    options: dict[str, Any] = {"max_active_keys": 1, "min_update_frequency": 1, "update_per": "instance"}
    one = TreeNet()
    await taught(one, source[:5], **options)
    state = one.state_dict()
    await taught(one, source[5:], **options)
    other = TreeNet(width=8)
    async with other:
        run = other.learn(source[5:], optimizer=SGD, unused="ignore", **options)
        await other.load_state_dict(state)
        losses = [step.loss async for step in run]
    assert len(losses) == 5
    close(other.state_dict(), one.state_dict())


# ---------------------------------------------------------------------- parts


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_a_network_in_a_network() -> None:
    """A part is called like a stage, in the same instance; its stages have its name before their own."""

    class Twice(Network):
        def __init__(self) -> None:
            self.layer = Stage(linear(3, 3), device="inline", max_batch=4)

        async def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = await self.layer(await self.layer(x))
            return out

    class Whole(Network):
        def __init__(self) -> None:
            self.first = Twice()
            self.more = [Twice(), self.first]
            self.head = Stage(linear(3, 1, seed=2), device="inline")

        async def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in (self.first, *self.more):
                x = await part(x)
            out: torch.Tensor = (await self.head(x)).sum()
            return out

    network = Whole()
    assert list(network.stages) == ["first.layer", "more.0.layer", "head"]
    with pytest.raises(ConfigurationError, match="outside of an instance"):
        await network.first(torch.rand(3))
    x = torch.rand(3)
    loss = await network.eager(x)
    loss.backward()
    expected = {f"{n}.{k}": p.grad for n, s in network.stages.items() for k, p in s.fn.named_parameters()}  # type: ignore[attr-defined]
    async with network:
        (step,) = await taught(network, [x], min_update_frequency=10**9)
        assert step.loss == pytest.approx(loss.item())
        assert step.calls == 7
        close(gathered(network), expected)


@pytest.mark.asyncio
@pytest.mark.may_block  # a pipeline looks at its modules when it is made
async def test_a_pipeline_as_an_attribute() -> None:
    """It is opened with the network; what it says is a constant for learning; without `async with` one is told."""

    class Whole(Network):
        def __init__(self) -> None:
            self.trunk = aiotime.Pipeline.from_stages([aiotime.Stage(linear(3, 3), name="trunk")])
            self.head = Stage(linear(3, 1), device="inline")

        async def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = (await self.trunk.submit(x)).output
            out: torch.Tensor = (await self.head(features)).sum()
            return out

    network = Whole()
    before = {key: value.clone() for key, value in network.trunk.state_dict().items()}
    with pytest.raises(ClosedError, match="async with network"):
        await taught(network, [torch.rand(3)])
    async with network:
        steps = await taught(network, [torch.rand(3) for _ in range(4)], min_update_frequency=1)
        assert len(steps) == 4
        assert network.stats().stages[0].updates == 4
    for key, value in network.trunk.state_dict().items():
        assert torch.equal(before[key], value)


# ---------------------------------------------------------------------- refusals, tracing, memory


def test_a_network_without_forward_or_stages() -> None:
    """It says what to write."""

    class Nothing(Network):
        pass

    async def run() -> None:
        async for _ in Nothing().run([1]):
            pass

    with pytest.raises(ConfigurationError, match="has no stages"):
        asyncio.run(run())

    class Silent(Network):
        def __init__(self) -> None:
            self.stage = Stage(lambda x: x, device="inline")

    async def other() -> None:
        async for _ in Silent().run([1]):
            pass

    with pytest.raises(StageError, match="async def forward"):
        asyncio.run(other())


@pytest.mark.parametrize("wrong", [0, -1, 1.5])
def test_max_active_keys_is_a_whole_number(wrong: Any) -> None:
    """From 1."""
    with pytest.raises(ConfigurationError, match="max_active_keys"):
        deep().run([], max_active_keys=wrong)


@pytest.mark.asyncio
async def test_tracing() -> None:
    """Forwards, backwards and what waits are in the trace, and nothing after it ended."""
    network = put(TreeNet(max_batch=4), "simulated")
    async with network:
        with network.tracing() as trace:
            await taught(network, trees(3))
        names = {each.name for each in trace.slices} if hasattr(trace, "slices") else set()
        recorded = len(trace)
        await taught(network, trees(3))
        assert len(trace) == recorded > 0
        assert not names or any("backward" in name for name in names)


@pytest.mark.asyncio
@kinds
async def test_tensors_are_freed(kind: str) -> None:
    """Once an instance has been learned from, nothing holds what its stages returned."""
    held: list[weakref.ref[torch.Tensor]] = []

    async def code(net: Any, x: torch.Tensor) -> torch.Tensor:
        h = await net.stage(x)
        for _ in range(3):
            h = await net.stage(h * 2)
            held.append(weakref.ref(h))
        out: torch.Tensor = h.sum()
        return out

    network = put(Coded(code, stage=Stage(linear(), max_batch=4)), kind)
    async with network:
        await taught(network, [torch.rand(3) for _ in range(10)])
        await network.submit(torch.rand(3))
        check_empty(network)
        gc.collect()
        assert len(held) == 33
        assert not any(ref() is not None for ref in held)


@pytest.mark.asyncio
async def test_steps_are_told_what_happened() -> None:
    """Key, target, loss, latency, calls and delays of each step."""
    network = RnnNet()
    source = [Sample(s.input, s.target, key=f"k{n}") for n, s in enumerate(sequences(3))]
    steps = await taught(network, source, loss=functional.cross_entropy)
    for n, (step, sample) in enumerate(zip(steps, source, strict=True)):
        assert isinstance(step, Step)
        assert (step.index, step.key, step.target) == (n, f"k{n}", sample.target)
        assert step.calls == 2 * len(sample.input) + 1
        assert step.loss == pytest.approx(functional.cross_entropy(step.output, sample.target).item(), abs=1e-5)
        assert step.latency > 0
        assert step.delay is not None
        assert len(step.delay) == 3


@pytest.mark.asyncio
async def test_a_sample_without_target_is_only_predicted() -> None:
    """It comes out without a loss, nothing is learned from it, and its graph is freed."""
    network = RnnNet(max_batch=4)
    source = [Sample(s.input, s.target if n % 2 else None) for n, s in enumerate(sequences(8))]
    async with network:
        steps = await taught(network, source, loss=functional.cross_entropy, min_update_frequency=10**9)
        assert [step.loss is None for step in steps] == [True, False] * 4
        uses = sum(len(s.input) for s in source if s.target is not None)
        assert network.stats().stages[1].gradients == uses
        check_empty(network)

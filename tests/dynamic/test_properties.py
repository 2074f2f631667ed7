"""Whatever network, devices, batches and order of events: gradients are autograd's, and nothing is ever left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aiotime import Pipeline, SimulatedDevice, VirtualClock
from aiotime import Stage as LinearStage
from aiotime.dynamic import Network, Stage
from aiotime.errors import AiotimeError, StageError
from tests.dynamic.nets import SGD, Coded, check_empty, close, double_precision, gathered, linear, taught
from tests.scenarios import for_every_k, play

WIDTH = 3


# ---------------------------------------------------------------------- random networks


class Both(nn.Module):
    """Two inputs, two outputs, one of them in a dict, with a number beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(2 * WIDTH, 2 * WIDTH, seed=7)

    def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> Any:
        both = torch.tanh(self.layer(torch.cat([x, y], -1)))
        return {"one": both[..., :WIDTH], "more": (both[..., WIDTH:], 5)}


class Plus(nn.Module):
    """Passes one gradient on to both of its inputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class Spread(nn.Module):
    """A mean over the row, in every place: its gradient has stride 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1, keepdim=True).expand_as(x)


STAGES: dict[str, Callable[[], nn.Module]] = {
    "bent": lambda: nn.Sequential(linear(WIDTH, WIDTH, seed=1), nn.Tanh()),
    "straight": lambda: linear(WIDTH, WIDTH, seed=2),
    "both": Both,
    "plus": Plus,
    "spread": Spread,
    "writing": lambda: nn.Sequential(nn.ReLU(inplace=True), linear(WIDTH, WIDTH, seed=3)),
}


@dataclass(frozen=True)
class Move:
    """One line of a random forward: a stage, which earlier values it is given, and tensor code around it."""

    stage: str
    first: int
    second: int
    code: int


def mixed(code: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Plain tensor code on two values."""
    return (x, x + y, x * y.sigmoid(), x - 2 * y.roll(1, -1), x.clamp(-0.5, 0.5), torch.stack([x, y]).mean(0))[code % 6]


moves = st.builds(Move, st.sampled_from(sorted(STAGES)), st.integers(0, 50), st.integers(0, 50), st.integers(0, 5))
programs = st.lists(moves, min_size=1, max_size=9)


async def perform(net: Any, sample: tuple[list[Move], torch.Tensor]) -> Any:
    """Every line is a task of its own that waits for the values it needs: a random DAG, as concurrent as it can be."""
    program, x = sample
    values: list[asyncio.Task[torch.Tensor]] = []

    async def given_() -> torch.Tensor:
        return x

    async def line(move: Move, at: int) -> torch.Tensor:
        one, other = await values[move.first % at], await values[move.second % at]
        a, stage = mixed(move.code, one, other), getattr(net, move.stage)
        result: torch.Tensor
        if move.stage == "both":
            found = await stage(a, y=other)
            assert found["more"][1] == 5
            result = found["one"] + found["more"][0] if move.code % 2 else found["one"]
        else:
            result = await (stage(a, other) if move.stage == "plus" else stage(a))
        return result

    values.append(asyncio.create_task(given_()))
    values.extend(asyncio.create_task(line(move, at)) for at, move in enumerate(program, start=1))
    every = await asyncio.gather(*values)
    return sum((at + 1) * (value**2).sum() for at, value in enumerate(every) if at % 2 == len(every) % 2 or at == 0)


def random_network(max_batch: int, device: Callable[[int], Any]) -> Coded:
    return Coded(
        perform,
        **{
            name: Stage(make(), device=device(at), max_batch=max_batch)
            for at, (name, make) in enumerate(sorted(STAGES.items()))
        },
    )


@given(
    samples=st.lists(programs, min_size=1, max_size=5),
    max_batch=st.sampled_from([1, 2, 8]),
    keys=st.integers(1, 5),
    times=st.lists(st.integers(0, 5), min_size=1, max_size=7),
    devices=st.integers(1, 3),
)
@settings(max_examples=40)
def test_random_networks(samples: list[list[Move]], max_batch: int, keys: int, times: list[int], devices: int) -> None:
    """Losses and gathered gradients of a random DAG of calls are those of autograd on the whole of it."""

    async def scenario() -> None:
        clock = VirtualClock()
        asked = 0

        def seconds(work: Any, frame: Any) -> float:
            nonlocal asked
            asked += 1
            return float(times[asked % len(times)])

        shared = [SimulatedDevice(k, seconds=seconds, clock=clock) for k in range(devices)]
        network = random_network(max_batch, lambda at: shared[at % devices])
        reference = random_network(max_batch, lambda at: "inline")
        generator = torch.Generator().manual_seed(0)
        source = [(program, torch.randn(WIDTH, generator=generator)) for program in samples]
        for stage in reference.stages.values():  # in plain PyTorch it would write into what others read
            for module in stage.fn.modules():  # type: ignore[attr-defined]
                if isinstance(module, nn.ReLU):
                    module.inplace = False
        losses, learnable = [], []
        for sample in source:
            loss = await reference.eager(sample)
            if loss.requires_grad:
                loss.backward()
                learnable.append(sample)
                losses.append(loss.item())
        expected = {
            f"{name}.{key}": p.grad
            for name, stage in reference.stages.items()
            for key, p in stage.fn.named_parameters()  # type: ignore[attr-defined]
            if p.grad is not None
        }
        async with network:
            steps = await taught(network, learnable, max_active_keys=keys, min_update_frequency=10**9)
            found = gathered(network)
            check_empty(network)
        assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-9)
        zero = {key: value for key, value in expected.items() if key not in found}
        assert not any(value.any() for value in zero.values())
        close(found, {key: value for key, value in expected.items() if key in found}, atol=1e-8)

    with double_precision():
        play(scenario())


# ---------------------------------------------------------------------- random ends


SLOW = partial(torch.optim.SGD, lr=1e-5)  # what it learns must not look like what makes `Shaky` raise


class Shaky(nn.Module):
    """Raises where a row asks for it: forwards, or backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(seed=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x > 50).any():
            raise ArithmeticError("forward")
        y: torch.Tensor = self.layer(x)
        if (x < -50).any() and y.requires_grad:
            y.register_hook(self.refuse)  # type: ignore[no-untyped-call]
        return y

    def refuse(self, grad: torch.Tensor) -> None:
        raise ArithmeticError("backward")


@given(
    fates=st.lists(
        st.sampled_from(["fine", "long", "raise", "forward", "backward", "detach", "caught", "unawaited", "race"]),
        min_size=1,
        max_size=14,
    ),
    max_batch=st.sampled_from([1, 3, 8]),
    keys=st.integers(1, 8),
    stop=st.integers(0, 30),
    how=st.sampled_from(["end", "break", "close", "cancel", "frames"]),
    learn=st.booleans(),
    times=st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
@settings(max_examples=120)
def test_random_ends(
    fates: list[str], max_batch: int, keys: int, stop: int, how: str, learn: bool, times: list[int]
) -> None:
    """Instances that fail in every way, stopped in every way at any moment: nothing is left, and what follows works."""

    async def code(net: Any, fate: str) -> Any:
        h = await net.one(torch.ones(3))
        if fate == "raise":
            raise LookupError
        if fate == "long":
            for _ in range(4):
                h = await net.two(h) + h
        elif fate in ("forward", "caught"):
            try:
                h = await net.two(h + 100)
            except StageError:
                if fate == "forward":
                    raise
        elif fate == "backward":
            h = await net.two(h - 100)
        elif fate == "detach":
            return (await net.two(h)).detach().sum()
        elif fate == "unawaited":
            net.two(h)
        elif fate == "race":
            tasks = [asyncio.ensure_future(net.two(h)), asyncio.ensure_future(net.one(h))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        return (await net.two(h)).sum()

    async def scenario() -> None:
        clock = VirtualClock()
        asked = 0

        def seconds(work: Any, frame: Any) -> float:
            nonlocal asked
            asked += 1
            return float(times[asked % len(times)])

        network = Coded(
            code,
            one=Stage(linear(seed=1), device=SimulatedDevice(0, seconds=seconds, clock=clock), max_batch=max_batch),
            two=Stage(Shaky(), device=SimulatedDevice(1, seconds=seconds, clock=clock), max_batch=max_batch),
        )

        async def consume() -> None:
            options: dict[str, Any] = {"max_active_keys": keys, "on_error": "skip"}
            if learn:
                run = network.learn(iter(fates), optimizer=SLOW, min_update_frequency=2, unused="ignore", **options)
            else:
                run = network.run(iter(fates), **options)
            async with run:
                async for step in run:
                    if how == "break" and step.index >= stop // 3:
                        break

        async with network:
            task = asyncio.create_task(consume())
            for _ in range(stop * 6):
                await asyncio.sleep(0)
            floor = network._house()._floor
            if how == "close":
                await network.aclose()
            elif how == "cancel":
                task.cancel()
            elif how == "frames" and floor is not None:
                for entry in list(floor.entries)[::2]:
                    entry.cancelled = True
            await asyncio.wait([task])
            if not task.cancelled() and (error := task.exception()) is not None:
                assert isinstance(error, AiotimeError)
                assert how == "close"
            if how != "close":
                while network._house()._floor is not None and floor and (floor.jobs or floor.entries):  # noqa: ASYNC110
                    await asyncio.sleep(0)
                check_empty(network)
        async with network:
            assert len(await taught(network, ["fine"] * 3, optimizer=SLOW)) == 3
            await network.submit("long")
            check_empty(network)

    play(scenario())


# ---------------------------------------------------------------------- cancelled at every await

both = pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
kinds = pytest.mark.parametrize("kind", ["simulated", "cpu", "inline"])


def small(kind: str, **more: Any) -> Coded:
    async def code(net: Any, x: torch.Tensor) -> Any:
        h = await net.one(x)
        a, b = await asyncio.gather(net.two(h), net.two(h * 2))
        return (a + b).sum()

    clock = VirtualClock()
    devices: list[Any] = (
        [SimulatedDevice(k, seconds=1.0 + k, clock=clock) for k in range(2)]
        if kind == "simulated"
        else ["cpu:0", "cpu:1"]
        if kind == "cpu"
        else ["inline"] * 2
    )
    return Coded(
        code,
        one=Stage(linear(seed=1), device=devices[0], max_batch=2),
        two=Stage(linear(seed=2), device=devices[1], max_batch=2),
        **more,
    )


async def still(network: Network) -> None:
    """Until what a cancellation left to the background has ended."""
    while True:
        floor = network._house()._floor
        closing = [task for task in asyncio.all_tasks() if task.get_name().startswith("close:")]
        if not closing and (floor is None or not (floor.entries or floor.jobs or floor.runs)):
            return
        await asyncio.sleep(0)


@pytest.mark.asyncio
@both
@kinds
async def test_cancelled_learning(kind: str, late: bool) -> None:
    """A consumer of learn(), cancelled anywhere between opening and leaving: all credits and graphs are given back."""
    network = small(kind)
    async with network:

        async def scenario() -> None:
            run = network.learn(
                (torch.rand(3) for _ in range(4)),
                optimizer=SGD,
                max_active_keys=3,
                min_update_frequency=1,
                update_per="instance",
            )
            async with run:
                async for _ in run:
                    pass

        assert await for_every_k(scenario, late=late) > 3
        await asyncio.wait_for(still(network), 20)
        check_empty(network)
        assert len(await taught(network, [torch.rand(3)] * 2)) == 2


@pytest.mark.asyncio
@both
@kinds
async def test_cancelled_requests(kind: str, late: bool) -> None:
    """submit() cancelled at any await leaves nothing, and its batch mates are answered."""
    network = small(kind)
    async with network:
        mates: list[asyncio.Task[Any]] = []

        async def scenario() -> None:
            mates.append(asyncio.create_task(network.submit(torch.rand(3))))
            await network.submit(torch.rand(3))

        assert await for_every_k(scenario, late=late) >= 2
        assert all(step.output.isfinite() for step in await asyncio.gather(*mates))
        await asyncio.wait_for(still(network), 20)
        check_empty(network)


@pytest.mark.asyncio
@both
@kinds
async def test_cancelled_opening_and_closing(kind: str, late: bool) -> None:
    """`async with network` cancelled at any await leaves no task and no thread, and it opens again."""
    network = small(kind)

    async def scenario() -> None:
        async with network:
            await network.submit(torch.rand(3))
            await taught(network, [torch.rand(3)])

    assert await for_every_k(scenario, late=late) > 3
    async with network:
        await network.submit(torch.rand(3))
    await asyncio.wait_for(still(network), 20)
    assert network._house()._floor is None


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.may_block  # a pipeline looks at its modules when it is made
@both
async def test_cancelled_with_a_pipeline(late: bool) -> None:
    """A pipeline among the attributes is closed with the network, wherever that is cancelled."""
    network = small("inline", trunk=Pipeline.from_stages([LinearStage(linear(), name="trunk")]))

    async def scenario() -> None:
        async with network:
            await network.submit(torch.rand(3))

    assert await for_every_k(scenario, late=late) > 3
    await asyncio.wait_for(still(network), 20)
    assert network.trunk._engine is None  # type: ignore[attr-defined]


@pytest.mark.asyncio
@both
async def test_cancelled_drain_and_load(late: bool) -> None:
    """drain() and load_state_dict() cancelled at any await: answers are given, weights are whole."""
    network, version = small("simulated"), 0

    async def scenario() -> None:
        nonlocal version
        version += 1
        async with network:
            requests = [asyncio.create_task(network.submit(torch.zeros(3))) for _ in range(4)]
            try:
                state = {key: torch.full_like(t, float(version)) for key, t in network.state_dict().items()}
                await network.load_state_dict(state)
                await network.drain()
            finally:
                await asyncio.shield(asyncio.ensure_future(network.drain()))
                await asyncio.gather(*requests, return_exceptions=True)
                for value in network.state_dict().values():
                    assert version == 1 or len(set(value.flatten().tolist())) == 1
                check_empty(network)

    assert await for_every_k(scenario, late=late) > 2
    await asyncio.wait_for(still(network), 20)


def endless() -> Iterator[torch.Tensor]:
    while True:
        yield torch.rand(3)


@pytest.mark.asyncio
@kinds
async def test_closing_while_gradients_are_on_their_way(kind: str) -> None:
    """aclose() at any moment of a lesson: the way back is walked to its end, then everything stops."""
    for turns in range(1, 120, 7):
        network = small(kind)
        await network.__aenter__()
        task = asyncio.create_task(
            taught(network, endless(), max_active_keys=5, min_update_frequency=2, update_per="instance")
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        floor = network._house()._floor
        assert floor is not None
        await network.aclose()
        await asyncio.wait([task])
        assert isinstance(task.exception(), AiotimeError)
        assert not floor.entries
        assert not floor.jobs
        assert not any(station.kept or len(station.inbox) for station in floor.stations)

"""Learning on a pretended accelerator: gradients between devices and the host, and who keeps which memory until when.

Stages are y = w x with w on the device; the hands below do by multiplication what autograd does, so that streams that
run late and in any order, and memory that is handed out again at once, show every wait and every hold that is missing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from aiotime.devices.base import Completions, Device, Pending
from aiotime.devices.cpu import CpuDevice
from aiotime.devices.cuda import AcceleratorDevice
from aiotime.devices.lane import AHEAD
from aiotime.devices.poller import Poller
from aiotime.devices.pretend import PretendArray, PretendBackend
from aiotime.frame import NOBODY, Frame
from aiotime.learning.desk import Agenda, Desk
from aiotime.learning.order import Order, event, lockstep, one_forward_one_backward
from aiotime.learning.ticket import Ticket

Settle = Callable[..., Awaitable[None]]
RATE = 0.125  # so that sums of few bits are exact

one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


class Hands:
    """y = w x, loss = y + c; the backward of the loss by hand, with the weights of the forward.

    Args:
        own: keep a copy of what came in, as `aiotime.learning.boundary.Boundary` does on an accelerator.
    """

    learns = True
    unformed = False
    learned = 0

    def __init__(self, stage: int, top: bool, backend: PretendBackend | None, index: int, *, own: bool = True) -> None:
        self.stage, self.top, self.backend, self.index, self.own = stage, top, backend, index, own
        self.w: Any = None
        self.kept: dict[Ticket, tuple[Any, Any]] = {}
        self.batches: list[int] = []

    def weights(self) -> Any:
        if self.w is None:  # with the first job: on the stream of the jobs
            w = torch.full((2,), 1.0 + self.stage)
            self.w = w if self.backend is None else self.backend.send(w, self.index)
        return self.w

    def predict(self, value: Any) -> Any:
        y = value * self.weights()
        return (y, None) if self.top else y

    def forward(self, ticket: Ticket, value: Any) -> Any:
        w = self.weights()
        kept = value * 1.0 if self.own else value
        self.kept[ticket] = kept, w
        y = kept * w
        return (y, y + 1.0) if self.top else y

    def backward(self, ticket: Ticket, message: Any) -> Any:
        x, w = self.kept.pop(ticket)
        grad = x * 0.0 + 1.0 if self.top else message[0]
        self.w = self.weights() + (grad * x) * -RATE
        down = grad * w
        return [down, None]

    def drop(self, ticket: Ticket) -> None:
        self.kept.pop(ticket, None)

    def batch_end(self, frames: int) -> None:
        self.batches.append(frames)

    def relay(self, ticket: Ticket, loss: int, message: Any) -> Any: ...

    def finish(self, ticket: Ticket) -> None: ...

    def flush(self) -> None: ...

    def pending_updates(self) -> int:
        return 0

    def adopt(self) -> None: ...

    def reset(self) -> None: ...


class Bench:
    """Desks on device streams, driven as the engine drives them."""

    def __init__(self, places: list[Device], order: Callable[[int, int], Order], *, own: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        self.completions = Completions(self.loop, self.completed)
        self.streams = [place.open(self.completions) for place in places]
        self.failures: list[BaseException] = []
        self.frames: list[Frame] = []
        self.desks: list[Desk] = []
        self.hands: list[Hands] = []
        stages = len(places)
        for k, (place, stream) in enumerate(zip(places, self.streams, strict=True)):
            backend = place._backend if isinstance(place, AcceleratorDevice) else None
            index = place.index if isinstance(place, AcceleratorDevice) else -1
            self.hands.append(Hands(k, k + 1 == stages, backend, index, own=own))  # type: ignore[arg-type]
            desk = Desk(
                self.hands[k],
                order(k, stages),
                stage=f"s{k}",
                index=k,
                stages=stages,
                agenda=Agenda(),
                host_below=k > 0 and places[k - 1].on_host,
                failed=lambda ticket, error: self.failures.append(error),
            )
            desk.works[0].host_output = k + 1 == stages or places[k + 1].on_host
            for work in desk.works:
                stream.bind(work)
            self.desks.append(desk)

    def launch(self, value: Any, *, learn: bool = True, action: Callable[[int], None] | None = None) -> Any:
        frame = Frame(NOBODY, len(self.frames), Pending(value, done=True), 0.0)
        if action is None:
            frame.ticket = Ticket(len(self.frames), len(self.desks), learn=learn)
            self.frames.append(frame)
        frame.input = outcome = self.loop.create_future()
        for k, (desk, stream) in enumerate(zip(self.desks, self.streams, strict=True)):
            act = None if action is None else lambda k=k: action(k)
            frame.tail = desk.launch(stream, frame, act, last=k + 1 == len(self.desks))
        for stream in self.streams:
            stream.ring()
        return outcome

    def completed(self, pending: Pending) -> None:
        frame = pending.frame
        if frame is None:
            return

        def passed(error: BaseException | None) -> None:
            if error is not None:
                frame.input.set_exception(error)
            else:
                frame.input.set_result(pending.value)

        if pending.event is None or pending.error is not None:
            passed(pending.error)
        else:
            Poller.of(self.loop).watch(pending.event, passed)

    async def close(self) -> None:
        for stream in self.streams:
            stream.close()
        for stream in self.streams:
            await stream.join()


def reference(xs: list[float], delays: list[int]) -> tuple[list[float], list[float]]:
    """Outputs and final weights of the same stages with queues of length D_k between gradient and update."""
    stages = len(delays)
    w = [1.0 + k for k in range(stages)]
    queues: list[list[float]] = [[] for _ in delays]
    outputs = []
    for x in xs:
        for k, queue in enumerate(queues):
            while len(queue) > delays[k]:
                w[k] -= RATE * queue.pop(0)
        used = list(w)
        entries = [x]
        for k in range(stages):
            entries.append(entries[-1] * used[k])
        outputs.append(entries[-1])
        grad = 1.0
        for k in reversed(range(stages)):
            queues[k].append(grad * entries[k])
            grad *= used[k]
    return outputs, [w[k] - RATE * sum(queue) for k, queue in enumerate(queues)]


def devices(layout: str, *, seed: int = 0, steps_per_query: int = 2) -> tuple[PretendBackend, list[Device]]:
    """For "0c1": a stage on the first pretended device, one on the host, one on the second device."""
    backend = PretendBackend(2, choose=random.Random(seed).randrange, steps_per_query=steps_per_query)
    cpus = iter(range(9))
    made: list[Device] = [
        CpuDevice(next(cpus)) if at == "c" else AcceleratorDevice("pretend", int(at), backend=backend) for at in layout
    ]
    return backend, made


def floats(value: Any) -> list[float]:
    """What a weight holds, on the host."""
    if isinstance(value, PretendArray):
        value = value.reader()()
    return [float(x) for x in value]


# powers of two, small enough that no float rounds
INPUTS = [[1.0, 0.5, 0.25, -0.5, 0.0, -1.0, 0.5][i % 7] for i in range(16)]


@one_loop
@pytest.mark.parametrize("layout", ["0", "01", "000", "0101", "c0", "0c1"])
@pytest.mark.parametrize(("order", "factor"), [(one_forward_one_backward, 1), (lockstep, 2)], ids=["1f1b", "lockstep"])
async def test_gradients_find_their_way(layout: str, order: Any, factor: int) -> None:
    """From device to device, down to the host and up from it: outputs and weights are those without devices.

    Whatever order the streams run in; no memory is read before it is written or after it has another owner.
    """
    stages = len(layout)
    expected, weights = reference(INPUTS, [factor * (stages - 1 - k) for k in range(stages)])
    for seed in range(2):
        backend, places = devices(layout, seed=seed)
        bench = Bench(places, order)
        async with asyncio.timeout(30):
            answers = await asyncio.gather(*[bench.launch(torch.full((2,), x)) for x in INPUTS])
            await bench.launch(None, action=lambda k: None)
            await bench.close()
        assert [floats(output) for output, _ in answers] == [pytest.approx([y] * 2, rel=1e-4) for y in expected]
        assert [floats(loss) for _, loss in answers] == [pytest.approx([y + 1] * 2, rel=1e-4) for y in expected]
        backend.finish()
        assert [floats(hands.w) for hands in bench.hands] == [pytest.approx([w] * 2, rel=1e-4) for w in weights]
        assert not any(hands.kept for hands in bench.hands)
        assert backend.violations == []
        assert bench.failures == []


@one_loop
@pytest.mark.parametrize("layout", ["00", "01", "0c1"])
async def test_event_order_learns_from_everything(layout: str) -> None:
    """Gradients count as there once they are launched; the devices see to the rest."""
    for seed in range(3):
        backend, places = devices(layout, seed=seed)
        bench = Bench(places, event)
        async with asyncio.timeout(30):
            await asyncio.gather(*[bench.launch(torch.full((2,), x), learn=i % 3 != 1) for i, x in enumerate(INPUTS)])
            await bench.launch(None, action=lambda k: None)
            await bench.close()
        for k in range(len(layout)):
            assert all(frame.ticket.delays[k] <= len(layout) - k for frame in bench.frames)
        assert not any(hands.kept for hands in bench.hands)
        assert backend.violations == []


@one_loop
async def test_what_a_graph_keeps_must_be_its_own() -> None:
    """The hazard that `Boundary(own=True)` is for: without the copy memory of another stream is reused too early.

    What came in was allocated on the copy-in stream. Once the backward is launched the graph lets go of it, the next
    frame's copy takes its place at once, and the backward may not have run yet.
    """
    seen = {True: 0, False: 0}
    for own in (True, False):
        for seed in range(6):
            backend, places = devices("01", seed=seed, steps_per_query=1)
            bench = Bench(places, one_forward_one_backward, own=own)
            async with asyncio.timeout(30):
                await asyncio.gather(*[bench.launch(torch.full((2,), x)) for x in INPUTS], return_exceptions=True)
                await bench.launch(None, action=lambda k: None)
                await bench.close()
            seen[own] += len(backend.violations)
    assert seen[True] == 0
    assert seen[False] > 0


@one_loop
async def test_a_barrier_acts_on_a_device_that_stands_still() -> None:
    """Weights are replaced while nothing reads them, on the stream that the next job uses."""
    backend, places = devices("01", seed=5)
    bench = Bench(places, one_forward_one_backward)
    seen: list[tuple[int, bool, bool]] = []

    def action(k: int) -> None:
        hands = bench.hands[k]
        idle = not any(stream.queue for stream in backend.streams if stream.index == hands.index)
        default = backend.current(hands.index) is backend._defaults[hands.index]
        seen.append((k, idle, default))
        hands.w = backend.send(torch.full((2,), 0.5), hands.index)

    async with asyncio.timeout(30):
        before = [bench.launch(torch.ones(2)) for _ in range(5)]
        await bench.launch(None, action=action)
        output, _ = await bench.launch(torch.ones(2), learn=False)
        await asyncio.gather(*before)
        await bench.close()
    assert sorted(seen) == [(0, True, False), (1, True, False)]
    assert floats(output) == [0.25, 0.25]
    assert backend.violations == []


@one_loop
async def test_a_mini_batch_cut_short_ends_on_the_stream_of_the_jobs() -> None:
    """The update at a barrier is work of the device like any other."""
    backend, places = devices("0")
    bench = Bench(places, lambda k, stages: Order(3, strict=True, batch=4))
    streams: list[Any] = []
    bench.hands[0].batch_end = lambda frames: streams.append((frames, backend.current(0)))  # type: ignore[method-assign]
    async with asyncio.timeout(30):
        await asyncio.gather(*[bench.launch(torch.ones(2)) for _ in range(6)])
        await bench.launch(None, action=lambda k: None)
        await bench.close()
    assert [frames for frames, _ in streams] == [4, 2]
    assert streams[0][1] is streams[1][1] is not backend._defaults[0]


@one_loop
async def test_a_lost_device_holds_nobody_up(settle: Settle) -> None:
    """Every frame and every gradient that was under way is settled with an error, and the streams end."""
    backend, places = devices("01")
    bench = Bench(places, one_forward_one_backward)
    async with asyncio.timeout(30):
        await bench.launch(torch.ones(2))
        backend.dead = True
        outcomes = await asyncio.gather(*[bench.launch(torch.ones(2)) for _ in range(6)], return_exceptions=True)
        assert all(isinstance(outcome, BaseException) for outcome in outcomes)
        for desk in bench.desks:
            desk.abort(ValueError("the end"))
        await bench.close()
    assert all(frame.ticket.grads[0].done for frame in bench.frames)
    for hands in bench.hands:
        hands.kept.clear()


@one_loop
async def test_weights_made_before_the_first_job_are_waited_for() -> None:
    """The first job of a launcher finds whatever was queued on other streams before: copies of weights, states."""
    backend = PretendBackend(1, choose=lambda count: count - 1)  # the default stream, made first, runs last
    bench = Bench([AcceleratorDevice("pretend", 0, backend=backend)], event)
    bench.hands[0].w = backend.send(torch.full((2,), 3.0), 0)  # on the default stream, as a pipeline is built
    async with asyncio.timeout(30):
        first = bench.launch(torch.ones(2))
        await asyncio.sleep(0)
        output, _ = await first
        await bench.launch(None, action=lambda k: None)
        await bench.close()
    assert floats(output) == [3.0, 3.0]
    assert backend.violations == []


@one_loop
async def test_what_comes_next_is_decided_as_late_as_it_can_be(settle: Settle) -> None:
    """Not before the device has room for it: the choice is made with the gradients that have come by then."""
    backend, places = devices("0")
    bench = Bench(places, event)
    there = [backend.send(torch.ones(2), 0) for _ in range(AHEAD + 3)]  # no staging slots: they are bounded as well
    await bench.launch(torch.ones(2), learn=False)
    backend.hold()
    answers = [bench.launch(value, learn=False) for value in there]
    desk = bench.desks[0]
    await settle(until=lambda: len(desk._forward) == 3)
    await settle(500)
    assert len(desk._forward) == 3
    backend.go()
    async with asyncio.timeout(30):
        await asyncio.gather(*answers)
        await bench.close()

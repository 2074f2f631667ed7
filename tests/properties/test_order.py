"""Whatever the completion order: order out = order in, each frame ends once and is acknowledged once, bounds hold.

Hypothesis chooses how long each frame takes on each simulated stage, and so the order in which they complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aiotime import Pipeline, Sample, SimulatedDevice, Stage, VirtualClock
from aiotime.devices.base import Work
from aiotime.engine import Engine
from aiotime.errors import DeadlineExceeded, FrameCancelled, FrameShed, StageError
from aiotime.frame import Frame
from aiotime.runs import Run

if TYPE_CHECKING:
    from tests.properties.conftest import Play


@dataclass
class Schedule:
    """How long frames take, on which stages they fail, and how wide the pipeline is."""

    seconds: list[list[int]]  # per stage, cycled over the frames
    workers: list[int]
    depth: int
    budget: int | None
    failing: set[int] = field(default_factory=set)  # payloads that the middle stage refuses

    def pipeline(self) -> tuple[Pipeline, VirtualClock]:
        clock = VirtualClock()

        def device(k: int) -> SimulatedDevice:
            def seconds(work: Work, frame: Frame) -> float:
                table = self.seconds[k]
                return float(table[frame.index % len(table)])

            return SimulatedDevice(k, seconds=seconds, clock=clock)

        limit = self.budget or self.depth * sum(self.workers)

        def checked(k: int) -> Any:
            def fn(x: int) -> int:
                engine = made._engine
                if engine is not None:
                    assert len(engine.frames) == engine.door.used <= limit
                if k == 1 and x in self.failing:
                    raise ValueError(f"boom {x}")
                return x

            return fn

        stages = [
            Stage(checked(k), device=device(k), workers=workers, name=f"s{k}") for k, workers in enumerate(self.workers)
        ]
        made = Pipeline.from_stages(stages, depth=self.depth, budget=self.budget)
        return made, clock


schedules = st.builds(
    Schedule,
    seconds=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=3, max_size=3),
    workers=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    depth=st.integers(1, 3),
    budget=st.none() | st.integers(1, 8),
    failing=st.sets(st.integers(0, 19), max_size=4),
)


class Tape:
    """Frames 0…n-1 with an acknowledgement each."""

    def __init__(self, n: int) -> None:
        self.acks: list[list[BaseException | None]] = [[] for _ in range(n)]

    async def __aiter__(self) -> AsyncIterator[Sample]:
        for i, acks in enumerate(self.acks):
            yield Sample(i, key=i, ack=acks.append)

    def outcome(self, i: int) -> BaseException | None:
        """What frame ``i`` ended with: exactly one thing."""
        [ack] = self.acks[i]
        return ack


def counts_add_up(run: Run) -> bool:
    stats = run.stats()
    return stats.frames_in == stats.frames_out + stats.frames_shed + stats.frames_failed


@settings(max_examples=60)
@given(schedule=schedules)
def test_one_run(play: Play, schedule: Schedule) -> None:
    """All frames that do not fail come out in order with their keys; each ends exactly once."""
    pipeline, _ = schedule.pipeline()

    async def scenario() -> None:
        tape = Tape(20)
        run = pipeline.run(tape, on_error="skip")
        preds = [pred async for pred in run]
        good = [i for i in range(20) if i not in schedule.failing]
        assert [p.index for p in preds] == [p.output for p in preds] == [p.key for p in preds] == good
        assert sum(p.dropped_before for p in preds) + len(preds) == (good[-1] + 1 if good else 0)
        for i in range(20):
            assert isinstance(tape.outcome(i), StageError) == (i in schedule.failing)
        assert counts_add_up(run)

    play(scenario())


@settings(max_examples=40)
@given(schedule=schedules, sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4), requests=st.integers(0, 10))
def test_several_runs_and_requests(play: Play, schedule: Schedule, sizes: list[int], requests: int) -> None:
    """Runs and requests share the stages; each run has its own order, each request its own answer."""
    pipeline, _ = schedule.pipeline()
    schedule.failing = set()

    async def consume(size: int) -> None:
        run = pipeline.run(Tape(size))
        assert [pred.key async for pred in run] == list(range(size))
        assert counts_add_up(run)

    async def request(i: int) -> None:
        assert (await pipeline.submit(100 + i)).output == 100 + i

    async def scenario() -> None:
        async with pipeline:
            await asyncio.gather(*(consume(size) for size in sizes), *(request(i) for i in range(requests)))
            stats = pipeline.stats()
            assert stats.frames_in == stats.frames_out == sum(sizes) + requests
            assert (stats.in_flight, stats.waiting) == (0, 0)

    play(scenario())


@settings(max_examples=60)
@given(
    schedule=schedules,
    overflow=st.sampled_from(["wait", "drop_oldest", "drop_newest", "latest"]),
    window=st.none() | st.integers(1, 6),
    deadline=st.none() | st.floats(0.5, 10.0),
)
def test_shedding(play: Play, schedule: Schedule, overflow: Any, window: int | None, deadline: float | None) -> None:
    """With any policy and deadline what comes out is in order; every frame is emitted, failed or shed, once."""
    pipeline, _ = schedule.pipeline()

    async def scenario() -> None:
        tape = Tape(20)
        run = pipeline.run(tape, overflow=overflow, window=window, deadline=deadline, on_error="skip")
        preds = [pred async for pred in run]
        came = [p.index for p in preds]
        assert came == sorted(set(came))
        assert [p.key for p in preds] == came
        assert [p.dropped_before for p in preds] == [b - a - 1 for a, b in zip([-1, *came], came, strict=False)]
        stats = run.stats()
        assert (stats.frames_in, stats.frames_out) == (20, len(came))
        assert counts_add_up(run)
        outcomes = [tape.outcome(i) for i in range(20)]
        assert [i for i, outcome in enumerate(outcomes) if outcome is None] == came
        assert sum(isinstance(outcome, FrameShed) for outcome in outcomes) == stats.frames_shed
        assert sum(isinstance(outcome, StageError) for outcome in outcomes) == stats.frames_failed
        if overflow == "wait":
            assert not any(type(outcome) is FrameShed for outcome in outcomes)
        if overflow == "latest" and deadline is None and 19 not in schedule.failing:
            assert came[-1] == 19  # the last frame is always delivered
        if deadline is None:
            assert not any(isinstance(outcome, DeadlineExceeded) for outcome in outcomes)

    play(scenario())


@settings(max_examples=40)
@given(schedule=schedules, after=st.integers(0, 19), how=st.sampled_from(["aclose", "stop", "pipeline"]))
def test_leaving_early(play: Play, schedule: Schedule, after: int, how: str) -> None:
    """Left after any number of predictions, in any way: nothing is in flight, every frame has ended once."""
    pipeline, _ = schedule.pipeline()
    schedule.failing = set()

    async def scenario() -> None:
        tape = Tape(20)
        async with pipeline:
            run = pipeline.run(tape)
            async with run:
                got = [(await anext(run)).index for _ in range(after)]
                if how == "stop":
                    await run.stop()
                    got += [pred.index async for pred in run]
                    assert len(got) == run.stats().frames_in
                elif how == "pipeline":
                    await pipeline.aclose()
            assert got == list(range(len(got)))
            assert counts_add_up(run)
            engine = run._state.engine
            assert isinstance(engine, Engine)
            assert (engine.door.used, engine.frames, engine.runs, engine.door.full) == (0, set(), set(), False)
        taken = run.stats().frames_in
        outcomes = [tape.outcome(i) for i in range(taken)]
        assert [i for i, outcome in enumerate(outcomes) if outcome is None] == got
        assert not any(tape.acks[taken:])
        if how == "aclose":
            assert all(isinstance(outcome, FrameCancelled) for outcome in outcomes[len(got) :])

    play(scenario())

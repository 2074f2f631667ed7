"""Lane, marks, staging: on a pretended accelerator whose streams run as late as they can and in any order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiotime.devices.accelerator import Accelerator
from aiotime.devices.base import Events, Pending
from aiotime.devices.lane import AHEAD, Lane
from aiotime.devices.marks import Mark
from aiotime.devices.pretend import POISON, PretendArray, PretendBackend
from aiotime.devices.staging import SLOTS, Ring, leaves, map_leaves
from aiotime.errors import BrokenError

# ---------------------------------------------------------------------- helpers


def launch(lane: Lane, fn: Callable[[Any], Any], up: Pending, *, host_output: bool = True) -> Pending:
    """What a worker does with one job."""
    mine = Pending()
    lane.run(fn, up, mine, host_output=host_output)
    up.value = None
    mine.done = True
    return mine


def ready(value: Any) -> Pending:
    """A frame's payload at the door."""
    return Pending(value, done=True)


def read(pending: Pending) -> Any:
    """What a reader on the host sees."""
    assert pending.event is not None
    pending.event.synchronize()
    return pending.value


def lane_on(backend: PretendBackend, index: int = 0, **options: Any) -> Lane:
    """A launcher's lane, driven by the test's thread."""
    return Lane(Accelerator.of(backend, index), **options)


def double(x: Any) -> Any:
    """Work for a host and for a device."""
    return x * 2 + 1


# ---------------------------------------------------------------------- any interleaving


class Plan(NamedTuple):
    """One drawn scenario."""

    stages: list[int]  # the device of each, or -1 for a stage on the host
    kinds: list[str]  # what each does
    frames: list[int]  # the rows of each frame's payload
    failures: set[tuple[int, int]]  # (stage, frame) where user code raises halfway
    seed: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Stages on two devices and the host, payload sizes, failures, and an order of events."""
    stages = draw(st.lists(st.sampled_from([0, 0, 1, -1]), min_size=1, max_size=4).filter(lambda s: max(s) >= 0))
    kinds = [draw(st.sampled_from(["chain", "same", "split"])) for _ in stages]
    frames = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3 * SLOTS))
    spot = st.tuples(st.integers(0, len(stages) - 1), st.integers(0, len(frames) - 1))
    return Plan(stages, kinds, frames, draw(st.sets(spot, max_size=3)), draw(st.integers(0, 2**32)))


def function(kind: str, scale: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A stage on ``{"a": array, "b": (array, text)}`` that allocates, frees, passes through."""

    def fn(value: dict[str, Any]) -> dict[str, Any]:
        a, (b, text) = value["a"], value["b"]
        if kind == "same":
            return value
        if kind == "split":
            return {"a": b * scale, "b": (a, text)}
        return {"a": (a * scale + 1) * 3 + a, "b": (b + a * 1 + 2, text)}

    return fn


class Failing(Exception):
    pass


class Interleaving:
    """Frames through stages, one host action or one device step at a time, in an order that a seed chooses."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = random.Random(plan.seed)
        self.backend = PretendBackend(2, choose=self.rng.randrange)
        self.lanes = [lane_on(self.backend, index) if index >= 0 else None for index in plan.stages]
        self.fns = [function(kind, 2 + k) for k, kind in enumerate(plan.kinds)]
        self.tails = [ready(self.payload(frame)) for frame in range(len(plan.frames))]
        self.next = [0] * len(plan.stages)  # per stage: the frame it takes next
        self.answers: dict[int, Any] = {}
        self.unread: deque[int] = deque()

    def payload(self, frame: int) -> dict[str, Any]:
        rows = self.plan.frames[frame]
        return {"a": torch.full((rows, 2), frame + 1.0), "b": (torch.arange(2.0) + frame, f"frame {frame}")}

    def expected(self, frame: int) -> Any:
        value = self.payload(frame)
        for fn in self.fns:
            value = fn(value)
        return value

    def run(self) -> None:
        stages, frames = len(self.plan.stages), len(self.plan.frames)
        while len(self.answers) < frames:
            able = [k for k in range(stages) if self.next[k] < (frames if k == 0 else self.next[k - 1])]
            action = self.rng.choice(["launch", "launch", "step", "step", "step", "read"])
            if action == "launch" and able:
                self.launch(self.rng.choice(able))
            elif action == "step":
                for _ in range(self.rng.randrange(6)):
                    self.backend.step()
            elif self.unread:
                self.read(self.unread[0], wait=not able)
        for lane in self.lanes:
            if lane is not None:
                lane.close()

    def launch(self, k: int) -> None:
        frame = self.next[k]
        self.next[k] += 1
        up, lane = self.tails[frame], self.lanes[k]
        self.tails[frame] = mine = Pending(done=True)
        if up.error is not None:
            mine.error = up.error
        else:
            try:
                if lane is None:
                    self.on_host(k, frame, up, mine)
                else:
                    lane.run(lambda value: self.call(k, frame, value), up, mine, host_output=self.read_on_host(k))
            except Failing as error:
                mine.error = error.with_traceback(None)
        up.value = None
        if k == len(self.plan.stages) - 1:
            self.unread.append(frame)

    def on_host(self, k: int, frame: int, up: Pending, mine: Pending) -> None:
        if up.event is not None:
            up.event.synchronize()
        mine.value = self.call(k, frame, up.value)

    def call(self, k: int, frame: int, value: Any) -> Any:
        value = self.fns[k](value)
        if (k, frame) in self.plan.failures:
            raise Failing
        return value

    def read_on_host(self, k: int) -> bool:
        return k == len(self.plan.stages) - 1 or self.plan.stages[k + 1] < 0

    def read(self, frame: int, *, wait: bool) -> None:
        tail = self.tails[frame]
        if tail.error is None and tail.event is not None and not tail.event.query():
            if not wait:
                return
            tail.event.synchronize()
        self.answers[frame] = tail.error or map_leaves(lambda x: x.clone() if hasattr(x, "clone") else x, tail.value)
        self.tails[frame] = Pending()
        self.unread.popleft()


@given(plans())
def test_every_interleaving_gives_the_models_own_answers(plan: Plan) -> None:
    """Whatever order streams run in, no memory is reused or read too early, and every frame comes out right."""
    case = Interleaving(plan)
    case.run()
    assert case.backend.violations == []
    failed = {frame for _, frame in plan.failures}
    for frame in range(len(plan.frames)):
        answer = case.answers[frame]
        if frame in failed:
            assert isinstance(answer, Failing)
            continue
        expected = case.expected(frame)
        assert torch.equal(answer["a"], expected["a"])
        assert torch.equal(answer["b"][0], expected["b"][0])
        assert answer["b"][1] == f"frame {frame}"


@given(plans())
def test_closed_lanes_have_given_everything_back(plan: Plan) -> None:
    """After the end no stream has work, and every event of a live pool is in it once."""
    case = Interleaving(plan)
    case.run()
    case.tails.clear()
    assert not any(stream.queue for stream in case.backend.streams)
    for accelerator in case.backend.accelerators.values():
        assert len(set(map(id, accelerator._events))) == len(accelerator._events)
        assert all(event.query() for event in accelerator._events)


# ---------------------------------------------------------------------- one lane


def test_launching_waits_for_nothing() -> None:
    """A job returns with its event not passed and its value not there."""
    backend = PretendBackend()
    lane = lane_on(backend)
    mine = launch(lane, double, ready(torch.ones(2)))
    assert mine.event is not None
    assert not mine.event.query()
    assert mine.value.tolist() == [POISON, POISON]
    assert read(mine).tolist() == [3, 3]
    lane.close()


def test_a_value_stays_on_the_device_for_a_device_stage() -> None:
    """Without host_output the value is the device's array, and the next lane waits on the device alone."""
    backend = PretendBackend()
    one, two = lane_on(backend), lane_on(backend)
    middle = launch(one, double, ready(torch.ones(2)), host_output=False)
    assert isinstance(middle.value, PretendArray)
    last = launch(two, double, middle)
    assert middle.event is not None
    assert not middle.event.query()
    assert read(last).tolist() == [7, 7]
    one.close()
    two.close()


def test_a_chain_of_marks_is_freed_by_its_last() -> None:
    """Seeing a frame's last mark passed drops what every stage before it held."""
    backend = PretendBackend()
    one, two = lane_on(backend), lane_on(backend)
    middle = launch(one, double, ready(torch.ones(2)), host_output=False)
    first_mark = middle.event
    last = launch(two, double, middle)
    assert isinstance(first_mark, Mark)
    assert isinstance(last.event, Mark)
    assert first_mark.held
    read(last)
    assert not first_mark.held
    assert first_mark.passed
    assert last.event.before is None
    one.close()
    two.close()


def test_launches_ahead_of_the_device_are_bounded() -> None:
    """The lane sleeps for the oldest launch when the device is ``ahead`` behind."""
    backend = PretendBackend()
    lane = lane_on(backend)
    events = [launch(lane, double, ready(torch.ones(2))).event for _ in range(AHEAD)]
    known = [[isinstance(e, Mark) and e.passed for e in events]]
    launch(lane, double, ready(torch.ones(2)))
    known.append([isinstance(e, Mark) and e.passed for e in events])
    assert known == [[False] * AHEAD, [True] + [False] * (AHEAD - 1)]
    lane.close()


def test_a_lane_says_when_it_is_about_to_sleep() -> None:
    """For the oldest launch, and for a value on its way to the host; not where there is nothing to wait for."""
    backend = PretendBackend()
    one, two = lane_on(backend), lane_on(backend)
    told: list[str] = []
    one.before_sleep = lambda: told.append("one")
    two.before_sleep = lambda: told.append("two")
    for _ in range(AHEAD):
        last = launch(one, double, ready(torch.ones(2)))
    assert told == []
    launch(one, double, ready(torch.ones(2)))
    assert told == ["one"]
    launch(two, double, last)
    assert told == ["one", "two"]
    backend.finish()
    launch(one, double, ready(torch.ones(2)))
    assert told == ["one", "two"]
    one.close()
    two.close()


def test_events_are_pooled() -> None:
    """A hundred frames in a row take a handful of events."""
    backend = PretendBackend()
    lane = lane_on(backend)
    for _ in range(100):
        read(launch(lane, double, ready(torch.ones(2))))
    assert backend.events < 12
    lane.close()


def test_streams_are_reused_by_the_next_lane() -> None:
    """Opening and closing does not strand memory on one-shot streams."""
    backend = PretendBackend()
    for _ in range(5):
        lane = lane_on(backend)
        read(launch(lane, double, ready(torch.ones(2))))
        lane.close()
    assert len(backend.streams) == 1 + 3  # the default one; in, compute, out


def test_a_failing_function_costs_its_frame_alone() -> None:
    """What it queued before it failed keeps its input alive; the next frame is right."""
    backend = PretendBackend()
    lane = lane_on(backend)

    def fails(x: Any) -> Any:
        x * 5
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        launch(lane, fails, ready(torch.ones(2)))
    assert read(launch(lane, double, ready(torch.ones(2)))).tolist() == [3, 3]
    lane.close()
    assert backend.violations == []


def test_a_failing_copy_to_the_host_costs_its_frame_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies already queued keep the output alive until the device has made them."""
    backend = PretendBackend()
    lane, copies = lane_on(backend, ahead=100), [0]
    download = backend.download

    def second_fails(leaf: Any) -> Any:
        copies[0] += 1
        if copies[0] == 2:
            raise MemoryError("no pinned memory left")
        return download(leaf)

    monkeypatch.setattr(backend, "download", second_fails)
    with pytest.raises(MemoryError):
        launch(lane, lambda x: (x + 1, x + 2), ready(torch.ones(2)))
    backend.choose = lambda n: 0  # the compute stream, made before the copy-out stream, goes first
    while backend.streams[1].queue and backend.step():
        pass
    lane.retire()
    later = launch(lane, lambda x: (x * 2, x * 3), ready(torch.ones(2)))
    assert [x.tolist() for x in read(later)] == [[2, 2], [3, 3]]
    lane.close()
    assert backend.violations == []


def test_a_value_on_its_way_to_the_host_is_waited_for_before_it_is_sent_on() -> None:
    """A device stage after one that wrote its output into the host's memory reads it when it is there."""
    backend = PretendBackend(2, choose=lambda n: n - 1)  # the second device is eager
    one, two = lane_on(backend), lane_on(backend, 1)
    last = launch(two, double, launch(one, double, ready(torch.ones(2))))
    assert read(last).tolist() == [7, 7]
    one.close()
    two.close()


def test_a_lost_device_is_told_at_the_event_and_by_every_later_launch() -> None:
    """An error that shows at an event is a BrokenError, and so is everything after it."""
    backend = PretendBackend()
    lane = lane_on(backend)
    mine = launch(lane, lambda x: x.break_device(), ready(torch.ones(2)))
    backend.finish()
    assert mine.event is not None
    with pytest.raises(BrokenError, match=r"pretend:0 failed.*restart the process.*illegal memory access"):
        mine.event.query()
    with pytest.raises(BrokenError):
        mine.event.synchronize()
    after = launch(lane, double, ready(torch.ones(2)))
    assert isinstance(after.error, BrokenError)
    lane.close()


def test_an_idle_lane_that_finds_its_device_lost_says_nothing() -> None:
    """Retiring on an idle thread must not end that thread; the next launch is told."""
    backend = PretendBackend()
    lane = lane_on(backend)
    launch(lane, lambda x: x.break_device(), ready(torch.ones(2)))
    backend.finish()
    lane.retire()
    assert isinstance(launch(lane, double, ready(torch.ones(2))).error, BrokenError)
    lane.close()


def test_a_device_lost_in_the_middle_of_a_launch_is_a_broken_error() -> None:
    """The runtime's error looks like the user's; the probe after it tells them apart."""
    backend = PretendBackend()
    lane = lane_on(backend)
    launch(lane, lambda x: x.break_device(), ready(torch.ones(2)))

    def late(x: Any) -> Any:
        backend.finish()
        return x * 2

    mine = launch(lane, late, ready(torch.ones(2)))
    assert isinstance(mine.error, BrokenError)
    assert isinstance(mine.error.__cause__, RuntimeError)
    assert mine.value is None
    lane.close()


def test_what_is_on_the_host_already_needs_no_copy() -> None:
    """A function that returns plain objects has them passed on, behind the compute stream's mark."""
    backend = PretendBackend()
    lane = lane_on(backend)
    mine = launch(lane, lambda x: {"label": "cat", "score": 0.5}, ready(torch.ones(2)))
    assert read(mine) == {"label": "cat", "score": 0.5}
    lane.close()


def test_what_is_no_array_travels_as_it_is() -> None:
    """Numbers, text and None reach the function unchanged."""
    backend = PretendBackend()
    lane = lane_on(backend)
    mine = launch(lane, lambda v: (v[0], v[1], v[2] + 1), ready(("a", None, torch.zeros(1))))
    text, nothing, array = read(mine)
    assert (text, nothing, array.tolist()) == ("a", None, [1])
    lane.close()


def test_an_output_on_another_device_is_fetched() -> None:
    """User code may leave its result on a device whose streams are not the lane's."""
    backend = PretendBackend(2)
    lane = lane_on(backend)
    mine = launch(lane, lambda x: (x, backend.send(x, 1)), ready(torch.ones(2)))
    here, there = read(mine)
    assert here.tolist() == there.tolist() == [1, 1]
    lane.close()
    assert backend.violations == []


def test_an_event_of_another_runtime_is_waited_for_on_the_host() -> None:
    """Streams cannot wait for an event that is not theirs, so the launcher does."""

    class Foreign:
        asked = 0

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            self.asked += 1

    backend, event = PretendBackend(), Foreign()
    lane = lane_on(backend)
    up = ready(torch.ones(2))
    up.event = event
    assert read(launch(lane, double, up)).tolist() == [3, 3]
    assert event.asked == 1
    lane.close()


# ---------------------------------------------------------------------- staging


@pytest.fixture
def backend() -> Iterator[PretendBackend]:
    """One device; at the end nothing would have corrupted data."""
    backend = PretendBackend(2)
    yield backend
    assert backend.violations == []


def test_a_slot_is_taken_again_only_after_its_copy(backend: PretendBackend) -> None:
    """More frames than slots, all launched before the device begins: each arrives as it was."""
    lane = lane_on(backend, ahead=100)
    pendings = [launch(lane, double, ready(torch.full((2,), float(i)))) for i in range(3 * SLOTS)]
    assert [read(p).tolist() for p in pendings] == [[2 * i + 1.0] * 2 for i in range(3 * SLOTS)]
    lane.close()


def test_a_ring_grows_no_further_than_its_limit(backend: PretendBackend) -> None:
    """With every slot busy the taker waits; with one free it is taken again."""
    accelerator = Accelerator.of(backend, 0)
    ring, stream = Ring(accelerator, slots=2), accelerator.borrow("in")
    seen = []
    for i in range(6):
        slot = ring.take()
        view = slot.hold(0, torch.full((2,), float(i)))
        with backend.on(stream):
            backend.send(view, 0)
        stream.record_event(slot.event)
        seen.append(slot)
    assert len(set(map(id, seen))) == 2
    ring.close()


def test_a_ring_says_when_it_is_about_to_sleep(backend: PretendBackend) -> None:
    """Only where every slot is being copied."""
    accelerator = Accelerator.of(backend, 0)
    ring, stream, told = Ring(accelerator, slots=2), accelerator.borrow("in"), list[int]()
    for i in range(3):
        slot = ring.take(lambda i=i: told.append(i))  # type: ignore[misc]
        stream.record_event(slot.event)
    assert told == [2]
    backend.finish()
    ring.take(lambda: told.append(3))
    assert told == [2]
    ring.close()


def test_an_idle_ring_has_one_slot(backend: PretendBackend) -> None:
    """Where copies are done before the next frame comes, one slot serves them all."""
    ring = Ring(Accelerator.of(backend, 0))
    assert len({id(ring.take()) for _ in range(5)}) == 1
    ring.close()


def test_a_slot_grows_with_its_frames_and_serves_smaller_ones(backend: PretendBackend) -> None:
    """A larger frame gets a larger buffer, a smaller one a view of it."""
    ring = Ring(Accelerator.of(backend, 0))
    addresses = []
    for rows in (2, 8, 3, 8):
        view = ring.take().hold(0, torch.full((rows, 2), float(rows)))
        assert view.shape == (rows, 2)
        assert view.unique().tolist() == [rows]
        addresses.append(view.data_ptr())
    assert len(set(addresses)) == 2
    assert addresses[1] == addresses[2] == addresses[3]
    ring.close()


def test_a_pinned_input_is_not_staged(backend: PretendBackend) -> None:
    """It is copied from where it lies and kept alive until that is done."""
    lane = lane_on(backend)
    value = backend.carve(backend.pinned(8), torch.ones(2)).copy_(torch.ones(2))
    before = len(backend._pinned)
    mine = launch(lane, double, ready(value), host_output=False)
    assert len(backend._pinned) == before
    assert isinstance(mine.event, Mark)
    assert any(held is value for held in mine.event.held)
    lane.close()


class Pair(NamedTuple):
    left: Any
    right: Any


def test_leaves_are_walked_in_every_container() -> None:
    """Tuples, lists, dicts and named tuples keep their types; leaves come in order."""
    value: dict[str, Any] = {"a": [1, (torch.ones(1), None)], "b": Pair("x", 2)}
    seen = leaves(value)
    assert seen[0] == 1
    assert seen[2:] == [None, "x", 2]
    same = map_leaves(lambda leaf: leaf, value)
    assert type(same["b"]) is Pair
    assert same["a"][1][0] is value["a"][1][0]


# ---------------------------------------------------------------------- a batch of frames from several launches


def test_a_batch_waits_for_the_launches_of_all_its_frames() -> None:
    """Values of three launches (same device, another, on their way to the host) in one job: each read once written."""
    backend = PretendBackend(2)
    first, second, other = lane_on(backend), lane_on(backend), lane_on(backend, 1)
    host = torch.arange(3.0)
    near = launch(first, double, ready(host), host_output=False)
    far = launch(other, double, ready(host + 1), host_output=False)
    home = launch(other, double, ready(host + 2))
    up = Pending([near.value, far.value, home.value], done=True)
    assert near.event is not None and far.event is not None and home.event is not None
    up.event = Events([near.event, home.event, far.event])
    joined = launch(second, lambda rows: rows[0] + rows[1] + rows[2], up)
    del near, far, home, up
    assert torch.equal(read(joined), double(host) + double(host + 1) + double(host + 2))
    assert backend.violations == []
    for lane in (first, second, other):
        lane.close()

"""Desks and agendas as pure logic: no thread, no loop, no tensor; hypothesis chooses what happens next.

    System: S desks on 1 … S pretended device streams. A step enters a frame, moves a stage task, lets a stream ask for
    a job, or ends the job that a stream runs; `Random` (drawn by hypothesis) chooses among what is possible.

A stream that was told "no job" asks again only after its bell has rung, so a lost wake-up is a dead end and fails. With
``racing`` other streams run on while a desk looks at a pending: the moments at which real threads lose wake-ups.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotime.devices.base import Job, Pending, passed_over, stage_failed
from aiotime.errors import ClosedError, FrameCancelled, StageError
from aiotime.frame import NOBODY, Frame
from aiotime.learning import desk as desk_module
from aiotime.learning import ticket as ticket_module
from aiotime.learning.desk import Agenda, Desk, Lost
from aiotime.learning.order import Order, event, lockstep, one_forward_one_backward
from aiotime.learning.ticket import Ticket

SOME = st.randoms(use_true_random=False) | st.builds(Random, st.integers())  # the first shrinks, the second ranges


class Watched(Pending):
    """A pending that lets others run while somebody looks whether it is done."""

    __slots__ = ("_done",)
    look: Callable[[], None] | None = None  # set while a desk looks

    @property
    def done(self) -> bool:
        if Watched.look is not None:
            Watched.look()
        return self._done

    @done.setter
    def done(self, value: bool) -> None:
        self._done = value


class Hands:
    """Computes nothing; writes down what it was asked, and fails where it is told to."""

    unformed = False

    def __init__(self, stage: int, log: list[tuple[str, int, int]], *, learns: bool = True) -> None:
        self.stage = stage
        self.learns = learns
        self.log = log
        self.learned = 0
        self.kept: set[int] = set()
        self.fails: set[tuple[str, int]] = set()
        self.batches: list[int] = []
        self.flushed = 0

    def _note(self, what: str, index: int) -> None:
        self.log.append((what, self.stage, index))
        if (what, index) in self.fails:
            raise ValueError(f"{what}{index} fails at stage {self.stage}")

    def predict(self, value: Any) -> Any:
        self.log.append(("P", self.stage, value))
        return value

    def forward(self, ticket: Ticket, value: Any) -> Any:
        assert value == ticket.index
        self._note("F", ticket.index)
        if self.learns:
            self.kept.add(ticket.index)
        return value

    def backward(self, ticket: Ticket, message: Any) -> Any:
        assert ticket.index in self.kept, "a backward without its forward, or a second one"
        assert message in (None, ("gradient of", ticket.index)), "another frame's gradient"
        self._note("B", ticket.index)
        self.kept.discard(ticket.index)
        return ("gradient of", ticket.index)

    def relay(self, ticket: Ticket, loss: int, message: Any) -> Any:
        self._note(f"R{loss}-", ticket.index)
        return message

    def finish(self, ticket: Ticket) -> None:
        self._note("W", ticket.index)

    def drop(self, ticket: Ticket) -> None:
        self.kept.discard(ticket.index)

    def batch_end(self, frames: int) -> None:
        self.batches.append(frames)
        self._note("U", len(self.batches))

    def flush(self) -> None:
        self.flushed += 1

    def pending_updates(self) -> int:
        return 0

    def adopt(self) -> None: ...

    def reset(self) -> None: ...


class Stream:
    """A device stream with one worker: tokens, a bell, and at most one job in progress."""

    name = "pretended"

    def __init__(self) -> None:
        self.agenda = Agenda()
        self.tokens = 0
        self.posted = 0
        self.closed = False
        self.rung = True  # it may ask for a job
        self.busy: Job | None = None

    def post(self, agenda: Agenda, jobs: int) -> bool:
        if self.closed:
            return False
        self.tokens += jobs
        self.posted += jobs
        self.rung = True  # a token in the queue wakes an idle worker
        agenda.poke()
        return True

    def ring(self) -> None:
        self.rung = True

    @property
    def can_ask(self) -> bool:
        return self.tokens > 0 and self.busy is None and self.rung

    def ask(self) -> None:
        self.rung = False
        job = self.agenda.take(self)
        if job is not None:
            self.rung = True
            self.tokens -= 1
            assert job[1].done, "a job whose upstream is not there would block the stream"
            self.busy = job

    def end(self) -> None:
        """What a worker does with a job."""
        assert self.busy is not None
        (work, up, frame, mine, action), self.busy = self.busy, None
        error = up.error or (None if action is not None else passed_over(frame, lambda: 0.0))
        if error is None:
            try:
                if action is not None:
                    action()
                else:
                    mine.value = work.fn(up.value)
            except BaseException as cause:
                error = stage_failed(work, frame, cause)
        mine.error = error
        up.value = None
        assert not mine.done, "settled twice"
        mine.done = True
        if mine.bell is not None:
            mine.bell.ring()


class System:
    """Desks, streams and stage tasks; `run` until nothing moves."""

    def __init__(
        self, orders: Sequence[Order], layout: Sequence[int], random: Random, *, first: int = 0, racing: bool = False
    ) -> None:
        self.random = random
        self.racing = racing
        self.log: list[tuple[str, int, int]] = []
        self.told: list[tuple[int, int]] = []  # (stage, frame) of every error that was reported
        self.streams = [Stream() for _ in range(max(layout) + 1)]
        self.desks: list[Desk] = []
        self.hands: list[Hands] = []
        for k, order in enumerate(orders):
            hands = Hands(k, self.log, learns=k >= first)
            self.hands.append(hands)
            self.desks.append(
                Desk(
                    hands,
                    order,
                    stage=f"s{k}",
                    index=k,
                    stages=len(orders),
                    agenda=self.streams[layout[k]].agenda,
                    host_below=True,
                    failed=lambda ticket, error, k=k: self.told.append((k, ticket.index)),  # type: ignore[misc]
                )
            )
        self.layout = list(layout)
        self.first = first
        self.source: deque[tuple[Frame, Callable[[int], None] | None]] = deque()
        self.inboxes: list[deque[tuple[Frame, Callable[[int], None] | None]]] = [deque() for _ in orders]
        self.frames: list[Frame] = []
        self.most_outstanding = Counter[int]()
        self.asking = False

    def add(self, *, learn: bool = True, late: bool = False, cancelled: bool = False) -> Frame:
        """One more frame, behind those before."""
        index = len(self.frames)
        frame = Frame(NOBODY, index, Pending(index, done=True), 0.0)
        frame.ticket = Ticket(index, len(self.desks), learn=learn, late=late)
        frame.cancelled = cancelled
        self.frames.append(frame)
        self.source.append((frame, None))
        return frame

    def barrier(self, action: Callable[[int], None] = lambda stage: None) -> Frame:
        """A control frame behind those before."""
        frame = Frame(NOBODY, -1, Pending(None, done=True), 0.0)
        self.source.append((frame, action))
        return frame

    # ------------------------------------------------------------------ what can happen

    def moves(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        if self.source:
            found.append(lambda: self.inboxes[0].append(self.source.popleft()))
        for k, inbox in enumerate(self.inboxes):
            if inbox:
                found.append(lambda k=k: self.launch(k))  # type: ignore[misc]
        return [*found, *self.stream_moves()]

    def stream_moves(self, besides: Stream | None = None) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        for stream in self.streams:
            if stream.busy is not None:
                found.append(stream.end)
            elif stream.can_ask and stream is not besides:
                found.append(lambda stream=stream: self.ask(stream))  # type: ignore[misc]
        return found

    def launch(self, k: int) -> None:
        frame, action = self.inboxes[k].popleft()
        act = None if action is None else lambda: action(k)
        last = k + 1 == len(self.desks)
        frame.tail = self.desks[k].launch(self.streams[self.layout[k]], frame, act, last=last)  # type: ignore[arg-type]
        if not last:
            self.inboxes[k + 1].append((frame, action))

    def ask(self, stream: Stream) -> None:
        if not self.racing or self.asking:
            stream.ask()
        else:
            self.asking = True

            def meanwhile() -> None:
                Watched.look = None  # whoever runs meanwhile is not interrupted
                try:
                    others = self.stream_moves(besides=stream)
                    if others and self.random.random() < 0.3:
                        self.random.choice(others)()
                finally:
                    Watched.look = meanwhile

            Watched.look = meanwhile
            try:
                stream.ask()
            finally:
                Watched.look = None
                self.asking = False
        for k, desk in enumerate(self.desks):
            self.most_outstanding[k] = max(self.most_outstanding[k], desk._outstanding)

    def step(self) -> bool:
        """One thing that can happen does; False when nothing can."""
        moves = self.moves()
        if not moves:
            return False
        self.random.choice(moves)()
        return True

    def run(self, *, until: Callable[[], bool] = lambda: False) -> None:
        while not until() and self.step():
            pass

    # ------------------------------------------------------------------ what must hold

    def check_nothing_left(self) -> None:
        """Every token was answered by one job, every pending settled, nothing is kept."""
        assert [stream.tokens for stream in self.streams] == [0] * len(self.streams)
        assert not any(stream.busy for stream in self.streams)
        for desk, hands in zip(self.desks, self.hands, strict=True):
            assert not hands.kept
            assert not desk._forward and not desk._backward and not desk._released and desk._owed is None
            assert not any(desk._relays.values())
        for frame in self.frames:
            assert frame.tail is not None and frame.tail.done
            ticket = frame.ticket
            for k in range(self.first, len(self.desks)):
                assert not ticket.learn or ticket.late or ticket.grads[k].done

    def jobs_of(self, stage: int, kinds: str = "FBPWU") -> list[tuple[str, int]]:
        return [(what, index) for what, at, index in self.log if at == stage and what in kinds]


@contextmanager
def watched() -> Iterator[None]:
    """The desks' and tickets' pendings are `Watched`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk_module, "Pending", Watched)
        patch.setattr(ticket_module, "Pending", Watched)
        yield


def layouts(stages: int) -> list[list[int]]:
    """All on one stream, on two in turn, on two halves, each on its own."""
    half = [int(k >= stages // 2) for k in range(stages)]
    return [[0] * stages, [k % 2 for k in range(stages)], half, list(range(stages))]


ORDERS: dict[str, Callable[..., Order]] = {
    "event": event,
    "1f1b": one_forward_one_backward,
    "lockstep": lockstep,
    "exact": lambda stage, stages, split=False: Order(0, split=split),
    "strictly exact": lambda stage, stages, split=False: Order(0, strict=True, split=split),
    "gpipe 4": lambda stage, stages, split=False: Order(3, strict=True, batch=4, split=split),
    "1f1b 4": lambda stage, stages, split=False: Order(min(stages - 1 - stage, 3), strict=True, batch=4, split=split),
}
STRICT = ["1f1b", "lockstep", "strictly exact", "gpipe 4", "1f1b 4"]


def made(name: str, stages: int, random: Random, *, split: bool = False, **options: Any) -> System:
    """A system of ``stages`` desks under the order of that name, on some layout."""
    orders = [ORDERS[name](k, stages, split=split) for k in range(stages)]
    return System(orders, random.choice(layouts(stages)), random, **options)


# ---------------------------------------------------------------------- liveness, whatever completes first


@pytest.mark.parametrize("name", ORDERS)
@given(random=SOME, stages=st.integers(1, 5), frames=st.integers(1, 12), split=st.booleans())
def test_every_frame_goes_forward_once_and_back_once(
    name: str, random: Random, stages: int, frames: int, split: bool
) -> None:
    """On any layout, in any order of completion: in order, each once, every token used, no dead end."""
    system = made(name, stages, random, split=split)
    for _ in range(frames):
        system.add()
    system.barrier()
    system.run()
    system.check_nothing_left()
    for k in range(stages):
        assert [index for what, index in system.jobs_of(k) if what == "F"] == list(range(frames))
        assert [index for what, index in system.jobs_of(k) if what == "B"] == list(range(frames))
    assert not system.told


@pytest.mark.parametrize("name", ORDERS)
@given(random=SOME, stages=st.integers(2, 4), frames=st.integers(1, 8))
def test_no_wake_up_is_lost_while_others_run(name: str, random: Random, stages: int, frames: int) -> None:
    """What other streams settle between two looks of a desk, and between its look and its bell, is seen."""
    with watched():
        system = made(name, stages, random, racing=True)
        for _ in range(frames):
            system.add()
        system.barrier()
        system.run()
        system.check_nothing_left()


@given(random=SOME, stages=st.integers(1, 5), frames=st.integers(1, 12))
def test_event_order_is_never_further_ahead_than_it_may(random: Random, stages: int, frames: int) -> None:
    """At stage k at most S-1-k frames lie between a frame's forward and the last backward before it."""
    system = made("event", stages, random)
    for _ in range(frames):
        system.add()
    system.run()
    for k in range(stages):
        assert system.most_outstanding[k] <= stages - k
        assert all(frame.ticket.delays[k] <= stages - 1 - k for frame in system.frames)


@given(random=SOME, stages=st.integers(1, 5), frames=st.integers(1, 12))
def test_event_order_needs_no_barrier_to_finish(random: Random, stages: int, frames: int) -> None:
    """Without anything behind them the last frames are learned from as well."""
    system = made("event", stages, random)
    for _ in range(frames):
        system.add()
    system.run()
    system.check_nothing_left()


@pytest.mark.parametrize(("name", "factor"), [("1f1b", 1), ("lockstep", 2)])
@given(random=SOME, stages=st.integers(1, 5), frames=st.integers(1, 20))
def test_strict_orders_have_exactly_their_delay(
    name: str, factor: int, random: Random, stages: int, frames: int
) -> None:
    """Frame i lacks min(i, d) updates at a stage that is d ahead; the delays are counted per stage."""
    system = made(name, stages, random)
    for _ in range(frames):
        system.add()
    system.barrier()
    system.run()
    for k, desk in enumerate(system.desks):
        ahead = factor * (stages - 1 - k)
        expected = [min(i, ahead) for i in range(frames)]
        assert [frame.ticket.delays[k] for frame in system.frames] == expected
        assert desk.delays == Counter(expected)


def mixture(random: Random, frames: int, *, late: bool = False) -> list[dict[str, bool]]:
    """Some with a target, some without, now and then a barrier (an empty dict)."""
    kinds: list[dict[str, bool]] = [{"learn": True}, {"learn": True}, {"learn": False}, {}]
    if late:
        kinds.append({"late": True})
    return [random.choice(kinds) for _ in range(frames)]


def play(system: System, kinds: Sequence[dict[str, bool]], *, ends: bool = True) -> None:
    for kind in kinds:
        if kind:
            system.add(**kind)
        else:
            system.barrier()
    if ends:
        system.barrier()


@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
@pytest.mark.parametrize("name", STRICT)
@given(one=SOME, other=SOME, stages=st.integers(1, 4), frames=st.integers(1, 14), seed=st.integers(0, 1 << 30))
def test_strict_orders_do_not_ask_what_is_ready_first(
    name: str, split: bool, one: Random, other: Random, stages: int, frames: int, seed: int
) -> None:
    """The jobs of a stage come in an order that depends on the frames alone, never on layout or completion."""
    kinds = mixture(Random(seed), frames)
    systems = [made(name, stages, random, split=split) for random in (one, other)]
    for system in systems:
        play(system, kinds)
        system.run()
        system.check_nothing_left()
    for k in range(stages):
        assert systems[0].jobs_of(k) == systems[1].jobs_of(k)


@pytest.mark.parametrize("name", ORDERS)
@given(random=SOME, stages=st.integers(1, 4), frames=st.integers(1, 14), split=st.booleans())
def test_frames_without_a_target_are_predicted_in_between(
    name: str, random: Random, stages: int, frames: int, split: bool
) -> None:
    """They go forward in their turn, are learned from nowhere, and hold nothing up."""
    system = made(name, stages, random, split=split)
    kinds = [{"learn": random.random() < 0.5} for _ in range(frames)]
    play(system, kinds)
    system.run()
    system.check_nothing_left()
    for k in range(stages):
        jobs = system.jobs_of(k)
        assert [index for what, index in jobs if what in "FP"] == list(range(frames))
        assert [index for what, index in jobs if what == "B"] == [i for i in range(frames) if kinds[i]["learn"]]


@given(random=SOME, stages=st.integers(2, 5), frames=st.integers(1, 10), first=st.integers(1, 4))
def test_stages_that_only_compute_share_a_stream_with_learning_ones(
    random: Random, stages: int, frames: int, first: int
) -> None:
    """Below the first stage that learns nothing comes back, and nothing waits for it, in every order."""
    first = min(first, stages - 1)
    name = random.choice(list(ORDERS))
    orders = [Order() if k < first else ORDERS[name](k, stages) for k in range(stages)]
    system = System(orders, random.choice(layouts(stages)), random, first=first)
    play(system, mixture(random, frames))
    system.run()
    system.check_nothing_left()
    for k in range(first):
        assert not [job for job in system.jobs_of(k) if job[0] in "BW"]


# ---------------------------------------------------------------------- barriers


@pytest.mark.parametrize("name", ORDERS)
@given(random=SOME, stages=st.integers(1, 4), frames=st.integers(1, 12), split=st.booleans())
def test_a_barrier_stands_between_before_and_behind(
    name: str, random: Random, stages: int, frames: int, split: bool
) -> None:
    """When it acts on a stage, everything before was learned from there and nothing behind has begun there."""
    system = made(name, stages, random, split=split)
    seen: list[tuple[int, int, list[tuple[str, int]]]] = []
    before: list[int] = []
    for i in range(frames):
        if random.random() < 0.3:
            before.append(i)

            def action(stage: int, i: int = i) -> None:
                seen.append((i, stage, system.jobs_of(stage, "FBW")))

            system.barrier(action)
        system.add()
    system.barrier()
    system.run()
    system.check_nothing_left()
    assert sorted((i, stage) for i, stage, _ in seen) == [(i, k) for i in before for k in range(stages)]
    for i, _, jobs in seen:
        kinds = "FBW" if split else "FB"
        assert sorted(jobs) == sorted((what, index) for what in kinds for index in range(i))
    assert all(hands.flushed == len(before) + 1 for hands in system.hands)


@given(random=SOME)
def test_a_barrier_that_fails_lets_the_rest_go_on(random: Random) -> None:
    """Its error is its own; the frames behind it are forwarded and learned from."""
    system = made("1f1b", 3, random)
    system.add()

    def action(stage: int) -> None:
        if stage == 1:
            raise ValueError("no")

    failing = system.barrier(action)
    system.add()
    system.barrier()
    system.run()
    system.check_nothing_left()
    assert isinstance(failing.tail.error, StageError)  # type: ignore[union-attr]
    assert [index for what, index in system.jobs_of(2) if what == "B"] == [0, 1]


# ---------------------------------------------------------------------- split backwards, mini-batches


@pytest.mark.parametrize("name", ORDERS)
@given(random=SOME, stages=st.integers(1, 4), frames=st.integers(1, 10))
def test_a_weight_gradient_follows_its_backward_directly(name: str, random: Random, stages: int, frames: int) -> None:
    """Nothing else of the stage comes between, so what a forward reads is what an unsplit backward would leave."""
    system = made(name, stages, random, split=True)
    for _ in range(frames):
        system.add()
    system.barrier()
    system.run()
    system.check_nothing_left()
    for k in range(stages):
        jobs = system.jobs_of(k, "FBWP")
        for at, (what, index) in enumerate(jobs):
            if what == "B":
                assert jobs[at + 1] == ("W", index)


@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
@pytest.mark.parametrize("name", ["gpipe 4", "1f1b 4"])
@given(random=SOME, stages=st.integers(1, 4), frames=st.integers(1, 14))
def test_a_mini_batch_ends_after_its_last_backward(
    name: str, split: bool, random: Random, stages: int, frames: int
) -> None:
    """One update per four frames, behind their last gradient and before any later forward; a barrier ends a part."""
    system = made(name, stages, random, split=split)
    for _ in range(frames):
        system.add()
    system.barrier()
    system.run()
    system.check_nothing_left()
    full, rest = divmod(frames, 4)
    for k, hands in enumerate(system.hands):
        assert hands.batches == [4] * full + [rest] * bool(rest)
        jobs = system.jobs_of(k)
        for number in range(full):
            end = jobs.index(("U", number + 1))
            last = "W" if split else "B"
            assert jobs[end - 1] == (last, 4 * number + 3)
            assert [i for what, i in jobs[:end] if what == "F"] == list(range(4 * number + 4))


@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
@given(random=SOME, frames=st.integers(1, 12), bad=st.sets(st.integers(0, 11)), what=st.sampled_from("FB"))
def test_a_mini_batch_counts_members_that_fail(
    split: bool, random: Random, frames: int, bad: set[int], what: str
) -> None:
    """A frame that fails takes its place in the batch, and the batch ends where it would have ended without."""
    system = made("1f1b 4", 3, random, split=split)
    system.hands[1].fails = {(what, index) for index in bad}
    for _ in range(frames):
        system.add()
    system.barrier()
    system.run()
    system.check_nothing_left()
    assert {tuple(hands.batches) for hands in system.hands} == {(4,) * (frames // 4) + (frames % 4,) * (frames % 4 > 0)}


@given(random=SOME, partial=st.booleans(), split=st.booleans())
def test_an_update_that_fails_is_told_and_the_next_batch_goes_on(random: Random, partial: bool, split: bool) -> None:
    """At the end of a full batch and of a part of one: reported once, and later frames are learned from."""
    system = made("gpipe 4", 2, random, split=split)
    system.hands[1].fails = {("U", 1)}
    for _ in range(3 if partial else 4):
        system.add()
    system.barrier()
    for _ in range(4):
        system.add()
    system.barrier()
    system.run()
    system.check_nothing_left()
    assert [stage for stage, _ in system.told] == [1]
    assert system.hands[1].batches == [3 if partial else 4, 4]


def test_a_mini_batch_whose_last_job_never_ran_holds_nothing_up() -> None:
    """On a lost device the closing backward is not run; the stage does not wait for it for ever."""
    system = made("gpipe 4", 1, Random(0))
    for _ in range(5):
        system.add()
    system.run(until=lambda: system.desks[0]._learned == 4)
    (stream,) = system.streams
    assert stream.busy is not None
    _, _, _, mine, _ = stream.busy
    stream.busy, mine.error, mine.done = None, ValueError("lost"), True
    system.barrier()
    system.run()
    assert stream.tokens == 0
    assert ("F", 4) in system.jobs_of(0)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ORDERS)
@given(
    random=SOME,
    stages=st.integers(1, 4),
    frames=st.integers(1, 10),
    faults=st.sets(st.tuples(st.sampled_from("FBW"), st.integers(0, 3), st.integers(0, 9)), max_size=6),
    cancelled=st.sets(st.integers(0, 9), max_size=3),
    split=st.booleans(),
    racing=st.booleans(),
)
def test_failures_pass_by_and_leave_nothing(
    name: str,
    random: Random,
    stages: int,
    frames: int,
    faults: set[tuple[str, int, int]],
    cancelled: set[int],
    split: bool,
    racing: bool,
) -> None:
    """A forward, a backward or a weight job that raises, a frame that is cancelled: the others are learned from.

    Below a failed backward the frame is lost without a further report; above it, it was learned from already.
    """
    with watched():
        system = made(name, stages, random, split=split, racing=racing)
        for hands in system.hands:
            hands.fails = {(what, index) for what, stage, index in faults if stage == hands.stage}
        for i in range(frames):
            system.add(cancelled=i in cancelled)
        system.barrier()
        system.run()
        system.check_nothing_left()
    lost = {i for i in range(frames) if i in cancelled or any(("F", k, i) in faults for k in range(stages))}
    expected = []
    for i in sorted(set(range(frames)) - lost):
        failing = [k for k in range(stages) if ("B", k, i) in faults]
        lowest = max(failing, default=-1)  # the first to fail, from above
        expected += [(lowest, i)] * bool(failing)
        for k in range(stages):
            tried = [index for what, index in system.jobs_of(k) if what == "B"]
            assert tried.count(i) == (k >= lowest)
            if split and ("W", k, i) in faults and k > lowest:
                expected.append((k, i))
    for i in lost:
        assert not [job for k in range(stages) for job in system.jobs_of(k) if job == ("B", i)]
    assert sorted(system.told) == sorted(expected)


def test_the_error_of_a_forward_is_passed_on_as_the_reason() -> None:
    """Down all stages a lost frame's message says why, and its forward's pending has the error."""
    system = made("event", 3, Random(1))
    system.hands[1].fails = {("F", 0)}
    frame = system.add()
    system.run()
    assert isinstance(frame.tail.error, StageError)  # type: ignore[union-attr]
    lost = frame.ticket.grads[0].value
    assert isinstance(lost, Lost) and lost.error is frame.tail.error  # type: ignore[union-attr]


@given(random=SOME)
def test_a_cancelled_frame_is_not_computed(random: Random) -> None:
    """Passed over in every stage, and so is learning from it."""
    system = made("1f1b", 3, random)
    frame = system.add(cancelled=True)
    system.add()
    system.barrier()
    system.run()
    system.check_nothing_left()
    assert isinstance(frame.tail.error, FrameCancelled)  # type: ignore[union-attr]
    assert not [entry for entry in system.log if entry[2] == 0 and entry[0] in "FB"]


# ---------------------------------------------------------------------- the end


@pytest.mark.parametrize("name", ORDERS)
@given(
    random=SOME,
    stages=st.integers(1, 4),
    frames=st.integers(1, 10),
    steps=st.integers(0, 200),
    split=st.booleans(),
    racing=st.booleans(),
)
def test_abort_at_any_moment_answers_every_token(
    name: str, random: Random, stages: int, frames: int, steps: int, split: bool, racing: bool
) -> None:
    """What was posted is answered with jobs that do nothing, nothing is kept, what comes later is refused."""
    with watched():
        system = made(name, stages, random, split=split, racing=racing)
        play(system, mixture(random, frames, late=name in ("event", "exact")), ends=random.random() < 0.5)
        for _ in range(steps):
            system.step()
        late = [frame.ticket for frame in system.frames if frame.ticket.late]
        for ticket in random.sample(late, len(late) // 2):
            for k, desk in enumerate(system.desks):
                desk.release_late(system.streams[system.layout[k]], ticket)  # type: ignore[arg-type]
        # as the engine ends: stage tasks are gone, desks are told, frames in flight cancelled, streams closed
        system.source.clear()
        for inbox in system.inboxes:
            inbox.clear()
        for desk in system.desks:
            desk.abort(ClosedError("the end"))
        for frame in system.frames:
            frame.cancelled = True
        for stream in system.streams:
            stream.closed = True
        system.run()
    assert [stream.tokens for stream in system.streams] == [0] * len(system.streams)
    for desk in system.desks:
        desk.forget()
    assert not any(hands.kept for hands in system.hands)
    frame = Frame(NOBODY, 99, Pending(99, done=True), 0.0)
    frame.ticket = Ticket(99, stages, learn=True)
    refused = system.desks[0].launch(system.streams[0], frame, last=True)  # type: ignore[arg-type]
    assert isinstance(refused.error, ClosedError) and refused.done
    assert system.desks[0].release_late(system.streams[0], frame.ticket) is False  # type: ignore[arg-type]


@given(random=SOME, frames=st.integers(5, 9))
def test_a_mini_batch_cut_short_by_the_end_updates_nothing(random: Random, frames: int) -> None:
    """Some stages would have all gradients, others a few: none of them updates."""
    system = made("gpipe 4", 2, random)
    for _ in range(frames):
        system.add()
    system.run(until=lambda: system.hands[1].batches == [4])
    for desk in system.desks:
        desk.abort(ClosedError("the end"))
    batches = [list(hands.batches) for hands in system.hands]
    system.run()
    assert [hands.batches for hands in system.hands] == batches


# ---------------------------------------------------------------------- targets that come later


def release(system: System, frame: Frame) -> None:
    for k, desk in enumerate(system.desks):
        assert desk.release_late(system.streams[system.layout[k]], frame.ticket)  # type: ignore[arg-type]


@given(random=SOME, stages=st.integers(1, 4), frames=st.integers(1, 10), racing=st.booleans(), split=st.booleans())
def test_a_late_target_may_come_at_any_time_and_in_any_order(
    random: Random, stages: int, frames: int, racing: bool, split: bool
) -> None:
    """Before its frame was forwarded, while it is, or after all the others: learned from once, in every stage."""
    with watched():
        system = made(random.choice(["event", "exact"]), stages, random, racing=racing, split=split)
        play(system, mixture(random, frames, late=True))
        waiting = [frame for frame in system.frames if frame.ticket.late]
        random.shuffle(waiting)
        while waiting:
            for _ in range(random.randrange(30)):
                system.step()
            release(system, waiting.pop())
        system.run()
        system.check_nothing_left()
    learned = sorted(frame.index for frame in system.frames if frame.ticket.learn)
    for k in range(stages):
        assert sorted(index for what, index in system.jobs_of(k) if what == "B") == learned


@given(random=SOME, stages=st.integers(1, 3))
def test_late_frames_hold_up_neither_others_nor_a_barrier(random: Random, stages: int) -> None:
    """Whose target has not come is not waited for."""
    system = made("event", stages, random)
    late = [system.add(late=True) for _ in range(4)]
    system.add()
    barrier = system.barrier()
    system.add()
    system.run()
    assert barrier.tail is not None and barrier.tail.done
    for k in range(stages):
        assert [index for what, index in system.jobs_of(k) if what == "B"] == [4, 5]
    for frame in late:
        release(system, frame)
    system.run()
    system.check_nothing_left()


@given(random=SOME, stages=st.integers(1, 3))
def test_a_barrier_waits_for_late_targets_that_have_come_and_for_no_frame_behind_it(
    random: Random, stages: int
) -> None:
    """A target that is there already for a frame behind the barrier must not hold the barrier up: a dead-lock."""
    system = made("event", stages, random)
    before = system.add(late=True)
    seen: list[list[tuple[str, int]]] = []
    system.run()
    release(system, before)
    system.barrier(lambda stage: seen.append(system.jobs_of(stage, "FB")))
    behind = system.add(late=True)
    release(system, behind)  # before it has even entered
    system.run()
    system.check_nothing_left()
    assert seen == [[("F", 0), ("B", 0)]] * stages


@given(random=SOME, stages=st.integers(1, 3), moment=st.integers(0, 40))
def test_an_expired_frame_is_forgotten_wherever_it_is(random: Random, stages: int, moment: int) -> None:
    """Given up before, between or after its forwards: no stage keeps anything for it."""
    system = made("event", stages, random)
    frame = system.add(late=True)
    for _ in range(moment):
        system.step()
    frame.ticket.expired = True
    for desk in system.desks:
        desk.expire(frame.ticket)
    system.add()  # a stage forgets with its next job
    system.run()
    system.check_nothing_left()
    assert not any(desk._kept_late for desk in system.desks)
    assert frame.tail is not None and frame.tail.error is None


# ---------------------------------------------------------------------- relays


@pytest.mark.parametrize("strict", [False, True])
@given(random=SOME, stages=st.integers(1, 5), n=st.integers(1, 5), frames=st.integers(1, 8), own=st.booleans())
def test_gradients_of_other_stages_losses_are_relayed(
    strict: bool, random: Random, stages: int, n: int, frames: int, own: bool
) -> None:
    """Each loss's gradient goes down through the stages between it and whoever learns from it, once per frame."""
    from aiotime.learning.order import interlocking

    orders = [interlocking(k, stages, n=n, strict=strict, own=own) for k in range(stages)]
    with watched():
        system = System(orders, random.choice(layouts(stages)), random, racing=True)
        for _ in range(frames):
            system.add()
        system.barrier()
        system.run()
        system.check_nothing_left()
    for k in range(stages):
        assert [index for what, index in system.jobs_of(k, "FB") if what == "B"] == list(range(frames))
        relayed = Counter(what for what, at, _ in system.log if at == k and what[0] == "R")
        assert relayed == Counter({f"R{loss}-": frames for loss in orders[k].relays})

"""Tests of aiotime.ingest.door: credits of frames and bytes, turns, pausing, withdrawing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotime.errors import AiotimeError, ConfigurationError
from aiotime.ingest.door import Door

Log = list[str]


class Guest:
    """An entrant that writes down when it entered; ``declines`` stands for one that was cancelled meanwhile."""

    def __init__(self, name: str, log: list[str], *, nbytes: int = 0, declines: bool = False) -> None:
        self.name, self.log, self.nbytes, self.declines = name, log, nbytes, declines

    def enter(self) -> int | None:
        if self.declines:
            return None
        self.log.append(self.name)
        return self.nbytes

    def size(self) -> int:
        return self.nbytes

    def refused(self, why: AiotimeError) -> None:
        raise AssertionError("nobody is refused by the door itself")


def test_admits_up_to_the_budget() -> None:
    """As many enter at once as there are credits; the next waits for one to be given back."""
    door, log = Door(2), Log()
    assert [door.admit("run", Guest(name, log)) for name in "abc"] == [True, True, False]
    assert (door.used, door.waiting, door.full) == (2, 1, True)
    door.release(0)
    assert log == ["a", "b", "c"]
    assert (door.used, door.waiting, door.full) == (2, 0, False)


def test_turns_go_round_the_flows() -> None:
    """A flow with many entrants gets every second credit beside a flow with one after the other."""
    door, log = Door(1), Log()
    door.admit("x", Guest("first", log))
    for i in range(4):
        door.admit("submit", Guest(f"s{i}", log))
    for i in range(3):
        door.admit("run", Guest(f"r{i}", log))
    for _ in range(7):
        door.release(0)
    assert log == ["first", "s0", "r0", "s1", "r1", "s2", "r2", "s3"]


def test_nobody_overtakes_who_waits() -> None:
    """Once somebody waits, `take` and `admit` do not hand a free credit to a newcomer."""
    door, log = Door(2, 100), Log()
    door.admit("a", Guest("small", log, nbytes=60))
    door.admit("b", Guest("large", log, nbytes=60))  # waits for bytes, though a frame credit is free
    assert not door.admit("c", Guest("tiny", log, nbytes=1))
    assert not door.take()
    door.release(60)
    assert log == ["small", "large", "tiny"]


def test_take_asks_nobody() -> None:
    """`take` gives a credit where nobody waits, never beyond the budget, while paused or where bytes are counted."""
    door = Door(1)
    assert door.take()
    assert not door.take()
    door.release(0)
    door.paused = True
    assert not door.take()
    assert not Door(1, 10).take()


def test_a_declined_credit_goes_to_the_next() -> None:
    """A grant that meets somebody who left is not lost."""
    door, log = Door(1), Log()
    door.admit("a", Guest("a", log))
    door.admit("b", Guest("gone", log, declines=True))
    door.admit("c", Guest("c", log))
    door.release(0)
    assert log == ["a", "c"]
    assert door.used == 1


def test_declining_at_once_costs_nothing() -> None:
    """An entrant that declines at a free door leaves the credit there."""
    door, log = Door(1), Log()
    door.admit("a", Guest("gone", log, declines=True))
    assert door.used == 0
    assert door.admit("b", Guest("b", log))


def test_byte_budget() -> None:
    """Bytes in flight stay within the budget, whatever number of frames would be allowed."""
    door, log = Door(10, 100), Log()
    door.admit("a", Guest("a", log, nbytes=40))
    door.admit("a", Guest("b", log, nbytes=40))
    assert not door.admit("a", Guest("c", log, nbytes=40))
    assert door.used_bytes == 80
    door.release(40)
    assert log == ["a", "b", "c"]
    assert (door.used, door.used_bytes) == (2, 80)


def test_a_frame_larger_than_the_budget_goes_alone() -> None:
    """A frame that can never fit is admitted when nothing else is in flight, rather than never."""
    door, log = Door(10, 100), Log()
    door.admit("a", Guest("small", log, nbytes=10))
    assert not door.admit("a", Guest("huge", log, nbytes=1000))
    assert not door.admit("b", Guest("later", log, nbytes=10))
    door.release(10)
    assert log == ["small", "huge"]
    door.release(1000)
    assert log == ["small", "huge", "later"]
    door.release(10)
    assert (door.used, door.used_bytes) == (0, 0)


def test_withdraw() -> None:
    """Whoever withdraws does not enter, and whoever waited behind it does at once where it fits."""
    door, log = Door(10, 100), Log()
    door.admit("a", Guest("a", log, nbytes=60))
    large = Guest("large", log, nbytes=60)
    door.admit("b", large)
    door.admit("c", Guest("small", log, nbytes=10))
    assert door.withdraw("b", large)
    assert log == ["a", "small"]
    assert not door.withdraw("b", large)
    assert not door.withdraw("nobody", large)


def test_withdraw_all() -> None:
    """Emptying the queue returns everybody who waited."""
    door, log = Door(1), Log()
    guests = [Guest(name, log) for name in "abc"]
    for guest in guests:
        door.admit(guest.name, guest)
    assert door.withdraw_all() == guests[1:]
    assert not door.full


def test_pause_and_pump() -> None:
    """A paused door admits nobody, not even into free credits, until it is pumped open."""
    door, log = Door(3), Log()
    door.paused = True
    door.admit("a", Guest("a", log))
    door.pump()
    assert log == []
    door.paused = False
    door.pump()
    assert log == ["a"]


def test_resize_up_admits_at_once_and_down_takes_nothing_away() -> None:
    """A larger budget lets the next in; a smaller one is kept from the next release on."""
    door, log = Door(1), Log()
    for name in "abcd":
        door.admit("x", Guest(name, log))
    door.resize(3, None)
    assert log == ["a", "b", "c"]
    door.resize(1, None)
    assert door.used == 3
    door.release(0)
    door.release(0)
    assert log == ["a", "b", "c"]
    door.release(0)
    assert log == ["a", "b", "c", "d"]


def test_resize_refuses_nonsense() -> None:
    """A budget of nothing is refused and leaves the old one."""
    door = Door(3, 5)
    for frames, nbytes in ((0, None), (1, 0)):
        with pytest.raises(ConfigurationError):
            door.resize(frames, nbytes)
    assert (door.frames, door.nbytes) == (3, 5)


def test_an_entrant_may_settle_while_it_enters() -> None:
    """A credit that comes back during an entrance is given on once, without recursion."""
    door, log = Door(1), Log()

    class Quick(Guest):
        def enter(self) -> int | None:
            super().enter()
            door.release(0)
            return 0

    door.paused = True
    for i in range(3000):
        door.admit("x", Quick(str(i), log))
    door.paused = False
    door.pump()
    assert len(log) == 3000
    assert door.used == 0


@given(
    frames=st.integers(1, 4),
    nbytes=st.none() | st.integers(1, 50),
    moves=st.lists(
        st.tuples(st.sampled_from(["admit", "release", "withdraw", "resize"]), st.integers(0, 60)), max_size=60
    ),
)
def test_the_budget_holds(frames: int, nbytes: int | None, moves: list[tuple[str, int]]) -> None:
    """For any sequence of moves: nobody enters beyond the budget, nobody twice, nobody waits beside a free credit."""
    door, log = Door(frames, nbytes), Log()
    waiting: dict[str, Guest] = {}
    inside: list[Guest] = []

    class Visitor(Guest):
        def enter(self) -> int | None:
            assert len(inside) < door.frames
            assert not inside or door.nbytes is None or sum(g.nbytes for g in inside) + self.nbytes <= door.nbytes
            inside.append(waiting.pop(self.name))
            return self.nbytes

    for number, (move, amount) in enumerate(moves):
        if move == "admit":
            visitor = waiting[str(number)] = Visitor(str(number), log, nbytes=amount)
            door.admit(amount % 3, visitor)
        elif move == "release" and inside:
            door.release(inside.pop(amount % len(inside)).nbytes)
        elif move == "withdraw" and waiting:
            gone = waiting.pop(sorted(waiting)[amount % len(waiting)])
            assert door.withdraw(gone.nbytes % 3, gone)
        elif move == "resize":
            door.resize(amount % 4 + 1, nbytes)
        assert door.used == len(inside)
        assert door.used_bytes == sum(g.nbytes for g in inside)
        assert door.waiting == len(waiting)
        assert not waiting or inside
        if nbytes is None:
            assert not waiting or door.used >= door.frames

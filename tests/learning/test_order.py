"""Orders are numbers: how far ahead a stage may be, and who counts."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotime.learning.order import Order, event, interlocking, lockstep, one_forward_one_backward

STAGES = st.integers(1, 9).flatmap(lambda stages: st.tuples(st.integers(0, stages - 1), st.just(stages)))


@given(at=STAGES, split=st.booleans())
def test_the_orders_of_the_delayed_rule(at: tuple[int, int], split: bool) -> None:
    """S-1-k ahead, asked or counted; lock-step twice that; the top stage is never ahead."""
    stage, stages = at
    above = stages - 1 - stage
    assert event(stage, stages, split=split) == Order(above, split=split)
    assert one_forward_one_backward(stage, stages, split=split) == Order(above, strict=True, split=split)
    assert lockstep(stage, stages, split=split) == Order(2 * above, strict=True, split=split)


@given(at=STAGES, n=st.integers(1, 9))
def test_interlocking_lies_between_local_and_back_propagation(at: tuple[int, int], n: int) -> None:
    """A stage waits for the n-1 stages above it; with n = 1 for none, with n >= S for the model's loss."""
    stage, stages = at
    order = interlocking(stage, stages, n=n)
    assert order.ahead == min(n - 1, stages - 1 - stage)
    if n == 1:
        assert order.relays == () and order.reach in (0, None)
    if n >= stages:
        assert dataclasses.replace(order) == event(stage, stages)


def test_an_order_is_a_value() -> None:
    """Equal by its numbers and not to be changed, so that desks may share one."""
    assert Order() == Order(ahead=0, strict=False, batch=None, split=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Order().ahead = 3  # type: ignore[misc]

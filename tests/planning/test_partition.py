"""Tests of aiotime.planning.partition: exact, against every division there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotime.errors import PlanError
from aiotime.planning.partition import Partition, Problem, even, frontier, partition


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small ones, with devices of different speed, far and near, with and without limits, learning or not."""
    layers, devices = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    cost = st.integers(0, 20).map(float)
    nbytes = st.lists(st.integers(0, 10), min_size=layers, max_size=layers)
    links = {
        (source, target): draw(st.sampled_from([0.0, 0.5, 3.0]))
        for source in [None, *range(devices)]
        for target in range(devices)
    }
    parameter_bytes = draw(nbytes)
    learns = draw(st.booleans())
    inputs = draw(nbytes)

    def holding(first: int, stop: int, stage: int, stages: int) -> int:
        return sum(parameter_bytes[first:stop]) + inputs[first] * (stages - stage)  # a layer more may be less

    return Problem(
        seconds=[draw(st.lists(cost, min_size=layers, max_size=layers)) for _ in range(devices)],
        cut_bytes=draw(nbytes),
        parameter_bytes=parameter_bytes,
        memory=draw(st.lists(st.none() | st.integers(0, 40), min_size=devices, max_size=devices)),
        transfer=lambda nbytes, source, target: nbytes * links[source, target],
        back_bytes=draw(nbytes) if learns else (),
        joined=draw(st.sets(st.integers(1, layers))) if learns else (),
        holding=holding if learns else None,
    )


def held(problem: Problem, first: int, stop: int, stage: int, stages: int) -> int:
    """Bytes in a stage."""
    if problem.holding is not None:
        return problem.holding(first, stop, stage, stages)
    return sum(problem.parameter_bytes[first:stop])


def every(problem: Problem) -> list[Partition]:
    """All divisions that fit."""
    layers, devices = len(problem.cut_bytes), len(problem.seconds)
    found = []
    for stages in range(1, min(layers, devices) + 1):
        for cuts in itertools.combinations(range(1, layers), stages - 1):
            if set(cuts) & set(problem.joined):
                continue
            edges = [0, *cuts, layers]
            for chosen in itertools.combinations(range(devices), stages):
                runs = list(itertools.pairwise(edges))
                fits = all(
                    (limit := problem.memory[device]) is None or held(problem, first, stop, stage, stages) <= limit
                    for stage, ((first, stop), device) in enumerate(zip(runs, chosen, strict=True))
                )
                if fits:
                    seconds = tuple(
                        problem.stage_seconds(first, stop, source, device)
                        for (first, stop), source, device in zip(runs, [None, *chosen], chosen, strict=False)
                    )
                    found.append(Partition(tuple(stop - first for first, stop in runs), chosen, seconds))
    return found


def rank(division: Partition) -> tuple[float, int, float]:
    """What is to be minimised, in this order."""
    return division.bottleneck, len(division.sizes), sum(division.seconds)


@given(problems())
def test_no_division_is_better(problem: Problem) -> None:
    """The slowest stage, then the number of stages, then their sum are the least there are."""
    there = every(problem)
    if not there:
        with pytest.raises(PlanError, match="memory"):
            partition(problem)
        return
    assert rank(partition(problem)) == pytest.approx(min(map(rank, there)))


@given(problems())
def test_the_frontier_has_the_best_of_each_number_of_stages(problem: Problem) -> None:
    """Also of those that are slower than fewer stages."""
    there = every(problem)
    if not there:
        return
    found = {len(division.sizes): division for division in frontier(problem)}
    assert found.keys() == {len(division.sizes) for division in there}
    for stages, division in found.items():
        assert rank(division) == pytest.approx(min(rank(one) for one in there if len(one.sizes) == stages))
        assert division in there


@given(problems(), st.integers(1, 4))
def test_a_limit_on_stages_is_kept(problem: Problem, stages: int) -> None:
    """At most that many."""
    there = [one for one in every(problem) if len(one.sizes) <= stages]
    if there:
        assert rank(partition(problem, stages=stages)) == pytest.approx(min(map(rank, there)))


def test_a_layer_that_fits_nowhere_is_named() -> None:
    """With its bytes and the largest limit."""
    problem = Problem([[1.0, 1.0]] * 2, [0, 0], [10, 5000], [100, 4000], names=["small", "large"])
    with pytest.raises(PlanError, match=r"'large' needs 5,000 bytes .* 4,000"):
        partition(problem)


def test_a_model_that_does_not_fit_says_so() -> None:
    """Each layer would fit, all of them do not."""
    problem = Problem([[1.0] * 3] * 2, [0] * 3, [60] * 3, [100, 100], names=["a", "b", "c"])
    with pytest.raises(PlanError, match="180 bytes"):
        partition(problem)


def test_three_hundred_layers_on_eight_devices_are_divided() -> None:
    """Equal layers, equal stages."""
    problem = Problem([[1.0] * 304] * 8, [1] * 304, [1] * 304, [None] * 8)
    assert partition(problem).sizes == (38,) * 8


@given(st.integers(1, 50), st.integers(1, 50))
def test_even_sizes_differ_by_one_at_most(layers: int, stages: int) -> None:
    """And add up; more stages than layers are refused."""
    if stages > layers:
        with pytest.raises(PlanError, match="cannot make"):
            even(layers, stages)
        return
    sizes = even(layers, stages)
    assert sum(sizes) == layers
    assert len(sizes) == stages
    assert max(sizes) - min(sizes) <= 1


def test_what_a_layer_needs_to_learn_is_said() -> None:
    """And what all of them do, where each would fit."""
    alone = Problem([[1.0] * 2] * 2, [0] * 2, [10] * 2, [50, 40], names=["a", "b"], holding=lambda *stage: 60)
    with pytest.raises(PlanError, match=r"'a' needs 60 bytes to learn .* more than 50"):
        partition(alone)
    together = Problem(
        [[1.0] * 2], [0] * 2, [10] * 2, [50], holding=lambda first, stop, stage, stages: 30 * (stop - first)
    )
    with pytest.raises(PlanError, match=r"60 bytes to learn .* add devices"):
        partition(together)

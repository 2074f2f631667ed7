"""The experiments of AMPNet: their instances, their networks beside the same in plain PyTorch, toy runs."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmark by name; the benchmarks are no installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("__main__", "contest", "lists", "perceptron", "race", "trees")
    return {name: importlib.import_module(f"benchmarks.dynamic.{name}") for name in names}.__getitem__


def truth(tree: Any) -> str:
    """An expression of the trees in Python's own words."""
    if isinstance(tree, int):
        return str(tree)
    words = {
        "maximum": "max({0}, {1})",
        "minimum": "min({0}, {1})",
        "distance": "abs({0} - {1})",
        "mean": "math.floor(({0} + {1}) / 2 + 0.5)",
    }
    return words[tree[0]].format(truth(tree[1]), truth(tree[2]))


def depth(tree: Any) -> int:
    return 0 if isinstance(tree, int) else 1 + max(depth(tree[1]), depth(tree[2]))


def nodes(tree: Any) -> list[Any]:
    """Those with children, in post-order."""
    return [] if isinstance(tree, int) else [*nodes(tree[1]), *nodes(tree[2]), tree]


# ---------------------------------------------------------------------- instances


@pytest.mark.parametrize(
    ("operation", "digits", "expected"),
    [
        (0, [1, 2], 2),  # 1.5
        (0, [9, 9, 8], 9),
        (1, [7], 7),
        (1, [1, 4], 7),  # -3
        (1, [1, 0, 2, 2], 1),  # 1.5 - 1.0: a half goes up
        (1, [0, 1, 1, 1], 0),  # -0.5
        (2, [3, 9, 0], 9),
        (2, [4], 0),
        (3, [5] * 9, 9),
        (3, [5] * 10, 0),
    ],
)
def test_lists_reduce_as_the_paper_says(part: Any, operation: int, digits: Sequence[int], expected: int) -> None:
    """Mean, even minus odd, range, length; halves up, modulo 10."""
    assert part("lists").answer(operation, digits) == expected


def test_answers_are_within_a_half_of_what_is_asked(part: Any) -> None:
    """Of a thousand random lists, against the statistics module; every length and every answer occurs."""
    lists = part("lists")
    rng = random.Random(3)
    lengths, answers = set(), set()
    for _ in range(1_000):
        operation, digits = lists.one_list(rng)
        exact = (
            fmean(digits),
            fmean(digits[::2]) - (fmean(digits[1::2]) if len(digits) > 1 else 0.0),
            max(digits) - min(digits),
            len(digits),
        )[operation]
        answer = lists.answer(operation, digits)
        assert min(abs(exact - answer - turn) for turn in (-10, 0, 10)) <= 0.5 + 1e-9
        lengths.add(len(digits))
        answers.add(answer)
    assert lengths == set(range(1, 11))
    assert answers == set(range(10))


def test_a_list_has_an_answer_for_every_beginning(part: Any) -> None:
    """The last one is that of the whole list."""
    sample = part("lists").as_sample(0, [4, 6, 2])
    assert sample.target.tolist() == [4, 5, 4]
    assert [int(digit) for digit in sample.input[1]] == [4, 6, 2]


def test_trees_are_worth_what_python_says(part: Any) -> None:
    """Every node with children, in post-order, for two hundred trees; and they are as deep as was asked."""
    trees = part("trees")
    rng = random.Random(4)
    for number in range(200):
        tree = trees.expression(rng, number % 7)
        assert depth(tree) == number % 7
        sample = trees.as_sample(tree)
        assert sample.target.tolist() == [int(eval(truth(node))) for node in nodes(tree)]
        assert sample.input.number == len(sample.target) - 1


def test_deeper_trees_are_never_trained_on(part: Any) -> None:
    """The depths of the samples are those asked for."""
    trees = part("trees")
    problem = trees.Trees(validation=[])

    def depth_of(node: Any) -> int:
        return 0 if node.children is None else 1 + max(map(depth_of, node.children))

    assert {depth_of(sample.input) for sample in problem.samples(200, seed=0)} == set(trees.DEPTHS)
    assert {depth_of(sample.input) for sample in problem.samples(5, seed=0, depths=[7])} == {7}


# ---------------------------------------------------------------------- networks


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["lists", "trees"])
async def test_the_network_is_what_plain_pytorch_computes(part: Any, name: str) -> None:
    """The same first weights, the same logits, batched or not: what is timed side by side is the same work."""
    module = part(name)
    problem = (module.Lists if name == "lists" else module.Trees)(validation=[])
    samples = problem.samples(20, seed=1)
    network, own = problem.network(seed=5, max_batch=8), problem.network(seed=5, max_batch=1)
    predictions = [step.output async for step in network.run([(sample.input, None) for sample in samples])]
    for prediction, sample in zip(predictions, samples, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(prediction, problem.plain(own, sample.input), rtol=1e-4, atol=1e-5)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["lists", "trees"])
async def test_one_at_a_time_learns_what_plain_pytorch_learns(part: Any, name: str) -> None:
    """After 30 instances the weights of the two loops that are compared are the same, to rounding."""
    module, race = part(name), part("race")
    problem = (module.Lists if name == "lists" else module.Trees)(validation=[])
    samples = problem.samples(30, seed=2)
    plain = race.Plain(problem, race.Way("plain", 1e-3), seed=6)
    await plain.learn(samples)
    learner = race.Learner(problem, race.Way("one", 1e-3, keys=1, per="instance", max_batch=8), seed=6)
    await learner.learn(samples)
    theirs, ours = plain.network.state_dict(), learner.network.state_dict()
    await learner.aclose()
    start = problem.network(seed=6, max_batch=1).state_dict()
    assert max(float((theirs[key] - start[key]).abs().max()) for key in start) > 1e-3
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-4)


def test_the_running_mean_begins_as_a_plain_mean(part: Any) -> None:
    """Of the first states all count alike; the states themselves are copied."""
    mean = part("race").Mean()
    weight = torch.tensor([1.0])
    for value in (1.0, 3.0, 8.0):
        weight.fill_(value)
        mean.add({"weight": weight})
    assert mean.state()["weight"].item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("curve", "expected"), [([0.5, 0.8, 0.9], 2.0), ([0.5, 0.7, 0.9], 2.5), ([0.9], 0.8 / 0.9), ([0.7], math.inf)]
)
def test_passes_are_counted_between_two_looks(part: Any, curve: list[float], expected: float) -> None:
    """Straight lines from look to look, from nothing before the first."""
    assert part("perceptron").passes(curve, 0.8) == pytest.approx(expected)


# ---------------------------------------------------------------------- toy runs


@pytest.mark.parametrize("name", ["perceptron", "lists", "trees"])
def test_it_saves_tables_targets_and_curves(
    part: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toy run of each part, saved: the report, its figures as JSON, the learning curves."""
    main = part("__main__")
    monkeypatch.setattr(main, "__file__", str(tmp_path / "__main__.py"))
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["benchmarks.dynamic", name, "--quick", "--save", "toy"])
    try:
        main.main()
    finally:
        torch.set_num_threads(threads)
    saved = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert saved == [f"toy-{name}.json", f"toy-{name}.md", f"toy-{name}.png"]
    assert "**Targets**" in (tmp_path / "results" / f"toy-{name}.md").read_text()


def test_rates_are_tuned_with_as_many_candidates_for_each_way(
    part: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--tune: each way is tried with each rate, on a seed of its own, and takes the best."""
    contest, race = part("contest"), part("race")
    tried: list[tuple[str, float, int]] = []

    async def pretend(problem: Any, ways: Any, *, seed: int, leg: int, legs: int) -> Any:
        (way,) = ways
        tried.append((way.name, way.rate, seed))
        curve = race.Curve(way, accuracy=[1 - abs(way.rate - (0.1 if way.keys else 0.3))])
        return race.Result(seed, [curve], [])

    monkeypatch.setattr(contest, "race", pretend)

    class Silent:
        def table(self, *given: Any) -> None:
            pass

    ways = [race.Way("plain", 1.0), race.Way("network", 1.0, keys=4)]
    rates = {"plain": (0.1, 0.2, 0.3), "network": (0.1, 0.2, 0.3)}
    found = contest.tuned(Silent(), None, ways, rates, contest.Sizes(leg=1, legs=3, validation=1, seeds=1))
    assert [way.rate for way in found] == [0.3, 0.1]
    assert tried == [(way.name, rate, contest.TUNING_SEED) for way in ways for rate in (0.1, 0.2, 0.3)]


@pytest.mark.parametrize("name", ["lists", "trees"])
def test_both_sides_have_as_many_rates_to_choose_from(part: Any, name: str) -> None:
    """And the rate that is used without --tune is one of them."""
    module = part(name)
    assert len({len(rates) for rates in module.RATES.values()}) == 1
    assert all(way.rate in module.RATES[way.name] for way in module.WAYS)


def test_a_part_that_is_not_there_is_named(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are those that are."""
    monkeypatch.setattr("sys.argv", ["benchmarks.dynamic", "nonsense"])
    with pytest.raises(SystemExit):
        part("__main__").main()

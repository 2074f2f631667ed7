"""The study of learning rules: its streams, its networks side by side, its tuning and its memory of finished runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aiotime.frame import Sample
from aiotime.learning.replay import replay

ROOT = Path(__file__).parent.parent
RULES = ("exact", "delayed 1f1b", "delayed 1f1b + local heads", "local heads", "penalty, AuxNets", "block ADMM")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the study; the benchmarks are no installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("accuracy", "memory", "nets", "rules", "streams", "study", "trial", "tuning")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.learning.{name}") for name in names})


def trial_of(study: Any, rule: str, **changed: Any) -> Any:
    """A short run on the smooth digits."""
    given = {
        "stream": "digits-smooth",
        "frames": 48,
        "rule": rule,
        "stages": 4,
        "optimizer": "RMSprop",
        "rate": 1e-3,
        "knob": 0,
        "seeds": (0, 1),
    }
    return study.trial.Trial(**{**given, **changed})


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize("name", ["digits", "digits-smooth", "digits-replay", "video-place", "video-next"])
def test_a_stream_is_what_its_seeds_say(study: Any, name: str) -> None:
    """The same seeds give the same stream, and a member's share of it depends on its own seed alone."""
    both, again, one = (study.streams.make(name, 40, seeds) for seeds in ((3, 4), (3, 4), (4,)))
    assert torch.equal(both.frames, again.frames)
    assert torch.equal(both.targets, again.targets)
    assert len(both) == 40
    if name.startswith("digits"):
        assert torch.equal(both.frames[:, 1:], one.frames)
        assert not torch.equal(both.frames[:, :1], both.frames[:, 1:])
    else:
        assert torch.equal(both.frames[:, :, 6:], one.frames)
        assert not torch.equal(both.frames[:, :, :6], one.frames)


def test_a_smooth_scene_blends_within_a_class(study: Any) -> None:
    """16 equal steps, one label, then a cut; where a scene is one frame, it is a digit as it is."""
    stream = study.streams.make("digits-smooth", 64, (0,))
    frames, labels = stream.frames[:, 0, 0].view(4, 16, 64), stream.targets.view(4, 16)
    assert (labels == labels[:, :1]).all()
    steps = frames.diff(dim=1)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps))
    within, across = steps.norm(dim=2).max(), (frames[1:, 0] - frames[:-1, 15]).norm(dim=1).min()
    assert within < across
    assert [sample.cut for sample in stream.samples(cuts=True)] == [at in (16, 32, 48) for at in range(64)]
    assert not any(sample.cut for sample in stream.samples())
    single = study.streams.make("digits-smooth", 20, (0,), per_digit=1).frames
    assert torch.equal(single * 16, (single * 16).round())


def test_the_replay_stream_is_that_of_the_package(study: Any) -> None:
    """Windows as `aiotime.learning.replay` makes them of the same digits."""
    window = study.streams.WINDOW
    plain = study.streams.make("digits", 10 + window - 1, (5,))
    source = [Sample(frame[0], target[0]) for frame, target in zip(plain.frames, plain.targets, strict=True)]
    expected = list(replay(source, window=window))[window - 1 :]
    stream = study.streams.make("digits-replay", 10, (5,))
    for frame, target, sample in zip(stream.frames, stream.targets, expected, strict=True):
        assert torch.equal(frame[0], sample.input)
        assert torch.equal(target[0], sample.target)


def test_features_are_standardised_by_what_came_so_far(study: Any) -> None:
    """Mean and deviation of the values up to now, this one included; a feature that never changed is 0."""
    values = torch.tensor([[1.0, 7.0], [3.0, 7.0], [8.0, 7.0]], dtype=torch.float64)
    running = study.streams.Running(2)
    for at, value in enumerate(values, start=1):
        running.add(value)
        so_far = values[:at, 0]
        deviation = so_far.std(correction=0)
        expected = 0.0 if at == 1 else float((value[0] - so_far.mean()) / deviation)
        assert running.scaled(value).tolist() == pytest.approx([expected, 0.0])


@pytest.mark.parametrize("name", ["phishing", "bananas", "image-segments", "trump-approval"])
def test_river_brings_its_streams(study: Any, name: str) -> None:
    """All members see the same frames, and each frame's features are numbers."""
    pytest.importorskip("river")
    stream = study.streams.make(name, 50, (0, 1))
    assert stream.frames.shape[:3] == (50, 2, 1)
    assert stream.frames.isfinite().all()
    assert torch.equal(stream.frames[:, 0], stream.frames[:, 1])
    if stream.task.kind == "classes":
        assert int(stream.targets.max()) < stream.task.outputs[0]


def test_r_squared_is_one_minus_the_unexplained_share(study: Any) -> None:
    """1 where all is right, 0 for the mean, never below -1, also where it diverged."""
    task = study.nets.Task("values", (1,), (1,))
    targets = torch.randn(30, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    outputs = targets.clone()
    outputs[:, 1] = targets[:, 1].mean()
    outputs[:, 2] = 100.0
    outputs[:, 3] = float("nan")
    scores = task.score(task.right(outputs, targets, members=4), targets)
    assert scores == pytest.approx([1.0, 0.0, -1.0, -1.0], abs=1e-5)


# ---------------------------------------------------------------------- networks and runs


@pytest.mark.parametrize("rule", RULES)
def test_members_learn_as_if_they_were_alone(study: Any, rule: str) -> None:
    """Two networks side by side answer, frame by frame, as each does in a pipeline of its own."""
    stream, frames = "video-next", 12  # its score is a number, so that hardly anything would go unseen
    both, first, second = (
        study.trial.run(
            trial_of(study, rule, stream=stream, frames=frames, stages=2, optimizer="SGD", rate=1e-2, seeds=seeds)
        )
        for seeds in ((6, 7), (6,), (7,))
    )
    assert both.error is None
    assert both.scores == pytest.approx([*first.scores, *second.scores], abs=2e-5)  # they are rounded


def test_the_event_order_lies_between_1f1b_and_exact(study: Any) -> None:
    """At full load it is the strict order, at a quarter of it nothing is late any more; at half load some is."""
    outcomes = {
        rule: study.trial.run(trial_of(study, rule))
        for rule in (
            "delayed 1f1b",
            "delayed event, full load",
            "delayed event, half load",
            "delayed event, quarter load",
            "exact",
        )
    }
    strict, full, half, quarter, exact = outcomes.values()
    assert (full.scores, full.curve, full.delay) == (strict.scores, strict.curve, 3.0)
    assert (quarter.scores, quarter.curve, quarter.delay) == (exact.scores, exact.curve, 0.0)
    assert 0.0 < half.delay < 3.0


def test_every_rule_runs(study: Any) -> None:
    """None of the table's lines fails over four stages, and each has as many settings to try as the others."""
    for row in study.rules.ROWS:
        trials = row.trials()
        assert len(set(trials)) == len(trials) == study.rules.TRIALS, row.name
        optimizer, rate, knob = trials[-1]
        outcome = study.trial.run(
            trial_of(study, row.name, frames=10, optimizer=optimizer, rate=rate, knob=knob, seeds=(0,))
        )
        assert outcome.error is None, (row.name, outcome.error)


def test_a_rule_that_fails_is_an_outcome(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its reason in place of figures."""

    def broken(setup: Any) -> Any:
        raise RuntimeError("no such luck\nand more")

    row = study.rules.Row("broken", broken)
    monkeypatch.setitem(study.rules.BY_NAME, "broken", row)
    outcome = study.trial.run(trial_of(study, "broken"))
    assert outcome.error == "RuntimeError: no such luck"
    assert outcome.scores == []


# ---------------------------------------------------------------------- the study


def test_finished_runs_are_not_run_again(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that was interrupted, even in the middle of a line, goes on where it was."""
    ran: list[Any] = []

    def pretend(trial: Any) -> Any:
        ran.append(trial)
        return study.trial.Outcome([0.5], [0.5], 1.0, 0.1)

    monkeypatch.setattr(study.study, "run", pretend)
    trials = [trial_of(study, "exact", rate=rate) for rate in (0.1, 0.2, 0.3)]
    cache = tmp_path / "runs.jsonl"
    study.study.Study(processes=1, cache=cache).run(trials[:2])
    with cache.open("a") as file:
        file.write('{"trial": {"stre')
    before = cache.read_text()
    resumed = study.study.Study(processes=1, cache=cache)
    outcomes = resumed.run([*trials, trials[0]])
    assert ran == trials
    assert list(outcomes) == trials
    assert resumed.ran == 1
    assert cache.read_text().startswith(before)
    assert [trial for trial, _ in study.study.read(cache)] == trials
    assert all(json.loads(line) for line in cache.read_text().splitlines() if not line.startswith(before[-16:]))


def test_tuning_is_alike_for_all_and_apart_from_what_counts(study: Any) -> None:
    """Each round keeps the best, every rule has the same number of runs, on seeds that no table uses."""
    seen: list[Any] = []
    rows = [study.rules.BY_NAME[name] for name in ("exact", "delayed 1f1b", "interlocking")]
    best = 1e-2

    class Pretended:
        def run(self, trials: Any, *, what: str = "") -> Any:
            trials = list(trials)
            seen.extend(trials)
            return {
                trial: study.trial.Outcome([-abs(trial.rate - best)] * 2, [], 0.0, 0.0)
                if trial.optimizer == "SGD"
                else study.trial.Outcome([], [], 0.0, 0.0, "failed")
                for trial in trials
            }

    rounds = [study.tuning.Round(12, 10), study.tuning.Round(3, 20)]
    chosen = study.tuning.tune(
        Pretended(), {row: study.tuning.grid(row, 12) for row in rows}, rounds, stream="digits", stages=4
    )
    assert {setting.rate for setting in chosen.values()} == {best}
    for row in rows:
        mine = [trial for trial in seen if trial.rule == row.name]
        assert [trial.frames for trial in mine] == [10] * 12 + [20] * 3
    assert not set(study.tuning.SEEDS) & set(study.accuracy.Sizes().seeds)
    sizes = study.accuracy.Sizes(scale=0.5)
    assert all(one.frames <= sizes.frames(name) // 2 for name in sizes.streams for one in sizes.cut(sizes.rounds, name))


def test_the_gap_closed(study: Any) -> None:
    """0 % is Sideways, 100 % Exact; nothing is said where there is no gap."""
    assert study.accuracy.closed(0.95, exact=0.97, sideways=0.87) == pytest.approx(80.0)
    assert study.accuracy.closed(0.95, exact=0.95, sideways=0.949) is None


def test_the_ledger_counts_a_storage_once(study: Any) -> None:
    """While any graph holds it, and not longer."""
    ledger = study.memory.Ledger()
    weight = torch.rand(8, 8, requires_grad=True)
    with ledger.watching():
        x = torch.rand(8, 8, requires_grad=True)
        outputs = [x @ weight, x @ weight]
    nbytes = 8 * 8 * 4
    assert ledger.total(set()) == 2 * nbytes
    assert ledger.total({weight.untyped_storage().data_ptr()}) == nbytes
    outputs.pop()
    assert ledger.total(set()) == 2 * nbytes
    outputs.pop()
    assert ledger.total(set()) == 0
    with ledger.watching():
        rectified = torch.rand(8, 8, requires_grad=True).relu()  # the graph saves its own output
    assert ledger.total(set()) == nbytes
    del rectified
    assert ledger.total(set()) == 0

"""Tests of ``aiotime demo`` on a few digits, and of its training on all of them."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
import json
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner

import aiotime
from aiotime.cli import digits as digits_module
from aiotime.cli import learning as learning_demo
from aiotime.cli.commands import commands
from aiotime.cli.versus import THREADS, Versus, compare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """What the demo does with torch's threads stays in its test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on 64 digits, one epoch: a second instead of twenty."""
    load = digits_module.load

    def load_few(*, seed: int) -> digits_module.Digits:
        digits = load(seed=seed)
        return dataclasses.replace(digits, train_images=digits.train_images[:64], train_labels=digits.train_labels[:64])

    monkeypatch.setattr(digits_module, "load", load_few)
    monkeypatch.setattr(digits_module, "EPOCHS", 1)


def test_the_split_is_fixed_and_clean() -> None:
    """The same seed gives the same digits; no held-back one was trained on; all are there."""
    one, two, other = (digits_module.load(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.test_images, two.test_images)
    assert not torch.equal(one.test_images, other.test_images)
    assert len(one.train_images) + len(one.test_images) == 1797
    assert one.frame(3).shape == (1, 1, 8, 8)
    assert 0 <= float(one.train_images.min()) < float(one.train_images.max()) == 1
    assert len(set(one.test_labels.tolist())) == 10


def test_the_halves_are_the_whole_model() -> None:
    """The fixed cut covers every layer, and about half of the multiplications lie before it."""
    model = digits_module.build()
    assert sum(digits_module.HALVES) == len(model)
    work = []

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        weights = getattr(module, "weight", None) if isinstance(module, torch.nn.Conv2d) else None
        work.append(0 if weights is None else weights.numel() * output.shape[-1] * output.shape[-2])

    for layer in model:
        layer.register_forward_hook(count)
    model(torch.zeros(1, 1, 8, 8))
    assert sum(work[: digits_module.HALVES[0]]) / sum(work) == pytest.approx(0.5, abs=0.05)


@pytest.mark.usefixtures("few")
def test_the_demo_runs_through(tmp_path: Path) -> None:
    """Every part reports; the pipeline's predictions are the model's own; trace and picture are written."""
    pytest.importorskip("matplotlib")
    options = ["--frames", "20", "--rate", "500", "--rounds", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(commands, ["demo", "predict", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "fitted a CNN on 64 digits" in result.stdout
    assert "two cameras at 500 frames/s" in result.stdout
    assert result.stdout.count("accuracy on unseen digits") == 2
    assert "20 of 20 predictions are those of the model alone" in result.stdout
    assert "the model alone, 1 thread" in result.stdout
    assert "the model alone, 2 threads" in result.stdout
    assert "pipeline on" in result.stdout
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert trace["traceEvents"]
    assert (tmp_path / "out" / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_takes_turns() -> None:
    """Each way has a rate for each round, and rounds are announced."""
    frames = [torch.rand(1, 4) for _ in range(5)]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    pipeline = aiotime.Pipeline(copy.deepcopy(model), example=frames[0], devices=["cpu:0", "cpu:1"], balance="even")
    rounds: list[int] = []

    async def main() -> Versus:
        async with pipeline:
            return await compare(pipeline, model, frames, rounds=3, after=rounds.append)

    versus = asyncio.run(main())
    assert rounds == [1, 2, 3]
    assert [len(rates) for rates in versus.rates] == [3] * (len(THREADS) + 1)
    assert all(rate > 0 for rates in versus.rates for rate in rates)


def test_ratios_are_taken_round_by_round() -> None:
    """A round in which everything was slow counts as much as the others."""
    versus = Versus(("a", "b", "ours"), ((100.0, 10.0, 100.0), (50.0, 5.0, 50.0), (150.0, 15.0, 250.0)))
    assert versus.ratios(0) == [1.5, 1.5, 2.5]
    assert versus.ratios(1) == [3.0, 3.0, 5.0]
    assert versus.median(2) == 150.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_training_reaches_its_accuracy() -> None:
    """Fitted as the demo fits it, the CNN knows at least 97 % of the digits it has not seen."""
    digits = digits_module.load(seed=0)
    steps: list[int] = []
    model = digits_module.fit(digits, seed=0, progress=lambda done, _: steps.append(done))
    with torch.inference_mode():
        right = (model(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    assert float(right) >= 0.97
    assert steps == list(range(1, steps[-1] + 1))


def test_the_learning_demo_runs_through(tmp_path: Path) -> None:
    """Every rule learns on both streams, each frame is scored once, and curves, timeline and trace are written."""
    pytest.importorskip("matplotlib")
    options = ["--frames", "24", "--out", str(tmp_path / "out")]
    wide = {"COLUMNS": "160"}
    result = CliRunner().invoke(commands, ["demo", *options], catch_exceptions=False, env=wide)
    assert result.exit_code == 0, result.output
    for name in ("Exact", "Sideways", "Delayed (the default)", "Delayed, local heads"):
        assert result.output.count(name) == 4  # as it ends, and in the table
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curves.png", "timeline.png", "trace.json"}
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert any("backward" in str(event.get("name")) for event in trace["traceEvents"])


def test_the_streams_are_what_they_say() -> None:
    """Unrelated digits come once each; the smooth stream moves by fifteenths and names the nearer digit."""
    samples = learning_demo.unrelated(0, None)
    assert len(samples) == 1797
    blended = learning_demo.smooth(0, 32)
    first, last = samples[0], samples[1]
    assert torch.equal(blended[0].input, first.input)
    assert torch.allclose(blended[15].input, last.input)
    assert [int(sample.target) for sample in blended[:16]] == [int(first.target)] * 8 + [int(last.target)] * 8
    steps = [float((a.input - b.input).abs().max()) for a, b in itertools.pairwise(blended[:16])]
    assert max(steps) <= 1 / 15 + 1e-6
    assert torch.equal(blended[16].input, samples[2].input)  # a cut


def test_a_curve_counts_what_it_is_given() -> None:
    """The accuracies of a curve are shares of its frames."""
    curve = learning_demo.Curve("rule", "stream", 8)
    for right in (False, False, False, True, True, True, True, False):
        curve.add(right)
    assert (curve.recent, curve.second_half) == (0.5, 0.75)
    assert len(curve.bars(4)) == 4

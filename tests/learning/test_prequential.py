"""Prequential evaluation: every score is of a prediction made before its frame was learned from."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aiotime import LATER, Pipeline, Sample, Stage
from aiotime.errors import ConfigurationError
from aiotime.learning import Delayed, Exact, Rule
from aiotime.learning.prequential import Point, PrequentialResult, accuracy, prequential
from aiotime.learning.replay import replay

SGD = partial(torch.optim.SGD, lr=0.1)


def samples(frames: int = 40) -> list[Sample]:
    """Two classes that a line tells apart."""
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(frames, 1, 4, generator=generator)
    return [Sample(x, (x[:, 0] > 0).long()) for x in xs]


def network() -> nn.Sequential:
    """Two layers, two stages."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


async def build(rule: Rule | None, *, rows: int = 1) -> Pipeline:
    """Two stages on two workers."""
    devices = ["cpu:0", "cpu:1"]
    example = torch.zeros(rows, 4)
    return await asyncio.to_thread(Pipeline, network(), example=example, devices=devices, balance=[2, 1], learner=rule)


RULES: dict[str, Callable[..., Rule]] = {"exact": Exact, "event": Delayed, "1f1b": partial(Delayed, order="1f1b")}


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("rule", RULES)
async def test_no_frame_is_learned_from_before_its_prediction_is_made(rule: str) -> None:
    """A spy in the loss and one in the optimizer: a frame is predicted before it updates the stage."""
    events: list[str] = []
    lock = threading.Lock()

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with lock:
                events.append("update")
            super().step(closure)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with lock:
            events.append("predicted")
        return cross_entropy(output, target)

    top = Stage(nn.Linear(4, 2), name="top", device="cpu:0")  # one stage: every update is the top's
    pipeline = await asyncio.to_thread(
        lambda: Pipeline.from_stages([top], learner=RULES[rule](loss=loss, optimizer=partial(Spy, lr=0.1)))
    )
    async with asyncio.timeout(20):
        result = await prequential(pipeline, samples())
    assert result.frames == 40
    assert events == ["predicted", "update"] * 40


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_the_scores_are_those_of_a_plain_predict_then_learn_loop() -> None:
    """Accuracy, losses and the curve's means, frame by frame."""
    pipeline = await build(Exact(loss=cross_entropy, optimizer=SGD))
    async with asyncio.timeout(20):
        result = await prequential(pipeline, samples(), window=10, every=4)
    model = network()
    optimizer = SGD(model.parameters())
    right = []
    for sample, loss in zip(samples(), result.losses, strict=True):
        output = model(sample.input)
        right.append(float(output.argmax(1) == sample.target))
        value = cross_entropy(output, sample.target)
        assert loss == pytest.approx(value.item(), rel=1e-5)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert list(result.scores) == right
    assert result.mean == pytest.approx(sum(right) / 40)
    assert [point.frames for point in result.curve] == list(range(4, 41, 4))
    assert result.curve[-1].score == pytest.approx(sum(right[-10:]) / 10)
    assert result.curve[-1].loss == pytest.approx(sum(result.losses[-10:]) / 10)
    assert result.curve[-1].mean == result.mean
    assert result.tail(0.25) == pytest.approx(sum(right[-10:]) / 10)
    assert result.delays == (((0, 40),), ((0, 40),))


@pytest.mark.asyncio
async def test_progress_comes_while_it_runs_and_the_rest_at_the_end() -> None:
    """A point every 15 frames and one for the last ten; the result afterwards is the whole."""
    pipeline = await build(Delayed(order="1f1b", loss=cross_entropy, optimizer=SGD))
    evaluation = prequential(pipeline, samples(), every=15, window=15)
    async with asyncio.timeout(20):
        points = [point async for point in evaluation]
    assert [point.frames for point in points] == [15, 30, 40]
    assert tuple(points) == evaluation.result.curve
    assert evaluation.result.delays[0] == ((0, 1), (1, 39))  # exactly one update late once it is full
    assert evaluation.result.delay_means == (39 / 40, 0.0)
    assert evaluation.result.seconds > 0


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_frames_without_target_are_predicted_and_not_scored() -> None:
    """Nor are those whose target comes later."""
    stream = samples(12)
    stream[3] = Sample(stream[3].input)
    stream[7] = Sample(stream[7].input, LATER, key=7)
    pipeline = await build(Delayed(loss=cross_entropy, optimizer=SGD))
    async with asyncio.timeout(20):
        result = await prequential(pipeline, stream)
    assert (result.frames, result.unscored) == (10, 2)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_model_that_does_not_learn_is_scored_too() -> None:
    """No losses, no delays: what standing still would have reached."""
    pipeline = await build(None)
    async with asyncio.timeout(20):
        result = await prequential(pipeline, samples())
    model = network()
    assert result.scores == tuple(accuracy(model(sample.input), sample.target) for sample in samples())
    assert result.delays == () and all(map(math.isnan, result.losses))


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_behind_replay_only_the_newest_row_counts() -> None:
    """The others have been learned from before."""
    seen: list[tuple[int, int]] = []

    def spy(output: torch.Tensor, target: torch.Tensor) -> float:
        seen.append((len(output), int(target[-1])))
        return accuracy(output, target)

    pipeline = await build(Exact(loss=cross_entropy, optimizer=SGD), rows=4)
    async with asyncio.timeout(20):
        result = await prequential(pipeline, replay(samples(), window=4), metric=spy, newest=1)
    assert seen == [(1, int(sample.target)) for sample in samples()]
    assert (result.metric, set(result.scores)) == ("spy", {0.0, 1.0})


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_the_loss_itself_can_be_the_score() -> None:
    """For regression, say."""
    pipeline = await build(Exact(loss=cross_entropy, optimizer=SGD))
    async with asyncio.timeout(20):
        result = await prequential(pipeline, samples(), metric="loss")
    assert result.scores == result.losses and result.mean == pytest.approx(sum(result.losses) / 40)


@pytest.mark.asyncio
async def test_left_early_it_keeps_what_it_found() -> None:
    """And leaves nothing running; an evaluation that was never begun may be closed as well."""
    pipeline = await build(Exact(loss=cross_entropy, optimizer=SGD))
    async with asyncio.timeout(20), pipeline:
        async with prequential(pipeline, samples(), every=5) as evaluation:
            async for point in evaluation:
                assert point.frames == 5
                break
        assert evaluation.result.frames == 5
        with pytest.raises(StopAsyncIteration):
            await anext(evaluation)
        await prequential(pipeline, samples()).aclose()
        assert not pipeline._engine or not pipeline._engine.runs


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_metric_that_does_not_fit_ends_it_with_the_shapes() -> None:
    """The run is closed, the error says what was compared."""
    stream = [Sample(sample.input, torch.zeros(1, 3)) for sample in samples()]
    pipeline = await build(None)
    async with asyncio.timeout(20), pipeline:
        with pytest.raises(ConfigurationError, match=r"not \(1, 2\) with \(1, 3\)"):
            async for _ in prequential(pipeline, stream):
                pass
        assert not pipeline._engine or not pipeline._engine.runs


@pytest.mark.parametrize(
    ("output", "target", "right"),
    [
        (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]), 0.5),
        (torch.tensor([0.0, 1.0, 0.0]), torch.tensor(1), 1.0),
        (torch.tensor([0.0, 1.0, 0.0]), 1, 1.0),
        (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.8]]), 1.0),
        (torch.eye(2).reshape(1, 2, 2, 1), torch.tensor([[[0], [1]]]), 1.0),
    ],
    ids=["rows", "one", "number", "scores", "picture"],
)
def test_accuracy_reads_classes_where_cross_entropy_does(output: torch.Tensor, target: Any, right: float) -> None:
    """Dim 1 of a batch, dim 0 of a single frame; targets are class numbers or scores."""
    assert accuracy(output, target) == right


@pytest.mark.parametrize("output", [torch.zeros(3, 1), torch.zeros(()), torch.zeros(2, 3), [1, 2]])
def test_accuracy_of_anything_else_is_refused(output: Any) -> None:
    """A single score per row has no greatest one."""
    with pytest.raises(ConfigurationError, match="hand in a callable"):
        accuracy(output, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"every": 0}, {"newest": 0}, {"metric": "f1"}], ids=lambda options: next(iter(options))
)
def test_arguments_that_cannot_work_are_refused_at_once(options: dict[str, Any]) -> None:
    """Before anything is pulled."""
    pipeline = Pipeline.from_stages([abs])
    with pytest.raises(ConfigurationError):
        prequential(pipeline, [], **options)


def found(**changes: Any) -> PrequentialResult:
    """A result of 40 frames."""
    values: dict[str, Any] = {
        "metric": "accuracy",
        "window": 10,
        "frames": 40,
        "unscored": 3,
        "mean": 0.75,
        "curve": tuple(Point(at, at / 40, at / 80, 1.0) for at in range(1, 41)),
        "scores": (0.5, 1.0) * 20,
        "losses": (1.0,) * 40,
        "delays": (((0, 10), (1, 30)), ((0, 40),)),
        "seconds": 2.0,
    }
    return PrequentialResult(**values | changes)


def test_a_result_prints_as_a_table() -> None:
    """A heading with the numbers, a dozen lines of the curve; nothing breaks where nothing was found."""
    lines = str(found()).splitlines()
    assert lines[0] == (
        "accuracy 0.7500 over 40 frames in 2.00 s, 3 more without target; mean delay by stage 0.75, 0.00"
    )
    assert lines[2].split() == ["frames", "newest", "so", "far", "loss"]
    assert len(lines) <= 3 + 12 and lines[-1].split() == ["40", "1.0000", "0.5000", "1"]
    assert "nan" in str(found(curve=(), scores=(), losses=(), frames=0, mean=math.nan, delays=()))
    assert str(found().curve[0]) == "1 frames: 0.0250 newest, 0.0125 so far, loss 1"


def test_a_result_prints_in_rich() -> None:
    """The same cells."""
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(found())
    assert "1.0000" in console.export_text()


def test_the_tail_is_a_share_of_the_frames() -> None:
    """At least one of them."""
    assert found().tail() == 0.75 and found().tail(0.01) == 1.0
    with pytest.raises(ConfigurationError, match="above 0 and up to 1"):
        found().tail(0)


def test_curves_are_drawn_beside_each_other(tmp_path: Path) -> None:
    """One picture; a suffix that is none's is refused."""
    found().plot(tmp_path / "curves.png", name="Delayed", beside={"Exact": found(curve=(Point(40, 1.0, 1.0, 0.0),))})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigurationError, match="no picture's"):
        found().plot(tmp_path / "curves.text")

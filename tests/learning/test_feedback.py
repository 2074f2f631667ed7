"""Targets that come late or never, samples that do not fit, endings in the middle: what is learned, what is said."""

from __future__ import annotations

import asyncio
import math
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from aiotime import LATER, Pipeline, Prediction, Sample, SimulatedDevice, Stage, VirtualClock
from aiotime.errors import AiotimeError, ClosedError, ConfigurationError, FeedbackError, InputError
from aiotime.learning import Delayed, Exact, Rule
from aiotime.learning.learner import StageLearner

if TYPE_CHECKING:
    from tests.conftest import Settle

SGD = partial(torch.optim.SGD, lr=0.1)


def network() -> nn.Sequential:
    """Six layers: stages of 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))


def samples(frames: int = 20) -> list[Sample]:
    """Labelled frames; the key of each is its number."""
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(frames, 1, 6, generator=generator)
    ys = torch.randint(0, 4, (frames, 1), generator=generator)
    return [Sample(x, y, key=at) for at, (x, y) in enumerate(zip(xs, ys, strict=True))]


def late(sample: Sample) -> Sample:
    """The same, its target to come."""
    return Sample(sample.input, LATER, key=sample.key)


async def build(
    rule: Rule | None = None, *, model: nn.Module | None = None, balance: Sequence[int] = (2, 2, 2), **options: Any
) -> Pipeline:
    """One CPU worker for each stage."""
    rule = rule or Delayed(loss=cross_entropy, optimizer=SGD)
    devices = [f"cpu:{at}" for at in range(len(balance))]
    chosen: dict[str, Any] = {"example": torch.zeros(1, 6), "devices": devices, "balance": list(balance)} | options
    return await asyncio.to_thread(lambda: Pipeline(model or network(), learner=rule, **chosen))


async def learn(pipeline: Pipeline, stream: Any, **options: Any) -> list[Prediction]:
    """All predictions."""
    return [prediction async for prediction in pipeline.run(stream, **options)]


def learned(pipeline: Pipeline) -> list[int]:
    """Frames learned from, per learning stage."""
    return [stage.learning.frames for stage in pipeline.stats().stages if stage.learning is not None]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def hands(pipeline: Pipeline) -> list[StageLearner]:
    """What learns, by stage."""
    return [spec.hands for spec in pipeline._specs if isinstance(spec.hands, StageLearner)]


# ------------------------------------------------------------------ late targets


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("rule", [Exact, Delayed], ids=lambda rule: str(rule.__name__))
async def test_a_late_target_is_learned_as_if_it_had_come_with_the_frame(rule: type[Rule]) -> None:
    """One after the other: loss and weights are those of labelled frames, and ``feedback`` says the loss."""
    one, two = [await build(rule(loss=cross_entropy, optimizer=SGD)) for _ in range(2)]
    async with asyncio.timeout(20), one, two:
        for sample in samples():
            labelled = await one.submit(sample)
            await one._engine.flush()  # type: ignore[union-attr]
            predicted = await two.submit(late(sample))
            assert predicted.loss is None and torch.equal(predicted.output, labelled.output)
            assert await two.feedback(sample.key, sample.target) == labelled.loss
    assert same(one.state_dict(), two.state_dict())
    assert learned(two) == [20, 20, 20]


@pytest.mark.asyncio
async def test_late_targets_come_in_any_order_while_a_run_goes_on() -> None:
    """Every frame is learned from once; the run delivers all predictions."""
    pipeline = await build()
    async with asyncio.timeout(20), pipeline:
        mixed = [late(sample) if at % 2 else sample for at, sample in enumerate(samples())]
        predictions = await learn(pipeline, mixed)
        assert learned(pipeline) == [10, 10, 10]
        waiting = [sample for sample in samples() if sample.key in range(1, 20, 2)]
        given = [await pipeline.feedback(sample.key, sample.target) for sample in reversed(waiting)]
        assert learned(pipeline) == [20, 20, 20]
    assert [prediction.key for prediction in predictions] == list(range(20))
    assert [prediction.loss is None for prediction in predictions] == [False, True] * 10
    assert all(map(math.isfinite, given)) and len(given) == 10


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_target_is_taken_once_and_only_for_a_frame_that_waits() -> None:
    """A second one, one for an unknown key, a labelled frame or one without target are refused with the reasons."""
    pipeline = await build()
    first, second, third, *_ = samples()
    async with asyncio.timeout(20), pipeline:
        await pipeline.submit(late(first))
        await pipeline.submit(second)
        await pipeline.submit(Sample(third.input, key=third.key))
        await pipeline.feedback(first.key, first.target)
        for key in (first.key, second.key, third.key, "nobody"):
            with pytest.raises(FeedbackError, match=f"no frame with key {key!r} waits for its target"):
                await pipeline.feedback(key, first.target)
        assert learned(pipeline) == [2, 2, 2]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_the_oldest_is_given_up_for_newer_ones() -> None:
    """With ``late=3`` the frame before the newest three can have no target any more, and nothing of it is kept."""
    pipeline = await build(Delayed(loss=cross_entropy, optimizer=SGD, late=3))
    async with asyncio.timeout(20), pipeline:
        await learn(pipeline, [late(sample) for sample in samples(8)])
        with pytest.raises(FeedbackError, match="given up after 3 newer ones"):
            await pipeline.feedback(4, samples()[4].target)
        for key in (6, 5, 7):
            await pipeline.feedback(key, samples()[key].target)
        await learn(pipeline, samples(1))
        assert [len(each.kept) for each in hands(pipeline)] == [0, 0, 0]
        assert learned(pipeline) == [4, 4, 4]


@pytest.mark.asyncio
async def test_one_given_up_on_its_way_keeps_nothing_either(settle: Settle) -> None:
    """It is given up while it waits before the second stage: what came after it has pushed it out."""
    inside, gate = threading.Event(), threading.Event()

    def gated(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        gate.wait(20)
        return x

    stages: list[Any] = [Stage(nn.Linear(6, 6), name="a"), gated, Stage(nn.Linear(6, 4), name="b")]
    rule = Delayed(loss=cross_entropy, optimizer=SGD, late=1)
    pipeline = await asyncio.to_thread(lambda: Pipeline.from_stages(stages, learner=rule, depth=4))
    async with asyncio.timeout(20), pipeline, asyncio.TaskGroup() as group:
        tasks = [group.create_task(pipeline.submit(late(sample))) for sample in samples(3)]
        await asyncio.to_thread(inside.wait, 20)
        await settle()
        gate.set()
        await asyncio.wait(tasks)
        await pipeline.feedback(2, samples()[2].target)
        await pipeline.submit(samples()[3])
        await pipeline._engine.flush()  # type: ignore[union-attr]
        assert [len(each.kept) for each in hands(pipeline)] == [0] * len(hands(pipeline))


@pytest.mark.asyncio
async def test_a_target_may_be_faster_than_the_forward(settle: Settle) -> None:
    """Given while the frame is between two stages: learned from when it has come through."""
    inside, gate = threading.Event(), threading.Event()

    def gated(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        gate.wait(20)
        return x

    stages: list[Any] = [Stage(nn.Linear(6, 6), name="a"), gated, Stage(nn.Linear(6, 4), name="b")]
    rule = Delayed(loss=cross_entropy, optimizer=SGD)
    pipeline = await asyncio.to_thread(lambda: Pipeline.from_stages(stages, learner=rule))
    sample = samples()[0]
    async with asyncio.timeout(20), pipeline, asyncio.TaskGroup() as group:
        request = group.create_task(pipeline.submit(late(sample)))
        await asyncio.to_thread(inside.wait, 20)
        feedback = group.create_task(pipeline.feedback(sample.key, sample.target))
        await settle()
        assert not feedback.done()
        gate.set()
        loss = cross_entropy((await request).output, sample.target)
        assert await feedback == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.asyncio
async def test_a_frame_that_never_entered_waits_for_no_target() -> None:
    """Cancelled at the door: its target is refused, and neither other targets nor the end wait for it."""
    pipeline = await build()
    first, second, *_ = samples()
    async with asyncio.timeout(20), pipeline:
        pipeline.pause()
        request = asyncio.ensure_future(pipeline.submit(late(first)))
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request])
        pipeline.resume()
        with pytest.raises(FeedbackError, match="no frame with key 0"):
            await pipeline.feedback(first.key, first.target)
        await pipeline.submit(late(second))
        await pipeline.feedback(second.key, second.target)
        await pipeline.drain()


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_closed_pipeline_takes_no_targets() -> None:
    """Nor does one that does not learn, or was never open; one that waits for a frame when it closes is told."""
    pipeline = await build()
    with pytest.raises(ClosedError, match="is not open"):
        await pipeline.feedback(0, torch.tensor([0]))
    async with asyncio.timeout(20), pipeline:
        await pipeline.submit(late(samples()[0]))
    with pytest.raises(ClosedError, match="is not open"):
        await pipeline.feedback(0, samples()[0].target)
    plain = Pipeline.from_stages([abs])
    async with plain:
        with pytest.raises(ClosedError, match="has no learner"):
            await plain.feedback(0, 1)
    assert [len(each.kept) for each in hands(pipeline)] == [0, 0, 0]


@pytest.mark.asyncio
async def test_closing_while_a_target_is_learned_from_tells_its_caller(settle: Settle) -> None:
    """The backward of the lowest stage never comes; the caller does not wait for ever."""
    inside, gate = threading.Event(), threading.Event()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        inside.set()
        gate.wait(20)
        return cross_entropy(output, target)

    pipeline = await build(Delayed(loss=loss, optimizer=SGD))
    async with asyncio.timeout(20), pipeline:
        await pipeline.submit(late(samples()[0]))
        feedback = asyncio.ensure_future(pipeline.feedback(0, samples()[0].target))
        await asyncio.to_thread(inside.wait, 20)
        closing = asyncio.ensure_future(pipeline.aclose())
        await settle()
        gate.set()
        await closing
        [result] = await asyncio.gather(feedback, return_exceptions=True)
        assert isinstance(result, float | AiotimeError)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_late_target_of_the_wrong_shape_is_its_callers_error_alone() -> None:
    """The run goes on, the frame is given up, the shapes are named."""
    pipeline = await build()
    stream = [late(sample) if sample.key == 0 else sample for sample in samples(10)]
    async with asyncio.timeout(20), pipeline:
        run = pipeline.run(stream, window=2)
        await anext(run)
        with pytest.raises(FeedbackError, match=r"output \(1, 4\) against target \(3,\)"):
            await pipeline.feedback(0, torch.zeros(3, dtype=torch.long))
        assert len([prediction async for prediction in run]) == 9
        assert learned(pipeline) == [9, 9, 9]
        assert pipeline.stats().learning_failed == 1
        assert "1 frames could not be learned from" in str(pipeline.stats())
        assert [len(each.kept) for each in hands(pipeline)] == [0, 0, 0]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_late_frame_needs_a_key_and_a_rule_that_allows_it() -> None:
    """Both are refused at the door, in their turn."""
    strict = await build(Delayed(order="1f1b", loss=cross_entropy, optimizer=SGD))
    async with asyncio.timeout(20), strict:
        with pytest.raises(InputError, match="takes no late targets in this order"):
            await strict.submit(late(samples()[0]))
        assert len(await learn(strict, [samples()[0], late(samples()[1]), samples()[2]], on_error="skip")) == 2
    pipeline = await build()
    async with asyncio.timeout(20), pipeline:
        with pytest.raises(InputError, match="found by its key"):
            await pipeline.submit(Sample(samples()[0].input, LATER))


# ------------------------------------------------------------------ which frames are learned from


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("order", ["event", "1f1b", "lockstep"])
async def test_a_frame_without_target_is_predicted_and_nothing_else(order: Any) -> None:
    """Weights are those of the labelled frames alone, whatever stands between them."""
    one, two = [await build(Delayed(order=order, loss=cross_entropy, optimizer=SGD)) for _ in range(2)]
    stream = samples()
    mixed = [piece for sample in stream for piece in (sample, Sample(sample.input))]
    async with asyncio.timeout(20):
        predictions = await learn(two, mixed)
        if order == "event":
            assert learned(two) == [20, 20, 20]
            return
        await learn(one, stream)
    assert [prediction.loss is None for prediction in predictions] == [False, True] * 20
    assert learned(two) == [20, 20, 20]
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("how", ["run", "submit", "drain", "two runs", "in pieces"])
@pytest.mark.parametrize("rule", [Exact, Delayed, partial(Delayed, order="1f1b")], ids=["exact", "event", "1f1b"])
async def test_every_sample_is_learned_from_exactly_once(rule: Any, how: str) -> None:
    """Warm-up frames are no data; what is in flight at the end of a stream or in a drain is learned from."""
    pipeline = await build(rule(loss=cross_entropy, optimizer=SGD), warm_up=5)
    stream = samples(15)
    async with asyncio.timeout(20), pipeline:
        assert learned(pipeline) == [0, 0, 0]
        assert all(stage.learning and stage.learning.delays == () for stage in pipeline.stats().stages)
        if how == "run":
            await learn(pipeline, stream)
        elif how == "submit":
            await asyncio.gather(*map(pipeline.submit, stream))
            await pipeline.drain()
        elif how == "drain":
            run = pipeline.run(stream, window=20)
            await anext(run)
            await pipeline.drain()
            left = [prediction async for prediction in run]
            assert learned(pipeline) == [1 + len(left)] * 3
            return
        elif how == "two runs":
            await asyncio.gather(learn(pipeline, stream[:7]), learn(pipeline, stream[7:]))
        else:
            for at in range(0, 15, 4):
                await learn(pipeline, stream[at : at + 4])
        assert learned(pipeline) == [15, 15, 15]
        delays = [stage.learning.delays for stage in pipeline.stats().stages if stage.learning]
        assert [sum(times for _, times in stage) for stage in delays] == [15, 15, 15]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_warm_up_frames_of_an_unsupervised_loss_are_no_data_either() -> None:
    """There every frame could be learned from."""

    def energy(output: torch.Tensor) -> torch.Tensor:
        return output.square().mean()

    pipeline = await build(Delayed(loss=energy, optimizer=SGD), warm_up=5)
    before = pipeline.state_dict()
    async with asyncio.timeout(20), pipeline:
        assert learned(pipeline) == [0, 0, 0] and same(pipeline.state_dict(), before)
        predictions = await learn(pipeline, [sample.input for sample in samples()])
        assert learned(pipeline) == [20, 20, 20]
    assert all(prediction.loss == pytest.approx(energy(prediction.output).item()) for prediction in predictions)
    assert sum(p.loss or 0 for p in predictions[10:]) < sum(p.loss or 0 for p in predictions[:10])


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_targets_may_be_any_pytree() -> None:
    """Two heads and a dict of two targets; the loss of one prediction is that of plain torch."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.kind, self.size = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            h = torch.tanh(self.body(x))
            return {"kind": self.kind(h), "size": self.size(h)}

    def loss(output: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(output["kind"], target["kind"]) + mse_loss(output["size"], target["size"])

    torch.manual_seed(0)
    model = Heads()
    stream = [Sample(s.input, {"kind": s.target, "size": s.input[:, :1]}, key=s.key) for s in samples()]
    first = loss(model(stream[0].input), stream[0].target).item()
    pipeline = await build(Delayed(loss=loss, optimizer=SGD), model=model, balance=[1, 3])
    async with asyncio.timeout(20):
        predictions = await learn(pipeline, stream)
    assert predictions[0].loss == pytest.approx(first, rel=1e-6)
    assert predictions[0].target is stream[0].target
    assert learned(pipeline) == [20, 20]


# ------------------------------------------------------------------ losses and targets that do not fit


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (partial(cross_entropy, reduction="none"), r"the loss returned shape \(2,\), not one number"),
        (lambda output, target: 0.5, "the loss returned float, not one number"),
        (lambda output, target: output.detach().sum(), "does not depend on any parameter"),
        (lambda output, target: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["vector", "number", "detached", "error"],
)
async def test_a_loss_that_is_none_is_told(loss: Any, says: str) -> None:
    """The run ends at the first frame with what to do about it; nothing was learned and nothing is left."""
    pipeline = await build(Delayed(loss=loss, optimizer=SGD), example=torch.zeros(2, 6))
    before = pipeline.state_dict()
    stream = [Sample(s.input.expand(2, 6), s.target.expand(2)) for s in samples()]
    async with asyncio.timeout(20), pipeline:
        with pytest.raises(InputError, match=says):
            await learn(pipeline, stream)
        assert learned(pipeline) == [0, 0, 0]
        assert same(pipeline.state_dict(), before)
        assert [len(each.kept) for each in hands(pipeline)] == [0, 0, 0]


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("order", ["event", "1f1b"])
async def test_a_target_of_the_wrong_shape_is_skipped_with_its_frame(order: Any) -> None:
    """The error names both shapes; with ``on_error="skip"`` the other frames are learned from as if it had not been."""
    one, two = [await build(Delayed(order=order, loss=cross_entropy, optimizer=SGD)) for _ in range(2)]
    stream = samples()
    bad = Sample(stream[0].input, torch.zeros(3, dtype=torch.long))
    async with asyncio.timeout(20), two:
        with pytest.raises(InputError, match=r"frame 0 .*output \(1, 4\) against target \(3,\)"):
            await learn(two, [bad])
        predictions = await learn(two, [*stream[:7], bad, *stream[7:]], on_error="skip")
        assert [prediction.index for prediction in predictions] == [*range(7), *range(8, 21)]
        assert learned(two) == [20, 20, 20]
        if order == "event":
            return
        await learn(one, stream[:7])
        await learn(one, stream[7:])
    assert sum(prediction.dropped_before for prediction in predictions) == 1


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_loss_that_is_not_finite_is_skipped_and_counted() -> None:
    """No stage's weights change; the prediction says nan, the statistics how many updates were left out."""
    pipeline = await build(Exact(loss=cross_entropy, optimizer=SGD))
    async with asyncio.timeout(20), pipeline:
        await learn(pipeline, samples(3))
        before = pipeline.state_dict()
        [prediction] = await learn(pipeline, [Sample(torch.full((1, 6), math.nan), torch.tensor([1]))])
        assert prediction.loss is not None and math.isnan(prediction.loss)
        assert same(pipeline.state_dict(), before)
        await learn(pipeline, samples(2))
        counts = [
            (stage.learning.frames, stage.learning.updates, stage.learning.skipped)
            for stage in pipeline.stats().stages
            if stage.learning
        ]
        assert counts == [(6, 5, 1)] * 3
        assert all(value.isfinite().all() for value in pipeline.state_dict().values())


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_backward_that_raises_ends_the_run_or_is_skipped() -> None:
    """Its prediction was handed out; the stages below forget the frame, and the statistics count it."""

    class Fragile(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.bad = bool((x > 1e6).any())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            if ctx.bad:
                raise ArithmeticError("no way back")
            return grad

    class Break(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(Fragile.apply(x))  # type: ignore[no-untyped-call]

    stages = [Stage(nn.Linear(6, 6), name="a"), Stage(Break(), name="b"), Stage(nn.Linear(6, 4), name="c")]
    rule = Delayed(loss=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.0))
    pipeline = await asyncio.to_thread(lambda: Pipeline.from_stages(stages, learner=rule))
    stream = samples(6)
    stream[2] = Sample(torch.full((1, 6), 1e9), stream[2].target)
    async with asyncio.timeout(20), pipeline:
        with pytest.raises(AiotimeError, match=r"learning from frame 2 failed at stage 'b'.*no way back"):
            await learn(pipeline, stream)
        done = pipeline.stats().learning_failed
        assert done == 1
        assert len(await learn(pipeline, stream, on_error="skip")) == 6
        assert pipeline.stats().learning_failed == 2
        assert all(not each.kept for each in hands(pipeline))


# ------------------------------------------------------------------ models that are special


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_batch_norm_is_warned_of_once() -> None:
    """With the reason; in eval mode there is nothing to warn of. The user's statistics stay as they were."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)
    )
    with pytest.warns(UserWarning, match="BatchNorm1d .* from each frame alone") as caught:
        pipeline = await build(model=model, example=torch.zeros(3, 6))
    assert len(caught) == 1
    stream = [Sample(s.input.expand(3, 6) + torch.arange(3.0)[:, None], s.target.expand(3)) for s in samples()]
    async with asyncio.timeout(20):
        await learn(pipeline, stream)
    bn = model[1]
    assert isinstance(bn, nn.BatchNorm1d) and bn.running_mean is not None
    assert torch.equal(bn.running_mean, torch.zeros(8))
    assert pipeline.state_dict()["1.num_batches_tracked"] == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await build(model=model.eval(), example=torch.zeros(3, 6))


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_stage_in_the_middle_may_have_nothing_to_learn() -> None:
    """It passes gradients on, and is no reason to count."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Tanh(), nn.Sigmoid(), nn.Linear(8, 8), nn.Linear(8, 4))
    pipeline = await build(Exact(loss=cross_entropy, optimizer=SGD), model=model)
    plain = torch.nn.Sequential(*list(model))
    optimizer = SGD(plain.parameters())
    async with asyncio.timeout(20):
        predictions = await learn(pipeline, samples())
    for sample, prediction in zip(samples(), predictions, strict=True):
        loss = cross_entropy(plain(sample.input), sample.target)
        assert prediction.loss == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    updates = [stage.learning.updates for stage in pipeline.stats().stages if stage.learning]
    assert updates == [20, 0, 20]


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_model_with_nothing_to_learn_is_refused() -> None:
    """And so is an optimizer that cannot be one; each error says what to hand in."""
    frozen = network().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing to learn; leave the learner out"):
        await build(model=frozen)
    cases: list[tuple[Any, str]] = [
        (torch.optim.SGD(network().parameters(), lr=0.1), "functools.partial"),
        (lambda params: None, "returned a NoneType"),
        (lambda params: torch.optim.SGD([], lr=0.1), "empty parameter list"),
        (lambda params: torch.optim.SGD(params, lr=-1.0), "could not be made for its 2 parameters"),
        ([SGD], "1 optimizers for 3 stages"),
        ({"no stage": SGD}, "no optimizer for stage"),
    ]
    for optimizer, says in cases:
        with pytest.raises(ConfigurationError, match=says):
            await build(Delayed(loss=cross_entropy, optimizer=optimizer))
    with pytest.raises(ConfigurationError, match="learner must be a rule"):
        await build(cross_entropy)  # type: ignore[arg-type]


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("first", [nn.Linear, nn.Tanh], ids=["after a linear", "after a tanh"])
@pytest.mark.parametrize("rule", [Exact, partial(Delayed, order="1f1b")], ids=["exact", "1f1b"])
async def test_an_in_place_layer_at_a_cut_learns_as_any_other(first: Any, rule: Any) -> None:
    """ReLU(inplace=True) first in a stage writes into what the stage below needs for its backward (Tanh's output)."""

    def made(*, inplace: bool) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            middle = nn.Tanh() if first is nn.Tanh else nn.Linear(8, 8)
            return nn.Sequential(nn.Linear(6, 8), middle, nn.ReLU(inplace=inplace), nn.Linear(8, 4))

    settings: dict[str, Any] = {"loss": cross_entropy, "optimizer": SGD}
    one = await build(rule(**settings), model=made(inplace=True), balance=[2, 2])
    two = await build(rule(**settings), model=made(inplace=False), balance=[2, 2])
    async with asyncio.timeout(20):
        losses = [[prediction.loss for prediction in await learn(each, samples())] for each in (one, two)]
    assert losses[0] == losses[1]
    assert same(one.state_dict(), two.state_dict())


# ------------------------------------------------------------------ endings, and several at once


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["event", "1f1b", "lockstep"])
@pytest.mark.parametrize("how", ["break", "cancel", "close"])
async def test_leaving_in_the_middle_leaves_weights_and_optimizers_together(order: Any, how: str) -> None:
    """Each stage has made as many updates as its optimizer has steps; nothing is kept, and learning goes on."""
    pipeline = await build(Delayed(order=order, loss=cross_entropy, optimizer=partial(torch.optim.Adam, lr=0.01)))
    async with asyncio.timeout(20), pipeline:
        for stop in (1, 4, 9):

            async def consume(stop: int = stop) -> None:
                async with pipeline.run(samples(), window=8) as run:
                    async for prediction in run:
                        if prediction.index == stop:
                            if how == "cancel":
                                asyncio.current_task().cancel()  # type: ignore[union-attr]
                            elif how == "close":
                                await pipeline.aclose()
                            else:
                                break

            task = asyncio.ensure_future(consume())
            await asyncio.wait([task])
            if not task.cancelled():
                assert isinstance(task.exception(), ClosedError | None)
            if how == "close":
                await pipeline.__aenter__()
            else:
                await pipeline._engine.flush()  # type: ignore[union-attr]
            assert all(not each.kept for each in hands(pipeline))
            for each in hands(pipeline):
                assert each.updater is not None
                steps = {int(state["step"]) for state in each.updater.optimizer.state.values()}
                assert steps <= {each.updater.updates} and each.updater.updates == each.learned
        before = [each.learned for each in hands(pipeline)]
        assert how == "close" or len(set(before)) == 1
        assert len(await learn(pipeline, samples(5))) == 5
        assert [each.learned for each in hands(pipeline)] == [count + 5 for count in before]


@pytest.mark.asyncio
async def test_weights_may_be_replaced_while_it_learns() -> None:
    """Between two frames: what was loaded is what the next frame meets, and learning goes on from there."""
    pipeline = await build(Exact(loss=cross_entropy, optimizer=SGD))
    async with asyncio.timeout(20), pipeline:
        start = pipeline.state_dict()
        first = await learn(pipeline, samples())
        assert not same(pipeline.state_dict(), start)
        await pipeline.load_state_dict(start)
        assert same(pipeline.state_dict(), start)
        again = await learn(pipeline, samples())
        assert [p.loss for p in again] == [p.loss for p in first]
        async with asyncio.TaskGroup() as group:
            run = group.create_task(learn(pipeline, samples()))
            while not run.done():
                await pipeline.load_state_dict(start)
        assert len(run.result()) == 20
    with pytest.raises(ConfigurationError, match="missing keys"):
        await pipeline.load_state_dict({})


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_stages_made_by_hand_take_new_weights_too() -> None:
    """Their working tensors are replaced, also where two stages have one name; what was tied stays tied."""
    rule = Exact(loss=cross_entropy, optimizer=SGD)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    layers = [nn.Linear(6, 6), tied, nn.Linear(6, 4)]
    pipeline = await asyncio.to_thread(lambda: Pipeline.from_stages(layers, learner=rule))
    async with asyncio.timeout(20), pipeline:
        start = pipeline.state_dict()
        first = await learn(pipeline, samples())
        await pipeline.load_state_dict(start)
        assert same(pipeline.state_dict(), start)
        assert [p.loss for p in await learn(pipeline, samples())] == [p.loss for p in first]
        end = pipeline.state_dict()
    assert torch.equal(end["Sequential.0.weight"], end["Sequential.1.weight"])


@pytest.mark.asyncio
async def test_several_runs_and_callers_learn_at_once() -> None:
    """Each run keeps its order, each frame is learned from once, each answer is its own."""
    pipeline = await build()
    async with asyncio.timeout(20), pipeline, asyncio.TaskGroup() as group:
        runs = [group.create_task(learn(pipeline, samples(15))) for _ in range(3)]
        calls = [group.create_task(pipeline.submit(sample)) for sample in samples(10)]
        await asyncio.wait([*runs, *calls])
        await pipeline.drain()
        assert learned(pipeline) == [55, 55, 55]
    for run in runs:
        assert [prediction.index for prediction in run.result()] == list(range(15))
        assert [prediction.key for prediction in run.result()] == list(range(15))
    assert [call.result().key for call in calls] == list(range(10))


# ------------------------------------------------------------------ statistics


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_busy_shares_count_backwards_and_updates() -> None:
    """On a virtual clock: one second forward and two backward make a stage busy three of them."""
    clock = VirtualClock()
    seconds = {"forward": 1.0, "backward": 2.0, "weights": 0.0}
    devices = [SimulatedDevice(at, seconds=lambda work, _: seconds[work.phase], clock=clock) for at in range(2)]
    pipeline = await build(balance=[3, 3], devices=devices)
    async with asyncio.timeout(20), pipeline:
        before = pipeline.stats()
        await learn(pipeline, samples())
        stats = pipeline.stats()
        for stage in stats.stages:
            assert stage.learning is not None
            assert stage.busy * stats.elapsed == pytest.approx(20 * 3.0)
            assert stage.learning.backward * stats.elapsed == pytest.approx(20 * 2.0)
            assert stage.learning.backward_p50 == pytest.approx(2.0)
            assert stage.service_p50 == pytest.approx(1.0)
            assert stage.learning.kept_bytes == 0
        top = stats.stages[1].learning
        assert top is not None and (top.delay_mean, top.delay_max, top.delays) == (0.0, 0, ((0, 20),))
        between = stats.since(before).stages[0].learning
        assert between is not None and between.frames == 20
    text = str(stats)
    assert "learned  updates  skipped  delay  most  backward" in text
    assert stats.to_dict()["stages"][1]["learning"]["updates"] == 20


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_pipeline_that_does_not_learn_says_nothing_of_it() -> None:
    """Neither in the table nor in the values."""
    pipeline = Pipeline.from_stages([abs])
    assert [prediction.output async for prediction in pipeline.run([-1])] == [1]
    assert pipeline.stats().stages[0].learning is None
    assert "learned" not in str(pipeline.stats())


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_kept_bytes_are_those_of_frames_that_wait() -> None:
    """Two frames whose target has not come keep input and output of each stage."""
    pipeline = await build()
    async with asyncio.timeout(20), pipeline:
        await learn(pipeline, [late(sample) for sample in samples(2)])
        kept = [stage.learning.kept_bytes for stage in pipeline.stats().stages if stage.learning]
        assert kept == [2 * 4 * (6 + 8), 2 * 4 * (8 + 8), 2 * 4 * (8 + 4)]

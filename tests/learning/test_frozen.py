"""The live model between two frames: what it is, what waits meanwhile, and that everything goes on afterwards."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aiotime import LATER, Pipeline, Sample, Stage
from aiotime.errors import BusyError, ClosedError, ConfigurationError
from aiotime.learning import Delayed, Exact, Rule

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Settle

SGD = partial(torch.optim.SGD, lr=0.1)


def network() -> nn.Sequential:
    """Two stages of two layers; dropout tells training from evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4))


def samples(frames: int = 12) -> list[Sample]:
    """Labelled frames."""
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(frames, 1, 6, generator=generator)
    ys = torch.randint(0, 4, (frames, 1), generator=generator)
    return [Sample(x, y) for x, y in zip(xs, ys, strict=True)]


async def build(rule: Rule | None = None, *, model: nn.Module | None = None) -> Pipeline:
    """Two stages on two workers."""
    rule = rule or Delayed(loss=cross_entropy, optimizer=SGD)
    example = torch.zeros(1, 6)
    devices = ["cpu:0", "cpu:1"]
    return await asyncio.to_thread(
        Pipeline, model or network(), example=example, devices=devices, balance=[2, 2], learner=rule
    )


async def learn(pipeline: Pipeline, stream: Any, **options: Any) -> int:
    """How many predictions came."""
    return len([prediction async for prediction in pipeline.run(stream, **options)])


@pytest.mark.asyncio
async def test_it_is_a_copy_of_the_model_with_the_weights_as_they_are_now() -> None:
    """Of the user's class, in eval mode, made once; the user's own model keeps its weights."""
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pipeline = await build(model=model)
    x = samples()[0].input
    async with asyncio.timeout(20), pipeline:
        await learn(pipeline, samples())
        async with pipeline.frozen() as first:
            live = pipeline.state_dict()
            assert type(first) is nn.Sequential and not first.training and first is not model
            assert all(torch.equal(value, live[key]) for key, value in first.state_dict().items())
            with torch.inference_mode():
                assert torch.equal(first(x), first(x))
            answer = first(x)
        assert torch.equal((await pipeline.submit(x)).output, answer)
        await learn(pipeline, samples())
        assert torch.equal(first(x), answer)  # it does not follow
        async with pipeline.frozen() as second:
            assert second is first
            assert not torch.equal(second(x), answer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["event", "1f1b"])
async def test_every_frame_before_has_been_learned_from_and_none_enters(order: Any, settle: Settle) -> None:
    """In the middle of a run: inside the block nothing moves, afterwards the run delivers the rest."""
    pipeline = await build(Delayed(order=order, loss=cross_entropy, optimizer=SGD))
    async with asyncio.timeout(20), pipeline:
        run = pipeline.run(samples(40), window=4)
        await anext(run)
        async with pipeline.frozen():
            stats = pipeline.stats()
            learned = [stage.learning.frames for stage in stats.stages if stage.learning is not None]
            assert pipeline._engine is not None
            assert learned == [pipeline._engine.accepted] * 2
            assert stats.in_flight == 0
            await settle()
            assert [stage.learning.frames for stage in pipeline.stats().stages if stage.learning] == learned
        assert len([prediction async for prediction in run]) == 39
        assert all(stage.learning and stage.learning.frames == 40 for stage in pipeline.stats().stages)


@pytest.mark.asyncio
async def test_callers_late_targets_and_runs_wait_until_it_is_left(settle: Settle) -> None:
    """None of them is refused."""
    pipeline = await build()
    x, y = samples()[0].input, samples()[0].target
    async with asyncio.timeout(20), pipeline, asyncio.TaskGroup() as group:
        await pipeline.submit(Sample(x, LATER, key="k"))
        async with pipeline.frozen():
            tasks = [
                group.create_task(pipeline.submit(Sample(x, y))),
                group.create_task(pipeline.feedback("k", y)),
                group.create_task(learn(pipeline, samples(3))),
            ]
            await settle()
            draining = group.create_task(pipeline.drain())  # it has to answer the request that waits
            await settle()
            assert not any(task.done() for task in [*tasks[:2], draining])
        await asyncio.wait([*tasks, draining])
    assert all(stage.learning and stage.learning.frames >= 2 for stage in pipeline.stats().stages)


@pytest.mark.asyncio
async def test_the_task_inside_is_told_that_it_would_wait_for_itself() -> None:
    """Instead of a dead-lock."""
    pipeline = await build()
    async with asyncio.timeout(20), pipeline:
        await pipeline.submit(Sample(samples()[0].input, LATER, key="k"))
        async with pipeline.frozen():
            with pytest.raises(BusyError, match="stands still for this very task"):
                await pipeline.submit(samples()[0])
            with pytest.raises(BusyError, match="stands still for this very task"):
                await pipeline.feedback("k", samples()[0].target)
        await pipeline.feedback("k", samples()[0].target)


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["error", "cancelled", "cancelled before it began"])
async def test_however_it_ends_the_door_opens_again(how: str, settle: Settle) -> None:
    """An error and a cancellation leave the pipeline running."""
    pipeline = await build()
    inside = asyncio.Event()

    async def evaluate() -> None:
        async with pipeline.frozen():
            inside.set()
            if how == "error":
                raise RuntimeError("mine")
            await asyncio.get_running_loop().create_future()

    async with asyncio.timeout(20), pipeline:
        task = asyncio.ensure_future(evaluate())
        if how == "cancelled before it began":
            await asyncio.sleep(0)
        else:
            await inside.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or isinstance(task.exception(), RuntimeError)
        assert await learn(pipeline, samples(5)) == 5


@pytest.mark.asyncio
async def test_a_checkpoint_fits_inside_and_blocks_may_nest(tmp_path: Path) -> None:
    """Evaluate, and keep what was good; two tasks may hold it at once."""
    pipeline = await build()
    inner = asyncio.Event()

    async def other() -> None:
        async with pipeline.frozen():
            inner.set()

    async with asyncio.timeout(20), pipeline, asyncio.TaskGroup() as group:
        await learn(pipeline, samples(5))
        async with pipeline.frozen() as model:
            taken = await pipeline.checkpoint(tmp_path / "c")
            group.create_task(other())
            await inner.wait()
            assert all(torch.equal(value, taken.weights[key]) for key, value in model.state_dict().items())
            assert not pipeline._engine or pipeline._engine.door.shut
        assert await learn(pipeline, samples(5)) == 5


@pytest.mark.asyncio
async def test_a_closed_pipeline_has_a_model_too_and_opening_waits(settle: Settle) -> None:
    """Nothing is open; a run that begins inside the block gets in when it is left."""
    pipeline = await build()
    async with asyncio.timeout(20):
        await learn(pipeline, samples(5))
        async with pipeline.frozen() as model:
            live = pipeline.state_dict()
            assert all(torch.equal(value, live[key]) for key, value in model.state_dict().items())
            run = asyncio.ensure_future(learn(pipeline, samples(5)))
            await settle()
            assert not run.done()
            assert all(torch.equal(value, live[key]) for key, value in pipeline.state_dict().items())
        assert await run == 5


@pytest.mark.asyncio
async def test_closing_inside_the_block_ends_whoever_waits(settle: Settle) -> None:
    """They are told that the pipeline closed; the model stays usable."""
    pipeline = await build()
    x, y = samples()[0].input, samples()[0].target
    async with asyncio.timeout(20), pipeline:
        await pipeline.submit(Sample(x, LATER, key="k"))
        async with pipeline.frozen() as model:
            tasks = [asyncio.ensure_future(pipeline.submit(x)), asyncio.ensure_future(pipeline.feedback("k", y))]
            await settle()
            await pipeline.aclose()
            assert model(x).shape == (1, 4)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, ClosedError) for result in results)


@pytest.mark.asyncio
async def test_stages_made_by_hand_come_as_one_module() -> None:
    """Modules copied, functions as they are, also where a name comes twice; without a learner as well."""
    inner = network()
    pipeline = await asyncio.to_thread(
        lambda: Pipeline.from_stages(
            [Stage(inner[0]), torch.tanh, Stage(nn.Linear(8, 8)), Stage(inner[3], name="top")],
            learner=Exact(loss=cross_entropy, optimizer=SGD),
        )
    )
    x = samples()[0].input
    async with asyncio.timeout(20), pipeline:
        await learn(pipeline, samples())
        async with pipeline.frozen() as model:
            answer = model(x)
            assert not model.training and all(isinstance(p, nn.Parameter) for p in model.parameters())
        assert torch.equal((await pipeline.submit(x)).output, answer)
    plain = await asyncio.to_thread(lambda: Pipeline.from_stages([Stage(nn.Linear(6, 8)), torch.tanh]))
    async with asyncio.timeout(20), plain.frozen() as model:
        answer = model(x)
    [prediction] = [prediction async for prediction in plain.run([x])]
    assert torch.equal(prediction.output, answer)


@pytest.mark.asyncio
async def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """With the way out; learning goes on."""

    class Unique(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Unique:
            raise TypeError("there is only one of me")

    pipeline = await build(model=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Tanh(), Unique(8, 4)))
    async with asyncio.timeout(20), pipeline:
        with pytest.raises(ConfigurationError, match=r"only one of me.*pipeline\.state_dict"):
            async with pipeline.frozen():
                pass
        assert await learn(pipeline, samples(3)) == 3

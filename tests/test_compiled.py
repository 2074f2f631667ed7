"""Tests of compiled stages in pipelines: results, weights that change, errors, plans, learning, what is left behind."""

from __future__ import annotations

import asyncio
import gc
import warnings
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from aiotime import Pipeline, Plan, Sample, Stage
from aiotime.compiling.ahead import Ahead
from aiotime.errors import ConfigurationError, StageError
from aiotime.learning import Delayed, Exact

slow = [pytest.mark.slow, pytest.mark.timeout(400)]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh()).eval()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class Residual(nn.Module):
    """A skip across the cut, and what writes into its input just behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        assert self.norm.running_mean is not None
        self.norm.running_mean.normal_()
        self.eval()

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.conv1(x))
        y = F.relu(self.conv2(x), inplace=True)
        return F.relu(x + self.conv3(y))


def of_mlp(**options: Any) -> Pipeline:
    """Two stages with a matrix product each."""
    settings: dict[str, Any] = {"example": torch.zeros(2, 6), "devices": ["cpu:0", "cpu:1"], "balance": [2, 2]}
    return Pipeline(mlp(), **settings | {"compile": "aot"} | options)


def programs(pipeline: Pipeline) -> list[Ahead]:
    found = [spec.program for spec in pipeline._specs]
    assert all(isinstance(program, Ahead) for program in found)
    return found  # type: ignore[return-value]


def close(made: Any, wanted: Any) -> None:
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


async def outputs(pipeline: Pipeline, frames: Any) -> list[Any]:
    return [prediction.output async for prediction in pipeline.run(frames)]


def wanted(model: nn.Module, frames: Any) -> list[Any]:
    with torch.inference_mode():
        return [model(frame) for frame in frames]


class TestPipeline:
    pytestmark = [*slow, pytest.mark.usefixtures("packages"), pytest.mark.asyncio]

    async def test_equals_the_model(self) -> None:
        frames = torch.randn(20, 2, 6)
        pipeline = await asyncio.to_thread(of_mlp)
        close(await outputs(pipeline, frames), wanted(mlp(), frames))
        assert [program.eager_calls for program in programs(pipeline)] == [0, 0]
        assert pipeline.plan is not None and [stage.compiled for stage in pipeline.plan.stages] == ["aot", "aot"]

    async def test_a_residual_network(self) -> None:
        frames = torch.randn(8, 1, 3, 8, 8)
        kept = frames.clone()
        build: dict[str, Any] = {
            "example": torch.zeros(1, 3, 8, 8),
            "devices": ["cpu:0", "cpu:1"],
            "balance": [3, 4],
            "compile": "aot",
        }
        pipeline = await asyncio.to_thread(Pipeline, Residual(), **build)
        close(await outputs(pipeline, frames), wanted(Residual(), kept))
        assert torch.equal(frames, kept)
        assert [program.eager_calls for program in programs(pipeline)] == [0, 0]
        assert programs(pipeline)[1]._written, "nothing writes into what crossed the cut: the test tests little"

    async def test_weights_that_change_between_two_frames(self) -> None:
        frames = torch.randn(40, 2, 6)
        pipeline = await asyncio.to_thread(of_mlp)
        tasks: list[asyncio.Task[None]] = []

        async def source() -> AsyncIterator[Tensor]:
            for number, frame in enumerate(frames):
                if number == 20:
                    tasks.append(asyncio.create_task(pipeline.load_state_dict(mlp(1).state_dict())))
                    await asyncio.sleep(0)
                yield frame

        made = await outputs(pipeline, source())
        await tasks[0]
        old, new = wanted(mlp(), frames), wanted(mlp(1), frames)
        first_new = next(at for at, one in enumerate(made) if torch.allclose(one, new[at], atol=1e-5))
        assert 20 <= first_new < 40
        close(made[:first_new], old[:first_new])
        close(made[first_new:], new[first_new:])
        close(await outputs(pipeline, frames[:3]), new[:3])

    async def test_a_checkpoint_brings_weights_back(self, tmp_path: Path) -> None:
        frames = torch.randn(3, 2, 6)
        pipeline = await asyncio.to_thread(of_mlp)
        async with pipeline:
            await pipeline.checkpoint(tmp_path / "kept")
            await pipeline.load_state_dict(mlp(1).state_dict())
            close(await outputs(pipeline, frames), wanted(mlp(1), frames))
            await pipeline.restore(tmp_path / "kept")
            close(await outputs(pipeline, frames), wanted(mlp(), frames))

    async def test_frames_of_many_sizes(self) -> None:
        build: dict[str, Any] = {
            "example": torch.zeros(2, 6),
            "devices": ["cpu:0"],
            "balance": [4],
            "dynamic": (0,),
            "compile": "aot",
        }
        pipeline = await asyncio.to_thread(Pipeline, mlp(), **build)
        frames = [torch.randn(size, 6) for size in (2, 5, 1, 64, 3)]
        made = await outputs(pipeline, frames)
        assert [one.shape for one in made] == [frame.shape for frame in frames]
        close(made, wanted(mlp(), frames))
        assert programs(pipeline)[0].eager_calls == 1  # the frame of one

    async def test_a_plan_says_how_stages_are_compiled(self) -> None:
        first = await asyncio.to_thread(of_mlp)
        assert first.plan is not None and first.plan.advice is not None and "Compiled: aot." in first.plan.advice
        plan = Plan.from_json(first.plan.to_json())
        assert plan == first.plan
        pipeline = await asyncio.to_thread(Pipeline, mlp(), example=torch.zeros(2, 6), plan=plan)
        assert all(program._package.cached for program in programs(pipeline))
        frames = torch.randn(3, 2, 6)
        close(await outputs(pipeline, frames), wanted(mlp(), frames))
        with pytest.raises(ConfigurationError, match="a plan or compile, not both"):
            Pipeline(mlp(), example=torch.zeros(2, 6), plan=plan, compile="aot")

    async def test_pipelines_at_the_same_time(self) -> None:
        """Built on threads of their own, from one package, with weights of their own."""
        frames = torch.randn(10, 2, 6)
        models = [mlp(seed) for seed in range(3)]  # not on the threads: they share one generator

        def build(seed: int) -> Pipeline:
            return Pipeline(
                models[seed], example=torch.zeros(2, 6), devices=["cpu:0", "cpu:1"], balance=[2, 2], compile="aot"
            )

        pipelines = await asyncio.gather(*(asyncio.to_thread(build, seed) for seed in range(3)))
        made = await asyncio.gather(*(outputs(pipeline, frames) for pipeline in pipelines))
        for seed, one in enumerate(made):
            close(one, wanted(mlp(seed), frames))

    async def test_closing_and_cancelling_with_frames_in_flight(self) -> None:
        pipeline = await asyncio.to_thread(of_mlp)
        frames = torch.randn(200, 2, 6)
        for _ in range(3):
            async with pipeline.run(frames) as run:
                async for prediction in run:
                    close(prediction.output, wanted(mlp(), frames[:1])[0])
                    break

        async def watched() -> None:
            async with pipeline.run(frames) as run:
                async for _ in run:
                    started.set()

        started = asyncio.Event()
        task = asyncio.create_task(watched())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        close(await outputs(pipeline, frames[:2]), wanted(mlp(), frames[:2]))


@pytest.mark.compiles
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("packages")
def test_nothing_is_left_of_it() -> None:
    pipeline = of_mlp()
    asyncio.run(outputs(pipeline, torch.randn(3, 2, 6)))
    seen: list[weakref.ref[Any]] = [weakref.ref(pipeline)]
    for program in programs(pipeline):
        seen += [weakref.ref(program), weakref.ref(program._library)]
    storages = [tensor.untyped_storage() for program in programs(pipeline) for tensor in program._library.held]
    del pipeline, program
    gc.collect()
    assert [one() for one in seen] == [None] * len(seen)
    assert {torch._C._storage_Use_Count(one._cdata) for one in storages} == {1}


class TestStage:
    pytestmark = [*slow, pytest.mark.usefixtures("packages"), pytest.mark.asyncio]

    def table(self, **options: Any) -> Stage:
        torch.manual_seed(0)
        return Stage(nn.Embedding(8, 4), compile="aot", example=torch.zeros(3, dtype=torch.long), **options)

    async def test_several_workers(self) -> None:
        pipeline = await asyncio.to_thread(lambda: Pipeline.from_stages([self.table(workers=3, name="table")]))
        frames = torch.randint(0, 8, (100, 3))
        torch.manual_seed(0)
        close(await outputs(pipeline, frames), wanted(nn.Embedding(8, 4), frames))
        state = {key: value + 1 for key, value in pipeline.state_dict().items()}
        await pipeline.load_state_dict(state)
        close(await outputs(pipeline, frames[:2]), [state["table.weight"][frame] for frame in frames[:2]])

    async def test_other_frames_run_eagerly(self) -> None:
        pipeline = await asyncio.to_thread(lambda: Pipeline.from_stages([self.table()]))
        made = await outputs(pipeline, [torch.zeros(2, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long)])
        assert [tuple(one.shape) for one in made] == [(2, 2, 4), (3, 4)]
        assert programs(pipeline)[0].eager_calls == 1

    async def test_a_frame_that_fails_is_that_frame_alone(self) -> None:
        frames = [torch.tensor([0, 1, 2]), torch.tensor([0, 99, 2]), torch.tensor([3, 4, 5])]
        skipping = await asyncio.to_thread(lambda: Pipeline.from_stages([self.table(on_error="skip")]))
        assert len(await outputs(skipping, frames)) == 2
        raising = await asyncio.to_thread(lambda: Pipeline.from_stages([self.table(name="table")]))
        with pytest.raises(StageError, match="table") as caught:
            await outputs(raising, frames)
        assert "index" in str(caught.value.__cause__)
        assert len(await outputs(skipping, frames[:1])) == 1


def test_needs_a_module_and_an_example() -> None:
    needed = r"needs a torch\.nn\.Module and example="
    with pytest.raises(ConfigurationError, match=needed):
        Stage(nn.ReLU(), compile="aot")
    with pytest.raises(ConfigurationError, match=needed):
        Stage(abs, compile="aot", example=1)
    with pytest.raises(ConfigurationError, match="compile must be None or one of"):
        Stage(nn.ReLU(), compile="fast", example=torch.zeros(1))


def test_ways_that_are_none() -> None:
    with pytest.raises(ConfigurationError, match="compile must be None or one of"):
        of_mlp(compile="fast")
    for way in ("aot", "cudagraph"):
        with pytest.raises(ConfigurationError, match='takes compile="inductor"'):
            of_mlp(compile=way, learner=Exact(loss=F.mse_loss, optimizer=sgd))


def test_cuda_graphs_on_the_host_are_a_warning() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pipeline = of_mlp(compile="cudagraph")
    assert "does not run compiled everywhere" in str(said[0].message)
    assert "CUDA graphs need a CUDA device" in str(said[0].message)
    assert pipeline.plan is not None and [stage.compiled for stage in pipeline.plan.stages] == [None, None]


@pytest.mark.compiles
@pytest.mark.timeout(300)
@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("lacking", ["compiler", "cache"])
async def test_runs_eagerly_without(
    lacking: str, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler, or nowhere to put what it makes: a warning that says so, and the same results."""
    (tmp_path / "file").write_text("")
    if lacking == "compiler":
        monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("AIOTIME_CACHE", str(tmp_path if lacking == "compiler" else tmp_path / "file"))
    frames = torch.randn(3, 2, 6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pipeline = await asyncio.to_thread(of_mlp)
    reason = "AOTInductor cannot compile it" if lacking == "compiler" else "cannot be written"
    assert reason in str(said[0].message)
    assert pipeline.plan is not None and [stage.compiled for stage in pipeline.plan.stages] == [None, None]
    close(await outputs(pipeline, frames), wanted(mlp(), frames))


@pytest.mark.compiles
@pytest.mark.timeout(600)
@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.usefixtures("packages")
async def test_learning_is_the_same_to_rounding() -> None:
    """Losses and weights of compiled stages and of eager ones, frame by frame."""

    async def learned(rule: Any, way: str | None) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(1)
        samples = [Sample(torch.randn(2, 6), torch.randn(2, 6)) for _ in range(12)]
        pipeline = await asyncio.to_thread(of_mlp, learner=rule(), compile=way)
        assert [spec.program is not None for spec in pipeline._specs] == [way is not None] * 2
        losses = [prediction.loss or 0.0 async for prediction in pipeline.run(samples)]
        return losses, pipeline.state_dict()

    def exact() -> Any:
        return Exact(loss=F.mse_loss, optimizer=sgd)

    def delayed() -> Any:
        return Delayed(loss=F.mse_loss, optimizer=sgd, order="1f1b")

    for rule in (exact, delayed):
        eager, compiled = await learned(rule, None), await learned(rule, "inductor")
        close(compiled, eager)
        assert eager[0][0] != eager[0][-1]

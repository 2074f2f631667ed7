"""Checkpoints: what comes back is what was, to the bit; what does not fit is refused; files are whole or not there."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

import aiotime
from aiotime import Pipeline, Sample, Stage, checkpoint
from aiotime.checkpoint import LEARNER, STATE, WEIGHTS, Checkpoint, pack, unpack
from aiotime.errors import ClosedError, ConfigurationError
from aiotime.learning import Delayed, Exact, Rule
from aiotime.learning.augmented_lagrangian import AugmentedLagrangian
from aiotime.learning.block_admm import BlockADMM
from aiotime.learning.interlocking import Interlocking
from aiotime.learning.learner import StageLearner
from aiotime.learning.local import Local
from aiotime.learning.penalty import Penalty
from aiotime.learning.sideways import Sideways
from aiotime.learning.synchronous import Synchronous

if TYPE_CHECKING:
    from tests.conftest import Settle

FRAMES, CUT = 28, 13  # 13: with three gradients per update, one is waiting at the cut
DEVICES = ["cpu:0", "cpu:1", "cpu:2"]
SGD = partial(torch.optim.SGD, lr=0.05)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)
HALVING = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)

RULES: dict[str, Callable[[], Rule]] = {
    "exact": lambda: Exact(loss=cross_entropy, optimizer=ADAM),
    "1f1b momentum": lambda: Delayed(order="1f1b", loss=cross_entropy, optimizer=MOMENTUM),
    "1f1b adam, gathered, scheduled": lambda: Delayed(
        order="1f1b", loss=cross_entropy, optimizer=ADAM, scheduler=HALVING, update_every=3
    ),
}


def network() -> nn.Sequential:
    """Three stages of (2, 2, 1) layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def samples(frames: int = FRAMES, *, rows: int = 1) -> list[Sample]:
    """Labelled frames; the key of each is its number."""
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(frames, rows, 6, generator=generator)
    ys = torch.randint(0, 4, (frames, rows), generator=generator)
    return [Sample(x, y, key=at) for at, (x, y) in enumerate(zip(xs, ys, strict=True))]


async def build(
    rule: Rule | None, *, model: nn.Module | None = None, balance: Sequence[int] = (2, 2, 1), rows: int = 1
) -> Pipeline:
    """A pipeline on as many CPU workers as there are stages; made on a thread, as that takes time."""
    return await asyncio.to_thread(
        Pipeline,
        model or network(),
        example=torch.zeros(rows, 6),
        devices=DEVICES[: len(balance)],
        balance=balance,
        learner=rule,
    )


async def losses(pipeline: Pipeline, stream: Sequence[Sample]) -> list[float | None]:
    """What the pipeline's predictions cost, while it learns from them."""
    async with asyncio.timeout(20):
        return [prediction.loss async for prediction in pipeline.run(stream)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def inside(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------ the continued run is the uninterrupted one


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("rule", RULES)
async def test_a_restored_pipeline_goes_on_as_the_first_did(rule: str, tmp_path: Path) -> None:
    """Losses and weights have the same bits: optimizer, schedule and gathered gradients are all there."""
    stream = samples()
    first = await build(RULES[rule]())
    async with first:
        await losses(first, stream[:CUT])
        taken = await first.checkpoint(tmp_path / "c", position={"byte": 4096})
        after = await losses(first, stream[CUT:])
    second = await build(RULES[rule]())
    found = await second.restore(tmp_path / "c")
    assert (found.frames, found.key, found.position) == (CUT, CUT - 1, {"byte": 4096})
    assert same(second.state_dict(), dict(taken.weights))
    assert await losses(second, stream[CUT:]) == after
    assert same(first.state_dict(), second.state_dict())


SETTINGS: dict[str, Any] = {"loss": cross_entropy, "optimizer": MOMENTUM}
EVERY: dict[str, Callable[[], Rule]] = {
    "sideways": lambda: Sideways(**SETTINGS),
    "synchronous": lambda: Synchronous(micro_batches=4, **SETTINGS),
    "chimera": lambda: Synchronous(micro_batches=4, schedule="chimera", **SETTINGS),
    "local heads": lambda: Delayed(order="1f1b", local=1.0, **SETTINGS),
    "double-buffered": lambda: Delayed(order="1f1b", weights="double-buffered", update_every=4, **SETTINGS),
    "predicted": lambda: Delayed(order="1f1b", weights="predicted", **SETTINGS),
    "local": lambda: Local(**SETTINGS),
    "interlocking": lambda: Interlocking(2, order="1f1b", **SETTINGS),
    "penalty": lambda: Penalty(beta=0.1, order="1f1b", **SETTINGS),
    "augmented lagrangian": lambda: AugmentedLagrangian(beta=0.1, order="1f1b", **SETTINGS),
    "block admm": lambda: BlockADMM(rho=0.1, order="1f1b", **SETTINGS),
}


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("rule", EVERY)
async def test_every_rule_goes_on_as_it_would_have(rule: str, tmp_path: Path) -> None:
    """Heads, multipliers, spare versions, replicas: whatever a rule keeps, into a fresh pipeline and a running one."""
    stream = samples()
    first, second, third = [await build(EVERY[rule](), balance=[2, 3]) for _ in range(3)]
    async with first:
        await losses(first, stream[:16])
        await first.checkpoint(tmp_path / "c")
        after = await losses(first, stream[16:])
    await second.restore(tmp_path / "c")
    assert await losses(second, stream[16:]) == after
    assert same(first.state_dict(), second.state_dict())
    async with third:
        await losses(third, stream[:4])
        await third.restore(tmp_path / "c")
        assert await losses(third, stream[16:]) == after


SCRIPT = """
import asyncio, sys
import aiotime
sys.path.insert(0, sys.argv[1])
import test_checkpoint as here

async def main():
    pipeline = await here.build(here.RULES[sys.argv[3]]())
    found = await pipeline.restore(sys.argv[2])
    for loss in await here.losses(pipeline, here.samples()[found.frames:]):
        print(loss.hex())

aiotime.run(main())
"""


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_another_process_goes_on_from_the_files(tmp_path: Path) -> None:
    """Everything that matters is in the folder."""
    rule, stream = "1f1b adam, gathered, scheduled", samples()
    first = await build(RULES[rule]())
    async with first:
        await losses(first, stream[:CUT])
        await first.checkpoint(tmp_path / "c")
        after = await losses(first, stream[CUT:])
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "c"), rule]
    environment = {"PYTHONPATH": str(Path(aiotime.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, encoding="utf-8", timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [float.fromhex(line) for line in done.stdout.split()] == after


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("rule", RULES)
async def test_a_cut_through_a_running_stream_is_one_cut(rule: str, tmp_path: Path) -> None:
    """Taken by the consumer while frames are in flight; what is behind the cut is what the next one goes on with."""
    stream = samples(40)
    first = await build(RULES[rule]())
    seen: list[float | None] = []
    async with asyncio.timeout(20), first:
        async for prediction in first.run(stream, window=6):
            seen.append(prediction.loss)
            if prediction.index == 9:
                taken = await first.checkpoint(tmp_path / "c")
        end = first.state_dict()
    assert taken.key == taken.frames - 1
    assert 10 <= taken.frames <= 16  # some were in flight
    second = await build(RULES[rule]())
    found = await second.restore(tmp_path / "c")
    assert await losses(second, stream[found.frames :]) == seen[found.frames :]
    assert same(second.state_dict(), end)


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_buffers_and_random_numbers_come_back(tmp_path: Path) -> None:
    """Batch norm's statistics are weights; with ``rng=True`` dropout draws what it would have drawn."""
    stream = samples(rows=4)

    def model() -> nn.Sequential:
        inner = network()
        return nn.Sequential(inner[0], nn.BatchNorm1d(8), nn.Dropout(0.5), inner[4])

    with pytest.warns(UserWarning, match="BatchNorm1d"):
        first, second = [await build(RULES["exact"](), model=model(), balance=[2, 2], rows=4) for _ in range(2)]
    with torch.random.fork_rng(devices=[]):
        async with first:
            await losses(first, stream[:CUT])
            await first.checkpoint(tmp_path / "c", rng=True)
            after = await losses(first, stream[CUT:])
        torch.manual_seed(99)
        await second.restore(tmp_path / "c")
        assert await losses(second, stream[CUT:]) == after
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_stages_made_by_hand_are_kept_too(tmp_path: Path) -> None:
    """Under "stage.key"; a function between two modules has nothing to keep."""

    def made() -> Pipeline:
        inner = network()
        first, last = Stage(inner[0], name="first"), Stage(inner[4], name="last")
        return Pipeline.from_stages([first, torch.tanh, last], learner=RULES["1f1b momentum"]())

    stream = samples()
    one = await asyncio.to_thread(made)
    async with one:
        await losses(one, stream[:CUT])
        taken = await one.checkpoint(tmp_path / "c")
        after = await losses(one, stream[CUT:])
    assert sorted(taken.weights) == ["first.bias", "first.weight", "last.bias", "last.weight"]
    other = await asyncio.to_thread(made)
    await other.restore(tmp_path / "c")
    assert await losses(other, stream[CUT:]) == after


@pytest.mark.asyncio
async def test_a_running_pipeline_goes_back(tmp_path: Path) -> None:
    """Restored between two frames of a run that knows nothing of it; the counters go back too."""
    stream = samples()
    pipeline = await build(RULES["exact"]())
    async with pipeline:
        await losses(pipeline, stream[:CUT])
        await pipeline.checkpoint(tmp_path / "c")
        after = await losses(pipeline, stream[CUT:])
        await pipeline.restore(tmp_path / "c")
        assert await losses(pipeline, stream[CUT:]) == after
        assert (await pipeline.checkpoint(tmp_path / "d")).frames == FRAMES


@pytest.mark.asyncio
async def test_concurrent_runs_see_no_more_than_a_pause(tmp_path: Path) -> None:
    """Two runs, checkpoints all the time: every frame comes, in its order."""
    pipeline = await build(RULES["1f1b momentum"]())
    stream = samples()
    async with asyncio.timeout(20), pipeline, asyncio.TaskGroup() as group:
        runs = [group.create_task(losses(pipeline, stream)) for _ in range(2)]
        while not all(run.done() for run in runs):
            await pipeline.checkpoint(tmp_path / "c")
    assert [len(run.result()) for run in runs] == [FRAMES, FRAMES]
    assert pipeline.stats().frames_out == 2 * FRAMES


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_pipeline_that_does_not_learn_keeps_weights_and_position(tmp_path: Path) -> None:
    """Nothing of a learner is written, and nothing of one is asked for."""
    pipeline = await build(None)
    await losses(pipeline, samples(5))
    taken = await pipeline.checkpoint(tmp_path / "c", position=lambda: ["row", 5])
    assert (taken.rule, taken.frames, taken.position) == (None, 5, ["row", 5])
    fresh = await build(None, model=nn.Sequential(*[type(m)(*_sizes(m)) for m in network()]))
    assert not same(fresh.state_dict(), pipeline.state_dict())
    await fresh.restore(tmp_path / "c")
    assert same(fresh.state_dict(), pipeline.state_dict())


def _sizes(module: nn.Module) -> tuple[int, ...]:
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_frames_are_counted_over_openings_and_checkpoints(tmp_path: Path) -> None:
    """Three openings, then a restored pipeline that is opened twice."""
    pipeline = await build(RULES["exact"]())
    for _ in range(3):
        await losses(pipeline, samples(4))
    assert (await pipeline.checkpoint(tmp_path / "c")).frames == 12
    other = await build(RULES["exact"]())
    await losses(other, samples(7))
    await other.restore(tmp_path / "c")
    await losses(other, samples(5))
    assert (await other.checkpoint(tmp_path / "d")).frames == 17


# ------------------------------------------------------------------ what does not fit


def wider() -> nn.Sequential:
    """Another network with as many layers."""
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4))


def two_groups(named: Any) -> list[dict[str, Any]]:
    """One group for each parameter."""
    return [{"params": [parameter]} for _, parameter in named]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rule": (
        {"rule": lambda: Exact(loss=cross_entropy, optimizer=MOMENTUM)},
        "rule is Delayed, this pipeline's is Exact",
    ),
    "no rule": ({"rule": lambda: None}, "rule is Delayed, this pipeline's is none"),
    "cut": ({"balance": [1, 2, 2]}, r"layers .*, these have \[1, 2, 2\]"),
    "stages": ({"balance": [3, 2]}, r"layers .*, these have \[3, 2\]"),
    "optimizer": (
        {"rule": lambda: Delayed(order="1f1b", loss=cross_entropy, optimizer=ADAM)},
        "optimizer of stage '0…1': SGD there, Adam here",
    ),
    "scheduler": (
        {"rule": lambda: Delayed(order="1f1b", loss=cross_entropy, optimizer=MOMENTUM, scheduler=HALVING)},
        "scheduler of stage '0…1': none there, StepLR here",
    ),
    "groups": (
        {"rule": lambda: Delayed(order="1f1b", loss=cross_entropy, optimizer=MOMENTUM, param_groups=two_groups)},
        r"parameter groups of stage '0…1': \[2\] there, \[1, 1\] here",
    ),
    "shape": ({"model": wider}, r"'0.bias' has shape \(8,\), the model's is \(9,\)"),
    "frozen layer": ({"frozen": 2}, "parameters of stage '2…3': {'2.weight': "),
}


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("what", OTHERS)
async def test_a_checkpoint_that_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    """The error names the difference, and nothing was changed."""
    pipeline = await build(RULES["1f1b momentum"]())
    await losses(pipeline, samples(5))
    await pipeline.checkpoint(tmp_path / "c")
    changes, says = OTHERS[what]
    model = changes.get("model", network)()
    if "frozen" in changes:
        model[changes["frozen"]].requires_grad_(False)
    other = await build(
        changes.get("rule", RULES["1f1b momentum"])(), model=model, balance=changes.get("balance", (2, 2, 1))
    )
    before = other.state_dict()
    with pytest.raises(ConfigurationError, match=says):
        await other.restore(tmp_path / "c")
    assert same(other.state_dict(), before)


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("what", ["rule", "no rule", "cut", "stages", "optimizer"])
async def test_its_weights_alone_are_taken_by_any_cut(what: str, tmp_path: Path) -> None:
    """``weights_only=True`` leaves optimizer and position as they are."""
    pipeline = await build(RULES["1f1b momentum"]())
    await losses(pipeline, samples(5))
    await pipeline.checkpoint(tmp_path / "c")
    changes, _ = OTHERS[what]
    other = await build(changes.get("rule", RULES["1f1b momentum"])(), balance=changes.get("balance", (2, 2, 1)))
    await other.restore(tmp_path / "c", weights_only=True)
    assert same(other.state_dict(), pipeline.state_dict())
    await losses(other, samples(3))
    assert (await other.checkpoint(tmp_path / "d")).frames == 3


@pytest.mark.asyncio
@pytest.mark.parametrize("opened", [False, True], ids=["closed", "open"])
async def test_a_stage_that_refuses_its_state_undoes_the_others(
    opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and optimizers of all stages are as before, and learning goes on from there."""
    stream = samples()
    one, two, other = [await build(RULES["1f1b momentum"]()) for _ in range(3)]
    for pipeline in (one, two):
        await losses(pipeline, stream[:CUT])
    await losses(other, samples(3))
    await other.checkpoint(tmp_path / "c")
    load = StageLearner.load_state_dict

    def refuse(learner: StageLearner, state: dict[str, Any]) -> None:
        if learner.site.index == 2 and state["learned"] == 3:
            raise ValueError("not with me")
        load(learner, state)

    if opened:
        await one.__aenter__()
    with monkeypatch.context() as patch, pytest.raises(ConfigurationError, match=r"nothing was changed.*not with me"):
        patch.setattr(StageLearner, "load_state_dict", refuse)
        await one.restore(tmp_path / "c")
    assert await losses(one, stream[CUT:]) == await losses(two, stream[CUT:])
    await one.aclose()
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.asyncio
async def test_closing_in_the_middle_of_a_restore_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settle: Settle
) -> None:
    """A stage that was done already gets its old weights back; the caller is told that the pipeline closed."""
    pipeline = await build(RULES["exact"]())
    await losses(pipeline, samples(5))
    await pipeline.checkpoint(tmp_path / "c")
    await losses(pipeline, samples(5))
    before = pipeline.state_dict()
    entered, gate = asyncio.Event(), asyncio.Event()
    load, loop = StageLearner.load_state_dict, asyncio.get_running_loop()

    def slow(learner: StageLearner, state: dict[str, Any]) -> None:
        load(learner, state)
        if learner.site.index == 1 and not entered.is_set():
            loop.call_soon_threadsafe(entered.set)
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(20)

    monkeypatch.setattr(StageLearner, "load_state_dict", slow)
    async with asyncio.timeout(20), pipeline:
        restoring = asyncio.ensure_future(pipeline.restore(tmp_path / "c"))
        await entered.wait()
        closing = asyncio.ensure_future(pipeline.aclose())
        await settle(until=lambda: pipeline._closing is not None and pipeline._closing.error is not None)
        gate.set()
        await closing
        with pytest.raises(ClosedError):
            await restoring
    assert same(pipeline.state_dict(), before)


# ------------------------------------------------------------------ files


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_the_folder_holds_three_plain_files(tmp_path: Path) -> None:
    """Two of tensors and one of JSON; weights under the model's own keys, which any reader of safetensors finds."""
    pipeline = await build(RULES["exact"]())
    await losses(pipeline, samples(3))
    await pipeline.checkpoint(tmp_path / "deep" / "c")
    folder = tmp_path / "deep" / "c"
    assert sorted(path.name for path in folder.iterdir()) == sorted([LEARNER, STATE, WEIGHTS])
    assert [path.name for path in folder.parent.iterdir()] == ["c"]
    assert same(load_file(folder / WEIGHTS), pipeline.state_dict())
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    assert (state["schema"], state["versions"]["aiotime"]) == (1, aiotime.__version__)


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("at", [0, 1])
async def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at one of the two files: the error says so, no rest lies about, and the old one is whole."""
    pipeline = await build(RULES["exact"]())
    await losses(pipeline, samples(3))
    await pipeline.checkpoint(tmp_path / "c")
    before = pipeline.state_dict()
    await losses(pipeline, samples(3))
    save, calls = save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > at:
            raise OSError("no space left")
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ConfigurationError, match="no space left"):
        await pipeline.checkpoint(tmp_path / "c")
    assert inside(tmp_path) == ["c"]
    assert same(dict((await asyncio.to_thread(Checkpoint.read, tmp_path / "c")).weights), before)


def written(path: Path, **changes: Any) -> Checkpoint:
    """A small one, written."""
    values: dict[str, Any] = {"pipeline": "p", "weights": {"w": torch.ones(2)}, "versions": {"aiotime": "0"}}
    made = Checkpoint(**values | changes)
    made.write(path)
    return made


def test_the_old_one_is_found_where_the_machine_died_between_two_renames(tmp_path: Path) -> None:
    """Under its other name; the next one that is written takes its place and leaves nothing else."""
    written(tmp_path / "c", frames=1)
    (tmp_path / "c").rename(tmp_path / ".c.previous")
    assert Checkpoint.read(tmp_path / "c").frames == 1
    written(tmp_path / "c", frames=2)
    assert Checkpoint.read(tmp_path / "c").frames == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_something_else_is_not_overwritten(tmp_path: Path) -> None:
    """A file, or a folder with other things in it; an empty folder will do."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diary").write_text("mine", encoding="utf-8")
    for name in ("file", "folder"):
        with pytest.raises(ConfigurationError, match="is no checkpoint"):
            written(tmp_path / name)
    (tmp_path / "empty").mkdir()
    written(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder"]
    assert (tmp_path / "folder" / "diary").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / STATE).write_text("{", encoding="utf-8"), "cannot be read: JSONDecodeError"),
        (lambda folder: (folder / LEARNER).write_bytes(b"12345678"), "cannot be read"),
        (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read: FileNotFoundError"),
        (lambda folder: (folder / STATE).unlink(), "no checkpoint is at"),
        (lambda folder: (folder / STATE).write_text('{"schema": 7, "versions": {"aiotime": "9"}}'), "schema 7, .* 9"),
    ],
    ids=["json", "tensors", "file", "state", "schema"],
)
def test_a_damaged_one_is_refused(spoil: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    """With the cause; so is a folder that is none."""
    written(tmp_path / "c")
    spoil(tmp_path / "c")
    with pytest.raises(ConfigurationError, match=says):
        Checkpoint.read(tmp_path / "c")


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_position_that_is_no_plain_value_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The message names what it is."""
    pipeline = await build(RULES["exact"]())
    with pytest.raises(ConfigurationError, match=r"position\['file'\] is a PosixPath|position\['file'\] is a Windows"):
        await pipeline.checkpoint(tmp_path / "c", position={"file": tmp_path})
    assert not inside(tmp_path)
    async with pipeline:  # and the door is open again
        assert await losses(pipeline, samples(2))


@pytest.mark.asyncio
async def test_a_cancelled_checkpoint_opens_the_door_again(tmp_path: Path) -> None:
    """Cancelled while it waits for the cut: frames enter, and the next checkpoint is taken."""
    pipeline = await build(RULES["1f1b momentum"]())
    async with asyncio.timeout(20), pipeline:
        for turns in range(4):
            task = asyncio.ensure_future(pipeline.checkpoint(tmp_path / "c"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert len(await losses(pipeline, samples(3))) == 3
        assert (await pipeline.checkpoint(tmp_path / "c")).frames == 12


# ------------------------------------------------------------------ values

TENSORS = st.sampled_from(
    [
        torch.tensor(3),
        torch.tensor([1.5, math.nan]),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        torch.arange(4, dtype=torch.uint8),
        torch.tensor([1 + 2j]),
    ]
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.text(max_size=3) | st.integers() | st.sampled_from(["$tensor", "$dict", "a.b", "1"])
VALUES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


def equal(one: Any, other: Any) -> bool:
    """Same types, same bits, nan equal to nan."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one.isnan(), other.isnan())
            and (
                torch.equal(
                    one.nan_to_num() if one.is_floating_point() else one,
                    other.nan_to_num() if other.is_floating_point() else other,
                )
            )
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


@given(value=VALUES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_nest_of_plain_values_and_tensors_comes_back(value: Any, tmp_path: Path) -> None:
    """Through JSON and safetensors, whatever the names and keys."""
    target = tmp_path / "c"
    written(target, position=value)
    assert equal(Checkpoint.read(target).position, value)


def test_tensors_under_one_name_are_kept_apart() -> None:
    """The keys 1 and "1" have the same name in a path."""
    tensors: dict[str, torch.Tensor] = {}
    packed = pack({1: torch.tensor(1), "1": torch.tensor(2)}, tensors, "x")
    found = unpack(json.loads(json.dumps(packed)), tensors)
    assert {key: int(value) for key, value in found.items()} == {1: 1, "1": 2}


def test_other_values_are_refused_by_name() -> None:
    """Where it stands is said."""
    with pytest.raises(ConfigurationError, match=r"state\['a'\]\[1\] is a set"):
        pack({"a": [1, {2}]}, {}, "state")

"""benchmarks.peers: feeds and clocks, processes that fail, the check of outputs, tables from figures made up here."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks are no installed package; and the thread count is global."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def outcomes_of(**rates: list[float] | str) -> dict[str, Any]:
    """Outcomes by name: rates of the rounds, or why it failed."""
    from benchmarks.peers.race import Outcome

    return {
        name: Outcome(failed=found) if isinstance(found, str) else Outcome(rates=found, cpu=[1e-3] * len(found))
        for name, found in rates.items()
    }


# ---------------------------------------------------------------- feeds


def test_a_counted_feed_repeats_its_frames() -> None:
    """The same frames plainly and asynchronously."""
    from benchmarks.peers.stream import Counted

    async def gather() -> list[int]:
        return [frame async for frame in Counted([1, 2, 3], 5)]

    assert list(Counted([1, 2, 3], 5)) == [1, 2, 3, 1, 2]
    assert asyncio.run(gather()) == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("plainly", [True, False])
def test_frames_arrive_over_a_pipe(plainly: bool) -> None:
    """All of them, with the stamps that the pacer wrote."""
    from benchmarks.peers.pacer import pace
    from benchmarks.peers.stream import Arriving

    source, pipe = os.pipe()
    feed = Arriving(["a", "b", "c"], 40, source)

    async def gather() -> list[str]:
        return [frame async for frame in feed]

    pacer = threading.Thread(target=pace, args=(pipe,), kwargs={"rate": 20_000.0, "number": 40})
    pacer.start()
    try:
        frames = list(feed) if plainly else asyncio.run(gather())
    finally:
        pacer.join()
        os.close(source)
        os.close(pipe)
    assert frames == ["abc"[k % 3] for k in range(40)]
    assert len(feed.stamps) == 40
    assert feed.stamps == sorted(feed.stamps)


def test_the_pacer_waits_between_frames() -> None:
    """At 1,000 frames/s the tenth is due 9 ms after the first; never before."""
    from benchmarks.peers.pacer import pace
    from benchmarks.peers.stream import STAMP

    source, pipe = os.pipe()
    pace(pipe, rate=1000.0, number=10)
    stamps = [stamp for (stamp,) in STAMP.iter_unpack(os.read(source, 80))]
    os.close(source)
    os.close(pipe)
    assert stamps[-1] - stamps[0] >= 0.0089


# ---------------------------------------------------------------- works


def test_every_work_is_the_same_twice_and_cut_equivalently() -> None:
    """Built anew it has the same weights and frames; its stages one after the other are the whole."""
    from benchmarks.peers.works import HOMES, build
    from benchmarks.peers.works.work import difference

    for name in HOMES:
        one, other = build(name, quick=True), build(name, quick=True)
        with torch.no_grad():
            value = one.frames[1]
            for stage in one.stages:
                value = stage(value)
            assert difference(value, other.plain(other.frames[1])) <= 1e-6, name


def test_differences_are_seen() -> None:
    """Of value, of shape, of length."""
    from benchmarks.peers.works.work import difference

    assert difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == pytest.approx(0.5)
    assert difference(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert difference([(1.0, 2.0)], [(1.0, 2.0)]) == 0.0
    assert difference([(1.0, 2.0)], []) == float("inf")


# ---------------------------------------------------------------- contenders


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["one", "two", "threads", "bounded", "executor", "lockstep", "ours"])
@pytest.mark.parametrize("work", ["trivial", "mlp64", "decode"])
def test_contenders_answer_as_the_plain_model_does(name: str, work: str) -> None:
    """The check that every process makes before it is measured, here in this process; then a turn."""
    from benchmarks.peers.child import Child

    child = Child(name, -1)
    opened = child.open(work, {}, quick=True)
    assert opened["difference"] <= 1e-3
    turn = child.rate(8)
    child.close()
    assert turn["frames"] == 24
    assert turn["rate"] > 0


@pytest.mark.parametrize("name", ["one", "lockstep", "ours_1f1b"])
def test_contenders_learn(name: str) -> None:
    """Their parameters move as far as the plain loop's."""
    from benchmarks.peers.child import Child

    child = Child(name, -1)
    child.open("learn_mlp", {}, quick=True)
    child.close()


def test_wrong_outputs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that changes order, and one that does not learn."""
    from benchmarks.peers.child import Child, WrongError
    from benchmarks.peers.contenders.sequential import Sequential
    from benchmarks.peers.stream import Feed, Sink

    class Swaps(Sequential):
        def run(self, feed: Feed, sink: Sink) -> None:
            own = Sink(keep=True)
            super().run(feed, own)
            for output in reversed(own.outputs):
                sink.take(output)

    class Forgets(Sequential):
        def _learn(self, feed: Feed, sink: Sink) -> None:
            for frame in feed:
                sink.take(self._work.model(frame))

    for made, work in ((Swaps(), "mlp64"), (Forgets(), "learn_mlp")):
        child = Child("one", -1)
        monkeypatch.setattr(type(child._entry), "make", lambda _, made=made: made)
        with pytest.raises(WrongError):
            child.open(work, {}, quick=True)
        monkeypatch.undo()


def test_a_stage_that_raises_is_raised_by_those_by_hand() -> None:
    """Not swallowed, no hang."""
    from benchmarks.peers.contenders.executor import Executor
    from benchmarks.peers.contenders.lockstep import LockStep
    from benchmarks.peers.contenders.threads import Threads
    from benchmarks.peers.stream import Counted, Sink
    from benchmarks.peers.works import build

    def fails(value: Any) -> Any:
        raise ValueError("no")

    for contender in (Threads(), Executor(), LockStep()):
        work = build("trivial", quick=True)
        work.stages = [work.stages[0], fails]
        contender.open(work)
        with pytest.raises(ValueError, match="no"):
            contender.run(Counted(work.frames, 1), Sink())
        contender.close()


def test_reasons_fit_a_table_and_name_no_path() -> None:
    """One line, the file's name only."""
    from benchmarks.peers.child import reason
    from benchmarks.peers.contenders.contender import CannotError

    assert reason(OSError("cannot\nopen /some/where/library.so here")) == "OSError: cannot open library.so here"
    assert reason(CannotError("tensors only")) == "tensors only"
    assert reason(ExceptionGroup("failed", [ValueError("inner")])) == "ValueError: inner"


# ---------------------------------------------------------------- processes


def settings_for(folder: Path) -> Any:
    """Of a race at toy sizes."""
    from benchmarks.peers.race import Settings, interpreters

    return Settings(rounds=1, seconds=0.01, quick=True, pythons=interpreters(None), cache=folder)


def test_peers_that_are_missing_are_shown_as_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No environment, no module, and a work that it cannot do; the others are measured."""
    from benchmarks.peers.contenders import ENTRIES, Entry
    from benchmarks.peers.race import Field, race

    monkeypatch.delenv("AIOTIME_RAY_PYTHON", raising=False)
    assert Entry("x", "x:X", "framework", needs=("no_such_module_at_all",)).missing() == ["no_such_module_at_all"]
    outcomes = race("decode", ["one", "torchgpipe", "ray"], Field(settings_for(tmp_path)))
    assert outcomes["one"].failed is None
    assert outcomes["one"].rates
    assert outcomes["one"].latencies
    assert "--ray-python" in (outcomes["ray"].failed or "")
    assert any(word in (outcomes["torchgpipe"].failed or "") for word in ("not installed", "tensors only"))
    assert ENTRIES["ray"].python == "ray"


def test_a_process_that_dies_or_hangs_fails(tmp_path: Path) -> None:
    """By signal, by silence; and nothing of it is left."""
    from benchmarks.peers.process import FailedError
    from benchmarks.peers.race import Field

    field = Field(settings_for(tmp_path))
    one, other = field.spawn("one"), field.spawn("one")
    try:
        field.greet(one)
        with pytest.raises(FailedError, match="no answer to 'collect'"):
            one.ask("collect", timeout=0.05)  # it is stopped
        other.greet(timeout=60)
        os.kill(other._process.pid, signal.SIGKILL)
        with pytest.raises(FailedError, match="ended by signal 9"):
            other.ask("collect", timeout=10)
    finally:
        one.end()
        other.end()
    for process in (one, other):
        with pytest.raises(ProcessLookupError):
            os.kill(process._process.pid, 0)


@pytest.mark.compiles
def test_pipelining_over_gloo_answers() -> None:
    """Ranks in processes of their own, frame by frame and in batches with a rest."""
    from benchmarks.peers.child import Child

    for name in ("pipelining", "pipelining8"):
        child = Child(name, -1)
        assert child.open("mlp64", {}, quick=True)["difference"] <= 1e-5
        child.close()


# ---------------------------------------------------------------- tables


def test_ratios_are_taken_within_a_round() -> None:
    """Median of ratios, none where one failed; the best of a group by its median."""
    from benchmarks.peers import tables

    outcomes = outcomes_of(one=[1.0, 10.0, 1.0], two=[2.0, 30.0, 1.0], aot=[5.0, 5.0, 5.0], spdl="not installed: spdl")
    assert tables.ratio(outcomes, "two", "one") == 2.0
    assert tables.ratio(outcomes, "spdl", "one") is None
    assert tables.ratio(outcomes, "ray", "one") is None
    assert tables.best(outcomes, lambda name: name in ("one", "two", "spdl")) == "two"
    assert tables.flagship(outcomes_of(ours=[1.0], ours_auto="no compiler")) == "ours"
    assert tables.flagship(outcomes_of(ours=[1.0], ours_auto=[2.0])) == "ours_auto"


def test_saved_works_are_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One work now, another one earlier: one big table, targets of both, failures with their reasons."""
    pytest.importorskip("matplotlib")
    from benchmarks._harness import Report
    from benchmarks.peers import tables

    monkeypatch.setattr("aiotime.keep_freed_memory", lambda: True)
    arguments = argparse.Namespace(save="here", quick=False, plain_malloc=False)

    def measured(work: str, **rates: list[float] | str) -> Report:
        report = Report(str(tmp_path / "x.py"), question="Is it so?", setup="", arguments=arguments)
        store = tables.Store(report)
        found = outcomes_of(**rates)
        store.add(work, f"title of {work}", found, rounds=2)
        tables.work_table(report, f"title of {work}", found)
        tables.summary(report, store)
        report.finish()
        return report

    measured("trivial", one=[1.0, 1.0], threads=[1.0, 1.0], ours=[0.8, 0.8], spdl="not installed: spdl")
    measured("conv", one=[1.0, 1.0], two=[1.5, 1.5], ours=[1.98, 1.98])
    text = (tmp_path / "results" / "here.md").read_text()
    assert "| trivial | conv |" in text.replace("  ", " ").replace("  ", " ")
    assert "conv: times one thread" in text
    assert "No verdict" in text
    assert "trivial: times SPDL" in text
    assert (tmp_path / "results" / "here.png").exists()
    assert (tmp_path / "results" / "here-trivial.json").exists()
    assert "SPDL failed: not installed: spdl" in capsys.readouterr().out


def test_every_target_has_its_work_and_every_contender_its_class() -> None:
    """Names in the tables of targets and contenders exist."""
    import importlib.util

    from benchmarks.peers import tables
    from benchmarks.peers.contenders import ENTRIES
    from benchmarks.peers.works import HOMES, QUICK

    assert {work for work, *_ in tables.TARGETS} == set(HOMES)
    assert set(QUICK) <= set(HOMES)
    for entry in ENTRIES.values():
        module, _, name = entry.home.partition(":")
        found = importlib.util.find_spec(f"benchmarks.peers.contenders.{module}")
        assert found is not None
        assert found.origin is not None
        assert f"class {name}(" in Path(found.origin).read_text()


@pytest.mark.compiles
def test_curves_run_at_toy_sizes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sub-command prints a table per curve."""
    from benchmarks.peers.__main__ import main

    monkeypatch.setattr("sys.argv", ["benchmarks.peers", "curves", "--quick", "--peers", "threads"])
    main()
    output = capsys.readouterr().out
    assert "**trivial stages; throughput" in output
    assert "p99 in ms" in output

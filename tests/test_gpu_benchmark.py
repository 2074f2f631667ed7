"""The benchmark for a GPU, as far as it can be proved without one: arithmetic, budget, files, driving, native calls."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
NAMES = (
    "budget busy costs drive dry environment green hostcalls lockstep moment nets ours part partime plain place plots "
    "record run runtime sharing suite transfers verdicts waits wakeup"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark; it is no installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.gpu.{name}") for name in NAMES.split()})


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


# ---------------------------------------------------------------------- budget


def test_a_budget_is_spent_by_the_clock(gpu: Any) -> None:
    clock = Clock()
    budget = gpu.budget.Budget(10.0, now=clock)
    clock.time += 4
    assert budget.left == 6.0
    assert budget.share(3) == 2.0
    assert budget.part(100.0).seconds == 6.0
    clock.time += 10
    assert budget.left == 0.0


@pytest.mark.parametrize(
    ("own", "later", "left", "allowed"),
    [
        (10, [20, 30], 60, 10),  # just enough for all
        (10, [20, 30], 70, 20),  # the parts before have saved ten seconds
        (10, [20, 30], 40, 10),  # too little for all: in the order of the parts
        (10, [], 4, 4),
        (10, [], 40, 40),  # the last takes what is left
    ],
)
def test_a_part_takes_what_others_saved_but_not_what_they_count_on(
    gpu: Any, own: float, later: list[float], left: float, allowed: float
) -> None:
    assert gpu.budget.allowance(own, later, left) == allowed


def test_slices_of_a_window_are_rates(gpu: Any) -> None:
    assert gpu.budget.slices([0.1, 0.2, 1.5, 9.9, 10.0, -1.0], 0.0, 10.0, 5) == [1.5, 0.0, 0.0, 0.0, 0.5]
    assert gpu.budget.slices([1.0], 5.0, 5.0) == []


# ---------------------------------------------------------------------- what is written


def test_figures_are_on_disk_when_put_returns(gpu: Any, tmp_path: Path) -> None:
    notebook = gpu.record.Notebook(tmp_path / "part.json")
    notebook.put("a", "b", value=1.23456789)
    assert gpu.record.load(tmp_path / "part.json") == {"a": {"b": 1.23457}}
    notebook.put("a", "c", value=math.nan)
    assert json.loads((tmp_path / "part.json").read_text())["a"] == {"b": 1.23457, "c": None}
    assert gpu.record.load(tmp_path / "absent.json") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_a_record_is_whole_after_every_change(gpu: Any, tmp_path: Path) -> None:
    record = gpu.record.Record(tmp_path / "gpu.json", question="?")
    record.part("one", status="running", budget=3)
    record.part("one", status="done", figures={"x": (1, 2)})
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["parts"] == {"one": {"status": "done", "budget": 3, "figures": {"x": [1, 2]}}}
    assert record.figures("one") == {"x": [1, 2]}
    assert record.figures("two") == {}


def test_no_path_of_the_machine_is_written(gpu: Any) -> None:
    try:
        raise ValueError(f"in {ROOT}/benchmarks and {Path.home()}/x")
    except ValueError as error:
        told = gpu.record.told(error)
    assert "ValueError: in ./benchmarks and ~/x" in told
    assert str(ROOT) not in told
    assert sys.prefix not in gpu.record.plain({"x": [f"{sys.prefix}/lib"]})["x"][0]


# ---------------------------------------------------------------------- two clocks


def test_the_offset_is_what_every_bracket_allows(gpu: Any) -> None:
    """A device whose clock is 5 s behind; launches and answers take what they like."""
    bracket = gpu.moment.Bracket
    found = gpu.moment.offset(
        [bracket(10.0, 5.4, 10.9), bracket(11.0, 6.1, 11.7), bracket(12.0, 7.5, 12.6)]
    )  # offsets allowed: 4.6..5.5, 4.9..5.6, 4.5..5.1
    assert found.low == pytest.approx(4.9)
    assert found.high == pytest.approx(5.1)
    assert found.middle == pytest.approx(5.0)
    assert found.half == pytest.approx(0.1)
    assert found.at == pytest.approx((5.4 + 6.1 + 7.5) / 3)


def test_drift_between_two_calibrations_is_followed(gpu: Any) -> None:
    clocks = gpu.moment.Clocks(gpu.moment.Offset(0.0, 99.9, 100.1), gpu.moment.Offset(10.0, 100.8, 101.2))
    assert clocks.host(5.0) == pytest.approx(105.5)
    assert clocks.uncertainty == pytest.approx(0.2)
    assert clocks.drift == pytest.approx(0.1)
    same = gpu.moment.Offset(1.0, 2.0, 2.0)
    assert gpu.moment.Clocks(same, same).host(3.0) == 5.0


def test_brackets_hold_the_device_time(gpu: Any) -> None:
    """On streams whose device keeps the host's time, the offset is the reference's own moment."""
    runtime = gpu.dry.DryRuntime()
    try:
        stream, reference = runtime.stream(), runtime.event(timing=True)
        stream.record_event(reference)
        stream.synchronize()
        found = gpu.moment.offset(gpu.moment.brackets(runtime, stream, reference, count=20))
        assert found.low <= reference.stamp <= found.high
    finally:
        runtime.close()


def test_a_stage_that_was_over_is_not_blamed_on_the_way(gpu: Any) -> None:
    sample = gpu.wakeup.Sample(asked=2.0, resumed=2.5, completion=1.0)
    assert sample.late
    assert sample.latency == 0.5
    assert gpu.wakeup.Sample(asked=2.0, resumed=2.5, completion=2.25).latency == 0.25


def test_frames_fit_the_time(gpu: Any) -> None:
    assert gpu.wakeup.frames_for(10e-6, 1.0) == gpu.wakeup.MOST
    assert gpu.wakeup.frames_for(10e-3, 1.0) == 98
    assert gpu.wakeup.frames_for(10e-3, 0.01) == gpu.wakeup.FEWEST


# ---------------------------------------------------------------------- waiting


@pytest.mark.asyncio
@pytest.mark.may_block  # an event of a pretended GPU lets go of the GIL by sleeping for no time
async def test_every_way_to_wait_ends(gpu: Any) -> None:
    """Each way tells of each frame, in order, and leaves no thread, reader or descriptor behind."""
    runtime = gpu.dry.DryRuntime()
    try:
        stream = runtime.stream()
        for kind in gpu.waits.WAYS:
            way = kind(runtime, stream, 5)
            way.open()
            for number in range(1, 5):
                end = runtime.event()
                runtime.spin(stream, 1e-3)
                stream.record_event(end)
                way.arm(number)
                async with asyncio.timeout(20):
                    await way.wait(number)
                assert end.query(), kind.name
            await way.close()
    finally:
        runtime.close()


def test_a_native_function_posts_without_python(gpu: Any) -> None:
    """``sem_post`` and ``fflush``, called by address with one pointer, as the driver calls them."""
    runtime = gpu.dry.DryRuntime()
    semaphore, bell = gpu.hostcalls.Semaphore(), gpu.hostcalls.Doorbell()
    try:
        stream = runtime.stream()
        runtime.call_host(stream, semaphore.function, semaphore.argument)
        waiter = threading.Thread(target=semaphore.wait)
        waiter.start()
        waiter.join()
        assert bell.take() == 0
        bell.load()
        bell.load()
        assert bell.take() == 0  # they wait in the buffer
        runtime.call_host(stream, bell.function, bell.argument)
        stream.synchronize()
        assert bell.take() == 2
    finally:
        runtime.close()
        semaphore.close()
        bell.close()


def test_a_loaded_library_is_found_by_name(gpu: Any) -> None:
    found = gpu.hostcalls.loaded("libc.so")
    assert found is not None
    assert Path(found).name.startswith("libc.so")
    assert gpu.hostcalls.loaded("libnothing_of_that_name.so") is None


# ---------------------------------------------------------------------- how busy


def test_the_union_joins_what_overlaps(gpu: Any) -> None:
    assert gpu.busy.union([(3, 4), (0, 1), (0.5, 2), (4, 4), (2, 2.5)]) == [(0, 2.5), (3, 4)]
    assert gpu.busy.covered([(0, 2), (1, 3), (8, 20)], 1, 10) == 4


def test_idle_is_what_no_kernel_covers(gpu: Any) -> None:
    """Kernels of two streams over ten seconds, one second without any; filling and draining are cut off."""
    kernels = [(0.0, 4.0), (2.0, 5.0), (6.0, 10.0)]
    assert gpu.busy.steady(kernels) == pytest.approx((1.0, 9.0))
    assert gpu.busy.idle_share(kernels) == pytest.approx(1 / 8)
    assert gpu.busy.idle_share([]) is None
    assert gpu.busy.overlap(kernels) == pytest.approx(11 / 9)
    assert gpu.busy.overlap([]) is None


def test_a_trace_has_operators(gpu: Any) -> None:
    x = torch.rand(64, 64)
    with gpu.busy.Trace(dry=True) as trace:
        for _ in range(5):
            x = x @ x
    found = trace.figures()
    assert found["kernels"] >= 5
    assert 0 <= found["idle"] < 1
    assert found["copies"] == 0


# ---------------------------------------------------------------------- driving


class Belt:
    """A loop that takes a second for each frame and gives one back when ``depth`` are on it."""

    def __init__(self, clock: Clock, depth: int = 2) -> None:
        self.clock = clock
        self.depth = depth
        self.frames: list[int] = []

    @property
    def in_flight(self) -> int:
        return len(self.frames)

    def push(self, number: int) -> list[int]:
        self.clock.time += 1
        self.frames.append(number)
        return [self.frames.pop(0)] if len(self.frames) == self.depth else []

    def poll(self) -> list[int]:
        self.clock.time += 1
        return [self.frames.pop(0)]

    def flush(self) -> list[int]:
        done, self.frames = self.frames, []
        return done

    def result(self, number: int) -> torch.Tensor:
        return torch.tensor(number)


def test_saturation_counts_from_result_to_result(gpu: Any) -> None:
    clock = Clock()
    run = gpu.drive.saturate(Belt(clock, depth=3), 10.0, fewest=3, now=clock)
    assert len(run.stamps) == 10
    assert run.rate == pytest.approx(1.0)
    assert run.latencies == [3.0] * 10
    assert run.figures()["p99_ms"] == 3000


def test_paced_latency_counts_from_the_arrival(gpu: Any) -> None:
    """A second for the push, another for the poll; frames that come twice as fast wait for those before them."""
    clock = Clock()

    def rest(seconds: float) -> None:
        clock.time += seconds

    run = gpu.drive.pace(Belt(clock), 0.1, 50.0, fewest=3, now=clock, rest=rest)
    assert run.latencies == [2.0] * 5
    run = gpu.drive.pace(Belt(clock), 2.0, 2.0, fewest=3, now=clock, rest=rest)  # twice what it can take
    assert run.latencies == [2.0, 2.5, 3.0, 3.5]


def test_the_answer_is_the_first_frames(gpu: Any) -> None:
    assert gpu.drive.answer(Belt(Clock(), depth=3)) == 0
    belt = Belt(Clock())
    belt.frames = [7]
    with pytest.raises(RuntimeError, match="one frame went in"):
        gpu.drive.answer(belt)


# ---------------------------------------------------------------------- the contest


@pytest.mark.parametrize("learns", [False, True])
def test_contenders_say_what_the_net_says(gpu: Any, learns: bool) -> None:
    """Plain loops and lock-step, each of their frames in order, the first and later ones."""
    task, place = gpu.nets.Task(4, 8, learns), gpu.place.HostPlace()
    pictures = gpu.nets.frames(task, place)
    wanted = [gpu.nets.reference(task, place, picture) for picture in pictures]
    makers: list[Callable[[], Any]] = [
        lambda: gpu.plain.PlainLoop(task, place, ahead=1, graph=False),
        lambda: gpu.plain.PlainLoop(task, place, ahead=3, graph=True),
        lambda: gpu.lockstep.LockStep(task, place, stages=3, graph=False),
        lambda: gpu.lockstep.LockStep(task, place, stages=2, graph=True),
    ]
    for make in makers:
        loop, came = make(), []
        for number in range(6):
            for done in loop.push(number):
                came.append(done)
                assert gpu.nets.distance(loop.result(done), wanted[done % len(wanted)]) < 1e-3
        came += loop.flush()
        assert came == list(range(6))
        assert loop.in_flight == 0
        assert loop.poll() == []
        loop.close()


def test_a_net_is_cut_without_a_change(gpu: Any) -> None:
    whole, cut = gpu.nets.net(7), torch.nn.Sequential(*gpu.nets.parts(7, 3))
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(whole(x), cut(x))
    assert [len(part) for part in gpu.nets.parts(8, 4)] == [2, 2, 2, 2]


def test_the_most_telling_contenders_come_first(gpu: Any) -> None:
    found = gpu.partime.contenders()
    names = [each.name for each in found]
    assert len(set(names)) == len(names)
    assert names[0] == gpu.partime.PLAIN
    assert {each.family for each in found[:3]} == {"plain", "lock-step", "aiotime"}


def test_long_frames_leave_the_paced_window_out(gpu: Any) -> None:
    light = gpu.partime.windows(2.0, 0.002, 250.0, dry=False)
    assert light.rate == 250.0
    assert light.fewest == 20
    heavy = gpu.partime.windows(3.0, 0.5, 1.0, dry=False)
    assert heavy.rate is None
    assert heavy.fewest == 3


def test_stages_that_share_run_in_order(gpu: Any) -> None:
    place = gpu.place.HostPlace()
    found = gpu.sharing.Chain(place, [place.stream()] * gpu.sharing.STAGES, 8).run(0.0, fewest=4)
    assert found["frames"] >= 4
    assert found["frame_p50_ms"] == 1.0


# ---------------------------------------------------------------------- verdicts, plots, the tests' output


def figures_of_a_run() -> dict[str, Any]:
    """As a run on a GPU would leave them."""

    def contender(family: str, per_s: float, idle: float, p99: float) -> dict[str, Any]:
        return {"family": family, "saturated": {"per_s": per_s}, "trace": {"idle": idle}, "paced": {"p99_ms": p99}}

    cells = {"10": {"p50_us": 20.0, "uncertainty_us": 4.0}, "100": {"p50_us": 28.0, "uncertainty_us": 4.0}}
    slow = {"10": {"failed": "no"}, "100": {"p50_us": 900.0, "p99_us": 1000.0, "cpu_us_per_frame": 3.0}}
    field = {
        "lock-step": contender("lock-step", 100.0, 0.3, 8.0),
        "lock-step, graph": contender("lock-step", 200.0, 0.1, 4.0),
        "aiotime": contender("aiotime", 250.0, 0.01, 3.0),
        "aiotime, more": {"failed": "out of memory"},
    }
    copies = {"16 KiB": {"pageable": {"gb_per_s": 1.0, "host_us": 5.0}, "ring": {"failed": "no"}}}
    ways = {"64²": {"one stream": {"per_s": 10.0}, "a stream each": {"per_s": 20.0}, "green": {"not available": "no"}}}
    return {
        "wake-up": {"figures": {"cells": {"asyncio": {"aiotime's poller": cells, "sleep(1 ms) + query": slow}}}},
        "partime": {"figures": {"tasks": {"30 layers": {"contenders": field}, "150 layers": {"contenders": {}}}}},
        "transfers": {"figures": {"copies": copies}},
        "sharing": {"figures": {"ways": ways}},
    }


def test_verdicts_count_the_uncertainty_and_take_the_strongest_rival(gpu: Any) -> None:
    found = {each["what"]: each for each in gpu.verdicts.verdicts(figures_of_a_run())}
    assert found["wake-up p50, 10 µs stages, asyncio"]["met"] is True
    late = found["wake-up p50, 100 µs stages, asyncio"]
    assert (late["value"], late["met"]) == (32.0, False)
    ratio = found["30 layers: aiotime over lock-step, graph"]
    assert (ratio["value"], ratio["met"]) == (1.25, False)
    assert found["30 layers: GPU idle, aiotime"]["met"] is True
    assert found["30 layers: p99 at half load, aiotime over lock-step, graph"]["value"] == 0.75
    assert found["150 layers: aiotime against lock-step"]["met"] is None
    assert [each["met"] for each in gpu.verdicts.verdicts({})] == [None, None]


def test_pictures_are_drawn_from_the_file_alone(gpu: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = {"parts": figures_of_a_run()}
    assert gpu.plots.draw(data, tmp_path) == {name: f"{name}.png" for name in gpu.plots.PLOTS}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in gpu.plots.PLOTS}
    assert set(gpu.plots.draw({"parts": {}}, tmp_path).values()) == {"nothing to draw"}


def test_a_broken_picture_costs_nothing_else(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def broken(data: Any, plot: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(gpu.plots, "PLOTS", {"broken": broken, "sharing": gpu.plots.sharing})
    told = gpu.plots.draw({"parts": figures_of_a_run()}, tmp_path)
    assert told == {"broken": "failed: KeyError: 'x'", "sharing": "sharing.png"}


def test_the_summary_of_the_tests_is_read(gpu: Any) -> None:
    output = "...\nFAILED tests/cuda/test_cuda.py::a - no\n1 failed, 93 passed, 2 skipped in 41.20s\n"
    assert gpu.suite.counts(output) == {"failed": 1, "passed": 93, "skipped": 2}
    assert gpu.suite.failures(output) == ["FAILED tests/cuda/test_cuda.py::a - no"]
    assert gpu.suite.counts("no tests ran in 0.1s") == {}


def test_green_contexts_say_why_not(gpu: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this is about their absence")
    with pytest.raises(gpu.green.Unavailable, match="PyTorch"):
        gpu.green.by_torch(8)
    with pytest.raises(gpu.green.Unavailable, match="the driver refused: CUDA_ERROR_NOT_SUPPORTED"):
        gpu.green.check(_Code(801))


class _Code(int):
    name = "CUDA_ERROR_NOT_SUPPORTED"


# ---------------------------------------------------------------------- parts


def test_a_cell_that_fails_is_written_down_and_the_rest_goes_on(gpu: Any) -> None:
    def broken() -> None:
        raise ValueError("this one")

    part = gpu.part.Part("costs", 10.0, dry=True)
    with part.guard("a", "b"):
        broken()
    part.put("a", "c", value=1)
    assert part.figures["a"]["c"] == 1
    assert part.figures["a"]["b"]["failed"] == "ValueError: this one"
    assert "Traceback" in part.figures["a"]["b"]["traceback"]
    assert part.failures == 1


def test_a_part_that_fails_leaves_its_traceback(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(part: Any) -> None:
        part.put("before", value=1)
        raise OSError("gone")

    monkeypatch.setattr(gpu.costs, "run", run)
    part = gpu.part.Part("costs", 10.0, dry=True)
    assert gpu.part.perform(part) == "failed"
    assert part.figures["before"] == 1
    assert part.figures["failed"] == "OSError: gone"
    assert "OSError: gone" in part.figures["traceback"]


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own(tmp_path: Path) -> None:
    """As a script, with its JSON and its plots in a folder; nothing elsewhere."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/run.py", "--dry", "--parts", "transfers", "costs", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == {"transfers": "done", "costs": "done"}
    assert found["parts"]["transfers"]["figures"]["violations"] == []
    assert found["parts"]["costs"]["figures"]["cells_failed"] == 0
    assert found["dry"] is True
    assert str(ROOT) not in (tmp_path / "gpu.json").read_text()


def test_a_part_that_takes_too_long_is_ended(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has written is kept; the run goes on."""
    monkeypatch.setattr(gpu.run, "STARTING", 0.0)
    found = gpu.run.apart("partime", 0.2, dry=True, record=gpu.record.Record(None))
    assert found["status"] == "cut off"


def test_nothing_is_measured_without_a_gpu(
    gpu: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.delenv("AIOTIME_REQUIRE_CUDA", raising=False)
    assert gpu.run.main(["--out", str(tmp_path)]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    monkeypatch.setenv("AIOTIME_REQUIRE_CUDA", "1")
    assert gpu.run.main(["--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_files_go_where_they_are_wanted(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.run.folder(gpu.run.arguments([])) == ROOT / "benchmarks" / "gpu" / "results"
    assert gpu.run.folder(gpu.run.arguments(["--quick"])) is None
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.run.folder(gpu.run.arguments([])) == tmp_path
    assert gpu.run.folder(gpu.run.arguments(["--out", "x"])) == Path("x")

"""Recording slices from any thread, and the file for Perfetto: lanes, arrows, times, validity."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotime.errors import ConfigurationError
from aiotime.observe.meter import Recorder, Tracer
from aiotime.observe.trace import Slice, Trace, flows, lanes


def staircase(stages: int, frames: int, *, zero: float = 0.0) -> Trace:
    """Each stage takes 1 ms on a lane of its own; times as a real clock gives them."""
    trace = Trace()
    for frame in range(frames):
        for stage in range(stages):
            start = zero + (frame + stage) * 1e-3
            trace.slice(f"cpu:{stage}", f"stage {stage}", start, start + 1e-3, frame)
    return trace


def of_phase(trace: Trace, phase: str) -> list[dict[str, Any]]:
    """The events of one kind in the file."""
    return [event for event in trace.to_dict()["traceEvents"] if event["ph"] == phase]


def lane_numbers(trace: Trace) -> dict[str, int]:
    """The thread of each lane in the file."""
    return {event["args"]["name"]: event["tid"] for event in of_phase(trace, "M") if event["name"] == "thread_name"}


# ------------------------------------------------------------------ recording


def test_is_a_tracer() -> None:
    """A recorder writes its jobs into a trace."""
    trace: Tracer = Trace()
    recorder = Recorder("decode", "cpu:0")
    recorder.tracer = trace
    recorder.add(1.0, 1.5, 7)
    assert isinstance(trace, Trace)
    assert trace.slices == [Slice("cpu:0", "decode", 1.0, 1.5, 7)]


def test_slices_are_sorted_by_start() -> None:
    """Streams report in the order in which jobs end; who reads wants the order of time."""
    trace = Trace()
    trace.slice("b", "long", 2.0, 3.0, 1)
    trace.slice("a", "short", 1.0, 1.1)
    assert [piece.name for piece in trace.slices] == ["short", "long"]
    assert trace.slices[0].frame is None


def test_the_newest_are_kept() -> None:
    """A full trace makes room and counts what had to go."""
    trace = Trace(limit=3)
    for frame in range(10):
        trace.slice("cpu:0", "s", float(frame), frame + 0.5, frame)
    assert [piece.frame for piece in trace.slices] == [7, 8, 9]
    assert (len(trace), trace.dropped) == (3, 7)
    assert repr(trace) == "<Trace of 3 events, 7 dropped>"


def test_clear_forgets() -> None:
    """After clear() counting starts anew."""
    trace = Trace(limit=2)
    for frame in range(5):
        trace.slice("cpu:0", "s", float(frame), frame + 0.5, frame)
    trace.clear()
    assert (trace.slices, len(trace), trace.dropped) == ([], 0, 0)
    trace.slice("cpu:0", "s", 1.0, 2.0)
    assert (len(trace), trace.dropped) == (1, 0)
    trace.instant("cpu:0", "x", 3.0)
    trace.counter("y", 4.0, 1)
    assert trace.dropped == 1


def test_limit_is_checked() -> None:
    """A trace of nothing is a mistake."""
    with pytest.raises(ConfigurationError, match="limit=0"):
        Trace(limit=0)


def test_many_threads_write_while_one_reads() -> None:
    """Nothing is lost or counted twice, and reading does not trip over writing."""
    trace = Trace(limit=1000)
    ready = threading.Barrier(5)

    def write(number: int) -> None:
        ready.wait()
        for frame in range(2000):
            trace.slice(f"cpu:{number}", "s", float(frame), frame + 0.5, frame)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    ready.wait()
    while any(writer.is_alive() for writer in writers):
        assert len(trace.slices) <= 1000
    for writer in writers:
        writer.join()
    assert len(trace) == 1000
    assert trace.dropped == 4 * 2000 - 1000


# ------------------------------------------------------------------ lanes and flows


def test_lanes_follow_the_frames() -> None:
    """In the order in which frames pass, not of the alphabet; numbers count as numbers; the loop comes last."""
    trace = Trace()
    for frame in range(3):
        start = frame * 10.0
        trace.slice("loop", "settle", start, start + 0.1)
        trace.slice("decode", "decode", start + 1, start + 2, frame)
        trace.slice(f"cuda:0/{(10, 9, 2)[frame]}", "model", start + 3, start + 4, frame)
        trace.slice("after", "post", start + 5, start + 6, frame)
    trace.slice("idle hands", "sweep", 0.0, 1.0)
    assert lanes(trace.slices) == ["decode", "cuda:0/2", "cuda:0/9", "cuda:0/10", "after", "idle hands", "loop"]


def test_flows_link_a_frame() -> None:
    """One list per frame, each in the order of time; work for no frame is in none."""
    trace = staircase(3, 2)
    trace.slice("loop", "settle", 0.0, 1.0)
    found = flows(reversed(trace.slices))
    assert [[(piece.frame, piece.name) for piece in path] for path in found] == [
        [(frame, f"stage {stage}") for stage in range(3)] for frame in range(2)
    ]


def test_flows_of_two_runs_are_told_apart() -> None:
    """Two runs have a frame 0 each: a frame passes each stage once, in order."""
    slices = [
        Slice("cpu:0", "a", 0.0, 1.0, 0),
        Slice("cpu:0", "a", 1.0, 2.0, 0),
        Slice("cpu:1", "b", 1.5, 2.5, 0),
        Slice("cpu:1", "b", 2.5, 3.5, 0),
    ]
    assert flows(slices) == [[slices[0], slices[2]], [slices[1], slices[3]]]


# ------------------------------------------------------------------ the file


def test_file_is_an_object_of_the_trace_event_format(tmp_path: Path) -> None:
    """What is written parses, and each event has what its phase asks for."""
    trace = staircase(3, 5)
    trace.slice("loop", "settle", 0.003, 0.0031)
    trace.instant("cpu:0", "swap", 0.002)
    trace.instant("door", "shed", 0.004, 3)
    trace.counter("queue decode", 0.001, 4)
    path = trace.save(tmp_path / "trace.json")
    assert path == tmp_path / "trace.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert written["displayTimeUnit"] in ("ms", "ns")
    assert written["otherData"]["dropped events"] == 0
    needed = {
        "M": {"name", "pid", "tid", "args"},
        "X": {"name", "cat", "pid", "tid", "ts", "dur", "args"},
        "i": {"name", "s", "pid", "tid", "ts"},
        "C": {"name", "pid", "ts", "args"},
        "s": {"name", "cat", "id", "pid", "tid", "ts"},
        "t": {"name", "cat", "id", "pid", "tid", "ts"},
        "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
    }
    seen = set()
    for event in written["traceEvents"]:
        assert needed[event["ph"]] <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event.get("tid", 0), int)
        if "ts" in event:
            assert event["ts"] >= 0
        seen.add(event["ph"])
    assert seen == needed.keys()
    named = set(lane_numbers(trace).values())
    assert {event["tid"] for event in written["traceEvents"] if event["ph"] in "Xistf"} <= named


def test_lanes_are_threads_in_order() -> None:
    """Each lane is a thread with a name and a place, the loop the last; an instant may have a lane of its own."""
    trace = staircase(3, 2)
    trace.slice("loop", "settle", 0.0, 1e-4)
    trace.instant("door", "shed", 0.0, 1)
    assert lane_numbers(trace) == {"cpu:0": 1, "cpu:1": 2, "cpu:2": 3, "loop": 4, "door": 5}
    places = {e["tid"]: e["args"]["sort_index"] for e in of_phase(trace, "M") if e["name"] == "thread_sort_index"}
    assert places == {number: number for number in range(1, 6)}
    (process,) = (event for event in of_phase(trace, "M") if event["name"] == "process_name")
    assert process["args"] == {"name": "aiotime"}


def test_times_are_microseconds_from_the_first_event() -> None:
    """The clock's zero does not matter; frame indices stand in args, absent for work of no frame."""
    trace = Trace(name="demo")
    trace.slice("cpu:0", "decode", 1000.001, 1000.0035, 12)
    trace.slice("loop", "settle", 1000.0, 1000.001)
    loop, decode = of_phase(trace, "X")
    assert (loop["ts"], loop["dur"], loop["args"]) == (0.0, 1000.0, {})
    assert (decode["ts"], decode["dur"], decode["args"]) == (1000.0, 2500.0, {"frame": 12})
    assert of_phase(trace, "M")[0]["args"] == {"name": "demo"}


def test_marks_and_counters() -> None:
    """Instants carry their frame, counters their value."""
    trace = Trace()
    trace.counter("queue", 1.0, 2.5)
    trace.instant("cpu:0", "shed", 1.5, 9)
    (counter,), (mark,) = of_phase(trace, "C"), of_phase(trace, "i")
    assert (counter["name"], counter["ts"], counter["args"]) == ("queue", 0.0, {"value": 2.5})
    assert (mark["name"], mark["ts"], mark["args"]) == ("shed", 5e5, {"frame": 9})
    assert trace.slices == []


def test_arrows_link_the_slices_of_a_frame() -> None:
    """Start, steps and finish of one id, each inside a slice of that frame on its lane; none for a single slice."""
    trace = staircase(4, 3)
    trace.slice("cpu:0", "alone", 1.0, 2.0, 99)
    arrows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in trace.to_dict()["traceEvents"]:
        if event["ph"] in "stf":
            arrows[event["id"]].append(event)
    assert ["".join(event["ph"] for event in path) for path in arrows.values()] == ["sttf"] * 3
    slices = of_phase(trace, "X")
    for path in arrows.values():
        assert len({(event["name"], event["cat"]) for event in path}) == 1
        inside = [
            [s for s in slices if s["tid"] == event["tid"] and s["ts"] < event["ts"] < s["ts"] + s["dur"]]
            for event in path
        ]
        assert all(len(found) == 1 for found in inside)
        assert len({found[0]["args"]["frame"] for found in inside}) == 1


@given(st.floats(0, 1e6), st.lists(st.floats(1e-7, 0.1), min_size=2, max_size=30))
def test_neighbours_on_a_lane_never_overlap(zero: float, durations: list[float]) -> None:
    """Slices back to back stay so after rounding to nanoseconds, wherever the clock's zero lies."""
    trace, now = Trace(), zero
    for frame, seconds in enumerate(durations):
        trace.slice("cpu:0", "s", now, now + seconds, frame)
        now += seconds
    written = of_phase(trace, "X")
    for one, following in pairwise(written):
        assert one["ts"] + one["dur"] <= following["ts"] + 1e-4


def test_empty_trace_saves(tmp_path: Path) -> None:
    """Nothing recorded is a valid file too."""
    path = Trace().save(str(tmp_path / "empty.json"))
    assert [event["name"] for event in json.loads(path.read_text())["traceEvents"]] == ["process_name"]

"""Tests of ``aiotime run``: sources, options, summaries, exit codes, and Ctrl-C on real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import aiotime
from aiotime.cli.commands import commands

NET = """
import os, threading
import torch
from torch import nn

class Sum(nn.Module):
    def forward(self, x):
        return x.sum().reshape(1)

class Double(nn.Module):
    def forward(self, x):
        return 2 * x

def make():
    return nn.Sequential(Double(), Sum()), torch.zeros(1, 4)

def pictures():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.zeros(1, 3, 16, 16)

def big():
    return nn.Sequential(nn.Identity(), nn.Upsample(scale_factor=400)), torch.zeros(1, 4, 1)

def picky():
    import aiotime
    def check(x):
        if float(x.sum()) < 0:
            raise ValueError("negative")
        return x
    return aiotime.Pipeline.from_stages([check, lambda x: x + 1]), torch.zeros(1, 4)

def stuck():
    import aiotime
    def wait(x):
        os.write(1, b"in the stage\\n")
        threading.Event().wait()
    return aiotime.Pipeline.from_stages([wait]), torch.zeros(1, 4)
"""
TWO = ["--devices", "cpu:0,cpu:1", "--balance", "even"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with net.py in it."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    return tmp_path


def write_frames(path: Path, *, count: int) -> Path:
    """A recording of frames [1, 4] whose values are all their index."""
    path.write_text("".join(json.dumps([[k] * 4]) + "\n" for k in range(count)))
    return path


def run(*arguments: str, input: str | bytes | None = None) -> Result:
    """``aiotime run`` in this process."""
    return CliRunner().invoke(commands, ["run", *arguments], input=input, catch_exceptions=False)


def records(path: Path) -> list[dict[str, Any]]:
    """The lines that were written."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- in process


def test_a_recording_becomes_json_lines(here: Path) -> None:
    """Every frame, in order, with what the model makes of it; the summary counts them and names the file."""
    write_frames(here / "frames.jsonl", count=20)
    result = run("net:make", "--source", "frames.jsonl", *TWO, "--out", "out.jsonl")
    assert result.exit_code == 0, result.output
    lines = records(here / "out.jsonl")
    assert [line["index"] for line in lines] == list(range(20))
    assert [line["output"] for line in lines] == [[8.0 * k] for k in range(20)]
    assert all(line["latency"] > 0 for line in lines)
    assert "20 predictions from 20 frames" in result.stdout
    assert "wrote out.jsonl (20 lines)" in result.stdout
    assert "latency p50" in result.stdout
    assert "cpu:1" in result.stdout


def test_a_video_is_resized_to_the_example(here: Path) -> None:
    """A real mp4 of another size goes in; each prediction is keyed by its time in the video."""
    import av

    with av.open("clip.mp4", "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(6):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    result = run("net:pictures", "--source", "clip.mp4", *TWO, "--out", "out.jsonl")
    assert result.exit_code == 0, result.output
    lines = records(here / "out.jsonl")
    assert [line["key"] for line in lines] == pytest.approx([0.1 * k for k in range(6)])
    assert [line["output"][0][0] for line in lines] == pytest.approx([40 * k / 255 for k in range(6)], abs=0.02)


def test_a_video_that_ends_abruptly_is_told(here: Path) -> None:
    """What could be decoded is predicted; the summary says how much is missing, but not where --limit left it out."""
    import av

    with av.open("clip.mp4", "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(20):
            noise = np.random.default_rng(index).integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    whole = (here / "clip.mp4").read_bytes()
    (here / "clip.mp4").write_bytes(whole[: len(whole) // 2])
    result = run("net:pictures", "--source", "clip.mp4", *TWO, "--out", "out.jsonl")
    assert result.exit_code == 0, result.output
    came = len(records(here / "out.jsonl"))
    assert 0 < came < 20
    assert f"ended {20 - came} frames before" in result.stdout
    assert "frames before" not in run("net:pictures", "--source", "clip.mp4", *TWO, "--limit", "2").stdout


def test_stdin_to_stdout_keeps_stdout_clean(here: Path) -> None:
    """With --out - nothing but JSON lines is on stdout; the summary is on stderr; keys come through."""
    frames = '[[1, 1, 1, 1]]\n{"input": [[2, 2, 2, 2]], "key": "b"}\n'
    result = run("net:make", "--source", "-", *TWO, "--out", "-", input=frames)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["output"], line.get("key")) for line in lines] == [([8.0], None), ([16.0], "b")]
    assert "2 predictions" in result.stderr


def test_raw_bytes_through_stdin(here: Path) -> None:
    """Raw tensors back to back, of the example's shape and dtype."""
    data = np.arange(8, dtype=np.float32).tobytes()
    result = run("net:make", "--source", "-", "--format", "raw", *TWO, "--out", "out.jsonl", input=data)
    assert result.exit_code == 0, result.output
    assert [line["output"] for line in records(here / "out.jsonl")] == [[12.0], [44.0]]


def test_output_styles(here: Path) -> None:
    """Large outputs are summed up; --output full writes them all; --top writes classes."""
    (here / "one.jsonl").write_text("[[[1], [2], [3], [4]]]\n")
    for options, check in (
        ([], lambda line: line["output"]["shape"] == [1, 4, 400]),
        (["--output", "full"], lambda line: len(line["output"][0][3]) == 400),
        (["--output", "none"], lambda line: "output" not in line),
        (["--top", "1"], lambda line: len(line["top"]) == 4),
    ):
        result = run("net:big", "-s", "one.jsonl", *TWO, "-o", "out.jsonl", *options)
        assert result.exit_code == 0, result.output
        assert check(records(here / "out.jsonl")[0])


def test_limit_and_rate(here: Path) -> None:
    """--limit asks the source for no more than so many frames; a paced source loses none."""
    write_frames(here / "frames.jsonl", count=50)
    result = run("net:make", "-s", "frames.jsonl", *TWO, "--limit", "7", "--rate", "1000", "-o", "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "7 predictions from 7 frames" in result.stdout
    result = run("net:make", "-s", "-", *TWO, "--limit", "2", "-o", "out.jsonl", input="[[1,1,1,1]]\n" * 9)
    assert len(records(here / "out.jsonl")) == 2, result.output


def test_trace_and_timeline_are_written(here: Path) -> None:
    """A trace that Perfetto reads and a picture; the summary names both."""
    pytest.importorskip("matplotlib")
    write_frames(here / "frames.jsonl", count=20)
    result = run("net:make", "-s", "frames.jsonl", *TWO, "--trace", "trace.json", "--timeline", "time.png")
    assert result.exit_code == 0, result.output
    assert json.loads((here / "trace.json").read_text())["traceEvents"]
    assert (here / "time.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote trace.json" in result.stdout
    assert "wrote time.png" in result.stdout


def test_a_trace_that_cannot_be_written_does_not_cost_the_summary(here: Path) -> None:
    """Predictions are kept and summed up; the exit code and the message tell about the trace and the timeline."""
    write_frames(here / "frames.jsonl", count=2)
    result = run("net:make", "-s", "frames.jsonl", *TWO, "--timeline", "time.what", "-o", "out.jsonl")
    assert result.exit_code == 1
    assert "could not write time.what" in result.stdout
    assert len(records(here / "out.jsonl")) == 2
    result = run("net:make", "-s", "frames.jsonl", *TWO, "--limit", "0", "--timeline", "time.png")
    assert result.exit_code == 1
    assert "0 predictions from 0 frames" in result.stdout


@pytest.mark.parametrize("option", ["--trace", "--timeline"])
def test_a_folder_that_is_not_there_is_told_before_the_work(here: Path, option: str) -> None:
    """Not at the end of a long stream."""
    write_frames(here / "frames.jsonl", count=2)
    result = run("net:make", "-s", "frames.jsonl", *TWO, option, "absent/it.png", "-o", "out.jsonl")
    assert result.exit_code == 2
    assert "there is no folder 'absent'" in result.stderr
    assert not (here / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("policy", "code", "indices"), [("raise", 1, [0]), ("skip", 0, [0, 2]), ("record", 0, [0, 1, 2])]
)
def test_a_frame_that_fails(here: Path, policy: str, code: int, indices: list[int]) -> None:
    """It ends the run, is left out, or becomes a line with its error; what came before is kept."""
    (here / "frames.jsonl").write_text("[[1,1,1,1]]\n[[-1,1,-1,-1]]\n[[2,2,2,2]]\n")
    result = run("net:picky", "-s", "frames.jsonl", "--on-error", policy, "-o", "out.jsonl")
    assert result.exit_code == code, result.output
    lines = records(here / "out.jsonl")
    assert [line["index"] for line in lines] == indices
    if policy == "raise":
        assert "negative" in result.stderr
    if policy == "record":
        assert "negative" in lines[1]["error"]
        assert "1 failed" in result.stdout


def test_a_frame_that_the_door_refuses_is_recorded(here: Path) -> None:
    """A frame of the wrong shape is refused with what was expected and what came; the stream goes on."""
    (here / "frames.jsonl").write_text("[[1,1,1]]\n[[2,2,2,2]]\n")
    result = run("net:make", "-s", "frames.jsonl", *TWO, "--on-error", "record", "-o", "out.jsonl")
    assert result.exit_code == 0, result.output
    refused, fine = records(here / "out.jsonl")
    assert "(1, 4)" in refused["error"]
    assert fine["output"] == [16.0]


def test_a_source_that_fails_midway_keeps_what_was_done(here: Path) -> None:
    """Predictions until then are written, the exit code is 1, the message says what and where."""
    (here / "frames.jsonl").write_text("[[1,1,1,1]]\n[[2,2,2,2]]\n[[3,\n")
    result = run("net:make", "-s", "frames.jsonl", *TWO, "-o", "out.jsonl")
    assert result.exit_code == 1, result.output
    assert len(records(here / "out.jsonl")) == 2
    assert "line 3 is not JSON" in result.stderr
    assert "2 predictions" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net:make", "-s", "nowhere.mp4"], "nowhere.mp4"),
        (["net:make", "-s", "/dev/video97"], "/dev/video97"),
        (["net:absent", "-s", "net.py"], "absent"),
        (["net:make", "-s", "net.py"], "not a video|no video"),
        (["net:make", "-s", "-", "--rate", "-1"], "rate"),
        (["net:make", "-s", "-", "--deadline", "-1"], "deadline"),
        (["net:make", "-s", "-", "--devices", "tpu:0"], "tpu:0"),
        (["net:make", "-s", "-", "--balance", "1,9"], "layers|balance"),
        (["net:make", "-s", "-", "--example", "4,x"], "--example"),
        (["net:make", "-s", "-", "-o", "absent/out.jsonl"], "cannot write"),
        (["net:picky", "-s", "-", "--depth", "3"], "made a Pipeline"),
    ],
)
def test_wrong_calls_say_what_would_be_right(arguments: list[str], message: str) -> None:
    """Exit code 2 and a message on stderr, never a traceback."""
    options = [] if "net:picky" in arguments or "--balance" in arguments else ["--balance", "even"]
    options += [] if "--devices" in arguments or "net:picky" in arguments else ["--devices", "cpu:0,cpu:1"]
    result = run(*arguments, *options, input="[[1,1,1,1]]\n")
    assert result.exit_code == 2, result.output
    import re

    assert re.search(message, result.stderr), result.stderr


def test_quiet_says_nothing(here: Path) -> None:
    """With --quiet only errors are printed."""
    write_frames(here / "frames.jsonl", count=3)
    result = run("net:make", "-s", "frames.jsonl", *TWO, "-o", "out.jsonl", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_a_saved_plan_is_used(here: Path) -> None:
    """What `aiotime plan --json` saved is what `aiotime run --plan` runs."""
    write_frames(here / "frames.jsonl", count=3)
    planned = CliRunner().invoke(commands, ["plan", "net:make", *TWO, "--json", "plan.json"], catch_exceptions=False)
    assert planned.exit_code == 0, planned.output
    result = run("net:make", "-s", "frames.jsonl", "--plan", "plan.json")
    assert result.exit_code == 0, result.output
    assert "cpu:0" in result.stdout
    assert "cpu:1" in result.stdout
    result = run("net:make", "-s", "frames.jsonl", "--plan", "plan.json", "--devices", "cpu:0")
    assert result.exit_code == 2
    assert "leave --devices, --balance and --compile out" in result.stderr


# ---------------------------------------------------------------------------------------------------- real processes

PATIENCE = 50  # seconds for a process that imports torch on a busy machine


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """``aiotime run`` as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(aiotime.__file__).parents[1]), "TERM": "xterm"}
    command = [sys.executable, "-m", "aiotime.cli", "run", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} | options
    process: subprocess.Popen[bytes] = subprocess.Popen(command, env=environment, **pipes)
    return process


def ended(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """What it still writes to stdout and stderr until it ends."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"did not end:\n{(err or b'').decode()}")
    return (out or b"").decode(), (err or b"").decode()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_silent_pipe_cleanly(number: signal.Signals) -> None:
    """While it waits for stdin, the first signal ends it: predictions complete, a summary, 128 + the signal."""
    process = start("net:make", "-s", "-", *TWO, "-o", "-", stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"[[1,1,1,1]]\n" * 3)
    process.stdin.flush()
    lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(number)
    code = process.wait(PATIENCE)  # its stdin stays open: nothing but the signal can end it
    out, err = ended(process)
    assert code == 128 + number, err
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert out == ""
    assert "3 predictions from 3 frames" in err
    assert f"stopped by {number.name}" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ctrl_c_finishes_what_is_in_flight(here: Path) -> None:
    """In the middle of a paced recording: every frame that was pulled is predicted, once, and written whole."""
    write_frames(here / "frames.jsonl", count=100_000)
    process = start("net:make", "-s", "frames.jsonl", "--rate", "200", *TWO, "-o", "-", stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = [process.stdout.readline().decode() for _ in range(5)]
    process.send_signal(signal.SIGINT)
    rest, err = ended(process)
    lines = [json.loads(line) for line in [*first, *rest.splitlines()]]
    assert process.returncode == 130, err
    assert [line["index"] for line in lines] == list(range(len(lines)))
    assert f"{len(lines)} predictions from {len(lines)} frames" in err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_second_ctrl_c_aborts_at_once() -> None:
    """A stage that never returns holds up the draining; asked twice, the process ends."""
    process = start("net:stuck", "-s", "-", stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"[[1,1,1,1]]\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"in the stage\n"
    process.send_signal(signal.SIGINT)
    while b"stopping" not in (line := process.stderr.readline()):
        assert line, "ended before it said that it stops"
    process.send_signal(signal.SIGINT)
    _, err = ended(process)
    assert process.returncode == 130
    assert "aborted" in err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_reader_that_leaves_ends_it_quietly(here: Path) -> None:
    """``aiotime run … | head -1``: no traceback, and the exit code of a broken pipe."""
    write_frames(here / "frames.jsonl", count=100_000)
    process = start("net:make", "-s", "frames.jsonl", *TWO, "-o", "-", stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, err = ended(process)
    assert process.returncode == 141, err
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_terminal_shows_progress_live(here: Path) -> None:
    """On a terminal the counters are redrawn in place, and the cursor is given back."""
    pty = pytest.importorskip("pty")
    write_frames(here / "frames.jsonl", count=90)
    leader, follower = pty.openpty()
    options = ["--rate", "100", "--limit", "60", "-o", "out.jsonl"]
    process = start("net:make", "-s", "frames.jsonl", *TWO, *options, stderr=follower)
    os.close(follower)
    shown = bytearray()
    with os.fdopen(leader, "rb", buffering=0) as screen:
        while select.select([screen], [], [], PATIENCE)[0]:
            try:
                data = screen.read(65536)
            except OSError:  # the other end of a terminal closes with an error
                break
            if not data:
                break
            shown += data
    out, _ = ended(process)
    assert process.returncode == 0, shown.decode()
    assert "60 predictions" in out
    assert "60/60" in shown.decode()
    assert shown.count(b"frames/s") > 3
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert len(records(here / "out.jsonl")) == 60

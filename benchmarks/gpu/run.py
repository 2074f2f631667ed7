"""python benchmarks/gpu/run.py [--out FOLDER] [--dry] [--parts NAME ...]: everything, within nine minutes, one JSON."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:  # run as a script, not as a module
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __doc__ as question  # noqa: E402
from benchmarks.gpu.budget import Budget, allowance  # noqa: E402
from benchmarks.gpu.part import PARTS, Part, perform  # noqa: E402
from benchmarks.gpu.plots import draw  # noqa: E402
from benchmarks.gpu.record import Record, load  # noqa: E402
from benchmarks.gpu.verdicts import verdicts  # noqa: E402

WHOLE = 525.0  # seconds for everything: fifteen less than nine minutes
PICTURES = 12.0  # of them for the plots
STARTING = 10.0  # a process imports PyTorch and wakes the GPU before its part's own clock starts
TOY = 60.0  # seconds a part may take in a dry run
LOOK = 1.0  # seconds between two looks at a part's notebook
JSON = "gpu.json"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=question)
    options.add_argument("--out", type=Path, help="folder for the JSON and the plots; default: $OUT, else results/")
    options.add_argument("--dry", action="store_true", help="toy sizes on the CPU: does it run? (figures mean nothing)")
    options.add_argument("--quick", action="store_true", help="--dry in one process; writes only where --out says")
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these")
    options.add_argument("--seconds", type=float, default=WHOLE, help="for everything")
    options.add_argument("--one-process", action="store_true", help="parts share this process; none can be cut off")
    # the benchmarks' common options mean nothing here, but `python -m benchmarks` hands them to everybody
    for common in ("--rounds", "--save"):
        options.add_argument(common, nargs="?", help=argparse.SUPPRESS)
    options.add_argument("--plain-malloc", action="store_true", help=argparse.SUPPRESS)
    return options.parse_args(given)


def folder(options: argparse.Namespace) -> Path | None:
    """Where files go; None: nowhere."""
    if options.out is not None:
        return Path(options.out)
    if options.quick:
        return None
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else Path(__file__).parent / "results"


def apart(name: str, seconds: float, *, dry: bool, record: Record) -> dict[str, Any]:
    """Run a part in a process of its own; when its time is over, the process and all it started are ended."""
    with tempfile.TemporaryDirectory() as place:
        notebook = Path(place) / "part.json"
        command = [sys.executable, "-u", "-m", "benchmarks.gpu.part", name]
        command += ["--seconds", str(seconds), "--file", str(notebook), *(["--dry"] if dry else [])]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        end = time.monotonic() + seconds + STARTING
        try:
            while process.poll() is None and time.monotonic() < end:
                try:
                    process.wait(timeout=max(0.01, min(LOOK, end - time.monotonic())))
                except subprocess.TimeoutExpired:
                    record.part(name, figures=load(notebook))  # what there is, should this process be ended, too
            cut = process.poll() is None
        finally:
            if process.poll() is None:  # its time is over, or somebody interrupted us
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        figures = load(notebook)
    status = figures.get("status", "cut off" if cut else f"ended with exit status {process.returncode}")
    if cut and "status" in figures:
        status += ", but its process had to be ended"
    return {"status": status, "figures": figures}


def within(name: str, seconds: float, *, dry: bool) -> dict[str, Any]:
    """Run a part in this process."""
    part = Part(name, seconds, dry=dry)
    return {"status": perform(part), "figures": part.figures}


def measure(options: argparse.Namespace, record: Record) -> None:
    """Every part in its turn."""
    dry, one_process = options.dry or options.quick, options.one_process or options.quick
    budget = Budget(options.seconds)
    chosen = [name for name in PARTS if name in options.parts]
    for position, name in enumerate(chosen):
        later = [PARTS[each][1] + STARTING for each in chosen[position + 1 :]]
        left = budget.left - PICTURES - (0.0 if one_process else STARTING)
        seconds = TOY if dry else allowance(PARTS[name][1], later, left)
        print(f"\n== {name}: up to {seconds:.0f} s, {budget.left:.0f} s left of all", flush=True)
        if not dry and seconds < 3.0:
            record.part(name, status="skipped: no time left")
            continue
        record.part(name, status="running", budget=seconds)
        start = time.perf_counter()
        try:
            if one_process:
                found = within(name, seconds, dry=dry)
            else:
                found = apart(name, seconds, dry=dry, record=record)
        except Exception as error:  # noqa: BLE001 - the other parts go on
            found = {"status": f"failed: {type(error).__name__}: {error}"}
        record.part(name, **found, seconds=time.perf_counter() - start)
        print(f"== {name}: {found['status']} after {time.perf_counter() - start:.1f} s", flush=True)


def tell(record: Record, *, dry: bool) -> None:
    """What was promised, and what became of it."""
    found = verdicts(record.data["parts"])
    record.put("targets", found)
    print("\n**Targets**\n\n| what | measured | target | verdict |\n|---|---|---|---|")
    for each in found:
        if each["met"] is None:
            print(f"| {each['what']} | not measured | | not met |")
            continue
        sign = "≤" if each["at_most"] else "≥"
        verdict = "met" if each["met"] else "not met"
        value, bound, unit = each["value"], each["bound"], each["unit"]
        print(f"| {each['what']} | {value:.3g}{unit} | {sign} {bound:g}{unit} | {verdict} |")
    if dry:
        print("\n**Toy sizes on the CPU: the figures mean nothing.**")


def main(given: Sequence[str] | None = None) -> int:
    """Measure, judge, draw."""
    options = arguments(given)
    dry = options.dry or options.quick
    import torch

    from benchmarks._harness import machine

    facts = machine()
    print(f"# {question}\n")
    print(f"{facts['processor']}, {facts['cores']} cores, torch {facts['torch']}, aiotime {facts['aiotime']}")
    if not dry and not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use: nothing was measured. --dry shows that the script runs.")
        return 1 if os.environ.get("AIOTIME_REQUIRE_CUDA") else 0
    if dry:
        print("\n**Toy sizes on the CPU: the figures mean nothing.**")
    out = folder(options)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    path = None if out is None else out / JSON
    record = Record(path, question=question, started=started, dry=dry, budget=options.seconds, machine=facts)
    start = time.perf_counter()
    measure(options, record)
    tell(record, dry=dry)
    if out is not None:
        record.put("plots", draw(record.data, out))
        print(f"\nwritten: {JSON} and {', '.join(record.data['plots'].values())}")
    record.put("seconds", time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

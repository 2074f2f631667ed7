"""One work, all its contenders: started one by one, then measured in turns.

    start-up    each alone: import, build, first output, check of two dozen outputs
    round r     forwards or backwards in turn:  go on ─▶ saturation ─▶ half of it, paced (every second round) ─▶ stop
    end         peak memory, end

Every contender has a process of its own; whoever is not on turn is stopped by a signal and uses nothing but memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks._harness import percentile, progress
from benchmarks.peers import bystanders
from benchmarks.peers.contenders import ENTRIES
from benchmarks.peers.pacer import pace, sharpen
from benchmarks.peers.process import FailedError, Process

STARTING = 120.0  # seconds: to import torch, with everybody else doing so
ANSWERING = 60.0  # to answer any other command
OPENING = {"compiled": 600.0, "aiotime": 600.0}  # to build, by family; compilers take their time
LOAD = 0.5  # of its own saturation, where latency is measured


@dataclass(slots=True)
class Outcome:
    """What was measured of one contender at one work.

    Args:
        rates: frames per second at saturation, one per round; as long as it did not fail.
        latencies: seconds, of all rounds, at ``LOAD`` of its own saturation.
        offered: frames per second at which they were measured, one per measurement.
        cpu: CPU seconds per frame of all its processes, one per round.
        peak: MiB, of all its processes.
        others: cores that processes outside used meanwhile, on average, one per round.
        start_up: seconds from the imported torch to the first output.
        first_start_up: the same where nothing had been compiled yet; for those that compile.
        failed: why it is out.
    """

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    offered: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    peak: float | None = None
    start_up: float | None = None
    first_start_up: float | None = None
    failed: str | None = None

    @property
    def rate(self) -> float:
        """The median over the rounds."""
        return median(self.rates)

    def latency(self, share: float) -> float | None:
        """Seconds; None where none was measured."""
        return percentile(self.latencies, share) if self.latencies else None

    def as_data(self) -> dict[str, Any]:
        """For JSON; of the latencies the percentiles."""
        data = asdict(self)
        data["latencies"] = [percentile(self.latencies, k / 100) for k in range(101)] if self.latencies else []
        return data


@dataclass(slots=True)
class Settings:
    """How a race is run.

    Args:
        rounds: turns of each contender.
        seconds: length of a turn, about.
        quick: toy sizes.
        pythons: interpreters by environment; one that is missing makes its contenders fail.
        cache: folder of what is compiled.
        plain_malloc: leave malloc as it comes.
        latency: measure it.
    """

    rounds: int
    seconds: float
    quick: bool
    pythons: Mapping[str, str]
    cache: Path
    plain_malloc: bool = False
    latency: bool = True

    @property
    def environment(self) -> dict[str, str]:
        """What the children's environment has besides ours."""
        added = {"TORCHINDUCTOR_CACHE_DIR": str(self.cache), "AIOTIME_CACHE": str(self.cache / "aiotime")}
        return added | ({"AIOTIME_BENCHMARK_PLAIN_MALLOC": "1"} if self.plain_malloc else {})


def cache_folder() -> Path:
    """Kept between runs, so that what is compiled need not be compiled again; one folder per torch and user."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"aiotime-benchmarks-peers-{torch.__version__}-{user}"


class Field:
    """The processes of the contenders; with ``keep`` they go from work to work, to spare their start at toy sizes."""

    def __init__(self, settings: Settings, *, keep: bool = False) -> None:
        self.settings = settings
        self._keep = keep
        self._kept: dict[str, Process] = {}

    def start(self, names: Sequence[str], outcomes: Mapping[str, Outcome]) -> dict[str, Process]:
        """Start those that are not there yet, two at a time, until each has imported torch."""
        processes: dict[str, Process] = {}
        for pair in (names[at : at + 2] for at in range(0, len(names), 2)):
            fresh = []
            for name in pair:
                kept = self._kept.pop(name, None)
                try:
                    processes[name] = kept or self.spawn(name)
                except FailedError as error:
                    outcomes[name].failed = str(error)
                    continue
                if kept is None:
                    fresh.append(name)
            for name in fresh:
                try:
                    self.greet(processes[name])
                except FailedError as error:
                    outcomes[name].failed = str(error)
                    processes.pop(name).end()
        return processes

    def spawn(self, name: str) -> Process:
        """One process."""
        entry = ENTRIES[name]
        python = self.settings.pythons.get(entry.python)
        if python is None:
            raise FailedError(f"not installed: name its environment, --{entry.python}-python PATH")
        try:
            return Process(name, entry, python, self.settings.environment)
        except OSError as error:
            raise FailedError(f"its interpreter does not start: {type(error).__name__}") from None

    def greet(self, process: Process) -> None:
        """Wait for its torch, which must be ours."""
        process.greet(timeout=STARTING)
        theirs = process.hello["torch"]
        if theirs != torch.__version__:
            raise FailedError(f"its torch is {theirs}, the others' {torch.__version__}")
        process.stop()

    def release(self, name: str, process: Process) -> None:
        """End it, or keep it for the next work."""
        if not self._keep:
            process.end()
            return
        try:
            process.go_on()
            process.ask("close", timeout=ANSWERING)
        except FailedError:
            process.end()
            return
        process.stop()
        self._kept[name] = process

    def end(self) -> None:
        """End those that were kept."""
        for process in self._kept.values():
            process.end()
        self._kept.clear()


def race(
    work: str, names: Sequence[str], field: Field, *, sizes: Mapping[str, Any] | None = None
) -> dict[str, Outcome]:
    """Measure ``names`` at ``work``; every name has its outcome, if only a reason why it failed."""
    settings = field.settings
    outcomes = {name: Outcome() for name in names}
    opening = {"work": work, "sizes": dict(sizes or {}), "quick": settings.quick}
    processes = field.start(names, outcomes)
    rates: dict[str, float] = {}
    try:
        for name in list(processes):
            progress(f"{work}: {name} starts")
            with _Turn(name, processes, outcomes):
                if ENTRIES[name].compiles:
                    outcomes[name].first_start_up = _rehearse(name, field, opening)
                opened = processes[name].ask("open", timeout=OPENING.get(ENTRIES[name].family, ANSWERING), **opening)
                outcomes[name].start_up, rates[name] = opened["seconds"], opened["rate"]
        for number in range(settings.rounds):
            ordered = list(processes)
            for name in ordered if number % 2 == 0 else reversed(ordered):
                progress(f"{work}, round {number + 1} of {settings.rounds}: {name}")
                with _Turn(name, processes, outcomes):
                    if not settings.quick:
                        processes[name].ask("collect", timeout=ANSWERING)
                    rates[name] = saturate(processes[name], outcomes[name], rates[name], settings.seconds)
                    if settings.latency and number % 2 == 0:
                        trickle(processes[name], outcomes[name], LOAD * outcomes[name].rate, settings.seconds)
        for name, process in processes.items():
            outcomes[name].peak = process.peak()
    finally:
        progress("")
        for name, process in processes.items():
            field.release(name, process)
    return outcomes


def _rehearse(name: str, field: Field, opening: Mapping[str, Any]) -> float:
    """Start-up of a process before the one that is measured, which leaves in the cache what it has compiled.

    Noted there as well, and not done again while the cache knows it.
    """
    key = hashlib.sha256(f"{name} {sorted(opening.items())}".encode()).hexdigest()[:16]
    note = field.settings.cache / "rehearsed" / f"{key}.json"
    if note.exists():
        known: float = json.loads(note.read_text())["seconds"]
        return known
    process = field.spawn(name)
    try:
        process.greet(timeout=STARTING)
        opened = process.ask("open", timeout=OPENING.get(ENTRIES[name].family, ANSWERING), **opening)
        seconds: float = opened["seconds"]
    finally:
        process.end()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"seconds": seconds}))
    return seconds


def saturate(process: Process, outcome: Outcome, rate: float, seconds: float) -> float:
    """One turn as fast as it goes; frames per second."""
    number = max(8, 8 * round(rate * seconds / 8))
    machine_before, before = bystanders.read(), process.seconds()
    found = process.ask("rate", number=number, timeout=ANSWERING)
    machine_after, after = bystanders.read(), process.seconds()
    outcome.rates.append(found["rate"])
    if before is None or after is None:
        outcome.cpu.append(found["cpu"])
    else:
        outcome.cpu.append((after - before) / found["frames"])
        if machine_before is not None and machine_after is not None:
            outcome.others.append(machine_after.cores_since(machine_before, contender=after - before))
    return float(found["rate"])


def trickle(process: Process, outcome: Outcome, rate: float, seconds: float) -> list[float]:
    """One turn at ``rate`` frames per second; latencies in seconds."""
    number = 8 + max(16, round(rate * seconds))
    process.tell("paced", number=number)
    failed: list[OSError] = []

    def send() -> None:
        sharpen()
        try:
            pace(process.arrivals, rate=rate, number=number)
        except OSError as error:  # it does not keep up, or is gone: its answer says which
            failed.append(error)

    thread = threading.Thread(target=send, name="pacer")
    thread.start()
    try:
        latencies: list[float] = process.answer(timeout=ANSWERING, doing="paced")["latencies"]
    finally:
        if failed and isinstance(failed[0], BlockingIOError):
            raise FailedError(f"it left a whole pipe of frames behind at {rate:,.0f} frames/s")
        thread.join(timeout=1.0)
    outcome.latencies.extend(latencies)
    outcome.offered.append(rate)
    return latencies


class _Turn:
    """A contender is on turn; one that fails is ended and its outcome says why."""

    def __init__(self, name: str, processes: dict[str, Process], outcomes: Mapping[str, Outcome]) -> None:
        self._name, self._processes, self._outcomes = name, processes, outcomes

    def __enter__(self) -> None:
        self._processes[self._name].go_on()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, FailedError):
            self._outcomes[self._name].failed = str(error)
            self._processes.pop(self._name).end()
            return True
        self._processes[self._name].stop()
        return False


def interpreters(ray: str | None) -> dict[str, str]:
    """By environment; that of Ray from the command line or AIOTIME_RAY_PYTHON."""
    found = {"own": sys.executable}
    ray = ray or os.environ.get("AIOTIME_RAY_PYTHON")
    if ray:
        found["ray"] = ray
    return found

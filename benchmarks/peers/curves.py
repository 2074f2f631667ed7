"""How throughput grows with the size of a frame, the number of stages and the load: one panel a curve.

size       deep conv, side of the picture        × plain loop on one thread
           MLP, width                            × plain loop on one thread
stages     trivial, and 0.12 ms without the lock  × plain loop on one thread
load       0.12 ms without the lock, deep conv    p50 and p99 over the share of one's own saturation
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._harness import Report, percentile, progress
from benchmarks.peers import tables
from benchmarks.peers.contenders import ENTRIES, PLAIN
from benchmarks.peers.pictures import Panel, lines
from benchmarks.peers.process import FailedError
from benchmarks.peers.race import Field, Outcome, Settings, race, saturate, trickle
from benchmarks.peers.works import build

PEERS = (PLAIN, "two", "aot", "threads", "executor", "spdl", "pipelining", "ours", "ours_auto")
QUICK = (PLAIN, "threads", "ours")
LOADS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True)
class Growth:
    """One curve of throughput: a work at several sizes."""

    work: str
    parameter: str
    values: Sequence[int]
    words: str


GROWTHS = (
    Growth("conv", "side", (16, 32, 64, 128), "deep conv, 12 layers: side of the picture"),
    Growth("mlp64", "width", (32, 128, 512), "MLP, 30 layers: width"),
    Growth("trivial", "stages", (1, 2, 4, 8), "trivial stages"),
    Growth("released", "stages", (1, 2, 4, 8), "stages of 0.12 ms without Python's lock"),
)
QUICK_GROWTHS = (Growth("trivial", "stages", (1, 2), "trivial stages"),)
LOADED = ("released", "conv")
QUICK_LOADED = ("trivial",)


def main(arguments: argparse.Namespace, settings: Settings) -> None:
    """Measure, tell, draw."""
    if arguments.save is not None:
        arguments.save = f"{arguments.save}-curves" if arguments.save else "curves"
    settings.rounds, settings.latency = arguments.rounds or (1 if settings.quick else 3), False
    report = Report(
        __file__,
        question="How does throughput grow with frames, stages and load?",
        setup=f"A process each, in turns of about {settings.seconds} s, {settings.rounds} rounds; "
        "whoever is not on turn is stopped. Loads are shares of each one's own saturation.",
        arguments=arguments,
    )
    panels: list[Panel] = []
    for growth in QUICK_GROWTHS if settings.quick else GROWTHS:
        names = _names(arguments, settings, growth.work)
        panels.append(_grow(report, growth, names, settings))
    for work in QUICK_LOADED if settings.quick else LOADED:
        panels.extend(_load(report, work, _names(arguments, settings, work), settings))
    path = report.figure_path()
    if path is not None:
        lines(path, panels)
        report.say("", f"![curves]({path.name})")
    report.finish()


def _names(arguments: argparse.Namespace, settings: Settings, work: str) -> list[str]:
    kind = build(work, quick=True).kind
    wanted = arguments.peers or (QUICK if settings.quick else PEERS)
    return [name for name, entry in ENTRIES.items() if kind in entry.kinds and (name == PLAIN or name in wanted)]


def _grow(report: Report, growth: Growth, names: Sequence[str], settings: Settings) -> Panel:
    """Ratios to the plain loop at each size."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    rows: dict[str, list[str | float]] = {name: [ENTRIES[name].title] for name in names}
    for value in growth.values:
        field = Field(settings)
        outcomes = race(growth.work, names, field, sizes={growth.parameter: value})
        for name in names:
            found = tables.ratio(outcomes, name, PLAIN)
            rows[name].append("failed" if found is None else f"{found:.2f}")
            if found is not None:
                points[name].append((value, found))
        _tell_failures(report, outcomes)
    report.table(
        f"{growth.words}; throughput, × plain loop on 1 thread",
        ["contender", *(f"{value}" for value in growth.values)],
        list(rows.values()),
    )
    return Panel(growth.words, growth.parameter, "× plain loop on 1 thread", points)


def _load(report: Report, work: str, names: Sequence[str], settings: Settings) -> list[Panel]:
    """Latency over load, of one process after the other in turns."""
    field = Field(settings)
    outcomes = {name: Outcome() for name in names}
    processes = field.start(names, outcomes)
    found: dict[str, dict[float, list[float]]] = {name: {load: [] for load in LOADS} for name in names}
    opening: Mapping[str, Any] = {"work": work, "sizes": {}, "quick": settings.quick}
    rates: dict[str, float] = {}
    try:
        for turn in range(settings.rounds + 1):
            for name in list(processes):
                process = processes[name]
                process.go_on()
                progress(f"{work}, load, round {turn} of {settings.rounds}: {name}")
                try:
                    if turn == 0:
                        rates[name] = process.ask("open", timeout=600.0, **opening)["rate"]
                    else:
                        rates[name] = saturate(process, outcomes[name], rates[name], settings.seconds)
                        for load in LOADS:
                            paced = trickle(process, outcomes[name], load * rates[name], settings.seconds)
                            found[name][load].extend(paced)
                    process.stop()
                except FailedError as error:
                    outcomes[name].failed = str(error)
                    processes.pop(name).end()
    finally:
        progress("")
        for process in processes.values():
            process.end()
    _tell_failures(report, outcomes)
    panels = []
    for share in (0.5, 0.99):
        label = f"p{100 * share:.0f}"
        running = [name for name in names if not outcomes[name].failed]
        points = {name: [(load, 1e3 * percentile(found[name][load], share)) for load in LOADS] for name in running}
        report.table(
            f"{build(work, quick=settings.quick).title}: {label} in ms, over the share of one's own saturation",
            ["contender", "saturation, frames/s", *(f"{load:.0%}" for load in LOADS)],
            [[ENTRIES[name].title, outcomes[name].rate, *(y for _, y in points[name])] for name in running],
        )
        panels.append(Panel(f"{work}: {label} over load", "share of saturation", "ms", points, logarithmic="y"))
    return panels


def _tell_failures(report: Report, outcomes: Mapping[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        if outcome.failed:
            report.say("", f"{ENTRIES[name].title} failed: {outcome.failed}")

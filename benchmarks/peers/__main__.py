"""python -m benchmarks.peers [WORK ...] [--peers NAME ...] [--quick] [--rounds N] [--save LABEL] [--ray-python PATH]
python -m benchmarks.peers curves [--save LABEL] …
python -m benchmarks.peers tables --save LABEL        # from the figures that are saved, nothing is measured
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Sequence

import torch

from benchmarks._harness import LOOPS, Report, parser
from benchmarks.peers import __doc__ as question
from benchmarks.peers import tables
from benchmarks.peers.contenders import ENTRIES, PLAIN
from benchmarks.peers.race import Field, Settings, cache_folder, interpreters, race
from benchmarks.peers.works import HOMES, QUICK, build


def options() -> argparse.ArgumentParser:
    """What the command line takes."""
    made = parser(question or "")
    made.add_argument("works", nargs="*", metavar="WORK", help=f"{', '.join(HOMES)}; or curves, or tables")
    made.add_argument("--peers", nargs="+", metavar="NAME", help=f"only these: {', '.join(ENTRIES)}")
    made.add_argument("--ray-python", metavar="PATH", help="the interpreter that has Ray; or AIOTIME_RAY_PYTHON")
    made.add_argument("--seconds", type=float, help="length of a turn")
    made.add_argument("--cold", action="store_true", help="forget what earlier runs have compiled")
    return made


def chosen(arguments: argparse.Namespace, kind: str) -> list[str]:
    """Who takes part in works of that kind, in the order of the tables; the plain loop always does."""
    return [
        name
        for name, entry in ENTRIES.items()
        if kind in entry.kinds
        and (name == PLAIN or (name in arguments.peers if arguments.peers else entry.quick or not arguments.quick))
    ]


def settings_of(arguments: argparse.Namespace) -> Settings:
    """How it is run."""
    quick = arguments.quick
    return Settings(
        rounds=arguments.rounds or (1 if quick else 5),
        seconds=arguments.seconds or (0.01 if quick else 0.3),
        quick=quick,
        pythons=interpreters(arguments.ray_python),
        cache=cache_folder(),
        plain_malloc=arguments.plain_malloc,
    )


def main() -> None:
    made = options()
    arguments = made.parse_args()
    works: Sequence[str] = arguments.works
    for names, known in ((works, [*HOMES, "curves", "tables"]), (arguments.peers or [], list(ENTRIES))):
        for name in names:
            if name not in known:
                made.error(f"there is no {name!r}; there are: {', '.join(known)}")
    torch.set_num_threads(1)
    settings = settings_of(arguments)
    if arguments.cold:
        shutil.rmtree(settings.cache, ignore_errors=True)
    if "curves" in works:
        from benchmarks.peers.curves import main as curves

        curves(arguments, settings)
        return
    report = Report(
        __file__,
        question=question or "",
        setup=f"Every contender in a process of its own, in turns of about {settings.seconds} s, {settings.rounds} "
        "rounds; whoever is not on turn is stopped. Medians over the rounds, ratios within a round. Latency at half of "
        f"each one's own saturation. aiotime on {LOOPS[0]}, depth=None, on the devices cpu:0 and cpu:1; the others' "
        "models are cut by hand into two equal stages.",
        arguments=arguments,
    )
    store = tables.Store(report)
    if "tables" not in works:
        field = Field(settings, keep=settings.quick)
        try:
            for work in works or (QUICK if settings.quick else HOMES):
                about = build(work, quick=settings.quick)
                outcomes = race(work, chosen(arguments, about.kind), field)
                store.add(work, about.title, outcomes, rounds=settings.rounds)
                tables.work_table(report, about.title, outcomes)
        finally:
            field.end()
    tables.summary(report, store)
    report.finish()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contenders' processes end with this one
    main()

"""The tables, the big table of ratios, the targets; and the figures of earlier works under the same label."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._harness import Report
from benchmarks.peers import pictures
from benchmarks.peers.contenders import ENTRIES, PLAIN
from benchmarks.peers.race import Outcome
from benchmarks.peers.works import HOMES

Outcomes = Mapping[str, Outcome]
NEVER_BELOW = 0.98  # times the best sequential way
ABSENT = "–"


class Store:
    """Figures of all works: those of this run, and those saved under the same label before, one file per work."""

    def __init__(self, report: Report) -> None:
        path = report.figure_path()
        self._folder = None if path is None else path.parent
        self._label = report.label
        self._machine = report.machine
        self.works: dict[str, Outcomes] = {}
        self.titles: dict[str, str] = {}
        self.dates: dict[str, str] = {}
        if self._folder is not None:
            for work in HOMES:
                if (file := self._file(work)).exists():
                    self._load(work, json.loads(file.read_text()))

    def add(self, work: str, title: str, outcomes: Outcomes, *, rounds: int) -> None:
        """Figures of this run; written at once where something is saved at all."""
        self.works[work], self.titles[work] = outcomes, title
        self.dates[work] = str(self._machine["date"])
        if self._folder is None:
            return
        data = {
            "work": work,
            "title": title,
            "rounds": rounds,
            "machine": self._machine,
            "contenders": {name: outcome.as_data() for name, outcome in outcomes.items()},
        }
        self._file(work).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def ordered(self) -> list[str]:
        """The works there are, in the order of the tables."""
        return [work for work in HOMES if work in self.works]

    def picture(self) -> Path | None:
        """Where the plot belongs; None where nothing is saved."""
        return None if self._folder is None else self._folder / f"{self._label}.png"

    def _file(self, work: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._label}-{work}.json"

    def _load(self, work: str, data: Mapping[str, Any]) -> None:
        self.works[work] = {name: Outcome(**found) for name, found in data["contenders"].items() if name in ENTRIES}
        self.titles[work] = data["title"]
        self.dates[work] = data["machine"]["date"]


def ratio(outcomes: Outcomes, one: str, other: str) -> float | None:
    """Throughput of ``one`` over ``other``: the median of the ratios within the rounds; None if one of them failed."""
    first, second = outcomes.get(one), outcomes.get(other)
    if first is None or second is None or first.failed or second.failed or not first.rates or not second.rates:
        return None
    return median(a / b for a, b in zip(first.rates, second.rates, strict=True))


def best(outcomes: Outcomes, wanted: Callable[[str], bool]) -> str | None:
    """Who of ``wanted`` was fastest."""
    running = [name for name, outcome in outcomes.items() if wanted(name) and not outcome.failed and outcome.rates]
    return max(running, key=lambda name: outcomes[name].rate, default=None)


def flagship(outcomes: Outcomes) -> str | None:
    """Which aiotime the targets are about: compiled where that runs, learning in the order of events."""
    for name in ("ours_auto", "ours_compiled", "ours_event", "ours"):
        if name in outcomes and not outcomes[name].failed:
            return name
    return None


def work_table(report: Report, title: str, outcomes: Outcomes) -> None:
    """One work: every contender, with all that was measured."""
    columns = [
        "contender", "frames/s", "lowest–highest", "× 1 thread", "p50 ms", "p99 ms", "at frames/s", "CPU ms per frame",
        "peak MiB", "start-up s", "first start-up s",
    ]  # fmt: skip
    rows: list[list[str | float]] = []
    for name, outcome in outcomes.items():
        if outcome.failed:
            rows.append([ENTRIES[name].title, "failed", *[ABSENT] * (len(columns) - 2)])
            continue
        low, high = min(outcome.rates), max(outcome.rates)
        p50, p99 = outcome.latency(0.5), outcome.latency(0.99)
        rows.append(
            [
                ENTRIES[name].title,
                outcome.rate,
                f"{low:,.0f}–{high:,.0f}",
                _or_absent(ratio(outcomes, name, PLAIN)),
                _or_absent(p50, 1e3),
                _or_absent(p99, 1e3),
                _or_absent(median(outcome.offered) if outcome.offered else None),
                median(outcome.cpu) * 1e3,
                _or_absent(outcome.peak),
                _or_absent(outcome.start_up),
                _or_absent(outcome.first_start_up),
            ]
        )
    report.table(title, columns, rows)
    others = [cores for outcome in outcomes.values() for cores in outcome.others]
    if others:
        report.say(
            "",
            f"Meanwhile others used {median(others):.2f} cores, {max(others):.2f} in the worst turn.",
        )
    for name, outcome in outcomes.items():
        if outcome.failed:
            report.say("", f"{ENTRIES[name].title} failed: {outcome.failed}")


def _or_absent(value: float | None, factor: float = 1.0) -> str | float:
    return ABSENT if value is None else value * factor


def summary(report: Report, store: Store) -> None:
    """The big table, who won, the targets, the plot."""
    works = store.ordered()
    if not works:
        report.say("", "Nothing has been measured under this label.")
        return
    rows: list[list[str | float]] = []
    for name, entry in ENTRIES.items():
        cells = [_cell(store.works[work], name) for work in works]
        if any(cell != ABSENT for cell in cells):
            rows.append([entry.title, *cells])
    report.table("Throughput, × plain loop on 1 thread", ["contender", *works], rows)
    report.table(
        "aiotime against the best of the others, throughput",
        ["work", "aiotime is", "best sequential", "aiotime ×", "best of all others", "aiotime ×"],
        [_duel(work, store.works[work]) for work in works],
    )
    if len(set(store.dates.values())) > 1:
        report.say("", "Measured on: " + ", ".join(f"{work} {store.dates[work]}" for work in works) + ".")
    targets(report, store.works)
    path = store.picture()
    if path is not None:
        pictures.bars(path, {store.titles[work]: store.works[work] for work in works})
        report.say("", f"![ratios]({path.name})")


def _cell(outcomes: Outcomes, name: str) -> str:
    if name not in outcomes:
        return ABSENT
    found = ratio(outcomes, name, PLAIN)
    return "failed" if found is None else f"{found:.2f}"


def _duel(work: str, outcomes: Outcomes) -> list[str | float]:
    own = flagship(outcomes)
    row: list[str | float] = [work, ENTRIES[own].title if own else "failed"]
    for group in (_sequential, _not_ours):
        other = best(outcomes, group)
        found = ratio(outcomes, own, other) if own and other else None
        row += [ENTRIES[other].title if other else ABSENT, ABSENT if found is None else f"{found:.2f}"]
    return row


def _sequential(name: str) -> bool:
    return ENTRIES[name].family in ("sequential", "compiled")


def _compiled(name: str) -> bool:
    return ENTRIES[name].family == "compiled"


def _framework(name: str) -> bool:
    return ENTRIES[name].parallel


def _not_ours(name: str) -> bool:
    return ENTRIES[name].family != "aiotime"


def _is(wanted: str) -> Callable[[str], bool]:
    return lambda name: name == wanted


# work, against whom in words, against whom, times
TARGETS: Sequence[tuple[str, str, Callable[[str], bool], float]] = (
    ("trivial", "SPDL", _is("spdl"), 10),
    ("trivial", "the best framework with parallel stages", _framework, 3),
    ("trivial", "the unbounded threads", _is("threads"), 0.9),
    ("released", "the plain loop", _is(PLAIN), 1.5),
    ("mlp64", "the eager plain loop", _is(PLAIN), 5),
    ("mlp256", "the eager plain loop", _is(PLAIN), 3),
    ("conv", "one thread", _is(PLAIN), 1.95),
    ("conv", "the best of all others", _not_ours, 1),
    ("gpt", "the best compiled sequential", _compiled, 1.5),
    ("learn_mlp", "one thread", _is(PLAIN), 1.85),
    ("learn_conv", "one thread", _is(PLAIN), 1.85),
    *((work, "the best sequential", _sequential, NEVER_BELOW) for work in HOMES),
)


def targets(report: Report, works: Mapping[str, Outcomes]) -> None:
    """Those of the issue, as far as their works and opponents have been measured."""
    unknown: list[str] = []
    for work, words, group, bound in TARGETS:
        if work not in works:
            continue
        own, other = flagship(works[work]), best(works[work], group)
        found = ratio(works[work], own, other) if own and other else None
        if found is None:
            unknown.append(f"{work}: times {words}")
            continue
        assert other is not None
        whom = "" if ENTRIES[other].title in words or other == PLAIN else f" ({ENTRIES[other].title})"
        report.target(f"{work}: times {words}{whom}", found, bound, unit=" ×")
    if unknown:
        report.say("", "No verdict, as one of the two failed or was left out: " + _listed(unknown) + ".")


def _listed(words: Iterable[str]) -> str:
    return "; ".join(words)

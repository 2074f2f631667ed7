"""What every benchmark shares: contenders that take turns, ratios, the machine in words, reports and results.

    for each round:  A  B  C   then   C  B  A   …        figures per round ──▶ medians, ratios within a round

A machine drifts by more than what is to be measured, so contenders run in one process, in turns, and are compared
within a round; the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import gc
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import torch

T = TypeVar("T")
Contender = Callable[[], float]
Loop = Literal["uvloop", "asyncio"]

LOOPS: tuple[Loop, ...] = ("uvloop", "asyncio") if importlib.util.find_spec("uvloop") else ("asyncio",)


def run_on(loop: Loop, main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` on a new event loop of that kind."""
    if loop == "asyncio":
        return asyncio.run(main)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


class Rounds:
    """Figures of several contenders, one per contender and round."""

    def __init__(self, figures: Mapping[str, Sequence[float]]) -> None:
        self.figures = {name: list(values) for name, values in figures.items()}

    def median(self, name: str) -> float:
        """The median over the rounds."""
        return median(self.figures[name])

    def ratio(self, one: str, other: str) -> float:
        """``one`` over ``other``: the median of the ratios within each round."""
        return median(a / b for a, b in zip(self.figures[one], self.figures[other], strict=True))

    def spread(self, name: str) -> str:
        """Smallest and largest figure, in words."""
        return f"{min(self.figures[name]):,.0f}–{max(self.figures[name]):,.0f}"


def take_turns(contenders: Mapping[str, Contender], *, rounds: int) -> Rounds:
    """Run every contender once per round, forwards and backwards in turn; each returns its figure."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            gc.collect()
            figures[name].append(contenders[name]())
            progress(f"round {number + 1} of {rounds}: {name}")
    progress("")
    return Rounds(figures)


def progress(text: str) -> None:
    """Show what is being measured, where somebody watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0..1) of ``values`` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def machine() -> dict[str, str | int | float]:
    """The machine and the versions, in words; no path and no host name."""
    import aiotime

    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),  # processes that wanted to run in the last minute, before us
        "python": platform.python_version(),
        "torch": torch.__version__,
        "uvloop": metadata.version("uvloop") if "uvloop" in LOOPS else "absent",
        "aiotime": aiotime.__version__,
    }


def _memory(*, plain: bool) -> str:
    """Keep freed memory unless told otherwise; what holds now, in words."""
    import aiotime

    if plain:
        return "plain malloc"
    return "freed memory kept" if aiotime.keep_freed_memory() else "malloc as it came"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def parser(question: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    made = argparse.ArgumentParser(description=question)
    made.add_argument("--quick", action="store_true", help="toy sizes: does it run? (the figures mean nothing)")
    made.add_argument("--rounds", type=int, help="how often each contender runs")
    made.add_argument(
        "--plain-malloc",
        action="store_true",
        help="let the C library give freed memory back (aiotime.keep_freed_memory)",
    )
    made.add_argument(
        "--save",
        nargs="?",
        const="",
        metavar="LABEL",
        help="write results/LABEL.json and .md; by default the label says the number of cores",
    )
    return made


class Report:
    """What was measured: printed as it comes, written to ``results/`` where asked.

    Made before anything is measured: freed memory is kept from here on, for every contender, but with --plain-malloc.

    Args:
        script: the ``__file__`` of the benchmark; results go beside it.
        question: what is asked, one line.
        setup: thread counts, sizes, whatever the figures depend on.
        arguments: as parsed by `parser`.
        memory: what malloc does, in words, where the benchmark sees to it itself.
    """

    def __init__(
        self, script: str, *, question: str, setup: str, arguments: argparse.Namespace, memory: str | None = None
    ) -> None:
        self._folder = Path(script).parent / "results"
        self._label: str | None = arguments.save
        self._quick: bool = arguments.quick
        self._lines: list[str] = []
        self.machine = machine() | {"memory": memory or _memory(plain=arguments.plain_malloc)}
        self._data: dict[str, Any] = {
            "question": question,
            "setup": setup,
            "machine": self.machine,
            "quick": self._quick,
            "tables": {},
            "targets": [],
        }
        facts = self.machine
        self.say(f"# {question}", "")
        self.say(
            f"{facts['date']} · {facts['processor']}, {facts['cores']} cores, {facts['system']}, "
            f"load {facts['load']} · Python {facts['python']}, torch {facts['torch']}, uvloop {facts['uvloop']}, "
            f"aiotime {facts['aiotime']} · {facts['memory']}"
        )
        self.say("", setup)
        if self._quick:
            self.say("", "**Toy sizes (--quick): the figures mean nothing.**")

    def say(self, *lines: str) -> None:
        """Add lines of text."""
        for line in lines:
            print(line)
        sys.stdout.flush()
        self._lines.extend(lines)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        """Add a table; numbers stay numbers in the JSON."""
        self._data["tables"][title] = [dict(zip(columns, row, strict=True)) for row in rows]
        shown = [[_shown(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *shown, strict=True)]
        numeric = [bool(rows) and not isinstance(cell, str) for cell in (rows[0] if rows else columns)]
        self.say("", f"**{title}**", "")
        self.say(_line(columns, widths, numeric))
        self.say(
            _line(
                [("-" * (w - 1) + ":") if n else "-" * w for w, n in zip(widths, numeric, strict=True)], widths, numeric
            )
        )
        for row in shown:
            self.say(_line(row, widths, numeric))

    def target(self, what: str, value: float, bound: float, *, unit: str = "", at_most: bool = False) -> None:
        """Compare ``value`` with what was promised."""
        self._data["targets"].append(
            {
                "what": what,
                "value": value,
                "bound": bound,
                "unit": unit,
                "at_most": at_most,
                "met": value <= bound if at_most else value >= bound,
            }
        )

    def finish(self) -> None:
        """Print the targets; write the files where asked."""
        targets = self._data["targets"]
        if targets:
            self.table(
                "Targets",
                ["what", "measured", "target", "verdict"],
                [
                    [
                        target["what"],
                        f"{_shown(target['value'])}{target['unit']}",
                        f"{'≤' if target['at_most'] else '≥'} {_shown(target['bound'])}{target['unit']}",
                        "met" if target["met"] else "not met",
                    ]
                    for target in targets
                ],
            )
        if self._label is None:
            return
        self._folder.mkdir(exist_ok=True)
        label = self.label
        (self._folder / f"{label}.md").write_text("\n".join(self._lines) + "\n")
        (self._folder / f"{label}.json").write_text(json.dumps(self._data, indent=1, ensure_ascii=False) + "\n")
        print(f"\nwritten: results/{label}.md, results/{label}.json")

    @property
    def label(self) -> str:
        """The name of the result files."""
        return self._label or f"{self.machine['cores']}-cores"

    def figure_path(self) -> Path | None:
        """Where a picture belongs; None where nothing is saved."""
        if self._label is None:
            return None
        self._folder.mkdir(exist_ok=True)
        return self._folder / f"{self.label}.png"


def _shown(cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 1000:
        return f"{cell:,.0f}"
    return f"{cell:.2f}" if abs(cell) < 100 else f"{cell:.1f}"


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    fitted = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
    return f"| {' | '.join(fitted)} |"

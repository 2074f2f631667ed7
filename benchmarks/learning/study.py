"""Many runs on a few processes, each finished one written down, so that an interrupted study goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import progress
from benchmarks.learning.trial import Outcome, Trial, run


class Study:
    """Runs trials, once each.

    Args:
        processes: 1 runs them in this one.
        cache: a file of JSON lines, read at the start and added to; None: nothing is kept.
    """

    def __init__(self, *, processes: int, cache: Path | None = None) -> None:
        self._processes = processes
        self._cache = cache
        self._known: dict[Trial, Outcome] = {}
        if cache is not None and cache.exists():
            self._known.update(read(cache))
            if not cache.read_text().endswith("\n"):
                cache.write_text(cache.read_text() + "\n")  # whoever wrote last was interrupted
        self.ran = 0
        self.seconds = 0.0  # of runs, in this process and others

    def run(self, trials: Iterable[Trial], *, what: str = "") -> dict[Trial, Outcome]:
        """The outcome of each."""
        wanted = list(dict.fromkeys(trials))
        missing = [trial for trial in wanted if trial not in self._known]
        missing.sort(key=lambda trial: trial.frames * (3 + trial.stages), reverse=True)  # the longest first
        start = time.perf_counter()
        with self._runner(len(missing)) as outcomes:
            for done, (trial, outcome) in enumerate(outcomes(missing), start=1):
                self._keep(trial, outcome)
                rest = (time.perf_counter() - start) / done * (len(missing) - done)
                progress(f"{what}: {done} of {len(missing)} runs, {rest / 60:.0f} min left at most")
        progress("")
        return {trial: self._known[trial] for trial in wanted}

    @contextmanager
    def _runner(self, number: int) -> Iterator[Callable[[Sequence[Trial]], Iterator[tuple[Trial, Outcome]]]]:
        if self._processes == 1 or number < 2:
            yield lambda trials: map(_run, trials)
            return
        with multiprocessing.get_context("spawn").Pool(min(self._processes, number), initializer=_alone) as pool:
            yield lambda trials: pool.imap_unordered(_run, trials)

    def _keep(self, trial: Trial, outcome: Outcome) -> None:
        self._known[trial] = outcome
        self.ran += 1
        self.seconds += outcome.seconds
        if self._cache is not None:
            with self._cache.open("a") as file:
                file.write(json.dumps({"trial": asdict(trial), "outcome": asdict(outcome)}) + "\n")


def read(cache: Path) -> Iterator[tuple[Trial, Outcome]]:
    """What a cache file holds; a last line that was cut off is left out."""
    for line in cache.read_text().splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        trial = entry["trial"]
        yield Trial(**{**trial, "seeds": tuple(trial["seeds"])}), Outcome(**entry["outcome"])


def _run(trial: Trial) -> tuple[Trial, Outcome]:
    return trial, run(trial)


def _alone() -> None:
    """A process of the pool: one thread, since there are as many processes as cores."""
    torch.set_num_threads(1)

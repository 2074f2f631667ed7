"""Hyper-parameters, chosen for every rule in the same way and on seeds (and frames) that the tables do not use.

    all trials of a rule, few frames ──▶ the best three, more frames ──▶ the best one

A trial is as good as its mean score over the second half of its run. No run is longer than the first half of the
stream that the tables are made of, and it is the second half that they count: so also where a stream has an order of
its own, nothing of what is counted was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean
from typing import Literal

from benchmarks.learning.rules import EXACT, Row
from benchmarks.learning.study import Study
from benchmarks.learning.trial import Outcome, Trial

SEEDS = (10, 11)


@dataclass(frozen=True, slots=True)
class Setting:
    """What was chosen for a rule."""

    optimizer: str
    rate: float
    knob: int

    def shown(self, row: Row) -> str:
        """For a table."""
        own = ", ".join(f"{name}={value}" for name, value in row.knobs[self.knob].items())
        return f"{self.optimizer} {self.rate:g}{f'; {own}' if own else ''}"


@dataclass(frozen=True, slots=True)
class Round:
    """So many of the best settings run so many frames."""

    settings: int
    frames: int


Network = Literal["plain", "deep"]


def planned(
    row: Row,
    setting: Setting,
    *,
    stream: str,
    frames: int,
    stages: int,
    seeds: tuple[int, ...],
    per_digit: int = 16,
    network: Network = "plain",
) -> Trial:
    """A run of ``row`` with ``setting``.

    "plain": a layer per stage but no fewer than four, first weights as torch has them. "deep": eight layers for
    every number of stages, He's first weights. Exact learning gives the same for every number of stages (tests compare
    the bits), so it runs with one, the fastest.
    """
    return Trial(
        stream,
        frames,
        row.name,
        1 if row.name == EXACT else stages,
        setting.optimizer,
        setting.rate,
        setting.knob,
        seeds,
        per_digit,
        8 if network == "deep" else max(4, stages),
        "he" if network == "deep" else "torch",
    )


def tune(
    study: Study,
    candidates: Mapping[Row, Sequence[Setting]],
    rounds: Sequence[Round],
    *,
    stream: str,
    stages: int,
    per_digit: int = 16,
    network: Network = "plain",
    what: str = "",
) -> dict[Row, Setting]:
    """The best setting of each rule; its first one where all of them fail."""
    left = {row: list(settings) for row, settings in candidates.items()}
    for number, one in enumerate(rounds, start=1):
        left = {row: settings[: one.settings] for row, settings in left.items()}
        trials = {
            (row, setting): planned(
                row,
                setting,
                stream=stream,
                frames=one.frames,
                stages=stages,
                seeds=SEEDS,
                per_digit=per_digit,
                network=network,
            )
            for row, settings in left.items()
            for setting in settings
            if len(settings) > 1
        }
        outcomes = study.run(trials.values(), what=f"{what}, round {number} of {len(rounds)}")

        worth = {key: mean(outcomes[trial]) for key, trial in trials.items()}
        left = {
            row: [
                setting
                for _, setting in sorted(
                    ((worth.get((row, setting), 0.0), setting) for setting in settings),
                    key=itemgetter(0),
                    reverse=True,
                )
            ]
            for row, settings in left.items()
        }
    return {row: settings[0] for row, settings in left.items()}


def mean(outcome: Outcome) -> float:
    """Of the members; a run that failed is worse than any."""
    return fmean(outcome.scores) if outcome.scores else float("-inf")


def grid(row: Row, number: int) -> list[Setting]:
    """The rule's own settings."""
    return [Setting(*trial) for trial in row.trials(number)]


def around(setting: Setting) -> list[Setting]:
    """The same at three rates."""
    return [
        Setting(setting.optimizer, float(f"{setting.rate * factor:.3g}"), setting.knob) for factor in (1.0, 0.3, 3.0)
    ]

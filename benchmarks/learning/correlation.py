"""Accuracy against how long a stream stays alike: 1 to 32 frames from cut to cut, everything else the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks._harness import Report
from benchmarks.learning import pictures
from benchmarks.learning.rules import BY_NAME, EXACT, PAIRS, RECOMMENDED, SIDEWAYS
from benchmarks.learning.study import Study
from benchmarks.learning.trial import Outcome, Trial
from benchmarks.learning.tuning import Network, Round, Setting, planned, tune

STREAM, STAGES = "digits-smooth", 4
RULES = (EXACT, RECOMMENDED, "local heads", "delayed 1f1b, predicted", "delayed 1f1b", "delayed lockstep", SIDEWAYS)
SETTINGS = tuple(Setting(name, rate, 0) for name, rate in PAIRS[:4])


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run."""

    lengths: Sequence[int] = (1, 2, 4, 8, 16, 32)
    frames: int = 3_000
    tuning: int = 1_000
    settings: int = len(SETTINGS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    network: Network = "plain"


def report_all(report: Report, study: Study, sizes: Sizes) -> None:
    """Tune at each length, run, table, picture."""
    outcomes: dict[tuple[str, int], Outcome] = {}
    trials: dict[tuple[str, int], Trial] = {}
    for length in sizes.lengths:
        chosen = tune(
            study,
            {BY_NAME[name]: SETTINGS[: sizes.settings] for name in RULES},
            [Round(sizes.settings, sizes.tuning)],
            stream=STREAM,
            stages=STAGES,
            per_digit=length,
            network=sizes.network,
            what=f"tuning at {length} frames per scene",
        )
        for row, setting in chosen.items():
            trials[row.name, length] = planned(
                row,
                setting,
                stream=STREAM,
                frames=sizes.frames,
                stages=STAGES,
                seeds=sizes.seeds,
                per_digit=length,
                network=sizes.network,
            )
    ran = study.run(trials.values(), what="correlation lengths")
    outcomes = {key: ran[trial] for key, trial in trials.items()}
    report.table(
        f"Accuracy over the second half of {sizes.frames:,} frames by frames per scene, {STAGES} stages, mean ± "
        f"deviation of {len(sizes.seeds)} seeds",
        ["rule", *map(str, sizes.lengths)],
        [[name, *(_shown(outcomes[name, length]) for length in sizes.lengths)] for name in RULES],
    )
    for length in (sizes.lengths[0], sizes.lengths[-1]):
        scores = [outcomes[name, length].scores for name in (RECOMMENDED, SIDEWAYS)]
        if all(scores):
            lead = 100 * (fmean(scores[0]) - fmean(scores[1]))
            report.target(f"{length} frames per scene: recommended recipe ahead of Sideways", lead, 0.0, unit=" points")
    path = report.figure_path()
    if path is not None:
        pictures.against_correlation(
            path,
            {
                name: [
                    (length, fmean(outcomes[name, length].scores))
                    for length in sizes.lengths
                    if outcomes[name, length].scores
                ]
                for name in RULES
            },
        )


def _shown(outcome: Outcome) -> str:
    if not outcome.scores:
        return f"failed: {(outcome.error or '')[:80]}"
    return f"{fmean(outcome.scores):.3f} ± {stdev(outcome.scores) if len(outcome.scores) > 1 else 0.0:.3f}"

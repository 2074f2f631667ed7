"""The headline in minutes: few rules, fixed settings, five seeds; unrelated digits and the smooth stream.

Unrelated digits: Adam 1e-3 for every rule, as the target says. Smooth stream: RMSprop, the better of `RATES` for each
rule, chosen on other seeds. The full study (`accuracy`) tunes every rule on every stream and takes far longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks._harness import Report
from benchmarks.learning import pictures
from benchmarks.learning.rules import DEFAULT, EXACT, RECOMMENDED, SIDEWAYS
from benchmarks.learning.study import Study
from benchmarks.learning.trial import BLOCK, Outcome, Trial

PLAIN, SMOOTH = "digits", "digits-smooth"
RATES = (3e-4, 1e-3, 3e-3)
MANY = (
    EXACT, SIDEWAYS, "delayed lockstep", "delayed 1f1b", "delayed 1f1b, current", "delayed 1f1b, predicted", DEFAULT,
    "delayed event, half load", RECOMMENDED, "local heads", "interlocking",
)  # fmt: skip
FEW = (EXACT, SIDEWAYS, DEFAULT, RECOMMENDED, "local heads")
WITHIN, AT_CHANCE = 0.5, 15.0  # points, per cent
CLOSED = {4: 95.0, 8: 90.0}  # per cent of the gap, by stages


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run.

    Args:
        frames: of a run that counts; tuning: of one that chooses a rate.
        deep: eight layers for every number of stages, He's first weights.
        seeds: that count; others: that choose.
        rules: by number of stages.
    """

    frames: int = 5_000
    tuning: int = 1_500
    deep: bool = False
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    others: tuple[int, ...] = (20, 21)
    rules: tuple[tuple[int, tuple[str, ...]], ...] = ((4, MANY), (8, FEW))


def report_all(report: Report, study: Study, sizes: Sizes) -> None:
    """Choose, run, print, draw."""
    cells = [(stages, rule) for stages, rules in sizes.rules for rule in rules]
    tuning = {
        (stages, rule, rate): _trial(sizes, SMOOTH, sizes.tuning, rule, stages, "RMSprop", rate, sizes.others)
        for stages, rule in cells
        for rate in RATES
    }
    tuned = study.run(tuning.values(), what="choosing rates")
    rates = {
        (stages, rule): max(RATES, key=lambda rate: _mean(tuned[tuning[stages, rule, rate]])) for stages, rule in cells
    }
    plain = {cell: _trial(sizes, PLAIN, sizes.frames, cell[1], cell[0], "Adam", 1e-3, sizes.seeds) for cell in cells}
    smooth = {
        cell: _trial(sizes, SMOOTH, sizes.frames, cell[1], cell[0], "RMSprop", rates[cell], sizes.seeds)
        for cell in cells
    }
    found = study.run([*plain.values(), *smooth.values()], what="runs that count")
    for stages, rules in sizes.rules:
        on_plain = {rule: found[plain[stages, rule]] for rule in rules}
        on_smooth = {rule: found[smooth[stages, rule]] for rule in rules}
        _table(report, stages, rules, on_plain, on_smooth, rates)
        exact, sideways = _mean(on_plain[EXACT]), _mean(on_plain[SIDEWAYS])
        behind = 100 * (exact - _mean(on_plain[DEFAULT]))
        report.target(f"{PLAIN}, S={stages}: {DEFAULT} behind exact", behind, WITHIN, unit=" points", at_most=True)
        report.target(f"{PLAIN}, S={stages}: Sideways", 100 * sideways, AT_CHANCE, unit=" %", at_most=True)
        for rule in (RECOMMENDED, "local heads"):
            closed = _closed(on_smooth, rule)
            report.target(f"{SMOOTH}, S={stages}: gap closed by {rule}", closed, CLOSED[stages], unit=" %")
        path = report.figure_path()
        if path is not None:
            shown = [rule for rule in (EXACT, RECOMMENDED, "local heads", DEFAULT, SIDEWAYS) if rule in rules]
            for name, outcomes in ((PLAIN, on_plain), (SMOOTH, on_smooth)):
                pictures.curves(
                    path.with_name(f"{path.stem}-{name}-S{stages}.png"),
                    {rule: outcomes[rule].curve for rule in shown},
                    title=f"{name}, {stages} stages",
                    block=BLOCK,
                )


def _table(
    report: Report,
    stages: int,
    rules: Sequence[str],
    plain: dict[str, Outcome],
    smooth: dict[str, Outcome],
    rates: dict[tuple[int, str], float],
) -> None:
    rows: list[list[str | float]] = [
        [
            rule,
            _shown(plain[rule]),
            _shown(smooth[rule]),
            f"{_closed(smooth, rule):.0f} %",
            f"{rates[stages, rule]:g}",
            f"{smooth[rule].delay:.1f}",
        ]
        for rule in rules
    ]
    columns = ["rule", "unrelated digits, %", "smooth stream, %", "gap closed", "rate, smooth", "mean delay, stage 0"]
    report.table(f"{stages} stages: accuracy over the second half, mean ± deviation", columns, rows)


def _trial(
    sizes: Sizes, stream: str, frames: int, rule: str, stages: int, optimizer: str, rate: float, seeds: tuple[int, ...]
) -> Trial:
    own = 1 if rule == EXACT else stages
    if sizes.deep:
        return Trial(stream, frames, rule, own, optimizer, rate, 0, seeds, layers=8, law="he")
    return Trial(stream, frames, rule, own, optimizer, rate, 0, seeds, layers=max(4, stages))


def _mean(outcome: Outcome) -> float:
    return fmean(outcome.scores) if outcome.scores else 0.0


def _shown(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"failed: {outcome.error}"
    deviation = stdev(outcome.scores) if len(outcome.scores) > 1 else 0.0
    return f"{100 * _mean(outcome):.1f} ± {100 * deviation:.1f}"


def _closed(outcomes: dict[str, Outcome], rule: str) -> float:
    gap = _mean(outcomes[EXACT]) - _mean(outcomes[SIDEWAYS])
    return 100 * (_mean(outcomes[rule]) - _mean(outcomes[SIDEWAYS])) / gap if gap > 0.01 else 0.0

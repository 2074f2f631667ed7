"""Accuracy of every rule over 1, 2, 4 and 8 stages, on every stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks._harness import Report
from benchmarks.learning import pictures
from benchmarks.learning.rules import BY_NAME, DEFAULT, EXACT, RECOMMENDED, ROWS, SIDEWAYS, Row
from benchmarks.learning.streams import STREAMS
from benchmarks.learning.study import Study
from benchmarks.learning.trial import BLOCK, Outcome, Trial
from benchmarks.learning.tuning import Network, Round, Setting, around, grid, planned, tune

STAGES = (1, 2, 4, 8)
SMOOTH, PLAIN = "digits-smooth", "digits"
LIKE_SMOOTH = ("trump-approval", "video-place", "video-next")  # tuned around what is best on the smooth digits
WITHIN, AT_CHANCE = 0.5, 15.0  # points, per cent
CLOSED = {4: 95.0, 8: 90.0}  # per cent of the gap, by stages
NOTICEABLE = 0.01  # a gap below this is not divided by
CURVES = (EXACT, RECOMMENDED, "delayed 1f1b, predicted", "delayed 1f1b", "delayed lockstep", SIDEWAYS)
DELAYED = (
    RECOMMENDED,
    "delayed 1f1b, predicted",
    "delayed 1f1b, current",
    "delayed 1f1b",
    "delayed lockstep",
    SIDEWAYS,
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run.

    Args:
        scale: of the streams' lengths.
        seeds: of the tables, five or more.
        rounds: of the tuning from scratch; near: of the tuning around a setting that is known.
        streams: their names, or all.
        rows: rules of the tables.
        stages: numbers of stages.
        network: see `benchmarks.learning.tuning.planned`.
    """

    scale: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rounds: tuple[Round, ...] = (Round(12, 300), Round(3, 1_200))
    near: tuple[Round, ...] = (Round(3, 500),)
    streams: tuple[str, ...] = tuple(STREAMS)
    rows: tuple[Row, ...] = ROWS
    stages: tuple[int, ...] = STAGES
    network: Network = "plain"

    def frames(self, stream: str) -> int:
        """Of a run that counts."""
        return round(STREAMS[stream][0] * self.scale)

    def cut(self, rounds: Sequence[Round], stream: str) -> list[Round]:
        """Rounds that stay within the first half of the stream."""
        half = self.frames(stream) // 2
        return [Round(one.settings, min(round(one.frames * min(1.0, self.scale)), half)) for one in rounds]


Found = dict[tuple[str, str, int], tuple[Setting, Outcome]]  # by stream, rule, stages


def measure(study: Study, sizes: Sizes) -> Found:
    """Tune and run all."""
    chosen: dict[tuple[str, int], dict[Row, Setting]] = {}
    everywhere = [row for row in sizes.rows if row.everywhere]
    from_scratch = {(SMOOTH, 4): sizes.rows, (SMOOTH, 8): sizes.rows, (PLAIN, 4): everywhere}
    for (stream, stages), rows in from_scratch.items():
        if stages in sizes.stages:
            chosen[stream, stages] = tune(
                study,
                {row: grid(row, sizes.rounds[0].settings) for row in rows},
                sizes.cut(sizes.rounds, stream),
                stream=stream,
                stages=stages,
                network=sizes.network,
                what=f"tuning on {stream}, {stages} stages",
            )
    for stream in sizes.streams:
        if stream not in (SMOOTH, PLAIN):
            like = chosen[SMOOTH if stream in LIKE_SMOOTH else PLAIN, 4]
            chosen[stream, 4] = tune(
                study,
                {row: around(like[row]) for row in everywhere},
                sizes.cut(sizes.near, stream),
                stream=stream,
                stages=4,
                network=sizes.network,
                what=f"tuning on {stream}",
            )
    trials: dict[tuple[str, str, int], tuple[Setting, Trial]] = {}
    for stream in sizes.streams:
        for row in sizes.rows if stream == SMOOTH else everywhere:
            for stages in sizes.stages:
                setting = chosen.get((stream, stages), chosen[stream, 4])[row]
                trial = _trial(sizes, stream, row, stages, setting)
                trials[stream, row.name, stages] = setting, trial
    outcomes = study.run((trial for _, trial in trials.values()), what="the tables")
    return {key: (setting, outcomes[trial]) for key, (setting, trial) in trials.items()}


def _trial(sizes: Sizes, stream: str, row: Row, stages: int, setting: Setting) -> Trial:
    frames = sizes.frames(stream)
    return planned(row, setting, stream=stream, frames=frames, stages=stages, seeds=sizes.seeds, network=sizes.network)


def default_rule(study: Study, sizes: Sizes) -> dict[str, Outcome]:
    """Exact, the default rule and Sideways on unrelated frames with Adam 1e-3 over 4 stages, untuned."""
    trials = {
        name: _trial(sizes, PLAIN, BY_NAME[name], 4, Setting("Adam", 1e-3, 0)) for name in (EXACT, DEFAULT, SIDEWAYS)
    }
    outcomes = study.run(trials.values(), what="Adam 1e-3 on digits")
    return {name: outcomes[trial] for name, trial in trials.items()}


def closed(score: float, *, exact: float, sideways: float) -> float | None:
    """Per cent of the gap between Sideways and Exact; None where there is hardly one."""
    gap = exact - sideways
    return None if gap < NOTICEABLE else 100 * (score - sideways) / gap


# ---------------------------------------------------------------------- what is shown


def report_all(report: Report, study: Study, sizes: Sizes) -> None:
    """Measure, tables, targets, pictures."""
    found = measure(study, sizes)
    untuned = default_rule(study, sizes)
    for stream in sizes.streams:
        _table(report, found, sizes, stream)
    report.table(
        "digits with Adam 1e-3 as it is, 4 stages",
        ["rule", "accuracy"],
        [[name, _spread(outcome)] for name, outcome in untuned.items()],
    )
    if all(outcome.scores for outcome in untuned.values()):
        exact, default, sideways = (100 * fmean(untuned[name].scores) for name in (EXACT, DEFAULT, SIDEWAYS))
        report.target("digits, Adam 1e-3, S=4: default rule behind Exact", exact - default, WITHIN, unit=" points",
                      at_most=True)  # fmt: skip
        report.target("digits, Adam 1e-3, S=4: Sideways (chance is 10 %)", sideways, AT_CHANCE, unit=" %", at_most=True)
    for stages, bound in CLOSED.items():
        if (share := _closed(found, SMOOTH, RECOMMENDED, stages)) is not None:
            report.target(f"{SMOOTH}, S={stages}: gap closed by {RECOMMENDED}", share, bound, unit=" %")
    _draw(report, found, sizes)


def _closed(found: Found, stream: str, name: str, stages: int) -> float | None:
    scores = [found[stream, one, stages][1].scores for one in (name, EXACT, SIDEWAYS) if (stream, one, stages) in found]
    if len(scores) < 3 or not all(scores):
        return None
    score, exact, sideways = map(fmean, scores)
    return closed(score, exact=exact, sideways=sideways)


def _spread(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"failed: {outcome.error[:120]}"
    deviation = stdev(outcome.scores) if len(outcome.scores) > 1 else 0.0
    return f"{fmean(outcome.scores):.3f} ± {deviation:.3f}"


def _table(report: Report, found: Found, sizes: Sizes, stream: str) -> None:
    rows: list[list[str | float]] = []
    for row in sizes.rows:
        if (stream, row.name, sizes.stages[0]) not in found:
            continue
        cells = [found[stream, row.name, stages] for stages in sizes.stages]
        shares = [_closed(found, stream, row.name, stages) for stages in sizes.stages]
        middle = cells[len(cells) // 2]
        rows.append(
            [
                row.name,
                *(_spread(outcome) for _, outcome in cells),
                *("–" if share is None else f"{share:.0f} %" for share in shares),
                f"{middle[1].delay:.2f}",
                *(setting.shown(row) for setting, _ in (middle, cells[-1])),
            ]
        )
    stages = sizes.stages
    score = "R²" if stream in ("trump-approval", "video-next") else "accuracy"
    report.table(
        f"{stream}: {score} over the second half of {sizes.frames(stream):,} frames, mean ± deviation of "
        f"{len(sizes.seeds)} seeds",
        [
            "rule",
            *(f"S = {s}" for s in stages),
            *(f"gap closed, S = {s}" for s in stages),
            f"delay, S = {stages[len(stages) // 2]}",
            f"tuned, S = {stages[len(stages) // 2]}",
            f"tuned, S = {stages[-1]}",
        ],
        rows,
    )


def _draw(report: Report, found: Found, sizes: Sizes) -> None:
    path = report.figure_path()
    if path is None:
        return
    for stream in (SMOOTH, PLAIN):
        if stream not in sizes.streams:
            continue
        curves = {name: found[stream, name, 4][1].curve for name in CURVES if (stream, name, 4) in found}
        pictures.curves(path.with_name(f"{path.stem}-{stream}.png"), curves, title=f"{stream}, 4 stages", block=BLOCK)
    pictures.against_delay(
        path.with_name(f"{path.stem}-delay.png"),
        {
            stream: {
                name: [
                    (outcome.delay, fmean(outcome.scores))
                    for stages in sizes.stages
                    for _, outcome in [found[stream, name, stages]]
                    if outcome.scores
                ]
                for name in DELAYED
                if (stream, name, sizes.stages[0]) in found
            }
            for stream in (SMOOTH, PLAIN)
            if stream in sizes.streams
        },
        exact={
            stream: fmean(found[stream, EXACT, 4][1].scores)
            for stream in (SMOOTH, PLAIN)
            if stream in sizes.streams and found[stream, EXACT, 4][1].scores
        },
    )

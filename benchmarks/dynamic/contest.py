"""Contest: a network with many instances in flight beside plain PyTorch, and what the report says about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import aiotime
from benchmarks._harness import Report
from benchmarks.dynamic import picture
from benchmarks.dynamic.race import Problem, Result, Way, race, speed, times

PLAIN, NETWORK, ONE = "plain PyTorch", "network", "network, one at a time"
FASTER = 3.0  # times plain PyTorch
MORE = 1.3  # times its instances
TUNING_SEED = 77


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    leg: int  # instances between two looks at the validation set
    legs: int  # at most, per seed
    validation: int  # instances
    seeds: int
    first: int = 0  # the first of them


def held(problem: Problem, ways: Sequence[Way], once: Sequence[Way], sizes: Sizes) -> list[Result]:
    """Every seed; ``once``: ways that run in the first one only."""
    results = []
    for seed in range(sizes.first, sizes.first + sizes.seeds):
        own = [*ways, *once] if seed == sizes.first else list(ways)
        results.append(aiotime.run(race(problem, own, seed=seed, leg=sizes.leg, legs=sizes.legs)))
    return results


def tuned(
    report: Report, problem: Problem, ways: Sequence[Way], rates: Mapping[str, Sequence[float]], sizes: Sizes
) -> list[Way]:
    """Each way with that of its ``rates`` which is best after a third of the instances, on a seed of its own."""
    legs = max(1, sizes.legs // 3)
    rows: list[list[str | float]] = []
    found = []
    for way in ways:
        scores = []
        for rate in rates[way.name]:
            one = aiotime.run(race(problem, [replace(way, rate=rate)], seed=TUNING_SEED, leg=sizes.leg, legs=legs))
            scores.append(one.curves[0].accuracy[-1])
        best = max(range(len(scores)), key=scores.__getitem__)
        found.append(replace(way, rate=rates[way.name][best]))
        tried = zip(rates[way.name], scores, strict=True)
        rows += [
            [way.name, f"{rate:g}", 100 * score, "taken" if rate == found[-1].rate else ""] for rate, score in tried
        ]
    columns = ["way", "rate", "accuracy (%)", ""]
    report.table(f"The rates of Adam, after {legs * sizes.leg:,} instances of seed {TUNING_SEED}", columns, rows)
    return found


def told(report: Report, problem: Problem, results: Sequence[Result]) -> None:
    """Tables, targets and the picture."""
    first = results[0].curves
    ways = [curve.way for curve in first]
    plain = next(at for at, way in enumerate(ways) if way.name == PLAIN)
    rows: list[list[str | float]] = []
    for at, way in enumerate(ways):
        own = [result for result in results if at < len(result.curves)]
        curves = [result.curves[at] for result in own]
        arrived = [curve.arrived for curve in curves if curve.arrived is not None]
        rows.append(
            [
                way.name,
                f"{way.rate:g}",
                "-" if way.share < 1 else f"{len(arrived)} of {len(own)}",
                f"{median(arrived):,.0f}" if arrived else "-",
                f"{median(curve.seconds[-1] for curve in curves):,.0f}" if arrived else "-",
                speed(own, at),
                times(own, at, plain),
                median(curve.batch for curve in curves),
                median(curve.delay for curve in curves),
            ]
        )
    report.table(
        f"Until {100 * problem.target:g} % of the validation set are right (medians of the seeds)",
        ["way", "rate", "arrived", "instances", "seconds", "instances/s", "× plain", "calls per batch", "delay"],
        rows,
    )
    for name in (NETWORK, *(way.name for way in ways if way.replicas > 1)):
        at = next((at for at, way in enumerate(ways) if way.name == name), None)
        if at is not None:
            own = [result for result in results if at < len(result.curves)]
            worst = min(max(result.curves[at].accuracy) for result in own)
            report.target(f"{name}: validation accuracy, the worst seed", 100 * worst, 100 * problem.target, unit=" %")
    at = next(at for at, way in enumerate(ways) if way.name == NETWORK)
    report.target(f"{NETWORK}: instances/s, times plain PyTorch", times(results, at, plain), FASTER, unit=" ×")
    report.target(
        f"{NETWORK}: instances until the target, times plain PyTorch's",
        median(_more(result, at, plain) for result in results),
        MORE,
        unit=" ×",
        at_most=True,
    )
    path = report.figure_path()
    if path is not None:
        picture.curves(path, [curve for curve in first if curve.accuracy], target=problem.target, title=problem.name)


def _more(result: Result, at: int, plain: int) -> float:
    """Instances that it needed, times those of plain PyTorch; infinite where it did not arrive."""
    one, other = result.curves[at].arrived, result.curves[plain].arrived
    if one is None:
        return math.inf
    return one / (other or result.curves[plain].instances[-1])

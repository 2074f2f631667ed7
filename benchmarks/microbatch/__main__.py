"""python -m benchmarks.microbatch"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import aiotime
from benchmarks._harness import LOOPS, Report, parser, progress, run_on
from benchmarks.microbatch import __doc__ as question
from benchmarks.microbatch.load import Outcome, beside, paced, saturated, shares
from benchmarks.microbatch.nets import NETS, frames

BATCHES = (1, 2, 4, 8, 16, 32)
WAITS = (0.0, 1e-3, 2e-3, 5e-3)  # seconds
PACED_BATCHES = (1, 8, 32)
LOADS = (0.5, 1.5)  # × what one frame at a time can do
GAIN = 2.0  # × the pipeline without batches, the perceptron
FAIR = 0.9  # of a third
Measured = dict[Any, list[Outcome]]


def take_turns(
    contenders: dict[Any, Callable[[], Coroutine[Any, Any, Outcome]]], rounds: int, found: Measured | None = None
) -> Measured:
    """Each once per round, forwards and backwards."""
    found = {} if found is None else found
    for number in range(rounds):
        order = list(contenders)
        for name in order if number % 2 == 0 else order[::-1]:
            progress(f"round {number + 1}: {name}")
            found.setdefault(name, []).append(run_on(LOOPS[0], contenders[name]()))
    progress("")
    return found


def middle(found: list[Outcome], what: Callable[[Outcome], float]) -> float:
    return median(what(outcome) for outcome in found)


def ratio(one: list[Outcome], other: list[Outcome]) -> float:
    """Of the throughputs, within each round."""
    return median(a.frames_per_second / b.frames_per_second for a, b in zip(one, other, strict=True))


class Bench:
    """One net: its plan, made once, so that every contender is cut in the same way."""

    def __init__(self, name: str, *, quick: bool) -> None:
        make, shape = NETS[name]
        self.make = make
        self.name = name
        self.example = torch.zeros(shape)
        self.frames = frames(shape, 64)
        self.number = 60 if quick else 1_500
        self.plan = aiotime.plan(make(), example=self.example, devices=["cpu:0", "cpu:1"], balance="even")
        model = make()
        with torch.inference_mode():
            self.expected = [model(frame) for frame in self.frames]
        self.model = model

    def pipeline(self, max_batch: int = 1, max_wait: float = 0.0) -> aiotime.Pipeline:
        """A new one, cut as all the others."""
        return aiotime.Pipeline(
            self.make(), example=self.example, plan=self.plan, max_batch=max_batch, max_wait=max_wait
        )

    async def loop(self, batch: int) -> Outcome:
        """No pipeline: the model called in a for loop, on frames that are all there, so many at a time."""
        torch.set_num_threads(1)
        latencies, count = [], 0
        with torch.inference_mode():
            start = perf_counter()
            while count < self.number:
                begun = perf_counter()
                some = [self.frames[(count + at) % len(self.frames)] for at in range(batch)]
                rows = self.model(torch.cat(some)).split(1)
                count += len(rows)
                latencies += [perf_counter() - begun] * len(rows)
            spent = perf_counter() - start
        return Outcome(count / spent, latencies, batch)

    def saturation(self, rounds: int) -> Measured:
        """As fast as it goes: by (kind, max_batch)."""

        def ours(most: int, wait: float) -> Callable[[], Coroutine[Any, Any, Outcome]]:
            return lambda: saturated(self.pipeline(most, wait), self.frames, self.number, self.expected)

        contenders: dict[Any, Callable[[], Coroutine[Any, Any, Outcome]]] = {
            ("for loop", 1): lambda: self.loop(1),
            ("for loop", 32): lambda: self.loop(32),
        }
        for most in BATCHES:
            contenders["pipeline", most] = ours(most, 0.0)
        contenders["2 ms", 8] = ours(8, 2e-3)
        contenders["2 ms", 32] = ours(32, 2e-3)
        return take_turns(contenders, rounds)

    def paced(self, capacity: float, rounds: int, *, quick: bool) -> Measured:
        """At a pace: by (load, max_batch, max_wait)."""
        contenders: dict[Any, Callable[[], Coroutine[Any, Any, Outcome]]] = {}
        for load in LOADS:
            rate = load * capacity
            number = 60 if quick else int(0.5 * rate)
            for most in PACED_BATCHES:
                for wait in WAITS if most > 1 else WAITS[:1]:
                    contenders[load, most, wait] = lambda most=most, wait=wait, rate=rate, number=number: paced(  # type: ignore[misc]
                        self.pipeline(most, wait), self.frames, number, self.expected, rate=rate, seed=7
                    )
        return take_turns(contenders, rounds)


def saturation_table(report: Report, bench: Bench, found: Measured) -> None:
    base = found["pipeline", 1]
    names = {"for loop": "for loop, frames joined by hand", "pipeline": "pipeline", "2 ms": "pipeline, max_wait 2 ms"}
    report.table(
        f"{bench.name}, saturated",
        ["contender", "max_batch", "frames/s", "× pipeline without", "mean batch", "p50 ms", "p99 ms"],
        [
            [
                names[kind],
                most,
                middle(each, lambda o: o.frames_per_second),
                ratio(each, base),
                middle(each, lambda o: o.batch),
                middle(each, lambda o: o.quantile(0.5)),
                middle(each, lambda o: o.quantile(0.99)),
            ]
            for (kind, most), each in found.items()
        ],
    )


def paced_table(report: Report, bench: Bench, found: Measured, capacity: float) -> None:
    report.table(
        f"{bench.name}, paced ({capacity:,.0f} frames/s is what the pipeline without batches does)",
        ["load", "max_batch", "max_wait ms", "frames/s", "mean batch", "p50 ms", "p99 ms"],
        [
            [
                load,
                most,
                1e3 * wait,
                middle(each, lambda o: o.frames_per_second),
                middle(each, lambda o: o.batch),
                middle(each, lambda o: o.quantile(0.5)),
                middle(each, lambda o: o.quantile(0.99)),
            ]
            for (load, most, wait), each in found.items()
        ],
    )


def fairness(report: Report, bench: Bench, capacity: float, rounds: int, *, quick: bool) -> None:
    """Three runs of equal greed; two steady ones, alone and beside a greedy one."""
    rows: list[list[str | float]] = []
    least = 1.0
    for most in (1, 8):
        found = [run_on(LOOPS[0], shares(bench.pipeline(most), bench.frames, 0.2 if quick else 1.0))]
        found += [run_on(LOOPS[0], shares(bench.pipeline(most), bench.frames, 1.0)) for _ in range(rounds - 1)]
        each = [median(one[at] for one in found) for at in range(3)]
        rows.append([most, *each])
        least = min(least, *each)
    report.table("Three runs that take what they can get: shares", ["max_batch", "first", "second", "third"], rows)
    report.target("smallest share of three greedy runs, × a third", 3 * least, FAIR)
    rate = 0.15 * capacity
    number = 40 if quick else int(rate)
    rows = []
    for most in (1, 8):
        for crowd in (False, True):
            took = [
                run_on(
                    LOOPS[0],
                    beside(bench.pipeline(most), bench.frames, number, bench.expected, rate=rate, crowd=crowd),
                )
                for _ in range(rounds)
            ]
            steady = [outcome for pair, _ in took for outcome in pair]
            rows.append(
                [
                    most,
                    "a third run takes what it can get" if crowd else "alone",
                    middle(steady, lambda o: o.frames_per_second) / rate,
                    middle(steady, lambda o: o.quantile(0.5)),
                    middle(steady, lambda o: o.quantile(0.99)),
                    median(rest for _, rest in took),
                ]
            )
    report.table(
        f"Two steady runs of {rate:,.0f} frames/s each",
        ["max_batch", "beside", "× their pace", "p50 ms", "p99 ms", "frames/s of the third"],
        rows,
    )
    report.target("steady runs beside a greedy one, × their pace (lowest)", min(float(row[2]) for row in rows), FAIR)


def picture(path: Path, found: dict[str, tuple[Measured, Measured]]) -> None:
    """Throughput against latency."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(len(found), 2, figsize=(12, 4.5 * len(found)), layout="constrained", squeeze=False)
    for (left, right), (name, (full, pace)) in zip(rows, found.items(), strict=True):
        ours = [(most, full["pipeline", most]) for most in BATCHES]
        points = [
            (middle(each, lambda o: o.quantile(0.5)), middle(each, lambda o: o.frames_per_second)) for _, each in ours
        ]
        left.plot(*zip(*points, strict=True), marker="o")
        for (most, _), point in zip(ours, points, strict=True):
            left.annotate(f"  {most}", point)
        left.set(title=f"{name}, saturated, by max_batch", xlabel="p50 latency, ms", ylabel="frames/s")
        for load in LOADS:
            for most in PACED_BATCHES[1:]:
                line = [(1e3 * wait, middle(pace[load, most, wait], lambda o: o.quantile(0.99))) for wait in WAITS]
                right.plot(*zip(*line, strict=True), marker="o", label=f"load {load}, max_batch {most}")
            alone = middle(pace[load, 1, 0.0], lambda o: o.quantile(0.99))
            right.axhline(alone, linestyle=":", color="0.5")
            right.annotate(f"load {load}, no batches", (WAITS[-1] * 600, alone), fontsize=8)
        right.set(title=f"{name}, paced", xlabel="max_wait, ms", ylabel="p99 latency, ms", yscale="log")
        right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    arguments = parser(question or "").parse_args()
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    report = Report(
        __file__,
        question=question or "",
        setup="Two CPU stages with one intra-op thread each, cut evenly; uvloop where there is one; contenders in "
        f"turns, {rounds} rounds, medians. Latency: saturated, from the door to the result; paced, from when it was "
        "due to the consumer's hands (a millisecond of the loop's timers included).",
        arguments=arguments,
    )
    torch.set_num_threads(1)
    found: dict[str, tuple[Measured, Measured]] = {}
    for name in NETS:
        bench = Bench(name, quick=arguments.quick)
        full = bench.saturation(rounds)
        saturation_table(report, bench, full)
        capacity = middle(full["pipeline", 1], lambda o: o.frames_per_second)
        pace = bench.paced(capacity, max(1, rounds - 1), quick=arguments.quick)
        paced_table(report, bench, pace, capacity)
        found[name] = full, pace
        best = max(ratio(full["pipeline", most], full["pipeline", 1]) for most in BATCHES)
        report.target(f"{name}: best max_batch, × the pipeline without", best, GAIN if "MLP" in name else 1.0)
        if "MLP" in name:
            fairness(report, bench, capacity, rounds, quick=arguments.quick)
    path = report.figure_path()
    if path is not None:
        picture(path, found)
    report.finish()


if __name__ == "__main__":
    main()

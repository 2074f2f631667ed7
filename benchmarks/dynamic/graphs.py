"""Does a gated graph network learn basic deduction (bAbI task 15) with many stories in flight, and how fast?

Every story is told once; after each lap the network is tested on stories that nobody told before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from aiotime.frame import Sample
from benchmarks._harness import Report, take_turns
from benchmarks.dynamic.graph_net import WIDTH, GraphNet, PlainGraphNet, loss, modules
from benchmarks.dynamic.graph_stories import samples
from benchmarks.dynamic.ways import InFlight, Plain, Way

EVERY = 8  # stories for an update
RATE = 2e-2  # of Adam; of 5e-3, 1e-2, 2e-2, 4e-2 the best for plain PyTorch and for 16 in flight, on other seeds
OFTEN = 1e-2  # the best where there are more updates
Adam = partial(torch.optim.Adam, fused=True)
PLAIN, ONE, FEW, USUAL = "plain PyTorch", "1 in flight", "8 in flight", "16 in flight"
FRESH = 1_000_000  # seeds from here on are for tests


@dataclass(frozen=True)
class Sizes:
    """What a full run does."""

    laps: int = 15
    lap: int = 80  # stories
    check: int = 200  # fresh stories after each lap
    test: int = 1_000  # and at the end
    larger: int = 300  # of twice the species
    rounds: int = 5  # each with first weights and stories of its own


QUICK = Sizes(laps=2, lap=8, check=4, test=8, larger=4, rounds=1)


@dataclass
class Learned:
    """What one way made of one round's stories."""

    seconds: list[float] = field(default_factory=list)  # of each lap
    right: list[float] = field(default_factory=list)  # share, after each lap
    test: float = 0.0  # share of many fresh stories, at the end
    larger: float = 0.0  # and of stories with twice the species

    def until(self, lap: int) -> tuple[int, float] | None:
        """(stories, seconds of learning) until the first check without a mistake."""
        for number, right in enumerate(self.right, start=1):
            if right == 1:
                return number * lap, sum(self.seconds[:number])
        return None


def setup(arguments: argparse.Namespace) -> str:
    """What the figures depend on."""
    sizes = QUICK if arguments.quick else Sizes()
    return (
        f"Stories of 4 species and 1 to 8 actors, made afresh, nodes numbered at random; states of {WIDTH}, 2 to 6 "
        f"steps as the story needs; Adam ({RATE:g}; {OFTEN:g} for an update per story or gradients), an update every "
        f"{EVERY} stories. {sizes.laps * sizes.lap:,} stories a "
        f"round, {arguments.rounds or sizes.rounds} rounds with other first weights and stories, contenders in turns. "
        "One intra-op thread; stages inline on the loop's thread unless a row says otherwise."
    )


def ways(seed: int) -> dict[str, Callable[[], Way]]:
    """All of them begin with the same weights."""

    def plain(every: int, rate: float) -> Way:
        return Plain(PlainGraphNet(modules(seed)), loss=loss, optimizer=partial(Adam, lr=rate), every=every)

    def flying(keys: int, *, device: Any = "inline", rate: float = RATE, per: str = "instance") -> Way:
        return InFlight(
            GraphNet(modules(seed), device=device),
            keys=keys,
            loss=loss,
            optimizer=partial(Adam, lr=rate),
            min_update_frequency=EVERY,
            update_per=per,
        )

    return {
        PLAIN: partial(plain, EVERY, RATE),
        "plain PyTorch, an update per story": partial(plain, 1, OFTEN),
        ONE: partial(flying, 1),
        FEW: partial(flying, 8),
        USUAL: partial(flying, 16),
        "64 in flight": partial(flying, 64),
        "16 in flight, stages on cpu:0": partial(flying, 16, device="cpu:0"),
        f"16 in flight, an update per {EVERY} gradients": partial(flying, 16, rate=OFTEN, per="gradient"),
    }


def learned(make: Callable[[], Way], seed: int, sizes: Sizes) -> Learned:
    """Lap by lap through the stories of ``seed``, tested on others."""
    way, found = make(), Learned()
    try:
        stories, fresh = samples(seed), samples(FRESH + seed)
        for _ in range(sizes.laps):
            found.seconds.append(way.learn(list(islice(stories, sizes.lap))))
            found.right.append(_right(way, fresh, sizes.check))
        found.test = _right(way, fresh, sizes.test)
        found.larger = _right(way, samples(2 * FRESH + seed, species=8, actors=(9, 16)), sizes.larger)
    finally:
        way.close()
    return found


def _right(way: Way, stories: Iterator[Sample], number: int) -> float:
    """The share of the next ``number`` stories that it answers rightly."""
    asked = list(islice(stories, number))
    scores = way.outputs([story.input for story in asked])
    return mean(float(score.argmax() == story.target) for score, story in zip(scores, asked, strict=True))


def main(arguments: argparse.Namespace, report: Report) -> None:
    """A round per seed; the ways take turns."""
    sizes = QUICK if arguments.quick else Sizes()
    rounds: int = arguments.rounds or sizes.rounds
    outcomes: dict[str, list[Learned]] = {name: [] for name in ways(0)}
    for make in ways(0).values():  # what is imported and made at first use must not count
        learned(make, 0, QUICK)

    def contender(name: str) -> float:
        seed = len(outcomes[name]) + 1
        found = learned(ways(seed)[name], seed, sizes)
        outcomes[name].append(found)
        return sizes.laps * sizes.lap / sum(found.seconds)

    rates = take_turns({name: partial(contender, name) for name in outcomes}, rounds=rounds)
    report.table(
        f"{sizes.laps * sizes.lap:,} stories, each told once: medians of {rounds} rounds",
        ["way", "stories/s", "× plain", "× 1 in flight", "seconds", "stories until right", "seconds until right"],
        [
            [
                name,
                rates.median(name),
                rates.ratio(name, PLAIN),
                rates.ratio(name, ONE),
                median(sum(one.seconds) for one in found),
                *_until(found, sizes.lap),
            ]
            for name, found in outcomes.items()
        ],
    )
    report.say("", f"Until right: the first of the checks after every {sizes.lap} stories with {sizes.check} of "
               f"{sizes.check} fresh ones right.")  # fmt: skip
    report.table(
        f"Right, of {sizes.test:,} fresh stories at the end (%)",
        ["way", "median", "worst round", "8 species, 9–16 actors", "worst"],
        [
            [
                name,
                100 * median(one.test for one in found),
                100 * min(one.test for one in found),
                100 * median(one.larger for one in found),
                100 * min(one.larger for one in found),
            ]
            for name, found in outcomes.items()
        ],
    )
    for name in (FEW, USUAL):
        worst = min(one.test for one in outcomes[name])
        report.target(f"{name}: fresh stories right, worst round", 100 * worst, 100, unit=" %")
        more = _more_stories(outcomes[name], outcomes[PLAIN], sizes.lap)
        report.target(f"{name}: stories until right, times plain", more, 1.3, unit=" ×", at_most=True)
        report.target(f"{name}: stories/s, times plain", rates.ratio(name, PLAIN), 1.0, unit=" ×")
    path = report.figure_path()
    if path is not None:
        picture(path, outcomes, lap=sizes.lap)


def _until(found: list[Learned], lap: int) -> tuple[str | float, str | float]:
    """Medians over the rounds; "never" where more than half of them never were."""
    reached = [one.until(lap) or (float("inf"), float("inf")) for one in found]
    stories, seconds = median(one[0] for one in reached), median(one[1] for one in reached)
    return ("never", "never") if stories == float("inf") else (round(stories), seconds)


def _more_stories(ours: Sequence[Learned], plain: Sequence[Learned], lap: int) -> float:
    """Stories until right, times those of ``plain``: the median over the rounds; never right counts as without end."""
    ratios = []
    for one, other in zip(ours, plain, strict=True):
        mine, theirs = one.until(lap), other.until(lap)
        ratios.append(float("inf") if mine is None else 0.0 if theirs is None else mine[0] / theirs[0])
    return median(ratios)


def picture(path: Path, outcomes: Mapping[str, list[Learned]], *, lap: int) -> None:
    """Fresh stories right, over stories told and over seconds of learning; means over the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    by_stories, by_seconds = figure.subplots(1, 2, sharey=True)
    for name, found in outcomes.items():
        right = [mean(values) for values in zip(*(one.right for one in found), strict=True)]
        laps = [mean(values) for values in zip(*(one.seconds for one in found), strict=True)]
        by_stories.plot([lap * number for number in range(1, len(right) + 1)], right, marker=".", label=name)
        by_seconds.plot([sum(laps[: number + 1]) for number in range(len(laps))], right, marker=".", label=name)
    by_stories.set(xlabel="stories told", ylabel="fresh stories right", ylim=(0, 1.02))
    by_seconds.set(xlabel="seconds of learning")
    by_seconds.legend(loc="lower right", fontsize=8)
    figure.suptitle("Basic deduction by a gated graph network")
    figure.savefig(path, dpi=120)

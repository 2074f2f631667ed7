"""Early exit on digits: how much latency does leaving early save, at which accuracy, alone and with others in flight?

First the network with four exits learns, from all of them at once; then images leave where a block is sure enough.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch

from aiotime.frame import Sample
from benchmarks._harness import Report, Rounds, percentile, take_turns
from benchmarks.dynamic.exit_flow import Flow, one_by_one, through
from benchmarks.dynamic.exit_net import POOLS, Block, ExitNet, PlainExits, PlainWhole, WholeNet, blocks, loss
from benchmarks.dynamic.ways import InFlight, Plain, Way

BLOCKS = len(POOLS)
CLIENTS = 16
EVERY = 8  # digits for an update
Adam = partial(torch.optim.Adam, lr=2e-3, fused=True)
Finer = partial(torch.optim.Adam, lr=4e-4, fused=True)  # in the last epoch
TRAINING = 1_347  # of 1,797 digits; the others are for tests
CHOSEN = 0.95  # the threshold of the targets
PLAIN, ONE, USUAL = "plain PyTorch", "1 in flight", "16 in flight"
ALONE, ORDERED, READY = "1 client", f"{CLIENTS} clients, in order", f"{CLIENTS} clients, as ready"


@dataclass(frozen=True)
class Sizes:
    """What a full run does."""

    training: int = TRAINING
    test: int = 450
    epochs: int = 3
    learning_rounds: int = 2
    rounds: int = 3
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, CHOSEN, 0.99)


QUICK = Sizes(training=24, test=12, epochs=1, learning_rounds=1, rounds=1, thresholds=(0.3, CHOSEN))


def setup(arguments: argparse.Namespace) -> str:
    """What the figures depend on."""
    sizes = QUICK if arguments.quick else Sizes()
    learning_rounds, rounds = arguments.rounds or sizes.learning_rounds, arguments.rounds or sizes.rounds
    return (
        f"scikit-learn's digits, {sizes.training:,} to learn from and {sizes.test} for tests; {BLOCKS} blocks of four "
        "3×3 convolutions with 32 channels at 8×8, an exit after each. Learning: cross-entropy at all exits, Adam "
        f"2e-3 (4e-4 in the last epoch), an update every {EVERY} digits, {sizes.epochs} epochs, {learning_rounds} "
        f"rounds with other first weights. Leaving early: {rounds} rounds in turns; a client sends its next image once "
        "it has its answer. One intra-op thread; stages inline on the loop's thread unless a row says otherwise."
    )


def digits(sizes: Sizes) -> tuple[list[Sample], list[Sample]]:
    """(to learn from, for tests), images [1, 8, 8] from 0 to 1, mixed once and for all."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    every = [
        Sample(torch.tensor(image / 16, dtype=torch.float32).view(1, 8, 8), torch.tensor(label))
        for image, label in zip(images, labels, strict=True)
    ]
    random.Random(0).shuffle(every)
    return every[: sizes.training], every[TRAINING : TRAINING + sizes.test]


def main(arguments: argparse.Namespace, report: Report) -> None:
    """Learn, then leave early."""
    sizes = QUICK if arguments.quick else Sizes()
    training, test = digits(sizes)
    parts = learning(report, sizes, training, test, rounds=arguments.rounds or sizes.learning_rounds)
    leaving(report, sizes, test, parts, rounds=arguments.rounds or sizes.rounds)


# ---------------------------------------------------------------------- learning


@dataclass
class Learned:
    """What one way made of one round."""

    seconds: float = 0.0
    right: list[float] = field(default_factory=list)  # share of the test digits, per exit
    parts: list[Block] = field(default_factory=list)


def ways(parts: Sequence[Block]) -> dict[str, Callable[[], Way]]:
    """All of them would begin with ``parts``."""

    def flying(keys: int, devices: Sequence[str], max_batch: int = EVERY) -> Way:
        network = ExitNet(parts, devices=devices, max_batch=max_batch)
        return InFlight(
            network, keys=keys, loss=loss, optimizer=Adam, min_update_frequency=EVERY, update_per="instance"
        )

    inline, two = ["inline"] * BLOCKS, [f"cpu:{at % 2}" for at in range(BLOCKS)]
    return {
        PLAIN: lambda: Plain(PlainExits(parts), loss=loss, optimizer=Adam, every=EVERY),
        ONE: partial(flying, 1, inline),
        USUAL: partial(flying, 16, inline),
        "16 in flight, batches of 16": partial(flying, 16, inline, 16),
        "16 in flight, stages on two workers": partial(flying, 16, two),
    }


def learned(name: str, seed: int, sizes: Sizes, training: Sequence[Sample], test: Sequence[Sample]) -> Learned:
    """Some epochs, each in an order of its own, from the first weights of ``seed``."""
    found = Learned(parts=blocks(seed))
    way = ways(found.parts)[name]()
    try:
        for epoch in range(sizes.epochs):
            if epoch and epoch == sizes.epochs - 1:
                way.use(Finer)
            order = random.Random(seed * 1_000 + epoch).sample(training, len(training))
            found.seconds += way.learn(order)
        said = way.outputs([sample.input for sample in test])
    finally:
        way.close()
    for at in range(BLOCKS):
        found.right.append(
            mean(float(one[at].argmax() == sample.target) for one, sample in zip(said, test, strict=True))
        )
    return found


def learning(
    report: Report, sizes: Sizes, training: Sequence[Sample], test: Sequence[Sample], *, rounds: int
) -> list[Block]:
    """Ways to learn in turns; returns the blocks of the last round's `USUAL`."""
    names = list(ways(blocks(0)))
    outcomes: dict[str, list[Learned]] = {name: [] for name in names}
    for name in names:
        learned(name, 0, QUICK, training[:8], test[:1])  # what is made at first use must not count

    def contender(name: str) -> float:
        found = learned(name, len(outcomes[name]) + 1, sizes, training, test)
        outcomes[name].append(found)
        return sizes.epochs * len(training) / found.seconds

    rates = take_turns({name: partial(contender, name) for name in names}, rounds=rounds)
    report.table(
        f"Learning: {sizes.epochs} epochs, medians of {rounds} rounds; right of {len(test)} test digits (%)",
        ["way", "digits/s", "× plain", "× 1 in flight", "seconds", *(f"exit {at}" for at in range(BLOCKS))],
        [
            [
                name,
                rates.median(name),
                rates.ratio(name, PLAIN),
                rates.ratio(name, ONE),
                median(one.seconds for one in found),
                *(100 * median(one.right[at] for one in found) for at in range(BLOCKS)),
            ]
            for name, found in outcomes.items()
        ],
    )
    behind = median(
        100 * (other.right[-1] - one.right[-1]) for one, other in zip(outcomes[USUAL], outcomes[PLAIN], strict=True)
    )
    report.target(f"learning, {USUAL}: digits/s, times plain", rates.ratio(USUAL, PLAIN), 1.0, unit=" ×")
    report.target(
        f"learning, {USUAL}: points behind plain after as many epochs", behind, 1.0, unit=" points", at_most=True
    )
    return outcomes[USUAL][-1].parts


# ---------------------------------------------------------------------- leaving early


def flows(
    parts: Sequence[Block], images: Sequence[torch.Tensor], thresholds: Sequence[float]
) -> dict[tuple[str, float | None], Callable[[], Flow]]:
    """(who asks, threshold; None: the whole network without exits): one pass of all images."""
    inline = ["inline"] * BLOCKS
    made: dict[tuple[str, float | None], Callable[[], Flow]] = {}
    for threshold in (None, *thresholds):
        plain = PlainWhole(parts) if threshold is None else PlainExits(parts, threshold=threshold)
        made[PLAIN, threshold] = partial(one_by_one, plain.eval(), images, blocks=BLOCKS)
        for name, clients, ordered in ((ALONE, 1, True), (ORDERED, CLIENTS, True), (READY, CLIENTS, False)):
            network = (
                WholeNet(parts, devices=inline, max_batch=CLIENTS)
                if threshold is None
                else ExitNet(parts, threshold=threshold, devices=inline, max_batch=CLIENTS)
            )
            made[name, threshold] = partial(through, network, images, clients=clients, ordered=ordered)
    return made


def leaving(report: Report, sizes: Sizes, test: Sequence[Sample], parts: Sequence[Block], *, rounds: int) -> None:
    """Every threshold and every kind of client in turns."""
    made = flows(parts, [sample.input for sample in test], sizes.thresholds)
    seen: dict[tuple[str, float | None], list[Flow]] = {key: [] for key in made}

    def contender(key: tuple[str, float | None]) -> float:
        seen[key].append(made[key]())
        return mean(seen[key][-1].latencies)

    take_turns({_label(*key): partial(contender, key) for key in made}, rounds=rounds)
    labels = [int(sample.target) for sample in test]
    right = {key: _share(found[-1].answers, labels) for key, found in seen.items()}
    means = Rounds({_label(*key): [1e3 * mean(one.latencies) for one in found] for key, found in seen.items()})
    halves = Rounds(
        {_label(*key): [1e3 * percentile(one.latencies, 0.5) for one in found] for key, found in seen.items()}
    )
    rates = Rounds({_label(*key): [len(labels) / one.seconds for one in found] for key, found in seen.items()})
    whole = right[ALONE, None]
    report.table(
        "Leaving early: accuracy and work",
        ["leaves above", "right (%)", "points lost", "calls per image", "calls saved"],
        [
            [
                _words(threshold),
                100 * right[ALONE, threshold],
                100 * (whole - right[ALONE, threshold]),
                seen[ALONE, threshold][-1].calls / len(labels),
                BLOCKS - seen[ALONE, threshold][-1].calls / len(labels),
            ]
            for threshold in (None, *sizes.thresholds)
        ],
    )
    for name in (PLAIN, ALONE, ORDERED, READY):
        report.table(
            f"Latency: {name}, medians of {rounds} rounds",
            ["leaves above", "p50 (ms)", "mean (ms)", "p50 × whole", "mean × whole", "images/s", "images/s × plain"],
            [
                [
                    _words(threshold),
                    halves.median(_label(name, threshold)),
                    means.median(_label(name, threshold)),
                    halves.ratio(_label(name, threshold), _label(name, None)),
                    means.ratio(_label(name, threshold), _label(name, None)),
                    rates.median(_label(name, threshold)),
                    rates.ratio(_label(name, threshold), _label(PLAIN, threshold)),
                ]
                for threshold in (None, *sizes.thresholds)
            ],
        )
    lost = 100 * (whole - right[ALONE, CHOSEN])
    report.target(f"leaving above {CHOSEN}: points lost", lost, 1.0, unit=" points", at_most=True)
    for name in (ALONE, READY):
        ratio = means.ratio(_label(name, CHOSEN), _label(name, None))
        report.target(f"leaving above {CHOSEN}, {name}: mean latency, times the whole network's", ratio, 1.0,
                      unit=" ×", at_most=True)  # fmt: skip
    ratio = halves.ratio(_label(READY, CHOSEN), _label(ORDERED, CHOSEN))
    report.target(f"leaving above {CHOSEN}: p50 as ready, times in order", ratio, 1.0, unit=" ×", at_most=True)
    path = report.figure_path()
    if path is not None:
        picture(path, halves, means, right, sizes.thresholds)


def _label(name: str, threshold: float | None) -> str:
    return f"{name}, {_words(threshold)}"


def _words(threshold: float | None) -> str:
    return "whole network" if threshold is None else f"{threshold:g}"


def _share(answers: Sequence[int], labels: Sequence[int]) -> float:
    return mean(float(answer == label) for answer, label in zip(answers, labels, strict=True))


def picture(
    path: Path,
    halves: Rounds,
    means: Rounds,
    right: Mapping[tuple[str, float | None], float],
    thresholds: Sequence[float],
) -> None:
    """Accuracy over latency, a point per threshold; the square is the whole network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, what, latency in zip(figure.subplots(1, 2, sharey=True), ("p50", "mean"), (halves, means), strict=True):
        for at, name in enumerate((PLAIN, ALONE, ORDERED, READY)):
            points = [(latency.median(_label(name, each)), 100 * right[name, each]) for each in thresholds]
            axes.plot(*zip(*points, strict=True), marker=".", color=f"C{at}", label=name)
            axes.plot(latency.median(_label(name, None)), 100 * right[name, None], marker="s", color=f"C{at}", ls="")
            if name == PLAIN:
                for threshold, point in zip(thresholds, points, strict=True):
                    axes.annotate(f"{threshold:g}", point, xytext=(-3, 4), textcoords="offset points", fontsize=7,
                                  ha="right")  # fmt: skip
        axes.set_xscale("log")
        axes.set(xlabel=f"latency, {what} (ms); squares: the whole network")
        axes.grid(visible=True, which="both", lw=0.3)
    figure.axes[0].set_ylabel("test digits right (%)")
    figure.axes[1].legend(loc="lower right", fontsize=8)
    figure.suptitle("Digits: leaving as soon as a block is sure enough")
    figure.savefig(path, dpi=120)

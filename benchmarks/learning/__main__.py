"""python -m benchmarks.learning [headline] [accuracy] [correlation] [speed] [memory] [--cache FILE]"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks._harness import Report, machine, parser
from benchmarks.learning import __doc__ as question
from benchmarks.learning import accuracy, correlation, headline, memory, speed
from benchmarks.learning.rules import BY_NAME, DEFAULT, EXACT, RECOMMENDED, SIDEWAYS
from benchmarks.learning.streams import STREAMS
from benchmarks.learning.study import Study
from benchmarks.learning.tuning import Round

NETWORKS = {
    "plain": "A layer of 64 per stage but no fewer than four (video: 3×3 convolutions of 16 channels), first weights "
    "as torch has them",
    "deep": "8 layers of 64 for every number of stages (video: 3×3 convolutions of 16 channels), He's first weights",
}
RIVER = ("phishing", "bananas", "image-segments", "trump-approval")


def main() -> None:
    options = parser(question or "")
    options.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; by default all of them")
    options.add_argument("--cache", type=Path, help="finished runs are kept in this file, and not run again")
    options.add_argument("--processes", type=int, help="of accuracy and correlation; by default one per core")
    options.add_argument("--scale", type=float, default=1.0, help="of the streams' lengths (accuracy)")
    options.add_argument("--streams", nargs="+", choices=list(STREAMS), help="of accuracy; by default all")
    options.add_argument(
        "--network",
        choices=("plain", "deep"),
        default="plain",
        help="deep: eight layers for every number of stages, He's first weights (accuracy and correlation)",
    )
    arguments = options.parse_args()
    for part in arguments.parts:
        if part not in PARTS:
            options.error(f"there is no part {part!r}; there are: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for part in arguments.parts or PARTS:
        PARTS[part](_own(arguments, part))


def _own(arguments: argparse.Namespace, part: str) -> argparse.Namespace:
    """Results of a part go to a file of its own."""
    own = copy.copy(arguments)
    if own.save is not None:
        label = own.save or f"{machine()['cores']}-cores"
        own.save = f"{label}-{part}{'-deep' if own.network == 'deep' else ''}"
    return own


def _study(arguments: argparse.Namespace) -> Study:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Study(processes=arguments.processes or (1 if arguments.quick else cores), cache=arguments.cache)


def run_accuracy(arguments: argparse.Namespace) -> None:
    """Every rule, stage count and stream."""
    sizes = accuracy.Sizes(scale=arguments.scale)
    if arguments.quick:
        names = (EXACT, SIDEWAYS, DEFAULT, RECOMMENDED)
        sizes = accuracy.Sizes(
            scale=0.01,
            seeds=(0, 1),
            rounds=(Round(2, 40),),
            near=(Round(2, 40),),
            streams=("digits", "digits-smooth"),
            rows=tuple(BY_NAME[name] for name in names),
            stages=(2, 4),
        )
    elif arguments.streams:
        sizes = accuracy.Sizes(scale=arguments.scale, streams=tuple(arguments.streams))
    missing = [name for name in sizes.streams if name in RIVER and importlib.util.find_spec("river") is None]
    sizes = replace(
        sizes, network=arguments.network, streams=tuple(name for name in sizes.streams if name not in missing)
    )
    report = Report(
        __file__,
        question=f"{question} Accuracy.",
        setup=f"{NETWORKS[arguments.network]}, batch 1; predict, then learn, frame by frame, in the pipeline itself. "
        "Every rule is tuned alike, on other seeds and frames.",
        arguments=arguments,
    )
    if missing:
        report.say("", f"Left out, since river is not installed: {', '.join(missing)}.")
    accuracy.report_all(report, _study(arguments), sizes)
    report.finish()


def run_correlation(arguments: argparse.Namespace) -> None:
    """Scenes of 1 to 32 frames."""
    sizes = correlation.Sizes()
    if arguments.quick:
        sizes = correlation.Sizes(lengths=(1, 8), frames=50, settings=1, seeds=(0, 1))
    sizes = replace(sizes, network=arguments.network)
    report = Report(
        __file__,
        question=f"{question} Accuracy against the stream's correlation length.",
        setup=f"{correlation.STREAM}: scenes of n frames that blend one digit into another of its class, then a cut. "
        f"{NETWORKS[arguments.network]}. "
        f"{correlation.STAGES} stages, {len(correlation.SETTINGS)} settings tried for every rule and length on other "
        "seeds.",
        arguments=arguments,
    )
    correlation.report_all(report, _study(arguments), sizes)
    report.finish()


def run_speed(arguments: argparse.Namespace) -> None:
    """Real time and virtual time."""
    quick = arguments.quick
    rounds = arguments.rounds or (1 if quick else 7)
    report = Report(
        __file__,
        question=f"{question} Speed.",
        setup=f"{rounds} rounds in turns, medians. aiotime: 2 CPU streams with 1 intra-op thread each, stashed "
        "weights, measured while the stream goes on.",
        arguments=arguments,
    )
    if quick:
        speed.real(report, layers=6, side=8, number=3, rounds=rounds)
        speed.simulated(report, devices=(8,), frames=16)
    else:
        speed.real(report, layers=30, side=64, number=16, rounds=rounds)
        speed.simulated(report, devices=(2, 4, 8), frames=1_000)
    report.finish()


def run_memory(arguments: argparse.Namespace) -> None:
    """Graphs, versions, bytes."""
    width, rows, frames = (8, 4, 24) if arguments.quick else (256, 64, 64)
    report = Report(
        __file__,
        question=f"{question} Memory.",
        setup=f"{memory.STAGES} stages of two layers ({width} wide, ReLU), frames of {rows} rows, float32, SGD. Saved "
        "in graphs: storages that autograd holds for backwards to come, each counted once, without the newest weights.",
        arguments=arguments,
    )
    memory.report_all(report, width=width, rows=rows, frames=frames)
    report.finish()


def run_headline(arguments: argparse.Namespace) -> None:
    """The answer in minutes."""
    sizes = headline.Sizes(deep=arguments.network == "deep")
    if arguments.quick:
        sizes = headline.Sizes(frames=40, tuning=20, seeds=(0, 1), others=(20,), rules=((4, headline.FEW),))
    report = Report(
        __file__,
        question=f"{question} The headline.",
        setup=f"{NETWORKS[arguments.network]}, batch 1; {sizes.frames} frames, {len(sizes.seeds)} seeds. Predict, then "
        "learn, frame by frame, in the pipeline itself. Unrelated digits: Adam 1e-3. Smooth stream: RMSprop, the "
        f"better of {', '.join(f'{rate:g}' for rate in headline.RATES)} on other seeds.",
        arguments=arguments,
    )
    headline.report_all(report, _study(arguments), sizes)
    report.finish()


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "headline": run_headline,
    "accuracy": run_accuracy,
    "correlation": run_correlation,
    "speed": run_speed,
    "memory": run_memory,
}


if __name__ == "__main__":
    main()

"""``aiotime demo``: the whole of it on handwritten digits: learning online, or predicting with a fitted model."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from aiotime.errors import ConfigurationError


@click.command(short_help="See it learn, or predict, handwritten digits.")
@click.argument("task", type=click.Choice(["learn", "predict"]), default="learn")
@click.option("--frames", type=click.IntRange(min=2), help="Digits to stream; by default all there are for the task.")
@click.option("-d", "--devices", help="Where stages run.  [default: four stages on cpu:0 and cpu:1; predict: two]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order, the split and the weights.")
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="aiotime-demo",
    show_default=True,
    help="Folder for pictures and traces.",
)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True,
              help="predict: frames/s of the paced part.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="predict: of the comparison.")
def demo(*, task: str, frames: int | None, devices: str | None, seed: int, out: Path, rate: float, rounds: int) -> None:
    """See it work on scikit-learn's handwritten digits.

    learn (the default): a CNN that knows nothing sees each digit once. A pipeline of four stages predicts it, then
    learns from it, while the stages work on different digits: by aiotime's rules, and beside them by sequential
    back-propagation (Exact) and PARTIME's rule (Sideways), on unrelated digits and on a smooth stream. Shows the
    accuracy as it grows; draws the curves and a timeline. A few minutes.

    predict: fits a CNN on part of the digits, then streams those it has not seen through two stages, at a stated
    rate and as fast as it goes, beside the same model run sequentially.
    """
    console = Console(highlight=False)
    try:
        if task == "learn":
            from aiotime.cli.learning import show_learning

            show_learning(console, frames=frames, devices=devices or "cpu:0,cpu:0,cpu:1,cpu:1", seed=seed, out=out)
        else:
            from aiotime.cli.predicting import show_predicting

            show_predicting(
                console, rate=rate, frames=frames, devices=devices or "cpu:0,cpu:1", rounds=rounds, seed=seed, out=out
            )
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error

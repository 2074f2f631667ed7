"""``aiotime run``: a source through a pipeline into JSON lines, and a summary."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from rich.console import Console
from rich.live import Live

from aiotime.cli.factory import Made, make, parse_balance, parse_devices, parse_file
from aiotime.cli.job import Job, Options, Outcome
from aiotime.cli.writing import STYLES, Writer
from aiotime.errors import ConfigurationError
from aiotime.observe.tables import count, duration, rich_table, share

if TYPE_CHECKING:
    from rich.table import Table

    from aiotime.observe.stats import Stats
    from aiotime.pipeline import Pipeline

BROKEN_PIPE = 141  # 128 + SIGPIPE: whoever read the predictions left


@click.command(short_help="Run a model over a source; write predictions.")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option(
    "-s",
    "--source",
    required=True,
    help="A video, a folder of pictures, /dev/video0, a URL, a recording (.npy, .jsonl, .raw), or - for stdin.",
)
@click.option(
    "--format",
    type=click.Choice(["auto", "raw", "npy", "jsonl"]),
    default="auto",
    show_default=True,
    help="What comes through stdin or lies in a recording.",
)
@click.option("-o", "--out", help="Where predictions go, as JSON lines; - for stdout. Left out, they are not kept.")
@click.option(
    "--output",
    "style",
    type=click.Choice(STYLES),
    default="auto",
    show_default=True,
    help="How outputs are written; auto sums up those of more than 1000 numbers.",
)
@click.option(
    "--top", type=click.IntRange(min=1), help="Write the best K classes with their scores instead of outputs."
)
@click.option("-e", "--example", multiple=True, metavar="SHAPE", help="A frame: 1,3,256,256, 1,16:int64 or name=1,16.")
@click.option(
    "-d", "--devices", metavar="LIST", help="Where stages run: cpu:0,cpu:1. By default all GPUs, else all cores."
)
@click.option(
    "--compile",
    "way",
    type=click.Choice(["auto", "aot", "inductor", "cudagraph"]),
    help="Compile the stages; auto takes what is fastest. The first time takes minutes.",
)
@click.option("--balance", default="measured", show_default=True, help="measured, even, or layers per stage: 3,5.")
@click.option(
    "--plan", "plan_file", type=click.Path(exists=True, dir_okay=False), help="A plan saved by `aiotime plan`."
)
@click.option(
    "--depth", type=click.IntRange(min=1), help="Launches in flight per stage; by default by the stages' times."
)
@click.option(
    "--overflow",
    type=click.Choice(["wait", "drop_oldest", "drop_newest", "latest"]),
    help="When the source is faster: by default wait, latest for a camera.",
)
@click.option(
    "--on-error",
    type=click.Choice(["raise", "skip", "record"]),
    default="raise",
    show_default=True,
    help="A failed frame ends the run, is left out, or is written with its error.",
)
@click.option(
    "--deadline", type=float, metavar="SECONDS", help="Shed a frame that was not computed so long after it came."
)
@click.option("--rate", type=float, metavar="FPS", help="Pull the source at no more than this rate.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Stop after N frames of the source.")
@click.option(
    "--trace",
    "trace_file",
    type=click.Path(dir_okay=False, writable=True),
    callback=parse_file,
    help="Write a trace for ui.perfetto.dev.",
)
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, writable=True),
    callback=parse_file,
    help="Draw what ran when (needs the extra [plot]).",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@click.pass_context
def run(
    context: click.Context,
    /,
    *,
    factory: str,
    source: str,
    format: str,
    out: str | None,
    style: str,
    top: int | None,
    example: tuple[str, ...],
    devices: str | None,
    balance: str,
    plan_file: str | None,
    way: str | None,
    depth: int | None,
    **stream: Any,
) -> None:
    """Run a model over a source and write its predictions.

    MODULE:FACTORY names a function that returns the model, a pipeline, or either with an example frame. It is
    looked up in the current folder first. Pictures are resized and converted to the example's shape and dtype.

    Ctrl-C stops pulling from the source, finishes what is in flight and writes it; a second Ctrl-C aborts. Exit
    codes: 0 at the end of the source, 1 when source or model failed (predictions so far are kept), 2 for a wrong
    call, 130 after Ctrl-C.

    \b
      aiotime run net:make --source clip.mp4 --example 1,3,256,256 --out predictions.jsonl
      aiotime run net:make --source photos/ --top 5 --out -
      cat frames.jsonl | aiotime run net:make --source - --on-error record --out predictions.jsonl
    """  # noqa: D301 - \b keeps click from joining these lines
    import aiotime
    from aiotime import sources

    options = Options(**stream)
    if options.timeline and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError('--timeline draws with matplotlib: pip install "aiotime[plot]"')
    console = Console(stderr=out == "-", quiet=options.quiet, highlight=False)
    try:
        made = make(factory, example=example)
        found = sources.find(source, example=made.example, format=format)
        with ExitStack() as stack:
            with Live("measuring the model …", console=console, auto_refresh=False, transient=True):
                pipeline = build(made, devices=devices, balance=balance, plan_file=plan_file, way=way, depth=depth)
            file = open_output(out, stack)  # last: a wrong call must not cost what was written before
            writer = Writer(file, style=style, top=top)
            outcome = aiotime.run(Job(pipeline, found, writer, options).work())
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    report(console, outcome, out=out, written=writer.written)
    if outcome.error is not None:
        click.echo(f"Error: {explain(outcome.error)}", err=True)
    context.exit(exit_code(outcome))


def build(
    made: Made, *, devices: str | None, balance: str, plan_file: str | None, way: str | None, depth: int | None
) -> Pipeline:
    """The pipeline a factory made, or one around its model; a model is measured first, which takes seconds."""
    from aiotime import Pipeline, Plan

    if made.pipeline is not None:
        if devices or plan_file or depth or way or balance != "measured":
            raise click.UsageError(
                f"{made.name} made a Pipeline, which has its devices, balance, compile and depth already"
            )
        return made.pipeline
    assert made.model is not None
    if plan_file and (devices or way or balance != "measured"):
        raise click.UsageError(
            "--plan names the devices, cuts the layers and says how they are compiled; leave --devices, --balance and "
            "--compile out"
        )
    return Pipeline(
        made.model,
        example=made.example,
        devices=parse_devices(devices),
        balance=parse_balance(balance),
        plan=Plan.from_json(Path(plan_file).read_text(encoding="utf-8")) if plan_file else None,
        compile=way,
        depth=depth,
    )


def open_output(out: str | None, stack: ExitStack) -> TextIO:
    """The file predictions go to."""
    if out == "-":
        return sys.stdout
    try:
        return stack.enter_context(Path(out or os.devnull).open("w", encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"cannot write to {out}: {error.strerror}") from error


def report(console: Console, outcome: Outcome, *, out: str | None, written: int) -> None:
    """The summary: what came out, how fast, what limits it, what was written."""
    run, stats = outcome.run, outcome.stats
    lost = {"shed": run.frames_shed, "failed": run.frames_failed}
    lines = [
        f"{count(run.frames_out)} predictions from {count(run.frames_in)} frames"
        + "".join(f", {count(number)} {how}" for how, number in lost.items() if number)
        + f" in {duration(run.elapsed)}: {count(round(run.frames_per_second, 1))} frames/s",
        f"latency p50 {duration(run.latency_p50)}, p99 {duration(run.latency_p99)}; {stats.diagnosis}",
    ]
    if outcome.missing:
        lines.append(f"the source ended {count(outcome.missing)} frames before what it says it holds: is it cut off?")
    if outcome.interrupt.received is not None:
        lines.append(f"stopped by {outcome.interrupt.received.name}; what was in flight was finished")
    if out is None:
        lines.append("predictions were not kept; give --out predictions.jsonl")
    elif out != "-":
        lines.append(f"wrote {out} ({count(written)} lines)")
    lines += outcome.notes
    console.print(stage_table(stats))
    for line in lines:
        console.print(line, soft_wrap=True)


def stage_table(stats: Stats) -> Table:
    """The columns of ``Stats`` that fit a terminal of 80."""
    rows = [
        [
            stage.name,
            stage.device,
            count(stage.frames),
            share(stage.busy),
            share(stage.blocked_input),
            duration(stage.service_p50),
            duration(stage.service_p99),
        ]
        for stage in stats.stages
    ]
    return rich_table(("stage", "device", "frames", "busy", "no input", "p50", "p99"), rows, left=2)


def explain(error: BaseException) -> str:
    """``error`` with what caused it, where its own message does not say that already."""
    text, cause = str(error), error.__cause__
    while cause is not None and str(cause) in text:
        cause = cause.__cause__
    return text if cause is None else f"{text} ({type(cause).__name__}: {cause})"


def exit_code(outcome: Outcome) -> int:
    """See the command's help."""
    if outcome.error is not None:
        return 1
    if outcome.reader_left:
        return BROKEN_PIPE
    return outcome.interrupt.exit_code

"""``aiotime run``: a source through a pipeline into JSON lines.

    source ─▶ (limit) ─▶ (pace) ─▶ pipeline.run ─▶ Writer
                                        └─▶ progress, trace, summary
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from rich.console import Console

from aiotime.cli.factory import Made, make, parse_balance, parse_devices
from aiotime.cli.interrupt import Interrupt, stop_on_signals
from aiotime.cli.writing import STYLES, Writer
from aiotime.errors import AiotimeError, ConfigurationError

if TYPE_CHECKING:
    from aiotime.frame import Frame, Prediction
    from aiotime.observe.stats import RunStats, Stats
    from aiotime.observe.trace import Trace
    from aiotime.pipeline import Pipeline
    from aiotime.runs import Run

BROKEN_PIPE = 141  # 128 + SIGPIPE: whoever read the predictions left


@dataclass(slots=True)
class Outcome:
    """How a stream ended."""

    interrupt: Interrupt
    stats: Stats | None = None
    run: RunStats | None = None
    error: BaseException | None = None
    reader_left: bool = False
    written: list[Path] = field(default_factory=list)


@click.command(short_help="Run a model over a source; write predictions.")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option(
    "-s",
    "--source",
    required=True,
    help="A video, a folder of pictures, a camera (/dev/video0), a URL, a recording (.npy, .jsonl, .raw), or - for stdin.",
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
@click.option("--top", type=click.IntRange(min=1), help="Write the best K classes with their scores instead of outputs.")
@click.option("-e", "--example", multiple=True, metavar="SHAPE", help="A frame: 1,3,256,256, 1,16:int64 or name=1,16.")
@click.option("-d", "--devices", metavar="LIST", help="Where stages run: cpu:0,cpu:1. By default all GPUs, else all cores.")
@click.option("--balance", default="measured", show_default=True, help="measured, even, or layers per stage: 3,5.")
@click.option("--plan", "plan_file", type=click.Path(exists=True, dir_okay=False), help="A plan saved by `aiotime plan`.")
@click.option("--depth", type=click.IntRange(min=1), help="Launches in flight per stage; by default by the stages' times.")
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
@click.option("--deadline", type=float, metavar="SECONDS", help="Shed a frame that was not computed so long after it came.")
@click.option("--rate", type=float, metavar="FPS", help="Pull the source at no more than this rate.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Stop after N frames of the source.")
@click.option("--trace", "trace_file", type=click.Path(dir_okay=False), help="Write a trace for ui.perfetto.dev.")
@click.option("--timeline", type=click.Path(dir_okay=False), help="Draw what ran when (needs the extra [plot]).")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@click.pass_context
def run(context: click.Context, factory: str, source: str, **given: Any) -> None:
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
    """
    import aiotime
    from aiotime import sources

    console = Console(stderr=given["out"] == "-", quiet=given["quiet"], highlight=False)
    try:
        made = make(factory, example=given["example"])
        found = sources.find(source, example=made.example, format=given["format"])
        with ExitStack() as stack:
            file = open_output(given["out"], stack)
            pipeline = build(made, given, console)
            job = Job(pipeline, found, Writer(file, style=given["style"], top=given["top"]), given, console)
            outcome = aiotime.run(job.work())
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    if not given["quiet"]:
        report(console, outcome, given)
    if outcome.error is not None:
        click.echo(f"Error: {explain(outcome.error)}", err=True)
    context.exit(exit_code(outcome))


class Job:
    """One stream from its source to its file."""

    def __init__(self, pipeline: Pipeline, source: Any, writer: Writer, given: dict[str, Any], console: Console) -> None:
        self._pipeline = pipeline
        self._source = source
        self._writer = writer
        self._given = given
        self._console = console
        self._stopping: asyncio.Task[None] | None = None

    async def work(self) -> Outcome:
        """Run until the source ends, somebody interrupts, or something fails; what was finished is written."""
        pipeline, given = self._pipeline, self._given
        with ExitStack() as stack:
            trace = stack.enter_context(pipeline.tracing()) if given["trace_file"] or given["timeline"] else None
            async with pipeline:
                outcome = await self._stream()
        self._save(trace, outcome)
        return outcome

    async def _stream(self) -> Outcome:
        pipeline, given = self._pipeline, self._given
        source = limited(self._source, given["limit"])
        if given["rate"] is not None:
            from aiotime import streams

            source = streams.pace(source, rate=given["rate"])
        run = pipeline.run(
            source,
            overflow=given["overflow"] or ("latest" if self._source.live else "wait"),
            on_error=self._record if given["on_error"] == "record" else given["on_error"],
            deadline=given["deadline"],
        )
        display = Display(self._console, pipeline, total=total(self._source.length, given["limit"]))
        with stop_on_signals(lambda: self._stop(run, display), display.close) as interrupt:
            outcome = Outcome(interrupt)
            async with run:
                with display:
                    try:
                        async for prediction in run:
                            await self._write(prediction)
                            display.update()
                    except BrokenPipeError:
                        outcome.reader_left = True
                        silence_stdout()
                    except (AiotimeError, OSError) as error:
                        outcome.error = error
                outcome.run, outcome.stats = run.stats(), pipeline.stats()
        return outcome

    async def _write(self, prediction: Prediction) -> None:
        if self._writer.heavy(prediction):  # seconds of formatting do not belong on the loop
            await asyncio.to_thread(self._writer.write, prediction)
        else:
            self._writer.write(prediction)

    def _record(self, frame: Frame, error: BaseException) -> None:
        self._writer.write_error(frame.index, frame.key, error)

    def _stop(self, run: Run, display: Display) -> None:
        display.note("stopping: finishing what is in flight (Ctrl-C again aborts)")
        self._stopping = asyncio.get_running_loop().create_task(run.stop(), name="stop")

    def _save(self, trace: Trace | None, outcome: Outcome) -> None:
        if trace is None:
            return
        if self._given["trace_file"]:
            outcome.written.append(trace.save(self._given["trace_file"]))
        if self._given["timeline"]:
            from aiotime.observe.timeline import plot_timeline

            plot_timeline(trace, self._given["timeline"])
            outcome.written.append(Path(self._given["timeline"]))


def build(made: Made, given: dict[str, Any], console: Console) -> Pipeline:
    """The pipeline a factory made, or one around its model; a model is measured first, which takes seconds."""
    from aiotime import Pipeline, Plan

    if made.pipeline is not None:
        fixed = [name for name in ("devices", "depth", "plan_file") if given[name]]
        if fixed or given["balance"] != "measured":
            raise click.UsageError(f"{made.name} made a Pipeline, which has its devices, balance, plan and depth already")
        return made.pipeline
    assert made.model is not None
    plan = Plan.from_json(Path(given["plan_file"]).read_text()) if given["plan_file"] else None
    with console.status("measuring the model …"):
        return Pipeline(
            made.model,
            example=made.example,
            devices=parse_devices(given["devices"]),
            balance=parse_balance(given["balance"]),
            plan=plan,
            depth=given["depth"],
        )


def limited(source: Any, limit: int | None) -> Any:
    """The first ``limit`` items of a source; closes it. Decoding keeps to one thread: the others belong to the stages."""
    if hasattr(source, "__aiter__"):
        return source if limit is None else first_of(source, limit)
    return on_one_thread(source, limit)


async def first_of(source: Any, limit: int) -> AsyncIterator[Any]:
    """At most ``limit`` items; asks for no more."""
    async with aclosing(aiter(source)) as items:
        for _ in range(limit):
            try:
                yield await anext(items)
            except StopAsyncIteration:
                return


def on_one_thread(source: Any, limit: int | None) -> Iterator[Any]:
    """At most ``limit`` items, made with one intra-op thread; asks for no more."""
    import torch

    torch.set_num_threads(1)  # of the thread that pulls
    with closing(iter(source)) as items:
        yield from itertools.islice(items, limit)


def total(length: int | None, limit: int | None) -> int | None:
    """How many frames will come, where that is known."""
    known = [number for number in (length, limit) if number is not None]
    return min(known) if known else None


def open_output(out: str | None, stack: ExitStack) -> TextIO:
    """The file predictions go to."""
    if out == "-":
        return sys.stdout
    try:
        return stack.enter_context(Path(out or os.devnull).open("w", encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"cannot write to {out}: {error.strerror}") from error


def silence_stdout() -> None:
    """Whoever read stdout left: let the interpreter's last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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

"""One stream from its source to its file: what ``aiotime run`` does on the event loop.

    source ─▶ (limit) ─▶ (pace) ─▶ pipeline.run ─▶ Writer
                                        └─▶ progress, trace

The summary is printed afterwards, by the command, from the `Outcome`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from aiotime.cli.interrupt import Interrupt, stop_on_signals
from aiotime.errors import AiotimeError, ConfigurationError
from aiotime.observe.progress import Progress

if TYPE_CHECKING:
    from aiotime.cli.writing import Writer
    from aiotime.frame import Frame, Prediction
    from aiotime.observe.stats import RunStats, Stats
    from aiotime.observe.trace import Trace
    from aiotime.pipeline import Pipeline
    from aiotime.runs import Run


@dataclass(slots=True)
class Outcome:
    """How a stream ended.

    Attributes:
        interrupt: the signal that stopped it, if one did.
        run: what the run counted.
        stats: what the pipeline counted.
        error: what ended it before its time; predictions until then are written.
        reader_left: whoever read the predictions closed the pipe.
        missing: frames that the source said it holds and did not give, though nothing stopped it.
        notes: what became of trace and timeline.
    """

    interrupt: Interrupt
    run: RunStats
    stats: Stats
    error: BaseException | None = None
    reader_left: bool = False
    missing: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said about the stream; None: not said."""

    overflow: Any = None
    on_error: str = "raise"  # or "skip", "record"
    deadline: float | None = None
    rate: float | None = None
    limit: int | None = None
    trace_file: str | None = None
    timeline: str | None = None
    quiet: bool = False


class Job:
    """Runs one source through a pipeline and writes what comes out.

    Args:
        pipeline: what computes; opened and closed here.
        source: one of `aiotime.sources`.
        writer: where predictions go.
        options: how.
    """

    def __init__(self, pipeline: Pipeline, source: Any, writer: Writer, options: Options) -> None:
        self._pipeline = pipeline
        self._source = source
        self._writer = writer
        self._options = options
        self._stopping: asyncio.Task[None] | None = None

    async def work(self) -> Outcome:
        """Run until the source ends, somebody interrupts or something fails; what was finished by then is written.

        Raises:
            ConfigurationError: an option does not fit.
        """
        pipeline, options = self._pipeline, self._options
        with ExitStack() as stack:
            trace = stack.enter_context(pipeline.tracing()) if options.trace_file or options.timeline else None
            async with pipeline:
                outcome = await self._stream()
        if trace is not None:
            await asyncio.to_thread(self._save, trace, outcome)
        return outcome

    async def _stream(self) -> Outcome:
        pipeline, options, source = self._pipeline, self._options, self._source
        run = pipeline.run(
            self._frames(),
            overflow=options.overflow or ("latest" if source.live else "wait"),
            on_error=self._record
            if options.on_error == "record"
            else "skip"
            if options.on_error == "skip"
            else "raise",
            deadline=options.deadline,
        )
        expected = total(source.length, options.limit)
        progress = Progress(expected, description=source.name)
        shown = nullcontext() if options.quiet else progress.follow(pipeline.stats)
        error: BaseException | None = None
        reader_left = False
        with stop_on_signals(lambda: self._stop(run, progress), lambda: self._abort(progress)) as interrupt:
            async with run, shown:
                try:
                    async for prediction in run:
                        await self._write(prediction)
                except BrokenPipeError:
                    reader_left = True
                    silence_stdout()
                except (AiotimeError, OSError) as failure:
                    error = failure
                counted = run.stats()
                stopped = error is not None or reader_left or interrupt.received is not None
                missing = 0 if expected is None or stopped else max(0, expected - counted.frames_in)
                return Outcome(interrupt, counted, pipeline.stats(), error, reader_left, missing)

    def _frames(self) -> Any:
        frames = limited(self._source, self._options.limit)
        if self._options.rate is None:
            return frames
        from aiotime import streams

        return streams.pace(frames, rate=self._options.rate)

    async def _write(self, prediction: Prediction) -> None:
        if self._writer.heavy(prediction):  # milliseconds of formatting do not belong on the loop
            await asyncio.to_thread(self._writer.write, prediction)
        else:
            self._writer.write(prediction)

    def _record(self, frame: Frame, error: BaseException) -> None:
        self._writer.write_error(frame.index, frame.key, error)

    def _stop(self, run: Run, progress: Progress) -> None:
        if not self._options.quiet:
            progress.description = "stopping (Ctrl-C again aborts)"
            if not sys.stderr.isatty():
                click.echo("stopping: finishing what is in flight", err=True)
        self._stopping = asyncio.get_running_loop().create_task(run.stop(), name="stop")

    def _abort(self, progress: Progress) -> None:
        if not self._options.quiet:
            progress.__exit__(None, None, None)  # gives the terminal its cursor back
            click.echo("aborted", err=True)

    def _save(self, trace: Trace, outcome: Outcome) -> None:
        from aiotime.observe.timeline import plot_timeline

        def draw(path: str) -> None:
            plot_timeline(trace, path, title=self._source.name)

        for path, save in ((self._options.trace_file, trace.save), (self._options.timeline, draw)):
            if path is None:
                continue
            try:
                save(path)
            except (ConfigurationError, OSError) as error:  # the predictions are written: say so, and go on
                outcome.notes.append(f"could not write {path}: {error}")
                outcome.error = outcome.error or error
            else:
                outcome.notes.append(f"wrote {path}")


def limited(source: Any, limit: int | None) -> Any:
    """The first ``limit`` items of a source; closes it. Decoding keeps to one thread: the rest is for the stages."""
    if hasattr(source, "__aiter__"):
        return source if limit is None else first_of(source, limit)
    return on_one_thread(source, limit)


async def first_of(source: Any, limit: int) -> AsyncIterator[Any]:
    """At most ``limit`` items; asks for no more."""
    async with aclosing(aiter(source)) as items:
        for _ in range(limit):
            try:
                item = await anext(items)
            except StopAsyncIteration:
                return
            yield item


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


def silence_stdout() -> None:
    """Whoever read stdout left: let the interpreter's last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""``aiotime demo predict``: fit a small CNN on handwritten digits, then stream digits it has not seen."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from aiotime.cli.factory import parse_devices
from aiotime.errors import ConfigurationError
from aiotime.observe.progress import Progress as StreamProgress
from aiotime.observe.tables import count, duration

if TYPE_CHECKING:
    from torch import Tensor, nn

    from aiotime.cli.digits import Digits
    from aiotime.observe.trace import Trace
    from aiotime.pipeline import Pipeline

CAMERAS = ("left", "right")
COMPARED = 120  # frames a round


def show_predicting(
    console: Console, *, rate: float, frames: int | None, devices: str, rounds: int, seed: int, out: Path
) -> None:
    """Fit the CNN, cut it, stream the digits it has not seen, compare, draw."""
    import aiotime
    from aiotime import Pipeline
    from aiotime.cli.digits import HELD_BACK, load

    digits = load(seed=seed)
    model = fitted(digits, console, seed=seed)
    alone = copy.deepcopy(model)
    with Live("measuring the layers …", console=console, auto_refresh=False, transient=True):
        pipeline = cut(model, digits, parse_devices(devices) or [], console)
    assert isinstance(pipeline, Pipeline)
    console.print(pipeline.plan)
    show = Show(pipeline, alone, digits, min(frames or HELD_BACK, HELD_BACK), console)
    trace = aiotime.run(show.all(rate=rate, rounds=rounds))
    draw(trace, out, console)


def fitted(digits: Digits, console: Console, *, seed: int) -> nn.Module:
    """The CNN, trained before your eyes."""
    from aiotime.cli.digits import fit

    start = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"fitting a CNN on {count(len(digits.train_images))} digits")
        model = fit(digits, seed=seed, progress=lambda done, steps: progress.update(task, completed=100 * done / steps))
    console.print(
        f"fitted a CNN on {count(len(digits.train_images))} digits in {duration(time.perf_counter() - start)}; "
        f"{count(len(digits.test_images))} are held back"
    )
    return model


def cut(model: nn.Module, digits: Digits, devices: list[str], console: Console) -> Pipeline:
    """A pipeline cut where the measurement says; where that advises one stage, in halves all the same."""
    from aiotime import Pipeline
    from aiotime.cli.digits import HALVES

    example = digits.frame(0)
    pipeline = Pipeline(model, example=example, devices=devices, balance="measured")
    if len(devices) == len(HALVES) and pipeline.plan is not None and len(pipeline.plan.stages) < len(devices):
        console.print(f"the measurement advises fewer stages here: {pipeline.plan.advice}")
        console.print("this is a demonstration: cutting the work in halves all the same")
        pipeline = Pipeline(model, example=example, devices=devices, balance=list(HALVES))
    return pipeline


@dataclass(frozen=True, slots=True)
class Show:
    """What the demo does on the event loop."""

    pipeline: Pipeline
    alone: nn.Module
    digits: Digits
    count: int
    console: Console

    async def all(self, *, rate: float, rounds: int) -> Trace:
        """Every part in turn; returns the trace of the fastest."""
        await self.at_a_rate(rate)
        trace = await self.flat_out()
        await self.beside_sequential(rounds)
        return trace

    async def at_a_rate(self, rate: float) -> None:
        """Two cameras, paced to half the rate each, merged into one stream with their keys kept."""
        from aiotime import streams

        shown = {name: range(at, self.count, len(CAMERAS)) for at, name in enumerate(CAMERAS)}
        paced = {name: streams.pace(self.samples(indices), rate=rate / len(CAMERAS)) for name, indices in shown.items()}
        right = dict.fromkeys(CAMERAS, 0)
        progress = StreamProgress(self.count, description=f"two cameras, {rate:g} frames/s")
        async with (
            self.pipeline,
            self.pipeline.run(streams.merge(**paced)) as run,
            progress.follow(self.pipeline.stats),
        ):
            async for prediction in run:
                camera, index = cast("tuple[str, int]", prediction.key)
                right[camera] += self.correct(prediction.output, index)
            stats = run.stats()
        self.say(
            f"two cameras at {rate:g} frames/s: {count(round(stats.frames_per_second, 1))} frames/s came out, "
            f"latency p50 {duration(stats.latency_p50)}, p99 {duration(stats.latency_p99)}"
        )
        by_camera = ", ".join(f"{name} {right[name] / len(shown[name]):.1%}" for name in CAMERAS)
        self.say(f"  accuracy on unseen digits {sum(right.values()) / self.count:.1%} ({by_camera})")
        lag = max(feed.lag for feed in paced.values())
        if any(feed.lagging for feed in paced.values()):
            self.say(f"  the pipeline could not keep that rate: the cameras were {duration(lag)} behind")

    async def flat_out(self) -> Trace:
        """The same digits as fast as the pipeline takes them, while a trace is recorded."""
        right = same = 0
        expected = self.classes()
        with self.pipeline.tracing() as trace:
            progress = StreamProgress(self.count, description="as fast as it goes")
            source = self.samples(range(self.count))
            async with self.pipeline, self.pipeline.run(source) as run, progress.follow(self.pipeline.stats):
                async for prediction in run:
                    index = cast("int", prediction.key)
                    right += self.correct(prediction.output, index)
                    same += int(prediction.output.argmax()) == expected[index]
                stats, run_stats = self.pipeline.stats(), run.stats()
        self.say(
            f"as fast as it goes: {count(round(run_stats.frames_per_second))} frames/s, "
            f"latency p50 {duration(run_stats.latency_p50)}, p99 {duration(run_stats.latency_p99)}"
        )
        self.say(
            f"  accuracy on unseen digits {right / self.count:.1%}; "
            f"{count(same)} of {count(self.count)} predictions are those of the model alone"
        )
        self.say(f"  {stats.diagnosis}")
        return trace

    async def beside_sequential(self, rounds: int) -> None:
        """The same frames through the model alone and through the pipeline, in turn."""
        from aiotime.cli.versus import compare

        frames = [self.digits.frame(index) for index in range(min(COMPARED, self.count))]
        with Live("comparing: warming up", console=self.console, auto_refresh=False, transient=True) as live:

            def say(done: int) -> None:
                live.update(f"comparing: {done} of {rounds} rounds", refresh=True)

            async with self.pipeline:
                versus = await compare(self.pipeline, self.alone, frames, rounds=rounds, after=say)
        self.say(f"throughput, medians of {rounds} rounds of {len(frames)} frames in turn:")
        self.console.print(versus)
        if versus.busy_elsewhere:
            self.say("  two threads were no faster than one: this machine's cores seem to be busy with something else")

    def say(self, line: str) -> None:
        """Print a line, however long."""
        self.console.print(line, soft_wrap=True)

    def samples(self, indices: range) -> list[object]:
        """Held-back digits as samples keyed by their index."""
        from aiotime import Sample

        return [Sample(self.digits.frame(index), key=index) for index in indices]

    def correct(self, logits: Tensor, index: int) -> bool:
        """Whether the best class of ``logits`` [1, 10] is the label of held-back digit ``index``."""
        return int(logits.argmax()) == int(self.digits.test_labels[index])

    def classes(self) -> list[int]:
        """What the model alone makes of the held-back digits."""
        import torch

        with torch.inference_mode():
            logits = [self.alone(self.digits.frame(index)) for index in range(self.count)]
        return [int(row.argmax()) for row in logits]


def draw(trace: Trace, out: Path, console: Console, *, title: str = "handwritten digits, as fast as it goes") -> None:
    """Write the trace and the timeline, and say where they are."""
    out.mkdir(parents=True, exist_ok=True)
    saved = trace.save(out / "trace.json")
    console.print(f"trace     {saved} (open it in https://ui.perfetto.dev)")
    try:
        from aiotime.observe.timeline import plot_timeline

        plot_timeline(trace, out / "timeline.png", title=title)
        console.print(f"timeline  {out / 'timeline.png'}")
    except ConfigurationError as error:
        console.print(f"timeline  not drawn: {error}")

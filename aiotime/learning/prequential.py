"""Prequential evaluation: every frame is predicted first, scored, and only then learned from (Dawid, 1984).

    x_t ─▶ prediction with what was learned from x_0 … x_{t-1} (less its delay) ─▶ score_t ─▶ learn from (x_t, y_t)

On a stream that is the fair test: each frame is test data once, before it is training data. That the prediction comes
first needs no care here, it is how the pipeline learns; with `replay`, score the newest frame alone.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError
from aiotime.frame import LATER, Prediction
from aiotime.observe.tables import count, duration, rich_table, text_table

if TYPE_CHECKING:
    from rich.table import Table

Metric = Literal["accuracy", "loss"] | Callable[[Any, Any], float]

COLUMNS = ("frames", "newest", "so far", "loss")


class Stream(Protocol):
    """What `Runner.run` returns: an `aiotime.Run`."""

    def __aiter__(self) -> AsyncIterator[Prediction]:
        """Itself."""

    async def __anext__(self) -> Prediction:
        """The next prediction."""

    async def aclose(self) -> None:
        """End it."""


class Runner(Protocol):
    """Who predicts and learns: an `aiotime.Pipeline`."""

    @property
    def run(self) -> Callable[..., Stream]:
        """``run(source, **options)``."""


@dataclass(frozen=True, slots=True)
class Point:
    """How it stood after some frames.

    Attributes:
        frames: scored so far.
        score: mean over the newest ``window`` of them.
        mean: mean over all of them.
        loss: mean loss over the newest ``window``; nan where there was none.
    """

    frames: int
    score: float
    mean: float
    loss: float

    def __str__(self) -> str:
        return f"{count(self.frames)} frames: {self.score:.4f} newest, {self.mean:.4f} so far, loss {self.loss:.4g}"


@dataclass(frozen=True, slots=True)
class PrequentialResult:
    """What an evaluation found; prints as a table.

    Attributes:
        metric: its name.
        window: frames that a point of the curve is the mean of.
        frames: how many were scored.
        unscored: predictions without a target (or with one that came `LATER`).
        mean: score over all frames; nan where there was none.
        curve: a `Point` every so many frames, and one at the end.
        scores: of each frame, in order; losses: of each frame, nan where there was none.
        delays: per stage: (delay, how many frames met it), in order; empty without a learner.
        seconds: it took.
    """

    metric: str
    window: int
    frames: int
    unscored: int
    mean: float
    curve: tuple[Point, ...]
    scores: tuple[float, ...]
    losses: tuple[float, ...]
    delays: tuple[tuple[tuple[int, int], ...], ...]
    seconds: float

    def tail(self, share: float = 0.5) -> float:
        """The mean score of the last ``share`` of the frames: what was reached, without what the beginning cost."""
        if not 0 < share <= 1:
            raise ConfigurationError(f"share is a part of the frames, above 0 and up to 1, not {share}")
        rest = self.scores[len(self.scores) - math.ceil(share * len(self.scores)) :]
        return _mean(rest)

    @property
    def delay_means(self) -> tuple[float, ...]:
        """Per stage: the delay a frame met on average."""
        return tuple(
            sum(delay * times for delay, times in stage) / sum(times for _, times in stage) for stage in self.delays
        )

    def plot(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        beside: Mapping[str, PrequentialResult] | None = None,
        title: str | None = None,
    ) -> None:
        """Draw the curve to ``path``; the suffix says the format (png, svg, pdf). Takes about half a second.

        Args:
            path: where.
            name: of this curve, in the legend.
            beside: further curves, by name.
            title: above the picture.

        Raises:
            ConfigurationError: matplotlib is missing, or it draws no such format.
        """
        try:
            from aiotime.observe import curves
        except ImportError as missing:
            raise ConfigurationError("plot() draws with matplotlib: pip install 'aiotime[plot]'") from missing
        results = {name or "this": self, **(beside or {})}
        lines = {label: [(point.frames, point.score) for point in one.curve] for label, one in results.items()}
        y = f"{self.metric}, newest {count(self.window)} frames"
        curves.draw(lines, path, x="frames", y=y, title=title or "Predicted, then learned")

    def __str__(self) -> str:
        return "\n".join([self._heading(), "", text_table(COLUMNS, self._rows(), left=0)])

    def __rich__(self) -> Table:
        table = rich_table(COLUMNS, self._rows(), left=0)
        table.title, table.title_justify = self._heading(), "left"
        return table

    def _heading(self) -> str:
        first = f"{self.metric} {self.mean:.4f} over {count(self.frames)} frames in {duration(self.seconds)}"
        if self.unscored:
            first += f", {count(self.unscored)} more without target"
        if self.delays:
            first += "; mean delay by stage " + ", ".join(f"{delay:.2f}" for delay in self.delay_means)
        return first

    def _rows(self) -> list[list[str]]:
        step = -(-len(self.curve) // 12) if self.curve else 1  # a dozen lines say it
        shown = [point for at, point in enumerate(self.curve, 1) if at % step == 0 or at == len(self.curve)]
        return [[count(p.frames), f"{p.score:.4f}", f"{p.mean:.4f}", f"{p.loss:.4g}"] for p in shown]


def prequential(
    pipeline: Runner,
    source: Any,
    *,
    metric: Metric = "accuracy",
    window: int = 200,
    every: int | None = None,
    newest: int | None = None,
    **options: Any,
) -> PrequentialRun:
    """Run ``source`` through ``pipeline``, scoring each prediction before its frame is learned from.

    ``result = await prequential(...)`` gives all of it at once; ``async for point in prequential(...)`` a `Point` every
    ``every`` frames, and ``.result`` afterwards. Left early: ``async with`` around it, or `PrequentialRun.aclose`.

    Args:
        pipeline: that learns (or does not: then it is the score of a model that stands still).
        source: of `aiotime.Sample`, as for ``pipeline.run``; frames without target are predicted and not scored.
        metric: "accuracy" (share of rows whose greatest output is the target's class), "loss", or a callable
            ``(output, target) -> number``.
        window: frames that each point of the curve is the mean of.
        every: frames from point to point; None: a tenth of the window.
        newest: score only the last so many rows of output and target: 1 behind `replay`, whose other rows have been
            learned from before.
        **options: for ``pipeline.run``.

    Raises:
        ConfigurationError: arguments that cannot work; while running, a metric that does not fit the output.
    """
    if window < 1 or (every is not None and every < 1):
        raise ConfigurationError(f"window and every are numbers of frames from 1, not {window} and {every}")
    if newest is not None and newest < 1:
        raise ConfigurationError(f"newest is a number of rows from 1, not {newest}")
    if not callable(metric) and metric not in ("accuracy", "loss"):
        raise ConfigurationError(f'metric must be "accuracy", "loss" or a callable (output, target), not {metric!r}')
    return PrequentialRun(pipeline.run(source, **options), metric, window, every or max(1, window // 10), newest)


class PrequentialRun:
    """An evaluation under way: awaitable, async iterable, async context manager; made by `prequential`."""

    def __init__(self, stream: Stream, metric: Metric, window: int, every: int, newest: int | None) -> None:
        self._stream = stream
        self._metric = metric
        self._window = window
        self._every = every
        self._newest = newest
        self._scores, self._losses = array("d"), array("d")
        self._curve: list[Point] = []
        self._delays: list[Counter[int]] = []
        self._unscored = 0
        self._total = 0.0
        self._recent: deque[float] = deque(maxlen=window)
        self._began: float | None = None
        self._seconds = 0.0
        self._ended = False

    def __await__(self) -> Generator[Any, None, PrequentialResult]:
        return self._all().__await__()

    async def _all(self) -> PrequentialResult:
        async with self:
            async for _ in self:
                pass
        return self.result

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Point:
        if self._began is None:
            self._began = time.perf_counter()
        while not self._ended:
            try:
                prediction = await anext(self._stream)
            except StopAsyncIteration:
                self._ended = True
                self._seconds = time.perf_counter() - self._began
                if self._scores and (not self._curve or self._curve[-1].frames < len(self._scores)):
                    return self._mark()
                break
            try:
                scored = self._take(prediction)
            except BaseException:
                await self.aclose()
                raise
            if scored and len(self._scores) % self._every == 0:
                return self._mark()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End it early; ``result`` holds what was scored so far. Idempotent."""
        if not self._ended:
            self._ended = True
            self._seconds = 0.0 if self._began is None else time.perf_counter() - self._began
        await self._stream.aclose()

    @property
    def result(self) -> PrequentialResult:
        """What was found so far."""
        frames = len(self._scores)
        running = time.perf_counter() - self._began if self._began is not None else 0.0
        return PrequentialResult(
            metric=self._metric if isinstance(self._metric, str) else getattr(self._metric, "__name__", "score"),
            window=self._window,
            frames=frames,
            unscored=self._unscored,
            mean=self._total / frames if frames else math.nan,
            curve=tuple(self._curve),
            scores=tuple(self._scores),
            losses=tuple(self._losses),
            delays=tuple(tuple(sorted(stage.items())) for stage in self._delays),
            seconds=self._seconds if self._ended else running,
        )

    def _take(self, prediction: Prediction) -> bool:
        """Score it; False where there is nothing to compare it with."""
        if prediction.delay is not None:
            self._delays = self._delays or [Counter() for _ in prediction.delay]
            for stage, delay in zip(self._delays, prediction.delay, strict=True):
                stage[delay] += 1
        score = self._score(prediction)
        if score is None:
            self._unscored += 1
            return False
        self._scores.append(score)
        self._losses.append(math.nan if prediction.loss is None else prediction.loss)
        self._recent.append(score)
        self._total += score
        return True

    def _score(self, prediction: Prediction) -> float | None:
        if self._metric == "loss":
            return prediction.loss
        output, target = prediction.output, prediction.target
        if target is None or target is LATER:
            return None
        if self._newest is not None:
            output, target = _last(output, self._newest), _last(target, self._newest)
        assert not isinstance(self._metric, str) or self._metric == "accuracy"
        return accuracy(output, target) if isinstance(self._metric, str) else float(self._metric(output, target))

    def _mark(self) -> Point:
        losses = [loss for loss in self._losses[-self._window :] if not math.isnan(loss)]
        point = Point(len(self._scores), _mean(self._recent), self._total / len(self._scores), _mean(losses))
        self._curve.append(point)
        return point


def accuracy(output: Any, target: Any) -> float:
    """Share of rows whose greatest output is the target's class.

    Args:
        output: (N, C), (N, C, …) or (C,).
        target: class numbers (N,), (N, …) or (); or scores in the shape of ``output``.

    Raises:
        ConfigurationError: shapes that do not fit.
    """
    if isinstance(output, torch.Tensor):
        target = torch.as_tensor(target, device=output.device)
        axis = 1 if output.dim() > 1 else 0
        if target.shape == output.shape and output.dim() > 0:
            target = target.argmax(axis)
        if output.dim() > 0 and output.shape[axis] > 1:
            found = output.argmax(axis)
            if found.numel() == target.numel():
                return float((found.flatten() == target.flatten()).float().mean())
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in (output, target)]
    raise ConfigurationError(
        f'metric="accuracy" compares scores (N, classes) with class numbers (N,), not {shapes[0]} with {shapes[1]}; '
        "hand in a callable (output, target) -> number"
    )


def _last(value: Any, rows: int) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf[-rows:] if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 else leaf, value
    )


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan

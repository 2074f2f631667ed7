"""What a stage learned, as a frozen value: part of `StageStats` where a pipeline learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aiotime.observe.meter import Recorder, quantile
from aiotime.observe.tables import count, duration, share, size

# beside the stage's name; a table of its own under that of the stages
LESSON_COLUMNS = ("stage", "learned", "updates", "skipped", "delay", "most", "backward", "p50", "kept")


@dataclass(frozen=True, slots=True)
class Lessons:
    """What one stage learned.

    Attributes:
        frames: frames it learned from since its learner was made (a restored checkpoint brings its own number).
        updates: of its weights; fewer than frames where gradients are gathered or skipped.
        skipped: updates left out because a gradient was not finite.
        delays: (delay, how many frames met it) since the pipeline was opened, in order; the delay is the number of
            earlier frames whose updates the weights lacked when a frame passed.
        backward: share of the elapsed time spent on backwards and updates; part of the stage's ``busy``.
        backward_p50: seconds of a backward with its update, median of the newest 1,024.
        kept_bytes: activations and old weights held now for backwards to come (what autograd saves inside not counted).
    """

    frames: int
    updates: int
    skipped: int
    delays: tuple[tuple[int, int], ...]
    backward: float
    backward_p50: float
    kept_bytes: int

    @property
    def delay_mean(self) -> float:
        """The delay a frame met on average; 0.0 before the first."""
        frames = sum(times for _, times in self.delays)
        return sum(delay * times for delay, times in self.delays) / frames if frames else 0.0

    @property
    def delay_max(self) -> int:
        """The greatest delay met."""
        return max((delay for delay, _ in self.delays), default=0)

    def since(self, earlier: Lessons, elapsed: float, before: float) -> Lessons:
        """What was learned between two snapshots, taken ``elapsed`` and ``before`` seconds after the opening."""
        then = dict(earlier.delays)
        met = ((delay, times - then.get(delay, 0)) for delay, times in self.delays)
        span = elapsed - before
        spent = self.backward * elapsed - earlier.backward * before
        return replace(
            self,
            frames=max(0, self.frames - earlier.frames),  # a checkpoint restored in between sets the counters
            updates=max(0, self.updates - earlier.updates),
            skipped=max(0, self.skipped - earlier.skipped),
            delays=tuple((delay, times) for delay, times in met if times > 0),
            backward=min(1.0, max(0.0, spent / span)) if span > 0 else 0.0,
        )

    def row(self, stage: str) -> list[str]:
        """Cells under `LESSON_COLUMNS`."""
        return [
            stage,
            count(self.frames),
            count(self.updates),
            count(self.skipped),
            count(round(self.delay_mean, 2)),
            count(self.delay_max),
            share(self.backward),
            duration(self.backward_p50),
            size(self.kept_bytes),
        ]


def lessons(
    backward: Sequence[Recorder],
    *,
    elapsed: float,
    frames: int,
    updates: int,
    skipped: int,
    delays: Mapping[int, int],
    kept_bytes: int,
) -> Lessons:
    """From the recorders of a stage's backward and weight jobs, and its learner's counters."""
    busy = sum(recorder.busy for recorder in backward)
    return Lessons(
        frames=frames,
        updates=updates,
        skipped=skipped,
        delays=tuple(sorted(delays.items())),
        backward=min(1.0, busy / elapsed) if elapsed > 0 else 0.0,
        backward_p50=quantile([s for recorder in backward[:1] for s in recorder.service.values()], 0.5),
        kept_bytes=kept_bytes,
    )

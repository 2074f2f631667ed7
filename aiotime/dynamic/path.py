"""Path: one instance's way through a network: which stage, when, in which batch, from which results.

print(step.path)            a line per call
step.path.draw("path.png")  stages as rows, time to the right, an arrow per result that another call used
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from aiotime.observe.tables import duration, text_table


@dataclass(frozen=True, slots=True)
class Visit:
    """One call of a stage.

    Attributes:
        number: of the call within its instance.
        stage: and, where it has several, which replica.
        asked: seconds on the devices' clock: when it was called.
        begun: when its batch began.
        ended: and ended.
        batch: the batch's number at that stage.
        size: calls in that batch.
        parents: numbers of the calls whose results it was given; known only where the network learns.
        back: begin and end of its batch's backward; None where there was none.
    """

    number: int
    stage: str
    asked: float
    begun: float
    ended: float
    batch: int
    size: int
    parents: tuple[int, ...]
    back: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Path:
    """What one instance did.

    Attributes:
        index: of the instance in its run.
        visits: in the order of the calls.
    """

    index: int
    visits: tuple[Visit, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """In the order of their first visit."""
        return tuple(dict.fromkeys(visit.stage for visit in self.visits))

    def __str__(self) -> str:
        if not self.visits:
            return f"instance {self.index}: no stage was called"
        start = min(visit.asked for visit in self.visits)
        rows = [
            [
                str(visit.number),
                visit.stage,
                " ".join(map(str, visit.parents)) or "-",
                duration(visit.asked - start),
                duration(visit.begun - visit.asked),
                duration(visit.ended - visit.begun),
                f"{visit.batch} of {visit.size}",
                "-" if visit.back is None else duration(visit.back[0] - start),
            ]
            for visit in self.visits
        ]
        header = ("call", "stage", "from", "at", "waited", "took", "batch", "back at")
        return f"instance {self.index}\n{text_table(header, rows)}"

    def draw(self, path: str | PathLike[str], *, title: str | None = None) -> None:
        """Save a picture (extra ``[plot]``): forwards filled, backwards outlined, arrows along results."""
        from aiotime.dynamic.drawing import draw

        draw(self, title or f"instance {self.index}: {len(self.visits)} calls").savefig(path, bbox_inches="tight")

"""What travels: Sample (what a source may yield), Frame (on its way), Prediction (what comes out).

Nothing here imports torch: a payload is any object.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from aiotime.devices.base import Pending


class Later:
    """The type of `LATER`."""

    def __repr__(self) -> str:
        return "aiotime.LATER"


LATER = Later()  # a Sample's target that is not known yet


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One item of a stream with what goes beside it.

    Args:
        input: the payload: a tensor (one argument of the model), a tuple (positional arguments) or
            a dict (keyword arguments); for a stage made of a function, any object. An `InputError` stands
            for a frame that the source could not read: it is refused in its turn, as ``on_error`` says.
        target: what the model should have said; only a learner reads it. None: predict only. `LATER`: it will
            come by `Pipeline.feedback`, under this sample's ``key``.
        key: who this frame belongs to (camera, user, request); comes back as ``Prediction.key``.
        deadline: seconds after its arrival within which the frame must start its last stage;
            an expired frame is shed before it is computed.
        ack: called on the event loop exactly once when the frame has left the pipeline: with
            ``None`` when its prediction was handed over, with the error when it was shed or failed.
        cut: a new scene begins with this frame: no gradient crosses from the frames before it.

    Example:
        >>> sample = aiotime.Sample(torch.zeros(1, 3), key="camera 1", deadline=0.1)
        >>> sample.key
        'camera 1'
    """

    input: Any
    target: Any = None
    key: Hashable = None
    deadline: float | None = None
    ack: Callable[[BaseException | None], None] | None = None
    cut: bool = False


@dataclass(slots=True, eq=False)
class Prediction:
    """What the pipeline made of one frame.

    Attributes:
        output: the model's own output (or the last stage's value).
        index: position of the frame in its run, from 0; shed and failed frames keep their number.
        key: the ``Sample.key`` it came with.
        loss: the frame's loss where a learner computed one.
        delay: per stage, how many earlier frames' updates its weights lacked when this frame passed; ``None``
            without a learner.
        latency: seconds from the frame's arrival at the door to its result.
        dropped_before: frames of this run shed or failed since the previous prediction.
        target: the ``Sample.target`` it came with.
    """

    output: Any
    index: int
    key: Hashable = None
    loss: float | None = None
    delay: tuple[int, ...] | None = None
    latency: float = 0.0
    dropped_before: int = 0
    target: Any = None


class Owner(Protocol):
    """Whoever put a frame in: a run or a single request. Told once, on the loop, when it ends."""

    def settled(self, frame: Frame) -> None:
        """``frame`` has its outcome: ``frame.value``, or ``frame.error`` where that is not None."""


class Nobody:
    """Owner of what nobody waits for."""

    def settled(self, frame: Frame) -> None:
        """Nobody is told."""


NOBODY = Nobody()


class Control(Protocol):
    """Work that travels between two frames, in order, and runs alone on each stage (a weight swap)."""

    def apply(self, stage: int) -> None:
        """Act on stage number ``stage``; called on its device stream while nothing else runs there."""


class Frame:
    """One item on its way through the pipeline.

    It carries one ``tail``: the pending value of its newest launch; each stage replaces it.
    ``cancelled`` and ``deadline`` are read by a device stream just before a job runs.
    """

    __slots__ = (
        "ack",
        "arrived",
        "cancelled",
        "control",
        "deadline",
        "dropped_before",
        "error",
        "index",
        "input",
        "key",
        "latency",
        "nbytes",
        "owner",
        "settled",
        "tail",
        "target",
        "ticket",
        "value",
    )

    def __init__(self, owner: Owner, index: int, tail: Pending, arrived: float) -> None:
        self.owner = owner
        self.index = index
        self.tail: Pending | None = tail
        self.arrived = arrived  # seconds on the pipeline's clock
        self.key: Hashable = None
        self.target: Any = None
        self.ticket: Any = None  # aiotime.learning.ticket.Ticket, in a pipeline that learns
        self.deadline: float | None = None  # absolute, on the pipeline's clock
        self.ack: Callable[[BaseException | None], None] | None = None
        self.control: Control | None = None
        self.input: Any = None  # kept only where a dead-letter callable may ask for it
        self.nbytes = 0
        self.dropped_before = 0
        self.cancelled = False
        self.settled = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.latency = 0.0

    def __repr__(self) -> str:
        return f"<Frame {self.index} key={self.key!r}>"

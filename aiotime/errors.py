"""Every error aiotime raises, told apart by who caused it.

AiotimeError
├── ConfigurationError      you built or called something in a way that cannot work (also a ValueError)
│   ├── TraceError          the model cannot be cut into layers; the message names the place and the way out
│   └── PlanError           a plan does not fit the model or the devices
├── ClosedError             you closed it (or never opened it)
├── BusyError               two tasks use what one may use
├── WouldBlock              a ``*_nowait`` call could not be served at once
├── BrokenError             the other side broke: a stage task or a device died, everything ends
├── SourceError             the source raised; ``__cause__`` is what it raised
├── FeedbackError           a target came for a frame that is not kept (any more)
├── FailureBudgetExceeded   more frames failed than the run allows; ``__cause__`` is the last failure
└── FrameError              one frame did not make it; carries ``stage``, ``frame`` and ``key``
    ├── InputError          refused at the door: wrong shape, dtype, structure, NaN (also a ValueError)
    ├── StageError          a stage's code raised on this frame; ``__cause__`` is what it raised
    │   └── StageTimeout    the stage took longer than its timeout
    └── FrameShed           given up on purpose
        ├── DeadlineExceeded  its deadline passed before it was computed (also a TimeoutError)
        └── FrameCancelled    whoever asked for it no longer wants it
"""

from __future__ import annotations

from collections.abc import Hashable


class AiotimeError(Exception):
    """Root of all errors raised by aiotime."""


class ConfigurationError(AiotimeError, ValueError):
    """An argument or a combination of arguments cannot work; the message says what would."""


class TraceError(ConfigurationError):
    """The model cannot be cut into layers; the message names the place and the way out."""


class PlanError(ConfigurationError):
    """A plan does not fit the model or the devices it is used with."""


class ClosedError(AiotimeError):
    """The pipeline, run or channel was closed by its owner, or was never opened."""


class BusyError(AiotimeError):
    """Two tasks use at once what only one may use at a time."""


class WouldBlock(AiotimeError):
    """A call that must not wait could not be served at once."""


class BrokenError(AiotimeError):
    """The other side broke: a stage task or a device died and everything that depended on it ends."""


class FeedbackError(AiotimeError, LookupError):
    """A target came for a frame that does not wait for one (any more); the message says why."""


class SourceError(AiotimeError):
    """The source of a run raised; ``__cause__`` holds what it raised."""


class FailureBudgetExceeded(AiotimeError):
    """More frames of a run failed than its failure budget allows; ``__cause__`` is the last failure."""


class FrameError(AiotimeError):
    """One frame did not make it.

    Attributes:
        stage: name of the stage where it happened, ``None`` when it happened at the door.
        frame: index of the frame in its run, ``None`` for a submitted request.
        key: the ``Sample.key`` the frame came with.
    """

    def __init__(
        self,
        message: str,
        *,
        stage: str | None = None,
        frame: int | None = None,
        key: Hashable = None,
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.frame = frame
        self.key = key


class InputError(FrameError, ValueError):
    """A frame was refused at the door; the message says what was expected and what came."""


class StageError(FrameError):
    """A stage's code raised on this frame; ``__cause__`` is the exception it raised."""


class StageTimeout(StageError, TimeoutError):
    """A stage took longer on this frame than its ``timeout``."""


class FrameShed(FrameError):
    """A frame was given up on purpose; it was counted as shed."""


class DeadlineExceeded(FrameShed, TimeoutError):
    """The frame's deadline passed before it was computed."""


class FrameCancelled(FrameShed):
    """Whoever asked for this frame no longer wants it."""

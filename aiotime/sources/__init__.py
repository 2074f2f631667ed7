"""Sources: things that yield frames as tensors, from files, cameras and pipes.

    Video       a video file or a network stream       video.py       blocking, key = seconds since its start
    Webcam      a camera of this machine               video.py       blocking, key = seconds since its start
    Folder      the pictures of a folder               folder.py      blocking, key = file name
    Recording   raw, .npy or JSON lines in a file      recording.py   blocking
    Stdin       the same from a pipe                   recording.py   asynchronous
    Conform     a picture -> what the model takes      conform.py

Each is iterable, so a pipeline takes it as it is; a blocking one is pulled on a thread. Each knows its ``length``
(None where it cannot be known) and whether it is ``live`` (it never waits for a slow consumer).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from aiotime.errors import ConfigurationError
from aiotime.sources.conform import Conform
from aiotime.sources.folder import Folder
from aiotime.sources.parsing import FORMATS
from aiotime.sources.recording import Recording, Stdin
from aiotime.sources.video import Video, Webcam

__all__ = ["Conform", "Folder", "Recording", "Stdin", "Video", "Webcam", "find"]

RECORDINGS = {".raw": "raw", ".bin": "raw", ".npy": "npy", ".jsonl": "jsonl", ".ndjson": "jsonl"}

Source = Folder | Recording | Stdin | Video | Webcam


def find(what: str | os.PathLike[str], *, example: Any = None, format: str = "auto") -> Source:
    """The source that ``what`` names.

    Args:
        what: ``"-"`` for stdin, a device such as ``"/dev/video0"``, a folder, a file, or a URL that PyAV opens.
        example: a frame as the model takes it; pictures are resized and converted to its shape and dtype.
        format: of stdin and recordings: ``"raw"``, ``"npy"`` or ``"jsonl"``; ``"auto"`` looks at the name or the
            first bytes.

    Raises:
        ConfigurationError: there is no such file, or nothing can be read from it; the message says what would do.
    """
    name = os.fspath(what)
    if format != "auto" and format not in FORMATS:
        raise ConfigurationError(f"format must be 'auto', {', '.join(map(repr, FORMATS))}, not {format!r}")
    if name == "-":
        return Stdin(example=example, format=format)
    if name.startswith("/dev/video"):
        return Webcam(name, example=example)
    if "://" in name:
        return Video(name, example=example)
    path = Path(name)
    if path.is_dir():
        return Folder(path, example=example)
    if not path.exists():
        raise ConfigurationError(
            f"there is no source {name!r}: give a video file, a folder of pictures, a recording "
            f"({', '.join(RECORDINGS)}), a camera such as /dev/video0, a URL, or - for stdin"
        )
    known = RECORDINGS.get(path.suffix.lower())
    if known is not None or format != "auto":
        return Recording(path, example=example, format=format if format != "auto" else str(known))
    return Video(path, example=example)

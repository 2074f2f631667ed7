"""The pictures of a folder as a stream."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aiotime.errors import ConfigurationError, InputError
from aiotime.frame import Sample
from aiotime.sources.conform import Conform
from aiotime.sources.video import require_av, video_stream

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


class Folder:
    """The pictures of a folder, by name (``frame2`` before ``frame10``); iterable again and again.

    Yields a `Sample` a picture: its input is uint8 ``[height, width, 3]``, or what `Conform` makes of it for
    ``example``; its key is the file's name. Only the folder itself is read, not the folders in it.

    Args:
        path: the folder.
        example: a frame as the model takes it; without it all pictures must have one size.

    Raises:
        ConfigurationError: no such folder, no picture in it, or PyAV is not installed.
        InputError: while iterating: a picture cannot be decoded, or its size differs; the message names it.
    """

    live = False

    def __init__(self, path: str | os.PathLike[str], *, example: Any = None) -> None:
        require_av()
        folder = Path(path)
        self.name = str(folder)
        if not folder.is_dir():
            raise ConfigurationError(f"there is no folder {self.name!r}")
        self._files = sorted(
            (file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")),
            key=natural,
        )
        if not self._files:
            raise ConfigurationError(f"the folder {self.name} holds no picture ({', '.join(sorted(PICTURES))})")
        self.length = len(self._files)
        self._conform = None if example is None else Conform(example)

    def __iter__(self) -> Iterator[Sample]:
        first: Tensor | None = None
        for index, file in enumerate(self._files):
            try:
                picture = decode(file, index)
            except InputError as error:  # this picture alone: it takes its place in the order, as a refused frame
                yield Sample(error, key=file.name)
                continue
            if self._conform is not None:
                yield Sample(self._conform(picture), key=file.name)
                continue
            first = picture if first is None else first
            if picture.shape != first.shape:
                raise InputError(
                    f"{file} is {picture.shape[1]}x{picture.shape[0]} and {self._files[0].name} is "
                    f"{first.shape[1]}x{first.shape[0]}; give example=, the frame that all shall be resized to",
                    frame=index,
                    key=file.name,
                )
            yield Sample(picture, key=file.name)


def decode(file: Path, index: int) -> Tensor:
    """The picture in ``file``, uint8 ``[height, width, 3]``; `InputError` names the file that holds none."""
    av = require_av()
    try:
        with av.open(str(file)) as container:
            stream = video_stream(container)
            if stream is not None:
                for frame in container.decode(stream):
                    return torch.from_numpy(frame.to_ndarray(format="rgb24"))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{file} is not a picture that can be decoded: {error}", frame=index, key=file.name) from error
    raise InputError(f"{file} is not a picture that can be decoded", frame=index, key=file.name)


def natural(file: Path) -> list[tuple[int, str]]:
    """A sorting key by which numbers in names count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]

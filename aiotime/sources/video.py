"""Video files, network streams and cameras, decoded by PyAV (extra ``[video]``)."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from aiotime.errors import ConfigurationError, InputError
from aiotime.frame import Sample
from aiotime.sources.conform import Conform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.video.stream import VideoStream

TEXT_ART = {"tty", "bin", "xbin", "adf", "idf"}  # FFmpeg renders any text file as a "video" through these
CAMERAS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}


class Video:
    """The frames of a video file or network stream, in order: iterable again and again.

    Yields a `Sample` a frame: its input is uint8 ``[height, width, 3]`` (red, green, blue), or what `Conform`
    makes of it for ``example``; its key is the frame's time in seconds since the start of the video.
    Decoding blocks: a pipeline pulls it on a thread.

    Args:
        path: a file, or a URL that FFmpeg opens (``rtsp://…``).
        example: a frame as the model takes it.

    Raises:
        ConfigurationError: no such file, no video in it, or PyAV is not installed.
        InputError: while iterating: the data cannot be decoded; the message says after which frame.
    """

    def __init__(self, path: str | os.PathLike[str], *, example: Any = None) -> None:
        self.name = os.fspath(path)
        self.live = "://" in self.name
        self.length: int | None = None  # frames, where the file says so
        self._format: str | None = None
        self._options: dict[str, str] = {}
        self._conform = None if example is None else Conform(example)
        if not self.live:  # looked at once, so that a wrong file is refused here and not by the first frame
            with self._opened() as (_, stream):
                self.length = stream.frames or None

    def __iter__(self) -> Iterator[Sample]:
        import av

        with self._opened() as (container, stream):
            count = 0
            frames = container.decode(stream)
            while True:
                try:
                    frame = next(frames)
                except StopIteration:
                    return
                except (av.FFmpegError, OSError) as error:
                    raise InputError(
                        f"{self.name} cannot be decoded from frame {count} on: {error}", frame=count
                    ) from error
                picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # [height, width, 3]
                key = count if frame.pts is None else round(frame.time, 6)
                yield Sample(picture if self._conform is None else self._conform(picture), key=key)
                count += 1

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        av = require_av()
        try:
            container = av.open(self.name, format=self._format, options=self._options)
        except (av.FFmpegError, OSError) as error:
            raise ConfigurationError(self._why(error)) from error
        with container:
            stream = video_stream(container)
            if stream is None:
                raise ConfigurationError(
                    f"{self.name} holds no video; give a video file (mp4, mkv, avi, …) or a picture"
                )
            yield container, stream

    def _why(self, error: OSError) -> str:
        if isinstance(error, FileNotFoundError):
            return f"there is no file {self.name!r}"
        return f"{self.name} is not a video that FFmpeg can read: {error}"


class Webcam(Video):
    """What a camera sees now. Yields as `Video` does, until it is closed.

    A camera does not wait: run it with ``overflow="latest"`` where the model may be slower than the camera.

    Args:
        device: as the system names it: ``"/dev/video0"`` on Linux.
        example: a frame as the model takes it.
        rate: frames per second asked of the camera; its own default otherwise.
        size: ``(width, height)`` asked of the camera; its own default otherwise.
        format: FFmpeg's name of the capture interface; that of this system otherwise.

    Raises:
        ConfigurationError: the camera cannot be opened; the message says why.
    """

    def __init__(
        self,
        device: str = "/dev/video0",
        *,
        example: Any = None,
        rate: float | None = None,
        size: tuple[int, int] | None = None,
        format: str | None = None,
    ) -> None:
        self.name = device
        self.live = True
        self.length = None
        self._format = format or CAMERAS.get(sys.platform, "v4l2")
        self._options = {}
        if rate is not None:
            self._options["framerate"] = f"{rate:g}"
        if size is not None:
            self._options["video_size"] = f"{size[0]}x{size[1]}"
        self._conform = None if example is None else Conform(example)
        with self._opened():
            pass  # refuse a camera that is not there now, not at the first frame

    def _why(self, error: OSError) -> str:
        if isinstance(error, FileNotFoundError):
            return f"there is no camera {self.name}; `ls /dev/video*` lists those of a Linux machine"
        if isinstance(error, PermissionError):
            return f"this user may not open the camera {self.name}; on Linux it must be in the group 'video'"
        if isinstance(error, BlockingIOError) or error.errno == 16:
            return f"the camera {self.name} is in use by another program"
        return f"the camera {self.name} cannot be opened ({error}); is it a camera?"


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first moving picture in ``container``; cover art of a song is none, nor is text."""
    if container.format.name in TEXT_ART:
        return None
    for stream in container.streams.video:
        if "attached_pic" not in str(stream.disposition).lower():
            stream.thread_type = "AUTO"
            return stream
    return None


def require_av() -> Any:
    """PyAV, or a `ConfigurationError` that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise ConfigurationError('reading video and pictures needs PyAV: pip install "aiotime[video]"') from error
    return av

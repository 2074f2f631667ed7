"""Tests of aiotime.sources: what each source yields, and what it says when there is nothing to yield."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiotime import sources
from aiotime.errors import ConfigurationError, InputError
from aiotime.sources import Conform, Folder, Recording, Stdin, Video, Webcam
from aiotime.sources.parsing import parser, sniff
from aiotime.sources.recording import pollable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Settle

EXAMPLE = torch.zeros(1, 3, 16, 16)


def write_video(path: Path, *, frames: int = 8, width: int = 64, height: int = 48) -> Path:
    """A video at 10 frames a second whose picture k is grey of brightness 20 * k."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = np.full((height, width, 3), min(255, 20 * index), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_picture(path: Path, *, value: int = 100, width: int = 32, height: int = 24) -> Path:
    """A picture of one brightness, written without any package but PyAV."""
    import av

    codec, layout = ("png", "rgb24") if path.suffix == ".png" else ("mjpeg", "yuvj420p")
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream: Any = container.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), value, np.uint8), format="rgb24")
        container.mux(stream.encode(frame.reformat(format=layout)))
        container.mux(stream.encode(None))
    return path


# ---------------------------------------------------------------------------------------------------- Conform


def picture(*, height: int = 8, width: int = 8, channels: int = 3) -> torch.Tensor:
    """Random uint8 [height, width, channels]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (height, width, channels), dtype=torch.uint8, generator=generator)


def test_conform_of_the_same_size_only_reorders_and_scales() -> None:
    """A picture of the model's size becomes [1, C, H, W] in 0..1, exactly."""
    image = picture()
    frame = Conform(torch.zeros(1, 3, 8, 8))(image)
    assert torch.equal(frame, image.permute(2, 0, 1).unsqueeze(0).float() / 255)


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(1, 3, 16, 16),
        torch.zeros(3, 16, 20),
        torch.zeros(1, 1, 5, 7),
        torch.zeros(5, 7),
        torch.zeros(16, 16, 3),
        torch.zeros(1, 16, 16, 3),
        torch.zeros(1, 3, 4, 4, dtype=torch.float16),
        torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_conform_makes_the_shape_and_dtype_of_the_example(example: torch.Tensor, channels: int) -> None:
    """Whatever the picture's size and channels, the frame is like the example and within its range."""
    frame = Conform(example)(picture(height=30, width=21, channels=channels))
    assert frame.shape == example.shape
    assert frame.dtype == example.dtype
    assert frame.is_contiguous()
    assert 0 <= float(frame.min()) <= float(frame.max()) <= (255 if example.dtype == torch.uint8 else 1)


def test_conform_resizes_as_torch_does() -> None:
    """The resizing is torch's antialiased bilinear one, to within the rounding of 8 bits."""
    image = picture(height=64, width=48)
    frame = Conform(EXAMPLE)(image)
    whole = image.permute(2, 0, 1).unsqueeze(0).float() / 255
    expected = torch.nn.functional.interpolate(whole, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(frame, expected, atol=1.5 / 255, rtol=0)


def test_conform_to_grey_weighs_the_colours() -> None:
    """Three channels become one by their luma."""
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).expand(8, 8, 3)
    assert float(Conform(torch.zeros(1, 1, 8, 8))(green).mean()) == pytest.approx(0.587, abs=0.003)


def test_conform_keeps_the_structure_of_the_example() -> None:
    """A tuple or dict with one tensor gets a tuple or dict."""
    (frame,) = Conform((EXAMPLE,))(picture())
    assert frame.shape == EXAMPLE.shape
    assert Conform({"image": EXAMPLE})(picture())["image"].shape == EXAMPLE.shape


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\)"),
        (torch.zeros(1, 5, 8, 8), r"\[1, C, H, W\]"),
        (torch.zeros(4), "pictures fit"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
        ((EXAMPLE, EXAMPLE), "one tensor"),
        ({"a": EXAMPLE, "b": EXAMPLE}, "'a': float32"),
    ],
)
def test_conform_refuses_what_no_picture_can_become(example: Any, message: str) -> None:
    """The error says what came, what would fit, and the way out."""
    with pytest.raises(ConfigurationError, match=message):
        Conform(example)


def test_conform_refuses_what_is_no_picture() -> None:
    """A float tensor is not taken for a picture."""
    with pytest.raises(ConfigurationError, match="uint8"):
        Conform(EXAMPLE)(torch.zeros(8, 8, 3))


# ---------------------------------------------------------------------------------------------------- Video


def test_video_yields_its_pictures_in_order_with_their_times(tmp_path: Path) -> None:
    """Every frame, as uint8 [height, width, 3], keyed by its seconds; the length is known."""
    video = Video(write_video(tmp_path / "clip.mp4"))
    samples = list(video)
    assert video.length == 8
    assert not video.live
    assert [sample.key for sample in samples] == pytest.approx([0.1 * k for k in range(8)])
    assert {tuple(sample.input.shape) for sample in samples} == {(48, 64, 3)}
    assert [float(s.input.float().mean()) for s in samples] == pytest.approx([20 * k for k in range(8)], abs=3)
    assert len(list(video)) == 8, "a second iteration begins anew"


def test_video_conforms_to_the_example(tmp_path: Path) -> None:
    """With an example the frames are what the model takes."""
    frames = [sample.input for sample in Video(write_video(tmp_path / "clip.mp4"), example=EXAMPLE)]
    assert {(frame.shape, frame.dtype) for frame in frames} == {(EXAMPLE.shape, torch.float32)}
    assert float(frames[5].mean()) == pytest.approx(100 / 255, abs=0.02)


def test_video_left_early_closes_its_file(tmp_path: Path) -> None:
    """Closing the iterator closes the file behind it."""
    path = write_video(tmp_path / "clip.mp4")
    iterator: Any = iter(Video(path))
    next(iterator)
    opened = set(open_files())
    assert str(path) in opened
    iterator.close()
    assert str(path) not in set(open_files())


def open_files() -> Iterator[str]:
    """Paths of the files this process has open."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    for link in folder.iterdir():
        try:
            yield str(link.readlink())
        except OSError:
            continue  # the descriptor of the listing itself


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 200, bytes(range(256)) * 40])
def test_what_is_not_a_video_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    """An empty file, a text and noise are refused when the source is made, not by the first frame."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"notes\.txt"):
        Video(path)


def test_a_song_with_a_cover_is_no_video(tmp_path: Path) -> None:
    """Sound alone is refused: the message says that there is no video in the file."""
    import av

    path = tmp_path / "song.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ConfigurationError, match="holds no video"):
        Video(path)


def test_a_missing_file_is_named() -> None:
    """No such file: the message says so, from `find` and from the source itself."""
    with pytest.raises(ConfigurationError, match=r"nowhere\.mp4"):
        Video("nowhere.mp4")
    with pytest.raises(ConfigurationError, match=r"nowhere\.mp4.*stdin"):
        sources.find("nowhere.mp4")


def test_a_video_that_breaks_off_gives_what_can_be_decoded(tmp_path: Path) -> None:
    """Damage in the middle: either decoded around or an InputError that says where, never a hang or a crash."""
    path = write_video(tmp_path / "clip.avi", frames=20)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = os.urandom(400)
    path.write_bytes(bytes(data))
    seen, errors = 0, []
    try:
        for _ in Video(path):
            seen += 1
    except InputError as error:
        errors.append(str(error))
    assert all(f"frame {seen}" in error for error in errors)
    assert seen > 0


def test_without_pyav_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyAV is missing, every source that needs it says what to install."""
    monkeypatch.setitem(sys.modules, "av", None)
    for make in (lambda: Video(tmp_path / "clip.mp4"), lambda: Folder(tmp_path), lambda: Webcam("/dev/video0")):
        with pytest.raises(ConfigurationError, match=r"aiotime\[video\]"):
            make()


def test_a_camera_that_is_not_there_is_named() -> None:
    """No such camera: refused when made, by name."""
    with pytest.raises(ConfigurationError, match=r"/dev/video97"):
        Webcam("/dev/video97")
    with pytest.raises(ConfigurationError, match=r"/dev/video97"):
        sources.find("/dev/video97")


def test_a_device_that_is_no_camera_is_refused(tmp_path: Path) -> None:
    """A file in the place of a camera: the message asks whether it is a camera."""
    path = tmp_path / "camera"
    path.write_bytes(b"no camera")
    with pytest.raises(ConfigurationError, match="is it a camera"):
        Webcam(str(path))


# ---------------------------------------------------------------------------------------------------- Folder


def test_folder_goes_by_name_with_numbers_as_numbers(tmp_path: Path) -> None:
    """frame2 comes before frame10; what is no picture, and hidden files, are left out."""
    for number in (10, 2, 1):
        write_picture(tmp_path / f"frame{number}.png", value=number)
    write_picture(tmp_path / "last.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    folder = Folder(tmp_path)
    samples = list(folder)
    assert folder.length == 4
    assert [sample.key for sample in samples] == ["frame1.png", "frame2.png", "frame10.png", "last.jpg"]
    assert [int(sample.input[0, 0, 0]) for sample in samples[:3]] == [1, 2, 10]
    assert samples[0].input.shape == (24, 32, 3)


def test_folder_with_mixed_sizes_needs_an_example(tmp_path: Path) -> None:
    """Without an example the first picture of another size is named; with one all are resized."""
    write_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.png", width=48)
    with pytest.raises(InputError, match=r"b\.png is 48x24 and a\.png is 32x24.*example="):
        list(Folder(tmp_path))
    assert [sample.input.shape for sample in Folder(tmp_path, example=EXAMPLE)] == [EXAMPLE.shape] * 2


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    """An empty folder says which files would count."""
    with pytest.raises(ConfigurationError, match=r"no picture.*\.png"):
        Folder(tmp_path)
    with pytest.raises(ConfigurationError, match="no folder"):
        Folder(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_a_broken_picture_is_named(tmp_path: Path, content: bytes) -> None:
    """What has the name of a picture and is none stands in its place as an error, by name; the rest goes on."""
    write_picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    write_picture(tmp_path / "c.png")
    samples = list(Folder(tmp_path))
    assert [sample.key for sample in samples] == ["a.png", "b.png", "c.png"]
    error = samples[1].input
    assert isinstance(error, InputError) and "b.png" in str(error)
    assert (error.frame, error.key) == (1, "b.png")


# ---------------------------------------------------------------------------------------------------- bytes


def as_npy(array: np.ndarray[Any, Any]) -> bytes:
    """The bytes that numpy.save writes."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def parse(data: bytes, cuts: list[int], *, format: str = "auto", example: Any) -> list[Any]:
    """Samples of ``data`` fed in pieces cut at ``cuts``."""
    frames, samples, start = parser(format, example=example), [], 0
    for end in [*sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]:
        samples += list(frames.feed(data[start:end]))
        start = end
    return samples + list(frames.end())


@given(st.sampled_from(["raw", "npy", "jsonl"]), st.lists(st.integers(0, 10_000), max_size=12), st.booleans())
def test_the_cut_of_the_bytes_does_not_matter(format: str, cuts: list[int], told: bool) -> None:
    """However a pipe cuts the bytes, the frames are the same, told the format or not."""
    example = torch.zeros(1, 6)
    frames = [torch.arange(6.0).reshape(1, 6) / 7 + k for k in range(5)]
    if format == "raw":
        data = b"".join(frame.numpy().tobytes() for frame in frames)
    elif format == "npy":
        data = b"".join(as_npy(frame.numpy()) for frame in frames)
    else:
        data = "\n".join(json.dumps(frame.tolist()) for frame in frames).encode()
    samples = parse(data, cuts, format=format if told else "auto", example=example)
    assert len(samples) == 5
    for sample, frame in zip(samples, frames, strict=True):
        torch.testing.assert_close(sample.input, frame)
        assert sample.input.dtype == torch.float32


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\x93NUMPY\x01\x00", "npy"),
        (b"[[1, 2", "jsonl"),
        (b'  {"input"', "jsonl"),
        (b"[\x00\x01binary", "raw"),
        (np.zeros(4, np.float32).tobytes(), "raw"),
        (b"plain text", "raw"),
        (b"", "raw"),
    ],
)
def test_sniff_is_careful(head: bytes, expected: str) -> None:
    """Only printable text that opens a list or an object is JSON; only numpy's magic is .npy; the rest is raw."""
    assert sniff(head) == expected


def test_raw_frames_cut_off_say_how_much_is_missing() -> None:
    """The whole frames come out; the truncated last one is an error with bytes and the expected shape."""
    example, samples = torch.zeros(1, 4), []
    frames = parser("raw", example=example)
    samples += list(frames.feed(bytes(16 + 10)))
    with pytest.raises(InputError, match=r"within frame 1: 10 of 16 bytes.*float32 \[1, 4\]"):
        frames.end()
    assert len(samples) == 1


def test_raw_frames_need_an_example() -> None:
    """There is no size to cut by, or no single tensor to fill."""
    with pytest.raises(ConfigurationError, match="example="):
        parser("raw", example=None)
    with pytest.raises(ConfigurationError, match="jsonl"):
        parser("raw", example=(EXAMPLE, EXAMPLE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_raw_frames_of_any_dtype(dtype: torch.dtype) -> None:
    """Bytes are taken as the example's dtype, and frames do not share memory."""
    example = torch.ones(2, 3).to(dtype)
    data = example.view(torch.uint8).numpy().tobytes() * 2
    first, second = parse(data, [], format="raw", example=example)
    first.input.zero_()
    assert torch.equal(second.input, example)


def test_npy_arrays_are_fitted_to_the_example() -> None:
    """A missing leading 1, another float type or byte order, Fortran order, a uint8 picture: all become frames."""
    example = torch.zeros(1, 3, 4, 4)
    values = np.arange(48, dtype=np.float64).reshape(3, 4, 4)
    arrays = [values, np.asfortranarray(values), values.astype(">f4"), values[None]]
    for sample in parse(b"".join(map(as_npy, arrays)), [], example=example):
        assert torch.equal(sample.input, torch.from_numpy(values).float().unsqueeze(0))
    (sample,) = parse(as_npy(np.full((9, 7, 3), 255, np.uint8)), [], example=example)
    assert torch.equal(sample.input, torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2)), r"expected float32 \[1, 4\]"),
        (np.zeros((1, 4), np.int32), "int32"),
        (np.array([{}], dtype=object), "pickled"),
        (np.array(["text"]), "torch lacks"),
    ],
)
def test_npy_arrays_that_do_not_fit(array: np.ndarray[Any, Any], message: str) -> None:
    """The error counts arrays and says what was expected."""
    data = as_npy(np.zeros((1, 4))) + as_npy(array)
    with pytest.raises(InputError, match=rf"array 1 .*{message}"):
        parse(data, [], example=torch.zeros(1, 4))


def test_npy_arrays_cut_off_or_damaged() -> None:
    """A cut array and bytes that are none are told apart."""
    whole = as_npy(np.zeros((1, 4), np.float32))
    with pytest.raises(InputError, match="array 1 was cut off"):
        parse(whole + whole[:-3], [], example=torch.zeros(1, 4))
    with pytest.raises(InputError, match="array 1 does not begin"):
        parse(whole + b"something else", [], example=torch.zeros(1, 4))


def test_json_lines_of_every_structure() -> None:
    """Bare lists, keyed objects, tuples and dicts; empty lines are passed over; integers take the example's dtype."""
    first, second = parse(b'[[1, 2]]\n\n{"input": [[3, 4]], "key": ["a", 1]}\n', [], example=torch.zeros(1, 2))
    assert torch.equal(first.input, torch.tensor([[1.0, 2.0]]))
    assert second.key == '["a", 1]'
    pair = (torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    (sample,) = parse(b"[[0.5], [7]]", [], example=pair)
    assert torch.equal(sample.input[0], torch.tensor([0.5]))
    assert torch.equal(sample.input[1], torch.tensor([7]))
    named = {"input": torch.zeros(1), "mask": torch.zeros(1)}
    (sample,) = parse(b'{"input": [1], "mask": [0]}', [], example=named)
    assert set(sample.input) == {"input", "mask"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[[1, 2]", "not JSON"),
        ('[["a", "b"]]', "does not hold float32"),
        ("[[1], [2, 3]]", "does not hold float32"),
        ('{"other": 1}', "does not hold float32"),
    ],
)
def test_a_bad_json_line_is_named_after_the_good_ones(line: str, message: str) -> None:
    """It stands in its place as an error with the line's number; the lines around it come out."""
    frames = list(parser("jsonl", example=torch.zeros(1, 2)).feed(f"[[1, 2]]\n\n{line}\n[[3, 4]]\n".encode()))
    assert torch.equal(frames[0].input, torch.tensor([[1.0, 2.0]]))
    assert isinstance(frames[1].input, InputError)
    assert re.search(rf"line 3 .*{message}", str(frames[1].input))
    assert torch.equal(frames[2].input, torch.tensor([[3.0, 4.0]]))


def test_recordings_are_read_again_and_again(tmp_path: Path) -> None:
    """A file of any format, found by its name or its first bytes."""
    example = torch.zeros(1, 2)
    (tmp_path / "frames.raw").write_bytes(bytes(8 * 3))
    (tmp_path / "frames.npy").write_bytes(as_npy(np.zeros((1, 2), np.float32)))
    (tmp_path / "frames.jsonl").write_text("[[1, 2]]\n[[3, 4]]\n")
    (tmp_path / "unnamed").write_text("[[1, 2]]\n[[3, 4]]\n")
    counts = {"frames.raw": 3, "frames.npy": 1, "frames.jsonl": 2}
    for name, count in counts.items():
        found = sources.find(tmp_path / name, example=example)
        assert isinstance(found, Recording)
        assert [len(list(found)) for _ in range(2)] == [count, count]
    assert len(list(Recording(tmp_path / "unnamed", example=example))) == 2
    found = sources.find(tmp_path / "unnamed", example=example, format="jsonl")
    assert isinstance(found, Recording)
    assert len(list(found)) == 2


def test_find_tells_sources_apart(tmp_path: Path) -> None:
    """Folder, video, URL and stdin by what they are; a wrong format is refused."""
    write_picture(tmp_path / "a.png")
    assert isinstance(sources.find(tmp_path), Folder)
    assert isinstance(sources.find(write_video(tmp_path / "clip.mp4")), Video)
    assert sources.find("rtsp://camera.invalid/stream").live
    with pytest.raises(ConfigurationError, match="'jsonl'"):
        sources.find(tmp_path, format="yaml")


# ---------------------------------------------------------------------------------------------------- stdin


@pytest.mark.asyncio
async def test_stdin_reads_a_pipe_as_it_is_written(settle: Settle) -> None:
    """A frame comes out as soon as its line is there, long before the pipe ends."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file:
        frames = aiter(Stdin(example=torch.zeros(1, 2), file=file))
        first = asyncio.ensure_future(anext(frames))
        await settle()
        assert not first.done()
        os.write(write, b"[[1, 2]]\n[[3,")
        assert torch.equal((await first).input, torch.tensor([[1.0, 2.0]]))
        os.write(write, b" 4]]")
        os.close(write)
        assert [float(sample.input.sum()) async for sample in frames] == [7.0]


@pytest.mark.asyncio
async def test_stdin_cancelled_while_it_waits_lets_go(settle: Settle) -> None:
    """Waiting for a silent pipe is cancelled at once, and the descriptor is as it was."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file, os.fdopen(write, "wb"):
        waiting = asyncio.ensure_future(anext(aiter(Stdin(example=torch.zeros(1), file=file))))
        await settle()
        assert not os.get_blocking(read)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert os.get_blocking(read)


@pytest.mark.asyncio
async def test_stdin_woken_for_nothing_waits_on(monkeypatch: pytest.MonkeyPatch, settle: Settle) -> None:
    """Another reader of the pipe was quicker: no byte is there, and the loop is not blocked by reading."""

    async def wakes_for_nothing(_: int) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr("aiotime.sources.recording.readable", wakes_for_nothing)
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file:
        frames = aiter(Stdin(example=torch.zeros(1), file=file))
        waiting = asyncio.ensure_future(anext(frames))
        await settle()
        assert not waiting.done()
        os.write(write, b"[7]\n")
        os.close(write)
        assert float((await waiting).input) == 7.0
        await frames.aclose()


@pytest.mark.asyncio
async def test_stdin_reads_files_and_memory_too(tmp_path: Path) -> None:
    """A redirected file and a file in memory, which no loop can wait for, are read all the same."""
    data = torch.ones(3, 2).numpy().tobytes()
    path = tmp_path / "frames"
    path.write_bytes(data)
    with path.open("rb") as file:
        assert not pollable(file.fileno())
        assert len([s async for s in Stdin(example=torch.zeros(2), format="raw", file=file)]) == 3
    assert len([s async for s in Stdin(example=torch.zeros(2), file=io.BytesIO(data))]) == 3
    assert [s async for s in Stdin(example=torch.zeros(2), file=io.BytesIO(b""))] == []


@pytest.mark.asyncio
async def test_stdin_cut_off_says_so_after_the_whole_frames() -> None:
    """The frames before the cut come out first."""
    seen = 0
    with pytest.raises(InputError, match="within frame 2"):
        async for _ in Stdin(example=torch.zeros(2), format="raw", file=io.BytesIO(bytes(20))):
            seen += 1
    assert seen == 2


@pytest.mark.asyncio
async def test_stdin_is_read_once() -> None:
    """A pipe cannot be begun anew."""
    source = Stdin(example=torch.zeros(2), file=io.BytesIO(b""))
    aiter(source)
    with pytest.raises(ConfigurationError, match="once"):
        aiter(source)


def test_a_terminal_is_no_source() -> None:
    """Reading frames from a keyboard is refused, with the way to pipe."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    with (
        os.fdopen(leader, "rb"),
        os.fdopen(follower, "rb") as file,
        pytest.raises(ConfigurationError, match="terminal"),
    ):
        Stdin(example=torch.zeros(1), file=file)

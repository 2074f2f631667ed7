"""The streams of the study, each the same for the same seeds, in every process.

    digits           scikit-learn's 8x8 digits, shuffled, pass after pass: neighbours are unrelated
    digits-smooth    a digit turns into another one of its class within 16 frames, then the scene cuts to the next pair
    digits-replay    digits, and each frame is a window of the newest 16
    phishing, bananas, image-segments, trump-approval    real streams that come with river, in their own order
    video-place      a window pans over two photographs: which photograph, which quadrant?
    video-next       the same: what does the next frame show?

Members (seeds) run side by side, see `benchmarks.learning.nets`. Streams with an order of their own are the same for
all members, whose first weights differ; the others differ in everything. Scene cuts fall on the same frames for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch.nn import functional

import aiotime
from benchmarks.learning.nets import Task

WINDOW = 16  # rows of a replay window
CLIP = 32  # frames between two cuts of the video
SIDE = 16  # of a video frame


@dataclass(frozen=True, slots=True)
class Stream:
    """Frames with their targets.

    Args:
        frames: (N, members, rows, features) or (N, 1, members x channels, height, width).
        targets: (N, members, rows), (N, members, rows, values) or pictures as the frames.
        task: what is to be learned; members: how many ride side by side.
        scene: frames from cut to cut; 0: no cuts.
    """

    frames: torch.Tensor
    targets: torch.Tensor
    task: Task
    members: int
    scene: int = 0

    def __len__(self) -> int:
        return len(self.frames)

    def samples(self, *, cuts: bool = False) -> list[aiotime.Sample]:
        """What a pipeline is fed with; ``cuts``: scene cuts are marked."""
        scene = self.scene if cuts else 0
        return [
            aiotime.Sample(frame, target, cut=bool(scene) and at > 0 and at % scene == 0)
            for at, (frame, target) in enumerate(zip(self.frames, self.targets, strict=True))
        ]


# ---------------------------------------------------------------------- digits


@cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)  # (1797, 64), (1797,)


def _side_by_side(ones: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, features) and (N,) per member ─▶ (N, E, 1, features) and (N, E, 1)."""
    return torch.stack([x for x, _ in ones], 1)[:, :, None], torch.stack([y for _, y in ones], 1)[:, :, None]


def digits(frames: int, seeds: Sequence[int]) -> Stream:
    """Each pass is a new permutation of all 1,797."""
    images, labels = _digits()

    def one(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        chance = torch.Generator().manual_seed(seed)
        passes = [torch.randperm(len(images), generator=chance) for _ in range(math.ceil(frames / len(images)))]
        order = torch.cat(passes)[:frames]
        return images[order], labels[order]

    x, y = _side_by_side([one(seed) for seed in seeds])
    return Stream(x, y, Task("classes", (64,), (10,)), len(seeds))


def smooth(frames: int, seeds: Sequence[int], *, per_digit: int = 16) -> Stream:
    """Scenes of ``per_digit`` frames: frame j is (1 - j/n) a + (j/n) b, where a and b are digits of one class.

    a is drawn from all, b from those of its class; the label is that class. So within a scene the frames are alike
    and the answer is the same, and at a cut both change. ``per_digit=1``: digits drawn independently.
    """
    images, labels = _digits()
    of_class = [torch.nonzero(labels == digit)[:, 0] for digit in range(10)]

    def one(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        chance = torch.Generator().manual_seed(seed)
        scenes = math.ceil(frames / per_digit)
        first = torch.randint(len(images), (scenes,), generator=chance)
        alike = [of_class[int(labels[a])] for a in first]
        second = torch.stack([some[torch.randint(len(some), (), generator=chance)] for some in alike])
        share = (torch.arange(per_digit) / per_digit)[None, :, None]  # (1, n, 1)
        blends = (1 - share) * images[first][:, None] + share * images[second][:, None]  # (scenes, n, 64)
        return blends.flatten(0, 1)[:frames], labels[first].repeat_interleave(per_digit)[:frames]

    x, y = _side_by_side([one(seed) for seed in seeds])
    return Stream(x, y, Task("classes", (64,), (10,)), len(seeds), scene=per_digit)


def replayed(frames: int, seeds: Sequence[int]) -> Stream:
    """Frame t is the window of digits t-15 … t, the newest last, whose row alone counts for the score.

    As PARTIME's experiment D has it, and `aiotime.learning.replay`: one new sample a frame, all rows learned from.
    """
    plain = digits(frames + WINDOW - 1, seeds)
    rows = plain.frames[:, :, 0].unfold(0, WINDOW, 1).transpose(2, 3).contiguous()  # (N, E, rows, features)
    targets = plain.targets[:, :, 0].unfold(0, WINDOW, 1).contiguous()  # (N, E, rows)
    return Stream(rows, targets, plain.task, len(seeds))


# ---------------------------------------------------------------------- river


class Running:
    """Mean and deviation of what came so far (Welford's recurrence); the present value counts."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` by the statistics so far."""
        deviation = (self.squares / max(1, self.count)).sqrt()
        return (x - self.mean) / torch.where(deviation > 0, deviation, 1.0)

    def add(self, x: torch.Tensor) -> None:
        """One more."""
        self.count += 1
        before = x - self.mean
        self.mean = self.mean + before / self.count
        self.squares = self.squares + before * (x - self.mean)


@cache
def _river(name: str, frames: int) -> tuple[torch.Tensor, list[Any]]:
    """Features (N, F), standardised online, and targets as river gives them."""
    from river import datasets

    rows, answers, running = [], [], None
    for features, answer in islice(getattr(datasets, name)(), frames):
        x = torch.tensor([float(value) for value in features.values()], dtype=torch.float64)
        running = running or Running(len(x))
        running.add(x)
        rows.append(running.scaled(x))
        answers.append(answer)
    return torch.stack(rows).float(), answers


def labelled(name: str, frames: int, seeds: Sequence[int]) -> Stream:
    """A classification stream of river, in its own order."""
    features, answers = _river(name, frames)
    classes = sorted(set(answers))
    labels = torch.tensor([classes.index(answer) for answer in answers])
    x, y = _side_by_side([(features, labels)] * len(seeds))
    return Stream(x, y, Task("classes", (features.shape[1],), (len(classes),)), len(seeds))


def measured(name: str, frames: int, seeds: Sequence[int]) -> Stream:
    """A regression stream of river; the target in deviations from its running mean, both as of the frame before."""
    features, answers = _river(name, frames)
    running, targets = Running(1), []
    for answer in answers:
        value = torch.tensor([float(answer)], dtype=torch.float64)
        targets.append(running.scaled(value) if running.count > 1 else torch.zeros(1, dtype=torch.float64))
        running.add(value)
    values = torch.stack(targets).float()  # (N, 1)
    members = len(seeds)
    x = features[:, None, None].expand(-1, members, 1, -1).contiguous()
    y = values[:, None, None].expand(-1, members, 1, -1).contiguous()
    return Stream(x, y, Task("values", (features.shape[1],), (1,)), members)


# ---------------------------------------------------------------------- video


@cache
def _photographs() -> list[torch.Tensor]:
    """scikit-learn's two photographs at half their size: (3, 213, 320), about zero mean and unit deviation."""
    from sklearn.datasets import load_sample_images

    photographs = []
    for photograph in load_sample_images().images:
        x = torch.tensor(photograph, dtype=torch.float32).permute(2, 0, 1)[None] / 255
        photographs.append(((functional.avg_pool2d(x, 2) - 0.5) / 0.25)[0])
    return photographs


def _panned(frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(frames, 3, SIDE, SIDE) pictures and (frames,) places: a window that moves evenly, bounces, and cuts."""
    chance = torch.Generator().manual_seed(seed)
    pictures, places = [], []
    for start in range(0, frames, CLIP):
        which = int(torch.randint(2, (), generator=chance))
        photograph = _photographs()[which]
        room = torch.tensor(photograph.shape[1:]) - 2 * SIDE  # of the upper left corner
        corner = torch.rand(2, generator=chance) * room
        step = (torch.rand(2, generator=chance) - 0.5) * 6  # pixels of the photograph per frame, up to 3
        for _ in range(start, min(start + CLIP, frames)):
            row, column = (int(value) for value in corner.round())
            crop = photograph[:, row : row + 2 * SIDE, column : column + 2 * SIDE]
            pictures.append(functional.avg_pool2d(crop[None], 2)[0])  # half pixels of the frame are seen
            lower, right = (bool(value) for value in corner > room / 2)
            places.append(4 * which + 2 * lower + right)
            step = torch.where((corner + step < 0) | (corner + step > room), -step, step)
            corner = corner + step
    return torch.stack(pictures), torch.tensor(places)


def _video(frames: int, seeds: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per member: (N, 6, SIDE, SIDE) frame before and frame, (N,) places, (N, 3, SIDE, SIDE) next frames."""
    for seed in seeds:
        pictures, places = _panned(frames + 1, seed)
        before = torch.cat([pictures[:1], pictures[:-1]])
        before[::CLIP] = pictures[::CLIP]  # a scene begins at rest
        after = pictures[1:].clone()
        last = torch.arange(frames)[CLIP - 1 :: CLIP]
        after[last] = pictures[last]  # nobody can foresee a cut
        yield torch.cat([before, pictures], 1)[:frames], places[:frames], after


def video_place(frames: int, seeds: Sequence[int]) -> Stream:
    """Which photograph, and which quadrant of it: 8 classes."""
    made = list(_video(frames, seeds))
    x = torch.cat([pair for pair, _, _ in made], 1)[:, None]  # (N, 1, E x 6, SIDE, SIDE)
    y = torch.stack([places for _, places, _ in made], 1)[:, :, None]  # (N, E, 1)
    return Stream(x, y, Task("classes", (6, SIDE, SIDE), (8,)), len(seeds), scene=CLIP)


def video_next(frames: int, seeds: Sequence[int]) -> Stream:
    """The next frame; before a cut, the same frame again."""
    made = list(_video(frames, seeds))
    x = torch.cat([pair for pair, _, _ in made], 1)[:, None]
    y = torch.cat([after for _, _, after in made], 1)[:, None]  # (N, 1, E x 3, SIDE, SIDE)
    return Stream(x, y, Task("values", (6, SIDE, SIDE), (3, SIDE, SIDE)), len(seeds), scene=CLIP)


# ---------------------------------------------------------------------- by name

Maker = Callable[[int, Sequence[int]], Stream]

STREAMS: dict[str, tuple[int, Maker]] = {  # frames of a full run, and what makes it
    "digits": (5_000, digits),
    "digits-smooth": (5_000, smooth),
    "digits-replay": (1_200, replayed),
    "phishing": (1_250, partial(labelled, "Phishing")),
    "bananas": (1_500, partial(labelled, "Bananas")),
    "image-segments": (2_310, partial(labelled, "ImageSegments")),
    "trump-approval": (1_001, partial(measured, "TrumpApproval")),
    "video-place": (1_000, video_place),
    "video-next": (1_000, video_next),
}


def make(name: str, frames: int, seeds: Sequence[int], *, per_digit: int = 16) -> Stream:
    """A stream by its name."""
    if name == "digits-smooth":
        return smooth(frames, seeds, per_digit=per_digit)
    return STREAMS[name][1](frames, seeds)

"""decode → model → post-process: two stages of Python around a detector's network."""

from __future__ import annotations

import zlib
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from benchmarks.peers.works.work import Work

CANDIDATES = 48
OVERLAP = 0.3
Box = tuple[float, float, float, float, float]  # left, top, right, bottom, score


class Decoder:
    """A compressed picture becomes a normalised tensor (1, 3, side, side)."""

    def __init__(self, side: int) -> None:
        self._side = side

    def __call__(self, packed: bytes) -> torch.Tensor:
        """Undo the compression, then the prediction of each pixel from its left neighbour, as PNG does."""
        rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(3, self._side, self._side)
        pixels = np.add.accumulate(rows, axis=2, dtype=np.uint8)
        return torch.from_numpy(pixels).unsqueeze(0).float().sub_(127.5).div_(63.75)


class Detector(nn.Module):
    """A picture becomes a map of scores and offsets: (rows, 5, cells, cells)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.BatchNorm2d(wide), nn.ReLU()]
            layers += [nn.Conv2d(wide, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * channels, 5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 3, side, side) in."""
        made: torch.Tensor = self.layers(x)
        return made


def boxes(cells: torch.Tensor) -> list[Box]:
    """The best boxes that do not overlap, best first; in plain Python, as such code often is."""
    scores, offsets = cells[0, 0].flatten(), cells[0, 1:].flatten(1)
    width = cells.shape[-1]
    best = scores.topk(min(CANDIDATES, scores.numel()))
    chosen: list[Box] = []
    columns = offsets[:, best.indices].T.tolist()
    for score, index, (x, y, w, h) in zip(best.values.tolist(), best.indices.tolist(), columns, strict=True):
        left, top = index % width + x, index // width + y
        box = (left, top, left + 1.5 + abs(w), top + 1.5 + abs(h), score)
        if all(_overlap(box, other) < OVERLAP for other in chosen):
            chosen.append(box)
    return chosen


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return shared / (areas - shared)


def decode(*, quick: bool) -> Work:
    """Pictures come in as bytes and leave as lists of boxes."""
    side, channels = (16, 4) if quick else (128, 16)
    torch.manual_seed(0)
    model = Detector(channels).eval()
    decoder = Decoder(side)
    random = np.random.default_rng(0)
    frames = []
    for _ in range(8):
        coarse = random.integers(0, 256, (3, side // 8 + 1, side // 8 + 1))
        smooth = np.kron(coarse, np.ones((1, 8, 8)))[:, :side, :side] + random.integers(0, 8, (3, side, side))
        pixels = smooth.clip(0, 255).astype(np.uint8)
        differences = np.diff(pixels, axis=2, prepend=np.uint8(0)).astype(np.uint8)
        frames.append(zlib.compress(differences.tobytes()))
    return Work(
        title=f"decode → detector → boxes: {side}×{side} pictures, Python before and after the model",
        kind="mixed",
        whole=[decoder, model, boxes],
        stages=[decoder, model, boxes],
        frames=frames,
        tolerance=1e-3,
    )

"""A video learned frame by frame: what will change until the next frame? Each frame is seen once.

The video is a camera that circles over two photographs (those that come with scikit-learn) and cuts from one to the
other every 150 frames. The network sees the newest two frames and foretells the change to the next one; when that has
come, the prediction is scored and the network learns from it. Two stages learn at the same time, the first of them one
update late. Prints the curve, and how much of the change was foreseen: 0 % is "nothing will move". Needs scikit-learn
and Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn.functional import avg_pool2d, mse_loss

import aiotime
from aiotime.learning import Delayed, prequential

FRAMES, SCENE = 600, 150
SIDE = 32  # pixels of a frame
TURN = 180  # frames for one circle


def photograph(name: str) -> torch.Tensor:
    """Grey, mean 0 and deviation 1: (427, 640)."""
    grey = torch.tensor(load_sample_image(name), dtype=torch.float32).mean(2)
    return (grey - grey.mean()) / grey.std()


def camera() -> Iterator[tuple[torch.Tensor, bool]]:
    """(frame [1, 1, 32, 32], is it the first of a scene?); it moves by one and a half pixels from frame to frame."""
    photographs = [photograph("china.jpg"), photograph("flower.jpg")]
    for t in range(FRAMES):
        angle = 2 * math.pi * t / TURN
        top, left = round(180 + 90 * math.sin(angle)), round(280 + 90 * math.cos(angle))
        view = photographs[t // SCENE % 2][top : top + 2 * SIDE, left : left + 2 * SIDE]
        yield avg_pool2d(view[None, None], 2), t % SCENE == 0


def video() -> Iterator[aiotime.Sample]:
    """Two frames [1, 2, 32, 32] and, as target, the change to the next [1, 1, 32, 32], which has come by then."""
    seen: list[torch.Tensor] = []
    for frame, cut in camera():
        if cut:
            seen = []  # no frame foretells the next scene
        if len(seen) >= 2:
            yield aiotime.Sample(torch.cat(seen[-2:], 1), frame - seen[-1], cut=len(seen) == 2)
        seen.append(frame)


async def main() -> float:
    """The share of the change that was foreseen in the second half."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 1, 1)
    )
    learner = Delayed(loss=mse_loss, optimizer=partial(torch.optim.RMSprop, lr=1e-3), order="1f1b")
    example, devices = torch.zeros(1, 2, SIDE, SIDE), ["cpu:0", "cpu:1"]
    pipeline = aiotime.Pipeline(model, example=example, devices=devices, balance=[2, 3], learner=learner)
    result = await prequential(pipeline, video(), metric="loss", window=100, every=50)
    print(result)
    still = [float(sample.target.square().mean()) for sample in video()]  # the error of "nothing will move"
    half = len(still) // 2
    foreseen = 1 - sum(result.losses[half:]) / sum(still[half:])
    print(f"foreseen of the change, second half: {foreseen:.0%}")
    return foreseen


if __name__ == "__main__":
    aiotime.run(main())

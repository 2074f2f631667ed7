"""A pipeline of functions and modules: decode on two CPU threads, a model, a small post-process on the loop.

The frames are compressed images in which one quadrant is bright. Two frames are decoded at once, and still every
answer comes in the order of the stream. Prints how many quadrants were named rightly, in order.
"""

from __future__ import annotations

import random
import zlib

import torch

import aiotime

QUADRANTS = ["top left", "top right", "bottom left", "bottom right"]


def encode(quadrant: int, *, size: int = 64) -> bytes:
    """A compressed grey image whose ``quadrant`` is brighter than the noise of the rest."""
    image = torch.randint(0, 120, (size, size), dtype=torch.uint8)
    half, row, column = size // 2, quadrant // 2, quadrant % 2
    image[row * half :, column * half :][:half, :half] += 100
    return zlib.compress(image.numpy().tobytes())


def decode(data: bytes) -> torch.Tensor:
    """A float image (1, 1, size, size) between 0 and 1."""
    grey = torch.frombuffer(bytearray(zlib.decompress(data)), dtype=torch.uint8)
    size = int(grey.numel() ** 0.5)
    return grey.reshape(1, 1, size, size) / 255


def name(scores: torch.Tensor) -> str:
    """In words."""
    return QUADRANTS[int(scores.argmax())]


async def main() -> int:
    """Send 200 images through; how many answers are right and in their place."""
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())  # mean brightness of each quadrant
    pipeline = aiotime.Pipeline.from_stages(
        [
            aiotime.Stage(decode, device="cpu:0", workers=2),  # zlib lets go of the GIL: two frames at once
            aiotime.Stage(model, device="cpu:1", name="model"),  # "cuda:0" where there is one
            aiotime.Stage(name, device="inline"),  # microseconds of work: no thread is worth it
        ]
    )
    bright = [random.randrange(4) for _ in range(200)]
    answers: list[str] = [pred.output async for pred in pipeline.run(map(encode, bright))]
    right = sum(answer == QUADRANTS[quadrant] for answer, quadrant in zip(answers, bright, strict=True))
    print(f"quadrants named rightly: {right} of {len(bright)}")
    return right


if __name__ == "__main__":
    aiotime.run(main())

"""Two cameras in one pipeline: merged with their keys kept, paced, and piped through aiostream's operators.

`pipe.take` ends the stream after 40 predictions; that closes the run, the merge and both cameras. Prints what
came from which camera, and how many cameras were closed. Needs the extra [streams] (aiostream, GPL-3.0-or-later).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

import torch
from aiostream import pipe

import aiotime
from aiotime import streams

closed: list[str] = []


async def camera(name: str) -> AsyncIterator[aiotime.Sample]:
    """A camera that never ends; frame n is n everywhere, so that an answer can be checked."""
    number = 0
    try:
        while True:
            yield aiotime.Sample(torch.full((1, 3, 32, 32), float(number)), key=number)
            number += 1
    finally:
        closed.append(name)


async def main() -> dict[str, int]:
    """Take 40 predictions; how many came from each camera."""
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # (1, 3, 32, 32) -> (1, 3)
    pipeline = aiotime.Pipeline(model, example=torch.zeros(1, 3, 32, 32), devices=["cpu:0"])
    cameras = streams.merge(
        door=streams.pace(camera("door"), rate=400.0),  # frames a second
        yard=streams.pace(camera("yard"), rate=400.0),
    )
    closed.clear()
    seen: Counter[str] = Counter()
    async with (cameras | streams.infer(pipeline) | pipe.take(40)).stream() as predictions:
        async for pred in predictions:
            name, number = pred.key  # the source's name, and the key the camera gave
            assert number == seen[name] == round(pred.output.mean().item()), "each camera keeps its order"
            seen[name] += 1
    print(f"predictions: {seen.total()} ({', '.join(f'{name} {count}' for name, count in sorted(seen.items()))})")
    print(f"cameras closed: {len(closed)}")
    return dict(seen)


if __name__ == "__main__":
    aiotime.run(main())

"""The shortest program: a model, a stream, predictions in the order of the stream.

Prints the class and the latency of every tenth frame, and at the end how many predictions came.
"""

from __future__ import annotations

import torch

import aiotime

model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10))
frame = torch.zeros(1, 1, 8, 8)  # one frame, as the model takes it
pipeline = aiotime.Pipeline(model, example=frame, devices=["cpu:0", "cpu:1"])


async def main() -> int:
    """Stream 100 random frames; how many predictions came."""
    count = 0
    source = (torch.rand(1, 1, 8, 8) for _ in range(100))
    async for pred in pipeline.run(source):
        count += 1
        if pred.index % 10 == 0:
            print(f"frame {pred.index}: class {pred.output.argmax().item()}, {pred.latency * 1e3:.2f} ms")
    print(f"predictions: {count}")
    return count


if __name__ == "__main__":
    aiotime.run(main())

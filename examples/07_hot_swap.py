"""New weights while frames are in flight: no frame sees half of them.

The model multiplies twice, by 1 and 1 at first and by 2 and 2 after the swap, in two stages on two threads. Every
frame is a 1, so it comes out as 1 or as 4; a 2 would be a frame that met one old and one new layer. Prints how many
of each there were.
"""

from __future__ import annotations

from collections import Counter

import torch

import aiotime


def multiply_twice() -> torch.nn.Sequential:
    """The model, (64,) -> (64,)."""
    layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(2)]
    for layer in layers:
        torch.nn.init.eye_(layer.weight)
    return torch.nn.Sequential(*layers)


async def main() -> dict[float, int]:
    """Stream 400 frames, swap after 100 (at most depth x stages = 4 are in flight then); how often each output came."""
    devices = ["cpu:0", "cpu:1"]
    pipeline = aiotime.Pipeline(multiply_twice(), example=torch.ones(64), devices=devices, balance="even", depth=2)
    doubled = {key: 2 * weight for key, weight in pipeline.state_dict().items()}  # the model's own keys
    outputs: Counter[float] = Counter()
    async with pipeline:
        async for pred in pipeline.run(torch.ones(400, 64)):
            outputs[pred.output.mean().item()] += 1
            if pred.index == 99:
                await pipeline.load_state_dict(doubled)  # returns when every stage has the new weights
                late = await pipeline.submit(torch.ones(64))
                assert late.output.mean() == 4, "what enters from here on sees the new weights"
    mixed = outputs.total() - outputs[1.0] - outputs[4.0]
    print(f"old weights: {outputs[1.0]} frames, new weights: {outputs[4.0]} frames, a mixture: {mixed} frames")
    return dict(outputs)


if __name__ == "__main__":
    aiotime.run(main())

"""Early exit: a digit leaves the network as soon as one of its blocks is sure enough; the branch is an `if`.

All four exits learn together, 16 digits in flight. Then digits that it has not seen go through; each block takes a
batch of whoever waits there, and they come out as they are ready. Draws the path of one that was hard to early_exit.png
in the current folder (needs the extra [plot]; the digits scikit-learn) and prints what share of the answers was right,
and how many of the four blocks a digit needed.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import aiotime
from aiotime.dynamic import Network, Stage


class Block(nn.Module):
    """[n, 64] to the next [n, 64] and to what it would say, [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.exit = nn.Linear(64, 10)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds to what it was given."""
        h = h + self.layers(h)
        return h, self.exit(h)


class Digits(Network):
    """Four blocks with an exit after each."""

    def __init__(self) -> None:
        self.enough = 2.0  # of the likeliest class; no probability exceeds it, so nothing leaves early
        self.blocks = [Stage(Block(), device="inline", max_batch=16) for _ in range(4)]

    async def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[exits passed, 10]."""
        said = []
        for block in self.blocks:
            h, logits = await block(h)
            said.append(logits)
            if logits.softmax(0).max() > self.enough:
                break
        return torch.stack(said)


def loss(said: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Of all exits alike."""
    return cross_entropy(said, label.expand(len(said)))


async def main(folder: Path = Path()) -> tuple[float, float]:
    """(share of right answers, calls per digit)."""
    torch.manual_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    digits = [aiotime.Sample(x.float() / 16, y) for x, y in zip(images, labels, strict=True)]
    random.Random(0).shuffle(digits)
    training, fresh = digits[:1400], digits[1400:]
    network, adam = Digits(), partial(torch.optim.Adam, lr=3e-3)
    async with network:
        for _ in range(3):
            async for _ in network.learn(training, loss=loss, optimizer=adam, update_per="instance"):
                pass
        network.enough = 0.9
        run = network.run(fresh, max_active_keys=16, ordered=False, paths=True)
        steps = [step async for step in run]
    hard = max(steps, key=lambda step: step.calls)
    print(hard.path)
    assert hard.path is not None
    await asyncio.to_thread(hard.path.draw, folder / "early_exit.png")  # a picture takes time: not on the loop
    print(f"wrote {folder / 'early_exit.png'}")
    right = sum(int(step.output[-1].argmax() == step.target) for step in steps) / len(steps)
    calls = sum(step.calls for step in steps) / len(steps)
    print(f"right: {right:.0%}, calls of the four blocks per digit: {calls:.2f}")
    return right, calls


if __name__ == "__main__":
    aiotime.run(main())

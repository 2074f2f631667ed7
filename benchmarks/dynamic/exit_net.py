"""A residual network with an exit after every block: one that leaves as soon as it is sure, and one without exits.

image ▶ block 0 ─h─▶ block 1 ─h─▶ block 2 ─h─▶ block 3
          └ sure? leave └ sure? leave └ sure? leave └ the last word

Exits beside a network's layers: Teerapittayanon et al. 2016 (BranchyNet, arXiv:1709.01686).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from aiotime.dynamic import Network, Stage

SIDE = 8  # pixels
CHANNELS = 32
CLASSES = 10
POOLS = (8, 8, 4, 2)  # of the exits: pixels that become one; the first exits are the cheapest, and the least sure


class Unit(nn.Module):
    """Two convolutions beside a short cut; at first they add nothing, so that depth does not slow the learning down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[n, channels, 8, 8] to the same."""
        return functional.relu(h + self.layers(h))


class Block(nn.Module):
    """Two units and an exit.

    Args:
        first: it makes its channels from a grey image.
        channels: of every unit.
        pool: pixels, across and down, that become one before its exit.
    """

    def __init__(self, *, first: bool, channels: int, pool: int) -> None:
        super().__init__()
        begin = [nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()] if first else []
        self.body = nn.Sequential(*begin, Unit(channels), Unit(channels))
        self.exit = nn.Sequential(nn.AvgPool2d(pool), nn.Flatten(), nn.Linear((SIDE // pool) ** 2 * channels, CLASSES))

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the next block takes, logits [n, 10])."""
        h = self.body(h)
        return h, self.exit(h)


def blocks(seed: int, *, channels: int = CHANNELS) -> list[Block]:
    """Four of them, the same for the same seed."""
    torch.manual_seed(seed)
    return [Block(first=at == 0, channels=channels, pool=pool) for at, pool in enumerate(POOLS)]


class ExitNet(Network):
    """Images [1, 8, 8] to logits [exits that it passed, 10]; the last row is the answer.

    Args:
        parts: its blocks.
        threshold: the probability of the likeliest class above which an instance leaves; None: all go to the end.
        devices: one for each block.
        max_batch: images that a block takes at once.
    """

    def __init__(
        self, parts: Sequence[Block], *, threshold: float | None = None, devices: Sequence[Any], max_batch: int
    ) -> None:
        self.threshold = threshold
        self.blocks = [
            Stage(block, device=device, max_batch=max_batch) for block, device in zip(parts, devices, strict=True)
        ]

    async def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Leaves early where it may and is sure."""
        h, said = image, []
        for block in self.blocks:
            h, logits = await block(h)
            said.append(logits)
            if self.threshold is not None and confidence(logits) > self.threshold:
                break
        return torch.stack(said)


class WholeNet(Network):
    """The same blocks to the end, without the exits before it: logits [10]."""

    def __init__(self, parts: Sequence[Block], *, devices: Sequence[Any], max_batch: int) -> None:
        last = len(parts) - 1
        modules = [part.body if at < last else nn.Sequential(part.body, part.exit) for at, part in enumerate(parts)]
        self.blocks = [
            Stage(module, device=device, max_batch=max_batch) for module, device in zip(modules, devices, strict=True)
        ]

    async def forward(self, image: torch.Tensor) -> torch.Tensor:
        """From block to block."""
        h = image
        for block in self.blocks:
            h = await block(h)
        return h


class PlainExits(nn.Module):
    """`ExitNet` in plain PyTorch, one image at a time."""

    def __init__(self, parts: Sequence[Block], *, threshold: float | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(parts)
        self.threshold = threshold

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [exits that it passed, 10]."""
        h, said = image.unsqueeze(0), []
        for block in self.blocks:
            h, logits = block(h)
            said.append(logits)
            if self.threshold is not None and confidence(logits) > self.threshold:
                break
        return torch.cat(said)


class PlainWhole(nn.Module):
    """`WholeNet` in plain PyTorch, one image at a time."""

    def __init__(self, parts: Sequence[Block]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(part.body for part in parts), parts[-1].exit)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [10]."""
        logits: torch.Tensor = self.layers(image.unsqueeze(0))
        return logits[0]


def confidence(logits: torch.Tensor) -> float:
    """The probability of the likeliest class."""
    return float(logits.softmax(-1).max())


def loss(said: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, the mean over all exits."""
    return functional.cross_entropy(said, label.expand(len(said)))

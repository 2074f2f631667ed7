"""Two small models, and frames for them."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 256
LAYERS = 12


def perceptron() -> nn.Sequential:
    """12 × (256 wide, ReLU)."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]
    return nn.Sequential(*layers).eval()


def convolutions() -> nn.Sequential:
    """5 convolutions on pictures of 3 × 32 × 32, and a classifier."""
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for inside, outside, stride in ((3, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2), (32, 64, 1)):
        made += [nn.Conv2d(inside, outside, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


NETS = {
    "MLP 256 wide": (perceptron, (1, WIDTH)),
    "conv net 32²": (convolutions, (1, 3, 32, 32)),
}


def frames(shape: tuple[int, ...], number: int) -> list[torch.Tensor]:
    """Different ones."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(shape, generator=generator) for _ in range(number)]

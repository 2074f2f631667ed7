"""The models: small and large layers, convolutions, attention; each an nn.Sequential that can be cut in two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Net:
    """A model with a frame of its stream."""

    name: str
    model: nn.Sequential
    frame: torch.Tensor

    def halves(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Two stages with as many layers each."""
        middle = len(self.model) // 2
        return self.model[:middle].eval(), self.model[middle:].eval()


class Block(nn.Module):
    """A transformer block with causal attention: (1, sequence, width) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention, then two linear layers, each around a skip."""
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.attend(self.before(x)).split(width, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Residual(nn.Module):
    """Two convolutions around a skip: (1, channels, height, width) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ReLU behind the skip."""
        return functional.relu(x + self.other(self.second(functional.relu(self.norm(self.first(x))))))


def nets(*, quick: bool) -> list[Net]:
    """All of them, in eval mode, with fixed weights."""
    torch.manual_seed(0)
    layers, blocks = (4, 2) if quick else (30, 6)

    def linear(width: int) -> nn.Sequential:
        return nn.Sequential(*[each for _ in range(layers) for each in (nn.Linear(width, width), nn.ReLU())])

    found = [
        Net(f"{layers} × (linear 64, ReLU)", linear(64), torch.rand(1, 64)),
        Net(f"{layers} × (linear 256, ReLU)", linear(256), torch.rand(1, 256)),
        Net(
            f"{2 * blocks} residual blocks, 32 channels, 32×32",
            nn.Sequential(*[Residual(32) for _ in range(2 * blocks)]),
            torch.rand(1, 32, 32, 32),
        ),
        Net(
            f"{blocks} GPT blocks, 128 wide, sequence 64",
            nn.Sequential(*[Block(128, 4) for _ in range(blocks)]),
            torch.rand(1, 64, 128),
        ),
    ]
    for net in found:
        net.model.eval()
    return found[:1] if quick else found

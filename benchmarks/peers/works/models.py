"""Networks on a stream at batch 1: small MLPs, a deep convolutional net, a residual one, a stack of GPT-like blocks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers.works.work import Work, halves


def perceptron(layers: int, width: int) -> nn.Sequential:
    """``layers`` times a linear layer and a ReLU."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())))


def convolutions(layers: int, channels: int, *, inputs: int | None = None) -> nn.Sequential:
    """``layers`` times a 5×5 convolution and a ReLU; the size of the picture stays."""
    torch.manual_seed(0)
    widths = [inputs or channels] + [channels] * (layers - 1)
    return nn.Sequential(
        *(layer for width in widths for layer in (nn.Conv2d(width, channels, 5, padding=2), nn.ReLU()))
    )


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norm around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, channels, height, width) in and out."""
        y = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(x + self.second_norm(self.second(y)))


class Block(nn.Module):
    """A transformer block as GPT-2 has it: causal attention and an MLP, each behind a layer norm, each with a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, positions, width) in and out."""
        rows, positions, width = x.shape
        parts = self.queries_keys_values(self.before_attention(x)).chunk(3, -1)
        queries, keys, values = (
            part.view(rows, positions, self.heads, width // self.heads).transpose(1, 2) for part in parts
        )
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).reshape(rows, positions, width))
        hidden: torch.Tensor = self.up(self.before_mlp(x))
        result: torch.Tensor = x + self.down(functional.gelu(hidden))
        return result


def model_work(title: str, model: nn.Sequential, frame: torch.Size | tuple[int, ...], *, layers: int = 1) -> Work:
    """A work of one model; it is cut by hand between groups of ``layers`` children."""
    generator = torch.Generator().manual_seed(1)
    model.eval()
    return Work(
        title=title,
        kind="model",
        whole=[model],
        stages=halves(model, layers=layers),
        frames=list(torch.rand(8, *frame, generator=generator)),
    )


def _mlp(width: int, layers: int, rows: int = 1) -> Work:
    title = f"MLP: {layers} × (linear, ReLU), {width} wide, batch {rows}"
    return model_work(title, perceptron(layers, width), (rows, width), layers=2)


def mlp64(*, quick: bool, width: int = 64, layers: int = 30) -> Work:
    """Small operations: what Python costs."""
    return _mlp(8, 4) if quick else _mlp(width, layers)


def mlp256(*, quick: bool, width: int = 256, layers: int = 30) -> Work:
    """Four times as wide."""
    return _mlp(16, 4) if quick else _mlp(width, layers)


def conv(*, quick: bool, side: int = 64, layers: int = 12, channels: int = 32) -> Work:
    """PARTIME's experiment A, shrunk."""
    side, layers, channels = (8, 4, 4) if quick else (side, layers, channels)
    return model_work(
        f"deep conv: {layers} × (5×5, {channels} channels, ReLU) at {side}×{side}, batch 1",
        convolutions(layers, channels),
        (1, channels, side, side),
        layers=2,
    )


def residual(*, quick: bool) -> Work:
    """Skips within the stages; three sizes of picture."""
    blocks, channels, side = (1, 4, 8) if quick else (3, 32, 64)
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
    for size in range(3):
        if size:
            layers.append(nn.Conv2d(channels << (size - 1), channels << size, 2, stride=2))
        layers.extend(Residual(channels << size) for _ in range(blocks))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels << 2, 10)]
    title = f"residual CNN: {3 * blocks} blocks, {channels} to {channels << 2} channels at {side}×{side}, batch 1"
    return model_work(title, nn.Sequential(*layers), (1, 3, side, side))


def gpt(*, quick: bool) -> Work:
    """What a language model's blocks do with 64 positions."""
    blocks, width, heads, positions = (2, 8, 2, 4) if quick else (6, 128, 4, 64)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
    title = f"GPT-like: {blocks} blocks, {width} wide, {heads} heads, sequence {positions}, batch 1"
    return model_work(title, model, (1, positions, width))

"""Works that learn: forward, backward and Adam on every frame."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.peers.works.models import convolutions, perceptron
from benchmarks.peers.works.work import Work, halves

RATE = 1e-5  # small: after a few frames the outputs are still those of the first weights, to a hundredth

Adam = partial(torch.optim.Adam, lr=RATE, fused=True)  # fused: the fastest of its forms on a CPU


def small(output: torch.Tensor) -> torch.Tensor:
    """A loss without target."""
    return output.square().mean()


def _lesson(title: str, model: torch.nn.Sequential, frame: tuple[int, ...]) -> Work:
    generator = torch.Generator().manual_seed(1)
    model.train()
    return Work(
        title=f"learning, {title}",
        kind="learning",
        whole=[model],
        stages=halves(model, layers=2),
        frames=list(torch.rand(8, *frame, generator=generator)),
        tolerance=0.05,
        loss=small,
        optimizer=Adam,
    )


def learn_mlp(*, quick: bool, width: int = 256, rows: int = 1) -> Work:
    """Forward, backward and Adam of a perceptron."""
    layers, width, rows = (4, 8, 1) if quick else (30, width, rows)
    title = f"MLP: {layers} × (linear, ReLU), {width} wide, batch {rows}: forward, backward, Adam"
    return _lesson(title, perceptron(layers, width), (rows, width))


def learn_conv(*, quick: bool, side: int = 64) -> Work:
    """Forward, backward and Adam of the deep convolutional net."""
    layers, channels, side = (4, 4, 8) if quick else (10, 32, side)
    title = f"deep conv: {layers} × (5×5, {channels} channels, ReLU) at {side}×{side}: forward, backward, Adam"
    return _lesson(title, convolutions(layers, channels), (1, channels, side, side))

"""PARTIME's experiment A (Meloni et al. 2022): stacks of 5×5 convolutions with 32 channels, one frame at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.gpu.place import Place

CHANNELS, KERNEL, COLOURS = 32, 5, 3
FRAMES = 4  # different ones, used in turn
RATE = 1e-6  # of learning; so small that weights, and with them outputs, stay comparable


@dataclass(frozen=True, slots=True)
class Task:
    """One cell of the contest."""

    layers: int
    size: int  # of the square picture
    learns: bool  # forward, backward and update; otherwise forward alone

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.layers} layers, {self.size}², {'forward + backward' if self.learns else 'forward'}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of a frame; a backward costs twice its forward."""
        forward = 2 * self.layers * (CHANNELS * KERNEL) ** 2 * self.size**2
        return float(forward * (3 if self.learns else 1))


# light ones first; time is divided by the size of the picture
TASKS = [Task(layers, size, learns) for size in (256, 1024) for layers in (30, 150) for learns in (False, True)]
TOY_TASKS = [Task(6, 16, False), Task(6, 16, True)]


class Block(nn.Module):
    """A convolution and a ReLU in its memory: one layer."""

    def __init__(self, before: int, after: int, *, last: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, KERNEL, padding=KERNEL // 2)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="linear" if last else "relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, before, size, size) -> (1, after, size, size)."""
        y: torch.Tensor = self.conv(x)
        return y if self.last else torch.relu_(y)


def net(layers: int) -> nn.Sequential:
    """Always the same weights, on the host."""
    torch.manual_seed(0)
    first, middle, last = Block(COLOURS, CHANNELS), range(layers - 2), Block(CHANNELS, 1, last=True)
    return nn.Sequential(first, *(Block(CHANNELS, CHANNELS) for _ in middle), last)


def parts(layers: int, stages: int) -> list[nn.Sequential]:
    """The same net cut into stages of equal depth."""
    blocks = list(net(layers))
    ends = [round(layers * k / stages) for k in range(stages + 1)]
    return [nn.Sequential(*blocks[a:b]) for a, b in itertools.pairwise(ends)]


def frames(task: Task, place: Place) -> list[torch.Tensor]:
    """Pictures in pinned memory."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(FRAMES):
        picture = torch.rand(1, COLOURS, task.size, task.size, generator=generator)
        made.append(place.pinned(picture).copy_(picture))
    return made


def targets(task: Task, place: Place) -> list[torch.Tensor]:
    """What each picture should become, in pinned memory."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(FRAMES):
        target = torch.rand(1, 1, task.size, task.size, generator=generator)
        made.append(place.pinned(target).copy_(target))
    return made


def reference(task: Task, place: Place, picture: torch.Tensor) -> torch.Tensor:
    """What the untouched net says of ``picture``, on the host."""
    with torch.inference_mode():
        model = net(task.layers).to(place.device)
        found: torch.Tensor = model(picture.to(place.device)).cpu()
    return found


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def update(parameters: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    """One step of gradient descent, in place."""
    with torch.no_grad():
        torch._foreach_add_(list(parameters), list(grads), alpha=-RATE)

"""The networks of the study: members that share nothing, one seed each, side by side in the same tensors.

    frame (members, rows, features)  ──▶ 8 layers ──▶ (members, rows, outputs)
    frame (1, members x channels, height, width) ──▶ 8 layers ──▶ (members, 1, classes) or a picture

Five seeds in one pipeline cost little more than one: at these sizes a frame's price is the number of operations. Every
optimizer and correction used here works element by element, the loss is the sum over the members, and the guard that
skips a whole stage's update is off: so each member learns as if it were alone (a test compares the two).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

LAYERS = 8
WIDTH = 64
CHANNELS = 16


@dataclass(frozen=True, slots=True)
class Task:
    """What goes in and comes out, for one member.

    Args:
        kind: "classes": the score is accuracy; "values": R², the share of the variance that is explained.
        inputs: (features,) or (channels, height, width).
        outputs: (classes,), (values,) or (channels, height, width).
    """

    kind: Literal["classes", "values"]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The sum over the members of each one's mean, so that none sees how many there are."""
        if self.kind == "classes":  # (E, rows, classes) and (E, rows)
            rows = target.shape[1]
            return functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum") / rows
        each = (output - target).square()
        if len(self.outputs) == 3:  # (1, E x channels, height, width)
            return each.sum() / torch.Size(self.outputs).numel()
        return each.sum() / (target.shape[1] * target.shape[2])  # (E, rows, values)

    def right(self, outputs: torch.Tensor, targets: torch.Tensor, *, members: int) -> torch.Tensor:
        """(frames, members): was the newest row classified rightly; or its negative mean squared error."""
        if self.kind == "classes":  # (N, E, rows, classes) and (N, E, rows)
            return (outputs[:, :, -1].argmax(-1) == targets[:, :, -1]).float()
        if len(self.outputs) == 3:
            return -(outputs - targets).square().reshape(len(outputs), members, -1).mean(-1)
        return -(outputs[:, :, -1] - targets[:, :, -1]).square().mean(-1)

    def score(self, right: torch.Tensor, targets: torch.Tensor) -> list[float]:
        """Per member: accuracy, or R² no worse than -1 (also where it diverged)."""
        if self.kind == "classes":
            return right.mean(0).tolist()
        spread = targets.reshape(len(targets), right.shape[1], -1)
        variance = spread.var(dim=(0, 2), correction=0)
        return (1 + right.mean(0) / variance).nan_to_num(-1.0).clamp(-1.0, 1.0).tolist()


class MemberLinear(nn.Module):
    """(E, rows, inputs) ↦ (E, rows, outputs), a matrix per member; He's initialisation, or zeros."""

    def __init__(
        self, inputs: int, outputs: int, seeds: Sequence[int], *, place: int, rectify: bool = False, zero: bool = False
    ) -> None:
        super().__init__()
        gain = 0.0 if zero else (2.0 if rectify else 1.0) ** 0.5 / inputs**0.5
        self.weight = nn.Parameter(_drawn((inputs, outputs), seeds, place) * gain)  # (E, inputs, outputs)
        self.bias = nn.Parameter(torch.zeros(len(seeds), 1, outputs))
        self.rectify = rectify

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All members at once."""
        y = torch.baddbmm(self.bias, x, self.weight)
        return y.relu() if self.rectify else y


class MemberConv(nn.Module):
    """(1, E x inputs, h, w) ↦ (1, E x outputs, h / stride, w / stride), filters per member."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        seeds: Sequence[int],
        *,
        place: int,
        size: int = 3,
        stride: int = 1,
        rectify: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__()
        gain = 0.0 if zero else (2.0 if rectify else 1.0) ** 0.5 / (inputs * size * size) ** 0.5
        drawn = _drawn((outputs, inputs, size, size), seeds, place) * gain
        self.weight = nn.Parameter(drawn.flatten(0, 1))
        self.bias = nn.Parameter(torch.zeros(len(seeds) * outputs))
        self.members, self.padding, self.stride, self.rectify = len(seeds), size // 2, stride, rectify

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All members at once, as groups."""
        y = functional.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding, groups=self.members)
        return y.relu() if self.rectify else y


class Pooled(nn.Module):
    """(1, E x channels, h, w) ↦ (E, 1, channels x 4): what a classifier reads of a picture."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.members = members

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Averages of the four quarters."""
        return functional.adaptive_avg_pool2d(x, 2).reshape(self.members, 1, -1)


class Resized(nn.Module):
    """Pictures of another size, by averages."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """To the given size."""
        return functional.adaptive_avg_pool2d(x, self.size)


def network(task: Task, seeds: Sequence[int]) -> nn.Sequential:
    """`LAYERS` layers for ``task``, one member per seed."""
    if len(task.inputs) == 1:
        sizes = [task.inputs[0], *[WIDTH] * (LAYERS - 1), task.outputs[0]]
        return nn.Sequential(
            *(MemberLinear(sizes[at], sizes[at + 1], seeds, place=at, rectify=at < LAYERS - 1) for at in range(LAYERS))
        )
    dense = len(task.outputs) == 3
    layers: list[nn.Module] = [
        MemberConv(
            task.inputs[0] if at == 0 else CHANNELS,
            CHANNELS,
            seeds,
            place=at,
            stride=2 if at == 1 and not dense else 1,
            rectify=True,
        )
        for at in range(LAYERS - 1)
    ]
    if dense:
        layers.append(MemberConv(CHANNELS, task.outputs[0], seeds, place=LAYERS - 1))
    else:
        layers.append(_classifier(CHANNELS, task, seeds, place=LAYERS - 1))
    return nn.Sequential(*layers)


def head(task: Task, seeds: Sequence[int], stage: int, cut: torch.Tensor) -> nn.Module:
    """What guesses the output from ``cut``, which leaves ``stage``: a linear layer, as the default heads have."""
    place = 100 + stage
    if len(task.inputs) == 1:
        return MemberLinear(cut.shape[-1], task.outputs[0], seeds, place=place)
    channels = cut.shape[1] // len(seeds)
    if len(task.outputs) == 3:
        return MemberConv(channels, task.outputs[0], seeds, place=place, size=1)
    return _classifier(channels, task, seeds, place=place)


def aux_net(seeds: Sequence[int], raw: torch.Tensor, like: torch.Tensor) -> nn.Module:
    """What guesses, from the raw frame, the values that cross a boundary; it starts at zero, as the default does."""
    if raw.dim() == 3:
        return MemberLinear(raw.shape[-1], like.shape[-1], seeds, place=0, zero=True)
    channels, size = (raw.shape[1] // len(seeds), like.shape[1] // len(seeds)), (like.shape[2], like.shape[3])
    return nn.Sequential(Resized(size), MemberConv(*channels, seeds, place=0, size=1, zero=True))


def _classifier(channels: int, task: Task, seeds: Sequence[int], *, place: int) -> nn.Module:
    return _Whole(Pooled(len(seeds)), MemberLinear(4 * channels, task.outputs[0], seeds, place=place))


class _Whole(nn.Module):
    """Modules in a row that count as one layer: nobody cuts between them."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x)
        return x


def _drawn(shape: tuple[int, ...], seeds: Sequence[int], place: int) -> torch.Tensor:
    """(E, *shape) normal numbers: a member's depend on its own seed and the layer's place alone."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(1_000 * seed + place)) for seed in seeds]
    )

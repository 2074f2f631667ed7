"""The networks of the study: members that share nothing, one seed each, side by side in the same tensors.

    frame (members, rows, features)  ──▶ layers ──▶ (members, rows, outputs)
    frame (1, members x channels, height, width) ──▶ layers ──▶ (members, 1, classes) or a picture

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

WIDTH = 64
CHANNELS = 16
Law = Literal["torch", "he", "zero"]  # of first weights: nn.Linear's own, He's for rectified layers, none


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
    """(E, rows, inputs) ↦ (E, rows, outputs), a matrix per member."""

    def __init__(
        self, inputs: int, outputs: int, seeds: Sequence[int], *, place: int, law: Law = "torch", rectify: bool = False
    ) -> None:
        super().__init__()
        weight, bias = _first((outputs, inputs), seeds, place, law)
        self.weight = nn.Parameter(weight.mT.contiguous())  # (E, inputs, outputs)
        self.bias = nn.Parameter(bias[:, None])  # (E, 1, outputs)
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
        law: Law = "torch",
        size: int = 3,
        stride: int = 1,
        rectify: bool = False,
    ) -> None:
        super().__init__()
        weight, bias = _first((outputs, inputs, size, size), seeds, place, law)
        self.weight = nn.Parameter(weight.flatten(0, 1))  # (E x outputs, inputs, size, size)
        self.bias = nn.Parameter(bias.flatten())
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


def network(task: Task, seeds: Sequence[int], *, layers: int, law: Law = "torch") -> nn.Sequential:
    """So many layers for ``task``, one member per seed."""
    top = layers - 1
    if len(task.inputs) == 1:
        sizes = [task.inputs[0], *[WIDTH] * top, task.outputs[0]]
        return nn.Sequential(
            *(
                MemberLinear(sizes[at], sizes[at + 1], seeds, place=at, law=law, rectify=at < top)
                for at in range(layers)
            )
        )
    dense = len(task.outputs) == 3
    stack: list[nn.Module] = [
        MemberConv(
            task.inputs[0] if at == 0 else CHANNELS,
            CHANNELS,
            seeds,
            place=at,
            law=law,
            stride=2 if at == 1 and not dense else 1,
            rectify=True,
        )
        for at in range(top)
    ]
    if dense:
        stack.append(MemberConv(CHANNELS, task.outputs[0], seeds, place=top, law=law))
    else:
        stack.append(_classifier(CHANNELS, task, seeds, place=top))
    return nn.Sequential(*stack)


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
        return MemberLinear(raw.shape[-1], like.shape[-1], seeds, place=0, law="zero")
    channels, size = (raw.shape[1] // len(seeds), like.shape[1] // len(seeds)), (like.shape[2], like.shape[3])
    return nn.Sequential(Resized(size), MemberConv(*channels, seeds, place=0, size=1, law="zero"))


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


def _first(shape: tuple[int, ...], seeds: Sequence[int], place: int, law: Law) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (E, *shape) and biases (E, outputs): a member's depend on its own seed and the layer's place alone."""
    members = len(seeds)
    fan_in = torch.Size(shape[1:]).numel()
    if law == "zero":
        return torch.zeros(members, *shape), torch.zeros(members, shape[0])
    chances = [torch.Generator().manual_seed(1_000 * seed + place) for seed in seeds]
    if law == "he":
        weights = torch.stack([torch.randn(shape, generator=chance) for chance in chances])
        return weights * (2 / fan_in) ** 0.5, torch.zeros(members, shape[0])
    bound = fan_in**-0.5  # as nn.Linear and nn.Conv2d have it
    drawn = [(torch.rand(shape, generator=chance), torch.rand(shape[0], generator=chance)) for chance in chances]
    weights, biases = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return (2 * weights - 1) * bound, (2 * biases - 1) * bound

"""Handwritten digits: the data, a small CNN and its training, for ``aiotime demo``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

HELD_BACK = 450  # of 1,797 digits; no training step sees them
EPOCHS = 3
BATCH = 64
HALVES = (10, 19)  # layers of the two stages that have about as much to multiply
LEARNING_RATE = 4e-3  # the peak of one cycle


@dataclass(frozen=True, slots=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` in 0..1 and labels ``[N]``, shuffled with a fixed seed and split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def frame(self, index: int) -> Tensor:
        """Held-back digit ``index`` as a frame, ``[1, 1, 8, 8]``."""
        return self.test_images[index : index + 1]


def load(*, seed: int) -> Digits:
    """scikit-learn's load_digits; it comes with the package, nothing is downloaded."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise click.UsageError('the demo needs scikit-learn: pip install "aiotime[demo]"') from error
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    cut = len(images) - HELD_BACK
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


def build() -> nn.Sequential:
    """A CNN of 186,000 weights and about 105 million multiplications a frame: heavy enough to be worth cutting.

    [1, 1, 8, 8] -> enlarged to 32 x 32 -> 4 convolutions -> 16 x 16 -> 4 convolutions -> [1, 10] logits
    """

    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU()]

    return nn.Sequential(
        nn.Upsample(scale_factor=4, mode="bilinear"),  # [1, 1, 32, 32]
        *block(1),
        *block(32),
        *block(32),
        *block(32),
        nn.MaxPool2d(2),  # [1, 32, 16, 16]
        *block(32),
        *block(32),
        *block(32),
        *block(32),
        nn.MaxPool2d(4),  # [1, 32, 4, 4]
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def fit(digits: Digits, *, seed: int, progress: Callable[[int, int], None]) -> nn.Sequential:
    """Train on the part that is not held back, with all the threads torch has.

    Args:
        digits: the data.
        seed: of the weights and of the order of the batches.
        progress: called with the steps done and the steps in all.
    """
    torch.manual_seed(seed)
    model = build()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # faster on a CPU; the stream keeps it
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    count = len(digits.train_images)
    steps = EPOCHS * -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for step, batch in enumerate(batches(count, seed=seed)):
        loss = nn.functional.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step + 1, steps)
    return model.eval()


def batches(count: int, *, seed: int) -> Iterator[Tensor]:
    """Indices of each step's samples: every epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(count, generator=generator)
        yield from (order[first : first + BATCH] for first in range(0, count, BATCH))

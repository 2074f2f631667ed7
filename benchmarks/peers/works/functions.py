"""Stages that are plain functions: what handing on costs, and what it gains where a stage lets go of Python's lock."""

from __future__ import annotations

import torch

from benchmarks.peers.works.work import Part, Work

SIDE = 160  # a product of two 160 x 160 matrices: about 0.12 ms on one core, without Python's lock


def add_one(x: torch.Tensor) -> torch.Tensor:
    """Next to nothing."""
    return x + 1


def trivial(*, quick: bool, stages: int = 4) -> Work:
    """One addition to 16 floats: all that is left is the handing on."""
    generator = torch.Generator().manual_seed(0)
    parts: list[Part] = [add_one] * stages
    return Work(
        title=f"{stages} trivial stages: x + 1 on 16 floats",
        kind="functions",
        whole=parts,
        stages=parts,
        frames=list(torch.rand(8, 1, 16, generator=generator)),
    )


class Turn:
    """x @ w with an orthogonal w, so that values stay as large as they were however many stages there are."""

    def __init__(self, weights: torch.Tensor) -> None:
        self._weights = weights

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(1, n, n) in, (1, n, n) out; the product is computed without Python's lock."""
        return x @ self._weights


def released(*, quick: bool, stages: int = 4, side: int | None = None) -> Work:
    """One matrix product per stage."""
    side = side or (8 if quick else SIDE)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.linalg.qr(torch.randn(side, side, generator=generator))[0].contiguous() for _ in range(stages)]
    parts: list[Part] = [Turn(weight) for weight in weights]
    return Work(
        title=f"{stages} stages of about 0.12 ms without Python's lock: a product of two {side} x {side} matrices",
        kind="functions",
        whole=parts,
        stages=parts,
        frames=list(torch.randn(8, 1, side, side, generator=generator)),
    )

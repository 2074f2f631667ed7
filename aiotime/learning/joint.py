"""Joint: what stands between two blocks: an auxiliary variable λ for each tensor that crosses, and its multiplier κ.

block below ── x⁻ ──▶ ⋮ ◀── β/2‖λ - x⁻‖² + κᵀ(λ - x⁻) ──▶ ⋮ λ ──▶ block above
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

Tensors = list[torch.Tensor | None]  # one entry per tensor that crosses a boundary; None where there is no λ


@contextmanager
def plain() -> Iterator[None]:
    """Arithmetic without a graph, on ordinary tensors, whatever mode the thread is in."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


class Joint:
    """λ and κ at one boundary while one frame is learned from.

    Args:
        anchor: where λ starts.
        dual: κ; None: zero, or none at all.

    λ = anchor + moved. Where λ starts at x⁻ the difference λ - x⁻ is exactly ``moved``, however large β is.
    """

    __slots__ = ("anchor", "dual", "moved")

    def __init__(self, anchor: Sequence[torch.Tensor | None], dual: Sequence[torch.Tensor | None] | None) -> None:
        self.anchor: Tensors = list(anchor)
        self.dual: Tensors = [None] * len(anchor) if dual is None else list(dual)
        self.moved: Tensors = [None] * len(anchor)

    def gap(self, at: int, x: torch.Tensor) -> torch.Tensor:
        """λ - x⁻ of one tensor, in float32 at least."""
        anchor, moved = self.anchor[at], self.moved[at]
        assert anchor is not None
        gap = wide(anchor) - wide(x)
        return gap if moved is None else gap + moved

    def correction(self, at: int, x: torch.Tensor, p: torch.Tensor | None, beta: float) -> torch.Tensor:
        """The objective's gradient for λ: p + κ + β(λ - x⁻)."""
        found = beta * self.gap(at, x)
        dual = self.dual[at]
        found = found if dual is None else found + dual
        return found if p is None else found + wide(p)

    def correct(
        self, outputs: Sequence[torch.Tensor], p: Sequence[torch.Tensor | None], rate: float, beta: float
    ) -> None:
        """λ ← λ - η(p + κ + β(λ - x⁻))."""
        for at, (x, grad) in enumerate(zip(outputs, p, strict=True)):
            if self.anchor[at] is not None:
                step = rate * self.correction(at, x, grad, beta)
                moved = self.moved[at]
                self.moved[at] = -step if moved is None else moved - step

    def pull(self, outputs: Sequence[torch.Tensor], beta: float, scale: float = 1.0) -> Tensors:
        """-(κ + β(λ - x⁻)), the terminal gradient of the block below, times ``scale`` (of a float16 loss)."""
        found: Tensors = []
        for at, x in enumerate(outputs):
            if self.anchor[at] is None:
                found.append(None)
            else:
                pull = -self.correction(at, x, None, beta)
                found.append((pull if scale == 1.0 else pull * scale).to(x.dtype))
        return found

    def distance(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """‖λ - x⁻‖ over all tensors."""
        gaps = [self.gap(at, x) for at, x in enumerate(outputs) if self.anchor[at] is not None]
        return torch.nn.utils.get_total_norm(gaps)

    def ascend(self, outputs: Sequence[torch.Tensor], step: float) -> None:
        """κ ← κ + β(λ - x⁻), ``step`` being β or less."""
        for at, x in enumerate(outputs):
            if self.anchor[at] is not None:
                rise, dual = step * self.gap(at, x), self.dual[at]
                self.dual[at] = rise if dual is None else dual + rise

    def value(self) -> Tensors:
        """λ."""
        return [
            anchor if anchor is None or moved is None else (wide(anchor) + moved).to(anchor.dtype)
            for anchor, moved in zip(self.anchor, self.moved, strict=True)
        ]

    def finite(self) -> bool:
        """Nothing here is NaN or infinite."""
        return all(bool(t.isfinite().all()) for t in (*self.moved, *self.dual) if t is not None)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """β(λ - x⁻) would be lost in half precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def has_gradient(tensor: torch.Tensor) -> bool:
    """It can have a λ: floating or complex."""
    return tensor.is_floating_point() or tensor.is_complex()

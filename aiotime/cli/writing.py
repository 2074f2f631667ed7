"""Predictions as JSON lines, one each: index, key, latency in seconds, and the output or the best classes."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from aiotime.frame import Prediction

LARGE = 1000  # numbers in an output; a larger one is summed up unless asked for in full
HEAVY = 20_000  # numbers in an output whose formatting takes milliseconds
STYLES = ("auto", "full", "summary", "none")


class Writer:
    """Writes predictions to a text file, a line each, so that whoever reads along sees whole lines.

    Args:
        file: where to; flushed after each line.
        style: ``"full"`` writes outputs as nested lists, ``"summary"`` their shape, dtype, mean, minimum and
            maximum, ``"none"`` neither; ``"auto"`` is full up to `LARGE` numbers and a summary beyond.
        top: instead: the best so many classes of the last dimension of logits, with softmax scores.
    """

    def __init__(self, file: TextIO, *, style: str = "auto", top: int | None = None) -> None:
        self._file = file
        self._style = style
        self._top = top
        self.written = 0

    def write(self, prediction: Prediction) -> None:
        """One prediction, one line."""
        record: dict[str, Any] = {"index": prediction.index}
        if prediction.key is not None:
            record["key"] = plain(prediction.key)
        record["latency"] = round(prediction.latency, 6)
        if prediction.dropped_before:
            record["dropped_before"] = prediction.dropped_before
        if self._top is not None:
            record["top"] = best(prediction.output, self._top)
        elif self._style != "none":
            record["output"] = self._shown(prediction.output)
        self._line(record)

    def heavy(self, prediction: Prediction) -> bool:
        """Whether writing this takes so long (milliseconds) that it should not be done on an event loop."""
        return self._style == "full" and self._top is None and numbers(prediction.output) > HEAVY

    def write_error(self, index: int | None, key: Hashable, error: BaseException) -> None:
        """One frame that failed, one line."""
        record: dict[str, Any] = {"index": index}
        if key is not None:
            record["key"] = plain(key)
        record["error"] = f"{type(error).__name__}: {error}"
        self._line(record)

    def _line(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self.written += 1

    def _shown(self, output: Any) -> Any:
        from torch import Tensor

        if isinstance(output, Tensor):
            full = self._style == "full" or (self._style == "auto" and output.numel() <= LARGE)
            return finite(output.tolist()) if full else summary(output)
        if isinstance(output, dict):
            return {str(key): self._shown(value) for key, value in output.items()}
        if isinstance(output, tuple | list):
            return [self._shown(value) for value in output]
        return plain(output)


def numbers(output: Any) -> int:
    """How many numbers the tensors of ``output`` hold."""
    from torch import Tensor

    if isinstance(output, Tensor):
        return output.numel()
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return sum(map(numbers, parts))


def best(output: Any, count: int) -> Any:
    """The ``count`` best classes over the last dimension: ``[{"class": 3, "score": 0.98}, …]``, a list per row."""
    from torch import Tensor

    if isinstance(output, dict):
        return {str(key): best(value, count) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return [best(value, count) for value in output]
    if not isinstance(output, Tensor) or output.ndim == 0:
        return plain(output)
    scores, classes = output.float().softmax(-1).topk(min(count, output.shape[-1]), -1)  # [..., count]
    return ranked(scores.tolist(), classes.tolist(), output.ndim)


def ranked(scores: Any, classes: Any, depth: int) -> Any:
    """Pairs of class and score at the leaves of two nested lists; a single row stands alone."""
    if depth == 1:
        return [
            {"class": c, "score": round(s, 6) if math.isfinite(s) else None}
            for s, c in zip(scores, classes, strict=True)
        ]
    if len(scores) == 1:
        return ranked(scores[0], classes[0], depth - 1)
    return [ranked(s, c, depth - 1) for s, c in zip(scores, classes, strict=True)]


def summary(output: Tensor) -> dict[str, Any]:
    """Shape, dtype, mean, minimum and maximum."""
    values = output.float() if output.numel() else output.new_zeros(1).float()
    found = {"mean": values.mean(), "min": values.min(), "max": values.max()}
    shown = {name: finite(float(f"{float(number):.6g}")) for name, number in found.items()}
    return {"shape": list(output.shape), "dtype": str(output.dtype).removeprefix("torch."), **shown}


def finite(value: Any) -> Any:
    """``value`` with null for NaN and infinity, which JSON has no words for."""
    if isinstance(value, list):
        return [finite(part) for part in value]
    if isinstance(value, complex):
        return [finite(value.real), finite(value.imag)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it; what it cannot becomes text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return str(value)

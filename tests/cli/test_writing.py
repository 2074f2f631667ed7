"""Tests of aiotime.cli.writing: predictions as JSON lines."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch

from aiotime.cli.writing import LARGE, Writer
from aiotime.errors import StageError
from aiotime.frame import Prediction


def lines(*predictions: Prediction, **options: Any) -> list[dict[str, Any]]:
    """What a Writer makes of predictions."""
    file = io.StringIO()
    writer = Writer(file, **options)
    for prediction in predictions:
        writer.write(prediction)
    assert writer.written == len(predictions)
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_a_line_has_index_key_latency_and_output() -> None:
    """Small outputs are written in full, whatever their structure."""
    output = {"box": torch.tensor([[1.0, 2.0]]), "rest": (torch.tensor(3), "text", None)}
    (line,) = lines(Prediction(output, 7, key=("left", 0.5), latency=0.0123456789, dropped_before=2))
    assert line == {
        "index": 7,
        "key": ["left", 0.5],
        "latency": 0.012346,
        "dropped_before": 2,
        "output": {"box": [[1.0, 2.0]], "rest": [3, "text", None]},
    }


def test_large_outputs_are_summed_up_unless_asked_for() -> None:
    """Beyond LARGE numbers: shape, dtype and range; with style "full" all of them."""
    output = torch.arange(LARGE + 1.0)
    (line,) = lines(Prediction(output, 0))
    assert line["output"] == {"shape": [LARGE + 1], "dtype": "float32", "mean": 500.0, "min": 0.0, "max": 1000.0}
    (line,) = lines(Prediction(output, 0), style="full")
    assert line["output"] == output.tolist()
    (line,) = lines(Prediction(output, 0), style="none")
    assert "output" not in line
    (line,) = lines(Prediction(torch.zeros(0), 0), style="summary")
    assert line["output"]["shape"] == [0]


def test_top_gives_classes_with_scores() -> None:
    """Softmax over the last dimension; a batch of one stands alone, more rows are a list."""
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    (line,) = lines(Prediction(logits, 0), top=2)
    scores = logits.softmax(-1)[0]
    assert [entry["class"] for entry in line["top"]] == [1, 2]
    assert [entry["score"] for entry in line["top"]] == pytest.approx([float(scores[1]), float(scores[2])], abs=1e-6)
    (line,) = lines(Prediction(logits.expand(2, 3), 0), top=9)
    assert [len(row) for row in line["top"]] == [3, 3]
    (line,) = lines(Prediction({"a": logits, "b": torch.tensor(1.0)}, 0), top=1)
    assert line["top"]["a"][0]["class"] == 1


def test_what_json_lacks_becomes_null() -> None:
    """NaN and infinity are null, so every line can be read by any JSON parser."""
    (line,) = lines(Prediction(torch.tensor([1.0, float("nan"), float("inf")]), 0))
    assert line["output"] == [1.0, None, None]
    (line,) = lines(Prediction(torch.full((2,), float("nan")), 0), style="summary")
    assert line["output"]["mean"] is None
    (line,) = lines(Prediction(torch.full((1, 2), float("nan")), 0), top=1)
    assert line["top"][0]["score"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64])
def test_outputs_of_every_dtype(dtype: torch.dtype) -> None:
    """Whatever torch holds becomes numbers."""
    (line,) = lines(Prediction(torch.ones(2, dtype=dtype), 0))
    assert len(line["output"]) == 2


def test_failed_frames_are_lines_too() -> None:
    """A dead letter has index, key and error."""
    file = io.StringIO()
    Writer(file).write_error(3, "a.png", StageError("stage 'x' failed", stage="x", frame=3))
    assert json.loads(file.getvalue()) == {"index": 3, "key": "a.png", "error": "StageError: stage 'x' failed"}


def test_only_large_outputs_in_full_are_heavy() -> None:
    """A writer says when writing would hold up an event loop."""
    large = Prediction((torch.zeros(200, 200),), 0)
    assert Writer(io.StringIO(), style="full").heavy(large)
    assert not Writer(io.StringIO(), style="auto").heavy(large)
    assert not Writer(io.StringIO(), style="full").heavy(Prediction(torch.zeros(10), 0))

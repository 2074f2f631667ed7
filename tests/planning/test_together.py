"""A pipeline of a model batches only what the model treats apart; its outputs are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from aiotime import Pipeline, Stage
from aiotime.errors import ConfigurationError, TraceError
from aiotime.learning import Exact


class Attention(nn.Module):
    """Sizes read in the graph, heads folded, a mask made on the way, a dict with a number in it."""

    def __init__(self, *, leaky: bool = False) -> None:
        super().__init__()
        self.enter, self.leave, self.leaky = nn.Linear(8, 16), nn.Linear(16, 4), leaky

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = self.enter(x)
        rows, time, width = h.shape
        mask = torch.ones(time, time).tril()
        h = h.view(rows * time, width).relu().view(rows, time, width)
        h = (h @ h.transpose(1, 2) * mask) @ h
        if self.leaky:
            h = h - h.mean(0)
        return {"logits": self.leave(h), "rows": rows}


class Counter(nn.Module):
    """Keeps something from frame to frame."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Buffer(torch.zeros(1))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        moved: torch.Tensor = self.layer(x) + self.seen
        return moved


TWO: dict[str, Any] = {"devices": ["cpu:0", "cpu:1"], "balance": "even"}


@pytest.mark.asyncio
@pytest.mark.may_block
@pytest.mark.parametrize("dynamic", [None, (0,), (0, 1)], ids=str)
async def test_a_graph(dynamic: tuple[int, ...] | None) -> None:
    """Traced with its first dimension free, whatever ``dynamic`` says; that says which frames are taken."""
    torch.manual_seed(0)
    model = Attention()
    pipeline = Pipeline(model, example=torch.rand(1, 5, 8), max_batch=4, dynamic=dynamic, **TWO)
    frames = [torch.rand(1 + at % 3 if dynamic else 1, 5 + at % 2 if dynamic == (0, 1) else 5, 8) for at in range(20)]
    outputs = [prediction.output async for prediction in pipeline.run(frames)]
    for frame, output in zip(frames, outputs, strict=True):
        expected = model(frame)
        torch.testing.assert_close(output["logits"], expected["logits"])
        assert output["rows"] == expected["rows"]


@pytest.mark.asyncio
@pytest.mark.may_block
async def test_batch_norm_in_eval_mode() -> None:
    """A pipeline puts the model into eval mode, where normalisation is each row's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    model(torch.rand(8, 3, 8, 8))
    pipeline = Pipeline(model, example=torch.rand(1, 3, 8, 8), max_batch=4, max_wait=0.001, **TWO)
    frames = list(torch.rand(10, 1, 3, 8, 8))
    outputs = [prediction.output async for prediction in pipeline.run(frames)]
    for frame, output in zip(frames, outputs, strict=True):
        torch.testing.assert_close(output, model(frame))


@pytest.mark.parametrize(
    ("model", "example", "why"),
    [
        (Attention(leaky=True), torch.rand(1, 5, 8), r"does not treat .* apart: output\['logits'\] differs"),
        (nn.TransformerEncoderLayer(8, 2, 16), torch.rand(1, 5, 8), "apart: output differs"),  # its batch is dim 1
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), torch.rand(2, 4), "apart"),
        (Counter(), torch.zeros(1, 4), "apart: output differs"),
        (nn.Sequential(nn.Linear(4, 4)), torch.rand(4), "does not take two frames at once"),
        (nn.Sequential(nn.Linear(4, 4)), torch.tensor(1.0), "max_batch joins frames along their first dimension"),
    ],
    ids=["leak", "second dimension", "batch norm", "state", "no batch dimension", "no dimension"],
)
def test_models_that_mix_frames(model: nn.Module, example: torch.Tensor, why: str) -> None:
    """Refused when the pipeline is built; the model is as it was."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=why):
        Pipeline(model, example=example, max_batch=2, **TWO)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_model_of_one_size() -> None:
    """Where tracing needs the batch to be one, the error says what asked for another."""

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] != 1:
                raise ValueError("one at a time, please")
            return x.view(1, 4) + 1

    with pytest.raises((TraceError, ConfigurationError), match="Leave max_batch=1"):
        Pipeline(Fixed(), example=torch.rand(1, 4), max_batch=2, **TWO)


def test_learning_does_not_batch() -> None:
    """Neither a model's stages nor a stage of its own."""

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    rule = Exact(loss=nn.functional.mse_loss, optimizer=sgd)
    with pytest.raises(ConfigurationError, match="learns frame by frame and cannot batch"):
        Pipeline(nn.Sequential(nn.Linear(4, 4)), example=torch.rand(1, 4), max_batch=2, learner=rule)
    with pytest.raises(ConfigurationError, match="'Linear' learns frame by frame"):
        Pipeline.from_stages([Stage(nn.Linear(4, 4), max_batch=2)], learner=rule)


def test_normalisation_over_the_batch_in_a_stage() -> None:
    """A module that normalises over its batch whatever its mode is refused by name."""
    inside = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ConfigurationError, match="BatchNorm1d at '1' keeps no running statistics"):
        Pipeline.from_stages([Stage(inside, max_batch=2)])

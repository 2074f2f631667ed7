"""Chain: a linear model cut into stages of a network; a pipeline as a part."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.dynamic import Chain, Network, Stage
from aiotime.errors import ClosedError, ConfigurationError, InputError
from aiotime.frame import Sample

SGD = partial(torch.optim.SGD, lr=0.1)


class Residual(nn.Module):
    """A skip across the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        h = h + torch.relu(self.b(h))
        out: torch.Tensor = self.c(h)
        return out


def chain(model: nn.Module, **options: Any) -> Chain:
    made = {"devices": ["inline", "cpu:0"], "balance": "even", "dynamic": (0,), "max_batch": 4, **options}
    return Chain(model, example=torch.zeros(1, 8), **made)


@pytest.mark.asyncio
async def test_outputs_are_the_models_own() -> None:
    """Also in batches of what waits, and of inputs with several rows."""
    torch.manual_seed(0)
    model = Residual()
    samples = [torch.randn(1 + n % 3, 8) for n in range(12)]
    made = chain(model)
    got = [step.output async for step in made.run(samples)]
    for sample, output in zip(samples, got, strict=True):
        assert torch.allclose(output, model(sample), atol=1e-6)
    assert len(made.stages) == 2


@pytest.mark.asyncio
async def test_learns_as_the_model_would() -> None:
    """One instance at a time equals plain PyTorch; the weights come back under the model's own keys."""
    torch.manual_seed(0)
    model, plain = Residual(), Residual()
    plain.load_state_dict(model.state_dict())
    samples = [Sample(torch.randn(1, 8), torch.tensor([n % 3])) for n in range(20)]
    optimizer = SGD(plain.parameters())
    losses = []
    for sample in samples:
        loss = functional.cross_entropy(plain(sample.input), sample.target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    made = chain(model)
    run = made.learn(
        samples,
        loss=functional.cross_entropy,
        optimizer=SGD,
        max_active_keys=1,
        min_update_frequency=1,
        update_per="instance",
    )
    assert [step.loss async for step in run] == pytest.approx(losses, abs=1e-5)
    learned = made.model_state_dict()
    assert learned.keys() == plain.state_dict().keys()
    for key, tensor in plain.state_dict().items():
        assert torch.allclose(learned[key], tensor, atol=1e-6), key
    assert not torch.equal(model.a.weight, plain.a.weight)  # the model handed in keeps its own


@pytest.mark.asyncio
async def test_bad_input() -> None:
    with pytest.raises(ConfigurationError, match="made of a torch"):
        Chain(lambda x: x, example=torch.zeros(1, 8))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="shape"):
        [step async for step in chain(Residual()).run([torch.zeros(1, 7)])]


class Routed(Network):
    """A frozen pipeline, a chain that learns, and a stage, in one network."""

    def __init__(self) -> None:
        self.trunk = aiotime.Pipeline(Residual(), example=torch.zeros(1, 8), devices=["inline"])
        self.side = chain(Residual())
        self.head = Stage(nn.Linear(3, 3), device="inline")

    async def forward(self, x: torch.Tensor) -> Any:
        return await self.head(await self.trunk(x)) + await self.side(x)


@pytest.mark.may_block
@pytest.mark.asyncio
async def test_a_pipeline_is_a_part_that_does_not_learn() -> None:
    torch.manual_seed(0)
    network = Routed()
    frozen = {key: tensor.clone() for key, tensor in network.trunk.state_dict().items()}
    before = network.state_dict()
    samples = [Sample(torch.randn(1, 8), torch.tensor([n % 3])) for n in range(24)]
    with pytest.raises(ClosedError, match="async with network"):
        [step async for step in network.run([torch.zeros(1, 8)])]
    async with network:
        run = network.learn(samples, loss=functional.cross_entropy, optimizer=SGD)
        assert len([step async for step in run]) == 24
        alone = (await network.trunk.submit(torch.zeros(1, 8))).output
        assert torch.equal(alone, await network.trunk(torch.zeros(1, 8)))
    after = network.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(frozen[key], tensor) for key, tensor in network.trunk.state_dict().items())
    assert sorted(network.stages) == ["head", "side.pieces.0", "side.pieces.1"]

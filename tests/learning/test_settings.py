"""Settings: what a user hands a rule is checked before anything runs, and the error says what would work."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import aiotime
from aiotime.errors import ConfigurationError, FeedbackError, InputError
from aiotime.learning import BlockADMM, Delayed, Interlocking, Penalty, Synchronous
from aiotime.learning.settings import takes_target
from aiotime.learning.update import Updater
from aiotime.learning.weights import Weights, slots_of

SGD = partial(torch.optim.SGD, lr=0.1)
COMMON: dict[str, Any] = {"loss": mse_loss, "optimizer": SGD}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Delayed(update_every=1.5, **COMMON),
        lambda: Delayed(late=1.5, **COMMON),
        lambda: Synchronous(micro_batches=2.5, **COMMON),  # type: ignore[arg-type]
        lambda: Interlocking(2.5, **COMMON),  # type: ignore[arg-type]
        lambda: Interlocking("2", **COMMON),  # type: ignore[arg-type]
        lambda: Penalty(beta=1.0, sweeps=1.5, **COMMON),  # type: ignore[arg-type]
        lambda: BlockADMM(rho=1.0, inner_steps=True, **COMMON),
    ],
)
def test_a_number_of_things_is_whole(make: Any) -> None:
    """Half a frame would be waited for without end."""
    with pytest.raises(ConfigurationError, match="number of"):
        make()


@pytest.mark.parametrize("optimizer", [5, None, "adam", {}, [], {"*": 3}, [SGD, None]])
def test_what_is_no_optimizer_is_refused(optimizer: Any) -> None:
    """Before a plan tries to measure with it."""
    with pytest.raises(ConfigurationError, match="optimizer must be a callable"):
        Delayed(loss=mse_loss, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, partial(torch.optim.LBFGS, lr=1.0), {"*": torch.optim.LBFGS}])
def test_an_optimizer_that_needs_a_closure_is_refused(optimizer: Any) -> None:
    """A frame passes once."""
    with pytest.raises(ConfigurationError, match="LBFGS evaluates the loss several times"):
        Delayed(loss=mse_loss, optimizer=optimizer)


def updater(**settings: Any) -> Updater:
    return Updater(Weights(slots_of([("", nn.Linear(2, 2))])), **{"optimizer": SGD, "stage": "s", **settings})


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "needs a metric"),
        (lambda optimizer: None, r"has no step\(\)"),
    ],
)
def test_a_scheduler_counts_steps(scheduler: Any, message: str) -> None:
    """One that needs a metric, or is none, is refused when it is made."""
    with pytest.raises(ConfigurationError, match=message):
        updater(scheduler=scheduler)
    with pytest.raises(ConfigurationError, match="scheduler must be a callable"):
        Delayed(scheduler=5, **COMMON)


def test_an_optimizer_gets_the_stage_s_parameters_and_no_others() -> None:
    """Groups that leave some out would never learn them; foreign ones would learn nothing."""
    with pytest.raises(ConfigurationError, match="did not get bias"):
        updater(param_groups=lambda named: [{"params": [p for name, p in named if name == "weight"]}])
    stranger = nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigurationError, match="parameters of somebody else"):
        updater(param_groups=lambda named: [{"params": [p for _, p in named]}, {"params": [stranger]}])


class Reconstruction(nn.Module):
    """A loss of the output alone."""

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """0-dim."""
        return output.square().mean()


def optional(output: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """A loss whose target has a default."""
    return output.mean() if target is None else mse_loss(output, target)


def test_a_loss_is_read_by_its_own_signature() -> None:
    """A module's is its forward's; an optional target is a target; what is said counts more."""
    assert not takes_target(Reconstruction())
    assert takes_target(nn.MSELoss())
    assert takes_target(optional)
    assert not Delayed(loss=optional, optimizer=SGD, supervised=False).supervised


def test_a_complex_loss_is_refused() -> None:
    """It is no number to go down on."""
    rule = Delayed(loss=lambda output: output.sum() * 1j, optimizer=SGD)
    with pytest.raises(InputError, match="a complex number, not one number"):
        rule.loss_value(torch.ones(1, requires_grad=True), None, frame=0, key=None)


def pipeline_of(rule: Delayed) -> aiotime.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    return aiotime.Pipeline(model, example=torch.zeros(1, 2), devices=["cpu:0", "cpu:1"], balance=[2, 1], learner=rule)


@pytest.mark.asyncio
async def test_a_late_target_needs_a_key_that_can_be_one() -> None:
    """An unhashable key is refused in its turn; credits come back, and what follows goes on."""
    pipeline = await asyncio.to_thread(pipeline_of, Delayed(**COMMON))
    async with asyncio.timeout(20), pipeline:
        for _ in range(20):
            with pytest.raises(InputError, match="cannot be one"):
                await pipeline.submit(aiotime.Sample(torch.ones(1, 2), aiotime.LATER, key=[1]))  # type: ignore[arg-type]
        assert (await pipeline.submit(aiotime.Sample(torch.ones(1, 2), torch.ones(1, 2)))).loss is not None


@pytest.mark.asyncio
async def test_no_target_is_no_feedback() -> None:
    """None and LATER are refused, and the frame still waits for its target."""
    pipeline = await asyncio.to_thread(pipeline_of, Delayed(**COMMON))
    async with asyncio.timeout(20), pipeline:
        await pipeline.submit(aiotime.Sample(torch.ones(1, 2), aiotime.LATER, key="a"))
        for nothing in (None, aiotime.LATER):
            with pytest.raises(FeedbackError, match="hand in what the loss is to compare with"):
                await pipeline.feedback("a", nothing)
        assert await pipeline.feedback("a", torch.ones(1, 2)) > 0


class Fragile(nn.Module):
    """A head that cannot take a large value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 2) -> (1, 2)."""
        if float(x.detach().abs().max()) > 0.9:
            raise ValueError("too much for this head")
        return x * 1.0


@pytest.mark.asyncio
async def test_a_head_that_fails_holds_no_prediction_back() -> None:
    """The frame is predicted; that it could not be learned from is told as a backward's failure."""
    rule = Delayed(local=1.0, head=lambda stage, cut, output: Fragile(), **COMMON)
    pipeline = await asyncio.to_thread(pipeline_of, rule)
    samples = [aiotime.Sample(torch.full((1, 2), 50.0 if at == 3 else 0.1), torch.zeros(1, 2)) for at in range(8)]
    async with asyncio.timeout(20), pipeline:
        indices = [pred.index async for pred in pipeline.run(samples, on_error="skip")]
        assert indices == list(range(8))
        assert pipeline.stats().learning_failed == 1

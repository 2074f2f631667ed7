"""Heads: which one a cut gets, how it begins, and that it stays out of the model."""

from __future__ import annotations

import asyncio
import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.errors import ConfigurationError
from aiotime.learning.heads import PREFIX, Headed, Heads, default_head
from aiotime.learning.learner import Site
from aiotime.learning.local import Local
from tests.learning.reference import ribbon, stream

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("cut", "output", "parameters"),
    [
        ((6,), (3,), 6 * 3 + 3),
        ((2, 6), (2, 3), 6 * 3 + 3),
        ((1, 6), (1, 3, 4, 4), 6 * 48 + 48),
        ((2, 5, 6), (2, 5, 9), 6 * 9 + 9),
        ((2, 5, 6), (2, 3), 6 * 3 + 3),
        ((2, 5, 6), (2, 7, 3), 6 * 21 + 21),
        ((2, 8, 16, 16), (2, 10), 8 * 8 + 8 + 32 * 10 + 10),
        ((2, 8, 3, 1), (2, 10), 8 * 8 + 8 + 16 * 10 + 10),
        ((1, 8, 16, 16), (1, 3, 16, 16), 8 * 8 * 9 + 8 + 8 * 3 + 3),
        ((1, 64, 8, 8), (1, 3, 16, 12), 64 * 32 * 9 + 32 + 32 * 3 + 3),
    ],
)
def test_a_head_goes_from_the_cut_to_the_shape_of_the_output(
    cut: tuple[int, ...], output: tuple[int, ...], parameters: int
) -> None:
    """Each kind of cut has its head, whose parameters all take part."""
    head = default_head(torch.zeros(cut), torch.zeros(output))
    guess = head(torch.rand(cut))
    assert guess.shape == output
    guess.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert sum(p.numel() for p in head.parameters()) == parameters


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("cut", "output"), [((6,), (3,)), ((4, 6), (3,)), ((3, 8, 8), (10,)), ((3, 8, 8), (2, 8, 8))])
def test_a_head_takes_any_batch(batch: int, cut: tuple[int, ...], output: tuple[int, ...]) -> None:
    """The example's first dimension is no part of the head."""
    head = default_head(torch.zeros(2, *cut), torch.zeros(2, *output))
    assert head(torch.rand(batch, *cut)).shape == (batch, *output)


def test_a_head_reads_the_widest_floating_tensor() -> None:
    """Where several tensors cross a cut: the floating one with most elements, the first of equals."""
    cut = {
        "tokens": torch.zeros(1, 99, dtype=torch.long),
        "a": torch.ones(1, 2),
        "b": [torch.ones(1, 5)],
        "c": torch.ones(1, 5),
    }
    head = default_head(cut, torch.zeros(1, 3))
    before = head(cut)
    assert before.shape == (1, 3)
    assert torch.equal(head({**cut, "a": torch.zeros(1, 2), "c": torch.zeros(1, 5)}), before)
    assert not torch.equal(head({**cut, "b": [torch.zeros(1, 5)]}), before)


@pytest.mark.parametrize(
    ("cut", "output", "says"),
    [
        (torch.zeros(1, 4), {"logits": torch.zeros(1, 3)}, "returns a dict"),
        (torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), "tensor of torch.int64"),
        (torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3), "no floating tensor"),
        (torch.zeros(3, 8, 8), torch.zeros(10), r"from \(3, 8, 8\) at the cut to the output's \(10,\)"),
        (torch.zeros(2, 4), torch.zeros(1, 3), r"from \(2, 4\)"),
        (torch.zeros(1, 2, 3, 4, 5), torch.zeros(1, 3), r"from \(1, 2, 3, 4, 5\)"),
        (torch.zeros(1, 4), torch.zeros(()), r"output's \(\)"),
    ],
)
def test_where_no_default_fits_the_user_is_asked_for_a_head(cut: Any, output: Any, says: str) -> None:
    """The refusal shows what was found and names the way out."""
    with pytest.raises(ConfigurationError, match=says) as caught:
        default_head(cut, output)
    assert "head=" in str(caught.value)


def test_first_weights_depend_on_seed_and_stage_alone() -> None:
    """The same seed and stage give the same weights; the global random numbers are neither read nor moved."""
    cut, output = torch.zeros(1, 8, 8, 8), torch.zeros(1, 10)

    def values(**settings: int) -> torch.Tensor:
        return nn.utils.parameters_to_vector(default_head(cut, output, **settings).parameters())

    state = torch.random.get_rng_state()
    first = values(seed=3, stage=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(values(seed=3, stage=1), first)
    assert not torch.equal(values(seed=4, stage=1), first)
    assert not torch.equal(values(seed=3, stage=2), first)
    assert first.abs().max() <= 1 / 8**0.5 and first.std() > 0.05


def test_a_head_has_the_precision_of_its_cut() -> None:
    """A model in double precision has heads in double precision."""
    head = default_head(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    assert {p.dtype for p in head.parameters()} == {torch.float64}


def test_what_the_user_hands_in_is_checked() -> None:
    """``head=`` must be a callable that returns a module, and the module it returns stays the user's."""
    with pytest.raises(ConfigurationError, match="head must be a callable"):
        Local(loss=functional.cross_entropy, optimizer=SGD, head=nn.Linear(2, 2).weight)  # type: ignore[arg-type]
    site = Site(0, 2, "encoder", lambda x: x, [])
    with pytest.raises(ConfigurationError, match=r"'encoder': head\(\.\.\.\) returned a int"):
        Heads(lambda k, cut, output: 3).make(site, None, None)  # type: ignore[arg-type, return-value]
    mine = nn.Linear(2, 2)
    assert Heads(lambda k, cut, output: mine).make(site, None, None) is not mine
    with pytest.raises(ConfigurationError, match="stage 'encoder': default heads imitate"):
        Heads().make(site, torch.zeros(1, 2), None)


def test_a_stage_without_an_example_is_refused_where_nothing_can_wait() -> None:
    """Where the first frame's output could not be waited for, a default head needs an example."""
    site = Site(0, 2, "encoder", lambda x: x, [])
    rule = Local(loss=functional.cross_entropy, optimizer=SGD)
    with pytest.raises(ConfigurationError, match=r"'encoder': no example .* Pipeline\(model, example=\.\.\.\)"):
        Headed(site, rule, heads=Heads(), waits=False)


def hands(pipeline: aiotime.Pipeline) -> list[Any]:
    """What computes for each stage."""
    return [spec.hands for spec in pipeline._specs]


@pytest.mark.asyncio
async def test_heads_are_in_checkpoints_and_not_in_the_model() -> None:
    """``pipeline.state_dict`` has the model's keys alone; a learner's state has its head, which learns."""
    xs, ys = stream(12)

    def build() -> aiotime.Pipeline:
        rule = Local(loss=functional.cross_entropy, optimizer=partial(torch.optim.Adam, lr=0.01))
        return aiotime.Pipeline(ribbon(3), example=xs[0], devices=["inline"] * 3, balance=[2, 2, 2], learner=rule)

    first = await asyncio.to_thread(build)
    assert first.state_dict().keys() == ribbon(3).state_dict().keys()
    before = hands(first)[0].state_dict()["head"]
    samples = [aiotime.Sample(x, y) for x, y in zip(xs, ys, strict=True)]
    async with asyncio.timeout(20):
        _ = [pred async for pred in first.run(samples[:6])]
    assert first.state_dict().keys() == ribbon(3).state_dict().keys()
    states = [copy.deepcopy(learner.state_dict()) for learner in hands(first)]
    assert [sorted(state["head"]) if "head" in state else None for state in states] == [
        ["inner.linear.bias", "inner.linear.weight"],
        ["inner.linear.bias", "inner.linear.weight"],
        None,
    ]
    assert not torch.equal(before["inner.linear.weight"], states[0]["head"]["inner.linear.weight"])
    second = await asyncio.to_thread(build)
    async with asyncio.timeout(20):
        await second.load_state_dict(first.state_dict())
        for learner, state in zip(hands(second), states, strict=True):
            learner.load_state_dict(state)
        ahead = [pred.loss async for pred in first.run(samples[6:])]
        again = [pred.loss async for pred in second.run(samples[6:])]
    assert ahead == again
    for one, other in zip(hands(first), hands(second), strict=True):
        assert one.weights.names == other.weights.names
        assert all(torch.equal(a, b) for a, b in zip(one.weights.masters, other.weights.masters, strict=True))


@pytest.mark.asyncio
async def test_a_head_of_the_users_own() -> None:
    """It gets the stage's number and both examples, is called with what leaves the stage, and learns with it."""
    xs, ys = stream(8)
    seen: list[tuple[int, torch.Size, torch.Size]] = []

    def head(stage: int, cut: Any, output: Any) -> nn.Module:
        seen.append((stage, cut.shape, output.shape))
        frozen = nn.Linear(8, 8)
        frozen.requires_grad_(False)
        return nn.Sequential(frozen, nn.BatchNorm1d(8, track_running_stats=True).eval(), nn.Linear(8, 4))

    rule = Local(loss=functional.cross_entropy, optimizer=SGD, head=head, param_groups=by_name)
    pipeline = await asyncio.to_thread(
        partial(aiotime.Pipeline, ribbon(2), example=xs[0], devices=["inline"] * 2, balance=[2, 2], learner=rule)
    )
    assert seen == [(0, (1, 8), (1, 4))]
    lower = hands(pipeline)[0]
    assert [name for name in lower.weights.names if name.startswith(PREFIX)] == [
        f"{PREFIX}{name}" for name in ("1.weight", "1.bias", "2.weight", "2.bias")
    ]
    assert [group["lr"] for group in lower.updater.optimizer.param_groups] == [0.1, 0.5]
    before = lower.state_dict()["head"]
    async with asyncio.timeout(20):
        _ = [pred async for pred in pipeline.run([aiotime.Sample(x, y) for x, y in zip(xs, ys, strict=True)])]
    after = lower.state_dict()["head"]
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"1.weight", "1.bias", "2.weight", "2.bias"}
    lower.load_state_dict({**lower.state_dict(), "head": before})
    assert all(torch.equal(before[name], value) for name, value in lower.state_dict()["head"].items())


def by_name(parameters: Any) -> list[dict[str, Any]]:
    """The head learns faster."""
    named = list(parameters)
    return [
        {"params": [p for name, p in named if not name.startswith(PREFIX)]},
        {"params": [p for name, p in named if name.startswith(PREFIX)], "lr": 0.5},
    ]

"""AuxNets: what they are made of, what they learn, and how the loss comes through them to the blocks below."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.errors import ConfigurationError, InputError
from aiotime.learning.aux_nets import AuxNets, LinearAux, PooledAux, small_net
from aiotime.learning.penalty import Penalty
from tests.learning.joints import Recorder, build, follow, learn
from tests.learning.reference import pieces, ribbon, stream

CPU = torch.device("cpu")
FAST = partial(torch.optim.Adam, lr=0.05)

one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


def nets_with(aux: Any = None, optimizer: Any = FAST) -> AuxNets:
    return AuxNets(aux, optimizer, stage="first", device=CPU)


# ------------------------------------------------------------------------------------------------ the networks


def test_rows_map_to_rows() -> None:
    """Where frame and boundary have as many rows each is mapped by itself, however many there are."""
    net = LinearAux(torch.zeros(2, 3, 5), torch.zeros(2, 7))
    assert net.map.weight.shape == (7, 15)
    assert net(torch.zeros(4, 3, 5)).shape == (4, 7)


def test_all_maps_to_all_where_rows_differ() -> None:
    """A frame of another number of rows is taken as a whole; so is a structure of tensors, integers among them."""
    net = LinearAux({"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.long)}, torch.zeros(1, 5))
    assert net.map.weight.shape == (5, 10)
    assert net({"a": torch.zeros(3, 2), "b": torch.ones(4, dtype=torch.long)}).shape == (1, 5)


def test_pictures_are_pooled() -> None:
    """From picture to picture the default is small: channels by channels weights."""
    raw, like = torch.zeros(2, 3, 16, 16), torch.zeros(2, 8, 4, 4)
    net = small_net(raw, like)
    assert isinstance(net, PooledAux)
    assert net(raw).shape == like.shape
    assert sum(p.numel() for p in net.parameters()) == 8 * 3 + 8
    assert isinstance(small_net(raw, torch.zeros(2, 8)), LinearAux)


def test_they_start_at_zero_and_draw_no_random_number() -> None:
    """The model's own random numbers come out as if there were no AuxNets."""
    state = torch.get_rng_state()
    nets = nets_with()
    (made,) = nets.predict(torch.ones(1, 4), [torch.ones(1, 3)])
    assert made is not None
    assert not made.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_huge_linear_map_is_refused() -> None:
    """A map of all pixels to all activations is not small; the error says what to hand in."""
    with pytest.raises(ConfigurationError, match="aux=callable"):
        LinearAux(torch.empty(1, 1 << 14, device="meta"), torch.empty(1, 1 << 14, device="meta"))


def test_they_learn_what_they_are_shown() -> None:
    """A linear relation is found; integers at the boundary have no network."""
    torch.manual_seed(0)
    nets, true = nets_with(), torch.randn(3, 4)
    boundary = [torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)]
    assert nets.predict(torch.zeros(1, 4), boundary)[1] is None
    errors = []
    for _ in range(300):
        raw = torch.randn(1, 4)
        nets.learn(raw, [raw @ true.T, None])
        assert nets.loss is not None
        errors.append(float(nets.loss))
    assert sum(errors[-50:]) < 1e-2 * sum(errors[:50])
    assert nets.steps == 300


def test_a_target_that_is_not_finite_teaches_nothing() -> None:
    """Weights and count stay as they were."""
    nets = nets_with()
    nets.predict(torch.ones(1, 4), [torch.zeros(1, 3)])
    nets.learn(torch.ones(1, 4), [torch.full((1, 3), torch.nan)])
    assert nets.steps == 0
    (made,) = nets.predict(torch.ones(1, 4), [torch.zeros(1, 3)])
    assert made is not None
    assert not made.any()


def test_inference_tensors_are_taken() -> None:
    """A frame made in inference mode can be learned from."""
    with torch.inference_mode():
        raw, target = torch.ones(1, 4), torch.ones(1, 3)
        nets = nets_with()
        nets.predict(raw, [target])
        nets.learn(raw, [target])
    assert nets.steps == 1


def test_a_network_of_the_users() -> None:
    """It is given the frame and the boundary; a wrong shape is refused with both."""
    nets = nets_with(lambda raw, like: nn.Linear(raw.shape[1], like.shape[1]))
    assert nets.predict(torch.zeros(1, 4), [torch.zeros(1, 3)])[0] is not None
    wrong = nets_with(lambda raw, like: nn.Identity())
    with pytest.raises(InputError, match=r"made shape \(1, 4\).*\(1, 3\) crosses"):
        wrong.predict(torch.zeros(1, 4), [torch.zeros(1, 3)])
    with pytest.raises(InputError, match="could not take a frame"):
        nets.predict(torch.zeros(1, 5), [torch.zeros(1, 3)])


def test_state_may_come_before_the_first_frame() -> None:
    """State loaded into networks that are not built yet is theirs once they are, and is handed on until then."""
    one, other = nets_with(), nets_with()
    assert one.state_dict() is None
    boundary = [torch.zeros(1, 3)]
    one.predict(torch.zeros(1, 4), boundary)
    for _ in range(3):
        one.learn(torch.ones(1, 4), [torch.ones(1, 3)])
    other.load_state_dict(one.state_dict())
    assert other.state_dict() is one.state_dict() or other.state_dict() is not None
    (made,), (expected,) = (nets.predict(torch.ones(1, 4), boundary) for nets in (other, one))
    assert made is not None
    assert expected is not None
    assert torch.equal(made, expected)
    assert other.steps == 3
    assert other.nbytes() == (3 * 4 + 3) * 4


# ------------------------------------------------------------------------------------------------ in the pipeline


def rule_with(**settings: Any) -> Penalty:
    base = {"beta": 1.0, "loss": functional.cross_entropy, "optimizer": Recorder, "start": "aux", "order": "1f1b"}
    return Penalty(**{**base, **settings})


@one_loop
async def test_they_learn_to_predict_the_boundary() -> None:
    """With a large β the corrected λ is x⁻ itself: ‖λ - x⁻‖ shrinks while weights are held."""
    frames, targets = stream(6)  # as many as the affine map can fit
    found: list[float] = []
    rule = rule_with(beta=1e4, aux_optimizer=FAST)
    pipeline = await build(rule, ribbon(2), [2, 2], frames[0])
    await follow(pipeline, frames * 40, targets * 40, watch=lambda hands: found.append(hands[0].violation))
    assert sum(found[-6:]) < 0.2 * sum(found[:6])


@one_loop
async def test_the_loss_reaches_the_blocks_below() -> None:
    """Once they reproduce the corrected λ, the terminal gradient is p: that of back-propagation, with weights held."""
    frames, targets = stream(4)
    model = ribbon(3)
    rule = rule_with(beta=4.0, aux_optimizer=partial(torch.optim.Adam, lr=0.01))
    course = await learn(rule, model, [2, 2, 2], frames * 200, targets * 200)
    for at, (frame, target) in enumerate(zip(frames, targets, strict=True)):
        exact = torch.autograd.grad(functional.cross_entropy(model(frame), target), list(model[:2].parameters()))
        found = course.hands[0].updater.optimizer.grads[at - 4]
        one, other = (torch.cat([grad.flatten() for grad in grads]) for grads in (found, exact))
        assert functional.cosine_similarity(one, other, dim=0) > 0.99


@one_loop
@pytest.mark.parametrize("aux", [None, "linear"])
async def test_they_are_no_part_of_the_model(aux: Any) -> None:
    """The model's keys are its own; the learner's state has the networks."""
    frames, targets = stream(5)
    pipeline = await build(rule_with(aux=aux), ribbon(2), [2, 2], frames[0])
    course = await follow(pipeline, frames, targets)
    assert set(course.state) == set(ribbon(2).state_dict())
    assert set(course.hands[0].state_dict()["nets"]["nets"]) == {"0.map.weight", "0.map.bias"}
    assert course.hands[1].state_dict()["nets"] is None
    assert course.hands[0].kept_nbytes() >= (8 * 6 + 8) * 4


@one_loop
async def test_without_example_they_are_made_of_the_first_frame() -> None:
    """Stages made by hand show their boundaries with the first frame."""
    frames, targets = stream(5)
    pipeline = await asyncio.to_thread(
        aiotime.Pipeline.from_stages, pieces(ribbon(2), [2, 2]), learner=rule_with(optimizer=FAST)
    )
    course = await follow(pipeline, frames, targets)
    assert course.hands[0].nets.steps > 0


@one_loop
async def test_a_network_that_does_not_fit_fails_the_frame() -> None:
    """The run raises the error that names the stage; nothing hangs."""
    frames, targets = stream(5)
    pipeline = await build(rule_with(aux=lambda raw, like: nn.Identity()), ribbon(2), [2, 2], frames[0])
    with pytest.raises(InputError, match="AuxNet behind stage"):
        await follow(pipeline, frames, targets)

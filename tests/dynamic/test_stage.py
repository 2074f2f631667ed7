"""Stages as the user writes them: what is refused, and what they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from aiotime.dynamic import Stage
from aiotime.dynamic.stage import Replica
from aiotime.errors import ConfigurationError
from tests.dynamic.nets import Coded, linear


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 1.5}, "max_batch"),
        ({"average_every": 0}, "average_every"),
        ({"inbox": 0}, "inbox"),
        ({"max_wait": -1.0, "max_batch": 2}, "max_wait"),
        ({"max_wait": float("nan"), "max_batch": 2}, "max_wait"),
        ({"max_wait": 1.0}, "set max_batch"),
        ({"group": "sum"}, "group"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": 3, "device": ["cpu:0", "cpu:1"]}, "3 replicas on 2 devices"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    """Each says which argument, and what would do."""
    with pytest.raises(ConfigurationError, match=said):
        Stage(linear(), **options)


def test_replicas_have_weights_of_their_own() -> None:
    """Copies of equal value, on the device of each, or all on one."""
    stage = Stage(linear(), device=["cpu:0", "cpu:1"])
    one, two = stage.replicas
    assert one.fn is stage.fn
    assert two.fn is not one.fn
    assert torch.equal(one.fn.weight, two.fn.weight)  # type: ignore[attr-defined]
    assert [replica.device.name for replica in stage.replicas if replica.device] == ["cpu:0", "cpu:1"]
    assert len(Stage(linear(), device="cpu:0", replicas=3).replicas) == 3


def test_names() -> None:
    """That of the attribute, in lists and dicts with the place, or the one that was given."""
    network = Coded(
        lambda net, x: x,
        first=Stage(linear(), device="inline"),
        named=Stage(linear(), device="inline", name="encoder"),
    )
    network.many = [Stage(linear(), device="inline") for _ in range(2)]  # type: ignore[attr-defined]
    network.table = {"a": Stage(linear(), device="inline")}  # type: ignore[attr-defined]
    assert list(network.stages) == ["first", "encoder", "many.0", "many.1", "table.a"]
    assert all(stage.name == name for name, stage in network.stages.items())


def test_two_of_one_name() -> None:
    """Are refused."""
    network = Coded(lambda net, x: x, a=Stage(linear(), name="same"), b=Stage(linear(), name="same"))
    with pytest.raises(ConfigurationError, match=r"two stages .* are called 'same'"):
        _ = network.stages


def test_one_stage_under_two_attributes_is_one() -> None:
    """With the first name."""
    stage = Stage(linear(), device="inline")
    assert list(Coded(lambda net, x: x, a=stage, b=stage).stages) == ["a"]


def test_repr() -> None:
    """What was said."""
    assert repr(Stage(linear(), device="cpu:0", max_batch=8)) == "Stage('Linear', device='cpu:0', max_batch=8)"
    assert "replicas=2" in repr(Stage(linear(), device=["cpu:0", "cpu:1"]))


def test_the_mode_of_a_replica() -> None:
    """Parts in training mode are remembered until they are given back; then the user is heard again."""
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    replica = Replica(module, None)
    training = replica.training()
    assert training == [module, module[0]]
    for part in training:
        part.training = False
    assert replica.training() == training  # what a network did is not the user's word
    replica.restore()
    assert module.training and module[0].training and not module[1].training
    module.eval()
    assert replica.training() == []
    replica.restore()
    assert not module.training

"""Which stages learn: the first that can and all above; what cannot work is refused, what is doubtful is warned of."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import aiotime
from aiotime.errors import ConfigurationError
from aiotime.learning import Delayed, Exact
from aiotime.learning.enrolment import enrol_stages, rehearse
from aiotime.learning.learner import Site

RULE = Delayed(loss=functional.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1))


def sites(*modules: nn.Module) -> list[Site]:
    return [Site(k, len(modules), f"s{k}", module, [("", module)]) for k, module in enumerate(modules)]


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def test_the_first_trainable_stage_and_all_above_learn() -> None:
    """Those below only compute; the lowest that learns passes nothing down; a frozen one above passes gradients on."""
    given = sites(frozen(nn.Linear(2, 2)), nn.ReLU(), nn.Linear(2, 2), frozen(nn.Linear(2, 2)), nn.Tanh())
    found = enrol_stages(RULE, given)
    assert [hands.learns for hands, _ in found] == [False, False, True, True, True]
    assert [site.passes_down for site in given] == [False, False, False, True, True]
    assert [hands.updater is not None for hands, _ in found] == [False, False, True, False, False]
    assert [order.ahead for _, order in found] == [0, 0, 2, 1, 0]


def test_nothing_to_learn_is_refused() -> None:
    """With the names of the stages and the way out."""
    with pytest.raises(ConfigurationError, match=r"none of the stages s0, s1 has a parameter.*unfreeze"):
        enrol_stages(RULE, sites(nn.ReLU(), frozen(nn.Linear(2, 2))))


def test_what_is_not_a_rule_is_refused() -> None:
    """A class, an optimizer: what people hand in by mistake."""
    for wrong in (Exact, torch.optim.Adam, "delayed"):
        with pytest.raises(ConfigurationError, match=r"learner must be a rule of aiotime\.learning"):
            enrol_stages(wrong, sites(nn.Linear(1, 1)))  # type: ignore[arg-type]


def test_a_parameter_of_two_stages_is_refused() -> None:
    """Both would update it, each its own copy. Within one stage, or frozen, it may be tied."""
    low, high = nn.Linear(2, 2), nn.Linear(2, 2)
    high.weight = low.weight
    with pytest.raises(ConfigurationError, match=r"'weight' of stage 's0' is also 'weight' of stage 's1'"):
        enrol_stages(RULE, sites(low, high))
    enrol_stages(RULE, sites(nn.Sequential(low, high)))
    low.weight.requires_grad_(False)
    enrol_stages(RULE, sites(low, high))


def test_a_tie_is_seen_where_devices_hold_copies() -> None:
    """Moved to two devices, one parameter has become two; the user's own tells that they were one."""
    given = sites(nn.Linear(2, 2), nn.Linear(2, 2))
    for site in given:
        site.identities = {"weight": 1}
    with pytest.raises(ConfigurationError, match=r"'weight' of stage 's0' is also 'weight' of stage 's1'"):
        enrol_stages(RULE, given)


def test_a_tied_model_is_refused_by_the_pipeline_with_its_own_names() -> None:
    """Cut between the two uses: an error that names both; cut elsewhere: it learns as one."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight

    def pipeline(balance: list[int]) -> aiotime.Pipeline:
        return aiotime.Pipeline(
            model, example=torch.zeros(1, 3), devices=["cpu:0", "cpu:1"][: len(balance)], balance=balance, learner=RULE
        )

    with pytest.raises(ConfigurationError, match=r"weight' of stage '0…1' is also '2\.weight' of stage '2'"):
        pipeline([2, 1])
    pipeline([3])


def test_batch_norm_in_training_is_warned_of_once() -> None:
    """Statistics of single frames are poor; in eval mode there is nothing to say."""
    with pytest.warns(UserWarning, match=r"BatchNorm1d at .*'1'.*GroupNorm") as caught:
        enrol_stages(RULE, sites(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.BatchNorm1d(2)))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enrol_stages(RULE, sites(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()))


def test_a_rehearsal_leaves_no_trace() -> None:
    """Entry and exit of every stage are noted; statistics, modes, random numbers and the example stay."""
    modules = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True))]
    given = sites(*modules)
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    example, drawn = torch.randn(3, 2), torch.random.get_rng_state()
    copied = example.clone()
    rehearse(given, example)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(example, copied)
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert all(part.training for part in module.modules())
    assert given[0].entry.shape == given[1].exit.shape == (3, 2)
    assert torch.equal(given[1].entry, modules[0].eval()(example))


@pytest.mark.parametrize("option", [{"workers": 2}, {"timeout": 1.0}], ids=["workers", "timeout"])
def test_a_stage_that_learns_has_one_worker_and_no_timeout(option: dict[str, Any]) -> None:
    """Refused; below the first that learns both are fine."""
    learning = aiotime.Stage(nn.Linear(2, 2), name="net", **option)
    with pytest.raises(ConfigurationError, match="stage 'net' learns"):
        aiotime.Pipeline.from_stages([learning], learner=RULE)
    aiotime.Pipeline.from_stages([aiotime.Stage(abs, **option), nn.Linear(2, 2)], learner=RULE)

"""Which stages learn, and with which hands: from a rule and the stages of a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError
from aiotime.learning.chimera import ReplicaLearner
from aiotime.learning.learner import Passage, Site, StageLearner, nothing_to_learn
from aiotime.learning.order import Order
from aiotime.learning.rule import Rule
from aiotime.learning.synchronous import Synchronous

_BATCH_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def enrol_stages(rule: Rule, sites: Sequence[Site]) -> list[tuple[StageLearner, Order]]:
    """Hands and order per stage; those below the first that has something to learn only let frames pass.

    Raises:
        ConfigurationError: nothing can be learned, a parameter occurs in two stages, or the rule does not fit.
    """
    check_rule(rule)
    rule.check(len(sites))
    trainable = [any(p.requires_grad for _, root in site.modules for p in root.parameters()) for site in sites]
    if not any(trainable):
        raise nothing_to_learn([site.name for site in sites])
    check_shared(sites)
    warn_of_batch_norm(sites)
    _copy_buffers(sites)
    first = trainable.index(True)
    found: list[tuple[StageLearner, Order]] = []
    for site in sites:
        if site.index < first:
            found.append((Passage(site, rule), Order()))
            continue
        site.passes_down = site.index > first
        found.append((rule.stage(site), rule.order(site.index, len(sites))))
    return found


def second_hands(rule: Synchronous, site: Site, of: ReplicaLearner) -> ReplicaLearner:
    """Those of a stage's replica at ``site``."""
    _copy_buffers([site])
    return rule.replica(site, of)


def check_rule(rule: Any) -> None:
    """Refuse what is no rule."""
    if not isinstance(rule, Rule):
        raise ConfigurationError(
            f"learner must be a rule of aiotime.learning, such as Delayed(loss=..., optimizer=...), not {rule!r}"
        )


def rehearse(sites: Sequence[Site], example: Any) -> None:
    """Note what enters and leaves each stage for ``example``; modules and random numbers stay as they are."""
    switched = [m for site in sites for _, root in site.modules for m in root.modules() if m.training]
    buffers = [b for site in sites for _, root in site.modules for b in root.buffers()]
    values = [buffer.detach().clone() for buffer in buffers]
    for module in switched:
        module.training = False
    try:
        with torch.inference_mode(mode=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            value = example
            for site in sites:
                value = pytree.tree_map(lambda leaf, to=site.device: _copied(leaf, to), value)
                site.entry = pytree.tree_map(lambda leaf: _copied(leaf, None), value)
                value = site.fn(value)
                site.exit = value
            for site in sites:
                site.final = value
            for buffer, before in zip(buffers, values, strict=True):
                buffer.copy_(before)
    finally:
        for module in switched:
            module.training = True


def _copied(leaf: Any, device: torch.device | None) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone() if device is None else leaf.detach().to(device)


def check_shared(sites: Sequence[Site]) -> None:
    """Refuse a parameter that two stages would update."""
    owner: dict[int, tuple[str, str]] = {}
    for site in sites:
        for prefix, root in site.modules:
            for name, parameter in root.named_parameters():
                if not parameter.requires_grad:
                    continue
                mine = site.names.get(f"{prefix}{name}", f"{prefix}{name}")
                identity = site.identities.get(f"{prefix}{name}", id(parameter))
                at, other = owner.setdefault(identity, (site.name, mine))
                if at != site.name:
                    raise ConfigurationError(
                        f"{other!r} of stage {at!r} is also {mine!r} of stage {site.name!r}: two stages cannot both "
                        "update one parameter. Put both uses into one stage (balance=[...]), untie them, or freeze it"
                    )


def _copy_buffers(sites: Sequence[Site]) -> None:
    """Layers in training mode write into their buffers: into ours from here on, the user's model keeps its own."""
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the original, so that no other gets its id
    with torch.inference_mode(mode=False):
        for site in sites:
            for _, root in site.modules:
                for module in root.modules():
                    if isinstance(module, torch.jit.ScriptModule):
                        continue
                    for name, buffer in module._buffers.items():
                        if buffer is not None:
                            if id(buffer) not in copies:
                                copies[id(buffer)] = (buffer, buffer.detach().clone())
                            module._buffers[name] = copies[id(buffer)][1]
            if site.rebind is not None:
                site.rebind()


def warn_of_batch_norm(sites: Sequence[Site]) -> None:
    """Say once that batch statistics of one frame are poor."""
    for site in sites:
        for prefix, root in site.modules:
            for name, module in root.named_modules():
                if isinstance(module, _BATCH_STATISTICS) and module.training:
                    warnings.warn(
                        f"{type(module).__name__} at {prefix}{name!r} will take its statistics from each frame alone "
                        "while it learns: with one sample per frame those are poor (and for a single value per channel "
                        "an error). Use GroupNorm or LayerNorm, call .eval() on it, or learn on a replay window",
                        stacklevel=4,
                    )
                    return

"""A module's twin: another module object, the same tensors, the same hooks.

Pieces are made of twins, so that moving one, or giving it new weights, does not reach into the user's model.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


def twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The twin of ``module``; ``made`` holds those made so far, so that what is shared stays shared.

    Hooks are shared with the original, also those added or removed later. Compiled and scripted modules have
    no twin and are used as they are.
    """
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        made[id(module)] = module
        return module
    copy: nn.Module = object.__new__(type(module))
    made[id(module)] = copy
    state: dict[str, Any] = vars(copy)
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            state[name] = MethodType(value.__func__, copy)
        elif type(value) is list and any(isinstance(item, torch.Tensor) for item in value):
            state[name] = list(value)  # a recurrent layer keeps its weights in a list as well
        else:
            state[name] = value
    for table in ("_parameters", "_buffers"):
        state[table] = dict(state[table])
    state["_modules"] = {
        name: None if child is None else twin(child, made) for name, child in state["_modules"].items()
    }
    return copy

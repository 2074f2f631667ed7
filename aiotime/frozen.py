"""A copy of the model for evaluation: made once, given the live weights each time it is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from aiotime.errors import ConfigurationError
from aiotime.stage import StageSpec, spread


class Chain(nn.Module):
    """The stages of `Pipeline.from_stages` one after the other, in one call: functions as they are, modules copied.

    Args:
        stages: (name, function, module or None): where there is a module, the function is not used.
    """

    def __init__(self, stages: Sequence[tuple[str, Callable[[Any], Any], nn.Module | None]]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(module for _, _, module in stages if module is not None)
        self._named = {name: module for name, _, module in stages if module is not None}
        self._calls = [fn if module is None else spread(module) for _, fn, module in stages]

    def forward(self, value: Any) -> Any:
        """What the last stage makes of ``value``."""
        for call in self._calls:
            value = call(value)
        return value

    def take(self, weights: Mapping[str, Any]) -> None:
        """Weights under ``"stage.key"``."""
        for name, module in self._named.items():
            module.load_state_dict({key: weights[f"{name}.{key}"] for key in module.state_dict()})


class Evaluation:
    """Makes the copy when it is first needed. Everything here may take time: call it on a thread.

    Args:
        model: the user's; None for a pipeline of stages.
        specs: the stages, modules: by stage, where there is no model.
    """

    def __init__(self, model: nn.Module | None, specs: Sequence[StageSpec], modules: Mapping[str, nn.Module]) -> None:
        self._model = model
        self._specs = specs
        self._modules = modules
        self._copy: nn.Module | None = None

    def with_weights(self, weights: Mapping[str, Any]) -> nn.Module:
        """The copy, in eval mode, with ``weights``."""
        with torch.inference_mode(mode=False), torch.no_grad():
            if self._copy is None:
                self._copy = self._made()
            if isinstance(self._copy, Chain):
                self._copy.take(weights)
            else:
                self._copy.load_state_dict(dict(weights))
            return self._copy.eval()

    def _made(self) -> nn.Module:
        try:
            if self._model is not None:
                return copy.deepcopy(self._model)
            return Chain([(spec.name, spec.fn, self._copied(spec.name)) for spec in self._specs])
        except Exception as error:
            raise ConfigurationError(
                f"the model cannot be copied for evaluation ({type(error).__name__}: {error}); build another one and "
                "give it pipeline.state_dict()"
            ) from error

    def _copied(self, name: str) -> nn.Module | None:
        module = self._modules.get(name)
        if module is None:
            return None
        apart = copy.deepcopy(module)
        for part in apart.modules():
            slots: dict[str, Any] = part._parameters
            for key, tensor in slots.items():
                if tensor is not None and not isinstance(tensor, nn.Parameter):  # a working tensor of its learner
                    slots[key] = nn.Parameter(tensor.detach())
        return apart

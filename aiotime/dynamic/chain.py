"""Chain: a model cut as `Pipeline` cuts it, as a part of a network: trained with it, instance by instance.

self.trunk = Chain(resnet, example=image, devices=["cuda:0", "cuda:1"])      in Network.__init__
features = await self.trunk(image)                                           in Network.forward
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from aiotime.devices import default_devices, resolve_all
from aiotime.devices.base import Device
from aiotime.dynamic.network import Network
from aiotime.dynamic.stage import Stage
from aiotime.errors import ConfigurationError
from aiotime.ingest.inspection import InputSpec
from aiotime.planning import Plan, make_plan, trace


class Chain(Network):
    """Layers one after the other, cut into stages that work on different instances at the same time.

    Called like a stage inside a network, or a network by itself. (A `Pipeline` is faster where nothing depends on the
    instance, and has every rule of learning; kept as an attribute of a network it is a part that does not learn.)

    Args:
        model: as for `Pipeline`: an ``nn.Sequential``, or a module that can be traced. Its tensors are shared until
            something is learned.
        example: what it is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
        devices: where stages may run, in order.
        balance: ``"measured"``, ``"even"``, or the layers per stage.
        dynamic: dims of every input tensor that may differ from the example's.
        max_batch: waiting calls that a stage runs as one, joined along the first dimension, which must be that of the
            batch all the way through; needs ``dynamic=(0,)`` where the model had to be traced.

    Raises:
        ConfigurationError: arguments that cannot work. TraceError: the model cannot be cut.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> chain = aiotime.dynamic.Chain(model, example=torch.zeros(1, 4), devices=["inline"] * 2, balance="even")
        >>> async def main():
        ...     return [tuple(pred.output.shape) async for pred in chain.run(torch.rand(3, 1, 4))]
        >>> asyncio.run(main())
        [(1, 2), (1, 2), (1, 2)]
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        example: Any,
        devices: Sequence[str | Device] | None = None,
        balance: Literal["measured", "even"] | Sequence[int] = "measured",
        dynamic: Sequence[int] | None = None,
        max_batch: int = 1,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise ConfigurationError(f"a Chain is made of a torch.nn.Module, not of a {type(model).__name__}")
        self._spec = InputSpec(example, dynamic=dynamic)
        example = self._spec.check(example)
        traced = trace(model, example, dynamic=dynamic)
        found = default_devices() if devices is None else resolve_all(devices)
        self.plan: Plan = make_plan(traced, example, found, balance=balance)
        self._cut = traced.cut(self.plan.sizes)
        self.pieces = [
            Stage(piece.module, device=device, max_batch=max_batch, group="cat")
            for piece, device in zip(self._cut, self.plan.place(found), strict=True)
        ]

    async def forward(self, sample: Any) -> Any:
        """From one stage to the next."""
        value = self._spec.check(sample)
        for stage in self.pieces:
            value = await stage(value)
        return value

    def model_state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the weights under the model's own keys, for ``model.load_state_dict``."""
        found: dict[str, torch.Tensor] = {}
        for piece in self._cut:
            found.update({key: value.detach().clone() for key, value in piece.state().items()})
        return found

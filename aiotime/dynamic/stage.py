"""Stage of a network: a module that instances call with ``await stage(x)``, and where it runs.

self.cell = Stage(nn.GRUCell(16, 64), device="cpu:0", max_batch=32)      in Network.__init__
h = await self.cell(x, h)                                                in Network.forward
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from aiotime.batching.joining import Group
from aiotime.devices import resolve
from aiotime.devices.base import Device
from aiotime.dynamic.instance import CURRENT
from aiotime.errors import ConfigurationError
from aiotime.learning.settings import whole_number
from aiotime.stage import Stage as LinearStage

if TYPE_CHECKING:
    from aiotime.dynamic.hands import Hands


class Replica:
    """One copy of a stage's module, what learns it, and its device."""

    __slots__ = ("_training", "device", "fn", "hands", "placed")

    def __init__(self, fn: Callable[..., Any], device: Device | None) -> None:
        self.fn = fn
        self.device = device  # None: the network finds one
        self.hands: Hands | None = None
        self.placed = False
        self._training: list[nn.Module] | None = None

    def training(self) -> list[nn.Module]:
        """The parts of the module that are in training mode unless a network has them infer."""
        if self._training is None:
            self._training = [m for m in self.fn.modules() if m.training] if isinstance(self.fn, nn.Module) else []
        return self._training

    def restore(self) -> None:
        """Put them back into it; whoever changes the mode of one is heard from now on."""
        for module in self._training or ():
            module.training = True
        self._training = None

    def place(self) -> None:
        """Put the module where the device computes."""
        assert self.device is not None
        if not self.placed and isinstance(self.fn, nn.Module):
            self.fn = self.device.place(self.fn)
        self.placed = True


class Stage(LinearStage):
    """One stage of a `Network`.

    Args:
        fn: a module or function. With ``max_batch=1`` it is called as the caller writes it; with more, every tensor
            has one dimension more, the first, and so must what it returns.
        device: ``"cpu:0"``, ``"cuda:0"``, ``"inline"`` or a Device; None: a CPU worker of its own. A list: one replica
            on each.
        name: by default that of the attribute which holds it.
        max_batch: waiting calls of equal shape that run as one (AMPNet's Group).
        max_wait: seconds that a call may wait for company beyond what the device is busy for.
        group: ``"stack"`` makes the first dimension; ``"cat"`` joins along the one there is, whose size may differ from
            call to call (nodes of graphs): row i of what comes out belongs to row i of what went in.
        replicas: copies of the module, each with its own weights and optimizer. An instance stays with one of them.
        average_every: updates of the replicas together after which their weights are averaged.
        inbox: calls that may wait here; further ones wait outside, in order.

    Example:
        >>> aiotime.dynamic.Stage(torch.nn.Linear(2, 2), device="cpu:0", max_batch=8)
        Stage('Linear', device='cpu:0', max_batch=8)
    """

    _joins = "calls"

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        device: str | Device | Sequence[str | Device] | None = None,
        name: str | None = None,
        max_batch: int = 1,
        max_wait: float = 0.0,
        group: Group = "stack",
        replicas: int | None = None,
        average_every: int = 100,
        inbox: int = 4096,
    ) -> None:
        several = [device] if device is None or isinstance(device, str | Device) else list(device)
        first = several[0] if several else None
        super().__init__(fn, device=first, name=name, max_batch=max_batch, max_wait=max_wait, group=group)
        whole_number("average_every", average_every, "a number of updates")
        whole_number("inbox", inbox, "a number of calls")
        if replicas is None:
            replicas = len(several)
        if replicas < 1 or (len(several) > 1 and replicas != len(several)):
            raise ConfigurationError(
                f"stage {self.name!r}: {replicas} replicas on {len(several)} devices; name one device for all of them, "
                "or one for each"
            )
        if replicas > 1 and not isinstance(fn, nn.Module):
            raise ConfigurationError(f"stage {self.name!r}: only a module can have replicas, not a function")
        self.named = name is not None
        self.occupied: Any = None  # the open network that it is part of
        self.average_every = average_every
        self.inbox = inbox
        devices = several * replicas if len(several) == 1 else several
        self.replicas = [
            Replica(fn if number == 0 else copy.deepcopy(fn), None if spec is None else resolve(spec))
            for number, spec in enumerate(devices)
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Queue one call for the instance that is running; ``await`` what it returns.

        That is a future: await or gather it as it is. `asyncio.create_task` and a TaskGroup want a coroutine around it.

        Raises:
            ConfigurationError: outside of a network's forward. InputError: what cannot be batched.
        """
        instance = CURRENT.get()
        if instance is None:
            raise ConfigurationError(
                f"stage {self.name!r} was called outside of an instance: call it from the network's forward, which "
                "network.run(source), network.learn(source) or network.submit(x) start for each sample"
            )
        return instance.call(self, args, kwargs)

    def __repr__(self) -> str:
        more = f", replicas={len(self.replicas)}" if len(self.replicas) > 1 else ""
        return f"Stage({self.name!r}, device={self.device!r}, max_batch={self.max_batch}{more})"

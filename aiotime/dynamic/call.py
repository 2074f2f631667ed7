"""Call: one ``await stage(x)``: what it was given, who uses what it returned, and the gradients that came back.

await stage(h, x) ── Call ──▶ inbox ──▶ batch ──▶ leaves ──▶ the instance's own code ──▶ other calls, the loss
                      ▲                                                                      │
                      └────────── grads of the leaves, once every user has returned its own ─┘
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch

from aiotime.batching.joining import check_constants, flatten, signature, unflatten
from aiotime.errors import InputError

if TYPE_CHECKING:
    from aiotime.dynamic.batch import Batch
    from aiotime.dynamic.instance import Instance
    from aiotime.dynamic.station import Station

_PLAIN = "tensors"  # in place of a pytree's structure: positional tensors and nothing else


class Call:
    """One use of a stage by one instance.

    ``waits`` counts the users of its leaves (calls, the loss) whose gradients have not come back. The call owns
    nothing once it is released.
    """

    __slots__ = (
        "asked",
        "batch",
        "edges",
        "future",
        "instance",
        "leaves",
        "number",
        "parents",
        "row",
        "signature",
        "spec",
        "station",
        "tensors",
        "used",
        "versions",
        "waits",
    )

    def __init__(self, station: Station, instance: Instance, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.station = station
        self.instance = instance
        self.number = 0  # within its instance
        self.asked = 0.0  # seconds, when it was made
        self.future: asyncio.Future[Any] | None = None
        self.batch: Batch | None = None  # that runs or ran it
        self.row = 0
        self.leaves: list[torch.Tensor] = []  # what it returned: detached, requiring grad where there is a graph
        self.parents: tuple[Call, ...] = ()  # whose leaves its inputs are made of
        self.waits = 0
        self.used = False  # some call or the loss is made of its leaves
        self.spec: Any
        self.tensors: list[torch.Tensor]  # among its arguments
        self.edges: list[Any] = []  # for each: where its gradient goes; None for leaves, and where none is wanted
        self.versions: list[int]  # of the tensors when the call was made
        self.signature: Hashable
        if not kwargs and all(type(arg) is torch.Tensor for arg in args):
            self.spec, self.tensors, constants = _PLAIN, list(args), None
        else:
            self.spec, self.tensors, constants = _flattened(station, args, kwargs)
        self.signature = self._signature(constants)
        self.versions = [0 if tensor.is_inference() else tensor._version for tensor in self.tensors]

    def _signature(self, constants: Any) -> Hashable:
        """Equal for calls that may share a batch."""
        station, learning = self.station, self.instance.lesson is not None
        if not station.batches:
            return None
        found = signature(station.name, self.tensors, cat=station.cat, of="calls")
        return (learning, self.spec, constants, found)

    def check_unchanged(self) -> None:
        """Raise where an input was changed in place between the call and its turn."""
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if not tensor.is_inference() and tensor._version != version:
                raise InputError(
                    f"stage {self.station.name!r} was given a tensor of shape {tuple(tensor.shape)} that was changed "
                    "in place before the stage could read it; await the call first, or change a copy"
                )

    def release(self) -> None:
        """Let go of everything: it is over."""
        self.tensors, self.edges, self.leaves, self.parents = [], [], [], ()
        self.batch = self.future = None


def _flattened(station: Station, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """(structure and what stands in it beside tensors, tensors, what must be equal in a batch) of its arguments."""
    flat = flatten((args, kwargs))
    for _, constant in flat.constants:
        _check_constant(station, constant)
    if station.batches:
        check_constants(station.name, flat.constants, of="calls")
    return (flat.structure, flat.constants), flat.tensors, flat.same


def _check_constant(station: Station, constant: Any) -> None:
    """Refuse what is no tensor and should be, or hides one that is to be learned through."""
    if isinstance(constant, asyncio.Future) or inspect.iscoroutine(constant):
        raise InputError(
            f"stage {station.name!r} was given a result that is not there yet: await stage(...) before you use it"
        )
    inside = getattr(constant, "__dict__", None)
    if inside and any(isinstance(value, torch.Tensor) and value.requires_grad for value in inside.values()):
        raise InputError(
            f"stage {station.name!r} was given a {type(constant).__name__} that holds results of stages; no gradient "
            "would come back through it. Hand in the tensors, or tuples, lists and dicts of them"
        )


def unflattened(spec: Any, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) that a call was made with, with ``tensors`` in place of its own."""
    if spec is _PLAIN:
        return tuple(tensors), {}
    structure, constants = spec
    args, kwargs = unflatten(structure, constants, tensors)
    return args, kwargs

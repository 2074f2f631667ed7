"""Weights: a stage's parameters while it learns, in as many versions as its delayed backwards need.

    masters   what the optimizer updates, in place        θ (newest)
    working   what the forward reads and autograd keeps   aliases of a master's storage, without its version counter

Autograd refuses a backward whose weights were changed in place, and rightly so. Because working tensors have counters
of their own, the rule decides instead: with ``keep_old`` an update first moves the masters to fresh storage, so
that graphs made earlier still see the weights of their forward (weight stashing, PipeDream, SOSP 2019); without it they
see the newest ("current" weights). A version costs memory only while a graph uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Slot:
    """A place in a module that holds a parameter, and the parameter's name in the stage."""

    __slots__ = ("attribute", "module", "name")

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name = name
        self.module = module
        self.attribute = attribute

    def get(self) -> Any:
        """The tensor it holds now."""
        return self.module._parameters[self.attribute]

    def put(self, tensor: torch.Tensor) -> None:
        """Hold ``tensor``, which need not be an nn.Parameter."""
        self.module._parameters[self.attribute] = tensor  # type: ignore[assignment]
        if isinstance(self.module, nn.RNNBase):  # it keeps its weights in a list as well
            names = self.module._flat_weights_names
            self.module._flat_weights = [self.module._parameters.get(name) for name in names]


def slots_of(modules: Sequence[tuple[str, nn.Module]], names: Mapping[str, str] | None = None) -> list[Slot]:
    """Every parameter slot of ``modules`` (prefix, module), renamed by ``names``; tied ones as often as they occur."""
    found = []
    for prefix, root in modules:
        for path, module in root.named_modules():
            for attribute, tensor in module._parameters.items():
                if tensor is not None:
                    name = f"{prefix}{path}.{attribute}" if path else f"{prefix}{attribute}"
                    found.append(Slot((names or {}).get(name, name), module, attribute))
    return found


class Weights:
    """The trainable parameters of one stage.

    Args:
        slots: where they are; a slot whose tensor does not require grad is left alone.
        rebind: called after slots were changed (generated code keeps references of its own).

    The tensors found in the slots are copied: whoever made the modules keeps theirs unchanged.
    """

    def __init__(self, slots: Sequence[Slot], *, rebind: Callable[[], Any] | None = None) -> None:
        self._slots = list(slots)
        self._rebind = rebind
        self.names: list[str] = []
        self.masters: list[nn.Parameter] = []
        self.working: list[torch.Tensor] = []
        self._places: list[list[Slot]] = []
        self.version = 0  # updates so far
        self.adopt()

    def adopt(self) -> None:
        """Take over what the slots hold now (at first, and after weights were loaded or moved).

        Masters keep their identity where they can, so that an optimizer's state stays theirs.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            found: dict[int, tuple[torch.Tensor, list[Slot]]] = {}
            for slot in self._slots:
                tensor = slot.get()
                if tensor.requires_grad:
                    found.setdefault(id(tensor), (tensor, []))[1].append(slot)
            known = dict(zip(self.names, self.masters, strict=True))
            self.names, masters, self._places = [], [], []
            for tensor, places in found.values():
                copy = tensor.detach().clone()
                master = known.get(places[0].name)
                if master is None or master.device != copy.device or master.shape != copy.shape:
                    master = nn.Parameter(copy)
                else:
                    master.data = copy
                self.names.append(places[0].name)
                masters.append(master)
                self._places.append(places)
            self.masters = masters
            self.publish()

    def extend(self, slots: Sequence[Slot]) -> None:
        """Take on the parameters of ``slots``, behind those it has; graphs made earlier do not know of them."""
        more = Weights(slots)
        self._slots += more._slots
        self._places += more._places
        self.names += more.names
        self.masters += more.masters
        self.working = [*self.working, *more.working]

    def publish(self) -> None:
        """Make the masters' present storage what the next forward reads.

        The working tensors are parameters: a module takes nothing else in their place when a state is loaded.
        """
        self.install([nn.Parameter(master.data) for master in self.masters])

    def install(self, tensors: Sequence[torch.Tensor]) -> None:
        """Have the next forward read ``tensors``: leaves that require grad, one per master.

        Fewer stand for the first masters: those that there were before `extend`.
        """
        self.working = list(tensors)
        for tensor, places in zip(self.working, self._places, strict=False):
            for slot in places:
                slot.put(tensor)
        if self._rebind is not None:
            self._rebind()

    @contextmanager
    def using(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Read ``tensors`` in place of the working ones inside the block (predicted or older weights)."""
        before = self.working
        self.install(tensors)
        try:
            yield
        finally:
            self.install(before)

    def update(self, step: Callable[[], Any], *, keep_old: bool) -> None:
        """Give the masters new values.

        Args:
            step: changes them in place.
            keep_old: graphs made before keep the weights they were made with.
        """
        with torch.inference_mode(mode=False):
            if keep_old:
                for master in self.masters:
                    master.data = master.data.clone()
            try:
                step()
            finally:  # a step that raised half-way has changed what it has changed; nobody may go on with the rest
                self.version += 1
                if keep_old:
                    self.publish()

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of the masters, detached."""
        return [master.detach().clone() for master in self.masters]

    def nbytes(self) -> int:
        """Bytes of one version."""
        return sum(master.numel() * master.element_size() for master in self.masters)

"""Batch: calls of one stage that run as one: joined, computed, taken apart again; and the same backwards.

    rows x₁ x₂ x₃ ── join ──▶ X ── module ──▶ Y ── part ──▶ rows y₁ y₂ y₃            (AMPNet's Group and Ungroup)
    rows dx₁ dx₂ dx₃ ◀─ part ── dX ◀── autograd ── dY ◀── join ── rows dy₁ dy₂ dy₃   once all of them are there

`forward` and `backward` run where the stage's device stream runs its jobs, everything else on the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from aiotime.batching.joining import check_divisible, flatten, join, no_tensor, part, unflatten
from aiotime.dynamic.call import Call, unflattened

if TYPE_CHECKING:
    from aiotime.dynamic.station import Station

Grads = list[torch.Tensor | None]  # one per tensor


class Batch:
    """Calls with the same signature, and what their forward leaves for their backward.

    Rows may come back at different times. Usually the backward waits for all of them; where the device would idle (an
    instance waits for something outside) some rows go first, with zeros for the others: gradients are sums.
    """

    __slots__ = (
        "begun",
        "busy",
        "calls",
        "done",
        "ended",
        "entry",
        "grads",
        "learning",
        "left",
        "number",
        "outputs",
        "ready",
        "sizes",
        "spec",
        "station",
        "turned",
        "version",
        "weights",
    )

    def __init__(self, station: Station, calls: list[Call], number: int) -> None:
        self.station = station
        self.calls = calls
        self.number = number
        self.learning = calls[0].instance.lesson is not None
        self.left = len(calls)  # rows whose gradient has not come
        self.ready: list[int] = []  # rows whose gradient has come and waits for a backward
        self.busy = False  # a backward of some rows is under way
        self.grads: list[Grads | None] = [None] * len(calls)
        self.entry: list[torch.Tensor] = []  # what the module was called with; leaves of its graph
        self.outputs: list[torch.Tensor] = []  # with their graph
        self.weights: list[torch.Tensor] = []  # that it read
        self.version = 0  # of those weights
        self.sizes: list[int] = []  # of each call's rows, where they are joined along an existing dimension
        self.spec: Any = None  # of the module's output, with what it has beside tensors
        self.done = False  # its forward has ended
        self.begun = self.ended = 0.0  # seconds, of the forward
        self.turned = (0.0, 0.0, 0)  # begin and end of the backward, updates since the forward
        for row, call in enumerate(calls):
            call.batch, call.row = self, row

    # ------------------------------------------------------------------ join and part

    def joined(self) -> list[Any]:
        """The calls' inputs as the module gets them; without a graph."""
        station, calls = self.station, self.calls
        if not station.batches:
            return [tensor.detach() for tensor in calls[0].tensors]
        if station.cat:
            self.sizes = [call.tensors[0].shape[0] if call.tensors else 1 for call in calls]
        with torch.no_grad():
            columns = zip(*(call.tensors for call in calls), strict=True)
            return [join(column, cat=station.cat) for column in columns]

    def parted(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The rows of what `joined` (or the module) made."""
        if not self.station.batches:
            return (tensor,)
        return part(tensor, self.sizes if self.station.cat else None)

    def dangling(self) -> list[bool]:
        """Which of the joined inputs somebody upstream wants a gradient of."""
        return [any(call.tensors[at].requires_grad for call in self.calls) for at in range(len(self.calls[0].tensors))]

    # ------------------------------------------------------------------ what the module does

    def infer(self, given: list[Any]) -> list[torch.Tensor]:
        """The module's output, flat."""
        return self._called(given)

    def learn(self, given: list[Any]) -> list[torch.Tensor]:
        """The same with a graph, which is kept; returns it cut off."""
        wanted = self.dangling()
        self.entry = []
        seen = []
        for tensor, wants in zip(given, wanted, strict=True):
            leaf = tensor.clone() if tensor.is_inference() else tensor.detach()
            if wants:
                leaf.requires_grad_()
            self.entry.append(leaf)
            # a module that writes into its input must not write into what others read, nor into a leaf
            seen.append(leaf.clone() if self.station.writes is not False else leaf)
        versions = [tensor._version for tensor in seen] if self.station.writes is None else []
        self.outputs = self._called(seen)
        if versions:
            self.station.writes = any(t._version != was for t, was in zip(seen, versions, strict=True))
        return [output.detach() for output in self.outputs]

    def _called(self, given: list[Any]) -> list[torch.Tensor]:
        args, kwargs = unflattened(self.calls[0].spec, given)
        output = self.station.fn(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            found, self.spec = [output], None
        else:
            structure, constants, found = flatten(output)
            self.spec = (structure, constants)
        self._check(output, found)
        return found

    def _check(self, output: Any, found: list[torch.Tensor]) -> None:
        station = self.station
        if not found:
            raise no_tensor(station.name, output, of="calls")
        if station.batches:
            rows = sum(self.sizes) if station.cat else len(self.calls)
            check_divisible(station.name, found, rows, cat=station.cat, of="calls")

    def backward(self, seeds: Grads, *, last: bool) -> tuple[Grads, Grads]:
        """(gradients of what went in, gradients of the weights summed over the rows).

        Args:
            seeds: gradients of the outputs, joined; None where nobody used one.
            last: no row of it will come again: the graph is freed.
        """
        pairs = [
            (output, seed)
            for output, seed in zip(self.outputs, seeds, strict=True)
            if seed is not None and output.requires_grad
        ]
        wanted = [leaf for leaf in self.entry if leaf.requires_grad]
        if not pairs or not (wanted or self.weights):
            return [None] * len(self.entry), [None] * len(self.weights)
        grads = torch.autograd.grad(
            [output for output, _ in pairs],
            [*wanted, *self.weights],
            [seed for _, seed in pairs],
            allow_unused=True,
            retain_graph=not last,
        )
        found = iter(grads)
        down = [next(found) if leaf.requires_grad else None for leaf in self.entry]
        return down, list(found)

    # ------------------------------------------------------------------ on the loop

    def seeds(self, chosen: Sequence[int]) -> Grads:
        """The gradients of the ``chosen`` rows joined; zeros for the others."""
        found: Grads = []
        wanted = set(chosen)
        for at, output in enumerate(self.outputs):
            rows = [grads[at] if grads is not None and row in wanted else None for row, grads in enumerate(self.grads)]
            present = next((row for row in rows if row is not None), None)
            if present is None or not output.requires_grad:
                found.append(None)
                continue
            if not self.station.batches:
                found.append(present)
                continue
            if self.station.cat:
                shape = present.shape[1:]
                filled = [
                    present.new_zeros((size, *shape)) if row is None else row
                    for row, size in zip(rows, self.sizes, strict=True)
                ]
                found.append(torch.cat(filled))
            else:
                found.append(torch.stack([torch.zeros_like(present) if row is None else row for row in rows]))
        return found

    def rebuilt(self, rows: list[torch.Tensor]) -> Any:
        """One call's result from its tensors."""
        if self.spec is None:
            return rows[0]
        structure, constants = self.spec
        return unflatten(structure, constants, rows)

    def forget(self) -> None:
        """Free the graph."""
        self.entry, self.outputs, self.weights, self.grads, self.calls = [], [], [], [], []

"""The footprint of learning: bytes that a stage holds for backwards to come, its optimizer and older weights.

One frame goes through the layers, one by one, forward, backward and update, where the model is. What autograd keeps of
it is noted by the memory it lies in, so that what two layers share is counted once in a stage that has both, and
parameters not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from aiotime.learning.rule import Rule
from aiotime.planning.payload import cloned, nbytes
from aiotime.planning.practice import Practice
from aiotime.planning.traced import Traced
from aiotime.planning.untouched import unspent, untouched

Memory = dict[int, int]  # address -> bytes


@dataclass(frozen=True, slots=True)
class StageLearning:
    """What learning adds to a stage; all zero (one version) where a stage only predicts, below all that learns.

    Attributes:
        backward_seconds: one frame, ``recompute`` included; None where nothing was measured.
        update_seconds: one frame: gradients taken in, and the optimizer's step (shared by ``update_every`` frames).
        activation_bytes: of one frame's graph: what autograd kept, what came in, what went out. The loss is not in it.
        input_bytes: of one frame as it comes in.
        graphs: frames of which they are kept at once.
        recompute: a frame waits as its input alone, and there is one graph at a time.
        weight_bytes: of the parameters that learn, one version.
        versions: of them kept at once, the newest counted.
        optimizer_bytes: of the optimizer's state.
    """

    backward_seconds: float | None
    update_seconds: float | None
    activation_bytes: int
    input_bytes: int
    graphs: int
    recompute: bool
    weight_bytes: int
    versions: int
    optimizer_bytes: int

    @property
    def kept_bytes(self) -> int:
        """Activations at most, of all frames under way."""
        if self.recompute and self.graphs:
            return self.graphs * self.input_bytes + self.activation_bytes
        return self.graphs * self.activation_bytes

    @property
    def nbytes(self) -> int:
        """All that learning adds: activations, older weights, one gradient, the optimizer's state."""
        return self.kept_bytes + self.versions * self.weight_bytes + self.optimizer_bytes


class Footprint:
    """What the layers of a model hold while ``rule`` learns.

    Args:
        traced: the model; it is not changed.
        example: a frame.
        rule: says how many frames and versions are kept.

    Attributes:
        first: the first layer that learns.
        back_bytes: of the gradient that goes back through each cut.
    """

    def __init__(self, traced: Traced, example: Any, rule: Rule) -> None:
        self.rule = rule
        trainable = [traced.trainable(at) for at in range(len(traced.layers))]
        self.first = next((at for at, found in enumerate(trainable) if found), len(trainable))
        self._saved: list[Memory] = []
        self._entry: list[Memory] = []
        self._exit: list[Memory] = []
        self._optimizer: list[int] = []
        self._differentiable: list[int] = []  # bytes of what enters each layer, without indices and masks
        self._graphs: dict[int, list[int]] = {}  # first layer -> bytes of the graph, by the number of layers
        self._counts: dict[tuple[int, int], tuple[int, int]] = {}
        owners: dict[int, int] = {}  # parameter -> the first layer that uses it
        for at, found in enumerate(trainable):
            for parameter in found:
                owners.setdefault(parameter, at)
        own = [
            sum(nbytes(tensor) for parameter, tensor in found.items() if owners[parameter] == at)
            for at, found in enumerate(trainable)
        ]
        with untouched(traced.model), unspent(traced.model):
            self._walk(traced, cloned(example))
        self._weights = [0, *accumulate(own)]
        self._states = [0, *accumulate(self._optimizer)]
        crosses = rule.reach(0, 2) > 0
        self.back_bytes = tuple(
            size if crosses and at > self.first else 0 for at, size in enumerate(self._differentiable)
        )
        self._parameters = [0, *accumulate(layer.parameter_bytes for layer in traced.layers)]

    def stage(
        self, first: int, stop: int, stage: int, stages: int, *, seconds: tuple[float, float] | None = None
    ) -> StageLearning:
        """Layers ``first`` to ``stop - 1`` as ``stage`` of ``stages``; ``seconds``: of backward and update."""
        backward, update = (None, None) if seconds is None else seconds
        if stop <= self.first:
            return StageLearning(backward, update, 0, 0, 0, False, 0, 1, 0)
        graphs, versions = self._kept(stage, stages)
        return StageLearning(
            backward,
            update,
            activation_bytes=self._graph(first, stop),
            input_bytes=sum(self._entry[first].values()),
            graphs=graphs,
            recompute=bool(self.rule.recompute),
            weight_bytes=self._weights[stop] - self._weights[first],
            versions=versions,
            optimizer_bytes=self._states[stop] - self._states[first],
        )

    def holding(self, first: int, stop: int, stage: int, stages: int) -> int:
        """Bytes that such a stage holds at most."""
        return self._parameters[stop] - self._parameters[first] + self.stage(first, stop, stage, stages).nbytes

    def _kept(self, stage: int, stages: int) -> tuple[int, int]:
        if (stage, stages) not in self._counts:
            self._counts[stage, stages] = (self.rule.graphs(stage, stages), self.rule.versions(stage, stages))
        return self._counts[stage, stages]

    def _graph(self, first: int, stop: int) -> int:
        if first not in self._graphs:
            seen = set(self._entry[first])
            total = sum(self._entry[first].values())
            sizes = [0]
            for at in range(first, len(self._saved)):
                total += sum(size for place, size in self._saved[at].items() if place not in seen)
                seen.update(self._saved[at])
                sizes.append(total + sum(size for place, size in self._exit[at].items() if place not in seen))
            self._graphs[first] = sizes
        return self._graphs[first][stop - first]

    def _walk(self, traced: Traced, value: Any) -> None:
        alive: list[Any] = []  # nothing is freed on the way, so that no memory is seen twice for different things
        counted: set[int] = set()
        for at in range(len(traced.layers)):
            piece = traced.piece(at, at + 1, apart=True)
            practice = Practice.of(piece, self.rule, differentiable=at > self.first)
            practice.forward(value)  # finds out whether the layer writes into its input
            kept: list[torch.Tensor] = []

            def pack(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
                kept.append(tensor.detach())
                return kept[-1]  # the tensor itself would keep its own graph alive

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
                output = practice.forward(value)
            own = _memory([*piece.module.parameters(), *practice.weights.working, *piece.module.buffers()])
            self._saved.append({place: size for place, size in _memory(kept).items() if place not in own})
            self._entry.append(_memory(practice.entry))
            self._exit.append(_memory(practice.outputs))
            self._differentiable.append(nbytes([leaf for leaf in practice.entry if leaf.requires_grad]))
            practice.backward(value)
            practice.update(value)
            self._optimizer.append(_state(practice, counted))
            alive.append((practice, kept, output))
            value = output


def _state(practice: Practice, counted: set[int]) -> int:
    """Bytes of the optimizer's state of the parameters not yet counted."""
    if practice.updater is None:
        return 0
    state = practice.updater.optimizer.state
    total = 0
    for source, master in zip(practice.sources, practice.weights.masters, strict=True):
        if source not in counted:
            counted.add(source)
            total += nbytes(state.get(master, {}))
    return total


def _memory(found: Sequence[torch.Tensor]) -> Memory:
    """Where these tensors lie; all of it, where a tensor is a view of more."""
    places: Memory = {}
    for tensor in found:
        if tensor.layout is not torch.strided:  # sparse: its parts are of no concern to anybody else
            places[id(tensor)] = tensor.element_size() * tensor._nnz()
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes():
            places[storage.data_ptr()] = storage.nbytes()
    return places

"""A traced model: its layers, and the pieces it can be cut into."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError, PlanError
from aiotime.planning.assembly import Assembly, Writer
from aiotime.planning.capture import Captured
from aiotime.planning.layers import Layer, names
from aiotime.planning.payload import nbytes
from aiotime.planning.piece import Piece
from aiotime.planning.recording import Recording

_pieces = itertools.count()


class Traced:
    """What `trace` found.

    Attributes:
        layers: in order.
        cut_bytes: bytes that cross each cut on the example: the payload, before layer 1, before layer 2, …
        output_bytes: bytes of the model's output on the example.
        dynamic: the dimensions that may vary, None where shapes are the example's.
        example: a copy of the example.
        how: "sequential" (between children), "fx" or "export" (in the graph).
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        recording: Recording,
        edges: Sequence[int],
        device: torch.device,
        example: Any,
        dynamic: tuple[int, ...] | None,
    ) -> None:
        self.model = model
        self.example = example
        self.dynamic = dynamic
        self.how = captured.how
        self._captured = captured
        self._recording = recording
        self._edges = list(edges)
        self._device = device
        self._keys = _persistent(model)
        self._used = [self._tensors_used(layer) for layer in range(len(edges) - 1)]
        self._adopted = self._adoptions()
        self._changed = {id(tensor) for tensor in recording.changed}
        self.layers: tuple[Layer, ...] = tuple(
            Layer(name, nbytes([*self._used[at].values(), *self._adopted_tensors(at).values()]))
            for at, name in enumerate(names(recording, edges))
        )
        self.cut_bytes: tuple[int, ...] = tuple(
            nbytes(example) if cut == 0 else sum(recording.bytes[node] for node in recording.live(cut))
            for cut in self._edges[:-1]
        )
        self.output_bytes = nbytes(recording.output)
        recording.output = None  # the activations need not outlive the trace

    @property
    def has_state(self) -> bool:
        """Whether a frame changes the model's own tensors (batch norm in training mode, a recurrent buffer)."""
        return bool(self._changed)

    def writes_input(self, layer: int) -> bool:
        """Whether ``layer`` changes in place what comes into it."""
        first, stop = self._edges[layer], self._edges[layer + 1]
        return any(origin < first for step, origin in self._recording.writes.items() if first <= step < stop)

    def trainable(self, layer: int) -> dict[int, nn.Parameter]:
        """The parameters of ``layer`` that require grad, by identity."""
        found = itertools.chain(self._used[layer].values(), self._adopted_tensors(layer).values())
        return {id(tensor): tensor for tensor in found if isinstance(tensor, nn.Parameter) and tensor.requires_grad}

    def shared(self) -> frozenset[int]:
        """Cuts between two layers that use one trainable parameter: in two stages, both would update it."""
        first: dict[int, int] = {}
        cuts: set[int] = set()
        for layer in range(len(self.layers)):
            for parameter in self.trainable(layer):
                cuts.update(range(first.setdefault(parameter, layer) + 1, layer + 1))
        return frozenset(cuts)

    def cut(self, sizes: Sequence[int]) -> list[Piece]:
        """Pieces of ``sizes[0]``, ``sizes[1]``, … layers.

        Raises:
            PlanError: the sizes do not add up to the number of layers, or one is less than 1.
        """
        if not sizes or any(size < 1 for size in sizes) or sum(sizes) != len(self.layers):
            raise PlanError(
                f"{list(sizes)} does not divide {len(self.layers)} layers: every stage needs at least one layer, "
                f"and together they must have {len(self.layers)}"
            )
        ends = list(itertools.accumulate(sizes, initial=0))
        return [self.piece(first, stop) for first, stop in itertools.pairwise(ends)]

    def piece(self, first: int, stop: int, *, apart: bool = False) -> Piece:
        """Layers ``first`` to ``stop - 1`` as a piece.

        Args:
            first: position of its first layer.
            stop: position after its last layer.
            apart: with copies of the tensors that a frame changes, so that running it does not change the model.
        """
        used: dict[str, Any] = {}  # paths of the tensors and modules in this piece
        for step in self._recording.steps[self._edges[first] : self._edges[stop]]:
            used.update((target, self._captured.attributes[target]) for target in _targets(step))
        if stop == len(self.layers):
            output = self._captured.graph.output_node()
            used.update((target, self._captured.attributes[target]) for target in _targets(output))
        assembly = Assembly(self._device)
        for path in sorted(used):
            if not assembly.has(path):
                assembly.add(path, used[path], persistent=path in self._keys)
        adopted = {key: tensor for at in range(first, stop) for key, tensor in self._adopted_tensors(at).items()}
        for key, tensor in adopted.items():
            if not assembly.has(key):
                assembly.add(key, tensor)
        keys = self._slots_of(assembly.module)
        if apart:
            assembly.separate(self._changed)
        places = {f"a{at}": path for at, path in enumerate(sorted(used))}
        shortcut = {path: name for name, path in places.items()}
        label = f"aiotime_piece_{next(_pieces)}"
        slow = self._written(first, stop, Writer(self._device, str)).compiled(label)
        fast = self._written(first, stop, Writer(self._device, shortcut.__getitem__)).compiled(label)
        return Piece(
            assembly.finished(slow, places),
            fast,
            layers=[layer.name for layer in self.layers[first:stop]],
            steps=self._edges[stop] - self._edges[first],
            keys=keys,
        )

    def _written(self, first: int, stop: int, writer: Writer) -> Writer:
        begin, end = self._edges[first], self._edges[stop]
        if begin == 0:
            self._write_entry(writer, end)
        else:
            self._write_arrival(writer, begin)
        for step in self._recording.steps[begin:end]:
            writer.step(step)
        if stop == len(self.layers):
            writer.graph.output(fx.map_arg(self._captured.graph.output_node().args[0], writer.operand))
        else:
            self._write_departure(writer, end)
        return writer

    def _write_entry(self, writer: Writer, end: int) -> None:
        """From the payload to the inputs."""
        payload = self._captured.payload
        value = writer.value
        if payload.check is not None:
            value = writer.graph.call_function(payload.check, (value,))
        for node, path in self._captured.inputs.items():
            if self._recording.last_use[node] < 0:
                continue
            inner = value
            for key in path:
                inner = _entered(writer.graph, inner, key)
            writer.nodes[node] = inner

    def _write_arrival(self, writer: Writer, begin: int) -> None:
        """From the flat tuple to the values that cross the cut."""
        at = itertools.count()
        items = self._recording.live(begin)
        for node in items:
            spec = self._recording.spec.get(node)
            leaves = [
                writer.graph.call_function(operator.getitem, (writer.value, next(at)))
                for _ in range(1 if spec is None else spec.num_leaves)
            ]
            whole = leaves[0] if spec is None else writer.graph.call_function(_unpacker(spec), tuple(leaves))
            writer.nodes[node] = whole

    def _write_departure(self, writer: Writer, end: int) -> None:
        """From the values that cross the cut to the flat tuple."""
        items: list[fx.Node] = []
        for node in self._recording.live(end):
            spec = self._recording.spec.get(node)
            if spec is None:
                items.append(writer.operand(node))
            else:
                packed = writer.graph.call_function(_packer(spec, node.name), (writer.operand(node),))
                leaves = range(spec.num_leaves)
                items.extend(writer.graph.call_function(operator.getitem, (packed, leaf)) for leaf in leaves)
        writer.graph.output(tuple(items))

    def _tensors_used(self, layer: int) -> dict[int, torch.Tensor]:
        tensors: dict[int, torch.Tensor] = {}
        for step in self._recording.steps[self._edges[layer] : self._edges[layer + 1]]:
            for target in _targets(step):
                value = self._captured.attributes[target]
                inside = (
                    itertools.chain(value.parameters(), value.buffers()) if isinstance(value, nn.Module) else [value]
                )
                tensors.update((id(tensor), tensor) for tensor in inside if isinstance(tensor, torch.Tensor))
        return tensors

    def _adoptions(self) -> dict[str, int]:
        """A layer for each key of the state_dict that no layer uses: the one nearest to it in the model."""
        used = {tensor for layer in self._used for tensor in layer}
        homes: dict[str, int] = {}  # module -> the first layer that uses something of it
        for at in range(len(self._used)):
            for key, tensor in self._keys.items():
                if id(tensor) in self._used[at]:
                    for home in _homes(key):
                        homes.setdefault(home, at)
        last = len(self._used) - 1
        return {
            key: next((homes[home] for home in _homes(key) if home in homes), last)
            for key, tensor in self._keys.items()
            if id(tensor) not in used
        }

    def _adopted_tensors(self, layer: int) -> dict[str, torch.Tensor]:
        return {key: self._keys[key] for key, home in self._adopted.items() if home == layer}

    def _slots_of(self, module: nn.Module) -> dict[str, str]:
        """The model's state_dict keys whose tensors this piece has -> where it has them."""
        state = module.state_dict(keep_vars=True)
        places: dict[int, str] = {}
        for slot, tensor in state.items():
            places.setdefault(id(tensor), slot)
        return {
            key: key if key in state and state[key] is tensor else places[id(tensor)]
            for key, tensor in self._keys.items()
            if id(tensor) in places
        }


def _persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers in the model's state_dict; a tied one under each of its keys."""
    keys = model.state_dict(keep_vars=True)
    found = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    tensors = dict(found)
    return {key: tensors[key] for key in keys if key in tensors}


def _homes(key: str) -> Iterator[str]:
    """The modules a key is inside of, innermost first."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:depth])


def _targets(step: fx.Node) -> list[str]:
    found = [str(node.target) for node in step.all_input_nodes if node.op == "get_attr"]
    return [*found, str(step.target)] if step.op == "call_module" else found


def _entered(graph: fx.Graph, value: fx.Node, key: pytree.KeyEntry) -> fx.Node:
    if isinstance(key, pytree.SequenceKey):
        return graph.call_function(operator.getitem, (value, key.idx))
    if isinstance(key, pytree.MappingKey):
        return graph.call_function(operator.getitem, (value, key.key))
    return graph.call_function(_taken(key), (value,))


def _taken(key: pytree.KeyEntry) -> Any:
    def take(value: Any) -> Any:
        return key.get(value)

    return take


def _packer(spec: pytree.TreeSpec, name: str) -> Any:
    def pack(value: Any) -> list[Any]:
        leaves, came = pytree.tree_flatten(value)
        if came != spec:
            raise ConfigurationError(
                f"{name!r} crosses a cut and had the structure {spec} on the example, now it has {came}; "
                "give every frame the same structure"
            )
        return leaves

    return pack


def _unpacker(spec: pytree.TreeSpec) -> Any:
    def unpack(*leaves: Any) -> Any:
        return pytree.tree_unflatten(list(leaves), spec)

    return unpack

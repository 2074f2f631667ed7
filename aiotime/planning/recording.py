"""One run of a captured graph on the example: what each node makes, reads and changes.

From it follow the bytes that cross a cut, the work in each node, and the places where the graph must not be cut:

- between the first and last use of a tensor of the model that a frame changes (a later frame would read it too soon);
- before an in-place change of a value of which two views cross the cut (copied to a device they part company).
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aiotime.planning.capture import Captured
from aiotime.planning.payload import nbytes, tensors
from aiotime.planning.untouched import same

_MOVED = 8.0  # work of moving one element of memory, in floating-point operations


@dataclass(eq=False)
class Recording:
    """What was seen. ``steps`` are the nodes that do work, in order; a cut ``c`` lies just before step ``c``.

    Attributes:
        bytes: per node with a value, the bytes of its tensors.
        spec: per node whose value is a structure with tensors in it, that structure.
        work: per step, floating-point operations plus memory moved; the same on every machine.
        position: per node with a value, the step that makes it, -1 for an input; in graph order.
        last_use: per node with a value, the last step that reads it (``len(steps)`` for an output).
        uncuttable: cuts that would change what the model computes.
        changed: tensors of the model that a frame changes.
        writes: per step that changes a value made before it, the earliest step whose value it changes.
        output: what the run returned.
    """

    steps: list[fx.Node]
    bytes: dict[fx.Node, int] = field(default_factory=dict)
    spec: dict[fx.Node, pytree.TreeSpec] = field(default_factory=dict)
    work: list[float] = field(default_factory=list)
    position: dict[fx.Node, int] = field(default_factory=dict)
    last_use: dict[fx.Node, int] = field(default_factory=dict)
    uncuttable: set[int] = field(default_factory=set)
    changed: list[torch.Tensor] = field(default_factory=list)
    writes: dict[int, int] = field(default_factory=dict)
    output: Any = None
    leaks: torch.Tensor | None = None  # a changed tensor of the model that is part of the output

    def live(self, cut: int) -> list[fx.Node]:
        """The values that cross ``cut``, in the order they were made."""
        return [node for node, last in self.last_use.items() if self.position[node] < cut <= last]


def record(captured: Captured, example: Any) -> Recording:
    """Run ``captured`` on ``example``, whose tensors may be changed, as may the model's buffers."""
    return _Recorder(captured, example).run()


class _Recorder(fx.Interpreter):
    def __init__(self, captured: Captured, example: Any) -> None:
        root = nn.Module()
        super().__init__(root, garbage_collect_values=False, graph=captured.graph)
        self.captured = captured
        self.example = example
        nodes = list(captured.graph.nodes)
        self.seen = Recording([node for node in nodes if node.op.startswith("call_")])
        self.buffers = self._model_tensors()

    def _model_tensors(self) -> dict[int, list[torch.Tensor]]:
        """The captured tensors by storage."""
        found: dict[int, list[torch.Tensor]] = defaultdict(list)
        known: set[int] = set()
        for value in self.captured.attributes.values():
            for tensor in _tensors_of(value):
                if id(tensor) not in known:
                    known.add(id(tensor))
                    found[_storage(tensor)].append(tensor)
        return found

    def run(self) -> Recording:  # type: ignore[override]
        seen = self.seen
        order = {node: at for at, node in enumerate(seen.steps)}
        for node in self.captured.graph.nodes:
            if node.op == "placeholder" or node.op.startswith("call_"):
                seen.position[node] = order.get(node, -1)
                uses = [order.get(user, len(seen.steps)) for user in node.users]
                seen.last_use[node] = max(uses, default=-1)
        held: dict[int, list[fx.Node]] = defaultdict(list)  # storage -> live nodes that have it
        touched: dict[int, list[int]] = defaultdict(list)  # storage of the model -> steps that use it
        changes: list[tuple[int, int]] = []  # (step, storage) of values changed in place
        altered: set[int] = set()  # storages of the model that are changed
        self.env = {}
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                value = self.example
                for key in self.captured.inputs[node]:
                    value = key.get(value)
                self._keep(node, value, held)
            elif node.op == "get_attr":
                self.env[node] = self.captured.attributes[node.target]
            elif node.op == "output":
                seen.output = _thawed(fx.map_arg(node.args[0], lambda used: self.env[used]))
            else:
                self._step(node, order[node], held, touched, changes, altered)
        for step, storage in changes:
            earlier = [node for node in held[storage] if seen.position[node] < step <= seen.last_use[node]]
            seen.writes[step] = min([seen.writes.get(step, step), *(seen.position[node] for node in earlier)])
            for cut in range(1, step + 1):
                crossing = [node for node in held[storage] if seen.position[node] < cut <= seen.last_use[node]]
                if len(crossing) > 1:
                    seen.uncuttable.add(cut)
        for storage in altered:
            seen.changed.extend(self.buffers[storage])
            seen.uncuttable.update(range(min(touched[storage]) + 1, max(touched[storage]) + 1))
        for tensor in tensors(seen.output):
            if _storage(tensor) in altered:
                seen.leaks = self.buffers[_storage(tensor)][0]
        return seen

    def _step(
        self,
        node: fx.Node,
        step: int,
        held: dict[int, list[fx.Node]],
        touched: dict[int, list[int]],
        changes: list[tuple[int, int]],
        altered: set[int],
    ) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        read = list(tensors((args, kwargs)))
        operands = [value for value in itertools.chain(args, kwargs.values()) if isinstance(value, nn.Module)]
        if node.op == "call_module":
            operands.append(self.captured.attributes[str(node.target)])
        owned = {_storage(tensor) for tensor in read} & self.buffers.keys()
        owned |= {_storage(tensor) for module in operands for tensor in _tensors_of(module)}
        for storage in owned:
            touched[storage].append(step)
        before = [(storage, tensor, _fingerprint(tensor)) for storage in owned for tensor in self.buffers[storage]]
        versions = [(tensor, _version(tensor)) for tensor in read]
        if node.op == "call_module":
            operation = self.captured.attributes[str(node.target)]
        else:
            operation = functools.partial(getattr(self, node.op), node.target)
            args, kwargs = (args, kwargs), {}
        with _Work() if node.op == "call_module" or not operands else nullcontext() as work:
            value = operation(*args, **kwargs)
        # a higher-order operator refuses to run below a mode: judged by what it reads
        self.seen.work.append(_MOVED * sum(tensor.numel() for tensor in read) if work is None else work.done)
        altered.update(storage for storage, tensor, earlier in before if _differs(tensor, earlier))
        for tensor, version in versions:
            if _version(tensor) != version and _storage(tensor) not in self.buffers:
                changes.append((step, _storage(tensor)))
        self._keep(node, value, held)
        for used in node.all_input_nodes:
            if self.seen.last_use.get(used, -1) == step:
                self.env.pop(used, None)

    def _keep(self, node: fx.Node, value: Any, held: dict[int, list[fx.Node]]) -> None:
        self.env[node] = value
        self.seen.bytes[node] = nbytes(value)
        for tensor in tensors(value):
            if node not in held[_storage(tensor)]:
                held[_storage(tensor)].append(node)
        if not isinstance(value, torch.Tensor) and any(True for _ in tensors(value)):
            self.seen.spec[node] = pytree.tree_structure(value)


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up floating-point operations and elements moved."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view:
            if func._overloadpacket in flop_registry:
                self.done += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            moved = itertools.chain(tensors(args), tensors(kwargs), tensors(result))
            self.done += _MOVED * sum(tensor.numel() for tensor in moved)
        return result


def _thawed(value: Any) -> Any:
    """A graph holds immutable twins of dict and list; its code makes plain ones."""
    if isinstance(value, immutable_dict):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, immutable_list):
        return [_thawed(item) for item in value]
    if type(value) is tuple:
        return tuple(_thawed(item) for item in value)
    return value


def _tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, torch.Tensor):
        yield value


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a tensor without one storage (sparse): itself
        return id(tensor)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else int(tensor._version)


def _fingerprint(tensor: torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """A parameter is known by its version alone; a buffer also by its values: batch norm writes behind the version."""
    return _version(tensor), None if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _differs(tensor: torch.Tensor, earlier: tuple[int, torch.Tensor | None]) -> bool:
    version, value = earlier
    return _version(tensor) != version or (value is not None and not same(tensor, value))

"""Putting a piece together: the modules it owns and the code it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from aiotime.planning.piece import PieceModule, like, slots
from aiotime.planning.twin import twin

_DEVICE = "piece_device"  # attribute that stands for the device the model was traced on


class Assembly:
    """The modules of a piece while it is put together: twins of the model's, shared tensors, constants."""

    def __init__(self, device: torch.device) -> None:
        self.module = PieceModule(device)
        self._twins: dict[int, nn.Module] = {}

    def add(self, path: str, value: Any, *, persistent: bool = True) -> None:
        """Put a tensor or the twin of a module at ``path``."""
        home, name = self._home(path)
        if isinstance(value, fx.GraphModule):
            own = fx.GraphModule(value, _copied(value.graph))
            self.module._piece_graphs.append(own)
            setattr(home, name, own)
        elif isinstance(value, nn.Module):
            home.add_module(name, twin(value, self._twins))
        elif isinstance(value, nn.Parameter):
            home.register_parameter(name, value)
        elif isinstance(value, torch.Tensor):
            home.register_buffer(name, value, persistent=persistent)
        else:
            setattr(home, name, value)

    def has(self, path: str) -> bool:
        """Whether something is at ``path``."""
        try:
            operator.attrgetter(path)(self.module)
        except AttributeError:
            return False
        return True

    def separate(self, tensors: set[int]) -> None:
        """Give the piece copies of its own of these tensors (by identity)."""
        copies: dict[int, torch.Tensor] = {}
        for module, name, tensor in slots(self.module).values():
            if id(tensor) in tensors:
                if id(tensor) not in copies:
                    copies[id(tensor)] = like(tensor, tensor.detach().clone())
                setattr(module, name, copies[id(tensor)])

    def finished(self, code: Callable[[Any, Any], Any], places: dict[str, str]) -> PieceModule:
        """The module, with its code and the places that the piece's own code reaches directly."""
        self.module._piece_code = code
        self.module._piece_places = places
        return self.module

    def _home(self, path: str) -> tuple[nn.Module, str]:
        home: nn.Module = self.module
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in home._modules:
                home.add_module(parent, nn.Module())
            home = home.get_submodule(parent)
        return home, name


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


class Writer:
    """Writes the code of a piece: a graph with one input, ``value``, whose constants are attributes of ``self``."""

    def __init__(self, device: torch.device, rename: Callable[[str], str]) -> None:
        self.graph = fx.Graph()
        self.value = self.graph.placeholder("value")
        self.nodes: dict[fx.Node, fx.Node] = {}
        self._device = device
        self._rename = rename
        self._device_node = self.graph.create_node("get_attr", _DEVICE)

    def step(self, node: fx.Node) -> None:
        """Copy one step of the model's graph."""
        copy = self.graph.node_copy(node, self.operand)
        if copy.op == "call_module":
            copy.target = self._rename(str(copy.target))
        copy.args = tuple(self._movable(arg) for arg in copy.args)
        copy.kwargs = {name: self._movable(arg, name) for name, arg in copy.kwargs.items()}
        self.nodes[node] = copy

    def operand(self, node: fx.Node) -> fx.Node:
        """What stands for ``node`` here."""
        if node not in self.nodes:
            assert node.op == "get_attr", f"{node} neither enters this piece nor is made in it"
            self.nodes[node] = self.graph.create_node("get_attr", self._rename(str(node.target)))
        return self.nodes[node]

    def _movable(self, value: Any, name: str = "") -> Any:
        """A constant that says where the model was traced becomes one that says where the piece is."""
        here = isinstance(value, torch.device) or (name == "device" and isinstance(value, str))
        if not here or torch.device(value) != self._device:
            return value
        return self._device_node

    def compiled(self, label: str) -> Callable[[Any, Any], Any]:
        """The code as a function ``(self, value) -> value``; each value is let go after its last use."""
        if not self._device_node.users:
            self.graph.erase_node(self._device_node)
        code = self.graph.python_code(root_module="self")
        scope = dict(code.globals)
        scope["__name__"] = label
        scope["__loader__"] = _Source(code.src)  # tracebacks find the line through it
        exec(compile(code.src, f"{label}.py", "exec"), scope)
        forward = scope["forward"]
        assert isinstance(forward, FunctionType)
        return forward


class _Source:
    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, name: str) -> str:
        return self._source

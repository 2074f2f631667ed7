"""Three ways from a model to a graph of its work.

    nn.Sequential      its children, one after the other; nothing is traced
    torch.fx           keeps the model's modules and their hooks; follows no control flow
    torch.export       any program of tensors, down to single operations

A captured graph refers to tensors and modules by the model's own qualified names and never changes the model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import operator
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from aiotime.planning.payload import Path, Payload, arguments

# containers of torch.nn whose insides are worth cutting; every other module of torch.nn is one layer
_CONTAINERS = (nn.Sequential, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(eq=False)
class Captured:
    """A model's work as a graph.

    Attributes:
        graph: placeholders are the payload's inputs; its output node has the model's own structure.
        attributes: what each get_attr and call_module target of the graph names.
        payload: the calling convention.
        inputs: where in the payload each placeholder is found.
        how: "sequential", "fx" or "export".
    """

    graph: fx.Graph
    attributes: dict[str, Any]
    payload: Payload
    inputs: dict[fx.Node, Path]
    how: str


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its ``forward``."""
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def is_plain_sequential(module: nn.Module) -> bool:
    """An nn.Sequential whose call is nothing but its children's, one after the other."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in vars(module)
    )


def capture_sequential(model: nn.Module, example: Any) -> Captured:
    """Child after child of a plain Sequential."""
    payload = Payload(example, whole=True)
    graph = fx.Graph()
    value = graph.placeholder("value")
    inputs = {value: payload.inputs[0][0]}
    attributes: dict[str, Any] = {}
    for name, child in _children(model):
        attributes[name] = child
        value = graph.call_module(name, (value,))
    graph.output(value)
    return Captured(graph, attributes, payload, inputs, "sequential")


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The children of a plain Sequential by qualified name, nested ones flattened (but for those with hooks)."""
    for name, child in module._modules.items():  # unlike named_children it repeats a child that occurs twice
        if child is None:
            continue
        if is_plain_sequential(child) and not has_hooks(child):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def capture_modules(model: nn.Module, example: Any) -> Captured:
    """By torch.fx: leaf modules stay modules. Raises whatever stops it."""
    payload = Payload(example)
    tracer = _ModuleTracer(payload)
    graph = tracer.trace(model)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = {node: path for node, (path, _) in zip(placeholders, payload.inputs, strict=True)}
    return Captured(graph, _attributes(graph, model), payload, inputs, "fx")


class _Untraceable(Exception):
    """Found while tracing: something that a torch.fx graph would lose."""


class _ModuleTracer(fx.Tracer):
    proxy_buffer_attributes = True  # or an in-place change of a buffer would happen while tracing, and be lost

    def __init__(self, payload: Payload) -> None:
        super().__init__(param_shapes_constant=True)
        self._payload = payload
        self._ambient = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if has_hooks(m) or isinstance(m, torch.jit.ScriptModule) or hasattr(m, "_orig_mod"):
            return True
        home = type(m).__module__
        return home.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(m, _CONTAINERS)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = [self.create_proxy("placeholder", f"input_{at}", (), {}) for at in range(len(self._payload.inputs))]

        def run(*inputs: Any) -> Any:
            left = iter(inputs)
            args, kwargs = arguments(self._payload.replaced(lambda _: next(left)))
            return root_fn(self.root, *args, **kwargs)

        return run, proxies

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._ambient:
            raise _Untraceable("torch.fx would lose the autocast or grad mode set inside the model")
        return super().create_node(kind, *args, **kwargs)


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def capture_operations(model: nn.Module, example: Any, dynamic: tuple[int, ...] | None) -> Captured:
    """By torch.export, not strict. Raises whatever stops it."""
    sample = example if dynamic is None else _grown(example, dynamic)
    args, kwargs = arguments(sample)
    with _quiet():
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=_dynamic_shapes(model, sample, dynamic), strict=False
        )
        module = program.module()
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    if isinstance(example, dict):  # export flattens keyword arguments in an order of its own
        names = module._in_spec.children()[1].context
        example = {name: example[name] for name in names}
    payload = Payload(example)
    _flatten_inputs(graph, payload, guarded=dynamic is not None)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = {node: path for node, (path, _) in zip(placeholders, payload.inputs, strict=True)}
    _raise_copies(graph)
    output = graph.output_node()
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    leaves = output.args[0]
    assert isinstance(leaves, tuple | list), "an exported program returns a flat tuple"
    output.args = (_unflattened(graph, output, list(leaves), info.out_spec),)
    graph.set_codegen(fx.graph.CodeGen())
    return Captured(graph, _attributes(graph, module), payload, inputs, "export")


def _dynamic_shapes(model: nn.Module, sample: Any, dynamic: tuple[int, ...] | None) -> dict[str, Any] | None:
    if dynamic is None:
        return None

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return {dim: torch.export.Dim.DYNAMIC for dim in dynamic if dim < leaf.dim()}

    args, kwargs = arguments(sample)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(dims, value) for name, value in bound.items()}


def _grown(example: Any, dynamic: tuple[int, ...]) -> Any:
    """``example`` with dynamic dimensions of size 1 doubled: export would take the 1 for a constant."""

    def grow(leaf: torch.Tensor) -> torch.Tensor:
        repeats = [2 if dim in dynamic and size == 1 else 1 for dim, size in enumerate(leaf.shape)]
        return leaf.repeat(repeats) if 2 in repeats else leaf

    return pytree.tree_map_only(torch.Tensor, grow, example)


def _flatten_inputs(graph: fx.Graph, payload: Payload, *, guarded: bool) -> None:
    """Keep a placeholder for each tensor only; put what is fixed into the graph; guards only for dynamic shapes."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, (_, leaf) in zip(placeholders, payload.leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            swap = functools.partial(_swapped, fixed=node, leaf=leaf)
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg(user.args, swap), fx.map_arg(user.kwargs, swap)
            graph.erase_node(node)
    for node in list(graph.nodes):
        guard = node.op == "call_module" and node.target == "_guards_fn" and not guarded
        unused = node.op == "get_attr" and not node.users
        if guard or unused or node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _swapped(node: fx.Node, *, fixed: fx.Node, leaf: Any) -> Any:
    return leaf if node is fixed else node


def _raise_copies(graph: fx.Graph) -> None:
    """Export writes changed buffers back at the very end; do so as soon as nobody reads the old value any more.

    A buffer's readers and its writer must be one layer, or a later frame would read what an earlier one has
    not yet written; so the nearer they are the better the model can be cut.
    """
    order = {node: at for at, node in enumerate(graph.nodes)}
    for copy in [node for node in graph.nodes if node.target is torch.ops.aten.copy_.default and not node.users]:
        target, source = copy.args[:2]
        if not (isinstance(target, fx.Node) and target.op == "get_attr" and isinstance(source, fx.Node)):
            continue
        last = source
        for node in _aliases(target) | _aliases(source):
            for user in node.users:
                reads = node in _aliases(target) or _is_mutable(user)
                if user is not copy and reads and user.op != "output" and order[user] > order[last]:
                    last = user
        if last.op not in ("placeholder", "get_attr"):
            last.append(copy)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """``node`` and the views of it."""
    found, left = {node}, [node]
    while left:
        for user in left.pop().users:
            schema = getattr(user.target, "_schema", None)
            views = schema is None or any(result.alias_info is not None for result in schema.returns)
            if user.op == "call_function" and views and user not in found:
                found.add(user)
                left.append(user)
    return found


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.is_mutable)


def _unflattened(graph: fx.Graph, output: fx.Node, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """The output of an exported graph, a flat list of nodes, in the model's own structure."""
    if _is_literal(spec):
        return pytree.tree_unflatten(leaves, spec)

    def unflatten(*leaves: Any) -> Any:
        return pytree.tree_unflatten(list(leaves), spec)

    with graph.inserting_before(output):
        return graph.call_function(unflatten, tuple(leaves))


def _is_literal(spec: pytree.TreeSpec) -> bool:
    """Whether a graph can spell the structure out: tensors in plain tuples, lists and dicts."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(_is_literal(child) for child in spec.children())


def _attributes(graph: fx.Graph, root: nn.Module) -> dict[str, Any]:
    targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    return {target: operator.attrgetter(target)(root) for target in targets}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep export's log and its print of what it got so far off the terminal: the error we raise says it."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(_Muted(sys.stderr)):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Muted(io.TextIOBase):
    """The stream of every thread but this one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

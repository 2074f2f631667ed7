"""From a model to layers, and from layers to pieces.

    traced = trace(model, example)
    traced.layers                    # what a plan divides
    first, second = traced.cut([3, 5])
    second(first(example))           # the model's own output

Here is the choice of a way to capture the model, the check that it is still the model, and the error if not.
"""

from __future__ import annotations

import linecache
import textwrap
from collections.abc import Sequence
from traceback import walk_tb
from typing import Any

import torch
from torch import nn

from aiotime.errors import TraceError
from aiotime.planning.capture import (
    Captured,
    capture_modules,
    capture_operations,
    capture_sequential,
    has_hooks,
    is_plain_sequential,
)
from aiotime.planning.layers import Layer, boundaries
from aiotime.planning.payload import Payload, call, cloned
from aiotime.planning.piece import Piece
from aiotime.planning.recording import Recording, record
from aiotime.planning.traced import Traced
from aiotime.planning.untouched import Snapshot, repeatable, untouched

__all__ = ["Layer", "Piece", "Traced", "trace"]


def trace(model: nn.Module, example: Any, *, dynamic: Sequence[int] | None = None) -> Traced:
    """Divide ``model`` into layers that can be run apart.

    An nn.Sequential is divided between its children; any other module is traced, by torch.fx where that agrees
    with the model, else by torch.export. The model stays as it is, in the mode (training or eval) it is in: that
    mode is what the layers do. Runs the model on ``example`` a few times; blocks.

    Args:
        model: its parameters and buffers are shared by the layers, not copied.
        example: a tensor (one argument), a tuple (positional arguments) or a dict (keyword arguments).
        dynamic: dimensions whose size may differ from frame to frame, for every tensor that has them;
            None fixes the shapes to the example's.

    Raises:
        TraceError: the model cannot be divided; the message names the place and the way out.
    """
    if hasattr(model, "_orig_mod") or isinstance(model, torch.jit.ScriptModule):
        raise TraceError("a compiled or scripted model cannot be divided; hand in the nn.Module it was made from")
    if has_hooks(model):
        raise TraceError(
            f"{type(model).__name__} has forward hooks on the model itself, which no stage could call; "
            "register them on its submodules, or wrap the model in a module of its own"
        )
    Payload(example)  # refuses what cannot be an example
    with untouched(model), torch.inference_mode(mode=False), torch.enable_grad():
        return _Tracing(model, cloned(example), None if dynamic is None else tuple(dynamic)).run()


class _Tracing:
    def __init__(self, model: nn.Module, example: Any, dynamic: tuple[int, ...] | None) -> None:
        self.model = model
        self.example = example
        self.dynamic = dynamic
        self.device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))

    def run(self) -> Traced:
        if is_plain_sequential(self.model):
            if not any(True for _ in self.model.children()):
                raise TraceError("the nn.Sequential has no children, so there is nothing to run")
            self._expected()
            captured = capture_sequential(self.model, self.example)
            return self._traced(captured, self._recorded(captured))
        expected = self._steady_output()
        snapshot = Snapshot(self.model)
        try:
            captured = capture_modules(self.model, self.example)
            recording = self._recorded(captured)
            if agree(recording.output, expected) and not self._has_lost_attributes(snapshot):
                return self._traced(captured, recording)
        except TraceError:
            raise
        except Exception:  # noqa: BLE001 - whatever user code or the tracer raised
            pass  # torch.fx follows fewer programs than torch.export, whose error is the one to show
        snapshot.restore()
        try:
            captured = capture_operations(self.model, self.example, self.dynamic)
        except Exception as error:
            raise TraceError(_explanation(self.model, error, self.dynamic)) from error
        snapshot.restore()
        recording = self._recorded(captured)
        if not agree(recording.output, expected):
            raise TraceError(
                f"{type(self.model).__name__}, traced, gives another output than the model itself: it depends on "
                f"something torch.export does not see. {way_out(self.model)}"
            )
        return self._traced(captured, recording)

    def _expected(self) -> Any:
        with repeatable(self.device):
            try:
                return call(self.model, cloned(self.example))
            except Exception as error:
                raise TraceError(
                    f"{type(self.model).__name__} does not run on its example: {type(error).__name__}: {error}. "
                    "The example is a tensor (one argument), a tuple (positional arguments) or a dict (keyword "
                    "arguments), on the model's device"
                ) from error

    def _steady_output(self) -> Any:
        """The model's output; refuses a model that keeps something from frame to frame outside of its buffers."""
        with untouched(self.model) as snapshot:
            expected = self._expected()
            filled = snapshot.changed()  # a cache that a first call fills does no harm
        if not filled:
            return expected
        self._expected()
        before = Snapshot(self.model)
        again = self._expected()
        if before.changed() and not agree(again, expected):
            owner, attribute = before.changed()[0]
            raise TraceError(
                f"{_named(self.model, owner)} keeps {attribute!r} from one call to the next, and its output depends "
                f"on it; a traced model would forget it. Make it a buffer (register_buffer). Or: {way_out(self.model)}"
            )
        return expected

    def _recorded(self, captured: Captured) -> Recording:
        with untouched(self.model), repeatable(self.device):
            return record(captured, cloned(self.example))

    def _has_lost_attributes(self, snapshot: Snapshot) -> bool:
        """Whether tracing ran code that sets attributes: that code is not in the graph."""
        return any(not attribute.startswith("_tensor_constant") for _, attribute in snapshot.changed())

    def _traced(self, captured: Captured, recording: Recording) -> Traced:
        if not recording.steps:
            raise TraceError(f"{type(self.model).__name__} computes nothing, so there is nothing to divide")
        if recording.leaks is not None:
            name = next((name for name, tensor in self.model.named_buffers() if tensor is recording.leaks), "a tensor")
            raise TraceError(
                f"{type(self.model).__name__} returns its buffer {name!r}, which the next frame changes; "
                "return a clone of it"
            )
        edges = boundaries(recording, every_step=captured.how == "sequential")
        return Traced(self.model, captured, recording, edges, self.device, self.example, self.dynamic)


def agree(first: Any, second: Any) -> bool:
    """Same structure, types, shapes and dtypes, and values equal within torch.testing's default tolerances."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        try:
            torch.testing.assert_close(first, second, equal_nan=True)
        except (AssertionError, TypeError, ValueError):
            return False
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(agree(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(agree, first, second))
    if hasattr(first, "__dict__"):
        return agree(vars(first), vars(second))
    return bool(first == second)


def _named(model: nn.Module, name: str) -> str:
    return f"{type(model.get_submodule(name)).__name__} at {name!r}" if name else type(model).__name__


def _explanation(model: nn.Module, error: BaseException, dynamic: tuple[int, ...] | None) -> str:
    """The place where tracing stopped, what torch said of it, the way out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join([*lines[:1], *(line.removeprefix("- ") for line in lines[1:] if line.startswith("- "))])
    found = f"{type(model).__name__} cannot be traced{_place(model, error)}: {type(error).__name__}: {reason}\n"
    if dynamic is not None and "specialized" in reason:
        found += (
            f"A dimension of dynamic={dynamic} has one size only for the model. It may be that the example's size is "
            "that of a buffer as well (a causal mask as long as the example): give a smaller example. Or leave the "
            "dimension out of dynamic. Or: "
        )
    return found + way_out(model)


def _place(model: nn.Module, error: BaseException) -> str:
    """Where in the model's own code the innermost frame of ``error`` is."""
    names = {id(module): name for name, module in model.named_modules()}
    current: BaseException | None = error
    while current is not None:
        place = ""
        for frame, line in walk_tb(current.__traceback__):
            code = frame.f_code
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            home = frame.f_globals.get("__name__", "").partition(".")[0]
            foreign = home in ("torch", "aiotime")  # they pass the model around
            ours = id(owner) in names and not foreign
            if ours:
                source = linecache.getline(code.co_filename, line).strip()
                name = _named(model, names[id(owner)])
                place = f" at {name} ({code.co_filename}:{line}{': ' + source if source else ''})"
        if place:
            return place
        current = current.__cause__ or current.__context__
    return ""


def way_out(model: nn.Module) -> str:
    """How to build the pipeline without tracing, with the model's own children where it has some."""
    names = [name for name, _ in model.named_children() if name.isidentifier()][:2]
    stages = [f"model.{name}" for name in names] if len(names) == 2 else ["first_half", "second_half"]
    lines = "\n".join(f'    aiotime.Stage({stage}, device="cpu:{at}"),' for at, stage in enumerate(stages))
    return "Cut it yourself; a stage is any function or module of one value:\n" + textwrap.indent(
        f"aiotime.Pipeline.from_stages([\n{lines}\n])", "    "
    )

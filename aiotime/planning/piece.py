"""A piece of a model: some of its layers as a function from what comes in to what goes on.

The first piece takes the payload as the user gave it, the last returns the model's own output; between two pieces
travels a flat tuple of tensors (and the odd number). A piece has modules of its own that share the model's
tensors: moving a piece or replacing its tensors leaves the model, and every other piece, as it was.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as _modules
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError

_EXTRA = "_extra_state"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    _modules._global_forward_hooks,
    _modules._global_forward_pre_hooks,
    _modules._global_backward_hooks,
    _modules._global_backward_pre_hooks,
]


class Bindings:
    """The tensors and modules a piece's code uses, one attribute each: cheaper to reach than through the modules."""

    piece_device: torch.device


class PieceModule(nn.Module):
    """The modules of a piece, under the model's own names; moving it replaces its tensors, never the model's."""

    piece_device: torch.device

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.piece_device = device
        self._piece_code: Callable[[Any, Any], Any] | None = None
        self._piece_bindings = Bindings()
        self._piece_shortcuts = Bindings()  # the same, with a module's forward in place of the module
        self._piece_hooks: list[Any] = []  # tables that must be empty for that
        self._piece_places: dict[str, str] = {}  # attribute of the bindings -> path in here
        self._piece_graphs: list[fx.GraphModule] = []  # bodies of higher-order operators, with device constants

    def forward(self, value: Any) -> Any:
        """The piece, reading every tensor from its module: slower than the piece, for torch.func and compilers."""
        assert self._piece_code is not None
        return self._piece_code(self, value)

    def bind(self) -> Bindings:
        """Look up again what the code uses, after tensors were replaced."""
        self._piece_hooks[:] = _GLOBAL_HOOKS
        for name, path in self._piece_places.items():
            used = operator.attrgetter(path)(self)
            setattr(self._piece_bindings, name, used)
            if isinstance(used, nn.Module) and _only_forwards(used):
                self._piece_hooks += _hooks(used)
                used = used.forward
            setattr(self._piece_shortcuts, name, used)
        self._piece_bindings.piece_device = self._piece_shortcuts.piece_device = self.piece_device
        return self._piece_bindings

    def bound(self) -> Bindings:
        """What the code reads now: forwards in place of modules, whose call costs more, unless there are hooks."""
        return self._piece_bindings if any(self._piece_hooks) else self._piece_shortcuts

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PieceModule:
        """Like nn.Module, but a converted tensor takes the place of the old one, which others may hold as well."""
        done: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for module, name, tensor in slots(self).values():
                if id(tensor) not in done:
                    converted = fn(tensor)
                    done[id(tensor)] = tensor if converted is tensor else like(tensor, converted)
                if done[id(tensor)] is not tensor:
                    setattr(module, name, done[id(tensor)])
            device = fn(torch.empty(0, device=self.piece_device)).device
        for module in self.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()
        for graph in self._piece_graphs:
            _follow(graph, self.piece_device, device)
        self.piece_device = device
        self.bind()
        return self


class Piece:
    """Callable ``piece(value) -> value``.

    Attributes:
        module: its modules and tensors; ``piece.module.to(device)`` moves the piece.
        layers: the names of its layers.
        steps: how many operations or modules it calls.
        keys: state_dict key of the model -> key in ``piece.module.state_dict()``.
    """

    __slots__ = ("_code", "keys", "layers", "module", "steps")

    def __init__(
        self,
        module: PieceModule,
        code: Callable[[Any, Any], Any],
        *,
        layers: Sequence[str],
        steps: int,
        keys: Mapping[str, str],
    ) -> None:
        self.module = module
        self.layers = tuple(layers)
        self.steps = steps
        self.keys = dict(keys)
        self._code = code
        module.bind()

    def __call__(self, value: Any) -> Any:
        """Run the layers on what the piece before returned (the first: on the payload)."""
        return self._code(self.module.bound(), value)

    def state(self) -> dict[str, Any]:
        """This piece's part of the model's state_dict, under the model's keys; tensors are shared, not copied."""
        state = self.module.state_dict()
        return {key: state[slot] for key, slot in self.keys.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over this piece's part of ``state`` (the model's keys; others are ignored).

        Each tensor is copied to the device and dtype of the one whose place it takes. The old tensors are not
        written to: a frame that still uses them, the model, and other pieces that share them are not affected.
        Not safe while the piece runs. On an error nothing has changed.

        Raises:
            ConfigurationError: a key is missing, or a shape is another.
        """
        missing = [key for key in self.keys if key not in state]
        if missing:
            raise ConfigurationError(f"the state lacks {', '.join(missing)}; hand in the model's whole state_dict")
        present = slots(self.module)
        taken: dict[int, torch.Tensor] = {}  # tensors tied inside this piece stay tied
        for key, slot in self.keys.items():
            if slot not in present:
                continue
            old, new = present[slot][2], state[key]
            if old.shape != new.shape:
                raise ConfigurationError(f"{key} has shape {tuple(old.shape)}, the state brings {tuple(new.shape)}")
            if id(old) not in taken:
                taken[id(old)] = like(old, new.detach().to(device=old.device, dtype=old.dtype, copy=True))
        for key, slot in self.keys.items():
            if slot.rpartition(".")[2] == _EXTRA:
                self.module.get_submodule(slot.rpartition(".")[0]).set_extra_state(state[key])
        for module, name, tensor in present.values():
            if id(tensor) in taken:
                put(module, name, taken[id(tensor)])
        self.module.bind()

    def __repr__(self) -> str:
        inside = self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} … {self.layers[-1]}"
        return f"<Piece {inside}: {len(self.layers)} layers>"


def _hooks(module: nn.Module) -> list[Any]:
    """The tables of hooks that ``module``'s call looks into; shared with the user's module, which may add to them."""
    return [getattr(module, name) for name in _HOOKS]


def _only_forwards(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its ``forward``, as long as it has no hooks."""
    usual = type(module).__call__ is nn.Module.__call__ and module._compiled_call_impl is None
    return usual and not any(_hooks(module))


def slots(root: nn.Module) -> dict[str, tuple[nn.Module, str, torch.Tensor]]:
    """Every place that holds a parameter or buffer: path -> (module, name in it, tensor)."""
    found: dict[str, tuple[nn.Module, str, torch.Tensor]] = {}
    for path, module in root.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    found[f"{path}.{name}" if path else name] = (module, name, tensor)
    return found


def put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give the parameter or buffer ``name`` of ``module`` another tensor; a parameter's need not be an nn.Parameter."""
    if name in module._parameters and not isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor  # type: ignore[assignment]
    else:
        setattr(module, name, tensor)


def like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new`` as what ``old`` is: a parameter that wants a gradient, one that does not, or a buffer."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new.detach(), requires_grad=old.requires_grad)
    if old.requires_grad:  # the working copy of a parameter, in a stage that learns
        return new.detach().requires_grad_()
    return new


def _follow(module: fx.GraphModule, before: torch.device, now: torch.device) -> None:
    """Rewrite the device constants of a graph inside the graph (a higher-order operator's body)."""
    if before == now:
        return
    for node in module.graph.nodes:
        swap = functools.partial(_swapped, before=before, now=now)
        node.args = pytree.tree_map(swap, node.args)
        node.kwargs = pytree.tree_map(swap, node.kwargs)
    module.recompile()


def _swapped(value: Any, *, before: torch.device, now: torch.device) -> Any:
    return now if isinstance(value, torch.device) and value == before else value

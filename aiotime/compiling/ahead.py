"""Ahead: a stage compiled ahead of time, run without Python's lock ("aot")."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.compiling.form import Form
from aiotime.compiling.library import Library, LibraryError
from aiotime.compiling.package import Package, make_package
from aiotime.compiling.program import CompileError

_ROUNDING = 1e-3  # of the largest element, that a compiled program may be away


class _Layout(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Ahead:
    """Callable ``program(value) -> value``; what it was not compiled for runs eagerly.

    Args:
        module: called with one value, in eval mode; its weights are shared, not copied (packed ones are copied).
        examples: values it will be called with; dimensions in which they differ may vary.
        device: where it runs.
        threads: of the host that it may use.
        models: how many calls may run at the same time.

    Attributes:
        eager_calls: how many values were not of the form it was compiled for.

    Raises:
        CompileError: it cannot be compiled, or computes something else than the module.
    """

    way = "aot"

    def __init__(
        self, module: nn.Module, examples: Sequence[Any], *, device: torch.device, threads: int = 1, models: int = 1
    ) -> None:
        self.module = module
        self.eager_calls = 0
        self._form = Form(examples)
        problem: CompileError | None = None
        for packed in (True, False):
            try:
                package = make_package(module, examples, self._form, device=device, threads=threads, packed=packed)
                self._load(package, device, models)
                with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                    self._check(examples)
                return
            except (CompileError, LibraryError) as error:
                problem = error if isinstance(error, CompileError) else CompileError(str(error))
        assert problem is not None
        raise problem

    def __call__(self, value: Any) -> Any:
        """What ``module(value)`` returns."""
        tensors = self._form.tensors(value)
        if tensors is None or (self._written and _overlapping(tensors, self._written)):
            self.eager_calls += 1
            return self.module(value)
        made = self._call(tensors)
        return made[0] if self._single else pytree.tree_unflatten(made, self._out_spec)

    def refresh(self) -> None:
        """Use the tensors that the module has now; not while it runs."""
        state = {name: tensor.detach() for name, tensor in _tensors(self.module).items()}
        bound: dict[str, torch.Tensor] = {}
        for name, like in self._layouts.items():
            if name in self._packs:
                continue
            tensor = self._package.held.get(name) if name not in state else state[name]
            if tensor is None:
                raise CompileError(f"the compiled library asks for {name!r}, which the module does not have")
            if (tensor.shape, tensor.dtype, tensor.device) != (like.shape, like.dtype, like.device):
                raise CompileError(f"{name} has another shape, dtype or device than when it was compiled")
            if tensor.stride() != like.stride or tensor.is_neg() or tensor.is_conj():
                laid_out = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=like.device)
                tensor = laid_out.copy_(tensor)
            bound[name] = tensor
        if self._packs:
            numbered = self._package.numbers
            line = torch.zeros(1 + sum(state[name].numel() for name in numbered))
            for name, first in numbered.items():
                line[first : first + state[name].numel()] = state[name].reshape(-1)
            for name, places in self._packs.items():
                bound[name] = line[places]
        self._library.bind(bound)

    def _load(self, package: Package, device: torch.device, models: int) -> None:
        self._package = package
        self._library = Library(package.library, device, models=models)
        self._written = package.written
        self._out_spec = package.out_spec
        self._single = package.out_spec.is_leaf()
        if (self._library.inputs, self._library.outputs) != (self._form.leaves, package.out_spec.num_leaves):
            raise CompileError("the compiler changed what goes in or comes out")
        values = self._library.values()
        self._layouts: dict[str, _Layout] = {}
        self._packs: dict[str, torch.Tensor] = {}  # constant -> the number of the weight each element is
        own = _tensors(self.module)
        found = set(values)
        for name, tensor in values.items():
            self._layouts[name] = _Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if name not in own and name not in package.held:
                self._packs[name], inside = _places(name, tensor, package, own)
                found |= inside
        for name in sorted(package.used - found):
            if own[name].numel():
                raise CompileError(f"the compiler took the value of {name} for good")
        with torch.inference_mode(mode=False), torch.no_grad():
            self.refresh()
        self._call = self._library.caller()

    def _check(self, examples: Sequence[Any]) -> None:
        """It must compute what the module does: of the examples, and of random numbers like them."""
        for example in examples:
            self._compare(example, self.module(_copied(example)))
        other = _random(examples[-1])
        try:
            expected = self.module(_copied(other))
        except Exception:  # noqa: BLE001 - whatever the module says to numbers it is not meant for
            return
        self._compare(other, expected)

    def _compare(self, example: Any, expected: Any) -> None:
        tensors = self._form.tensors(_copied(example))
        if tensors is None:
            raise CompileError("its example is not what it was compiled for")
        made = self._call(tensors)
        held = {tensor.untyped_storage().data_ptr() for tensor in self._library.held if tensor.numel()}
        if any(tensor.untyped_storage().data_ptr() in held for tensor in made if tensor.numel()):
            raise CompileError("it returns its own weights")
        wanted, spec = pytree.tree_flatten(expected)
        if spec != self._out_spec or not all(itertools.starmap(_agree, zip(made, wanted, strict=True))):
            raise CompileError("compiled, it computes something else")


def _random(example: Any) -> Any:
    """The same with random numbers: an example of zeros would let much pass."""
    source = torch.Generator().manual_seed(0)

    def drawn(leaf: torch.Tensor) -> torch.Tensor:
        if not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        return torch.randn(leaf.shape, generator=source, dtype=torch.float32).to(leaf.device, leaf.dtype)

    return pytree.tree_map(drawn, example)


def _places(
    name: str, packed: torch.Tensor, package: Package, own: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, set[str]]:
    """For each element of a packed weight, the number of the weight's element; and which weights are packed there.

    Raises:
        CompileError: not each of their elements is there once. What was computed from weights is not made of numbers,
            or of those of halves of weights.
    """
    if packed.dtype is not torch.float32 or not package.numbers:
        raise CompileError(f"the compiler made a constant {name!r} of its own")
    places = packed.round().long()
    inside = {
        weight for weight, first in package.numbers.items() if own[weight].numel() and bool((places == first).any())
    }
    each_once = torch.cat(
        [torch.arange(package.numbers[weight], package.numbers[weight] + own[weight].numel()) for weight in inside]
        or [torch.zeros(0, dtype=torch.long)]
    )
    present = places[places != 0].sort().values
    if not torch.equal(places.float(), packed) or not torch.equal(present, each_once.sort().values):
        raise CompileError(f"the compiler computed the constant {name!r} from weights")
    return places, inside


def _agree(made: torch.Tensor, wanted: Any) -> bool:
    """Whether they are equal to rounding, measured by the largest element: small ones of a sum may lose all digits."""
    if not isinstance(wanted, torch.Tensor) or (made.shape, made.dtype) != (wanted.shape, wanted.dtype):
        return False
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(made, wanted)
    finite = torch.isfinite(wanted)
    if not torch.equal(made[~finite].nan_to_num(), wanted[~finite].nan_to_num()):
        return False
    rounding = max(_ROUNDING, 16 * torch.finfo(wanted.dtype).eps)
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    made, wanted = made[finite].to(wide), wanted[finite].to(wide)
    if not wanted.numel():
        return True
    return bool((made - wanted).abs().max() <= rounding * wanted.abs().max())


def _overlapping(tensors: Sequence[torch.Tensor], written: Sequence[int]) -> bool:
    """Whether a tensor that is written into shares memory with another: compiled code takes them for separate."""
    memory = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return any(memory.count(memory[at]) > 1 for at in written)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, a tied one under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)

"""Ahead: a stage compiled ahead of time, run without Python's lock ("aot")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.compiling.form import Form
from aiotime.compiling.library import Library, LibraryError
from aiotime.compiling.package import Package, make_package
from aiotime.compiling.program import CompileError


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
                for example in examples:
                    self._compare(example)
                return
            except (CompileError, LibraryError) as error:
                problem = error if isinstance(error, CompileError) else CompileError(str(error))
        assert problem is not None
        raise problem

    def __call__(self, value: Any) -> Any:
        """What ``module(value)`` returns."""
        tensors = self._form.tensors(value)
        if tensors is None:
            self.eager_calls += 1
            return self.module(value)
        made = self._call(tensors)
        return made[0] if self._single else pytree.tree_unflatten(made, self._out_spec)

    def refresh(self) -> None:
        """Use the tensors that the module has now; not while it runs."""
        state = {name: tensor.detach() for name, tensor in _tensors(self.module).items()}
        bound: dict[str, torch.Tensor] = {}
        for name, (shape, stride) in self._layouts.items():
            if name in self._packs:
                continue
            tensor = self._package.held.get(name) if name not in state else state[name]
            if tensor is None:
                raise CompileError(f"the compiled library asks for {name!r}, which the module does not have")
            if tensor.shape != shape:
                raise CompileError(f"{name} has another shape than when it was compiled")
            if tensor.stride() != stride:
                laid_out = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
                tensor = laid_out.copy_(tensor)
            bound[name] = tensor
        if self._packs:
            numbered = self._package.numbers
            line = torch.zeros(1 + sum({first: state[name].numel() for name, first in numbered.items()}.values()))
            for name, first in numbered.items():
                line[first : first + state[name].numel()] = state[name].reshape(-1)
            for name, places in self._packs.items():
                bound[name] = line[places]
        self._library.bind(bound)

    def _load(self, package: Package, device: torch.device, models: int) -> None:
        self._package = package
        self._library = Library(package.library, device, models=models)
        self._out_spec = package.out_spec
        self._single = package.out_spec.is_leaf()
        self._layouts: dict[str, tuple[torch.Size, tuple[int, ...]]] = {}
        self._packs: dict[str, torch.Tensor] = {}  # constant -> the number of the weight each element is
        known = {*_tensors(self.module), *package.held}
        for name, tensor in self._library.values().items():
            self._layouts[name] = (tensor.shape, tensor.stride())
            if name not in known:
                self._packs[name] = _places(name, tensor, package)
        with torch.inference_mode(mode=False), torch.no_grad():
            self.refresh()
        self._call = self._library.caller()

    def _compare(self, example: Any) -> None:
        """The compiled program must compute what the module does."""
        with torch.inference_mode():
            expected = self.module(_copied(example))
            tensors = self._form.tensors(_copied(example))
            assert tensors is not None
            got = pytree.tree_unflatten(self._call(tensors), self._out_spec)
        try:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
        except AssertionError as error:
            raise CompileError(f"compiled, it computes something else: {str(error).splitlines()[0]}") from error


def _places(name: str, packed: torch.Tensor, package: Package) -> torch.Tensor:
    """For each element of a packed weight, the number of the weight's element."""
    if packed.dtype is not torch.float32 or not package.numbers:
        raise CompileError(f"the compiler made a constant {name!r} of its own")
    places = packed.round().long()
    if places.min() < 0 or not torch.equal(places.float(), packed):
        raise CompileError(f"the compiler computed the constant {name!r} from weights")
    return places


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, a tied one under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)

"""JustInTime: a stage compiled by torch.compile ("inductor"); its backward too, where the stage learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from aiotime.compiling.form import Form
from aiotime.compiling.program import CompileError
from aiotime.compiling.silence import quiet

_SOURCE = "def forward(module, value):\n    return module(value)\n"


class JustInTime:
    """Callable ``program(value) -> value``; compiles at its first call in each mode, on the thread that calls.

    Args:
        module: called with one value; its weights are read at each call, so nothing needs to be told when they change.
        examples: values it will be called with; dimensions in which they differ may vary.
        threads: of the host that it may use.
    """

    way = "inductor"

    def __init__(self, module: nn.Module, examples: Sequence[Any], *, threads: int = 1) -> None:
        self.module = module
        self._met: set[tuple[bool, bool]] = set()  # modes in which it was called, and so compiled
        dynamic = any(Form(examples).varying) if len(examples) > 1 else False
        with quiet():  # imports half of Inductor
            self._call = torch.compile(_own_code(), dynamic=dynamic or None, options={"cpp.threads": threads})

    def __call__(self, value: Any) -> Any:
        """What ``module(value)`` returns."""
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if mode in self._met:
            return self._call(self.module, value)
        with quiet():
            made = self._call(self.module, value)
        self._met.add(mode)
        return made

    def refresh(self) -> None:
        """Nothing to do: the weights are looked up at each call."""

    def check(self, examples: Sequence[Any]) -> None:
        """Compile for the examples, without gradients.

        Raises:
            CompileError: it cannot be compiled.
        """
        try:
            with quiet(), torch.inference_mode():
                for example in examples:
                    self(example)
        except Exception as error:
            said = str(error).strip().splitlines()
            raise CompileError(f"torch.compile cannot take it: {said[0] if said else type(error).__name__}") from error


def _own_code() -> Callable[[nn.Module, Any], Any]:
    """A function with code of its own: torch.compile counts recompilations per code object and gives up after eight."""
    scope: dict[str, Any] = {}
    exec(compile(_SOURCE, "<aiotime stage>", "exec"), scope)
    forward: Callable[[nn.Module, Any], Any] = scope["forward"]
    return forward

"""Tests of aiotime.compiling.jit: torch.compile, looked up anew at each call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiotime.compiling.jit import JustInTime, _own_code
from aiotime.compiling.program import CompileError
from tests.compiling.nets import mlp


@pytest.mark.compiles
@pytest.mark.timeout(300)
def test_equals_the_module_with_the_weights_it_has_now(packages: Path) -> None:
    module = mlp()
    program = JustInTime(module, [torch.zeros(2, 16)])
    program.check([torch.zeros(2, 16)])
    with torch.inference_mode():
        for seed in (0, 1):
            module.load_state_dict(mlp(seed).state_dict(), assign=True)
            program.refresh()
            x = torch.randn(2, 16)
            torch.testing.assert_close(program(x), mlp(seed)(x))
            torch.testing.assert_close(program(x[:1]), mlp(seed)(x[:1]))
    assert program.way == "inductor"


def test_says_what_cannot_be_compiled() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            raise ValueError("not today")

    with pytest.raises(CompileError, match=r"torch\.compile cannot take it: not today"):
        JustInTime(Net(), [torch.zeros(2)]).check([torch.zeros(2)])
    with pytest.raises(CompileError, match="int travels"):
        JustInTime(Net(), [3, 4])


def test_each_has_code_of_its_own() -> None:
    assert _own_code().__code__ is not _own_code().__code__

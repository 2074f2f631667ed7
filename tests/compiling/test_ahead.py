"""Tests of aiotime.compiling.ahead: compiled is what the module computes, with the weights that it has now."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aiotime.compiling import ahead as ahead_module
from aiotime.compiling.ahead import Ahead, _agree, _overlapping, _places
from aiotime.compiling.package import Package
from aiotime.compiling.program import CompileError
from tests.compiling.nets import CPU, Counter, Everything, Sum, mlp

compiled = [pytest.mark.compiles, pytest.mark.timeout(300)]


@pytest.fixture
def net(packages: Path) -> tuple[nn.Sequential, Ahead]:
    module = mlp()
    return module, Ahead(module, [torch.zeros(2, 16)], device=CPU)


@pytest.fixture(scope="module")
def everything(packages: Path) -> tuple[Everything, Ahead]:
    module = Everything()
    return module, Ahead(module, [Everything.example()], device=CPU)


def close(made: Any, wanted: Any) -> None:
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


class TestMlp:
    pytestmark = compiled

    def test_equals_the_module(self, net: tuple[nn.Sequential, Ahead]) -> None:
        module, program = net
        with torch.inference_mode():
            for _ in range(3):
                x = torch.randn(2, 16)
                close(program(x), module(x))
        assert program.way == "aot" and program.eager_calls == 0
        assert program._packs, "the compiler packed no weights: the test tests little"

    def test_layouts_it_was_not_compiled_for(self, net: tuple[nn.Sequential, Ahead]) -> None:
        module, program = net
        big = torch.randn(40, 32)
        with torch.inference_mode():
            made_here = torch.randn(2, 16)
        for x in (big[:2, ::2], big[3:5, :16], big[:16, :2].t(), big[1].view(2, 16), made_here, -big[:2, :16]):
            with torch.no_grad():
                close(program(x), module(x))
        close(program(torch._neg_view(big[:2, :16])), module(-big[:2, :16]).detach())
        assert program.eager_calls == 0

    def test_what_it_was_not_compiled_for_runs_eagerly(self, net: tuple[nn.Sequential, Ahead]) -> None:
        module, program = net
        for x in (torch.randn(3, 16), torch.randn(16), torch.randn(0, 16)):
            close(program(x), module(x))
        assert program.eager_calls == 3

    def test_other_weights_from_the_cache_give_other_results(self, net: tuple[nn.Sequential, Ahead]) -> None:
        other = mlp(1)
        program = Ahead(other, [torch.ones(2, 16)], device=CPU)
        assert program._package.cached
        x = torch.randn(2, 16)
        close(program(x), other(x).detach())
        close(net[1](x), net[0](x).detach())

    def test_refresh_takes_new_tensors(self, net: tuple[nn.Sequential, Ahead]) -> None:
        module, program = net
        x = torch.randn(2, 16)
        before = program(x)
        module.load_state_dict(mlp(1).state_dict(), assign=True)
        close(program(x), before)
        program.refresh()
        close(program(x), mlp(1)(x).detach())

    def test_refresh_lets_the_old_tensors_go(self, net: tuple[nn.Sequential, Ahead]) -> None:
        """The library keeps handles of its own for ever; they must not keep the weights."""
        module, program = net
        first = module[0]
        assert isinstance(first, nn.Linear)
        for seed in (1, 2):
            old = first.weight.untyped_storage()
            module.load_state_dict(mlp(seed).state_dict(), assign=True)
            program.refresh()
            gc.collect()
            assert torch._C._storage_Use_Count(old._cdata) == 1

    def test_everything_goes_with_the_program(self, net: tuple[nn.Sequential, Ahead]) -> None:
        module = mlp()
        program = Ahead(module, [torch.zeros(2, 16)], device=CPU)
        weight = next(module.parameters())
        kept = weight.untyped_storage()
        seen: list[weakref.ref[Any]] = [weakref.ref(program), weakref.ref(program._library), weakref.ref(module)]
        made = program(torch.zeros(2, 16))
        del program, module, weight
        gc.collect()
        assert [one() for one in seen] == [None] * 3
        assert torch._C._storage_Use_Count(kept._cdata) == 1
        assert made.isfinite().all()  # an output outlives its program

    def test_refresh_refuses_what_the_code_would_misread(self, net: tuple[nn.Sequential, Ahead]) -> None:
        module, program = net
        for weight in (
            torch.zeros(24, 16, dtype=torch.float64),
            torch.zeros(24, 15),
            torch.zeros(24, 16, device="meta"),
        ):
            module[0].weight = nn.Parameter(weight)
            with pytest.raises(CompileError, match=r"0\.weight has another shape, dtype or device"):
                program.refresh()

    def test_weights_with_other_strides(self, net: tuple[nn.Sequential, Ahead]) -> None:
        module, program = net
        weight = torch.randn(20, 30)[2:18, 3:27].t()
        module[0].weight = nn.Parameter(weight)
        program.refresh()
        x = torch.randn(2, 16)
        close(program(x), module(x).detach())

    def test_autocast_around_it_changes_nothing(self, net: tuple[nn.Sequential, Ahead]) -> None:
        """Stages run on threads without it."""
        with torch.autocast("cpu", torch.bfloat16):
            program = Ahead(mlp(), [torch.zeros(2, 16)], device=CPU)
        assert program._package.cached
        assert program(torch.zeros(2, 16)).dtype is torch.float32


class TestEverything:
    pytestmark = compiled

    def test_equals_the_module(self, everything: tuple[Everything, Ahead]) -> None:
        module, program = everything
        for seed in (1, 2):
            value = Everything.example(seed)
            with torch.inference_mode():
                made, wanted = program(value), module(Everything.example(seed))
            assert list(made) == list(wanted)
            close(made, wanted)
            close(value, Everything.example(seed))
        assert program.eager_calls == 0

    def test_every_weight_may_change(self, everything: tuple[Everything, Ahead]) -> None:
        """Equal when compiled, tied, tiny, of no dimension, a boolean: each is read from where it is now."""
        module, program = everything
        before = copy.deepcopy(module.state_dict())
        state = {
            key: ~value
            if value.dtype is torch.bool
            else value.flip(0)
            if key == "order"
            else torch.rand_like(value) + 0.5
            for key, value in before.items()
            if not key.startswith("batch.num")
        }
        state["tied.weight"] = state["first.weight"]
        changing = {key: [state[key] if other == key else before[other] for other in before] for key in state}
        value = Everything.example()
        try:
            for key, values in changing.items():
                module.load_state_dict(
                    dict(zip(before, values, strict=True))
                    | {"tied.weight": values[list(before).index("first.weight")]},
                    assign=True,
                )
                module.tied.weight = module.first.weight
                program.refresh()
                with torch.inference_mode():
                    close({key: program(value)}, {key: module(value)})
            module.load_state_dict(before | state, assign=True)
            module.mask = torch.tensor([0.0, 3.0, 1.0])  # two buffers that were equal, and the compiler's one
            program.refresh()
            with torch.inference_mode():
                close(program(value)["precise"], module(value)["precise"])
        finally:
            module.load_state_dict(before, assign=True)
            module.mask = module.twin.clone()
            program.refresh()

    def test_outputs_are_nobody_elses(self, everything: tuple[Everything, Ahead]) -> None:
        module, program = everything
        made = program(Everything.example())
        weights = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
        assert not weights & {tensor.untyped_storage().data_ptr() for tensor in made.values() if tensor.numel()}


class TestRefusals:
    """No compiler is asked."""

    def test_a_module_that_counts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("AIOTIME_CACHE", str(tmp_path))
        module = Counter()
        with pytest.raises(CompileError, match="a frame changes its buffers"):
            Ahead(module, [torch.zeros(3)], device=CPU)
        assert module.count.tolist() == [0, 0]

    def test_an_output_that_is_no_tensor(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return x + 1, None

        with pytest.raises(CompileError, match="not a tensor"):
            Ahead(Net(), [torch.zeros(3)], device=CPU)

    def test_a_module_that_cannot_be_exported(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return x + 1 if x.sum() > 0 else x

        with pytest.raises(CompileError, match=r"torch\.export cannot take it"):
            Ahead(Net(), [torch.zeros(3)], device=CPU)


@pytest.mark.compiles
@pytest.mark.timeout(300)
def test_sizes_that_vary(packages: Path) -> None:
    """Any size, bit for bit its shape; but two sizes that the code takes for one are the same."""
    module = Sum()
    program = Ahead(module, Sum.examples(), device=CPU)
    for size in (2, 3, 17, 1000):
        value = torch.randn(size, 4), torch.randn(size, 4)
        made = program(value)
        assert made.shape == (size, 4)
        close(made, module(value))
    assert program.eager_calls == 0
    for sizes in ((5, 1), (1, 5), (1, 1), (0, 0)):
        value = torch.randn(sizes[0], 4), torch.randn(sizes[1], 4)
        close(program(value), module(value))
    assert program.eager_calls == 4


def package(**numbers: int) -> Package:
    return Package(Path(), numbers, frozenset(numbers), (), {}, pytree.tree_structure(0), cached=True)


def test_places_of_packed_weights() -> None:
    own = {"a": torch.zeros(2, 2), "b": torch.zeros(3), "none": torch.zeros(0)}
    found, inside = _places("c", torch.tensor([[3.0, 1, 0], [4, 2, 0]]), package(a=1, b=5, none=8), own)
    assert found.tolist() == [[3, 1, 0], [4, 2, 0]] and inside == {"a"}
    _, inside = _places("c", torch.tensor([7.0, 6, 5, 4, 3, 2, 1]), package(a=1, b=5), own)
    assert inside == {"a", "b"}


@pytest.mark.parametrize(
    "packed",
    [
        torch.tensor([2.0, 3, 4, 5]),  # + 1
        torch.tensor([2.0, 4, 6, 8]),  # * 2
        torch.tensor([-1.0, -2, -3, -4]),
        torch.tensor([1.0, 2, 3]),  # a part
        torch.tensor([1.0, 2, 3, 4, 4]),
        torch.tensor([1.5, 2, 3, 4]),
        torch.tensor([1.0, 2, 3, 4, float("nan")]),
        torch.tensor([1.0, 2, 3, 1e9]),
        torch.tensor([1, 2, 3, 4]),
    ],
)
def test_what_was_computed_from_weights_is_refused(packed: Tensor) -> None:
    own = {"a": torch.zeros(2, 2), "b": torch.zeros(4)}
    with pytest.raises(CompileError, match="constant 'c'"):
        _places("c", packed, package(a=1, b=5), own)
    with pytest.raises(CompileError, match="of its own"):
        _places("c", packed, package(), own)


@pytest.mark.parametrize(
    ("made", "wanted", "agree"),
    [
        (torch.tensor([1e6, 1.0]), torch.tensor([1e6, 1.05]), True),  # the digits that cancelled
        (torch.tensor([1e-7, 0.0]), torch.tensor([1e-7, 1e-8]), False),  # small is not equal
        (torch.zeros(2), torch.zeros(2), True),
        (torch.zeros(2), torch.zeros(3), False),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), False),
        (torch.zeros(2), None, False),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.tensor([1.0, float("nan"), float("inf")]), torch.tensor([1.0, float("nan"), float("inf")]), True),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("inf")]), False),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0]), False),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.01, 2.0], dtype=torch.bfloat16), True),
        (torch.tensor([1j, 2.0]), torch.tensor([1j, 2.0]), True),
        (torch.tensor([1j, 2.0]), torch.tensor([-1j, 2.0]), False),
    ],
)
def test_equal_to_rounding(made: Tensor, wanted: Any, agree: bool) -> None:
    assert _agree(made, wanted) is agree


def test_inputs_that_share_memory() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    assert _overlapping([x, x[:2], y], [0])
    assert not _overlapping([x, x[:2], y], [2])


def test_random_numbers_instead_of_the_examples() -> None:
    example = {"x": torch.zeros(2, 3), "ids": torch.arange(3), "z": torch.zeros(2, dtype=torch.complex64)}
    other = ahead_module._random(example)
    assert other["ids"] is example["ids"] and other["x"].std() > 0.1
    assert (other["x"].dtype, other["z"].dtype) == (torch.float32, torch.complex64)
    close(other, ahead_module._random(example))

"""Tests of aiotime.compiling.package: what is exported, what the cache is keyed by, what is on disk."""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiotime.compiling import package as package_module
from aiotime.compiling.form import Form
from aiotime.compiling.package import (
    _calls_back,
    _compile,
    _exported,
    _key,
    _numbered,
    _numbering,
    _settings,
    _sizes,
    _unpack,
    _used,
    _written,
    cache_folder,
    make_package,
)
from aiotime.compiling.program import CompileError
from tests.compiling.nets import CPU, Counter, Everything, Sum, mlp


def exported(module: nn.Module, *examples: Any) -> Any:
    return _exported(module, examples[-1], Form(examples), CPU)


def key(module: nn.Module, *examples: Any, threads: int = 1, packed: bool = True) -> str:
    program = exported(module, *examples)
    held = {name: tensor for name, tensor in program.constants.items() if isinstance(tensor, Tensor)}
    return _key(program, held, _numbering(program.state_dict), _settings(threads, packed=packed), CPU)


class Scaled(nn.Module):
    def __init__(self, scale: float = 2.0, held: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.held: Tensor
        self.register_buffer("held", torch.full((2,), held), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return x * self.scale + self.held


class TestKey:
    def test_does_not_depend_on_weights(self) -> None:
        assert key(mlp(0), torch.zeros(2, 16)) == key(mlp(1), torch.ones(2, 16))

    def test_does_not_depend_on_where_code_is(self) -> None:
        def made(indent: str) -> nn.Module:
            scope: dict[str, Any] = {"nn": nn}
            code = f"{indent}class Net(nn.Module):\n    def forward(self, x):\n        return x + 1\n"
            exec(compile(code, f"<{len(indent)}>", "exec"), scope)
            net: nn.Module = scope["Net"]()
            return net

        assert key(made(""), torch.zeros(2)) == key(made("\n\n"), torch.zeros(2))

    @pytest.mark.parametrize(
        "other",
        [
            lambda: key(Scaled(2.5), torch.zeros(2)),
            lambda: key(Scaled(held=3.0), torch.zeros(2)),
            lambda: key(Scaled(), torch.zeros(1, 2)),
            lambda: key(Scaled(), torch.zeros(2, dtype=torch.float64)),
            lambda: key(Scaled(), torch.zeros(2), torch.zeros(2)[None].expand(3, 2)[0].new_zeros(2), threads=2),
            lambda: key(Scaled(), torch.zeros(2), packed=False),
        ],
    )
    def test_depends_on_all_that_is_compiled(self, other: Callable[[], str]) -> None:
        assert other() != key(Scaled(), torch.zeros(2))

    def test_depends_on_strides_and_on_what_varies(self) -> None:
        net = nn.ReLU()
        keys = {
            key(net, torch.zeros(4, 4)),
            key(net, torch.zeros(4, 4).t()),
            key(net, torch.zeros(3, 4), torch.zeros(4, 4)),
            key(net, torch.zeros(3, 3), torch.zeros(4, 4)),
        }
        assert len(keys) == 4

    def test_depends_on_the_machine_and_on_inductors_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import config

        first = key(nn.ReLU(), torch.zeros(2))
        monkeypatch.setattr(config, "epilogue_fusion", not config.epilogue_fusion)
        second = key(nn.ReLU(), torch.zeros(2))
        monkeypatch.setattr(package_module, "_machine", lambda device: "another")
        assert len({first, second, key(nn.ReLU(), torch.zeros(2))}) == 3

    def test_constants_of_any_dtype(self) -> None:
        for dtype in (torch.bool, torch.bfloat16, torch.complex64, torch.int64):

            class Net(nn.Module):
                def __init__(self, value: Tensor) -> None:
                    super().__init__()
                    self.held: Tensor
                    self.register_buffer("held", value, persistent=False)

                def forward(self, x: Tensor) -> Any:
                    return x, self.held.clone()

            ones, zeros = torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)
            assert key(Net(ones), torch.zeros(1)) == key(Net(ones.clone()), torch.zeros(1))
            assert key(Net(ones), torch.zeros(1)) != key(Net(zeros), torch.zeros(1))


class TestExport:
    @pytest.mark.parametrize("write", ["self.count.add_(1)", "self.count.view(-1)[0].mul_(2)"])
    def test_a_module_that_writes_into_its_own_is_refused(self, write: str) -> None:
        program = exported(Counter(), torch.zeros(3))
        with pytest.raises(CompileError, match="a frame changes its buffers"):
            _written(program)

    def test_a_normalisation_that_learns_from_frames_is_refused(self) -> None:
        with pytest.raises(CompileError, match="a frame changes its buffers"):
            _written(exported(nn.BatchNorm1d(3).train(), torch.zeros(4, 3)))

    def test_inputs_that_are_written_into(self) -> None:
        class Net(nn.Module):
            def forward(self, value: Any) -> Any:
                return value[0] + value[1].t().relu_()

        assert _written(exported(Net(), (torch.zeros(2, 2), torch.zeros(2, 2)))) == (1,)
        assert _written(exported(nn.ReLU(), torch.zeros(2))) == ()

    def test_tensors_that_are_used(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)
                self.norm = nn.BatchNorm1d(2).eval()

            def forward(self, x: Tensor) -> Any:
                return self.norm(self.used(x))

        found = _used(exported(Net(), torch.zeros(2, 2)))
        assert found == {
            "used.weight",
            "used.bias",
            "norm.weight",
            "norm.bias",
            "norm.running_mean",
            "norm.running_var",
        }

    def test_sizes_that_vary(self) -> None:
        first, second = _sizes(exported(Sum(), *Sum.examples()))
        assert (first.tensor, first.dim, second.tensor, second.dim) == (0, 0, 1, 0)
        assert first.name == second.name and first.least == 2 and first.most > 2**40
        assert _sizes(exported(nn.ReLU(), torch.zeros(3))) == []

    def test_two_sizes_of_which_one_is_a_multiple(self) -> None:
        class Net(nn.Module):
            def forward(self, value: Any) -> Any:
                return value[0].reshape(-1) + value[1]

        examples = [(torch.zeros(n, 2), torch.zeros(2 * n)) for n in (2, 3)]
        with pytest.raises(CompileError, match=r"multiples of each other|cannot take it"):
            _sizes(exported(Net(), *examples))

    def test_autocast_outside_is_not_exported(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            inside = key(mlp(), torch.zeros(2, 16))
        assert inside == key(mlp(), torch.zeros(2, 16))


class TestNumbers:
    def test_every_element_has_its_own(self) -> None:
        module = Everything()
        numbers = _numbering(module.state_dict())
        assert "order" not in numbers and "brief" not in numbers and "precise1.weight" not in numbers
        made = [_numbered(module.state_dict()[name], first).flatten() for name, first in numbers.items()]
        assert torch.equal(torch.cat(made).sort().values, torch.arange(1.0, 1 + sum(map(len, made))))

    def test_too_many_have_none(self) -> None:
        assert _numbering({"a": torch.zeros(1, device="meta").expand(2**23), "b": torch.zeros(2**23 - 2)}) != {}
        assert _numbering({"a": torch.zeros(1, device="meta").expand(2**23), "b": torch.zeros(2**23)}) == {}

    def test_strides_are_kept_and_memory_is_not_shared(self) -> None:
        weight = nn.Parameter(torch.randn(6, 4)[1:4, 1:4].t(), requires_grad=False)
        for first in (None, 7):
            made = _numbered(weight, first)
            assert isinstance(made, nn.Parameter) and made.stride() == weight.stride()
            assert made.data_ptr() != weight.data_ptr() and made.storage_offset() == 0
        assert torch.equal(_numbered(weight, None), weight)
        assert _numbered(weight, 7).flatten().tolist() == list(range(7, 16))


class TestFolder:
    def test_is_the_users_cache_unless_told(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("AIOTIME_CACHE", str(tmp_path))
        assert cache_folder() == tmp_path
        monkeypatch.delenv("AIOTIME_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "aiotime"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == tmp_path / ".cache" / "aiotime"

    def test_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("AIOTIME_CACHE", str(tmp_path / "file"))
        with pytest.raises(CompileError, match="cache of compiled packages cannot be written"):
            made(nn.ReLU(), torch.zeros(2))

    def test_a_package_that_another_process_put_there_first(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        folder = tmp_path / "key"

        def compiled(program: Any, *, package_path: str, inductor_configs: Any) -> None:
            with zipfile.ZipFile(package_path, "w") as archive:
                archive.writestr("model/data/model.so", "mine")
            folder.mkdir()
            (folder / "model.so").write_text("theirs")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
        _compile(None, {}, folder)
        assert (folder / "model.so").read_text() == "theirs"
        assert [one.name for one in tmp_path.iterdir()] == ["key"]

    def test_nothing_is_left_of_what_failed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def compiled(program: Any, *, package_path: str, inductor_configs: Any) -> None:
            Path(package_path).write_text("half")
            raise RuntimeError("C++ compile error\nnear line 3: error: expected a plan")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
        with pytest.raises(CompileError, match=r"C\+\+ compile error: expected a plan$"):
            _compile(None, {}, tmp_path / "key")
        assert list(tmp_path.iterdir()) == []

    def test_one_compilation_at_a_time(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("AIOTIME_CACHE", str(tmp_path))
        inside, most = [0], [0]

        def compiled(program: Any, settings: Any, folder: Path) -> None:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            torch.zeros(500, 500) @ torch.zeros(500, 500)  # lets others run
            inside[0] -= 1

        monkeypatch.setattr(package_module, "_compile", compiled)
        threads = [threading.Thread(target=made, args=(nn.Linear(2, n), torch.zeros(1, 2))) for n in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1]


class TestArchive:
    def archive(self, path: Path, **files: str) -> Path:
        with zipfile.ZipFile(path / "model.pt2", "w") as archive:
            for name, text in files.items():
                archive.writestr(name.replace("__", "/").replace("_DOT_", "."), text)
        return path / "model.pt2"

    def test_the_library_and_its_kernels(self, tmp_path: Path) -> None:
        package = self.archive(
            tmp_path,
            a__x_DOT_so="code",
            a__k_DOT_cubin="kernel",
            b__o_DOT_cubin="no",
            a__w_DOT_json=json.dumps({"a": 1}),
        )
        _unpack(package, tmp_path / "out")
        found = {one.name: one.read_text() for one in (tmp_path / "out").iterdir()}
        assert found == {"model.so": "code", "k.cubin": "kernel"}

    def test_operators_of_python_are_refused(self, tmp_path: Path) -> None:
        package = self.archive(tmp_path, a__x_DOT_so="code", a__w_DOT_json=json.dumps({"nodes": [{"name": "f"}]}))
        with pytest.raises(CompileError, match="only call through Python's loader"):
            _unpack(package, tmp_path / "out")
        assert not _calls_back(b"no json") and not _calls_back(b"[]") and not _calls_back(b'{"nodes": []}')

    def test_two_libraries_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CompileError, match="2 libraries"):
            _unpack(self.archive(tmp_path, a__x_DOT_so="", a__y_DOT_so=""), tmp_path / "out")


def made(module: nn.Module, example: Any) -> package_module.Package:
    return make_package(module, [example], Form([example]), device=CPU, threads=1, packed=True)


@pytest.mark.compiles
@pytest.mark.timeout(300)
def test_is_compiled_once(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(mlp(), torch.zeros(2, 16))
    assert first.library.parent.parent == packages and first.library.exists()
    monkeypatch.setattr(package_module, "_compile", None)
    again = made(mlp(1), torch.zeros(2, 16))
    assert again.cached and again.library == first.library
    assert (again.numbers, again.used, again.written) == (first.numbers, first.used, ())


@pytest.mark.compiles
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("packages")
def test_the_compiler_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("AIOTIME_CACHE", str(tmp_path))
    with pytest.raises(CompileError, match="AOTInductor cannot compile it"):
        made(mlp(), torch.zeros(2, 16))
    assert list(tmp_path.iterdir()) == []
    said = capfd.readouterr()
    assert "Autotune" not in said.out + said.err

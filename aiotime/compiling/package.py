"""Package: a module exported, compiled by AOTInductor into a shared library, and kept on disk.

    module ──▶ torch.export ──▶ numbered weights ──▶ AOTInductor (C++ compiler) ──▶ cache/<key>/model.so

The library is compiled with *numbered* weights: each element of each float32 weight is its own number. Three things
follow. The cache does not depend on the weights, only on code, shapes, device and versions. Weights that happen to be
equal are not merged into one, so they can be given new values later. And where the compiler packed a weight into
another order, the numbers in the packed copy say where each element belongs, so that it can be filled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.compiling.form import Form
from aiotime.compiling.program import CompileError

FORMAT = 1  # of what is on disk
_MOST = 2**24  # numbers that a float32 tells apart
_LIBRARY = "model.so"


@dataclass(frozen=True)
class Package:
    """A compiled module.

    Attributes:
        library: path of the shared library; its constants hold numbers until they are bound.
        numbers: weight -> the number of its first element; empty where weights were not numbered.
        held: tensors that are neither parameters nor persistent buffers, by name in the library.
        out_spec: structure of what it returns.
        cached: it was there already.
    """

    library: Path
    numbers: Mapping[str, int]
    held: Mapping[str, torch.Tensor]
    out_spec: pytree.TreeSpec
    cached: bool


def make_package(
    module: nn.Module, examples: Sequence[Any], form: Form, *, device: torch.device, threads: int, packed: bool
) -> Package:
    """Compile ``module`` for values like ``examples``, or find it compiled.

    Args:
        module: called with one value; in the mode (training or eval) it will run in.
        examples: the last one is traced; dimensions in which they differ are dynamic.
        form: of the examples.
        device: where it runs.
        threads: of the host that it may use.
        packed: let the compiler choose among kernels of its own for matrix products, and pack their weights.

    Raises:
        CompileError: no compiler, or the module cannot be exported or compiled.
    """
    exported = _exported(module, examples[-1], form)
    state = {name: tensor.detach() for name, tensor in exported.state_dict.items()}
    held = {name: tensor for name, tensor in exported.constants.items() if isinstance(tensor, torch.Tensor)}
    numbers = _numbering(state)
    settings = _settings(threads, packed=packed and device.type == "cpu" and bool(numbers))
    key = _key(exported, held, numbers, settings, device)
    folder = cache_folder() / key
    library = folder / _LIBRARY
    found = library.exists()
    if not found:
        for name, first in numbers.items():
            exported.state_dict[name] = _numbered(exported.state_dict[name], first)
        _compile(exported, settings, folder)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    return Package(library, numbers, held, out_spec, found)


def cache_folder() -> Path:
    """Where compiled packages are: AIOTIME_CACHE, else in the user's cache folder."""
    given = os.environ.get("AIOTIME_CACHE")
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "aiotime"


def _exported(module: nn.Module, example: Any, form: Form) -> Any:
    dims = iter(form.varying)
    shapes = pytree.tree_map(lambda _: dict.fromkeys(next(dims), torch.export.Dim.DYNAMIC) or None, example)
    try:
        with warnings.catch_warnings(), torch.inference_mode(mode=False), torch.no_grad():
            warnings.simplefilter("ignore")
            dynamic = (shapes,) if any(form.varying) else None
            exported = torch.export.export(module, (_plain(example),), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise CompileError(f"torch.export cannot take it: {_first_line(error)}") from error
    kinds = {type(each.arg).__name__ for each in exported.graph_signature.output_specs}
    if kinds - {"TensorArgument"}:
        raise CompileError("it returns something that is not a tensor")
    if exported.graph_signature.buffers_to_mutate:
        raise CompileError("a frame changes its buffers")
    return exported


def _plain(value: Any) -> Any:
    """Copies that are no inference tensors."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def _numbering(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The first number of each float32 weight; nothing where there are more elements than numbers."""
    numbers: dict[str, int] = {}
    following = 1  # 0 is what packing pads with
    seen: dict[int, int] = {}
    for name, tensor in state.items():
        if tensor.dtype is not torch.float32:
            continue
        if id(tensor) not in seen:
            seen[id(tensor)] = following
            following += tensor.numel()
        numbers[name] = seen[id(tensor)]
    return numbers if following <= _MOST else {}


def _numbered(tensor: Any, first: int) -> Any:
    with torch.no_grad():
        values = torch.arange(first, first + tensor.numel(), dtype=torch.float32, device=tensor.device)
        filled = torch.empty_like(tensor)  # keeps the strides
        filled.copy_(values.view(tensor.shape))
    return nn.Parameter(filled, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else filled


def _settings(threads: int, *, packed: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "always_keep_tensor_constants": True,  # small weights must stay weights
        "cpp.threads": threads,
    }
    if packed:
        settings |= {
            "max_autotune": True,
            "max_autotune_gemm_backends": "CPP,ATEN",
            "autotune_num_choices_displayed": 0,
        }
    return settings


def _key(
    exported: Any,
    held: Mapping[str, torch.Tensor],
    numbers: Mapping[str, int],
    settings: Mapping[str, Any],
    device: torch.device,
) -> str:
    text = exported.graph_module.print_readable(
        print_output=False, include_stride=True, include_device=True, fast_sympy_print=True
    )
    facts = {
        "format": FORMAT,
        "torch": torch.__version__,
        "machine": _machine(device),
        "settings": dict(settings),
        "numbers": dict(numbers),
        "signature": str(exported.graph_signature),
        "code": text,
        "held": {name: _digest(tensor) for name, tensor in held.items()},
    }
    said = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:40]


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest() + str((tuple(tensor.shape), tensor.stride(), tensor.dtype))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} {properties.name} {properties.major}.{properties.minor} {torch.version.cuda}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()} {flags}"


def _compile(exported: Any, settings: Mapping[str, Any], folder: Path) -> None:
    """Compile into ``folder``, which appears whole or not at all: another process may be at the same."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="compiling-", dir=folder.parent) as made:
            package = str(Path(made) / "model.pt2")
            with _quiet():
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=package, inductor_configs=dict(settings)
                )
            inside = Path(made) / "library"
            _unpack(Path(package), inside)
            try:
                inside.rename(folder)
            except OSError:
                if not (folder / _LIBRARY).exists():
                    raise
    except CompileError:
        raise
    except OSError as error:
        raise CompileError(f"the cache of compiled packages cannot be written: {error}") from error
    except Exception as error:
        raise CompileError(f"AOTInductor cannot compile it: {_first_line(error)}") from error


def _unpack(package: Path, folder: Path) -> None:
    """The shared library, and on accelerators the kernels it loads."""
    folder.mkdir()
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        libraries = [name for name in names if name.endswith(".so")]
        if len(libraries) != 1:
            raise CompileError(f"AOTInductor made {len(libraries)} libraries where one was expected")
        beside = libraries[0].rpartition("/")[0]
        for name in names:
            if name == libraries[0] or (name.rpartition("/")[0] == beside and name.endswith((".cubin", ".fatbin"))):
                target = folder / (_LIBRARY if name == libraries[0] else Path(name).name)
                with archive.open(name) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
        for name in names:
            if name.rpartition("/")[0] == beside and name.endswith(".json") and _calls_back(archive.read(name)):
                raise CompileError("it uses an operator that AOTInductor can only call through Python's loader")


def _calls_back(text: bytes) -> bool:
    """Whether a description lists operators that need a proxy executor."""
    try:
        said = json.loads(text)
    except ValueError:
        return False
    return isinstance(said, dict) and bool(said.get("nodes"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's own warnings; what fails is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no reason given'}"[:300]

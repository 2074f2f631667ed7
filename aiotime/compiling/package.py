"""Package: a module exported, compiled by AOTInductor into a shared library, and kept on disk.

    module ──▶ torch.export ──▶ numbered weights ──▶ AOTInductor (C++ compiler) ──▶ cache/<key>/model.so

The library is compiled with *numbered* weights: each element of each float32 weight is its own number. Three things
follow. The cache does not depend on the weights, only on code, shapes, device and versions. Tied weights, and weights
that are views of the same memory, are not merged into one, so each can be given a tensor of its own later. And where
the compiler packed a weight into another order, the numbers in the packed copy say where each element belongs, so that
it can be filled again. What has no numbers (other dtypes, too many elements) is copied, and not packed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.compiling.form import Form, Size
from aiotime.compiling.program import CompileError
from aiotime.compiling.silence import quiet, silent

FORMAT = 2  # of what is on disk
_MOST = 2**24  # numbers that a float32 tells apart
_LIBRARY = "model.so"


@dataclass(frozen=True)
class Package:
    """A compiled module.

    Attributes:
        library: path of the shared library; its constants hold numbers until they are bound.
        numbers: weight -> the number of its first element; empty where weights were not numbered.
        used: the parameters and buffers that the code reads.
        written: the inputs that it writes into.
        held: tensors that are neither parameters nor persistent buffers, by name in the library.
        out_spec: structure of what it returns.
        cached: it was there already.
    """

    library: Path
    numbers: Mapping[str, int]
    used: frozenset[str]
    written: tuple[int, ...]
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
    with quiet():  # and alone: torch.export and Inductor patch what all threads see
        return _made(module, examples[-1], form, device, threads, packed)


def _made(module: nn.Module, example: Any, form: Form, device: torch.device, threads: int, packed: bool) -> Package:
    exported = _exported(module, example, form, device)
    written = _written(exported)
    form.limit(_sizes(exported))
    state = {name: tensor.detach() for name, tensor in exported.state_dict.items()}
    held = {name: tensor for name, tensor in exported.constants.items() if isinstance(tensor, torch.Tensor)}
    numbers = _numbering(state)
    settings = _settings(threads, packed=packed and device.type == "cpu" and bool(numbers))
    try:
        key = _key(exported, held, numbers, settings, device)
    except Exception as error:
        raise CompileError(f"it holds something that no library can: {_first_line(error)}") from error
    folder = cache_folder() / key
    library = folder / _LIBRARY
    found = library.exists()
    if not found:
        for name, tensor in exported.state_dict.items():
            exported.state_dict[name] = _numbered(tensor, numbers.get(name))
        _compile(exported, settings, folder)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    return Package(library, numbers, _used(exported), written, held, out_spec, found)


def cache_folder() -> Path:
    """Where compiled packages are: AIOTIME_CACHE, else in the user's cache folder."""
    given = os.environ.get("AIOTIME_CACHE")
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "aiotime"


def _exported(module: nn.Module, example: Any, form: Form, device: torch.device) -> Any:
    dims = iter(form.varying)
    shapes = pytree.tree_map(lambda _: dict.fromkeys(next(dims), torch.export.Dim.DYNAMIC) or None, example)
    try:
        with quiet(), torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            dynamic = (shapes,) if any(form.varying) else None
            exported = torch.export.export(module, (_plain(example),), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise CompileError(f"torch.export cannot take it: {_first_line(error)}") from error
    kinds = {type(each.arg).__name__ for each in exported.graph_signature.output_specs}
    if kinds - {"TensorArgument"}:
        raise CompileError("it returns something that is not a tensor")
    return exported


def _plain(value: Any) -> Any:
    """Copies that are no inference tensors, nor lazily negated or conjugated."""

    def plain(leaf: Any) -> Any:
        return leaf.detach().resolve_neg().resolve_conj().clone() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(plain, value)


def _written(exported: Any) -> tuple[int, ...]:
    """The inputs that a call writes into.

    Raises:
        CompileError: it writes into the module's own tensors.
    """
    graphs = [each.graph for each in exported.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    if not any(_writes(node.target) for graph in graphs for node in graph.nodes):
        return ()
    with quiet():  # what is written through views shows once there are no writes any more
        signature = exported.run_decompositions({}).graph_signature
    if signature.buffers_to_mutate or getattr(signature, "parameters_to_mutate", None):
        raise CompileError("a frame changes its buffers")
    names = list(signature.user_inputs)
    return tuple(sorted({names.index(name) for name in signature.user_inputs_to_mutate.values()}))


def _writes(target: Any) -> bool:
    """Whether a node's function may write into what it gets."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _sizes(exported: Any) -> list[Size]:
    """The sizes that may vary.

    Raises:
        CompileError: one is computed from others.
    """
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    sizes = []
    for at, name in enumerate(exported.graph_signature.user_inputs):
        for dim, size in enumerate(nodes[name].meta["val"].shape):
            if isinstance(size, int):
                continue
            symbol = size.node.expr
            if not symbol.is_Symbol:
                raise CompileError("the sizes of what this stage gets are multiples of each other")
            limits = exported.range_constraints.get(symbol)
            most = sys.maxsize if limits is None or not limits.upper.is_Integer else int(limits.upper)
            sizes.append(Size(at, dim, str(symbol), 0 if limits is None else int(limits.lower), most))
    return sizes


def _used(exported: Any) -> frozenset[str]:
    """Names of the parameters and buffers that some operator takes."""
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return frozenset(
        targets[node.name]
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.users and node.name in targets
    )


def _numbering(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The first number of each float32 weight; nothing where there are more elements than numbers."""
    numbers: dict[str, int] = {}
    following = 1  # 0 is what packing pads with
    for name, tensor in state.items():
        if tensor.dtype is torch.float32:
            numbers[name] = following
            following += tensor.numel()
    return numbers if following <= _MOST else {}


def _numbered(tensor: Any, first: int | None) -> Any:
    """A tensor of its own for each name, with numbers from ``first`` where it has them; the strides are kept."""
    with torch.no_grad():
        filled = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        if first is None:
            filled.copy_(tensor)
        else:
            numbers = torch.arange(first, first + tensor.numel(), dtype=torch.float32, device=tensor.device)
            filled.copy_(numbers.view(tensor.shape))
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
    code = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    facts = {
        "format": FORMAT,
        "torch": torch.__version__,
        "machine": _machine(device),
        "settings": dict(settings),
        "numbers": dict(numbers),
        "signature": str(exported.graph_signature),
        "code": code,  # without the comments: they name files and lines
        "sizes": {str(symbol): str(limits) for symbol, limits in exported.range_constraints.items()},
        "options": (_options(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "held": {name: _digest(tensor) for name, tensor in held.items()},
    }
    said = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:40]


def _options() -> str:
    """What was set of Inductor's options, for all compilations of this process."""
    with quiet():
        from torch._inductor import config  # takes a while to import

    options = config.save_config_portable()
    options.pop("aot_inductor.metadata", None)  # what the last compilation says about itself
    return json.dumps(options, sort_keys=True, default=lambda value: type(value).__name__)


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().resolve_neg().resolve_conj().contiguous().view(-1)
    content = flat.view(torch.uint8).numpy().tobytes()
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
            with silent():
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


def _first_line(error: BaseException) -> str:
    """What went wrong, and where a C++ compiler said so, what it said."""
    said = str(error).strip().splitlines()
    found = next((line.partition(" error: ")[2] for line in said if " error: " in line), "")
    first = f"{type(error).__name__}: {said[0] if said else 'no reason given'}"
    return (f"{first}: {found}" if found else first)[:300]

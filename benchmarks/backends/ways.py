"""The ways: each makes a function ``tensor -> tensor`` of a module, for one thread of the host."""

from __future__ import annotations

import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aiotime.compiling.ahead import Ahead

Function = Callable[[torch.Tensor], torch.Tensor]
Way = Callable[[nn.Module, torch.Tensor], Function]

_PACKED = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN", "autotune_num_choices_displayed": 0}


def eager(module: nn.Module, frame: torch.Tensor) -> Function:
    """The module itself."""
    return module


def ours(module: nn.Module, frame: torch.Tensor) -> Function:
    """AOTInductor through its C interface, as ``compile="aot"`` does it."""
    return Ahead(module, [frame], device=torch.device("cpu"))


def packaged(module: nn.Module, frame: torch.Tensor) -> Function:
    """AOTInductor with the same settings, called through PyTorch's loader."""
    folder = tempfile.mkdtemp(prefix="aiotime-benchmark-")
    with torch.no_grad():
        exported = torch.export.export(module, (frame,))
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(Path(folder) / "model.pt2"), inductor_configs=dict(_PACKED)
        )
    loaded: Any = torch._inductor.aoti_load_package(path)
    return loaded


def jit(module: nn.Module, frame: torch.Tensor) -> Function:
    """torch.compile with the same settings."""
    compiled: Any = torch.compile(module, options=dict(_PACKED))
    with torch.inference_mode():
        compiled(frame)
    return compiled


def script(module: nn.Module, frame: torch.Tensor) -> Function:
    """TorchScript, traced and frozen."""
    frozen: Any = torch.jit.freeze(torch.jit.trace(module, frame))
    return frozen


def onnx(module: nn.Module, frame: torch.Tensor) -> Function:
    """Onnxruntime with one thread."""
    import onnxruntime

    written = io.BytesIO()
    program = torch.onnx.export(module, (frame,), dynamo=True, verbose=False)
    assert program is not None
    program.save(written)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(written.getvalue(), options, providers=["CPUExecutionProvider"])
    name, output = session.get_inputs()[0].name, [session.get_outputs()[0].name]
    return lambda x: torch.from_numpy(session.run(output, {name: x.numpy()})[0])


def openvino(module: nn.Module, frame: torch.Tensor) -> Function:
    """OpenVINO with one thread."""
    import openvino as vino

    core = vino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    converted = vino.convert_model(module, example_input=frame, input=[list(frame.shape)])
    request = core.compile_model(converted, "CPU").create_infer_request()

    def call(x: torch.Tensor) -> torch.Tensor:
        request.set_input_tensor(vino.Tensor(x.numpy(), shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return call


EAGER, OURS = "eager", 'aiotime\'s compile="aot"'
WAYS: dict[str, Way] = {
    EAGER: eager,
    "torch.compile": jit,
    "TorchScript": script,
    "AOTInductor, PyTorch's loader": packaged,
    OURS: ours,
    "onnxruntime": onnx,
    "OpenVINO": openvino,
}
_NEEDS = {"onnxruntime": ("onnxruntime", "onnxscript"), "OpenVINO": ("openvino",)}


def make(way: str, module: nn.Module, frame: torch.Tensor) -> Function | str:
    """The function, checked against the module; or why there is none, in words."""
    absent = [name for name in _NEEDS.get(way, ()) if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = WAYS[way](module, frame)
        with torch.inference_mode():
            torch.testing.assert_close(made(frame), module(frame), rtol=1e-3, atol=1e-4)
    except Exception as error:  # noqa: BLE001 - shown as failed, with the reason
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"
    return made

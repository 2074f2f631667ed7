"""The machine in words, and what is missing on it."""

from __future__ import annotations

import importlib.util
import inspect
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

import torch

import aiotime
from benchmarks._harness import machine
from benchmarks.gpu.part import Part

NEEDED = {
    "aiotime itself": ("numpy", "safetensors", "structlog", "torch"),
    "both loops": ("uvloop",),
    "the tests": ("blockbuster", "hypothesis", "pytest", "pytest_asyncio", "pytest_timeout"),
    "the plots": ("matplotlib",),
    "green contexts that share no multiprocessor": ("cuda.bindings",),
}
QUERY = (
    "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,pcie.link.gen.current,pcie.link.width.current"
)


def absent(names: tuple[str, ...]) -> list[str]:
    """Those that cannot be imported."""
    missing = []
    for name in names:
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            found = None
        if found is None:
            missing.append(name)
    return missing


def clock_step() -> float:
    """Seconds between two different answers of the clock that everything here is measured with."""
    now = time.perf_counter
    steps = []
    for _ in range(1000):
        first = now()
        while (second := now()) == first:
            pass
        steps.append(second - first)
    return min(steps)


def device_facts() -> dict[str, Any]:
    """What PyTorch and nvidia-smi say of the first GPU."""
    facts = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    found: dict[str, Any] = {name: getattr(facts, name, None) for name in names}
    found["gpus"] = torch.cuda.device_count()
    found["cuda"] = torch.version.cuda
    found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found["conv_tf32"] = torch.backends.cudnn.allow_tf32
    found["conv_autotune"] = torch.backends.cudnn.benchmark
    found["allocator"] = torch.cuda.get_allocator_backend()
    found["peers"] = [
        [torch.cuda.can_device_access_peer(a, b) for b in range(torch.cuda.device_count()) if a != b]
        for a in range(torch.cuda.device_count())
    ]
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        found["nvidia-smi"] = dict(zip(QUERY.split(","), asked.stdout.strip().split(", "), strict=False))
    return found


def compile_offered() -> bool:
    """Does this aiotime have ``compile=``?"""
    return "compile" in inspect.signature(aiotime.Pipeline).parameters


def green_contexts() -> str:
    """What this PyTorch says of green contexts."""
    try:
        from torch.cuda import green_contexts as module
    except ImportError:
        return "this PyTorch has none"
    return "supported" if module.SUPPORTED else "this PyTorch was built without them"


def run(part: Part) -> None:
    """Write it all down."""
    part.put("machine", value=machine())
    part.put("kernel", value=platform.release())
    part.put("switch_interval_s", value=sys.getswitchinterval())
    part.put("clock_step_ns", value=clock_step() * 1e9)
    part.put("missing", value={what: missing for what, names in NEEDED.items() if (missing := absent(names))})
    part.put("compile", value="offered" if compile_offered() else "this aiotime has no compile= yet")
    part.put("green_contexts", value=green_contexts())
    part.put("variables", value={name: text for name, text in os.environ.items() if name.startswith(("CUDA_", "OMP_"))})
    for name in ("pytest", "pytest-asyncio", "triton"):
        try:
            part.put("versions", name, value=metadata.version(name))
        except metadata.PackageNotFoundError:
            part.put("versions", name, value="absent")
    if part.dry:
        part.put("gpu", value="dry: none was used")
    else:
        part.put("gpu", value=device_facts())
        part.say(f"{part.figures['gpu']['name']}, torch {torch.__version__}")
    for what, missing in part.figures["missing"].items():
        part.say(f"missing for {what}: {', '.join(missing)}")

"""Where stages run. One file a device, one contract (`base`).

inline      the event loop itself           inline.py
cpu:N       worker threads                  cpu.py, worker.py
cuda:N      streams of an accelerator       cuda.py
sim:N       stated times, virtual clock     simulated.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from aiotime.devices.base import Device
from aiotime.devices.cpu import CpuDevice
from aiotime.devices.inline import InlineDevice
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import ConfigurationError

__all__ = ["CpuDevice", "Device", "InlineDevice", "SimulatedDevice", "VirtualClock", "default_devices", "resolve"]


def resolve(spec: str | Device) -> Device:
    """The device behind ``"inline"``, ``"cpu:N"`` or ``"cuda:N"``; a `Device` is returned as it is.

    Raises:
        ConfigurationError: nothing by that name; the message lists what there is.
    """
    if isinstance(spec, Device):
        return spec
    kind, _, number = str(spec).partition(":")
    index = number or "0"
    if kind == "inline" and not number:
        return InlineDevice()
    if index.isdigit():
        if kind == "cpu":
            return CpuDevice(int(index))
        if kind in ("cuda", "xpu"):
            from aiotime.devices.cuda import AcceleratorDevice, CudaDevice  # imported only where it is used

            return CudaDevice(int(index)) if kind == "cuda" else AcceleratorDevice(kind, int(index))
    raise ConfigurationError(
        f'no device is called {spec!r}; write "inline", "cpu:0", "cpu:1", … or "cuda:0", …, '
        "or hand in a Device such as aiotime.devices.CpuDevice(0, threads=2)"
    )


def resolve_all(specs: Sequence[str | Device]) -> list[Device]:
    """Resolve each; at least one."""
    if isinstance(specs, str | Device):
        specs = [specs]
    if not specs:
        raise ConfigurationError('devices is empty; name at least one, for example devices=["cpu:0"]')
    return [resolve(spec) for spec in specs]


def default_devices() -> list[Device]:
    """Every CUDA device, or else one CPU worker per core this process may use."""
    if torch.cuda.is_available():
        return [resolve(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return [CpuDevice(index) for index in range(cores)]

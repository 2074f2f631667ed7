"""aiotime: run a neural network over a stream that never stops, inside one asyncio event loop.

The rooms, from the top; a module imports only from rooms below it:

    cli                          aiotime run | plan | demo
    streams, sources             aiostream operators; video, folders, cameras, stdin
    dynamic                      Network: instances are coroutines, stages batch what waits
    pipeline                     Pipeline: build, open, run, submit, drain, weights, statistics
    keeper, standstill,          what a checkpoint reads and writes; the pause in which it does;
    checkpoint, frozen           its files; a copy of the live model to evaluate
    runs, requests, weights      one stream, in order, with its errors; one submitted frame; a weight swap
    engine                       an open pipeline on one loop; where a frame ends
    ingest, stage, planning      the door; the stage task; trace, measure, cut
    compiling                    a stage as one call: AOTInductor without the GIL, torch.compile, CUDA graphs
    learning                     rules of learning on the stream, and what runs them
    batching                     frames (or a network's calls) as one job: joined, computed, taken apart
    devices, channel, frame      where work runs; bounded queues; what travels
    observe, errors              meters, statistics, traces, logs; every error
    loop, heap                   asyncio.run on uvloop; what the C library does with freed memory
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiotime.channel import Channel
    from aiotime.devices import CpuDevice, Device, InlineDevice, SimulatedDevice, VirtualClock
    from aiotime.errors import AiotimeError
    from aiotime.frame import LATER, Prediction, Sample
    from aiotime.heap import keep_freed_memory
    from aiotime.loop import run
    from aiotime.observe.stats import Stats
    from aiotime.pipeline import Pipeline
    from aiotime.planning import Plan, plan
    from aiotime.runs import Run
    from aiotime.stage import Stage, retry

__version__ = "0.1.0"

# public name -> where it lives; loaded at first use, so that the torch-free rooms stay torch-free
_HOMES = {
    "AiotimeError": "aiotime.errors",
    "Channel": "aiotime.channel",
    "CpuDevice": "aiotime.devices",
    "Device": "aiotime.devices",
    "InlineDevice": "aiotime.devices",
    "LATER": "aiotime.frame",
    "Pipeline": "aiotime.pipeline",
    "Plan": "aiotime.planning",
    "Prediction": "aiotime.frame",
    "Run": "aiotime.runs",
    "Sample": "aiotime.frame",
    "SimulatedDevice": "aiotime.devices",
    "Stage": "aiotime.stage",
    "Stats": "aiotime.observe.stats",
    "VirtualClock": "aiotime.devices",
    "keep_freed_memory": "aiotime.heap",
    "plan": "aiotime.planning",
    "retry": "aiotime.stage",
    "run": "aiotime.loop",
}

__all__ = [
    "LATER",
    "AiotimeError",
    "Channel",
    "CpuDevice",
    "Device",
    "InlineDevice",
    "Pipeline",
    "Plan",
    "Prediction",
    "Run",
    "Sample",
    "SimulatedDevice",
    "Stage",
    "Stats",
    "VirtualClock",
    "keep_freed_memory",
    "plan",
    "retry",
    "run",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        if name in ("errors", "streams", "sources", "devices", "observe", "planning", "learning", "dynamic"):
            import importlib

            return importlib.import_module(f"aiotime.{name}")
        raise AttributeError(f"module 'aiotime' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

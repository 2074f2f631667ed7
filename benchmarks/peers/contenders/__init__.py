"""Who takes part: names, where each one's code lives, what it needs, and which works it is for.

Nothing is imported here but the standard library: a contender is loaded in its own process.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["sequential", "compiled", "by hand", "framework", "aiotime"]
WORKS = ("functions", "model", "mixed")  # kinds; see works.work.Kind


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the tables.

    Args:
        title: as the tables show it.
        home: module and class, ``"threads:Threads"``.
        family: "sequential" and "compiled" are plain loops; "framework": somebody's library with parallel stages.
        options: of the class.
        kinds: of works it takes part in.
        needs: modules that must be installed.
        threads: intra-op threads of PyTorch that the process starts with.
        python: "own" or "ray", the interpreter of another environment.
        compiles: its first start-up takes longer, as it compiles.
        quick: takes part where toy sizes are run, unless others are named.
    """

    title: str
    home: str
    family: Family
    options: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = WORKS
    needs: tuple[str, ...] = ()
    threads: int = 1
    python: Literal["own", "ray"] = "own"
    compiles: bool = False
    quick: bool = False

    @property
    def parallel(self) -> bool:
        """It has parallel stages of somebody else's making."""
        return self.family == "framework"

    def make(self) -> Any:
        """The contender; in its own process."""
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(f"benchmarks.peers.contenders.{module}"), name)(**self.options)

    def missing(self) -> list[str]:
        """What it needs and this interpreter has not."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


PLAIN = "one"  # the plain loop on one thread, which every ratio is about
ALL = (*WORKS, "learning")
MODELS = ("model", "mixed")

ENTRIES: dict[str, Entry] = {
    PLAIN: Entry("plain loop, 1 thread", "sequential:Sequential", "sequential", kinds=ALL, quick=True),
    "two": Entry(
        "plain loop, 2 threads",
        "sequential:Sequential",
        "sequential",
        {"threads": 2},
        kinds=ALL,
        threads=2,
    ),
    "compile": Entry(
        "torch.compile, 1 thread", "sequential:Compiled", "compiled", kinds=(*MODELS, "learning"), compiles=True
    ),
    "aot": Entry("AOTInductor, 1 thread", "sequential:AheadOfTime", "compiled", kinds=MODELS, compiles=True),
    "aot2": Entry(
        "AOTInductor, 2 threads",
        "sequential:AheadOfTime",
        "compiled",
        {"threads": 2},
        kinds=MODELS,
        threads=2,
        compiles=True,
    ),
    "threads": Entry("threads + SimpleQueue, unbounded", "threads:Threads", "by hand", quick=True),
    "bounded": Entry("threads + bounded queues", "threads:Threads", "by hand", {"bounded": True}),
    "executor": Entry("asyncio.Queue + run_in_executor", "executor:Executor", "by hand"),
    "lockstep": Entry("lock-step, PARTIME's scheme", "lockstep:LockStep", "by hand", kinds=ALL),
    "aiostream": Entry("aiostream", "streaming:Aiostream", "framework", needs=("aiostream",)),
    "spdl": Entry("SPDL", "loading:Spdl", "framework", needs=("spdl",)),
    "torchgpipe": Entry("torchgpipe, batches of 8", "gpipe:Gpipe", "framework", needs=("torchgpipe",), threads=2),
    "pipelining": Entry("torch pipelining over gloo, frame by frame", "gloo:Pipelining", "framework"),
    "pipelining8": Entry("torch pipelining over gloo, batches of 8", "gloo:Pipelining", "framework", {"batch": 8}),
    "ray": Entry("Ray actors", "cluster:Actors", "framework", needs=("ray",), python="ray"),
    "raygraph": Entry("Ray compiled graph", "cluster:Graph", "framework", needs=("ray",), python="ray"),
    "ours": Entry("aiotime", "ours:Ours", "aiotime", needs=("aiotime",), quick=True),
    "ours_auto": Entry(
        'aiotime, compile="auto"',
        "ours:Ours",
        "aiotime",
        {"compile": "auto"},
        kinds=MODELS,
        needs=("aiotime",),
        compiles=True,
    ),
    **{
        f"ours_{order}": Entry(
            f"aiotime, Delayed, {order}",
            "ours:Ours",
            "aiotime",
            {"order": order},
            kinds=("learning",),
            quick=order == "event",
        )
        for order in ("event", "1f1b", "lockstep")
    },
    "ours_compiled": Entry(
        'aiotime, Delayed, event, compile="inductor"',
        "ours:Ours",
        "aiotime",
        {"order": "event", "compile": "inductor"},
        kinds=("learning",),
        needs=("aiotime",),
        compiles=True,
    ),
}

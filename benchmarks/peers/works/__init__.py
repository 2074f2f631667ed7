"""The works that every contender is given; `build` makes one by its name."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.peers.works.work import Work

# name -> the module whose function of the same name makes it
HOMES = {
    "trivial": "functions",
    "released": "functions",
    "mlp64": "models",
    "mlp256": "models",
    "conv": "models",
    "residual": "models",
    "gpt": "models",
    "decode": "pictures",
    "learn_mlp": "lessons",
    "learn_conv": "lessons",
}
# the works at toy sizes, unless others are named: one of each kind
QUICK = ("trivial", "mlp64", "decode", "learn_mlp")


def build(name: str, *, quick: bool = False, **sizes: Any) -> Work:
    """The work of that name, the same in every process; ``sizes`` differ from the usual ones in `curves` alone."""
    module = importlib.import_module(f"benchmarks.peers.works.{HOMES[name]}")
    work: Work = getattr(module, name)(quick=quick, **sizes)
    return work

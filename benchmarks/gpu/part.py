"""One part of the run: its budget, its notebook, and a process of its own.

    python -m benchmarks.gpu.part NAME --seconds S --file F [--dry]

A GPU that one part has broken is as good as new for the next process; a part that hangs is ended from outside, and
what it had written down stays.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.record import Notebook, told


class Part:
    """What a part is given.

    Args:
        name: of the part.
        seconds: it may spend.
        dry: toy sizes on the CPU; the figures mean nothing.
        path: of the notebook's file.
    """

    def __init__(self, name: str, seconds: float, *, dry: bool, path: Path | None = None) -> None:
        self.name = name
        self.dry = dry
        self.budget = Budget(seconds)
        self._notebook = Notebook(path)
        self.failures = 0

    @property
    def figures(self) -> dict[str, Any]:
        """What was written down so far."""
        return self._notebook.figures

    def put(self, *keys: str, value: Any) -> None:
        """Write a figure down; it is on disk when this returns."""
        self._notebook.put(*keys, value=value)

    def say(self, text: str) -> None:
        """Progress, one line."""
        print(f"[{self.name} {self.budget.spent:5.1f}/{self.budget.seconds:.0f} s] {text}", flush=True)

    @contextmanager
    def guard(self, *keys: str) -> Iterator[None]:
        """What fails inside is written down under ``keys`` with its traceback, and the rest goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - one cell must not cost the others
            self.failures += 1
            self.put(*keys, value={"failed": f"{type(error).__name__}: {error}", "traceback": told(error)})
            self.say(f"failed: {'/'.join(keys)}: {type(error).__name__}: {error}")

    def runtime(self) -> Any:
        """The GPU, or threads that stand for it."""
        if self.dry:
            from benchmarks.gpu.dry import DryRuntime

            return DryRuntime()
        from benchmarks.gpu.runtime import CudaRuntime

        return CudaRuntime()


# name -> (module, seconds promised); in the order in which they run
PARTS: dict[str, tuple[str, float]] = {
    "environment": ("environment", 15.0),
    "tests": ("suite", 95.0),
    "wake-up": ("wakeup", 85.0),
    "costs": ("costs", 30.0),
    "transfers": ("transfers", 25.0),
    "sharing": ("sharing", 35.0),
    "partime": ("partime", 225.0),  # last: it takes what the others have saved
}


def perform(part: Part) -> str:
    """Run the part; "done", or "failed" with the traceback in its notebook."""
    module = importlib.import_module(f"benchmarks.gpu.{PARTS[part.name][0]}")
    start = time.perf_counter()
    status = "done"
    try:
        module.run(part)
    except Exception as error:  # noqa: BLE001 - recorded with its traceback; the other parts go on
        part.put("failed", value=f"{type(error).__name__}: {error}")
        part.put("traceback", value=told(error))
        status = "failed"
    part.put("seconds_inside", value=time.perf_counter() - start)
    part.put("cells_failed", value=part.failures)
    part.put("status", value=status)
    return status


def main() -> int:
    options = argparse.ArgumentParser(description="one part of benchmarks.gpu")
    options.add_argument("name", choices=list(PARTS))
    options.add_argument("--seconds", type=float, required=True)
    options.add_argument("--file", type=Path, required=True)
    options.add_argument("--dry", action="store_true")
    given = options.parse_args()
    status = perform(Part(given.name, given.seconds, dry=given.dry, path=given.file))
    return 0 if status == "done" else 1


if __name__ == "__main__":
    sys.exit(main())

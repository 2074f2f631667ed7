"""python -m benchmarks.freed_memory [--settings] [--sizes 64 128 512]"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import LOOPS, Report, Rounds, parser, progress
from benchmarks.freed_memory import __doc__ as question
from benchmarks.freed_memory.child import CONTENDERS

NEVER_SLOWER = 0.95  # times malloc as it comes
FEW_FAULTS = 200  # per frame; without, it is thousands
PLAIN, KEPT = "plain", "kept"
PARTS = ("trim", "mmap", "pad", "trim+mmap", "trim+pad", "mmap+pad", "trim+mmap+pad", "trim+mmap+pad+arena")


def child(setting: str, size: int, number: int, layers: int) -> dict[str, Any]:
    """What one process measured under ``setting``."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.freed_memory.child", setting, str(size), str(number), str(layers)],
        cwd=Path(__file__).parent.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"the process of setting {setting!r} failed:\n{finished.stderr}")
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def measure(settings: Sequence[str], size: int, number: int, layers: int, rounds: int) -> dict[str, list[Any]]:
    """Every setting once per round, forwards and backwards in turn."""
    found: dict[str, list[Any]] = {setting: [] for setting in settings}
    for turn in range(rounds):
        for setting in settings if turn % 2 == 0 else reversed(settings):
            progress(f"{size}×{size}, round {turn + 1} of {rounds}: {setting}")
            found[setting].append(child(setting, size, number, layers))
    progress("")
    return found


def main() -> None:
    options = parser(question or "")
    options.add_argument("--settings", action="store_true", help="compare the parts of the setting as well")
    options.add_argument("--sizes", nargs="+", type=int, help="of the pictures")
    arguments = options.parse_args()
    quick = arguments.quick
    rounds = arguments.rounds or (1 if quick else 5)
    settings = (PLAIN, KEPT, *(PARTS if arguments.settings else ()))
    report = Report(
        __file__,
        question=question or "",
        setup=f"(conv 5×5 with 32 channels, ReLU), batch 1, float32; a process for each setting and round, {rounds} "
        "rounds in turns, medians. plain: malloc as it comes; kept: after aiotime.keep_freed_memory(). Pipeline: 2 CPU "
        f"streams with 1 intra-op thread each, divided evenly, on {LOOPS[0]}, measured while the stream goes on.",
        arguments=arguments,
        memory="malloc as each row says",
    )
    for size in arguments.sizes or ((16,) if quick else (64, 128, 512)):
        layers = 4 if quick or size > 256 else 30
        number = 2 if quick or size > 256 else max(4, 20 * 64**2 // size**2)
        found = measure(settings, size, number, layers, rounds)
        rows: list[list[str | float]] = []
        for contender in CONTENDERS:
            rates = Rounds({setting: [one[contender]["rate"] for one in found[setting]] for setting in settings})
            faults = Rounds({setting: [one[contender]["faults"] for one in found[setting]] for setting in settings})
            for setting in settings:
                peak = max(one["peak"] for one in found[setting])
                ratio = rates.ratio(setting, PLAIN)
                rows.append([contender, setting, rates.median(setting), ratio, faults.median(setting), peak])
            where = f"{size}×{size}, {contender}"
            report.target(f"{where}: times plain", rates.ratio(KEPT, PLAIN), NEVER_SLOWER, unit=" ×")
            report.target(f"{where}: page faults per frame", faults.median(KEPT), FEW_FAULTS, at_most=True)
        report.table(
            f"{size}×{size}, {layers} layers, {number} frames a round",
            ["contender", "malloc", "frames/s", "× plain", "faults per frame", "peak MiB"],
            rows,
        )
    report.finish()


if __name__ == "__main__":
    main()

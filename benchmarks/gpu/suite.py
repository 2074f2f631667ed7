"""``pytest tests/cuda -q``: do the answers, lifetimes, waits and errors hold on this GPU at all?"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from benchmarks.gpu.part import Part
from benchmarks.gpu.record import ROOT

COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed|deselected|warnings?)")
KEPT = 12_000  # characters of the output's end


def counts(output: str) -> dict[str, int]:
    """The numbers of pytest's last line."""
    for line in reversed(output.strip().splitlines()):
        found = COUNT.findall(line)
        if found:
            return {name.rstrip("s") if name.startswith("error") else name: int(number) for number, name in found}
    return {}


def failures(output: str) -> list[str]:
    """The lines of the short summary that name a failure or an error."""
    return [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def run(part: Part) -> None:
    """All of tests/cuda; without a GPU they are collected alone."""
    command = [sys.executable, "-m", "pytest", "tests/cuda", "-q", "--tb=short", "-p", "no:cacheprovider"]
    variables = dict(os.environ)
    if part.dry:
        command.append("--collect-only")
    else:
        variables["AIOTIME_REQUIRE_CUDA"] = "1"
        command.append("--durations=8")
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    cut = False
    try:
        output, _ = process.communicate(timeout=max(5.0, part.budget.left - 2.0))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        cut = True
    part.put("command", value=" ".join(["python", *command[1:]]))
    part.put("exit", value=None if cut else process.returncode)
    part.put("cut_off", value=cut)
    part.put("counts", value=counts(output))
    part.put("failures", value=failures(output))
    part.put("output_end", value=output[-KEPT:])
    part.say(f"{'cut off; ' if cut else ''}{counts(output) or output[-400:]}")

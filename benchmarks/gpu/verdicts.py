"""What was promised for one H200, against what was found. Plain data in, plain data out.

Where a measurement has an uncertainty, it is counted against us; where a cell is missing, it is named, not passed over.
"""

from __future__ import annotations

from typing import Any

WAKE_UP = 30.0  # µs, p50
IDLE = 0.02  # of the time, under saturation
OVER_LOCK_STEP = 1.3  # times
OURS = "aiotime's poller"


def target(what: str, value: float, bound: float, *, unit: str = "", at_most: bool = False) -> dict[str, Any]:
    """One promise; the same fields as the other benchmarks' JSON."""
    met = value <= bound if at_most else value >= bound
    return {"what": what, "value": value, "bound": bound, "unit": unit, "at_most": at_most, "met": met}


def unmeasured(what: str) -> dict[str, Any]:
    """A promise that nothing was found about."""
    return {"what": what, "value": None, "bound": None, "unit": "", "at_most": False, "met": None}


def wake_up(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The poller's p50 at each stage duration on each loop, at the late end of the clocks' uncertainty."""
    found = []
    for loop, ways in figures.get("cells", {}).items():
        for duration, cell in ways.get(OURS, {}).items():
            what = f"wake-up p50, {duration} µs stages, {loop}"
            if cell.get("p50_us") is None:
                found.append(unmeasured(what))
                continue
            late = cell["p50_us"] + (cell.get("uncertainty_us") or 0.0)
            found.append(target(what, late, WAKE_UP, unit=" µs", at_most=True))
    return found or [unmeasured("wake-up p50")]


def best(contenders: dict[str, Any], family: str) -> tuple[str, dict[str, Any]] | None:
    """The fastest of a family under saturation."""
    running = [
        (name, each)
        for name, each in contenders.items()
        if each.get("family") == family and each.get("saturated", {}).get("per_s")
    ]
    return max(running, key=lambda pair: pair[1]["saturated"]["per_s"], default=None)


def partime(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """For each task: our fastest against the fastest lock-step."""
    found = []
    for task, data in figures.get("tasks", {}).items():
        ours, theirs = (best(data.get("contenders", {}), family) for family in ("aiotime", "lock-step"))
        if ours is None or theirs is None:
            found.append(unmeasured(f"{task}: aiotime against lock-step"))
            continue
        (mine, a), (other, b) = ours, theirs
        ratio = a["saturated"]["per_s"] / b["saturated"]["per_s"]
        found.append(target(f"{task}: {mine} over {other}", ratio, OVER_LOCK_STEP, unit=" ×"))
        idle = a.get("trace", {}).get("idle")
        what = f"{task}: GPU idle, {mine}"
        found.append(
            unmeasured(what) if idle is None else target(what, 100 * idle, 100 * IDLE, unit=" %", at_most=True)
        )
        p99 = [each.get("paced", {}).get("p99_ms") for each in (a, b)]
        what = f"{task}: p99 at half load, {mine} over {other}"
        if p99[0] is None or not p99[1]:
            found.append(unmeasured(what))
        else:
            found.append(target(what, p99[0] / p99[1], 1.0, unit=" ×", at_most=True))
    return found or [unmeasured("aiotime against lock-step")]


def verdicts(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """All promises."""
    figures = {name: part.get("figures", {}) for name, part in parts.items()}
    return [*wake_up(figures.get("wake-up", {})), *partime(figures.get("partime", {}))]

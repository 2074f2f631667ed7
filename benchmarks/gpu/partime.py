"""PARTIME's experiment A on one GPU: plain loops, its lock-step scheme, aiotime; with and without graphs.

Contenders run one after the other, each for a share of the time; within a task the same frames, the same weights, the
same outputs (checked), pinned inputs and results in pinned memory for all of them.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks._harness import LOOPS, run_on
from benchmarks.gpu.busy import Trace
from benchmarks.gpu.drive import answer, pace, saturate
from benchmarks.gpu.environment import compile_offered
from benchmarks.gpu.lockstep import LockStep
from benchmarks.gpu.nets import TASKS, TOY_TASKS, Task, distance, frames, reference
from benchmarks.gpu.ours import Ours, Windows
from benchmarks.gpu.part import Part
from benchmarks.gpu.place import CudaPlace, HostPlace, Place
from benchmarks.gpu.plain import PlainLoop
from benchmarks.gpu.record import told

AHEAD = 4  # frames under way in the asynchronous plain loop
LOAD = 0.5  # of what the host-synchronised plain loop manages: the rate at which latency is compared
PATIENCE = 120.0  # seconds for all windows of a pipeline
TOLERANCE = 0.03  # of the largest output; convolutions in TF32 differ by their algorithm

PLAIN = "plain loop, synchronised"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way through the contest.

    Attributes:
        name: in words.
        family: "plain", "lock-step" or "aiotime".
        make: (task, place) -> a `benchmarks.gpu.drive.Loop`, or `Ours`.
        graph: are its kernels replayed from CUDA graphs?
        learning: for tasks that learn (True), for those that do not (False), for both (None).
    """

    name: str
    family: str
    make: Callable[[Task, Place], Any]
    graph: bool = False
    learning: bool | None = None


def contenders() -> list[Contender]:
    """Everybody, the most telling first: where time runs out, the last are left out, and named."""
    found = [
        Contender(PLAIN, "plain", lambda t, p: PlainLoop(t, p, ahead=1, graph=False)),
        Contender("lock-step, 4 stages", "lock-step", lambda t, p: LockStep(t, p, stages=4, graph=False)),
        Contender("aiotime, 1 stage", "aiotime", lambda t, p: Ours(t, p, stages=1)),
        Contender("aiotime, 4 stages", "aiotime", lambda t, p: Ours(t, p, stages=4)),
        Contender("lock-step, 4 stages, graph", "lock-step", lambda t, p: LockStep(t, p, stages=4, graph=True), True),
        Contender("plain loop, asynchronous", "plain", lambda t, p: PlainLoop(t, p, ahead=AHEAD, graph=False)),
        Contender(
            "plain loop, asynchronous, graph", "plain", lambda t, p: PlainLoop(t, p, ahead=AHEAD, graph=True), True
        ),
        Contender("aiotime, 2 stages", "aiotime", lambda t, p: Ours(t, p, stages=2)),
        Contender(
            "aiotime, 1 stage, exact", "aiotime", lambda t, p: Ours(t, p, stages=1, exact=True), False, learning=True
        ),
        Contender("lock-step, 2 stages", "lock-step", lambda t, p: LockStep(t, p, stages=2, graph=False)),
        Contender("lock-step, 2 stages, graph", "lock-step", lambda t, p: LockStep(t, p, stages=2, graph=True), True),
        Contender("plain loop, synchronised, graph", "plain", lambda t, p: PlainLoop(t, p, ahead=1, graph=True), True),
    ]
    if compile_offered():
        graphs = [_graphed(stages) for stages in (1, 4, 2)]
        found[5:5] = graphs[:2]
        found.append(graphs[2])
    return found


def _graphed(stages: int) -> Contender:
    name = f"aiotime, {stages} stage{'s' if stages > 1 else ''}, graphs"
    # it has no backward: a pipeline that learns refuses it
    return Contender(
        name, "aiotime", lambda t, p: Ours(t, p, stages=stages, compiled="cudagraph"), graph=True, learning=False
    )


def windows(seconds: float, frame: float, rate: float | None, *, dry: bool) -> Windows:
    """How a contender's ``seconds`` are used when a frame takes ``frame`` of them.

    Building, capturing and warming takes its part. Where frames are so long that few fit, the paced window goes first.
    """
    if dry:
        return Windows(warm=0.0, saturated=0.0, traced=0.0, paced=0.0, rate=rate, fewest=4)
    fewest = max(3, min(20, int(0.2 * seconds / max(frame, 1e-6))))
    paced = rate if frame * fewest * 2 < 0.5 * seconds else None
    return Windows(0.1 * seconds, 0.3 * seconds, min(0.3, 0.1 * seconds), 0.3 * seconds, paced, fewest)


def drive(loop: Any, plan: Windows, trace: Callable[[], Trace] | None) -> dict[str, Any]:
    """The windows of `Ours.race`, for a loop that is driven from outside."""
    found: dict[str, Any] = {"answer": answer(loop)}
    saturate(loop, plan.warm, fewest=2)
    found["saturated"] = saturate(loop, plan.saturated, fewest=plan.fewest).figures()
    if trace is not None:
        profiler = trace()
        with profiler:
            traced = saturate(loop, plan.traced, fewest=plan.fewest)
        found["traced_per_s"] = traced.rate
        found["trace"] = profiler.figures()
    if plan.rate is not None:
        found["paced"] = pace(loop, plan.rate, plan.paced, fewest=plan.fewest).figures()
    return found


def one(contender: Contender, task: Task, place: Place, plan: Windows, wanted: torch.Tensor, *, dry: bool) -> Any:
    """A contender's figures in a task; its output is compared before they count."""
    gc.collect()
    place.forget()

    def trace() -> Trace:
        return Trace(dry=dry)

    watched = (
        None if dry and (task.learns or contender.graph) else trace
    )  # starting the profiler takes most of a dry run
    made = contender.make(task, place)
    try:
        if isinstance(made, Ours):
            found = run_on(LOOPS[0], asyncio.wait_for(made.race(plan, watched), PATIENCE))
        else:
            found = drive(made, plan, watched)
    finally:
        if not isinstance(made, Ours):
            made.close()
    off = distance(found.pop("answer"), wanted)
    found["off"] = off
    found["peak_mib"] = place.peak_bytes() / 2**20
    found["family"], found["graph"] = contender.family, contender.graph
    if not off <= TOLERANCE:
        raise RuntimeError(f"{contender.name} gives another answer: off by {off:.2g} of the largest output")
    return found


def run(part: Part) -> None:
    """Every task, every contender."""
    place: Place = HostPlace() if part.dry else CudaPlace()
    tasks = TOY_TASKS if part.dry else TASKS
    if part.dry:
        torch.set_num_threads(1)
    everybody = contenders()
    if not compile_offered():
        part.put("graphs_of_aiotime", value='absent: this aiotime has no compile="cudagraph" yet')
    with part.guard("profiler"), Trace(dry=part.dry):  # its first start takes a second or more
        place.synchronize()
    for position, task in enumerate(tasks):
        seconds = part.budget.left * task.size / sum(each.size for each in tasks[position:])
        _task(part, place, task, everybody, seconds)


def _task(part: Part, place: Place, task: Task, everybody: list[Contender], seconds: float) -> None:
    field = [each for each in everybody if each.learning in (None, task.learns)]
    budget = part.budget.part(seconds)
    part.put("tasks", task.name, "gflop", value=task.flops / 1e9)
    try:
        wanted = reference(task, place, frames(task, place)[0])
    except RuntimeError as error:  # out of memory: the other tasks may fit
        part.put("tasks", task.name, "failed", value=told(error))
        return
    frame, rate = 0.0, None
    for position, contender in enumerate(field):
        keys = ("tasks", task.name, "contenders", contender.name)
        plan = windows(budget.share(len(field) - position), frame, rate, dry=part.dry)
        needed = 0.0 if part.dry else frame * (4 + 3 * plan.fewest) + 0.3
        if budget.left < needed:
            part.put(*keys, value={"skipped": f"no time left: it needs {needed:.1f} s"})
            continue
        with part.guard(*keys):
            found = one(contender, task, place, plan, wanted, dry=part.dry)
            part.put(*keys, value=found)
            per_s = found["saturated"]["per_s"]
            if contender.name == PLAIN and per_s > 0:
                frame, rate = 1 / per_s, LOAD * per_s
                with part.guard(*keys, "paced"):  # it did not know the rate before
                    found["paced"] = _paced(contender, task, place, replace(plan, rate=rate))
                    part.put(*keys, "paced", value=found["paced"])
            idle = found.get("trace", {}).get("idle")
            part.say(
                f"{task.name}: {contender.name}: {per_s:.1f} frames/s"
                + (f", idle {100 * idle:.1f} %" if idle is not None else "")
                + (f", p99 {found['paced']['p99_ms']:.2f} ms" if "paced" in found else "")
            )


def _paced(contender: Contender, task: Task, place: Place, plan: Windows) -> dict[str, Any]:
    loop = contender.make(task, place)
    try:
        assert plan.rate is not None
        return pace(loop, plan.rate, plan.paced, fewest=plan.fewest).figures()
    finally:
        loop.close()

"""python -m benchmarks.not_worth_cutting"""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

import aiotime
from benchmarks._harness import LOOPS, Contender, Report, Rounds, parser, run_on, take_turns
from benchmarks.hop_cost.peers import frames_from
from benchmarks.not_worth_cutting import __doc__ as question

NEVER_SLOWER = 0.95  # times the plain loop


def stack(depth: int, width: int) -> nn.Sequential:
    """``depth`` times a linear layer and a ReLU."""
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU()))).eval()


def tiny() -> nn.Sequential:
    """Three layers that take a few microseconds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def sequential(model: nn.Module, frame: torch.Tensor, number: int) -> float:
    """Frames per second of plain calls on one thread."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(10):
            model(frame)
        start = time.perf_counter()
        for _ in range(number):
            model(frame)
        return number / (time.perf_counter() - start)


async def pipelined(pipeline: aiotime.Pipeline, frame: torch.Tensor, number: int) -> float:
    """Frames per second through the warm pipeline."""
    async with pipeline:
        async for _ in pipeline.run(frames_from(frame, max(20, number // 10))):
            pass
        start = time.perf_counter()
        async for _ in pipeline.run(frames_from(frame, number)):
            pass
        return number / (time.perf_counter() - start)


def compare(model: nn.Module, pipeline: aiotime.Pipeline, frame: torch.Tensor, number: int, *, rounds: int) -> Rounds:
    """The plain loop and the pipeline, in turns."""
    contenders: dict[str, Contender] = {
        "plain": lambda: sequential(model, frame, number),
        "aiotime": lambda: run_on(LOOPS[0], pipelined(pipeline, frame, number)),
    }
    return take_turns(contenders, rounds=rounds)


def main() -> None:
    arguments = parser(question or "").parse_args()
    quick = arguments.quick
    rounds = arguments.rounds or (1 if quick else 9)
    torch.set_num_threads(1)
    report = Report(
        __file__,
        question=question or "",
        setup=f'balance="measured" on cpu:0 and cpu:1 with 1 intra-op thread each, batch 1, {LOOPS[0]}; the plain loop '
        f"calls the model on one thread in inference mode; {rounds} rounds in turns, medians.",
        arguments=arguments,
    )
    cases = [
        ("30 × (linear 64, ReLU)", stack(30, 64), torch.rand(1, 64), 4_000, NEVER_SLOWER),
        ("30 × (linear 256, ReLU)", stack(30, 256), torch.rand(1, 256), 2_000, None),
        ("linear 16, ReLU, linear 16 → 4", tiny(), torch.rand(1, 16), 20_000, None),
    ]
    rows: list[list[str | float]] = []
    for name, model, frame, most, bound in cases[:1] if quick else cases:  # planning one takes seconds
        number = 40 if quick else most
        pipeline = aiotime.Pipeline(copy.deepcopy(model), example=frame, devices=["cpu:0", "cpu:1"], balance="measured")
        measured = compare(model, pipeline, frame, number, rounds=rounds)
        assert pipeline.plan is not None
        ratio, plain, ours = measured.ratio("aiotime", "plain"), measured.median("plain"), measured.median("aiotime")
        where = " + ".join(stage.device for stage in pipeline.plan.stages)
        rows.append([name, where, plain, ours, ratio, 1e6 / plain, 1e6 / ours - 1e6 / plain])
        if bound is not None:
            report.target(f"{name}: times the plain loop", ratio, bound, unit=" ×")
    report.table(
        "Where the plan put the model, and what that costs",
        ["model", "plan", "plain frames/s", "aiotime frames/s", "ratio", "plain µs", "added µs"],
        rows,
    )
    report.finish()


if __name__ == "__main__":
    main()

"""python -m benchmarks.hop_cost"""

from __future__ import annotations

from functools import partial
from time import perf_counter

import torch

import aiotime
from benchmarks._costs import ping_pong, wake_ups
from benchmarks._harness import LOOPS, Contender, Loop, Report, parser, run_on, take_turns
from benchmarks.hop_cost import __doc__ as question
from benchmarks.hop_cost.peers import (
    Peer,
    executor_futures_in_queues,
    executor_one_at_a_time,
    for_loop,
    frames_from,
    threads_and_queues,
)

STAGES = 4
FRAME = torch.rand(16)
DEPTHS = (2, 4, 16, 64)
PEER_DEPTH = 64
TARGET = 50_000  # frames/s
OVER_EXECUTOR = 10  # times
ONE_CALL = "queues + executor, one call in flight"  # per stage
MANY_CALLS = "queues + executor, many in flight"


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


async def pipelined(number: int, *, depth: int | None) -> float:
    """Frames per second through a warm pipeline, one CPU stream per stage."""
    stages = [aiotime.Stage(add_one, name=f"add {k}", device=f"cpu:{k}") for k in range(STAGES)]
    async with aiotime.Pipeline.from_stages(stages, depth=depth) as pipeline:
        async for _ in pipeline.run(frames_from(FRAME, max(200, number // 5))):
            pass
        start = perf_counter()
        count = 0
        async for _ in pipeline.run(frames_from(FRAME, number)):
            count += 1
        spent = perf_counter() - start
    if count != number:
        raise RuntimeError(f"{number} frames went in, {count} came out")
    return number / spent


def main() -> None:
    arguments = parser(question or "").parse_args()
    number, slow_number, rounds = (400, 100, 1) if arguments.quick else (20_000, 2_000, 7)
    rounds = arguments.rounds or rounds
    functions = [add_one] * STAGES
    report = Report(
        __file__,
        question=question or "",
        setup=f"{STAGES} stages, each x + 1 on {FRAME.numel()} floats on a CPU stream of its own with 1 intra-op "
        f"thread; {number:,} frames, {rounds} rounds in turns, medians. Queues of the peers hold {PEER_DEPTH}.",
        arguments=arguments,
    )

    def ours(loop: Loop, depth: int | None) -> Contender:
        return lambda: run_on(loop, pipelined(number, depth=depth))

    def peer(loop: Loop, peer: Peer) -> Contender:
        return lambda: run_on(loop, peer(functions, FRAME, slow_number, PEER_DEPTH))

    contenders: dict[str, Contender] = {"for loop": partial(for_loop, functions, FRAME, number)}
    for loop in LOOPS:
        contenders[f"aiotime, {loop}"] = ours(loop, None)
        contenders[f"{ONE_CALL}, {loop}"] = peer(loop, executor_one_at_a_time)
        contenders[f"{MANY_CALLS}, {loop}"] = peer(loop, executor_futures_in_queues)
    contenders["threads + bounded queues"] = partial(threads_and_queues, functions, FRAME, slow_number, PEER_DEPTH)
    for depth in DEPTHS:
        for loop in LOOPS:
            contenders[f"depth {depth}, {loop}"] = ours(loop, depth)
    measured = take_turns(contenders, rounds=rounds)
    plain = 1 / measured.median("for loop")

    def row(name: str) -> list[str | float]:
        seconds = 1 / measured.median(name)
        return [
            name,
            measured.median(name),
            measured.spread(name),
            measured.ratio(name, "for loop"),
            (seconds - plain) / STAGES * 1e6,
        ]

    columns = ["contender", "frames/s", "lowest–highest", "× for loop", "added µs per hop"]
    report.table("Four trivial stages", columns, [row(name) for name in contenders if not name.startswith("depth")])
    report.table(
        "By depth (launches in flight per stage)",
        ["depth", *(f"frames/s, {each}" for each in LOOPS), *(f"µs per frame, {each}" for each in LOOPS)],
        [
            [str(depth), *(measured.median(name) for name in names), *(1e6 / measured.median(name) for name in names)]
            for depth, names in [
                *((depth, [f"depth {depth}, {each}" for each in LOOPS]) for depth in DEPTHS),
                ("adaptive", [f"aiotime, {each}" for each in LOOPS]),
            ]
        ],
    )
    wakes = 50 if arguments.quick else 2_000
    costs = {each: wake_ups(each, wakes) for each in LOOPS}
    report.table(
        "What this machine charges (µs)",
        ["what", "µs"],
        [
            ["four stages called in a for loop, per frame", plain * 1e6],
            ["hand-over between two threads by locks (ping-pong)", ping_pong(wakes) * 1e6],
            *(
                [f"{what}, {each}", getattr(costs[each], attribute) * 1e6]
                for each in LOOPS
                for what, attribute in (
                    ("loop wakes an idle thread", "thread_p50"),
                    ("thread wakes the loop, until the task goes on", "loop_p50"),
                )
            ),
        ],
    )
    loop = LOOPS[0]
    report.target(f"frames/s, {loop}", measured.median(f"aiotime, {loop}"), TARGET)
    for name in (ONE_CALL, MANY_CALLS):
        report.target(
            f"times {name}, {loop}", measured.ratio(f"aiotime, {loop}", f"{name}, {loop}"), OVER_EXECUTOR, unit=" ×"
        )
    report.finish()


if __name__ == "__main__":
    main()

"""python -m benchmarks.submit"""

from __future__ import annotations

import asyncio
import time

import torch

import aiotime
from benchmarks._harness import LOOPS, Contender, Loop, Report, parser, run_on, take_turns
from benchmarks.hop_cost.peers import frames_from
from benchmarks.submit import __doc__ as question

STAGES = 4
CONCURRENT = 1_000
OF_RUN = 0.9  # share of the throughput of run()


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def pipeline() -> aiotime.Pipeline:
    """Four trivial stages, one CPU stream each."""
    return aiotime.Pipeline.from_stages(
        [aiotime.Stage(add_one, name=f"add {k}", device=f"cpu:{k}") for k in range(STAGES)]
    )


class Tally:
    """Every answer against its request."""

    def __init__(self) -> None:
        self.asked = 0
        self.wrong = 0
        self.lost = 0

    def check(self, requests: list[torch.Tensor], answers: list[torch.Tensor | None]) -> None:
        """Compare, outside of the measured time."""
        self.asked += len(requests)
        got = [(request, answer) for request, answer in zip(requests, answers, strict=True) if answer is not None]
        self.lost += len(requests) - len(got)
        if got:
            sent = torch.stack([request for request, _ in got]) + STAGES
            self.wrong += int((sent != torch.stack([answer for _, answer in got])).any(dim=1).sum())


def numbered(number: int) -> list[torch.Tensor]:
    """Requests that differ in every element."""
    return list(torch.arange(number, dtype=torch.float64).unsqueeze(1).expand(number, 16).contiguous())


async def stream(number: int, tally: Tally) -> float:
    """Frames per second of run(), its outputs kept and checked like the answers."""
    frames = numbered(number)
    async with pipeline() as opened:
        async for _ in opened.run(frames_from(frames[0], max(200, number // 5))):
            pass
        answers: list[torch.Tensor | None] = [None] * number
        start = time.perf_counter()
        async for prediction in opened.run(frames):
            answers[prediction.index] = prediction.output
        spent = time.perf_counter() - start
    tally.check(frames, answers)
    return number / spent


async def kept_up(number: int, concurrent: int, tally: Tally) -> float:
    """Requests per second while ``concurrent`` clients each ask again as soon as they were answered."""
    requests = numbered(number)
    async with pipeline() as opened:
        await asyncio.gather(*(opened.submit(requests[0]) for _ in range(max(200, number // 5))))
        answers: list[torch.Tensor | None] = [None] * number
        numbers = iter(range(number))

        async def client() -> None:
            for mine in numbers:
                answers[mine] = (await opened.submit(requests[mine])).output

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrent)))
        spent = time.perf_counter() - start
    tally.check(requests, answers)
    return number / spent


async def burst(concurrent: int, tally: Tally) -> float:
    """Requests per second of one crowd that asks at once."""
    requests = numbered(concurrent)
    async with pipeline() as opened:
        await asyncio.gather(*(opened.submit(requests[0]) for _ in range(concurrent)))
        start = time.perf_counter()
        predictions = await asyncio.gather(*(opened.submit(request) for request in requests))
        spent = time.perf_counter() - start
    tally.check(requests, [prediction.output for prediction in predictions])
    return concurrent / spent


def on_one(loop: Loop, number: int, concurrent: int, tally: Tally) -> dict[str, Contender]:
    """The contenders on one kind of loop."""
    return {
        f"run(), {loop}": lambda: run_on(loop, stream(number, tally)),
        f"submit(), {loop}": lambda: run_on(loop, kept_up(number, concurrent, tally)),
        f"one burst of submit(), {loop}": lambda: run_on(loop, burst(concurrent, tally)),
    }


def main() -> None:
    arguments = parser(question or "").parse_args()
    number, concurrent, rounds = (1_000, 100, 1) if arguments.quick else (20_000, CONCURRENT, 9)
    rounds = arguments.rounds or rounds
    torch.set_num_threads(1)
    report = Report(
        __file__,
        question=question or "",
        setup=f"{STAGES} stages, each x + 1 on 16 floats on a CPU stream of its own with 1 intra-op thread; {number:,} "
        f"requests by {concurrent:,} clients, or frames of one run(); every answer is kept and compared; {rounds} "
        "rounds in turns, medians.",
        arguments=arguments,
    )
    tally = Tally()
    contenders: dict[str, Contender] = {}
    for loop in LOOPS:
        contenders |= on_one(loop, number, concurrent, tally)
    measured = take_turns(contenders, rounds=rounds)
    report.table(
        f"{concurrent:,} requests at once",
        ["contender", "per second", "lowest–highest", "µs each", "× run()"],
        [
            [
                name,
                measured.median(name),
                measured.spread(name),
                1e6 / measured.median(name),
                measured.ratio(name, f"run(), {name.rpartition(', ')[2]}"),
            ]
            for name in measured.figures
        ],
    )
    report.say("", f"{tally.asked:,} requests and frames: {tally.lost} lost, {tally.wrong} with another's answer.")
    report.target("requests lost", tally.lost, 0, at_most=True)
    report.target("requests that got another's answer", tally.wrong, 0, at_most=True)
    loop = LOOPS[0]
    over_run = measured.ratio(f"submit(), {loop}", f"run(), {loop}")
    report.target(f"submit() over run(), {loop}", over_run, OF_RUN, unit=" ×")
    report.finish()


if __name__ == "__main__":
    main()

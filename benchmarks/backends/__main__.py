"""python -m benchmarks.backends"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import torch

from benchmarks._harness import Contender, Report, parser, take_turns
from benchmarks.backends import __doc__ as question
from benchmarks.backends.nets import nets
from benchmarks.backends.ways import EAGER, OURS, WAYS, Function, make

WINDOW = 16  # frames in flight over two threads


def alone(function: Function, frame: torch.Tensor, seconds: float) -> float:
    """Frames per second on one thread, in a loop."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(3):
            function(frame)
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            function(frame)
            count += 1
    return count / spent


def in_two(stages: Sequence[Function], frame: torch.Tensor, seconds: float) -> float:
    """Frames per second through two stages, each on a thread of its own, handed on by queues."""
    queues: list[queue.SimpleQueue[torch.Tensor | None]] = [queue.SimpleQueue() for _ in range(3)]

    def work(stage: int) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while (value := queues[stage].get()) is not None:
                queues[stage + 1].put(stages[stage](value))
            queues[stage + 1].put(None)

    threads = [threading.Thread(target=work, args=(stage,)) for stage in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(WINDOW):
        queues[0].put(frame)
    for _ in range(WINDOW):  # warm
        queues[2].get()
        queues[0].put(frame)
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        queues[2].get()
        queues[0].put(frame)
        count += 1
    queues[0].put(None)
    while queues[2].get() is not None:
        pass
    for thread in threads:
        thread.join()
    return count / spent


def main() -> None:
    arguments = parser(question or "").parse_args()
    seconds, rounds = (0.05, 1) if arguments.quick else (0.7, 5)
    rounds = arguments.rounds or rounds
    report = Report(
        __file__,
        question=question or "",
        setup=f"Batch 1, float32, one intra-op thread; alone: a loop on one thread; in two: the layers in two halves, "
        f"each on a plain thread, handed on by SimpleQueue with {WINDOW} frames in flight. "
        f"{seconds} s each, {rounds} rounds in turns, medians. Every way is checked against the model.",
        arguments=arguments,
    )
    ways = [EAGER, "TorchScript"] if arguments.quick else list(WAYS)  # compilers take a minute a net
    for net in nets(quick=arguments.quick):
        contenders: dict[str, Contender] = {}
        failed: dict[str, str] = {}
        for way in ways:
            whole = make(way, net.model, net.frame)
            if isinstance(whole, str):
                failed[way] = whole
                continue
            with torch.no_grad():
                between = net.halves()[0](net.frame)
            halves = [make(way, half, given) for half, given in zip(net.halves(), (net.frame, between), strict=True)]
            problem = next((half for half in halves if isinstance(half, str)), None)
            if problem is not None:
                failed[way] = problem
                continue
            stages = [half for half in halves if not isinstance(half, str)]
            contenders[f"{way}, alone"] = lambda whole=whole, net=net: alone(whole, net.frame, seconds)  # type: ignore[misc]
            contenders[f"{way}, in two"] = lambda stages=stages, net=net: in_two(stages, net.frame, seconds)  # type: ignore[misc]
        measured = take_turns(contenders, rounds=rounds)
        first = f"{EAGER}, alone"
        rows: list[list[str | float]] = []
        for way in ways:
            if way in failed:
                rows.append([way, f"failed: {failed[way]}", "", "", ""])
                continue
            one, two = f"{way}, alone", f"{way}, in two"
            rows.append(
                [
                    way,
                    f"{measured.median(one):,.0f}",
                    f"{measured.ratio(one, first):.2f}",
                    f"{measured.ratio(two, first):.2f}",
                    f"{measured.ratio(two, one):.2f}",
                ]
            )
        report.table(
            net.name,
            ["way", "alone, frames/s", "alone, × eager", "in two, × eager alone", "in two, × its own alone"],
            rows,
        )
        mine = OURS if OURS in ways else ways[-1]
        best = max((f"{way}, in two" for way in ways if way not in failed and way != mine), key=measured.median)
        report.target(
            f"{net.name}: {mine} in two × the best other in two",
            measured.ratio(f"{mine}, in two", best) if mine not in failed else 0.0,
            1.0,
            unit=f" × ({best})",
        )
    report.finish()


if __name__ == "__main__":
    main()

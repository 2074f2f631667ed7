"""A contender's process: python -m benchmarks.peers.child NAME ANSWERS ARRIVALS

Commands come as lines of JSON on standard input, answers leave on the descriptor ANSWERS, stamps of arriving frames
come in on ARRIVALS. Between two commands the process waits in the kernel, with its stages open and idle.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

START = time.perf_counter()

import torch  # noqa: E402 - timed

from benchmarks.peers.contenders import ENTRIES  # noqa: E402
from benchmarks.peers.stream import Arriving, Counted, Sink  # noqa: E402

CHECKED = 24  # frames whose outputs are compared with the plain model's
WARM = 8  # outputs before a window begins, and frames that go on behind it
LONG = 1000  # frames of a turn in which a few more or less are nothing
MOVED = (0.4, 2.5)  # how far a learning contender's parameters may have moved, times the plain loop's


class WrongError(Exception):
    """The outputs are not those of the plain model."""


class Child:
    """Obeys: open, collect, rate, paced, close."""

    def __init__(self, name: str, arrivals: int) -> None:
        self._entry = ENTRIES[name]
        self._arrivals = arrivals

    def open(self, work: str, sizes: dict[str, Any], quick: bool) -> dict[str, Any]:
        """Build, send a frame through, then compare two dozen with the plain model; seconds until the first output."""
        from benchmarks.peers.works import build

        start = time.perf_counter()
        missing = self._entry.missing()
        if missing:
            raise ModuleNotFoundError(f"not installed: {', '.join(missing)}")
        self._contender = self._entry.make()
        self._work = build(work, quick=quick, **sizes)
        self._contender.open(self._work)
        first = Sink(keep=True)
        self._contender.run(Counted(self._work.frames, 1), first)
        seconds = time.perf_counter() - start
        far = self._check(build(work, quick=quick, **sizes), first.outputs)
        if not far <= self._work.tolerance:
            raise WrongError(f"outputs differ from the plain model's by {far:.1e} of the largest value")
        return {"seconds": seconds, "difference": far, "rate": self._estimate(0.0 if quick else 0.05)}

    def rate(self, number: int) -> dict[str, Any]:
        """Frames per second; ``number`` a multiple of WARM.

        A long turn counts from its first output to its last. In a short one, filling and draining would count for much:
        it is measured from the WARM-th output on, while the stream goes on.
        """
        sink = Sink()
        total = number + 2 * WARM
        before = time.process_time()
        self._contender.run(Counted(self._work.frames, total), sink)
        spent = time.process_time() - before
        start, stop = (0, total - 1) if total > LONG else (WARM - 1, WARM + number - 1)
        rate = (stop - start) / (sink.times[stop] - sink.times[start])
        return {"rate": rate, "cpu": spent / total, "frames": total}

    def paced(self, number: int) -> dict[str, Any]:
        """Seconds between a frame's arrival and its output, in order, without the first WARM."""
        sink, feed = Sink(), Arriving(self._work.frames, number, self._arrivals)
        self._contender.run(feed, sink)
        pairs = zip(sink.times[WARM:], feed.stamps[WARM:], strict=True)
        return {"latencies": [round(taken - arrived, 7) for taken, arrived in pairs]}

    def collect(self) -> dict[str, Any]:
        """Garbage, before a turn."""
        gc.collect()
        return {}

    def close(self) -> dict[str, Any]:
        """Take it all down."""
        self._contender.close()
        return {}

    def _estimate(self, seconds: float) -> float:
        """Frames per second, roughly, from a turn of about so many ``seconds``."""
        number = WARM
        while True:
            start = time.perf_counter()
            rate: float = self.rate(number)["rate"]
            if time.perf_counter() - start > seconds or number > 10_000:
                return rate
            number *= 4

    def _check(self, other: Any, first: list[Any]) -> float:
        """How far the outputs of the next frames are from those of a work that nobody has touched."""
        from benchmarks.peers.contenders.sequential import Sequential
        from benchmarks.peers.works.work import difference

        sink = Sink(keep=True)
        self._contender.run(Counted(self._work.frames, CHECKED), sink)
        if len(sink.outputs) != CHECKED:
            raise WrongError(f"{CHECKED} frames went in, {len(sink.outputs)} outputs came out")
        before = {} if other.kind != "learning" else {k: v.clone() for k, v in other.model.state_dict().items()}
        threads = torch.get_num_threads()
        plain, expected = Sequential(), Sink(keep=True)
        plain.open(other)
        plain.run(Counted(other.frames, 1), expected)
        plain.run(Counted(other.frames, CHECKED), expected)
        torch.set_num_threads(threads)
        if before:
            self._check_learned(before, plain.parameters())
        answers = zip([*first, *sink.outputs], expected.outputs, strict=True)
        return max(difference(one, right) for one, right in answers)

    def _check_learned(self, before: dict[str, Any], meant: dict[str, Any]) -> None:
        """As many updates, of about the same size, as the plain loop made of the same frames."""
        found = self._contender.parameters()
        if found.keys() != before.keys():
            raise WrongError("what was learned has other names than the model's parameters")
        moved, right = (
            sum(float((value - before[name]).abs().sum()) for name, value in learned.items())
            for learned in (found, meant)
        )
        if not MOVED[0] <= moved / right <= MOVED[1]:
            raise WrongError(f"its parameters moved {moved / right:.2f} times as far as the plain loop's")


def main() -> None:
    name, answers, arrivals = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.set_inheritable(answers, False)
    os.set_inheritable(arrivals, False)
    imported = time.perf_counter() - START
    torch.set_num_threads(ENTRIES[name].threads)
    kept = False
    if not os.environ.get("AIOTIME_BENCHMARK_PLAIN_MALLOC"):
        from aiotime.heap import keep_freed_memory

        kept = keep_freed_memory()
    child = Child(name, arrivals)
    with os.fdopen(answers, "w") as out:

        def answer(**content: Any) -> None:
            out.write(json.dumps(content) + "\n")
            out.flush()

        answer(torch=torch.__version__, imported=imported, kept=kept)
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer(**getattr(child, command.pop("do"))(**command))
            except Exception as error:  # noqa: BLE001 - the runner shows the reason and goes on without this one
                answer(failed=reason(error))
                break
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # whatever threads a contender has left behind


def reason(error: BaseException) -> str:
    """One line for the table: what went wrong, without paths of this machine."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split()) or type(error).__name__
    named = text if type(error).__name__ in ("CannotError", "WrongError") else f"{type(error).__name__}: {text}"
    words = (os.path.basename(word) if word.startswith("/") else word for word in named.split(" "))  # noqa: PTH119
    return " ".join(words)[:200]


if __name__ == "__main__":
    main()

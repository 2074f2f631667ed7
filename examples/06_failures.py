"""When frames fail: try again, skip, keep the dead letters, and stop when too many fail.

A stage parses text, and every third text is bad. Another loads something, and for every tenth frame its first attempt
fails. Prints what came through and what became of the rest.
"""

from __future__ import annotations

from typing import Any

import aiotime
from aiotime.errors import FailureBudgetExceeded, FrameError, StageError

TEXTS = ["no number" if number % 3 == 2 else str(number) for number in range(30)]  # 20 good, 10 bad
attempts: dict[float, int] = {}
letters: list[tuple[int, str, str]] = []  # (frame, its input, what was wrong with it)


def load(number: float) -> float:
    """Fails at the first attempt for every tenth frame, as networks do."""
    attempts[number] = attempts.get(number, 0) + 1
    if number % 10 == 0 and attempts[number] == 1:
        raise ConnectionError(f"nobody answered for {number}")
    return number


def bury(frame: Any, error: FrameError) -> None:
    """A dead letter: the frame with its input, and the error with its stage and cause."""
    letters.append((frame.index, frame.input, f"{error.stage}: {error.__cause__}"))


async def main() -> tuple[int, int]:
    """Run the texts four times; how many came through, how many dead letters."""
    pipeline = aiotime.Pipeline.from_stages(
        [
            aiotime.Stage(float, device="cpu:0", name="parse"),
            aiotime.Stage(load, device="cpu:1", on_error=aiotime.retry(2, backoff=0.001)),
        ]
    )
    attempts.clear()
    letters.clear()

    through = [pred.output async for pred in pipeline.run(TEXTS, on_error="skip")]
    again = sum(count - 1 for count in attempts.values())
    print(f"skip: {len(through)} of {len(TEXTS)} came through, {again} of them at the second attempt")

    buried = [pred.index async for pred in pipeline.run(TEXTS, on_error=bury)]
    print(f"dead letters: {len(letters)}, {len(buried)} came through; the first letter: {letters[0]}")

    try:
        async for pred in pipeline.run(TEXTS):  # "raise": the error comes in its turn
            print(f"raise: frame {pred.index} came through")
    except StageError as error:
        print(f"raise: stage {error.stage!r} failed at frame {error.frame}: {error.__cause__}")

    try:
        async for _ in pipeline.run(TEXTS, on_error="skip", failure_budget=4):
            pass
    except FailureBudgetExceeded as error:
        print(f"budget: {error}")

    return len(through), len(letters)


if __name__ == "__main__":
    aiotime.run(main())

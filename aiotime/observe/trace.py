"""A recording of who worked on which frame when, and its file for Perfetto (ui.perfetto.dev) or chrome://tracing.

    device streams, loop ── slice · instant · counter (any thread) ──▶ Trace ── save ──▶ trace.json
                                                                         └── slices ──▶ timeline

One lane per device stream, the loop as a lane. The newest events are kept, so a trace may stay on for days.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

from aiotime.errors import ConfigurationError
from aiotime.observe.meter import LOOP_LANE

PROCESS = 1  # the pid in the file: there is one process


class Slice(NamedTuple):
    """Something called ``name`` (a stage) occupied ``lane`` from ``start`` to ``end`` seconds, perhaps for a frame.

    ``others``: the frames that were in the same batch as ``frame``.
    """

    lane: str
    name: str
    start: float
    end: float
    frame: int | None = None
    others: tuple[int, ...] = ()

    @property
    def frames(self) -> tuple[int, ...]:
        """All frames that it was for."""
        return () if self.frame is None else (self.frame, *self.others)


# (running number, lane, name, start, end, frame); an instant has no end; a counter no lane, its value stands for frame
Event = tuple[int, str | None, str, float, float | None, float | None]


class Trace:
    """Collects slices of work; a `Tracer`. Recording one costs well under a microsecond.

    Args:
        limit: how many events are kept; older ones make room and are counted in `dropped`.
        name: of the process in the file, by default "aiotime".

    Events may be written by any thread at any time, also while the trace is read or saved.
    """

    def __init__(self, *, limit: int = 200_000, name: str = "aiotime") -> None:
        if limit < 1:
            raise ConfigurationError(f"a trace keeps at least 1 event, not limit={limit}")
        self.name = name
        self.limit = limit
        self._number = count()  # of the next event; next() is atomic, unlike an addition
        self._first = 0  # number of the first event since the trace was last cleared
        self._events: deque[Event] = deque(maxlen=limit)

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} events, {self.dropped} dropped>"

    def slice(self, lane: str, name: str, start: float, end: float, frame: int | None = None) -> None:
        """Something called ``name`` occupied ``lane`` from ``start`` to ``end`` (seconds)."""
        self._events.append((next(self._number), lane, name, start, end, frame))

    def instant(self, lane: str, name: str, at: float, frame: int | None = None) -> None:
        """Something called ``name`` happened on ``lane`` at ``at`` (seconds): a frame was shed, a swap began."""
        self._events.append((next(self._number), lane, name, at, None, frame))

    def counter(self, name: str, at: float, value: float) -> None:
        """The quantity ``name`` (a queue's occupancy) is ``value`` from ``at`` (seconds) on."""
        self._events.append((next(self._number), None, name, at, None, value))

    @property
    def slices(self) -> list[Slice]:
        """The slices that are kept, by their start."""
        return _slices(self._read())

    @property
    def dropped(self) -> int:
        """How many events had to make room for newer ones since the trace was made or cleared."""
        events = self._read()
        newest = max((event[0] for event in events), default=self._first - 1)
        return max(0, newest + 1 - self._first - len(events))

    def clear(self) -> None:
        """Forget everything recorded so far, and what was dropped."""
        self._events.clear()
        self._first = next(self._number) + 1

    def save(self, path: str | Path) -> Path:
        """Write Trace Event JSON to ``path`` and return it. Times are microseconds from the first event.

        Arrows link the slices of one frame. Blocks for about 10 µs per event: with a loop running, use
        ``await asyncio.to_thread(trace.save, path)``.
        """
        path = Path(path)
        # dumps, for dump encodes in Python, event by event
        path.write_text(json.dumps(self.to_dict(), separators=(",", ":")), encoding="utf-8")
        return path

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes: an object of the Trace Event Format."""
        events = self._read()
        slices = _slices(events)
        others = [event for event in events if event[4] is None]
        zero = min((event[3] for event in events), default=0.0)
        instants = {event[1]: None for event in others if event[1] is not None}
        order = lanes(slices)
        order += sorted((lane for lane in instants if lane not in order), key=_natural)
        threads = {lane: number for number, lane in enumerate(order, start=1)}
        return {
            "traceEvents": [
                *_metadata(self.name, threads),
                *(_complete(piece, threads, zero) for piece in slices),
                *(_other(event, threads, zero) for event in others),
                *_arrows(flows(slices), threads, zero),
            ],
            "displayTimeUnit": "ms",
            "otherData": {"recorded by": "aiotime", "dropped events": self.dropped},
        }

    def _read(self) -> list[Event]:
        return list(self._events)  # one step for the interpreter: no thread can append meanwhile


def lanes(slices: Iterable[Slice]) -> list[str]:
    """The lanes as a reader wants them: in the order in which frames pass through, then by name; the loop last."""
    slices = list(slices)
    steps: dict[str, list[int]] = {piece.lane: [] for piece in slices}
    for flow in flows(slices):
        for step, piece in enumerate(flow):
            steps[piece.lane].append(step)

    def place(lane: str) -> tuple[bool, int, list[tuple[int, str]]]:
        return lane == LOOP_LANE, median_low(steps[lane]) if steps[lane] else len(slices), _natural(lane)

    return sorted(steps, key=place)


def flows(slices: Iterable[Slice]) -> list[list[Slice]]:
    """The slices of each frame, in the order of time; one list per frame, by its first slice.

    Frames of several runs may have one index. A frame passes each stage once, and those of one index keep
    their order: a slice belongs to the oldest of them that has not had its stage.
    """
    found: list[list[Slice]] = []
    # per frame index: for each stage name how many frames have had it, and those frames
    had: dict[tuple[int, str], int] = {}
    of_index: dict[int, list[list[Slice]]] = {}
    for piece in sorted(slices, key=lambda piece: piece.start):
        for frame in piece.frames:
            same = of_index.setdefault(frame, [])
            nth = had.get((frame, piece.name), 0)
            had[frame, piece.name] = nth + 1
            if nth == len(same):
                same.append([])
                found.append(same[nth])
            same[nth].append(piece)
    return found


def _slices(events: Iterable[Event]) -> list[Slice]:
    found = [
        Slice(lane, name, start, end, None if frame is None else int(frame), getattr(frame, "others", ()))
        for _, lane, name, start, end, frame in events
        if lane is not None and end is not None
    ]
    found.sort(key=lambda piece: piece.start)
    return found


def _natural(lane: str) -> list[tuple[int, str]]:
    """A key that puts cpu:2 before cpu:10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", lane) if part]


def _micros(seconds: float, zero: float) -> float:
    return round((seconds - zero) * 1e6, 3)


def _metadata(process: str, threads: dict[str, int]) -> Iterable[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": PROCESS, "tid": 0, "args": {"name": process}}
    for lane, thread in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": PROCESS, "tid": thread, "args": {"name": lane}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": PROCESS, "tid": thread, "args": {"sort_index": thread}}


def _complete(piece: Slice, threads: dict[str, int], zero: float) -> dict[str, Any]:
    start = _micros(piece.start, zero)
    return {
        "ph": "X",
        "name": piece.name,
        "cat": "work" if piece.frame is not None else "loop",
        "pid": PROCESS,
        "tid": threads[piece.lane],
        "ts": start,
        # from rounded ends, or a slice would reach a nanosecond into its neighbour
        "dur": max(0.0, round(_micros(piece.end, zero) - start, 3)),
        "args": _frames(piece),
    }


def _frames(piece: Slice) -> dict[str, Any]:
    if piece.frame is None:
        return {}
    return {"frame": piece.frame, "batch": list(piece.frames)} if piece.others else {"frame": piece.frame}


def _other(event: Event, threads: dict[str, int], zero: float) -> dict[str, Any]:
    _, lane, name, at, _, value = event
    written = {"name": name, "pid": PROCESS, "ts": _micros(at, zero)}
    if lane is None:
        return written | {"ph": "C", "tid": 0, "args": {"value": value}}
    args = {} if value is None else {"frame": int(value)}
    return written | {"ph": "i", "s": "t", "cat": "mark", "tid": threads[lane], "args": args}


def _arrows(paths: list[list[Slice]], threads: dict[str, int], zero: float) -> Iterable[dict[str, Any]]:
    """Flow events: start, steps, finish; each in the middle of its slice, so that rounding cannot move it out."""
    for number, path in enumerate(paths, start=1):
        if len(path) < 2:
            continue
        for step, piece in enumerate(path):
            phase = "s" if step == 0 else "f" if step == len(path) - 1 else "t"
            arrow = {
                "ph": phase,
                "name": "frame",
                "cat": "frame",
                "id": number,
                "pid": PROCESS,
                "tid": threads[piece.lane],
                "ts": _micros((piece.start + piece.end) / 2, zero),
            }
            yield arrow | {"bp": "e"} if phase == "f" else arrow

"""Where to cut: the exact division of layers into stages on devices. Pure: numbers in, numbers out.

    layers   0 1 2 │ 3 4 │ 5 6 7 8          a stage is a run of layers, stages are in order,
    devices  d0    │ d2  │ d3               devices are taken in order and may be left out

A stage costs its layers' seconds on its device plus the transfer into it (counted on the receiving stage) and, where
a gradient goes back through that cut, its transfer. The slowest stage is the pipeline's period; it is minimised, then
the number of stages, then their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from aiotime.errors import PlanError

Transfer = Callable[[int, int | None, int], float]  # (bytes, from device or None for the door, to device) -> seconds
Holding = Callable[[int, int, int, int], int]  # (first layer, stop, stage, stages) -> bytes that the stage holds

_SLACK = 1e-12  # relative: sums of the same seconds in another order count as equal


@dataclass(frozen=True, slots=True)
class Partition:
    """Stages: how many layers each has, which device (by position), its seconds including the transfer into it."""

    sizes: tuple[int, ...]
    devices: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def bottleneck(self) -> float:
        """Seconds of the slowest stage: the time between two frames."""
        return max(self.seconds)


@dataclass(frozen=True, slots=True)
class Problem:
    """What a division is judged by.

    Args:
        seconds: ``seconds[device][layer]``, none negative: more layers never make a stage faster.
        cut_bytes: bytes that enter layer ``i``; ``cut_bytes[0]`` is the payload.
        parameter_bytes: per layer.
        memory: bytes of parameters each device may hold, None for no limit.
        transfer: seconds to move bytes from a device (None: from the door) to the next.
        names: the layers' names, for messages.
        back_bytes: of the gradient that goes back through each cut; empty: nothing goes back.
        joined: cuts that must not be made.
        holding: what a stage holds, where that is more than the parameters of its layers.
    """

    seconds: Sequence[Sequence[float]]
    cut_bytes: Sequence[int]
    parameter_bytes: Sequence[int]
    memory: Sequence[int | None]
    transfer: Transfer = lambda nbytes, source, target: 0.0
    names: Sequence[str] = ()
    back_bytes: Sequence[int] = ()
    joined: Collection[int] = ()
    holding: Holding | None = None

    def moving(self, first: int, source: int | None, device: int) -> float:
        """Seconds to bring what enters layer ``first`` from ``source``, and its gradient back."""
        seconds = self.transfer(self.cut_bytes[first], source, device)
        if source is not None and self.back_bytes and self.back_bytes[first]:
            seconds += self.transfer(self.back_bytes[first], device, source)
        return seconds

    def stage_seconds(self, first: int, stop: int, source: int | None, device: int) -> float:
        """Seconds of a stage with layers ``first`` to ``stop - 1``, fed from ``source``."""
        return sum(self.seconds[device][first:stop]) + self.moving(first, source, device)


def partition(problem: Problem, *, stages: int | None = None) -> Partition:
    """The best division into at most ``stages`` stages (as many as there are devices when None).

    Raises:
        PlanError: the layers do not fit into the memory of the devices.
    """
    found = frontier(problem, stages=stages)
    least = min(division.bottleneck for division in found)
    return next(division for division in found if division.bottleneck <= least * (1 + _SLACK))


def frontier(problem: Problem, *, stages: int | None = None) -> list[Partition]:
    """The best division for each exact number of stages that is possible, fewest first.

    Raises:
        PlanError: no number of stages fits into the memory of the devices.
    """
    layers, devices = len(problem.cut_bytes), len(problem.seconds)
    most = min(layers, devices, devices if stages is None else stages)
    search = _Search(problem)
    least = search.run(most, bound=None) if problem.holding is None else None  # else it depends on their number
    found: list[Partition] = []
    for count in range(1, most + 1):
        table = least or search.run(count, bound=None)
        ends = [cost[layers] for cost in table.costs[count]]
        period = min(ends)
        if period == float("inf"):
            continue
        exact = search.run(count, bound=period * (1 + _SLACK))
        found.append(exact.read(problem, count))
    if not found:
        raise PlanError(_why_infeasible(problem))
    return found


class _Search:
    """The dynamic programme over (stages, device of the last stage, layers done)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers = len(problem.cut_bytes)
        self.devices = len(problem.seconds)
        self.sums = [[0.0, *accumulate(row)] for row in problem.seconds]
        self.bytes = [0, *accumulate(problem.parameter_bytes)]
        self.transfers: dict[tuple[int, int, int | None, int], float] = {}

    def transfer(self, layer: int, source: int | None, device: int) -> float:
        back = self.problem.back_bytes[layer] if self.problem.back_bytes else 0
        key = (self.problem.cut_bytes[layer], back, source, device)
        if key not in self.transfers:
            self.transfers[key] = self.problem.moving(layer, source, device)
        return self.transfers[key]

    def run(self, most: int, *, bound: float | None) -> _Table:
        """Minimise the slowest stage; or, where ``bound`` is given, the sum with every stage within it.

        What stages hold is asked for ``most`` stages.
        """
        table = _Table(most, self.devices, self.layers)
        for count in range(1, most + 1):
            for device in range(self.devices):
                entries = self._entries(table, count, device)
                if entries:
                    self._fill(table, count, device, entries, bound)
        return table

    def _entries(self, table: _Table, count: int, device: int) -> dict[int, list[tuple[float, float, int | None]]]:
        """Per first layer of a stage on ``device``: (transfer, cost before, device before), the useful ones only."""
        if count == 1:
            return {0: [(self.transfer(0, None, device), 0.0, None)]}
        entries: dict[int, list[tuple[float, float, int | None]]] = {}
        for first in range(count - 1, self.layers):
            if first in self.problem.joined:
                continue
            best: dict[float, tuple[float, int | None]] = {}  # devices that are equally far away: the cheapest
            for source in range(count - 2, device):
                before = table.costs[count - 1][source][first]
                if before == float("inf"):
                    continue
                cost = self.transfer(first, source, device)
                if cost not in best or before < best[cost][0]:
                    best[cost] = (before, source)
            if best:
                entries[first] = [(cost, before, source) for cost, (before, source) in best.items()]
        return entries

    def _fill(
        self,
        table: _Table,
        count: int,
        device: int,
        entries: dict[int, list[tuple[float, float, int | None]]],
        bound: float | None,
    ) -> None:
        sums, held = self.sums[device], self.bytes
        limit, holding = self.problem.memory[device], self.problem.holding
        costs, origins = table.costs[count][device], table.origins[count][device]
        for stop in range(count, self.layers + 1):
            best, origin = float("inf"), None
            for first in range(stop - 1, count - 2, -1):
                compute = sums[stop] - sums[first]
                if limit is not None and holding is None and held[stop] - held[first] > limit:
                    break
                if compute > (best if bound is None else bound):
                    break  # more layers only make this stage slower
                if first not in entries:
                    continue
                if limit is not None and holding is not None and holding(first, stop, count - 1, table.most) > limit:
                    continue  # not monotone: a layer more may mean an input less
                for transfer, before, source in entries[first]:
                    stage = compute + transfer
                    if bound is None:
                        cost = max(before, stage)
                    elif stage > bound:
                        continue
                    else:
                        cost = before + stage
                    if cost < best:
                        best, origin = cost, (first, source)
            costs[stop], origins[stop] = best, origin


class _Table:
    """``costs[count][device][layers done]`` and where each came from."""

    def __init__(self, most: int, devices: int, layers: int) -> None:
        self.most = most
        self.layers = layers
        self.costs = [[[float("inf")] * (layers + 1) for _ in range(devices)] for _ in range(most + 1)]
        self.origins: list[list[list[tuple[int, int | None] | None]]] = [
            [[None] * (layers + 1) for _ in range(devices)] for _ in range(most + 1)
        ]

    def read(self, problem: Problem, count: int) -> Partition:
        """The division behind the cheapest end with ``count`` stages."""
        stop = self.layers
        device: int | None = min(range(len(self.costs[count])), key=lambda at: self.costs[count][at][stop])
        sizes: list[int] = []
        devices: list[int] = []
        seconds: list[float] = []
        while count:
            assert device is not None
            origin = self.origins[count][device][stop]
            assert origin is not None, "a finite cost has an origin"
            first, source = origin
            sizes.append(stop - first)
            devices.append(device)
            seconds.append(problem.stage_seconds(first, stop, source, device))
            stop, device, count = first, source, count - 1
        return Partition(tuple(reversed(sizes)), tuple(reversed(devices)), tuple(reversed(seconds)))


def even(layers: int, stages: int) -> tuple[int, ...]:
    """Sizes of ``stages`` stages that differ by at most one layer, the larger first."""
    if not 1 <= stages <= layers:
        raise PlanError(f"{layers} layers cannot make {stages} stages; ask for 1 to {layers}")
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def _why_infeasible(problem: Problem) -> str:
    limits = [limit for limit in problem.memory if limit is not None]
    largest = max(limits, default=0)
    needs, kind = list(problem.parameter_bytes), "bytes of parameters"
    if problem.holding is not None:  # nowhere does a layer hold less than alone in the last of many stages
        most = len(problem.memory)
        needs = [problem.holding(layer, layer + 1, most - 1, most) for layer in range(len(needs))]
        kind = "bytes to learn (parameters, gradients, optimizer state, activations)"
    for layer, needed in enumerate(needs):
        if all(limit is not None and needed > limit for limit in problem.memory):
            name = problem.names[layer] if problem.names else str(layer)
            return (
                f"layer {name!r} needs {needed:,} {kind} and no device may hold more than {largest:,}; "
                "raise the memory limit or split the layer"
            )
    total = sum(needs) if problem.holding is None else problem.holding(0, len(needs), 0, 1)
    return (
        f"the model's {total:,} {kind} do not fit, layer by layer in order, into "
        f"devices limited to {', '.join(f'{limit:,}' if limit is not None else 'no limit' for limit in problem.memory)}"
        " bytes; raise the memory limit or add devices"
    )

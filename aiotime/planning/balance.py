"""How many stages, of which layers, on which devices: by measurement, or as asked.

profile ──▶ partition (exact, for 1, 2, … stages) ──▶ rehearse the promising ones ──▶ the fewest that are as fast
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from aiotime.compiling import Outcome
from aiotime.devices import resolve
from aiotime.devices.base import Device
from aiotime.errors import ConfigurationError, PlanError
from aiotime.planning.compilation import compile_pieces, described
from aiotime.planning.footprint import Footprint
from aiotime.planning.pace import Phases, added, one_by_one, period
from aiotime.planning.partition import Partition, Problem, Transfer, frontier
from aiotime.planning.profile import Profile, profile
from aiotime.planning.rehearsal import PHASES, can_rehearse, rehearse
from aiotime.planning.traced import Traced
from aiotime.planning.untouched import unspent, untouched

MARGIN = 0.05  # more stages must be faster by this share, or fewer are taken
SHORT = 1e-3  # seconds; below this a frame's hops, completions and share of the GIL weigh, and none are rehearsed
SHORT_MARGIN = 0.4  # so that there more stages must be faster by this share
INLINE = 1e-3  # seconds; a single stage on the host up to this long runs on the loop: a thread hop costs more
HOP = 20e-6  # seconds to hand a frame from one thread of the host to the next: queue, wake-up, the loop's share
TINY = 30e-6  # seconds; models whose mean layer takes less stay on one thread
SMALL = 100e-6  # seconds; layers of less are mostly Python and the GIL
_REHEARSALS = 3  # numbers of stages that are tried out


@dataclass(frozen=True, slots=True)
class Division:
    """What was decided; the measured figures are None where nothing was measured."""

    sizes: tuple[int, ...]
    devices: tuple[str, ...]
    seconds: tuple[float, ...] | None = None
    transfers: tuple[float, ...] | None = None
    layer_seconds: tuple[float, ...] | None = None
    sequential: float | None = None
    advice: str | None = None
    phases: tuple[Phases, ...] | None = None  # of each stage, where the model learns
    layer_phases: tuple[Phases, ...] | None = None
    period: float | None = None  # seconds between two frames, where the rule's order has a say in it
    ways: tuple[str | None, ...] | None = None  # how each stage is compiled


@dataclass(frozen=True, slots=True)
class _Candidate:
    partition: Partition
    seconds: tuple[float, ...]  # per stage, without transfers
    transfers: tuple[float, ...]
    footprint: Footprint | None
    outcomes: tuple[Outcome, ...] = ()  # how its stages are compiled

    @property
    def bottleneck(self) -> float:
        """Seconds between two frames."""
        loads = [sum(pair) for pair in zip(self.seconds, self.transfers, strict=True)]
        if self.footprint is None:
            return max(loads)
        return period(loads, self.footprint.rule, first=self.predicting)

    @property
    def predicting(self) -> int:
        """Stages that do not learn, below those that do."""
        if self.footprint is None:
            return self.stages
        return sum(end <= self.footprint.first for end in itertools.accumulate(self.partition.sizes))

    @property
    def ways(self) -> int:
        """How often a frame crosses each cut; what is short is meant for one crossing."""
        return 1 if self.footprint is None else 2

    @property
    def passes(self) -> int:
        """What each layer does for a frame: forward, backward, update; what is tiny or small is meant for one."""
        return 1 if self.footprint is None else PHASES

    @property
    def serial(self) -> bool:
        """By the rule's order no two of its stages ever work at the same time."""
        return self.footprint is not None and self.predicting == 0 and one_by_one(self.footprint.rule, self.stages)

    @property
    def stages(self) -> int:
        return len(self.seconds)


def divide_by_hand(
    traced: Traced,
    devices: Sequence[Device],
    limits: Sequence[int | None],
    sizes: tuple[int, ...],
    *,
    advice: str | None = None,
    footprint: Footprint | None = None,
) -> Division:
    """One stage a device, of the sizes given; nothing is timed.

    Raises:
        PlanError: the sizes do not fit the layers or the devices, or a stage its device's memory.
    """
    count = len(traced.layers)
    if not sizes or any(size < 1 for size in sizes) or sum(sizes) != count:
        raise PlanError(
            f"balance={list(sizes)} does not divide the model's {count} layers: each stage needs at least one, and "
            f"together they must have {count}"
        )
    if len(sizes) > len(devices):
        raise PlanError(f"balance={list(sizes)} makes {len(sizes)} stages for {len(devices)} devices; name as many")
    ends = list(itertools.accumulate(sizes, initial=0))
    for at, ((first, stop), device, limit) in enumerate(zip(itertools.pairwise(ends), devices, limits, strict=False)):
        held = sum(layer.parameter_bytes for layer in traced.layers[first:stop])
        kind = "bytes of parameters"
        if footprint is not None:
            held, kind = footprint.holding(first, stop, at, len(sizes)), "bytes while they learn"
        if limit is not None and held > limit:
            raise PlanError(
                f"layers {traced.layers[first].name!r} to {traced.layers[stop - 1].name!r} hold {held:,} {kind}, "
                f"{device.name} may hold {limit:,}; give it fewer layers"
            )
    return Division(sizes, tuple(device.name for device in devices[: len(sizes)]), advice=advice)


def compiled_by_hand(
    traced: Traced, example: Any, devices: Sequence[Device], division: Division, way: str, *, learning: bool
) -> Division:
    """``division`` with its stages compiled; "auto" times each stage alone."""
    ends = itertools.accumulate(division.sizes, initial=0)
    pieces = [traced.piece(first, stop, apart=True) for first, stop in itertools.pairwise(ends)]
    cast = list(devices[: len(pieces)])
    with untouched(traced.model), unspent(traced.model, [device.name for device in cast]):
        for piece, device in zip(pieces, cast, strict=True):
            device.place(piece.module)
        outcomes = compile_pieces(pieces, cast, example, [way] * len(pieces), dynamic=traced.dynamic, learning=learning)
    told = described(outcomes)
    advice = division.advice if told is None else _joined(division.advice, told)
    return replace(division, ways=tuple(outcome.way for outcome in outcomes), advice=advice)


def divide_measured(
    traced: Traced,
    example: Any,
    devices: Sequence[Device],
    limits: Sequence[int | None],
    *,
    seconds: float,
    footprint: Footprint | None = None,
    way: str | None = None,
) -> Division:
    """As many stages as pay; with ``footprint``, for a model that learns by its rule; with ``way``, compiled that way.

    Raises:
        PlanError: the model does not fit into the memory of the devices.
    """
    rule = None if footprint is None else footprint.rule
    measured = profile(traced, example, devices, seconds=seconds * 0.6, learner=rule)
    problem = Problem(
        seconds=[measured.layers[device.speed_class] for device in devices],
        cut_bytes=traced.cut_bytes,
        parameter_bytes=[layer.parameter_bytes for layer in traced.layers],
        memory=limits,
        transfer=_transfer(devices),
        names=[layer.name for layer in traced.layers],
        back_bytes=() if footprint is None else footprint.back_bytes,
        joined=() if footprint is None else traced.shared(),
        holding=None if footprint is None else footprint.holding,
    )
    found = _permitted(frontier(problem), footprint)
    candidates = [_predicted(problem, devices, measured, partition, footprint) for partition in found]
    if way is None:
        chosen, refused = _choose(traced, example, devices, candidates, seconds=seconds * 0.4)
    else:
        chosen, refused = _choose_compiled(traced, example, devices, candidates, way, seconds=seconds * 0.4)
    names = tuple(devices[at].name for at in chosen.partition.devices)
    advice = _advice(traced, devices, chosen, refused, candidates)
    if chosen.stages == 1 and chosen.seconds[0] <= INLINE:
        device = devices[chosen.partition.devices[0]]
        if device.on_host and can_rehearse([device]) and device.name != "inline":
            names = ("inline",)
            advice = _joined(
                advice,
                f"A frame takes {_microseconds(chosen.seconds[0])}, less than a hop to another thread is worth, so "
                "the stage runs inline, on the event loop.",
            )
    elif chosen.stages > 1 and max(chosen.seconds) <= INLINE:
        advice = _joined(advice, f"Every stage takes less than {_microseconds(INLINE)}: hops between threads show.")
    if told := described(chosen.outcomes):
        advice = _joined(advice, told)
    runs = list(itertools.pairwise(itertools.accumulate(chosen.partition.sizes, initial=0)))
    layer_seconds = itertools.chain.from_iterable(
        problem.seconds[device][first:stop]
        for device, (first, stop) in zip(chosen.partition.devices, runs, strict=True)
    )
    phases, layer_phases = _phases(chosen, devices, measured, runs) if footprint is not None else (None, None)
    return Division(
        sizes=chosen.partition.sizes,
        devices=names,
        seconds=chosen.seconds,
        transfers=chosen.transfers,
        layer_seconds=tuple(layer_seconds),
        sequential=measured.sequential,
        advice=advice,
        phases=phases,
        layer_phases=layer_phases,
        period=None if footprint is None else chosen.bottleneck,
        ways=tuple(outcome.way for outcome in chosen.outcomes) or None,
    )


def _permitted(found: list[Partition], footprint: Footprint | None) -> list[Partition]:
    """Those with a number of stages that the rule can work with."""
    if footprint is None:
        return found
    permitted = []
    refusal: ConfigurationError | None = None
    for partition in found:
        try:
            footprint.rule.check(len(partition.sizes))
            permitted.append(partition)
        except ConfigurationError as error:
            refusal = error
    if not permitted and refusal is not None:
        raise refusal
    return permitted


def _phases(
    chosen: _Candidate, devices: Sequence[Device], measured: Profile, runs: Sequence[tuple[int, int]]
) -> tuple[tuple[Phases, ...], tuple[Phases, ...]]:
    """What the seconds of each stage, and of each layer, are made of."""
    stages: list[Phases] = []
    layers: list[Phases] = []
    for device, (first, stop), seconds in zip(chosen.partition.devices, runs, chosen.seconds, strict=True):
        kind = devices[device].speed_class
        inside = measured.layer_phases[kind][first:stop]
        whole = measured.whole_phases[kind] if len(runs) == 1 else added(inside)
        factor = seconds / whole.total if whole.total else 0.0
        stages.append(whole.scaled(factor, factor, factor))
        layers.extend(inside)
    return tuple(stages), tuple(layers)


def _transfer(devices: Sequence[Device]) -> Transfer:
    def seconds(nbytes: int, source: int | None, target: int) -> float:
        if source is None:  # the door: a payload lies in the host's memory
            return 0.0 if devices[target].on_host else resolve("cpu:0").transfer_seconds(nbytes, devices[target])
        moved = devices[source].transfer_seconds(nbytes, devices[target])
        both_host = devices[source].on_host and devices[target].on_host and can_rehearse(devices)
        return moved + HOP if both_host else moved

    return seconds


def _predicted(
    problem: Problem, devices: Sequence[Device], measured: Profile, found: Partition, footprint: Footprint | None
) -> _Candidate:
    """``found`` with its transfers apart; a single stage takes what the whole took, not the sum of its layers."""
    firsts = list(itertools.accumulate(found.sizes, initial=0))
    sources = [None, *found.devices]
    transfers = tuple(
        problem.moving(first, source, device)
        for first, source, device in zip(firsts, sources, found.devices, strict=False)
    )
    if len(found.sizes) == 1:
        return _Candidate(found, (measured.whole[devices[found.devices[0]].speed_class],), transfers, footprint)
    computed = tuple(total - moved for total, moved in zip(found.seconds, transfers, strict=True))
    return _Candidate(found, computed, transfers, footprint)


def _choose(
    traced: Traced, example: Any, devices: Sequence[Device], candidates: Sequence[_Candidate], *, seconds: float
) -> tuple[_Candidate, list[_Candidate]]:
    """The fewest stages that are about as fast as any tried, and the others that were tried."""
    tried = [candidate for candidate in candidates if candidate.stages == 1]
    others = sorted((candidate for candidate in candidates if candidate.stages > 1), key=lambda one: one.bottleneck)
    real = can_rehearse(devices)
    if tried:
        others = [candidate for candidate in others if not candidate.serial]
    if real and tried and tried[0].bottleneck <= TINY * tried[0].passes * len(traced.layers):
        others = []  # two threads of such layers were slower than one wherever it was measured
    for rehearsal, candidate in enumerate(others):
        best = min((one.bottleneck for one in tried), default=float("inf"))
        if candidate.bottleneck >= best * (1 - MARGIN) or (real and rehearsal >= _REHEARSALS):
            break  # the rest promise even less
        tried.append(_rehearsed(traced, example, devices, candidate, seconds / _REHEARSALS) if real else candidate)
    best = min(one.bottleneck for one in tried)
    tried.sort(key=lambda one: one.stages)
    margin = SHORT_MARGIN if real and tried[0].bottleneck <= SHORT * tried[0].ways else MARGIN
    chosen = next(one for one in tried if one.bottleneck * (1 - margin) <= best)
    return chosen, [one for one in tried if one is not chosen]


def _choose_compiled(
    traced: Traced,
    example: Any,
    devices: Sequence[Device],
    candidates: Sequence[_Candidate],
    way: str,
    *,
    seconds: float,
) -> tuple[_Candidate, list[_Candidate]]:
    """The same among compiled stages: every number of stages that promises something is compiled and rehearsed."""
    share = seconds / _REHEARSALS
    if not can_rehearse(devices):
        chosen, refused = _choose(traced, example, devices, candidates, seconds=seconds)
        return _compiled(traced, example, devices, chosen, way, seconds=0.0), refused
    ordered = sorted(candidates, key=lambda one: one.stages)
    tried = [_compiled(traced, example, devices, ordered[0], way, seconds=share)]
    gain = tried[0].bottleneck / ordered[0].bottleneck  # what compiling does for the others, as far as one can foresee
    others = sorted((one for one in ordered[1:] if not one.serial), key=lambda one: one.bottleneck)
    for candidate in others[:_REHEARSALS]:
        best = min(one.bottleneck for one in tried)
        if candidate.bottleneck * gain + HOP >= best * (1 - MARGIN):
            break
        tried.append(_compiled(traced, example, devices, candidate, way, seconds=share))
    best = min(one.bottleneck for one in tried)
    tried.sort(key=lambda one: one.stages)
    margin = SHORT_MARGIN if tried[0].bottleneck <= SHORT * tried[0].ways else MARGIN
    chosen = next(one for one in tried if one.bottleneck * (1 - margin) <= best)
    return chosen, [one for one in tried if one is not chosen]


def _compiled(
    traced: Traced, example: Any, devices: Sequence[Device], candidate: _Candidate, way: str, *, seconds: float
) -> _Candidate:
    """Rehearsed as compiled; for "auto" in a pipeline that learns also as it is, and the faster of the two."""
    if way != "auto" or candidate.footprint is None:
        return _rehearsed(traced, example, devices, candidate, seconds, way)
    plain = _rehearsed(traced, example, devices, candidate, seconds)
    compiled = _rehearsed(traced, example, devices, candidate, seconds, "inductor")
    return compiled if compiled.bottleneck <= plain.bottleneck * (1 - MARGIN) else plain


def _rehearsed(
    traced: Traced,
    example: Any,
    devices: Sequence[Device],
    candidate: _Candidate,
    seconds: float,
    way: str | None = None,
) -> _Candidate:
    ends = itertools.accumulate(candidate.partition.sizes, initial=0)
    pieces = [traced.piece(first, stop, apart=True) for first, stop in itertools.pairwise(ends)]
    cast = [devices[at] for at in candidate.partition.devices]
    learner = None if candidate.footprint is None else candidate.footprint.rule
    outcomes: list[Outcome] = []
    with untouched(traced.model), unspent(traced.model, [device.name for device in cast]):
        if way is not None:
            for piece, device in zip(pieces, cast, strict=True):
                device.place(piece.module)
            outcomes = compile_pieces(
                pieces, cast, example, [way] * len(pieces), dynamic=traced.dynamic, learning=learner is not None
            )
        programs = [outcome.program for outcome in outcomes] or None
        rehearsed = rehearse(pieces, cast, example, seconds=seconds, learner=learner, programs=programs)
    return replace(candidate, seconds=rehearsed, outcomes=tuple(outcomes))


def _advice(
    traced: Traced,
    devices: Sequence[Device],
    chosen: _Candidate,
    refused: Sequence[_Candidate],
    candidates: Sequence[_Candidate],
) -> str | None:
    if chosen.stages == len(devices):
        return None
    taken = f"{chosen.stages} of {len(devices)} devices {'is' if chosen.stages == 1 else 'are'} used"
    if len(traced.layers) <= chosen.stages:
        return f"The model has {len(traced.layers)} layers, so {taken}."
    cuts = sorted(traced.shared()) if chosen.footprint is not None else []
    if cuts and chosen.stages == candidates[-1].stages:
        first, last = traced.layers[cuts[0] - 1].name, traced.layers[cuts[-1]].name
        return (
            f"{taken}: layers from {first!r} to {last!r} share parameters, which two stages cannot both update; untie "
            "or freeze them for more places to cut."
        )
    each = chosen.bottleneck / len(traced.layers)
    if chosen.outcomes and not refused:
        return f"{taken}: what a frame takes once compiled is less than a hop to another thread would save."
    if chosen.stages == 1 and each <= TINY * chosen.passes and not refused:
        return (
            f"{taken}: the layers take {_microseconds(each)} each, mostly Python; on several threads they would wait "
            "for each other (the GIL) longer than they would gain."
        )
    slower = [one for one in refused if one.stages > chosen.stages]
    if slower:
        closest = min(slower, key=lambda one: one.bottleneck)
        ratio = closest.bottleneck / chosen.bottleneck
        if ratio < 1 - MARGIN:
            return (
                f"{taken}: {closest.stages} stages side by side take {_microseconds(closest.bottleneck)} a frame, "
                f"{chosen.stages} {_microseconds(chosen.bottleneck)}: where frames are as short as this, hops between "
                "threads and the GIL may cost more than the difference."
            )
        verdict = f"{ratio:.1f} times as long as" if ratio > 1.05 else "about as long as"
        return (
            f"{taken}: {closest.stages} stages side by side take {_microseconds(closest.bottleneck)} a frame, "
            f"{verdict} {chosen.stages} ({_microseconds(chosen.bottleneck)}): "
            + (
                "the layers are too small, their threads wait for each other."
                if chosen.bottleneck <= SMALL * chosen.passes * len(traced.layers)
                else "the stages share what they need (cores, caches, memory), with each other or with other programs."
            )
        )
    if chosen.footprint is not None and candidates[-1].serial:
        return (
            f"{taken}: {type(chosen.footprint.rule).__name__} learns from each frame before it takes the next, so "
            "stages would never work at the same time."
        )
    return f"{taken}: more stages would not be faster, as the slowest stage could not become shorter."


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _joined(first: str | None, second: str) -> str:
    return second if first is None else f"{first} {second}"

"""From the steps of a graph to layers that a person can read and a plan can divide.

A graph has hundreds of steps, most of them nothing beside a convolution or a matrix product. Heavy steps are
layers of their own; the light ones between two heavy steps are shared out at the shallowest module boundary.
Only steps lighter than 1/`FINEST` of the whole are joined, so no useful place to cut is lost.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from aiotime.planning.recording import Recording

FINEST = 256  # about as many layers as a large model is divided into


@dataclass(frozen=True, slots=True)
class Layer:
    """The smallest unit a plan moves.

    Attributes:
        name: the model's own qualified name of the module that does most of the layer's work, or a place in the graph.
        parameter_bytes: bytes of the parameters and buffers it uses, each counted once.
    """

    name: str
    parameter_bytes: int


def boundaries(recording: Recording, *, every_step: bool) -> list[int]:
    """The first step of each layer, and at the end the number of steps.

    ``every_step``: the steps are the children of a Sequential and layers as they are.
    """
    count = len(recording.steps)
    allowed = [cut for cut in range(1, count) if cut not in recording.uncuttable]
    if every_step:
        return [0, *allowed, count]
    return [0, *_grouped(recording, allowed), count]


def _grouped(recording: Recording, allowed: Sequence[int]) -> list[int]:
    """Cuts between blocks (runs of steps that must stay together) such that every block is heavy."""
    edges = [0, *allowed, len(recording.steps)]
    threshold = sum(recording.work) / FINEST
    blocks = list(itertools.pairwise(edges))
    heavy = [sum(recording.work[first:stop]) >= threshold for first, stop in blocks]
    paths = [module_path(step) for step in recording.steps]
    cuts: list[int] = []
    previous: int | None = None  # the latest heavy block, or the end of a run of light ones as heavy together
    run: list[int] = []  # light blocks since
    for at, (first, stop) in enumerate(blocks):
        if heavy[at]:
            if previous is not None:
                candidates = [blocks[light][0] for light in run] + [first]
                cuts.append(min(candidates, key=lambda cut: (_shared(paths, cut), _crossing(recording, cut), -cut)))
            previous, run = at, []
            continue
        run.append(at)
        if sum(recording.work[blocks[run[0]][0] : stop]) >= threshold:
            if previous is not None:
                cuts.append(blocks[run[0]][0])
            previous, run = at, []
    return cuts


def _shared(paths: Sequence[list[str]], cut: int) -> int:
    """How many modules the steps on both sides of ``cut`` are inside of together."""
    shared = 0
    for left, right in zip(paths[cut - 1], paths[cut], strict=False):
        if left != right:
            break
        shared += 1
    return shared


def _crossing(recording: Recording, cut: int) -> int:
    return sum(recording.bytes[node] for node in recording.live(cut))


def module_path(step: fx.Node) -> list[str]:
    """The qualified name, in parts, of the module whose forward took this step; [] for the model itself."""
    if step.op == "call_module":
        return str(step.target).split(".")
    stack = step.meta.get("nn_module_stack") or {}
    deepest = ""
    for name, _ in stack.values():
        deepest = name
    return deepest.split(".") if deepest else []


def names(recording: Recording, edges: Sequence[int]) -> list[str]:
    """A name for each layer, no two alike."""
    given: Counter[str] = Counter()
    found: list[str] = []
    for first, stop in itertools.pairwise(edges):
        heaviest = max(range(first, stop), key=lambda step: recording.work[step])
        step = recording.steps[heaviest]
        name = ".".join(module_path(step)) or step.name
        given[name] += 1
        found.append(name if given[name] == 1 else f"{name}#{given[name]}")
    return found

"""Memory: what each rule keeps at each of four stages, counted, beside what its definition says."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

import aiotime
from aiotime.learning.delayed import Delayed
from aiotime.learning.exact import Exact
from aiotime.learning.interlocking import Interlocking
from aiotime.learning.local import Local
from aiotime.learning.penalty import Penalty
from aiotime.learning.rule import Rule
from aiotime.learning.sideways import Sideways
from aiotime.learning.synchronous import Synchronous
from benchmarks._harness import LOOPS, Report, run_on

STAGES = 4
KIBIBYTE = 2**10
SGD = partial(torch.optim.SGD, lr=1e-3)
PerStage = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Kind:
    """A rule, and what it keeps between jobs at stage k of S by its definition: graphs, and versions of the weights."""

    name: str
    make: Callable[..., Rule]
    graphs: PerStage
    versions: PerStage


def _behind(k: int) -> int:
    return STAGES - 1 - k


_STRICT = partial(Delayed, order="1f1b")


KINDS = (
    Kind("exact", Exact, lambda k: 1, lambda k: 1),
    Kind("synchronous, 4 micro-batches, gpipe", partial(Synchronous, micro_batches=4, schedule="gpipe"),
         lambda k: 4, lambda k: 1),
    Kind("synchronous, 4 micro-batches, 1f1b", partial(Synchronous, micro_batches=4),
         lambda k: min(STAGES - k, 4), lambda k: 1),
    Kind("Sideways", Sideways, lambda k: 1, lambda k: 1),
    Kind("delayed lockstep, stashed", partial(Delayed, order="lockstep"),
         lambda k: 2 * _behind(k) + 1, lambda k: 2 * _behind(k) + 1),
    Kind("delayed lockstep, current", partial(Delayed, order="lockstep", weights="current"),
         lambda k: 2 * _behind(k) + 1, lambda k: 1),
    Kind("delayed 1f1b, stashed", _STRICT, lambda k: _behind(k) + 1, lambda k: _behind(k) + 1),
    Kind("delayed 1f1b, current", partial(_STRICT, weights="current"), lambda k: _behind(k) + 1, lambda k: 1),
    Kind("delayed 1f1b, 2BW", partial(_STRICT, weights="double-buffered", update_every=STAGES),
         lambda k: _behind(k) + 1, lambda k: 2),
    Kind("delayed 1f1b, recompute", partial(_STRICT, recompute=True),
         lambda k: int(k == STAGES - 1), lambda k: _behind(k) + 1),
    Kind("delayed 1f1b + local heads", partial(_STRICT, local=1.0), lambda k: _behind(k) + 1, lambda k: _behind(k) + 1),
    Kind("local heads", partial(Local, order="1f1b"), lambda k: 1, lambda k: 1),
    Kind("interlocking, n = 2", partial(Interlocking, 2, order="1f1b"),
         lambda k: min(1, _behind(k)) + 1, lambda k: min(1, _behind(k)) + 1),
    Kind("penalty, AuxNets", partial(Penalty, beta=1.0, start="aux", order="1f1b"), lambda k: int(k == 0), lambda k: 1),
)  # fmt: skip


@dataclass
class Ledger:
    """Tensors that autograd has saved and not yet let go of, by storage, so that shared ones count once."""

    held: dict[int, int] = field(default_factory=dict)  # storage -> how often it is saved
    nbytes: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what this thread's graphs save inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor):
            yield

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        storage = tensor.untyped_storage()
        at = storage.data_ptr()
        self.held[at] = self.held.get(at, 0) + 1
        self.nbytes[at] = storage.nbytes()
        saved = _Saved(tensor.detach())  # an output as it is would hold the graph that holds it
        weakref.finalize(saved, self._let_go, at)
        return saved

    def _let_go(self, at: int) -> None:
        self.held[at] -= 1
        if not self.held[at]:
            del self.held[at], self.nbytes[at]

    def total(self, without: set[int]) -> int:
        """Bytes saved, but for these storages."""
        return sum(nbytes for at, nbytes in self.nbytes.items() if at not in without)


class _Saved:
    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@dataclass
class Peak:
    """The most that was seen."""

    graphs: list[int] = field(default_factory=lambda: [0] * STAGES)
    versions: list[int] = field(default_factory=lambda: [0] * STAGES)
    saved: int = 0  # bytes in graphs, all stages, without the newest weights
    kept: int = 0  # what the learners say

    def look(self, learners: Sequence[Any], ledger: Ledger) -> None:
        """After a job."""
        newest: set[int] = set()
        for k, learner in enumerate(learners):
            masters = {master.untyped_storage().data_ptr() for master in learner.weights.masters}
            newest |= masters
            kept = list(learner.kept.values())
            used = {one.weights[0].untyped_storage().data_ptr() for one in kept if one.weights}
            first = learner.weights.masters[0].untyped_storage().data_ptr()
            with_graph = sum(one.loss is not None or any(y.grad_fn is not None for y in one.outputs) for one in kept)
            self.graphs[k] = max(self.graphs[k], with_graph)
            self.versions[k] = max(self.versions[k], len(used | {first}))
        self.saved = max(self.saved, ledger.total(newest))
        self.kept = max(self.kept, sum(learner.kept_nbytes() for learner in learners))


def _mlp(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2 * STAGES)))


async def _watch(kind: Kind, *, width: int, rows: int, frames: int) -> Peak:
    x = torch.rand(rows, width)
    rule = kind.make(loss=nn.functional.mse_loss, optimizer=SGD, idle=None)
    pipeline = aiotime.Pipeline(_mlp(width), example=x, devices=["inline"] * STAGES, balance=[4] * STAGES, learner=rule)
    learners: list[Any] = [spec.hands for spec in pipeline._specs]
    peak, ledger = Peak(), Ledger()
    for learner in learners:
        for name in ("forward", "backward", "finish", "relay"):
            _after(learner, name, lambda: peak.look(learners, ledger))
    with ledger.watching():
        async for _ in pipeline.run([aiotime.Sample(x, x) for _ in range(frames)]):
            pass
    return peak


def _after(learner: Any, name: str, look: Callable[[], None]) -> None:
    job = getattr(learner, name)

    def watched(*given: Any) -> Any:
        result = job(*given)
        look()
        return result

    setattr(learner, name, watched)


def report_all(report: Report, *, width: int, rows: int, frames: int) -> None:
    """Every rule, one table; the strict orders keep exactly what they should."""
    lines: list[list[str | float]] = []
    wrong: list[str] = []
    for kind in KINDS:
        try:
            peak = run_on(LOOPS[0], _watch(kind, width=width, rows=rows, frames=frames))
        except Exception as error:  # noqa: BLE001 - a rule that fails is shown as failed
            lines.append([kind.name, f"failed: {type(error).__name__}: {error}".splitlines()[0][:120], *[""] * 5])
            wrong.append(kind.name)
            continue
        graphs, versions = ([rule(k) for k in range(STAGES)] for rule in (kind.graphs, kind.versions))
        if (peak.graphs, peak.versions) != (graphs, versions):
            wrong.append(kind.name)
        lines.append(
            [
                kind.name,
                _listed(peak.graphs),
                _listed(graphs),
                _listed(peak.versions),
                _listed(versions),
                f"{peak.saved / KIBIBYTE:,.0f}",
                f"{peak.kept / KIBIBYTE:,.0f}",
            ]
        )
    report.table(
        f"Most that was kept at stages 0 to {STAGES - 1}: graphs and versions of the weights; KiB in all",
        ["rule", "graphs", "by definition", "versions", "by definition", "KiB saved in graphs", "KiB by kept_nbytes()"],
        lines,
    )
    report.target("rules that keep other than their definition says", len(wrong), 0, at_most=True)
    if wrong:
        report.say("", f"Other than by definition: {', '.join(wrong)}.")


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))

"""The rules of the study, one line each, and the settings that are tried for them.

Every rule gets the same number of trials (`TRIALS`): where it has knobs of its own, each of their settings meets fewer
optimizers, the more promising ones first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from aiotime.learning.augmented_lagrangian import AugmentedLagrangian
from aiotime.learning.block_admm import BlockADMM
from aiotime.learning.corrections import (
    DelayScaling,
    DiscrepancyCorrection,
    GapAware,
    HybridFinish,
    LearningRateRescheduling,
    SpikeCompensation,
    asynchronous_nesterov,
)
from aiotime.learning.delayed import Delayed
from aiotime.learning.exact import Exact
from aiotime.learning.interlocking import Interlocking
from aiotime.learning.local import Local
from aiotime.learning.penalty import Penalty
from aiotime.learning.rule import Rule
from aiotime.learning.sideways import Sideways
from aiotime.learning.synchronous import Synchronous
from benchmarks.learning import nets
from benchmarks.learning.nets import Task

TRIALS = 12
Knob = Mapping[str, Any]
Optimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rule is made of, for one run.

    Args:
        task: whose loss is learned from; seeds: one per member; stages: how many; frames: of the run.
        optimizer: parameters -> optimizer.
        knob: the rule's own settings.
    """

    task: Task
    seeds: Sequence[int]
    stages: int
    frames: int
    optimizer: Optimizer
    knob: Knob = field(default_factory=dict)

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of every rule; the guard and the idle timer would act on all members, or by the clock."""
        return {"loss": self.task.loss, "optimizer": self.optimizer, "guard": False, "idle": None}

    @property
    def headed(self) -> dict[str, Any]:
        """The same, with heads that keep the members apart."""
        make = lambda stage, cut, _: nets.head(self.task, self.seeds, stage, cut)  # noqa: E731
        return {**self.common, "head": make}

    @property
    def auxiliary(self) -> dict[str, Any]:
        """The same, with AuxNets that do."""
        return {**self.common, "aux": partial(nets.aux_net, self.seeds)}


@dataclass(frozen=True, eq=False)
class Row:
    """One rule of the tables.

    Args:
        name: in tables.
        make: setup -> rule.
        knobs: settings of its own that are tried.
        load: runs on simulated devices, the stream at this share of what they can do; None: order alone decides.
        cuts: scene cuts are marked in the stream.
        only: the one optimizer it goes with.
        everywhere: on every stream; otherwise on the smooth one alone.
    """

    name: str
    make: Callable[[Setup], Rule]
    knobs: Sequence[Knob] = ({},)
    load: float | None = None
    cuts: bool = False
    only: str | None = None
    everywhere: bool = False

    def trials(self, number: int = TRIALS) -> list[tuple[str, float, int]]:
        """(optimizer, rate, index of the knob), ``number`` of them."""
        pairs = [(self.only, rate) for rate in FINE] if self.only else PAIRS
        knobs = range(len(self.knobs))
        return [(name, rate, knob) for name, rate in pairs for knob in knobs][:number]


# ---------------------------------------------------------------------- optimizers

OPTIMIZERS: dict[str, Callable[[float], Optimizer]] = {
    "SGD": lambda rate: partial(torch.optim.SGD, lr=rate),
    "momentum": lambda rate: partial(torch.optim.SGD, lr=rate, momentum=0.9),
    "Adam": lambda rate: partial(torch.optim.Adam, lr=rate, fused=True),
    "RMSprop": lambda rate: partial(torch.optim.RMSprop, lr=rate),
    "NAdam": asynchronous_nesterov,
}

PAIRS: tuple[tuple[str, float], ...] = (  # the more promising first
    ("RMSprop", 1e-3),
    ("RMSprop", 3e-4),
    ("SGD", 3e-2),
    ("RMSprop", 3e-3),
    ("SGD", 1e-2),
    ("Adam", 3e-4),
    ("momentum", 3e-3),
    ("RMSprop", 1e-4),
    ("Adam", 1e-3),
    ("momentum", 3e-4),
    ("momentum", 1e-3),
    ("SGD", 3e-3),
)
FINE = (1e-3, 3e-4, 3e-3, 1e-4, 2e-3, 5e-4, 2e-4, 5e-3, 5e-5, 1e-2, 2e-5, 1e-5)  # for rules of one optimizer alone


# ---------------------------------------------------------------------- rules


POWERS = ({"power": 0.5}, {"power": 1.0})


def _delayed(order: str = "1f1b", **more: Any) -> Callable[[Setup], Rule]:
    return lambda s: Delayed(order=order, **more, **s.common)  # type: ignore[arg-type]


ROWS: tuple[Row, ...] = (
    Row("exact", lambda s: Exact(**s.common), everywhere=True),
    Row("Sideways (PARTIME)", lambda s: Sideways(**s.common), everywhere=True),
    Row("Sideways, cuts marked", lambda s: Sideways(**s.common), cuts=True),
    Row("Sideways per clip, cuts marked", lambda s: Sideways(per_clip=True, **s.common), cuts=True),
    Row("delayed lockstep", _delayed("lockstep"), everywhere=True),
    Row("delayed 1f1b", _delayed(), everywhere=True),
    Row("delayed 1f1b, cuts marked", _delayed(), cuts=True),
    Row("delayed 1f1b, current", _delayed(weights="current"), everywhere=True),
    Row("delayed 1f1b, predicted", _delayed(weights="predicted"), everywhere=True),
    Row("delayed 1f1b, 2BW", lambda s: _delayed(weights="double-buffered", update_every=s.stages)(s)),
    Row("+ rate by delay", lambda s: _delayed(corrections=[DelayScaling(**s.knob)])(s), POWERS),
    Row("+ rate by delay, predicted",
        lambda s: _delayed(weights="predicted", corrections=[DelayScaling(**s.knob)])(s), POWERS),
    Row("+ PipeMare T1", lambda s: _delayed(corrections=[LearningRateRescheduling(max(1, s.frames // 4))])(s)),
    Row("+ PipeMare T2, current", _delayed(weights="current", corrections=[DiscrepancyCorrection()])),
    Row("+ gap-aware", _delayed(corrections=[GapAware()])),
    Row("+ spike compensation", _delayed(corrections=[SpikeCompensation()]), only="momentum"),
    Row("+ asynchronous Nesterov", _delayed(), only="NAdam"),
    Row("+ hybrid finish", lambda s: _delayed(corrections=[HybridFinish(s.frames // 2, s.frames // 4)])(s)),
    Row("delayed event, full load", _delayed("event"), load=1.0, everywhere=True),
    Row("delayed event, half load", _delayed("event"), load=0.5, everywhere=True),
    Row("delayed event, quarter load", _delayed("event"), load=0.25, everywhere=True),
    Row("delayed 1f1b + local heads", lambda s: Delayed(order="1f1b", local=1.0, **s.headed), everywhere=True),
    Row("local heads", lambda s: Local(order="1f1b", **s.headed), everywhere=True),
    Row("local heads, overlapping", lambda s: Local(overlapping=True, order="1f1b", **s.headed)),
    Row("interlocking", lambda s: Interlocking(order="1f1b", **s.knob, **s.headed), ({"n": 2}, {"n": 3}),
        everywhere=True),
    Row("synchronous, 4 micro-batches", lambda s: Synchronous(micro_batches=4, **s.common), everywhere=True),
    Row("penalty", lambda s: Penalty(order="1f1b", **s.knob, **s.common),
        ({"beta": 1.0, "start": "previous"}, {"beta": 1.0, "rate": 0.5})),
    Row("penalty, AuxNets", lambda s: Penalty(order="1f1b", start="aux", **s.knob, **s.auxiliary),
        ({"beta": 1.0}, {"beta": 0.1}), everywhere=True),
    Row("augmented Lagrangian", lambda s: AugmentedLagrangian(order="1f1b", **s.knob, **s.common),
        ({"beta": 1.0, "rate": 0.5}, {"beta": 1.0, "rate": 0.25}), everywhere=True),
    Row("block ADMM", lambda s: BlockADMM(order="1f1b", **s.knob, **s.common), ({"rho": 1.0}, {"rho": 10.0}),
        everywhere=True),
)  # fmt: skip

BY_NAME: dict[str, Row] = {row.name: row for row in ROWS}

EXACT, SIDEWAYS = "exact", "Sideways (PARTIME)"
DEFAULT = "delayed event, full load"
RECOMMENDED = "delayed 1f1b + local heads"

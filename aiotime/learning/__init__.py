"""Learning on the stream: every rule behind one small contract.

rule.py        what a user says; what a rule says to the runtime: an order of jobs, a pair of hands
order.py       orders, as numbers        desk.py      which job comes next; ticket.py: what a frame carries
learner.py     the hands: back-propagation through one stage; boundary.py: where its graph begins
weights.py     parameters in versions    update.py    optimizer, clipping, guard, schedule
course.py      the learning of an open pipeline: late targets, errors, barriers
enrolment.py   which stages learn        settings.py  checks of what a user sets

exact.py  synchronous.py  sideways.py  delayed.py  local.py  interlocking.py  penalty.py
augmented_lagrangian.py  block_admm.py   one file per rule

corrections/   for gradients that come late           heads.py     auxiliary heads, by the cut's shape
split.py  recompute.py  double_buffer.py              ways of Delayed
chimera.py  meeting.py  norm.py                       two replicas of a stage; the whole model's norm
auxiliary.py  joint.py  aux_nets.py                   auxiliary variables
taps.py                                               gradients that go back the short way, in Sideways
replay.py      a sliding window                       prequential.py  predict, score, then learn
"""

from aiotime.learning.augmented_lagrangian import AugmentedLagrangian
from aiotime.learning.block_admm import BlockADMM
from aiotime.learning.corrections import (
    Correction,
    DelayScaling,
    DiscrepancyCorrection,
    GapAware,
    HybridFinish,
    LearningRateRescheduling,
    SpikeCompensation,
    WeightPrediction,
    asynchronous_nesterov,
    from_batch_recipe,
)
from aiotime.learning.delayed import Delayed
from aiotime.learning.exact import Exact
from aiotime.learning.interlocking import Interlocking
from aiotime.learning.local import Local
from aiotime.learning.penalty import Penalty
from aiotime.learning.prequential import PrequentialResult, prequential
from aiotime.learning.replay import replay
from aiotime.learning.rule import Rule
from aiotime.learning.sideways import Sideways
from aiotime.learning.synchronous import Synchronous

__all__ = [
    "AugmentedLagrangian",
    "BlockADMM",
    "Correction",
    "DelayScaling",
    "Delayed",
    "DiscrepancyCorrection",
    "Exact",
    "GapAware",
    "HybridFinish",
    "Interlocking",
    "LearningRateRescheduling",
    "Local",
    "Penalty",
    "PrequentialResult",
    "Rule",
    "Sideways",
    "SpikeCompensation",
    "Synchronous",
    "WeightPrediction",
    "asynchronous_nesterov",
    "from_batch_recipe",
    "prequential",
    "replay",
]

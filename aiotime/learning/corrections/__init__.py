"""Corrections for gradients that come late: composable, off by default. One file per correction, one contract.

contract.py     what a correction may change, and how several become one at a stage
prediction.py   WeightPrediction            forward with the weights its gradient will meet
spike.py        SpikeCompensation           a late gradient catches up at once (SGD with momentum)
rates.py        LearningRateRescheduling    smaller steps at first;  DelayScaling: smaller steps
discrepancy.py  DiscrepancyCorrection       backward with a guess at the weights of its forward
gap.py          GapAware                    gradients damped where the weights moved far
finish.py       HybridFinish                fewer frames in flight towards the end
recipes.py      asynchronous_nesterov, from_batch_recipe
"""

from aiotime.learning.corrections.contract import Correction
from aiotime.learning.corrections.discrepancy import DiscrepancyCorrection
from aiotime.learning.corrections.finish import HybridFinish
from aiotime.learning.corrections.gap import GapAware
from aiotime.learning.corrections.prediction import WeightPrediction
from aiotime.learning.corrections.rates import DelayScaling, LearningRateRescheduling
from aiotime.learning.corrections.recipes import asynchronous_nesterov, from_batch_recipe
from aiotime.learning.corrections.spike import SpikeCompensation

__all__ = [
    "Correction",
    "DelayScaling",
    "DiscrepancyCorrection",
    "GapAware",
    "HybridFinish",
    "LearningRateRescheduling",
    "SpikeCompensation",
    "WeightPrediction",
    "asynchronous_nesterov",
    "from_batch_recipe",
]

"""Planning: from a model to stages on devices.

trace.py      model -> layers (capture, recording, layers)      payload.py    what a frame stands for
traced.py     layers -> pieces (assembly, piece, twin)          untouched.py  the model stays as it is
profile.py    what each layer costs on each device              rehearsal.py  stages side by side
practice.py   a piece that learns, to be timed                  footprint.py  the memory that learning takes
partition.py  where to cut, exactly                             pace.py       what a rule's order makes of stages
plan.py       Plan, plan(); table.py prints it, saved.py reads it
"""

from aiotime.planning.footprint import StageLearning
from aiotime.planning.layers import Layer
from aiotime.planning.piece import Piece
from aiotime.planning.plan import LayerCost, Plan, StagePlan, make_plan, plan
from aiotime.planning.trace import trace
from aiotime.planning.traced import Traced

__all__ = [
    "Layer",
    "LayerCost",
    "Piece",
    "Plan",
    "StageLearning",
    "StagePlan",
    "Traced",
    "make_plan",
    "plan",
    "trace",
]

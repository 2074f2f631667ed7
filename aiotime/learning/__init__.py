"""Learning on the stream: every rule behind one small contract.

    rule.py        what a user says; what a rule says to the runtime: an order of jobs, a pair of hands
    order.py       orders, as numbers        desk.py      which job comes next; ticket.py: what a frame carries
    learner.py     the hands: back-propagation through one stage; boundary.py: where its graph begins
    weights.py     parameters in versions    update.py    optimizer, clipping, guard, schedule

    exact.py, delayed.py, …                  one file per rule
"""

from aiotime.learning.delayed import Delayed
from aiotime.learning.exact import Exact
from aiotime.learning.rule import Rule

__all__ = ["Delayed", "Exact", "Rule"]

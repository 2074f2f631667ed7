"""Networks whose path depends on the instance: every instance is a coroutine (AMPNet, Gaunt et al. 2017).

the user's side                               what runs it
network.py   Network: run, learn, submit      house.py     open and closed, weights
stage.py     Stage: await stage(x)            floor.py     an open network: lessons, jobs, the end
chain.py     a linear model as a part         session.py   one run at the door;  entry.py  one frame
lesson.py    how it learns                    journey.py   one instance's coroutine, to its outcome
step.py      what comes out                   instance.py  one sample's calls, and the way back
path.py      one instance's way; drawing.py   station.py   a stage on its device;  hands.py  its learning half
stats.py     counters as tables               lane.py      what a device stream does next;  inbox.py  what waits
eager.py     plain PyTorch, to compare        batch.py     calls that run as one;  call.py  one call
                                              average.py   replicas become their mean
"""

from aiotime.dynamic.chain import Chain
from aiotime.dynamic.network import Network
from aiotime.dynamic.path import Path, Visit
from aiotime.dynamic.stage import Stage
from aiotime.dynamic.stats import NetworkStats, StationStats
from aiotime.dynamic.step import Step, Steps

__all__ = ["Chain", "Network", "NetworkStats", "Path", "Stage", "StationStats", "Step", "Steps", "Visit"]

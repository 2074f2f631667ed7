"""Networks whose path depends on the instance: every instance is a coroutine (AMPNet, Gaunt et al. 2017).

user's side                                   what runs it
network.py   Network: run, learn, submit      house.py     open and closed, weights
stage.py     Stage: await stage(x)            floor.py     an open network: instances, jobs, the end
lesson.py    how it learns                    session.py   one run at the door;  entry.py  one frame
step.py      what comes out                   station.py   a stage on its device;  hands.py  its learning half
path.py      one instance's way               lane.py      what a device stream does next;  inbox.py  what waits
stats.py     counters as tables               batch.py     calls that run as one;  call.py  one call
eager.py     plain PyTorch, to compare        instance.py  one sample's way, and the way back
                                              average.py   replicas become their mean
"""

from aiotime.dynamic.chain import Chain
from aiotime.dynamic.network import Network
from aiotime.dynamic.path import Path, Visit
from aiotime.dynamic.stage import Stage
from aiotime.dynamic.stats import NetworkStats, StationStats
from aiotime.dynamic.step import Step, Steps

__all__ = ["Chain", "Network", "NetworkStats", "Path", "Stage", "StationStats", "Step", "Steps", "Visit"]

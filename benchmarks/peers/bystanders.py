"""Who else was at work: CPU time of the whole machine, to be compared with that of the contender on turn."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Reading:
    """CPU seconds of all processes since the machine started, those of this one, those that the host took away."""

    at: float
    busy: float
    own: float
    stolen: float

    def cores_since(self, before: Reading, *, contender: float) -> float:
        """Cores that others used, on average; ``contender`` is the CPU seconds of whoever was on turn."""
        others = (self.busy - before.busy) - (self.own - before.own) - contender + (self.stolen - before.stolen)
        return max(0.0, others) / (self.at - before.at)


def read() -> Reading | None:
    """Now; None where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, stolen = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    busy = user + nice + system + interrupts + soft
    return Reading(time.perf_counter(), busy, time.process_time(), stolen)

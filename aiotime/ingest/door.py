"""Credits: the bound on what is in flight, for the whole pipeline, shared fairly by its runs and requests.

One credit is taken at the door and given back where the frame settles. There is no await between the
granting of a credit and the frame's entering: an entrant *is* what enters, so a grant cannot be lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Protocol

from aiotime.errors import AiotimeError, ConfigurationError


class Entrant(Protocol):
    """Somebody at the door with one frame to bring in."""

    def enter(self) -> int | None:
        """Enter now, on one credit; returns the frame's bytes, or None to decline (gone, expired)."""

    def size(self) -> int:
        """Bytes of the frame that would enter now."""

    def refused(self, why: AiotimeError) -> None:
        """The door was closed while it waited."""


class Door:
    """Admits entrants while frames and bytes in flight stay within the budget; round robin over flows.

    A frame larger than the whole byte budget is admitted alone rather than never.
    """

    def __init__(self, frames: int, nbytes: int | None = None) -> None:
        self.used = 0
        self.used_bytes = 0
        self.paused = False
        self.held = 0  # how many hold it shut for a while, beside `paused`
        self._flows: dict[Hashable, deque[Entrant]] = {}
        self._pumping = False
        self.frames = 0
        self.nbytes: int | None = None
        self.resize(frames, nbytes)

    def resize(self, frames: int, nbytes: int | None) -> None:
        """Set both limits; frames already in flight stay."""
        if frames < 1:
            raise ConfigurationError(f"the budget needs at least one frame in flight, not {frames}")
        if nbytes is not None and nbytes < 1:
            raise ConfigurationError(f"the byte budget must be positive or None, not {nbytes}")
        self.frames, self.nbytes = frames, nbytes
        self.pump()

    @property
    def waiting(self) -> int:
        """Entrants that wait for a credit."""
        return sum(map(len, self._flows.values()))

    @property
    def shut(self) -> bool:
        """Nobody is admitted for now."""
        return self.paused or self.held > 0

    @property
    def full(self) -> bool:
        """Somebody waits: all credits are out."""
        return bool(self._flows)

    def take(self) -> bool:
        """One credit at once, where nobody waits and no byte budget asks for sizes; the frame must enter now."""
        if self._flows or self.shut or self.used >= self.frames or self.nbytes is not None or self._pumping:
            return False
        self.used += 1
        return True

    def admit(self, flow: Hashable, entrant: Entrant) -> bool:
        """Let ``entrant`` in at once (True), or when its turn comes (False)."""
        free = not self._flows and not self.shut and not self._pumping and self.used < self.frames
        if free and (self.nbytes is None or self._fits(entrant)):
            self._enter(entrant)
            return True
        self.line_up(flow, entrant)
        return False

    def line_up(self, flow: Hashable, entrant: Entrant) -> None:
        """Let ``entrant`` in when its turn comes, even if there is room now; somebody will `pump`."""
        self._flows.setdefault(flow, deque()).append(entrant)

    def withdraw(self, flow: Hashable, entrant: Entrant) -> bool:
        """Take ``entrant`` out of the queue; False when it is not there (any more)."""
        queue = self._flows.get(flow)
        if queue is None or entrant not in queue:
            return False
        queue.remove(entrant)
        if not queue:
            del self._flows[flow]
        self.pump()  # it may have been what the others waited behind
        return True

    def withdraw_all(self) -> list[Entrant]:
        """Empty the queue; what waited is returned."""
        left = [entrant for queue in self._flows.values() for entrant in queue]
        self._flows.clear()
        return left

    def release(self, nbytes: int) -> None:
        """Give back the credit of a frame that settled."""
        self.used -= 1
        self.used_bytes -= nbytes
        if self._flows:
            self.pump()

    def pump(self) -> None:
        """Admit whoever can be."""
        if self._pumping:
            return  # an entrant settled on its way in: the outer call goes on
        self._pumping = True
        try:
            while self._flows and not self.shut and self.used < self.frames:
                flow = next(iter(self._flows))
                queue = self._flows[flow]
                if self.nbytes is not None and not self._fits(queue[0]):
                    return  # it keeps its turn: small frames must not starve a large one
                entrant = queue.popleft()
                if not queue:
                    del self._flows[flow]
                elif len(self._flows) > 1:
                    del self._flows[flow]
                    self._flows[flow] = queue  # to the end: round robin
                self._enter(entrant)
        finally:
            self._pumping = False

    def _fits(self, entrant: Entrant) -> bool:
        assert self.nbytes is not None
        return self.used == 0 or self.used_bytes + entrant.size() <= self.nbytes

    def _enter(self, entrant: Entrant) -> None:
        self.used += 1
        nbytes = entrant.enter()
        if nbytes is None:
            self.used -= 1
        else:
            self.used_bytes += nbytes

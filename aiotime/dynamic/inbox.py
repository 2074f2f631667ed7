"""Inbox: calls that wait for their stage, grouped by what may run as one batch. Bounded: the others wait outside."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from aiotime.dynamic.call import Call

PASSED_OVER = 8  # batches of other groups after which the oldest call's group comes first


class Inbox:
    """Calls of one stage, in groups of equal signature.

    Args:
        limit: calls inside; further ones wait outside, in order.
        most: calls of one batch.
    """

    __slots__ = ("_groups", "_inside", "_limit", "_most", "_outside", "_patience", "blocked", "peak")

    def __init__(self, limit: int, most: int) -> None:
        self._limit = limit
        self._most = most
        self._groups: dict[Hashable, deque[Call]] = {}  # in the order of their oldest calls, nearly
        self._outside: deque[Call] = deque()
        self._inside = 0
        self._patience = PASSED_OVER
        self.blocked = 0  # calls that had to wait outside
        self.peak = 0  # the most that ever waited inside

    def __len__(self) -> int:
        return self._inside + len(self._outside)

    @property
    def largest(self) -> int:
        """Calls that one batch could have now."""
        return min(self._most, max(map(len, self._groups.values()), default=0))

    @property
    def oldest(self) -> float | None:
        """When the call was made that has waited longest; None where none waits."""
        return min((group[0].asked for group in self._groups.values()), default=None)

    def put(self, call: Call) -> None:
        """A call waits."""
        if self._inside >= self._limit:
            self.blocked += 1
            self._outside.append(call)
        else:
            self._enter(call)

    def _enter(self, call: Call) -> None:
        group = self._groups.get(call.signature)
        if group is None:
            group = self._groups[call.signature] = deque()
        group.append(call)
        self._inside += 1
        self.peak = max(self.peak, self._inside)

    def take(self) -> list[Call]:
        """The next batch: the largest group, but none is passed over for ever. Withdrawn calls are dropped."""
        groups = self._groups
        while groups:
            if len(groups) == 1:
                signature = next(iter(groups))
            elif self._patience <= 0:
                signature = min(groups, key=lambda each: groups[each][0].asked)
            else:
                signature = max(groups, key=lambda each: min(self._most, len(groups[each])))
            eldest = min(groups, key=lambda each: groups[each][0].asked) if len(groups) > 1 else signature
            self._patience = PASSED_OVER if signature == eldest else self._patience - 1
            group = groups[signature]
            taken: list[Call] = []
            while group and len(taken) < self._most:
                call = group.popleft()
                self._inside -= 1
                if call.future is not None and not call.future.done():
                    taken.append(call)
            if not group:
                del groups[signature]
            while self._outside and self._inside < self._limit:
                self._enter(self._outside.popleft())
            if taken:
                return taken
        return []

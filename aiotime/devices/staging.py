"""Host values on their way to a device: a ring of pinned slots, and walking over a value's arrays.

    pageable value ── fill (the launcher's own copy) ──▶ slot ── queued copy ──▶ device
                                                          └── taken again only after its copy's event has passed

A copy from pageable memory would make the launcher wait for what the stream has to do before it; a pinned
allocation per frame costs hundreds of microseconds and synchronises the device. So each launcher keeps a few pinned
slots, sized by the first frame and grown when a larger one comes. The copies wait for nothing but each other, so a few
slots are enough: one being filled, one being copied, the rest queued. Where all are busy the link is the bottleneck,
and the launcher (never the loop) sleeps until the oldest is free.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from aiotime.devices.accelerator import Accelerator

SLOTS = 4


def _nothing() -> None:
    pass


class Slot:
    """Pinned memory for the arrays of one frame, and the event behind their copies."""

    __slots__ = ("_backend", "_buffers", "_layouts", "_sizes", "_views", "event")

    def __init__(self, accelerator: Accelerator) -> None:
        self._backend = accelerator.backend
        self.event = accelerator.event()
        self._buffers: list[Any] = []  # per array of the value
        self._sizes: list[int] = []  # bytes of each buffer
        self._views: list[Any] = []  # of each buffer, as the newest array was laid out
        self._layouts: list[Hashable] = []

    def hold(self, position: int, leaf: Any) -> Any:
        """A pinned copy of host array ``leaf``, the value's number ``position``; done on return."""
        backend, layout = self._backend, self._backend.layout(leaf)
        if position == len(self._buffers):
            self._buffers.append(None)
            self._sizes.append(0)
            self._views.append(None)
            self._layouts.append(None)
        if self._layouts[position] != layout:
            nbytes = backend.nbytes(leaf)
            if self._buffers[position] is None or nbytes > self._sizes[position]:
                self._buffers[position] = backend.pinned(max(nbytes, 1))
                self._sizes[position] = nbytes
            self._views[position] = backend.carve(self._buffers[position], leaf)
            self._layouts[position] = layout
        backend.fill(self._views[position], leaf)
        return self._views[position]


class Ring:
    """The slots of one launcher; only its thread touches them."""

    def __init__(self, accelerator: Accelerator, *, slots: int = SLOTS) -> None:
        self._accelerator = accelerator
        self._limit = slots
        self._slots: deque[Slot] = deque()  # least lately taken first

    def take(self, before_sleep: Callable[[], None] = _nothing) -> Slot:
        """A slot whose copies are done; the taker records its event behind the new ones, whatever happens."""
        slots, accelerator = self._slots, self._accelerator
        if slots and accelerator.has_passed(slots[0].event):
            slot = slots.popleft()
        elif len(slots) >= self._limit:
            slot = slots[0]
            before_sleep()
            accelerator.wait_for(slot.event)
            slots.popleft()
        else:
            slot = Slot(accelerator)
        slots.append(slot)
        return slot

    def close(self) -> None:
        """Give the memory back; every copy has been waited for."""
        for slot in self._slots:
            self._accelerator.return_event(slot.event)
        self._slots.clear()


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with every leaf replaced by ``fn(leaf)``; the containers are new ones."""
    kind = type(value)
    if kind is tuple:
        return tuple([map_leaves(fn, part) for part in value])
    if kind is list:
        return [map_leaves(fn, part) for part in value]
    if kind is dict:
        return {key: map_leaves(fn, part) for key, part in value.items()}
    if isinstance(value, torch.Tensor):
        return fn(value)
    return pytree.tree_map(fn, value)  # named tuples, registered classes; anything else is a leaf


def leaves(value: Any) -> list[Any]:
    """The leaves of ``value``, in the order of `map_leaves`."""
    found: list[Any] = []
    map_leaves(found.append, value)
    return found

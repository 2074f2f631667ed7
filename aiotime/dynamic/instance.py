"""Instance: one sample's own way through a network, and the way back.

    forward   coroutine ── await stage(x) ──▶ Call … Call ──▶ loss
    back      loss ──▶ leaves it is made of ──▶ a call whose users have all returned ──▶ its batch ──▶ its inputs …

What a stage returns is cut off: a leaf. Tensor code between two stages records a small graph of its own, from leaves
to the inputs of the next call; a call's gradient goes through that graph and gathers in the leaves (`Tensor.grad`). So
branches, loops, joins and repeated use need no record beyond "who uses my leaves": a counter (AMPNet, section 3, has
messages retrace their path; Gaunt et al. 2017).

Everything here runs on the loop.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge

from aiotime.dynamic.call import Call
from aiotime.errors import ConfigurationError, DeadlineExceeded, FrameCancelled, StageError

if TYPE_CHECKING:
    from aiotime.dynamic.batch import Batch, Grads
    from aiotime.dynamic.entry import Entry
    from aiotime.dynamic.floor import Floor
    from aiotime.dynamic.lesson import Lesson
    from aiotime.dynamic.path import Visit
    from aiotime.dynamic.stage import Stage

# through an instance's own graph: whose, from where (tensors, edges), the gradients there, calls to whose leaves
Walk = tuple["Instance", list[Any], list[torch.Tensor], tuple[Call, ...]]

CURRENT: ContextVar[Instance | None] = ContextVar("aiotime.dynamic.instance", default=None)


class Instance:
    """One sample in flight.

    Args:
        floor: where its stages are open.
        entry: its frame.
        lesson: how it is learned from; None: inference.
        recorded: keep every call, for a drawing of its path.
    """

    __slots__ = (
        "back",
        "calls",
        "closed",
        "entry",
        "error",
        "floor",
        "lags",
        "leaves",
        "lesson",
        "made",
        "recorded",
        "returned",
        "route",
        "settling",
        "touched",
        "visits",
    )

    def __init__(self, floor: Floor, entry: Entry, lesson: Lesson | None, *, recorded: bool = False) -> None:
        self.floor = floor
        self.entry = entry
        self.lesson = lesson
        self.recorded = recorded
        self.calls: dict[Call, None] = {}  # that are not over, in the order they were made
        self.leaves: dict[int, Call] = {}  # by the identity of a leaf that requires grad; the call holds the leaf
        self.made = 0  # calls so far
        self.closed = False  # takes no further calls
        self.back = False  # gradients are on their way
        self.error: BaseException | None = None  # of a backward
        self.lags: dict[int, int] = {}  # stage -> most updates that the weights it met lacked
        self.touched: dict[Any, None] = {}  # stations that got a gradient from it
        self.returned: asyncio.Future[None] | None = None  # once every call is over
        self.settling = 0  # stations that are being told that it is through
        self.route: int | None = None  # which of several replicas it stays with
        self.visits: list[Visit] = []  # by the number of the call, where recorded

    # ------------------------------------------------------------------ forward

    def call(self, stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Any]:
        """``stage(*args, **kwargs)``, as of this instance."""
        future: asyncio.Future[Any] = self.floor.call(self, stage, args, kwargs)
        return future

    def admit(self, call: Call) -> None:
        """A call is made."""
        entry = self.entry
        if self.closed:
            raise ConfigurationError(
                f"stage {call.station.name!r} was called for instance {entry.index} after its forward had returned; "
                "await every task that forward starts"
            )
        self.check()
        call.number, self.made = self.made, self.made + 1
        if self.lesson is not None:
            parents: dict[Call, None] = {}
            for tensor in call.tensors:
                if tensor.requires_grad:
                    self.makers(tensor, parents, call.station.name)
                # of the tensor as it is now: code that changes it in place later gives it another
                call.edges.append(get_gradient_edge(tensor) if tensor.grad_fn is not None else None)
            if parents:
                call.parents = tuple(parents)
                for parent in parents:
                    parent.waits += 1
                    parent.used = True
        self.calls[call] = None

    def check(self) -> None:
        """Raise where nobody wants the result any more."""
        entry = self.entry
        if entry.cancelled:
            raise FrameCancelled(f"instance {entry.index} was cancelled", frame=entry.index, key=entry.key)
        if entry.deadline is not None and self.floor.now() > entry.deadline:
            raise DeadlineExceeded(
                f"instance {entry.index} was shed: its deadline passed before it was computed",
                frame=entry.index,
                key=entry.key,
            )

    def makers(self, tensor: torch.Tensor, found: dict[Call, None], where: str) -> None:
        """Add the calls whose leaves ``tensor`` is made of to ``found``; in an order that is the same every time."""
        leaves = self.leaves
        call = leaves.get(id(tensor))
        if call is not None:
            found[call] = None
            return
        if tensor.grad_fn is None:
            raise self._foreign(tensor, where)
        seen: set[Any] = set()
        todo: list[Any] = [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is None:
                todo.extend(above for above, _ in node.next_functions if above is not None)
                continue
            call = leaves.get(id(variable))
            if call is None:
                raise self._foreign(variable, where)
            found[call] = None

    def _foreign(self, tensor: torch.Tensor, where: str) -> ConfigurationError:
        what = "a parameter" if isinstance(tensor, torch.nn.Parameter) else "a tensor that requires grad"
        return ConfigurationError(
            f"{where!r} of instance {self.entry.index} uses {what} of shape {tuple(tensor.shape)} that none of its "
            "stages returned: parameters belong into stages, and a result of one instance into no other (detach it)"
        )

    # ------------------------------------------------------------------ back

    def roots(self, loss: torch.Tensor) -> tuple[Call, ...]:
        """The calls whose leaves ``loss`` is made of; they are used."""
        found: dict[Call, None] = {}
        self.makers(loss, found, "the loss")
        for call in found:
            call.used = True
        return tuple(found)

    def retrace(self, loss: torch.Tensor, roots: tuple[Call, ...], scale: float) -> None:
        """Send the gradient of ``loss`` on its way to its `roots`, and from there on."""
        seed = torch.full_like(loss, scale)
        if id(loss) in self.leaves:
            gather(loss, seed)
            self.turn()
        else:
            self.floor.turn_soon((self, [loss], [seed], roots))

    def turn(self) -> None:
        """The gradient of the loss has come to the leaves that it is made of."""
        self.back = True
        give([call for call in self.calls if call.waits == 0])

    def abandon(self) -> None:
        """Give up: what waits is withdrawn, what was computed is freed, what runs is freed when it ends."""
        self.closed = self.back = True
        for call in self.calls:
            future = call.future
            if future is not None and not future.done():
                future.cancel()
        give([call for call in self.calls if call.waits == 0])

    def unused(self) -> set[str]:
        """Stages a result of which neither a call nor the loss used."""
        return {
            call.station.name
            for call in self.calls
            if not call.used and any(leaf.requires_grad for leaf in call.leaves)
        }

    def unfinished(self) -> StageError | None:
        """The error of an instance whose forward returned before all its calls had."""
        pending = sorted(
            {call.station.name for call in self.calls if call.future is not None and not call.future.done()}
        )
        if not pending:
            return None
        entry = self.entry
        return StageError(
            f"instance {entry.index} returned while calls of {', '.join(map(repr, pending))} were still under way; "
            "await every stage that it calls",
            stage=pending[0],
            frame=entry.index,
            key=entry.key,
        )

    def note(self, visit: Visit) -> None:
        """A call's forward has ended."""
        insort(self.visits, visit, key=lambda each: each.number)

    def note_back(self, number: int, when: tuple[float, float]) -> None:
        """And its backward."""
        at = bisect_left(self.visits, number, key=lambda each: each.number)
        self.visits[at] = replace(self.visits[at], back=when)

    def over(self, call: Call) -> None:
        """One call less; a prediction may be out before a call that it had withdrawn."""
        self.calls.pop(call, None)
        call.release()
        self._look()

    def settled(self) -> None:
        """A station knows."""
        self.settling -= 1
        self._look()

    def _look(self) -> None:
        if not self.calls and not self.settling and self.returned is not None and not self.returned.done():
            self.returned.set_result(None)

    async def all_over(self) -> None:
        """Wait until no call of it is left, and every station knows that was to be told."""
        while self.calls or self.settling:
            self.returned = self.floor.loop.create_future()
            await self.returned

    def forget(self) -> None:
        """Let go of everything."""
        self.closed = True
        self.calls, self.leaves, self.touched = {}, {}, {}


def gather(leaf: torch.Tensor, grad: torch.Tensor) -> None:
    """Add ``grad`` to what came back for ``leaf`` so far; never in place, for it may share storage with others."""
    leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def spread(roots: Sequence[Any], grads: list[torch.Tensor], makers: Iterable[Call]) -> None:
    """Take ``grads`` of ``roots`` (tensors, edges) through the instances' own graphs, to the leaves of ``makers``.

    All of it, or, where user code raises, nothing. `torch.autograd.backward` would add in place to what has gathered.
    """
    leaves = {id(leaf): leaf for call in makers for leaf in call.leaves if leaf.requires_grad}.values()
    found = torch.autograd.grad(roots, list(leaves), grads, retain_graph=True, allow_unused=True)
    for leaf, grad in zip(leaves, found, strict=True):
        if grad is not None:
            gather(leaf, grad)


def give(ready: Iterable[Call]) -> None:
    """Hand the gradients of finished leaves to their batches; follow up what that sets free."""
    todo = deque(ready)
    while todo:
        call = todo.popleft()
        batch = call.batch
        if batch is None:  # it never ran, or was withdrawn: there is nothing to differentiate
            todo.extend(_free(call))
            continue
        if not batch.done:
            continue  # it runs at the moment; whoever ends it comes back here
        batch.left -= 1
        if call.instance.error is None and any(leaf.grad is not None for leaf in call.leaves):
            batch.grads[call.row] = [leaf.grad for leaf in call.leaves]
            batch.ready.append(call.row)
        else:  # nothing comes back through it
            todo.extend(_free(call))
        follow(batch)


def follow(batch: Batch) -> None:
    """What is to be done with a batch whose rows have changed."""
    if batch.busy:
        return  # asked again when its backward has ended
    if batch.ready:
        batch.station.lane.turn_back(batch)
    elif batch.left == 0:
        batch.station.kept.discard(batch)
        batch.forget()


def returned(batch: Batch, rows: Sequence[int], grads: Grads | None) -> list[Call]:
    """Gradients of what went into ``rows`` have come (None: there are none): pass them on. The calls ready now."""
    walks: list[Walk] = []
    calls = [batch.calls[row] for row in rows]
    if grads is not None:
        parts = [None if grad is None else batch.parted(grad) for grad in grads]
        for row, call in zip(rows, calls, strict=True):
            leaves = call.instance.leaves
            local: list[Any] = []
            outer: list[torch.Tensor] = []
            for tensor, edge, part in zip(call.tensors, call.edges, parts, strict=True):
                if part is None:
                    continue
                if edge is not None:
                    local.append(edge)
                    outer.append(part[row])
                elif id(tensor) in leaves:
                    gather(tensor, part[row])
            if local:
                walks.append((call.instance, local, outer, call.parents))
        if walks:
            walk(walks)
    ready: list[Call] = []
    for row, call in zip(rows, calls, strict=True):
        batch.grads[row] = None
        ready += _free(call)
    return ready


def walk(walks: Sequence[Walk]) -> None:
    """Through the graphs of all of them at once; where code of one instance raises, only that instance fails."""
    try:
        spread(
            [root for _, roots, _, _ in walks for root in roots],
            [grad for _, _, grads, _ in walks for grad in grads],
            [call for _, _, _, makers in walks for call in makers],
        )
    except Exception as error:  # noqa: BLE001 - user code; raised by its instance
        if len(walks) > 1:
            for one in walks:
                walk([one])
        elif walks[0][0].error is None:
            walks[0][0].error = error


def _free(call: Call) -> list[Call]:
    """A call is over; those of its parents that wait for nobody else."""
    ready = []
    for parent in call.parents:
        parent.waits -= 1
        if parent.waits == 0 and parent.instance.back:
            ready.append(parent)
    call.instance.over(call)
    return ready

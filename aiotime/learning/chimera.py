"""Chimera: two pipelines in opposite directions over the same devices.

    device    0            1            2            3
    down      stage 0 ───▶ stage 1 ───▶ stage 2 ───▶ stage 3        frames 0, 2, … of a mini-batch
    up        stage 3 ◀─── stage 2 ◀─── stage 1 ◀─── stage 0        frames 1, 3, …

Every stage has two replicas with equal weights. Where one direction leaves a device idle the other one fills in. At
the end of a mini-batch the replicas' gradients meet: sum of the down half + sum of the up half, in this order, and both
make the same update of it.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aiotime.devices.base import Device, DeviceStream, Pending, Work
from aiotime.frame import Frame
from aiotime.learning.learner import Site, StageLearner
from aiotime.learning.meeting import MeetingDesk
from aiotime.learning.order import Order
from aiotime.learning.rule import Rule
from aiotime.learning.ticket import Ticket

Gathered = tuple[list[torch.Tensor | None], int]  # sum of gradients, how many frames

DOWN, UP = 0, 1


@dataclass(frozen=True, slots=True)
class Replica:
    """The second one of a stage: where it runs, and what learns there."""

    device: Device
    hands: ReplicaLearner


class Meeting:
    """Where the two replicas of a stage, each on a thread of its own, exchange what they gathered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offered: list[Gathered | None]
        self._agreed: list[Gathered | None]
        self.pendings: list[Pending]  # per side: done when there is an agreement for it to take
        self.clear()

    def offer(self, side: int, gathered: Gathered) -> None:
        """One side is through with its half. The second to come sums up and wakes both."""
        with self._lock:
            self._offered[side] = gathered
            down, up = self._offered
            if down is None or up is None:
                return
            self._offered = [None, None]
        self._agreed = [_sum(down, up), _sum(down, up)]  # each its own tensors: an optimizer may write into them
        for pending in list(self.pendings):
            pending.done = True
            if pending.bell is not None:
                pending.bell.ring()

    def take(self, side: int) -> Gathered | None:
        """The sum; from here on the side may offer again. The other one need not have taken it yet."""
        agreed, self._agreed[side] = self._agreed[side], None
        self.pendings[side] = Pending()
        return agreed

    def clear(self) -> None:
        """Nobody is here: a new engine begins."""
        self._offered, self._agreed = [None, None], [None, None]
        self.pendings = [Pending(), Pending()]

    def withdraw(self, side: int) -> None:
        """There will be no agreement."""
        with self._lock:
            self._offered[side] = None


def _sum(down: Gathered, up: Gathered) -> Gathered:
    with torch.inference_mode(mode=False), torch.no_grad():
        grads: list[torch.Tensor | None] = []
        for a, b in zip(down[0], up[0], strict=True):
            if a is None or b is None:
                one = b if a is None else a
                grads.append(None if one is None else one.clone())
            else:
                grads.append(a + b.to(a.device))
        devices = {grad.device for grad in grads if grad is not None and grad.device.type != "cpu"}
        for device in devices:
            torch.accelerator.current_stream(device).synchronize()  # who takes the sum does so on another stream
    return grads, down[1] + up[1]


class ReplicaLearner(StageLearner):
    """One replica of a stage: gathers its half of a mini-batch, updates from the whole.

    Args:
        meeting: shared with the other replica. side: `DOWN` or `UP`.
    """

    def __init__(self, site: Site, rule: Rule, meeting: Meeting, side: int) -> None:
        super().__init__(site, rule)
        self.stash = False
        self.meeting = meeting
        self.side = side

    def offer(self) -> None:
        """Show the other replica what this one gathered; nothing, if it got no frame."""
        gathered: Gathered = self.updater.take() if self.updater is not None else ([], 0)
        if self.site.device.type != "cpu":
            # the other device's stream knows nothing of ours
            torch.accelerator.current_stream(self.site.device).synchronize()
        self.meeting.offer(self.side, gathered)

    def agreement(self, ticket: Ticket | None) -> tuple[Pending, Pending]:
        """The update waits for the meeting; nobody waits for the update."""
        return self.meeting.pendings[self.side], Pending()

    def batch_end(self, frames: int) -> None:
        """Update from both halves."""
        agreed = self.meeting.take(self.side)
        if self.updater is None or agreed is None:
            return
        grads, count = agreed
        own = [
            None if grad is None else grad.to(master.device)
            for grad, master in zip(grads, self.weights.masters, strict=True)
        ]
        self.updater.put(own, count)
        self.update()

    def discard(self) -> None:
        """The pipeline ends before the halves met."""
        self.meeting.withdraw(self.side)
        if self.updater is not None:
            self.updater.take()

    # ------------------------------------------------------------------ equal replicas

    def show(self) -> dict[str, Any]:
        """Weights, buffers, optimizer: copies of all that makes this replica what it is."""
        with torch.inference_mode(mode=False), torch.no_grad():
            return {
                "weights": self.weights.snapshot(),
                "buffers": [buffer.detach().clone() for buffer in self._buffers()],
                "state": copy.deepcopy(self.state_dict()),  # an optimizer does not copy what it loads
            }

    def mirror(self, shown: dict[str, Any]) -> None:
        """Become equal to the replica that showed this."""
        with torch.inference_mode(mode=False), torch.no_grad():
            for master, tensor in zip(self.weights.masters, shown["weights"], strict=True):
                master.data = tensor.to(master.device, copy=True)
            self.weights.publish()
            for buffer, tensor in zip(self._buffers(), shown["buffers"], strict=True):
                buffer.copy_(tensor)
        learned = self.learned
        self.load_state_dict(shown["state"])
        self.learned = learned  # from the frames that came this way

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for _, root in self.site.modules for buffer in root.buffers()]

    def reset(self) -> None:
        """A new engine begins: nothing is in flight, and nobody waits at the meeting."""
        super().reset()
        if self.updater is not None:
            self.updater.take()
        if self.side == DOWN:
            self.meeting.clear()


class Crossing:
    """Which direction a frame takes: those with targets by turns within a mini-batch, the others by turns."""

    def __init__(self, micro_batches: int) -> None:
        self.size = micro_batches
        self._learned = 0  # frames of the present mini-batch
        self._others = 0
        self.forks: list[Fork] = []

    def place(self, ticket: Ticket) -> int:
        """Position in the mini-batch; decided once, where the frame first meets a fork."""
        if ticket.place < 0:
            if ticket.learn:
                ticket.place = self._learned
                self._learned = (self._learned + 1) % self.size
            else:
                ticket.place = self._others = 1 - self._others
        return ticket.place

    def end(self) -> None:
        """A barrier comes: tell every fork how much there is of a mini-batch."""
        for fork in self.forks:
            fork.ends.append(self._learned)
        self._learned = 0


class ReplicaDesk(MeetingDesk):
    """A desk of one replica; knows from the fork whether a barrier cuts the mini-batch short."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._short: deque[bool] = deque()

    def launch_end(
        self, stream: DeviceStream, frame: Frame, action: Callable[[], None], *, last: bool, short: bool
    ) -> Pending:
        """A barrier; ``short``: this side has not had all of its half, but there is a mini-batch to end."""
        self._short.append(short)
        return self.launch(stream, frame, action, last=last)

    def _unfinished(self) -> bool:
        return self._short.popleft()

    def _lacking(self, ticket: Ticket) -> int:
        return ticket.place if ticket.learn else super()._lacking(ticket)


class Fork:
    """Stands for both desks of a stage where the stage task launches.

    Args:
        crossing: shared by all stages. down, up: the desks; ``up_stream``: the device stream of the second.
    """

    def __init__(self, crossing: Crossing, down: ReplicaDesk, up: ReplicaDesk, up_stream: DeviceStream) -> None:
        self.crossing = crossing
        self.down = down
        self.up = up
        self.up_stream = up_stream
        self.ends: deque[int] = deque()  # per barrier to come: frames of the mini-batch that it cuts short
        crossing.forks.append(self)

    @property
    def works(self) -> tuple[Work, ...]:
        """Of both replicas."""
        return (*self.down.works, *self.up.works)

    @property
    def delays(self) -> Delays:
        """How often a frame met which delay, in both."""
        return Delays(self.down.delays, self.up.delays)

    @property
    def order(self) -> Order:
        """That of both."""
        return self.down.order

    def launch(
        self, stream: DeviceStream, frame: Frame, action: Callable[[], None] | None = None, *, last: bool
    ) -> Pending:
        """A frame goes one way; a barrier stops both, acts on the down replica, then makes the other equal to it."""
        if action is None:
            if self.crossing.place(frame.ticket) % 2 == DOWN:
                return self.down.launch(stream, frame, last=last)
            pending = self.up.launch(self.up_stream, frame, last=last)
            self.up_stream.ring()
            return pending
        if self is self.crossing.forks[0]:
            self.crossing.end()
        frames, half = self.ends.popleft(), self.crossing.size // 2
        act, shown = action, []

        def act_and_show() -> None:
            act()
            shown.append(self.down.hands.show())  # type: ignore[attr-defined]

        def mirror() -> None:
            self.up.hands.mirror(shown[0])  # type: ignore[attr-defined]

        short = 0 < frames < self.crossing.size
        tail = frame.tail
        frame.tail = self.down.launch_end(
            stream, frame, act_and_show, last=False, short=short and (frames + 1) // 2 < half
        )
        pending = self.up.launch_end(self.up_stream, frame, mirror, last=last, short=short)
        frame.tail = tail
        self.up_stream.ring()
        return pending


class Delays(dict[int, int]):
    """Two counts as one."""

    def __init__(self, *parts: dict[int, int]) -> None:
        super().__init__()
        self._parts = parts
        for part in parts:
            for delay, frames in list(part.items()):
                self[delay] = self.get(delay, 0) + frames

    def clear(self) -> None:
        """Both start again."""
        super().clear()
        for part in self._parts:
            part.clear()

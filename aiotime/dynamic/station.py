"""Station: a stage of an open network: one module on one device stream; a replicated stage has several.

inbox ──▶ launch_forward ──▶ [device stream: join, module] ──▶ part ──▶ leaves to the callers
grads ──▶ launch_backward ─▶ [device stream: autograd, update] ──▶ part ──▶ leaves of the callers' inputs
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aiotime.devices.base import Work, stage_failed
from aiotime.dynamic.batch import Batch, Grads
from aiotime.dynamic.call import Call
from aiotime.dynamic.hands import Counts, Hands
from aiotime.dynamic.inbox import Inbox
from aiotime.dynamic.instance import follow, give, returned
from aiotime.errors import AiotimeError, FrameShed, StageError
from aiotime.learning.learner import Site

if TYPE_CHECKING:
    from aiotime.dynamic.floor import Floor
    from aiotime.dynamic.lane import Lane
    from aiotime.dynamic.lesson import Lesson
    from aiotime.dynamic.stage import Replica, Stage


class Station:
    """One replica of a stage, open on a lane.

    Args:
        floor: the open network.
        stage: what the user said.
        replica: which copy of the module.
        lane: the device stream's.
        index: a number of its own among all stations.
    """

    def __init__(self, floor: Floor, stage: Stage, name: str, replica: Replica, lane: Lane, index: int) -> None:
        self.floor = floor
        self.stage = stage
        self.name = name
        self.replica = replica
        self.lane = lane
        self.index = index
        self.fn: Callable[..., Any] = replica.fn
        self.module = replica.fn if isinstance(replica.fn, nn.Module) else None
        self.most = stage.max_batch
        self.batches = stage.max_batch > 1
        self.cat = stage.group == "cat"
        self.inbox = Inbox(stage.inbox, stage.max_batch)
        self.kept: set[Batch] = set()  # whose graphs wait for their backward
        self.writes: bool | None = None  # does the module write into its input? found out with the first batch
        self.sizes: dict[int, int] = {}  # calls of a batch -> how many forwards
        self.back_sizes: dict[int, int] = {}  # and backwards
        self.numbers = 0  # batches so far
        self.passed = 0  # forwards of others on the lane since calls wait here
        assert replica.device is not None
        self._on_host = replica.device.on_host
        self._training = replica.training()
        self._trains: bool | None = None  # the mode they are in
        self.infer = Work(self._infer, stage=name, index=3 * index)
        self.learn = Work(self._learn, stage=name, index=3 * index + 1, grad=True)
        self.back = Work(self._backward, stage=f"{name} backward", index=3 * index + 2, grad=True, phase="backward")
        self.works = (self.infer, self.learn, self.back)
        self.before = Counts.of(replica.hands)  # what its hands had done before the network was opened
        for work in self.works:
            lane.stream.bind(work)
        lane.stations.append(self)

    @property
    def hands(self) -> Hands | None:
        """What learns here, since the first lesson."""
        return self.replica.hands

    def site(self, stations: int) -> Site:
        """As a rule of learning sees it."""
        first = next(iter(self.module.parameters()), None) if self.module is not None else None
        device = torch.device("cpu") if first is None else first.device
        modules = [] if self.module is None else [("", self.module)]
        return Site(self.index, stations, self.stage.name, self.fn, modules, device=device)

    def enrol(self, site: Site, lesson: Lesson) -> None:
        """Learn as ``lesson`` says from here on, with a new optimizer."""
        self.replica.hands = Hands(site, lesson)
        self.before = Counts.of(None)

    # ------------------------------------------------------------------ forward, on the loop

    def hesitates(self) -> bool:
        """A batch that is not full may still wait for company."""
        return self.stage.max_wait > 0 and self.patience() > 0

    def patience(self) -> float:
        """Seconds that the oldest call may still wait."""
        oldest = self.inbox.oldest
        return 0.0 if oldest is None else oldest + self.stage.max_wait - self.floor.now()

    def launch_forward(self, calls: list[Call]) -> None:
        """Run ``calls`` as one batch."""
        wanted = []
        for call in calls:
            try:
                call.instance.check()
                call.check_unchanged()
            except AiotimeError as error:  # nobody wants it any more, or its input is another
                self._refuse(call, error)
            else:
                wanted.append(call)
        if not wanted:
            self.lane.settled()
            return
        self.numbers += 1
        batch = Batch(self, wanted, self.numbers)
        self.sizes[len(wanted)] = self.sizes.get(len(wanted), 0) + 1
        try:
            given = None if self._on_host else batch.joined()  # one copy to the device, not one per call
        except Exception as error:  # noqa: BLE001 - whatever the calls' tensors cannot do
            self._failed(batch, error)
            self.lane.settled()
            return
        work = self.learn if batch.learning else self.infer
        self.floor.launch(self, work, batch, [batch, given], self._forward_settled)

    def _refuse(self, call: Call, error: BaseException) -> None:
        if call.future is not None and not call.future.done():
            call.future.set_exception(error)
            if isinstance(error, FrameShed):
                call.future.exception()  # not said aloud where nobody waits for it: the instance is told as well
        call.batch = None
        self._ended(call)

    def _ended(self, call: Call) -> None:
        """A call without a gradient to wait for: failed, withdrawn, or of an instance that only predicts."""
        instance = call.instance
        if instance.lesson is None:
            instance.over(call)
        elif instance.back and call.waits == 0:
            give([call])

    def _forward_settled(self, batch: Batch, value: Any, error: BaseException | None) -> None:
        batch.done = True
        if error is not None:
            self._failed(batch, error)
            return
        floor = self.floor
        outputs: list[torch.Tensor] = value
        try:
            parts = [batch.parted(output) for output in outputs]
        except Exception as cause:  # noqa: BLE001 - whatever the stage returned
            self._failed(batch, cause)
            return
        learning = batch.learning
        needs = [output.requires_grad for output in batch.outputs] if learning else []
        single = batch.spec is None
        late: list[Call] = []
        for row, call in enumerate(batch.calls):
            rows = [part[row] for part in parts]
            instance = call.instance
            if learning:
                call.leaves = rows
                for leaf, need in zip(rows, needs, strict=True):
                    if need:
                        leaf.requires_grad_()
                        instance.leaves[id(leaf)] = call
            if instance.recorded:
                floor.visited(call)
            future = call.future
            if future is not None and not future.done():
                future.set_result(rows[0] if single else batch.rebuilt(rows))
            if not learning:
                instance.over(call)
            elif instance.back:
                late.append(call)
        if not learning:
            batch.forget()
        elif late:  # their instances gave up meanwhile
            give([call for call in late if call.waits == 0])

    def _failed(self, batch: Batch, error: BaseException) -> None:
        """One of them alone is the culprit: the others run again without it."""
        calls, batch.calls = batch.calls, []
        self.kept.discard(batch)
        batch.forget()
        for call in calls:
            call.batch = None
        if len(calls) > 1:
            for call in calls:
                if call.future is None or call.future.done():
                    self._ended(call)
                else:
                    call.signature = call  # nobody else's
                    self.inbox.put(call)
                    self.lane.arrived()
            return
        self._refuse(calls[0], self._blamed(self.infer, calls[0], error))

    @staticmethod
    def _blamed(work: Work, call: Call, error: BaseException) -> BaseException:
        """``error`` of a batch as that of one instance."""
        if isinstance(error, StageError) and error.__cause__ is not None:
            return stage_failed(work, call.instance.entry, error.__cause__)
        return error if isinstance(error, AiotimeError) else stage_failed(work, call.instance.entry, error)

    # ------------------------------------------------------------------ backward, on the loop

    def instance_done(self) -> bool:
        """An instance that sent gradients here is through; True where that makes an update due."""
        hands = self.hands
        if hands is None or hands.updater is None:
            return False
        hands.finished += 1
        return hands.finished - hands.applied >= hands.lesson.frequency

    def launch_backward(self, batch: Batch) -> None:
        """Those rows of ``batch`` whose gradients are here."""
        rows, batch.ready, batch.busy = batch.ready, [], True
        self.back_sizes[len(rows)] = self.back_sizes.get(len(rows), 0) + 1
        try:
            seeds = batch.seeds(rows)
        except Exception as error:  # noqa: BLE001 - gradients that do not fit
            self.lane.settled()
            self._back_failed(batch, rows, error)
            return
        then = partial(self._backward_settled, rows)
        self.floor.launch(self, self.back, batch, [batch, seeds, len(rows), batch.left == 0], then)

    def _backward_settled(self, rows: list[int], batch: Batch, value: Any, error: BaseException | None) -> None:
        if error is not None:
            self._back_failed(batch, rows, error)
            return
        hands = self.hands
        if hands is not None:
            lag = batch.turned[2]
            for row in rows:
                call = batch.calls[row]
                instance = call.instance
                instance.touched[self] = None
                if lag > instance.lags.get(self.index, -1):
                    instance.lags[self.index] = lag
                if instance.recorded:
                    self.floor.turned(call)
        self._back(batch, rows, value)

    def _back_failed(self, batch: Batch, rows: list[int], error: BaseException) -> None:
        for row in rows:
            instance = batch.calls[row].instance
            if instance.error is None:
                instance.error = self._blamed(self.back, batch.calls[row], error)
        self._back(batch, rows, None)

    def _back(self, batch: Batch, rows: list[int], grads: Grads | None) -> None:
        ready = returned(batch, rows, grads)
        batch.busy = False
        follow(batch)
        give(ready)

    # ------------------------------------------------------------------ where the jobs run

    def _switch(self, training: bool) -> None:
        if self._trains is not training:
            self._trains = training
            for module in self._training:
                module.training = training

    def _infer(self, value: Any) -> list[torch.Tensor]:
        batch: Batch = value[0]
        given: list[Any] | None = value[1]
        batch.begun = self.floor.now()
        self._switch(False)
        try:
            return batch.infer(batch.joined() if given is None else given)
        finally:
            batch.ended = self.floor.now()

    def _learn(self, value: Any) -> list[torch.Tensor]:
        batch: Batch = value[0]
        given: list[Any] | None = value[1]
        batch.begun = self.floor.now()
        self._switch(True)
        hands = self.hands
        assert hands is not None
        try:
            if given is None:
                given = batch.joined()
            with torch.enable_grad(), hands.lesson.autocast(hands.site.device), hands.reading():
                batch.weights, batch.version = hands.weights.working, hands.weights.version
                outputs = batch.learn(given)
            self.kept.add(batch)  # before the next job can update the weights
            return outputs
        finally:
            batch.ended = self.floor.now()

    def _backward(self, value: Any) -> Grads:
        batch: Batch = value[0]
        begun = self.floor.now()
        hands = self.hands
        assert hands is not None
        seeds, count, last = value[1:]
        down, grads = batch.backward(seeds, last=last)
        if last:
            self.kept.discard(batch)
        lag = hands.weights.version - batch.version
        hands.take(batch, grads, count, list(self.kept))
        batch.turned = (begun, self.floor.now(), lag)
        return down

    def update(self) -> None:
        """As many instances as an update takes are through (``update_per="instance"``)."""
        hands = self.hands
        if hands is None:
            return
        finished = hands.finished
        if finished - hands.applied >= hands.lesson.frequency:  # else an earlier update has taken them in
            count, hands.applied = finished - hands.applied, finished  # also where the step raises: its sum is gone
            hands.update(count, list(self.kept))

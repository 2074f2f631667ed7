"""Network: a model whose way depends on the instance; every instance is a coroutine.

source ──▶ door ──▶ instance: await stage(x) … ──▶ window ──▶ async for pred in network.run(source)
                     └── learn: loss, the way back, each stage updates on its own ──▶ async for step
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import torch

from aiotime.channel import Overflow
from aiotime.dynamic.eager import Eager
from aiotime.dynamic.house import House, Tenant
from aiotime.dynamic.instance import CURRENT
from aiotime.dynamic.lesson import Lesson, Unused, UpdatePer
from aiotime.dynamic.stage import Stage
from aiotime.dynamic.stats import NetworkStats
from aiotime.dynamic.step import Step, Steps
from aiotime.errors import ConfigurationError
from aiotime.learning.corrections.contract import Correction
from aiotime.learning.rule import Loss, PerStage
from aiotime.learning.settings import whole_number
from aiotime.learning.update import ParamGroups, SchedulerFactory
from aiotime.observe.trace import Trace
from aiotime.runs import RunOptions, RunState
from aiotime.stage import OnError

KEYS = 64  # instances in flight unless a run says otherwise
WINDOW = 4  # times that many may wait for their turn to leave


class Network:
    """A network with control flow of its own: branches, loops, trees, graphs (AMPNet; Gaunt et al. 2017).

    Make stages in ``__init__``, call them in ``async def forward(self, sample)``. In there a branch is ``if``, a loop
    ``for``, a tree recursion, a join ``asyncio.gather``; tensor code between the calls is part of the network.
    Nested networks and `Chain` are called like stages, ``await self.part(x)``, and so is a `Pipeline` kept as an
    attribute, which is opened with the network (``async with network:``); its output is a constant for learning.

    Example:
        >>> class Twice(aiotime.dynamic.Network):
        ...     def __init__(self):
        ...         self.layer = aiotime.dynamic.Stage(torch.nn.Linear(2, 2), device="inline", max_batch=8)
        ...     async def forward(self, x):
        ...         return await self.layer(await self.layer(x))
        >>> async def main():
        ...     return [tuple(pred.output.shape) async for pred in Twice().run(torch.rand(3, 2))]
        >>> asyncio.run(main())
        [(2,), (2,), (2,)]
    """

    name: str = ""

    async def forward(self, sample: Any) -> Any:
        """One instance: what it is given by the source, to what it returns. Yours to write."""
        raise NotImplementedError(f"{type(self).__name__} needs an 'async def forward(self, sample)'")

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a part of another network: its forward, in the same instance."""
        if CURRENT.get() is None:
            raise ConfigurationError(
                f"{type(self).__name__} was called outside of an instance; use network.run(source), "
                "network.learn(source), network.submit(x), or network.eager(x)"
            )
        return await self.forward(*args, **kwargs)

    # ------------------------------------------------------------------ work

    def run(
        self,
        source: Any,
        *,
        max_active_keys: int = KEYS,
        ordered: bool = True,
        overflow: Overflow = "wait",
        on_error: OnError = "raise",
        deadline: float | None = None,
        failure_budget: int | float | None = None,
        window: int | None = None,
        paths: bool = False,
    ) -> Steps:
        """Predict: an async iterator of `Step`, with the order, back-pressure and errors of `Pipeline.run`.

        Args:
            source: an async iterable, an iterable or a callable of samples or `Sample`.
            max_active_keys: instances in flight.
            ordered: predictions leave in the order of the source; False: as they are ready.
            overflow: see `Pipeline.run`.
            on_error: see there.
            deadline: seconds after its arrival within which an instance must make its last call, else it is shed.
            failure_budget: see there.
            window: instances in flight or waiting for their turn to leave; None: four times ``max_active_keys``.
            paths: keep each instance's `Path`.
        """
        options = RunOptions(
            overflow=overflow,
            on_error=on_error,
            deadline=deadline,
            failure_budget=failure_budget,
            window=_window(window, max_active_keys),
            ordered=ordered,
        )
        return self._run(source, options, keys=max_active_keys, lesson=None, paths=paths)

    def learn(
        self,
        source: Any,
        *,
        loss: Loss | None = None,
        optimizer: PerStage,
        max_active_keys: int = 16,
        min_update_frequency: int = 8,
        update_per: UpdatePer = "gradient",
        weights: Literal["stashed", "current"] = "stashed",
        corrections: Sequence[Correction] = (),
        unused: Unused = "warn",
        scheduler: SchedulerFactory | None = None,
        param_groups: ParamGroups | None = None,
        clip_norm: float | None = None,
        guard: bool = True,
        precision: torch.dtype | None = None,
        supervised: bool | None = None,
        ordered: bool = True,
        on_error: OnError = "raise",
        deadline: float | None = None,
        failure_budget: int | float | None = None,
        window: int | None = None,
        paths: bool = False,
    ) -> Steps:
        """Predict, then learn, every instance on its own and many at once: an async iterator of `Step`.

        Every stage updates by itself once it has gradients enough, whatever the others do; a gradient may so be late by
        some updates (`NetworkStats`, ``delays``). The mean of the gathered gradients is applied.

        Optimizers live on from one call to the next, as long as ``optimizer``, ``scheduler``, ``param_groups`` and
        ``corrections`` are the same (equal partials count as the same).

        Args:
            source: of `Sample` with targets; a sample without target is predicted only.
            loss: ``loss(output, target)`` or ``loss(output)``, one number; None: ``forward`` returns the loss.
            optimizer: ``params -> torch.optim.Optimizer``, one for each stage (replicas: each its own), or a mapping by
                stage name with ``"*"`` for the others.
            max_active_keys: instances in flight; 1 is synchronous.
            min_update_frequency: gradients after which a stage updates, or instances.
            update_per: "gradient": one for each use of the stage, as AMPNet counts. "instance": finished ones that used
                it; with both numbers 1 that is plain PyTorch's loop over the instances.
            weights: a backward sees those of its forward ("stashed"), or the newest ("current", as AMPNet has it).
            corrections: for the delay, see `aiotime.learning.corrections`.
            unused: what happens where a call's result is used neither by another call nor by the loss: "warn" (once per
                stage, in the log), "raise", "ignore".
            scheduler: as for any rule of `aiotime.learning`.
            param_groups: likewise.
            clip_norm: likewise.
            guard: likewise.
            precision: likewise.
            supervised: likewise.
            ordered: steps leave in the order of the source; False: as they are ready.
            on_error: see `Pipeline.run`. An instance that fails is not learned from; others go on. Where it fails on
                the way back, what it had sent by then stays; a backward that raises fails all instances of its batch.
            deadline: seconds after its arrival within which an instance must make its last call, else it is shed.
            failure_budget: see `Pipeline.run`.
            window: instances in flight or waiting for their turn to leave; None: four times ``max_active_keys``.
            paths: keep each instance's `Path`.

        Raises:
            ConfigurationError: settings that cannot work, or nothing to learn.
        """
        lesson = Lesson(
            loss=loss,
            optimizer=optimizer,
            min_update_frequency=min_update_frequency,
            update_per=update_per,
            weights=weights,
            corrections=corrections,
            unused=unused,
            scheduler=scheduler,
            param_groups=param_groups,
            clip_norm=clip_norm,
            guard=guard,
            precision=precision,
            supervised=supervised,
        )
        options = RunOptions(
            overflow="wait",
            on_error=on_error,
            deadline=deadline,
            failure_budget=failure_budget,
            window=_window(window, max_active_keys),
            ordered=ordered,
        )
        return self._run(source, options, keys=max_active_keys, lesson=lesson, paths=paths)

    def _run(self, source: Any, options: RunOptions, *, keys: int, lesson: Lesson | None, paths: bool) -> Steps:
        house = self._house()
        house.runs += 1
        tenant = Tenant(house, keys=keys, lesson=lesson, paths=paths)
        return Steps(RunState(tenant, source, options, house.runs))

    async def submit(self, sample: Any, *, deadline: float | None = None) -> Step:
        """One request, one answer; many at once. The network must be open.

        Raises:
            ClosedError: it is not. StageError: it failed. DeadlineExceeded: too late.
        """
        return await self._house().submit(sample, deadline)

    async def eager(self, sample: Any) -> Any:
        """``forward`` in plain PyTorch, here and now: for breakpoints, plain tracebacks, and as what to compare with.

        Stages are called directly, a stage with ``max_batch > 1`` with a batch of one; autograd records as
        it does elsewhere. Nothing may be learning at the same time.
        """
        context = contextvars.copy_context()
        context.run(CURRENT.set, Eager())  # type: ignore[arg-type]
        return await asyncio.get_running_loop().create_task(self.forward(sample), context=context)

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        await self._house().enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close: what is in flight is given up (`drain` first to finish it), every task and thread ends."""
        await self._house().close()

    async def drain(self) -> None:
        """Finish what was accepted, accept nothing new."""
        await self._house().drain()

    # ------------------------------------------------------------------ state

    @property
    def stages(self) -> dict[str, Stage]:
        """By name: those of parts have the part's name before their own."""
        return dict(self._house().stages)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the weights, under ``"stage.key"``; of replicas, their mean."""
        return self._house().state_dict()

    async def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the weights, also while instances are in flight: between two batches of each stage.

        Raises:
            ConfigurationError: missing or unexpected keys, or a wrong shape; then nothing was changed.
        """
        await self._house().load_state_dict(state)

    # ------------------------------------------------------------------ observation

    def stats(self) -> NetworkStats:
        """A frozen snapshot of what it does now; prints as a table. Once closed: the last one.

        Raises:
            ClosedError: it was never open.
        """
        return self._house().stats()

    @contextmanager
    def tracing(self, *, limit: int = 200_000) -> Iterator[Trace]:
        """Record what every device stream and the loop do, for ``trace.save(path)`` and timelines.

        Args:
            limit: newest slices kept.
        """
        house = self._house()
        recorded = Trace(limit=limit)
        house.trace_into(recorded)
        try:
            yield recorded
        finally:
            house.trace_into(None)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: {', '.join(f'{name}@{_places(stage)}' for name, stage in self.stages.items())}>"
        )

    def _house(self) -> House:
        """What runs it; made at first use, since nobody must call our ``__init__``."""
        house: House | None = self.__dict__.get("_aiotime_house")
        if house is None:
            house = self.__dict__["_aiotime_house"] = House(self)
        return house


def _places(stage: Stage) -> str:
    return "+".join("?" if replica.device is None else replica.device.name for replica in stage.replicas)


def _window(window: int | None, keys: int) -> int:
    """How many instances may be on their way or wait for an earlier one to leave first."""
    whole_number("max_active_keys", keys, "a number of instances")
    return WINDOW * keys if window is None else window

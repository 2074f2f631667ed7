"""Pipeline: what people hold. Builds stages from a plan or by hand, opens and closes them, answers requests.

Longer than most modules: it is the public face, half of it docstrings; the work is done in the rooms below.
"""

from __future__ import annotations

import asyncio
import dataclasses
import warnings
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch.utils._pytree import tree_map

from aiotime.batching.desk import Batching
from aiotime.batching.joining import Alike, check_batching
from aiotime.channel import Overflow
from aiotime.checkpoint import Checkpoint
from aiotime.compiling import Program, check_way, compile_module
from aiotime.devices import Device, default_devices, resolve, resolve_all
from aiotime.devices.base import Clock, RealClock
from aiotime.devices.cpu import CpuDevice
from aiotime.engine import Engine
from aiotime.errors import (
    BrokenError,
    ClosedError,
    ConfigurationError,
    FrameError,
    InputError,
    PlanError,
)
from aiotime.frame import Prediction, Sample
from aiotime.frozen import Evaluation
from aiotime.ingest.inspection import InputSpec, require_finite
from aiotime.keeper import Keeper
from aiotime.learning.chimera import Replica, ReplicaLearner
from aiotime.learning.enrolment import enrol_stages, rehearse, second_hands
from aiotime.learning.learner import Site
from aiotime.learning.rule import Rule
from aiotime.learning.synchronous import Synchronous
from aiotime.observe.meter import quantile
from aiotime.observe.stats import Stats, stage_stats
from aiotime.observe.trace import Trace
from aiotime.planning import Plan, make_plan, trace
from aiotime.planning.compilation import compile_pieces
from aiotime.planning.together import check_rows_apart, layouts, no_learning_in_batches, trace_for_batches
from aiotime.planning.trace import Piece
from aiotime.planning.twin import twin
from aiotime.requests import Request
from aiotime.runs import Run, RunOptions, RunState, call_dead_letter, check_deadline
from aiotime.stage import OnError, Retry, Spread, Stage, StageSpec, spread, unique_names, with_retries
from aiotime.standstill import Standstill
from aiotime.weights import Swap

Balance = Literal["measured", "even"] | Sequence[int]


class Pipeline:
    """A model cut into stages that work on different frames at the same time.

    Args:
        model: an ``nn.Sequential`` (cut between its children) or any module that torch.fx or torch.export
            can trace. It is put into eval mode, runs in ``torch.inference_mode``, and belongs to the
            pipeline from here on.
        example: one frame as the model takes it: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Frames must have its structure, dtypes and shapes.
        devices: where stages may run, in order: ``"cpu:0"``, ``"cuda:1"``, ``"inline"`` or Device objects.
            None: all CUDA devices, else one CPU worker per core.
        balance: ``"measured"`` times the layers and cuts for the fastest stream, with fewer stages where
            more do not pay; ``"even"`` gives each device as many layers; a list gives the layers per stage.
        plan: a `Plan` made earlier (``Plan.from_json``) instead of ``balance``.
        depth: launches in flight per stage; None adapts it to the stages' times (heavy ones 2, stages of
            microseconds tens). Frames in flight <= depth x stages.
        budget: frames in flight in the whole pipeline, if it shall differ from depth x stages.
        budget_bytes: bytes of payload in flight; None: no limit.
        dynamic: dims of every input tensor that may differ from the example's, such as ``(0,)``.
        check_finite: refuse frames that hold NaN or infinity.
        max_batch: frames that run as one job where they wait at a stage: joined along the first dimension of every
            tensor, each with its own result (a view of the batch's). Checked here: the model on two frames at once must
            give what it gives on each. Not together with ``learner``.
        max_wait: seconds that the first stage, when it could start, waits for a batch to become full; what ran together
            there reaches the others together.
        warm_up: frames (copies of the example) sent through before the first real one at each opening.
        learner: a rule of `aiotime.learning`: the pipeline then learns from every `Sample` that has a target. The
            model keeps the mode (training or eval) it is in and is copied: read what was learned with `state_dict`.
        compile: None runs the stages' layers eagerly. ``"aot"`` compiles each stage ahead of time into native code
            that runs without Python's lock (AOTInductor; kept on disk in AIOTIME_CACHE, by default the user's
            cache folder); ``"inductor"`` by torch.compile, the only way for stages that learn; ``"cudagraph"``
            captures it as a CUDA graph; ``"auto"`` measures and takes the fastest, eager among them. What cannot
            be compiled runs eagerly, with a warning that says why. The first time takes up to a minute a stage.
        name: for task names, logs and statistics.

    Raises:
        ConfigurationError: arguments that cannot work. TraceError: the model cannot be cut.

    Example:
        >>> import asyncio, torch, aiotime
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> async def main():
        ...     pipeline = aiotime.Pipeline(model, example=torch.zeros(1, 4), devices=["cpu:0", "cpu:1"])
        ...     return [tuple(pred.output.shape) async for pred in pipeline.run(torch.rand(3, 1, 4))]
        >>> asyncio.run(main())
        [(1, 2), (1, 2), (1, 2)]
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        example: Any,
        devices: Sequence[str | Device] | None = None,
        balance: Balance = "measured",
        plan: Plan | None = None,
        depth: int | None = None,
        budget: int | None = None,
        budget_bytes: int | None = None,
        dynamic: Sequence[int] | None = None,
        check_finite: bool = False,
        warm_up: int = 0,
        max_batch: int = 1,
        max_wait: float = 0.0,
        learner: Rule | None = None,
        compile: str | None = None,
        name: str | None = None,
    ) -> None:
        check_way(compile, learning=learner is not None)
        if not isinstance(model, torch.nn.Module):
            raise ConfigurationError(
                f"a Pipeline is made of a torch.nn.Module, not of a {type(model).__name__}; "
                "for functions use Pipeline.from_stages([...])"
            )
        self._set_up(depth, budget, budget_bytes, warm_up, name or type(model).__name__)
        self._spec: InputSpec | None = InputSpec(example, dynamic=dynamic)
        self._example = self._spec.check(example)
        check_batching(self.name, max_batch, max_wait, "cat", of="frames")
        if max_batch > 1 and learner is not None:
            raise no_learning_in_batches(self.name)
        if learner is None:
            model.eval()
        traced = (
            trace_for_batches(model, self._example, dynamic)
            if max_batch > 1
            else trace(model, self._example, dynamic=dynamic)
        )
        if plan is None:
            found = default_devices() if devices is None else resolve_all(devices)
            plan = make_plan(traced, self._example, found, balance=balance, learner=learner, way=compile)
            if compile not in (None, "auto") and any(stage.compiled is None for stage in plan.stages):
                warnings.warn(f"pipeline {self.name!r} does not run compiled everywhere. {plan.advice}", stacklevel=2)
        else:
            plan.check(traced.layers)
            if not (isinstance(balance, str) and balance == "measured"):
                raise ConfigurationError("hand in a plan or a balance, not both: the plan says how to cut")
            if compile is not None:
                raise ConfigurationError("hand in a plan or compile, not both: the plan says how stages are compiled")
            found = resolve_all([s.device for s in plan.stages] if devices is None else devices)
            absent = {s.device for s in plan.stages} - {device.name for device in found} - {"inline"}
            if absent:
                raise PlanError(
                    f"the plan uses {', '.join(sorted(absent))}, devices names {', '.join(d.name for d in found)}; "
                    "leave devices out or make a plan for them"
                )
        self.plan: Plan | None = plan
        self._pieces: list[Piece] = traced.cut(plan.sizes)
        joiners = layouts(model, self._pieces, self._example, dynamic) if max_batch > 1 else []
        specs = []
        for piece, planned, device in zip(self._pieces, plan.stages, plan.place(found), strict=True):
            device.place(piece.module)
            specs.append(StageSpec(planned.name, piece, device))
        outcomes = compile_pieces(
            self._pieces,
            [spec.device for spec in specs],
            self._example,
            [stage.compiled for stage in plan.stages],
            dynamic=traced.dynamic,
            learning=learner is not None,
        )
        for spec, outcome in zip(specs, outcomes, strict=True):
            if outcome.program is not None:
                spec.fn = spec.program = outcome.program
            _warn_of(spec.name, outcome.problems)
        for spec, joiner in zip(specs, joiners, strict=False):
            spec.batching = Batching(max_batch, 0.0 if spec is not specs[0] else max_wait, joiner)
        if check_finite:
            specs[0].fn = require_finite(specs[0].fn)
            specs[0].remake = require_finite
        names = unique_names([spec.name for spec in specs])
        for spec, unique in zip(specs, names, strict=True):
            spec.name = unique
        self._model: torch.nn.Module | None = model
        sizes = plan.sizes
        self._teach(learner, specs, again=lambda: traced.cut(sizes))
        seconds = [stage.seconds for stage in plan.stages if stage.seconds is not None]
        self._finish(specs, max(seconds) if len(seconds) == len(plan.stages) else None)

    @classmethod
    def from_stages(
        cls,
        stages: Sequence[Stage | Callable[[Any], Any]],
        *,
        depth: int | None = None,
        budget: int | None = None,
        budget_bytes: int | None = None,
        learner: Rule | None = None,
        name: str | None = None,
    ) -> Self:
        """A pipeline of functions and modules: decode on a CPU thread, model on a GPU, post-process.

        Args:
            stages: `Stage` objects; a bare function or module stands for ``Stage(it)``.
            depth: launches in flight per worker, as for `Pipeline`.
            budget: frames in flight, as for `Pipeline`.
            budget_bytes: bytes of payload in flight, as for `Pipeline`.
            learner: a rule of `aiotime.learning`; stages made of modules learn, from copies of their parameters.
            name: for task names, logs and statistics.

        Frames are not inspected: the first stage gets what the source yields.

        Example:
            >>> import asyncio, aiotime
            >>> double = aiotime.Stage(lambda x: 2 * x, device="cpu:0", name="double", workers=2)
            >>> async def main():
            ...     pipeline = aiotime.Pipeline.from_stages([double, lambda x: x + 1])
            ...     return [pred.output async for pred in pipeline.run(range(4))]
            >>> asyncio.run(main())
            [1, 3, 5, 7]
        """
        if not stages:
            raise ConfigurationError("from_stages needs at least one stage")
        pipeline = cls.__new__(cls)
        pipeline._set_up(depth, budget, budget_bytes, 0, name or "pipeline")
        pipeline._spec = None
        pipeline._example = None
        pipeline._model = None
        pipeline._pieces = []
        pipeline.plan = None
        made = [stage if isinstance(stage, Stage) else Stage(stage) for stage in stages]
        names = unique_names([stage.name for stage in made])
        taken = {stage.device for stage in made if isinstance(stage.device, str)}
        free = (device for device in map(CpuDevice, range(len(made) + len(taken))) if device.name not in taken)
        specs = []
        for stage, unique in zip(made, names, strict=True):
            device = next(free) if stage.device is None else resolve(stage.device)
            fn, remake, program = stage.fn, None, None
            if isinstance(fn, torch.nn.Module):
                if learner is None:
                    fn.eval()
                else:
                    fn = twin(fn, {})  # learning replaces parameters; the user's module keeps its own
                device.place(fn)
                pipeline._modules[unique] = fn
                module, fn = fn, spread(fn)
                remake = partial(_spread_again, policy=stage.on_error, stage=unique, device=device)
                if stage.compile is not None:
                    check_way(stage.compile, learning=learner is not None)
                    program = _program(stage, module, unique, device, learning=learner is not None)
                    fn = fn if program is None else program
            policy, batching = stage.on_error, None
            if stage.max_batch > 1:
                if learner is not None:
                    raise no_learning_in_batches(unique)
                check_rows_apart(unique, stage.fn)
                batching = Batching(stage.max_batch, stage.max_wait, Alike(unique, stage.group), fn)
            if isinstance(policy, Retry):
                fn = with_retries(fn, policy, unique, device)
                policy = policy.then
            spec = StageSpec(unique, fn, device, stage.workers, policy, stage.timeout, batching, remake=remake)
            spec.program = program
            specs.append(spec)
        pipeline._teach(learner, specs)
        pipeline._finish(specs, None)
        return pipeline

    def _set_up(self, depth: int | None, budget: int | None, budget_bytes: int | None, warm_up: int, name: str) -> None:
        if depth is not None and depth < 1:
            raise ConfigurationError(f"depth must be at least 1 launch in flight per stage, not {depth}")
        if budget is not None and budget < 1:
            raise ConfigurationError(f"budget must be at least 1 frame in flight, not {budget}")
        if warm_up < 0:
            raise ConfigurationError(f"warm_up is a number of frames, not {warm_up}")
        self.name = name
        self._depth, self._budget, self._budget_bytes, self._warm_up = depth, budget, budget_bytes, warm_up
        self._modules: dict[str, torch.nn.Module] = {}
        self._engine: Engine | None = None
        self._closing: Engine | None = None
        self._entered = False  # opened by hand: stays open between runs
        self._leases = 0
        self._runs = 0
        self._warm: asyncio.Task[None] | None = None
        self._tracer: Trace | None = None
        self._last_stats: Stats | None = None
        self._paused = False

    def _teach(self, learner: Rule | None, specs: list[StageSpec], *, again: Callable[[], list[Piece]] = list) -> None:
        """Give the stages that learn their hands; ``again`` makes further pieces, for a rule that wants replicas."""
        self._learner = learner
        if learner is None:
            return
        sites = []
        tensors = self._model.named_parameters(remove_duplicate=False) if self._model is not None else ()
        identities = {key: id(tensor) for key, tensor in tensors}
        for index, spec in enumerate(specs):
            piece = self._pieces[index] if self._pieces else None
            root = piece.module if piece is not None else self._modules.get(spec.name)
            site = Site(index, len(specs), spec.name, spec.fn, [("", root)] if root is not None else [])
            if piece is not None:
                site.rebind, site.example = piece.module.bind, self._example
                site.names = {slot: key for key, slot in piece.keys.items()}
                site.identities = {slot: identities[key] for key, slot in piece.keys.items() if key in identities}
            elif root is not None:
                site.names = {name: f"{spec.name}.{name}" for name, _ in root.named_parameters()}
            site.device = _torch_device(spec.device, root)
            sites.append(site)
        if self._pieces:
            rehearse(sites, self._example)
        for spec, found in zip(specs, enrol_stages(learner, sites), strict=True):
            hands, _ = found
            if not hands.learns and spec.workers > 1:
                continue  # several at once, on threads of their own
            if hands.learns and (spec.workers > 1 or spec.timeout is not None):
                raise ConfigurationError(
                    f"stage {spec.name!r} learns (or passes gradients on): it needs workers=1 and no timeout"
                )
            spec.hands, spec.order = found
        if isinstance(learner, Synchronous) and learner.schedule == "chimera":
            pieces = again()
            for site, spec in zip(sites, specs, strict=True):
                if isinstance(spec.hands, ReplicaLearner):
                    piece = pieces[site.index] if pieces else None
                    spec.replica = self._replica(learner, site, spec, specs[-1 - site.index].device, piece)

    def _replica(
        self, learner: Synchronous, site: Site, spec: StageSpec, device: Device, piece: Piece | None
    ) -> Replica:
        """The same stage once more, on ``device``."""
        assert isinstance(spec.hands, ReplicaLearner)
        own = dataclasses.replace(site)
        first = self._modules.get(spec.name)
        root = None if first is None else twin(first, {})
        made: Any = root
        if piece is not None:
            made, root, own.rebind = piece, piece.module, piece.module.bind
        if root is not None:
            device.place(root)
            own.modules, own.fn = [("", root)], made if spec.remake is None else spec.remake(made)
        own.device = _torch_device(device, root)
        return Replica(device, second_hands(learner, own, spec.hands))

    def _finish(self, specs: list[StageSpec], first_guess: float | None) -> None:
        self._specs = specs
        self._first_guess = first_guess
        self._standstill = Standstill(engine=lambda: self._engine, steady=self._steady, stages=len(specs))
        self._evaluation = Evaluation(self._model, specs, self._modules)
        self._keeper = Keeper(
            self.name,
            specs,
            model=self._model,
            pieces=self._pieces,
            modules=self._modules,
            rule=self._learner,
            layers=None if self.plan is None else list(self.plan.sizes),
            standstill=self._standstill,
        )
        self.on_error: Mapping[str, OnError] = {s.name: s.on_error for s in specs if s.on_error is not None}
        self.keeps_input = any(callable(policy) for policy in self.on_error.values())  # dead letters show it
        clocks = {id(spec.device.clock): spec.device.clock for spec in specs}
        virtual = [clock for clock in clocks.values() if not isinstance(clock, RealClock)]
        if len(virtual) > 1:
            raise ConfigurationError("simulated devices of one pipeline must share one VirtualClock")
        self._clock: Clock = virtual[0] if virtual else RealClock()
        self._real_time = not virtual

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        if self._entered:
            raise ConfigurationError(f"pipeline {self.name!r} is open already")
        self._entered = True
        try:
            engine = self._open()
            if self._warm is not None:
                await asyncio.shield(self._warm)
            if engine.error is not None:
                raise engine.error
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close: what is in flight is given up (`drain` first to finish it), every task and thread ends."""
        self._entered = False
        engine, self._engine = self._engine, None
        if engine is not None:
            self._last_stats, self._closing = self._snapshot(engine), engine
            self._keeper.ended(engine)
        engine = self._closing
        if engine is not None and not engine.loop.is_closed():  # else what it had ended with its loop
            await engine.close()  # a second caller waits as the first does
        if self._closing is engine:
            self._closing = None
        warm, self._warm = self._warm, None
        if warm is not None and not warm.done():
            await asyncio.wait([warm])

    def _open(self) -> Engine:
        loop = asyncio.get_running_loop()
        engine = self._engine
        if engine is not None and engine.loop is loop:
            return engine
        if engine is not None and not engine.loop.is_closed():
            raise ConfigurationError(
                f"pipeline {self.name!r} is open on another event loop; use one pipeline per loop or close it there"
            )
        if engine is not None:
            self._leases = 0  # its loop is gone, and with it whoever held one
        self._engine = engine = Engine(
            self._specs,
            name=self.name,
            depth=self._depth,
            frames=self._budget,
            nbytes=self._budget_bytes,
            clock=self._clock,
            first_guess=self._first_guess,
            rule=self._learner,
        )
        engine.trace_into(self._tracer)
        engine.door.paused = self._paused
        self._standstill.attach(engine)
        engine.start()
        if self._warm_up and self._example is not None:
            engine.door.paused = True
            self._warm = loop.create_task(self._run_warm_up(engine), name=f"warm-up:{self.name}")
        return engine

    async def _run_warm_up(self, engine: Engine) -> None:
        """Send copies of the example past the paused door, then open it with fresh counters."""
        requests = []
        for _ in range(self._warm_up):
            request = Request(engine, self._example, None)
            if request.frame.ticket is not None:
                request.frame.ticket.learn = False  # no data
            engine.door.used += 1
            request.enter()
            requests.append(request.future)
        await asyncio.wait(requests)
        for future in requests:
            engine.counts["failed" if future.exception() else "out"] -= 1  # no frames of anybody
            if error := future.exception():
                engine.end(BrokenError(f"warm-up of pipeline {self.name!r} failed: {error}"))
        engine.reset_counters()
        engine.door.paused = self._paused
        engine.door.pump()

    async def _steady(self) -> Engine | None:
        """The open engine; one that is ending is waited for."""
        broken = self._engine if self._engine is not None and self._engine.error is not None else None
        for ending in (self._closing, broken):
            if ending is not None and not ending.loop.is_closed():
                self._check_loop(ending)
                await ending.close()
        engine = self._engine
        if engine is None or engine.error is not None or engine.loop.is_closed():
            return None
        self._check_loop(engine)
        return engine

    def _check_loop(self, engine: Engine) -> None:
        if engine.loop is not asyncio.get_running_loop():
            raise ConfigurationError(f"pipeline {self.name!r} is open on another event loop")

    # Host, as runs see it

    def lease(self) -> Engine:
        """The open engine, opened if need be; to be given back."""
        engine = self._open()
        if engine.error is not None:
            raise engine.error
        if engine.draining:
            raise ClosedError(f"pipeline {self.name!r} is draining and takes no new runs")
        self._leases += 1
        return engine

    async def give_back(self) -> None:
        """A run ends; the last one closes a pipeline that nobody opened by hand."""
        self._leases -= 1
        if self._leases == 0 and not self._entered:
            await self.aclose()

    def inspect(self, payload: Any, index: int | None, key: Any) -> Any:
        """The payload if the model takes it, else `InputError`."""
        if isinstance(payload, InputError):  # the source could not read this frame
            payload.frame, payload.key = index, key
            raise payload
        return payload if self._spec is None else self._spec.check(payload, index, key)

    # ------------------------------------------------------------------ work

    def run(
        self,
        source: Any,
        *,
        overflow: Overflow = "wait",
        on_error: OnError = "raise",
        deadline: float | None = None,
        failure_budget: int | float | None = None,
        window: int | None = None,
    ) -> Run:
        """Send a stream through; several runs at once share the stages, each with its own order.

        Args:
            source: an async iterable (or aiostream stream), an iterable (a blocking one is pulled on a
                thread), or a callable that returns the next frame. It yields payloads or `Sample`.
            overflow: when the source is faster than the pipeline: ``"wait"`` slows it down;
                ``"drop_oldest"``, ``"drop_newest"`` shed among the frames that wait at the door; ``"latest"``
                keeps only the newest of them.
            on_error: ``"raise"`` ends the run at a failed frame, in its turn; ``"skip"`` leaves it out;
                a callable ``(frame, error)`` (plain or async) gets it: ``frame.input``, ``frame.key``.
            deadline: seconds after its arrival within which a frame must be computed, else it is shed.
            failure_budget: with "skip" or a callable: failures allowed, a count (int) or a share (float).
            window: frames of this run in flight or waiting for its consumer; default: the budget.
        """
        options = RunOptions(
            overflow=overflow, on_error=on_error, deadline=deadline, failure_budget=failure_budget, window=window
        )
        self._runs += 1
        return Run(RunState(self, source, options, self._runs))

    async def submit(self, frame: Any, *, deadline: float | None = None) -> Prediction:
        """One request, one answer; many at once, answered as they finish.

        Args:
            frame: a payload or a `Sample`.
            deadline: seconds after which the answer is no longer wanted.

        Cancelled while its work is still queued: the work is taken out of the queue and never done.

        Raises:
            InputError: refused at the door. StageError: a stage failed on it. DeadlineExceeded: too late.
            ClosedError: the pipeline is not open, or is draining.
        """
        engine = self._engine
        if engine is None:
            raise ClosedError(f"pipeline {self.name!r} is not open; use 'async with pipeline:' around submit()")
        if engine.loop is not asyncio.get_running_loop():
            raise ConfigurationError(f"pipeline {self.name!r} is open on another event loop")
        if engine.error is not None:
            raise engine.error
        if engine.draining:
            raise ClosedError(f"pipeline {self.name!r} is draining and takes no new requests")
        engine.check_not_held()
        try:
            request = Request(engine, frame, self._spec, keep_input=self.keeps_input)
        except InputError as error:
            engine.counts["in"] += 1
            engine.counts["failed"] += 1
            if type(frame) is Sample and frame.ack is not None:
                engine.loop.call_soon(frame.ack, error)
            raise
        if deadline is None and type(frame) is Sample:
            deadline = frame.deadline
        check_deadline(deadline)
        try:
            return await request.answer(deadline, real_time=self._real_time)
        except FrameError as error:
            policy = self.on_error.get(error.stage) if error.stage else None
            if callable(policy):
                await call_dead_letter(policy, request.frame, error)
            raise

    async def __call__(self, frame: Any) -> Any:
        """As a part of an `aiotime.dynamic.Network`: the output for one frame; no gradient passes through it."""
        return (await self.submit(frame)).output

    async def drain(self) -> None:
        """Finish what was accepted, accept nothing new: requests are refused, runs stop pulling.

        Returns when nothing is in flight and no request waits. `resume` opens the door again. What runs
        have ready is still for their consumers to take: let them end before `aclose`, which gives it up.
        """
        engine = self._engine
        if engine is None:
            return
        engine.draining = True
        for state in list(engine.runs):
            state.stop()
        engine.door.paused = False
        engine.door.pump()
        if engine.door.waiting:
            await engine.until_let_go()
        await engine.idle()
        await engine.flush()

    def pause(self) -> None:
        """Admit nothing until `resume`; frames in flight go on, callers and sources wait."""
        self._paused = True
        if self._engine is not None:
            self._engine.door.paused = True

    def resume(self) -> None:
        """Open the door again after `pause` or `drain`."""
        self._paused = False
        if self._engine is not None:
            self._engine.draining = False
            self._engine.door.paused = False
            self._engine.door.pump()

    def set_budget(self, *, frames: int | None = None, nbytes: int | None = None) -> None:
        """Change the budget of frames and payload bytes in flight, at once if the pipeline is open.

        Args:
            frames: None: depth x stages, as by default.
            nbytes: None: no limit.
        """
        if frames is not None and frames < 1:
            raise ConfigurationError(f"the budget needs at least one frame in flight, not {frames}")
        if nbytes is not None and nbytes < 1:
            raise ConfigurationError(f"the byte budget must be positive or None, not {nbytes}")
        self._budget, self._budget_bytes = frames, nbytes
        if self._engine is not None:
            self._engine.set_budget(frames, nbytes)

    # ------------------------------------------------------------------ learning

    async def feedback(self, key: Hashable, target: Any) -> float:
        """The target of a frame that came with ``Sample(x, target=aiotime.LATER, key=key)``.

        Returns:
            the frame's loss, once every stage has learned from it.

        Raises:
            FeedbackError: no frame with this key waits for its target (any more).
            ClosedError: the pipeline is not open.
        """
        engine = self._engine
        if engine is None or engine.course is None:
            why = "has no learner" if self._learner is None else "is not open"
            raise ClosedError(f"pipeline {self.name!r} {why}, so no frame waits for a target")
        await engine.until_let_go()
        if engine.error is not None:
            raise engine.error
        return await engine.course.feedback(key, target)

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[torch.nn.Module]:
        """The live model for evaluation, between two frames: ``async with pipeline.frozen() as model:``.

        Every frame that entered before has been learned from, none enters and no late target is taken inside the
        block; runs and callers wait, and go on when it is left, also by an error or a cancellation. ``model`` is a
        copy like the one the pipeline was built with (made once), with the weights as they are now, in eval mode,
        where the user's model is (a pipeline of stages: a module that calls them all in turn). It stays as it is
        until the next such block.

        Raises:
            ConfigurationError: the model cannot be copied.
            BusyError: from `submit` and `feedback`, called by the very task that is inside the block.
        """
        async with self._standstill.held():
            weights = self._keeper.joined(await self._standstill.visit(self._keeper.read_weights))
            yield await asyncio.to_thread(self._evaluation.with_weights, weights)

    # ------------------------------------------------------------------ checkpoints

    async def checkpoint(self, path: str | PathLike[str], *, position: Any = None, rng: bool = False) -> Checkpoint:
        """Save weights, optimizers, rule state and position, at one cut through the stream, into the folder ``path``.

        Every frame that entered before is learned from first (gathered gradients stay gathered), none after it is
        in; runs and callers see a short pause, and the files are written while they go on. Frames whose target is
        to come (`LATER`) are not part of it. A checkpoint that is there is kept until the new one is complete.

        Args:
            path: a folder, see `aiotime.checkpoint`.
            position: where the source is, as it shall come back from `restore`: plain values, or a callable that
                returns them, called at the cut. Or give each Sample a ``key``: that of the newest frame comes back.
            rng: the states of torch's random number generators too.

        Returns:
            what was written.

        Raises:
            ConfigurationError: a value that cannot be written, or ``path`` is something else. Then nothing changed.
        """
        taken = await self._keeper.taken(position, rng=rng)
        await asyncio.to_thread(taken.write, path)
        return taken

    async def restore(self, path: str | PathLike[str] | Checkpoint, *, weights_only: bool = False) -> Checkpoint:
        """Go on from a checkpoint: open or not, while frames flow or not.

        Frames that entered before are learned from with the old weights; the next one meets the new. Cancelled: it
        goes on in the background, and no frame enters until it is done.

        Args:
            path: the folder, or what `checkpoint` or ``Checkpoint.read`` returned.
            weights_only: leave optimizers, rule state and position; for other cuts, rules and optimizers.

        Returns:
            the checkpoint, with ``frames``, ``key`` and ``position``.

        Raises:
            ConfigurationError: there is none, or it does not fit this model, cut, rule or optimizer.
                Then nothing was changed.
        """
        found = path if isinstance(path, Checkpoint) else await asyncio.to_thread(Checkpoint.read, path)
        if weights_only:
            await self.load_state_dict(found.weights)
            return found
        await self._keeper.put_back(found, self._fitting(found.weights))
        return found

    # ------------------------------------------------------------------ weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the model's own keys (with `from_stages`: ``"stage.key"``)."""
        merged: dict[str, Any] = {}
        if self._model is None:
            for stage, module in self._modules.items():
                merged.update({f"{stage}.{key}": tensor for key, tensor in module.state_dict().items()})
        for piece in self._pieces:
            merged.update(piece.state())
        if self._learner is not None:  # what learning goes on to change must not change in the caller's hands
            merged = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in merged.items()}
        if self._model is None:
            return merged
        return {key: merged.get(key, tensor) for key, tensor in self._model.state_dict().items()}

    async def load_state_dict(self, state: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
        """Replace weights, also while running: between two frames, and no frame sees half of them.

        Returns when every stage has the new weights. The tensors are replaced, not written into: the
        model handed in keeps its old ones.

        Raises:
            ConfigurationError: missing or unexpected keys (unless ``strict=False``), or a wrong shape;
                then nothing was changed.
        """
        swap = Swap(self._keeper.load, self._fitting(state, strict=strict), stages=len(self._specs))
        engine = self._engine
        if engine is None or engine.error is not None:
            for stage in range(len(self._specs)):
                swap.apply(stage)
            return
        swap.done = engine.loop.create_future()
        engine.enter_control(swap, swap)
        await asyncio.shield(swap.done)

    def _fitting(self, state: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
        """Copies of the tensors in ``state`` that the stages take, once all of them fit."""
        own: dict[str, Any] = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if strict and (missing or unexpected):
            raise ConfigurationError(f"load_state_dict: missing keys {missing}, unexpected keys {unexpected}")
        tensors = [key for key, value in own.items() if key in state and isinstance(value, torch.Tensor)]
        wrong = [key for key in tensors if own[key].shape != state[key].shape]
        if wrong:
            key = min(wrong)
            raise ConfigurationError(
                f"load_state_dict: {key!r} has shape {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}"
            )
        given = {key: value for key, value in state.items() if key in own}
        if missing and self._model is not None:  # a piece takes all it has or nothing
            tied = {(v.data_ptr(), v.shape): key for key, v in self._model.state_dict().items() if key in given}
            for key, value in self._model.state_dict().items():
                if key in missing:
                    given[key] = given.get(tied.get((value.data_ptr(), value.shape), ""), own[key])
        with torch.inference_mode(mode=False):  # ordinary tensors, whatever mode the caller is in
            return {
                key: value.detach().clone() if isinstance(value, torch.Tensor) else value
                for key, value in given.items()
            }

    # ------------------------------------------------------------------ observation

    @property
    def ready(self) -> bool:
        """Would it take a request now: open, neither draining nor paused, and not broken? For health checks."""
        engine = self._engine
        return engine is not None and engine.error is None and not engine.draining and not engine.door.paused

    @property
    def example(self) -> Any:
        """The example frame it was built with; None with `from_stages`."""
        return self._example

    def stats(self) -> Stats:
        """A frozen snapshot of what the pipeline does now; prints as a table. Once closed: the last one.

        Raises:
            ClosedError: it was never open.
        """
        if self._engine is not None:
            return self._snapshot(self._engine)
        if self._last_stats is None:
            raise ClosedError(f"pipeline {self.name!r} was never open; it has statistics from opening on")
        return self._last_stats

    def _snapshot(self, engine: Engine) -> Stats:
        elapsed = engine.now() - engine.opened
        latencies = engine.latencies.values()
        stages = []
        course = engine.course
        for index, runner in enumerate(engine.stages):
            inbox = runner.inbox.statistics()
            stages.append(
                stage_stats(
                    runner.spec.name,
                    runner.spec.device.name,
                    runner.work.recorders,
                    elapsed=elapsed,
                    queue=inbox.occupancy + max(0, sum(not p.done for p in runner.launched) - runner.spec.workers),
                    queue_mean=inbox.occupancy_mean,
                    queue_max=inbox.occupancy_max,
                    backward=[recorder for work in runner.works[1:] for recorder in work.recorders],
                    learning=course.lessons(index, elapsed) if course is not None else None,
                    tally=runner.work.tally,
                )
            )
        return Stats(
            name=self.name,
            elapsed=elapsed,
            frames_in=engine.counts["in"],
            frames_out=engine.counts["out"],
            frames_shed=engine.counts["shed"],
            frames_failed=engine.counts["failed"],
            in_flight=len(engine.frames),
            waiting=engine.door.waiting,
            budget_frames=engine.door.frames,
            budget_bytes=engine.door.nbytes,
            bytes_in_flight=engine.door.used_bytes,
            latency_p50=quantile(latencies, 0.5),
            latency_p99=quantile(latencies, 0.99),
            stages=tuple(stages),
            undelivered_mean=engine.undelivered / elapsed if elapsed else 0.0,
            learning_failed=course.failed if course is not None else 0,
        )

    @contextmanager
    def tracing(self, *, limit: int = 200_000) -> Iterator[Trace]:
        """Record what every device stream and the loop do, for ``trace.save(path)`` and timelines.

        Args:
            limit: newest slices kept.
        """
        recorded = Trace(limit=limit)
        self._tracer = recorded
        if self._engine is not None:
            self._engine.trace_into(recorded)
        try:
            yield recorded
        finally:
            self._tracer = None
            if self._engine is not None:
                self._engine.trace_into(None)

    def __repr__(self) -> str:
        stages = ", ".join(f"{spec.name}@{spec.device.name}" for spec in self._specs)
        return f"<Pipeline {self.name!r}: {stages}>"


def _torch_device(device: Device, root: torch.nn.Module | None) -> torch.device:
    """Where the parameters of a stage are, or would be."""
    tensor = next(iter(root.parameters()), None) if root is not None else None
    if tensor is not None:
        return tensor.device
    return torch.device("cpu" if device.on_host else device.name)


def _program(stage: Stage, module: torch.nn.Module, name: str, device: Device, *, learning: bool) -> Program | None:
    """What the stage's module is compiled to; None: it runs eagerly."""
    assert stage.compile is not None
    place = _torch_device(device, module)
    examples = [stage.example]
    if stage.max_batch > 1:
        examples = [Alike(name, stage.group).join([stage.example] * rows) for rows in (1, 2)]
    outcome = compile_module(
        Spread(module),
        [
            tree_map(lambda leaf: leaf.to(place) if isinstance(leaf, torch.Tensor) else leaf, value)
            for value in examples
        ],
        way=stage.compile,
        device=device,
        place=place,
        models=stage.workers,
        learning=learning,
    )
    _warn_of(name, outcome.problems if stage.compile != "auto" else {})
    return outcome.program


def _warn_of(stage: str, problems: Mapping[str, str]) -> None:
    for way, reason in problems.items():
        warnings.warn(f"stage {stage!r} runs eagerly: compile={way!r}: {reason}", stacklevel=3)


def _spread_again(
    module: torch.nn.Module, *, policy: OnError | Retry | None, stage: str, device: Device
) -> Callable[[Any], Any]:
    """A stage's function for a copy of its module."""
    fn = spread(module)
    return with_retries(fn, policy, stage, device) if isinstance(policy, Retry) else fn

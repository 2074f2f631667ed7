"""Keeper: what the stages of one pipeline hold, read and written: weights, learners' state, the position in the stream.

    read    stage by stage ──▶ StagePart ──▶ Checkpoint, or the weights of an evaluation
    write   Checkpoint ──▶ fits? ──▶ stage by stage, and all of it back where one stage refuses

Single stages are visited on their device streams; see `aiotime.standstill` for why that is one cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import aiotime
from aiotime.checkpoint import Checkpoint, StagePart, copied, is_plain, pack
from aiotime.engine import Engine
from aiotime.errors import BrokenError, ClosedError, ConfigurationError
from aiotime.learning.learner import StageLearner
from aiotime.learning.rule import Rule
from aiotime.planning.piece import Piece, put, slots
from aiotime.stage import StageSpec
from aiotime.standstill import Standstill


class Keeper:
    """Reads and writes the stages of one pipeline.

    Args:
        name: the pipeline.
        specs: its stages.
        model: the user's; None where stages were made by hand.
        pieces: the model's, one per stage.
        modules: by stage, where there is no model.
        rule: how it learns.
        layers: per stage, from its plan.
        standstill: for visits.
    """

    def __init__(
        self,
        name: str,
        specs: Sequence[StageSpec],
        *,
        model: nn.Module | None,
        pieces: Sequence[Piece],
        modules: Mapping[str, nn.Module],
        rule: Rule | None,
        layers: Sequence[int] | None,
        standstill: Standstill,
    ) -> None:
        self._name = name
        self._specs = specs
        self._model = model
        self._pieces = pieces
        self._modules = modules
        self._rule = None if rule is None else type(rule).__name__
        self._layers = layers
        self._standstill = standstill
        self._accepted = 0  # frames that went in at earlier openings, or before a restored checkpoint
        self._newest: Hashable = None  # the key of the last of them

    # ------------------------------------------------------------------ one stage

    def load(self, stage: int, state: Mapping[str, Any]) -> None:
        """Give one stage its part of ``state``; the old tensors are not written to."""
        try:
            if self._model is not None:
                self._pieces[stage].load(state)
            elif (module := self._modules.get(self._specs[stage].name)) is not None:
                _load_module(module, self._specs[stage].name, state)
        finally:
            if (hands := self._specs[stage].hands) is not None:
                hands.adopt()
            if (program := self._specs[stage].program) is not None:
                program.refresh()

    def read(self, stage: int) -> StagePart:
        """Copies of what one stage holds, on the host."""
        part = self.read_weights(stage)
        hands = self._specs[stage].hands
        state = copied(hands.state_dict()) if isinstance(hands, StageLearner) else None
        return StagePart(part.name, part.weights, self._about(stage), state)

    def read_weights(self, stage: int) -> StagePart:
        """The same without what its learner holds."""
        name = self._specs[stage].name
        weights: dict[str, Any] = {}
        if self._model is not None:
            weights = self._pieces[stage].state()
        elif (module := self._modules.get(name)) is not None:
            weights = {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return StagePart(name, copied(weights))

    def write(self, stage: int, weights: Mapping[str, Any], state: dict[str, Any] | None) -> None:
        """Give one stage weights, and its learner its state."""
        self.load(stage, weights)
        hands = self._specs[stage].hands
        if state is not None and isinstance(hands, StageLearner):
            hands.load_state_dict(copied(state))  # copies: what is in use is written into

    def _about(self, stage: int) -> dict[str, Any] | None:
        hands = self._specs[stage].hands
        return hands.about() if isinstance(hands, StageLearner) else None

    def joined(self, parts: Mapping[int, StagePart]) -> dict[str, Any]:
        """The weights of all stages, in the model's order."""
        merged = {key: value for stage in sorted(parts) for key, value in parts[stage].weights.items()}
        if self._model is None:
            return merged
        return {key: merged[key] if key in merged else copied(v) for key, v in self._model.state_dict().items()}

    # ------------------------------------------------------------------ position

    def seen(self, engine: Engine | None) -> tuple[int, Hashable]:
        """How many frames ever went in, and the key of the newest."""
        if engine is None or not engine.accepted:
            return self._accepted, self._newest
        return self._accepted + engine.accepted, engine.newest

    def ended(self, engine: Engine) -> None:
        """An opening ends: what it counted is kept."""
        self._accepted, self._newest = self.seen(engine)
        engine.accepted = 0

    # ------------------------------------------------------------------ all stages

    async def taken(self, position: Any, *, rng: bool) -> Checkpoint:
        """Everything at one cut; see `Pipeline.checkpoint`."""
        async with self._standstill.held():
            parts = await self._standstill.visit(self.read)
            frames, key = self.seen(self._standstill.engine)
            position = position() if callable(position) else position
            pack(position, {}, "position")
            return Checkpoint(
                pipeline=self._name,
                weights=self.joined(parts),
                stages=[parts[stage] for stage in range(len(self._specs))],
                rule=self._rule,
                layers=self._layers,
                frames=frames,
                key=key if is_plain(key) else None,
                position=position,
                rng=read_rng() if rng else None,
                versions={"aiotime": aiotime.__version__, "torch": torch.__version__},
            )

    async def put_back(self, found: Checkpoint, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint whose ``weights`` were found to fit; see `Pipeline.restore`."""
        own = [StagePart(spec.name, about=self._about(stage)) for stage, spec in enumerate(self._specs)]
        found.check(own, rule=self._rule, layers=self._layers)
        task = asyncio.create_task(self._put_back(found, weights), name=f"restore:{self._name}")
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, should nobody wait any more
        await asyncio.shield(task)

    async def _put_back(self, found: Checkpoint, weights: Mapping[str, torch.Tensor]) -> None:
        before: dict[int, StagePart] = {}

        def bring(stage: int) -> None:
            before[stage] = self.read(stage)
            self.write(stage, weights, found.stages[stage].state if found.rule is not None else None)

        def undo(stage: int) -> None:
            if stage in before:
                self.write(stage, before[stage].weights, before[stage].state)

        async with self._standstill.held():
            try:
                await self._standstill.visit(bring)
            except Exception as error:
                await self._standstill.visit(undo)
                if isinstance(error, ClosedError | BrokenError):
                    raise
                raise ConfigurationError(
                    f"the checkpoint of pipeline {found.pipeline!r} could not be taken over, and nothing was changed: "
                    f"{error}"
                ) from error
            engine = self._standstill.engine
            self._accepted, self._newest = found.frames, found.key
            if engine is not None:
                engine.accepted = 0
            if found.rng is not None:
                write_rng(found.rng)


def _load_module(module: nn.Module, name: str, state: Mapping[str, Any]) -> None:
    """By the module's own ``load_state_dict``, which replaces parameters; what was tied stays tied."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner, attribute, tensor in slots(module).values():
        if attribute in owner._parameters:
            places.setdefault(id(tensor), []).append((owner, attribute))
    for owner, attribute in (first for first, *_ in places.values()):
        held: Any = owner._parameters[attribute]
        if not isinstance(held, nn.Parameter):  # a learner's working tensor
            put(owner, attribute, nn.Parameter(held.detach(), requires_grad=held.requires_grad))
    own: dict[str, Any] = module.state_dict()
    mine = {key: state[f"{name}.{key}"] for key in own if f"{name}.{key}" in state}
    mine = {
        key: value.to(device=own[key].device, dtype=own[key].dtype) if isinstance(value, torch.Tensor) else value
        for key, value in mine.items()
    }
    module.load_state_dict(mine, strict=False, assign=True)
    for (owner, attribute), *others in places.values():
        for other, name_there in others:
            put(other, name_there, getattr(owner, attribute))


def read_rng() -> dict[str, torch.Tensor]:
    """The states of torch's generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{at}": torch.cuda.get_rng_state(at) for at in range(torch.cuda.device_count())}
    return states


def write_rng(states: Mapping[str, torch.Tensor]) -> None:
    """Set them, where there is such a device."""
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)

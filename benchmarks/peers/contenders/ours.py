"""aiotime, as its README shows it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

import aiotime
from benchmarks.peers.contenders.contender import CannotError, OnLoop
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Work

DEVICES = ["cpu:0", "cpu:1"]


class Ours(OnLoop):
    """A pipeline, open from the first frame to the last; models are cut by measurement.

    Args:
        compile: handed to `aiotime.Pipeline` and `aiotime.Stage`, where the installed version takes it.
        order: of `aiotime.learning.Delayed`, for works that learn.
    """

    def __init__(self, *, compile: str | None = None, order: str | None = None) -> None:
        self._compile = compile
        self._order = order

    async def enter(self, work: Work) -> None:
        """Cut, and open."""
        self.pipeline = self._pipeline(work)
        await self.pipeline.__aenter__()

    def _pipeline(self, work: Work) -> aiotime.Pipeline:
        if work.kind in ("model", "learning"):
            settings = self._settings(aiotime.Pipeline)
            if work.kind == "learning":
                settings["learner"] = aiotime.learning.Delayed(
                    order=self._order, loss=work.loss, optimizer=work.optimizer
                )
            return aiotime.Pipeline(work.model, example=work.frames[0], devices=list(DEVICES), **settings)
        settings = self._settings(aiotime.Stage)
        stages = [
            aiotime.Stage(part, name=f"stage {index}", **(settings if isinstance(part, nn.Module) else {}))
            for index, part in enumerate(work.stages)
        ]
        return aiotime.Pipeline.from_stages(stages)

    def _settings(self, made: type) -> dict[str, Any]:
        if self._compile is None:
            return {}
        if "compile" not in inspect.signature(made).parameters:
            raise CannotError(f"aiotime {aiotime.__version__}: {made.__name__} takes no argument 'compile'")
        return {"compile": self._compile}

    async def stream(self, feed: Feed, sink: Sink) -> None:
        """One run."""
        take = sink.take
        async for prediction in self.pipeline.run(feed):
            take(prediction.output)

    async def leave(self) -> None:
        """Close."""
        await self.pipeline.__aexit__(None, None, None)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Of the pipeline, which learns on copies."""
        return dict(self.pipeline.state_dict())

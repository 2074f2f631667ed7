"""Ways to learn the same network: the loop that everybody writes, and `Network.learn` with many instances in flight.

Both hold on to their weights and optimizers from one lap to the next, so that a lap can be timed and then be tested.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from aiotime.dynamic import Network
from aiotime.frame import Sample
from benchmarks._harness import LOOPS

TESTED = 64  # instances in flight where nothing is learned

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Way(Protocol):
    """One contender."""

    def learn(self, samples: Sequence[Sample]) -> float:
        """Seconds that it took to learn from each of them once."""

    def use(self, optimizer: Optimizer) -> None:
        """From the next lap on, with a fresh state."""

    def outputs(self, inputs: Sequence[Any]) -> list[Any]:
        """What it says, nothing learned."""

    def close(self) -> None:
        """It is no longer needed."""


class Plain:
    """Plain PyTorch, one instance at a time: no event loop, one autograd graph from end to end.

    Args:
        model: called with a sample's input.
        every: instances whose mean gradient makes an update.
    """

    def __init__(self, model: nn.Module, *, loss: Loss, optimizer: Optimizer, every: int) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer(model.parameters())
        self.every = every
        self.gathered = 0  # instances since the last step

    def learn(self, samples: Sequence[Sample]) -> float:
        """Forward, backward; a step for every so many of them. What is left over waits for the next lap."""
        self.model.train()
        start = time.perf_counter()
        for sample in samples:
            loss = self.loss(self.model(sample.input), sample.target)
            (loss / self.every).backward()  # type: ignore[no-untyped-call]
            self.gathered += 1
            if self.gathered == self.every:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.gathered = 0
        return time.perf_counter() - start

    def use(self, optimizer: Optimizer) -> None:
        """What was gathered is applied by the new one."""
        self.optimizer = optimizer(self.model.parameters())

    def outputs(self, inputs: Sequence[Any]) -> list[Any]:
        """One at a time."""
        self.model.eval()
        with torch.inference_mode():
            return [self.model(each) for each in inputs]

    def close(self) -> None:
        """Nothing is open."""


class InFlight:
    """A network, many instances at once, on an event loop of its own that stays.

    Args:
        network: is opened here, and closed by `close`.
        keys: instances in flight.
        options: of `Network.learn`.
    """

    def __init__(self, network: Network, *, keys: int, **options: Any) -> None:
        self.network = network
        self.keys = keys
        self._options = options
        if LOOPS[0] == "uvloop":
            import uvloop

            self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        else:
            self._runner = asyncio.Runner()
        self._runner.run(self.network.__aenter__())

    def learn(self, samples: Sequence[Sample]) -> float:
        """From the first one in to the last gradient back."""
        return self._runner.run(self._learn(samples))

    async def _learn(self, samples: Sequence[Sample]) -> float:
        start = time.perf_counter()
        async for _ in self.network.learn(samples, max_active_keys=self.keys, **self._options):
            pass
        return time.perf_counter() - start

    def use(self, optimizer: Optimizer) -> None:
        """One for each stage."""
        self._options["optimizer"] = optimizer

    def outputs(self, inputs: Sequence[Any]) -> list[Any]:
        """Many at once, however many it learns from."""
        return self._runner.run(self._outputs(inputs))

    async def _outputs(self, inputs: Sequence[Any]) -> list[Any]:
        return [pred.output async for pred in self.network.run(inputs, max_active_keys=TESTED)]

    def close(self) -> None:
        """Every task and thread ends."""
        try:
            self._runner.run(self.network.aclose())
        finally:
            self._runner.close()

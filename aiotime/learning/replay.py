"""Replay: each frame comes with others of its past, so that one update learns from a batch.

    stream     x0   x1       x2          x3            x4
    recent     x0   x0 x1    x0 x1 x2    x1 x2 x3      x2 x3 x4           window=3: a sliding batch
    reservoir  x0   x0 x1    x0 x1 x2    x1 x0 x3      x1 x0 x4           every past frame equally likely

A sliding window of 256 images into which they come one at a time is how PARTIME trained a ResNet-50 on CIFAR-10; the
reservoir is Vitter's algorithm R (1985), the memory of experience replay in continual learning.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError, InputError
from aiotime.frame import LATER, Sample

Keep = Literal["recent", "reservoir"]
Fill = Literal["repeat", "grow"]


@overload
def replay(
    source: AsyncIterable[Any],
    *,
    window: int = ...,
    batch: int | None = ...,
    keep: Keep = ...,
    fill: Fill = ...,
    empty_at_cut: bool = ...,
    seed: int = ...,
) -> AsyncIterator[Sample]: ...
@overload
def replay(
    source: Iterable[Any],
    *,
    window: int = ...,
    batch: int | None = ...,
    keep: Keep = ...,
    fill: Fill = ...,
    empty_at_cut: bool = ...,
    seed: int = ...,
) -> Iterator[Sample]: ...
def replay(
    source: AsyncIterable[Any] | Iterable[Any],
    *,
    window: int = 256,
    batch: int | None = None,
    keep: Keep = "recent",
    fill: Fill = "repeat",
    empty_at_cut: bool = False,
    seed: int = 0,
) -> AsyncIterator[Sample] | Iterator[Sample]:
    """Samples whose input is a batch: labelled frames of the past, and the newest frame last.

    The prediction for the newest frame is ``pred.output[-1]`` (its last rows, where a frame has several); the loss is
    that of the whole batch. Inputs and targets are concatenated along dim 0, targets without dims are stacked. Key,
    deadline, ack and cut are the newest frame's. A frame without target is predicted with the others around it, is
    not learned from and not remembered. A frame that cannot be put beside the others is refused in its turn.

    Args:
        source: yields `Sample` (or bare inputs, which have no target). Iterable: so is the result, and a pipeline
            pulls it on a thread. Async iterable: so is the result.
        window: frames in the batch, the newest counted; with "reservoir" one more than are remembered.
        batch: so many of them, drawn anew for each frame without repetition, the newest always among them; None: all.
        keep: what is remembered: the "recent" labelled frames, or a "reservoir" in which each labelled frame so far
            is equally likely to be.
        fill: while fewer are there: "repeat" repeats them, so that every batch has the same shape (that of the
            pipeline's ``example``); "grow" sends smaller ones (a pipeline with ``dynamic=(0,)`` takes them).
        empty_at_cut: forget everything where a new scene begins (``Sample.cut``).
        seed: of what is drawn.

    Raises:
        ConfigurationError: arguments that cannot work; while iterating, a target that is to come `LATER`.
    """
    memory = Memory(window=window, batch=batch, keep=keep, fill=fill, empty_at_cut=empty_at_cut, seed=seed)
    if isinstance(source, AsyncIterable):
        return _later(source, memory)
    if isinstance(source, str | bytes | dict) or not isinstance(source, Iterable):
        raise ConfigurationError(
            f"replay takes an iterable or async iterable of samples, not a {type(source).__name__}"
        )
    return _now(source, memory)


async def _later(source: AsyncIterable[Any], memory: Memory) -> AsyncIterator[Sample]:
    iterator = aiter(source)
    try:
        async for item in iterator:
            yield memory.batch_with(item)
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()


def _now(source: Iterable[Any], memory: Memory) -> Iterator[Sample]:
    iterator = iter(source)
    try:
        for item in iterator:
            yield memory.batch_with(item)
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


class Memory:
    """What is replayed; a pure function of the samples and the seed. Arguments as for `replay`."""

    def __init__(
        self, *, window: int, batch: int | None, keep: Keep, fill: Fill, empty_at_cut: bool, seed: int
    ) -> None:
        if window < 1:
            raise ConfigurationError(f"window is a number of frames from 1, not {window}")
        if batch is not None and not 1 <= batch <= window:
            raise ConfigurationError(f"batch is a number of frames from 1 to window={window}, not {batch}")
        if keep not in ("recent", "reservoir"):
            raise ConfigurationError(f'keep must be "recent" or "reservoir", not {keep!r}')
        if fill not in ("repeat", "grow"):
            raise ConfigurationError(f'fill must be "repeat" or "grow", not {fill!r}')
        self._room = window - 1
        self._size = window if batch is None else batch
        self._draw = batch is not None
        self._keep = keep
        self._fill = fill
        self._empty_at_cut = empty_at_cut
        self._random = random.Random(seed)
        self._past: list[tuple[Any, Any]] = []  # (input, target)
        self._seen = 0  # labelled frames since it was empty

    def batch_with(self, item: Any) -> Sample:
        """The batch whose newest frame is ``item``, which is remembered from then on if it has a target."""
        sample = item if isinstance(item, Sample) else Sample(item)
        if sample.target is LATER:
            raise ConfigurationError(
                "replay needs each target with its frame: yield Sample(x, target=None) to predict now, and "
                "Sample(x, target) once the target is known"
            )
        if isinstance(sample.input, InputError):
            return sample
        if sample.cut and self._empty_at_cut:
            self._past.clear()
            self._seen = 0
        chosen = [*self._others(), (sample.input, sample.target)]
        if self._fill == "repeat" and len(chosen) < self._size:
            times = -(-self._size // len(chosen))
            chosen = (chosen * times)[-self._size :]  # the newest stays last
        try:
            x = joined([x for x, _ in chosen], numbers=False)
            y = None if sample.target is None else joined([y for _, y in chosen], numbers=True)
        except (RuntimeError, ValueError, TypeError) as error:
            refused = InputError(f"the frame cannot be put beside earlier ones in one batch: {error}", key=sample.key)
            return replace(sample, input=refused, target=None)
        if sample.target is not None:
            self._remember(sample.input, sample.target)
        return replace(sample, input=x, target=y)

    def _others(self) -> Sequence[tuple[Any, Any]]:
        """Those that go before the newest, the oldest first."""
        number = self._size - 1
        if not self._draw or number >= len(self._past):
            return self._past
        return [self._past[at] for at in sorted(self._random.sample(range(len(self._past)), number))]

    def _remember(self, x: Any, y: Any) -> None:
        self._seen += 1
        if len(self._past) < self._room:
            self._past.append((x, y))
        elif self._keep == "recent":
            if self._room:
                self._past.append((x, y))
                del self._past[0]
        else:
            at = self._random.randrange(self._seen)  # it stays with probability room / seen (algorithm R)
            if at < self._room:
                self._past[at] = (x, y)


def joined(values: Sequence[Any], *, numbers: bool) -> Any:
    """Pytrees of one structure as one: tensors along dim 0, those without dims stacked; other leaves the newest's.

    Args:
        values: the newest last.
        numbers: plain numbers are stacked too.
    """
    if all(isinstance(value, torch.Tensor) for value in values):
        return _rows(values)
    flat = [pytree.tree_flatten(value) for value in values]
    leaves, spec = flat[-1]
    if any(other != spec for _, other in flat):
        raise ValueError("they differ in structure")
    return pytree.tree_unflatten(
        [
            _rows([others[at] for others, _ in flat]) if _stackable(leaf, numbers) else leaf
            for at, leaf in enumerate(leaves)
        ],
        spec,
    )


def _stackable(leaf: Any, numbers: bool) -> bool:
    return isinstance(leaf, torch.Tensor) or hasattr(leaf, "__array__") or (numbers and isinstance(leaf, int | float))


def _rows(leaves: Sequence[Any]) -> torch.Tensor:
    # leaves: (n, …) each, or () each -> (sum of n, …), or (len(leaves),)
    tensors = [torch.as_tensor(leaf) for leaf in leaves]
    return torch.cat([tensor[None] if tensor.dim() == 0 else tensor for tensor in tensors])

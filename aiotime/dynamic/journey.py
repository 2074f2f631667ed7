"""Journey: an instance's coroutine, from its forward to its outcome.

    forward ▸ every call answered? ▸ loss ▸ every result used? ▸ the way back ▸ updates that it made due ▸ outcome

Whatever raises, here or in the user's code, ends this instance alone, and only once none of its calls is left.
"""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING, Any

import torch

from aiotime.devices.base import stage_failed
from aiotime.dynamic.instance import CURRENT, Instance
from aiotime.errors import AiotimeError, ConfigurationError, FrameCancelled, FrameError, InputError, StageError
from aiotime.frame import LATER
from aiotime.learning.boundary import detached
from aiotime.observe.log import get_logger

if TYPE_CHECKING:
    from aiotime.dynamic.entry import Entry
    from aiotime.dynamic.floor import Floor
    from aiotime.dynamic.station import Station

log = get_logger()


async def live(floor: Floor, entry: Entry, instance: Instance) -> None:
    """The task of one instance; it settles its frame, however it ends."""
    error: BaseException | None = None
    entry.begun = True
    try:
        await _pass(floor, entry, instance)
    except BaseException as cause:
        error = _as_failure(floor, entry, cause)
        instance.abandon()
        await _until_over(instance)
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise
    finally:
        instance.forget()
        floor.entries.discard(entry)
        entry.session.settle(entry, error)


async def _pass(floor: Floor, entry: Entry, instance: Instance) -> None:
    tail, lesson = entry.tail, instance.lesson
    assert tail is not None
    payload, tail.value = tail.value, None
    if entry.target is LATER:
        raise InputError(
            f"instance {entry.index} was refused: a network takes no late targets; hand in the sample when its "
            "target is known",
            frame=entry.index,
            key=entry.key,
        )
    if floor.predecessor is not None:  # its last jobs may still use the modules
        await floor.predecessor.close()
        floor.predecessor = None
    if entry.session.ready is not None:
        await asyncio.shield(entry.session.ready)  # others wait for it, too
    instance.check()
    CURRENT.set(instance)
    output = await floor.network.forward(payload)
    del payload
    unfinished = instance.unfinished()
    if unfinished is not None:
        raise unfinished
    if lesson is None:
        entry.value = output
        return
    instance.closed = True
    with lesson.autocast(torch.device("cpu")):
        loss = lesson.loss_value(output, entry.target, frame=entry.index, key=entry.key)
    entry.loss = float(loss.detach())
    entry.value = detached(output)
    del output
    roots = instance.roots(loss)
    if lesson.unused != "ignore":
        _check_used(floor, entry, instance)
    instance.retrace(loss, roots, lesson.loss_scale())
    del loss, roots
    await _until_over(instance)
    if lesson.per_instance:  # also where it failed on the way back: what it sent until then is in the sums
        for station in instance.touched:
            if station.instance_done():
                _update_at(floor, station, instance)
        await _until_over(instance)
    if instance.error is not None:
        raise instance.error
    for stage in dict.fromkeys(station.stage for station in instance.touched):
        averaging = floor.averaging.get(stage)
        if averaging is not None:
            averaging.look()


def _update_at(floor: Floor, station: Station, instance: Instance) -> None:
    """Have a station update; the instance that made the update due waits for it."""

    def then(_: Any, __: Any, error: BaseException | None) -> None:
        if error is not None and instance.error is None:
            instance.error = stage_failed(station.back, instance.entry, error.__cause__ or error)
        instance.settled()

    instance.settling += 1
    floor.act(station, station.update, then)


def _check_used(floor: Floor, entry: Entry, instance: Instance) -> None:
    assert instance.lesson is not None
    for stage in sorted(instance.unused()):
        said = floor.unused.get(stage, 0)
        floor.unused[stage] = said + 1
        what = (
            f"instance {entry.index} called stage {stage!r} and used its result neither for another call nor for "
            "the loss, so nothing is learned from that call"
        )
        if instance.lesson.unused == "raise":
            raise StageError(what, stage=stage, frame=entry.index, key=entry.key)
        if not said:
            log.warning("dynamic.unused", network=floor.name, stage=stage, instance=entry.index)
            warnings.warn(f'{what}. Said once; unused="raise" or "ignore" of learn', stacklevel=2)


async def _until_over(instance: Instance) -> None:
    """Its calls must end whatever happens to this task: other instances' rows are in the same batches."""
    while instance.calls or instance.settling:
        try:
            await instance.all_over()
        except asyncio.CancelledError:
            pass


def _as_failure(floor: Floor, entry: Entry, cause: BaseException) -> BaseException:
    """What the run is told of an exception in an instance."""
    index, key = entry.index, entry.key
    if isinstance(cause, BaseExceptionGroup):  # of a TaskGroup in forward: what went wrong first, not that it did
        cause = _first(cause.subgroup(FrameError) or cause)
    if floor.error is not None and isinstance(cause, FrameCancelled | asyncio.CancelledError):
        return floor.error  # that is why it was cancelled
    if isinstance(cause, FrameError):
        cause.frame, cause.key = index, key
        return cause
    if isinstance(cause, AiotimeError) and not isinstance(cause, ConfigurationError):
        return cause
    if isinstance(cause, asyncio.CancelledError) and entry.cancelled:
        return FrameCancelled(f"instance {index} was cancelled", frame=index, key=key)
    said = f"the network failed at instance {index}: {type(cause).__name__}: {cause}"
    if isinstance(cause, RuntimeError) and "inplace" in str(cause).lower().replace("-", ""):
        said += (
            " (what a stage returns shares its memory with other instances of the batch and cannot be changed in "
            "place: write h = h + 1, masked_fill, torch.where)"
        )
    error = StageError(said, frame=index, key=key)
    error.__cause__ = cause
    return error


def _first(error: BaseException) -> BaseException:
    """Of the errors in a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

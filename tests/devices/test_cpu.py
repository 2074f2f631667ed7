"""Tests of aiotime.devices.cpu: intra-op threads per worker, inference mode, measuring, lending."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import torch

from aiotime.devices import CpuDevice
from aiotime.devices.base import Completions, Pending, Work
from aiotime.errors import ConfigurationError, StageError
from aiotime.frame import Frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Settle


class Nobody:
    def settled(self, frame: Frame) -> None: ...


async def once(device: CpuDevice, fn: Callable[[Any], Any], settle: Settle, *, grad: bool = False) -> Pending:
    """The pending of one job on a stream of ``device``."""
    done: list[Pending] = []
    stream = device.open(Completions(asyncio.get_running_loop(), done.append))
    work = Work(fn, stage="s", index=0, grad=grad)
    stream.bind(work)
    stream.launch(work, Frame(Nobody(), 0, Pending(torch.ones(2), done=True), 0.0), last=True)
    stream.ring()
    await settle(until=lambda: done)
    stream.close()
    await stream.join()
    return done[0]


@pytest.mark.asyncio
@pytest.mark.parametrize("threads", [1, 2])
async def test_each_worker_has_its_own_number_of_threads(settle: Settle, threads: int) -> None:
    """The number of intra-op threads is the worker's own; the loop's thread keeps its number."""
    before = torch.get_num_threads()
    pending = await once(CpuDevice(0, threads=threads), lambda x: torch.get_num_threads(), settle)
    assert pending.value == threads
    assert torch.get_num_threads() == before


@pytest.mark.asyncio
async def test_inference_mode_unless_autograd_is_wanted(settle: Settle) -> None:
    """Jobs run in inference mode; work with grad=True records."""
    weight = torch.ones(2, requires_grad=True)
    plain = await once(CpuDevice(), lambda x: (x * weight, torch.is_inference_mode_enabled()), settle)
    assert plain.value[1]
    assert not plain.value[0].requires_grad
    recorded = await once(CpuDevice(), lambda x: x * weight, settle, grad=True)
    assert recorded.value.requires_grad
    recorded.value.sum().backward()
    assert weight.grad is not None


def test_measure_runs_on_a_thread_like_the_real_ones() -> None:
    """A measurement uses the device's threads and inference mode, and returns seconds and the result."""
    before = torch.get_num_threads()
    seconds, (threads, inference) = CpuDevice(0, threads=2).measure(
        lambda x: (torch.get_num_threads(), torch.is_inference_mode_enabled()), 1, seconds=0.001
    )
    assert seconds > 0.0
    assert (threads, inference) == (2, True)
    assert torch.get_num_threads() == before


def test_measure_raises_what_the_function_raises() -> None:
    """An error in the measured function reaches the caller."""
    with pytest.raises(ZeroDivisionError):
        CpuDevice().measure(lambda x: 1 / x, 0)


@pytest.mark.asyncio
async def test_who_may_run_whose_jobs() -> None:
    """A stream runs another's jobs only where they would run the same: one worker each, as many threads."""
    completions = Completions(asyncio.get_running_loop(), lambda pending: None)
    one, other = CpuDevice(0).open(completions), CpuDevice(1).open(completions)
    assert one.can_lend_to(other)
    assert not one.can_lend_to(one)
    assert not one.can_lend_to(CpuDevice(2, threads=2).open(completions))
    assert not one.can_lend_to(CpuDevice(2).open(completions, workers=2))


def test_nonsense_is_refused() -> None:
    """A worker needs at least one thread."""
    with pytest.raises(ConfigurationError, match="threads=0"):
        CpuDevice(3, threads=0)


def test_modules_stay_in_host_memory() -> None:
    """Placing a module on a CPU worker and moving values between workers costs nothing."""
    module = torch.nn.Linear(1, 1)
    assert CpuDevice().place(module) is module
    assert CpuDevice().transfer_seconds(10**9, CpuDevice(1)) == 0.0
    assert (CpuDevice(1).name, CpuDevice(1, threads=2).speed_class) == ("cpu:1", "cpu×2")


@pytest.mark.asyncio
async def test_an_upstream_event_is_waited_for(settle: Settle) -> None:
    """A value that another device is still making is used only after its event has passed."""
    waited: list[str] = []

    class Passed:
        def query(self) -> bool:
            return bool(waited)

        def synchronize(self) -> None:
            waited.append("waited")

    done: list[Pending] = []
    stream = CpuDevice().open(Completions(asyncio.get_running_loop(), done.append))
    work = Work(lambda x: (x, list(waited)), stage="s", index=0)
    stream.bind(work)
    up = Pending(1, done=True)
    up.event = Passed()
    stream.launch(work, Frame(Nobody(), 0, up, 0.0), last=True)
    stream.ring()
    await settle(until=lambda: done)
    assert done[0].value == (1, ["waited"])
    stream.close()
    await stream.join()


@pytest.mark.asyncio
async def test_torch_errors_name_the_stage(settle: Settle) -> None:
    """A shape mismatch deep in torch is the frame's StageError."""
    pending = await once(CpuDevice(), lambda x: x @ torch.ones(3, 3), settle)
    assert isinstance(pending.error, StageError)
    assert "stage 's' failed at frame 0: RuntimeError" in str(pending.error)

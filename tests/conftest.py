"""What every test runs under: both event loops, and a check afterwards that nothing was left behind.

    threads counted ─▶ loop opens ─▶ TEST ─▶ no task, no loop error left ─▶ loop closes ─▶ no thread left
                          └─ blocking calls inside aiotime raise

An async test (``@pytest.mark.asyncio``) runs once on asyncio and once on uvloop; one that is about a single loop
says ``@pytest.mark.asyncio(loop_factories=["asyncio"])``. A test that provokes an unhandled loop error asserts on
the fixture `loop_errors` and clears it. One that may block the loop inside aiotime says ``@pytest.mark.may_block``.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio
from blockbuster import BlockBuster
from hypothesis import HealthCheck, settings

try:
    import uvloop
except ImportError:  # platforms without it run on asyncio alone
    uvloop = None  # type: ignore[assignment, unused-ignore]

GRACE_TURNS = 100  # turns of the loop in which a task that is ending may end
GRACE_SECONDS = 5.0  # in which a thread that was told to end may end; joined, not slept
PATIENCE_SECONDS = 20.0  # after which `settle(until=...)` says that it never came true

# there are as many test processes as cores: threads of torch in each would only wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # it would leave its threads behind

settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

threads_before = pytest.StashKey[set[threading.Thread]]()


class Settle(Protocol):
    """The type of the fixture `settle`."""

    async def __call__(self, turns: int = ..., *, until: Callable[[], object] | None = ...) -> None:
        """Let everything on the loop block; see the fixture."""


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Each async test runs on every loop we support."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if uvloop is not None:
        factories["uvloop"] = uvloop.new_event_loop
    return factories


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/cuda needs a GPU, whether or not it says so."""
    for item in items:
        if "cuda" in item.path.parent.parts[-1:] and item.get_closest_marker("cuda") is None:
            item.add_marker(pytest.mark.cuda)


def pytest_collection_finish() -> None:
    """Set what the imports made apart, so that the collections after each test look at that test alone."""
    gc.collect()
    gc.freeze()


@functools.cache
def cuda_devices() -> int:
    """How many GPUs can be used."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old or absent driver warns; the count says it all
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs more GPUs than there are; fail instead where GPUs were promised (``tox -e cuda``)."""
    marker = item.get_closest_marker("cuda")
    if marker is None:
        return
    needed, present = int(marker.kwargs.get("devices", 1)), cuda_devices()
    if present < needed:
        reason = f"needs {needed} CUDA device(s), {present} usable here"
        if os.environ.get("AIOTIME_REQUIRE_CUDA"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """After the loop is closed (it joins its own executor): no thread of this test may live on."""
    result = yield
    before = item.stash.get(threads_before, None)
    if before is not None and (left := lasting_threads(before)):
        pytest.fail("threads left behind:\n" + "\n".join(map(describe_thread, left)), pytrace=False)
    return result


def lasting_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """The non-daemon threads that are not in ``before`` and do not end within the grace."""
    new = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in new:
        thread.join(GRACE_SECONDS / len(new))
    return [thread for thread in new if thread.is_alive()]


def describe_thread(thread: threading.Thread) -> str:
    """Name and stack of a living thread."""
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread.name}:\n" + "".join(traceback.format_stack(frame) if frame is not None else ["  (ended)\n"])


def describe_task(task: asyncio.Task[Any]) -> str:
    """Name and current line of a task."""
    stack = task.get_stack(limit=1)
    where = f"{stack[-1].f_code.co_filename}:{stack[-1].f_lineno}" if stack else "not started"
    return f"  {task.get_name()} at {where}"


@pytest_asyncio.fixture
async def loop_errors() -> AsyncIterator[list[dict[str, Any]]]:
    """What reached the loop's exception handler so far; a test that provokes one asserts on it and clears it."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
    yield errors


@pytest_asyncio.fixture
async def quiet_loop(loop_errors: list[dict[str, Any]]) -> AsyncIterator[None]:
    """Afterwards no task but this fixture's own lives, and no error reached the loop's exception handler."""
    yield
    gc.collect()  # finalizers of what the test dropped speak now, not in a later test
    for _ in range(GRACE_TURNS):
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if not left:
            break
        await asyncio.sleep(0)
    if left:
        pytest.fail("tasks left behind:\n" + "\n".join(sorted(map(describe_task, left))), pytrace=False)
    gc.collect()  # a task that ended just now may hold an error nobody retrieved
    await asyncio.sleep(0)
    if loop_errors:
        shown = (f"  {context['message']}: {context.get('exception')!r}" for context in loop_errors)
        pytest.fail("errors nobody handled on the loop:\n" + "\n".join(shown), pytrace=False)


@functools.cache
def blocking_calls() -> BlockBuster:
    """Raises where code of aiotime, or anything it calls, blocks a running loop."""
    return BlockBuster("aiotime")


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test under the checks of this file."""
    request.node.stash[threads_before] = set(threading.enumerate())
    if not pytest_asyncio.is_async_test(request.node):
        yield
        gc.collect()
        return
    request.getfixturevalue("quiet_loop")  # set up before, so checked after, the test's own fixtures
    if request.node.get_closest_marker("may_block") is not None:
        yield
        return
    blocking_calls().activate()
    try:
        yield
    finally:
        blocking_calls().deactivate()


@pytest.fixture
def settle() -> Settle:
    """A call that lets everything on the loop run until it blocks; no clock is involved.

    ``await settle()`` turns the loop a fixed number of times. ``await settle(until=predicate)`` is for what other
    threads bring about: it turns the loop until the predicate holds, and fails when that does not come about.
    """

    async def settle(turns: int = 100, *, until: Callable[[], object] | None = None) -> None:
        if until is None:
            for _ in range(turns):
                await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        limit = loop.time() + PATIENCE_SECONDS
        while not until():
            if loop.time() > limit:
                pytest.fail(f"did not come true within {PATIENCE_SECONDS} s: {until}")
            await asyncio.sleep(0)

    return settle


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where compiled packages are kept, each compiled once a session; skips where there is no C++ compiler."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("there is no C++ compiler")
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "packages"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIOTIME_CACHE", str(folder))
        yield folder

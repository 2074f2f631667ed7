"""The checks that follow every test: each is seen to fail here, once, on a toy test that deserves it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import aiotime

ROOT = Path(__file__).parent.parent

TOY = """
import asyncio, threading
from pathlib import Path
import pytest, pytest_asyncio
import aiotime

seen = []
source = "import time\\ndef nap(): time.sleep(0.001)\\n"
namespace = {}
exec(compile(source, str(Path(aiotime.__path__[0]) / "toy.py"), "exec"), namespace)


@pytest.mark.asyncio
async def test_clean():
    seen.append(type(asyncio.get_running_loop()).__module__.split(".")[0])
    await asyncio.to_thread(int)


def test_clean_both_loops():
    assert sorted(seen) == ["asyncio", "uvloop"]


@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_clean_one_loop():
    assert type(asyncio.get_running_loop()).__module__ == "uvloop"


@pytest.mark.asyncio
async def test_clean_ending_task():
    asyncio.get_running_loop().create_task(asyncio.sleep(0), name="ending")


def test_clean_ending_thread():
    gate = threading.Event()
    threading.Thread(target=gate.wait, args=(0.05,)).start()


@pytest.mark.asyncio
async def test_clean_error_that_was_looked_at(loop_errors):
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)
    assert [type(e["exception"]) for e in loop_errors] == [ZeroDivisionError]
    loop_errors.clear()


@pytest_asyncio.fixture
async def worker():
    task = asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="worker")
    yield
    task.cancel()


@pytest.mark.asyncio
async def test_clean_fixture_ends_before_the_check(worker):
    pass


@pytest.mark.asyncio
@pytest.mark.may_block
async def test_clean_may_block():
    namespace["nap"]()


@pytest.mark.asyncio
async def test_clean_settle(settle):
    ready, got = asyncio.Event(), []
    async def wait():
        await ready.wait()
        got.append(1)
    task = asyncio.get_running_loop().create_task(wait())
    await settle()
    assert got == [] and not task.done()
    thread = threading.Thread(target=asyncio.get_running_loop().call_soon_threadsafe, args=(ready.set,))
    thread.start()
    await settle(until=lambda: got)
    assert got == [1]


@pytest.mark.asyncio
async def test_bad_task():
    seen.append(asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="left:over"))


@pytest.mark.asyncio
async def test_bad_loop_error():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_bad_error_nobody_retrieved():
    async def fail():
        raise ValueError("lost")
    asyncio.get_running_loop().create_task(fail(), name="lost")
    await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_bad_blocking():
    namespace["nap"]()


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_bad_never_awaited():
    asyncio.sleep(1)


def test_bad_thread():
    global keep
    keep = threading.Event()
    threading.Thread(target=keep.wait, name="left-over").start()


def test_clean_thread_ends_after_all():
    keep.set()


@pytest.mark.cuda(devices=1000)
def test_skipped():
    raise AssertionError
"""


@pytest.fixture
def toy(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with our configuration, our conftest.py (with less grace) and the toy tests.

    They run in a process of their own. A test with `pytester` must not import torch: pytester takes what was imported
    meanwhile out of ``sys.modules`` again, and a torch that is imported twice crashes the process.
    """
    tests = pytester.mkdir("tests")
    shutil.copy(ROOT / "pyproject.toml", pytester.path)
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    (tests / "conftest.py").write_text(conftest.replace("GRACE_SECONDS = 5.0", "GRACE_SECONDS = 0.5"))
    (tests / "test_toy.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(Path(aiotime.__path__[0]).parent))
    monkeypatch.delenv("AIOTIME_REQUIRE_CUDA", raising=False)
    return pytester


def test_clean_tests_pass(toy: pytest.Pytester) -> None:
    """What ends in time, on either loop, is no leak."""
    result = toy.runpytest_subprocess("-k", "clean and not after_all", timeout=50)
    result.assert_outcomes(passed=15, deselected=12)


def test_leaks_fail(toy: pytest.Pytester) -> None:
    """A task, a loop error, a lost error, a blocked loop, a forgotten await and a thread each fail their own test."""
    result = toy.runpytest_subprocess("-k", "bad or after_all", timeout=50)
    outcomes = result.parseoutcomes()
    # what happens inside the test fails it, what shows afterwards is an error of its teardown
    assert (outcomes["failed"], outcomes["errors"]) == (3, 7), result.stdout.str()
    result.stdout.fnmatch_lines_random(
        [
            "*tasks left behind:*",
            "*left:over at *",
            "*errors nobody handled on the loop:*",
            "*ZeroDivisionError*",
            "*ValueError('lost')*",
            "*BlockingError: Blocking call to time.sleep*",
            "*was never awaited*",
            "*threads left behind:*",
            "*left-over:*",
        ]
    )


def test_a_missing_gpu_is_a_skip_with_its_reason(toy: pytest.Pytester) -> None:
    """Where GPUs were not promised, their tests are skipped and say why."""
    result = toy.runpytest_subprocess("-m", "cuda", timeout=50)
    result.assert_outcomes(skipped=1, deselected=26)
    result.stdout.fnmatch_lines(["SKIPPED*needs 1000 CUDA device(s), * usable here"])


def test_a_promised_gpu_that_is_missing_is_a_failure(toy: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tox -e cuda`` on a machine without GPUs must not pass by skipping everything."""
    monkeypatch.setenv("AIOTIME_REQUIRE_CUDA", "1")
    result = toy.runpytest_subprocess("-m", "cuda", timeout=50)
    result.assert_outcomes(errors=1, deselected=26)

"""The learning service of examples/11 under a real uvicorn, asked and taught by real clients over loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch

import aiotime

SERVICE = Path(__file__).parent.parent / "examples" / "11_learning_service.py"
PATIENCE = 30.0  # seconds
WAITING = 256  # as the example says

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])  # the server runs on uvloop, whatever the client does


@contextmanager
def started(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(its address, the process); killed if it does not end by itself."""
    environment = os.environ | {"PYTHONPATH": str(Path(aiotime.__file__).parent.parent)}
    command = [sys.executable, "-W", "error", str(SERVICE), "--port", "0", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=environment
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), f"it ended with {process.wait()}"
            yield url, process
        finally:
            if process.poll() is None:
                process.kill()


def end(process: subprocess.Popen[str]) -> str:
    """SIGTERM, and the last line it printed; it must end without an error or a warning."""
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert err == ""
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn raises the signal again when it is done
    return out.splitlines()[-1]


@pytest_asyncio.fixture(loop_scope="function")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client that waits patiently."""
    async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as client:
        yield client


def bars(number: int) -> list[list[float]]:
    """Class c has a bright row c, on noise."""
    generator = torch.Generator().manual_seed(number)
    frame = torch.rand(8, 8, generator=generator)
    frame[number % 8] += 2
    rows: list[list[float]] = frame.tolist()
    return rows


async def post(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to what must be accepted."""
    answer = await client.post(url, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def teach(client: httpx.AsyncClient, url: str, numbers: range) -> int:
    """Ask for all, then label them in another order; how many were named rightly before their label came."""
    answers = await asyncio.gather(
        *(post(client, f"{url}/predict", {"frame": bars(at), "key": f"frame {at}"}) for at in numbers)
    )
    named = {answer["key"]: answer["class"] for answer in answers}
    for at in reversed(numbers):
        assert (await post(client, f"{url}/label", {"key": f"frame {at}", "label": at % 8}))["loss"] > 0
    return sum(named[f"frame {at}"] == at % 8 for at in numbers)


async def test_it_learns_from_labels_that_come_late(client: httpx.AsyncClient, tmp_path: Path) -> None:
    """Nine rounds of 40 frames, labelled after all were predicted: chance at first, nearly all right at the end.

    With ``--keep`` the next process names at once what the first one learned.
    """
    keep = ["--keep", str(tmp_path / "learned")]
    with started(*keep) as (url, process):
        rounds = [await teach(client, url, range(40 * at, 40 * at + 40)) for at in range(9)]
        score = (await client.get(f"{url}/score")).json()
        assert end(process) == "labels learned from: 360"
    assert rounds[0] <= 15
    assert rounds[-1] >= 36
    assert score["labels"] == 360 and score["right"] > 0.8
    with started(*keep) as (url, process):
        assert await teach(client, url, range(1000, 1040)) >= 34
        assert end(process) == "labels learned from: 40"


async def test_what_does_not_fit_has_its_status(client: httpx.AsyncClient) -> None:
    """An unknown key, a second label and one that was given up are 404, a wrong frame or label 422."""
    with started() as (url, process):
        for at in range(WAITING + 1):
            await post(client, f"{url}/predict", {"frame": bars(at), "key": f"frame {at}"})
        for key in ("nobody", "frame 0"):
            refused = await client.post(f"{url}/label", json={"key": key, "label": 1})
            assert (refused.status_code, refused.json()["error"]) == (404, "FeedbackError")
        await post(client, f"{url}/label", {"key": "frame 1", "label": 1})
        assert (await client.post(f"{url}/label", json={"key": "frame 1", "label": 1})).status_code == 404
        assert (await client.post(f"{url}/label", json={"key": "frame 2", "label": 11})).status_code == 422
        assert (await client.post(f"{url}/predict", json={"key": "x", "frame": [[1.0]]})).status_code == 422
        assert end(process) == "labels learned from: 1"

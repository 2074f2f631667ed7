"""The example service under a real uvicorn in a process of its own, asked by real clients over loopback.

server    examples/03_service.py as it is, one process for all tests that leave it running
gated     the same service around a stage that waits, frame by frame, for a line on stdin that says what to do
doomed    another gated one, for a single test that ends it
"""

from __future__ import annotations

import asyncio
import collections
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
import websockets
from websockets.asyncio.client import ClientConnection, connect

import aiotime

SERVICE = Path(__file__).parent.parent / "examples" / "03_service.py"
PATIENCE = 20.0  # seconds after which something that was asked for again and again should have come true
DEPTH = 2  # of the gated pipeline: its budget, as it has one stage
RAW = {"content-type": "application/octet-stream"}

GATED = f"""
import importlib, sys, torch
import aiotime

sys.path.insert(0, sys.argv[1])
service = importlib.import_module("03_service")

def gate(frame):
    order = sys.stdin.readline().strip()
    if order == "fail":
        raise RuntimeError("told to fail")
    return torch.zeros(1_000_000) if order == "much" else frame[..., :1]

pipeline = aiotime.Pipeline.from_stages([aiotime.Stage(gate, device="cpu:0")], depth={DEPTH})
aiotime.run(service.serve(pipeline))
"""

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])  # the server runs on uvloop, whatever the client does


class Server:
    """A running service."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.url = process.stdout.readline().strip()  # it listens from here on
        assert self.url.startswith("http://127.0.0.1:"), f"it ended with {process.wait()}"

    def let_through(self, frames: int = 1, *, order: str = "") -> None:
        """Open the gate for some frames; ``order``: they "fail", or become "much"."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n" * frames)
        self.process.stdin.flush()

    def end(self) -> list[str]:
        """SIGTERM, and what it printed after its address. It must end by itself, without an error or a warning."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> list[str]:
        """What it printed after its address."""
        out, err = self.process.communicate(timeout=PATIENCE)
        assert (self.process.returncode, err) == (0, "")
        return out.splitlines()


@contextmanager
def start(*arguments: str) -> Iterator[Server]:
    """A service as a process; killed if it does not end by itself."""
    environment = os.environ | {"PYTHONPATH": str(Path(aiotime.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-W", "error", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
    ) as process:
        try:
            yield Server(process)
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The example as it is."""
    with start(str(SERVICE), "--port", "0") as running:
        yield running
        running.end()


@pytest.fixture(scope="module")
def gated() -> Iterator[Server]:
    """The service around a gate; a test leaves it with nothing in flight and no line unread."""
    with start("-c", GATED, str(SERVICE.parent)) as running:
        yield running
        running.end()


@pytest.fixture
def doomed() -> Iterator[Server]:
    """The service around a gate, to be ended by the test."""
    with start("-c", GATED, str(SERVICE.parent)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="function")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client with room for everybody at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=PATIENCE, trust_env=False) as client:
        yield client


@asynccontextmanager
async def stream(server: Server) -> AsyncIterator[ClientConnection]:
    """A WebSocket to /stream."""
    url = server.url.replace("http", "ws") + "/stream"
    # without max_queue=None a client that leaves with answers unread does not read the server's goodbye either
    async with connect(url, compression=None, proxy=None, max_size=None, max_queue=None) as socket:
        yield socket


async def until(ask: Callable[[], Awaitable[Any]], fulfilled: Callable[[Any], object]) -> Any:
    """Ask again and again until the answer is the wanted one."""
    limit = asyncio.get_running_loop().time() + PATIENCE
    while not fulfilled(answer := await ask()):
        assert asyncio.get_running_loop().time() < limit, f"did not come about; the last answer: {answer}"
    return answer


def stats_of(server: Server, client: httpx.AsyncClient) -> Callable[[], Awaitable[Any]]:
    """A question for `until`."""

    async def ask() -> Any:
        return (await client.get(f"{server.url}/stats")).json()

    return ask


def number_frame(number: float) -> bytes:
    """A raw frame that holds one number everywhere."""
    return torch.full((1, 1, 8, 8), float(number)).numpy().tobytes()


def make_model() -> torch.nn.Sequential:
    """The model that the example serves."""
    spec = importlib.util.spec_from_file_location("example_03_service", SERVICE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: torch.nn.Sequential = module.make_model()
    return model.eval()


async def test_each_of_200_callers_gets_the_answer_to_its_own_frame(server: Server, client: httpx.AsyncClient) -> None:
    """Half of them send JSON and half raw bytes, all at once; every answer is the model's own."""
    frames = torch.rand(200, 1, 1, 8, 8)

    async def ask(number: int) -> httpx.Response:
        frame = frames[number]
        if number % 2:
            return await client.post(f"{server.url}/predict", content=frame.numpy().tobytes(), headers=RAW)
        return await client.post(f"{server.url}/predict", json={"frame": frame.tolist(), "key": f"caller {number}"})

    answers = await asyncio.gather(*map(ask, range(200)))
    assert {answer.status_code for answer in answers} == {200}
    assert [answer.json()["key"] for answer in answers[::2]] == [f"caller {number}" for number in range(0, 200, 2)]
    scores = torch.tensor([answer.json()["scores"] for answer in answers])
    with torch.inference_mode():
        torch.testing.assert_close(scores, make_model()(frames.flatten(0, 1)))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"json": {"frame": [[1.0, 2.0]]}}, "expected a float32 tensor of shape (1, 1, 8, 8), got a float32 tensor of"),
        ({"json": {"frame": [[1.0, 2.0], [3.0]]}}, "got a list of"),
        ({"json": {"image": []}}, "got"),
        ({"content": b"no JSON"}, "got"),
        ({"content": b"123", "headers": RAW}, "got a bytes"),
        ({"content": number_frame(1)[:-4], "headers": RAW}, "got a float32 tensor of shape (63,)"),
        ({"content": number_frame(float("nan")), "headers": RAW}, "expected finite values"),
        ({"content": number_frame(1), "headers": RAW, "params": {"deadline": "-1"}}, "a deadline is a positive number"),
    ],
    ids=["shape", "ragged", "key", "json", "bytes", "size", "nan", "deadline"],
)
async def test_a_wrong_request_is_told_what_is_expected(
    server: Server, client: httpx.AsyncClient, body: dict[str, Any], says: str
) -> None:
    """422 with the message of the pipeline's door."""
    answer = await client.post(f"{server.url}/predict", **body)
    assert answer.status_code == 422
    assert says in answer.json()["detail"]


async def test_a_stream_of_300_frames_is_answered_in_order(server: Server, client: httpx.AsyncClient) -> None:
    """Every frame has its answer in its place, with its key, a bad one too; then the server says goodbye."""
    frames = torch.rand(300, 1, 1, 8, 8)

    async def send(socket: ClientConnection) -> None:
        for number, frame in enumerate(frames):
            if number == 150:
                await socket.send(json.dumps({"frame": [1.0], "key": number}))
            elif number % 2:
                await socket.send(frame.numpy().tobytes())
            else:
                await socket.send(json.dumps({"frame": frame.tolist(), "key": number}))
        await socket.send(b"")

    async with stream(server) as socket, asyncio.TaskGroup() as group:
        group.create_task(send(socket))
        answers = [json.loads(message) async for message in socket]
    assert socket.close_code == 1000
    assert [answer["index"] for answer in answers] == list(range(300))
    assert [answer["key"] for answer in answers[::2]] == list(range(0, 300, 2))
    assert "expected a float32 tensor of shape (1, 1, 8, 8)" in answers.pop(150)["error"]
    scores = torch.tensor([answer["scores"] for answer in answers])
    with torch.inference_mode():
        expected = make_model()(torch.cat([frames[:150], frames[151:]]).flatten(0, 1))
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("leave", ["close", "abort"])
async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(
    server: Server, client: httpx.AsyncClient, leave: str
) -> None:
    """With frames on their way and answers unread, politely or not: nothing stays in flight, and others are served."""
    before = (await client.get(f"{server.url}/stats")).json()
    for number in range(5):
        async with stream(server) as socket:
            for _ in range(10 * number):  # at first it leaves without having sent anything
                await socket.send(number_frame(1))
            for _ in range(number):
                await socket.recv()
            if leave == "abort":
                socket.transport.abort()
    after = await until(stats_of(server, client), lambda stats: stats["in_flight"] == stats["waiting"] == 0)
    assert after["frames_in"] - before["frames_in"] <= 100
    assert (await client.post(f"{server.url}/predict", content=number_frame(1), headers=RAW)).status_code == 200


async def test_a_stream_takes_no_more_than_the_pipeline_has_room_for(gated: Server, client: httpx.AsyncClient) -> None:
    """A client that sends 64 MiB to a stage that stands still is stopped by its socket; later all is answered."""
    frame = torch.zeros(128 * 1024).numpy().tobytes()  # half a MiB
    ask = stats_of(gated, client)
    before = await ask()

    async def send(socket: ClientConnection) -> None:
        for _ in range(128):
            await socket.send(frame)
        await socket.send(b"")

    async with stream(gated) as socket, asyncio.TaskGroup() as group:
        sender = group.create_task(send(socket))
        await until(ask, lambda stats: stats["in_flight"] == DEPTH)
        for _ in range(20):  # the loop there turns often enough to take more, if it would
            stats = await ask()
        assert stats["frames_in"] - before["frames_in"] <= DEPTH + 1
        assert not sender.done()
        gated.let_through(128)
        answers = [json.loads(message) async for message in socket]
    assert [answer["index"] for answer in answers] == list(range(128))
    assert (await ask())["frames_out"] - before["frames_out"] == 128


async def test_a_late_and_a_failed_request_have_their_status(gated: Server, client: httpx.AsyncClient) -> None:
    """504 when the deadline passed, 500 when a stage raised; the next caller is served."""
    predict = f"{gated.url}/predict"
    late = await client.post(predict, content=number_frame(1), headers=RAW, params={"deadline": "0.01"})
    assert (late.status_code, late.json()["error"]) == (504, "DeadlineExceeded")
    gated.let_through()  # its job had begun already
    await until(stats_of(gated, client), lambda stats: stats["in_flight"] == 0)
    gated.let_through(order="fail")
    failed = await client.post(predict, content=number_frame(1), headers=RAW)
    assert (failed.status_code, failed.json()["error"]) == (500, "StageError")
    assert "told to fail" in failed.json()["detail"]
    gated.let_through()
    assert (await client.post(predict, content=number_frame(7), headers=RAW)).json()["scores"][0] == 7.0


async def test_draining_answers_what_was_accepted_and_refuses_the_rest(
    doomed: Server, client: httpx.AsyncClient
) -> None:
    """SIGTERM with 30 requests inside, most still at the door: /health and newcomers get 503, the 30 their answers."""
    predict = f"{doomed.url}/predict"
    posts = [
        asyncio.create_task(client.post(predict, content=number_frame(number), headers=RAW)) for number in range(30)
    ]
    await until(stats_of(doomed, client), lambda stats: stats["frames_in"] == 30)
    assert (await client.get(f"{doomed.url}/health")).status_code == 200
    doomed.process.send_signal(signal.SIGTERM)
    health = await until(lambda: client.get(f"{doomed.url}/health"), lambda answer: answer.status_code != 200)
    assert (health.status_code, health.json()) == (503, {"draining": True})
    refused = await client.post(predict, content=number_frame(1), headers=RAW)
    assert (refused.status_code, refused.json()["error"]) == (503, "ClosedError")
    async with stream(doomed) as socket:
        assert "draining" in json.loads(await socket.recv())["error"]
        with pytest.raises(websockets.ConnectionClosedError):
            await socket.recv()
    assert socket.close_code == 1013
    assert not any(post.done() for post in posts)
    doomed.let_through(30)
    answers = await asyncio.gather(*posts)
    assert [answer.status_code for answer in answers] == [200] * 30
    assert [answer.json()["scores"][0] for answer in answers] == list(range(30))
    assert doomed.ended() == ["frames answered: 30"]


async def test_draining_lets_a_stream_finish(doomed: Server, client: httpx.AsyncClient) -> None:
    """SIGTERM with frames of a stream in flight: a slow reader still gets their predictions, then a goodbye (1001)."""
    async with stream(doomed) as socket:
        for number in range(DEPTH):
            await socket.send(number_frame(number))
        ask = stats_of(doomed, client)
        await until(ask, lambda stats: stats["in_flight"] == DEPTH)
        doomed.process.send_signal(signal.SIGTERM)
        await until(lambda: client.get(f"{doomed.url}/health"), lambda answer: answer.status_code == 503)
        socket.transport.pause_reading()  # megabytes, more than the sockets hold: they cannot all be sent before
        doomed.let_through(DEPTH, order="much")
        await until(ask, lambda stats: stats["in_flight"] == 0)
        for _ in range(100):  # it has all the time it would need to stop
            assert (await client.get(f"{doomed.url}/health")).status_code == 503
        socket.transport.resume_reading()
        answers = [json.loads(message) async for message in socket]
    assert [(answer["index"], len(answer["scores"])) for answer in answers] == [(n, 1_000_000) for n in range(DEPTH)]
    assert socket.close_code == 1001
    assert doomed.ended() == [f"frames answered: {DEPTH}"]


async def test_a_goodbye_behind_unanswered_frames_is_no_error(gated: Server, client: httpx.AsyncClient) -> None:
    """20 frames and the closing frame arrive at once: the answers find nobody, and the run ends quietly."""
    async with stream(gated) as socket:
        for number in range(20):
            socket.protocol.send_binary(number_frame(number))
        socket.protocol.send_close(1000)
        socket.transport.write(b"".join(socket.protocol.data_to_send()))
        ask = stats_of(gated, client)
        before = await until(ask, lambda stats: stats["in_flight"] == DEPTH)
        gated.let_through(DEPTH)  # the second is at the gate already when the first finds nobody
        after = await until(ask, lambda stats: stats["in_flight"] == stats["waiting"] == 0)
        # the goodbye is seen by whoever comes first: the reader of the socket, or the first answer
        assert after["frames_out"] - before["frames_out"] in (0, 1)


async def test_sigterm_under_load_loses_no_accepted_request(client: httpx.AsyncClient) -> None:
    """20 callers without pause; every 200 they got is one the service counted, and the other way round."""
    seen: collections.Counter[str] = collections.Counter()
    under_load = asyncio.Event()

    async def call(url: str) -> None:
        while True:
            try:
                answer = await client.post(f"{url}/predict", content=number_frame(1), headers=RAW)
            except httpx.TransportError:
                seen["turned away"] += 1  # it stopped listening before it took this one
                return
            seen[str(answer.status_code)] += 1
            if answer.status_code != 200:
                return
            if seen["200"] == 200:
                under_load.set()

    with start(str(SERVICE), "--port", "0") as running:
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(call(running.url))
            await under_load.wait()
            running.process.send_signal(signal.SIGTERM)
        assert running.ended() == [f"frames answered: {seen['200']}"]
    assert seen["200"] >= 200
    assert seen.keys() <= {"200", "503", "turned away"}

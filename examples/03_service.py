"""A FastAPI service around one pipeline; `python examples/03_service.py --port 8000` and Ctrl-C to end it.

    POST /predict     one frame, one answer; a JSON body {"frame": nested lists, "key": ...} or raw float32 bytes
    WS   /stream      frames in, predictions out, in order; messages as the bodies above; an empty one ends the stream
    GET  /health      200, or 503 while it drains
    GET  /stats       what the pipeline does

An error of aiotime becomes a status (`STATUS`). SIGTERM drains: /health turns to 503 while the socket still listens,
what was accepted is answered, then the server stops and prints how many frames it answered. Needs fastapi, uvicorn
and websockets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from starlette.websockets import WebSocketState

import aiotime
from aiotime.errors import AiotimeError, ConfigurationError, DeadlineExceeded, FrameError, InputError, StageError

EXAMPLE = torch.zeros(1, 1, 8, 8)
STATUS: dict[type[AiotimeError], int] = {  # the first that fits
    InputError: 422,
    ConfigurationError: 422,  # a deadline that is no positive number
    DeadlineExceeded: 504,
    StageError: 500,
    AiotimeError: 503,  # ClosedError: it drains; BrokenError
}
LAST_WORDS = 10  # seconds that clients have to take what is theirs once the pipeline is drained


def make_model() -> torch.nn.Sequential:
    """A small classifier, (1, 1, 8, 8) -> (1, 10); the same at every start."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10)]
    return torch.nn.Sequential(*layers)


def build() -> aiotime.Pipeline:
    """The pipeline that is served. ``"even"`` cuts even so small a model; without it the plan decides."""
    devices = ["cpu:0", "cpu:1"]
    return aiotime.Pipeline(make_model(), example=EXAMPLE, devices=devices, balance="even", check_finite=True)


def read(body: bytes | str, *, raw: bool) -> aiotime.Sample:
    """A body as a sample. What is no tensor goes on as it is: the pipeline's door says what it expected."""
    frame: Any = body
    key = None
    try:
        if raw and isinstance(body, bytes):
            numbers = torch.frombuffer(bytearray(body), dtype=EXAMPLE.dtype)
            frame = numbers.reshape(EXAMPLE.shape) if numbers.numel() == EXAMPLE.numel() else numbers
        else:
            given = json.loads(body)
            frame, key = given["frame"], given.get("key")
            frame = torch.tensor(frame, dtype=EXAMPLE.dtype)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return aiotime.Sample(frame, key=key)


def answer(pred: aiotime.Prediction) -> dict[str, Any]:
    """A prediction as JSON."""
    scores = pred.output.flatten().tolist()
    return {"index": pred.index, "key": pred.key, "scores": scores, "latency_ms": round(pred.latency * 1e3, 3)}


def status_of(error: AiotimeError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status in STATUS.items() if isinstance(error, kind))


def create_app(pipeline: aiotime.Pipeline) -> FastAPI:
    """The service. It opens the pipeline when it starts and drains it when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with pipeline:
            yield
            await drain()
            print(f"frames answered: {pipeline.stats().frames_out}", flush=True)

    async def drain() -> None:
        app.state.draining = True
        await pipeline.drain()
        if app.state.streams:  # drain() waits for the devices; the last predictions may still be on their way out
            await asyncio.wait(app.state.streams, timeout=LAST_WORDS)

    app = FastAPI(title="aiotime example", lifespan=lifespan)
    app.state.draining, app.state.drain, app.state.streams = False, drain, set()

    @app.exception_handler(AiotimeError)
    async def refuse(_request: Request, error: AiotimeError) -> JSONResponse:
        return JSONResponse({"error": type(error).__name__, "detail": str(error)}, status_of(error))

    @app.post("/predict")
    async def predict(request: Request, deadline: float | None = None) -> dict[str, Any]:
        raw = request.headers.get("content-type", "").startswith("application/octet-stream")
        return answer(await pipeline.submit(read(await request.body(), raw=raw), deadline=deadline))

    @app.websocket("/stream")
    async def stream(websocket: WebSocket) -> None:
        async def frames() -> AsyncIterator[aiotime.Sample]:
            """Taken from the socket only when the pipeline has room: a fast client is slowed down by TCP itself."""
            while (message := await websocket.receive())["type"] == "websocket.receive":
                body = message.get("bytes") or message.get("text")
                if not body:
                    return
                yield read(body, raw=isinstance(body, bytes))

        async def send(message: dict[str, Any]) -> None:
            try:
                await websocket.send_json(message)
            except RuntimeError as closed:  # the client's goodbye is there and has not been read yet
                raise WebSocketDisconnect(1006) from closed

        async def report(frame: Any, error: FrameError) -> None:
            """A bad frame is answered in its turn, and the stream goes on."""
            await send({"index": frame.index, "key": frame.key, "error": str(error)})

        await websocket.accept()
        task = asyncio.current_task()
        app.state.streams.add(task)
        try:
            try:
                async with pipeline.run(frames(), on_error=report) as run:
                    async for pred in run:
                        await send(answer(pred))
                code = 1001 if app.state.draining else 1000
            except AiotimeError as error:
                await send({"error": str(error)})
                code = 1013  # try again later
            if websocket.client_state is WebSocketState.CONNECTED:
                await websocket.close(code)
        except WebSocketDisconnect:
            pass  # the client is gone, and the run with it
        finally:
            app.state.streams.discard(task)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"draining": app.state.draining}, 503 if app.state.draining else 200)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return pipeline.stats().to_dict()

    return app


class DrainingServer(uvicorn.Server):
    """uvicorn stops listening at the first signal; this one drains first. Further signals mean what they mean to it."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_WORDS))
        self._app = app
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGINT and SIGTERM."""
        if self._app.state.draining:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._draining = self._loop.create_task(self._drain(), name="drain")

    async def _drain(self) -> None:
        await self._app.state.drain()
        self.should_exit = True


async def serve(pipeline: aiotime.Pipeline, *, port: int = 0) -> None:
    """Listen on loopback until SIGTERM or Ctrl-C; port 0 takes a free one."""
    with socket.create_server(("127.0.0.1", port), backlog=2048) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await DrainingServer(create_app(pipeline)).serve(sockets=[listener])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A FastAPI service around one pipeline.")
    parser.add_argument("--port", type=int, default=8000)
    aiotime.run(serve(build(), port=parser.parse_args().port))

"""A service that learns from labels that come late; `python examples/11_learning_service.py --port 8000`.

    POST /predict    {"frame": 8 x 8 numbers, "key": text} -> {"key", "class"}; the frame then waits for its label
    POST /label      {"key": text, "label": 0..9}          -> {"loss"}, once every stage has learned from it
    GET  /score      how many labels came, and how many of the newest 100 predictions they found right

A label is 404 where no frame with its key waits (unknown, had its label, or given up for newer ones), 422 where it does
not fit. With ``--keep FOLDER`` what was learned (weights and optimizer) is saved at the end and found again at the
start. SIGTERM or Ctrl-C finish what was accepted. Prints how many labels it learned from. Needs fastapi and uvicorn.
"""

from __future__ import annotations

import argparse
import socket
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from torch import nn
from torch.nn.functional import cross_entropy

import aiotime
from aiotime.errors import AiotimeError, FeedbackError, InputError
from aiotime.learning import Delayed

WAITING = 256  # frames that may wait for their labels
Row = Annotated[list[float], Field(min_length=8, max_length=8)]


class Asked(BaseModel):
    """A frame to name."""

    frame: Annotated[list[Row], Field(min_length=8, max_length=8)]
    key: str


class Labelled(BaseModel):
    """What it was."""

    key: str
    label: Annotated[int, Field(ge=0, le=9)]


def build() -> aiotime.Pipeline:
    """A network that knows nothing yet, in two stages."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    learner = Delayed(loss=cross_entropy, optimizer=partial(torch.optim.Adam, lr=3e-3), late=WAITING)
    example, devices = torch.zeros(1, 8, 8), ["cpu:0", "cpu:1"]
    return aiotime.Pipeline(model, example=example, devices=devices, balance=[3, 1], learner=learner)


def create_app(pipeline: aiotime.Pipeline, keep: Path | None = None) -> FastAPI:
    """The service; it opens the pipeline when it starts."""
    found = keep is not None and keep.exists()
    said: OrderedDict[str, int] = OrderedDict()  # key -> class, before the label is known
    right: deque[bool] = deque(maxlen=100)
    labels = 0

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if keep is not None and found:
            await pipeline.restore(keep)
        async with pipeline:
            yield
            await pipeline.drain()
            if keep is not None:
                await pipeline.checkpoint(keep)
        print(f"labels learned from: {labels}", flush=True)

    app = FastAPI(title="aiotime learns", lifespan=lifespan)

    @app.exception_handler(AiotimeError)
    async def refuse(_: Request, error: AiotimeError) -> JSONResponse:
        status = 404 if isinstance(error, FeedbackError) else 422 if isinstance(error, InputError) else 503
        return JSONResponse({"error": type(error).__name__, "detail": str(error)}, status)

    @app.post("/predict")
    async def predict(asked: Asked) -> dict[str, str | int]:
        sample = aiotime.Sample(torch.tensor([asked.frame]), target=aiotime.LATER, key=asked.key)
        said[asked.key] = int((await pipeline.submit(sample)).output.argmax())
        said.move_to_end(asked.key)
        if len(said) > WAITING:
            said.popitem(last=False)
        return {"key": asked.key, "class": said[asked.key]}

    @app.post("/label")
    async def label(given: Labelled) -> dict[str, float]:
        nonlocal labels
        loss = await pipeline.feedback(given.key, torch.tensor([given.label]))
        labels += 1
        right.append(said.pop(given.key, None) == given.label)
        return {"loss": loss}

    @app.get("/score")
    async def score() -> dict[str, float]:
        return {"labels": labels, "right": sum(right) / max(1, len(right))}

    return app


async def serve(pipeline: aiotime.Pipeline, *, port: int = 0, keep: Path | None = None) -> None:
    """Listen on loopback until SIGTERM or Ctrl-C; port 0 takes a free one."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await uvicorn.Server(uvicorn.Config(create_app(pipeline, keep), log_level="warning")).serve(sockets=[listener])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A service that learns from late labels.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--keep", type=Path, help="folder for what was learned")
    arguments = parser.parse_args()
    aiotime.run(serve(build(), port=arguments.port, keep=arguments.keep))

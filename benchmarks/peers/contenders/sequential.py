"""The plain loop: every part called one after the other, as it comes and compiled."""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers.contenders.contender import Contender
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Part, Work

# Of what inductor offers, these were the fastest over all models here; see README.md.
STRONGEST = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN", "freezing": True}


class Sequential(Contender):
    """What everybody writes first; also the loop of the compiled ones below.

    Args:
        threads: intra-op threads of PyTorch.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    def open(self, work: Work) -> None:
        """Nothing but the optimizer, where it learns."""
        torch.set_num_threads(self.threads)
        self._work = work
        self.parts = list(work.whole)
        if work.kind == "learning":
            assert work.optimizer is not None
            self._optimizer = work.optimizer(work.model.parameters())

    def run(self, feed: Feed, sink: Sink) -> None:
        """Call by call."""
        if self._work.kind == "learning":
            self._learn(feed, sink)
            return
        parts, take = self.parts, sink.take
        with torch.inference_mode():
            if len(parts) == 1:
                (only,) = parts
                for value in feed:
                    take(only(value))
                return
            for frame in feed:
                value = frame
                for part in parts:
                    value = part(value)
                take(value)

    def _learn(self, feed: Feed, sink: Sink) -> None:
        (model,) = self.parts
        loss, optimizer = self._work.loss, self._optimizer
        assert loss is not None
        for frame in feed:
            output = model(frame)
            optimizer.zero_grad()
            loss(output).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            sink.take(output.detach())

    def close(self) -> None:
        """Nothing is open."""
        torch.set_num_threads(1)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Of the model itself."""
        return dict(self._work.model.state_dict())


class Compiled(Sequential):
    """torch.compile, with inductor's autotuning."""

    def open(self, work: Work) -> None:
        """Every module is compiled when the first frame comes.

        Frozen weights are constants of the program: only then inductor packs them for its own products of matrices.
        """
        super().open(work)
        learns = work.kind == "learning"
        settings: Any = importlib.import_module("torch._inductor.config")
        settings.freezing = not learns  # of the process; as one of the options below it would come too late for dynamo
        options: dict[str, Any] = STRONGEST | {"freezing": not learns}
        self.parts = [
            torch.compile(part, fullgraph=True, dynamic=False, options=options) if isinstance(part, nn.Module) else part
            for part in work.whole
        ]


class AheadOfTime(Sequential):
    """An AOTInductor package per module, called in the same plain loop.

    The package is made once per folder of the cache, as one would before shipping it.
    """

    def open(self, work: Work) -> None:
        """Load the packages, or make them."""
        super().open(work)
        value = work.frames[0]
        parts: list[Part] = []
        with torch.no_grad():
            for index, part in enumerate(work.whole):
                if isinstance(part, nn.Module):
                    parts.append(package(part, value, f"{type(self).__name__}-{self.threads}-{index}-{work.title}"))
                else:
                    parts.append(part)
                value = parts[-1](value)
        self.parts = parts


def package(model: nn.Module, example: torch.Tensor, name: str) -> Any:
    """The compiled model, loaded; from the cache where this torch has made it before."""
    inductor: Any = torch._inductor
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{name} {STRONGEST} {torch.__version__}".encode()).hexdigest()[:16]
    path = folder / f"{key}.pt2"
    if not path.exists():
        program = torch.export.export(model, (example,))
        unfinished = path.with_suffix(f".{os.getpid()}.pt2")
        inductor.aoti_compile_and_package(program, package_path=str(unfinished), inductor_configs=dict(STRONGEST))
        unfinished.rename(path)
    return inductor.aoti_load_package(str(path), run_single_threaded=True)

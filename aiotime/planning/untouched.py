"""Looking at a model without changing it: whatever happens inside, the model is afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """What a model was: its modules' attributes, its slots, and the values of its buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(name, module, dict(vars(module))) for name, module in model.named_modules()]
        self._tables = [
            (module, {table: dict(vars(module)[table]) for table in _TABLES}) for _, module, _ in self._attributes
        ]
        self._values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def changed(self) -> list[tuple[str, str]]:
        """(module, attribute) of every plain attribute that is another object now."""
        return [
            (name, attribute)
            for name, module, before in self._attributes
            for attribute in sorted(before.keys() | vars(module).keys())
            if attribute not in _TABLES
            if vars(module).get(attribute, before) is not before.get(attribute, before)
        ]

    def restore(self) -> None:
        """Put everything back."""
        for _, module, before in self._attributes:
            now: dict[str, Any] = vars(module)
            for attribute in now.keys() - before.keys():
                del now[attribute]
            now.update(before)
        for module, tables in self._tables:
            for table, before in tables.items():
                now = vars(module)[table]
                now.clear()
                now.update(before)
        with torch.no_grad():
            for buffer, value in self._values:
                if not same(buffer, value):
                    buffer.copy_(value)


@contextmanager
def untouched(model: nn.Module) -> Iterator[Snapshot]:
    """Restore ``model`` at the end: attributes, parameter and buffer slots, buffer values."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()


@contextmanager
def unspent(model: nn.Module, devices: Sequence[str] = ()) -> Iterator[None]:
    """Leave the caller's random numbers as they are: on the host, on the model's GPUs and on those named."""
    used = {tensor.device for tensor in model.parameters()} | {
        torch.device(name) for name in devices if name.startswith("cuda:")
    }
    with torch.random.fork_rng(devices=sorted(device.index for device in used if device.type == "cuda")):
        yield


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, without using up the caller's; attention without its fused inference path.

    That path leaves out operations and rounds differently, so a traced model could not be compared with the model.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal in every element, NaN equal to NaN."""
    if first.is_floating_point() or first.is_complex():
        return bool(torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True))
    return torch.equal(first, second)

"""Tests of aiotime.compiling.library: a compiled model through its C interface."""

from __future__ import annotations

import gc
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from aiotime.compiling.ahead import Ahead
from aiotime.compiling.library import Library, LibraryError, check_interface
from tests.compiling.nets import CPU, Sum, mlp

pytestmark = [pytest.mark.compiles, pytest.mark.timeout(300)]


@pytest.fixture
def path(packages: Path) -> Path:
    return Ahead(mlp(), [torch.zeros(2, 16)], device=CPU)._package.library


def bound(library: Library) -> dict[str, torch.Tensor]:
    """Weights of some net as the library wants them, all ones."""
    return {name: torch.ones_like(tensor) for name, tensor in library.values().items()}


def test_what_it_says_of_itself(path: Path) -> None:
    library = Library(path, CPU)
    assert (library.inputs, library.outputs) == (1, 1)
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} <= set(library.constants) == set(library.values())
    assert library.values()["0.weight"].flatten().tolist() == list(range(1, 385))


def test_reads_the_memory_it_was_given(path: Path) -> None:
    library = Library(path, CPU)
    weights = bound(library)
    library.bind(weights)
    call = library.caller()
    first = call([torch.ones(2, 16)])[0]
    assert set(first.flatten().tolist()) == {17 * 24 + 1}
    weights["2.bias"] += 1
    assert set(call([torch.ones(2, 16)])[0].flatten().tolist()) == {17 * 24 + 2}
    assert set(first.flatten().tolist()) == {17 * 24 + 1}


def test_every_constant_must_be_given(path: Path) -> None:
    library = Library(path, CPU)
    weights = bound(library)
    del weights["2.bias"]
    with pytest.raises(KeyError, match=r"2\.bias"):
        library.bind(weights)
    with pytest.raises(LibraryError, match="is on device type"):
        library.bind({name: tensor.to("meta") for name, tensor in bound(library).items()})


def test_keeps_what_is_bound_and_lets_go_of_it(path: Path) -> None:
    library = Library(path, CPU)
    storages = []
    for _ in range(3):
        weights = bound(library)
        storages.append(weights["0.weight"].untyped_storage())
        library.bind(weights)
        del weights
        assert [torch._C._storage_Use_Count(one._cdata) for one in storages] == [1] * (len(storages) - 1) + [2]
    del library
    gc.collect()
    assert torch._C._storage_Use_Count(storages[-1]._cdata) == 1


def test_is_deleted_once_nobody_can_call_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[int] = []
    usual = Library._function

    def function(self: Library, name: str) -> Any:
        found = usual(self, name)
        if name != "Delete":
            return found

        def delete(handle: int) -> Any:
            deleted.append(handle)
            return found(handle)

        return delete

    monkeypatch.setattr(Library, "_function", function)
    library = Library(path, CPU)
    library.bind(bound(library))
    call = library.caller()
    del library
    gc.collect()
    assert not deleted and call([torch.zeros(2, 16)])[0].shape == (2, 16)
    del call
    gc.collect()
    assert len(deleted) == 1


@pytest.mark.parametrize("models", [1, 2])
def test_several_threads_at_once(path: Path, models: int) -> None:
    library = Library(path, CPU, models=models)
    library.bind(bound(library))
    call = library.caller()
    wrong: list[Any] = []

    def run(number: int) -> None:
        for _ in range(200):
            made = call([torch.full((2, 16), float(number))])[0]
            if set(made.flatten().tolist()) != {24 * (16 * number + 1) + 1}:
                wrong.append(made)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_python_goes_on_during_a_call(packages: Path) -> None:
    """Counted strictly inside the call, with Python told never to switch threads of its own accord."""
    library = Ahead(Sum(), Sum.examples(), device=CPU)._library
    run, gate, steps = library._functions["Run"], threading.Event(), [0]
    inside: list[int] = []

    def count() -> None:
        gate.wait()
        for _ in range(1000):
            steps[0] += 1

    def watched(*arguments: Any) -> Any:
        gate.set()  # who waits for it can only go on once this thread lets the lock go
        before = steps[0]
        code = run(*arguments)
        inside.append(steps[0] - before)
        return code

    library._functions["Run"] = watched
    call, values = library.caller(), [torch.zeros(500_000, 4), torch.zeros(500_000, 4)]
    thread, interval = threading.Thread(target=count), sys.getswitchinterval()
    thread.start()
    try:
        sys.setswitchinterval(1e3)
        made = call(values)
    finally:
        sys.setswitchinterval(interval)
        gate.set()
        thread.join()
    assert made[0].shape == (500_000, 4) and inside == [1000]


def test_what_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "model.so").write_text("text")
    with pytest.raises(LibraryError, match="cannot be loaded"):
        Library(tmp_path / "model.so", CPU)
    with pytest.raises(LibraryError, match="cannot be loaded"):
        Library(tmp_path / "none.so", CPU)


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(torch._C, "_aoti", types.SimpleNamespace())
    with pytest.raises(LibraryError, match="has no C interface to compiled models"):
        check_interface()
    with pytest.raises(LibraryError, match="has no C interface"):
        Library(path, CPU)

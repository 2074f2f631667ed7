"""Tests of aiotime.cli.factory: module:factory and example shapes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from aiotime.cli.factory import find, make, parse_balance, parse_devices, parse_example

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    example = torch.zeros(1, 4)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x)

def plain():
    return Net()

def with_example():
    return Net(), torch.ones(1, 4)

plain_with_attribute = lambda: Net()
plain_with_attribute.example = lambda: torch.full((1, 4), 2.0)

ready = nn.Sequential(nn.Linear(4, 2))
ready.example = torch.zeros(1, 4)

def piped():
    import aiotime
    return aiotime.Pipeline.from_stages([lambda x: x])

def wrong():
    return 7

def broken():
    raise OSError("no weights")
"""


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``nets`` in the current folder."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "imports_missing.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("nets", "imports_missing"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("nets:Net", 0.0), ("nets:with_example", 1.0), ("nets:plain_with_attribute", 2.0), ("nets:ready", 0.0)],
)
def test_a_model_and_its_example(name: str, value: float) -> None:
    """A class, a function that returns a pair, one with an attribute and a ready model all give a model and a frame."""
    made = make(name, example=())
    assert isinstance(made.model, torch.nn.Module)
    assert torch.equal(made.example, torch.full((1, 4), value))


def test_the_command_line_has_the_last_word_on_the_example() -> None:
    """--example wins over the factory's own."""
    assert make("nets:with_example", example=("2,4",)).example.shape == (2, 4)


def test_a_pipeline_needs_no_example() -> None:
    """A factory may return a pipeline; its frames are as its first stage wants them."""
    made = make("nets:piped", example=())
    assert made.pipeline is not None
    assert made.model is None
    assert made.example is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets", "module:factory"),
        ("nets:", "module:factory"),
        ("nowhere:make", "no module 'nowhere'"),
        ("nets.deep:make", "no module 'nets.deep'"),
        ("nets:absent", "it has .*Net"),
        ("nets:plain", "--example"),
        ("nets:wrong", "gave a int"),
    ],
)
def test_what_cannot_be_made_says_why(name: str, message: str) -> None:
    """Each mistake has its own message, with the way out."""
    with pytest.raises(click.UsageError, match=message):
        make(name, example=())


def test_errors_inside_the_users_module_are_not_hidden() -> None:
    """An import that fails inside the module, and an error of the factory, come through as they are."""
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        find("imports_missing:make")
    with pytest.raises(OSError, match="no weights"):
        make("nets:broken", example=())


def test_a_file_name_is_understood() -> None:
    """``nets.py:Net`` is what shells complete to."""
    assert make("nets.py:Net", example=()).model is not None


def test_examples_of_every_structure() -> None:
    """One shape is a tensor, several are a tuple, named ones a dict; dtypes are named; values are reproducible."""
    one: Any = parse_example(("1,3,8,8",))
    assert (one.shape, one.dtype) == ((1, 3, 8, 8), torch.float32)
    assert torch.equal(one, parse_example(("1,3,8,8",)))
    assert 0 <= float(one.min()) < float(one.max()) <= 1
    pair: Any = parse_example(("1,4", "1,4:int64"))
    assert [tensor.dtype for tensor in pair] == [torch.float32, torch.int64]
    named: Any = parse_example(("ids=1,16:int64", "mask=1,16:bool"))
    assert {name: tensor.dtype for name, tensor in named.items()} == {"ids": torch.int64, "mask": torch.bool}


@pytest.mark.parametrize("given", [("",), ("1,x",), ("1,3:float33",), ("1,3:nn",), ("a=1", "2")])
def test_examples_that_make_no_sense(given: tuple[str, ...]) -> None:
    """A wrong shape, dtype or mixture is refused."""
    with pytest.raises(click.UsageError, match="--example"):
        parse_example(given)


def test_devices_and_balance() -> None:
    """Lists as people type them."""
    assert parse_devices(None) is None
    assert parse_devices("cpu:0, cpu:1,") == ["cpu:0", "cpu:1"]
    assert parse_balance("even") == "even"
    assert parse_balance("3,5") == [3, 5]
    with pytest.raises(click.UsageError, match="3,5"):
        parse_balance("half")

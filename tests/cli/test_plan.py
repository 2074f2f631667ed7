"""Tests of ``aiotime plan``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from aiotime import Plan
from aiotime.cli.commands import commands

NET = """
import torch
from torch import nn

def tiny():
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])

def rule():
    import aiotime
    return aiotime.learning.Exact(loss=nn.functional.mse_loss, optimizer=torch.optim.SGD)

def piped():
    import aiotime
    return aiotime.Pipeline.from_stages([lambda x: x])
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with net.py in it."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    return tmp_path


def plan(*arguments: str) -> tuple[int, str]:
    """Exit code and output of ``aiotime plan``."""
    result = CliRunner().invoke(commands, ["plan", *arguments], catch_exceptions=False)
    return result.exit_code, result.output


def test_a_plan_is_printed_and_saved(here: Path) -> None:
    """Stages with their devices on the screen; the file reads back to the same cut."""
    code, output = plan("net:tiny", "-e", "1,4", "-d", "cpu:0,cpu:1", "--balance", "1,3", "--json", "plan.json")
    assert code == 0, output
    assert "cpu:0" in output
    assert "cpu:1" in output
    assert "wrote plan.json" in output
    assert Plan.from_json((here / "plan.json").read_text()).sizes == (1, 3)


def test_layers_are_listed() -> None:
    """With --layers there is a line for each layer."""
    code, output = plan("net:tiny", "-e", "1,4", "-d", "cpu:0,cpu:1", "--balance", "even", "--layers")
    assert code == 0, output
    assert [line.split()[0] for line in output.splitlines() if line[:1].isdigit()] == ["0", "1", "2", "3"]


def test_a_model_too_small_to_cut_is_told(here: Path) -> None:
    """Measured, four tiny layers stay together, and the plan says why."""
    code, output = plan("net:tiny", "-e", "1,4", "-d", "cpu:0,cpu:1", "--json", "plan.json")
    assert code == 0, output
    assert len(Plan.from_json((here / "plan.json").read_text()).stages) == 1
    assert "1 of 2 devices" in output


@pytest.mark.parametrize(
    ("learn", "rule", "versions"),
    [("adam", "Delayed", [2, 1]), ("SGD", "Delayed", [2, 1]), ("net:rule", "Exact", [1, 1])],
)
def test_learning_is_planned(here: Path, learn: str, rule: str, versions: list[int]) -> None:
    """With --learn, by an optimizer's name or a rule of one's own: memory on the screen, figures in the file."""
    code, output = plan(
        "net:tiny", "-e", "1,4", "-d", "cpu:0,cpu:1", "--balance", "even", "--learn", learn, "--json", "plan.json"
    )
    assert code == 0, output
    assert "Memory of stage 1: parameters 160 B" in output
    made = Plan.from_json((here / "plan.json").read_text())
    assert made.rule == rule
    assert [stage.learning.versions for stage in made.stages if stage.learning is not None] == versions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net:tiny"], "--example"),
        (["net:piped"], "cut already"),
        (["net:tiny", "-e", "1,4", "-d", "cpu:x"], "cpu:x"),
        (["net:tiny", "-e", "1,4", "-d", "cpu:0", "--balance", "9"], "layers"),
        (["net:tiny", "-e", "1,4", "--json", "absent/plan.json"], "there is no folder 'absent'"),
        (["net:tiny", "-e", "1,4", "--learn", "magic"], "torch.optim has adadelta"),
        (["net:tiny", "-e", "1,4", "--learn", "net:tiny"], "expected a rule of aiotime.learning, got a Sequential"),
    ],
)
def test_wrong_calls_say_what_would_be_right(arguments: list[str], message: str) -> None:
    """Exit code 2 and a message, never a traceback."""
    code, output = plan(*arguments)
    assert code == 2, output
    assert message in output

"""Tests of the command as a whole."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

import aiotime
from aiotime.cli import main
from aiotime.cli.commands import commands


@pytest.mark.parametrize("arguments", [[], ["run"], ["plan"], ["demo"]])
def test_help_reads_well(arguments: list[str]) -> None:
    """Help of the command and of each of its parts: a usage, an example, no line too long, no leftover markup."""
    result = CliRunner().invoke(commands, [*arguments, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")
    assert "``" not in result.output
    assert "\b" not in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_the_version_is_told() -> None:
    """--version prints the package's version."""
    assert aiotime.__version__ in CliRunner().invoke(commands, ["--version"]).output


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where click or rich is missing, the entry point names the extra."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=r"aiotime\[cli\]"):
        main()


def test_the_command_keeps_freed_memory_from_its_start_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process is the command's own, and a plan is to be measured as the job will run."""
    calls: list[None] = []
    monkeypatch.setattr("aiotime.heap.keep_freed_memory", lambda: calls.append(None))
    monkeypatch.setattr(sys, "argv", ["aiotime", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert calls == [None]
    assert aiotime.__version__ in capsys.readouterr().out

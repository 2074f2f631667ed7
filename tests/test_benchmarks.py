"""The benchmarks run, at toy sizes; what they find is nobody's promise there."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("benchmarks/*/__main__.py"))


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no installed package: they are found from the repository's root."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_runs_at_toy_size(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the machine, its tables and a verdict on each promise, and writes nothing."""
    before = sorted(folder.rglob("results/*"))
    script = importlib.import_module(f"benchmarks.{folder.name}.__main__")
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{folder.name}", "--quick"])
    threads = torch.get_num_threads()
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert output.startswith("# ")
    assert "cores" in output
    assert "torch" in output
    assert "the figures mean nothing" in output
    _, _, verdicts = output.partition("**Targets**")
    assert any(verdict in verdicts for verdict in ("| met ", "| not met "))
    assert sorted(folder.rglob("results/*")) == before


def test_several_run_by_one_command() -> None:
    """``python -m benchmarks NAME …`` runs each in a process of its own, one after the other."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "simulated_scaling", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("# Does the schedule itself scale")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_says_what_it_asks(folder: Path) -> None:
    """Each folder has a README that gives its command and its promise, and is in the list of questions."""
    text = (folder / "README.md").read_text()
    assert f"python -m benchmarks.{folder.name}" in text
    assert "Promised:" in text
    assert f"[{folder.name}]({folder.name}/README.md)" in (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.usefixtures("importable")
def test_results_are_written_where_asked(tmp_path: Path) -> None:
    """--save writes a table for people and JSON for programs, with the machine and no path of it."""
    from benchmarks import _harness

    (tmp_path / "some_question").mkdir()
    script = tmp_path / "some_question" / "__main__.py"
    arguments = _harness.parser("Is it so?").parse_args(["--save", "here"])
    report = _harness.Report(str(script), question="Is it so?", setup="nothing special", arguments=arguments)
    report.table("Figures", ["name", "value"], [["one", 1.5], ["many", 12_345.0]])
    report.target("as fast as promised", 1.5, 2.0, unit=" ×")
    report.target("as small as promised", 1.5, 2.0, at_most=True)
    report.finish()
    results = script.parent / "results"
    data = json.loads((results / "here.json").read_text())
    assert data["tables"]["Figures"] == [{"name": "one", "value": 1.5}, {"name": "many", "value": 12_345.0}]
    assert [target["met"] for target in data["targets"]] == [False, True]
    assert data["machine"]["cores"] >= 1
    table = (results / "here.md").read_text()
    assert "| many | 12,345 |" in table
    for text in (table, json.dumps(data)):
        assert str(tmp_path) not in text
        assert str(Path.home()) not in text
        assert str(ROOT) not in text


@pytest.mark.usefixtures("importable")
def test_a_report_says_what_malloc_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Freed memory is kept for every contender; --plain-malloc leaves malloc alone; the first line tells them apart."""
    from benchmarks import _harness

    calls: list[None] = []

    def keep() -> bool:
        calls.append(None)
        return True

    monkeypatch.setattr("aiotime.keep_freed_memory", keep)
    for options, words, called in (([], "freed memory kept", 1), (["--plain-malloc"], "plain malloc", 1)):
        arguments = _harness.parser("Is it so?").parse_args(options)
        report = _harness.Report(str(tmp_path / "x.py"), question="Is it so?", setup="", arguments=arguments)
        assert report.machine["memory"] == words
        assert words in capsys.readouterr().out.splitlines()[2]
        assert len(calls) == called


@pytest.mark.usefixtures("importable")
def test_contenders_take_turns() -> None:
    """Forwards and backwards, and a ratio is the median of the ratios within the rounds."""
    from benchmarks._harness import take_turns

    order: list[str] = []
    figures = {"a": iter([1.0, 20.0, 3.0]), "b": iter([1.0, 10.0, 1.0])}

    def contender(name: str) -> float:
        order.append(name)
        return next(figures[name])

    rounds = take_turns({"a": lambda: contender("a"), "b": lambda: contender("b")}, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert rounds.median("a") == 3.0
    assert rounds.ratio("a", "b") == 2.0


def test_the_list_names_what_there_is() -> None:
    """An unknown name is answered with the known ones."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "no_such_question"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode == 2
    for folder in FOLDERS:
        assert folder.name in finished.stdout

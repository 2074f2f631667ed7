"""The examples run and print the numbers they promise; the services (03, 11) have test files of their own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import aiotime

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
SERVICES = ("03_service", "11_learning_service")
SCRIPTS = [path for path in FILES if path.stem not in SERVICES]  # those that end by themselves
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(aiotime.__file__).parent.parent), "PYTHONIOENCODING": "utf-8"}

PRINTED = {  # a line of each, as a script
    "01_first_prediction": "predictions: 100",
    "02_stages": "quadrants named rightly: 200 of 200",
    "04_cameras": "cameras closed: 2",
    "05_overflow_and_deadlines": "requests answered in time: 6 of 20",
    "06_failures": "skip: 20 of 30 came through, 2 of them at the second attempt",
    "07_hot_swap": "a mixture: 0 frames",
    "08_timeline": "bottleneck: model, busy 97%",
    "09_simulated_scaling": "64 devices: 56.84 ×   (formula 56.84 ×)",
    "10_transformer": "sequences with equal logits: 32 of 32",
    "12_next_frame": "foreseen of the change, second half: ",
    "13_tree_network": "expressions named rightly: ",
    "14_early_exit": "calls of the four blocks per digit: ",
    "15_graph_deduction": "new stories understood: 500 of 500",
}

ALL_AS_SCRIPTS = """
import runpy, sys
for path in sys.argv[1:]:
    print("=====", path, flush=True)
    runpy.run_path(path, run_name="__main__")
"""


def load(stem: str) -> ModuleType:
    """An example as a module; its name begins with a digit, so it cannot be imported by a statement."""
    spec = importlib.util.spec_from_file_location(f"example_{stem}", EXAMPLES / f"{stem}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(stem: str, *args: Any) -> Any:
    """What ``main`` of an example returns."""
    return aiotime.run(load(stem).main(*args))


def test_first_prediction_gets_every_frame() -> None:
    """01: a hundred frames in, a hundred predictions out."""
    assert run("01_first_prediction") == 100


def test_first_prediction_is_what_the_readme_shows() -> None:
    """01 and the README build the same pipeline, so that neither grows old alone."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    source = (EXAMPLES / "01_first_prediction.py").read_text(encoding="utf-8")
    built = [line for line in source.splitlines() if re.match(r"(model|frame|pipeline) = ", line)]
    assert len(built) == 3
    assert all(line in readme for line in built)


def test_stages_name_every_quadrant_in_order() -> None:
    """02: two decoding workers, and every answer in its place."""
    assert run("02_stages") == 200


def test_cameras_both_get_their_predictions() -> None:
    """04: forty predictions from both cameras, each in its order, and both cameras closed afterwards."""
    module = load("04_cameras")
    seen = aiotime.run(module.main())
    assert sum(seen.values()) == 40
    assert set(seen) == set(module.closed) == {"door", "yard"}


def test_overflow_and_deadlines_shed_what_they_must(capsys: pytest.CaptureFixture[str]) -> None:
    """05: a device that does 10 frames a second answers about 100 of 10 seconds, and 6 requests of 0.1 s in 0.55 s."""
    latest, in_time = run("05_overflow_and_deadlines")
    assert in_time == 6
    line = re.compile(r"^(.+?) +answered +(\d+), shed +(\d+), oldest answer ([\d.]+) s$", re.MULTILINE)
    found = line.findall(capsys.readouterr().out)
    table = {name: (int(answered), int(shed), float(oldest)) for name, answered, shed, oldest in found}
    assert all(answered + shed == 300 for answered, shed, _ in table.values())
    assert table["overflow='wait'"][:2] == (300, 0)
    assert table["overflow='latest'"][0] == latest
    assert all(100 <= answered <= 105 for name, (answered, _, _) in table.items() if name != "overflow='wait'")
    oldest = {name: seconds for name, (_, _, seconds) in table.items()}
    assert oldest["overflow='latest'"] < oldest["overflow='drop_oldest'"] < oldest["overflow='drop_newest'"]
    assert oldest["overflow='drop_newest', deadline=0.2"] <= 0.2 + 0.1  # it began in time


def test_failures_are_all_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    """06: of 30 texts 20 come through and 10 are dead letters; the error and the budget name the frame."""
    assert run("06_failures") == (20, 10)
    printed = capsys.readouterr().out
    assert "2 of them at the second attempt" in printed
    assert "stage 'parse' failed at frame 2" in printed
    assert "budget of 4 (5 failed); the last: stage 'parse' failed at frame 14" in printed


def test_hot_swap_mixes_no_weights() -> None:
    """07: every frame met two old layers or two new ones, and the swap came right after what was in flight."""
    outputs = run("07_hot_swap")
    assert set(outputs) == {1.0, 4.0}
    assert sum(outputs.values()) == 400
    assert 100 <= outputs[1.0] <= 104


def test_timeline_shows_the_slowest_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """08: the slowest stage is busy 60 of 62 ms, and text, trace and picture show it."""
    busy = run("08_timeline", tmp_path)
    assert busy == pytest.approx(60 / 62)
    lanes = dict(re.findall(r"^(sim:\d)  (\S+) ", capsys.readouterr().out, re.MULTILINE))
    assert lanes["sim:1"] == "." + "".join(str(frame % 10) * 2 for frame in range(30)) + "."
    assert len({len(lane) for lane in lanes.values()}) == 1
    assert json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_simulated_scaling_follows_its_formula() -> None:
    """09: on 64 devices a stream of 500 frames gains exactly what filling the pipeline leaves."""
    assert run("09_simulated_scaling") == pytest.approx(64 * 500 / 563)


def test_transformer_equals_the_model() -> None:
    """10: the logits of all sequences are the model's own."""
    assert run("10_transformer") == 32


def test_next_frame_foresees_what_will_change() -> None:
    """12: more than half of what "nothing will move" leaves open, on frames that were each seen once."""
    assert 0.5 < run("12_next_frame") < 0.9


def test_tree_network_learns_expressions() -> None:
    """13: fresh expressions are named far better than by chance, from the values of 2,000 others."""
    assert run("13_tree_network") >= 190


def test_early_exit_saves_calls_and_stays_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """14: nine of ten unseen digits are named rightly with half of the calls, and the path of one is drawn."""
    right, calls = run("14_early_exit", tmp_path)
    assert right > 0.9
    assert 1 < calls < 2
    assert (tmp_path / "early_exit.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^3 +blocks\.3 ", capsys.readouterr().out, re.MULTILINE)  # it went all the way


def test_graph_deduction_understands_every_story() -> None:
    """15: of stories that it was never told it understands all."""
    assert run("15_graph_deduction") == 500


def test_examples_run_as_scripts(tmp_path: Path) -> None:
    """Each runs as a script, in an empty folder, without a warning, and prints its number."""
    command = [sys.executable, "-W", "error", "-c", ALL_AS_SCRIPTS, *map(str, SCRIPTS)]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    outputs = {Path(part.splitlines()[0]).stem: part for part in done.stdout.split("===== ")[1:]}
    assert outputs.keys() == PRINTED.keys()
    missing = [stem for stem, line in PRINTED.items() if line not in outputs[stem]]
    assert not missing


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_introduces_itself(path: Path) -> None:
    """A docstring that says what it prints, a script part, and a line in the index."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert "rints" in (ast.get_docstring(tree) or "")
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':")
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")

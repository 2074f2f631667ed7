"""The package as a whole: what it exports, what it imports, what its files must not say."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import aiotime

ROOT = Path(__file__).parent.parent
EXTRAS = ["PIL", "aiostream", "av", "click", "matplotlib", "rich", "sklearn"]  # as they are imported


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules after ``statement`` ran in a fresh interpreter."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(aiotime.__path__[0]).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout))


def tracked_files() -> list[Path]:
    """Every file git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_version_is_that_of_the_metadata() -> None:
    """``aiotime.__version__`` and pyproject.toml agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert aiotime.__version__ == project["version"]


def test_package_says_that_it_is_typed() -> None:
    """The marker file travels with the package."""
    assert files("aiotime").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", aiotime.__all__)
def test_public_name_is_there_and_documented(name: str) -> None:
    """Each public name can be had, and its docstring is its own."""
    value = getattr(aiotime, name)
    if isinstance(value, str):  # __version__
        return
    doc = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc, f"aiotime.{name} has no docstring"
    assert doc.strip().splitlines()[0].strip(), f"the docstring of aiotime.{name} does not begin with a promise"


def test_public_names_are_listed_once_in_order() -> None:
    """``__all__`` is sorted, and ``dir(aiotime)`` offers all of it before anything was loaded."""
    assert sorted(set(aiotime.__all__)) == sorted(aiotime.__all__)
    assert set(aiotime.__all__) <= set(dir(aiotime))


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt public name fails as it would in any module."""
    with pytest.raises(AttributeError, match="Pipelin"):
        _ = aiotime.Pipelin


@pytest.mark.parametrize("name", ["errors", "frame", "channel", "observe"])
def test_control_plane_does_not_import_torch(name: str) -> None:
    """The control plane can be imported, and so tested, without torch."""
    importlib.import_module(f"aiotime.{name}")  # exists
    assert "torch" not in modules_after(f"import aiotime.{name}")


def test_public_names_need_no_extra() -> None:
    """Every public name can be had with the required dependencies alone."""
    modules_after(
        f"for extra in {EXTRAS}: sys.modules[extra] = None  # importing it raises\n"
        "import aiotime\n"
        "for name in aiotime.__all__: getattr(aiotime, name)"
    )


def test_importing_aiotime_starts_no_thread_and_no_loop() -> None:
    """Importing the package has no side effect that a service would notice."""
    modules_after(
        "import asyncio, logging, threading, warnings\n"
        "warnings.simplefilter('error')\n"
        "policy, handlers = asyncio.get_event_loop_policy(), list(logging.root.handlers)\n"
        "import aiotime\n"
        "for name in aiotime.__all__: getattr(aiotime, name)\n"
        "assert threading.active_count() == 1\n"
        "assert asyncio.get_event_loop_policy() is policy\n"
        "assert logging.root.handlers == handlers"
    )


def test_no_file_names_a_package_index_or_a_path_of_some_machine() -> None:
    """Where packages come from and where a checkout lies is the business of each machine."""
    hosts = re.compile(r"py[p]i\.|[p]ythonhosted|[d]ownload\.pytorch|[i]ndex-url\s*[ =]\s*\S", re.IGNORECASE)
    paths = re.compile(r"(?<![\w.$~}/])/(?:work|root|home|tmp|Users)/(?!\*)")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), start=1):
            if hosts.search(line) or paths.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


def test_every_direct_dependency_is_pinned() -> None:
    """constraints.txt has a version for whatever pyproject.toml asks for, and torch without a local version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(line for lines in project["project"]["optional-dependencies"].values() for line in lines),
        *(line for lines in project["dependency-groups"].values() for line in lines if isinstance(line, str)),
        "tox",
    ]
    names = {match[0].lower() for line in asked if (match := re.match(r"[\w-]+", line))} - {"aiotime"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert names <= pins.keys(), sorted(names - pins.keys())
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values()), (
        "a local version does not exist elsewhere"
    )

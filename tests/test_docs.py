"""What the documentation shows works: python blocks of README and tutorial, examples in public docstrings.

A block that stands under the comment ``<!-- run -->`` is run; the blocks of a file run one after another in one
namespace, as a reader would type them. Every other python block must at least compile. ``await`` may stand at
top level.
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import importlib
import inspect
import os
import re
import types
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

import aiotime

ROOT = Path(__file__).parent.parent
RUN_FILES = ["README.md", "docs/tutorial.md", "docs/learning.md", "docs/dynamic.md"]
BLOCK = re.compile(
    r"(?P<run><!-- run -->\s*\n)?^(?P<indent> *)```(?:python|py|\{code-block\} python)[^\n]*\n(?P<code>.*?)^ *```\s*$",
    re.MULTILINE | re.DOTALL,
)
WITH_EXAMPLES = ["Pipeline", "Sample", "Stage", "plan", "run"]  # the names a reader meets first


@dataclass(frozen=True, slots=True)
class Block:
    """One python block of a Markdown file."""

    line: int  # of its first line of code, from 1
    code: str
    run: bool

    def compile(self, path: str) -> types.CodeType:
        """Compiled so that tracebacks name the line in the Markdown file."""
        padded = "\n" * (self.line - 1) + self.code
        code: types.CodeType = compile(padded, path, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        return code


def blocks(path: Path) -> list[Block]:
    """The python blocks of a Markdown file, in order."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        found.append(Block(text.count("\n", 0, match.start("code")) + 1, code, match["run"] is not None))
    return found


def run_blocks(path: str, chosen: list[Block]) -> dict[str, Any]:
    """Run blocks one after another in one namespace; the namespace."""
    module = types.ModuleType("__main__")
    with asyncio.Runner() as runner:
        for block in chosen:
            code = block.compile(path)
            result = eval(code, module.__dict__)
            if code.co_flags & inspect.CO_COROUTINE:
                runner.run(cast("Coroutine[Any, Any, None]", result))
    return module.__dict__


def examples(name: str) -> list[doctest.DocTest]:
    """The examples in the docstring of a public name, and in those of its public methods."""
    value = getattr(aiotime, name)
    if not (inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value)):
        return []
    module = value if inspect.ismodule(value) else importlib.import_module(value.__module__)
    known = {each: importlib.import_module(each) for each in ("aiotime", "asyncio", "torch")}
    found = doctest.DocTestFinder().find(value, f"aiotime.{name}", module=module, globs=known)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", RUN_FILES)
def test_marked_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader types from README and tutorial works, in order, in an empty folder."""
    chosen = [block for block in blocks(ROOT / name) if block.run]
    assert chosen, f"no block of {name} stands under <!-- run -->"
    monkeypatch.chdir(tmp_path)
    run_blocks(name, chosen)


@pytest.mark.parametrize(
    "path", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda path: path.name
)
def test_every_block_compiles(path: Path) -> None:
    """No page shows Python that is not Python."""
    for block in blocks(path):
        block.compile(path.name)


@pytest.mark.parametrize("name", aiotime.__all__)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of every public name give what they show; ``aiotime``, ``asyncio`` and ``torch`` are imported."""
    found = examples(name)
    if name in WITH_EXAMPLES:
        assert found, f"the docstring of aiotime.{name} shows no example"
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in found:
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_a_block_knows_its_line_and_runs_in_order(tmp_path: Path) -> None:
    """The machinery of this file: marked blocks share a namespace, may await, and fail with their line."""
    page = tmp_path / "page.md"
    page.write_text(
        "# page\n\n<!-- run -->\n```python\nx = 1\n```\n\n```python\nnot_run()\n```\n\n"
        "1. indented\n\n<!-- run -->\n   ```python\n   import asyncio\n   y = x + 1\n   await asyncio.sleep(0)\n"
        "   ```\n\n"
        "```bash\nls\n```\n\n<!-- run -->\n```python\nraise KeyError(y)\n```\n",
        encoding="utf-8",
    )
    found = blocks(page)
    assert [(block.line, block.run) for block in found] == [(5, True), (9, False), (16, True), (27, True)]
    assert run_blocks("page.md", [found[0], found[2]])["y"] == 2
    with pytest.raises(KeyError) as caught:
        run_blocks("page.md", [found[0], found[2], found[3]])
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == ("page.md", 27)


def test_links_between_pages_lead_somewhere() -> None:
    """A relative link in README, CONTRIBUTING or docs names a file that exists."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    missing = [
        f"{os.path.relpath(page, ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not missing, "\n".join(missing)

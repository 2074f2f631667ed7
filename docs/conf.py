"""Configuration of Sphinx: ``tox -e docs``. Nothing is fetched while the pages are built."""

from __future__ import annotations

from typing import Any

import aiotime

project = "aiotime"
author = "The aiotime authors"
copyright = "The aiotime authors, Apache-2.0"
release = version = aiotime.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "any"  # `Name` in a docstring is a link where there is such a name
suppress_warnings = ["ref.any"]  # and plain code where there is not: parameters, private names
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"aiotime {release}"
html_copy_source = False


def _keep_drawings(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """An indented block in a module's docstring is a drawing: show it as it stands."""
    if what != "module":
        return
    drawn: list[str] = []
    inside = False
    for line in (obj.__doc__ or "").splitlines():  # as written: Sphinx has cut the common indent off already
        if line.startswith("    ") and not inside:
            drawn += ["::", ""]
        inside = line.startswith("    ") or (inside and not line.strip())
        drawn.append(line)
    lines[:] = [*drawn, ""]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _keep_drawings)

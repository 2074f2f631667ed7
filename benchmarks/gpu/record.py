"""What was found, on disk at every moment: the whole's JSON, and the notebook of a part that is under way.

    part's process ── Notebook.put ──▶ its own file ── read by ──▶ Record ── written after every change ──▶ gpu.json

Files are replaced, never written in place: whoever is cut off leaves the last whole state behind.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


class Notebook:
    """Figures of one part, a tree of dicts, written to ``path`` at every change (None: kept in memory alone)."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.figures: dict[str, Any] = {}

    def put(self, *keys: str, value: Any) -> None:
        """Write ``value`` down under ``keys``."""
        place = self.figures
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = plain(value)
        if self._path is not None:
            replace(self._path, self.figures)


class Record:
    """The JSON of a whole run.

    Args:
        path: of the JSON; None: it is not written.
        head: what stands above the parts.
    """

    def __init__(self, path: Path | None, **head: Any) -> None:
        self._path = path
        self.data: dict[str, Any] = {**plain(head), "parts": {}, "targets": []}
        self.write()

    def part(self, name: str, **fields: Any) -> None:
        """Add to what is known of a part."""
        self.data["parts"].setdefault(name, {}).update(plain(fields))
        self.write()

    def figures(self, name: str) -> dict[str, Any]:
        """What a part has found so far."""
        found: dict[str, Any] = self.data["parts"].get(name, {}).get("figures", {})
        return found

    def put(self, key: str, value: Any) -> None:
        """Set something above the parts."""
        self.data[key] = plain(value)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        if self._path is not None:
            replace(self._path, self.data)


def replace(path: Path, data: Any) -> None:
    """Write ``data`` as JSON, whole or not at all."""
    new = path.with_name(f"{path.stem}.new.json")
    new.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    new.replace(path)


def load(path: Path) -> dict[str, Any]:
    """What `Notebook` wrote; nothing where it has not begun."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: six digits, no NaN, and no path of this machine."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return without_paths(str(value))


def without_paths(text: str) -> str:
    """``text`` with the folders of this machine replaced by words."""
    for folder, word in ((ROOT, "."), (sys.prefix, "<python>"), (sys.base_prefix, "<python>"), (Path.home(), "~")):
        if str(folder) != "/":
            text = text.replace(str(folder), word)
    return text


def told(error: BaseException) -> str:
    """The traceback of ``error``, without this machine's paths."""
    return without_paths("".join(traceback.format_exception(error)))

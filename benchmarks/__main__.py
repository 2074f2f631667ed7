"""python -m benchmarks [NAME ...] [--quick] [--save [LABEL]]: run some or all, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def names() -> list[str]:
    """The questions there are."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/__main__.py"))


def main() -> int:
    known = names()
    chosen = []
    options = sys.argv[1:]
    while options and options[0] in known:
        chosen.append(options.pop(0))
    if options and not options[0].startswith("-"):
        print(f"there is no benchmark {options[0]!r}; there are: {', '.join(known)}")
        return 2
    status = 0
    for name in chosen or known:
        command = [sys.executable, "-m", f"benchmarks.{name}", *options]
        status = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False).returncode or status
        print()
    return status


if __name__ == "__main__":
    raise SystemExit(main())

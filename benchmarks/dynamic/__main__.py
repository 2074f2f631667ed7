"""python -m benchmarks.dynamic [perceptron] [lists] [trees] [graphs] [exit] [--quick] [--save LABEL] [--rounds N]
       python -m benchmarks.dynamic [lists] [trees] --tune

A part is the module of its name: its docstring begins with the question, ``setup(arguments)`` says in words what the
figures depend on, and ``main(arguments, report)`` measures and fills the report.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util

import torch

from benchmarks._harness import Report, machine, parser
from benchmarks.dynamic import __doc__ as question

PARTS = [
    name
    for name in ("perceptron", "lists", "trees", "graphs", "exit")
    if importlib.util.find_spec(f"benchmarks.dynamic.{name}")
]


def main() -> None:
    options = parser(question or "")
    options.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; by default all of them")
    options.add_argument("--tune", action="store_true", help="choose the rates anew (lists and trees)")
    options.add_argument("--seed", type=int, default=0, help="the first seed (lists and trees); 0 to 3 chose settings")
    arguments = options.parse_args()
    for part in arguments.parts:
        if part not in PARTS:
            options.error(f"there is no part {part!r}; there are: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for part in arguments.parts or PARTS:
        run(part, _own(arguments, part))


def run(part: str, arguments: argparse.Namespace) -> None:
    """One part, with a report of its own."""
    module = importlib.import_module(f"benchmarks.dynamic.{part}")
    first, _, _ = (module.__doc__ or part).partition("\n")
    report = Report(__file__, question=first, setup=module.setup(arguments), arguments=arguments)
    module.main(arguments, report)
    report.finish()


def _own(arguments: argparse.Namespace, part: str) -> argparse.Namespace:
    """Results of a part go to a file of its own."""
    own = copy.copy(arguments)
    if own.save is not None:
        own.save = f"{own.save or str(machine()['cores']) + '-cores'}-{part}"
    return own


if __name__ == "__main__":
    main()

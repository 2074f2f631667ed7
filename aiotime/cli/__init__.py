"""The command ``aiotime``: run a model over a stream, plan it, or see it work (extra ``[cli]``).

    commands.py   the group of commands
    run.py        aiotime run: a source through a pipeline into JSON lines
    plan.py       aiotime plan: measure a model and print how it would be cut
    demo.py       aiotime demo: the whole of it on handwritten digits: learning.py, predicting.py
    digits.py     its data and its fitted model; versus.py its comparison
    job.py        one stream from its source to its file, on the event loop
    factory.py    module:factory -> a model or a pipeline, and an example frame
    writing.py    predictions -> JSON lines
    interrupt.py  Ctrl-C: first drain, then abort

click and rich are imported by the commands alone, so that `main` can say what to install.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command; says what to install where click or rich is missing."""
    try:
        import click  # noqa: F401 - the extra is installed as a whole or not at all
        import rich  # noqa: F401
    except ImportError as error:
        sys.exit(f'the command line of aiotime needs {error.name}: pip install "aiotime[cli]"')
    from aiotime.cli.commands import commands
    from aiotime.heap import keep_freed_memory

    keep_freed_memory()  # before models are built, so that plans are measured as the job will run
    commands(prog_name="aiotime")

"""The group of commands behind ``aiotime``."""

from __future__ import annotations

import click

import aiotime
from aiotime.cli.demo import demo
from aiotime.cli.plan import plan
from aiotime.cli.run import run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(aiotime.__version__, prog_name="aiotime")
def commands() -> None:
    """Run a neural network over a stream that never stops.

    The layers of the model are spread over devices, which work on different frames at the same time.

    \b
      aiotime demo                                   see it work on handwritten digits
      aiotime plan net:make --example 1,3,256,256    how a model would be cut, and whether it pays
      aiotime run net:make --source clip.mp4 --devices cpu:0,cpu:1 --out predictions.jsonl

    "net:make" is the function make() in net.py (or in an installed module); it returns the model.
    """  # noqa: D301 - \b keeps click from joining these lines


commands.add_command(run)
commands.add_command(plan)
commands.add_command(demo)

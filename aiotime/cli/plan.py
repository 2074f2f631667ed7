"""``aiotime plan``: measure a model's layers and print where it would be cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.live import Live

from aiotime.cli.factory import find, make, parse_balance, parse_devices, parse_file
from aiotime.errors import ConfigurationError

if TYPE_CHECKING:
    from aiotime.learning import Rule


def parse_rule(text: str) -> Rule:
    """``adam`` -> `Delayed` with torch.optim.Adam; ``module:rule`` -> that rule, or what the function there returns."""
    import torch

    from aiotime.learning import Delayed, Rule

    if ":" in text:
        found = find(text)
        rule = found if isinstance(found, Rule) or not callable(found) else found()
        if not isinstance(rule, Rule):
            raise click.UsageError(f"--learn {text}: expected a rule of aiotime.learning, got a {type(rule).__name__}")
        return rule
    optimizers = {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    if text.lower() not in optimizers:
        raise click.UsageError(
            f"--learn {text}: torch.optim has {', '.join(sorted(optimizers))}; or name a rule of yours as module:rule"
        )
    return Delayed(loss=torch.nn.functional.mse_loss, optimizer=optimizers[text.lower()])


@click.command(short_help="Measure a model and print how it would be cut.")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("-e", "--example", multiple=True, metavar="SHAPE", help="A frame: 1,3,256,256, 1,16:int64 or name=1,16.")
@click.option(
    "-d", "--devices", metavar="LIST", help="Where stages may run: cpu:0,cpu:1. By default all GPUs, else all cores."
)
@click.option(
    "--compile",
    "way",
    type=click.Choice(["auto", "aot", "inductor", "cudagraph"]),
    help="Compile the stages; auto takes what is fastest. The first time takes minutes.",
)
@click.option("--balance", default="measured", show_default=True, help="measured, even, or layers per stage: 3,5.")
@click.option(
    "--learn",
    metavar="OPTIMIZER",
    help="Plan for a model that learns: adam, sgd, ... of torch.optim with the rule Delayed, or MODULE:RULE, your own.",
)
@click.option("--layers", is_flag=True, help="Print every layer, not only the stages.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True),
    callback=parse_file,
    help="Save the plan, for `aiotime run --plan`.",
)
def plan(
    factory: str,
    example: tuple[str, ...],
    devices: str | None,
    balance: str,
    way: str | None,
    learn: str | None,
    layers: bool,
    json_file: str | None,
) -> None:
    """Measure a model and print how it would be cut.

    MODULE:FACTORY names a function that returns the model, alone or with an example frame. Each layer is timed on
    each device; the cut is the one with the fastest slowest stage. Fewer stages than devices are
    used where more do not pay, and the plan says so.

    With --learn each layer's backward and update are timed as well, and the plan says what learning takes of memory.
    The loss is not part of it.

    \b
      aiotime plan net:make --example 1,3,256,256 --devices cpu:0,cpu:1 --json plan.json
      aiotime plan net:make --example 1,3,256,256 --devices cpu:0,cpu:1 --learn adam
      aiotime plan net:make --example 1,3,256,256 --devices cpu:0,cpu:1 --compile auto
    """  # noqa: D301 - \b keeps click from joining these lines
    import aiotime

    console = Console(highlight=False)
    try:
        made = make(factory, example=example)
        if made.model is None:
            raise click.UsageError(
                f"{factory} made a Pipeline, which is cut already; name a function that makes the model"
            )
        learner = None if learn is None else parse_rule(learn)
        if learner is None:
            made.model.eval()  # as a pipeline runs it
        # no spinner: drawing it would take time from what is measured
        with Live("measuring the model …", console=Console(stderr=True), auto_refresh=False, transient=True):
            planned = aiotime.plan(
                made.model,
                example=made.example,
                devices=parse_devices(devices),
                balance=parse_balance(balance),
                learner=learner,
                compile=way,
            )
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    if layers:
        click.echo(planned.table(layers=True))
    else:
        console.print(planned)
    if json_file is not None:
        Path(json_file).write_text(planned.to_json() + "\n", encoding="utf-8")
        console.print(f"wrote {json_file}")

"""``module:factory`` on the command line -> a model or a pipeline, and a frame as it takes it."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from aiotime.pipeline import Pipeline

NAMED = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:,\d+)*)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True, slots=True)
class Made:
    """What a factory made: a model or a pipeline, and one frame (None: not told)."""

    name: str
    model: torch.nn.Module | None
    pipeline: Pipeline | None
    example: Any


def make(name: str, *, example: tuple[str, ...]) -> Made:
    """Import and call the factory.

    Args:
        name: ``module:factory``, looked up in the current folder first. The factory is a function without required
            arguments, a Module class, or a ready object; it gives a model, a Pipeline or a pair with an example.
        example: shapes from the command line; else the pair's, else the factory's attribute ``example``.

    Raises:
        click.UsageError: nothing by that name, or what it gave is neither a model nor a pipeline.
    """
    import torch

    from aiotime.pipeline import Pipeline

    factory = find(name)
    made = factory
    if callable(factory) and not isinstance(factory, torch.nn.Module | Pipeline):
        made = factory()
    frame = getattr(factory, "example", None)
    if isinstance(made, tuple) and len(made) == 2:
        made, frame = made
    if callable(frame) and not isinstance(frame, torch.Tensor):
        frame = frame()
    if example:
        frame = parse_example(example)
    if isinstance(made, Pipeline):
        return Made(name, None, made, frame)
    if isinstance(made, torch.nn.Module):
        if frame is None:
            raise click.UsageError(
                f"{name} does not say what a frame looks like: give --example 1,3,256,256 (a shape), let the factory "
                "return (model, example), or set an attribute on it: factory.example = torch.zeros(1, 3, 256, 256)"
            )
        return Made(name, made, None, frame)
    raise click.UsageError(
        f"{name} gave a {type(made).__name__}; expected a torch.nn.Module, an aiotime.Pipeline, "
        "or a pair of one of them and an example frame"
    )


def find(name: str) -> Any:
    """The object that ``module:attribute`` names."""
    module_name, colon, attribute = name.partition(":")
    module_name = module_name.removesuffix(".py").replace("/", ".")
    if not colon or not module_name or not attribute:
        raise click.UsageError(f"{name!r} is not of the form module:factory, such as net:make for make() in net.py")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there; something that it imports is not
        raise click.UsageError(f"there is no module {module_name!r} here ({here}) nor installed") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            public = ", ".join(item for item in vars(found) if not item.startswith("_")) or "nothing"
            raise click.UsageError(f"{module_name} has no {attribute!r}; it has {public}") from error
    return found


def parse_example(given: tuple[str, ...]) -> Any:
    """Frames from shapes: ``1,3,256,256``, ``1,16:int64``, ``ids=1,16:int64``.

    One unnamed shape gives a tensor, several a tuple of positional arguments, named ones a dict of keyword
    arguments. Floating-point values are random in 0..1 with a fixed seed, integers are zero.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    named: dict[str, torch.Tensor] = {}
    unnamed: list[torch.Tensor] = []
    for text in given:
        match = NAMED.fullmatch(text.replace(" ", ""))
        dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
        if match is None or not isinstance(dtype, torch.dtype):
            raise click.UsageError(
                f"--example {text!r}: expected [name=]shape[:dtype], such as 1,3,256,256 or ids=1,16:int64"
            )
        shape = [int(extent) for extent in match["shape"].split(",")]
        floating = dtype.is_floating_point
        tensor = torch.rand(shape, generator=generator).to(dtype) if floating else torch.zeros(shape, dtype=dtype)
        if match["name"]:
            named[match["name"]] = tensor
        else:
            unnamed.append(tensor)
    if named and unnamed:
        raise click.UsageError("--example: name all inputs of the model or none")
    return named or (unnamed[0] if len(unnamed) == 1 else tuple(unnamed))


def parse_file(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """A file to be written at the end: refused at the beginning where its folder is not there."""
    if path is not None and not Path(path).parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(Path(path).parent)!r}")
    return path


def parse_devices(text: str | None) -> list[str] | None:
    """``cpu:0,cpu:1`` -> its parts; None stays None, which lets the pipeline choose."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def parse_balance(text: str) -> Any:
    """``measured``, ``even``, or layers by stage: ``3,5``."""
    if text in ("measured", "even"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(
            f"--balance {text!r}: expected measured, even, or layers per stage such as 3,5"
        ) from None

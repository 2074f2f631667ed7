"""Checkpoint: weights, optimizers, rule state and position of a pipeline at one cut through its stream; and its files.

    path/weights.safetensors     the model's state_dict, under its own keys
    path/learner.safetensors     every tensor of optimizers and rules, named by where it stands in the state
    path/state.json              everything else; a tensor is {"$tensor": its name}

A new checkpoint is written beside the old one and takes its place by a rename; should the machine die between the two
renames, the old one is found under its other name. No pickle anywhere: reading a file runs nobody's code.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from aiotime.errors import ConfigurationError

SCHEMA = 1
WEIGHTS, LEARNER, STATE = "weights.safetensors", "learner.safetensors", "state.json"

_writing = threading.Lock()  # two checkpoints of one process never swap folders at once


@dataclass(frozen=True, slots=True, eq=False)
class StagePart:
    """What one stage brings.

    Attributes:
        name: the stage.
        weights: its part of the model's state.
        about: what kind of learner it has (`StageLearner.about`); None: it does not learn.
        state: its ``state_dict()``.
    """

    name: str
    weights: Mapping[str, Any] = field(default_factory=dict)
    about: dict[str, Any] | None = None
    state: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """One consistent cut: every frame before it has been learned from, none after it.

    Attributes:
        pipeline: its name.
        weights: the model's state_dict at the cut.
        stages: what each stage's learner needs to go on.
        rule: the class of the learning rule; None: the pipeline did not learn.
        layers: per stage, how many layers it has; None where stages were made by hand.
        frames: how many frames had gone in, counted over restored checkpoints.
        key: ``Sample.key`` of the newest of them, where it is a plain value; else None.
        position: what the caller said of its source (a byte offset, a row).
        rng: states of torch's random number generators by device, where they were asked for.
        versions: of aiotime and torch, that wrote it.
    """

    pipeline: str
    weights: Mapping[str, Any]
    stages: Sequence[StagePart] = ()
    rule: str | None = None
    layers: Sequence[int] | None = None
    frames: int = 0
    key: Any = None
    position: Any = None
    rng: Mapping[str, torch.Tensor] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    # ------------------------------------------------------------------ files

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the folder ``path``; a checkpoint that is there is replaced when the new one is complete. Blocks.

        Raises:
            ConfigurationError: ``path`` is something else, or a value cannot be written.
        """
        target = Path(path).absolute()
        others: dict[str, Any] = {key: v for key, v in self.weights.items() if not isinstance(v, torch.Tensor)}
        tensors: dict[str, torch.Tensor] = {}
        content = {
            "schema": SCHEMA,
            "versions": dict(self.versions),
            "pipeline": self.pipeline,
            "rule": self.rule,
            "layers": None if self.layers is None else list(self.layers),
            "frames": self.frames,
            "key": pack(self.key, tensors, "key"),
            "position": pack(self.position, tensors, "position"),
            "rng": pack(None if self.rng is None else dict(self.rng), tensors, "rng"),
            "other weights": pack(others, tensors, "weights"),
            "stages": [
                {
                    "name": part.name,
                    "about": part.about,
                    "state": pack(part.state, tensors, f"stage {part.name!r}", name=str(at)),
                }
                for at, part in enumerate(self.stages)
            ],
        }
        with _writing:
            _check_target(target)
            fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
            fresh.mkdir(parents=True)
            try:
                weights = {key: v for key, v in self.weights.items() if isinstance(v, torch.Tensor)}
                _save(weights, fresh / WEIGHTS)
                _save(tensors, fresh / LEARNER)
                (fresh / STATE).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
                for name in (WEIGHTS, LEARNER, STATE):
                    _sync(fresh / name)
                _put_in_place(fresh, target)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The checkpoint in the folder ``path``. Blocks.

        Raises:
            ConfigurationError: there is none, it is damaged, or a newer aiotime wrote it.
        """
        target = Path(path).absolute()
        folder = target if target.exists() else _previous(target)
        if not (folder / STATE).is_file():
            raise ConfigurationError(f"no checkpoint is at {str(path)!r}; 'await pipeline.checkpoint(path)' makes one")
        try:
            content = json.loads((folder / STATE).read_text(encoding="utf-8"))
            schema = content["schema"]
            if schema != SCHEMA:
                raise ConfigurationError(
                    f"the checkpoint at {str(path)!r} has schema {schema}, written by aiotime "
                    f"{content['versions'].get('aiotime')}; this aiotime reads schema {SCHEMA}: use one of that age"
                )
            # copies: what is read may be a view of the file
            tensors = {key: tensor.clone() for key, tensor in load_file(folder / LEARNER).items()}
            weights: dict[str, Any] = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
            weights.update(unpack(content["other weights"], tensors))
            return cls(
                pipeline=content["pipeline"],
                weights=weights,
                stages=[
                    StagePart(part["name"], about=part["about"], state=unpack(part["state"], tensors))
                    for part in content["stages"]
                ],
                rule=content["rule"],
                layers=content["layers"],
                frames=content["frames"],
                key=unpack(content["key"], tensors),
                position=unpack(content["position"], tensors),
                rng=unpack(content["rng"], tensors),
                versions=content["versions"],
            )
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"the checkpoint at {str(path)!r} cannot be read: {type(error).__name__}: {error}"
            ) from error

    # ------------------------------------------------------------------ does it fit?

    def check(self, own: Sequence[StagePart], *, rule: str | None, layers: Sequence[int] | None) -> None:
        """Raise `ConfigurationError` unless learners like ``own`` can go on from here."""
        for difference in self._differences(own, rule, layers):
            raise ConfigurationError(
                f"the checkpoint of pipeline {self.pipeline!r} does not fit: {difference}; build the pipeline as it "
                "was, or take its weights alone: restore(path, weights_only=True)"
            )

    def _differences(self, own: Sequence[StagePart], rule: str | None, layers: Sequence[int] | None) -> Iterator[str]:
        if self.rule != rule:
            yield f"its rule is {self.rule or 'none'}, this pipeline's is {rule or 'none'}"
        if rule is None:
            return  # weights are all there is
        if self.layers is not None and layers is not None and list(self.layers) != list(layers):
            yield f"its stages have {list(self.layers)} layers (balance=...), these have {list(layers)}"
        if len(self.stages) != len(own):
            yield f"it has {len(self.stages)} stages, this pipeline {len(own)}"
        for theirs, mine in zip(self.stages, own, strict=True):
            if theirs.name != mine.name:
                yield f"its stage {theirs.name!r} is {mine.name!r} here"
            there, here = theirs.about or {}, mine.about or {}
            if bool(there) != bool(here):
                yield f"stage {mine.name!r} {'learned' if there else 'did not learn'} there"
            for what in dict.fromkeys([*here, *there]):
                if there.get(what) != here.get(what):
                    yield (
                        f"{what} of stage {mine.name!r}: {_shown(there.get(what), here.get(what))} there, "
                        f"{_shown(here.get(what), there.get(what))} here"
                    )


def _shown(value: Any, other: Any) -> str:
    """A value as an error shows it; of two mappings only where they differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: item for key, item in value.items() if other.get(key) != item}
    return "none" if value is None or value == {} else str(value)


# ---------------------------------------------------------------------- values


def copied(value: Any) -> Any:
    """The same nest of dicts, lists and tuples with a copy of every tensor, on the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(copied(item) for item in value)
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value


def pack(value: Any, tensors: dict[str, torch.Tensor], where: str, *, name: str | None = None) -> Any:
    """``value`` as JSON takes it, its tensors moved to ``tensors``.

    Args:
        value: dicts, lists, tuples, None, bool, int, float, str and tensors, nested.
        tensors: gets every tensor under a name of its own.
        where: for errors.
        name: what the names begin with, by default the same.

    Raises:
        ConfigurationError: it holds something else.
    """
    name = where if name is None else name
    if isinstance(value, torch.Tensor):
        return {"$tensor": _stow(value, tensors, name)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{where}[{at}]", name=f"{name}.{at}") for at, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        packed = {key: pack(item, tensors, f"{where}[{key!r}]", name=f"{name}.{key}") for key, item in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in packed):
            return packed
        return {"$dict": [[pack(key, tensors, f"a key of {where}"), item] for key, item in packed.items()]}
    raise ConfigurationError(
        f"{where} is a {type(value).__name__}, which a checkpoint does not hold; it takes tensors, None, bool, int, "
        "float, str, and lists, tuples and dicts of them"
    )


def unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What was packed."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(unpack(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value["$dict"]}
    return {key: unpack(item, tensors) for key, item in value.items()}


def is_plain(value: Any) -> bool:
    """Can `pack` take it?"""
    try:
        pack(value, {}, "value")
    except ConfigurationError:
        return False
    return True


def _stow(tensor: torch.Tensor, tensors: dict[str, torch.Tensor], name: str) -> str:
    unique, number = name, 1
    while unique in tensors:
        number += 1
        unique = f"{name}#{number}"
    tensors[unique] = tensor
    return unique


# ---------------------------------------------------------------------- folders


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # clones: a file takes no two tensors that share storage
    ready = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except Exception as error:
        raise ConfigurationError(f"{path.name} cannot be written: {type(error).__name__}: {error}") from error


def _check_target(target: Path) -> None:
    if target.exists() and not (target.is_dir() and ((target / STATE).is_file() or not any(target.iterdir()))):
        raise ConfigurationError(f"{str(target)!r} is there already and is no checkpoint; name a new folder")


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _put_in_place(fresh: Path, target: Path) -> None:
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    try:
        fresh.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have ``path`` on the disk before something else is done; where folders cannot be opened, they need not be."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # a file system that has no such thing
    finally:
        os.close(handle)

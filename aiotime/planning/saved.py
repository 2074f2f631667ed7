"""Plans that were saved: from what `Plan.to_json` wrote back to a `Plan`, every value looked at."""

from __future__ import annotations

from typing import Any, cast

from aiotime.compiling import WAYS
from aiotime.planning.footprint import StageLearning
from aiotime.planning.plan import LayerCost, Plan, StagePlan


def read_plan(data: dict[str, Any]) -> Plan:
    """The plan that ``data`` describes.

    Raises:
        KeyError, TypeError, ValueError: something is missing, or is not what it should be.
    """

    def number(value: Any) -> float | None:
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf")
        ):
            raise ValueError(f"expected seconds or null, got {value!r}")
        return cast("float | None", value)

    def count(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"expected a number of bytes, got {value!r}")
        return value

    def word(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"expected a name, got {value!r}")
        return value

    def way(value: Any) -> str | None:
        if value is not None and value not in WAYS[1:]:
            raise ValueError(f"expected a way to compile or null, got {value!r}")
        return cast("str | None", value)

    def learning(value: Any) -> StageLearning | None:
        if value is None:
            return None
        if not isinstance(value["recompute"], bool):
            raise TypeError(f"expected true or false, got {value['recompute']!r}")
        return StageLearning(
            backward_seconds=number(value["backward_seconds"]),
            update_seconds=number(value["update_seconds"]),
            activation_bytes=count(value["activation_bytes"]),
            input_bytes=count(value["input_bytes"]),
            graphs=count(value["graphs"]),
            recompute=value["recompute"],
            weight_bytes=count(value["weight_bytes"]),
            versions=count(value["versions"]),
            optimizer_bytes=count(value["optimizer_bytes"]),
        )

    # what is read with .get is not in files that were written before plans knew of learning
    layers = tuple(
        LayerCost(
            word(layer["name"]),
            number(layer["seconds"]),
            count(layer["output_bytes"]),
            count(layer["parameter_bytes"]),
            number(layer.get("backward_seconds")),
            number(layer.get("update_seconds")),
        )
        for layer in data["layers"]
    )
    stages = tuple(
        StagePlan(
            name=word(stage["name"]),
            layers=tuple(word(name) for name in stage["layers"]),
            device=word(stage["device"]),
            seconds=number(stage["seconds"]),
            transfer_seconds=number(stage["transfer_seconds"]),
            output_bytes=count(stage["output_bytes"]),
            parameter_bytes=count(stage["parameter_bytes"]),
            learning=learning(stage.get("learning")),
            compiled=way(stage.get("compiled")),
        )
        for stage in data["stages"]
    )
    if [name for stage in stages for name in stage.layers] != [layer.name for layer in layers] or not stages:
        raise ValueError("its stages do not hold its layers, each once and in order")
    advice, rule = data["advice"], data.get("rule")
    return Plan(
        stages,
        layers,
        number(data["sequential_seconds"]),
        None if advice is None else word(advice),
        None if rule is None else word(rule),
        number(data.get("paced_seconds")),
    )

"""A plan as a table: aligned text, or rich's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotime.observe.tables import size

if TYPE_CHECKING:
    from rich.console import Group

    from aiotime.planning.plan import LayerCost, Plan, StagePlan

STAGE_COLUMNS = ("stage", "device", "layers", "ms", "transfer ms", "bytes across the cut", "parameters")
LAYER_COLUMNS = ("layer", "ms", "bytes across the cut", "parameters", "stage", "device")
_PHASES = ("forward ms", "backward ms", "update ms")
LEARNING_COLUMNS = ("stage", "device", "layers", *_PHASES, "transfer ms", "bytes across the cut", "memory")
LEARNING_LAYER_COLUMNS = ("layer", *_PHASES, "bytes across the cut", "parameters", "stage", "device")
_LEFT = {"stage", "device", "layers", "layer"}
_TWO_LINES = {
    "transfer ms": "transfer\nms",
    "bytes across the cut": "bytes across\nthe cut",
    "forward ms": "forward\nms",
    "backward ms": "backward\nms",
    "update ms": "update\nms",
}
NOT_MEASURED = "–"


def columns(plan: Plan, *, layers: bool) -> tuple[str, ...]:
    """The heads; a plan for learning has more."""
    if layers:
        return LAYER_COLUMNS if plan.rule is None else LEARNING_LAYER_COLUMNS
    return STAGE_COLUMNS if plan.rule is None else LEARNING_COLUMNS


def rows(plan: Plan, *, layers: bool) -> list[tuple[str, ...]]:
    """The cells, one row a stage or one row a layer."""
    if not layers:
        return [_stage_row(at, stage) for at, stage in enumerate(plan.stages)]
    found: list[tuple[str, ...]] = []
    costs = iter(plan.layers)
    for at, stage in enumerate(plan.stages):
        for _ in stage.layers:
            cost = next(costs)
            found.append(
                (
                    cost.name,
                    *_spent(cost, learning=plan.rule is not None),
                    size(cost.output_bytes),
                    size(cost.parameter_bytes),
                    str(at),
                    stage.device,
                )
            )
    return found


def _stage_row(at: int, stage: StagePlan) -> tuple[str, ...]:
    inside = stage.layers[0] if len(stage.layers) == 1 else f"{stage.layers[0]} … {stage.layers[-1]}"
    return (
        str(at),
        stage.device,
        f"{inside} ({len(stage.layers)})",
        *_spent(stage, learning=stage.learning is not None),
        milliseconds(stage.transfer_seconds),
        size(stage.output_bytes),
        size(stage.memory_bytes),
    )


def _spent(cost: StagePlan | LayerCost, *, learning: bool) -> tuple[str, ...]:
    if not learning:
        return (milliseconds(cost.seconds),)
    return milliseconds(cost.forward_seconds), milliseconds(cost.backward_seconds), milliseconds(cost.update_seconds)


def summary(plan: Plan) -> list[str]:
    """The lines below the table."""
    lines: list[str] = []
    if plan.frames_per_second is None:
        lines.append('Nothing was measured; balance="measured" predicts frames/s.')
    else:
        line = f"Predicted: {rate(plan.frames_per_second)} frames/s"
        if plan.rule is not None:
            line += f", learned from with {plan.rule}"
        if plan.speed_up is not None and plan.sequential_seconds:
            alone = "by itself" if plan.rule is None else "trained by itself"
            line += f", {plan.speed_up:.2f} × the model {alone} ({rate(1 / plan.sequential_seconds)} frames/s)"
        lines.append(line)
    lines.extend(_memory(at, stage) for at, stage in enumerate(plan.stages) if stage.learning is not None)
    if plan.advice:
        lines.append(plan.advice)
    return lines


def _memory(at: int, stage: StagePlan) -> str:
    """Of what a stage's memory consists."""
    learning = stage.learning
    assert learning is not None
    parts = [f"parameters {size(stage.parameter_bytes)}"]
    if learning.graphs:
        many = "" if learning.graphs == 1 else "s"
        if learning.recompute:
            parts.append(f"{learning.graphs} input{many} × {size(learning.input_bytes)}")
            parts.append(f"1 graph × {size(learning.activation_bytes)}")
        else:
            parts.append(f"{learning.graphs} graph{many} × {size(learning.activation_bytes)}")
    if learning.weight_bytes:
        if learning.versions > 1:
            older = "1 older version" if learning.versions == 2 else f"{learning.versions - 1} older versions"
            parts.append(f"{older} × {size(learning.weight_bytes)}")
        parts.append(f"gradient {size(learning.weight_bytes)}")
    if learning.optimizer_bytes:
        parts.append(f"optimizer {size(learning.optimizer_bytes)}")
    return f"Memory of stage {at}: {' + '.join(parts)}"


def text(plan: Plan, *, layers: bool = False) -> str:
    """Plain aligned text."""
    heads = columns(plan, layers=layers)
    cells = [heads, *rows(plan, layers=layers)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for cell, width, column in zip(row, widths, heads, strict=True)
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join([*lines, *summary(plan)])


def rich_table(plan: Plan) -> Group:
    """One row a stage for rich, within 80 columns, and the summary below."""
    from rich.console import Group  # only where somebody prints with rich
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold underline")
    for column in columns(plan, layers=False):
        header = _TWO_LINES.get(column, column)
        table.add_column(header, justify="left" if column in _LEFT else "right", no_wrap=column != "layers")
    for row in rows(plan, layers=False):
        table.add_row(*map(Text, row))  # brackets in a name are no markup
    return Group(table, Text("\n".join(summary(plan))))


def milliseconds(seconds: float | None) -> str:
    """Three digits that matter, in milliseconds."""
    if seconds is None:
        return NOT_MEASURED
    return f"{seconds * 1e3:.3f}" if seconds < 1.0 else f"{seconds * 1e3:,.0f}"


def rate(per_second: float) -> str:
    """Three digits that matter, or all of a large number."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"

"""A plan as a table: aligned text, or rich's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotime.observe.tables import size

if TYPE_CHECKING:
    from rich.console import Group

    from aiotime.planning.plan import Plan, StagePlan

STAGE_COLUMNS = ("stage", "device", "layers", "ms", "transfer ms", "bytes across the cut", "parameters")
LAYER_COLUMNS = ("layer", "ms", "bytes across the cut", "parameters", "stage", "device")
_LEFT = {"stage", "device", "layers", "layer"}
_TWO_LINES = {"transfer ms": "transfer\nms", "bytes across the cut": "bytes across\nthe cut"}
NOT_MEASURED = "–"


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
                    milliseconds(cost.seconds),
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
        milliseconds(stage.seconds),
        milliseconds(stage.transfer_seconds),
        size(stage.output_bytes),
        size(stage.parameter_bytes),
    )


def summary(plan: Plan) -> list[str]:
    """The lines below the table."""
    lines: list[str] = []
    if plan.frames_per_second is None:
        lines.append('Nothing was measured; balance="measured" predicts frames/s.')
    else:
        line = f"Predicted: {rate(plan.frames_per_second)} frames/s"
        if plan.speed_up is not None and plan.sequential_seconds:
            line += f", {plan.speed_up:.2f} × the model by itself ({rate(1 / plan.sequential_seconds)} frames/s)"
        lines.append(line)
    if plan.advice:
        lines.append(plan.advice)
    return lines


def text(plan: Plan, *, layers: bool = False) -> str:
    """Plain aligned text."""
    columns = LAYER_COLUMNS if layers else STAGE_COLUMNS
    cells = [columns, *rows(plan, layers=layers)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
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
    for column in STAGE_COLUMNS:
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

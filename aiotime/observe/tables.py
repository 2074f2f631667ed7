"""How numbers and tables look in plain text and in rich: aligned columns, readable durations, shares and sizes.

`text_table` needs nothing installed; `rich_table` imports rich when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiotime.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.table import Table

GAP = "  "  # between two columns
NAME = 10  # columns that a name keeps on a narrow terminal before it is folded


def duration(seconds: float) -> str:
    """``seconds`` with three significant digits and the unit that suits them: 5.2 µs, 340 ms, 12.3 s, 4 min 10 s."""
    size = abs(seconds)
    if size >= 99.95:
        minutes, rest = divmod(round(size), 60)
        hours, minutes = divmod(minutes, 60)
        sign = "-" if seconds < 0 else ""
        return f"{sign}{hours} h {minutes:02d} min" if hours else f"{sign}{minutes} min {rest:02d} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if size >= scale * 0.9995:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns" if seconds else "0 s"


def count(number: float) -> str:
    """A number of things: whole ones with thousands apart, others with three significant digits."""
    return f"{int(number):,}" if float(number).is_integer() else _three_digits(number)


def share(part: float) -> str:
    """A share between 0 and 1 in per cent; what is there but below half a per cent is not shown as 0."""
    return "<1 %" if 0 < part < 0.005 else f"{part:.0%}".replace("%", " %")


def size(nbytes: float) -> str:
    """Bytes in the binary unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1023.5:
            return f"{int(nbytes)} B" if unit == "B" else f"{_three_digits(nbytes)} {unit}"
        nbytes /= 1024
    return f"{_three_digits(nbytes)} TiB"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns of equal width under ``header``: the first ``left`` columns flush left, the others flush right."""
    _check(header, rows)
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append(GAP.join(cells).rstrip())
    return "\n".join(lines)


def rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """The same table for rich; cells are shown as they are, brackets are no markup."""
    from rich.table import Table
    from rich.text import Text

    _check(header, rows)
    table = Table(box=None, pad_edge=False, header_style="bold underline")
    for column, name in enumerate(header):
        if column < left:
            longest = max(len(line[column]) for line in (header, *rows))
            table.add_column(name, overflow="fold", min_width=min(longest, NAME))
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _check(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        if len(row) != len(header):
            raise ConfigurationError(f"a row has {len(row)} cells where the header has {len(header)} columns: {row!r}")


def _three_digits(number: float) -> str:
    size = abs(number)
    if size >= 99.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if size >= 9.995 else f"{number:.2f}"

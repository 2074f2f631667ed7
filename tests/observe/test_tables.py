"""Numbers and tables in plain text and in rich."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aiotime.errors import ConfigurationError
from aiotime.observe.tables import count, duration, rich_table, share, size, text_table


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0 s"),
        (4.2e-9, "4.20 ns"),
        (5.21e-6, "5.21 µs"),
        (340e-6, "340 µs"),
        (0.99996e-3, "1.00 ms"),
        (0.0123, "12.3 ms"),
        (0.5, "500 ms"),
        (1.0, "1.00 s"),
        (99.94, "99.9 s"),
        (100, "1 min 40 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (-0.002, "-2.00 ms"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    """Three digits and the unit that suits them."""
    assert duration(seconds) == shown


@given(st.floats(min_value=1e-9, max_value=99.9))
def test_duration_is_close(seconds: float) -> None:
    """What is shown is within one half of the third digit of what was measured, and never 1000 of a unit."""
    number, unit = duration(seconds).split()
    scale = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]
    assert float(number) * scale == pytest.approx(seconds, rel=0.0051)
    assert float(number) < 1000


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0"), (1204, "1,204"), (97.94, "97.9"), (3.0, "3"), (1204.5, "1,204"), (0.25, "0.25")]
)
def test_count(number: float, shown: str) -> None:
    """Whole numbers stay whole, thousands are set apart."""
    assert count(number) == shown


@pytest.mark.parametrize(("part", "shown"), [(0, "0 %"), (0.001, "<1 %"), (0.345, "34 %"), (1, "100 %")])
def test_share(part: float, shown: str) -> None:
    """A little is told from nothing."""
    assert share(part) == shown


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1000, "1000 B"), (1024, "1.00 KiB"), (3 << 20, "3.00 MiB"), (1 << 50, "1,024 TiB")],
)
def test_size(nbytes: float, shown: str) -> None:
    """Bytes in binary units."""
    assert size(nbytes) == shown


def test_text_table_aligns() -> None:
    """Names flush left, numbers flush right."""
    table = text_table(["stage", "note", "n"], [["decode", "", "7"], ["a", "longer", "1,000"]], left=2)
    assert table.splitlines() == [
        "stage   note        n",
        "decode              7",
        "a       longer  1,000",
    ]


def test_text_table_without_rows() -> None:
    """A header alone is a table too."""
    assert text_table(["a", "b"], []) == "a  b"


def test_text_table_has_no_blanks_at_the_end() -> None:
    """A table can be pasted where blanks at the end of a line are an error."""
    assert text_table(["a", "note"], [["x", ""], ["y", "z"]], left=2) == "a  note\nx\ny  z"


def test_rows_must_fit_the_header() -> None:
    """A row with a cell too many is told, in both kinds of table."""
    for table in (text_table, rich_table):
        with pytest.raises(ConfigurationError, match="2 cells where the header has 1 columns"):
            table(["a"], [["1", "2"]])


def test_rich_table_shows_cells_as_they_are() -> None:
    """A name with brackets is no markup."""
    file = io.StringIO()
    Console(file=file, width=60).print(rich_table(["stage", "n"], [["[bold]x", "7"], ["y", "1,000"]]))
    assert file.getvalue().split("\n") == ["stage        n", "[bold]x      7", "y        1,000", ""]


def test_rich_table_keeps_numbers_on_a_narrow_terminal() -> None:
    """Where there is no room a long name is folded; numbers stay whole."""
    file = io.StringIO()
    Console(file=file, width=24).print(rich_table(["stage", "n"], [["a_rather_long_name", "1,234,567"]]))
    assert "1,234,567" in file.getvalue()
    assert "…" not in file.getvalue()

"""Layouts: rows, what all frames share, counts; joined and divided in proportion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiotime.batching.layout import Across, Layout
from aiotime.errors import ConfigurationError, InputError


def value(rows: int, start: float = 0.0) -> dict[str, Any]:
    """Rows, heads folded into the rows, a mask, how many rows there are, a constant."""
    x = torch.arange(rows, dtype=torch.float32)[:, None] + start
    return {"x": x, "heads": x.repeat_interleave(2, 0), "mask": torch.eye(3), "rows": rows, "name": "n"}


def both(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    joined = {key: torch.cat([one[key], two[key]]) for key in ("x", "heads")}
    return joined | {"mask": one["mask"], "rows": one["rows"] + two["rows"], "name": "n"}


def made(rows: int = 1) -> Layout:
    one, two = value(rows), value(rows, 10.0)
    return Layout("output", one, two, both(one, two), rows)


def test_there_and_back() -> None:
    """Frames of different sizes; what is shared is each frame's own to write into."""
    layout = made()
    values = [value(1), value(3, 5.0), value(2, 9.0)]
    looks = [layout.look(each) for each in values]
    assert len({signature for signature, _ in looks}) == 1
    sizes = [size for _, size in looks]
    joined = layout.join(values)
    assert (joined["rows"], joined["x"].shape, joined["heads"].shape) == (6, (6, 1), (12, 1))
    layout.check(joined, sizes)
    back = layout.part(joined, sizes)
    for one, other in zip(values, back, strict=True):
        assert torch.equal(one["x"], other["x"]) and torch.equal(one["heads"], other["heads"])
        assert (one["rows"], one["name"]) == (other["rows"], other["name"])
    back[0]["mask"].zero_()
    assert torch.equal(back[1]["mask"], torch.eye(3))


def test_exact() -> None:
    """Where other dimensions may differ only values of one shape are joined."""
    one, two = value(1), value(1, 10.0)
    layout = Layout("output", one, two, both(one, two), 1, exact=True)
    assert layout.look(value(1))[0] != layout.look(value(2))[0]


@pytest.mark.parametrize(
    ("key", "wrong", "why"),
    [
        ("x", torch.zeros(2, 1), r"output\['x'\] differs: .* off by 10"),
        ("x", torch.zeros(3, 1), r"output\['x'\] differs: a tensor of shape \(3, 1\)"),
        ("mask", torch.zeros(3, 3), r"output\['mask'\] differs"),
        ("rows", 7, r"output\['rows'\], a int, cannot be divided .* 1 and 1 for the two frames, 7 for both"),
        ("name", "m", r"output\['name'\], a str, cannot be divided"),
    ],
)
def test_what_differs(key: str, wrong: Any, why: str) -> None:
    """The message names the first value, and by how much."""
    one, two = value(1), value(1, 10.0)
    with pytest.raises(ConfigurationError, match=why):
        Layout("output", one, two, both(one, two) | {key: wrong}, 1)


def test_structure() -> None:
    """Another structure for two frames, no rows at all, and a later value that looks otherwise."""
    x = torch.ones(1)
    with pytest.raises(ConfigurationError, match="another structure"):
        Layout("output", x, x, [x, x], 1)
    with pytest.raises(ConfigurationError, match="no tensor whose first dimension"):
        Layout("output", {"a": 1.5}, {"a": 1.5}, {"a": 1.5}, 1)
    with pytest.raises(InputError, match="another structure than it had"):
        made().check([x], [1])
    layout = made()
    with pytest.raises(InputError, match="cannot be divided among them"):
        layout.check(value(3), [1, 1])


def test_across_a_piece() -> None:
    """Joined as what comes in, divided as what goes out."""
    x = torch.ones(1, 2)
    across = Across(Layout("input", x, 2 * x, torch.cat([x, 2 * x]), 1), made())
    signature, size = across.look(x)
    assert (size, across.look(3 * x)[0]) == (1, signature)
    assert across.join([x, x]).shape == (2, 2)
    assert [part["rows"] for part in across.part(value(4), [1, 3])] == [1, 3]

"""Tests of aiotime.ingest.inspection: what is refused at the door, and in which words."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from aiotime.errors import ConfigurationError, InputError
from aiotime.ingest.inspection import InputSpec, is_array, payload_bytes, require_finite

IMAGE = torch.zeros(1, 3, 4, 4)


def test_takes_what_the_example_shows() -> None:
    """A tensor like the example passes as it is, not a copy."""
    frame = torch.rand(1, 3, 4, 4)
    assert InputSpec(IMAGE).check(frame) is frame


@pytest.mark.parametrize(
    ("payload", "came"),
    [
        (torch.zeros(1, 3, 4, 5), "a float32 tensor of shape (1, 3, 4, 5)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "a uint8 tensor of shape (1, 3, 4, 4)"),
        (torch.zeros(3, 4, 4), "a missing batch dimension? use x.unsqueeze(0)"),
        (None, "a NoneType"),
        (3.0, "a float"),
        ((IMAGE,), "a tuple of [a float32 tensor of shape (1, 3, 4, 4)]"),
        ({"x": IMAGE}, "a dict of {'x': a float32 tensor of shape (1, 3, 4, 4)}"),
        (np.array(["a"]), "an array torch cannot hold"),
    ],
)
def test_refusals_say_what_was_expected_and_what_came(payload: Any, came: str) -> None:
    """A wrong frame is refused with its number, the expectation and what it is."""
    with pytest.raises(InputError, match=re.escape(came)) as caught:
        InputSpec(IMAGE).check(payload, 7, "camera")
    assert str(caught.value).startswith("frame 7 was refused: expected a float32 tensor of shape (1, 3, 4, 4), got ")
    assert (caught.value.frame, caught.value.key, caught.value.stage) == (7, "camera", None)


def test_a_request_has_no_number() -> None:
    """Refusing a submitted request speaks of the request."""
    with pytest.raises(InputError, match=r"^the request was refused"):
        InputSpec(IMAGE).check(0)


def test_other_devices_are_refused() -> None:
    """A tensor outside host memory is refused: the pipeline does the moving."""
    with pytest.raises(InputError, match="host memory, got one on meta"):
        InputSpec(IMAGE).check(IMAGE.to("meta"))


def test_numpy_becomes_a_tensor_that_shares_memory() -> None:
    """Arrays are taken wherever tensors are, without a copy."""
    array = np.ones((1, 3, 4, 4), dtype=np.float32)
    got = InputSpec(IMAGE).check(array)
    array[0, 0, 0, 0] = 5
    assert got[0, 0, 0, 0] == 5
    assert is_array(array)
    assert not is_array(got)


def test_an_array_may_be_the_example() -> None:
    """An example that is an array stands for a tensor."""
    spec = InputSpec(np.zeros((2, 2), dtype=np.float32))
    assert spec.check(torch.zeros(2, 2)).shape == (2, 2)
    with pytest.raises(InputError, match=r"expected a float32 tensor of shape \(2, 2\)"):
        spec.check(torch.zeros(2, 3))


def test_trees() -> None:
    """Tuples and dicts are compared leaf by leaf; the message names the place."""
    spec = InputSpec({"image": IMAGE, "size": (torch.zeros(2), 1)})
    good = {"image": IMAGE, "size": (np.zeros(2, dtype=np.float32), 5)}
    assert isinstance(spec.check(good)["size"][0], torch.Tensor)
    with pytest.raises(InputError, match=re.escape("at ['size'][0]: expected a float32 tensor of shape (2)")):
        spec.check({"image": IMAGE, "size": (torch.zeros(3), 1)})
    with pytest.raises(InputError, match="expected a int, got"):
        spec.check({"image": IMAGE, "size": (torch.zeros(2), "one")})
    with pytest.raises(InputError, match=r"expected a dict of .* got a list of"):
        spec.check([IMAGE])


def test_dynamic_dims() -> None:
    """A dim that may differ is free, the others are not; negative dims count from the end."""
    spec = InputSpec(torch.zeros(1, 3), dynamic=(0,))
    assert spec.check(torch.zeros(7, 3)).shape == (7, 3)
    for wrong in (torch.zeros(7, 4), torch.zeros(3), torch.zeros(1, 1, 3)):
        with pytest.raises(InputError, match=r"shape \(any, 3\)"):
            spec.check(wrong)
    assert InputSpec(torch.zeros(1, 3), dynamic=(-1,)).check(torch.zeros(1, 9)).shape == (1, 9)


def test_an_example_without_tensors_is_refused() -> None:
    """An example must show what the model takes."""
    with pytest.raises(ConfigurationError, match="holds no tensor"):
        InputSpec((1, "x"))


def test_require_finite() -> None:
    """NaN and infinity are refused with their number; whole numbers are not looked at."""
    fn = require_finite(lambda value: "called")
    assert fn((torch.zeros(2), torch.zeros(2, dtype=torch.long), 3)) == "called"
    with pytest.raises(InputError, match="2 NaN or infinite of 3"):
        fn({"x": torch.tensor([1.0, torch.nan, torch.inf])})


def test_payload_bytes() -> None:
    """Tensors and arrays count, wherever they are; other things weigh nothing."""
    assert payload_bytes(torch.zeros(4)) == 16
    assert payload_bytes({"a": torch.zeros(4), "b": (np.zeros(2), "text", None)}) == 32
    assert payload_bytes("text") == 0

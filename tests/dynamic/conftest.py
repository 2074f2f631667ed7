"""What tests of networks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.dynamic.nets import double_precision

# with the first optimizer of a process torch imports more of itself, which is not what the tests of blocking are about
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors have 64 bits inside the test."""
    with double_precision():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A result that nobody uses is warned of; some networks here have one on purpose."""
    for item in items:
        if "dynamic" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:instance .* used its result neither"))

"""What may share a batch, and what a call cannot be given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiotime.dynamic import Stage
from aiotime.dynamic.call import Call, unflattened
from aiotime.errors import InputError
from tests.dynamic.nets import Coded


class Somewhere:
    """As much of a station as a call looks at."""

    def __init__(self, *, batches: bool = True, cat: bool = False) -> None:
        self.name, self.batches, self.cat = "here", batches, cat


class Someone:
    """And of an instance."""

    def __init__(self, lesson: Any = None) -> None:
        self.lesson = lesson


def made(*args: Any, at: Any = None, learns: bool = False, **kwargs: Any) -> Call:
    where: Any = at or Somewhere()
    who: Any = Someone(object() if learns else None)
    return Call(where, who, args, kwargs)


X = torch.zeros(3)


def same(one: Call, other: Call) -> bool:
    return bool(one.signature == other.signature)


def test_equal_shapes_share_a_batch() -> None:
    """Shape, dtype, structure, constants and purpose must be equal."""
    assert same(made(X), made(torch.ones(3)))
    assert not same(made(X), made(torch.zeros(4)))
    assert not same(made(X), made(X.double()))
    assert not same(made(X), made(X, X))
    assert not same(made(X), made((X,)))
    assert not same(made(X), made(x=X))
    assert same(made(x=X, flag=True), made(x=torch.ones(3), flag=True))
    assert not same(made(x=X, flag=True), made(x=X, flag=False))
    assert not same(made(X), made(X, learns=True))
    assert same(made(X, None), made(X, None))


def test_constants_of_equal_value_and_other_type_differ() -> None:
    """1, 1.0 and True are equal, and multiply an integer tensor to different things."""
    signatures = [made(X, each).signature for each in (1, 1.0, True)]
    assert len(set(signatures)) == 3


def test_cat_ignores_the_first_dimension() -> None:
    """Any number of rows; all tensors of a call have the same."""
    at = Somewhere(cat=True)
    assert same(made(torch.zeros(2, 3), at=at), made(torch.zeros(5, 3), at=at))
    assert not same(made(torch.zeros(2, 3), at=at), made(torch.zeros(2, 4), at=at))
    with pytest.raises(InputError, match="without dimensions"):
        made(torch.tensor(1.0), at=at)
    with pytest.raises(InputError, match="same size in every tensor"):
        made(torch.zeros(2, 3), torch.zeros(3, 3), at=at)


def test_what_cannot_be_compared_cannot_be_batched() -> None:
    """A batching stage refuses it and says what to do; a stage without batches takes anything."""

    class Odd:
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(InputError, match="cannot do so with a Odd"):
        made(X, Odd())
    alone = made(X, Odd(), at=Somewhere(batches=False))
    assert alone.signature is None


def test_arguments_come_back_as_they_were() -> None:
    """Nested, with constants between the tensors, and with other tensors in their places."""
    args: Any = (X, [1, (X, "two")], {"a": X})
    kwargs: Any = {"b": None, "c": X}
    call = made(*args, **kwargs)
    assert len(call.tensors) == 4
    others = [torch.full((1,), float(n)) for n in range(4)]
    found, named = unflattened(call.spec, others)
    assert found == (others[0], [1, (others[1], "two")], {"a": others[2]})
    assert named == {"b": None, "c": others[3]}
    plain = made(X, X)
    assert unflattened(plain.spec, others[:2]) == ((others[0], others[1]), {})


@pytest.mark.asyncio
@pytest.mark.parametrize("max_batch", [1, 4])
async def test_constants_reach_the_module(max_batch: int) -> None:
    """Positional and named ones, each call its own."""

    async def code(net: Any, n: int) -> Any:
        out = await net.scale(torch.ones(2), n % 2 + 1, more={"plus": n % 3})
        assert out.tolist() == [n % 2 + 1 + n % 3] * 2
        return out

    def scale(x: torch.Tensor, by: int, *, more: dict[str, int]) -> torch.Tensor:
        return x * by + more["plus"]

    network = Coded(code, scale=Stage(scale, device="inline", max_batch=max_batch))
    assert len([step async for step in network.run(range(12))]) == 12


@pytest.mark.asyncio
async def test_an_error_at_the_call_is_the_instances() -> None:
    """What cannot be batched fails the instance that handed it in."""

    async def code(net: Any, n: int) -> Any:
        return await net.stage(torch.ones(2), {1, 2} if n == 1 else 3)

    network = Coded(code, stage=Stage(lambda x, y: x, device="inline", max_batch=2))
    run = network.run(range(3), on_error="skip")
    assert [step.index async for step in run] == [0, 2]
    with pytest.raises(InputError, match="runs waiting calls as one batch"):
        await alone(network)


async def alone(network: Coded) -> None:
    async with network.run([1]) as run:
        async for _ in run:
            pass

"""Replay: which frames stand beside the newest, in which order, and what happens to those that do not fit."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from aiotime import LATER, Pipeline, Sample
from aiotime.errors import ConfigurationError, InputError
from aiotime.learning import Exact
from aiotime.learning.replay import replay


def numbered(frames: int, *, targets: bool = True) -> list[Sample]:
    """Frame t holds t; its target is 10 t."""
    return [
        Sample(torch.full((1, 2), float(t)), torch.tensor(10 * t) if targets else None, key=t) for t in range(frames)
    ]


def inside(sample: Sample) -> list[int]:
    """Which frames a batch is made of."""
    return [int(row[0]) for row in sample.input]


def test_a_sliding_batch_ends_with_the_newest_frame() -> None:
    """``fill="grow"``: as many as there are, then the newest three; targets beside them, key of the newest."""
    found = list(replay(numbered(5), window=3, fill="grow"))
    assert [inside(sample) for sample in found] == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert [sample.target.tolist() for sample in found][-1] == [20, 30, 40]
    assert [sample.key for sample in found] == [0, 1, 2, 3, 4]
    assert found[-1].input.shape == (3, 2) and found[-1].target.shape == (3,)


def test_repeated_frames_fill_up_what_is_missing() -> None:
    """Every batch has the same shape, and the newest stays last."""
    found = list(replay(numbered(5), window=4))
    assert [inside(sample) for sample in found] == [
        [0, 0, 0, 0], [0, 1, 0, 1], [1, 2, 0, 1, 2][1:], [0, 1, 2, 3], [1, 2, 3, 4],
    ]  # fmt: skip
    assert {sample.input.shape for sample in found} == {(4, 2)}


def test_a_window_of_one_is_the_stream() -> None:
    """Nothing is kept, whatever is asked for."""
    for keep in ("recent", "reservoir"):
        found = list(replay(numbered(4), window=1, keep=keep))
        assert [inside(sample) for sample in found] == [[0], [1], [2], [3]]


def test_only_labelled_frames_are_remembered() -> None:
    """One without target is predicted beside the others and forgotten; the batch has no target then."""
    stream = numbered(5)
    stream[2] = Sample(stream[2].input, None, key=2)
    found = list(replay(stream, window=3, fill="grow"))
    assert [inside(sample) for sample in found] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [1, 3, 4]]
    assert [sample.target is None for sample in found] == [False, False, True, False, False]


def test_bare_inputs_are_predicted_alone() -> None:
    """They have no target, so none is ever remembered."""
    found = list(replay([torch.zeros(1, 2), torch.ones(1, 2)], window=3, fill="grow"))
    assert [inside(sample) for sample in found] == [[0], [1]]


def test_a_cut_empties_it_where_that_is_asked_for() -> None:
    """And the mark travels on either way."""
    stream = numbered(4)
    stream[2] = Sample(stream[2].input, stream[2].target, cut=True)
    found = list(replay(stream, window=3, fill="grow", empty_at_cut=True))
    assert [inside(sample) for sample in found] == [[0], [0, 1], [2], [2, 3]]
    assert [sample.cut for sample in found] == [False, False, True, False]
    assert inside(list(replay(stream, window=3, fill="grow"))[2]) == [0, 1, 2]


@given(
    frames=st.integers(1, 40),
    window=st.integers(1, 12),
    share=st.integers(1, 12),
    keep=st.sampled_from(["recent", "reservoir"]),
    seed=st.integers(0, 5),
    fill=st.sampled_from(["grow", "repeat"]),
)
def test_every_batch_holds_what_it_promises(
    frames: int, window: int, share: int, keep: Any, seed: int, fill: Any
) -> None:
    """The newest last, no frame of the future, none twice unless repeated, the size asked for, the same for a seed."""
    batch = min(share, window)
    options: dict[str, Any] = {"window": window, "batch": batch, "keep": keep, "seed": seed, "fill": fill}
    found = [inside(sample) for sample in replay(numbered(frames), **options)]
    assert found == [inside(sample) for sample in replay(numbered(frames), **options)]
    for t, members in enumerate(found):
        assert members[-1] == t and max(members) == t
        assert len(members) == (batch if fill == "repeat" else min(batch, t + 1))
        if fill == "grow":
            assert len(set(members)) == len(members)
        if keep == "recent":
            assert min(members) > t - window


def test_a_reservoir_remembers_every_frame_with_equal_chance() -> None:
    """40 frames into 8 places, 200 seeds: each frame is found about 40 times."""
    times: Counter[int] = Counter()
    for seed in range(200):
        *_, last = replay(numbered(41), window=9, keep="reservoir", seed=seed)
        times.update(inside(last)[:-1])
    assert times.total() == 200 * 8
    assert all(15 < times[frame] < 65 for frame in range(40))  # more than 4 deviations off in either direction
    assert sum(times[frame] for frame in range(20)) == pytest.approx(800, abs=100)


def test_pytrees_arrays_and_plain_numbers_are_joined_leaf_by_leaf() -> None:
    """A dict of a tensor and a tuple; targets as a list of an int and an array; other leaves are the newest frame's."""
    stream = [
        Sample({"x": torch.full((1, 2), t), "y": (torch.full((1, 1, 3), t), "text", t)}, [t, torch.tensor([t]).numpy()])
        for t in range(3)
    ]
    *_, last = replay(stream, window=3)
    assert last.input["x"].shape == (3, 2) and last.input["y"][0].shape == (3, 1, 3)
    assert last.input["y"][1:] == ("text", 2)
    assert [target.tolist() for target in last.target] == [[0, 1, 2], [0, 1, 2]]


def test_a_frame_that_fits_no_batch_is_refused_in_its_turn() -> None:
    """Another shape or structure becomes an InputError in its place, unread frames too; it is not remembered."""
    stream = numbered(5)
    stream[1] = Sample(torch.zeros(1, 3), torch.tensor(0), key="wide")
    stream[2] = Sample((torch.zeros(1, 2),), torch.tensor(0), key="tuple")
    stream[3] = Sample(InputError("unreadable"), key="bad")
    found = list(replay(stream, window=3, fill="grow"))
    assert [sample.key for sample in found if isinstance(sample.input, InputError)] == ["wide", "tuple", "bad"]
    assert found[1].input.key == "wide" and "one batch" in str(found[1].input)
    assert inside(found[4]) == [0, 4]


def test_targets_that_come_later_are_refused() -> None:
    """With the way out."""
    with pytest.raises(ConfigurationError, match="once the target is known"):
        list(replay([Sample(torch.zeros(1), LATER, key=1)]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 0}, "window is a number of frames from 1"),
        ({"window": 4, "batch": 5}, "batch is a number of frames from 1 to window=4"),
        ({"keep": "all"}, "keep must be"),
        ({"fill": "zeros"}, "fill must be"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(options: dict[str, Any], says: str) -> None:
    """Before anything is pulled."""
    with pytest.raises(ConfigurationError, match=says):
        replay([], **options)


def test_what_is_no_source_is_refused() -> None:
    """A string is iterable, and surely a mistake."""
    for source in ("text", 3, {"a": 1}):
        with pytest.raises(ConfigurationError, match="replay takes an iterable"):
            replay(source)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_an_async_source_stays_async_and_is_closed() -> None:
    """Leaving it early closes what it reads from."""
    closed = []

    async def camera() -> AsyncIterator[Sample]:
        try:
            for sample in numbered(100):
                yield sample
        finally:
            closed.append(True)

    stream = replay(camera(), window=2, fill="grow")
    assert [inside(await anext(stream)) for _ in range(3)] == [[0], [0, 1], [1, 2]]
    await stream.aclose()  # type: ignore[attr-defined]
    assert closed == [True]


def test_leaving_a_plain_one_closes_its_source() -> None:
    """As a file would be."""
    closed = []

    def lines() -> Iterator[Sample]:
        try:
            yield from numbered(100)
        finally:
            closed.append(True)

    stream = replay(lines(), window=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert closed == [True]


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("fill", ["grow", "repeat"])
async def test_learning_on_the_window_is_mini_batch_training(fill: Any) -> None:
    """The pipeline's losses and weights are those of a plain loop over the same batches."""
    generator = torch.Generator().manual_seed(0)
    stream = [
        Sample(torch.randn(1, 6, generator=generator), torch.randint(0, 3, (1,), generator=generator))
        for _ in range(20)
    ]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = partial(torch.optim.SGD, lr=0.2)
    example = torch.zeros(4, 6)
    pipeline = await asyncio.to_thread(
        lambda: Pipeline(
            model,
            example=example,
            devices=["cpu:0", "cpu:1"],
            balance=[2, 1],
            dynamic=(0,) if fill == "grow" else None,
            learner=Exact(loss=cross_entropy, optimizer=optimizer),
        )
    )
    async with asyncio.timeout(20):
        seen = [prediction async for prediction in pipeline.run(replay(stream, window=4, fill=fill))]
    step = optimizer(model.parameters())
    for sample, prediction in zip(replay(stream, window=4, fill=fill), seen, strict=True):
        output = model(sample.input)
        torch.testing.assert_close(prediction.output[-1], output[-1].detach())
        loss = cross_entropy(output, sample.target)
        assert prediction.loss == pytest.approx(loss.item(), rel=1e-5)
        step.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        step.step()
    torch.testing.assert_close(pipeline.state_dict(), dict(model.state_dict()))

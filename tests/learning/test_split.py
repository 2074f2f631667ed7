"""Halves: a backward in two parts has the gradients of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from aiotime.learning import Delayed
from aiotime.learning.learner import Site
from aiotime.learning.split import Halves
from aiotime.learning.ticket import Ticket


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.inner(x)
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Positions(nn.Module):
    """A parameter on a path without the input, and another behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x * self.mix(self.table).tanh() + self.table
        return y


class Twice(nn.Module):
    """One module called twice, and a weight that is used as it is and through another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.own = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(self.own(self.layer(x)).relu() * self.gain) * self.gain.exp()
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x).relu())
        return y


class Several(nn.Module):
    """Outputs that need the input, that do not, and that are the input or a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.free = nn.Parameter(torch.randn(3, 8))
        self.both = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        aside = (self.free * self.both).sin()
        return self.layer(x) * self.both, aside, x, self.free, aside.sum() + x.sum()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.used(x)
        return y


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        y[..., :4].mul_(self.layer.bias[:4])
        return y.relu_()


class Chunks(nn.Module):
    """A node with several outputs, of which one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 24)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, _, c = self.layer(x).chunk(3, dim=-1)
        y: torch.Tensor = self.gru(a * c.sigmoid())[0]
        return y


class Square(torch.autograd.Function):
    """w x², with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return w * x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return 2 * grads[0] * w * x, (grads[0] * x * x).sum_to_size(w.shape)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(Square.apply(self.layer(x), self.w))  # type: ignore[no-untyped-call]
        return y


ROWS = (2, 5, 8)
IMAGE = (2, 3, 6, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (partial(nn.Linear, 8, 8), ROWS),
    "stack": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.GELU()), ROWS),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)), ROWS),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3), nn.Flatten()
        ),
        IMAGE,
    ),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)), IMAGE),
    "residual": (lambda: nn.Sequential(Residual(nn.Linear(8, 8), nn.ReLU()), Residual(nn.LayerNorm(8))), ROWS),
    "attention": (lambda: nn.Sequential(Residual(nn.LayerNorm(8), Attention()), nn.Linear(8, 3)), ROWS),
    "positions": (lambda: nn.Sequential(Positions(), nn.Linear(8, 8)), ROWS),
    "twice": (Twice, ROWS),
    "tied": (Tied, ROWS),
    "several": (Several, ROWS),
    "unused": (Unused, ROWS),
    "in place": (InPlace, ROWS),
    "chunks": (Chunks, ROWS),
    "custom": (Custom, ROWS),
    "none": (nn.ReLU, ROWS),
}


def outputs_of(made: Any) -> list[torch.Tensor]:
    return list(made) if isinstance(made, tuple) else [made]


def test_two_parts_equal_one() -> None:
    """For every kind of graph both parts together have the bits of one ``autograd.grad``."""
    torch.manual_seed(0)
    for name, (make, shape) in CASES.items():
        module = make()
        weights: list[torch.Tensor] = list(module.parameters())
        x = torch.randn(shape, requires_grad=True)
        seeds = [torch.randn_like(output) for output in outputs_of(module(x))]
        whole = torch.autograd.grad(outputs_of(module(x)), [x, *weights], seeds, allow_unused=True)
        halves = Halves(outputs_of(module(x)), seeds, [x], weights)
        found = [*halves.first(), *halves.second()]
        assert len(found) == len(whole)
        for mine, theirs in zip(found, whole, strict=True):
            assert (mine is None) == (theirs is None), name
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine, theirs, msg=partial("{0}: {1}".format, name))


def test_weights_wait() -> None:
    """The first part computes no weight gradient that can wait, the second does not walk the chain again."""
    ran: list[str] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
            ran.append(ctx.name)
            return grads[0], None

    noted: Callable[..., torch.Tensor] = Noted.apply
    x, u, v = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    y = noted(noted(x @ noted(u, "u"), "chain") @ noted(v, "v"), "chain")
    halves = Halves([y], [torch.ones_like(y)], [x], [u, v])
    halves.first()
    assert ran == ["chain", "chain"]
    halves.second()
    assert sorted(ran[2:]) == ["u", "v"]


def test_what_cannot_wait_is_taken_at_once() -> None:
    """A module called twice is differentiated in the first part, the others still wait."""
    module = Twice()
    x = torch.randn(2, 8, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]
    halves = Halves([module(x).sum()], [None], [x], list(module.parameters()))
    halves.first()
    there = {name for name, grad in zip(names, halves._grads, strict=True) if grad is not None}
    assert there == {"gain", "layer.weight", "layer.bias"}


def test_nothing_to_do() -> None:
    """Without roots there are no gradients; without an entry all are weights'."""
    layer = nn.Linear(3, 2)
    weights: list[torch.Tensor] = list(layer.parameters())
    x = torch.randn(1, 3)
    assert Halves([], [], [x], weights).first() == [None]
    halves = Halves([layer(x).sum()], [None], [], weights)
    assert halves.first() == []
    assert all(grad is not None for grad in halves.second())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_hands_on_first(recompute: bool) -> None:
    """A stage returns the message before its weights move; `finish` moves them as an unsplit backward does."""

    def stage(split: bool) -> Any:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        rule = Delayed(
            loss=functional.cross_entropy, optimizer=partial(torch.optim.Adam, lr=0.1), split=split, recompute=recompute
        )
        return rule.stage(Site(1, 3, "middle", model, [("", model)], passes_down=True))

    def lead(hands: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        ticket = Ticket(0, 3, learn=True, target=torch.tensor([0]))
        hands.forward(ticket, torch.ones(1, 4))
        message = hands.backward(ticket, [torch.tensor([[1.0, -1.0]])])
        at_message = hands.weights.snapshot()
        hands.drop(Ticket(1, 3, learn=True))  # a late frame that is given up between the two parts
        hands.finish(ticket)
        assert hands.kept_nbytes() == 0
        return message, [*at_message, *hands.weights.snapshot()]

    whole, split = lead(stage(split=False)), lead(stage(split=True))
    assert torch.equal(whole[0][0], split[0][0])
    half = len(whole[1]) // 2
    assert all(torch.equal(a, b) for a, b in zip(whole[1][half:], split[1][half:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(split[1][:half], split[1][half:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[1][:half], whole[1][half:], strict=True))

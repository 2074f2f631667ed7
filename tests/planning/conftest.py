"""Models to divide: each fixture value is a model in eval mode and an example it takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(x + self.bn2(self.conv2(y)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Residual(8), Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(self.stem(x))
        return self.head(x.mean(dim=(2, 3)))


class UNet(nn.Module):
    """Two inputs, long skips, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)])
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(32, 8, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)])

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Any]:
        x = torch.cat([image, mask], dim=1)
        skips = []
        for down in self.down:
            x = F.relu(down(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.relu(self.middle(x))
        for up in self.up:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:])
            x = F.relu(up(torch.cat([x, skip], dim=1)))
        return {"mask": x, "aux": [x.mean(), (mask, None)]}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (y.view(batch, time, self.heads, width // self.heads).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        weights = scores.masked_fill(mask[:time, :time], float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tied embedding and head, a causal mask that is not in the state_dict, positions made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 16)
        self.positions = nn.Embedding(16, 16)
        self.blocks = nn.ModuleList([Block(16, 2) for _ in range(3)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.tokens.weight
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))


class Translator(nn.Module):
    """Encoder and decoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(20, 16)
        self.target = nn.Embedding(20, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, source: Tensor, target: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        return self.head(self.transformer(self.source(source), self.target(target), tgt_mask=mask, tgt_is_causal=True))


class Keywords(nn.Module):
    """Keyword arguments, one of them a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(
        self, *, left: Tensor, right: Tensor, negate: bool = False, scale: float | None = None
    ) -> dict[str, Any]:
        both = self.left(left) + self.right(right)
        if negate:
            both = -both
        return {"sum": both, "sides": (left, right), "scale": scale}


class Nested(nn.Module):
    """One argument that is a dict with lists in it; an OrderedDict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any]) -> OrderedDict[str, Tensor]:
        a = self.a(batch["x"]).relu()
        b = self.b(batch["rest"][0]).relu()
        return OrderedDict(b=b * a, a=a + batch["rest"][1])


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.middle = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.middle(self.inner(x)))


class Splitter(nn.Module):
    """Returns a tuple, in the midst of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.fc(x)
        return y[..., :3], {"rest": y[..., 3:]}


class Joiner(nn.Module):
    def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> Any:
        return pair[0] * pair[1]["rest"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.lstm, self.after = nn.Linear(4, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (hidden, _) = self.lstm(self.before(x))
        return self.after(y), hidden


class InPlace(nn.Module):
    """Changes a value of which a view lives on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        view = y[:, :2]
        z = self.b(x)
        y.add_(z)
        return torch.cat([view, y], dim=1)


class Echo(nn.Module):
    """Its output is, in part, its input and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, self.fc(x), self.fc.bias


class Precise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self.fc(x)
        return y + torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


@dataclass
class Case:
    model: nn.Module
    example: Any

    def __call__(self) -> Any:
        if isinstance(self.example, dict):
            return self.model(**self.example)
        return self.model(*self.example) if isinstance(self.example, tuple) else self.model(self.example)


def sequential() -> nn.Sequential:
    """Nested, with an in-place change at a cut."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Sequential(nn.Conv2d(6, 4, 3), nn.Identity())),
        nn.Flatten(),
        nn.Linear(4 * 12 * 12, 7),
    )


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "sequential": lambda: (sequential(), torch.randn(2, 3, 16, 16)),
    "sequential by keyword": lambda: (sequential(), {"input": torch.randn(2, 3, 16, 16)}),
    "sequential of structures": lambda: (
        nn.Sequential(nn.ReLU(), Splitter(), Joiner(), nn.Linear(3, 3)),
        torch.randn(2, 4),
    ),
    "one layer": lambda: (nn.Linear(3, 3), torch.randn(2, 3)),
    "residual": lambda: (ResNet(), torch.randn(1, 3, 8, 8)),
    "unet": lambda: (UNet(), (torch.randn(1, 3, 16, 16), torch.randn(1, 1, 16, 16))),
    "gpt": lambda: (GPT(), torch.randint(0, 31, (2, 9))),
    "encoder-decoder": lambda: (Translator(), (torch.randint(0, 20, (2, 7)), torch.randint(0, 20, (2, 5)))),
    "keywords": lambda: (
        Keywords(),
        {"right": torch.randn(2, 6), "left": torch.randn(2, 6), "negate": True},
    ),
    "nested": lambda: (Nested(), ({"x": torch.randn(2, 4), "rest": [torch.randn(2, 4), torch.randn(4)]},)),
    "twice": lambda: (Twice(), torch.randn(2, 5)),
    "recurrent": lambda: (Recurrent(), torch.randn(2, 6, 4)),
    "in place": lambda: (InPlace(), torch.randn(2, 4)),
    "echo": lambda: (Echo(), torch.randn(2, 3)),
    "precise": lambda: (Precise(), torch.randn(2, 3, dtype=torch.float64)),
}


@pytest.fixture
def make() -> Callable[[str], Case]:
    """A case by name, its weights drawn anew but the same in each test; batch norm with statistics of its own."""

    def made(name: str) -> Case:
        torch.manual_seed(0)
        model, example = CASES[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.normal_()
        return Case(model.eval(), example)

    return made


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, make: Callable[[str], Case]) -> Case:
    """Each of the models above."""
    return make(request.param)

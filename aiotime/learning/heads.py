"""Heads: small networks that guess the model's output from what leaves a stage, so that a stage has a loss of its own.

    stage k ──▶ cut ──▶ next stage            default heads, by the shapes of the cut and of the model's output
                 │                                (F,)          ─▶ (G,)           linear
                 ▼                                (N, F)        ─▶ (N, *)         linear
               head_k ──▶ guess ──▶ loss          (N, T, F)     ─▶ (N, T, G)      linear at each position
                                                  (N, T, F)     ─▶ (N, *)         mean over positions, linear
                                                  (N, C, H, W)  ─▶ (N, *)         pooling, 1x1 convolution, linear
                                                  (N, C, H, W)  ─▶ (N, C', H', W')  convolution, resizing, 1x1

The convolutional one follows Belilovsky et al., "Decoupled Greedy Learning of CNNs" (ICML 2020): a head must be cheap
beside its stage, so it looks at a coarse picture. Where several tensors cross a cut, a head reads the widest floating
one: the one with most elements, the first of equals.

Here are also the hands of a stage that has a head (`Headed`). A head is evaluated when its stage's backward runs, with
the head's newest weights: the output is not held up, and nothing of the head is kept between forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError
from aiotime.learning.boundary import tensors_of
from aiotime.learning.learner import Kept, Site, StageLearner
from aiotime.learning.rule import Rule
from aiotime.learning.ticket import Ticket
from aiotime.learning.update import Updater
from aiotime.learning.weights import slots_of

HeadFactory = Callable[[int, Any, Any], nn.Module]

PREFIX = "local_head."  # of a head's parameters among those of its stage
COARSE = 4  # positions per side that a pooled head sees of an image
COARSER = 2  # and that its linear layer sees
WIDEST = 32  # channels inside a dense head, at most


@dataclass(frozen=True, slots=True)
class Heads:
    """How the heads of a pipeline are made.

    Args:
        factory: ``(stage index, example of the cut, example of the output) -> module`` that is called with what leaves
            the stage (a tensor, or a tuple where several cross the cut) and returns what the loss takes; the example of
            the output is None in `Pipeline.from_stages`. None: the default for the shapes.
        seed: of the default heads' first weights, which the global random numbers do not influence.
    """

    factory: HeadFactory | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.factory is not None and not callable(self.factory):
            raise ConfigurationError(
                f"head must be a callable (stage_index, example_of_cut, example_of_output) -> nn.Module, "
                f"not {self.factory!r}"
            )

    def make(self, site: Site, cut: Any, output: Any) -> nn.Module:
        """The head of the stage at ``site``, on the stage's device and in the mode that the factory left it in.

        Raises:
            ConfigurationError: no default fits the shapes, or the user's factory returned no module.
        """
        if self.factory is None:
            try:
                return default_head(cut, output, seed=self.seed, stage=site.index).to(site.device)
            except ConfigurationError as error:
                raise ConfigurationError(f"stage {site.name!r}: {error}") from None
        made = self.factory(site.index, _bare(cut), output)
        if not isinstance(made, nn.Module):
            raise ConfigurationError(
                f"stage {site.name!r}: head(...) returned a {type(made).__name__}, not a torch.nn.Module"
            )
        return copy.deepcopy(made).to(site.device)  # the same module may be meant for several stages


def default_head(cut: Any, output: Any, *, seed: int = 0, stage: int = 0) -> nn.Module:
    """A head from the shapes of what leaves a stage and of the model's output; see the module's table.

    Args:
        cut: example of what leaves the stage: a tensor, or a pytree with a floating tensor in it.
        output: example of the model's output: one floating tensor.
        seed: of its first weights.
        stage: the stage's position; the same seed, stage and shapes give the same weights.

    Raises:
        ConfigurationError: no default fits.
    """
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        what = type(output).__name__ if not isinstance(output, torch.Tensor) else f"tensor of {output.dtype}"
        raise ConfigurationError(
            f"default heads imitate a model that returns one floating tensor; this one returns a {what}. {_WAY_OUT}"
        )
    found = [(tensor.numel(), -at) for at, tensor in enumerate(tensors_of(cut)) if tensor.is_floating_point()]
    if not found:
        raise ConfigurationError(f"no floating tensor leaves this stage that a head could read. {_WAY_OUT}")
    at = -max(found)[1]
    widest = tensors_of(cut)[at]
    inner = _fitting(tuple(widest.shape), tuple(output.shape))
    if inner is None:
        raise ConfigurationError(
            f"no default head leads from {tuple(widest.shape)} at the cut to the output's {tuple(output.shape)}. "
            f"{_WAY_OUT}"
        )
    _initialise(inner, torch.Generator().manual_seed(seed + 1_000_003 * stage))
    return _Reading(inner, at).to(widest.dtype)


_WAY_OUT = (
    "Hand in head=, a callable (stage_index, example_of_cut, example_of_output) -> nn.Module that returns what the "
    "loss takes"
)


def _fitting(cut: tuple[int, ...], output: tuple[int, ...]) -> nn.Module | None:
    if len(cut) == len(output) == 1:
        return _linear(cut[0], output[0])
    if len(output) < 2 or len(cut) < 2 or cut[0] != output[0]:
        return None
    tail = output[1:]
    if len(cut) == 2:
        return _VectorHead(cut[1], tail)
    if len(cut) == 3:
        if len(output) == 3 and cut[1] == output[1]:
            return _linear(cut[2], output[2])  # acts on the last dimension alone
        return nn.Sequential(_Mean(), _VectorHead(cut[2], tail))
    if len(cut) == 4:
        return _DenseHead(cut[1], (tail[0], tail[1], tail[2]), cut[2:]) if len(tail) == 3 else _ImageHead(cut, tail)
    return None


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # draws no global random numbers


def _conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, device="meta").to_empty(device="cpu")


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """The law that torch has for linear and convolutional layers, U(-1/√fan_in, 1/√fan_in), from ``generator``."""
    with torch.inference_mode(mode=False), torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = 1.0 / sqrt(max(1, layer.weight[0].numel()))
                layer.weight.uniform_(-bound, bound, generator=generator)
                if layer.bias is not None:
                    layer.bias.uniform_(-bound, bound, generator=generator)


class _Reading(nn.Module):
    """Applies ``inner`` to tensor number ``at`` of what leaves the stage."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner = inner
        self.at = at

    def forward(self, cut: Any) -> Any:
        return self.inner(tensors_of(cut)[self.at])


class _VectorHead(nn.Module):
    def __init__(self, features: int, tail: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = _linear(features, prod(tail))
        self.tail = tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, F)
        y: torch.Tensor = self.linear(x)  # (N, prod(tail))
        return y if len(self.tail) == 1 else y.reshape(x.shape[0], *self.tail)


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1)  # (N, T, F) -> (N, F)


class _ImageHead(nn.Module):
    def __init__(self, cut: tuple[int, ...], tail: tuple[int, ...]) -> None:
        super().__init__()
        _, channels, height, width = cut
        self.coarse = min(height, COARSE), min(width, COARSE)
        self.coarser = min(height, COARSER), min(width, COARSER)
        self.conv = _conv(channels, channels, 1)
        self.linear = _VectorHead(channels * prod(self.coarser), tail)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        x = functional.relu(self.conv(functional.adaptive_avg_pool2d(x, self.coarse)))  # (N, C, 4, 4)
        x = functional.adaptive_avg_pool2d(x, self.coarser)  # (N, C, 2, 2)
        guess: torch.Tensor = self.linear(x.flatten(1))  # (N, *tail)
        return guess


class _DenseHead(nn.Module):
    def __init__(self, channels: int, tail: tuple[int, int, int], size: tuple[int, ...]) -> None:
        super().__init__()
        inside = min(channels, WIDEST)
        self.near = _conv(channels, inside, 3)
        self.last = _conv(inside, tail[0], 1)
        self.size = None if tail[1:] == tuple(size) else tail[1:]  # None: as large as what comes in

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        x = functional.relu(self.near(x))
        if self.size is not None:
            x = functional.interpolate(x, self.size, mode="bilinear", align_corners=False)
        guess: torch.Tensor = self.last(x)  # (N, C', H', W')
        return guess


class Headed(StageLearner):
    """Back-propagation through a stage, and a head with a loss of its own on what leaves it.

    Args:
        site: the stage.
        rule: the user's settings.
        heads: how a head is made.
        wanted: this stage has a head; the last stage never does, the model's output is its guess.
        waits: where no example is known, the backward of the first frame waits for the model's output.
        **settings: for the next class in line.

    The head's parameters are behind those of the stage in `weights` and in the stage's optimizer, and part of
    `state_dict`; they are no part of the model.
    """

    def __init__(
        self, site: Site, rule: Rule, *, heads: Heads, wanted: bool = True, waits: bool = True, **settings: Any
    ) -> None:
        self.heads = heads
        self.head: nn.Module | None = None
        self.headed = wanted and not site.top
        self.body = 0  # parameters of the stage itself
        self._restored: Mapping[str, Any] | None = None  # a checkpoint for a head that is not made yet
        self._guess: list[int] | None = None  # shape of the model's output, where the first frame has shown it
        if self.headed and site.final is None and not waits and heads.factory is None:
            raise ConfigurationError(
                f"stage {site.name!r}: no example shows what the model returns, so no default head can be made. "
                f"Build the pipeline with Pipeline(model, example=...). Or: {_WAY_OUT}"
            )
        super().__init__(site, rule, **settings)

    # ------------------------------------------------------------------ the head is made

    def make_updater(self) -> Updater | None:
        """With the head's parameters: at once where an example shows the shapes, else with the first frame."""
        self.body = len(self.weights.masters)
        unknown = self.site.final is None
        # also where no head is wanted: a stage below may wait for the model's output by way of this one
        self.unformed = unknown and not self.top and self.heads.factory is None
        if self.headed and not unknown:
            self._make_head(self.site.exit, self.site.final)
        return super().make_updater()  # where the head is still to come: one more is made with it

    def _make_head(self, cut: Any, output: Any) -> None:
        with torch.inference_mode(mode=False):
            self.head = self.heads.make(self.site, cut, output)
            self.weights.extend(slots_of([(PREFIX, self.head)]))

    def _form(self, ticket: Ticket, cut: Any) -> nn.Module:
        """Make the head that no example could show the shapes for."""
        example = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, cut)
        self._make_head(example, ticket.final if self.heads.factory is None else None)
        self._guess = list(ticket.final.shape) if isinstance(ticket.final, torch.Tensor) else None
        self.unformed = False
        self.updater = super().make_updater()
        if self._restored is not None:
            restored, self._restored = self._restored, None
            self.load_state_dict(dict(restored))
        assert self.head is not None
        return self.head

    def form_early(self, ticket: Ticket, cut: Any) -> None:
        """Make the head before the model's output is there, where it is not needed or a checkpoint knows its shape."""
        if self.heads.factory is None and ticket.final is None:
            known = None if self._restored is None else self._restored.get("guess")
            if known is None:
                return
            ticket.final = torch.empty(known, device="meta")
        self._form(ticket, cut)

    # ------------------------------------------------------------------ its loss

    def compute(self, ticket: Ticket, kept: Kept, given: Any) -> Any:
        """Remembers what leaves the stage, with its graph."""
        output = super().compute(ticket, kept, given)
        if self.headed:
            kept.extra = output
        elif self.top and self.site.final is None:
            ticket.final = pytree.tree_map(_shape_alone, output)
        return output

    def local_loss(self, ticket: Ticket, kept: Kept) -> torch.Tensor:
        """The loss of the head's guess; from now on the frame's gradients are for the head's present weights."""
        with self.recording():
            head = self.head if self.head is not None else self._form(ticket, kept.extra)
            with self.rule.autocast(self.site.device):
                guess = head(_bare(kept.extra))
            loss = self.loss_of(ticket, guess)
        kept.weights = [*kept.weights[: self.body], *self.weights.working[self.body :]]
        return loss

    def drop(self, ticket: Ticket) -> None:
        """Forget the frame, but not the shapes it showed."""
        kept = self.kept.get(ticket)
        if kept is not None and self.unformed and ticket.final is not None:
            self.unformed = False
            if self.headed:
                self._form(ticket, kept.extra)
        super().drop(ticket)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """With the head, which the model's own state has no place for."""
        if self._restored is not None:  # neither used nor changed yet
            return dict(self._restored)
        state = super().state_dict()
        if self.headed:
            values = self.head.state_dict() if self.head is not None else None
            state["guess"] = self._guess
            state["head"] = None if values is None else {name: value.detach().clone() for name, value in values.items()}
        return state

    def about(self) -> dict[str, Any]:
        """Without what depends on the head where that comes with the first frame."""
        about = super().about()
        if self.headed and self.site.final is None:
            about["parameters"] = dict(list(about["parameters"].items())[: self.body])
            about["parameter groups"] = []
        return about

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        if self.headed and self.head is None:
            self.learned = state["learned"]
            self._restored = state if state.get("head") is not None else None
            return
        if self.head is not None and state.get("head") is not None:
            with torch.inference_mode(mode=False), torch.no_grad():
                by_name = {**dict(self.head.named_parameters()), **dict(self.head.named_buffers())}
                names = (name.removeprefix(PREFIX) for name in self.weights.names[self.body :])
                by_name.update(zip(names, self.weights.masters[self.body :], strict=True))
                for name, own in by_name.items():
                    own.copy_(state["head"][name])  # in place: no graph of a head lasts longer than one job
        super().load_state_dict(state)


def _bare(cut: Any) -> Any:
    """The tensor itself where one alone crosses: pieces of a model hand on tuples."""
    return cut[0] if isinstance(cut, tuple | list) and len(cut) == 1 else cut


def _shape_alone(leaf: Any) -> Any:
    return leaf.detach().to("meta") if isinstance(leaf, torch.Tensor) else leaf

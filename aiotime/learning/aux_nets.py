"""AuxNets: small networks that predict, from the raw frame, what shall cross one boundary between two stages.

    raw frame ──▶ AuxNet_k ──▶ λ_k ──▶ what stage k learns from, without waiting for stage k-1
                     ▲
                     └── trained to reproduce the corrected λ_k (Sun et al. 2021, arXiv 2112.05387)

They belong to the rule's state, never to the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError, InputError
from aiotime.learning.boundary import nbytes_of, tensors_of
from aiotime.learning.update import OptimizerFactory

AuxFactory = Callable[[Any, torch.Tensor], nn.Module]  # (raw frame, boundary tensor) -> what maps one to the other
Aux = Literal["linear"] | AuxFactory | None

LARGEST = 1 << 26  # weights of a linear AuxNet; beyond that it is not small


class LinearAux(nn.Module):
    """One affine map from all of the frame, starting at zero.

    Args:
        raw: a frame; like: what shall come out.

    Row n of the output is made from row n of the frame where both have as many rows; else all from all.
    """

    def __init__(self, raw: Any, like: torch.Tensor) -> None:
        super().__init__()
        given = tensors_of(raw)
        rows = like.shape[0] if like.dim() > 1 else 0
        self.by_row = rows > 0 and all(tensor.dim() > 1 and tensor.shape[0] == rows for tensor in given)
        self.shape = tuple(like.shape[1:] if self.by_row else like.shape)
        per = rows if self.by_row else 1
        size = sum(tensor.numel() for tensor in given) // per, like.numel() // per
        if size[0] * size[1] > LARGEST:
            raise ConfigurationError(
                f"an AuxNet that is one linear map from {size[0]} to {size[1]} numbers has {size[0] * size[1]} "
                "weights; hand in aux=callable (raw, boundary) -> nn.Module that makes a small one"
            )
        self.map = _zero(nn.Linear, *size, like=like)

    def forward(self, raw: Any) -> torch.Tensor:
        """(n, …) ↦ (n, …), or all ↦ all."""
        weight = self.map.weight
        given = [tensor.to(weight.dtype) for tensor in tensors_of(raw)]
        rows = given[0].shape[0] if self.by_row else 1
        flat = torch.cat([tensor.reshape(rows, -1) for tensor in given], dim=1)  # (rows, numbers of a frame)
        made: torch.Tensor = self.map(flat)
        return made.reshape(rows, *self.shape) if self.by_row else made.reshape(self.shape)


class PooledAux(nn.Module):
    """For pictures (n, c, h, w): pooled to the boundary's size, then an affine map of channels, starting at zero."""

    def __init__(self, raw: torch.Tensor, like: torch.Tensor) -> None:
        super().__init__()
        self.size = (like.shape[2], like.shape[3])
        self.map = _zero(nn.Conv2d, raw.shape[1], like.shape[1], 1, like=like)

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) ↦ (n, channels, height, width) of the boundary."""
        pooled = nn.functional.adaptive_avg_pool2d(raw.to(self.map.weight.dtype), self.size)
        made: torch.Tensor = self.map(pooled)
        return made


def _zero(kind: Any, *size: int, like: torch.Tensor) -> Any:
    """A layer of zeros; no random number is drawn, which would move the model's own."""
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    layer = nn.utils.skip_init(kind, *size, dtype=dtype, device=like.device)  # type: ignore[no-untyped-call]
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def small_net(raw: Any, like: torch.Tensor) -> nn.Module:
    """`PooledAux` from picture to picture, else `LinearAux`."""
    pictures = isinstance(raw, torch.Tensor) and raw.dim() == like.dim() == 4 and raw.shape[0] == like.shape[0]
    return PooledAux(raw, like) if pictures else LinearAux(raw, like)


class AuxNets:
    """The AuxNets of one boundary: one per floating tensor that crosses it.

    Args:
        aux: None: `small_net`; "linear": `LinearAux`; or ``(raw, boundary tensor) -> nn.Module``.
        optimizer: of these networks alone; None: Adam with lr 1e-3.
        stage: name of the stage below the boundary, for errors.
        device: where it runs.
    """

    def __init__(self, aux: Aux, optimizer: OptimizerFactory | None, *, stage: str, device: torch.device) -> None:
        self._make: AuxFactory = small_net if aux is None else LinearAux if aux == "linear" else aux
        self._optimizer_of = optimizer or partial(torch.optim.Adam, lr=1e-3)
        self._stage = stage
        self._device = device
        self._nets: nn.ModuleDict | None = None  # by position of the tensor
        self._optimizer: torch.optim.Optimizer | None = None
        self._to_load: dict[str, Any] | None = None
        self.steps = 0
        self.loss: torch.Tensor | None = None  # newest mean squared error

    def build(self, raw: Any, boundary: Sequence[torch.Tensor]) -> nn.ModuleDict:
        """Make the networks for what such a frame and such a boundary look like, unless they are there."""
        if self._nets is None:
            with torch.inference_mode(mode=False), torch.enable_grad():
                raw = self.placed(raw)
                nets = nn.ModuleDict()
                for position, tensor in enumerate(boundary):
                    if tensor.is_floating_point():
                        nets[str(position)] = self._make(raw, tensor).to(self._device)
                self._nets = nets
                parameters = [p for p in nets.parameters() if p.requires_grad]
                self._optimizer = self._optimizer_of(parameters) if parameters else None
                if self._to_load is not None:
                    self.load_state_dict(self._to_load)
        return self._nets

    def placed(self, raw: Any) -> Any:
        """The frame as the networks can read it: on their device, fit for autograd."""

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return (leaf.clone() if leaf.is_inference() else leaf).to(self._device)

        return pytree.tree_map(place, raw)

    def predict(self, raw: Any, boundary: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """λ, one per tensor of ``boundary``; None for what is not floating.

        Raises:
            InputError: a network did not make the shape that crosses.
        """
        nets = self.build(raw, boundary)
        with torch.inference_mode(mode=False), torch.no_grad():
            raw = self.placed(raw)
            return [
                self._made(nets[str(position)], raw, tensor) if str(position) in nets else None
                for position, tensor in enumerate(boundary)
            ]

    def _made(self, net: nn.Module, raw: Any, like: torch.Tensor) -> torch.Tensor:
        shapes = [tuple(tensor.shape) for tensor in tensors_of(raw)]
        try:
            made: torch.Tensor = net(raw)
        except Exception as error:
            raise InputError(
                f"the AuxNet behind stage {self._stage!r} could not take a frame of shape {shapes}: "
                f'{type(error).__name__}: {error}; with start="aux" all frames must have one shape'
            ) from error
        if made.shape != like.shape:
            raise InputError(
                f"the AuxNet behind stage {self._stage!r} made shape {tuple(made.shape)} of a frame of shape {shapes}, "
                f'but {tuple(like.shape)} crosses the boundary; with start="aux" all frames must have one shape'
            )
        return made.to(like.dtype)

    def learn(self, raw: Any, targets: Sequence[torch.Tensor | None]) -> None:
        """One step towards ``targets``, by the mean squared error; none where a target is not finite."""
        nets, optimizer = self._nets, self._optimizer
        wanted = [(str(at), target) for at, target in enumerate(targets) if target is not None]
        if nets is None or optimizer is None or not wanted:
            return
        if not all(bool(target.isfinite().all()) for _, target in wanted):
            return
        with torch.inference_mode(mode=False), torch.enable_grad():
            raw = self.placed(raw)
            errors = [_distance(nets[at](raw), self.placed(target)) for at, target in wanted]
            loss = torch.stack(errors).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self.steps += 1
        self.loss = loss.detach()

    def nbytes(self) -> int:
        """Bytes of their parameters."""
        return 0 if self._nets is None else nbytes_of(list(self._nets.parameters()))

    def state_dict(self) -> dict[str, Any] | None:
        """Parameters and optimizer; None before the first frame."""
        if self._nets is None:
            return self._to_load
        return {
            "nets": self._nets.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from `state_dict`, if need be once the first frame has shown what the networks look like."""
        self._to_load = state
        if state is None or self._nets is None:
            return
        self._to_load = None
        self._nets.load_state_dict(state["nets"])
        if self._optimizer is not None and state["optimizer"] is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def _distance(made: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(made, target.to(made.dtype))

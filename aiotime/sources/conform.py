"""Conform: a decoded picture becomes what the model takes (shape, dtype, channels, structure)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aiotime.errors import ConfigurationError

CHANNELS = (1, 3)
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness (ITU-R BT.601)


class Conform:
    """Turns pictures, uint8 ``[height, width, channels]`` with values 0..255, into frames shaped like ``example``.

    Floating-point frames hold 0..1, uint8 frames 0..255. The size is fitted by antialiased bilinear
    interpolation, without keeping the aspect ratio; three channels become one by their luma.

    Args:
        example: a frame as the model takes it: a tensor ``[1, C, H, W]``, ``[C, H, W]``, ``[1, H, W, C]``,
            ``[H, W, C]`` or ``[H, W]`` with C in {1, 3}, or a tuple or dict that holds one such tensor alone.

    Raises:
        ConfigurationError: a picture cannot become such a frame; write a source of your own then.
    """

    def __init__(self, example: Any) -> None:
        self._wrap = example
        leaf = only_tensor(example)
        self._shape = leaf.shape
        self._dtype = leaf.dtype
        self._device = leaf.device
        if not (leaf.dtype.is_floating_point or leaf.dtype == torch.uint8):
            raise ConfigurationError(
                f"a picture cannot become a frame of {leaf.dtype}; use a floating-point type or uint8"
            )
        shape = list(leaf.shape)
        if len(shape) == 4 and shape[0] == 1:
            shape = shape[1:]
        self._last = len(shape) == 3 and shape[0] not in CHANNELS and shape[-1] in CHANNELS
        if len(shape) == 2:
            self.channels, self.height, self.width = 1, shape[0], shape[1]
        elif self._last:
            self.height, self.width, self.channels = shape
        elif len(shape) == 3 and shape[0] in CHANNELS:
            self.channels, self.height, self.width = shape
        else:
            raise ConfigurationError(
                f"a picture cannot become a frame of shape {tuple(leaf.shape)}; pictures fit [1, C, H, W], [C, H, W] "
                "or [H, W] with one or three channels. For anything else iterate a source without example= and convert "
                "its pictures yourself"
            )

    def __call__(self, picture: Tensor) -> Any:
        """One picture, uint8 ``[height, width]`` or ``[height, width, channels]``, as a frame.

        Raises:
            ConfigurationError: not a picture.
        """
        if picture.dtype != torch.uint8 or picture.ndim not in (2, 3):
            raise ConfigurationError(
                f"expected a picture, uint8 [height, width, channels], not {picture.dtype} {tuple(picture.shape)}"
            )
        if picture.ndim == 2:
            picture = picture.unsqueeze(-1)
        image = picture[..., :3].permute(2, 0, 1).unsqueeze(0)  # [1, C, h, w]; a fourth channel is transparency
        if image.shape[1] == 2:
            image = image[:, :1]
        if image.shape[-2:] != (self.height, self.width):
            image = torch.nn.functional.interpolate(
                image, size=(self.height, self.width), mode="bilinear", align_corners=False, antialias=True
            )
        if image.shape[1] == 3 and self.channels == 1:
            weights = torch.tensor(LUMA).reshape(1, 3, 1, 1)
            image = (image.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)
        elif image.shape[1] == 1 and self.channels == 3:
            image = image.expand(1, 3, self.height, self.width)
        if self._dtype != torch.uint8:
            image = image.to(self._dtype) / 255
        if self._last:
            image = image.permute(0, 2, 3, 1)
        return rewrap(self._wrap, image.reshape(self._shape).contiguous().to(self._device))


def only_tensor(example: Any) -> Tensor:
    """The one tensor in ``example``: itself, or the only entry of a tuple or dict.

    Raises:
        ConfigurationError: there is none, or more than one.
    """
    leaf = example
    if isinstance(leaf, dict) and len(leaf) == 1:
        (leaf,) = leaf.values()
    elif isinstance(leaf, tuple | list) and len(leaf) == 1:
        (leaf,) = leaf
    if isinstance(leaf, Tensor):
        return leaf
    raise ConfigurationError(
        "such a source fills one tensor a frame, and the model takes "
        f"{describe(example)}; use JSON lines (format='jsonl'), or write a generator that yields such frames"
    )


def rewrap(example: Any, leaf: Tensor) -> Any:
    """``leaf`` in the structure of ``example`` (see `only_tensor`)."""
    if isinstance(example, dict):
        return dict.fromkeys(example, leaf)
    if isinstance(example, tuple | list):
        return (leaf,)
    return leaf


def describe(example: Any) -> str:
    """``example`` in words, for messages."""
    if isinstance(example, Tensor):
        return f"{str(example.dtype).removeprefix('torch.')} {list(example.shape)}"
    if isinstance(example, dict):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in example.items()) + "}"
    if isinstance(example, tuple | list):
        return "(" + ", ".join(map(describe, example)) + ")"
    return type(example).__name__

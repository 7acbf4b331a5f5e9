"""Augmentation: inputs changed at random, a whole batch at a time.

``AUGMENTATIONS[name](inputs, generator)`` returns as many inputs of the same shape and type. What
comes from outside of an image is 0 (black in uint8 and in [0, 1]). No image is looked at by
itself: crops and shifts are one gather for a batch, elastic distortions one resampling.

Augmentation is for training alone. Curvature, soft labels and scores are of the images as they are;
a remembered image that is changed keeps the soft label of the unchanged one, unless the recipe asks
the old weights about it (``Recipe.ask``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from .models import Inputs

Augment = Callable[[Inputs, torch.Generator | None], Inputs]


def crop_flip(inputs: Inputs, generator: torch.Generator | None = None) -> Inputs:
    """Moved by up to an eighth of each side (4 pixels of 32), and mirrored or not, left to right.

    inputs: images (B, C, H, W). This is the usual padded random crop with a flip. Raises as
    ``shift``.
    """
    x = _images(inputs)
    return _moved(x, (_part(x.shape[2], 8), _part(x.shape[3], 8)), True, generator)


def shift(inputs: Inputs, generator: torch.Generator | None = None) -> Inputs:
    """Moved by up to a fourteenth of each side (2 pixels of 28): for digits, which have no mirror.

    inputs: images (B, C, H, W). Raises ValueError for inputs of another shape.
    """
    x = _images(inputs)
    return _moved(x, (_part(x.shape[2], 14), _part(x.shape[3], 14)), False, generator)


def elastic(inputs: Inputs, generator: torch.Generator | None = None) -> Inputs:
    """Turned, stretched, moved and bent a little: how handwriting differs (Simard 2003).

    x(u) -> x(A u + b + v(u)): A turns by up to 10 degrees and scales by up to 10 %, b moves by up
    to a fourteenth of each side, and v is a smooth field: on a grid of 5 x 5 drawn from a normal
    distribution with a standard deviation of 3/56 of each side (1.5 pixels of 28), in between by
    bilinear interpolation, as the pixels are. inputs: images (B, C, H, W), of floats or of uint8,
    which are rounded. Raises as ``shift``.
    """
    x = _images(inputs)
    batch, device = len(x), x.device
    place = None if generator is None else generator.device

    def drawn(high: float) -> Tensor:
        unit = torch.rand(batch, generator=generator, device=place)
        return ((2 * unit - 1) * high).to(device)

    angle, scale = drawn(math.radians(10)), 1 / (1 + drawn(0.1))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    right, down = drawn(1 / 7), drawn(1 / 7)  # the sides of grid_sample are 2 long
    rows = [torch.stack(row, 1) for row in ((cos, -sin, right), (sin, cos, down))]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    field = torch.randn(batch, 2, 5, 5, generator=generator, device=place).to(device)
    field = F.interpolate(field, size=x.shape[2:], mode="bilinear", align_corners=True)
    grid = grid + field.permute(0, 2, 3, 1) * (3 / 28)
    values = x if x.is_floating_point() else x.float()
    moved = F.grid_sample(values, grid.to(values.dtype), align_corners=False)
    return moved if x.is_floating_point() else moved.round().clamp(0, 255).to(x.dtype)


AUGMENTATIONS: Mapping[str, Augment] = MappingProxyType(
    {"crop-flip": crop_flip, "shift": shift, "elastic": elastic}
)


def _part(side: int, n: int) -> int:
    """A side's n-th part in whole pixels, at least one where there are two to move between."""
    return max(side // n, 1 if side > 1 else 0)


def _images(inputs: Inputs) -> Tensor:
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else "a dict"
        raise ValueError(f"expected images of shape (B, C, H, W) to augment, got {shape}")
    return inputs


def _moved(
    x: Tensor, reach: tuple[int, int], mirror: bool, generator: torch.Generator | None
) -> Tensor:
    """Each image by its own offset in -reach..reach; strided as channels-last."""
    batch, _, height, width = x.shape
    down, right = reach
    device = None if generator is None else generator.device

    def drawn(high: int) -> Tensor:
        values = torch.randint(high, (batch, 1), generator=generator, device=device)
        return values.to(x.device)

    rows = torch.arange(height, device=x.device) + drawn(2 * down + 1)  # (B, H) in the padded image
    columns = torch.arange(width, device=x.device).expand(batch, width)
    if mirror:
        columns = torch.where(drawn(2) == 1, columns.flip(1), columns)
    columns = columns + drawn(2 * right + 1)
    # Channels last, so that a pixel is one row of a table and all its channels move at once.
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, right, right, down, down))
    tall, wide = padded.shape[1:3]
    first = torch.arange(batch, device=x.device)[:, None, None] * (tall * wide)
    index = first + rows[:, :, None] * wide + columns[:, None, :]
    pixels = padded.flatten(0, 2).index_select(0, index.flatten())
    return pixels.view(batch, height, width, -1).permute(0, 3, 1, 2)

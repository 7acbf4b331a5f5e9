"""Augmentation: inputs changed at random, a whole batch at a time.

``AUGMENTATIONS[name](inputs, generator)`` returns as many inputs of the same shape and type. Each
image is moved by its own whole number of pixels, and what comes from outside of it is 0 (black in
uint8 and in [0, 1]). One gather does a batch: no image is looked at by itself.

Augmentation is for training alone. Curvature, soft labels and scores are of the images as they are;
a remembered image that is changed keeps the soft label of the unchanged one.
"""

from __future__ import annotations

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
    return _moved(x, (x.shape[2] // 8, x.shape[3] // 8), True, generator)


def shift(inputs: Inputs, generator: torch.Generator | None = None) -> Inputs:
    """Moved by up to a fourteenth of each side (2 pixels of 28): for digits, which have no mirror.

    inputs: images (B, C, H, W). Raises ValueError for inputs of another shape.
    """
    x = _images(inputs)
    return _moved(x, (x.shape[2] // 14, x.shape[3] // 14), False, generator)


AUGMENTATIONS: Mapping[str, Augment] = MappingProxyType({"crop-flip": crop_flip, "shift": shift})


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

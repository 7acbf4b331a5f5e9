"""What is shown of an item's input: a PNG made here, or text. Nothing is passed on as it came, so
that a script in an image, a broken file and one that would unpack to gigabytes stay harmless."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .store import Item

MOST_PIXELS = 40_000_000  # of a picture that is opened at all
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
SIZES = {"small": 96, "large": 384}


class NoPictureError(ValueError):
    """An item that cannot be shown as a picture, and why."""


def picture(raw: Any, item: Item, size: int) -> bytes:
    """A PNG of at most ``size`` pixels a side, small ones enlarged by a whole number.

    Raises NoPictureError.
    """
    if item.kind == "image":
        image = _opened(raw)
    elif item.kind == "tensor":
        image = Image.fromarray(pixels(raw))
    else:
        raise NoPictureError(f"a {item.kind} is no picture")
    largest = max(image.size)
    if largest > size:
        image.thumbnail((size, size))
    elif (times := size // largest) > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _opened(raw: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(raw), formats=_FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise NoPictureError(f"{image.width} x {image.height} pixels are too many to show")
        image.load()
        return image.convert("RGB")
    except NoPictureError:
        raise
    except Exception as error:  # decoders of broken files raise what they like
        raise NoPictureError(f"it cannot be read ({type(error).__name__})") from error


def pixels(x: Tensor) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3): channels first or none, or a vector that makes a square."""
    if x.ndim == 1:
        side = math.isqrt(x.numel())
        if side < 4 or side * side != x.numel():
            raise NoPictureError(f"{x.numel()} numbers make no square")
        x = x.reshape(side, side)
    if x.ndim == 2:
        x = x[None]
    if x.ndim != 3 or x.shape[0] not in (1, 3) or not x.numel() or x[0].numel() > MOST_PIXELS:
        raise NoPictureError(f"numbers of shape {tuple(x.shape)} are no picture")
    values = x.double()
    if not values.isfinite().all():
        raise NoPictureError("some of its numbers are NaN or infinite")
    if x.dtype.is_floating_point or x.dtype.itemsize > 1:
        low, high = values.min(), values.max()
        values = 255 * (values - low) / (high - low).clamp(min=1e-300)
    found = values.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return found[:, :, 0] if found.shape[2] == 1 else found


def words(raw: Any, item: Item, most: int = 2_000) -> str:
    """The input as text: a text itself, the numbers of a row, the names of several tensors."""
    if item.kind == "text":
        text = raw if isinstance(raw, str) else bytes(raw).decode("utf-8", "replace")
    elif item.kind == "tensor":
        text = _numbers(raw, most)
    elif item.kind == "dict":
        text = "\n".join(f"{name}: {_numbers(x, most)}" for name, x in sorted(raw.items()))
    else:
        return ""
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= most else text[:most] + " …"


def _numbers(x: Tensor, most: int) -> str:
    few = x.flatten()[: most // 4].tolist()
    listed = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in few)
    return listed + (", …" if x.numel() > len(few) else "")

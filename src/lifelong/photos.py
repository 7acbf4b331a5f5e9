"""Folders of photos too many to hold decoded: inputs say which photo, and a layer reads it.

An input is two numbers, (file, draw): int64 (N, 2). ``Photos``, the first layer of the network,
decodes it: with draw 0 the middle of the photo, else a random crop, mirrored or not, that the draw
decides. So a data set, what is remembered of it and a checkpoint take 16 bytes for a photo, the
photos stay on disk as they are, and what is augmented can be read again just so.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from .data import Examples
from .models import Inputs

SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: of the photo's area; width to height
MARGIN = 256 / 224  # the shorter side of a photo beside that of its middle, in evaluation


@dataclass(frozen=True)
class Folder:
    """The photos of ROOT/SPLIT/CLASS/*.JPEG: paths and labels, classes in alphabetical order."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def scan(root: Path, split: str) -> Folder:
    """The photos of a split, sorted by class and name.

    Raises FileNotFoundError where there is no such folder or no photo in a class's folder, and says
    how the photos are to lie.
    """
    place = root / split
    wanted = "expected train/CLASS/*.JPEG and val/CLASS/*.JPEG (docs/imagenet.md says how)"
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder {split} in {root}; {wanted}")
    classes = sorted(p.name for p in place.iterdir() if p.is_dir())
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (place / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"there is no photo in {place / name}; {wanted}")
        paths += found
        labels += [label] * len(found)
    if not classes:
        raise FileNotFoundError(f"there is no class's folder in {place}; {wanted}")
    return Folder(tuple(paths), tuple(labels), tuple(classes))


def references(folder: Folder, first: int = 0) -> Examples:
    """The photos as examples: inputs (N, 2) of file numbers, from ``first`` on, and draws of 0."""
    numbers = torch.arange(first, first + len(folder.paths))
    inputs = torch.stack([numbers, torch.zeros_like(numbers)], 1)
    return Examples(inputs, torch.tensor(folder.labels))


def redraw(inputs: Inputs, generator: torch.Generator | None = None) -> Inputs:
    """The same photos (B, 2), each with a new draw: augmentation, for ``Learner(augment=...)``.

    Raises ValueError for inputs that do not say which photo.
    """
    x = _numbers(inputs)
    place = None if generator is None else generator.device
    draws = torch.randint(1, 2**31, (len(x),), generator=generator, device=place)
    return torch.stack([x[:, 0], draws.to(x.device)], 1)


class Photos(nn.Module):
    """(B, 2) file numbers and draws to (B, 3, size, size) uint8, on the same device.

    Without parameters or buffers. Decodes with as many threads as torch may use. Raises ValueError
    for other inputs, OSError with the path for a photo that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        super().__init__()
        self.paths, self.size = tuple(paths), size

    def forward(self, x: Tensor) -> Tensor:
        numbers = _numbers(x).tolist()
        workers = min(torch.get_num_threads(), len(numbers))
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                pixels = list(pool.map(self._read, numbers))
        else:
            pixels = [self._read(one) for one in numbers]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(x.device)

    def _read(self, one: Sequence[int]) -> np.ndarray:
        path = self.paths[one[0]]
        try:
            with Image.open(path) as photo:
                return np.asarray(crop(photo, self.size, one[1]))
        except (OSError, UnidentifiedImageError) as error:
            raise OSError(f"cannot read the photo {path}: {error}") from error

    def extra_repr(self) -> str:
        return f"{len(self.paths)} photos, size={self.size}"


def crop(photo: Image.Image, size: int, draw: int) -> Image.Image:
    """size x size pixels in RGB: of draw 0 the middle of the photo, its shorter side at 256/224 of
    ``size``; else a random part, as Szegedy et al. 2015 have it: of 8 to 100 % of the area, 3/4 to
    4/3 as wide as high, mirrored in half of all draws. The photo is decoded no larger than needed.
    """
    width, height = photo.size
    if draw == 0:
        side = round(MARGIN * size)
        scale = min(width, height) / side
        box, mirror = _middle(width, height, size * scale), False
    else:
        box, mirror = _part(width, height, random.Random(draw))
        scale = min(box[2] - box[0], box[3] - box[1]) / size
    if scale >= 2:  # JPEG decodes at a half, a quarter or an eighth for less
        photo.draft("RGB", (int(width // scale), int(height // scale)))
    across, down = photo.size[0] / width, photo.size[1] / height
    box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    found = photo.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
    return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else found


Box = tuple[float, float, float, float]


def _middle(width: int, height: int, side: float) -> Box:
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _part(width: int, height: int, source: random.Random) -> tuple[Box, bool]:
    """A part of the photo, and whether it is mirrored; the whole middle after ten parts that do not
    fit into a long photo."""
    mirror = source.random() < 0.5
    for _ in range(10):
        area = width * height * source.uniform(*AREA)
        ratio = math.exp(source.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            left, top = source.uniform(0, width - wide), source.uniform(0, height - high)
            return (left, top, left + wide, top + high), mirror
    return _middle(width, height, min(width, height)), mirror


def _numbers(inputs: Inputs) -> Tensor:
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or inputs.shape[1] != 2:
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else "a dict"
        raise ValueError(f"expected photos by (file, draw), of shape (B, 2), got {shape}")
    return inputs

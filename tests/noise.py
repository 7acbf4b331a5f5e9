"""Data sets of the right names and shapes, full of noise: what tests of whole programs read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np


def write(folder: Path) -> Path:
    """All data sets that the tables read; the folder."""
    for split, count in (("train", 600), ("test", 300)):
        images(folder / f"mnist-{split}.parquet", (28, 28), classes=10, count=count)
    for split in ("train", "test"):
        images(folder / f"cifar10_jpegq75-{split}.parquet", (32, 32, 3), classes=10, count=80)
    for split in ("train-part0", "val"):
        images(folder / f"tiny_imagenet-{split}.parquet", (64, 64, 3), classes=50, count=400)
    rows(folder / "stream_elec.parquet", columns=8, count=120)
    return folder


def rows(path: Path, *, columns: int, count: int) -> None:
    """Numbers in columns, and labels 0 and 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(count)
    table = {f"x{i}": generator.random(count, np.float32) for i in range(columns)}
    pq.write_table(pa.table({**table, "label": generator.integers(0, 2, count)}), path)


def images(path: Path, shape: tuple[int, ...], *, classes: int, count: int) -> None:
    """``count`` PNG images of a shape (H, W) or (H, W, 3), as many of each class."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    generator = np.random.default_rng(count)
    cells = []
    for _ in range(count):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": cells, "label": np.arange(count) % classes}), path)

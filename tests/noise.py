"""Data sets of the right names and shapes, full of noise: what tests of whole programs read."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write(folder: Path) -> Path:
    """All data sets that the tables read; the folder."""
    for split, count in (("train", 600), ("test", 300)):
        images(folder / f"mnist-{split}.parquet", (28, 28), classes=10, count=count)
    for split in ("train", "test"):
        images(folder / f"cifar10_jpegq75-{split}.parquet", (32, 32, 3), classes=10, count=80)
    for split in ("train-part0", "val"):
        images(
            folder / f"tiny_imagenet-{split}.parquet",
            (64, 64, 3),
            classes=200,
            count=400,
            names=[f"n{i:08d} thing" for i in range(200)],
        )
    (folder / "tiny_imagenet-wnids.txt").write_text(
        "".join(f"n{i:08d}\n" for i in reversed(range(200)))
    )
    rows(folder / "stream_elec.parquet", columns=8, count=120)
    return folder


def rows(path: Path, *, columns: int, count: int) -> None:
    """Numbers in columns, and labels 0 and 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(count)
    table = {f"x{i}": generator.random(count, np.float32) for i in range(columns)}
    pq.write_table(pa.table({**table, "label": generator.integers(0, 2, count)}), path)


def images(
    path: Path,
    shape: tuple[int, ...],
    *,
    classes: int,
    count: int,
    names: Sequence[str] | None = None,
) -> None:
    """``count`` PNG images of a shape (H, W) or (H, W, 3), as many of each class; ``names`` of the
    classes as Hugging Face writes them."""
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
    table = pa.table({"image": cells, "label": np.arange(count) % classes})
    if names is not None:
        described = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    pq.write_table(table, path)

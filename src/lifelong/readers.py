"""Readers: real data from where people keep them, as ``Examples``.

    train = load(find("data", "mnist", "train"))          # mnist-train.parquet, or MNIST/raw
    train = load(datasets.load_dataset("mnist"))          # Hugging Face, not imported here
    train = load("data", split="train")                   # torchvision's root, without torchvision
    train = load((x, y)); load("digits.npz")              # arrays

Images become float32 (N, C, H, W) in [0, 1]; tables become float32 (N, D); integer labels become
int64 (N,). Everything is held in memory, and nothing is written to disk.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import Examples

Mode = Literal["L", "RGB"]
Size = tuple[int, int]
Columns = tuple[str | Sequence[str], str]

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "y")
_ARRAY_NAMES = (  # (inputs, labels) as npz files name them, before the names without a split
    ("x_{}", "y_{}"),
    ("X_{}", "y_{}"),
    ("{}_images", "{}_labels"),
    ("{}_x", "{}_y"),
)
_PLAIN_ARRAY_NAMES = (("x", "y"), ("X", "y"), ("inputs", "labels"), ("images", "labels"))
_CHUNK = 512  # images decoded by one thread at a time


def load(
    source: Any,
    *,
    split: str = "train",
    columns: Columns | None = None,
    mode: Mode | None = None,
    size: Size | None = None,
    dtype: torch.dtype = torch.float32,
    classes: Container[int] | None = None,
) -> Examples:
    """Read ``source`` into memory.

    source: a Parquet or .npz file (it is one split already); several Parquet files, read one after
    another; a folder of Parquet files named by split, or torchvision's root with raw MNIST files;
    a Hugging Face ``Dataset`` or ``DatasetDict``; a pair of arrays (inputs, labels).
    split: which part of a folder, an .npz file or a ``DatasetDict``.
    columns: (inputs, label); inputs is a column of encoded images, or one or more numeric columns.
    By default one with an image's name (``IMAGE_COLUMNS``), else all columns but the label's.
    mode: "L" for grey, "RGB" for colour; by default grey where every image is. size: (H, W) to
    shrink or stretch encoded images to (box filter); without it all must have one size.
    dtype: torch.uint8 keeps encoded images as they are, 0 to 255, in a quarter of the memory.
    classes: of encoded images, only those with these labels are decoded and returned.

    uint8 arrays of at least three dimensions are images and are divided by 255, others are cast;
    (N, H, W) becomes (N, 1, H, W), and channels move to the front.

    Raises FileNotFoundError where nothing is there, ValueError where columns are missing, there is
    no example, or something cannot be decoded (naming the row); ImportError where pyarrow is
    needed and missing; TypeError where the source is of no kind above.
    """
    if mode not in (None, "L", "RGB"):
        raise ValueError(f'mode must be "L", "RGB" or None, got {mode!r}')
    if dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"dtype must be torch.float32 or torch.uint8, got {dtype}")
    how = _Decoding(mode, size, dtype, classes)
    if isinstance(source, str | os.PathLike):
        return _load_path(Path(source), split, columns, how)
    if isinstance(source, Mapping) and split in source and _is_dataset(source[split]):
        source = source[split]
    if _is_dataset(source):
        return _load_dataset(source, columns, how)
    if isinstance(source, Mapping) and all(_is_dataset(part) for part in source.values()):
        raise ValueError(f"there is no split {split!r}; the splits are {sorted(source)}")
    if isinstance(source, Sequence) and len(source) and isinstance(source[0], str | os.PathLike):
        paths = [Path(p) for p in source]
        if len(paths) == 1:
            return _load_path(paths[0], split, columns, how)
        return _load_parquet(paths, columns, how)
    if isinstance(source, Sequence) and len(source) == 2:
        return _from_arrays(source[0], source[1], "the arrays")
    raise TypeError(
        f"cannot read {type(source).__name__}: expected a path, several Parquet files, a Hugging "
        "Face Dataset, or a pair (inputs, labels)"
    )


def find(data_dir: str | os.PathLike[str], name: str, split: str = "train") -> tuple[Path, ...]:
    """Where a data set lies in a folder of several: paths for ``load``, with the same ``split``.

    Looks for ``name-split.parquet``, its parts ``name-split-part0.parquet``, ...,
    ``name-split.npz``, a folder ``name`` or ``name/data`` with Parquet files of that split,
    torchvision's ``Name/raw``, and at last for a set without splits, ``name.parquet`` or
    ``name.npz``. For "test" a set that only has "val" serves it.

    Raises FileNotFoundError, listing what was expected and what is there.
    """
    folder = _existing(Path(data_dir))
    for part in (split, "val") if split == "test" else (split,):
        for pattern in (f"{name}-{part}.parquet", f"{name}-{part}-*.parquet", f"{name}-{part}.npz"):
            if found := _natural(folder.glob(_escape(pattern))):
                return tuple(found)
        for inner in (folder / name, folder / name / "data"):
            if found := _split_files(inner, part):
                return tuple(found)
    for raw in sorted(folder.glob("*/raw")):
        if raw.parent.name.casefold() == name.casefold():
            return (raw,)
    if name.casefold() == "mnist" and _raw_folder(folder) is not None:
        return (folder,)
    for whole in (folder / f"{name}.parquet", folder / f"{name}.npz"):
        if whole.is_file():
            if split != "train":
                raise FileNotFoundError(
                    f"{whole.name} is not divided into splits, so there is no {split!r}; "
                    'load split="train" and divide it'
                )
            return (whole,)
    raise FileNotFoundError(
        f"no {name!r} with split {split!r} in {folder}: expected {name}-{split}.parquet, "
        f"{name}-{split}-part0.parquet, ..., {name}-{split}.npz, a folder {name} with Parquet "
        f"files, or torchvision's raw files. {_listing(folder)}"
    )


def class_names(source: Any, *, label: str | None = None) -> tuple[str, ...] | None:
    """The names of the classes that Hugging Face keeps with the data; None where there are none.

    source: a Parquet file or several (the first counts), or a Hugging Face ``Dataset``.
    """
    if _is_dataset(source):
        chosen = label or _choose(source.column_names, LABEL_COLUMNS)
        names = getattr(source.features.get(chosen), "names", None)
        return None if names is None else tuple(names)
    path = Path(source if isinstance(source, str | os.PathLike) else source[0])
    if path.suffix != ".parquet":
        return None
    schema = _parquet_file(path).schema_arrow
    chosen = label or _choose(schema.names, LABEL_COLUMNS)
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(chosen, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    return None if names is None else tuple(names)


# Files --------------------------------------------------------------------------------------------


def _load_path(path: Path, split: str, columns: Columns | None, how: _Decoding) -> Examples:
    _existing(path)
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; copy or download it again")
        if path.suffix == ".parquet":
            return _load_parquet([path], columns, how)
        if path.suffix == ".npz":
            return _load_npz(path, split, columns)
        raise ValueError(f"cannot tell what {path.name} is: expected .parquet, .npz, or a folder")
    raw = _raw_folder(path)
    if raw is not None:
        return _load_raw(raw, split)
    for inner in (path, path / "data"):
        if found := _split_files(inner, split):
            return _load_parquet(found, columns, how)
    raise FileNotFoundError(
        f"no data for split {split!r} in {path}: expected {split}.parquet, "
        f"{split}-00000-of-00001.parquet, or MNIST/raw with raw files; where the folder holds "
        f"several data sets, use find(folder, name, split). {_listing(path)}"
    )


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    parent, near = path.absolute().parent, ""
    if parent.is_dir() and parent.parent != parent:  # of the root nobody wants the list
        near = f" In {parent}: {_listing(parent)}"
    expected = "expected the folder or file with the data"
    raise FileNotFoundError(f"{path} does not exist; {expected}.{near}")


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is a file"
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    if not names:
        return "The folder is empty"
    more = f", ... ({len(names)} in all)" if len(names) > 30 else ""
    return "The folder holds " + ", ".join(names[:30]) + more


def _split_files(folder: Path, split: str) -> list[Path]:
    """Parquet files as the Hugging Face hub names them: train.parquet, train-00000-of-00002..."""
    return _natural(
        p for p in folder.glob("*.parquet") if re.fullmatch(rf"{re.escape(split)}(-.*)?", p.stem)
    )


def _natural(paths: Iterable[Path]) -> list[Path]:
    """In the order of the numbers in the names: part2 before part10."""
    return sorted(paths, key=lambda p: [int(s) if s.isdigit() else s for s in _digits(p.name)])


def _digits(name: str) -> list[str]:
    return re.split(r"(\d+)", name)  # text and digits alternate, so keys always compare


def _escape(pattern: str) -> str:
    return re.sub(r"([\[?])", r"[\1]", pattern)


# Parquet ------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """The columns that make up the inputs, and the label's; ``image``: one column of images."""

    inputs: list[str]
    label: str
    image: bool


class _Block(NamedTuple):
    """Rows as they were read: encoded images, or numeric columns side by side."""

    where: str  # the file
    row: int  # of the first
    images: list[Any] | None
    table: np.ndarray | None
    labels: np.ndarray
    rows: Sequence[int] = ()  # of each, where they are not consecutive


class _Decoding(NamedTuple):
    """How encoded images become arrays, and of which classes."""

    mode: Mode | None
    size: Size | None
    dtype: torch.dtype = torch.float32
    classes: Container[int] | None = None


def _load_parquet(paths: Sequence[Path], columns: Columns | None, how: _Decoding) -> Examples:
    files = [_parquet_file(_existing(path)) for path in paths]
    what = ", ".join(path.name for path in paths)
    schema = files[0].schema_arrow
    encoded = {f.name for f in schema if str(f.type).startswith(("struct", "binary", "large_bin"))}
    parts = _choose_columns(schema.names, columns, what, encoded)
    for path, file in zip(paths, files, strict=True):
        absent = [c for c in (*parts.inputs, parts.label) if c not in file.schema_arrow.names]
        if absent:
            raise ValueError(f"{path.name} lacks the columns {absent} that {paths[0].name} has")

    def blocks() -> Iterator[_Block]:
        for path, file in zip(paths, files, strict=True):
            row = 0
            for batch in file.iter_batches(_CHUNK, columns=[*parts.inputs, parts.label]):
                labels = _cells(batch.column(parts.label), parts.label, path.name, row)
                if parts.image:
                    images, table = batch.column(parts.inputs[0]).to_pylist(), None
                else:
                    images, table = (
                        None,
                        _side_by_side(
                            [_cells(batch.column(c), c, path.name, row) for c in parts.inputs]
                        ),
                    )
                yield _Block(f"{path.name}, ", row, images, table, labels)
                row += batch.num_rows

    return _assemble(blocks(), how, what)


def _assemble(blocks: Iterable[_Block], how: _Decoding, what: str) -> Examples:
    """Decode the images while the rest is read, and put all blocks together."""
    read = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # Pillow decodes without the GIL
        for block in blocks:
            if block.images is not None and how.classes is not None:
                block = _chosen(block, how.classes)
                if not block.images:
                    continue
            decoded = pool.submit(_decode, block, how) if block.images is not None else None
            read.append((block._replace(images=None), decoded))
        pixels = [(block, decoded.result()) for block, decoded in read if decoded is not None]
    if not read:
        wanted = "" if how.classes is None else " of these classes"
        raise ValueError(f"{what}: there are no rows{wanted}")
    labels = np.concatenate([block.labels for block, _ in read])
    if pixels:
        return _examples(_stack(pixels, how.dtype), labels, what)
    tables = [block.table for block, _ in read if block.table is not None]
    return _examples(torch.from_numpy(np.concatenate(tables)), labels, what)


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "reading Parquet files needs pyarrow: pip install 'lifelong[data]'"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a whole Parquet file ({error}); copy or download it again"
        ) from error


def _cells(column: Any, name: str, file: str, row: int) -> np.ndarray:
    """A numeric column, or one of equally long lists of numbers: (n,) or (n, D)."""
    if column.null_count:
        first = row + column.is_null().to_pylist().index(True)
        raise ValueError(f"{file}, row {first}: column {name!r} is empty; drop or fill those rows")
    kind = str(column.type)
    if "list" in kind:
        widths = set(column.value_lengths().to_pylist()) if "fixed" not in kind else {None}
        if len(widths) > 1:
            raise ValueError(f"{file}: the lists in column {name!r} differ in length")
        return _numbers(column.flatten(), name, file).reshape(len(column), -1)
    return _numbers(column, name, file)


def _numbers(column: Any, name: str, file: str) -> np.ndarray:
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "biuf":
        raise ValueError(
            f"{file}: column {name!r} holds {column.type}, not numbers; encode it first, or "
            "choose others with columns=(inputs, label)"
        )
    return values


def _side_by_side(blocks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(
        [b.reshape(len(b), -1).astype(np.float32, copy=False) for b in blocks], axis=1
    )


def _choose_columns(
    names: Sequence[str], columns: Columns | None, what: str, encoded: Container[str]
) -> _Parts:
    """encoded: columns that hold no numbers, which are images."""
    if columns is not None:
        inputs = [columns[0]] if isinstance(columns[0], str) else list(columns[0])
        label = columns[1]
        absent = [c for c in (*inputs, label) if c not in names]
        if absent or not inputs:
            raise ValueError(f"{what}: no columns {absent}; the columns are {list(names)}")
        image = inputs[0] in IMAGE_COLUMNS or inputs[0] in encoded
        return _Parts(inputs, label, len(inputs) == 1 and image)
    label = _choose(names, LABEL_COLUMNS)
    if label is None:
        raise ValueError(
            f"{what}: no label column; expected one of {list(LABEL_COLUMNS)}, found {list(names)}; "
            "say which with columns=(inputs, label)"
        )
    image = _choose(names, IMAGE_COLUMNS)
    inputs = [image] if image else [c for c in names if c != label]
    if not inputs:
        raise ValueError(f"{what}: only a label column, {label!r}; the inputs are missing")
    return _Parts(inputs, label, image is not None)


def _choose(names: Iterable[str], candidates: Sequence[str]) -> str | None:
    present = set(names)
    return next((c for c in candidates if c in present), None)


# Images -------------------------------------------------------------------------------------------


def _chosen(block: _Block, classes: Container[int]) -> _Block:
    """The rows of these classes, each under its own number."""
    keep = [i for i, label in enumerate(block.labels.tolist()) if label in classes]
    images = [(block.images or [])[i] for i in keep]
    return block._replace(
        images=images, labels=block.labels[keep], rows=[block.row + i for i in keep]
    )


def _decode(block: _Block, how: _Decoding) -> np.ndarray:
    """(n, C, H, W) uint8; C is 1 where all images of the block are grey."""
    images = []
    found = block.images or []
    places = block.rows or range(block.row, block.row + len(found))
    for row, item in zip(places, found, strict=True):
        images.append(_decode_one(f"{block.where}row {row}", item, how.mode, how.size))
        if images[-1].shape[:2] != images[0].shape[:2]:
            raise ValueError(_differ(f"{block.where}row {row}", images[-1], images[0]))
    if any(image.ndim == 3 for image in images):
        images = [i if i.ndim == 3 else np.repeat(i[..., None], 3, axis=2) for i in images]
        return np.stack(images).transpose(0, 3, 1, 2)
    return np.stack(images)[:, None]


def _stack(pixels: list[tuple[_Block, np.ndarray]], dtype: torch.dtype) -> Tensor:
    """(N, C, H, W), uint8 or float32 in [0, 1]; grey blocks get the channels of colour."""
    first = pixels[0][1]
    for block, images in pixels:
        if images.shape[2:] != first.shape[2:]:
            raise ValueError(_differ(f"{block.where}row {block.row}", images[0, 0], first[0, 0]))
    channels = max(images.shape[1] for _, images in pixels)
    count = sum(len(images) for _, images in pixels)
    out = torch.empty(count, channels, *first.shape[2:], dtype=dtype)
    start = 0
    for _, images in pixels:
        out[start : start + len(images)] = torch.from_numpy(images)
        start += len(images)
    return out if dtype == torch.uint8 else out.div_(255)


def _decode_one(where: str, item: Any, mode: Mode | None, size: Size | None) -> np.ndarray:
    from PIL import Image

    if isinstance(item, Mapping):
        item = item.get("bytes")
    if item is None:
        raise ValueError(f"{where}: no image bytes; embed the images in the file")
    if not _is_encoded(item):
        raise ValueError(
            f"{where}: expected an encoded image, got a {type(item).__name__}; give numbers as "
            "arrays, load((inputs, labels)), or name their column otherwise"
        )
    try:
        image = Image.open(io.BytesIO(item)) if isinstance(item, bytes) else item
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"images of mode {image.mode!r} have no 8-bit values; convert them")
        target = mode or ("L" if image.mode in ("1", "L", "LA") else "RGB")
        if image.mode != target:
            image = image.convert(target)
        if size is not None:
            image = image.resize((size[1], size[0]), Image.Resampling.BOX)
        return np.asarray(image)
    # Pillow's decoders raise these for broken files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{where}: the image cannot be decoded ({error})") from error


def _is_encoded(item: Any) -> bool:
    """An image's bytes, Hugging Face's dict of them, or Pillow's own."""
    return isinstance(item, bytes | Mapping) or hasattr(item, "getbands")


def _differ(where: str, image: np.ndarray, first: np.ndarray) -> str:
    return (
        f"{where}: an image of {image.shape[:2]} (H, W) among images of {first.shape[:2]}; "
        "give them one size with size=(H, W)"
    )


# Hugging Face datasets ----------------------------------------------------------------------------


def _is_dataset(source: Any) -> bool:
    return all(hasattr(source, a) for a in ("column_names", "features", "__getitem__", "__len__"))


def _load_dataset(source: Any, columns: Columns | None, how: _Decoding) -> Examples:
    first = source[0:1] if len(source) else {}
    encoded = {name for name, values in first.items() if _is_encoded(values[0])}
    parts = _choose_columns(source.column_names, columns, "the dataset", encoded)

    def blocks() -> Iterator[_Block]:
        for start in range(0, len(source), _CHUNK):
            rows = source[start : start + _CHUNK]
            labels = _array(rows[parts.label], parts.label)
            if parts.image:
                yield _Block("", start, list(rows[parts.inputs[0]]), None, labels)
            else:
                table = _side_by_side([_array(rows[c], c) for c in parts.inputs])
                yield _Block("", start, None, table, labels)

    return _assemble(blocks(), how, "the dataset")


def _array(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"column {name!r} holds lists that differ in length") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"column {name!r} holds {array.dtype}, not numbers; encode or drop those values, or "
            "choose others with columns=(inputs, label)"
        )
    return array


# Raw MNIST files ----------------------------------------------------------------------------------


def _raw_folder(root: Path) -> Path | None:
    """The folder with idx files: the root itself, root/raw, root/MNIST/raw."""
    for folder in (root, root / "raw", root / "MNIST" / "raw"):
        if folder.is_dir() and any(folder.glob("*-ubyte*")):
            return folder
    return None


def _load_raw(folder: Path, split: str) -> Examples:
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise ValueError(f'raw MNIST files have the splits "train" and "test", got {split!r}')
    images = _read_idx(_idx_file(folder, f"{prefix}-images", 3))
    labels = _read_idx(_idx_file(folder, f"{prefix}-labels", 1))
    return _from_arrays(images, labels, str(folder))


def _idx_file(folder: Path, stem: str, ndim: int) -> Path:
    names = [f"{stem}{sep}idx{ndim}-ubyte{end}" for end in ("", ".gz") for sep in "-."]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {names[0]} (or .gz) in {folder}. {_listing(folder)}")
    return path


def _read_idx(path: Path) -> np.ndarray:
    """The idx format: two zero bytes, the type (8: uint8), the rank, big-endian sizes, values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of bytes")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start].ljust(start - 4, b"\0"))
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path} is truncated: {len(content) - start} bytes of {math.prod(shape)}; "
            "copy or download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# Arrays -------------------------------------------------------------------------------------------


def _load_npz(path: Path, split: str, columns: Columns | None) -> Examples:
    arrays = None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            keys = list(archive.files)
            pair = _array_keys(keys, split) if columns is None else columns
            if pair is not None and all(name in keys for name in pair):
                arrays = [archive[str(name)] for name in pair]
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path.name} holds Python objects, which are never unpickled here: loading them "
                "can run code. Save plain numeric arrays"
            ) from error
        raise ValueError(
            f"{path} is not a whole .npz file ({error}); copy or download it again"
        ) from error
    if arrays is None:
        raise ValueError(
            f"{path.name}: expected arrays such as {pair or (f'x_{split}', f'y_{split}')}, found "
            f"{keys}; say which with columns=(inputs, label)"
        )
    return _from_arrays(arrays[0], arrays[1], path.name)


def _array_keys(keys: Sequence[str], split: str) -> tuple[str, str] | None:
    pairs = [(x.format(split), y.format(split)) for x, y in _ARRAY_NAMES]
    return next((p for p in (*pairs, *_PLAIN_ARRAY_NAMES) if {*p} <= set(keys)), None)


def _from_arrays(inputs: Any, labels: Any, what: str) -> Examples:
    x = inputs if isinstance(inputs, Tensor) else torch.from_numpy(_native(inputs, what))
    if x.ndim == 0 or x.is_complex():
        raise ValueError(f"{what}: inputs must be real numbers of shape (N, ...)")
    if x.ndim == 3:
        x = x.unsqueeze(1)
    elif x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.permute(0, 3, 1, 2)
    is_image = x.dtype == torch.uint8 and x.ndim == 4
    x = x.contiguous().float()
    return _examples(x / 255.0 if is_image else x, labels, what)


def _native(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what}: expected numbers, got an array of {array.dtype}")
    # torch reads neither big-endian nor read-only memory nor the wider unsigned types.
    kind = "int64" if array.dtype.kind == "u" and array.dtype.itemsize > 1 else None
    return np.array(array, dtype=kind or array.dtype.newbyteorder("="))


def _examples(inputs: Tensor, labels: Any, what: str) -> Examples:
    y = labels if isinstance(labels, Tensor) else torch.from_numpy(_native(labels, what))
    if len(inputs) != len(y):
        raise ValueError(f"{what}: {len(inputs)} inputs but {len(y)} labels")
    if len(y) == 0:
        raise ValueError(f"{what}: there are no examples")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y.squeeze(1)
    finite = torch.isfinite(inputs).flatten(1).all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{what}, row {row}: inputs are NaN or infinite; drop or fill those rows")
    return Examples(inputs, y.float() if y.is_floating_point() else y.long())

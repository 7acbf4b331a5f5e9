"""Portable files of a memory: safetensors with a json header, or Parquet.

A safetensors file holds a group for each type and shape of items: a ``Memory`` and, beside it, ids,
notes and scores. ``read_export`` gives them back, and ``store.append`` takes them again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import CheckpointError
from ..memory import Memory
from . import codec, scrub
from .base import Item, MemoryStore

_PAGE = 512
_COLUMNS = (
    "item", "id", "task", "origin", "label", "head", "reference", "soft_weight", "hard_weight",
    "scores", "note", "kind", "layout", "input",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """Items of one type: ``store.append(e.memory, inputs=e.inputs, ids=e.ids, ...)``.

    inputs: encoded images or texts; None where they are tensors, in ``memory.inputs``, which is
    (N, 0) otherwise.
    """

    memory: Memory
    inputs: list[bytes] | list[str] | None
    ids: list[str]
    notes: list[str]
    scores: dict[str, Tensor]


def write_export(store: MemoryStore, path: Path, version: int | None) -> Path:
    """An older export at ``path`` is replaced.

    Raises ValueError for a suffix that is neither .safetensors nor .parquet; FileExistsError for a
    file there that is no export.
    """
    version = store.version if version is None else version
    if path.suffix in (".safetensors", ".parquet") and os.path.lexists(path):
        parquet = path.suffix == ".parquet"
        if not (_is_table(path) if parquet else checkpoint.kind_of(path) == "memory"):
            raise FileExistsError(
                f"{path} is there, and is no export, which may be replaced; choose another name, "
                "or remove it"
            )
    if path.suffix == ".safetensors":
        groups = [_group_state(store, items, version) for items in _groups(store, version)]
        return checkpoint.save(path, {"groups": groups}, kind="memory")
    if path.suffix == ".parquet":
        return _write_parquet(store, path, version)
    raise ValueError(f"expected a path that ends in .safetensors or .parquet, got {path}")


def read_export(path: str | Path) -> list[Exported]:
    """What ``export`` wrote to a safetensors file.

    Raises FileNotFoundError, CheckpointError.
    """
    state = checkpoint.load(path, kind="memory")
    try:
        return [_exported(group) for group in state["groups"]]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds a memory that cannot be read ({error!r}); export it again"
        ) from error


def _exported(group: dict[str, Any]) -> Exported:
    state, inputs = dict(group["memory"]), None
    if scrub.is_encoded(state["inputs"]):
        packed = state["inputs"]
        inputs = scrub.unpacked(packed)
        if packed["encoded"] == "text":
            inputs = [codec.decoded(data) for data in inputs]
        state["inputs"] = torch.empty(len(inputs), 0)
    memory = Memory.from_state_dict(state)
    columns = (group["ids"], group["notes"], *group["scores"].values())
    if any(len(column) != len(memory) for column in columns):
        raise ValueError("its columns differ in length")
    return Exported(memory, inputs, group["ids"], group["notes"], group["scores"])


def pages(store: MemoryStore, version: int | None, size: int = _PAGE) -> Iterator[list[Item]]:
    """All items, a page at a time."""
    after = 0
    while page := store.items(version=version, after=after, limit=size):
        yield page
        after = page[-1].item


def _groups(store: MemoryStore, version: int) -> list[list[Item]]:
    """Items that one ``Memory`` can hold: of one kind and shape, with scores of the same names."""
    groups: dict[Any, list[Item]] = {}
    for page in pages(store, version):
        for item in page:
            groups.setdefault((item.layout, tuple(item.scores)), []).append(item)
    return list(groups.values())


def _group_state(store: MemoryStore, items: list[Item], version: int) -> dict[str, Any]:
    numbers, kind = [item.item for item in items], items[0].kind
    encoded: list[bytes] = []

    def keep(values: Any) -> Tensor:
        encoded.extend(v.encode() if isinstance(v, str) else v for v in values)
        return torch.empty(len(values), 0)

    state = store.memory(numbers, version=version, decode=keep).state_dict()
    if kind in ("image", "text"):
        state["inputs"] = scrub.packed(kind, encoded)
    names = items[0].scores
    scores = {n: torch.tensor([i.scores[n] for i in items], dtype=torch.float64) for n in names}
    return {
        "memory": state,
        "ids": [item.id for item in items],
        "notes": [item.note for item in items],
        "scores": scores,
    }


def _write_parquet(store: MemoryStore, path: Path, version: int) -> Path:
    """A row for each item, a page in memory at a time, moved to its place when it is whole.

    Inputs are bytes as they are stored: an encoded image or a text as it came, a tensor's numbers
    in the order and type that ``layout`` says.
    """
    pa, pq = _arrow()
    whole = all(type(item.label) is int for page in pages(store, version) for item in page)
    types = (
        pa.int64(), pa.string(), pa.int64(), pa.int64(), pa.int64() if whole else pa.string(),
        pa.list_(pa.int64()), pa.list_(pa.float64()), pa.float64(), pa.float64(), pa.string(),
        pa.string(), pa.string(), pa.string(), pa.binary(),
    )  # fmt: skip
    schema = pa.schema(list(zip(_COLUMNS, types, strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # its user's alone
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for page in pages(store, version):
                rows = [_row(store, item, version, whole) for item in page]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "a Parquet export needs pyarrow: pip install lifelong[data]; .safetensors needs nothing"
        ) from error
    return pa, pq


def _is_table(path: Path) -> bool:
    """Whether a file is a Parquet export."""
    pa, pq = _arrow()
    try:
        return tuple(pq.read_schema(path).names) == _COLUMNS
    except (pa.ArrowException, OSError):
        return False


def _row(store: MemoryStore, item: Item, version: int, whole: bool) -> dict[str, Any]:
    row = {**vars(item), "label": item.label if whole else json.dumps(item.label)}
    value = store.raw(item.item)
    if isinstance(value, str):
        value = value.encode()
    elif not isinstance(value, bytes):
        tensors = value.values() if isinstance(value, dict) else [value]
        columns = [(codec.column_of(x.unsqueeze(0)), x.unsqueeze(0)) for x in tensors]
        value = b"".join(column.rows(x)[0] for column, x in columns)
    reference = store.memory([item.item], version=version, decode=_no_inputs).outputs[0]
    scores = json.dumps(item.scores)
    return {**row, "scores": scores, "input": value, "reference": reference.double().tolist()}


def _no_inputs(values: Any) -> Tensor:
    return torch.empty(len(values), 0)

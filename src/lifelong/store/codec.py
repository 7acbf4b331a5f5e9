"""Memory <-> rows of bytes, with a layout in json that says how to read them. Shared by all stores.

A layout holds names of types and shapes alone, never a value, and only types of the list below are
read. The digest of a row is sha256 over its layout and its columns, each with its length.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import StoreDamagedError
from ..memory import Memory, is_top
from ..models import Inputs
from ..top_outputs import TopOutputs
from .base import Decode, Kind

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
        torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """Tensors of one type and shape, one for each row."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def spec(self) -> list[Any]:
        return [str(self.dtype).removeprefix("torch."), list(self.shape)]

    @classmethod
    def of(cls, spec: Any) -> Column:
        """Raises StoreDamagedError for what ``spec`` would not have written."""
        try:
            name, shape = spec
            plain = all(type(n) is int and n >= 0 for n in shape) and len(shape) < 33
            if plain and math.prod(max(n, 1) for n in shape) < 2**40:
                return cls(_DTYPES[name], tuple(shape))
        except (TypeError, ValueError, KeyError):
            pass
        raise StoreDamagedError(
            f"a layout says {str(spec)[:80]!r}, which is no type and shape; restore the store from "
            "a copy"
        )

    def require(self, data: bytes | memoryview) -> None:
        """A row is as long as it must be, or StoreDamagedError."""
        if len(data) != self.num_bytes:
            raise StoreDamagedError(
                f"a row has {len(data)} bytes where its layout says {self.num_bytes}; "
                "call store.verify()"
            )

    def rows(self, x: Tensor) -> list[bytes]:
        """The bytes of each row of x (N, *shape)."""
        n = len(x)
        if n == 0 or self.num_bytes == 0:
            return [b""] * n
        flat = x.detach().to("cpu").contiguous().reshape(n, -1)
        if flat.is_conj() or flat.is_neg():
            flat = flat.resolve_conj().resolve_neg()
        return [row.tobytes() for row in flat.view(torch.uint8).numpy()]


class Filling:
    """A tensor (N, *shape) that is filled row by row from bytes; one copy each.

    Room is taken only once there is a row as long as its layout says.
    """

    def __init__(self, column: Column, n: int) -> None:
        self._column, self._n = column, n

    @cached_property
    def tensor(self) -> Tensor:
        return torch.empty((self._n, *self._column.shape), dtype=self._column.dtype)

    @cached_property
    def _bytes(self) -> np.ndarray:
        return self.tensor.reshape(self._n, -1).view(torch.uint8).numpy()

    def put(self, i: int, data: bytes | memoryview) -> None:
        self._column.require(data)
        if len(data):
            self._bytes[i] = np.frombuffer(data, np.uint8)


def column_of(x: Tensor) -> Column:
    """The type and shape of x's rows; TypeError for a type that cannot be stored."""
    if x.dtype not in _DTYPES.values():
        raise TypeError(f"a store holds {', '.join(_DTYPES)}, got {x.dtype}; convert it first")
    return Column(x.dtype, tuple(x.shape[1:]))


@dataclass(frozen=True)
class InputLayout:
    """How inputs were stored: ``columns`` by name for a dict, under "" for a tensor."""

    kind: Kind
    columns: Mapping[str, Column] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.columns[""].shape if self.kind == "tensor" else ()

    @cached_property
    def spec(self) -> str:
        """In json."""
        columns = [[name, *column.spec()] for name, column in self.columns.items()]
        return json.dumps({"kind": self.kind, "columns": columns})

    @classmethod
    def of(cls, spec: str) -> InputLayout:
        value = parse(spec)
        try:
            kind, columns = value["kind"], {c[0]: Column.of(c[1:]) for c in value["columns"]}
            fits = {"tensor": list(columns) == [""], "dict": True}.get(kind, not columns)
            if kind in ("tensor", "dict", "image", "text") and fits:
                return cls(kind, columns)
        except (TypeError, KeyError, IndexError):
            pass
        raise StoreDamagedError(f"a layout of inputs cannot be read: {spec[:80]!r}")

    def require(self, data: bytes) -> None:
        """An input is as long as it must be, or StoreDamagedError."""
        size = sum(column.num_bytes for column in self.columns.values())
        if self.kind in ("tensor", "dict") and len(data) != size:
            raise StoreDamagedError(
                f"an input has {len(data)} bytes where its layout says {size}; call store.verify()"
            )

    def split(self, data: bytes) -> dict[str, bytes]:
        """The bytes of each column."""
        self.require(data)
        sizes = [column.num_bytes for column in self.columns.values()]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return {
            name: data[start : start + size]
            for name, start, size in zip(self.columns, starts, sizes)
        }

    def value(self, data: bytes) -> Any:
        """One stored input as it came."""
        if self.kind == "image":
            return bytes(data)
        if self.kind == "text":
            return decoded(data)
        values = {}
        for name, part in self.split(data).items():
            filling = Filling(self.columns[name], 1)
            filling.put(0, part)
            values[name] = filling.tensor[0]
        return values if self.kind == "dict" else values[""]


@dataclass(frozen=True)
class StateLayout:
    """How an item's label, outputs and weights were stored. top: k, C and dtype of packed
    ``TopOutputs``, None for outputs as they are."""

    label: Column
    reference: Column
    weight: tuple[torch.dtype, torch.dtype]
    top: tuple[int, int, torch.dtype] | None = None

    @cached_property
    def spec(self) -> str:
        """In json."""
        weight = [str(dtype).removeprefix("torch.") for dtype in self.weight]
        value = {"label": self.label.spec(), "reference": self.reference.spec(), "weight": weight}
        if self.top is not None:
            k, width, dtype = self.top
            value["top"] = [k, width, str(dtype).removeprefix("torch.")]
        return json.dumps(value)

    @classmethod
    def of(cls, spec: str) -> StateLayout:
        value = parse(spec)
        try:
            soft, hard = (_DTYPES[name] for name in value["weight"])
            top = None
            if value.get("top") is not None:
                k, width, name = value["top"]
                if not 0 < int(k) <= int(width) < 2**31:
                    raise ValueError(value["top"])
                top = (int(k), int(width), _DTYPES[name])
            return cls(Column.of(value["label"]), Column.of(value["reference"]), (soft, hard), top)
        except (TypeError, KeyError, ValueError) as error:
            raise StoreDamagedError(f"a layout of items cannot be read: {spec[:80]!r}") from error


def parse(spec: Any) -> Any:
    """json that a store wrote, or StoreDamagedError."""
    try:
        return json.loads(spec)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreDamagedError(f"{str(spec)[:80]!r} is not json; call store.verify()") from error


def decoded(data: bytes) -> str:
    """Text that a store wrote, or StoreDamagedError."""
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as error:
        raise StoreDamagedError("a text is not UTF-8; call store.verify()") from error


def digest(spec: str, *columns: bytes) -> bytes:
    """sha256 (32,) of a row: its layout, the lengths of its columns, the columns."""
    lengths = struct.pack(f">{len(columns)}q", *map(len, columns))
    sha = hashlib.sha256(b"%b\0%b" % (spec.encode(), lengths))
    sha.update(columns[0] if len(columns) == 1 else b"".join(columns))
    return sha.digest()


def integer(value: int) -> bytes:
    """Eight bytes whatever the value, so that it can be erased in place."""
    return struct.pack(">q", value)


def real(value: float) -> bytes:
    return struct.pack(">d", value)


def unpack(kind: str, data: Any) -> Any:
    """What ``integer`` (">q") or ``real`` (">d") packed, or StoreDamagedError."""
    try:
        return struct.unpack(kind, data)[0]
    except (struct.error, TypeError) as error:
        raise StoreDamagedError("a number has the wrong length; call store.verify()") from error


def encode_inputs(
    inputs: Inputs, encoded: Sequence[bytes | str] | None = None
) -> list[tuple[InputLayout, bytes]]:
    """Each input's layout and bytes; ``encoded`` instead of the tensors where it is given.

    Raises TypeError for an encoded input that is neither bytes nor text.
    """
    if encoded is not None:
        kinds: dict[type, Kind] = {bytes: "image", str: "text"}
        found = []
        for value in encoded:
            if type(value) not in kinds:
                raise TypeError(
                    f"expected encoded images as bytes or texts as str, got {type(value).__name__}"
                )
            data = value.encode() if isinstance(value, str) else value
            found.append((InputLayout(kinds[type(value)]), data))
        return found
    if isinstance(inputs, Mapping):
        columns = {name: column_of(x) for name, x in inputs.items()}
        layout = InputLayout("dict", columns)
        parts = [columns[name].rows(x) for name, x in inputs.items()]
        return [(layout, b"".join(row)) for row in zip(*parts, strict=True)]
    column = column_of(inputs)
    layout = InputLayout("tensor", {"": column})
    return [(layout, row) for row in column.rows(inputs)]


class State(NamedTuple):
    """An item's row but for its input: everything that a memory says of it, as bytes."""

    layout: StateLayout
    name: bytes
    task: bytes
    origin: bytes
    head: bytes
    soft: bytes
    hard: bytes
    scores: bytes
    note: bytes
    label: bytes
    reference: bytes

    @classmethod
    def of(cls, layout: StateLayout, columns: Sequence[bytes]) -> State:
        """A row that was read, as long as its layout says, or StoreDamagedError."""
        state = cls(layout, *columns)
        layout.label.require(state.label)
        layout.reference.require(state.reference)
        return state

    @property
    def columns(self) -> tuple[bytes, ...]:
        return self[1:]  # type: ignore[return-value]

    @property
    def digest(self) -> bytes:
        return digest(self.layout.spec, *self.columns)


def encode_states(
    memory: Memory,
    heads: Sequence[int],
    names: Iterable[str],
    notes: Iterable[str],
    scores: Iterable[Mapping[str, float]],
) -> list[State]:
    """heads: the store's number of each of ``memory.heads``; scores: by name, of each item."""
    top, reference_rows = None, memory.reference
    if is_top(memory.reference):
        top = (memory.reference.k, memory.reference.width, memory.reference.dtype)
        reference_rows = memory.reference.packed()
    layout = StateLayout(
        column_of(memory.labels),
        column_of(reference_rows),  # type: ignore[arg-type]
        (memory.soft_weight.dtype, memory.hard_weight.dtype),
        top,
    )
    return [
        State(layout, name.encode(), integer(task), integer(origin), integer(heads[head]),
              real(soft), real(hard), json.dumps(dict(score)).encode(), note.encode(), label,
              reference)
        for name, task, origin, head, soft, hard, score, note, label, reference in zip(
            names,
            memory.task.tolist(),
            memory.origin.tolist(),
            memory.head.tolist(),
            memory.soft_weight.double().tolist(),
            memory.hard_weight.double().tolist(),
            scores,
            notes,
            layout.label.rows(memory.labels),
            layout.reference.rows(reference_rows),  # type: ignore[arg-type]
            strict=True,
        )
    ]  # fmt: skip


def label_of(layout: StateLayout, data: bytes) -> Any:
    """A stored label as a number or a list."""
    filling = Filling(layout.label, 1)
    filling.put(0, data)
    return filling.tensor[0].tolist()


class GatheringInputs:
    """Inputs of N items, filled row by row, all of one layout.

    Raises ValueError where layouts differ: one ``Memory`` cannot hold them.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.count = 0
        self.encoded: list[Any] = []
        self.layout: InputLayout | None = None
        self.columns: dict[str, Filling] = {}

    def put(self, layout: InputLayout, data: bytes) -> None:
        """The next input."""
        if self.layout is None:
            self.layout = layout
            self.columns = {name: Filling(c, self.n) for name, c in layout.columns.items()}
        elif not _alike(layout, self.layout):
            raise ValueError(differ(layout.spec, self.layout.spec))
        if layout.kind == "tensor":
            self.columns[""].put(self.count, data)
        elif layout.kind == "dict":
            for name, part in layout.split(data).items():
                self.columns[name].put(self.count, part)
        else:
            self.encoded.append(layout.value(data))
        self.count += 1

    def inputs(self, decode: Decode | None) -> Inputs:
        if self.layout is None:
            raise ValueError("there are no such items; ask store.count(where) before")
        if self.layout.kind == "tensor":
            return self.columns[""].tensor
        if self.layout.kind == "dict":
            return {name: filling.tensor for name, filling in self.columns.items()}
        return (decode or _default_decode(self.layout.kind))(self.encoded)


class Gathering:
    """A ``Memory`` of N items that is filled row by row; raises as ``GatheringInputs``."""

    def __init__(self, n: int) -> None:
        self.states: list[State] = []
        self._inputs = GatheringInputs(n)

    def put(self, inputs: InputLayout, data: bytes, state: State) -> None:
        """The next item."""
        self._inputs.put(inputs, data)
        self.states.append(state)

    def memory(self, heads: Mapping[int, Any], decode: Decode | None) -> Memory:
        """heads: by the store's number."""
        return believed(self._inputs.inputs(decode), self.states, heads)


def believed(inputs: Any, states: Sequence[State], heads: Mapping[int, Any]) -> Memory:
    """Inputs (N, ...) with what N rows say of them; heads: by the store's number.

    Raises ValueError where labels or outputs differ in type or shape.
    """
    of_state = states[0].layout
    for state in states:
        if not _alike(state.layout, of_state):
            raise ValueError(differ(state.layout.spec, of_state.spec))
    columns = dict(zip(State._fields, zip(*states, strict=True), strict=True))
    numbers = _packed(columns["head"], ">i8")
    found, head = np.unique(numbers, return_inverse=True)
    try:
        used = tuple(heads[number] for number in found.tolist())
    except KeyError as error:
        raise StoreDamagedError(f"head {error} is missing; call store.verify()") from error
    soft, hard = of_state.weight
    reference: Any = _filled(of_state.reference, columns["reference"])
    if of_state.top is not None:
        reference = TopOutputs.unpacked(reference, *of_state.top)
    return Memory(
        inputs=inputs,
        labels=_filled(of_state.label, columns["label"]),
        reference=reference,
        soft_weight=torch.from_numpy(_packed(columns["soft"], ">f8")).to(soft),
        hard_weight=torch.from_numpy(_packed(columns["hard"], ">f8")).to(hard),
        task=torch.from_numpy(_packed(columns["task"], ">i8")),
        origin=torch.from_numpy(_packed(columns["origin"], ">i8")),
        head=torch.from_numpy(head.astype(np.int64)),
        heads=used,
    )


def differ(one: str, other: str) -> str:
    return (
        f"the items differ in type or shape ({one}, {other}), so one Memory cannot hold them; "
        "choose some by Where(kind=..., task=...)"
    )


def _alike(a: object, b: object) -> bool:
    return a is b or a == b  # most are the same object, which is told faster


def _filled(column: Column, rows: Sequence[bytes]) -> Tensor:
    if any(len(row) != column.num_bytes for row in rows):
        raise StoreDamagedError("a row has the wrong length; call store.verify()")
    shape = (len(rows), *column.shape)
    joined = bytearray(b"".join(rows))
    if not joined:
        return torch.empty(shape, dtype=column.dtype)
    return torch.frombuffer(joined, dtype=column.dtype).reshape(shape).clone()


def _packed(rows: Sequence[bytes], kind: str) -> np.ndarray:
    """(N,) numbers of the machine's byte order."""
    if any(len(row) != 8 for row in rows):
        raise StoreDamagedError("a number has the wrong length; call store.verify()")
    values = np.frombuffer(b"".join(rows), kind)
    return values.astype(values.dtype.newbyteorder("="))


def _default_decode(kind: Kind) -> Decode:
    if kind == "text":
        raise ValueError(
            "texts need a tokenizer; pass decode=, a function from a list of str to inputs"
        )
    return decode_images


def decode_images(images: Sequence[bytes]) -> Tensor:
    """uint8 (N, C, H, W) of encoded images of one size. ValueError for what is no such image."""
    arrays = []
    for i, data in enumerate(images):
        try:
            with Image.open(io.BytesIO(data)) as image:
                grey = image.mode in ("1", "L", "I;16")
                pixels = np.asarray(image.convert("L" if grey else "RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"input {i} is no image that Pillow reads ({error}); pass decode="
            ) from error
        arrays.append(pixels[None] if grey else pixels.transpose(2, 0, 1))
    if len({a.shape for a in arrays}) > 1:
        shapes = sorted({a.shape for a in arrays})
        raise ValueError(f"the images have several sizes, {shapes[:3]}; pass a decode= that crops")
    return torch.from_numpy(np.stack(arrays))

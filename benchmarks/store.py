"""The memory on disk beside plain Parquet, plain Lance and plain files: append, read, erase.

    python -m benchmarks.store --data DIR --out DIR [--smoke] [--scratch DIR]

Sides: one file for each image; Parquet; a plain Lance table; ``lifelong.store`` on SQLite and on
Lance, which check the digest of each row that they read, and hold soft labels and more besides.

Images: the JPEG files of Tiny ImageNet, 64 x 64, as they came, each followed by 32 bytes that no
other has (a JPEG reader stops before them), so that every image can be searched for on disk, also
where the data set is repeated to reach the number wanted. Pixels: random uint8 (3, 64, 64).

1. append: all in one call, and in transactions of 1,000. `synced` says which sides asked the system
   to write each transaction through to the device before they went on; those that do not would
   lose it with the power. Rounds, the sides in turn.
2. read: batches of 128 ids drawn at random, each batch new to every side and read by all of them
   right after each other, first in turn; the files are in the system's cache. What counts is from
   ids to bytes, without decoding.
3. erase: 100 ids drawn at random, then every file is searched for each image's 32 bytes, before
   and after. Files are unlinked; who reads the device itself may still find them, save where they
   were overwritten in place.

Ratios are medians over rounds of wall times, beside plain files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lifelong.memory import Memory
from lifelong.readers import find
from lifelong.runs import versions
from lifelong.store import open_store

SHAPE = (3, 64, 64)
MARK, PREFIX = 32, b"\xf1lifelong"


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    kind: str = "jpeg"  # or "pixels"
    num_images: int = 100_000
    transaction: int = 1000
    rounds: int = 3  # of append
    batch_size: int = 128
    batches: int = 200
    erased: int = 100
    seed: int = 0


SMOKE = Config(num_images=60, transaction=20, rounds=1, batch_size=8, batches=5, erased=3)


@dataclass(frozen=True)
class Rows:
    """Consecutive images: ids, encoded bytes or pixels, labels."""

    ids: range
    payload: Sequence[bytes]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, size: int) -> Iterator[Rows]:
        for i in range(0, len(self), size):
            part = slice(i, i + size)
            yield Rows(self.ids[part], self.payload[part], self.labels[part])


def mark(i: int) -> bytes:
    """32 bytes that stand in no other image; all begin alike, so a search is one pass."""
    return PREFIX + hashlib.sha256(f"image {i}".encode()).digest()[: MARK - len(PREFIX)]


def images(config: Config, data: Path | None) -> Rows:
    n = config.num_images
    generator = np.random.default_rng(config.seed)
    if config.kind == "pixels":
        size = int(np.prod(SHAPE)) - MARK
        payload = [generator.bytes(size) + mark(i) for i in range(n)]
        return Rows(range(n), payload, generator.integers(0, 200, n))
    if data is None:  # of the length of the real ones
        lengths = generator.integers(1000, 3500, n)
        payload = [
            b"\xff\xd8" + generator.bytes(int(k)) + b"\xff\xd9" + mark(i)
            for i, k in enumerate(lengths)
        ]
        return Rows(range(n), payload, generator.integers(0, 200, n))
    files = [p for split in ("train", "val") for p in find(data, "tiny_imagenet", split)]
    table = pa.concat_tables(pq.read_table(p, columns=["image", "label"]) for p in files)
    encoded = [row["bytes"] for row in table["image"].to_pylist()]
    payload = [encoded[i % len(encoded)] + mark(i) for i in range(n)]
    return Rows(range(n), payload, np.resize(table["label"].to_numpy(), n))


# Sides --------------------------------------------------------------------------------------------


class Side(Protocol):
    """One way to keep images in a folder that is not there yet."""

    synced: bool

    def __init__(self, folder: Path, kind: str) -> None: ...

    def append(self, parts: Iterable[Rows]) -> None:
        """Each part is committed before the next one comes."""
        ...

    def reader(self) -> Callable[[Sequence[int]], Sequence[Any]]:
        """Open what is there; the function from ids to payloads, in the order of the ids."""
        ...

    def erase(self, ids: Sequence[int]) -> None: ...


def table_of(rows: Rows) -> pa.Table:
    return pa.table(
        {
            "id": pa.array(rows.ids, pa.int64()),
            "image": pa.array(rows.payload, pa.binary()),
            "label": pa.array(rows.labels, pa.int64()),
        }
    )


class Files:
    """A file for each image, in 256 folders; labels in a text file."""

    synced = False

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        for i in range(256):
            (folder / f"{i:02x}").mkdir(parents=True, exist_ok=True)

    def path(self, i: int) -> str:
        return f"{self.folder}/{i % 256:02x}/{i:08d}"

    def append(self, parts: Iterable[Rows]) -> None:
        for part in parts:
            for i, payload in zip(part.ids, part.payload):
                with open(self.path(i), "wb") as file:
                    file.write(payload)
                    if self.synced:
                        file.flush()
                        os.fsync(file.fileno())
            with (self.folder / "labels.txt").open("a") as file:
                file.writelines(f"{i} {y}\n" for i, y in zip(part.ids, part.labels))

    def reader(self) -> Callable[[Sequence[int]], Sequence[bytes]]:
        def read(ids: Sequence[int]) -> list[bytes]:
            found = []
            for i in ids:
                with open(self.path(i), "rb") as file:
                    found.append(file.read())
            return found

        return read

    def erase(self, ids: Sequence[int]) -> None:
        for i in ids:
            os.unlink(self.path(i))


class Parquet:
    """A file for each transaction, groups of 1,000 rows, images not compressed again."""

    synced = True

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _write(self, table: pa.Table, path: Path) -> None:
        with path.open("wb") as file:
            pq.write_table(
                table, file, row_group_size=1000, use_dictionary=False, compression="none"
            )
            file.flush()
            os.fsync(file.fileno())

    def append(self, parts: Iterable[Rows]) -> None:
        for part in parts:
            self._write(table_of(part), self.folder / f"{part.ids[0]:09d}.parquet")

    def reader(self) -> Callable[[Sequence[int]], Sequence[bytes]]:
        files = [pq.ParquetFile(p) for p in sorted(self.folder.glob("*.parquet"))]
        groups = [(f, g) for f in files for g in range(f.num_row_groups)]
        sizes = [f.metadata.row_group(g).num_rows for f, g in groups]
        ends = np.cumsum(sizes)

        def read(ids: Sequence[int]) -> list[bytes]:
            wanted = np.asarray(ids)  # an image's id is its row
            of = np.searchsorted(ends, wanted, side="right")
            found: dict[int, bytes] = {}
            for g in np.unique(of):
                file, group = groups[g]
                column = file.read_row_group(group, columns=["image"])["image"]
                for i in wanted[of == g].tolist():
                    found[i] = column[i - int(ends[g]) + sizes[g]].as_py()
            return [found[i] for i in ids]

        return read

    def erase(self, ids: Sequence[int]) -> None:
        gone = pa.array(ids)
        for path in sorted(self.folder.glob("*.parquet")):
            table = pq.read_table(path)
            mask = pa.compute.is_in(table["id"], gone)
            if pa.compute.any(mask).as_py():
                kept = table.filter(pa.compute.invert(mask))
                beside = path.with_suffix(".new")
                self._write(kept, beside)
                beside.replace(path)


class Lance:
    """A plain table, read by row number."""

    synced = False

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder

    def append(self, parts: Iterable[Rows]) -> None:
        for part in parts:
            mode = "append" if self.folder.exists() else "create"
            lance.write_dataset(table_of(part), self.folder, mode=mode)

    def reader(self) -> Callable[[Sequence[int]], Sequence[bytes]]:
        dataset = lance.dataset(self.folder)

        def read(ids: Sequence[int]) -> list[bytes]:
            return dataset.take(list(ids), columns=["image"])["image"].to_pylist()

        return read

    def erase(self, ids: Sequence[int]) -> None:
        dataset = lance.dataset(self.folder)
        dataset.delete(f"id in ({', '.join(map(str, ids))})")
        dataset.optimize.compact_files(materialize_deletions_threshold=0.0)
        dataset.cleanup_old_versions(older_than=timedelta(0))


class Ours:
    """A ``MemoryStore``: with soft labels of ten outputs, weights, ids and digests besides."""

    suffix = ""
    synced = True

    def __init__(self, folder: Path, kind: str) -> None:
        self.path, self.kind = f"{folder}{self.suffix}", kind
        self.folder = folder  # what is measured on disk
        if self.suffix:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = f"{folder}/store{self.suffix}"

    def append(self, parts: Iterable[Rows]) -> None:
        with open_store(self.path) as store:
            for part in parts:
                pixels = self.kind == "pixels"
                store.append(memory_of(part, pixels), inputs=None if pixels else list(part.payload))

    def reader(self) -> Callable[[Sequence[int]], Any]:
        store = open_store(self.path, "r")

        def read(ids: Sequence[int]) -> Any:
            if self.kind == "pixels":
                return store.batch(ids).inputs
            kept: list[bytes] = []

            def keep(values: Sequence[bytes]) -> Tensor:
                kept.extend(values)
                return torch.empty(len(values), 0)

            store.batch(ids, decode=keep)
            return kept

        return read

    def erase(self, ids: Sequence[int]) -> None:
        with open_store(self.path) as store:
            store.forget([i + 1 for i in ids])


class OursOnLance(Ours):
    __doc__ = Ours.__doc__
    suffix = ".lance"


def memory_of(rows: Rows, pixels: bool) -> Memory:
    n = len(rows)
    inputs = torch.empty(n, 0)
    if pixels:
        inputs = torch.frombuffer(bytearray(b"".join(rows.payload)), dtype=torch.uint8)
        inputs = inputs.reshape(n, *SHAPE)
    return Memory(
        inputs=inputs,
        labels=torch.from_numpy(rows.labels.astype(np.int64)),
        reference=torch.zeros(n, 10),
        soft_weight=torch.ones(n),
        hard_weight=torch.zeros(n),
        task=torch.zeros(n, dtype=torch.int64),
        origin=torch.arange(rows.ids[0], rows.ids[-1] + 1),
        head=torch.zeros(n, dtype=torch.int64),
    )


SIDES: dict[str, type[Side]] = {
    "files": Files,
    "parquet": Parquet,
    "lance": Lance,
    "store (SQLite)": Ours,
    "store (Lance)": OursOnLance,
}
REFERENCE = "files"


# Measurements -------------------------------------------------------------------------------------


def run(config: Config, rows: Rows, scratch: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """All three measurements of all sides, in ``scratch``, which is left empty."""
    held = sum(map(len, rows.payload))
    log(f"{len(rows):,} images of kind {config.kind}, {held / len(rows):,.0f} bytes each")
    result: dict[str, Any] = {"payload_bytes": held, "append": {}}
    for how, size in (("whole", len(rows)), ("transactions", config.transaction)):
        keep = how == "transactions"  # the fragmented ones are read and erased from, as in life
        result["append"][how] = append(config, rows, size, scratch, keep=keep, log=log)
    result["read"] = read(config, rows, scratch, log)
    result["erase"] = erase(config, scratch, log)
    for name in SIDES:
        shutil.rmtree(scratch / name)
    return result


def append(
    config: Config, rows: Rows, size: int, scratch: Path, *, keep: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    disk: dict[str, int] = {}
    for turn in range(config.rounds):
        for name in in_turn(turn):
            folder = scratch / name
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()  # nobody pays for what another left in the cache
            start = time.perf_counter()
            SIDES[name](folder, config.kind).append(rows.cut(size))
            seconds[name].append(time.perf_counter() - start)
            disk[name] = size_of(folder)
            if not (keep and turn == config.rounds - 1):
                shutil.rmtree(folder)
    found = {
        name: {
            **ratio(seconds[name], seconds[REFERENCE]),
            "bytes": disk[name],
            "synced": SIDES[name].synced,
        }
        for name in SIDES
    }
    for name, one in found.items():
        log(
            f"append {size:,} at a time | {name}: {one['median']:.2f} s, {one['ratio']:.2f} x, "
            f"{one['bytes'] / 1e6:.1f} MB{', synced' if one['synced'] else ''}"
        )
    return found


def read(
    config: Config, rows: Rows, scratch: Path, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    generator = np.random.default_rng(config.seed + 1)
    opened, readers = {}, {}
    for name, side in SIDES.items():
        start = time.perf_counter()
        readers[name] = side(scratch / name, config.kind).reader()
        opened[name] = time.perf_counter() - start
        for path in (scratch / name).rglob("*"):
            if path.is_file():
                path.read_bytes()  # into the system's cache
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(config.batches + 1):
        ids = generator.choice(len(rows), config.batch_size, replace=False).tolist()
        for name in in_turn(turn):
            start = time.perf_counter()
            payload = readers[name](ids)
            elapsed = time.perf_counter() - start
            if turn:  # first uses are no reading
                seconds[name].append(elapsed)
            elif as_bytes(payload) != [rows.payload[i] for i in ids]:
                raise ValueError(f"{name} read something else than was written")
    found = {
        name: {**ratio(seconds[name], seconds[REFERENCE]), "open": opened[name]} for name in SIDES
    }
    for name, one in found.items():
        log(
            f"read {config.batch_size} | {name}: {1e3 * one['median']:.2f} ms, "
            f"{one['ratio']:.2f} x ({one['low']:.2f} to {one['high']:.2f})"
        )
    return found


def erase(config: Config, scratch: Path, log: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    generator = np.random.default_rng(config.seed + 2)
    ids = sorted(generator.choice(config.num_images, config.erased, replace=False).tolist())
    found = {}
    for name, side in SIDES.items():
        folder = scratch / name
        before = on_disk(folder, ids)
        start = time.perf_counter()
        side(folder, config.kind).erase(ids)
        seconds = time.perf_counter() - start
        others = [i for i in range(0, config.num_images, 97) if i not in set(ids)]
        found[name] = {
            "seconds": seconds,
            "found_before": before,
            "found_after": on_disk(folder, ids),
            "others_lost": len(others) - on_disk(folder, others),
            "bytes_after": size_of(folder),
        }
    for name, one in found.items():
        one["ratio"] = one["seconds"] / found[REFERENCE]["seconds"]
        log(
            f"erase {config.erased} | {name}: {one['seconds']:.3f} s, {one['ratio']:.1f} x; found "
            f"{one['found_before']} before, {one['found_after']} after; "
            f"{one['others_lost']} others lost"
        )
    return found


def on_disk(folder: Path, ids: Iterable[int]) -> int:
    """How many of the images' marks stand somewhere in a file under ``folder``."""
    wanted = {mark(i) for i in ids}
    marks = re.compile(re.escape(PREFIX) + b".{%d}" % (MARK - len(PREFIX)), re.DOTALL)
    found: set[bytes] = set()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                found |= wanted.intersection(marks.findall(m))
    return len(found)


def size_of(folder: Path) -> int:
    """Bytes that the files take, in whole blocks of the file system."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


def as_bytes(payload: Any) -> list[bytes]:
    if isinstance(payload, Tensor):
        return [row.numpy().tobytes() for row in payload]
    return list(payload)


def in_turn(turn: int) -> list[str]:
    names = list(SIDES)
    k = turn % len(names)
    return names[k:] + names[:k]


def ratio(ours: list[float], reference: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours, reference)]
    low, high = (min(ratios), max(ratios))
    if len(ratios) > 4:
        low, _, high = quantiles(ratios, n=4)
    return {"median": median(ours), "ratio": median(ratios), "low": low, "high": high}


# Record -------------------------------------------------------------------------------------------


def write(folder: Path, config: Config, found: dict[str, Any], log: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    settings = folder / "config.json"
    configs = json.loads(settings.read_text()) if settings.exists() else {}
    for file, content in (
        (path, {**result, config.kind: found}),
        (settings, {**configs, config.kind: asdict(config)}),
        (folder / "versions.json", {**versions(), **others()}),
    ):
        file.write_text(json.dumps(content, indent=1) + "\n")
    with (folder / "log.txt").open("a") as file:
        file.write("\n".join(log) + "\n")


def others() -> dict[str, str]:
    import sqlite3

    found = {"sqlite": sqlite3.sqlite_version}
    for name in ("pyarrow", "pylance"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with tiny_imagenet; else random bytes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=("jpeg", "pixels"), default="jpeg")
    parser.add_argument("--images", type=int, help="how many; default 100,000")
    parser.add_argument("--rounds", type=int, help="of append; default 3")
    parser.add_argument("--scratch", type=Path, help="where the stores are made and removed")
    parser.add_argument("--smoke", action="store_true", help="seconds; the numbers mean nothing")
    options = parser.parse_args(arguments)
    config = SMOKE if options.smoke else Config()
    given = {"kind": options.kind, "num_images": options.images, "rounds": options.rounds}
    config = Config(**{**asdict(config), **{k: v for k, v in given.items() if v is not None}})
    torch.set_num_threads(1)
    lines = [f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {config}"]

    def log(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        found = run(config, images(config, options.data), Path(scratch), log)
    write(options.out, config, found, lines)


if __name__ == "__main__":
    main()

"""Data sets that are read from front to back and held nowhere: ``Stream``, and tar ``Shards``.

A pass over a stream holds one batch. Everything that reads data in passes takes one (scores,
selection, curvature, g, ``Prior.update``); it must give the same examples again, in the same order,
whenever it is iterated.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .data import Head


class Stream(IterableDataset):
    """Examples, one after another, of whatever can be iterated again and again.

    source: an iterable (a Hugging Face streaming data set, ``Shards``, a WebDataset) or a function
    that returns an iterator; example: what it gives -> (input, label), where it is not that
    already; length: how many there are, where the source does not tell by ``len``: curvature,
    scores and a memory of a number of items need none, ``Prior.update`` does; head: the class set.

    In a DataLoader of several workers each reads every n-th example: the order is another, and
    always the same. Raises ValueError for a length below 1, TypeError for an iterator, which could
    be read only once.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterator[Any]],
        example: Callable[[Any], tuple[Any, Any]] | None = None,
        *,
        length: int | None = None,
        head: Head | None = None,
    ) -> None:
        if isinstance(source, Iterator):
            raise TypeError(
                "expected a source that can be read more than once, got an iterator; pass what it "
                "was made of, or a function that makes it"
            )
        if length is not None and length < 1:
            raise ValueError(f"length must be the number of examples, got {length}")
        self.source, self.example, self.head = source, example, head
        self._length = length

    def __len__(self) -> int:
        """Raises TypeError where nobody said."""
        return len(self.source) if self._length is None else self._length  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        source: Any = self.source
        items = iter(source) if hasattr(source, "__iter__") else source()
        worker = get_worker_info()
        if worker is not None:
            items = islice(items, worker.id, None, worker.num_workers)
        return items if self.example is None else map(self.example, items)


class Shards:
    """Samples of tar files as WebDataset lays them out, from the first file to the last.

    Files that stand one after another and share a name up to its first dot are a sample: a dict of
    its extensions in small letters to bytes, and ``__key__``. Nothing is unpacked to a disk; a file
    may be compressed. Raises ValueError for no paths, while reading for a file that is no tar or
    ends within a sample's bytes (a cut between two files shows in ``Stream``'s length alone),
    FileNotFoundError for one that is missing.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        self.paths = [paths] if isinstance(paths, str | Path) else list(paths)
        if not self.paths:
            raise ValueError("no shards were given; expected paths of tar files")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self.paths:
            try:
                with tarfile.open(path, "r|*") as tar:
                    yield from _samples(tar)
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(f"{path} is no tar file, or a damaged one ({error})") from error


def _samples(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    sample: dict[str, Any] = {}
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # else a record of each file stays
        file = tar.extractfile(member) if member.isfile() else None
        if file is None:
            continue
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key = folder + slash + stem
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        sample["__key__"] = key
        sample[extension.lower()] = file.read()
    if sample:
        yield sample

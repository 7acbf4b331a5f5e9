"""Data sets that are read from front to back and held nowhere: ``Stream``, and tar ``Shards``.

A pass over a stream holds one batch. Everything that reads data in passes takes one (scores,
selection, curvature, g, ``Prior.update``); it must give the same examples again, in the same order,
whenever it is iterated.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .data import Head, num_known


class Stream(IterableDataset):
    """Examples, one after another, of whatever can be iterated again and again.

    source: an iterable (a Hugging Face streaming data set, ``Shards``, a WebDataset) or a function
    that returns an iterator; example: what it gives -> (input, label), where it is not that
    already; length: how many there are, where the source does not tell by ``len``: curvature,
    scores and a memory of a number of items need none, ``Prior.update`` does; head: the class set.

    In a DataLoader of several workers each reads its part: the order is another, and always the
    same. splits: whether the source gives each worker a part by itself, as PyTorch asks of an
    IterableDataset and those of WebDataset and Hugging Face do; of others each worker takes every
    n-th example. By default told by the source's type: say True for a function that opens a
    WebDataset. Raises ValueError for a length below 1, and while reading for a worker that gets
    all or only some examples where it should be otherwise, if the length is known; TypeError for
    an iterator, which could be read only once.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterator[Any]],
        example: Callable[[Any], tuple[Any, Any]] | None = None,
        *,
        length: int | None = None,
        head: Head | None = None,
        splits: bool | None = None,
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
        self.splits = isinstance(source, IterableDataset) if splits is None else splits

    def __len__(self) -> int:
        """Raises TypeError where nobody said."""
        return len(self.source) if self._length is None else self._length  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        source: Any = self.source
        items = iter(source) if hasattr(source, "__iter__") else source()
        worker = get_worker_info()
        if worker is not None:
            items = self._part(items, worker.id, worker.num_workers)
        return items if self.example is None else map(self.example, items)

    def _part(self, items: Iterator[Any], worker: int, of: int) -> Iterator[Any]:
        """This worker's; at the end it is known what the source gave."""
        number = -1
        for number, item in enumerate(items):
            if self.splits or number % of == worker:
                yield item
        length, gave = num_known(self), number + 1
        if length is None or of == 1:
            return
        # A source of one shard splits into all of it for the first worker and nothing for others.
        if gave < length if not self.splits else gave >= length and worker > 0:
            raise ValueError(
                f"the stream gave a worker {gave} of {length} examples, and was said to "
                f"{'' if self.splits else 'not '}split them among {of} workers by itself; pass "
                f"lifelong.Stream(..., splits={not self.splits}), or the right length"
            )


class Shards:
    """Samples of tar files as WebDataset lays them out, from the first file to the last.

    Files that stand one after another and share a name up to its first dot are a sample: a dict of
    its extensions in small letters to bytes, and ``__key__``; those without a name before the dot
    (``._0001.jpg``) or without a dot (``README``) belong to none. Nothing is unpacked to a disk; a
    file may be compressed. Raises ValueError for no paths, while reading for a sample that has an
    extension twice, and for a file that is no tar or ends within a sample's bytes (a cut between
    two files shows in ``Stream``'s length alone), FileNotFoundError for one that is missing.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        self.paths = [paths] if isinstance(paths, str | Path) else list(paths)
        if not self.paths:
            raise ValueError("no shards were given; expected paths of tar files")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self.paths:
            try:
                with tarfile.open(path, "r|*") as tar:
                    yield from _samples(tar, path)
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(f"{path} is no tar file, or a damaged one ({error})") from error


def _samples(tar: tarfile.TarFile, path: str | Path) -> Iterator[dict[str, Any]]:
    sample: dict[str, Any] = {}
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # else a record of each file stays
        file = tar.extractfile(member) if member.isfile() else None
        if file is None:
            continue
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot:
            continue
        key, extension = folder + slash + stem, extension.lower()
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        if extension in sample:
            raise ValueError(f"{path}: the sample {key!r} has {extension!r} twice; name each once")
        sample["__key__"] = key
        sample[extension] = file.read()
    if sample:
        yield sample

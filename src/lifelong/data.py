"""Data as the library sees them: examples with ids, in a fixed order, a batch at a time.

``Examples`` holds arrays; ``batches`` also reads (inputs, labels) pairs, any map-style ``Dataset``
of (input, label), any ``IterableDataset`` of them (``streaming.Stream`` makes one), Hugging Face's
data sets, a ``DataLoader`` that does not shuffle, and any re-iterable of (inputs, labels) batches.
The id of an example is its position, unless ``Examples.ids`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from .distributed import Ranks
from .errors import NotRepeatableError
from .models import Inputs, Unread, concat, move, rows, select, take

Head = tuple[int, ...]
BATCH_SIZE = 512  # of passes that take no training step; the result does not depend on it


class Batch(NamedTuple):
    """inputs (B, ...), labels (B,) or (B, C), ids (B,) int64."""

    inputs: Inputs
    labels: Tensor
    ids: Tensor

    def rows(self, index: Tensor | slice) -> Batch:
        """Some of the examples."""
        return Batch(take(self.inputs, index), self.labels[index], self.ids[index])

    def to(self, device: Any) -> Batch:
        """On the device of the model that is to read it."""
        return Batch(move(self.inputs, device), self.labels.to(device), self.ids.to(device))


@dataclass(frozen=True, eq=False)
class Examples(Dataset):
    """Examples in memory, with the head they belong to.

    inputs: (N, ...) tensor, or a dict of them; labels: (N,) or (N, C); ids: (N,) int64, by
    default 0..N-1; head: the output units that compete for these examples, None for all;
    transform: applied to each batch of inputs as it is read, and must be deterministic (a
    permutation, a rotation, a cast), since the past must look the same when it is read again.
    """

    inputs: Inputs
    labels: Tensor
    ids: Tensor = None  # type: ignore[assignment]  # filled below
    head: Head | None = None
    transform: Callable[[Inputs], Inputs] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping | Unread):  # unread ones are read a batch at a time
            object.__setattr__(self, "inputs", torch.as_tensor(self.inputs))
        object.__setattr__(self, "labels", torch.as_tensor(self.labels))
        n = rows(self.inputs)
        ids = torch.arange(n) if self.ids is None else torch.as_tensor(self.ids)
        object.__setattr__(self, "ids", ids)
        if self.head is not None:
            object.__setattr__(self, "head", tuple(int(c) for c in self.head))
        if len(self.labels) != n or len(ids) != n:
            raise ValueError(
                f"expected as many labels and ids as inputs, got {n} inputs, "
                f"{len(self.labels)} labels and {len(ids)} ids"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """One (input, label) pair for an int; ``Examples`` for a slice or an index tensor."""
        if getattr(index, "ndim", None) == 0:  # numpy's integers, as ``Subset`` passes them on
            index = int(index)
        if isinstance(index, int):
            index = range(len(self))[index]  # negative indices, and IndexError where it ends
            batch = self.batch(torch.tensor([index]))
            return take(batch.inputs, 0), batch.labels[0]  # type: ignore[arg-type]
        return replace(
            self,
            inputs=select(self.inputs, index),
            labels=self.labels[index],
            ids=self.ids[index],
        )

    def batch(self, index: Tensor | slice) -> Batch:
        """The transformed rows ``index``."""
        inputs = take(self.inputs, index)
        if self.transform is not None:
            inputs = self.transform(inputs)
        return Batch(inputs, self.labels[index], self.ids[index])


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's part of data that all ranks of a group hold together, in the order of the ranks.

    Passes read ``local`` alone and add up over the ranks; ``num_examples`` is of all. Ids are the
    positions in the whole, unless others were given: they must differ between all examples. A rank
    may hold none; ``shard`` makes it. local: this rank's data; start: where they begin in the
    whole; total: N.
    """

    local: Any
    ranks: Ranks
    start: int
    total: int
    head: Head | None = None

    def __len__(self) -> int:
        return self.total

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.ranks.sum(tensors)


def shard(data: Data, ranks: Ranks | None = None, *, ids: Tensor | None = None) -> Shard:
    """This rank's part of data that the ranks hold together; called on every rank.

    ranks: by default the default process group. ids (n,): of ``Examples``, in place of positions in
    the whole. Raises ValueError without a process group and where heads differ between ranks,
    TypeError for ids of other data.
    """
    ranks, data = Ranks() if ranks is None else ranks, as_data(data)
    count = 0 if _is_empty(data) else num_examples(data)
    counts = ranks.objects(count)
    start = sum(counts[: ranks.rank])
    head = getattr(data, "head", None)
    ranks.require_same("head", head)
    if isinstance(data, Examples):
        own = torch.arange(start, start + count) if ids is None else torch.as_tensor(ids)
        data = replace(data, ids=own)
    elif ids is not None:
        raise TypeError(f"ids are for Examples, got {type(data).__name__}")
    return Shard(data, ranks, start, sum(counts), head)


def _is_empty(data: Any) -> bool:
    return isinstance(data, Dataset) and _length(data) == 0


def summed(data: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over one rank's examples, as sums over those of all ranks where data are a ``Shard``."""
    return data.sum(tensors) if isinstance(data, Shard) else list(tensors)


def whole(data: Data) -> Data:
    """What every rank can read by itself: of a ``Shard`` all examples, sent to each rank."""
    if not isinstance(data, Shard):
        return data
    parts = list(batches(data))
    inputs = data.ranks.gather_each(concat([part.inputs for part in parts]) if parts else None)
    return Examples(inputs, every_label(data), every_id(data), data.head)


def every_id(data: Any) -> Tensor:
    """(N,) of all examples, on all ranks."""
    if isinstance(data, Shard):
        parts = [batch.ids for batch in batches(data)]
        return data.ranks.gather(torch.cat(parts) if parts else None)
    return data.ids if isinstance(data, Examples) else torch.arange(num_examples(data))


def every_label(data: Any) -> Tensor:
    """(N,) or (N, C) of all examples, on all ranks."""
    data = as_data(data)
    if isinstance(data, Examples):
        return data.labels
    parts = [batch.labels for batch in batches(data)]
    if isinstance(data, Shard):
        return data.ranks.gather(torch.cat(parts) if parts else None)
    return torch.cat(parts)


Data = Examples | Shard | Dataset | DataLoader | tuple | Iterable  # whatever ``batches`` reads


def as_data(data: Data) -> Any:
    """``data``, with a plain pair (inputs, labels) made into ``Examples``."""
    is_pair = isinstance(data, tuple) and len(data) == 2 and not isinstance(data, Examples)
    return Examples(*data) if is_pair else data  # type: ignore[misc]


def head_of(data: Data, head: Sequence[int] | None = None) -> Head | None:
    """The head that was given, or else the one that the data carry."""
    chosen = head if head is not None else getattr(data, "head", None)
    return None if chosen is None else tuple(int(c) for c in chosen)


def head_mask(head: Head | None, num_outputs: int, device: Any = None) -> Tensor | None:
    """(C,) bool, True on the head's units; None stands for all. Raises where a unit is missing."""
    if head is None:
        return None
    if not head:
        raise ValueError("a head needs at least one class; use head=None for all outputs")
    if min(head) < 0 or max(head) >= num_outputs:
        raise ValueError(
            f"the head names classes {min(head)} to {max(head)}, but the model has "
            f"{num_outputs} outputs; grow the model's head first"
        )
    mask = torch.zeros(num_outputs, dtype=torch.bool, device=device)
    mask[list(head)] = True
    return mask


def among(ids: Tensor, known: Tensor) -> Tensor:
    """Which of ids (B,) are in ``known`` (M,), which is sorted: (B,) bool in B log M steps, so that
    asking for a batch at a time costs no more than asking at once (``torch.isin`` reads all M)."""
    if len(known) == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    known = known.to(ids.device)
    return known[torch.searchsorted(known, ids).clamp_(max=len(known) - 1)] == ids


def batches(data: Data, batch_size: int = BATCH_SIZE) -> Iterator[Batch]:
    """The data once, in order, as ``Batch``; the last one may be smaller.

    Raises ValueError where there is not one example, or another number than a stream or loader
    says, TypeError where the data are not read so.
    """
    data = as_data(data)
    if isinstance(data, Shard):
        yield from _of_shard(data, batch_size)
        return
    start = 0
    for inputs, labels, ids in _read(data, batch_size):
        labels = torch.as_tensor(labels)
        n = len(labels)
        if n == 0:
            continue
        if rows(inputs) != n:
            raise ValueError(f"a batch has {rows(inputs)} inputs but {n} labels")
        yield Batch(inputs, labels, torch.arange(start, start + n) if ids is None else ids)
        start += n
    if start == 0:
        raise ValueError("the data hold no examples; pass a task with at least one")
    said = num_known(data)
    if said is not None and said != start:
        what, how = "stream", "its true length"
        if isinstance(data, DataLoader) and not _is_stream(data.dataset):
            what, how = "loader", "a collate_fn that neither drops nor adds examples"
        raise ValueError(
            f"the {what} says that it has {said} examples, and gave {start}; pass {how}"
        )


def _of_shard(data: Shard, batch_size: int) -> Iterator[Batch]:
    if data.total == 0:
        raise ValueError("no rank holds an example; pass a task with at least one")
    if _is_empty(data.local):
        return
    for batch in batches(data.local, batch_size):
        known = isinstance(data.local, Examples)
        yield batch if known else batch._replace(ids=batch.ids + data.start)


def _read(data: Any, batch_size: int) -> Iterator[tuple[Inputs, Any, Tensor | None]]:
    if isinstance(data, Examples):
        for i in range(0, len(data), batch_size):
            yield data.batch(slice(i, i + batch_size))
    elif _is_stream(data):
        with torch.random.fork_rng(devices=[]):
            items = iter(data)
        while part := list(islice(items, batch_size)):
            inputs, labels = _examples(part)
            yield inputs, labels, None
    elif isinstance(data, DataLoader) or (
        not isinstance(data, Dataset) and isinstance(data, Iterable) and not _is_table(data)
    ):
        if isinstance(data, Iterator):
            raise TypeError(
                "expected data that can be read more than once, got an iterator; "
                "pass the dataset or the loader itself"
            )
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed for its workers
            items = iter(data)
        for item in items:
            inputs, labels = _pair(item)
            yield inputs, labels, None
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        table: Any = data
        n = len(table)
        for i in range(0, n, batch_size):
            inputs, labels = _examples([table[j] for j in range(i, min(n, i + batch_size))])
            yield inputs, labels, None
    else:
        raise TypeError(
            f"cannot read {type(data).__name__}: expected Examples, a pair (inputs, labels), "
            "a map-style Dataset, an IterableDataset, a DataLoader, or an iterable of (inputs, "
            "labels) batches"
        )


def _is_table(data: Any) -> bool:
    """Of Hugging Face's ``datasets``, which gives single examples as dicts."""
    return hasattr(data, "column_names") and hasattr(data, "with_format")


def _is_stream(data: Any) -> bool:
    """Whether it is iterated for single examples, where a loader gives batches."""
    return isinstance(data, IterableDataset) or (_is_table(data) and _length(data) is None)


def _length(data: Any) -> int | None:
    """As the data tell it, without reading."""
    try:
        return len(data)
    except TypeError:
        return None


def _examples(items: list[Any]) -> tuple[Inputs, Any]:
    """Single examples (input, label), or dicts of columns, as a batch."""
    if isinstance(items[0], Mapping) and "labels" not in items[0]:
        raise TypeError(
            "expected examples (input, label), or dicts with the key 'labels', got a dict of "
            f"{sorted(map(str, items[0]))[:8]}; pass lifelong.Stream(data, lambda row: (input, "
            "label)), or rename the column"
        )
    return _pair(default_collate(items))


def _pair(item: Any) -> tuple[Inputs, Any]:
    if isinstance(item, Mapping) and "labels" in item:  # the Hugging Face convention
        return {k: v for k, v in item.items() if k != "labels"}, item["labels"]
    if isinstance(item, Sequence) and len(item) == 2:
        return item[0], item[1]
    raise TypeError(
        "expected batches of (inputs, labels), or dicts with the key 'labels', "
        f"got {type(item).__name__}"
    )


def num_examples(data: Data) -> int:
    """How many examples one pass over the data gives, of all ranks where they are a ``Shard``.

    Loaders that do not tell and iterables of batches are read to count them. Raises TypeError for a
    stream that does not know.
    """
    data = as_data(data)
    known = num_known(data)
    if known is not None:
        return known
    if _is_stream(data):
        raise TypeError(
            f"how many examples there are is needed here, and a {type(data).__name__} does not "
            "tell; pass lifelong.Stream(data, length=N). Curvature, scores and memorise(budget=M) "
            "do without"
        )
    return sum(len(batch.labels) for batch in batches(data))


def num_known(data: Data) -> int | None:
    """As ``num_examples``, but None where the data would have to be read to tell."""
    data = as_data(data)
    if isinstance(data, Shard):
        return data.total
    if isinstance(data, DataLoader):
        sampled = type(data.sampler) is SequentialSampler or _is_stream(data.dataset)
        whole = sampled and data.batch_size and not data.drop_last
        return _length(data.dataset) if whole else None
    return _length(data) if isinstance(data, Dataset) or _is_table(data) else None


def num_local(data: Shard) -> int:
    """Of this rank."""
    return 0 if _is_empty(data.local) else num_examples(data.local)


def require_repeatable(data: Data) -> None:
    """Read the first batch twice; raise NotRepeatableError where a loader shuffles or augments.

    Quantities of the past (ids, curvature, memory) are taken in several passes that must meet
    the same examples. A shuffling loader is also told by its sampler, before any reading.
    """
    data = as_data(data)
    if isinstance(data, Shard):
        if num_local(data):
            require_repeatable(data.local)
        return
    if isinstance(data, Examples) and data.transform is None:
        return
    shuffles = isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler)
    if not shuffles:
        # Few examples are enough, and an augmentation shows in the first of them.
        with torch.random.fork_rng(devices=[]):  # what an augmentation draws is given back
            first, again = (next(batches(data, batch_size=8)) for _ in range(2))
        shuffles = not (_equal(first.inputs, again.inputs) and _equal(first.labels, again.labels))
    if shuffles:
        raise NotRepeatableError(
            "two passes over the data differ: the loader shuffles, or its transform augments at "
            "random. Expected the same examples in the same order; pass the dataset itself, or "
            "DataLoader(dataset, shuffle=False) without random transforms"
        )


def _equal(a: Inputs, b: Inputs) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if a.shape != b.shape:  # type: ignore[union-attr]
        return False
    same = torch.equal(a, b)  # type: ignore[arg-type]
    return same or bool(((a == b) | ((a != a) & (b != b))).all())  # type: ignore[union-attr]  # NaN is NaN

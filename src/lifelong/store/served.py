"""A memory whose inputs stay in the store, read by threads that open it for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..memory import Memory
from ..models import Inputs, select
from ..serving import Reading, Served
from .base import Decode

CHUNK = 4096  # rows of beliefs that are held as bytes at a time


class StoredInputs:
    """Inputs of a store by item number, for ``Served``.

    noted: today's version where it can be told at once, or None: then a thread is asked for it.
    """

    def __init__(
        self,
        open: Callable[[], Any],
        decode: Decode | None,
        workers: int,
        noted: Callable[[], int | None] | None = None,
    ) -> None:
        self._decode, self._noted = decode, noted
        self._reading = Reading(open, workers)

    def submit(self, places: Sequence[int], *, urgent: bool) -> Future[Inputs]:
        work = partial(_inputs, items=places, decode=self._decode)
        return self._reading.submit(work, urgent=urgent)

    def version(self) -> int:
        found = None if self._noted is None else self._noted()
        if found is None:
            found = self._reading.submit(_version, urgent=True).result()
        return found


def _inputs(store: Any, items: Sequence[int], decode: Decode | None) -> Inputs:
    return store.inputs(items, decode=decode)


def _version(store: Any) -> int:
    return store.version


def served(
    source: StoredInputs, items: Sequence[int], beliefs: Iterator[Memory], ahead: int
) -> Memory:
    """The items with what is believed of them, a chunk after another; their inputs unread."""
    parts = list(beliefs)
    if not parts:
        raise ValueError("there are no such items; ask store.count(where) before")
    if ahead < 0:
        raise ValueError(f"ahead is a number of batches from 0, got {ahead}")
    found = parts[0].add(*parts[1:])
    empty = select(source.submit(items[:1], urgent=True).result(), slice(0, 0))
    place = torch.tensor(items, dtype=torch.int64)
    rows = Served((source,), torch.zeros_like(place), place, empty, ahead)
    return Memory(**{**vars(found), "inputs": rows})


def unread_state(memory: Memory) -> dict[str, Any]:
    """As ``Memory.state_dict``, without reading."""
    return {**vars(memory), "heads": [None if h is None else list(h) for h in memory.heads]}


def no_inputs(n: int) -> Tensor:
    return torch.empty(n, 0)


def place_of(path: str) -> str:
    """The same from another folder."""
    return path if "://" in path else str(Path(path).absolute())


def missing(items: Sequence[int]) -> ValueError:
    return ValueError(
        f"items {list(items)[:5]} are not in today's memory: they were dropped or forgotten; take "
        "them out of the memory that is served (memory.drop, prior.forget), or serve it again"
    )


def not_of_today(version: int) -> ValueError:
    return ValueError(
        f"version {version} is not today's, whose items alone are served; load it without "
        "serve=True, or restore it first"
    )

"""The gallery's order: a few numbers of each item, so that 100,000 of them sort in no time.

lambda and the residual come from the soft label that each item is remembered with; leverage and
sensitivity of a run are there once they were measured (``measures.py``), and all scores that were
stored with the items (``store.append(scores=)``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..likelihoods import Categorical, Likelihood
from ..store import Item, MemoryStore, Where
from .measures import key_of

PAGE = 2_000  # items read at once
NEWEST = "newest"
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Index:
    """number, task, since: (N,) int64, since: the version that an item came with, which is one
    run's or one file's; label: (N,) float64, NaN for labels of several numbers; scores: name ->
    (N,) float64, NaN where an item has none. version: of the store; arrivals: those of ``since``,
    each in words."""

    version: int
    number: NDArray[np.int64]
    task: NDArray[np.int64]
    since: NDArray[np.int64]
    label: NDArray[np.float64]
    scores: Mapping[str, NDArray[np.float64]]
    arrivals: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.number)

    @property
    def tasks(self) -> list[int]:
        return np.unique(self.task).tolist()

    @property
    def labels(self) -> list[float]:
        known = self.label[~np.isnan(self.label)]
        return np.unique(known).tolist()

    @property
    def orders(self) -> list[str]:
        return [NEWEST, *self.scores]

    def arranged(
        self,
        order: str = NEWEST,
        *,
        ascending: bool = False,
        task: int | None = None,
        label: float | None = None,
        since: int | None = None,
        among: Sequence[int] | None = None,
    ) -> NDArray[np.int64]:
        """Places of the items that are wanted, in the order: largest first unless ``ascending``;
        items without that score last. among: numbers of items.

        Raises ValueError for an order that there is not.
        """
        if order not in self.orders:
            raise ValueError(f"there is no order {order!r}; expected one of {self.orders}")
        keep = np.ones(len(self), dtype=bool)
        if task is not None:
            keep &= self.task == task
        if label is not None:
            keep &= self.label == label
        if since is not None:
            keep &= self.since == since
        if among is not None:
            keep &= np.isin(self.number, np.asarray(among, dtype=np.int64))
        places = np.flatnonzero(keep)
        key = self.number.astype(np.float64) if order == NEWEST else self.scores[order]
        key = key[places] if ascending else -key[places]
        return places[np.argsort(key, kind="stable")]  # NaN comes last either way


def build(store: MemoryStore, measured: Mapping[str, Mapping[str, float]] = EMPTY) -> Index:
    """Read all of today's items once, ``PAGE`` at a time. measured: "task/origin" -> scores."""
    likelihood = likelihood_of(store)
    items: list[tuple[int, int, int, float, dict[str, float]]] = []
    after = 0
    while page := store.items(after=after, limit=PAGE):
        found = beliefs(store, page, likelihood)
        for item, of_item in zip(page, found, strict=True):
            label = float(item.label) if isinstance(item.label, int | float) else math.nan
            also = measured.get(key_of(item.task, item.origin), EMPTY)
            scores = {**of_item, **also, **item.scores}
            items.append((item.item, item.task, item.since, label, scores))
        after = page[-1].item
        if len(page) < PAGE:
            break
    names = dict.fromkeys(name for *_, scores in items for name in scores)
    came = {i[2] for i in items}
    return Index(
        store.version,
        np.array([i[0] for i in items], dtype=np.int64),
        np.array([i[1] for i in items], dtype=np.int64),
        np.array([i[2] for i in items], dtype=np.int64),
        np.array([i[3] for i in items], dtype=np.float64),
        {n: np.array([i[4].get(n, math.nan) for i in items], dtype=np.float64) for n in names},
        {v.number: v.message or v.kind for v in store.history() if v.number in came},
    )


def likelihood_of(store: MemoryStore) -> Likelihood:
    """Of the prior in force; classes where there is none."""
    try:
        return store.load_prior().likelihood
    except ValueError:
        return Categorical()


def beliefs(
    store: MemoryStore, items: Sequence[Item], likelihood: Likelihood
) -> list[dict[str, float]]:
    """lambda and the length of the residual of each item, where its outputs tell them."""
    found: list[dict[str, float]] = [{} for _ in items]
    layouts: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        layouts.setdefault(item.layout, []).append(place)
    for places in layouts.values():
        numbers = [items[place].item for place in places]
        memory = store.memory(numbers, decode=lambda raw: torch.zeros(len(raw), 0))
        f = memory.outputs
        if f.ndim != 2 or not torch.isfinite(f).all():
            continue
        f = likelihood.mask(f, memory.mask)
        try:
            trace = likelihood.hessian_trace(f).tolist()
            length = likelihood.residual(f, memory.labels).norm(dim=-1).tolist()
        except (ValueError, RuntimeError, IndexError):  # a prior of another kind of label
            continue
        for place, a, b in zip(places, trace, length, strict=True):
            found[place] = {"lambda": a, "residual": b}
    return found


def named(store: MemoryStore, text: str, limit: int = 10_000) -> list[int]:
    """Numbers of the items whose id, note or text has ``text`` in it, at most ``limit``."""
    numbers: list[int] = []
    after = 0
    while page := store.items(Where(text=text), after=after, limit=1_000):
        numbers += [item.item for item in page]
        after = page[-1].item
        if len(page) < 1_000 or len(numbers) >= limit:
            break
    return numbers[:limit]


def number_of(store: MemoryStore, key: str) -> int | None:
    """Of "task/origin" today's item; None where it is there no more."""
    task, _, origin = key.partition("/")
    found = store.items(Where(task=int(task), origin=int(origin)), limit=1)
    return found[0].item if found else None


def believed(store: MemoryStore, items: Sequence[Item]) -> list[tuple[list[float], list[int]]]:
    """Of each item E[y | f*], and which outputs compete for it. Raises ValueError where items have
    outputs of several widths."""
    memory = store.memory([i.item for i in items], decode=lambda raw: torch.zeros(len(raw), 0))
    likelihood: Any = likelihood_of(store)
    mask = memory.mask
    mean = likelihood.mean(likelihood.mask(memory.outputs, mask)).tolist()
    every = list(range(memory.reference.shape[1]))
    competing = [every] * len(items) if mask is None else [
        row.nonzero().squeeze(1).tolist() for row in mask
    ]  # fmt: skip
    return list(zip(mean, competing, strict=True))


def soft_label(store: MemoryStore, item: Item, version: int | None = None) -> list[float]:
    """E[y | f*] of one item at a version: (C,), over the outputs that compete."""
    memory = store.memory([item.item], version=version, decode=lambda raw: torch.zeros(len(raw), 0))
    likelihood: Any = likelihood_of(store)
    mean = likelihood.mean(likelihood.mask(memory.outputs, memory.mask))
    return [float(x) for x in mean[0]]

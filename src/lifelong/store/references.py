"""A prior in a store, for both back ends: in the place of its memory it refers to the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StoreDamagedError
from ..memory import Memory
from . import codec, scrub


@dataclass(frozen=True)
class Known:
    """An item of today, as ``save_prior`` finds it again."""

    item: int
    state: int
    digest: bytes
    name: str
    note: str
    scores: dict[str, float]


class Today:
    """Items of today by the digest of their input and their place; each is taken once."""

    def __init__(self, rows: Iterable[Sequence[Any]]) -> None:
        self.states: set[int] = set()
        self._known: dict[tuple[bytes, bytes, bytes], list[Known]] = {}
        for content, task, origin, item, state, digest, name, note, scores in rows:
            self.states.add(state)
            known = Known(
                item, state, digest, codec.decoded(name), codec.decoded(note), codec.parse(scores)
            )
            self._known.setdefault((content, task, origin), []).append(known)

    def take(self, content: bytes, task: bytes, origin: bytes) -> Known | None:
        known = self._known.get((content, task, origin))
        return known.pop() if known else None


def require_digest(spec: str, columns: Sequence[Any], expected: Any) -> None:
    whole = {*map(type, columns)} == {bytes}
    if not whole or codec.digest(spec, *columns) != expected:
        raise StoreDamagedError(
            "an item's bytes are not those that were written; restore the store from a copy, "
            "store.verify() tells which"
        )


def memory_of(holder: Mapping[str, Any]) -> Memory:
    return Memory.from_state_dict(holder["memory"])


def is_reference(value: Any) -> bool:
    """Whether a dict stands for a memory whose rows are in the database."""
    return isinstance(value, Mapping) and value.keys() == {"rows", "head", "heads", "empty"}


def referring(holder: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The dict round a memory with the states' numbers in its place."""
    memory = holder["memory"]
    none = torch.zeros(len(rows), dtype=torch.bool)
    reference = {
        "rows": torch.tensor(rows, dtype=torch.int64),
        "head": memory["head"],
        "heads": memory["heads"],
        "empty": scrub.select({"memory": memory}, none)["memory"],
    }
    return {**holder, "memory": reference}


def without_rows(
    state: Any, keeps: Callable[[int], bool], places: Set[tuple[int, int]] = frozenset()
) -> tuple[Any, bool]:
    """(a prior's tree that refers to the states that ``keeps`` says alone, whether it had others);
    the same tree where nothing changes. places: (task, origin) that its groups name no more."""
    changed = False

    def fewer(holder: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal changed
        refers = holder["memory"]
        keep = torch.tensor([keeps(row) for row in refers["rows"].tolist()]).bool()
        if keep.all():
            return None
        changed = True
        parts = {name: refers[name][keep] for name in ("rows", "head")}
        left = {**holder, "memory": {**refers, **parts}}
        if "blocks" in holder:
            left["blocks"] = scrub.marginal(holder["blocks"], keep)
        return left

    fresh = scrub.map_memories(state, fewer, is_reference)
    left = scrub.without_members(fresh, places)
    return (left if changed or left is not fresh else state), changed

"""What every memory on disk offers: ``MemoryStore``, and the plain values that it speaks in.

    item     an example with a number that is never used again, and an id that the user gave
    version  the state after one committed change: 1, 2, ...; 0 is the empty store
    drop     out of today's memory; ``restore`` undoes it
    forget   out of every version and every file at once; nothing undoes it

Readers see whole versions only. Whatever raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from ..data import Head
from ..memory import Memory
from ..models import Inputs
from ..prior import Prior

Kind = Literal["tensor", "dict", "image", "text"]
Mode = Literal["r", "a"]
Decode = Callable[[Sequence[Any]], Inputs]  # stored inputs (bytes, str) -> what the model takes


@dataclass(frozen=True)
class Where:
    """Which items: those for which all that is given holds. ``Where()`` is every item.

    task; origin: the id within its task; label: the class, or the value of a label of one number;
    kind: of the input; text: part of the id, the note or a text input.
    """

    task: int | None = None
    origin: int | None = None
    label: float | None = None
    kind: Kind | None = None
    text: str | None = None

    def __str__(self) -> str:
        """ "task 0 and label 3", or "anything"."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        words = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in given.items()
            if value is not None
        ]
        return " and ".join(words) or "anything"


Which = Where | Iterable[int | str]  # int: the item's number; str: every item with that id


@dataclass(frozen=True)
class Item:
    """What is known of an item, without its input.

    item: its number; id: the user's name for it; label: a number, or a list of them; head: the
    outputs that compete; scores: by name; note: in words; kind, shape, num_bytes: of the input
    (shape () for images and text); since: the version that it came with; layout: types and
    shapes in json, the same for items that fit into one ``Memory``.
    """

    item: int
    id: str
    task: int
    origin: int
    label: Any
    head: Head | None
    soft_weight: float
    hard_weight: float
    scores: dict[str, float]
    note: str
    kind: Kind
    shape: tuple[int, ...]
    num_bytes: int
    since: int
    layout: str


@dataclass(frozen=True)
class Version:
    """One committed change. kind: "append", "drop", "restore", "forget", "prior", "compact".

    time: UTC, ISO 8601; added, dropped: items that came and went; size: items afterwards;
    prior: whether a prior was saved with it; in_force: whether it has one, that or an older one,
    so that ``load_prior(number)`` gives it; message: the user's, "" where it was erased.
    What was forgotten counts nowhere, as if it had never been there.
    """

    number: int
    time: str
    kind: str
    message: str
    added: int
    dropped: int
    size: int
    prior: bool
    in_force: bool


@dataclass(frozen=True)
class Diff:
    """Items of version b that a has not, the reverse, and those whose beliefs changed."""

    a: int
    b: int
    added: tuple[int, ...]
    dropped: tuple[int, ...]
    changed: tuple[int, ...]


@dataclass(frozen=True)
class Tombstone:
    """That an id was forgotten, and when; not what it was. version: the one that forgot it."""

    version: int
    time: str


@dataclass(frozen=True)
class Forgotten:
    """What ``forget`` did.

    version: the new one; items: how many were erased; files: paths that were rewritten or
    removed, with those of run folders; priors: how many older priors were removed; influenced:
    today's prior held some of the items, so its anchor, g and G were made with them: take that
    influence out with ``Prior.forget`` and save the new prior; foreign: what lies in the folder
    and in those of runs and was not looked into, since it is no readable checkpoint with memories:
    other files, also texts that may name an id (logs, certificates), damaged ones, links.
    """

    version: int
    items: int
    files: tuple[str, ...]
    priors: int
    influenced: bool
    foreign: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """Something that ``verify`` found. place: a file, or an item; problem: in words.

    damage: data are wrong or missing; otherwise only something to know (a foreign file).
    """

    place: str
    problem: str
    damage: bool = True


@dataclass(frozen=True)
class Verification:
    """What ``verify`` read, and what it found. Whole where no finding is damage."""

    version: int
    items: int
    files: int
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return not any(finding.damage for finding in self.findings)


class MemoryStore(Protocol):
    """A memory on disk. ``open_store`` makes one; use it in a ``with``, or call ``close``.

    Errors are ``StoreError``s: ``StoreBusyError``, ``StoreDamagedError``, ``StoreFullError``,
    ``StoreReadOnlyError``, ``StoreVersionError``, ``ForgottenError``.
    """

    @property
    def path(self) -> str:
        """The folder, or the address of one."""
        ...

    @property
    def version(self) -> int:
        """The newest version; 0 for an empty store."""
        ...

    @property
    def identity(self) -> str:
        """The same as long as the store is, in its copies too; one made anew has another."""
        ...

    @property
    def num_bytes(self) -> int:
        """On disk, all versions and priors."""
        ...

    def __len__(self) -> int:
        """Items in today's memory."""
        ...

    # ------------------------------------------------------------------ write

    def append(
        self,
        memory: Memory,
        *,
        inputs: Sequence[bytes | str] | None = None,
        ids: Sequence[str] | None = None,
        notes: Sequence[str] | None = None,
        scores: dict[str, Sequence[float] | Tensor] | None = None,
        message: str = "",
        readmit: bool = False,
    ) -> int:
        """Add items, all or none; the new version.

        inputs: encoded images or texts as they came, stored instead of ``memory.inputs``;
        ids: by default "task:origin", need not differ; notes: in words; scores: name -> (M,);
        readmit: also items whose id or input was forgotten (by default ``ForgottenError``);
        their tombstones go.
        """
        ...

    def drop(self, which: Which, *, message: str = "") -> int:
        """Take items out of today's memory; ``restore`` brings them back."""
        ...

    def restore(self, version: int, *, message: str = "") -> int:
        """Make today's memory, and prior, what they were at ``version``, in a new version."""
        ...

    def forget(
        self, which: Which, *, runs: Iterable[str | Path] = (), message: str = ""
    ) -> Forgotten:
        """Erase items from every version, and from every file of the store and of ``runs``."""
        ...

    def compact(self, *, keep: int = 1) -> int:
        """Give up all but the newest ``keep`` versions, and the room of what was erased.

        That is a version of its own, beside those.
        """
        ...

    def save_prior(self, prior: Prior, *, message: str = "", readmit: bool = False) -> int:
        """Its memory becomes today's memory, the rest a file tied to the version by digest."""
        ...

    # ------------------------------------------------------------------- read

    def memory(
        self,
        which: Where | Sequence[int] | None = None,
        *,
        version: int | None = None,
        decode: Decode | None = None,
    ) -> Memory:
        """The items as ``Memory``: by ``Where`` in order of number, or item numbers as given.

        decode: stored images or texts -> inputs; by default images become uint8 (N, C, H, W).
        """
        ...

    def batch(self, index: Tensor | Sequence[int], *, decode: Decode | None = None) -> Memory:
        """Today's memory at positions ``index``, 0 to len - 1, as ``store.memory()[index]``."""
        ...

    def draw(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        decode: Decode | None = None,
    ) -> Memory:
        """A random batch as ``Memory.draw`` makes it: weights scaled, so that sums are unbiased."""
        ...

    def inputs(self, items: Sequence[int], *, decode: Decode | None = None) -> Inputs:
        """Of today's items with these numbers, in that order; ValueError where one has left."""
        ...

    def serve(
        self,
        which: Where | Sequence[int] | None = None,
        *,
        decode: Decode | None = None,
        ahead: int = 2,
        workers: int = 1,
    ) -> Memory:
        """As ``memory``, but the inputs stay on the disk: ``workers`` threads read what is drawn,
        ``ahead`` batches in advance. In RAM are soft labels, weights and places alone."""
        ...

    def load_prior(
        self, version: int | None = None, *, serve: bool = False, ahead: int = 2, workers: int = 1
    ) -> Prior:
        """What ``save_prior`` was given; with ``serve`` its inputs stay on the disk, as those of
        ``serve``. ValueError where that version has none, and for serving an older one."""
        ...

    def raw(self, item: int) -> Any:
        """An item's input as it came: bytes, str, Tensor, or a dict of tensors."""
        ...

    def items(
        self,
        where: Where | None = None,
        *,
        version: int | None = None,
        after: int = 0,
        limit: int = 1000,
    ) -> list[Item]:
        """A page of the listing: up to ``limit`` items whose number is above ``after``."""
        ...

    def count(self, where: Where | None = None, *, version: int | None = None) -> int:
        """How many items ``items`` would list over all pages."""
        ...

    def find(self, which: Which) -> list[int]:
        """The numbers of all items that ``forget(which)`` would erase, of any version.

        Raises ValueError where an id or a number is of none, or no item is like that.
        """
        ...

    def history(self) -> list[Version]:
        """Every version that is kept, oldest first."""
        ...

    def diff(self, a: int, b: int) -> Diff:
        """What changed between two versions."""
        ...

    def forgotten(self, id: str) -> Tombstone | None:
        """When an id was forgotten, or an item that has it by default; None where it never was."""
        ...

    def verify(self) -> Verification:
        """Read everything, and compare it with its digests."""
        ...

    def export(self, path: str | Path, *, version: int | None = None) -> Path:
        """One portable file: .safetensors (``read_export`` reads it) or .parquet (extra data).

        Replaces an older export, and no other file.
        """
        ...

    def close(self) -> None:
        """Give up the files; nothing is lost without it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def default_id(task: int, origin: int) -> str:
    """The id of an item that was given none."""
    return f"{task}:{origin}"

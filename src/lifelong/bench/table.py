"""What a table is: methods at several memories and seeds, what was published, what is to be met.

A ``Table`` holds plain values and one function, ``run``, that computes a cell. Everything else
(processes, files, resuming, the README) is the engine's: ``execute``, ``record``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import UsageError, suggestion
from ..presets import PRESETS

GoalKind = Literal["accuracy", "below", "above", "gap", "first"]


@dataclass(frozen=True)
class Method:
    """A row of a table.

    name: unique in the table. preset: of ``PRESETS``, or a name that the table's own ``run``
    understands. settings: arguments of the preset, beside ``memory``. training: fields of
    ``config.Training`` that differ from the table's. memories: None for those of the table; a
    preset without a memory has (0,) whatever is said. tuned: "no", "published", or in words on
    what and among which values. note: stands beside the row.
    """

    name: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    memories: tuple[int, ...] | None = None
    tuned: str = "no"
    note: str = ""

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    def memories_of(self, table: Table) -> tuple[int, ...]:
        """Examples of each task that the method is tried with."""
        preset = PRESETS.get(self.preset)
        if preset is not None and "memory" not in inspect.signature(preset).parameters:
            return (0,)
        return table.memories if self.memories is None else self.memories


@dataclass(frozen=True)
class Published:
    """A number that others published. value: %; tag: of its provenance, "P" paper, "C" the
    authors' code, "RR" computed from their raw results, "X" an independent reproduction, "F" read
    off a figure, "T" a thesis; source: where it stands. memory: examples of each task, 0 for none.
    method: the table's name for it, or another one, which then makes a row without a record."""

    method: str
    memory: int
    value: float
    tag: str
    source: str


@dataclass(frozen=True)
class Goal:
    """What a row must reach, in mean accuracy over seeds.

    kind  "accuracy"  at least ``bar`` %
          "below"     at most ``bar`` points below the row ``of``
          "above"     at least ``bar`` points above the best of the rows ``of``
          "gap"       closes at least ``bar`` % of the gap from the row of[0] to the row of[1]
          "first"     first, or within one standard error of first, among the rows of the same
                      memory or none; yardsticks (joint, separate) and the same preset with other
                      settings take no part
    why: what it is measured against, in words.
    """

    method: str
    memory: int
    bar: float = 0.0
    kind: GoalKind = "accuracy"
    of: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Cell:
    """One method at one memory with one seed."""

    table: str
    method: str
    memory: int
    seed: int

    def __str__(self) -> str:
        memory = f", memory {self.memory}" if self.memory else ""
        return f"{self.method}{memory}, seed {self.seed}"


def _nowhere(fraction: float) -> None:
    pass


@dataclass(frozen=True)
class Context:
    """What ``run`` gets beside the cell.

    data: folder with the data sets; cache: for what cells share (features, first tasks), kept
    as long as the record grows; folder: of this cell alone, for checkpoints, removed once it is
    done; smoke: the tiny version is wanted; report: to be told the fraction done, 0 to 1, as
    often as one likes. A call that finds checkpoints in ``folder`` goes on from them.
    """

    cache: Path
    folder: Path
    data: Path | None = None
    smoke: bool = False
    report: Callable[[float], None] = _nowhere


Run = Callable[["Table", Cell, Context], dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Rows, and how a cell is computed.

    memories: examples of each task; ``seeds`` of them, 0, 1, ... run: (table, cell, context) ->
    plain values, among them "accuracy" in [0, 1]; a function of a module or a frozen dataclass, so
    that it can be sent to another process, and a dataclass's fields are recorded as the table's
    set-up. If it has a method ``shared`` of the same arguments, that gives the path of what the
    cell makes in the cache for others too, or None: two that would make the same are not begun
    together; if it has a method ``recipe`` of a Method, that gives the plain values that its row is
    made by. Numbers are averaged over seeds in the record. smoke: fields of the table that differ
    in its tiny version (``context.smoke`` tells ``run``).

    Raises ValueError where two rows have one name (or names that make one file name), or where a
    goal is of no row.
    """

    name: str
    title: str
    methods: tuple[Method, ...]
    memories: tuple[int, ...]
    run: Run
    seeds: int = 5
    published: tuple[Published, ...] = ()
    goals: tuple[Goal, ...] = ()
    needs_data: bool = False
    note: str = ""
    smoke: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slugs = [m.slug for m in self.methods]
        double = sorted({m.name for m in self.methods if slugs.count(m.slug) > 1})
        if double:
            raise ValueError(f"table {self.name!r}: names of methods that are not unique: {double}")
        if not self.methods or self.seeds < 1:
            raise ValueError(f"table {self.name!r} needs at least one method and one seed")
        names = {m.name for m in self.methods}
        for goal in self.goals:
            missing = {goal.method, *goal.of} - names
            if missing:
                raise ValueError(f"table {self.name!r}: a goal of rows it lacks: {sorted(missing)}")

    def method(self, name: str) -> Method:
        """The row of that name. Raises UsageError with a suggestion where there is none."""
        found = {m.name: m for m in self.methods}
        if name not in found:
            hint = suggestion(name, found)
            raise UsageError(f"table {self.name!r} has no method {name!r}; {hint}")
        return found[name]

    def tiny(self) -> Table:
        """The smoke version: the same rows, one seed, unless ``smoke`` says otherwise."""
        return replace(self, **{"seeds": 1, **self.smoke})

    def cells(
        self,
        methods: Sequence[str] | None = None,
        memories: Sequence[int] | None = None,
        seeds: int | None = None,
    ) -> Iterator[Cell]:
        """All cells, seed by seed, so that a table that was interrupted is balanced.

        ``memories`` other than the table's may be asked for; rows that keep nothing stay.
        """
        chosen = [self.method(n) for n in methods] if methods else self.methods
        for seed in range(self.seeds if seeds is None else seeds):
            for method in chosen:
                own = method.memories_of(self)
                for memory in own if memories is None or own == (0,) else memories:
                    yield Cell(self.name, method.name, memory, seed)

    def definition(self, name: str) -> dict[str, Any]:
        """What decides the numbers of a row, in plain values: the same again, or another row.

        With ``recipe``, what the preset's settings and its defaults come to, where the table's
        ``run`` tells: a default that changes makes another row, too.
        """
        method = self.method(name)
        row: dict[str, Any] = {
            "preset": method.preset,
            "settings": dict(method.settings),
            "training": dict(method.training),
        }
        recipe = getattr(self.run, "recipe", None)
        if recipe is not None:
            row["recipe"] = recipe(method)
        return plain({**row, "setup": self.setup})

    @property
    def setup(self) -> dict[str, Any]:
        """What ``run`` is, in plain values."""
        if is_dataclass(self.run) and not isinstance(self.run, type):
            return plain({"run": type(self.run).__qualname__, **asdict(self.run)})
        return {"run": getattr(self.run, "__qualname__", repr(self.run))}


def defaults(value: Any) -> dict[str, Any]:
    """Of a dataclass and those in it: the fields that have one, in plain values. A record from
    before such a field was there was made with its default."""
    found: dict[str, Any] = {}
    for f in fields(value):
        inside = getattr(value, f.name)
        if is_dataclass(inside) and not isinstance(inside, type):
            found[f.name] = defaults(inside)
        elif f.default is not MISSING:
            found[f.name] = plain(f.default)
    return found


def plain(value: Any) -> Any:
    """As json gives it back: lists for tuples, text for what is no plain value."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)

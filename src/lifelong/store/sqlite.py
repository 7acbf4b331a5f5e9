"""``SqliteStore``: a memory in a folder, by the standard library's SQLite.

    memory.sqlite                        items, versions, tombstones
    memory.sqlite-wal, -shm              commits that are not yet in it; SQLite's own
    memory.version                       the newest version, so that a damaged -wal is noticed
    prior-DIGEST.safetensors             anchor, g and G; named by sha256, which the database holds
    thumbnails/ITEM.*                    of whoever shows the items; ``forget`` removes them

Erasing in place. SQLite's secure_delete overwrites what is deleted, but rows that it moves between
pages can leave a copy behind. So the tables with contents are only ever appended to, no row of
them moves, and ``forget`` overwrites rows with zeros of the same length where they lie; ``compact``
copies what stays to new pages and gives the old ones, zeroed, back. Then the log is written
into the database and cut, and a mark that says so is taken back: if a kill comes in between, the
next writer goes on from there.

A prior's file is written before the commit that names it and removed after the one that does
not, by the holder of the write lock alone, so a kill leaves a pair that fits and at most a file
that nobody names, which the next writer removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import (
    CheckpointError,
    StoreBusyError,
    StoreDamagedError,
    StoreFullError,
    StoreVersionError,
)
from ..memory import Memory
from ..models import Inputs
from ..prior import Prior
from . import codec, files, scrub, served
from .base import (
    Decode,
    Diff,
    Finding,
    Forgotten,
    Item,
    Mode,
    Tombstone,
    Verification,
    Version,
    Where,
    Which,
)
from .database import DATABASE, GUARD, INDICES, TABLES, Database, newest, noted
from .export import write_export
from .marks import (
    Mark,
    default_ids,
    forgotten_error,
    hash_id,
    identity_of,
    marks_of,
    mentions,
    tag_of,
    tombstones_of,
    utf8,
)
from .references import (
    Today,
    is_reference,
    memory_of,
    referring,
    require_digest,
    without_rows,
)

THUMBNAILS = "thumbnails"
_APPENDED = ("content", "state", "version")
_LARGEST = 2**63 - 1  # number that SQLite holds
_ERASED = bytes(32)  # the digest of a row that was overwritten
_WHOLE = (
    "s.layout, s.digest, s.name, s.task, s.origin, s.head, s.soft, s.hard, s.scores, s.note, "
    "s.label, s.reference"
)


class SqliteStore(Database):
    """A ``MemoryStore`` in a folder. One process writes at a time, others wait; any may read.

    One object belongs to one thread; after a fork the child opens its own connection.
    """

    def __init__(self, path: str | Path, mode: Mode = "a", *, timeout: float = 30.0) -> None:
        self._live: tuple[int, list[int]] | None = None
        self._layouts: dict[Any, Any] = {}
        super().__init__(path, mode, timeout=timeout)

    def _open(self) -> None:
        super()._open()
        if self.mode == "a" and self._meta("pending") is not None:
            with suppress(StoreBusyError):  # a reader is in the way: next time
                self._finish()

    @contextmanager
    def _writing(self, kind: str, message: str) -> Iterator[tuple[sqlite3.Connection, int]]:
        """A new version: the connection and its number."""
        text = utf8(message, "the message")
        with self._locked() as con:
            number = newest(con) + 1
            self._remove_orphans(con)
            yield con, number
            now = datetime.now(UTC).isoformat(timespec="seconds")
            row = (number, now, kind, _version_digest(number, now, kind, text), text)
            con.execute("INSERT INTO version VALUES (?, ?, ?, ?, ?)", row)
        self._note(number)

    def _take(self, con: sqlite3.Connection, key: str, n: int) -> int:
        """The first of n numbers that were never used."""
        first = self._meta(key)
        if not isinstance(first, int):
            raise StoreDamagedError(f"{self._database} has lost a count; restore it from a copy")
        con.execute("UPDATE meta SET value = ? WHERE key = ?", (first + n, key))
        return first

    # ------------------------------------------------------------------- write

    def append(
        self,
        memory: Memory,
        *,
        inputs: Sequence[bytes | str] | None = None,
        ids: Sequence[str] | None = None,
        notes: Sequence[str] | None = None,
        scores: Mapping[str, Sequence[float] | Tensor] | None = None,
        message: str = "",
        readmit: bool = False,
    ) -> int:
        """See ``MemoryStore.append``.

        Raises ValueError where a column has another length than the memory, TypeError for a type
        that cannot be stored, ForgottenError for ids and inputs that were forgotten.
        """
        n = len(memory)
        names = ids if ids is not None else default_ids(memory)
        notes = notes if notes is not None else [""] * n
        columns: dict[str, Any] = {"ids": names, "notes": notes}
        columns |= {f"scores {name!r}": values for name, values in (scores or {}).items()}
        columns |= {} if inputs is None else {"inputs": inputs}
        for name, column in columns.items():
            if len(column) != n:
                raise ValueError(f"expected {n} {name}, one for each item, got {len(column)}")
        for name in (*names, *notes):
            utf8(name, "ids and notes")
        contents = codec.encode_inputs(memory.inputs, inputs)
        values = {k: torch.as_tensor(v).double().tolist() for k, v in (scores or {}).items()}
        each = [{name: value[i] for name, value in values.items()} for i in range(n)]
        with self._writing("append", message) as (con, number):
            self._admit(con, marks_of(self._salt, memory, names, contents), readmit)
            heads = [self._layout(con, json.dumps(h)) for h in memory.heads]
            states = codec.encode_states(memory, heads, names, notes, each)
            items = self._insert_contents(con, contents)
            self._insert_states(con, number, list(zip(items, states, strict=True)))
        return number

    def _insert_contents(
        self, con: sqlite3.Connection, contents: Sequence[tuple[codec.InputLayout, bytes]]
    ) -> range:
        specs = {layout.spec for layout, _ in {id(c[0]): c for c in contents}.values()}
        known = {spec: self._layout(con, spec) for spec in sorted(specs)}
        first = self._take(con, "item", len(contents))
        items = range(first, first + len(contents))
        rows = (
            (item, known[spec], codec.digest(spec, data), data)
            for item, (spec, data) in zip(items, ((c.spec, d) for c, d in contents), strict=True)
        )
        con.executemany("INSERT INTO content VALUES (?, ?, ?, ?)", rows)
        return items

    def _insert_states(
        self, con: sqlite3.Connection, number: int, states: Sequence[tuple[int, codec.State]]
    ) -> range:
        first = self._take(con, "state", len(states))
        numbers = range(first, first + len(states))
        salt = self._salt
        known: dict[codec.StateLayout, int] = {}
        for _, state in states:
            if state.layout not in known:
                known[state.layout] = self._layout(con, state.layout.spec)
        rows = (
            (i, item, known[s.layout], tag_of(salt, s.name), s.digest, *s.columns)
            for i, (item, s) in zip(numbers, states, strict=True)
        )
        con.executemany(f"INSERT INTO state VALUES ({', '.join('?' * 15)})", rows)
        lives = ((i, item, number) for i, (item, _) in zip(numbers, states, strict=True))
        con.executemany("INSERT INTO life VALUES (?, ?, ?, NULL)", lives)
        return numbers

    def _layout(self, con: sqlite3.Connection, spec: str) -> int:
        row = con.execute("SELECT id FROM layout WHERE spec = ?", (spec,)).fetchone()
        if row is not None:
            return row[0]
        return con.execute("INSERT INTO layout(spec) VALUES (?)", (spec,)).lastrowid or 0

    def _admit(self, con: sqlite3.Connection, marks: Iterable[Mark], readmit: bool) -> None:
        """Refuse what was forgotten; with ``readmit`` take its tombstones away."""
        if con.execute("SELECT 1 FROM tombstone LIMIT 1").fetchone() is None:
            return
        if readmit:
            hashes = [(mark.hash,) for mark in marks]
            con.executemany("DELETE FROM tombstone WHERE hash = ?", hashes)
            return
        for mark in marks:
            if not mark.refused:
                continue
            row = con.execute("SELECT version FROM tombstone WHERE hash = ?", (mark.hash,))
            found = row.fetchone()
            if found is not None:
                raise forgotten_error(mark, found[0])

    def drop(self, which: Which, *, message: str = "") -> int:
        """See ``MemoryStore.drop``. Raises ValueError where no item of today is meant."""
        with self._writing("drop", message) as (con, number):
            items = self._chosen(con, which, number - 1)
            con.execute(
                f"UPDATE life SET died = ? WHERE died IS NULL AND item IN {_CHOSEN}",
                (number, json.dumps(items)),
            )
        return number

    def restore(self, version: int, *, message: str = "") -> int:
        """See ``MemoryStore.restore``. What was forgotten stays so.

        Raises StoreVersionError for a version that is not kept.
        """
        with self._writing("restore", message) as (con, number):
            self._require_version(con, version)
            wanted = dict(con.execute(*_alive("l.state, l.item", version)))
            now = {row[0] for row in con.execute("SELECT state FROM life WHERE died IS NULL")}
            con.execute(
                f"UPDATE life SET died = ? WHERE died IS NULL AND state IN {_CHOSEN}",
                (number, json.dumps(sorted(now - wanted.keys()))),
            )
            con.executemany(
                "INSERT INTO life VALUES (?, ?, ?, NULL)",
                [(state, wanted[state], number) for state in sorted(wanted.keys() - now)],
            )
            prior = _prior_of(con, version)
            if prior != _prior_of(con, number):
                con.execute("INSERT INTO prior VALUES (?, ?)", (number, prior))
        return number

    def forget(
        self, which: Which, *, runs: Iterable[str | Path] = (), message: str = ""
    ) -> Forgotten:
        """Erase items from every version, and from every file of the store and of ``runs``.

        which: looked up in all versions. runs: run folders, or any with checkpoints of this
        library; their files are written again without the items (those with the same task and
        origin, or the same input), and their report.html is removed.
        The messages of versions that added or dropped the items go too, and those that name them;
        priors of older versions, whose anchors learned from them in ways that nothing takes out;
        and today's prior loses their rows.

        Raises ValueError where no item is meant, or ``message`` names one; StoreBusyError where a
        reader keeps an old snapshot open: the items are out of every version then, and the next
        ``forget``, ``compact`` or opening finishes erasing.
        """
        runs = [Path(run) for run in runs]
        for run in runs:
            if not run.is_dir():
                raise FileNotFoundError(f"there is no folder {run}; pass the run's folder")
        changed: list[str] = []
        with self._writing("forget", message) as (con, number):
            items = self._chosen(con, which, None)
            chosen = json.dumps(items)
            rows = con.execute(
                f"SELECT s.name, s.task, s.origin FROM state s WHERE s.item IN {_CHOSEN}", (chosen,)
            ).fetchall()
            names = {name for name, _, _ in rows}
            if mentions(message.encode(), names):
                raise ValueError(
                    "the message names an item that is to be forgotten, and would outlive it; "
                    "say it without the id"
                )
            digests = con.execute(f"SELECT digest FROM content WHERE id IN {_CHOSEN}", (chosen,))
            match = scrub.Match(
                frozenset((codec.unpack(">q", t), codec.unpack(">q", o)) for _, t, o in rows),
                frozenset(row[0] for row in digests),
            )
            # All is read before anything is written. Files first: if a kill comes, the items are
            # still known and forget is called again.
            surveys = [scrub.survey(run, match) for run in runs]
            surveys.append(scrub.survey(self.folder, match, self._is_mine))
            for found in surveys:
                changed += map(str, scrub.carry_out(found, match))
            changed += self._remove_thumbnails(set(items))
            priors, influenced = self._forget_in_priors(con, items, match.places)
            self._overwrite(con, chosen, names)
            con.executemany(
                "INSERT OR REPLACE INTO tombstone VALUES (?, ?)",
                [(hash_, number) for hash_ in tombstones_of(self._salt, names, match)],
            )
            con.execute("INSERT OR REPLACE INTO meta VALUES ('pending', 1)")
        changed += self._finish()
        unseen = [path for found in surveys for path in found.foreign]
        foreign = tuple(dict.fromkeys(map(str, [*unseen, *self._foreign()])))
        return Forgotten(number, len(items), tuple(changed), priors, influenced, foreign)

    def _is_mine(self, path: Path) -> bool:
        """A file of the store's own, or a thumbnail."""
        own = path.parent == self.folder and _is_own(path.name)
        return own or path.parent == self.folder / THUMBNAILS

    def _overwrite(self, con: sqlite3.Connection, chosen: str, names: Set[bytes]) -> None:
        """Zeros where the items are, of the same length: no row moves."""
        touched = con.execute(
            f"SELECT born, died FROM life WHERE item IN {_CHOSEN}", (chosen,)
        ).fetchall()
        numbers = {n for pair in touched for n in pair if n is not None}
        versions = con.execute("SELECT number, time, kind, message FROM version").fetchall()
        blank = [
            (bytes(len(text)), _version_digest(number, when, kind, bytes(len(text))), number)
            for number, when, kind, text in versions
            if number in numbers or mentions(text, names)
        ]
        con.executemany("UPDATE version SET message = ?, digest = ? WHERE number = ?", blank)
        for table, key, columns in (
            ("content", "id", ("digest", "input")),
            ("state", "item", ("digest", "name", "task", "origin", "head", "soft", "hard",
                               "scores", "note", "label", "reference")),
        ):  # fmt: skip
            zeros = ", ".join(f"{c} = zeroblob(length({c}))" for c in columns)
            con.execute(f"UPDATE {table} SET {zeros} WHERE {key} IN {_CHOSEN}", (chosen,))
        con.execute(f"DELETE FROM life WHERE item IN {_CHOSEN}", (chosen,))

    def _finish(self) -> list[str]:
        """The last part of erasing: the log is cut, files that nobody names are overwritten."""
        self._cut_log()
        with self._locked() as con:
            removed = self._remove_orphans(con)
            con.execute("DELETE FROM meta WHERE key = 'pending'")
        return removed

    def _cut_log(self) -> None:
        """Write the log into the database and cut it to nothing; StoreBusyError for a reader."""
        end = time.monotonic() + self.timeout
        with self._errors():
            while self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > end:
                    raise StoreBusyError(
                        "a process that reads an old version keeps its bytes in "
                        f"{self._database}-wal. They are out of every version; close the reader "
                        "and call forget or compact, or open the store again, to erase them"
                    )
                time.sleep(0.01)

    def compact(self, *, keep: int = 1) -> int:
        """See ``MemoryStore.compact``. Takes room and time for a copy of what stays.

        Raises ValueError for ``keep`` below 1, StoreBusyError as ``forget``, StoreDamagedError
        where the file of a prior that is kept is.
        """
        if keep < 1:
            raise ValueError(f"at least today's version is kept, got keep={keep}")
        with self._writing("compact", "") as (con, number):
            oldest = max(self._oldest(), number - keep)  # what was given up stays so
            con.execute("DELETE FROM life WHERE died <= ?", (oldest,))
            effective = con.execute("SELECT max(version) FROM prior WHERE version <= ?", (oldest,))
            con.execute("DELETE FROM prior WHERE version < ?", (effective.fetchone()[0] or 0,))
            con.execute("INSERT OR REPLACE INTO meta VALUES ('oldest', ?)", (oldest,))
            # A kernel in a prior's file has a row for each item, also of those that go now.
            alive = {row[0] for row in con.execute("SELECT state FROM life")}
            named = con.execute("SELECT DISTINCT digest FROM prior WHERE digest IS NOT NULL")
            for (name,) in named.fetchall():
                self._rewrite_prior(con, name, alive.__contains__)
            kept = {
                "state": "t.id IN (SELECT state FROM life)",
                "content": "t.id IN (SELECT item FROM life)",
                "version": f"t.number >= {oldest}",
            }
            for table in _APPENDED:
                con.execute(f"CREATE TABLE fresh{TABLES[table]}")
                con.execute(f"INSERT INTO fresh SELECT t.* FROM {table} t WHERE {kept[table]}")
                con.execute(f"DROP TABLE {table}")
                con.execute(f"ALTER TABLE fresh RENAME TO {table}")
            for name, columns in INDICES.items():
                con.execute(f"CREATE INDEX IF NOT EXISTS {name} {columns}")
            con.execute("INSERT OR REPLACE INTO meta VALUES ('pending', 1)")
        with self._errors():
            # A script, since ``execute`` takes one step of it and gives back one page.
            self._db.executescript("PRAGMA incremental_vacuum;")
        self._finish()
        self._live = None
        return number

    # ------------------------------------------------------------------- priors

    def save_prior(self, prior: Prior, *, message: str = "", readmit: bool = False) -> int:
        """See ``MemoryStore.save_prior``: the memory becomes today's memory, the rest a file.

        An item that is there already (same task, origin and input) keeps its number, id, note and
        scores; what the prior no longer remembers is dropped. Inputs are stored as the tensors
        that they are. Raises as ``append``; StoreFullError where the file cannot be written.
        """
        state = prior.state_dict()
        held: list[Memory] = []
        scrub.map_memories(state, lambda holder: held.append(memory_of(holder)))
        with self._writing("prior", message) as (con, number):
            today = _today(con)
            rows = [self._remember(con, number, memory, today, readmit) for memory in held]
            gone = today.states.difference(*rows)
            con.execute(
                f"UPDATE life SET died = ? WHERE died IS NULL AND state IN {_CHOSEN}",
                (number, json.dumps(sorted(gone))),
            )
            numbers = iter(rows)
            refer = scrub.map_memories(state, lambda holder: referring(holder, next(numbers)))
            con.execute("INSERT INTO prior VALUES (?, ?)", (number, self._write_prior(refer)))
        return number

    def _remember(
        self, con: sqlite3.Connection, number: int, memory: Memory, today: Today, readmit: bool
    ) -> list[int]:
        """The states of a memory's items, in its order; what is not there yet is inserted."""
        contents = codec.encode_inputs(memory.inputs)
        places = zip(memory.task.tolist(), memory.origin.tolist(), strict=True)
        found = [
            today.take(codec.digest(layout.spec, data), codec.integer(t), codec.integer(o))
            for (layout, data), (t, o) in zip(contents, places, strict=True)
        ]
        names = [
            name if old is None else old.name
            for name, old in zip(default_ids(memory), found, strict=True)
        ]
        marks = marks_of(self._salt, memory, names, contents, [old is None for old in found])
        self._admit(con, marks, readmit)
        fresh = [content for content, old in zip(contents, found, strict=True) if old is None]
        items = iter(self._insert_contents(con, fresh))
        states = codec.encode_states(
            memory,
            [self._layout(con, json.dumps(head)) for head in memory.heads],
            names,
            ["" if old is None else old.note for old in found],
            [{} if old is None else old.scores for old in found],
        )
        result = [
            old.state if old is not None and old.digest == state.digest else None
            for old, state in zip(found, states, strict=True)
        ]
        new = [
            (next(items) if old is None else old.item, state)
            for old, state, same in zip(found, states, result, strict=True)
            if same is None
        ]
        numbers = iter(self._insert_states(con, number, new))
        return [next(numbers) if same is None else same for same in result]

    def _write_prior(self, state: Any) -> bytes:
        """Put a prior's file in its place; its digest. Called by the holder of the lock."""
        data = checkpoint.dumps(state, kind="store")
        name = hashlib.sha256(data).digest()
        path = self.folder / _prior_name(name)
        if not files.require_plain(path):
            try:
                checkpoint.write(path, data)
            except OSError as error:
                raise StoreFullError(str(error)) from error
            files.sync(self.folder)
        return name

    def _read_prior(self, name: bytes) -> Any:
        """Raises FileNotFoundError; StoreDamagedError where the bytes have another digest."""
        path = self.folder / _prior_name(name)
        if not files.require_plain(path):
            raise FileNotFoundError(path)
        if files.sha256(path) != name:
            raise StoreDamagedError(
                f"{path} is not the file that the database names: bytes were changed or lost. "
                "Restore it from a copy; the memory can be read without it"
            )
        try:
            return checkpoint.load(path, kind="store")
        except CheckpointError as error:
            raise StoreDamagedError(str(error)) from error

    def load_prior(
        self, version: int | None = None, *, serve: bool = False, ahead: int = 2, workers: int = 1
    ) -> Prior:
        """See ``MemoryStore.load_prior``, on the CPU.

        Without the items that were dropped or forgotten after it was saved: a memory term loses
        them, a kernel's Gaussian is marginalised over them.
        Raises ValueError where that version has no prior (of older ones ``forget`` removes them),
        and for serving an older one than today's; StoreVersionError for a version that is
        not kept, StoreDamagedError.
        """
        if serve and version not in (None, self.version):
            raise served.not_of_today(version)
        gather = self._gathering(serve, ahead, workers)
        try:
            try:
                return self._loaded(version, gather)
            except FileNotFoundError:  # a forget may remove it after its name was read: once more
                return self._loaded(version, gather)
        except FileNotFoundError as error:
            raise StoreDamagedError(
                f"{error} is missing; restore it from a copy. The memory can be read without it"
            ) from error
        except (KeyError, TypeError) as error:
            raise StoreDamagedError(
                f"the prior cannot be read ({error!r}); upgrade lifelong, or use an older version"
            ) from error

    def _gathering(self, serve: bool, ahead: int, workers: int) -> _Gather:
        """How the memory of a prior is read: now, or when it is drawn."""
        if not serve:
            return lambda con, states: self._gather(con, states, None).state_dict()
        return lambda con, states: served.unread_state(
            self._served(con, states, None, ahead, workers)
        )

    def _loaded(self, version: int | None, gather: _Gather) -> Prior:
        with self._reading() as con:
            state = self._prior_state(con, version, gather)
        return Prior.from_state_dict(state)

    def _prior_state(self, con: sqlite3.Connection, version: int | None, gather: _Gather) -> Any:
        at = self._require_version(con, version)
        name = _prior_of(con, at)
        if name is None:
            raise ValueError(
                f"version {at} has no prior; store.history() tells which have, and forget removes "
                "those of older versions"
            )
        alive = {row[0] for row in con.execute(*_alive("l.state", at))}

        def resolve(holder: dict[str, Any]) -> dict[str, Any]:
            refers = holder["memory"]
            rows = refers["rows"].tolist()
            keep = torch.tensor([row in alive for row in rows], dtype=torch.bool)
            state = dict(refers["empty"])
            if keep.any():
                kept = [row for row, stays in zip(rows, keep.tolist(), strict=True) if stays]
                state = {
                    **gather(con, kept),
                    "head": refers["head"][keep],
                    "heads": refers["heads"],
                }
            resolved = {**holder, "memory": state}
            if "blocks" in holder and not keep.all():
                resolved["blocks"] = scrub.marginal(holder["blocks"], keep)
            return resolved

        return scrub.map_memories(self._read_prior(name), resolve, is_reference)

    def _forget_in_priors(
        self, con: sqlite3.Connection, items: Sequence[int], places: Set[tuple[int, int]]
    ) -> tuple[int, bool]:
        """How many older priors were given up, and whether today's held some of the items."""
        now = _prior_of(con, newest(con))
        gone = con.execute("SELECT DISTINCT digest FROM prior WHERE digest IS NOT ?", (now,))
        older = sum(row[0] is not None for row in gone)
        con.execute("UPDATE prior SET digest = NULL WHERE digest IS NOT ?", (now,))
        if now is None:
            return older, False
        rows = con.execute(f"SELECT id FROM state WHERE item IN {_CHOSEN}", (json.dumps(items),))
        erased = {row[0] for row in rows}
        return older, self._rewrite_prior(con, now, lambda state: state not in erased, places)

    def _rewrite_prior(
        self,
        con: sqlite3.Connection,
        name: bytes,
        keeps: Callable[[int], bool],
        places: Set[tuple[int, int]] = frozenset(),
    ) -> bool:
        """Put a prior without some states in its place; whether it had any of them.

        places: named by the members of its groups no more.
        """
        try:
            before = self._read_prior(name)
        except FileNotFoundError as error:
            raise StoreDamagedError(f"{error} is missing; restore it from a copy") from error
        state, held = without_rows(before, keeps, places)
        if state is not before:
            new = self._write_prior(state)
            con.execute("UPDATE prior SET digest = ? WHERE digest = ?", (new, name))
        return held

    def _remove_orphans(self, con: sqlite3.Connection) -> list[str]:
        """Erase priors that no version names, and what a kill left half-written."""
        named = {
            _prior_name(digest)
            for (digest,) in con.execute("SELECT digest FROM prior WHERE digest IS NOT NULL")
        }
        removed = []
        for entry in list(os.scandir(self.folder)):
            left = entry.name.startswith((".prior-", f".{GUARD}."))
            if left or (_is_prior(entry.name) and entry.name not in named):
                if entry.is_symlink():
                    os.unlink(entry.path)
                else:
                    files.erase(Path(entry.path))
                removed.append(entry.path)
        return removed

    def _remove_thumbnails(self, items: set[int]) -> list[str]:
        folder = self.folder / THUMBNAILS
        if folder.is_symlink() or not folder.is_dir():
            return []
        gone = [p for p in files.walk(folder) if p.stem.isdecimal() and int(p.stem) in items]
        files.erase(*gone)
        return [str(path) for path in gone]

    # -------------------------------------------------------------------- read

    @property
    def version(self) -> int:
        """The newest version; 0 for an empty store."""
        with self._reading() as con:
            return newest(con)

    @property
    def identity(self) -> str:
        """See ``MemoryStore.identity``."""
        with self._reading():
            return identity_of(self._salt)

    @property
    def num_bytes(self) -> int:
        """Of the store's own files."""
        return sum(e.stat().st_size for e in os.scandir(self.folder) if _is_own(e.name))

    def __len__(self) -> int:
        with self._reading() as con:
            return len(self._states_of_today(con))

    def _states_of_today(self, con: sqlite3.Connection) -> list[int]:
        """By item's number; read once for each version."""
        now = newest(con)
        if self._live is None or self._live[0] != now:
            rows = con.execute("SELECT state FROM life WHERE died IS NULL ORDER BY item")
            self._live = (now, [row[0] for row in rows])
        return self._live[1]

    def memory(
        self,
        which: Where | Sequence[int] | None = None,
        *,
        version: int | None = None,
        decode: Decode | None = None,
    ) -> Memory:
        """See ``MemoryStore.memory``.

        Raises ValueError for no items, items that the version has not, and items of several types
        or shapes; StoreVersionError; StoreDamagedError where bytes are not those written.
        """
        with self._reading() as con:
            states = self._states_of(con, which, self._require_version(con, version))
            return self._gather(con, states, decode)

    def _states_of(
        self, con: sqlite3.Connection, which: Where | Sequence[int] | None, at: int
    ) -> list[int]:
        """Of the items that ``memory`` means, in its order."""
        if which is None or isinstance(which, Where):
            sql, values = (
                _alive("l.state", at) if which is None else self._select(con, "l.state", which, at)
            )
            return [row[0] for row in con.execute(sql + " ORDER BY l.item", values)]
        place = dict(con.execute(*_alive("l.item, l.state", at)).fetchall())
        missing = [item for item in which if item not in place]
        if missing:
            raise ValueError(f"version {at} has no items {missing[:5]}; store.items() lists them")
        return [place[item] for item in which]

    def inputs(self, items: Sequence[int], *, decode: Decode | None = None) -> Inputs:
        """See ``MemoryStore.inputs``. Raises StoreDamagedError too."""
        found = codec.GatheringInputs(len(items))
        with self._reading() as con:
            rows = con.execute(
                "SELECT c.id, c.layout, c.digest, c.input FROM json_each(?) j CROSS JOIN content c "
                "ON c.id = j.value WHERE EXISTS (SELECT 1 FROM life l WHERE l.item = j.value AND "
                "l.died IS NULL)",
                (json.dumps(list(items)),),
            ).fetchall()  # a statement that is left half-way would keep old pages in the log
            for wanted, (item, layout, check, data) in zip(items, rows, strict=False):
                if item != wanted:
                    break
                spec = self._input_layout(con, layout)
                require_digest(spec.spec, (data,), check)
                found.put(spec, data)
        if found.count < len(items):
            raise served.missing(items[found.count :])
        return found.inputs(decode)

    def serve(
        self,
        which: Where | Sequence[int] | None = None,
        *,
        decode: Decode | None = None,
        ahead: int = 2,
        workers: int = 1,
    ) -> Memory:
        """See ``MemoryStore.serve``. Raises as ``memory``, and ValueError for ahead < 0 and fewer
        than one worker."""
        with self._reading() as con:
            states = self._states_of(con, which, newest(con))
            return self._served(con, states, decode, ahead, workers)

    def _served(
        self,
        con: sqlite3.Connection,
        states: list[int],
        decode: Decode | None,
        ahead: int,
        workers: int,
    ) -> Memory:
        folder = Path(served.place_of(self.path))
        opened = partial(SqliteStore, folder, "r", timeout=self.timeout)
        source = served.StoredInputs(opened, decode, workers, partial(noted, folder))
        chosen = json.dumps(states)
        layouts = con.execute(
            f"SELECT DISTINCT c.layout FROM state s JOIN content c ON c.id = s.item WHERE s.id IN "
            f"{_CHOSEN}",
            (chosen,),
        ).fetchall()
        if len(layouts) > 1:
            raise ValueError(
                codec.differ(*(self._input_layout(con, n).spec for (n,) in layouts[:2]))
            )
        items = [
            row[0]
            for row in con.execute(
                "SELECT s.item FROM json_each(?) j CROSS JOIN state s ON s.id = j.value", (chosen,)
            )
        ]
        if len(items) < len(states):
            raise StoreDamagedError("rows of items are missing; store.verify() tells which")
        chunks = (states[i : i + served.CHUNK] for i in range(0, len(states), served.CHUNK))
        return served.served(source, items, (self._beliefs(con, c) for c in chunks), ahead)

    def _beliefs(self, con: sqlite3.Connection, states: list[int]) -> Memory:
        """Those states without inputs, each checked against its digest."""
        rows = con.execute(
            f"SELECT {_WHOLE} FROM json_each(?) j CROSS JOIN state s ON s.id = j.value",
            (json.dumps(states),),
        )
        found = [self._state(con, row) for row in rows]
        return codec.believed(served.no_inputs(len(found)), found, _Heads(self, con))

    def batch(self, index: Tensor | Sequence[int], *, decode: Decode | None = None) -> Memory:
        """See ``MemoryStore.batch``. Raises ValueError beyond the end, and as ``memory``."""
        places = index.tolist() if isinstance(index, Tensor) else list(index)
        with self._reading() as con:
            live = self._states_of_today(con)
            if places and not (min(places) >= 0 and max(places) < len(live)):
                raise ValueError(
                    f"positions must lie in [0, {len(live)}), got {min(places)} to {max(places)}"
                )
            return self._gather(con, [live[i] for i in places], decode)

    def draw(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        decode: Decode | None = None,
    ) -> Memory:
        """See ``MemoryStore.draw``. Raises ValueError for n below 1, and as ``memory``."""
        if n < 1:
            raise ValueError(f"a batch needs at least one item, got n={n}")
        with self._reading() as con:
            size = len(self._states_of_today(con))
            if n >= size:
                return self.batch(range(size), decode=decode)
            u = torch.rand(n, generator=generator, dtype=torch.float64)
            places = torch.arange(n, dtype=torch.float64).add_(u).mul_(size / n)
            drawn = self.batch(places.long().clamp_(max=size - 1), decode=decode)
        return drawn.scaled(size / n)

    def _gather(self, con: sqlite3.Connection, states: list[int], decode: Decode | None) -> Memory:
        """Those states' items in that order, each checked against its digests."""
        gathering = codec.Gathering(len(states))
        rows = con.execute(
            f"SELECT {_WHOLE}, s.id, c.layout, c.digest, c.input FROM json_each(?) j "
            "CROSS JOIN state s ON s.id = j.value CROSS JOIN content c ON c.id = s.item",
            (json.dumps(states),),
        )
        # In the list's order, as the joins say; sorting would copy every input once more.
        for wanted, (*row, number, layout, check, data) in zip(states, rows, strict=False):
            if number != wanted:
                break
            inputs = self._input_layout(con, layout)
            require_digest(inputs.spec, (data,), check)
            gathering.put(inputs, data, self._state(con, row))
        missing = len(states) - len(gathering.states)
        if missing:
            raise StoreDamagedError(
                f"{missing} items are missing from {self._database}; restore it from "
                "a copy, store.verify() tells what is affected"
            )
        return gathering.memory(_Heads(self, con), decode)

    def _state(self, con: sqlite3.Connection, row: Sequence[Any]) -> codec.State:
        """Of the columns ``_WHOLE``, checked."""
        layout = self._state_layout(con, row[0])
        require_digest(layout.spec, row[2:], row[1])
        return codec.State.of(layout, row[2:])

    def _spec(self, con: sqlite3.Connection, number: int) -> str:
        if number not in self._layouts:
            row = con.execute("SELECT spec FROM layout WHERE id = ?", (number,)).fetchone()
            if row is None:
                raise StoreDamagedError(f"layout {number} is missing; call store.verify()")
            self._layouts[number] = row[0]
        return self._layouts[number]

    def _input_layout(self, con: sqlite3.Connection, number: int) -> codec.InputLayout:
        key = ("input", number)
        if key not in self._layouts:
            self._layouts[key] = codec.InputLayout.of(self._spec(con, number))
        return self._layouts[key]

    def _state_layout(self, con: sqlite3.Connection, number: int) -> codec.StateLayout:
        key = ("state", number)
        if key not in self._layouts:
            self._layouts[key] = codec.StateLayout.of(self._spec(con, number))
        return self._layouts[key]

    def _require_layout(self, con: sqlite3.Connection, number: int) -> None:
        """It is one of inputs, of states, or a head."""
        value = codec.parse(self._spec(con, number))
        if not isinstance(value, dict):
            self._head(con, number)
        elif "kind" in value:
            self._input_layout(con, number)
        else:
            self._state_layout(con, number)

    def _head(self, con: sqlite3.Connection, number: int) -> Any:
        head = codec.parse(self._spec(con, number))
        if head is not None and not (isinstance(head, list) and all(type(c) is int for c in head)):
            raise StoreDamagedError(f"a head cannot be read: {str(head)[:80]!r}")
        return None if head is None else tuple(head)

    def raw(self, item: int) -> Any:
        """See ``MemoryStore.raw``. Raises ValueError for an item that no kept version has."""
        with self._reading() as con:
            number = max(-1, min(item, _LARGEST))
            row = con.execute(
                "SELECT layout, digest, input FROM content WHERE id = ?", (number,)
            ).fetchone()
            if row is None or row[1] == _ERASED:
                raise ValueError(f"no version has an item {item}; store.items() lists them")
            layout = self._input_layout(con, row[0])
            require_digest(layout.spec, (row[2],), row[1])
            return layout.value(row[2])

    def items(
        self,
        where: Where | None = None,
        *,
        version: int | None = None,
        after: int = 0,
        limit: int = 1000,
    ) -> list[Item]:
        """See ``MemoryStore.items``. Raises StoreVersionError, StoreDamagedError."""
        with self._reading() as con:
            at = self._require_version(con, version)
            columns = (
                f"l.item, c.layout, length(c.input), {_WHOLE}, "
                "(SELECT min(born) FROM life b WHERE b.item = l.item)"
            )
            sql, values = self._select(con, columns, where, at, paged=True)
            sql += " AND l.item > ? ORDER BY l.item LIMIT ?"
            after, limit = (max(-_LARGEST, min(n, _LARGEST)) for n in (after, limit))
            return [self._item(con, row) for row in con.execute(sql, (*values, after, limit))]

    def _item(self, con: sqlite3.Connection, row: Sequence[Any]) -> Item:
        number, layout, size, *whole, since = row
        state, inputs = self._state(con, whole), self._input_layout(con, layout)
        return Item(
            item=number,
            id=codec.decoded(state.name),
            task=codec.unpack(">q", state.task),
            origin=codec.unpack(">q", state.origin),
            label=codec.label_of(state.layout, state.label),
            head=self._head(con, codec.unpack(">q", state.head)),
            soft_weight=codec.unpack(">d", state.soft),
            hard_weight=codec.unpack(">d", state.hard),
            scores=codec.parse(state.scores),
            note=codec.decoded(state.note),
            kind=inputs.kind,
            shape=inputs.shape,
            num_bytes=size,
            since=since,
            layout=f"[{inputs.spec}, {state.layout.spec}]",
        )

    def count(self, where: Where | None = None, *, version: int | None = None) -> int:
        """See ``MemoryStore.count``. Raises StoreVersionError."""
        with self._reading() as con:
            at = self._require_version(con, version)
            sql, values = self._select(con, "count(*)", where, at)
            return con.execute(sql, values).fetchone()[0]

    def _select(
        self,
        con: sqlite3.Connection,
        columns: str,
        where: Where | None,
        version: int | None,
        *,
        paged: bool = False,
    ) -> tuple[str, tuple[Any, ...]]:
        """Items of a version, as SQL and its values; None: of any version that is kept. paged: to
        go on with ``AND l.item > ?``, so that a page is found at once, wherever it begins."""
        today = version is not None and version == newest(con)
        values: list[Any] = [] if today or version is None else [version, version]
        alive = "1" if version is None else "l.died IS NULL" if today else _ALIVE
        parts, where = [alive], where or Where()
        for column, wanted in (("task", where.task), ("origin", where.origin)):
            if wanted is None:
                continue
            if not -_LARGEST <= wanted <= _LARGEST:
                parts.append("0")  # no item has it
                continue
            parts.append(f"s.{column} = ?")
            values.append(codec.integer(wanted))
        if where.label is not None:
            pairs = self._labels(con, where.label)
            parts.append(" OR ".join(["s.layout = ? AND s.label = ?"] * len(pairs)) or "0")
            values += [value for pair in pairs for value in pair]
        if where.kind is not None:
            parts.append(f"c.layout IN {_CHOSEN}")
            values.append(json.dumps(self._kinds(con, where.kind)))
        if where.text is not None:
            text = utf8(where.text, "the text")
            parts.append(
                f"instr(s.name, ?) OR instr(s.note, ?) OR (c.layout IN {_CHOSEN} AND "
                "instr(c.input, ?))"
            )
            values += [text, text, json.dumps(self._kinds(con, "text")), text]
        needs_content = "c." in columns or any("c." in part for part in parts)
        # Left alone, SQLite reads all that are alive, and sorts them, for each page.
        wanted = f"INDEXED BY {'life_today' if today else 'life_item'} "
        index = wanted if paged and "0" not in parts else ""
        sql = (
            f"SELECT {columns} FROM life l {index}CROSS JOIN state s ON s.id = l.state "
            + ("CROSS JOIN content c ON c.id = l.item " if needs_content else "")
            + "WHERE "
            + " AND ".join(f"({part})" for part in parts)
        )
        return sql, tuple(values)

    def _labels(self, con: sqlite3.Connection, label: float) -> list[tuple[int, bytes]]:
        """(layout, bytes) of a label of one number, for each type that labels have."""
        found = []
        for number, spec in con.execute("SELECT id, spec FROM layout").fetchall():
            if not (isinstance(spec, str) and spec.startswith('{"label"')):
                continue
            column = self._state_layout(con, number).label
            if column.num_bytes != column.dtype.itemsize:
                continue
            value = torch.tensor([label], dtype=torch.float64).to(column.dtype)
            if value.item() == label or value.is_floating_point():
                found.append((number, column.rows(value)[0]))
        return found

    def _kinds(self, con: sqlite3.Connection, kind: str) -> list[int]:
        """The layouts of inputs of a kind."""
        rows = con.execute("SELECT id, spec FROM layout").fetchall()
        return [n for n, spec in rows if str(spec).startswith(f'{{"kind": "{kind}"')]

    def _require_version(self, con: sqlite3.Connection, version: int | None) -> int:
        last = newest(con)
        if version is None:
            return last
        oldest = self._oldest()
        if not oldest <= version <= last:
            raise StoreVersionError(
                f"there is no version {version}: {oldest} to {last} are kept; store.history() "
                "lists them"
            )
        return version

    def _oldest(self) -> int:
        """The first version that is kept."""
        oldest = self._meta("oldest") or 0
        if type(oldest) is not int:
            raise StoreDamagedError("the oldest version is no number; call store.verify()")
        return oldest

    def _chosen(self, con: sqlite3.Connection, which: Which, version: int | None) -> list[int]:
        """The items that are meant, of a version or (None) of any; ValueError where none is."""
        where = "any version" if version is None else "today's memory"
        if isinstance(which, Where):
            sql, values = self._select(con, "DISTINCT l.item", which, version)
            found = [row[0] for row in con.execute(sql, values)]
            if not found:
                raise ValueError(f"no item of {where} has {which}; store.items() lists them")
            return sorted(found)
        if isinstance(which, (str, bytes)):
            raise TypeError(f"expected ids in a list, got {which!r}; pass [{which!r}]")
        wanted = set(which)
        if not wanted:
            raise ValueError("no ids were given; pass at least one, or a Where")
        odd = [w for w in wanted if type(w) not in (int, str)]
        if odd:
            raise TypeError(f"expected item numbers (int) or ids (str), got {odd[0]!r}")
        salt = self._salt
        names = {name: utf8(name, "an id") for name in wanted if isinstance(name, str)}
        tags = json.dumps([tag_of(salt, name) for name in names.values()])
        rows = con.execute(
            f"SELECT s.name, s.item FROM state s WHERE s.tag IN {_CHOSEN} AND s.digest != ?",
            (tags, _ERASED),
        ).fetchall()
        by_name: dict[bytes, set[int]] = {}
        for name, item in rows:
            by_name.setdefault(name, set()).add(item)
        asked = {n for n in wanted if isinstance(n, int)}.union(*by_name.values())
        sql = "SELECT DISTINCT l.item FROM json_each(?) j CROSS JOIN life l ON l.item = j.value"
        sql += "" if version is None else " AND l.died IS NULL"
        alive = {row[0] for row in con.execute(sql, (json.dumps(sorted(asked)),))}
        missing = [n for n in wanted if isinstance(n, int) and n not in alive]
        missing += [n for n, raw in names.items() if not by_name.get(raw, set()) & alive]
        if missing:
            raise ValueError(
                f"{where} has no items {missing[:5]}; store.items() lists them, and "
                "store.forgotten(id) tells whether one was forgotten"
            )
        return sorted(alive)

    def find(self, which: Which) -> list[int]:
        """See ``MemoryStore.find``."""
        with self._reading() as con:
            return self._chosen(con, which, None)

    def history(self) -> list[Version]:
        """See ``MemoryStore.history``."""
        with self._reading() as con:
            born = dict(con.execute("SELECT born, count(*) FROM life GROUP BY born").fetchall())
            died = dict(con.execute("SELECT died, count(*) FROM life GROUP BY died").fetchall())
            kept = dict(  # of items that were there before, with other beliefs
                con.execute(
                    "SELECT a.born, count(*) FROM life a WHERE EXISTS (SELECT 1 FROM life b WHERE "
                    "b.item = a.item AND b.died = a.born) GROUP BY a.born"
                ).fetchall()
            )
            priors = dict(con.execute("SELECT version, digest FROM prior ORDER BY version"))
            rows = con.execute("SELECT * FROM version ORDER BY number")
            result, size = [], None
            for number, when, kind, digest, message in rows.fetchall():
                if _version_digest(number, when, kind, message) != digest:
                    raise StoreDamagedError(
                        f"version {number} is not what was written; call store.verify()"
                    )
                if size is None:
                    size = sum(n for at, n in born.items() if at < number)
                    size -= sum(n for at, n in died.items() if at is not None and at < number)
                same = kept.get(number, 0)
                added, dropped = born.get(number, 0) - same, died.get(number, 0) - same
                size += added - dropped
                text = codec.decoded(message) if message.strip(b"\0") else ""
                saved = priors.get(number) is not None and kind == "prior"
                last = max((n for n in priors if n <= number), default=None)
                held = last is not None and priors[last] is not None
                result.append(Version(number, when, kind, text, added, dropped, size, saved, held))
            return result

    def diff(self, a: int, b: int) -> Diff:
        """See ``MemoryStore.diff``. Raises StoreVersionError."""
        with self._reading() as con:
            one, two = (
                dict(con.execute(*_alive("l.item, l.state", self._require_version(con, v))))
                for v in (a, b)
            )
        return Diff(
            a,
            b,
            added=tuple(sorted(two.keys() - one.keys())),
            dropped=tuple(sorted(one.keys() - two.keys())),
            changed=tuple(sorted(i for i in one.keys() & two.keys() if one[i] != two[i])),
        )

    def forgotten(self, id: str) -> Tombstone | None:
        """See ``MemoryStore.forgotten``."""
        with self._reading() as con:
            name = hash_id(self._salt, utf8(id, "an id"))
            row = con.execute(
                "SELECT t.version, v.time FROM tombstone t LEFT JOIN version v ON "
                "v.number = t.version WHERE t.hash = ?",
                (name,),
            ).fetchone()
        return None if row is None else Tombstone(*row)

    # ------------------------------------------------------------------ verify

    def verify(self) -> Verification:
        """See ``MemoryStore.verify``: digests of all rows and files, SQLite's own check, links."""
        found: list[Finding] = []
        with self._reading() as con:
            for (line,) in con.execute("PRAGMA integrity_check").fetchall():
                if line != "ok":
                    found.append(Finding(DATABASE, line))
            number, items = 0, 0
            for part in (self._verify_rows, self._verify_files):
                try:
                    found += part(con)
                except sqlite3.DatabaseError as error:
                    found.append(Finding(DATABASE, f"cannot be read: {error}"))
            with suppress(sqlite3.DatabaseError):
                number, items = newest(con), len(self._states_of_today(con))
        own = sum(_is_own(entry.name) for entry in os.scandir(self.folder))
        return Verification(number, items, own, tuple(found))

    def _verify_rows(self, con: sqlite3.Connection) -> Iterator[Finding]:
        def check(name: str, layout: Any, columns: Sequence[bytes], digest: bytes) -> str:
            if digest == _ERASED:
                blank = all(isinstance(c, bytes) and not c.strip(b"\0") for c in columns)
                return "" if blank else "is half erased"
            try:
                form = layout()
                require_digest(form.spec, columns, digest)
                if isinstance(form, codec.InputLayout):
                    form.require(*columns)
                else:
                    codec.State.of(form, columns)
            except (StoreDamagedError, TypeError):
                return f"its {name} is not what was written"
            return ""

        for item, layout, digest, data in con.execute("SELECT * FROM content"):
            problem = check("input", lambda n=layout: self._input_layout(con, n), (data,), digest)
            if problem:
                yield Finding(f"item {item}", problem)
        for item, *row in con.execute(f"SELECT s.item, {_WHOLE} FROM state s"):
            layout = row[0]
            problem = check("row", lambda n=layout: self._state_layout(con, n), row[2:], row[1])
            if problem:
                yield Finding(f"item {item}", problem)
        for number, spec in con.execute("SELECT id, spec FROM layout").fetchall():
            try:
                self._require_layout(con, number)
            except StoreDamagedError:
                yield Finding(f"layout {number}", f"is not what was written: {str(spec)[:80]!r}")
        lost = con.execute(
            "SELECT l.item FROM life l LEFT JOIN state s ON s.id = l.state AND s.item = l.item "
            "LEFT JOIN content c ON c.id = l.item WHERE s.id IS NULL OR c.id IS NULL OR "
            "s.digest = ? OR c.digest = ?",
            (_ERASED, _ERASED),
        )
        for (item,) in lost.fetchall():
            yield Finding(f"item {item}", "is in a version, and its row is missing")
        versions = con.execute("SELECT * FROM version ORDER BY number").fetchall()
        for number, when, kind, digest, message in versions:
            if _version_digest(number, when, kind, message) != digest:
                yield Finding(f"version {number}", "is not what was written")
        numbers = [row[0] for row in versions]
        if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            yield Finding(DATABASE, "versions are missing in between")
        numbers = [self._meta("item"), self._meta("state"), self._meta("oldest") or 0]
        if type(self._meta("salt")) is not bytes or any(type(n) is not int for n in numbers):
            yield Finding(DATABASE, "its numbers or its salt are missing")
        if self._meta("pending") is not None:
            yield Finding(DATABASE, "erasing was not finished: open it for writing", damage=False)

    def _verify_files(self, con: sqlite3.Connection) -> Iterator[Finding]:
        named = con.execute("SELECT DISTINCT digest FROM prior WHERE digest IS NOT NULL")
        names = set()
        for (digest,) in named.fetchall():
            names.add(name := _prior_name(digest))
            try:
                if not files.require_plain(self.folder / name):
                    yield Finding(name, "is missing")
                elif files.sha256(self.folder / name) != digest:
                    yield Finding(name, "is not what was written")
            except StoreDamagedError as error:
                yield Finding(name, str(error))
        guard = self._guard()
        if guard is None and newest(con):
            yield Finding(GUARD, "is missing or damaged; the next commit writes it", damage=False)
        for entry in sorted(os.scandir(self.folder), key=lambda e: e.name):
            if _is_prior(entry.name) and entry.name not in names:
                yield Finding(
                    entry.name, "is named by no version; the next write removes it", False
                )
        for path in self._foreign():
            yield Finding(str(path.relative_to(self.folder)), "is not the store's", damage=False)

    def _foreign(self) -> Iterator[Path]:
        """What lies below the folder and is not the store's, nor an export; links too."""
        for root, folders, names in os.walk(self.folder):
            links = [name for name in folders if Path(root, name).is_symlink()]
            for name in sorted([*names, *links]):
                path = Path(root, name)
                own = root == str(self.folder) and _is_own(name)
                shown = path.parent == self.folder / THUMBNAILS
                if path.is_symlink() or not (
                    own or shown or checkpoint.kind_of(path) in scrub.KINDS
                ):
                    yield path

    # ------------------------------------------------------------------ export

    def export(self, path: str | Path, *, version: int | None = None) -> Path:
        """See ``MemoryStore.export``. A file inside the store's folder is reached by ``forget``.

        Raises ValueError for another suffix, a name of the store's own, and Parquet in the
        store's folder, which ``forget`` could not rewrite; FileExistsError for a file that is no
        export; ImportError without pyarrow.
        """
        path = Path(path)
        inside = self.folder.resolve() in path.resolve().parents
        if inside and (_is_own(path.name) or path.suffix == ".parquet"):
            raise ValueError(
                f"{path} lies in the store; choose a .safetensors of another name, which forget "
                "finds there, or another folder"
            )
        return write_export(self, path, version)


class _Heads(dict[int, Any]):
    """Heads by the store's number, read when they are first asked for."""

    def __init__(self, store: SqliteStore, con: sqlite3.Connection) -> None:
        self._store, self._con = store, con

    def __missing__(self, number: int) -> Any:
        self[number] = head = self._store._head(self._con, number)
        return head


_Gather = Callable[[sqlite3.Connection, list[int]], dict[str, Any]]
_ALIVE = "l.born <= ? AND (l.died IS NULL OR l.died > ?)"
_CHOSEN = "(SELECT value FROM json_each(?))"


def _alive(columns: str, version: int) -> tuple[str, tuple[int, int]]:
    return f"SELECT {columns} FROM life l WHERE {_ALIVE}", (version, version)


def _prior_of(con: sqlite3.Connection, version: int) -> bytes | None:
    """The digest of the prior that was in force at a version."""
    row = con.execute(
        "SELECT digest FROM prior WHERE version <= ? ORDER BY version DESC LIMIT 1", (version,)
    ).fetchone()
    return None if row is None else row[0]


def _prior_name(digest: Any) -> str:
    """Made of the digest, so that nothing in a database can name another file."""
    if not (isinstance(digest, bytes) and len(digest) == 32):
        raise StoreDamagedError("the digest of a prior has the wrong length; call store.verify()")
    return f"prior-{digest.hex()[:32]}.safetensors"


def _is_prior(name: str) -> bool:
    middle = name.removeprefix("prior-").removesuffix(".safetensors")
    return name == f"prior-{middle}.safetensors" and len(middle) == 32 and middle.isalnum()


def _is_own(name: str) -> bool:
    return name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", GUARD) or _is_prior(name)


def _version_digest(number: int, when: Any, kind: Any, message: Any) -> bytes:
    return hashlib.sha256(repr((number, when, kind, message)).encode()).digest()


def _today(con: sqlite3.Connection) -> Today:
    return Today(
        con.execute(
            "SELECT c.digest, s.task, s.origin, s.item, s.id, s.digest, s.name, s.note, "
            "s.scores FROM life l CROSS JOIN state s ON s.id = l.state CROSS JOIN content c "
            "ON c.id = l.item WHERE l.died IS NULL ORDER BY l.item DESC"
        )
    )

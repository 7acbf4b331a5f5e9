"""``LanceStore``: the same memory on Lance, for object stores and more than one machine's disk.

One Lance table whose rows are only ever appended or deleted. A commit is one append, so it is there
as a whole or not at all:

    item rows   a state of an item (label, outputs, weights, ...), with its input where it is new
    prior row   a prior without its memory, as bytes, named by sha256
    message     the user's words on the version, a row of its own so that it can be erased
    event row   last: the version's number, what left, and the commit that it was made upon

Readers follow the chain of commits from its first. Two writers that make a version upon the same
commit both succeed in Lance; here the one that Lance put second is void, in no version, and its
writer takes it back and raises StoreBusyError. On local folders writers also wait for a lock.

Erasing takes three steps, since Lance keeps what it deletes: rows are deleted, files with deleted
rows written again whatever their share, and old versions of the table cleaned up whatever their
age. If a kill comes in between, the next writer goes on from there.

Of every item a few numbers are held in memory (about half a kilobyte); outputs and inputs are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import (
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
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
from .sqlite import THUMBNAILS

FORMAT = 1
LOCK = "writer.lock"
_OWN = ("data", "_versions", "_transactions", "_deletions", "_indices")  # Lance's own folders
# What the layer below Lance says where an address does not answer, or not to us.
_UNREACHED = ("sending request", "http error", "timed out", "timeout", "dns error", "connection",
              "credential", "unauthorized", "forbidden", "nosuchbucket", "status 4",
              "status 5")  # fmt: skip
_INDEX = ("commit", "event", "prior", "item", "state", "whole", "task", "origin", "label", "tag",
          "layout", "spec")  # fmt: skip


class LanceStore:
    """A ``MemoryStore`` in a Lance table, at a folder or an address such as s3://bucket/name.

    Unlike ``SqliteStore``: on an object store a writer does not wait for another, but raises
    StoreBusyError after its work; ``forget`` and ``compact`` there want to be the only writer; a
    reader of an old version is not waited for, but loses it; and nothing is overwritten in place:
    files are removed. An object does not cross a fork. Needs the extra ``lance``.
    """

    def __init__(self, path: str | Path, mode: Mode = "a", *, timeout: float = 30.0) -> None:
        if mode not in ("r", "a"):
            raise ValueError(f'mode must be "r" or "a", got {mode!r}')
        _lance()
        self._uri, self.mode, self.timeout = str(path), mode, timeout
        self.folder = None if "://" in self._uri else Path(path)
        self._pid, self._synced = os.getpid(), set[str]()
        self._view_: _View | None = self._open()
        if mode == "a" and self._view_.pending:
            with suppress(StoreBusyError, StoreReadOnlyError), self._locked() as view:
                self._finish(view)

    # ------------------------------------------------------------------- open

    @property
    def path(self) -> str:
        return self._uri

    def _open(self) -> _View:
        there = self.folder is None or (self.folder / "_versions").is_dir()
        if self.folder is not None and self.folder.is_file():
            raise StoreDamagedError(f"{self.folder} is a file, not a store; choose another name")
        if there:
            with suppress(FileNotFoundError), self._errors():
                return self._load()
        if self.mode == "r":
            raise FileNotFoundError(f"there is no store at {self.path}; open_store(path) makes one")
        lance = _lance()
        schema = _schema(FORMAT, secrets.token_hex(16))
        with self._errors():
            try:
                if self.folder is not None:
                    self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                lance.write_dataset(schema.empty_table(), self._uri, mode="create")
            except OSError as error:  # another process was faster: its store is used
                if "already exists" not in str(error):
                    raise
            self._sync()
            return self._load()

    def _load(self) -> _View:
        dataset = _lance().dataset(self._uri)
        metadata = {k.decode(): v.decode() for k, v in (dataset.schema.metadata or {}).items()}
        try:
            number, salt = int(metadata["lifelong"]), bytes.fromhex(metadata["salt"])
        except (KeyError, ValueError) as error:
            raise StoreDamagedError(
                f"{self.path} is a Lance table, but not a store of this library; choose another "
                "folder"
            ) from error
        if number > FORMAT:
            raise StoreVersionError(
                f"{self.path} has format {number}, and this lifelong reads up to {FORMAT}; upgrade "
                "lifelong"
            )
        if dataset.schema.names != _schema(FORMAT, "").names:
            raise StoreDamagedError(f"{self.path} was changed by another program; restore a copy")
        view = _View(dataset, salt)
        view.absorb(dataset.to_table(columns=list(_INDEX), scan_in_order=True))
        return view

    def _view(self) -> _View:
        """What was committed last."""
        if self._pid != os.getpid():
            raise StoreError(
                "a Lance store does not cross a fork: its threads stay behind; call open_store in "
                "the child, or start it by spawn"
            )
        if self._view_ is None:
            raise StoreError(f"the store at {self.path} is closed; open_store opens it again")
        with self._errors():
            if self._view_.dataset.latest_version != self._view_.dataset.version:
                self._view_ = self._load()
        return self._view_

    def close(self) -> None:
        """Give up the files; nothing is lost without it."""
        self._view_ = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LanceStore({self.path!r}, mode={self.mode!r})"

    # ------------------------------------------------------------ transactions

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Lance's errors as the library's, with what to do. Its panics are no ``Exception``s."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit, StoreError, FileNotFoundError):
            raise
        except BaseException as error:
            text = " ".join(str(error).split())
            foreign = type(error).__module__ in ("pyo3_runtime", "pyarrow.lib")
            if not foreign and not isinstance(error, OSError | RuntimeError | ValueError):
                raise
            raise self._explained(text) from error

    def _explained(self, text: str) -> Exception:
        low = text.lower()
        if "no space left" in low or "quota" in low:
            return StoreFullError(
                f"no room to write {self.path} ({text[:200]}). Nothing was changed; free some "
                "space and try again"
            )
        if "permission denied" in low or "read-only" in low or "accessdenied" in low:
            return StoreReadOnlyError(
                f"{self.path} cannot be written ({text[:200]}); change its permissions, or read "
                'it with open_store(path, "r")'
            )
        if "was not found" in low and "dataset at path" in low:
            return FileNotFoundError(f"there is no store at {self.path}")
        if self.folder is None and any(word in low for word in _UNREACHED):
            return StoreError(
                f"cannot reach {self.path} ({text[:300]}). Check the address, the network and the "
                "credentials, which are the environment's. Before you repeat a write, look at "
                "store.version: only the answer may be missing"
            )
        if "commit conflict" in low or "concurrent" in low:
            return StoreBusyError(
                f"another process was writing to {self.path}; nothing was changed, try again"
            )
        return StoreDamagedError(
            f"{self.path} cannot be read ({text[:300]}): bytes were changed or lost, or another "
            "process has just erased what was being read. Open it again; if that fails, restore "
            "it from a copy"
        )

    @contextmanager
    def _locked(self) -> Iterator[_View]:
        """The newest view, for the one writer."""
        if self.mode != "a":
            raise StoreReadOnlyError(
                f"the store at {self.path} was opened for reading; use open_store(path)"
            )
        if self.folder is None:
            yield self._view()
            return
        import fcntl

        try:
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreReadOnlyError(
                f"{self.folder} cannot be written ({error.strerror}); change its permissions, or "
                'read it with open_store(path, "r")'
            ) from error
        try:
            end = time.monotonic() + self.timeout
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise StoreBusyError(
                            f"another process has been writing to {self.path} for "
                            f"{self.timeout:g} s; nothing was changed. Try again, or "
                            "open_store(path, timeout=...)"
                        ) from None
                    time.sleep(0.01)
            yield self._view()
        finally:
            os.close(handle)

    @contextmanager
    def _writing(self, kind: str, message: str) -> Iterator[_Change]:
        """A new version: what is put into the change is committed at the end."""
        text = utf8(message, "the message")
        with self._locked() as view:
            change = _Change(view, kind, text)
            yield change
            self._commit(view, change)

    def _commit(self, view: _View, change: _Change) -> None:
        """Contents are on the disk before the commit that names them."""
        from lance import LanceDataset, LanceOperation
        from lance.fragment import write_fragments

        table = change.table(view.dataset.schema)
        with self._errors():
            fragments = write_fragments(table, view.dataset, schema=table.schema)
            self._sync()
            done = LanceDataset.commit(
                view.dataset, LanceOperation.Append(fragments), read_version=view.dataset.version
            )
            self._sync()
            if done.version == view.dataset.version + 1:
                view.dataset = done
                view.absorb(table.select(list(_INDEX)))
                return
            self._view_ = self._load()
            if change.commit not in self._view_.commits:  # somebody else's came between
                done.delete(f"commit = '{change.commit}'")
                raise StoreBusyError(
                    f"another process wrote to {self.path} at the same time; nothing was changed, "
                    "try again"
                )

    def _sync(self) -> None:
        """Flush what is new in a local folder: Lance itself flushes nothing."""
        if self.folder is None:
            return
        folders = set()
        for name in _OWN:
            for path in files.walk(self.folder / name):
                if str(path) not in self._synced:
                    with suppress(FileNotFoundError):
                        handle = os.open(path, os.O_RDONLY)
                        try:
                            os.fsync(handle)
                        finally:
                            os.close(handle)
                        folders.add(path.parent)
                        if path.suffix != ".json":  # the hint is written again and again
                            self._synced.add(str(path))
        for folder in folders | {self.folder}:
            files.sync(folder)

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
        that cannot be stored, ForgottenError for ids and inputs that were forgotten,
        StoreBusyError.
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
        with self._writing("append", message) as change:
            change.admit(marks_of(change.view.salt, memory, names, contents), readmit)
            heads = [change.spec(json.dumps(h)) for h in memory.heads]
            states = codec.encode_states(memory, heads, names, notes, each)
            for content, state in zip(contents, states, strict=True):
                change.insert(change.new_item(), state, content)
        return change.number

    def drop(self, which: Which, *, message: str = "") -> int:
        """See ``MemoryStore.drop``. Raises ValueError where no item of today is meant."""
        with self._writing("drop", message) as change:
            today = change.view.today
            items = self._chosen(change.view, which, change.number - 1)
            change.event["died"] = [today[item] for item in items]
        return change.number

    def restore(self, version: int, *, message: str = "") -> int:
        """See ``MemoryStore.restore``. What was forgotten stays so.

        Raises StoreVersionError for a version that is not kept.
        """
        with self._writing("restore", message) as change:
            view = change.view
            at = view.require(version)
            wanted, now = set(view.alive(at).values()), set(view.today.values())
            change.event |= {"died": sorted(now - wanted), "back": sorted(wanted - now)}
            if view.prior_of(at) != view.prior_of(change.number):
                change.event["prior"] = view.prior_of(at)
        return change.number

    def forget(
        self, which: Which, *, runs: Iterable[str | Path] = (), message: str = ""
    ) -> Forgotten:
        """Erase items from every version, and from every file of the store and of ``runs``.

        As ``SqliteStore.forget``, but for three things: every older version of the Lance table
        goes, so a reader that still has one open must open it again; files are removed, not
        overwritten, so an object store with versioning or soft delete must be told apart; and on
        an object store no other process may write meanwhile.

        Raises ValueError where no item is meant, or ``message`` names one.
        """
        runs = [Path(run) for run in runs]
        for run in runs:
            if not run.is_dir():
                raise FileNotFoundError(f"there is no folder {run}; pass the run's folder")
        changed: list[str] = []
        with self._locked() as view:
            change = _Change(view, "forget", utf8(message, "the message"))
            items = set(self._chosen(view, which, None))
            states = [state for state, place in view.place.items() if view.item[place] in items]
            rows = list(self._states(view, states))
            names = {state.name for state in rows}
            if mentions(message.encode(), names):
                raise ValueError(
                    "the message names an item that is to be forgotten, and would outlive it; "
                    "say it without the id"
                )
            places = frozenset((_whole(s.task), _whole(s.origin)) for s in rows)
            sources = [view.source[item] for item in sorted(items)]
            digests = self._take(view, sources, "digest")["digest"].to_pylist()
            match = scrub.Match(places, frozenset(digests))
            # All is read before anything is written. Files first: if a kill comes, the items are
            # still known and forget is called again.
            surveys = [scrub.survey(run, match) for run in runs]
            if self.folder is not None:
                surveys.append(scrub.survey(self.folder, match, self._is_mine))
            for found in surveys:
                changed += map(str, scrub.carry_out(found, match))
            if self.folder is not None:
                changed += self._remove_thumbnails(self.folder / THUMBNAILS, items)
            priors, influenced = self._forget_in_priors(view, change, set(states), places)
            touched = {n for life in view.lives if life[1] in items for n in life[2:]}
            messages = self._messages(view)
            blank = {n for n, text in messages.items() if n in touched or mentions(text, names)}
            change.event |= {
                "erased": sorted(items),
                "blank": sorted(blank),
                "tombstones": [h.hex() for h in tombstones_of(view.salt, names, match)],
            }
            self._commit(view, change)
            changed += self._finish(self._view())
        unseen = [path for found in surveys for path in found.foreign]
        foreign = tuple(dict.fromkeys(map(str, [*unseen, *self._foreign()])))
        return Forgotten(change.number, len(items), tuple(changed), priors, influenced, foreign)

    def compact(self, *, keep: int = 1) -> int:
        """See ``MemoryStore.compact``. Raises ValueError for ``keep`` below 1, StoreBusyError."""
        if keep < 1:
            raise ValueError(f"at least today's version is kept, got keep={keep}")
        with self._locked() as view:
            change = _Change(view, "compact", b"")
            oldest = max(view.oldest, change.number - keep)  # what was given up stays so
            effective = max((n for n, _ in view.priors if n <= oldest), default=0)
            lives = [x for x in view.lives if x[3] is None or x[3] > oldest]
            priors = [p for p in view.priors if p[0] >= effective]
            # A kernel in a prior has a row for each item, also of those that go now.
            alive = {life[0] for life in lives}
            new = {
                name: self._without(view, change, name, alive.__contains__)
                for name in {name for _, name in priors if name}
            }
            change.event |= {
                "oldest": oldest,
                "lives": lives,
                "priors": [(n, new.get(name or "")) for n, name in priors],
                "gone": sorted(view.tombstones.items()),
            }
            self._commit(view, change)
            self._finish(self._view())
        return change.number

    def _finish(self, view: _View) -> list[str]:
        """Delete what no version names, write its files again, and clean up; what was removed."""
        before = self._listing(view)
        alive, needed = ({life[k] for life in view.lives} for k in (0, 1))
        rows, commits = [], []
        for place, state in enumerate(view.state):
            if state is None:
                continue
            needs_input = view.whole[place] and view.item[place] in needed
            if state not in alive and not needs_input:
                rows.append(state)
        old = {e["commit"] for e in view.events if e["number"] < view.oldest}
        commits = sorted(old)
        blank = {e["commit"] for e in view.events if e["number"] in view.blank} | old
        named = {digest for _, digest in view.priors if digest}
        priors = sorted(set(view.prior_at) - named)
        parts = [
            *_in("state", rows),
            *_in("commit", commits, " AND event IS NOT NULL"),
            *_in("commit", sorted(blank), " AND message IS NOT NULL"),
            *_in("prior", priors),
            *_in("commit", sorted(view.void)),
        ]
        with self._errors():
            dataset = view.dataset
            for part in parts:
                dataset.delete(part)
            dataset.optimize.compact_files(materialize_deletions_threshold=0.0)
            dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
            self._sync()
            self._view_ = view = self._load()
        return sorted(before - self._listing(view))

    def _remove_thumbnails(self, folder: Path, items: set[int]) -> list[str]:
        if folder.is_symlink() or not folder.is_dir():
            return []
        gone = [p for p in files.walk(folder) if p.stem.isdecimal() and int(p.stem) in items]
        for path in gone:
            files.erase(path)
        return [str(path) for path in gone]

    def _listing(self, view: _View) -> set[str]:
        with self._errors():
            paths = _files(view.dataset)
        return {f"{self.path}/{path}" for path, _ in paths if path.startswith("data/")}

    # ------------------------------------------------------------------- priors

    def save_prior(self, prior: Prior, *, message: str = "", readmit: bool = False) -> int:
        """See ``MemoryStore.save_prior``, and ``SqliteStore.save_prior`` for what is kept.

        The rest of the prior is a row beside the items, named by digest. Raises as ``append``.
        """
        state = prior.state_dict()
        held: list[Memory] = []
        scrub.map_memories(state, lambda holder: held.append(memory_of(holder)))
        with self._writing("prior", message) as change:
            known = self._known(change.view)
            rows = [self._remember(change, memory, known, readmit) for memory in held]
            gone = known.states.difference(*rows)
            change.event["died"] = sorted(gone)
            numbers = iter(rows)
            refer = scrub.map_memories(state, lambda holder: referring(holder, next(numbers)))
            change.event["prior"] = change.put_prior(refer)
        return change.number

    def _known(self, view: _View) -> Today:
        items = sorted(view.today, reverse=True)
        states = [view.today[item] for item in items]
        rows = self._states(view, states)
        sources = self._take(view, [view.source[item] for item in items], "digest")["digest"]
        return Today(
            (content, s.task, s.origin, item, state, s.digest, s.name, s.note, s.scores)
            for content, s, item, state in zip(sources.to_pylist(), rows, items, states)
        )

    def _remember(self, change: _Change, memory: Memory, known: Today, readmit: bool) -> list[int]:
        """The states of a memory's items, in its order; what is not there yet is inserted."""
        contents = codec.encode_inputs(memory.inputs)
        places = zip(memory.task.tolist(), memory.origin.tolist(), strict=True)
        found = [
            known.take(codec.digest(layout.spec, data), codec.integer(t), codec.integer(o))
            for (layout, data), (t, o) in zip(contents, places, strict=True)
        ]
        names = [
            name if old is None else old.name
            for name, old in zip(default_ids(memory), found, strict=True)
        ]
        marks = marks_of(change.view.salt, memory, names, contents, [old is None for old in found])
        change.admit(marks, readmit)
        states = codec.encode_states(
            memory,
            [change.spec(json.dumps(head)) for head in memory.heads],
            names,
            ["" if old is None else old.note for old in found],
            [{} if old is None else old.scores for old in found],
        )
        result = []
        for content, old, state in zip(contents, found, states, strict=True):
            if old is None:
                result.append(change.insert(change.new_item(), state, content))
            elif old.digest == state.digest:
                result.append(old.state)
            else:
                result.append(change.insert(old.item, state, None))
        return result

    def _read_prior(self, view: _View, name: str) -> Any:
        if name not in view.prior_at:
            raise StoreDamagedError(
                f"a prior is missing from {self.path}; restore it from a copy. The memory can be "
                "read without it"
            )
        data = self._take(view, [view.prior_at[name]], "input")["input"][0].as_py()
        if hashlib.sha256(data).hexdigest() != name:
            raise StoreDamagedError(
                f"a prior in {self.path} is not what was written; restore it from a copy"
            )
        with tempfile.TemporaryDirectory() as folder:  # the reader of checkpoints wants a file
            path = checkpoint.write(Path(folder, "prior.safetensors"), data)
            return checkpoint.load(path or Path(folder, "prior.safetensors"), kind="store")

    def inputs(self, items: Sequence[int], *, decode: Decode | None = None) -> Inputs:
        """See ``MemoryStore.inputs``. Raises StoreDamagedError too."""
        view = self._view()
        gone = [item for item in items if item not in view.today or item not in view.source]
        if gone:
            raise served.missing(gone)
        sources = [view.source[item] for item in items]
        rows = self._take(view, sources, "input", "digest")
        found = codec.GatheringInputs(len(items))
        columns = (rows["input"].to_pylist(), rows["digest"].to_pylist())
        for place, data, digest in zip(sources, *columns, strict=True):
            layout = view.input_layout(place)
            require_digest(layout.spec, (data,), digest)
            found.put(layout, data)
        return found.inputs(decode)

    def serve(
        self,
        which: Where | Sequence[int] | None = None,
        *,
        decode: Decode | None = None,
        ahead: int = 2,
        workers: int = 1,
    ) -> Memory:
        """See ``MemoryStore.serve`` and ``SqliteStore.serve``."""
        view = self._view()
        return self._served(view, self._states_of(view, which, None), decode, ahead, workers)

    def _served(
        self, view: _View, states: Sequence[int], decode: Decode | None, ahead: int, workers: int
    ) -> Memory:
        opened = partial(LanceStore, served.place_of(self.path), "r", timeout=self.timeout)
        source = served.StoredInputs(opened, decode, workers)
        items = [view.item[view.place[state]] for state in states]
        layouts = {view.input_layout(view.source[item]).spec for item in items}
        if len(layouts) > 1:
            raise ValueError(codec.differ(*sorted(layouts)[:2]))

        def beliefs() -> Iterator[Memory]:
            for start in range(0, len(states), served.CHUNK):
                found = list(self._states(view, states[start : start + served.CHUNK]))
                yield codec.believed(served.no_inputs(len(found)), found, _Heads(view))

        return served.served(source, items, beliefs(), ahead)

    def load_prior(
        self, version: int | None = None, *, serve: bool = False, ahead: int = 2, workers: int = 1
    ) -> Prior:
        """See ``MemoryStore.load_prior`` and ``SqliteStore.load_prior``.

        Raises ValueError where that version has no prior, and for serving an older one than
        today's, StoreVersionError, StoreDamagedError.
        """
        view = self._view()
        at = view.require(version)
        if serve and at != view.newest:
            raise served.not_of_today(at)
        name = view.prior_of(at)
        if name is None:
            raise ValueError(
                f"version {at} has no prior; store.history() tells which have, and forget removes "
                "those of older versions"
            )
        alive = set(view.alive(at).values())

        def resolve(holder: dict[str, Any]) -> dict[str, Any]:
            refers = holder["memory"]
            rows = refers["rows"].tolist()
            keep = torch.tensor([row in alive for row in rows], dtype=torch.bool)
            state = dict(refers["empty"])
            if keep.any():
                kept = [row for row, stays in zip(rows, keep.tolist(), strict=True) if stays]
                found = (
                    served.unread_state(self._served(view, kept, None, ahead, workers))
                    if serve
                    else self._gather(view, kept, None).state_dict()
                )
                state = {
                    **found,
                    "head": refers["head"][keep],
                    "heads": refers["heads"],
                }
            resolved = {**holder, "memory": state}
            if "blocks" in holder and not keep.all():
                resolved["blocks"] = scrub.marginal(holder["blocks"], keep)
            return resolved

        try:
            state = scrub.map_memories(self._read_prior(view, name), resolve, is_reference)
            return Prior.from_state_dict(state)
        except (KeyError, TypeError) as error:
            raise StoreDamagedError(
                f"the prior cannot be read ({error!r}); upgrade lifelong, or use an older version"
            ) from error

    def _is_mine(self, path: Path) -> bool:
        """A file of the table's own, or a thumbnail."""
        return path.relative_to(self.path).parts[0] in (*_OWN, LOCK, THUMBNAILS)

    def _forget_in_priors(
        self, view: _View, change: _Change, erased: set[int], places: Set[tuple[int, int]]
    ) -> tuple[int, bool]:
        """How many older priors were given up, and whether today's held some of the items."""
        now = view.prior_of(change.number)
        older = len({digest for _, digest in view.priors if digest not in (None, now)})
        new = now
        if now is not None:
            new = self._without(view, change, now, lambda state: state not in erased, places)
        change.event["renamed"] = [now, new]
        return older, new != now

    def _without(
        self,
        view: _View,
        change: _Change,
        name: str,
        keeps: Callable[[int], bool],
        places: Set[tuple[int, int]] = frozenset(),
    ) -> str:
        """The name of a prior that has only those states; the same where it had no others.

        places: named by the members of its groups no more.
        """
        before = self._read_prior(view, name)
        state, _ = without_rows(before, keeps, places)
        return name if state is before else change.put_prior(state)

    # -------------------------------------------------------------------- read

    @property
    def version(self) -> int:
        """The newest version; 0 for an empty store."""
        return self._view().newest

    @property
    def identity(self) -> str:
        """See ``MemoryStore.identity``."""
        return identity_of(self._view().salt)

    @property
    def num_bytes(self) -> int:
        """Of the table's files."""
        view = self._view()
        with self._errors():
            return sum(size for _, size in _files(view.dataset))

    def __len__(self) -> int:
        return len(self._view().today)

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
        view = self._view()
        return self._gather(view, self._states_of(view, which, version), decode)

    def _states_of(
        self, view: _View, which: Where | Sequence[int] | None, version: int | None
    ) -> list[int]:
        """Of the items that ``memory`` means, in its order."""
        at = view.require(version)
        if which is None or isinstance(which, Where):
            return [s for _, s in self._matching(view, which, at)]
        alive = view.alive(at)
        missing = [item for item in which if item not in alive]
        if missing:
            raise ValueError(f"version {at} has no items {missing[:5]}; store.items() lists them")
        return [alive[item] for item in which]

    def batch(self, index: Tensor | Sequence[int], *, decode: Decode | None = None) -> Memory:
        """See ``MemoryStore.batch``. Raises ValueError beyond the end, and as ``memory``."""
        places = index.tolist() if isinstance(index, Tensor) else list(index)
        view = self._view()
        live = view.live
        if places and not (min(places) >= 0 and max(places) < len(live)):
            raise ValueError(
                f"positions must lie in [0, {len(live)}), got {min(places)} to {max(places)}"
            )
        return self._gather(view, [live[i] for i in places], decode)

    def draw(
        self, n: int, generator: torch.Generator | None = None, *, decode: Decode | None = None
    ) -> Memory:
        """See ``MemoryStore.draw``. Raises ValueError for n below 1, and as ``memory``."""
        if n < 1:
            raise ValueError(f"a batch needs at least one item, got n={n}")
        size = len(self)
        if n >= size:
            return self.batch(range(size), decode=decode)
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        places = torch.arange(n, dtype=torch.float64).add_(u).mul_(size / n)
        drawn = self.batch(places.long().clamp_(max=size - 1), decode=decode)
        return drawn.scaled(size / n)

    def _take(self, view: _View, places: Sequence[int], *columns: str) -> Any:
        """Those rows in that order."""
        with self._errors():
            return view.dataset.take(list(places), columns=list(columns))

    def _gather(self, view: _View, states: Sequence[int], decode: Decode | None) -> Memory:
        gathering = codec.Gathering(len(states))
        places = [view.place[state] for state in states]
        sources = [view.source.get(view.item[place], -1) for place in places]
        if -1 in sources:
            raise StoreDamagedError(f"an input is missing from {self.path}; restore a copy")
        if places == sources:
            rows = inputs = self._take(view, places, "row", "check", "input", "digest")
        else:
            rows = self._take(view, places, "row", "check")
            inputs = self._take(view, sources, "input", "digest")
        for place, source, row, check, data, digest in zip(
            places,
            sources,
            rows["row"].to_pylist(),
            rows["check"].to_pylist(),
            inputs["input"].to_pylist(),
            inputs["digest"].to_pylist(),
            strict=True,
        ):
            layout = view.input_layout(source)
            require_digest(layout.spec, (data,), digest)
            gathering.put(layout, data, view.unpacked(place, row, check))
        return gathering.memory(_Heads(view), decode)

    def _states(self, view: _View, states: Sequence[int]) -> Iterator[codec.State]:
        """Those states without their inputs, a page at a time."""
        for start in range(0, len(states), 4096):
            places = [view.place[state] for state in states[start : start + 4096]]
            rows = self._take(view, places, "row", "check")
            for place, row, check in zip(
                places, rows["row"].to_pylist(), rows["check"].to_pylist()
            ):
                yield view.unpacked(place, row, check)

    def raw(self, item: int) -> Any:
        """See ``MemoryStore.raw``. Raises ValueError for an item that no kept version has."""
        view = self._view()
        if item not in view.source or item not in {life[1] for life in view.lives}:
            raise ValueError(f"no version has an item {item}; store.items() lists them")
        place = view.source[item]
        row = self._take(view, [place], "input", "digest").to_pylist()[0]
        layout = view.input_layout(place)
        require_digest(layout.spec, (row["input"],), row["digest"])
        return layout.value(row["input"])

    def items(
        self,
        where: Where | None = None,
        *,
        version: int | None = None,
        after: int = 0,
        limit: int = 1000,
    ) -> list[Item]:
        """See ``MemoryStore.items``. Raises StoreVersionError, StoreDamagedError."""
        view = self._view()
        pairs = self._matching(view, where, view.require(version), after=after, limit=limit)
        since: dict[int, int] = {}
        for _, item, born, _ in view.lives:
            since[item] = min(born, since.get(item, born))
        states = self._states(view, [state for _, state in pairs])
        return [
            self._item(view, item, state, code, since[item])
            for (item, state), code in zip(pairs, states, strict=True)
        ]

    def _item(self, view: _View, number: int, row: int, state: codec.State, since: int) -> Item:
        source = view.source[number]
        inputs = view.input_layout(source)
        return Item(
            item=number,
            id=codec.decoded(state.name),
            task=_whole(state.task),
            origin=_whole(state.origin),
            label=codec.label_of(state.layout, state.label),
            head=view.head(_whole(state.head)),
            soft_weight=codec.unpack(">d", state.soft),
            hard_weight=codec.unpack(">d", state.hard),
            scores=codec.parse(state.scores),
            note=codec.decoded(state.note),
            kind=inputs.kind,
            shape=inputs.shape,
            num_bytes=view.size[source],
            since=since,
            layout=f"[{inputs.spec}, {state.layout.spec}]",
        )

    def count(self, where: Where | None = None, *, version: int | None = None) -> int:
        """See ``MemoryStore.count``. Raises StoreVersionError."""
        view = self._view()
        return len(self._matching(view, where, view.require(version)))

    def _matching(
        self,
        view: _View,
        where: Where | None,
        version: int | None,
        *,
        after: int = 0,
        limit: int | None = None,
    ) -> list[tuple[int, int]]:
        """(item, state) by item's number; of any version that is kept where it is None."""
        if version is None:
            pairs = sorted({(life[1], life[0]) for life in view.lives})
        else:
            pairs = sorted(view.alive(version).items())
        pairs = [pair for pair in pairs if pair[0] > after]
        if where is not None:
            pairs = [p for p in pairs if view.fits(where, view.place[p[1]], view.source[p[0]])]
            if where.text is not None:
                pairs = self._with_text(view, pairs, utf8(where.text, "the text"))
        return pairs if limit is None else pairs[:limit]

    def _with_text(
        self, view: _View, pairs: list[tuple[int, int]], text: bytes
    ) -> list[tuple[int, int]]:
        found = []
        for pair, state in zip(pairs, self._states(view, [s for _, s in pairs]), strict=True):
            source = view.source[pair[0]]
            hit = text in state.name or text in state.note
            if not hit and view.input_layout(source).kind == "text":
                hit = text in self._take(view, [source], "input")["input"][0].as_py()
            if hit:
                found.append(pair)
        return found

    def _chosen(self, view: _View, which: Which, version: int | None) -> list[int]:
        """The items that are meant, of a version or (None) of any; ValueError where none is."""
        where = "any version" if version is None else "today's memory"
        if isinstance(which, Where):
            found = sorted({item for item, _ in self._matching(view, which, version)})
            if not found:
                raise ValueError(f"no item of {where} has {which}; store.items() lists them")
            return found
        if isinstance(which, (str, bytes)):
            raise TypeError(f"expected ids in a list, got {which!r}; pass [{which!r}]")
        wanted = set(which)
        if not wanted:
            raise ValueError("no ids were given; pass at least one, or a Where")
        odd = [w for w in wanted if type(w) not in (int, str)]
        if odd:
            raise TypeError(f"expected item numbers (int) or ids (str), got {odd[0]!r}")
        names = {name: utf8(name, "an id") for name in wanted if isinstance(name, str)}
        tags = {tag_of(view.salt, raw) for raw in names.values()}
        alive = {life[1] for life in view.lives} if version is None else set(view.today)
        likely = [s for s, p in view.place.items() if view.tag[p] in tags and view.item[p] in alive]
        by_name: dict[bytes, set[int]] = {}
        for state, code in zip(likely, self._states(view, likely), strict=True):
            by_name.setdefault(code.name, set()).add(view.item[view.place[state]])
        missing = [n for n in wanted if isinstance(n, int) and n not in alive]
        missing += [n for n, raw in names.items() if raw not in by_name]
        if missing:
            raise ValueError(
                f"{where} has no items {missing[:5]}; store.items() lists them, and "
                "store.forgotten(id) tells whether one was forgotten"
            )
        numbers = {n for n in wanted if isinstance(n, int)}
        return sorted(numbers.union(*(by_name[raw] for raw in names.values())))

    def _messages(self, view: _View) -> dict[int, bytes]:
        """By version. Raises StoreDamagedError where one is not what was written."""
        with self._errors():
            rows = view.dataset.to_table(
                columns=["commit", "message", "check"], filter="message IS NOT NULL"
            ).to_pylist()
        number = {e["commit"]: e["number"] for e in view.events}
        found = {}
        for row in rows:
            if hashlib.sha256(row["message"]).digest() != row["check"]:
                raise StoreDamagedError("a message is not what was written; call store.verify()")
            if row["commit"] in number:
                found[number[row["commit"]]] = row["message"]
        return found

    def find(self, which: Which) -> list[int]:
        """See ``MemoryStore.find``."""
        return self._chosen(self._view(), which, None)

    def history(self) -> list[Version]:
        """See ``MemoryStore.history``."""
        view = self._view()
        messages = self._messages(view)
        born: dict[int, set[int]] = {}
        died: dict[int, set[int]] = {}
        for _, item, start, end in view.lives:
            born.setdefault(start, set()).add(item)
            died.setdefault(end, set()).add(item)
        priors = {n for n, digest in view.priors if digest}
        result = []
        for event in view.events:
            n = event["number"]
            if n < view.oldest:
                continue
            came, went = born.get(n, set()), died.get(n, set())
            text = "" if n in view.blank else messages.get(n, b"").decode()
            saved = n in priors and event["kind"] == "prior"
            size = len(view.alive(n))
            counts = (len(came - went), len(went - came), size)
            held = view.prior_of(n) is not None
            result.append(Version(n, event["time"], event["kind"], text, *counts, saved, held))
        return result

    def diff(self, a: int, b: int) -> Diff:
        """See ``MemoryStore.diff``. Raises StoreVersionError."""
        view = self._view()
        one, two = (view.alive(view.require(v)) for v in (a, b))
        return Diff(
            a,
            b,
            added=tuple(sorted(two.keys() - one.keys())),
            dropped=tuple(sorted(one.keys() - two.keys())),
            changed=tuple(sorted(i for i in one.keys() & two.keys() if one[i] != two[i])),
        )

    def forgotten(self, id: str) -> Tombstone | None:
        """See ``MemoryStore.forgotten``."""
        view = self._view()
        number = view.tombstones.get(hash_id(view.salt, utf8(id, "an id")).hex())
        if number is None:
            return None
        times = {e["number"]: e["time"] for e in view.events}
        return Tombstone(number, times.get(number))  # type: ignore[arg-type]

    def verify(self) -> Verification:
        """See ``MemoryStore.verify``: digests of all rows, since Lance has none."""
        view = self._view()
        found: list[Finding] = []
        alive = {life[0] for life in view.lives}
        lost = [s for s in alive if s not in view.place]
        found += [Finding(f"state {s}", "is in a version, and its row is missing") for s in lost]
        for state, place in view.place.items():
            number = view.item[place]
            try:
                if state in alive:
                    list(self._states(view, [state]))
                    self.raw(number)
            except (StoreDamagedError, ValueError, KeyError) as error:
                found.append(Finding(f"item {number}", f"is not what was written ({error})"))
        for name in {digest for _, digest in view.priors if digest}:
            try:
                self._read_prior(view, name)
            except ValueError as error:
                found.append(Finding(f"prior {name[:8]}", str(error)))
        try:
            self._messages(view)
        except StoreDamagedError as error:
            found.append(Finding("messages", str(error)))
        if view.pending:
            found.append(Finding("table", "erasing was not finished: open it for writing", False))
        for path in self._foreign():
            place = path.relative_to(self.path)
            found.append(Finding(str(place), "is not the store's", damage=False))
        with self._errors():
            number_of_files = len(_files(view.dataset))
        return Verification(view.newest, len(view.today), number_of_files, tuple(found))

    def _foreign(self) -> Iterator[Path]:
        if self.folder is None:
            return
        for path in sorted(self.folder.rglob("*")):
            top = path.relative_to(self.folder).parts[0]
            other = path.is_file() and top not in (*_OWN, LOCK, THUMBNAILS)
            if path.is_symlink() or (other and checkpoint.kind_of(path) not in scrub.KINDS):
                yield path

    def export(self, path: str | Path, *, version: int | None = None) -> Path:
        """See ``MemoryStore.export``.

        Raises ValueError for another suffix, and for Parquet in the store's folder, which
        ``forget`` could not write again; FileExistsError for a file that is no export; ImportError
        without pyarrow.
        """
        path = Path(path)
        inside = self.folder is not None and self.folder.resolve() in path.resolve().parents
        if inside and path.suffix != ".safetensors":
            raise ValueError(
                f"{path} lies in the store; choose a .safetensors, which forget finds there, or "
                "another folder"
            )
        return write_export(self, path, version)


# What is held in memory ---------------------------------------------------------------------------


class _View:
    """A version of the table, and the state of things that its events amount to.

    Columns have one entry for each row; lives are [state, item, born, died].
    """

    def __init__(self, dataset: Any, salt: bytes) -> None:
        self.dataset, self.salt = dataset, salt
        self.item: list[Any] = []  # None but for items
        self.state: list[Any] = []
        self.whole: list[bool] = []
        self.task: list[int] = []
        self.origin: list[int] = []
        self.label: list[float | None] = []
        self.tag: list[int] = []
        self.layout: list[int] = []
        self.spec: list[int] = []
        self.place: dict[int, int] = {}  # of a state
        self.source: dict[int, int] = {}  # of an item: the row with its input
        self.size = _Sizes(self)
        self.prior_at: dict[str, int] = {}
        self.events: list[dict[str, Any]] = []
        self.commits: set[str] = set()
        self.void: set[str] = set()
        self.lives: list[list[Any]] = []
        self.priors: list[tuple[int, str | None]] = []
        self.tombstones: dict[str, int] = {}
        self.blank: set[int] = set()
        self.oldest = 0
        self.specs: list[str] = []
        self.next = (1, 1)
        self._open: dict[int, list[Any]] = {}  # a state's life that has not ended
        self._cache: dict[Any, Any] = {}

    @property
    def newest(self) -> int:
        return self.events[-1]["number"] if self.events else 0

    @property
    def pending(self) -> bool:
        """Whether what was erased may still lie in files."""
        last = self.events[-1]["kind"] if self.events else ""
        return last in ("forget", "compact") and len(self.dataset.versions()) > 1

    def absorb(self, table: Any) -> None:
        """Rows that come after those that are known."""
        start = len(self.item)
        column = {name: table[name].to_pylist() for name in _INDEX}
        for name in ("item", "state", "whole", "task", "origin", "label", "tag", "layout", "spec"):
            getattr(self, name).extend(column[name])
        came: list[tuple[int, int, str]] = []
        for i, (commit, event, prior) in enumerate(
            zip(column["commit"], column["event"], column["prior"])
        ):
            state, item = column["state"][i], column["item"][i]
            if state is not None:
                self.place[state] = start + i
                if column["whole"][i]:
                    self.source[item] = start + i
                came.append((state, item, commit))
            elif prior is not None:
                self.prior_at[prior] = start + i
            elif event is not None:
                self._apply(commit, codec.parse(event), came)
                came = []
        self._cache.clear()

    def _apply(
        self, commit: str, event: dict[str, Any], came: Iterable[tuple[int, int, str]]
    ) -> None:
        try:
            if self.events and event["parent"] != self.events[-1]["commit"]:
                self.void.add(commit)
                return
            number = event["number"]
            self.events.append({**event, "commit": commit})
            self.commits.add(commit)
            self.specs, self.next = event["specs"], tuple(event["next"])
            # What was erased or given up since then is no longer there to die or to come back.
            for state in event.get("died", ()):
                if state in self._open:
                    self._open.pop(state)[3] = number
            again = (state for state in event.get("back", ()) if state in self.place)
            back = [(state, self.item[self.place[state]], commit) for state in again]
            for state, item, of in (*came, *back):
                if of == commit:
                    self._open[state] = life = [state, item, number, None]
                    self.lives.append(life)
            if "prior" in event:
                self.priors.append((number, event["prior"]))
            if "renamed" in event:
                old, new = event["renamed"]
                self.priors = [(n, new if digest == old else None) for n, digest in self.priors]
            if "lives" in event:
                self.lives, self.oldest = event["lives"], event["oldest"]
                self.priors = [tuple(pair) for pair in event["priors"]]
                self.tombstones = dict(event["gone"])
            if "erased" in event:
                erased = set(event["erased"])
                self.lives = [life for life in self.lives if life[1] not in erased]
                self.blank |= set(event["blank"])
                self.tombstones |= dict.fromkeys(event["tombstones"], number)
            for mark in event.get("readmitted", ()):
                self.tombstones.pop(mark, None)
            if "lives" in event or "erased" in event:
                self._open = {life[0]: life for life in self.lives if life[3] is None}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise StoreDamagedError(
                f"a version of the store cannot be read ({error!r}); restore it from a copy"
            ) from error

    @property
    def today(self) -> dict[int, int]:
        """item -> state"""
        if "today" not in self._cache:
            self._cache["today"] = {life[1]: life[0] for life in self._open.values()}
        return self._cache["today"]

    @property
    def live(self) -> list[int]:
        """Today's states by item's number."""
        if "live" not in self._cache:
            self._cache["live"] = [state for _, state in sorted(self.today.items())]
        return self._cache["live"]

    def alive(self, version: int) -> dict[int, int]:
        """item -> state"""
        if version == self.newest:
            return self.today
        return {
            item: state
            for state, item, born, died in self.lives
            if born <= version and (died is None or died > version)
        }

    def require(self, version: int | None) -> int:
        if version is None:
            return self.newest
        if not self.oldest <= version <= self.newest:
            raise StoreVersionError(
                f"there is no version {version}: {self.oldest} to {self.newest} are kept; "
                "store.history() lists them"
            )
        return version

    def prior_of(self, version: int) -> str | None:
        return next((d for n, d in reversed(self.priors) if n <= version), None)

    def input_layout(self, place: int) -> codec.InputLayout:
        return self._layout(codec.InputLayout, self.layout[place])

    def state_layout(self, place: int) -> codec.StateLayout:
        return self._layout(codec.StateLayout, self.spec[place])

    def _layout(self, kind: Any, number: int) -> Any:
        if (kind, number) not in self._cache:
            self._cache[kind, number] = kind.of(self._spec(number))
        return self._cache[kind, number]

    def _spec(self, number: int) -> str:
        if not 0 <= number < len(self.specs):
            raise StoreDamagedError(f"layout {number} is missing; call store.verify()")
        return self.specs[number]

    def head(self, number: int) -> Any:
        head = codec.parse(self._spec(number))
        return None if head is None else tuple(head)

    def unpacked(self, place: int, row: bytes, check: bytes) -> codec.State:
        """A packed state, checked."""
        layout = self.state_layout(place)
        try:
            sizes = struct.unpack(">10I", row[:40])
        except struct.error as error:
            raise StoreDamagedError("a row cannot be read; call store.verify()") from error
        columns, start = [], 40
        for size in sizes:
            columns.append(row[start : start + size])
            start += size
        require_digest(layout.spec, columns, check)
        return codec.State.of(layout, columns)

    def fits(self, where: Where, place: int, source: int) -> bool:
        """All that ``where`` says but for the text."""
        if where.task is not None and self.task[place] != where.task:
            return False
        if where.origin is not None and self.origin[place] != where.origin:
            return False
        if where.kind is not None and self.input_layout(source).kind != where.kind:
            return False
        if where.label is None:
            return True
        dtype, label = self.state_layout(place).label.dtype, self.label[place]
        if label is None:
            return False
        return label == where.label or (
            dtype.is_floating_point and torch.tensor(where.label).to(dtype).item() == label
        )


class _Heads(dict[int, Any]):
    """Heads by the store's number, read when they are first asked for."""

    def __init__(self, view: _View) -> None:
        self._view = view

    def __missing__(self, number: int) -> Any:
        self[number] = head = self._view.head(number)
        return head


class _Sizes:
    """Bytes of the input in a row."""

    def __init__(self, view: _View) -> None:
        self._view = view

    def __getitem__(self, place: int) -> int:
        layout = self._view.input_layout(place)
        if layout.kind in ("tensor", "dict"):
            return sum(column.num_bytes for column in layout.columns.values())
        return len(self._view.dataset.take([place], columns=["input"])["input"][0].as_py())


@dataclass
class _Change:
    """A version in the making: its event and its rows."""

    view: _View
    kind: str
    message: bytes

    def __post_init__(self) -> None:
        self.commit, self.number = secrets.token_hex(16), self.view.newest + 1
        self.rows: list[dict[str, Any]] = []
        self.specs, (self._item, self._state) = list(self.view.specs), self.view.next
        self._known = {spec: i for i, spec in enumerate(self.specs)}
        self.event: dict[str, Any] = {}

    def spec(self, spec: str) -> int:
        if spec not in self._known:
            self._known[spec] = len(self.specs)
            self.specs.append(spec)
        return self._known[spec]

    def new_item(self) -> int:
        self._item += 1
        return self._item - 1

    def insert(
        self, item: int, state: codec.State, content: tuple[codec.InputLayout, bytes] | None
    ) -> int:
        """The number of the state; content: None where the item has its input already."""
        label = codec.label_of(state.layout, state.label)
        row = {
            "commit": self.commit,
            "item": item,
            "state": self._state,
            "whole": content is not None,
            "task": _whole(state.task),
            "origin": _whole(state.origin),
            "label": float(label) if isinstance(label, int | float) else None,
            "tag": tag_of(self.view.salt, state.name),
            "spec": self.spec(state.layout.spec),
            "row": struct.pack(">10I", *map(len, state.columns)) + b"".join(state.columns),
            "check": state.digest,
        }
        if content is not None:
            layout, data = content
            row |= {
                "layout": self.spec(layout.spec),
                "digest": codec.digest(layout.spec, data),
                "input": data,
            }
        self.rows.append(row)
        self._state += 1
        return self._state - 1

    def admit(self, marks: Iterable[Mark], readmit: bool) -> None:
        """Refuse what was forgotten; with ``readmit`` take its tombstones away."""
        tombstones = self.view.tombstones
        for mark in marks if tombstones else ():
            known = mark.hash.hex() in tombstones
            if known and readmit:
                self.event.setdefault("readmitted", []).append(mark.hash.hex())
            elif known and mark.refused:
                raise forgotten_error(mark, tombstones[mark.hash.hex()])

    def put_prior(self, state: Any) -> str:
        """Its name."""
        data = checkpoint.dumps(state, kind="store")
        name = hashlib.sha256(data).hexdigest()
        if name not in self.view.prior_at:
            self.rows.append({"commit": self.commit, "prior": name, "input": data})
        return name

    def table(self, schema: Any) -> Any:
        import pyarrow as pa

        event = {
            "number": self.number,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": self.kind,
            "parent": self.view.events[-1]["commit"] if self.view.events else "",
            "next": [self._item, self._state],
            "specs": self.specs,
            **self.event,
        }
        check = hashlib.sha256(self.message).digest()
        words = {"commit": self.commit, "message": self.message, "check": check}
        last = {"commit": self.commit, "event": json.dumps(event)}
        rows = [*self.rows, *([words] if self.message else []), last]
        columns = [pa.array([r.get(f.name) for r in rows], f.type) for f in schema]
        return pa.Table.from_arrays(columns, schema=schema)


def _schema(number: int, salt: str) -> Any:
    import pyarrow as pa

    columns = {
        "commit": pa.string(), "event": pa.string(), "prior": pa.string(),
        "message": pa.binary(), "item": pa.int64(), "state": pa.int64(), "whole": pa.bool_(),
        "task": pa.int64(), "origin": pa.int64(), "label": pa.float64(), "tag": pa.int64(),
        "layout": pa.int64(), "spec": pa.int64(), "row": pa.binary(), "check": pa.binary(),
        "digest": pa.binary(), "input": pa.large_binary(),
    }  # fmt: skip
    return pa.schema(list(columns.items()), {"lifelong": str(number), "salt": salt})


def _lance() -> Any:
    try:
        import lance
    except ImportError as error:
        raise ImportError(
            "a store on Lance needs pylance: pip install lifelong[lance]; a folder without .lance "
            "in its name needs nothing"
        ) from error
    return lance


def _files(dataset: Any) -> list[tuple[str, int]]:
    """(path, bytes) of the table's files."""
    found = []
    for batch in dataset.all_files():
        rows = batch.to_pydict()
        found += zip(rows["path"], rows["size_bytes"])
    return found


def _in(column: str, values: Sequence[int | str], more: str = "") -> Iterator[str]:
    """Conditions, a thousand values each. The values are numbers and hexadecimal words."""
    for start in range(0, len(values), 1000):
        part = ", ".join(repr(v) for v in values[start : start + 1000])
        yield f"{column} IN ({part}){more}"


def _whole(data: bytes) -> int:
    return codec.unpack(">q", data)

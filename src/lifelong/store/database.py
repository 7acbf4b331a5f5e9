"""A store's SQLite file: opened with distrust, one writer at a time, every error with what to do.

The file's schema must be a store's to the letter, so nothing in it can run (triggers, views); the
names of files never come out of it. Its log is read by a connection that cannot write first, since
SQLite gives up damaged ends of it silently; how many versions there must be stands in a file
of its own.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from ..errors import (
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreVersionError,
)
from . import files
from .base import Mode

FORMAT = 1
APPLICATION = 0x11FE1096  # in the file's header: a store's, and of nobody else
DATABASE, GUARD = "memory.sqlite", "memory.version"
_PAGE = 65536
_CHECKPOINT = 128  # pages in the log after which SQLite writes them into the database
_CACHE = 65536  # KiB of pages

# The contents, then what says when they are there. Each row of `state` is what is believed of an
# item from some version on. Names, numbers and labels are blobs of fixed length, so that zeros
# take exactly their place. Contents have digests; each column of the other tables stands in an
# index too, so that SQLite's integrity check finds a changed byte there.
TABLES = {
    "content": "(id INTEGER PRIMARY KEY, layout INTEGER, digest BLOB, input BLOB)",
    "state": (
        "(id INTEGER PRIMARY KEY, item INTEGER, layout INTEGER, tag INTEGER, digest BLOB, "
        "name BLOB, task BLOB, origin BLOB, head BLOB, soft BLOB, hard BLOB, scores BLOB, "
        "note BLOB, label BLOB, reference BLOB)"
    ),
    "version": "(number INTEGER PRIMARY KEY, time TEXT, kind TEXT, digest BLOB, message BLOB)",
    "life": "(state INTEGER, item INTEGER, born INTEGER, died INTEGER)",
    "layout": "(id INTEGER PRIMARY KEY, spec TEXT)",
    "prior": "(version INTEGER PRIMARY KEY, digest BLOB)",
    "tombstone": "(hash BLOB PRIMARY KEY, version INTEGER) WITHOUT ROWID",
    "meta": "(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
}
INDICES = {
    "state_item": "ON state(item)",
    "state_tag": "ON state(tag)",
    "life_item": "ON life(item, state, born, died)",
    "life_died": "ON life(died)",
    "life_today": "ON life(item, state) WHERE died IS NULL",
    "layout_spec": "ON layout(spec)",
    "prior_digest": "ON prior(digest)",
    "tombstone_version": "ON tombstone(version)",
    "meta_value": "ON meta(value)",
}


class Database:
    """The file, the connection to it, and its transactions; see ``SqliteStore``."""

    def __init__(self, path: str | Path, mode: Mode = "a", *, timeout: float = 30.0) -> None:
        if mode not in ("r", "a"):
            raise ValueError(f'mode must be "r" or "a", got {mode!r}')
        self.folder, self.mode, self.timeout = Path(path), mode, timeout
        self._con: sqlite3.Connection | None = None
        self._pid = 0
        self._open()

    @property
    def path(self) -> str:
        return str(self.folder)

    @property
    def _database(self) -> Path:
        return self.folder / DATABASE

    def _open(self) -> None:
        if self.mode == "a":
            self._create()
        elif not self._database.exists() and not (self.folder / GUARD).exists():
            raise FileNotFoundError(
                f"there is no store at {self.folder}; open_store(path) makes one"
            )
        names = [DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", GUARD]
        there = [files.require_plain(self.folder / name) for name in names]
        known = self._guard() or 0
        size = self._database.stat().st_size if there[0] else 0
        if size == 0:
            raise StoreDamagedError(
                f"{self._database} is missing or empty, and the store had {known} versions; "
                "restore the file from a copy"
            )
        with self._errors():
            # By a connection that cannot write: closing a writer would remove a damaged log.
            probe = self._connect("ro")
            try:
                self._require_ours(probe)
                self._require_length(probe, size)
                found = newest(probe)
                if found < known:
                    raise StoreDamagedError(
                        f"{self._database}-wal is damaged or missing: the database ends with "
                        f"version {found}, and version {known} was committed. Nothing was "
                        "changed; put the file back from a copy, or remove memory.version to go "
                        f"on from version {found}"
                    )
                if self.mode == "a":
                    self._require_rights()
                self._con = probe if self.mode == "r" else self._connect("rw")
            finally:
                if self._con is not probe:
                    probe.close()
            self._pid = os.getpid()

    def _create(self) -> None:
        """An empty database where there is none, in one step: whole or not at all."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreReadOnlyError(
                f"cannot make the folder {self.folder} ({error.strerror}); choose another"
            ) from error
        if os.path.lexists(self._database) or (self._guard() or 0) > 0:
            return
        temporary = self.folder / f".{DATABASE}.{secrets.token_hex(8)}"
        with self._errors():
            try:
                # Its user's alone, as the files of priors are; SQLite makes -wal and -shm like it.
                os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
                con = sqlite3.connect(temporary, isolation_level=None)
                try:
                    con.execute(f"PRAGMA page_size = {_PAGE}")
                    con.execute("PRAGMA auto_vacuum = INCREMENTAL")
                    con.execute("PRAGMA journal_mode = WAL")
                    con.execute("BEGIN")
                    con.execute(f"PRAGMA application_id = {APPLICATION}")
                    con.execute(f"PRAGMA user_version = {FORMAT}")
                    for name, columns in TABLES.items():
                        con.execute(f"CREATE TABLE {name}{columns}")
                    for name, columns in INDICES.items():
                        con.execute(f"CREATE INDEX {name} {columns}")
                    start = [("salt", secrets.token_bytes(16)), ("item", 1), ("state", 1)]
                    con.executemany("INSERT INTO meta VALUES (?, ?)", start)
                    con.execute("COMMIT")
                finally:
                    con.close()
                with suppress(FileExistsError):  # another process was faster: its store is used
                    _place(temporary, self._database)
            except OSError as error:
                raise StoreReadOnlyError(
                    f"cannot make {self._database} ({error.strerror}); choose another folder"
                ) from error
            finally:
                for name in ("", "-wal", "-shm", "-journal"):
                    Path(f"{temporary}{name}").unlink(missing_ok=True)
        files.sync(self.folder)

    def _connect(self, mode: str) -> sqlite3.Connection:
        address = f"file:{quote(str(self._database.absolute()))}?mode={mode}"
        log = Path(f"{self._database}-wal")
        if mode == "ro" and _fixed(self.folder) and not (log.exists() and log.stat().st_size):
            address += "&immutable=1"  # SQLite could make no -shm there, and nobody writes
        con = sqlite3.connect(address, uri=True, isolation_level=None, timeout=self.timeout)
        try:
            con.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            for pragma in (
                "trusted_schema = OFF",
                "cell_size_check = ON",
                "temp_store = MEMORY",  # a temporary file would hold contents
                "synchronous = FULL",
                "secure_delete = ON",
                f"cache_size = -{_CACHE}",
                f"wal_autocheckpoint = {_CHECKPOINT}",
                f"query_only = {'ON' if mode == 'ro' else 'OFF'}",
            ):
                con.execute(f"PRAGMA {pragma}").fetchall()
        except BaseException:
            con.close()
            raise
        return con

    def _require_ours(self, con: sqlite3.Connection) -> None:
        """The header and the schema are those of a store: no triggers, no views, nothing else."""
        ours = con.execute("PRAGMA application_id").fetchone()[0] == APPLICATION
        version = con.execute("PRAGMA user_version").fetchone()[0]
        if ours and version > FORMAT:
            raise StoreVersionError(
                f"{self._database} has format {version}, and this lifelong reads up to {FORMAT}; "
                "upgrade lifelong"
            )
        rows = con.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL")
        found = {(kind, name, str(sql).replace('"', "")) for kind, name, sql in rows}
        expected = {("table", n, f"CREATE TABLE {n}{c}") for n, c in TABLES.items()}
        expected |= {("index", n, f"CREATE INDEX {n} {c}") for n, c in INDICES.items()}
        if not ours or version < 1 or found != expected:
            odd = sorted(f"{kind} {name}" for kind, name, _ in found ^ expected)
            raise StoreDamagedError(
                f"{self._database} is not a store of this library, or was changed by another "
                f"program ({', '.join(odd)[:200] or 'its header'}); choose another folder, or "
                "restore it from a copy"
            )

    def _require_rights(self) -> None:
        """SQLite would open what cannot be written for reading, and fail at the first write."""
        for path in (self.folder, self._database):
            if not os.access(path, os.W_OK):
                raise StoreReadOnlyError(
                    f"{path} cannot be written; change its permissions, or read it with "
                    'open_store(path, "r")'
                )

    def _require_length(self, con: sqlite3.Connection, size: int) -> None:
        pages = con.execute("PRAGMA page_count").fetchone()[0]
        log = Path(f"{self._database}-wal")
        if size < pages * _PAGE and not (log.exists() and log.stat().st_size):
            raise StoreDamagedError(
                f"{self._database} is truncated: {size:,} bytes of {pages * _PAGE:,}; restore it "
                "from a copy"
            )

    @property
    def _db(self) -> sqlite3.Connection:
        if self._pid != os.getpid() and self._con is not None:
            # A connection must not cross a fork, nor be closed there: the parent's locks would go.
            _OF_PARENTS.append(self._con)
            self._con = None
            self._open()
        if self._con is None:
            raise StoreError(f"the store at {self.folder} is closed; open_store opens it again")
        return self._con

    def close(self) -> None:
        """Give up the files; nothing is lost without it."""
        if self._con is not None and self._pid == os.getpid():
            self._con.close()
        self._con = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SqliteStore({self.path!r}, mode={self.mode!r})"

    # ------------------------------------------------------------ transactions

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's and the system's errors as the library's, with what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.Error) -> Exception:
        code = getattr(error, "sqlite_errorcode", None)
        primary, where = (0 if code is None else code & 0xFF), self._database
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusyError(
                f"another process has been writing to {where} for {self.timeout:g} s; nothing was "
                "changed. Try again, or open_store(path, timeout=...)"
            )
        if primary == sqlite3.SQLITE_FULL or code in (
            sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_TRUNCATE,
            sqlite3.SQLITE_IOERR_SHMSIZE,
        ):  # fmt: skip
            return StoreFullError(
                f"no room to write {where} ({error}): the disk or a quota is full. Nothing was "
                "changed; free some space and try again"
            )
        unwritable = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
        if primary in unwritable and self.mode == "r":
            return StoreReadOnlyError(
                f"{where} cannot be read by a user who cannot write its folder ({error}): SQLite "
                "keeps a file there by which readers see what is being written. Allow this user to "
                "write the folder, or copy it and read the copy"
            )
        if primary in unwritable:
            return StoreReadOnlyError(
                f"{where} or its folder cannot be written ({error}); change its permissions, or "
                'read it with open_store(path, "r")'
            )
        if isinstance(error, sqlite3.ProgrammingError):
            return error
        return StoreDamagedError(
            f"{where} cannot be read ({error}): bytes were changed or lost. Restore it from a "
            "copy; store.verify() tells what is affected"
        )

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One snapshot: everything inside sees the same version."""
        con = self._db
        with self._errors():
            if con.in_transaction:
                yield con
                return
            con.execute("BEGIN")
            try:
                yield con
            finally:
                con.execute("ROLLBACK")

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        """A transaction of the one writer: all of it, or nothing."""
        if self.mode != "a":
            raise StoreReadOnlyError(
                f"the store at {self.folder} was opened for reading; use open_store(path)"
            )
        con = self._db
        with self._errors():
            con.execute("BEGIN IMMEDIATE")
            try:
                yield con
                con.execute("COMMIT")
            except BaseException:
                if con.in_transaction:
                    con.execute("ROLLBACK")
                raise

    def _note(self, number: int) -> None:
        """After the commit, so that the guard is never ahead of what was committed."""
        text = f"{number} {zlib.crc32(str(number).encode()):08x}\n".ljust(32).encode()
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        # On a full disk the guard stays behind: it then notices less, and nothing is lost.
        with suppress(OSError):
            handle = os.open(self.folder / GUARD, flags, 0o600)
            try:
                os.write(handle, text)
            finally:
                os.close(handle)

    def _guard(self) -> int | None:
        return noted(self.folder)

    def _meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    @property
    def _salt(self) -> bytes:
        salt = self._meta("salt")
        if not isinstance(salt, bytes):
            raise StoreDamagedError(f"{self._database} has lost its salt; restore it from a copy")
        return salt


def _place(temporary: Path, path: Path) -> None:
    """Give a new file its name. Raises FileExistsError where there is one of that name."""
    with suppress(OSError):
        if not os.path.lexists(path):
            os.link(temporary, path)
            return
    # A file system without links: a rename would replace another's, so only one at a time.
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(path):
            raise FileExistsError(path)
        os.rename(temporary, path)
    finally:
        os.close(handle)


def _fixed(folder: Path) -> bool:
    """Whether a folder's file system is mounted for reading alone: then nobody writes there."""
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except (AttributeError, OSError):
        return False


_OF_PARENTS: list[sqlite3.Connection] = []  # never closed in a child


def newest(con: sqlite3.Connection) -> int:
    """The number of the newest version; 0 where there is none."""
    return con.execute("SELECT max(number) FROM version").fetchone()[0] or 0


def noted(folder: Path) -> int | None:
    """The newest version that was noted; None where the file is missing or damaged."""
    try:
        number, check = (folder / GUARD).read_bytes()[:64].split()
        return int(number) if int(check, 16) == zlib.crc32(number) else None
    except (OSError, ValueError):
        return None

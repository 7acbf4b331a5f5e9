"""A memory on disk that can be trusted: transactional, versioned, and deleting for real.

with open_store("memory") as store:
    store.append(memory, message="digits of Monday")      # one version
    batch = store.draw(128)                               # a random batch, weights unbiased
    store.drop(Where(label=3))                            # undone by store.restore(version)
    store.forget(["0:17"])                                # gone from every version and file

See docs/memory-store.md for what is guaranteed, and what is not.
"""

from __future__ import annotations

from pathlib import Path

from .base import (
    Diff,
    Finding,
    Forgotten,
    Item,
    MemoryStore,
    Mode,
    Tombstone,
    Verification,
    Version,
    Where,
)
from .export import Exported, read_export

__all__ = [
    "Diff",
    "Exported",
    "Finding",
    "Forgotten",
    "Item",
    "MemoryStore",
    "Tombstone",
    "Verification",
    "Version",
    "Where",
    "open_store",
    "read_export",
]


def open_store(path: str | Path, mode: Mode = "a", *, timeout: float = 30.0) -> MemoryStore:
    """The store in folder ``path``. mode: "r" to read, "a" to write too, made where it is missing.

    A name that ends in .lance, or an address such as s3://bucket/name, is kept by Lance (extra
    ``lance``), all others by SQLite. timeout: seconds to wait for another writer. Raises
    FileNotFoundError for "r" where nothing is there, StoreDamagedError, StoreVersionError,
    StoreReadOnlyError, StoreBusyError; ImportError without pylance.
    """
    if "://" in str(path) or str(path).endswith(".lance"):
        from .lance import LanceStore

        return LanceStore(path, mode, timeout=timeout)
    from .sqlite import SqliteStore

    return SqliteStore(path, mode, timeout=timeout)

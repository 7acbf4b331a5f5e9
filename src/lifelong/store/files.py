"""Files of a store's folder: never through a link, never outside, and erased by overwriting."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .. import checkpoint
from ..errors import StoreDamagedError, StoreError

_PIECE = 1 << 20


def require_plain(path: Path) -> bool:
    """Whether a file is there; StoreDamagedError for a link, a folder or a device in its place."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        raise StoreDamagedError(
            f"{path} is a link or no plain file, so it could lead out of the store; put the file "
            "itself there"
        )
    return True


def walk(folder: Path) -> Iterator[Path]:
    """Every plain file below a folder, hidden ones too; links are neither followed nor listed.

    Raises as ``entries``.
    """
    for path in entries(folder):
        with suppress(FileNotFoundError):  # another process has just removed it
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


def entries(folder: Path) -> Iterator[Path]:
    """Everything below a folder but for folders; links are not followed, and listed.

    Raises StoreError for a folder that cannot be looked into: what it holds would be missed.
    """
    for root, folders, names in os.walk(folder, followlinks=False, onerror=_unseen):
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(root, name)


def _unseen(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise StoreError(
            f"cannot look into the folder {error.filename} ({error.strerror}), so what it holds "
            "would be missed; change its permissions, or move it away"
        ) from error


def sha256(path: Path) -> bytes:
    """Of a plain file, a piece at a time."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def erase(*paths: Path) -> None:
    """Overwrite files' bytes with zeros, flush, and remove them.

    A file that has other names (hard links) is only removed: the bytes belong to those too.
    """
    for path in paths:
        with suppress(FileNotFoundError):
            if path.lstat().st_nlink == 1:
                handle = os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
                try:
                    _zero(handle, os.fstat(handle).st_size)
                finally:
                    os.close(handle)
            path.unlink()
    for folder in {path.parent for path in paths}:
        sync(folder)


def discard(path: Path) -> None:
    """``erase`` for what another process may be about to move to its place.

    It gets a name of its own first: a writer that still wanted it fails, and what it was to replace
    is unharmed.
    """
    private = path.with_name(f"{path.name}.erased")
    with suppress(FileNotFoundError):
        os.rename(path, private)
        erase(private)


def overwrite(path: Path, data: bytes) -> None:
    """Put ``data`` in a file's place atomically, then overwrite what was there before.

    The old file keeps a second name until then, hidden and found again after a kill.
    """
    old = path.with_name(f".{path.name}.old")
    erase(old)  # of a kill
    linked = path.lstat().st_nlink == 1
    if linked:
        try:
            os.link(path, old)
        except OSError:  # a file system without links: the old blocks are freed, not overwritten
            linked = False
    checkpoint.write(path, data)
    sync(path.parent)
    if linked:
        erase(old)


def sync(folder: Path) -> None:
    """Flush a folder: the names in it survive a power cut."""
    with suppress(OSError):  # not every system opens folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _zero(handle: int, size: int) -> None:
    for start in range(0, size, _PIECE):
        os.write(handle, bytes(min(_PIECE, size - start)))
    os.fsync(handle)

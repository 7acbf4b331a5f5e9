"""By what an item is known again once it was forgotten, for both back ends: ids, places and inputs
as salted hashes; and the ids themselves, as text in rows and in messages."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence, Set
from typing import NamedTuple

from ..errors import ForgottenError
from ..memory import Memory
from . import codec, scrub
from .base import default_id

_BETWEEN = re.compile(rb"[\s,;()\[\]{}<>'\"]+")  # words of a message


def hash_id(salt: bytes, name: bytes) -> bytes:
    """Of an id; the salt makes hashes of two stores differ."""
    return hashlib.blake2b(name, digest_size=16, key=salt).digest()


def hash_content(salt: bytes, digest: bytes) -> bytes:
    """Of an input, by its digest; never that of an id."""
    return hashlib.blake2b(digest, digest_size=16, key=salt, person=b"input").digest()


def tag_of(salt: bytes, name: bytes) -> int:
    """An id's place in the index: 63 bits of its hash."""
    return int.from_bytes(hash_id(salt, name)[:8], "big") >> 1


def identity_of(salt: bytes) -> str:
    """By which a store is known again, without its salt."""
    return hashlib.blake2b(digest_size=16, key=salt, person=b"store").hexdigest()


class Mark(NamedTuple):
    """By which something that was forgotten is known again. refused: where its tombstone is."""

    hash: bytes
    name: str
    refused: bool


def marks_of(
    salt: bytes,
    memory: Memory,
    names: Sequence[str],
    contents: Sequence[tuple[codec.InputLayout, bytes]],
    fresh: Sequence[bool] | None = None,
) -> list[Mark]:
    """Of items that are about to be written: id, place and input; not of those there already.

    The place ("task:origin") is not refused under an id of the user's own, as it need not be
    theirs; readmitting takes its tombstone away as well.
    """
    found = []
    for i, (name, place) in enumerate(zip(names, default_ids(memory), strict=True)):
        if fresh is None or fresh[i]:
            layout, data = contents[i]
            content = hash_content(salt, codec.digest(layout.spec, data))
            found.append(Mark(hash_id(salt, name.encode()), repr(name), True))
            found.append(Mark(hash_id(salt, place.encode()), repr(place), False))
            found.append(Mark(content, f"the input of {name!r}", True))
    return found


def tombstones_of(salt: bytes, names: Set[bytes], match: scrub.Match) -> list[bytes]:
    """Hashes of what must not come back: ids, the ids that the items have by default, inputs.

    A prior holds no ids, so one that was kept elsewhere is known by places and inputs alone.
    """
    ids = set(names) | {default_id(*place).encode() for place in match.places}
    hashes = {hash_id(salt, name) for name in ids}
    return sorted(hashes | {hash_content(salt, digest) for digest in match.digests})


def forgotten_error(mark: Mark, version: int) -> ForgottenError:
    return ForgottenError(
        f"{mark.name} was forgotten in version {version}; leave it out (of a prior: prior.forget), "
        "or pass readmit=True if it may be kept again"
    )


def utf8(text: str, what: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be text, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} must be text that UTF-8 can write, got {text!r}") from error


def mentions(message: bytes, names: Set[bytes]) -> bool:
    """Whether a message names one of the ids, as a word; ids of several words as a part.

    One look-up a word, however many ids there are.
    """
    words = {part.strip(b".:!?") for part in _BETWEEN.split(message)}
    several = [name for name in names if _BETWEEN.search(name)]
    return not names.isdisjoint(words - {b""}) or any(name in message for name in several)


def default_ids(memory: Memory) -> list[str]:
    places = zip(memory.task.tolist(), memory.origin.tolist(), strict=True)
    return [default_id(task, origin) for task, origin in places]

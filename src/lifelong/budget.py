r"""Budgets: how much may be remembered. Plain values; nothing here needs torch.

    200                 examples
    "20MB", Bytes(n)    bytes: kB, MB, GB are powers of 1000, KiB, MiB, GiB powers of 1024
    Fidelity(0.95)      as few examples as give the past's gradient back so well
    None                everything

As text, for flags and files: "200", "20MB", "fidelity:0.95". ``plain`` and ``parse`` are inverse.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Integral
from typing import Any

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_EXPECTED = (
    "expected a number of examples (200), of bytes ('20MB', powers of 1000, or '20MiB', of 1024), "
    "or a fidelity ('fidelity:0.95')"
)


@dataclass(frozen=True)
class Fidelity:
    """As few examples as reach this fidelity; 1 is the past itself, 0 no memory of it.

    Near the anchor, by the curve (``curve.py``); for strength="auto" at a strength of 1. A larger
    one that is found for the way back to where learning began is less faithful near the anchor.

    Raises ValueError for a target outside of (0, 1].
    """

    target: float

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"a fidelity to reach lies in (0, 1], got {self.target}")


@dataclass(frozen=True)
class Bytes:
    """As many examples as fit in ``count`` bytes, counted as ``Memory.num_bytes`` does.

    Raises ValueError for less than one byte.
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"a budget of bytes is a whole number of at least 1, got {self.count}")

    def items(self, each: float) -> int:
        """How many items of ``each`` bytes fit. Raises ValueError where not one does."""
        if self.count < each:
            raise ValueError(
                f"a budget of {self.count:,} bytes holds no example: one takes {math.ceil(each):,} "
                "with its labels, beliefs and bookkeeping; pass at least that many"
            )
        return int(self.count // each)

    def __str__(self) -> str:
        return f"{self.count}B"


Budget = int | Bytes | Fidelity
Given = Budget | str  # what a user may write


def parse(given: Any) -> Budget | None:
    """The budget that a user wrote: a number, a text, a ``Bytes``, a ``Fidelity`` or None.

    Raises ValueError for a text that says no budget and for a negative number, TypeError for
    anything else, such as a fraction of an example.
    """
    if given is None or isinstance(given, (Bytes, Fidelity)):
        return given
    if isinstance(given, str):
        return _read(given)
    if isinstance(given, bool) or not isinstance(given, Integral):  # numpy's integers are
        raise TypeError(f"a budget of {given!r} makes no memory: {_EXPECTED}")
    if given < 0:
        raise ValueError(f"memory must not be negative, got {given}")
    return int(given)


def _read(text: str) -> Budget:
    word = text.strip().replace("_", "")
    # Commas part thousands; "1,5MB" may mean one and a half, and is refused.
    number = re.fullmatch(r"((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\s*([a-zA-Z]*)", word)
    if word.lower().startswith("fidelity:"):
        try:
            target = float(word[len("fidelity:") :])
        except ValueError:
            raise ValueError(f"{text!r} names no fidelity: {_EXPECTED}") from None
        return Fidelity(target)
    if number is not None:
        amount, unit = number[1].replace(",", ""), number[2]
        if not unit and amount.isdigit():
            return int(amount)
        if unit.upper() in _UNITS:
            return Bytes(int(float(amount) * _UNITS[unit.upper()]))
    raise ValueError(f"{text!r} is no budget: {_EXPECTED}")


def plain(budget: Budget | None) -> int | str | None:
    """The budget as a number or a text, for json and TOML; ``parse`` reads it again."""
    if isinstance(budget, Fidelity):
        return f"fidelity:{budget.target!r}"
    return str(budget) if isinstance(budget, Bytes) else budget

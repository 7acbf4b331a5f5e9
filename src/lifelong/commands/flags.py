"""What all commands parse with."""

from __future__ import annotations

import sys
from typing import TypeVar

import tyro

Flags = TypeVar("Flags")


def parse(kind: type[Flags], prog: str, about: str, examples: str, args: list[str]) -> Flags:
    """``args`` as flags; ``about`` stands above the help, ``examples`` below it.

    Raises SystemExit after --help, and after a wrong flag that was explained on standard error.
    """
    wants_help = not {"-h", "--help"}.isdisjoint(args)
    if wants_help:
        sys.stdout.write(about + "\n\n")  # tyro would not break its lines
    try:
        return tyro.cli(kind, prog=prog, description="", args=args)
    finally:
        if wants_help:
            sys.stdout.write(examples)

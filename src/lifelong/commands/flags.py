"""What all commands parse with, and how they print without colours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

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


@contextmanager
def plain() -> Iterator[None]:
    """Inside, no escape code is printed, on a terminal either: bold and the progress bar's moves
    are such codes as colours are, so output is as to a file.

    Processes that are started inside learn of it from NO_COLOR.
    """
    before = {name: os.environ.pop(name, None) for name in ("NO_COLOR", *_FORCING)}
    os.environ["NO_COLOR"] = "1"
    out: Any = _NoTerminal(sys.stdout)
    err: Any = _NoTerminal(sys.stderr)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        del os.environ["NO_COLOR"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


_FORCING = ("FORCE_COLOR", "TTY_COMPATIBLE")  # rich would write codes into a file


class _NoTerminal:
    """A stream that says it is no terminal; what writes codes asks for that."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

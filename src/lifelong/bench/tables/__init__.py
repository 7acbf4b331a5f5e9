"""The tables that ``lifelong bench`` knows: each module here gives ``TABLES``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from ...config import UsageError, suggestion
from ..table import Table

_MODULES = (
    "mnist",
    "elec2",
    "ablation",
    "frozen",
    "cifar",
    "tiny",
)  # fmt: skip


def tables() -> Mapping[str, Table]:
    """All of them by name, in order."""
    found: dict[str, Table] = {}
    for module in _MODULES:
        for table in import_module(f"{__name__}.{module}").TABLES:
            if table.name in found:
                raise ValueError(f"two tables are called {table.name!r}")
            found[table.name] = table
    return found


def table(name: str) -> Table:
    """The table of that name. Raises UsageError with a suggestion where there is none."""
    known = tables()
    if name not in known:
        raise UsageError(f"there is no table {name!r}; {suggestion(name, known)}")
    return known[name]

"""Small frozen values as plain dicts and back: {"name": "Gaussian", "noise_sd": 0.1}."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from types import ModuleType
from typing import Any


def named(value: Any) -> dict[str, Any]:
    """A frozen dataclass as its class's name and its fields."""
    return {"name": type(value).__name__, **asdict(value)}


def unnamed(module: ModuleType, values: Mapping[str, Any]) -> Any:
    """The value again. Only dataclasses that ``module`` itself defines are made, nothing else.

    Raises ValueError for a name that is not one of them.
    """
    found = getattr(module, str(values["name"]), None)
    if (
        not isinstance(found, type)
        or found.__module__ != module.__name__
        or not hasattr(found, "__dataclass_fields__")
    ):
        raise ValueError(f"{values['name']!r} is not known to {module.__name__}")
    return found(**known(found, {k: v for k, v in values.items() if k != "name"}))


def known(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are fields of ``cls``; others warn."""
    names = {f.name for f in fields(cls)}
    unknown = sorted(values.keys() - names)
    if unknown:
        warnings.warn(
            f"{cls.__name__}: unknown keys {unknown} are ignored; a newer version may have "
            "written them",
            stacklevel=3,
        )
    return {k: v for k, v in values.items() if k in names}

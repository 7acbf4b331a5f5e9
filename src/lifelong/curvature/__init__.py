"""Curvature: its structures (``Diagonal``, ``Dense``) and what estimates them from data."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import CheckpointError
from .base import Curvature
from .dense import Dense
from .diagonal import Diagonal
from .estimators import Estimator, dense_curvature, diagonal_curvature

__all__ = [
    "Curvature",
    "Dense",
    "Diagonal",
    "Estimator",
    "dense_curvature",
    "diagonal_curvature",
    "from_state_dict",
]


def from_state_dict(state: Mapping[str, Tensor]) -> Diagonal | Dense:
    """The curvature that ``state_dict`` was taken of; CheckpointError where it is none."""
    kinds = {key.split(".", 1)[0] for key in state}
    if kinds == {"diagonal"}:
        return Diagonal.from_state_dict(state)
    if kinds == {"dense"}:
        return Dense.from_state_dict(state)
    raise CheckpointError(
        f"expected a saved Diagonal or Dense curvature, got keys {sorted(state)[:3]}"
    )

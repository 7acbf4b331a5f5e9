"""Curvature: its structures, and what estimates them from data."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import CheckpointError
from .base import Curvature
from .block_diagonal import PREFIX as _BLOCKS
from .block_diagonal import BlockDiagonal
from .dense import Dense
from .diagonal import Diagonal
from .estimators import Estimator, dense_curvature, diagonal_curvature
from .isotropic import Isotropic
from .kronecker import EigenKronecker, Kronecker
from .low_rank import LowRank

__all__ = [
    "BlockDiagonal",
    "Curvature",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "Estimator",
    "Isotropic",
    "Kronecker",
    "LowRank",
    "dense_curvature",
    "diagonal_curvature",
    "from_state_dict",
]


def from_state_dict(state: Mapping[str, Tensor]) -> Curvature:
    """The curvature that ``state_dict`` was taken of; CheckpointError where it is none."""
    kinds = {key.split(".", 1)[0] for key in state}
    structures = {
        "isotropic": Isotropic,
        "diagonal": Diagonal,
        "kronecker": Kronecker,
        "eigen_kronecker": EigenKronecker,
        "low_rank": LowRank,
        "dense": Dense,
    }
    if len(kinds) == 1 and (kind := kinds.pop()) in structures:
        return structures[kind].from_state_dict(state)
    if state and all(key.startswith(_BLOCKS) for key in state):
        blocks: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            index, _, rest = key.removeprefix(_BLOCKS).partition(".")
            blocks.setdefault(index, {})[rest] = value
        return BlockDiagonal(tuple(from_state_dict(blocks[index]) for index in sorted(blocks)))
    raise CheckpointError(
        f"expected a saved curvature (keys that start with one of {sorted(structures)} or "
        f"'block_diagonal'), got keys {sorted(state)[:3]}"
    )

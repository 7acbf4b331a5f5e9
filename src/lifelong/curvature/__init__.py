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
from .estimators import (
    Estimator,
    Structure,
    block_curvature,
    dense_curvature,
    diagonal_curvature,
    estimate,
    isotropic_curvature,
    kronecker_curvature,
    low_rank_curvature,
)
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
    "Structure",
    "block_curvature",
    "dense_curvature",
    "diagonal_curvature",
    "estimate",
    "from_state_dict",
    "isotropic_curvature",
    "kronecker_curvature",
    "low_rank_curvature",
    "structure_of",
]


def structure_of(curvature: Curvature) -> Structure:
    """The name under which ``estimate`` makes a curvature that can be added to this one.

    Raises TypeError for a structure of the user's own.
    """
    blocks = curvature.blocks if isinstance(curvature, BlockDiagonal) else (curvature,)
    names: dict[type, Structure] = {
        EigenKronecker: "eigen_kronecker",
        Kronecker: "kronecker",
        LowRank: "low_rank",
        Isotropic: "isotropic",
    }
    for kind, name in names.items():
        if any(isinstance(block, kind) for block in blocks):
            return name
    if isinstance(curvature, BlockDiagonal):
        return "block"
    if isinstance(curvature, Diagonal):
        return "diagonal"
    if isinstance(curvature, Dense):
        return "dense"
    raise TypeError(
        f"no estimator makes a {type(curvature).__name__}; expected a curvature of this library"
    )


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

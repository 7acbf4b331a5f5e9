"""Block-diagonal curvature: another curvature for each set of parameters, none between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import Params
from .base import (
    Curvature,
    Shapes,
    describe,
    require_dense,
    require_rows,
    require_same,
    require_shapes,
)
from .dense import Dense
from .diagonal import Diagonal
from .kronecker import EigenKronecker, Kronecker

PREFIX = "block_diagonal."


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal:
    """G = ⊕_b G_b: curvatures of any structure over disjoint parameters.

    K-FAC of a network has a ``Kronecker`` for each layer, and smaller blocks for what is no
    layer's weight; a block of ``Dense`` for each layer is dense by layer.

    Raises ValueError where there is no block, or two share a parameter.
    """

    blocks: tuple[Curvature, ...]

    def __post_init__(self) -> None:
        names = [name for block in self.blocks for name in block.shapes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise ValueError(
                f"expected blocks over disjoint parameters, at least one; {twice[:5]} are in two"
                if twice
                else "expected at least one block"
            )

    def __repr__(self) -> str:
        return describe(self)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{PREFIX}{i:08d}.{key}": value
            for i, block in enumerate(self.blocks)
            for key, value in block.state_dict().items()
        }

    @property
    def shapes(self) -> Shapes:
        return {name: shape for block in self.blocks for name, shape in block.shapes.items()}

    def block_of(self, name: str) -> Curvature:
        """The block that a parameter is in. Raises KeyError for a name that is in none."""
        for block in self.blocks:
            if name in block.shapes:
                return block
        raise KeyError(f"{name!r} is in no block; the parameters are {list(self.shapes)[:5]}")

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> in nats."""
        return torch.stack([block.quad(part) for block, part in self._parts(d)]).sum()

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v."""
        return _joined([block.mv(part) for block, part in self._parts(v)])

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v; ValueError where a block has no inverse."""
        return _joined([block.inverse_mv(part, damping) for block, part in self._parts(v)])

    def diagonal(self) -> Params:
        return _joined([block.diagonal() for block in self.blocks])

    def inverse_diagonal(self, damping: float = 0.0) -> Params:
        return _joined([block.inverse_diagonal(damping) for block in self.blocks])

    def sample(
        self,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draws of N(0, (G + damping I)⁻¹): name -> (S, *shape)."""
        return _joined([
            block.sample(damping, num_samples=num_samples, generator=generator)
            for block in self.blocks
        ])  # fmt: skip

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log |G + damping I|."""
        return torch.stack([block.logdet(damping) for block in self.blocks]).sum()

    def half(self, rows: Mapping[str, Tensor], damping: float = 0.0) -> Tensor:
        """Rows (..., *shape) to (..., R), R summed over the blocks."""
        require_rows(self.shapes, rows)
        parts = [
            block.half({name: rows[name] for name in block.shapes}, damping)
            for block in self.blocks
        ]
        return torch.cat(parts, dim=-1)

    def dense(self) -> Dense:
        some = next(iter(self.diagonal().values()))
        require_dense(self.shapes, some.element_size(), "keep it in blocks")
        return Dense(
            torch.block_diag(*[block.dense().matrix for block in self.blocks]), self.shapes
        )

    def rounded(self, dtype: torch.dtype) -> BlockDiagonal:
        """With Kronecker factors in ``dtype``; other blocks as they are."""
        return BlockDiagonal(
            tuple(b.rounded(dtype) if isinstance(b, Kronecker) else b for b in self.blocks)
        )

    def merge(self) -> BlockDiagonal:
        """Each block that is a sum of Kronecker products as one product of the same trace."""
        mergeable = (Kronecker, EigenKronecker)
        return BlockDiagonal(
            tuple(b.merge() if isinstance(b, mergeable) else b for b in self.blocks)
        )

    def __add__(self, other: BlockDiagonal) -> BlockDiagonal:
        """Block by block; a diagonal of zeros (parameters that took no part) gives way to the
        other's blocks.

        StaleAnchorError where the parameters differ, ValueError where they are in other blocks,
        TypeError where two blocks are of structures that do not add.
        """
        if not isinstance(other, BlockDiagonal):
            return NotImplemented
        require_shapes(self.shapes, other.shapes, "the curvature to add")
        theirs = {frozenset(b.shapes): b for b in other.blocks if not _is_zero(b)}
        sums: list[Curvature] = []
        for block in self.blocks:
            if not _is_zero(block):
                partner = theirs.pop(frozenset(block.shapes), None)
                sums.append(block if partner is None else block + partner)
        sums.extend(theirs.values())
        names = [name for block in sums for name in block.shapes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{twice[:5]} are in other blocks of the curvature to add; expected the same "
                "blocks in both"
            )
        zeros = {n: v for b in self.blocks if _is_zero(b) for n, v in b.diagonal().items()}
        sums.extend(Diagonal({n: v}) for n, v in zeros.items() if n not in names)
        place = {name: i for i, name in enumerate(self.shapes)}
        return BlockDiagonal(tuple(sorted(sums, key=lambda b: min(place[n] for n in b.shapes))))

    def __mul__(self, factor: float) -> BlockDiagonal:
        return BlockDiagonal(tuple(block * factor for block in self.blocks))

    __rmul__ = __mul__

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BlockDiagonal:
        return BlockDiagonal(tuple(block.to(device, dtype) for block in self.blocks))

    @property
    def num_bytes(self) -> int:
        return sum(block.num_bytes for block in self.blocks)

    def _parts(self, v: Mapping[str, Tensor]) -> list[tuple[Curvature, Params]]:
        require_same(self.shapes, v, "the vector")
        return [(block, {name: v[name] for name in block.shapes}) for block in self.blocks]


def _is_zero(block: Curvature) -> bool:
    return isinstance(block, Diagonal) and not any(bool(v.any()) for v in block.values.values())


def _joined(parts: list[Params]) -> Params:
    return {name: value for part in parts for name, value in part.items()}


def is_rounded(curvature: Curvature | None) -> bool:
    """Whether Kronecker factors are of fewer bits than a sum over tasks wants."""
    blocks = curvature.blocks if isinstance(curvature, BlockDiagonal) else (curvature,)
    return any(isinstance(b, Kronecker) and b.left.element_size() < 4 for b in blocks)

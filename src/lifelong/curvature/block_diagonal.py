"""Block-diagonal curvature: another curvature for each set of parameters, none between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import Params
from .base import (
    Curvature,
    Shapes,
    describe,
    numel,
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
        return merged([self])

    def __add__(self, other: BlockDiagonal) -> BlockDiagonal:
        """Block by block; a diagonal of zeros (parameters that took no part) gives way to the
        other's blocks, and what one has of a layer's weight or bias alone joins the other's block
        of both.

        StaleAnchorError where the parameters differ, ValueError where they are in other blocks,
        TypeError where two blocks are of structures that do not add.
        """
        if not isinstance(other, BlockDiagonal):
            return NotImplemented
        return BlockDiagonal(tuple(map(_sum, _partners([self, other]))))

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


def merged(sums: list[BlockDiagonal]) -> BlockDiagonal:
    """``merge()`` of what they add up to, a block at a time.

    Empties the list: a summand that nobody else holds is let go with its blocks, and neither their
    sum nor its products are ever held. Raises as ``BlockDiagonal.__add__``.
    """
    groups = _partners(sums)[::-1]
    sums.clear()
    blocks = []
    while groups:
        blocks.append(_merged(groups.pop()))
    return BlockDiagonal(tuple(blocks))


def _merged(blocks: list[Curvature]) -> Curvature:
    if all(isinstance(b, Kronecker) for b in blocks):
        return Kronecker.merged(blocks)  # type: ignore[arg-type]
    total = _sum(blocks)
    return total.merge() if isinstance(total, Kronecker | EigenKronecker) else total


def _sum(blocks: Sequence[Curvature]) -> Curvature:
    return sum(blocks[1:], start=blocks[0])


def _partners(sums: Sequence[BlockDiagonal]) -> list[list[Curvature]]:
    """The blocks over the same parameters, in the order of parameters."""
    for g in sums[1:]:
        require_shapes(sums[0].shapes, g.shapes, "the curvature to add")
    found: dict[frozenset[str], list[Curvature]] = {}
    zeros: dict[str, Tensor] = {}
    for block in (block for g in sums for block in g.blocks):
        if _is_zero(block):
            zeros.update(block.diagonal())
        else:
            found.setdefault(frozenset(block.shapes), []).append(block)
    groups: dict[frozenset[str], list[Curvature]] = {}
    for key, group in found.items():
        whole = max((other for other in found if key <= other), key=len)
        wide = [_widened(b, found[whole][0]) for b in group] if key < whole else group
        if None in wide:
            whole, wide = key, group
        groups.setdefault(whole, []).extend(wide)  # type: ignore[arg-type]
    names = [name for key in groups for name in key]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{twice[:5]} are in other blocks of the curvature to add; expected the same "
            "blocks in both"
        )
    place = {name: i for i, name in enumerate(sums[0].shapes)}
    left: list[list[Curvature]] = [[Diagonal({n: v})] for n, v in zeros.items() if n not in names]
    return sorted(
        [*groups.values(), *left], key=lambda group: min(place[n] for n in group[0].shapes)
    )


def _widened(block: Curvature, like: Curvature) -> Curvature | None:
    """The same matrix over the parameters of ``like`` in its structure, 0 where these are new:
    what was learned before a layer had its bias, or its weight. None where it cannot be held."""
    shapes = like.shapes
    if isinstance(like, Dense) and isinstance(block, (Dense, Diagonal)):
        x, new = block.dense().matrix, {n: s for n, s in shapes.items() if n not in block.shapes}
        x = torch.block_diag(x, x.new_zeros(numel(new), numel(new)))
        return Dense(x, {**block.shapes, **new}).reordered(shapes)
    if isinstance(like, Kronecker) and isinstance(block, Kronecker):
        right = F.pad(block.right, (0, 1) * (block.right.ndim - 2))
        return Kronecker(block.left, right, shapes)
    if isinstance(like, EigenKronecker) and isinstance(block, EigenKronecker):
        right = block.right
        if right is not None:
            right = F.pad(right, (0, 1, 0, 1))
            right[..., -1, -1] = 1
        return EigenKronecker(block.left, right, F.pad(block.values, (0, 1)), shapes)
    if not isinstance(block, Diagonal) or list(block.shapes) != list(shapes)[1:]:
        return None
    bias = next(iter(block.values.values()))
    if isinstance(like, EigenKronecker):
        _, groups, rows, columns = like.values.shape
        values = F.pad(bias.reshape(1, groups, rows, 1), (columns - 1, 0))
        return EigenKronecker(None, None, values, shapes)
    if isinstance(like, Kronecker):  # its input is the number 1, the last column: L ⊗ e eᵀ
        right = F.pad(bias.new_ones(1, like.right.shape[1], 1), (like.right.shape[-1] - 1, 0))
        return Kronecker(bias.reshape(1, like.left.shape[1], -1), right, shapes)
    return None


def _is_zero(block: Curvature) -> bool:
    return isinstance(block, Diagonal) and not any(bool(v.any()) for v in block.values.values())


def _joined(parts: list[Params]) -> Params:
    return {name: value for part in parts for name, value in part.items()}


def is_rounded(curvature: Curvature | None) -> bool:
    """Whether Kronecker factors are of fewer bits than a sum over tasks wants."""
    blocks = curvature.blocks if isinstance(curvature, BlockDiagonal) else (curvature,)
    return any(isinstance(b, Kronecker) and b.left.element_size() < 4 for b in blocks)

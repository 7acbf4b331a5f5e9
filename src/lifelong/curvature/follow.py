r"""A curvature for another model: G' = P G Pᵀ, where P takes each new number from its old place.

Where a number is new its row and column are 0: nothing is known of it. Each structure keeps its
form where P allows that: a rename always; fewer or more entries for a diagonal, a dense matrix,
directions, and a Kronecker product, since P picks the rows of L by the outputs and those of R by
the inputs. A corrected eigenbasis does not survive the loss of an entry, nor c I a gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor

from ..errors import StaleAnchorError
from ..models import Params
from .base import Curvature
from .block_diagonal import BlockDiagonal
from .dense import Dense
from .diagonal import Diagonal
from .isotropic import Isotropic
from .kronecker import EigenKronecker, Kronecker
from .low_rank import LowRank


@dataclass(frozen=True, eq=False)
class Place:
    """Where a parameter of the new model lies in the old one.

    old: its name there, None for a new one; rows (O',): for each entry along the first dimension
    the old one, -1 for none; None for the leading ones. Along other dimensions the leading block
    that both have is kept.
    """

    old: str | None
    rows: Tensor | None = None

    def fit(self, old: Tensor, new: Tensor) -> Tensor:
        """``new`` with what it shares with ``old`` copied in; StaleAnchorError where they differ
        in their number of dimensions."""
        if old.ndim != new.ndim:
            raise StaleAnchorError(
                f"a parameter of shape {tuple(old.shape)} cannot become one of {tuple(new.shape)}"
            )
        fitted = new.clone()
        if not old.ndim:
            return old.to(new)
        common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
        if self.rows is None:
            fitted[common] = old[common].to(new)
            return fitted
        rows = self.rows.to(old.device)
        to = (rows >= 0).nonzero().squeeze(1)
        block = old.index_select(0, rows[to])[(slice(None), *common[1:])]
        target = fitted.index_select(0, to.to(new.device))
        target[(slice(None), *common[1:])] = block.to(new)
        fitted[to.to(new.device)] = target
        return fitted


Places = Mapping[str, Place]


def followed(old: Params, new: Mapping[str, Tensor], places: Places) -> Params:
    """``new`` with what it shares with ``old`` copied in."""
    return {
        n: places[n].fit(old[places[n].old], value)  # type: ignore[index]
        if places[n].old in old
        else value.clone()
        for n, value in new.items()
    }


def follow(
    curvature: Curvature, current: Params, places: Places, *, leave: bool = False
) -> tuple[Curvature, list[str]]:
    """(the curvature over the parameters ``current``, the old names whose curvature stayed behind).

    leave: 0 where a structure cannot follow; without it, ValueError with the names.
    """
    lost: list[str] = []
    if isinstance(curvature, BlockDiagonal):
        blocks: list[Curvature] = []
        for block in curvature.blocks:
            names = [n for n in current if places[n].old in block.shapes]
            if not names:
                continue
            found = _follow(block, {n: current[n] for n in names}, places)
            if found is None:
                lost += block.shapes
            else:
                blocks.append(found)
        known = {n for block in blocks for n in block.shapes}
        blocks += [
            Diagonal.zeros_like({n: p}) for n, p in current.items() if n not in known
        ]  # each of its own, so that a block of any structure can be added to it
        order = {n: i for i, n in enumerate(current)}
        blocks.sort(key=lambda b: min(order[n] for n in b.shapes))
        result: Curvature = BlockDiagonal(tuple(blocks))
    else:
        found = _follow(curvature, current, places)
        if found is None:
            lost += curvature.shapes
        result = found if found is not None else _nothing(curvature, current)
    if lost and not leave:
        raise ValueError(
            f"the {type(curvature).__name__} curvature of {lost[:5]} cannot follow a change of "
            "the model; pass structure='diagonal' or 'dense' to convert all of it, or "
            "allow_unmatched=True to leave that of these behind"
        )
    return result, lost


def _nothing(curvature: Curvature, current: Params) -> Curvature:
    """A curvature of 0 in the same structure, so that the next one can be added."""
    if isinstance(curvature, Isotropic):
        return Isotropic.zeros_like(current)
    return BlockDiagonal(tuple(Diagonal.zeros_like({n: p}) for n, p in current.items()))


def _follow(curvature: Curvature, current: Params, places: Places) -> Curvature | None:
    """None where the structure cannot hold the result."""
    renamed = {old: n for n in current if (old := places[n].old) is not None}
    same = list(renamed) == list(curvature.shapes) and len(renamed) == len(current)
    unmoved = same and all(
        curvature.shapes[old] == current[n].shape and _in_order(places[n], current[n])
        for old, n in renamed.items()
    )
    if isinstance(curvature, Diagonal):
        zeros = Diagonal.zeros_like(current).values
        return Diagonal(followed(curvature.values, zeros, places))
    if isinstance(curvature, Dense):
        index = _positions(curvature, current, places)
        shapes = {n: p.shape for n, p in current.items()}
        return Dense(_picked(_picked(curvature.matrix, index, 0), index, 1), shapes)
    if isinstance(curvature, LowRank):
        zeros = {n: curvature.weights.new_zeros(p.shape) for n, p in current.items()}
        rows = [
            followed({n: v[r] for n, v in curvature.factors.items()}, zeros, places)
            for r in range(curvature.rank)
        ]
        return LowRank(
            {n: torch.stack([row[n] for row in rows]) for n in current}, curvature.weights
        )
    if isinstance(curvature, Isotropic):
        # c I where no number is new.
        whole = all(_all_old(p, places[n], curvature.shapes) for n, p in current.items())
        return (
            replace(curvature, shapes={n: p.shape for n, p in current.items()}) if whole else None
        )
    if isinstance(curvature, Kronecker) and not unmoved:
        return _kronecker(curvature, current, places)
    if isinstance(curvature, (Kronecker, EigenKronecker)) and unmoved:
        return replace(curvature, shapes={renamed[n]: s for n, s in curvature.shapes.items()})
    return None


def _kronecker(curvature: Kronecker, current: Params, places: Places) -> Kronecker | None:
    """The rows and columns of each factor that are still there; None where no weight is."""
    old_weight, *old_bias = curvature.shapes
    found = {places[n].old: n for n in current}
    weight, bias = found.get(old_weight), found.get(old_bias[0]) if old_bias else None
    if weight is None or curvature.left.shape[1] != 1:
        return None
    old, new = curvature.shapes[old_weight], current[weight].shape
    if len(old) != len(new):
        return None
    outputs = _index(places[weight], old, new)
    if bias is not None and not torch.equal(
        outputs, _index(places[bias], old[:1], current[bias].shape)
    ):
        return None
    inputs = torch.arange(old[1:].numel()).reshape(old[1:])
    absent = torch.full(new[1:], -1)
    columns = Place(None).fit(inputs, absent).flatten()
    if bias is not None:
        columns = torch.cat([columns, torch.tensor([old[1:].numel()])])
    shapes: dict[str, Size] = {weight: new}
    if bias is not None:
        shapes[bias] = current[bias].shape

    def pick(factor: Tensor, index: Tensor) -> Tensor:
        for dim in range(2, factor.ndim):
            factor = _picked(factor, index, dim)
        return factor

    return Kronecker(pick(curvature.left, outputs), pick(curvature.right, columns), shapes)


def _index(place: Place, old: Size, new: Size) -> Tensor:
    """For each entry along the first dimension of ``new`` the old one, -1 for none."""
    return place.fit(torch.arange(old[0]), torch.full(new[:1], -1))


def _in_order(place: Place, new: Tensor) -> bool:
    return place.rows is None or torch.equal(place.rows.cpu(), torch.arange(len(new)))


def _all_old(new: Tensor, place: Place, shapes: Mapping[str, Size]) -> bool:
    if place.old is None or place.old not in shapes:
        return False
    old = torch.zeros(shapes[place.old], dtype=torch.int8)
    return not bool(place.fit(old, torch.ones(new.shape, dtype=torch.int8)).any())


def _positions(curvature: Dense, current: Params, places: Places) -> Tensor:
    """(P',) for each new number its place in the old flat vector, -1 for none."""
    positions, start = {}, 0
    for name, shape in curvature.shapes.items():
        positions[name] = torch.arange(start, start + shape.numel()).reshape(shape)
        start += shape.numel()
    absent = {n: torch.full(p.shape, -1) for n, p in current.items()}
    return torch.cat([i.flatten() for i in followed(positions, absent, places).values()])


def _picked(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The entries ``index`` along a dimension; 0 where it is -1."""
    index = index.to(x.device)
    found = x.index_select(dim, index.clamp(min=0))
    mask = (index >= 0).reshape([-1 if d == dim else 1 for d in range(x.ndim)])
    return torch.where(mask, found, torch.zeros_like(found))

r"""Sums behind K-FAC: the factors of each layer, and what is no layer's weight.

For a layer with output gradients g_nl (O) and inputs a_nl (I) of example n at position l, in all
directions v of its output space, and weights w_n:

    L = sum_nl w_n g_nl g_nlᵀ,      R = sum_nl |w_n| a_nl a_nlᵀ / sum_nl |w_n|,      G ~ L ⊗ R.

L is a sum over examples and R a mean, so the product is a sum in nats, as every curvature is.
The approximation: gradients and inputs are independent of each other, over examples and over
positions. A layer that is used at several positions (convolution, sequence) can be read in two
ways (Eschenhagen et al. 2023):

    expand   positions are more examples, as in the formula above; KFC for convolutions.
    reduce   g_n = sum_l g_nl and a_n = mean_l a_nl: for models that average over positions.

Sources: Martens & Grosse 2015; Grosse & Martens 2016; George et al. 2018 (corrected).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..hooks import Factor, Outer, Positions, Trace, accumulator
from .base import Curvature, Shapes, sizes
from .dense import Dense
from .diagonal import Diagonal
from .kronecker import EigenKronecker, Kronecker

PositionRule = Literal["expand", "reduce"]
Other = Literal["diagonal", "dense", "raise"]

_CHUNK = 8 * 2**20  # bytes of unfolded inputs at a time
_COLUMNS = 128  # of a symmetric product at a time
_OTHER_LIMIT = 4096  # numbers of a parameter that may have a dense block


@dataclass
class Layer:
    """Running sums of one layer; of symmetric sums only the blocks on and below the diagonal."""

    shapes: Shapes  # the weight, and the bias if there is one
    left: Tensor  # (N, O, O)
    right: Tensor  # (N, I, I), the bias in the last column
    count: Tensor  # sum_nl |w_n|

    @classmethod
    def of(cls, shapes: Shapes, factor: Outer | Positions) -> Layer:
        weight = next(iter(shapes.values()))
        groups = factor.g.shape[2] if isinstance(factor, Positions) else 1
        rows, columns = weight[0] // groups, weight[1:].numel() + len(shapes) - 1
        zeros = factor.g.new_zeros
        return cls(shapes, zeros(groups, rows, rows), zeros(groups, columns, columns), zeros(()))

    def add(self, factor: Outer | Positions, w: Tensor, rule: PositionRule) -> None:
        g, inputs = _sides(factor, rule)
        w = w.to(g.dtype)
        for each in g:  # (B, N, L, O)
            _add_gram(self.left, each, w)
        for part in _parts(self, g):
            a, size = inputs(part), w[part].abs()
            width = a.shape[-1]
            _add_gram(self.right[:, :width, :width], a, size)
            if width < self.right.shape[-1]:
                total = a[:, :, 0] if a.shape[2] == 1 else a.sum(2)
                self.right[:, -1, :-1] += torch.tensordot(size, total, dims=1)
                self.right[:, -1, -1] += size.sum() * a.shape[2]
        self.count += w.abs().sum() * g.shape[3]

    def kronecker(self) -> Kronecker:
        count = torch.where(self.count == 0, torch.ones_like(self.count), self.count)
        left, right = _symmetric(self.left), _symmetric(self.right) / count
        return Kronecker(left.unsqueeze(0), right.unsqueeze(0), self.shapes)


@dataclass
class Sums:
    """What one pass over the data adds up: the layers' factors, and other parameters' blocks."""

    params: Mapping[str, nn.Parameter]
    rule: PositionRule = "expand"
    other: Other = "diagonal"
    layers: dict[str, Layer] = field(default_factory=dict)  # by the name of the weight
    rest: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)  # parameter -> weight, or itself

    def add(self, trace: Trace, v: Tensor, w: Tensor) -> None:
        factors = trace.pull(v)
        for weight, shapes in _layers(trace, factors):
            factor = factors[weight]
            self._claim(shapes, weight)
            if weight not in self.layers:
                self.layers[weight] = Layer.of(shapes, factor)  # type: ignore[arg-type]
            self.layers[weight].add(factor, w, self.rule)  # type: ignore[arg-type]
            for name in shapes:
                del factors[name]
        for name, factor in factors.items():
            self._claim([name], name)
            self.rest[name] = self._rest(name, factor, w)

    def _claim(self, names: object, key: str) -> None:
        """Raise ValueError where a parameter is in another block than in the batches before."""
        for name in names:  # type: ignore[attr-defined]
            if self.seen.setdefault(name, key) != key:
                raise ValueError(
                    f"{name!r} is used in another way in one batch than in another, so it has no "
                    "Kronecker factors; leave it out by params=, or use diagonal_curvature"
                )

    def _rest(self, name: str, factor: Factor, w: Tensor) -> Tensor:
        if self.other == "raise":
            raise ValueError(
                f"{name!r} is not the weight or bias of a Linear, Conv1d or Conv2d layer that "
                "hooks can follow, so it has no Kronecker factors; pass other='diagonal' or "
                "'dense', or leave it out by params="
            )
        total = self.rest.get(name)
        if self.other == "diagonal":
            new = factor.square_sum(w)
            return new if total is None else total + new
        size = self.params[name].numel()
        if size > _OTHER_LIMIT:
            raise ValueError(
                f"{name!r} has {size} numbers, too many for a dense block (at most "
                f"{_OTHER_LIMIT}); pass other='diagonal', or leave it out by params="
            )
        rows = factor.rows().flatten(2)  # (K, B, p)
        new = torch.einsum("kbp,b,kbq->pq", rows, w.to(rows.dtype), rows)
        return new if total is None else total + new

    def blocks(self) -> tuple[Curvature, ...]:
        """The blocks in the order of the parameters; zeros for what took no part."""
        found: list[Curvature] = []
        for name, p in self.params.items():
            key = self.seen.get(name)
            if key in self.layers:
                if key == name:
                    found.append(self.layers[key].kronecker())
                continue
            zero = torch.zeros(p.shape, dtype=accumulator(p.dtype), device=p.device)
            value = self.rest.get(name, zero)
            if self.other == "dense" and name in self.rest:
                found.append(Dense(value, sizes({name: p})))
            else:
                found.append(Diagonal({name: value}))
        return tuple(found)


@dataclass
class Corrections:
    """The diagonal of the true curvature in the layers' eigenbases: a second pass."""

    bases: dict[str, EigenKronecker]  # by the name of the weight
    rule: PositionRule = "expand"
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, trace: Trace, v: Tensor, w: Tensor) -> None:
        factors = trace.pull(v, frozenset(self.bases))
        for weight, factor in factors.items():
            basis = self.bases[weight]
            new = _square_sum(factor, basis, w)  # type: ignore[arg-type]
            self.values[weight] = self.values.get(weight, torch.zeros_like(new)) + new

    def blocks(self) -> dict[str, EigenKronecker]:
        return {
            weight: EigenKronecker(
                basis.left,
                basis.right,
                self.values[weight].reshape(basis.values.shape),
                basis.shapes,
            )
            for weight, basis in self.bases.items()
        }


def _square_sum(factor: Outer | Positions, basis: EigenKronecker, w: Tensor) -> Tensor:
    """sum_kn w_n (Uᵀ (sum_l g_nl a_nlᵀ) V)², the gradients themselves: exact at any positions."""
    if basis.left is None or basis.right is None:
        raise ValueError("expected both bases of a layer, got the identity")
    left, right = basis.left[0], basis.right[0]
    bias = len(basis.shapes) > 1
    if isinstance(factor, Outer):
        a = factor.a if not bias else _homogeneous(factor.a)
        return Outer(factor.g @ left[0], a @ right[0]).square_sum(w)

    def turned(part: slice) -> Tensor:
        a = factor.a(part)
        return (_homogeneous(a) if bias else a) @ right

    shape = torch.Size((len(left) * left.shape[-1], right.shape[-1]))
    return Positions(factor.g @ left, turned, shape).square_sum(w)


def _homogeneous(a: Tensor) -> Tensor:
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


def _layers(trace: Trace, factors: Mapping[str, Factor]) -> Iterator[tuple[str, Shapes]]:
    """(weight, shapes of it and of the bias that was added in the same calls)."""
    uses = {
        name: ([id(use) for use, _ in pairs], {role for _, role in pairs})
        for name, pairs in trace.uses_of.items()
        if name in factors
    }
    biases = {tuple(calls): name for name, (calls, roles) in uses.items() if roles == {"bias"}}
    for name, (calls, roles) in uses.items():
        if roles == {"weight"} and isinstance(factors[name], (Outer, Positions)):
            bias = biases.get(tuple(calls))
            names = [name] if bias is None else [name, bias]
            yield name, {n: trace.engine.params[n].shape for n in names}


def _sides(
    factor: Outer | Positions, rule: PositionRule
) -> tuple[Tensor, Callable[[slice], Tensor]]:
    """Output gradients (K, B, N, L, O) and a reader of inputs (b, N, L, I)."""
    if isinstance(factor, Outer):
        return factor.g[:, :, None, None], lambda part: factor.a[part, None, None]
    if rule == "expand":
        return factor.g, factor.a
    return factor.g.sum(-2, keepdim=True), lambda part: factor.a(part).mean(-2, keepdim=True)


def _parts(layer: Layer, g: Tensor) -> Iterator[slice]:
    """Examples whose inputs stay in the cache."""
    groups, columns = layer.right.shape[:2]
    n, positions = g.shape[1], g.shape[3]
    step = max(1, _CHUNK // (4 * groups * columns * positions))
    return (slice(i, min(n, i + step)) for i in range(0, n, step))


def _add_gram(out: Tensor, x: Tensor, w: Tensor) -> None:
    """out (N, D, D) += sum_n w_n x_nᵀ x_n for x (b, N, L, D), below the diagonal of blocks only:
    close to half of the products."""
    uniform = bool((w == w[0]).all()) if len(w) else True
    scale = float(w[0]) if uniform and len(w) else 1.0
    for target, each in zip(out, x.unbind(1), strict=True):  # (D, D), (b, L, D)
        weighted = each if uniform else each * w[:, None, None]
        if each.shape[1] == 1:
            each, weighted = each.transpose(0, 1), weighted.transpose(0, 1)
        width = each.shape[-1]
        for start in range(0, width, _COLUMNS):
            end = min(width, start + _COLUMNS)
            left, right = each[..., start:end].mT, weighted[..., :end]
            target[start:end, :end].addbmm_(left, right, alpha=scale)


def _symmetric(lower: Tensor) -> Tensor:
    lower = lower.tril()
    return lower + lower.tril(-1).mT

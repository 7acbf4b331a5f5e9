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
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..hooks import Factor, Outer, Positions, Trace, Use, accumulator, unfold, upcast
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

    def add(
        self, factor: Outer | Positions, w: Tensor, rule: PositionRule, use: Use | None = None
    ) -> None:
        """use: the layer's only call, where its rows can be taken one by one (``_by_rows``)."""
        g, inputs = _sides(factor, rule)
        w = w.to(g.dtype)
        for each in g:  # (B, N, L, O)
            _add_gram(self.left, each, w)
        if use is not None and rule == "expand":
            self._add_rows(use, w.abs())
        for part in _parts(self, g) if use is None or rule == "reduce" else ():
            a, size = inputs(part), w[part].abs()
            width = a.shape[-1]
            _add_gram(self.right[:, :width, :width], a, size)
            if width < self.right.shape[-1]:
                total = a[:, :, 0] if a.shape[2] == 1 else a.sum(2)
                self.right[:, -1, :-1] += torch.tensordot(size, total, dims=1)
                self.right[:, -1, -1] += size.sum() * a.shape[2]
        self.count += w.abs().sum() * g.shape[3]

    def _add_rows(self, use: Use, w: Tensor) -> None:
        """The inputs of a convolution with a vertical stride of 1, unfolded sideways alone.

        R[dy', dy] = sum_y U(y + dy' - dy) U(y)ᵀ over the rows y from dy to dy + H - 1 of the
        padded image: for one shift dy' - dy the sums differ in the first and the last rows only.
        So k matrix products of all rows do for a kernel of height k, where patches need k².
        """
        module: Any = use.module
        high, wide = module.kernel_size
        rows, width = use.shape[2:]
        flat = SimpleNamespace(
            kernel_size=(1, wide),
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            padding_mode=module.padding_mode,
        )
        n = use.a.shape[1] * wide
        total = w.new_zeros(high, n, high, n)  # [dy', :, dy, :], dy <= dy'
        sums = w.new_zeros(high, n)
        step = max(1, _CHUNK // (4 * n * (rows + high) * width))
        for start in range(0, len(w), step):
            size = w[start : start + step]
            x = unfold(flat, upcast(use.a[start : start + step]))  # (b, C * wide, rows * width)
            _add_shifted(total, x, size, rows, width)
            each = (size @ x.flatten(1)).reshape(n, -1, width).sum(-1)
            sums += torch.stack([each[:, dy : dy + rows].sum(-1) for dy in range(high)])
        columns = high * n
        order = torch.arange(columns, device=w.device).reshape(high, -1, wide)
        order = order.transpose(0, 1).flatten()  # (C, high, wide) from (high, C, wide)
        gram = _symmetric(total.reshape(columns, columns))
        right = self.right[0]
        right[:columns, :columns] += gram[order.unsqueeze(1), order]
        if len(right) > columns:
            right[-1, :-1] += sums.flatten()[order]
            right[-1, -1] += w.sum() * rows * width

    def kronecker(self) -> Kronecker:
        """The factors, in the tensors of the sums, which are then used up."""
        count = torch.where(self.count == 0, torch.ones_like(self.count), self.count)
        left, right = _symmetric(self.left), _symmetric(self.right).div_(count)
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
            use = _by_rows(trace, weight)
            self.layers[weight].add(factor, w, self.rule, use)  # type: ignore[arg-type]
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

    def over(self, ranks: Ranks) -> None:
        """The sums of all ranks in place of this one's, which may have seen nothing."""
        known = ranks.objects(
            (
                {n: (x.shapes, x.left.shape, x.right.shape) for n, x in self.layers.items()},
                {n: x.shape for n, x in self.rest.items()},
                self.seen,
            )
        )
        for layers, rest, seen in known:
            for name, key in seen.items():
                self._claim([name], key)
            for name, (shapes, left, right) in layers.items():
                zeros = partial(_zeros_like, self.params[name])
                self.layers.setdefault(name, Layer(shapes, zeros(left), zeros(right), zeros(())))
            for name, shape in rest.items():
                self.rest.setdefault(name, _zeros_like(self.params[name], shape))
        order = sorted(self.layers), sorted(self.rest)
        held = [x for n in order[0] for x in self._sums_of(n)] + [self.rest[n] for n in order[1]]
        found = iter(ranks.sum(held))
        for n in order[0]:
            layer = self.layers[n]
            self.layers[n] = Layer(layer.shapes, next(found), next(found), next(found))
        for n in order[1]:
            self.rest[n] = next(found)

    def _sums_of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.layers[name]
        return layer.left, layer.right, layer.count

    def blocks(self) -> tuple[Curvature, ...]:
        """The blocks in the order of the parameters; zeros for what took no part. Uses up the sums:
        factors are the largest tensors of an update, and copies would be its peak."""
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


def _zeros_like(p: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=accumulator(p.dtype), device=p.device)


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

    def over(self, ranks: Ranks) -> None:
        """The sums of all ranks in place of this one's, which may have seen nothing."""
        for shapes in ranks.objects({n: x.shape for n, x in self.values.items()}):
            for name, shape in shapes.items():
                like = self.bases[name].values
                self.values.setdefault(name, like.new_zeros(shape))
        names = sorted(self.values)
        found = ranks.sum([self.values[n] for n in names])
        self.values.update(zip(names, found, strict=True))

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


def _add_shifted(total: Tensor, x: Tensor, w: Tensor, rows: int, width: int) -> None:
    """total (k, D, k, D), the blocks dy <= dy', += those of x (b, D, rows of the image * width)."""
    high, size = total.shape[:2]
    uniform = bool((w == w[0]).all())
    scale, weighted = (float(w[0]), x) if uniform else (1.0, x * w[:, None, None])

    def add(out: Tensor, shift: int, start: int, end: int) -> None:
        """out += sum over rows y in [start, end) of U(y + shift) U(y)ᵀ."""
        left = x[:, :, (start + shift) * width : (end + shift) * width]
        out.addbmm_(left, weighted[:, :, start * width : end * width].mT, alpha=scale)

    for shift in range(high):
        last = high - 1 - shift  # the largest dy; rows from there on are in all sums
        core = x.new_zeros(size, size)
        if last < rows:
            add(core, shift, last, rows)
        for dy in range(last + 1):
            block = core.clone()
            if last < rows:
                add(block, shift, dy, last)
                add(block, shift, rows, dy + rows)
            else:
                add(block, shift, dy, dy + rows)
            total[dy + shift, :, dy] += block


def _by_rows(trace: Trace, weight: str) -> Use | None:
    """The only call of a convolution whose kernel moves down one row at a time."""
    (use, _), *more = trace.uses_of[weight]
    module: Any = use.module
    fits = (
        not more
        and type(module) is nn.Conv2d
        and module.groups == 1
        and module.stride[0] == module.dilation[0] == 1
        and module.kernel_size[0] > 1
        and not isinstance(module.padding, str)
        and use.shape[0] == len(trace.f)
    )
    return use if fits else None


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
    """The symmetric matrices of which ``lower`` has the lower half, in its place."""
    below = lower.tril_().tril(-1)
    return lower.add_(below.mT)

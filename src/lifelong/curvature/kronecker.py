r"""Kronecker-factored curvature of one layer, and its eigenvalue-corrected form.

The layer has a weight (N O, ...) in N groups of O output channels, and maybe a bias; its weights
are N matrices W_n (O, I), the bias their last column (its input is the number 1), and

    G = sum_t ⊕_n L_tn ⊗ R_tn,      G V = sum_t L_tn V_n R_tn,      <V, G V> = sum tr(Vᵀ L V R),

with L (O, O) from the gradients at the layer's output and R (I, I) from its inputs: K-FAC
(Martens & Grosse 2015), groups and positions of convolutions as in Grosse & Martens 2016. Either
factor may be stored as its diagonal, as an embedding's table needs.

T products come from T data sets. Those with one factor in common, up to a number, add to one
product (a layer of outputs with Gaussian noise: L is the same for any data), and ``+`` makes it;
another sum of products is no product, so what needs one (an inverse, draws, a determinant) asks for
``merge()`` first. Adding the factors instead, L_1 + L_2 and
R_1 + R_2, as some libraries do, counts the cross terms L_1 ⊗ R_2 and L_2 ⊗ R_1 too: a curvature
that grows with the square of the number of data sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..models import Params, nbytes
from .base import (
    Shapes,
    describe,
    eigh,
    log_sum,
    normal,
    require_dense,
    require_positive,
    require_rows,
    require_same,
    require_samples,
    require_shapes,
    require_state,
    shapes_from_state,
    shapes_state,
)
from .dense import Dense

_KRONECKER = "kronecker."
_EIGEN = "eigen_kronecker."
_STRETCH = 2**16  # columns of all factors that are in double precision at once
_ROUNDING = 8  # relative errors of eps at which two factors are thought to be multiples


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker:
    """G = sum_t ⊕_n L_tn ⊗ R_tn over one layer.

    left: (T, N, O, O), right: (T, N, I, I), or (T, N, O) and (T, N, I) for diagonal factors;
    shapes: name -> shape of the weight, then of the bias if the last column of R is the bias.

    Raises ValueError where the factors do not fit the shapes.
    """

    left: Tensor
    right: Tensor
    shapes: Shapes

    def __post_init__(self) -> None:
        layout = _layout(self.shapes, self.left.shape[1] if self.left.ndim > 1 else 0)
        for name, factor, size in zip(("left", "right"), (self.left, self.right), layout[1:],
                                      strict=True):  # fmt: skip
            lead = (len(self.left), layout[0])
            if factor.shape not in ((*lead, size, size), (*lead, size)):
                raise ValueError(
                    f"expected a {name} factor of shape (T, N, {size}, {size}) or (T, N, {size}), "
                    f"the same T and N in both, for parameters "
                    f"{ {n: tuple(s) for n, s in self.shapes.items()} }, got {tuple(factor.shape)}"
                )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Kronecker:
        """Raises CheckpointError where the tensors are not those of a Kronecker curvature."""
        names = [_KRONECKER + part for part in ("left", "right")]
        prefix = _KRONECKER + "shape."
        require_state(state, "Kronecker", names, (prefix,))
        return cls(state[names[0]], state[names[1]], shapes_from_state(prefix, state))

    def __repr__(self) -> str:
        return describe(self)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            _KRONECKER + "left": self.left,
            _KRONECKER + "right": self.right,
            **shapes_state(_KRONECKER + "shape.", self.shapes),
        }

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> = sum_tn tr(Dᵀ L D R) in nats."""
        x = self._matrix(d)
        return (x * self._product(x)).sum()

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v = sum_tn L V R."""
        return _params(self.shapes, self._product(self._matrix(v)))

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v by the eigenvectors of the factors.

        This and all below raise ValueError where G is not one product, and where the damped
        matrix is not positive definite.
        """
        return self.eigen.inverse_mv(v, damping)

    def diagonal(self) -> Params:
        left, right = (_diagonal(x) for x in (self.left, self.right))
        return _params(self.shapes, torch.einsum("tno,tni->noi", left, right))

    def inverse_diagonal(self, damping: float = 0.0) -> Params:
        return self.eigen.inverse_diagonal(damping)

    def sample(
        self,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draws of N(0, (G + damping I)⁻¹): name -> (S, *shape)."""
        return self.eigen.sample(damping, num_samples=num_samples, generator=generator)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log |G + damping I|."""
        return self.eigen.logdet(damping)

    def half(self, rows: Mapping[str, Tensor], damping: float = 0.0) -> Tensor:
        """Rows (..., *shape) to (..., P)."""
        return self.eigen.half(rows, damping)

    def dense(self) -> Dense:
        require_dense(self.shapes, self.left.element_size(), "keep it as Kronecker factors")
        blocks = [
            sum((torch.kron(a[n], b[n]) for a, b in self._full()), start=self.left.new_zeros(()))
            for n in range(self.left.shape[1])
        ]
        return _dense(self.shapes, blocks)

    @property
    def num_products(self) -> int:
        """T."""
        return len(self.left)

    def merge(self) -> Kronecker:
        """One product with the trace of G, in the direction of the one that is nearest to G in the
        Frobenius norm (Van Loan & Pitsianis 1993).

        The nearest one is smaller than G in trace, as a projection is: task after task the past
        would fade. Where either trace is not positive (a difference), the nearest one itself.

        The rearrangement sum_t vec(L_t) vec(R_t)ᵀ has rank T, and its leading singular pair is the
        answer: found from matrices of T x T, defined for singular factors as well, positive
        semi-definite for positive semi-definite products, and the same in any order of the sum.
        """
        return Kronecker.merged([self])

    @staticmethod
    def merged(sums: Sequence[Kronecker]) -> Kronecker:
        """``merge()`` of what they add up to, of which nothing but the result is held.

        StaleAnchorError where the parameters differ, ValueError where the groups do.
        """
        first = sums[0]
        if len(sums) == 1 and first.num_products == 1:
            return first
        for g in sums[1:]:
            _require_alike(first.shapes, g.shapes, first.left.shape[1], g.left.shape[1])
        lefts, rights = (
            [factor for one in _alike(*factors) for factor in one.unbind()]
            for factors in ([g.left for g in sums], [g.right for g in sums])
        )
        pairs = [
            _nearest([left[n] for left in lefts], [right[n] for right in rights])
            for n in range(first.left.shape[1])
        ]
        left, right = (torch.stack(parts).unsqueeze(0) for parts in zip(*pairs, strict=True))
        return Kronecker(left, right, first.shapes)

    def positive_part(self) -> Kronecker:
        """One product of positive semi-definite factors: ``merge()`` with their negative
        eigenvalues at 0. What a difference stands for, as near as one product can."""
        one = self.merge()
        return Kronecker(_clamped(one.left), _clamped(one.right), self.shapes)

    @cached_property
    def eigen(self) -> EigenKronecker:
        """The same matrix by its eigenvectors; ValueError where it is not one product."""
        _require_one(self.num_products)
        (a, left), (b, right) = (_factor_eigh(x) for x in (self.left, self.right))
        return EigenKronecker(left, right, a.unsqueeze(-1) * b.unsqueeze(-2), self.shapes)

    def __add__(self, other: Kronecker) -> Kronecker:
        """All products of both; two whose left or right factors are multiples of one another, to
        rounding, become the one product that is their sum: L ⊗ R + c L ⊗ S = L ⊗ (R + c S).

        StaleAnchorError where the parameters differ, ValueError where the groups do.
        """
        if not isinstance(other, Kronecker):
            return NotImplemented
        _require_alike(self.shapes, other.shapes, self.left.shape[1], other.left.shape[1])
        lefts, rights = (
            tuple(x.unbind() for x in _alike(*pair))
            for pair in ((self.left, other.left), (self.right, other.right))
        )
        products = list(zip(lefts[0], rights[0], strict=True))
        for new in zip(lefts[1], rights[1], strict=True):
            _collect(products, new)
        left, right = (torch.stack(parts) for parts in zip(*products, strict=True))
        return Kronecker(left, right, self.shapes)

    def __mul__(self, factor: float) -> Kronecker:
        return Kronecker(self.left * factor, self.right, self.shapes)

    __rmul__ = __mul__

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Kronecker:
        left, right = (x.to(device=device, dtype=dtype) for x in (self.left, self.right))
        return Kronecker(left, right, self.shapes)

    def rounded(self, dtype: torch.dtype) -> Kronecker:
        """With factors in ``dtype``: in bfloat16 a product with G has a relative error of about
        0.4 %, and takes a quarter of the time on processors that multiply bfloat16."""
        return self.to(dtype=dtype)

    @property
    def num_bytes(self) -> int:
        return nbytes(self.left) + nbytes(self.right)

    def _matrix(self, v: Mapping[str, Tensor]) -> Tensor:
        require_same(self.shapes, v, "the vector")
        # Rounded first, where it is: half the bytes to join.
        rows = {n: v[n].to(self.left.dtype) for n in self.shapes}
        return _matrix(self.shapes, self.left.shape[1], rows)

    def _product(self, x: Tensor) -> Tensor:
        """sum_t L X R: (N, O, I) to (N, O, I)."""
        products = _right(_left(self.left, x), self.right)
        return products[0] if len(products) == 1 else products.sum(0)

    def _full(self) -> list[tuple[Tensor, Tensor]]:
        """The products' factors as matrices."""
        pair = (x if x.ndim == 4 else torch.diag_embed(x) for x in (self.left, self.right))
        return list(zip(*pair, strict=True))


@dataclass(frozen=True, eq=False, repr=False)
class EigenKronecker:
    """G = sum_t ⊕_n (U_tn ⊗ V_tn) diag(s_tn) (U_tn ⊗ V_tn)ᵀ over one layer.

    left: U (T, N, O, O) and right: V (T, N, I, I), orthogonal, None for the identity; values: s
    (T, N, O, I). With U, V the eigenvectors of K-FAC's factors and s the diagonal of the true
    curvature in that basis it is the nearest such matrix in the Frobenius norm, so never worse
    than K-FAC (EKFAC, George et al. 2018).

    Raises ValueError where the parts do not fit the shapes.
    """

    left: Tensor | None
    right: Tensor | None
    values: Tensor
    shapes: Shapes

    def __post_init__(self) -> None:
        groups = self.values.shape[1] if self.values.ndim == 4 else 0
        _, rows, columns = _layout(self.shapes, groups)
        if self.values.shape[2:] != (rows, columns):
            raise ValueError(
                f"expected values of shape (T, N, {rows}, {columns}), got "
                f"{tuple(self.values.shape)}"
            )
        lead = self.values.shape[:2]
        for name, basis, size in (("left", self.left, rows), ("right", self.right, columns)):
            if basis is not None and basis.shape != (*lead, size, size):
                raise ValueError(
                    f"expected a {name} basis of shape {(*lead, size, size)}, got "
                    f"{tuple(basis.shape)}"
                )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> EigenKronecker:
        """Raises CheckpointError where the tensors are not those of an EigenKronecker."""
        prefix = _EIGEN + "shape."
        optional = (_EIGEN + "left", _EIGEN + "right")
        require_state(state, "EigenKronecker", [_EIGEN + "values"], (prefix, *optional))
        left, right = (state.get(key) for key in optional)
        return cls(left, right, state[_EIGEN + "values"], shapes_from_state(prefix, state))

    def __repr__(self) -> str:
        return describe(self)

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"left": self.left, "right": self.right, "values": self.values}
        return {
            **{_EIGEN + name: x.contiguous() for name, x in parts.items() if x is not None},
            **shapes_state(_EIGEN + "shape.", self.shapes),
        }

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> = sum_t s . (Uᵀ D V)² in nats."""
        return (self.values * self._turned(self._matrix(d)).square()).sum()

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v = sum_t U (s . (Uᵀ V V)) Vᵀ."""
        x = self.values * self._turned(self._matrix(v))
        return _params(self.shapes, self._back(x).sum(0))

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v.

        This and all below raise ValueError where G has several terms, and where the damped
        matrix is not positive definite.
        """
        x = self._turned(self._matrix(v)) / self._damped(damping)
        return _params(self.shapes, self._back(x)[0])

    def diagonal(self) -> Params:
        return _params(self.shapes, self._squares(self.values).sum(0))

    def inverse_diagonal(self, damping: float = 0.0) -> Params:
        return _params(self.shapes, self._squares(self._damped(damping).reciprocal())[0])

    def sample(
        self,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draws of N(0, (G + damping I)⁻¹): name -> (S, *shape)."""
        require_samples(num_samples, self.shapes, self.values)
        scale = self._damped(damping).rsqrt()
        x = scale * normal((num_samples, *self.values.shape), self.values, generator)
        return _params(self.shapes, self._back(x)[:, 0])

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log |G + damping I|."""
        _require_one(len(self.values))
        return log_sum(self.values, damping)

    def half(self, rows: Mapping[str, Tensor], damping: float = 0.0) -> Tensor:
        """Rows (..., *shape) to (..., P)."""
        require_rows(self.shapes, rows)
        x = _matrix(self.shapes, self.values.shape[1], rows).to(self.values.dtype)
        return (self._turned(x) * self._damped(damping).rsqrt()).flatten(-4)

    def dense(self) -> Dense:
        require_dense(self.shapes, self.values.element_size(), "keep it as Kronecker factors")
        blocks = []
        for n in range(self.values.shape[1]):
            block = self.values.new_zeros(())
            for t, s in enumerate(self.values[:, n]):
                left, right = (
                    torch.eye(size, dtype=s.dtype, device=s.device) if x is None else x[t, n]
                    for x, size in ((self.left, s.shape[0]), (self.right, s.shape[1]))
                )
                basis = torch.kron(left.contiguous(), right.contiguous())
                block = block + (basis * s.flatten()) @ basis.T
            blocks.append(block)
        return _dense(self.shapes, blocks)

    @property
    def num_products(self) -> int:
        """T."""
        return len(self.values)

    def merge(self) -> EigenKronecker:
        """One term: the nearest in the Frobenius norm with the eigenvectors of the marginals.

        U diagonalises sum_t of the partial trace over the inputs, V that over the outputs (each
        marginal is exact for the sum), and the values are the diagonal of G in that basis.
        """
        if self.num_products == 1:
            return self
        left = _marginal_basis(self.left, self.values.sum(-1))
        right = _marginal_basis(self.right, self.values.sum(-2))
        # s_oi = sum_t sum_jk (UᵀU_t)²_oj s_tjk (VᵀV_t)²_ik
        x = self.values
        if left is not None and self.left is not None:
            x = (left.mT @ self.left).square() @ x
        if right is not None and self.right is not None:
            x = x @ (right.mT @ self.right).square().mT
        return EigenKronecker(left, right, x.sum(0, keepdim=True), self.shapes)

    def __add__(self, other: EigenKronecker) -> EigenKronecker:
        """The terms of both. StaleAnchorError where the parameters differ, ValueError where the
        groups do."""
        if not isinstance(other, EigenKronecker):
            return NotImplemented
        _require_alike(self.shapes, other.shapes, self.values.shape[1], other.values.shape[1])
        left = _joined(self.left, other.left, self.values, other.values, 2)
        right = _joined(self.right, other.right, self.values, other.values, 3)
        values = torch.cat([self.values, other.values])
        return EigenKronecker(left, right, values, self.shapes)

    def __mul__(self, factor: float) -> EigenKronecker:
        return EigenKronecker(self.left, self.right, self.values * factor, self.shapes)

    __rmul__ = __mul__

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EigenKronecker:
        left, right = (
            None if x is None else x.to(device=device, dtype=dtype) for x in (self.left, self.right)
        )
        values = self.values.to(device=device, dtype=dtype)
        return EigenKronecker(left, right, values, self.shapes)

    @property
    def num_bytes(self) -> int:
        return nbytes(self.left) + nbytes(self.right) + nbytes(self.values)

    def _matrix(self, v: Mapping[str, Tensor]) -> Tensor:
        require_same(self.shapes, v, "the vector")
        return _matrix(self.shapes, self.values.shape[1], v).to(self.values.dtype)

    def _turned(self, x: Tensor) -> Tensor:
        """Uᵀ X V: (..., N, O, I) to (..., T, N, O, I)."""
        left = None if self.left is None else self.left.mT
        return _right(_left(left, x.unsqueeze(-4)), self.right)

    def _back(self, x: Tensor) -> Tensor:
        """U X Vᵀ: (..., T, N, O, I) to the same."""
        right = None if self.right is None else self.right.mT
        return _right(_left(self.left, x), right)

    def _squares(self, s: Tensor) -> Tensor:
        """The diagonal of (U ⊗ V) diag(s) (U ⊗ V)ᵀ: (T, N, O, I)."""
        left = None if self.left is None else self.left.square()
        right = None if self.right is None else self.right.square().mT
        return _right(_left(left, s), right)

    def _damped(self, damping: float) -> Tensor:
        _require_one(len(self.values))
        require_positive(float(self.values.min()) + damping, damping)
        return self.values + damping


# --- the layer's weights as matrices ------------------------------------------------------------


def _layout(shapes: Shapes, groups: int) -> tuple[int, int, int]:
    """(N, O, I) of a weight and maybe a bias; ValueError for other parameters."""
    found = list(shapes.values())
    weight = found[0] if found else torch.Size()
    bias = found[1:]
    if not (
        len(weight) > 1
        and (not bias or bias == [weight[:1]])
        and groups > 0
        and weight[0] % groups == 0
    ):
        raise ValueError(
            "expected a weight (N O, ...) and maybe its bias (N O,), in N groups, got shapes "
            f"{ {n: tuple(s) for n, s in shapes.items()} } and N = {groups}"
        )
    return groups, weight[0] // groups, weight[1:].numel() + len(bias)


def _matrix(shapes: Shapes, groups: int, rows: Mapping[str, Tensor]) -> Tensor:
    """Name -> (..., *shape) to (..., N, O, I), the bias in the last column."""
    parts = [
        rows[name].reshape(
            *rows[name].shape[: rows[name].ndim - len(shape)], groups, shape[0] // groups, -1
        )
        for name, shape in shapes.items()
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _params(shapes: Shapes, x: Tensor) -> Params:
    """(..., N, O, I) to name -> (..., *shape)."""
    widths = [shape[1:].numel() for shape in shapes.values()]
    return {
        name: part.reshape(*x.shape[:-3], *shape)
        for (name, shape), part in zip(shapes.items(), x.split(widths, dim=-1), strict=True)
    }


def _left(factor: Tensor | None, x: Tensor) -> Tensor:
    """L X for a matrix, a diagonal (one dimension less) or the identity."""
    if factor is None:
        return x
    return factor @ x if factor.ndim == 4 else factor.unsqueeze(-1) * x


def _right(x: Tensor, factor: Tensor | None) -> Tensor:
    """X R, likewise."""
    if factor is None:
        return x
    return x @ factor if factor.ndim == 4 else x * factor.unsqueeze(-2)


def _diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1) if factor.ndim == 4 else factor


def _dense(shapes: Shapes, blocks: list[Tensor]) -> Dense:
    """The groups' (O I, O I) blocks, moved to where the parameters' numbers are."""
    x = torch.block_diag(*blocks)
    groups, rows, columns = _layout(shapes, len(blocks))
    at = torch.arange(len(x), device=x.device).reshape(groups, rows, columns)
    index = torch.cat([i.flatten() for i in _params(shapes, at).values()])
    return Dense(x[index.unsqueeze(1), index], shapes)


# --- products -----------------------------------------------------------------------------------


def _factor_eigh(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    return (factor, None) if factor.ndim == 3 else eigh(factor)


def _collect(products: list[tuple[Tensor, Tensor]], new: tuple[Tensor, Tensor]) -> None:
    """Add a product, factors (N, ...), to the first that shares a factor with it, or to the end."""
    for t, (left, right) in enumerate(products):
        ratio = _ratio(new[0], left)
        if ratio is not None:
            products[t] = left, right + _each(ratio, new[1]) * new[1]
            return
        ratio = _ratio(new[1], right)
        if ratio is not None:
            products[t] = left + _each(ratio, new[0]) * new[0], right
            return
    products.append(new)


def _ratio(x: Tensor, base: Tensor) -> Tensor | None:
    """c (N,) with x = c base to rounding, for x and base (N, ...); None where there is none."""
    size = _dots(base, base)
    c = _dots(base, x) / torch.where(size > 0, size, torch.ones_like(size))
    apart = torch.zeros_like(c)
    for a, b in _stretches(base.flatten(1), x.flatten(1)):
        apart += (b - c.unsqueeze(1) * a).square().sum(1)
    limit = _ROUNDING * torch.finfo(x.dtype).eps * _dots(x, x).sqrt()
    return None if bool((apart.sqrt() > limit).any()) else c.to(x.dtype)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """(N,) <x_n, y_n> of x and y (N, ...)."""
    parts = _stretches(x.flatten(1), y.flatten(1))
    return torch.stack([(a * b).sum(1) for a, b in parts]).sum(0)


def _stretches(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows (..., K), a stretch of columns at a time, in double precision: copies of whole factors
    would be the largest tensors of an update."""
    for parts in zip(*(x.split(_STRETCH, dim=-1) for x in rows), strict=True):
        yield tuple(part.double() for part in parts)


def _each(c: Tensor, x: Tensor) -> Tensor:
    """One number for each group, to multiply x (N, ...) with."""
    return c.reshape(-1, *[1] * (x.ndim - 1))


def _nearest(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The pair a, b that minimises |sum_t left_t ⊗ right_t - a ⊗ b|."""
    # a = sum_t w_t left_t and b = sum_t q_t right_t. With the Gram matrices L of the left factors
    # and R = C Cᵀ of the right ones, as rows: w = C z and q = L w / s, for the leading eigenpair
    # s², z of Cᵀ L C. Nothing of the size of a factor is held but the sums.
    of_left, of_right = (_gram(factor) for factor in (left, right))
    values, vectors = torch.linalg.eigh(of_right)
    root = vectors * values.clamp(min=0).sqrt()
    values, vectors = torch.linalg.eigh(root.T @ of_left @ root)
    sigma = values[-1].clamp(min=0).sqrt()
    w = root @ vectors[:, -1]
    scale = torch.where(sigma > 0, sigma, 1.0).rsqrt()
    a = _combined(scale * w, left)
    b = _combined(scale * (of_left @ w) / torch.where(sigma > 0, sigma, 1.0), right)
    sign = -1.0 if float(_trace(b)) < 0 else 1.0
    whole = sum(float(_trace(x) * _trace(y)) for x, y in zip(left, right, strict=True))
    part = float(_trace(a) * _trace(b))
    share = whole / part if whole > 0 and part > 0 else 1.0
    return a.mul_(sign * share), b.mul_(sign)


def _gram(factors: Sequence[Tensor]) -> Tensor:
    """(T, T) inner products."""
    stretches = _stretches(*(x.flatten() for x in factors))
    return torch.stack([x @ x.T for x in map(torch.stack, stretches)]).sum(0)


def _combined(weights: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """sum_t weights_t factors_t."""
    total = torch.zeros_like(factors[0])
    for weight, factor in zip(weights.tolist(), factors, strict=True):
        total.add_(factor, alpha=weight)
    return total


def _clamped(factor: Tensor) -> Tensor:
    """Negative eigenvalues at 0, of matrices (T, N, n, n) or diagonals (T, N, n)."""
    if factor.ndim == 3:
        return factor.clamp(min=0)
    values, vectors = eigh(factor)
    return (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT


def _trace(x: Tensor) -> Tensor:
    """Of a matrix, or of a diagonal."""
    return (x.diagonal() if x.ndim == 2 else x).double().sum()


def _marginal_basis(bases: Tensor | None, values: Tensor) -> Tensor | None:
    """Eigenvectors of sum_t Q_t diag(values_t) Q_tᵀ: (T, N, n, n), (T, N, n) to (1, N, n, n)."""
    if bases is None:
        return None
    return eigh(((bases * values.unsqueeze(-2)) @ bases.mT).sum(0, keepdim=True))[1]


def _joined(
    x: Tensor | None, y: Tensor | None, ours: Tensor, theirs: Tensor, dim: int
) -> Tensor | None:
    """The bases of both sums, the identity written out where only one is it."""
    if x is None and y is None:
        return None
    eye = torch.eye(ours.shape[dim], dtype=ours.dtype, device=ours.device)
    bases = ((x, ours), (y, theirs))
    return torch.cat([eye.expand(*s.shape[:2], -1, -1) if b is None else b for b, s in bases])


def _alike(*factors: Tensor) -> tuple[Tensor, ...]:
    """All diagonal, or all matrices."""
    if len({x.ndim for x in factors}) == 1:
        return factors
    return tuple(x if x.ndim == 4 else torch.diag_embed(x) for x in factors)


def _require_one(count: int) -> None:
    """Raise ValueError where G is a sum of several products."""
    if count != 1:
        raise ValueError(
            f"expected one Kronecker product, got a sum of {count}, of which no inverse, sample or "
            "determinant is known; call merge() for the single product nearest to it"
        )


def _require_alike(ours: Shapes, theirs: Shapes, groups: int, others: int) -> None:
    require_shapes(ours, theirs, "the curvature to add")
    if groups != others:
        raise ValueError(f"cannot add curvatures of {groups} and of {others} groups of channels")

r"""Low-rank curvature: a few directions in weight space.

G = sum_r w_r v_r v_rᵀ. With an orthonormal basis U of the directions and E, lambda the
eigenvectors and eigenvalues of G in it, whatever damping leaves the rest of space alone:

    (G + delta I)^p = delta^p (I - U Uᵀ) + U (lambda + delta)^p Uᵀ,

the identity of Woodbury for p = -1, and a symmetric root for p = -1/2. Cost: O(P R²) once, then
O(P R) for each product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..models import Params, nbytes
from .base import (
    Shapes,
    describe,
    eigh,
    flatten,
    from_numbered,
    log_sum,
    normal,
    numbered,
    numel,
    require_dense,
    require_positive,
    require_rows,
    require_same,
    require_samples,
    require_shapes,
    require_state,
    unflatten,
)
from .dense import Dense

_WEIGHTS = "low_rank.weights"
_FACTOR = "low_rank.factor."


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """G = sum_r weights_r v_r v_rᵀ. factors: name -> (R, *shape), the parts of v_r; weights: (R,),
    of either sign.

    Raises ValueError where the numbers of directions differ.
    """

    factors: Params
    weights: Tensor

    def __post_init__(self) -> None:
        ranks = {name: len(v) for name, v in self.factors.items()}
        if not ranks or self.weights.ndim != 1 or set(ranks.values()) != {len(self.weights)}:
            raise ValueError(
                "expected weights (R,) and factors (R, *shape), got "
                f"{tuple(self.weights.shape)} and "
                f"{ {n: tuple(v.shape) for n, v in self.factors.items()} }"
            )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> LowRank:
        """Raises CheckpointError where the tensors are not those of a low-rank curvature."""
        require_state(state, "LowRank", [_WEIGHTS], (_FACTOR,))
        return cls(from_numbered(_FACTOR, state), state[_WEIGHTS])

    def __repr__(self) -> str:
        return describe(self)

    def state_dict(self) -> dict[str, Tensor]:
        return {_WEIGHTS: self.weights, **numbered(_FACTOR, self.factors)}

    @property
    def shapes(self) -> Shapes:
        return {name: v.shape[1:] for name, v in self.factors.items()}

    @property
    def rank(self) -> int:
        """R, the number of directions."""
        return len(self.weights)

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> = sum_r w_r (v_r . d)² in nats."""
        return (self.weights * self._along(d).square()).sum()

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v."""
        x = self.weights * self._along(v)
        return {name: torch.tensordot(x, factor, 1) for name, factor in self.factors.items()}

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v; ValueError where that matrix is not positive definite, as it is
        never without damping where R < P."""
        require_same(self.shapes, v, "the vector")
        return self._shaped(self._power(self._flat(v), damping, -1.0))

    def diagonal(self) -> Params:
        return {
            name: torch.tensordot(self.weights, factor.square(), 1)
            for name, factor in self.factors.items()
        }

    def inverse_diagonal(self, damping: float = 0.0) -> Params:
        basis, _ = self._spectrum
        rest, scale = self._scales(damping, -1.0)
        return self._shaped(rest + basis.square() @ scale)

    def sample(
        self,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draws of N(0, (G + damping I)⁻¹): name -> (S, *shape)."""
        require_samples(num_samples, self.shapes, self.weights)
        noise = normal((num_samples, numel(self.shapes)), self.weights, generator)
        return self._shaped(self._power(noise, damping, -0.5))

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log |G + damping I| = (P - R) log damping + sum_r log(lambda_r + damping)."""
        basis, values = self._spectrum
        rest = basis.shape[0] - basis.shape[1]
        total = log_sum(values, damping)
        return total if not rest else total + rest * log_sum(values.new_zeros(()), damping)

    def half(self, rows: Mapping[str, Tensor], damping: float = 0.0) -> Tensor:
        """Rows (..., *shape) to (..., P)."""
        require_rows(self.shapes, rows)
        return self._power(self._flat(rows), damping, -0.5)

    def dense(self) -> Dense:
        require_dense(self.shapes, self.weights.element_size(), "keep it in its directions")
        v = self._directions
        return Dense((v.T * self.weights) @ v, self.shapes)

    def truncate(self, rank: int) -> LowRank:
        """The nearest curvature of this rank in the Frobenius norm: the eigenvalues that are
        largest in size. Raises ValueError for a rank below 1."""
        if rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {rank}")
        basis, values = self._spectrum
        keep = values.abs().argsort(descending=True)[:rank]
        factors = unflatten(self.shapes, basis[:, keep].T)
        return LowRank({n: v.clone() for n, v in factors.items()}, values[keep])

    def __add__(self, other: LowRank) -> LowRank:
        """The directions of both; ``truncate`` bounds their number. StaleAnchorError where the
        parameters differ."""
        if not isinstance(other, LowRank):
            return NotImplemented
        require_shapes(self.shapes, other.shapes, "the curvature to add")
        factors = {n: torch.cat([v, other.factors[n]]) for n, v in self.factors.items()}
        return LowRank(factors, torch.cat([self.weights, other.weights]))

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.factors, self.weights * factor)

    __rmul__ = __mul__

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LowRank:
        factors = {n: v.to(device=device, dtype=dtype) for n, v in self.factors.items()}
        return LowRank(factors, self.weights.to(device=device, dtype=dtype))

    @property
    def num_bytes(self) -> int:
        return nbytes(self.factors) + nbytes(self.weights)

    @property
    def _directions(self) -> Tensor:
        """(R, P)."""
        return flatten(self.shapes, self.factors)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """U (P, R') orthonormal and lambda (R',) with G = U diag(lambda) Uᵀ, R' = min(R, P)."""
        q, r = torch.linalg.qr(self._directions.T)
        values, vectors = eigh((r * self.weights) @ r.T)
        return q @ vectors, values

    def _scales(self, damping: float, power: float) -> tuple[float, Tensor]:
        """delta^p and (lambda + delta)^p - delta^p; the first is 0 where U spans all of space."""
        basis, values = self._spectrum
        spans = basis.shape[0] == basis.shape[1]
        smallest = float(values.min()) if spans else min(0.0, float(values.min()))
        require_positive(smallest + damping, damping)
        rest = 0.0 if spans else damping**power
        return rest, (values + damping) ** power - rest

    def _power(self, x: Tensor, damping: float, power: float) -> Tensor:
        """(G + damping I)^power x: (..., P) to the same."""
        basis, _ = self._spectrum
        rest, scale = self._scales(damping, power)
        return rest * x + (scale * (x @ basis)) @ basis.T

    def _along(self, v: Mapping[str, Tensor]) -> Tensor:
        """v_r . v: (R,)."""
        require_same(self.shapes, v, "the vector")
        return self._directions @ self._flat(v)

    def _flat(self, v: Mapping[str, Tensor]) -> Tensor:
        return flatten(self.shapes, v).to(self.weights.dtype)

    def _shaped(self, x: Tensor) -> Params:
        return unflatten(self.shapes, x)

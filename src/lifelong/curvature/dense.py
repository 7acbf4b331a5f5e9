"""Dense curvature: the whole (P, P) matrix, for small models and as the truth for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..hooks import accumulator
from ..models import Params, nbytes
from .base import (
    Shapes,
    describe,
    eigh,
    flatten,
    log_sum,
    normal,
    numel,
    require_positive,
    require_rows,
    require_same,
    require_samples,
    require_shapes,
    require_state,
    shapes_from_state,
    shapes_state,
    sizes,
    unflatten,
)

_MATRIX = "dense.matrix"
_SHAPE = "dense.shape."


@dataclass(frozen=True, eq=False, repr=False)
class Dense:
    """G = matrix, (P, P). shapes: name -> shape; parameters are flattened in that order.

    Raises ValueError where the matrix has another size than the shapes need.
    """

    matrix: Tensor
    shapes: Shapes

    def __post_init__(self) -> None:
        size = numel(self.shapes)
        if self.matrix.shape != (size, size):
            raise ValueError(
                f"expected a matrix of shape ({size}, {size}) for parameters of {size} numbers, "
                f"got {tuple(self.matrix.shape)}"
            )

    @classmethod
    def zeros_like(cls, params: Mapping[str, Tensor]) -> Dense:
        """No curvature, over these parameters, in float32 or better."""
        some, shapes = next(iter(params.values())), sizes(params)
        size = numel(shapes)
        matrix = torch.zeros(size, size, dtype=accumulator(some.dtype), device=some.device)
        return cls(matrix, shapes)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Dense:
        """Raises CheckpointError where the tensors are not those of a dense curvature."""
        require_state(state, "Dense", [_MATRIX], (_SHAPE,))
        return cls(state[_MATRIX], shapes_from_state(_SHAPE, state))

    def __repr__(self) -> str:
        return describe(self)

    def state_dict(self) -> dict[str, Tensor]:
        return {_MATRIX: self.matrix, **shapes_state(_SHAPE, self.shapes)}

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> in nats."""
        x = self._flat(d)
        return x @ (self.matrix @ x)

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v."""
        return self._shaped(self.matrix @ self._flat(v))

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v by Cholesky; ValueError where it is not positive definite."""
        x = self._flat(v)
        factor = self._cholesky(damping)
        return self._shaped(torch.cholesky_solve(x.unsqueeze(1), factor).squeeze(1))

    def diagonal(self) -> Params:
        return self._shaped(self.matrix.diagonal())

    def inverse_diagonal(self, damping: float = 0.0) -> Params:
        return self._shaped(torch.cholesky_inverse(self._cholesky(damping)).diagonal())

    def sample(
        self,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draws of N(0, (G + damping I)⁻¹): name -> (S, *shape)."""
        require_samples(num_samples, self.shapes, self.matrix)
        noise = normal((len(self.matrix), num_samples), self.matrix, generator)
        draws = torch.linalg.solve_triangular(self._cholesky(damping).mT, noise, upper=True)
        return self._shaped(draws.T)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log |G + damping I|, from eigenvalues that are computed once."""
        return log_sum(self._eigenvalues, damping)

    def half(self, rows: Mapping[str, Tensor], damping: float = 0.0) -> Tensor:
        """Rows (..., *shape) to (..., P)."""
        require_rows(self.shapes, rows)
        x = flatten(self.shapes, rows).to(self.matrix.dtype)
        flat = x.reshape(-1, x.shape[-1]).T
        root = torch.linalg.solve_triangular(self._cholesky(damping), flat, upper=False)
        return root.T.reshape(x.shape)

    def dense(self) -> Dense:
        return self

    def __add__(self, other: Dense) -> Dense:
        """Curvatures of independent data add. StaleAnchorError where the parameters differ."""
        if not isinstance(other, Dense):
            return NotImplemented
        require_shapes(self.shapes, other.shapes, "the curvature to add")
        return Dense(self.matrix + other.reordered(self.shapes).matrix, self.shapes)

    def __mul__(self, factor: float) -> Dense:
        return Dense(self.matrix * factor, self.shapes)

    __rmul__ = __mul__

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Dense:
        return Dense(self.matrix.to(device=device, dtype=dtype), self.shapes)

    @property
    def num_bytes(self) -> int:
        return nbytes(self.matrix)

    def reordered(self, names: Mapping[str, object]) -> Dense:
        """The same matrix with the parameters in another order."""
        if list(names) == list(self.shapes):
            return self
        order = self._shaped(torch.arange(len(self.matrix), device=self.matrix.device))
        index = torch.cat([order[name].flatten() for name in names])
        shapes = {name: self.shapes[name] for name in names}
        return Dense(self.matrix[index.unsqueeze(1), index], shapes)

    @cached_property
    def _eigenvalues(self) -> Tensor:
        return eigh(self.matrix)[0]

    def _cholesky(self, damping: float) -> Tensor:
        eye = torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device)
        damped = self.matrix + damping * eye
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            # eigvalsh may round a tiny negative eigenvalue up, but Cholesky has failed.
            require_positive(min(float(torch.linalg.eigvalsh(damped)[0]), 0.0), damping)
        return factor

    def _flat(self, v: Mapping[str, Tensor]) -> Tensor:
        require_same(self.shapes, v, "the vector")
        return flatten(self.shapes, v).to(self.matrix.dtype)

    def _shaped(self, x: Tensor) -> Params:
        return unflatten(self.shapes, x)

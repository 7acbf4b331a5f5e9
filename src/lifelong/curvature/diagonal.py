"""Diagonal curvature: one number in nats for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hooks import accumulator
from ..models import Params, nbytes
from .base import (
    Shapes,
    describe,
    flatten,
    from_numbered,
    log_sum,
    normal,
    numbered,
    require_dense,
    require_positive,
    require_rows,
    require_same,
    require_samples,
    require_state,
    sizes,
)
from .dense import Dense

_PREFIX = "diagonal."


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal:
    """G = diag(values). values: name -> tensor in the parameter's shape, float32 or better."""

    values: Params

    @classmethod
    def zeros_like(cls, params: Mapping[str, Tensor]) -> Diagonal:
        """No curvature, over these parameters, in float32 or better."""
        return cls(
            {
                name: torch.zeros(p.shape, dtype=accumulator(p.dtype), device=p.device)
                for name, p in params.items()
            }
        )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Diagonal:
        """Raises CheckpointError where the tensors are not those of a diagonal curvature."""
        require_state(state, "Diagonal", [], (_PREFIX,))
        return cls(from_numbered(_PREFIX, state))

    def __repr__(self) -> str:
        return describe(self)

    def state_dict(self) -> dict[str, Tensor]:
        return numbered(_PREFIX, self.values)

    @property
    def shapes(self) -> Shapes:
        return sizes(self.values)

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> in nats."""
        self._require(d)
        parts = [(value * d[name].square()).sum() for name, value in self.values.items()]
        return torch.stack(parts).sum()

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v."""
        self._require(v)
        return {name: value * v[name] for name, value in self.values.items()}

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v; ValueError where an entry is not positive."""
        self._require(v)
        return {name: v[name] / value for name, value in self._damped(damping).items()}

    def diagonal(self) -> Params:
        return dict(self.values)

    def inverse_diagonal(self, damping: float = 0.0) -> Params:
        return {name: value.reciprocal() for name, value in self._damped(damping).items()}

    def sample(
        self,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draws of N(0, (G + damping I)⁻¹): name -> (S, *shape)."""
        require_samples(num_samples, self.shapes, next(iter(self.values.values())))
        return {
            name: normal((num_samples, *value.shape), value, generator) * value.rsqrt()
            for name, value in self._damped(damping).items()
        }

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log |G + damping I|."""
        return log_sum(flatten(self.shapes, self.values), damping)

    def half(self, rows: Mapping[str, Tensor], damping: float = 0.0) -> Tensor:
        """Rows (..., *shape) to (..., P)."""
        shapes = self.shapes
        require_rows(shapes, rows)
        return flatten(shapes, rows) * flatten(shapes, self._damped(damping)).rsqrt()

    def dense(self) -> Dense:
        shapes = self.shapes
        flat = flatten(shapes, self.values)
        require_dense(shapes, flat.element_size(), "keep it diagonal")
        return Dense(torch.diag(flat), shapes)

    def __add__(self, other: Diagonal) -> Diagonal:
        """Curvatures of independent data add. StaleAnchorError where the parameters differ."""
        if not isinstance(other, Diagonal):
            return NotImplemented
        self._require(other.values, "the curvature to add")
        return Diagonal({name: value + other.values[name] for name, value in self.values.items()})

    def __mul__(self, factor: float) -> Diagonal:
        return Diagonal({name: value * factor for name, value in self.values.items()})

    __rmul__ = __mul__

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Diagonal:
        return Diagonal(
            {name: value.to(device=device, dtype=dtype) for name, value in self.values.items()}
        )

    @property
    def num_bytes(self) -> int:
        return nbytes(self.values)

    def _require(self, other: Mapping[str, Tensor], what: str = "the vector") -> None:
        require_same(self.shapes, other, what)

    def _damped(self, damping: float) -> Params:
        smallest = min(float(value.min()) for value in self.values.values())
        require_positive(smallest + damping, damping)
        return {name: value + damping for name, value in self.values.items()}

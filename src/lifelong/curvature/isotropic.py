"""Isotropic curvature: one number in nats for all weights."""

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
    log_sum,
    normal,
    numel,
    require_dense,
    require_positive,
    require_rows,
    require_same,
    require_samples,
    require_shapes,
    require_state,
    shapes_from_state,
    shapes_state,
    sizes,
)
from .dense import Dense

_VALUE = "isotropic.value"
_SHAPE = "isotropic.shape."


@dataclass(frozen=True, eq=False, repr=False)
class Isotropic:
    """G = value I. value: a scalar tensor; shapes: name -> shape.

    Raises ValueError where value is not a scalar.
    """

    value: Tensor
    shapes: Shapes

    def __post_init__(self) -> None:
        if self.value.shape != ():
            raise ValueError(f"expected a scalar value, got shape {tuple(self.value.shape)}")

    @classmethod
    def zeros_like(cls, params: Mapping[str, Tensor]) -> Isotropic:
        """No curvature, over these parameters, in float32 or better."""
        some = next(iter(params.values()))
        zero = torch.zeros((), dtype=accumulator(some.dtype), device=some.device)
        return cls(zero, sizes(params))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Isotropic:
        """Raises CheckpointError where the tensors are not those of an isotropic curvature."""
        require_state(state, "Isotropic", [_VALUE], (_SHAPE,))
        return cls(state[_VALUE], shapes_from_state(_SHAPE, state))

    def __repr__(self) -> str:
        return describe(self)

    def state_dict(self) -> dict[str, Tensor]:
        return {_VALUE: self.value, **shapes_state(_SHAPE, self.shapes)}

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> in nats."""
        require_same(self.shapes, d, "the vector")
        return self.value * torch.stack([d[name].square().sum() for name in self.shapes]).sum()

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v."""
        require_same(self.shapes, v, "the vector")
        return {name: self.value * v[name] for name in self.shapes}

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v; ValueError where the number is not positive."""
        require_same(self.shapes, v, "the vector")
        scale = self._damped(damping)
        return {name: v[name] / scale for name in self.shapes}

    def diagonal(self) -> Params:
        return {name: self.value.expand(shape).clone() for name, shape in self.shapes.items()}

    def inverse_diagonal(self, damping: float = 0.0) -> Params:
        variance = 1 / self._damped(damping)
        return {name: variance.expand(shape).clone() for name, shape in self.shapes.items()}

    def sample(
        self,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draws of N(0, (G + damping I)⁻¹): name -> (S, *shape)."""
        require_samples(num_samples, self.shapes, self.value)
        sd = self._damped(damping).rsqrt()
        return {
            name: sd * normal((num_samples, *shape), self.value, generator)
            for name, shape in self.shapes.items()
        }

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log |G + damping I|."""
        return numel(self.shapes) * log_sum(self.value, damping)

    def half(self, rows: Mapping[str, Tensor], damping: float = 0.0) -> Tensor:
        """Rows (..., *shape) to (..., P)."""
        require_rows(self.shapes, rows)
        return flatten(self.shapes, rows) * self._damped(damping).rsqrt()

    def dense(self) -> Dense:
        require_dense(self.shapes, self.value.element_size(), "keep it isotropic")
        size = numel(self.shapes)
        eye = torch.eye(size, dtype=self.value.dtype, device=self.value.device)
        return Dense(self.value * eye, self.shapes)

    def __add__(self, other: Isotropic) -> Isotropic:
        """Curvatures of independent data add. StaleAnchorError where the parameters differ."""
        if not isinstance(other, Isotropic):
            return NotImplemented
        require_shapes(self.shapes, other.shapes, "the curvature to add")
        return Isotropic(self.value + other.value, self.shapes)

    def __mul__(self, factor: float) -> Isotropic:
        return Isotropic(self.value * factor, self.shapes)

    __rmul__ = __mul__

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Isotropic:
        return Isotropic(self.value.to(device=device, dtype=dtype), self.shapes)

    @property
    def num_bytes(self) -> int:
        return nbytes(self.value)

    def _damped(self, damping: float) -> Tensor:
        require_positive(float(self.value) + damping, damping)
        return self.value + damping

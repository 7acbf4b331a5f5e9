"""Dense curvature: the whole (P, P) matrix, for small models and as the truth for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..hooks import accumulator
from ..models import Params, nbytes
from .base import require_positive, require_same

_MATRIX = "dense.matrix"
_SHAPE = "dense.shape."


@dataclass(frozen=True, eq=False)
class Dense:
    """G = matrix, (P, P). shapes: name -> shape; parameters are flattened in that order.

    Raises ValueError where the matrix has another size than the shapes need.
    """

    matrix: Tensor
    shapes: dict[str, torch.Size]

    def __post_init__(self) -> None:
        size = sum(shape.numel() for shape in self.shapes.values())
        if self.matrix.shape != (size, size):
            raise ValueError(
                f"expected a matrix of shape ({size}, {size}) for parameters of {size} numbers, "
                f"got {tuple(self.matrix.shape)}"
            )

    @classmethod
    def zeros_like(cls, params: Mapping[str, Tensor]) -> Dense:
        """No curvature, over these parameters, in float32 or better."""
        some = next(iter(params.values()))
        size = sum(p.numel() for p in params.values())
        matrix = torch.zeros(size, size, dtype=accumulator(some.dtype), device=some.device)
        return cls(matrix, {name: p.shape for name, p in params.items()})

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Dense:
        """Raises CheckpointError where the tensors are not those of a dense curvature."""
        rest = sorted(key for key in state if key != _MATRIX)
        if _MATRIX not in state or not all(key.startswith(_SHAPE) for key in rest):
            raise CheckpointError(
                f"expected {_MATRIX!r} and keys that start with {_SHAPE!r}, got "
                f"{sorted(state)[:3]}; this is not a saved Dense curvature"
            )
        shapes = {
            key.removeprefix(_SHAPE).split(".", 1)[1]: torch.Size(state[key].tolist())
            for key in rest
        }
        return cls(state[_MATRIX], shapes)

    def state_dict(self) -> dict[str, Tensor]:
        # The position is part of the key: a file may give its tensors back in another order.
        shapes = {
            f"{_SHAPE}{i:08d}.{name}": torch.tensor(list(shape), dtype=torch.int64)
            for i, (name, shape) in enumerate(self.shapes.items())
        }
        return {_MATRIX: self.matrix, **shapes}

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
        eye = torch.eye(len(x), dtype=self.matrix.dtype, device=self.matrix.device)
        damped = self.matrix + damping * eye
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            # eigvalsh may round a tiny negative eigenvalue up, but Cholesky has failed.
            require_positive(min(float(torch.linalg.eigvalsh(damped)[0]), 0.0), damping)
        return self._shaped(torch.cholesky_solve(x.unsqueeze(1), factor).squeeze(1))

    def diagonal(self) -> Params:
        return self._shaped(self.matrix.diagonal())

    def __add__(self, other: Dense) -> Dense:
        """Curvatures of independent data add. StaleAnchorError where the parameters differ."""
        if not isinstance(other, Dense):
            return NotImplemented
        require_same(self.shapes, other.diagonal(), "the curvature to add")
        if list(self.shapes) == list(other.shapes):
            return Dense(self.matrix + other.matrix, self.shapes)
        order = other._shaped(torch.arange(len(other.matrix), device=other.matrix.device))
        index = torch.cat([order[name].flatten() for name in self.shapes])
        return Dense(self.matrix + other.matrix[index.unsqueeze(1), index], self.shapes)

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

    def _flat(self, v: Mapping[str, Tensor]) -> Tensor:
        require_same(self.shapes, v, "the vector")
        return torch.cat([v[name].flatten() for name in self.shapes]).to(self.matrix.dtype)

    def _shaped(self, x: Tensor) -> Params:
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = x.split(sizes)
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

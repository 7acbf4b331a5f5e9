"""Diagonal curvature: one number in nats for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..hooks import accumulator
from ..models import Params, nbytes
from .base import require_positive, require_same

_PREFIX = "diagonal."


@dataclass(frozen=True, eq=False)
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
        if not state or not all(key.startswith(_PREFIX) for key in state):
            raise CheckpointError(
                f"expected keys that start with {_PREFIX!r}, got {sorted(state)[:3]}; "
                "this is not a saved Diagonal curvature"
            )
        return cls({key.removeprefix(_PREFIX): value for key, value in state.items()})

    def state_dict(self) -> dict[str, Tensor]:
        return {_PREFIX + name: value for name, value in self.values.items()}

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
        smallest = min(float(value.min()) for value in self.values.values())
        require_positive(smallest + damping, damping)
        return {name: v[name] / (value + damping) for name, value in self.values.items()}

    def diagonal(self) -> Params:
        return dict(self.values)

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
        require_same({name: value.shape for name, value in self.values.items()}, other, what)

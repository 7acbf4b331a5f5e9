"""What the library asks of a curvature G: a symmetric (P, P) matrix in nats, in some structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ..errors import StaleAnchorError
from ..models import Params


@runtime_checkable
class Curvature(Protocol):
    """G, a sum over examples of per-example curvatures; frozen, keyed by parameter name."""

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> in nats: a scalar, differentiable in d. There is no factor 1/2."""
        ...

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v."""
        ...

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v. Raises ValueError where that matrix is not positive definite."""
        ...

    def diagonal(self) -> Params:
        """The diagonal of G, in the shapes of the parameters."""
        ...

    def __add__(self, other: Self) -> Self: ...

    def __mul__(self, factor: float) -> Self: ...

    def __rmul__(self, factor: float) -> Self: ...

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self: ...

    def state_dict(self) -> dict[str, Tensor]:
        """A flat dict of tensors, as safetensors holds it."""
        ...

    @property
    def num_bytes(self) -> int: ...


def require_same(ours: Mapping[str, torch.Size], theirs: Mapping[str, Tensor], what: str) -> None:
    """Raise StaleAnchorError where names or shapes differ."""
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    resized = [
        f"{name}: {tuple(shape)} -> {tuple(theirs[name].shape)}"
        for name, shape in ours.items()
        if name in theirs and theirs[name].shape != shape
    ]
    if missing or extra or resized:
        parts = [
            f"{label} {names[:5]}"
            for label, names in (("missing", missing), ("unknown", extra), ("resized", resized))
            if names
        ]
        raise StaleAnchorError(
            f"{what} has other parameters than this curvature: {'; '.join(parts)}. Expected the "
            "same names and shapes; take both from the same model with the same params filter"
        )


def require_positive(smallest: float, damping: float) -> None:
    """Raise ValueError where the smallest eigenvalue of G + damping I is not positive."""
    if not smallest > 0:
        enough = damping + max(-1.01 * smallest, 1e-6)
        raise ValueError(
            "the curvature plus damping is not positive definite (its smallest eigenvalue is "
            f"{smallest:.3g}), so it has no inverse; a damping of {enough:.3g} would do"
        )

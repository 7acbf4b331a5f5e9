r"""Kernels: k(x, x'), the prior covariance of a function's values, by name.

A kernel is anything that is called with inputs (N, ...) and (M, ...) and returns (N, M), symmetric
and positive semi-definite. Those here are frozen values, so that they are compared, printed and
saved by name; a function of one's own does as well, but cannot be saved. Inputs of several
dimensions are flattened, and everything is computed in float64.

``bias`` adds a constant function of that variance: an offset that is learned and regularised with
the rest. Source: Rasmussen & Williams 2006, chapter 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Kernel(Protocol):
    """k(x, x'): (N, ...), (M, ...) -> (N, M)."""

    def __call__(self, x: Tensor, others: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class RBF:
    """variance · exp(-‖x - x'‖² / (2 lengthscale²)) + bias.

    Raises ValueError for a lengthscale or variance that is not positive, or a negative bias.
    """

    lengthscale: float = 1.0
    variance: float = 1.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        _require("lengthscale", self.lengthscale)
        _require("variance", self.variance)
        _require("bias", self.bias, zero=True)

    def __call__(self, x: Tensor, others: Tensor) -> Tensor:
        # Differences, not products of matrices: a copy of a point is at distance 0 exactly.
        gap = torch.cdist(_flat(x), _flat(others), compute_mode="donot_use_mm_for_euclid_dist")
        return self.variance * (-0.5 * (gap / self.lengthscale).square()).exp() + self.bias


@dataclass(frozen=True)
class Linear:
    """variance · ⟨x, x'⟩ + bias: Bayesian linear regression, seen from the outputs.

    Raises ValueError for a variance that is not positive, or a negative bias.
    """

    variance: float = 1.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        _require("variance", self.variance)
        _require("bias", self.bias, zero=True)

    def __call__(self, x: Tensor, others: Tensor) -> Tensor:
        return self.variance * (_flat(x) @ _flat(others).T) + self.bias


@dataclass(frozen=True)
class Polynomial:
    """variance · (⟨x, x'⟩ + bias)^degree: all monomials up to the degree, where bias > 0.

    Raises ValueError for a degree below 1 or not whole, a variance that is not positive, or a
    negative bias.
    """

    degree: int = 2
    variance: float = 1.0
    bias: float = 1.0

    def __post_init__(self) -> None:
        if self.degree != int(self.degree) or self.degree < 1:
            raise ValueError(f"degree must be a whole number of at least 1, got {self.degree}")
        _require("variance", self.variance)
        _require("bias", self.bias, zero=True)

    def __call__(self, x: Tensor, others: Tensor) -> Tensor:
        return self.variance * (_flat(x) @ _flat(others).T + self.bias) ** self.degree


def _flat(x: Tensor) -> Tensor:
    return (x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)).double()


def _require(name: str, value: float, *, zero: bool = False) -> None:
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise ValueError(
            f"{name} must be finite and {'not negative' if zero else 'positive'}, got {value}"
        )

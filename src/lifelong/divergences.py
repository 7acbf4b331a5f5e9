r"""Divergences: how far the model's beliefs ``f`` have moved from the remembered ``f_ref``.

D(f_ref, f) is (B, C), (B, C) -> (B,), in nats, zero and flat at f = f_ref. Three methods fall out:
``KL`` makes K-priors and gradient reconstruction (for exponential families it is the Bregman
divergence of the likelihood), ``KL(temperature=T)`` distillation as in LwF, ``Logit`` DER. The
Mahalanobis distance of FROMP couples examples, so it is a term of its own (``terms.KernelTerm``).

Sources: Khan & Swaroop 2021; Li & Hoiem 2016 (LwF); Buzzega et al. 2020 (DER).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .likelihoods import Likelihood


@runtime_checkable
class Divergence(Protocol):
    def __call__(self, likelihood: Likelihood, f_ref: Tensor, f: Tensor) -> Tensor:
        """(B, C), (B, C) -> (B,) nats."""
        ...


@dataclass(frozen=True)
class KL:
    r"""KL(p(. | f_ref / T) || p(. | f / T)), times T² where ``rescale`` is set.

    Hinton's T² keeps the gradient's size as T grows; the gradient-reconstruction paper's code
    leaves it out. At T = 1, the Bayesian value, the two agree.
    """

    temperature: float = 1.0
    rescale: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    def __call__(self, likelihood: Likelihood, f_ref: Tensor, f: Tensor) -> Tensor:
        if self.temperature == 1:
            return likelihood.kl(f_ref, f)
        d = likelihood.kl(self._warmed(f_ref), self._warmed(f))
        return d * self.temperature**2 if self.rescale else d

    def _warmed(self, f: Tensor) -> Tensor:
        # What a head masks is as low as numbers go: below T = ½ it would become -inf, and KL NaN.
        return (f / self.temperature).clamp(min=torch.finfo(f.dtype).min / 2)


@dataclass(frozen=True)
class Logit:
    r"""½ ‖f - f_ref‖² over the outputs: DER's term. Units of logits², not nats."""

    def __call__(self, likelihood: Likelihood, f_ref: Tensor, f: Tensor) -> Tensor:
        return 0.5 * (f - f_ref).square().sum(-1)

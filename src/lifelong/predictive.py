r"""Predictions with error bars: the mean of a label and its covariance, in two parts.

    Cov[t(y)] = Cov(E[t(y) | f])  +  E(Cov[t(y) | f])
                epistemic: of the weights    aleatoric: of the noise

t(y) is what the likelihood takes of a label (its indicator, its value). The outputs f are Gaussian
(``linearised``), or known by draws (``averaged``).
Sources: MacKay 1992 (the probit approximation); Khan et al. 2019, DNN2GP (the two parts).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import hooks
from .likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    require_hessian,
)
from .models import match


@dataclass(frozen=True, eq=False)
class Predictive:
    """The label's mean (B, C) and the two parts of its covariance, (B, C, C).

    For classes, mean holds the probabilities; for Gaussian noise, all is in units of the labels.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: Tensor

    @property
    def covariance(self) -> Tensor:
        """Of the label, noise included: (B, C, C)."""
        return self.epistemic + self.aleatoric

    @property
    def sd(self) -> Tensor:
        """Error bars: the standard deviation of each label, noise included, (B, C)."""
        return self.covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def linearised(
    f: Tensor, covariance: Tensor, likelihood: Likelihood, mask: Tensor | None = None
) -> Predictive:
    """The label's law where the outputs are N(f, covariance): (B, C), (B, C, C).

    Gaussian and Poisson: exact. Bernoulli: the probit approximation, p_c = sigmoid(k_c f_c) with
    k_c = (1 + pi v_c / 8)^-1/2 and v the variances. Categorical: p = softmax(k f), the same k for
    each class (MacKay 1992). For these two the covariances are of first order, at f: Lambda V
    Lambda and Lambda, with V the covariance and Lambda the likelihood's Hessian (DNN2GP).

    Raises TypeError for another likelihood, which needs draws (``num_samples``).
    """
    v = covariance.diagonal(dim1=1, dim2=2)
    inside = likelihood.mask(f, mask)
    if isinstance(likelihood, Gaussian):
        return Predictive(inside, covariance, _noise(likelihood, f))
    if isinstance(likelihood, Poisson):
        rate = (f + 0.5 * v).exp()
        spread = rate.unsqueeze(2) * covariance.expm1() * rate.unsqueeze(1)
        return Predictive(rate, spread, torch.diag_embed(rate))
    if isinstance(likelihood, Bernoulli | Categorical):
        hessian = likelihood.hessian(inside)
        softer = likelihood.mask(f * (1 + math.pi / 8 * v).rsqrt(), mask)
        return Predictive(likelihood.mean(softer), hessian @ covariance @ hessian, hessian)
    raise TypeError(
        f"no closed form is known for {type(likelihood).__name__}: pass num_samples, so that the "
        "outputs are drawn"
    )


def averaged(
    draws: Iterable[Tensor], likelihood: Likelihood, mask: Tensor | None = None
) -> Predictive:
    """The label's law as the mean over draws of the outputs, each (B, C): a mixture.

    Draws are read one at a time. Raises TypeError for a likelihood without a Hessian, ValueError
    where there is no draw.
    """
    require_hessian(likelihood, "the label's covariance")
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    count, origin = 0, torch.empty(0)
    for f in draws:
        inside = likelihood.mask(f, mask)
        mean, noise = likelihood.mean(inside), _noise(likelihood, inside)
        if sums is None:
            origin = mean
        step = mean - origin  # sums about the first draw lose no digits
        new = (step, step.unsqueeze(2) * step.unsqueeze(1), noise)
        sums = new if sums is None else tuple(a + b for a, b in zip(sums, new, strict=True))  # type: ignore[assignment]
        count += 1
    if sums is None:
        raise ValueError("expected at least one draw of the outputs, got none")
    shift, squares, noise = (total / count for total in sums)
    spread = squares - shift.unsqueeze(2) * shift.unsqueeze(1)
    return Predictive(origin + shift, spread, noise)


def gaussian_draws(
    f: Tensor, covariance: Tensor, num_samples: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Draws (B, C) of outputs N(f, covariance), as many at once as the working set holds."""
    values, vectors = torch.linalg.eigh(covariance)  # singular where outputs are masked
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    step = max(1, hooks.WORKING_SET // (f.numel() * f.element_size()))
    device = f.device if generator is None else generator.device
    for start in range(0, num_samples, step):
        shape = (min(step, num_samples - start), *f.shape)
        noise = torch.randn(shape, generator=generator, dtype=f.dtype, device=device).to(f.device)
        yield from f + torch.einsum("bcd,sbd->sbc", root, noise)


def _noise(likelihood: Likelihood, f: Tensor) -> Tensor:
    """Cov[t(y) | f], (B, C, C): the Hessian, but for Gaussian labels, whose f is scaled."""
    if isinstance(likelihood, Gaussian):
        return torch.diag_embed(torch.full_like(f, likelihood.noise_sd**2))
    return likelihood.hessian(f)


@contextmanager
def holding(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these weights inside, its own back after: storages are swapped, not copied.

    Raises StaleAnchorError where names or shapes differ.
    """
    params = match(model, weights)
    own = {name: p.data for name, p in params.items()}
    try:
        for name, p in params.items():
            p.data = weights[name].to(device=p.device, dtype=p.dtype)
        yield
    finally:
        for name, p in params.items():
            p.data = own[name]

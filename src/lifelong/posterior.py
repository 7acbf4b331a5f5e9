r"""``Posterior``: a Gaussian over the weights, N(mean, precision⁻¹).

Laplace's method at a minimum: precision = curvature of the data + prior precision. It is what
``identify`` sees (leverage), what FROMP's kernel is built from, and, as a prior, online Laplace.
It gives error bars (``predictive``) and, by its evidence, the prior precision itself.
Sources: MacKay 1992 (evidence); Immer et al. 2021 (the linearised predictive; networks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from . import hooks
from .curvature import Curvature, Estimator, Structure, estimate, structure_of
from .curvature.base import require_same
from .data import BATCH_SIZE, Data, Head
from .function_space import function_covariance
from .hooks import upcast
from .jacobians import checked, require_deterministic_mode, weighted_batches
from .likelihoods import Gaussian, Likelihood, require_hessian, require_likelihood
from .models import (
    Inputs,
    Params,
    evaluating,
    forward,
    logits,
    match,
    move,
    parameters,
    require_finite,
    snapshot,
)
from .notebook import table
from .predictive import Predictive, averaged, gaussian_draws, holding, linearised
from .prior import Prior
from .recall import Pass
from .recipe import Recipe
from .terms import Regulariser, WeightTerm

Method = Literal["glm", "mc", "mean"]
_WEIGHT_SAMPLES = 32  # of Monte Carlo, where none are asked for
_TURNS = 100  # of precision and noise, at most


@dataclass(frozen=True)
class Fit:
    """What the evidence needs of the data: nll = -log p(D | mean) in nats, and of what likelihood.

    num_labels: how many numbers were observed, examples times outputs.
    """

    nll: float
    num_labels: int
    likelihood: Likelihood

    def rescaled(self, noise_sd: Tensor) -> tuple[Tensor, Tensor]:
        """(log p(D | mean), what the curvature is multiplied by) under another Gaussian noise.

        Raises ValueError for a likelihood without noise, and for noise that is not positive.
        """
        if not isinstance(self.likelihood, Gaussian):
            raise ValueError(
                f"noise_sd is of the Gaussian likelihood, but the posterior was made with "
                f"{type(self.likelihood).__name__}; leave noise_sd out"
            )
        _require_positive("noise_sd", noise_sd)
        old, n = self.likelihood.noise_sd, self.num_labels
        squares = 2 * old**2 * (self.nll - n * (math.log(old) + 0.5 * math.log(2 * math.pi)))
        normaliser = n * (noise_sd.log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * squares / noise_sd**2 - normaliser, (old / noise_sd) ** 2


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """N(mean, (curvature + prior_precision I)⁻¹), in nats of the data that curvature sums over.

    fit: what was seen of the data, where the evidence is to be asked for; ``laplace`` fills it.

    Raises ValueError where prior_precision is not positive.
    """

    mean: Params
    curvature: Curvature
    prior_precision: float
    fit: Fit | None = None

    def __post_init__(self) -> None:
        if not self.prior_precision > 0:
            raise ValueError(
                f"prior_precision must be positive, got {self.prior_precision}: without it the "
                "weights that the data do not see have infinite variance"
            )

    def __repr__(self) -> str:
        return f"Posterior({self.curvature!r}, prior_precision={self.prior_precision:.4g})"

    def _repr_html_(self) -> str:
        rows = [
            ("parameters", f"{sum(m.numel() for m in self.mean.values()):,}"),
            ("curvature", type(self.curvature).__name__),
            ("prior precision", f"{self.prior_precision:.4g}"),
        ]
        return table("Posterior", rows)

    @classmethod
    def laplace(
        cls,
        model: nn.Module,
        data: Data,
        likelihood: Likelihood,
        *,
        prior_precision: float,
        structure: Structure = "diagonal",
        estimator: Estimator = "exact",
        curvature: Curvature | None = None,
        head: Head | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Posterior:
        """Laplace's method at the model's present weights, a minimum of nll + delta/2 ||theta||².

        curvature: of these data at these weights, in any structure, where it is at hand; structure
        and estimator are then not used.

        Raises ValueError for another structure, TypeError for what is no likelihood or one without
        a Hessian,
        StaleAnchorError for a curvature of other parameters; else as ``diagonal_curvature``.
        """
        require_likelihood(likelihood)
        over = Pass(model, data, likelihood, head, generator, batch_size)
        if curvature is None:
            curvature = estimate(
                model,
                data,
                likelihood,
                structure=structure,
                estimator=estimator,
                head=head,
                generator=generator,
                batch_size=batch_size,
            )
        require_deterministic_mode(model)
        mean = snapshot(parameters(model))
        require_same(curvature.shapes, mean, "the model")
        return cls(mean, curvature, prior_precision, _fit(over))

    # ---------------------------------------------------------------- weights

    def variance(self) -> Params:
        """The marginal variance of each weight: the diagonal of the inverse precision.

        Raises ValueError where the precision is not positive definite, as do all below.
        """
        return self.curvature.inverse_diagonal(self.prior_precision)

    def sample(self, num_samples: int = 1, generator: torch.Generator | None = None) -> Params:
        """Draws of the weights: name -> (S, *shape).

        Raises ValueError where so many do not fit in 8 GiB, and says how many do: draw those,
        again and again.
        """
        steps = self.curvature.sample(
            self.prior_precision, num_samples=num_samples, generator=generator
        )
        return {name: mean + steps[name].to(mean.dtype) for name, mean in self.mean.items()}

    # ---------------------------------------------------------------- predictions

    @torch.no_grad()
    def predictive(
        self,
        model: nn.Module,
        inputs: Inputs,
        likelihood: Likelihood,
        *,
        method: Method = "glm",
        num_samples: int | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Predictive:
        """What a new label will be, and how sure that is: mean (B, C), covariance (B, C, C).

        method:
            "glm"   the model linearised at the mean, f ~ N(f*, J Sigma Jᵀ). With num_samples the
                    outputs are drawn, without it the formulas of ``predictive.linearised``
            "mc"    draws of the weights (32 by default), a forward pass for each
            "mean"  the mean's own prediction: no uncertainty of the weights

        The posterior's mean is used, whatever the weights of the model are now; it is read in eval
        mode and comes back as it was. mask (C,): the classes that compete; probability 0 outside.
        Neither Jacobians nor draws are held at once.

        Raises ValueError for another method, fewer than one sample, a mask that does not fit, or
        where the precision is not positive definite; TypeError for a likelihood without a Hessian,
        or without a closed form; StaleAnchorError for a model of other parameters; NonFiniteError
        for outputs that are NaN or infinite.
        """
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        require_hessian(likelihood, "the label's covariance")
        device = next(iter(match(model, self.mean).values())).device
        inputs = move(inputs, device)
        with evaluating(model):
            if method == "mc":
                draws = self._outputs(model, inputs, num_samples or _WEIGHT_SAMPLES, generator)
                return averaged(draws, likelihood, mask)
            with holding(model, self.mean):
                f = upcast(forward(model, inputs))
                require_finite(f, "an output of the model")
                if method == "mean":
                    return averaged([f], likelihood, mask)
                spread = function_covariance(
                    model,
                    inputs,
                    self.curvature,
                    self.prior_precision,
                    likelihood=likelihood,
                    mask=mask,
                ).to(f.dtype)
        if num_samples is None:
            return linearised(f, spread, likelihood, mask)
        return averaged(gaussian_draws(f, spread, num_samples, generator), likelihood, mask)

    def _outputs(
        self, model: nn.Module, inputs: Inputs, count: int, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Outputs under draws of the weights, a few draws in memory at a time."""
        params = match(model, self.mean)
        num_bytes = sum(m.numel() * m.element_size() for m in self.mean.values())
        step = max(1, hooks.WORKING_SET // num_bytes)
        args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), dict(inputs))
        for start in range(0, count, step):
            draws = self.sample(min(step, count - start), generator)
            for s in range(min(step, count - start)):
                weights = {name: draw[s].to(params[name]) for name, draw in draws.items()}
                f = upcast(logits(torch.func.functional_call(model, weights, args, kwargs)))
                require_finite(f, "an output of the model")
                yield f

    # ---------------------------------------------------------------- evidence

    def log_evidence(
        self,
        prior_precision: float | Tensor | None = None,
        noise_sd: float | Tensor | None = None,
    ) -> Tensor:
        """Laplace's log p(D) in nats, differentiable in both arguments (scalar tensors):

            log p(D | theta) - delta/2 ||theta||² + P/2 log delta - 1/2 log |G + delta I|

        at theta = mean, under the prior N(0, I / delta). delta: by default the posterior's own; the
        mean stays where it is. noise_sd: of the Gaussian likelihood, by default its own. Exact for
        a linear-Gaussian model with dense G at its minimum.

        Raises ValueError where the posterior was made without data, for arguments that are not
        positive, for noise_sd of another likelihood, and where G + delta I is not positive
        definite.
        """
        delta = _scalar(self.prior_precision if prior_precision is None else prior_precision)
        _require_positive("prior_precision", delta)
        fit, scale = self._seen(), torch.ones((), dtype=torch.float64)
        log_likelihood = -scale * fit.nll
        if noise_sd is not None:
            log_likelihood, scale = fit.rescaled(_scalar(noise_sd))
        p = sum(m.numel() for m in self.mean.values())
        square = sum(float(m.double().square().sum()) for m in self.mean.values())
        # |s G + delta I| = s^P |G + (delta / s) I|
        logdet = p * scale.log() + self._exact.logdet(delta / scale).cpu()
        return log_likelihood - 0.5 * delta * square + 0.5 * p * delta.log() - 0.5 * logdet

    def maximise_evidence(self, *, noise: bool = False) -> Posterior:
        """The same posterior with the prior precision of the largest evidence: nothing to tune.

        The evidence is concave in log delta (its slope is half of gamma(delta) - delta ||theta||²,
        the first falling, the second rising: MacKay 1992), so bisection of the slope finds the only
        maximum. noise: choose the Gaussian's noise_sd too, in turns; it is then in
        ``fit.likelihood``, and the curvature is scaled to it. The mean stays: train again with the
        new precision, and repeat, for the maximum over both.

        Raises ValueError where the evidence has no maximum (no curvature, a mean of 0, or noise
        where every label is met exactly), for noise of another likelihood, and as ``log_evidence``.
        """
        fit, log_delta = self._seen(), math.log(self.prior_precision)
        curved = any(bool(v.any()) for v in self.curvature.diagonal().values())
        if not (curved and any(bool(m.any()) for m in self.mean.values())):
            raise ValueError(
                "the evidence has no maximum in the prior precision: the curvature or the mean is "
                "0; expected a model that was fitted to data"
            )
        if not noise:
            log_delta = _peak(lambda u: self.log_evidence(u.exp()), log_delta)
            return replace(self, prior_precision=math.exp(log_delta))
        if not isinstance(fit.likelihood, Gaussian):
            raise ValueError(
                "noise=True is for the Gaussian likelihood, not for "
                f"{type(fit.likelihood).__name__}"
            )
        log_sd = math.log(fit.likelihood.noise_sd)
        for _ in range(_TURNS):
            before = (log_delta, log_sd)
            sd = math.exp(log_sd)
            log_delta = _peak(lambda u, sd=sd: self.log_evidence(u.exp(), sd), log_delta)
            delta = math.exp(log_delta)
            log_sd = _peak(lambda u, delta=delta: self.log_evidence(delta, u.exp()), log_sd)
            if max(abs(log_delta - before[0]), abs(log_sd - before[1])) < 1e-8:
                break
        return self._with_noise(math.exp(log_sd), math.exp(log_delta))

    def _with_noise(self, noise_sd: float, prior_precision: float) -> Posterior:
        fit = self._seen()
        log_likelihood, scale = fit.rescaled(_scalar(noise_sd))
        changed = replace(fit, nll=-float(log_likelihood), likelihood=Gaussian(noise_sd))
        return Posterior(self.mean, self.curvature * float(scale), prior_precision, changed)

    @cached_property
    def _exact(self) -> Curvature:
        """In float64: the evidence is a small difference of sums over all weights."""
        return self.curvature.to(dtype=torch.float64)

    def _seen(self) -> Fit:
        if self.fit is None:
            raise ValueError(
                "this posterior was made without data, so it has no evidence; use "
                "Posterior.laplace(model, data, ...), or pass fit="
            )
        return self.fit

    # ---------------------------------------------------------------- as a prior

    def as_prior(self, likelihood: Likelihood) -> Prior:
        """-log N(theta; mean, precision⁻¹) up to a constant: online Laplace's prior.

        Its updates add curvature of the same structure. Raises TypeError for a curvature of the
        user's own, which no estimator makes.
        """
        recipe = Recipe(
            "online_laplace", structure=structure_of(self.curvature), gradient="anchored"
        )
        pulled = {n: -self.prior_precision * m for n, m in self.mean.items()}
        terms = (Regulariser(self.prior_precision), WeightTerm(self.mean, pulled, self.curvature))
        return Prior(likelihood, recipe, terms, num_tasks=1)


@torch.no_grad()
def _fit(over: Pass) -> Fit:
    """One pass over the data for their nll at the present weights."""
    nll, count = 0.0, 0
    for batch in weighted_batches(over.model, over.data, over.head, None, None, over.batch_size):
        f = forward(over.model, batch.inputs)
        y, mask = checked(over.likelihood, f, batch)
        inside = over.likelihood.mask(upcast(f), mask)
        nll, count = nll + float(over.likelihood.nll(inside, y).double().sum()), count + f.numel()
    return Fit(nll, count, over.likelihood)


def _scalar(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).cpu()


def _require_positive(name: str, value: Tensor) -> None:
    if not (bool(value > 0) and bool(torch.isfinite(value))):
        raise ValueError(f"{name} must be positive and finite, got {float(value)}")


def _peak(value: Callable[[Tensor], Tensor], start: float) -> float:
    """The maximum of a concave function of one number, by bisection of its slope."""

    def rises(u: float) -> bool:
        at = torch.tensor(u, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(value(at), at)
        return bool(slope > 0)

    low = high = start
    up = rises(start)
    step = 1.0
    while rises(high) if up else not rises(low):
        low, high = (high, high + step) if up else (low - step, low)
        step *= 2
    while high - low > 1e-10 * (1 + abs(low)):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rises(middle) else (low, middle)
    return 0.5 * (low + high)

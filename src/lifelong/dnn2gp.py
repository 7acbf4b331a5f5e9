r"""A network as a Gaussian process: Laplace's posterior is that of a linear model on other data.

At weights mu with Jacobian J, residual r and likelihood Hessian Lambda, the linear model

    y~ = J w + e,   e ~ N(0, Lambda⁻¹),   w ~ N(0, I / delta),   y~ = J mu - Lambda⁻¹ r

has the posterior N(mu, (sum_n J_nᵀ Lambda_n J_n + delta I)⁻¹): Laplace's, where mu is a minimum of
nll + delta/2 ||theta||². Seen from the outputs it is a Gaussian process with the kernel
k(x, x') = J(x) J(x')ᵀ / delta. Source: Khan et al. 2019 (DNN2GP).

Lambda is singular for classes (no label tells a shift of all logits), so nothing here inverts it: a
pseudo-inverse makes the pseudo-targets, and with a root L of Lambda = L Lᵀ

    (K + Lambda⁻¹)⁻¹ = L B⁻¹ Lᵀ,   B = I + Lᵀ K L,

which is as good where the noise is infinite. Matrices are (N C, N C): for few examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .curvature import Isotropic
from .curvature.base import normal
from .data import BATCH_SIZE, Data, Head
from .function_space import function_covariance, function_kernel, linear_part
from .hooks import upcast
from .jacobians import checked, require_deterministic_mode, residual, weighted_batches
from .likelihoods import Likelihood, require_hessian
from .models import (
    Inputs,
    Params,
    concat,
    device_of,
    evaluating,
    forward,
    move,
    parameters,
    snapshot,
)
from .predictive import Predictive, averaged, gaussian_draws, holding, linearised

_LIMIT = 2 * 2**30  # bytes of one matrix in float64


@dataclass(frozen=True, eq=False)
class PseudoData:
    """The linear model's data; its features are J(inputs), ``per_example_jacobian``.

    inputs: (N, ...); targets: y~ (N, C); precision: Lambda (N, C, C), of the noise; residual: r
    (N, C); nll: of the true labels, in nats; mask: (C,) the outputs that compete, or None.
    """

    inputs: Inputs
    targets: Tensor
    precision: Tensor
    residual: Tensor
    nll: float
    mask: Tensor | None = None

    @property
    def noise(self) -> Tensor:
        """Lambda⁺, the covariance of the targets' noise: (N, C, C). Directions that no label
        tells of, whose noise is infinite, have 0."""
        return torch.linalg.pinv(self.precision, hermitian=True)


@torch.no_grad()
def pseudo_data(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    head: Head | None = None,
    batch_size: int = BATCH_SIZE,
) -> PseudoData:
    """y~ = J mu - Lambda⁺ r and Lambda of all the data, mu the model's present weights.

    Raises TypeError for a likelihood without a Hessian, NotRepeatableError for a model that is
    random or in training mode; for labels and outputs as ``diagonal_curvature``.
    """
    require_hessian(likelihood, "DNN2GP")
    require_deterministic_mode(model)
    mean = snapshot(parameters(model))
    inputs, linear, slopes, precisions = [], [], [], []
    nll, mask = 0.0, None
    for batch in weighted_batches(model, data, head, None, None, batch_size):
        f = upcast(forward(model, batch.inputs))
        y, mask = checked(likelihood, f, batch)
        inside = likelihood.mask(f, mask)
        nll += float(likelihood.nll(inside, y).double().sum())
        inputs.append(batch.inputs)
        linear.append(linear_part(model, batch.inputs, mean))
        slopes.append(residual(likelihood, f, y, mask))
        precisions.append(likelihood.hessian(inside))
    r, precision = torch.cat(slopes), torch.cat(precisions)
    inverse = torch.linalg.pinv(precision, hermitian=True)
    targets = torch.cat(linear) - (inverse @ r.unsqueeze(2)).squeeze(2)
    return PseudoData(concat(inputs), targets, precision, r, nll, mask)


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """The network's Gaussian process: mean mu, prior N(0, I / prior_precision), pseudo-data.

    Every method takes the model for its layers; mu is used, whatever its weights are now.
    """

    mean: Params
    prior_precision: float
    likelihood: Likelihood
    data: PseudoData
    kernel_matrix: Tensor  # (N C, N C), between the data, in float64

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        data: Data,
        likelihood: Likelihood,
        *,
        prior_precision: float,
        head: Head | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> GaussianProcess:
        """At the model's present weights, a minimum of nll + prior_precision/2 ||theta||².

        Raises ValueError where prior_precision is not positive, and where the kernel matrix would
        not fit in 2 GiB; else as ``pseudo_data``.
        """
        if not prior_precision > 0:
            raise ValueError(f"prior_precision must be positive, got {prior_precision}")
        pseudo = pseudo_data(model, data, likelihood, head=head, batch_size=batch_size)
        n, c = pseudo.targets.shape
        if 8 * (n * c) ** 2 > _LIMIT:
            raise ValueError(
                f"the kernel of {n} examples and {c} outputs takes {8 * (n * c) ** 2 / 2**30:.0f} "
                f"GiB, expected at most {_LIMIT / 2**30:.0f}: {int((_LIMIT / 8) ** 0.5) // c} "
                "examples fit; Posterior.laplace is the same posterior at a cost linear in them"
            )
        mean = snapshot(parameters(model))
        k = _kernel(model, mean, pseudo.inputs, None, prior_precision, pseudo.mask)
        return cls(mean, prior_precision, likelihood, pseudo, k.reshape(n * c, n * c).double())

    def outputs(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The process at each input: mean (B, C) and covariance (B, C, C) of f, before noise.

            f*(x) - J(x) mu + k(x, X) L B⁻¹ Lᵀ y~,    k(x, x) - k(x, X) L B⁻¹ Lᵀ k(X, x)

        At a minimum the mean is f*(x), the network's own output. Outputs outside of the head have
        covariance 0. Errors as ``function_covariance``.
        """
        f, white = self._cross(model, inputs)
        with evaluating(model), holding(model, self.mean):
            prior = function_covariance(
                model,
                inputs,
                Isotropic.zeros_like(self.mean),
                self.prior_precision,
                mask=self.data.mask,
            )
        return f, (prior.double() - white @ white.mT).to(f.dtype)

    def predict(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Predictive:
        """The law of a new label: as ``Posterior.predictive(method="glm")``, from the kernel."""
        f, spread = self.outputs(model, inputs)
        if num_samples is None:
            return linearised(f, spread, self.likelihood, self.data.mask)
        draws = gaussian_draws(f, spread, num_samples, generator)
        return averaged(draws, self.likelihood, self.data.mask)

    def sample(
        self,
        model: nn.Module,
        inputs: Inputs,
        num_samples: int = 1,
        *,
        generator: torch.Generator | None = None,
        jitter: float = 0.0,
    ) -> Tensor:
        """Functions from the process, the inputs drawn together: (S, B, C), before noise.

        jitter: variance added to each output, in output units squared.

        Raises ValueError where the covariance between the inputs is singular (more outputs than
        weights, inputs that repeat), with the jitter that would do.
        """
        f, white = self._cross(model, inputs)
        white = white.flatten(0, 1)
        k = _kernel(model, self.mean, inputs, None, self.prior_precision, self.data.mask)
        covariance = k.reshape(len(white), -1).double() - white @ white.T
        inside = torch.ones_like(f[0], dtype=torch.bool)
        if self.data.mask is not None:
            inside = self.data.mask.to(f.device)
        at = inside.repeat(len(f)).nonzero().squeeze(1)
        factor = _cholesky(covariance[at.unsqueeze(1), at], jitter)
        noise = normal((num_samples, len(at)), factor, generator)
        draws = f.double().flatten().repeat(num_samples, 1)
        draws[:, at] += noise @ factor.T
        return draws.reshape(num_samples, *f.shape).to(f.dtype)

    def log_evidence(self) -> Tensor:
        """Laplace's log p(D) by way of the functions, in nats, without a sum over weights:

            log p(y | f*) + 1/2 rᵀ Lambda⁺ r - 1/2 y~ᵀ L B⁻¹ Lᵀ y~ - 1/2 log |B|

        For Gaussian noise that is log N(y~; 0, K + Lambda⁻¹), DNN2GP's; otherwise the first two
        terms give the true labels their due. At a minimum it is ``Posterior.log_evidence`` with the
        dense Gauss-Newton matrix.
        """
        r = self.data.residual.double().unsqueeze(2)
        fitted = (r.mT @ self.data.noise.double() @ r).sum()
        logdet = 2 * self._factor.diagonal().log().sum()
        return -self.data.nll + 0.5 * fitted - 0.5 * self._solved.square().sum() - 0.5 * logdet

    # ---------------------------------------------------------------- linear algebra

    @cached_property
    def _root(self) -> Tensor:
        """L, the symmetric root of Lambda: (N, C, C) in float64."""
        values, vectors = torch.linalg.eigh(self.data.precision.double())
        return (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT

    @cached_property
    def _factor(self) -> Tensor:
        """Cholesky of B = I + Lᵀ K L, which is never near singular: (N C, N C)."""
        n, c = self.data.targets.shape
        k = self.kernel_matrix.reshape(n, c, n, c)
        scaled = torch.einsum("iab,ibjc,jcd->iajd", self._root, k, self._root)
        b = scaled.reshape(n * c, n * c)
        return torch.linalg.cholesky(b + torch.eye(n * c, dtype=b.dtype, device=b.device))

    @cached_property
    def _solved(self) -> Tensor:
        """chol(B)⁻¹ Lᵀ y~: (N C, 1)."""
        q = (self._root @ self.data.targets.double().unsqueeze(2)).reshape(-1, 1)
        return torch.linalg.solve_triangular(self._factor, q, upper=False)

    def _cross(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The mean of f at the inputs (B, C), and k(x, X) L chol(B)⁻ᵀ: (B, C, N C)."""
        inputs = move(inputs, device_of(model))
        with evaluating(model), holding(model, self.mean), torch.no_grad():
            f = upcast(forward(model, inputs)) - linear_part(model, inputs, self.mean)
        cross = _kernel(
            model, self.mean, inputs, self.data.inputs, self.prior_precision, self.data.mask
        )
        b, c, n, _ = cross.shape
        x = torch.einsum("bcnd,nde->bcne", cross.double(), self._root).reshape(b * c, n * c)
        white = torch.linalg.solve_triangular(self._factor, x.T, upper=False).T
        white = white.reshape(b, c, n * c)
        return f + (white @ self._solved).squeeze(2).to(f.dtype), white


def _kernel(
    model: nn.Module,
    mean: Params,
    inputs: Inputs,
    others: Inputs | None,
    precision: float,
    mask: Tensor | None,
) -> Tensor:
    """The prior's kernel J J'ᵀ / precision at the mean: (B, C, B', C')."""
    with evaluating(model), holding(model, mean):
        return function_kernel(
            model, inputs, Isotropic.zeros_like(mean), precision, others=others, mask=mask
        )


def _cholesky(k: Tensor, jitter: float) -> Tensor:
    """Of K + jitter I. ValueError where it is singular to rounding, with a jitter that would do."""
    eye = torch.eye(len(k), dtype=k.dtype, device=k.device)
    factor, info = torch.linalg.cholesky_ex(k + jitter * eye)
    values = torch.linalg.eigvalsh(k)
    rounding = len(k) * torch.finfo(k.dtype).eps * float(values[-1].abs())
    lowest = float(values[0])
    if int(info) or lowest + jitter < rounding:
        raise ValueError(
            f"the kernel between these inputs is singular with jitter={jitter:g} (its smallest "
            f"eigenvalue is {lowest:.3g}); jitter={2 * (rounding + abs(lowest)):.1g} would do"
        )
    return factor

"""K-priors of kernel machines: every adaptation is retraining on all that is left.

The references share no code with the library: closed forms for Gaussian processes, bounded least
squares (scipy) and libsvm (scikit-learn) for support vector machines, dense minimisers in the
features of a Cholesky factor for the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.svm import SVC
from torch import Tensor, nn

import lifelong
from lifelong import (
    Bernoulli,
    Categorical,
    CheckpointError,
    Examples,
    Gaussian,
    Hinge,
    KernelMachine,
    KernelPrior,
    NonFiniteError,
    Poisson,
    checkpoint,
)
from lifelong.curvature import Isotropic
from lifelong.kernels import RBF, Linear, Polynomial
from lifelong.models import parameters, snapshot
from lifelong.testing import laws, reference

F64 = torch.float64


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(likelihood: Any, f: Tensor, seed: int) -> Tensor:
    f = f + 0.7 * normal(len(f), seed=seed)
    if isinstance(likelihood, Gaussian):
        return f
    if isinstance(likelihood, Bernoulli):
        return (f > 0).double()
    if isinstance(likelihood, Poisson):
        return f.exp().round()
    if isinstance(likelihood, Categorical):
        return (f > -0.5).long() + (f > 0.8).long()
    return (f > 0).double() * 2 - 1


def task(likelihood: Any, n: int, seed: int = 0) -> Examples:
    """n examples of three features, with ids of their own."""
    x = normal(n, 3, seed=seed)
    y = labels(likelihood, x[:, 0] + x[:, 1] * x[:, 2], seed + 100)
    return Examples(x, y, ids=1000 * seed + torch.arange(n))


# ------------------------------------------------------------------ the slow truth


@dataclass(frozen=True)
class Batch:
    """All that was learned and not forgotten, to be trained on from nothing."""

    likelihood: Any
    kernel: Any
    precision: float
    x: Tensor
    y: Tensor
    ids: Tensor

    def train(self) -> Callable[[Tensor], Tensor]:
        """x -> f (B, C) at the minimum."""
        k = self.kernel(self.x, self.x)
        alpha = retrain(self.likelihood, k, self.y, self.precision)
        return lambda z: self.kernel(z, self.x) @ alpha


def retrain(likelihood: Any, k: Tensor, y: Tensor, precision: float) -> Tensor:
    """alpha (N, C)."""
    if isinstance(likelihood, Gaussian):
        noise = precision * likelihood.noise_sd**2 * torch.eye(len(k), dtype=F64)
        return torch.linalg.solve(k + noise, y.reshape(len(k), -1))
    if isinstance(likelihood, Hinge):
        columns = y.reshape(len(k), -1).unbind(1)
        return torch.stack([bounded_least_squares(k, c, precision) for c in columns], 1)
    root = torch.linalg.cholesky(k)
    outputs = 3 if isinstance(likelihood, Categorical) else 1
    model = nn.Linear(len(k), outputs, bias=False, dtype=F64)
    nn.init.zeros_(model.weight)

    def loss() -> Tensor:
        nll = likelihood.nll(model(root), y).sum()
        return nll + 0.5 * precision * model.weight.square().sum()

    reference.minimise(model, loss, tolerance=1e-10, max_iter=20)
    return torch.linalg.solve_triangular(root.T, model.weight.detach().T, upper=True)


def bounded_least_squares(k: Tensor, y: Tensor, precision: float) -> Tensor:
    """The dual of a support vector machine, ½ aᵀ Q a - sum a, as ½ ‖R a - R⁻ᵀ 1‖²."""
    q = y.unsqueeze(1) * k * y / precision
    r = torch.linalg.cholesky(q).T
    target = torch.linalg.solve_triangular(r.T, torch.ones(len(q), 1, dtype=F64), upper=False)
    found = lsq_linear(
        r.numpy(), target.squeeze(1).numpy(), (0, 1), method="bvls", tol=1e-15, max_iter=2000
    )
    return torch.from_numpy(found.x) * y / precision


def libsvm(k: Tensor, y: Tensor, precision: float) -> Tensor:
    """alpha by libsvm. It has an offset that is not regularised; beside a mirror image of all the
    data, -phi(x) with the label -y, the offset is 0 by symmetry, and each half counts half."""
    both = torch.cat([torch.cat([k, -k], 1), torch.cat([-k, k], 1)])
    svc = SVC(C=0.5 / precision, kernel="precomputed", tol=1e-10, shrinking=False)
    svc.fit(both.numpy(), torch.cat([y, -y]).numpy())
    beta = torch.zeros(len(both), dtype=F64)
    beta[torch.from_numpy(svc.support_).long()] = torch.from_numpy(svc.dual_coef_[0])
    return (beta[: len(k)] - beta[len(k) :]).unsqueeze(1)


# ------------------------------------------------------------------ the four adaptations

KERNEL, OTHER = RBF(1.2, bias=0.3), RBF(0.9, variance=1.5, bias=0.1)
CASES = {
    "Gaussian process": (Gaussian(0.4), 1, 1.0),
    "logistic": (Bernoulli(), 1, 0.3),
    "Poisson": (Poisson(), 1, 0.7),
    "three classes": (Categorical(), 3, 0.5),
    "support vector machine": (Hinge(), 1, 0.4),
}
cases = pytest.mark.parametrize("case", CASES)


def learned(case: str, n: int = 24) -> tuple[KernelPrior, Batch]:
    likelihood, outputs, precision = CASES[case]
    data = task(likelihood, n)
    prior = KernelPrior(KERNEL, likelihood, precision, outputs).update(data)
    return prior, Batch(likelihood, KERNEL, precision, data.inputs, data.labels, data.ids)  # type: ignore[arg-type]


def add(prior: KernelPrior, batch: Batch) -> tuple[KernelPrior, Batch]:
    new = task(batch.likelihood, 10, seed=7)
    x, y = torch.cat([batch.x, _seen(batch, new.inputs)]), torch.cat([batch.y, new.labels])  # type: ignore[arg-type,list-item]
    after = prior.update(Examples(_seen(batch, new.inputs), new.labels, new.ids))  # type: ignore[arg-type]
    return after, replace(batch, x=x, y=y, ids=torch.cat([batch.ids, new.ids]))


def remove(prior: KernelPrior, batch: Batch) -> tuple[KernelPrior, Batch]:
    ids = batch.ids[[1, 4, 5, len(batch.ids) - 1]]
    stays = ~torch.isin(batch.ids, ids)
    return prior.forget(ids), replace(
        batch, x=batch.x[stays], y=batch.y[stays], ids=batch.ids[stays]
    )


def regularise(prior: KernelPrior, batch: Batch) -> tuple[KernelPrior, Batch]:
    likelihood, changes = batch.likelihood, {}
    if isinstance(likelihood, Gaussian):
        likelihood = changes["likelihood"] = Gaussian(0.6)
    after = prior.replace(precision=2.5 * batch.precision, **changes)
    return after, replace(batch, precision=2.5 * batch.precision, likelihood=likelihood)


def transfer(prior: KernelPrior, batch: Batch) -> tuple[KernelPrior, Batch]:
    after = prior.transfer(kernel=OTHER, features=lambda x: x[:, :2])
    return after, replace(batch, kernel=OTHER, x=batch.x[:, :2])


def _seen(batch: Batch, x: Tensor) -> Tensor:
    """The features that the function sees by now."""
    return x[:, : batch.x.shape[1]]


ADAPTATIONS = {"add": add, "remove": remove, "regularise": regularise, "transfer": transfer}


def error(prior: KernelPrior, batch: Batch) -> float:
    """Of the function, at its inputs and elsewhere."""
    z = torch.cat([batch.x, _seen(batch, normal(30, 3, seed=50))])
    return laws.distance(prior.machine(z), batch.train()(z))


@cases
def test_learning_is_training(case):
    prior, batch = learned(case)
    assert error(prior, batch) < 1e-9
    assert prior.certified


@cases
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_an_adaptation_is_retraining(case, adaptation):
    prior, batch = ADAPTATIONS[adaptation](*learned(case))
    assert error(prior, batch) < 1e-9
    assert len(prior) == prior.num_data == len(batch.x)


@cases
@pytest.mark.parametrize("order", list(itertools.permutations(ADAPTATIONS, 3)), ids="-".join)
def test_three_adaptations_in_a_row_are_retraining(case, order):
    prior, batch = learned(case)
    for adaptation in order:
        prior, batch = ADAPTATIONS[adaptation](prior, batch)
    assert error(prior, batch) < 1e-9

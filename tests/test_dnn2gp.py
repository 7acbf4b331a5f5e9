"""A network as a Gaussian process: its identities with the weights' posterior, in float64."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from lifelong import (
    Bernoulli,
    Categorical,
    Examples,
    Gaussian,
    NotRepeatableError,
    Poisson,
    Posterior,
    dnn2gp,
)
from lifelong.data import head_mask
from lifelong.dnn2gp import GaussianProcess, pseudo_data
from lifelong.likelihoods import Likelihood
from lifelong.models import parameters
from lifelong.testing.reference import flatten, ggn, gradient, jacobian, minimise

DELTA = 0.7


class Case(NamedTuple):
    likelihood: Likelihood
    labels: Tensor
    head: tuple[int, ...] | None = None


N = 12
REAL = torch.randn(N, 3, generator=torch.Generator().manual_seed(3)).double()
CASES = {
    "gaussian": Case(Gaussian(0.5), REAL),
    "categorical": Case(Categorical(), torch.arange(N) % 3),
    "categorical head": Case(Categorical(), torch.arange(N) % 2, (0, 1)),
    "bernoulli": Case(Bernoulli(), (REAL > 0).double()),
    "poisson": Case(Poisson(), (3 * REAL.abs()).round()),
}


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), *extra, nn.Linear(4, 3)).double()


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()


def examples(case: Case) -> Examples:
    return Examples(draw(N), case.labels, head=case.head)


@cache
def fitted(name: str) -> nn.Sequential:
    """At a minimum of nll + delta/2 ||theta||²."""
    case, model = CASES[name], net()
    mask = head_mask(case.head, 3)

    def loss() -> Tensor:
        f = case.likelihood.mask(model(draw(N)), mask)
        square = sum(p.square().sum() for p in model.parameters())
        return case.likelihood.nll(f, case.labels).sum() + 0.5 * DELTA * square

    minimise(model, loss)
    return model


def both(name: str) -> tuple[GaussianProcess, Posterior]:
    case, model = CASES[name], fitted(name)
    given: dict[str, Any] = {"prior_precision": DELTA}
    data = examples(case)
    return (
        GaussianProcess.fit(model, data, case.likelihood, **given, batch_size=5),
        Posterior.laplace(model, data, case.likelihood, **given, structure="dense"),
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters(model).values()])


@pytest.mark.parametrize("name", CASES)
def test_the_linear_model_on_pseudo_data_has_the_posterior(name):
    case, model = CASES[name], fitted(name)
    pseudo = pseudo_data(model, examples(case), case.likelihood, batch_size=5)
    j = flatten(jacobian(model, draw(N)))
    precision = torch.einsum("ncp,ncd,ndq->pq", j, pseudo.precision, j)
    assert torch.allclose(precision, ggn(model, examples(case), case.likelihood), atol=1e-10)
    damped = precision + DELTA * torch.eye(len(precision)).double()
    moment = torch.einsum("ncp,ncd,nd->p", j, pseudo.precision, pseudo.targets)
    assert torch.allclose(torch.linalg.solve(damped, moment), flat(model), atol=1e-8)
    # The noise is the pseudo-inverse: all four of Penrose's conditions.
    a, b = pseudo.precision, pseudo.noise
    for x, y in ((a @ b @ a, a), (b @ a @ b, b), (a @ b, (a @ b).mT), (b @ a, (b @ a).mT)):
        assert torch.allclose(x, y, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_function_space_equals_weight_space(name):
    (gp, posterior), x, case = both(name), draw(6, 9), CASES[name]
    ours = gp.predict(fitted(name), x)
    theirs = posterior.predictive(fitted(name), x, case.likelihood, mask=head_mask(case.head, 3))
    for part in ("mean", "epistemic", "aleatoric"):
        assert torch.allclose(getattr(ours, part), getattr(theirs, part), rtol=1e-6, atol=1e-8)
    assert torch.allclose(gp.log_evidence(), posterior.log_evidence(), rtol=1e-10)


def test_the_evidence_is_the_density_of_the_pseudo_targets():
    (gp, _), sd = both("gaussian"), 0.5
    j = flatten(jacobian(fitted("gaussian"), draw(N))).flatten(0, 1)
    k = j @ j.T / DELTA + sd**2 * torch.eye(len(j)).double()
    density = MultivariateNormal(torch.zeros(len(j)).double(), k)
    assert torch.allclose(gp.log_evidence(), density.log_prob(gp.data.targets.flatten()))


def test_away_from_a_minimum_it_is_one_newton_step_on():
    """The linear model's mean is mu - Sigma grad, and its evidence is Laplace's plus what the step
    gains, 1/2 gradᵀ Sigma grad."""
    model, data, x = net(), examples(CASES["gaussian"]), draw(4, 9)
    gp = GaussianProcess.fit(model, data, Gaussian(0.5), prior_precision=DELTA)
    posterior = Posterior.laplace(
        model, data, Gaussian(0.5), prior_precision=DELTA, structure="dense"
    )
    slope = gradient(model, data, Gaussian(0.5)) + DELTA * flat(model)
    matrix = ggn(model, data, Gaussian(0.5))
    step = torch.linalg.solve(matrix + DELTA * torch.eye(len(matrix)).double(), slope)
    j = flatten(jacobian(model, x))
    assert torch.allclose(gp.outputs(model, x)[0], model(x).detach() - j @ step)
    gain = 0.5 * slope @ step
    assert torch.allclose(gp.log_evidence(), posterior.log_evidence() + gain)


@pytest.mark.parametrize("name", ["gaussian", "categorical head"])
def test_drawn_functions_have_the_covariance_between_inputs(name):
    (gp, _), model, x = both(name), fitted(name), draw(2, 9)
    n, keep = 4000, [c for c in range(3) if c in (CASES[name].head or range(3))]
    draws = gp.sample(model, x, n, generator=torch.Generator().manual_seed(0))
    step = (draws - model(x).detach())[:, :, keep].flatten(1)
    j = flatten(jacobian(model, x))[:, keep].flatten(0, 1)
    matrix = ggn(model, examples(CASES[name]), CASES[name].likelihood)
    covariance = j @ torch.linalg.inv(matrix + DELTA * torch.eye(len(matrix)).double()) @ j.T
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), step.T, upper=False)
    found = white @ white.T / n
    assert (found - torch.eye(len(j)).double()).abs().max() < 4.5 * (2 / n) ** 0.5
    outside = [c for c in range(3) if c not in keep]
    assert torch.allclose(draws[:, :, outside], model(x).detach()[:, outside].expand(n, -1, -1))


def test_predictions_can_be_drawn():
    (gp, _), model, x = both("categorical"), fitted("categorical"), draw(3, 9)
    drawn = gp.predict(model, x, num_samples=3000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mean, gp.predict(model, x).mean, atol=0.05)
    assert torch.allclose(drawn.mean.sum(1), torch.ones(3).double())


def test_the_fitted_weights_are_used_and_the_model_is_left_alone():
    (gp, _), x = both("categorical"), draw(3, 9)
    truth = gp.predict(fitted("categorical"), x)
    model = net().train()
    before = flat(model)
    made = gp.predict(model, x)
    assert torch.allclose(made.mean, truth.mean)
    assert torch.allclose(made.epistemic, truth.epistemic)
    assert torch.equal(flat(model), before)
    assert model.training


def test_a_singular_kernel_names_the_jitter_that_would_do():
    (gp, _), model, x = both("gaussian"), fitted("gaussian"), draw(2, 9)
    twice = torch.cat([x, x])
    with pytest.raises(ValueError, match="is singular with jitter=0 .*jitter=.* would do") as error:
        gp.sample(model, twice)
    jitter = float(str(error.value).split("jitter=")[2].split()[0])
    assert gp.sample(model, twice, 5, jitter=jitter).shape == (5, 4, 3)


def test_errors(monkeypatch):
    data = examples(CASES["categorical"])
    with pytest.raises(ValueError, match="prior_precision must be positive, got 0"):
        GaussianProcess.fit(net(), data, Categorical(), prior_precision=0)
    with pytest.raises(NotRepeatableError, match="training mode"):
        pseudo_data(net(nn.Dropout(0.5)), data, Categorical())
    lacking: Any = SimpleNamespace(residual=None)
    with pytest.raises(TypeError, match="has no hessian, which DNN2GP needs; give it"):
        pseudo_data(net(), data, lacking)
    monkeypatch.setattr(dnn2gp, "_LIMIT", 8 * 30**2)
    with pytest.raises(ValueError, match="12 examples and 3 outputs.*10 examples fit; Posterior"):
        GaussianProcess.fit(net(), data, Categorical(), prior_precision=1.0)

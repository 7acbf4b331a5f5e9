"""Laplace's posterior against dense algebra in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong import Categorical, Diagonal, Examples, NotRepeatableError, Posterior
from lifelong.models import parameters
from lifelong.testing.reference import ggn

DELTA = 0.7


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), *extra, nn.Tanh(), nn.Linear(3, 3)).double()


def data() -> Examples:
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).double()
    return Examples(x, torch.arange(9) % 3)


def flat(params: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params.values()])


def laplace(structure: Any) -> tuple[Posterior, Tensor]:
    """The posterior, and its precision matrix from the reference."""
    posterior = Posterior.laplace(
        net(), data(), Categorical(), prior_precision=DELTA, structure=structure, batch_size=4
    )
    g = ggn(net(), data(), Categorical())
    g = g if structure == "dense" else torch.diag(g.diagonal())
    return posterior, g + DELTA * torch.eye(len(g)).double()


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_variance_is_the_diagonal_of_the_inverse(structure):
    posterior, precision = laplace(structure)
    assert torch.allclose(flat(posterior.variance()), torch.linalg.inv(precision).diagonal())
    assert torch.equal(flat(posterior.mean), flat(parameters(net())))


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_samples_have_the_mean_and_the_covariance(structure):
    posterior, precision = laplace(structure)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([flat(posterior.sample(generator)) for _ in range(3000)])
    # Whitened by the true precision, they are standard normal.
    white = (draws - flat(posterior.mean)) @ torch.linalg.cholesky(precision)
    n, p = white.shape
    assert white.mean(0).abs().max() < 4.5 / n**0.5
    covariance = white.T @ white / n
    assert (covariance - torch.eye(p).double()).abs().max() < 4.5 * (2 / n) ** 0.5


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_as_a_prior_it_is_minus_its_log_density(structure):
    posterior, precision = laplace(structure)
    prior, model = posterior.as_prior(Categorical()), net()
    at_mean = prior(model).detach()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    d = flat(parameters(model)) - flat(posterior.mean)
    assert torch.allclose(prior(model) - at_mean, 0.5 * d @ precision @ d)
    assert prior.update(model, data()).recipe.structure == structure


def test_errors():
    curvature = Diagonal({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="prior_precision must be positive, got 0.0: .*infinite"):
        Posterior({"w": torch.zeros(2)}, curvature, 0.0)
    with pytest.raises(ValueError, match="structure must be 'diagonal' or 'dense', got 'path'"):
        Posterior.laplace(net(), data(), Categorical(), prior_precision=1.0, structure="path")  # type: ignore[arg-type]
    with pytest.raises(NotRepeatableError, match="training mode"):
        Posterior.laplace(net(nn.Dropout(0.5)), data(), Categorical(), prior_precision=1.0)

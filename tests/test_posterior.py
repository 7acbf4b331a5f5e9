"""Laplace's posterior against dense algebra in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from lifelong import (
    Bernoulli,
    Categorical,
    Dense,
    Diagonal,
    Examples,
    Gaussian,
    NonFiniteError,
    NotRepeatableError,
    Posterior,
    StaleAnchorError,
    hooks,
)
from lifelong.curvature import (
    BlockDiagonal,
    Isotropic,
    Kronecker,
    LowRank,
    Structure,
    estimate,
    structure_of,
)
from lifelong.models import parameters
from lifelong.testing.reference import flatten, ggn, jacobian, minimise

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
    draws = torch.cat([d.flatten(1) for d in posterior.sample(3000, generator).values()], dim=1)
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


# -------------------------------------------------------------------- predictions


@pytest.mark.parametrize("structure", get_args(Structure))
def test_an_update_of_it_as_a_prior_adds_curvature_of_its_structure(structure):
    posterior = Posterior.laplace(
        net(), data(), Categorical(), prior_precision=DELTA, structure=structure
    )
    prior = posterior.as_prior(Categorical())
    assert prior.recipe.structure == structure
    model, more = net(), Examples(data().inputs.flip(0), data().labels)
    updated = prior.update(model, more)
    again = estimate(model, more, Categorical(), structure=structure)
    assert torch.allclose(
        updated.weight.curvature.dense().matrix, (posterior.curvature + again).dense().matrix
    )


def test_a_curvature_of_ones_own_has_no_estimator():
    class Own:
        shapes: ClassVar = {}

    with pytest.raises(TypeError, match="no estimator makes a Own"):
        structure_of(Own())


def points(n: int = 4) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(5)).double()


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_the_linearised_predictive_is_dense_algebra(structure):
    posterior, precision = laplace(structure)
    x, noise = points(), 0.3
    made = posterior.predictive(net(), x, Gaussian(noise))
    j = flatten(jacobian(net(), x))
    spread = j @ torch.linalg.inv(precision) @ j.mT
    assert torch.allclose(made.mean, net()(x).detach())
    assert torch.allclose(made.covariance, spread + noise**2 * torch.eye(3).double())
    plain = posterior.predictive(net(), x, Gaussian(noise), method="mean")
    assert torch.equal(plain.mean, made.mean)
    assert not plain.epistemic.any()


@pytest.mark.parametrize("working_set", [1, hooks.WORKING_SET])
def test_monte_carlo_is_the_linearised_law_of_a_linear_model(working_set, monkeypatch):
    torch.manual_seed(1)
    model, x = nn.Linear(2, 3).double(), points()
    posterior = Posterior.laplace(
        model, data(), Categorical(), prior_precision=DELTA, structure="dense"
    )
    exact = posterior.predictive(model, x, Gaussian(0.1))
    monkeypatch.setattr(hooks, "WORKING_SET", working_set)  # one draw at a time, or all
    n, generator = 2000, torch.Generator().manual_seed(0)
    made = posterior.predictive(
        model, x, Gaussian(0.1), method="mc", num_samples=n, generator=generator
    )
    sd = exact.epistemic.diagonal(dim1=1, dim2=2).sqrt()
    assert ((made.mean - exact.mean).abs() < 4.5 * sd / n**0.5).all()
    gap = (made.epistemic - exact.epistemic).abs()
    assert (gap < 4.5 * 2**0.5 * sd[:, :, None] * sd[:, None] / n**0.5).all()


@pytest.mark.parametrize("options", [{}, {"num_samples": 50}, {"method": "mc"}])
def test_classes_outside_of_the_mask_have_no_probability(options):
    posterior, _ = laplace("dense")
    mask = torch.tensor([True, False, True])
    made = posterior.predictive(net(), points(), Categorical(), mask=mask, **options)
    assert not made.mean[:, 1].any()
    assert torch.allclose(made.mean.sum(1), torch.ones(4).double())
    assert (made.sd[:, [0, 2]] > 0).all()


def test_drawn_outputs_agree_with_the_probit_formula():
    posterior, _ = laplace("dense")
    generator = torch.Generator().manual_seed(0)
    made = posterior.predictive(
        net(), points(), Categorical(), num_samples=4000, generator=generator
    )
    assert torch.allclose(
        made.mean, posterior.predictive(net(), points(), Categorical()).mean, atol=0.05
    )


@pytest.mark.parametrize("options", [{}, {"method": "mc"}, {"method": "mean"}])
def test_the_mean_is_used_and_the_model_comes_back_as_it_was(options):
    posterior, _ = laplace("dense")
    options |= {"generator": torch.Generator()}
    options["generator"].manual_seed(0)
    truth = posterior.predictive(net(), points(), Categorical(), **options)
    model = net(nn.Identity())[:1] + net()[1:]  # the same layers, in training mode
    model.train()
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    before = flat(parameters(model))
    options["generator"].manual_seed(0)
    state = torch.random.get_rng_state()
    made = posterior.predictive(model, points(), Categorical(), **options)
    assert torch.equal(made.mean, truth.mean)
    assert torch.equal(flat(parameters(model)), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# -------------------------------------------------------------------- evidence

X = torch.randn(9, 2, generator=torch.Generator().manual_seed(7)).double()
Y = 2 * X[:, :1] + 0.5 * torch.randn(9, 1, generator=torch.Generator().manual_seed(8)).double()


def regression(delta: float, noise: float) -> tuple[nn.Module, Posterior]:
    """Linear regression without an intercept, at its minimum."""
    model = nn.Linear(2, 1, bias=False).double()
    minimise(
        model,
        lambda: Gaussian(noise).nll(model(X), Y).sum() + 0.5 * delta * model.weight.square().sum(),
    )
    posterior = Posterior.laplace(
        model, (X, Y), Gaussian(noise), prior_precision=delta, structure="dense", batch_size=4
    )
    return model, posterior


def log_slopes(evidence: Callable[..., Tensor], *values: float) -> list[float]:
    """The derivatives in the logarithms of the arguments."""
    at = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
    slopes = torch.autograd.grad(evidence(*at), at)
    return [float(slope) * v for slope, v in zip(slopes, values, strict=True)]


@given(st.floats(0.05, 20), st.floats(0.3, 3))
def test_it_is_exact_for_linear_regression(delta, noise):
    covariance = X @ X.T / delta + noise**2 * torch.eye(9).double()
    exact = MultivariateNormal(torch.zeros(9).double(), covariance).log_prob(Y.squeeze(1))
    torch.testing.assert_close(regression(delta, noise)[1].log_evidence(), exact)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_it_is_the_formula_of_laplace(structure):
    posterior, precision = laplace(structure)
    square = flat(posterior.mean).square().sum()
    f, y = net()(data().inputs).detach(), data().labels
    expected = (
        -Categorical().nll(f, y).sum()
        - 0.5 * DELTA * square
        + 0.5 * len(precision) * torch.tensor(DELTA).double().log()
        - 0.5 * torch.logdet(precision)
    )
    torch.testing.assert_close(posterior.log_evidence(), expected)
    # Under another delta it is that of a posterior made with it: the mean stays.
    other = replace(posterior, prior_precision=2.0)
    torch.testing.assert_close(posterior.log_evidence(2.0), other.log_evidence())


def test_another_noise_is_that_of_a_posterior_made_with_it():
    model, posterior = regression(0.7, 0.5)
    other = Posterior.laplace(model, (X, Y), Gaussian(1.3), prior_precision=0.7, structure="dense")
    torch.testing.assert_close(posterior.log_evidence(noise_sd=1.3), other.log_evidence())


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_it_is_differentiable_in_precision_and_noise(structure):
    posterior = Posterior.laplace(
        net(), (points(), torch.ones(4, 3).double()), Gaussian(0.6), prior_precision=DELTA,
        structure=structure,
    )  # fmt: skip
    at = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.9)]
    assert torch.autograd.gradcheck(posterior.log_evidence, at)


@given(st.floats(1e-3, 1e3))
def test_the_precision_of_the_largest_evidence_is_found_from_anywhere(start):
    posterior, _ = laplace("dense")
    best = replace(posterior, prior_precision=start).maximise_evidence()
    grid = torch.logspace(-3, 3, 61, dtype=torch.float64)
    assert best.log_evidence() >= max(posterior.log_evidence(d) for d in grid)
    assert abs(log_slopes(posterior.log_evidence, best.prior_precision)[0]) < 1e-7
    # MacKay's fixed point: delta ||theta||² = gamma, the number of weights that the data set.
    g = torch.linalg.eigvalsh(posterior.curvature.matrix).clamp(min=0)
    gamma = (g / (g + best.prior_precision)).sum()
    square = flat(best.mean).square().sum()
    torch.testing.assert_close(best.prior_precision * square, gamma, rtol=1e-6, atol=1e-9)
    assert best.mean is posterior.mean


def test_noise_is_chosen_with_the_precision():
    _, posterior = regression(0.7, 0.5)
    best = posterior.maximise_evidence(noise=True)
    sd = best.fit.likelihood.noise_sd
    at = (best.prior_precision, sd)
    assert max(abs(s) for s in log_slopes(posterior.log_evidence, *at)) < 1e-6
    # The curvature and the nll are those of the new noise.
    torch.testing.assert_close(best.log_evidence(), posterior.log_evidence(*at))
    torch.testing.assert_close(best.curvature.matrix, X.T @ X / sd**2)


def test_refits_reach_the_maximum_of_the_exact_evidence():
    """Fit, choose delta, fit again: where both stand still, so does log N(y; 0, X Xᵀ/delta + I)."""
    delta = 5.0
    for _ in range(30):
        delta = regression(delta, 0.5)[1].maximise_evidence().prior_precision

    def exact(delta: Tensor) -> Tensor:
        covariance = X @ X.T / delta + 0.25 * torch.eye(9).double()
        return MultivariateNormal(torch.zeros(9).double(), covariance).log_prob(Y.squeeze(1))

    assert abs(log_slopes(exact, delta)[0]) < 1e-6


# -------------------------------------------------------------------- structures


def kronecker(shapes: dict[str, torch.Size], draw: Callable[..., Tensor]) -> BlockDiagonal:
    blocks = []
    for index in ("0", "2"):
        layer = {n: s for n, s in shapes.items() if n.startswith(index)}
        (o, i), _ = layer.values()
        a, b = draw(1, 1, o, o), draw(1, 1, i + 1, i + 1)
        blocks.append(Kronecker(a @ a.mT, b @ b.mT, layer))
    return BlockDiagonal(tuple(blocks))


@pytest.mark.parametrize("structure", ["isotropic", "kronecker", "low rank"])
def test_every_structure_says_what_its_matrix_says(structure):
    shapes = {n: p.shape for n, p in parameters(net()).items()}
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if structure == "isotropic":
        g = Isotropic(torch.tensor(1.5).double(), shapes)
    elif structure == "kronecker":
        g = kronecker(shapes, draw)
    else:
        g = LowRank({n: draw(4, *s) for n, s in shapes.items()}, draw(4).square())
    seen = laplace("dense")[0]
    ours, theirs = (replace(seen, curvature=c) for c in (g, g.dense()))
    assert torch.allclose(flat(ours.variance()), flat(theirs.variance()))
    for attribute in ("mean", "epistemic", "aleatoric"):
        a, b = (
            getattr(p.predictive(net(), points(), Categorical()), attribute) for p in (ours, theirs)
        )
        assert torch.allclose(a, b)
    torch.testing.assert_close(ours.log_evidence(0.3), theirs.log_evidence(0.3))
    best = [p.maximise_evidence().prior_precision for p in (ours, theirs)]
    assert abs(best[0] / best[1] - 1) < 1e-6
    prior, model = ours.as_prior(Categorical()), net()
    at_mean = prior(model).detach()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * draw(*p.shape)
    d = {n: p.detach() - ours.mean[n] for n, p in parameters(model).items()}
    density = 0.5 * (g.quad(d) + DELTA * flat(d).square().sum())
    assert torch.allclose(prior(model) - at_mean, density)
    given = Posterior.laplace(net(), data(), Categorical(), prior_precision=DELTA, curvature=g)
    torch.testing.assert_close(given.log_evidence(0.3), ours.log_evidence(0.3))
    draws = ours.sample(3, generator)
    assert {n: d.shape for n, d in draws.items()} == {n: (3, *s) for n, s in shapes.items()}


# -------------------------------------------------------------------- errors


def test_errors_of_the_evidence():
    posterior, _ = laplace("dense")
    with pytest.raises(ValueError, match="made without data, so it has no evidence"):
        replace(posterior, fit=None).log_evidence()
    for value in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="prior_precision must be positive and finite"):
            posterior.log_evidence(value)
    with pytest.raises(ValueError, match="noise_sd is of the Gaussian.*made with Categorical"):
        posterior.log_evidence(noise_sd=1.0)
    with pytest.raises(ValueError, match="noise_sd must be positive and finite, got -1"):
        regression(0.7, 0.5)[1].log_evidence(noise_sd=-1.0)
    with pytest.raises(ValueError, match="noise=True is for the Gaussian.*not for Categorical"):
        posterior.maximise_evidence(noise=True)
    for changes in (
        {"mean": {n: torch.zeros_like(m) for n, m in posterior.mean.items()}},
        {"curvature": Dense.zeros_like(posterior.mean)},
    ):
        with pytest.raises(ValueError, match="no maximum in the prior precision: the curvature or"):
            replace(posterior, **changes).maximise_evidence()
    indefinite = replace(posterior, curvature=posterior.curvature * -5.0)
    for wrong in (
        indefinite.log_evidence,
        indefinite.variance,
        indefinite.sample,
        lambda: indefinite.predictive(net(), points(), Categorical()),
    ):
        with pytest.raises(ValueError, match="not positive definite.*a damping of .* would do"):
            wrong()


def test_more_samples_than_memory_allows_are_refused():
    with pytest.raises(ValueError, match=r"GiB, expected at most 8; draw \d+ at a time"):
        laplace("diagonal")[0].sample(10**9)


def test_errors_of_predictions():
    posterior, _ = laplace("diagonal")
    x = points()
    with pytest.raises(ValueError, match=r"method must be one of \('glm', 'mc', 'mean'\)"):
        posterior.predictive(net(), x, Categorical(), method="gp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        posterior.predictive(net(), x, Categorical(), num_samples=0)
    with pytest.raises(ValueError, match="no classes to choose from"):
        posterior.predictive(net(), x, Bernoulli(), mask=torch.ones(3).bool())
    with pytest.raises(StaleAnchorError, match="missing from the model"):
        posterior.predictive(nn.Linear(2, 3).double(), x, Categorical())
    for method in ("glm", "mc", "mean"):
        with pytest.raises(NonFiniteError, match="an output of the model"):
            posterior.predictive(net(), x * float("inf"), Categorical(), method=method)
    lacking: Any = SimpleNamespace(residual=None)
    with pytest.raises(TypeError, match="has no hessian, which the label's covariance"):
        posterior.predictive(net(), x, lacking)
    with pytest.raises(
        TypeError, match="SimpleNamespace has no hessian_factor or hessian, which estimator='exact'"
    ):
        Posterior.laplace(net(), data(), lacking, prior_precision=1.0)


def test_errors():
    curvature = Diagonal({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="prior_precision must be positive, got 0.0: .*infinite"):
        Posterior({"w": torch.zeros(2)}, curvature, 0.0)
    with pytest.raises(ValueError, match="structure must be one of .*'kronecker'.*got 'path'"):
        Posterior.laplace(net(), data(), Categorical(), prior_precision=1.0, structure="path")  # type: ignore[arg-type]
    with pytest.raises(StaleAnchorError, match="the model has other parameters"):
        Posterior.laplace(net(), data(), Categorical(), prior_precision=1.0, curvature=curvature)
    with pytest.raises(NotRepeatableError, match="training mode"):
        Posterior.laplace(net(nn.Dropout(0.5)), data(), Categorical(), prior_precision=1.0)
    dropout = net(nn.Dropout(0.5))
    own = Diagonal.zeros_like(parameters(dropout))
    with pytest.raises(NotRepeatableError, match="training mode"):
        Posterior.laplace(dropout, data(), Categorical(), prior_precision=1.0, curvature=own)


@pytest.mark.parametrize("method", ["glm", "mc", "mean"])
def test_a_model_that_changed_its_dtype_since(method):
    model = net().float()
    few = Examples(data().inputs.float(), data().labels)
    posterior = Posterior.laplace(model, few, Categorical(), prior_precision=DELTA)
    told = posterior.predictive(model.double(), points(), Categorical(), method=method)
    assert told.mean.dtype == torch.float64

"""Likelihoods: every closed form against autograd and torch.distributions, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as td
from torch.nn import functional as F

from lifelong.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    NextTokens,
    Poisson,
)

NOISE_SD = 0.7


@dataclass(frozen=True)
class Case:
    """A likelihood with independent definitions of what it should be."""

    likelihood: Likelihood
    log_partition: Callable[[Tensor], Tensor]  # A: (B, C) -> (B,)
    distribution: Callable[[Tensor], td.Distribution]


CASES = {
    "categorical": Case(
        Categorical(),
        lambda f: f.logsumexp(-1),
        lambda f: td.OneHotCategorical(logits=f),
    ),
    "bernoulli": Case(
        Bernoulli(),
        lambda f: F.softplus(f).sum(-1),
        lambda f: td.Independent(td.Bernoulli(logits=f), 1),
    ),
    "gaussian": Case(
        Gaussian(NOISE_SD),
        lambda f: 0.5 * f.square().sum(-1) / NOISE_SD**2,
        lambda f: td.Independent(td.Normal(f, NOISE_SD), 1),
    ),
    "poisson": Case(
        Poisson(),
        lambda f: f.exp().sum(-1),
        lambda f: td.Independent(td.Poisson(f.exp()), 1),
    ),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
seeds = st.integers(0, 2**32 - 1)
classes = st.integers(1, 5)
scales = st.sampled_from([0.1, 1.0, 3.0])


def outputs(seed: int, num_classes: int, scale: float = 1.0, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)


def labels(case: Case, seed: int, num_classes: int) -> Tensor:
    """(B, C) labels, hard where the likelihood has hard ones."""
    f = outputs(seed + 1, num_classes)
    y = case.likelihood.sample(f, torch.Generator().manual_seed(seed))
    return F.one_hot(y, num_classes).double() if y.ndim == 1 else y


def gradient(function: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """The gradient of a (B,) function of (B, C) in its argument, by autograd."""
    f = f.detach().requires_grad_()
    return torch.autograd.grad(function(f).sum(), f)[0]


def second_derivative(function: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """(B, C, C), by autograd: examples do not mix, so that summing over them loses nothing."""
    full = torch.autograd.functional.jacobian(
        lambda g: torch.autograd.grad(function(g).sum(), g, create_graph=True)[0],
        f.detach().requires_grad_(),
    )
    return torch.stack([full[b, :, b] for b in range(len(f))])  # type: ignore[index]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@each_case
def test_is_a_likelihood(case: Case) -> None:
    assert isinstance(case.likelihood, Likelihood)


@each_case
@given(seed=seeds, num_classes=classes, scale=scales)
def test_nll_is_minus_log_probability(
    case: Case, seed: int, num_classes: int, scale: float
) -> None:
    f, y = outputs(seed, num_classes, scale), labels(case, seed, num_classes)
    close(case.likelihood.nll(f, y), -case.distribution(f).log_prob(y))


@each_case
@given(seed=seeds, num_classes=classes, scale=scales)
def test_mean_is_that_of_the_distribution(
    case: Case, seed: int, num_classes: int, scale: float
) -> None:
    f = outputs(seed, num_classes, scale)
    close(case.likelihood.mean(f), case.distribution(f).mean)


@each_case
@given(seed=seeds, num_classes=classes, scale=scales)
def test_residual_is_the_gradient(case: Case, seed: int, num_classes: int, scale: float) -> None:
    f, y = outputs(seed, num_classes, scale), labels(case, seed, num_classes)
    close(case.likelihood.residual(f, y), gradient(lambda f: case.likelihood.nll(f, y), f))


@each_case
@given(seed=seeds, num_classes=classes, scale=scales)
def test_hessian_is_the_second_derivative(
    case: Case, seed: int, num_classes: int, scale: float
) -> None:
    f, y = outputs(seed, num_classes, scale), labels(case, seed, num_classes)
    H = case.likelihood.hessian(f)
    close(H, second_derivative(lambda f: case.likelihood.nll(f, y), f))


@each_case
@given(seed=seeds, num_classes=classes, scale=scales)
def test_factor_and_trace_agree_with_the_hessian(
    case: Case, seed: int, num_classes: int, scale: float
) -> None:
    f = outputs(seed, num_classes, scale)
    H, S = case.likelihood.hessian(f), case.likelihood.hessian_factor(f)
    close(S @ S.mT, H)
    close(case.likelihood.hessian_trace(f), H.diagonal(dim1=1, dim2=2).sum(-1))


@given(seed=seeds, num_classes=classes, scale=scales)
def test_exact_fisher_is_the_hessian(seed: int, num_classes: int, scale: float) -> None:
    likelihood, f = Categorical(), outputs(seed, num_classes, scale)
    p = likelihood.mean(f)
    fisher = torch.zeros(len(f), num_classes, num_classes, dtype=f.dtype)
    for c in range(num_classes):
        r = likelihood.residual(f, torch.full((len(f),), c))
        fisher += p[:, c, None, None] * r.unsqueeze(-1) * r.unsqueeze(-2)
    close(fisher, likelihood.hessian(f))


@each_case
@given(seed=seeds, num_classes=classes, scale=scales)
def test_kl_is_the_bregman_divergence(
    case: Case, seed: int, num_classes: int, scale: float
) -> None:
    f_ref, f = outputs(seed, num_classes, scale), outputs(seed + 1, num_classes, scale)
    A = case.log_partition
    bregman = A(f) - A(f_ref) - (gradient(A, f_ref) * (f - f_ref)).sum(-1)
    close(case.likelihood.kl(f_ref, f), bregman)


@each_case
@given(seed=seeds, num_classes=classes, scale=scales)
def test_kl_is_that_of_the_distributions(
    case: Case, seed: int, num_classes: int, scale: float
) -> None:
    f_ref, f = outputs(seed, num_classes, scale), outputs(seed + 1, num_classes, scale)
    kl = td.kl_divergence(case.distribution(f_ref), case.distribution(f))
    close(case.likelihood.kl(f_ref, f), kl)


@each_case
@given(seed=seeds, num_classes=classes, scale=scales)
def test_kl_is_zero_and_flat_at_the_reference(
    case: Case, seed: int, num_classes: int, scale: float
) -> None:
    f = outputs(seed, num_classes, scale)
    close(case.likelihood.kl(f, f), torch.zeros(len(f), dtype=f.dtype), 1e-14)
    close(gradient(lambda g: case.likelihood.kl(f, g), f), torch.zeros_like(f), 1e-12)
    curvature = second_derivative(lambda g: case.likelihood.kl(f, g), f)
    close(curvature, case.likelihood.hessian(f))


@each_case
@given(seed=seeds, num_classes=classes, alpha=st.floats(0, 1))
def test_blended_labels_are_blended_losses(
    case: Case, seed: int, num_classes: int, alpha: float
) -> None:
    """l(blend) = alpha l(soft) + (1 - alpha) l(true) up to a constant in f: compare two f."""
    likelihood, y = case.likelihood, labels(case, seed, num_classes)
    soft = likelihood.mean(outputs(seed + 2, num_classes))
    f, g = outputs(seed, num_classes), outputs(seed + 1, num_classes)

    def rise(y: Tensor) -> Tensor:
        return likelihood.nll(f, y) - likelihood.nll(g, y)

    blend = alpha * soft + (1 - alpha) * y
    close(rise(blend), alpha * rise(soft) + (1 - alpha) * rise(y))
    r = alpha * likelihood.residual(f, soft) + (1 - alpha) * likelihood.residual(f, y)
    close(likelihood.residual(f, blend), r)


@each_case
@given(seed=seeds, num_classes=classes)
def test_soft_label_of_the_reference_gives_the_kl(case: Case, seed: int, num_classes: int) -> None:
    """l(mean(f_ref), f) - l(mean(f_ref), f_ref) = KL(f_ref, f): function terms are soft replay."""
    f_ref, f = outputs(seed, num_classes), outputs(seed + 1, num_classes)
    soft = case.likelihood.mean(f_ref)
    rise = case.likelihood.nll(f, soft) - case.likelihood.nll(f_ref, soft)
    close(rise, case.likelihood.kl(f_ref, f))


@given(seed=seeds, num_classes=classes, scale=scales)
def test_class_indices_equal_one_hot_labels(seed: int, num_classes: int, scale: float) -> None:
    f = outputs(seed, num_classes, scale)
    y = Categorical().sample(f, torch.Generator().manual_seed(seed))
    one_hot = F.one_hot(y, num_classes).double()
    close(Categorical().nll(f, y), Categorical().nll(f, one_hot))
    close(Categorical().residual(f, y), Categorical().residual(f, one_hot))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(NOISE_SD), Poisson()], ids=repr)
def test_one_output_takes_flat_labels(likelihood: Likelihood) -> None:
    f, y = outputs(0, 1), torch.tensor([0, 1, 1, 0])
    likelihood.validate(f, y)
    column = y.double().unsqueeze(1)
    close(likelihood.nll(f, y), likelihood.nll(f, column))
    close(likelihood.residual(f, y), likelihood.residual(f, column))


# Sampling


@each_case
def test_samples_have_the_right_mean(case: Case) -> None:
    n, f = 20_000, outputs(3, 3, batch=1)
    y = case.likelihood.sample(f.expand(n, 3), torch.Generator().manual_seed(0))
    y = F.one_hot(y, 3).double() if y.ndim == 1 else y
    distribution = case.distribution(f[0])
    standard_error = (distribution.variance / n).sqrt()
    assert ((y.mean(0) - distribution.mean).abs() < 4 * standard_error).all()
    ratio = y.var(0) / distribution.variance
    assert ((ratio - 1).abs() < 0.1).all()


@each_case
def test_samples_depend_on_the_generator_alone(case: Case) -> None:
    f, state = outputs(0, 3, batch=50), torch.get_rng_state()
    first, same, other = (
        case.likelihood.sample(f, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# Heads

MASK = torch.tensor([True, False, True, False])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [MASK, MASK.expand(5, 4)], ids=["(C,)", "(B, C)"])
def test_masked_outputs_have_probability_zero(dtype: torch.dtype, mask: Tensor) -> None:
    likelihood = Categorical()
    f = (10 * outputs(0, 4, batch=5)).to(dtype).requires_grad_()
    g = likelihood.mask(f, mask)
    reference = likelihood.mask(outputs(1, 4, batch=5).to(dtype), mask)
    p, y = likelihood.mean(g), torch.tensor([0, 2, 2, 0, 0])
    assert (p[:, ~MASK] == 0).all()
    assert (likelihood.hessian(g)[:, ~MASK] == 0).all()
    assert (likelihood.hessian_factor(g)[:, ~MASK] == 0).all()
    assert set(likelihood.sample(g.float()).tolist()) <= {0, 2}
    for loss in (
        likelihood.nll(g, y),
        likelihood.nll(g, likelihood.mean(reference)),
        likelihood.kl(reference, g),
    ):
        assert torch.isfinite(loss).all()
        (grad,) = torch.autograd.grad(loss.sum(), f, retain_graph=True)
        assert torch.isfinite(grad).all()
        assert (grad[:, ~MASK] == 0).all()
        assert (grad[:, MASK] != 0).any()


def test_mask_equals_leaving_the_outputs_out() -> None:
    likelihood, f, f_ref = Categorical(), outputs(0, 4), outputs(1, 4)
    y = torch.tensor([0, 2, 2, 0])
    inside = likelihood.nll(f[:, MASK], y // 2)
    close(likelihood.nll(likelihood.mask(f, MASK), y), inside)
    kl = likelihood.kl(likelihood.mask(f_ref, MASK), likelihood.mask(f, MASK))
    close(kl, likelihood.kl(f_ref[:, MASK], f[:, MASK]))


@each_case
def test_no_mask_leaves_the_outputs(case: Case) -> None:
    f = outputs(0, 4)
    assert case.likelihood.mask(f, None) is f


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(), Poisson()], ids=repr)
def test_heads_are_for_classes(likelihood: Likelihood) -> None:
    f = outputs(0, 4)
    with pytest.raises(ValueError, match="a head .* use Categorical"):
        likelihood.mask(f, MASK)
    with pytest.raises(ValueError, match="a head .* use Categorical"):
        likelihood.validate(f, torch.ones(4, 4), MASK)


# Bad input


@each_case
@given(seed=seeds, num_classes=classes)
def test_good_labels_pass(case: Case, seed: int, num_classes: int) -> None:
    f = outputs(seed, num_classes)
    case.likelihood.validate(f, labels(case, seed, num_classes))
    case.likelihood.validate(f, case.likelihood.sample(f))
    case.likelihood.validate(f.float(), case.likelihood.mean(outputs(seed + 1, num_classes)))


def test_labels_inside_the_head_pass() -> None:
    f = outputs(0, 4)
    Categorical().validate(f, torch.tensor([0, 2, 2, 0]), MASK)
    Categorical().validate(f, Categorical().mean(Categorical().mask(f, MASK)), MASK)
    Categorical().validate(f[:0], torch.empty(0, dtype=torch.int64))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("y", "mask", "error", "message"),
    [
        ([0, 1, 2], None, ValueError, "one label for each of the 4 examples"),
        ([0, 1, 2, 4], None, ValueError, r"labels run from 0 to 4, but the model has 4 outputs"),
        ([0, -1, 2, 3], None, ValueError, "labels run from -1 to 3"),
        ([0, 1, 2, 0], MASK, ValueError, r"labels \[1\] lie outside of the head"),
        ([0.0, 1.0, 2.0, 0.0], None, TypeError, r"must be int64, .* y\.long\(\)"),
        ([[1, 0, 0, 0]] * 4, None, ValueError, "soft labels must be floating point"),
        ([[1.0, 0.0]] * 4, None, ValueError, r"of shape \(4, 4\), got .* \(4, 2\)"),
        ([[NAN, 0.0, 0.0, 1.0]] * 4, None, ValueError, "NaN or infinite"),
        ([[2.0, -1.0, 0.0, 0.0]] * 4, None, ValueError, "probabilities"),
        ([[1.0, 1.0, 0.0, 0.0]] * 4, None, ValueError, "probabilities"),
        ([[0.5, 0.5, 0.0, 0.0]] * 4, MASK, ValueError, "outside of the head"),
    ],
)
def test_bad_class_labels(
    y: list, mask: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Categorical().validate(outputs(0, 4), torch.tensor(y), mask)


def test_logits_are_two_dimensional() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(B, C\)"):
        Categorical().validate(torch.zeros(4, 4, 2), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("likelihood", "y", "message"),
    [
        (Bernoulli(), [[0.0, 1.5]], r"lie in \[0, 1\], got 0 to 1.5"),
        (Bernoulli(), [[-0.5, 1.0]], r"lie in \[0, 1\]"),
        (Bernoulli(), [[NAN, 1.0]], "NaN or infinite"),
        (Bernoulli(), [0.0], "do not fit outputs"),
        (Gaussian(), [[INF, 1.0]], "NaN or infinite"),
        (Gaussian(), [[1.0, 1.0, 1.0]], "do not fit outputs"),
        (Poisson(), [[-1.0, 1.0]], "must not be negative, got -1"),
        (Poisson(), [[NAN, 1.0]], "NaN or infinite"),
        (Poisson(), [1.0], "do not fit outputs"),
    ],
)
def test_bad_labels(likelihood: Likelihood, y: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood.validate(torch.zeros(1, 2), torch.tensor(y))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(), Poisson()], ids=repr)
def test_labels_never_broadcast(likelihood: Likelihood) -> None:
    f, y = torch.zeros(3, 2), torch.zeros(3)
    for call in (likelihood.nll, likelihood.residual):
        with pytest.raises(ValueError, match="do not fit outputs"):
            call(f, y)


@pytest.mark.parametrize("noise_sd", [0.0, -1.0, INF, NAN])
def test_noise_is_positive_and_finite(noise_sd: float) -> None:
    with pytest.raises(ValueError, match="noise_sd must be positive and finite"):
        Gaussian(noise_sd)


# -------------------------------------------------------------------- the next tokens of a text

L, V = 3, 5


def text(seed: int) -> tuple[Tensor, Tensor]:
    """f (4, L V) and tokens (4, L), some of them not to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, V, (4, L), generator=generator)
    y[torch.rand(4, L, generator=generator) < 0.3] = -100
    return outputs(seed, L * V), y


@given(seed=seeds)
def test_next_tokens_are_a_sum_over_tokens(seed: int) -> None:
    likelihood, (f, y) = NextTokens(V), text(seed)
    each, counted = f.view(4, L, V), (y != -100).double()
    nll = torch.stack([Categorical().nll(each[:, t], y[:, t].clamp(min=0)) for t in range(L)], 1)
    close(likelihood.nll(f, y), (nll * counted).sum(1))
    close(likelihood.residual(f, y), gradient(lambda x: likelihood.nll(x, y), f))
    f_ref = outputs(seed + 1, L * V)
    pairs = zip(f_ref.view(4, L, V).unbind(1), each.unbind(1), strict=True)
    close(likelihood.kl(f_ref, f), torch.stack([Categorical().kl(a, b) for a, b in pairs]).sum(0))
    close(likelihood.mean(f).view(4, L, V), each.softmax(-1))
    traces = [Categorical().hessian_trace(each[:, t]) for t in range(L)]
    close(likelihood.hessian_trace(f), torch.stack(traces).sum(0))


def test_drawn_tokens_follow_their_probabilities() -> None:
    f = outputs(0, L * V, batch=1).expand(20_000, -1)
    y = NextTokens(V).sample(f, torch.Generator().manual_seed(0))
    found = F.one_hot(y, V).double().mean(0)
    torch.testing.assert_close(found, f[0].view(L, V).softmax(-1), atol=0.02, rtol=0)


def test_tokens_that_do_not_fit() -> None:
    likelihood, (f, y) = NextTokens(V), text(0)
    likelihood.validate(f, y)
    assert likelihood.mask(f, None) is f
    with pytest.raises(ValueError, match=r"expected tokens \(B, L\) and logits \(B, L \* 5\)"):
        likelihood.validate(f[:, 1:], y)
    with pytest.raises(ValueError, match="expected tokens"):
        likelihood.validate(f, y[:, 0])
    with pytest.raises(TypeError, match=r"y\.long\(\)"):
        likelihood.validate(f, y.int())
    with pytest.raises(ValueError, match="outside of 0 to 4"):
        likelihood.validate(f, torch.full_like(y, 5))
    with pytest.raises(ValueError, match="outside of 0 to 4"):
        likelihood.validate(f, torch.full_like(y, -1))
    with pytest.raises(ValueError, match="NextTokens has no classes"):
        likelihood.mask(f, torch.ones(L * V, dtype=torch.bool))
    for function in (likelihood.hessian, likelihood.hessian_factor):
        with pytest.raises(TypeError, match="pass estimator='mc'"):
            function(f)
    assert isinstance(likelihood, Likelihood)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        NextTokens(1)

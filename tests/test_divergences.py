"""Divergences: zero and flat at the reference, and what each temperature means."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong.divergences import KL, Divergence, Logit
from lifelong.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

LIKELIHOODS = [Categorical(), Bernoulli(), Gaussian(0.7), Poisson()]
DIVERGENCES = [KL(), KL(2.0), KL(2.0, rescale=True), Logit()]

each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
seeds = st.integers(0, 2**32 - 1)
classes = st.integers(1, 5)


def outputs(seed: int, num_classes: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, num_classes, generator=generator, dtype=torch.float64)


def gradient(function: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    f = f.detach().requires_grad_()
    return torch.autograd.grad(function(f).sum(), f)[0]


def second_derivative(function: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """(B, C, C): examples do not mix, so that each block is the derivative of its own row."""
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda g: function(g.unsqueeze(0)).sum(), row)
            for row in f
        ]  # type: ignore[arg-type]
    )


@each_divergence
@each_likelihood
@given(seed=seeds, num_classes=classes)
def test_positive_zero_and_flat(
    likelihood: Likelihood, divergence: Divergence, seed: int, num_classes: int
) -> None:
    f_ref, f = outputs(seed, num_classes), outputs(seed + 1, num_classes)
    value = divergence(likelihood, f_ref, f)
    assert isinstance(divergence, Divergence)
    assert value.shape == f.shape[:1]
    assert (value >= -1e-12).all()
    at_reference = divergence(likelihood, f_ref, f_ref)
    torch.testing.assert_close(at_reference, torch.zeros_like(at_reference), rtol=0, atol=1e-14)
    flat = gradient(lambda g: divergence(likelihood, f_ref, g), f_ref)
    torch.testing.assert_close(flat, torch.zeros_like(flat), rtol=0, atol=1e-12)


@each_likelihood
@given(seed=seeds)
def test_temperature_one_is_the_likelihoods_kl(likelihood: Likelihood, seed: int) -> None:
    f_ref, f = outputs(seed), outputs(seed + 1)
    for divergence in (KL(), KL(1.0, rescale=True)):
        assert torch.equal(divergence(likelihood, f_ref, f), likelihood.kl(f_ref, f))


@each_likelihood
@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_curvature_at_a_temperature(likelihood: Likelihood, temperature: float) -> None:
    """At f_ref the Hessian is H(f_ref / T) / T², and H(f_ref / T) where T² is put back."""
    f_ref = outputs(0)
    H = likelihood.hessian(f_ref / temperature)
    for divergence, expected in (
        (KL(temperature), H / temperature**2),
        (KL(temperature, rescale=True), H),
    ):
        found = second_derivative(
            lambda g, d=divergence: d(likelihood, f_ref[: len(g)], g), f_ref[:1]
        )
        torch.testing.assert_close(found, expected[:1], rtol=1e-10, atol=1e-12)


def test_hot_distillation_compares_centred_logits() -> None:
    """As T grows, T² KL of softmaxes tends to half the variance of f - f_ref over the classes."""
    f_ref, f = outputs(0), outputs(1)
    value = KL(1e4, rescale=True)(Categorical(), f_ref, f)
    expected = 0.5 * (f - f_ref).var(-1, unbiased=False)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0.0)


@given(seed=seeds, num_classes=classes)
def test_logit_is_the_gaussian_kl(seed: int, num_classes: int) -> None:
    f_ref, f = outputs(seed, num_classes), outputs(seed + 1, num_classes)
    gaussian = KL()(Gaussian(1.0), f_ref, f)
    torch.testing.assert_close(Logit()(Categorical(), f_ref, f), gaussian)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_is_positive_and_finite(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        KL(temperature)


@given(seed=seeds, temperature=st.floats(0.01, 10))
def test_under_a_head_it_is_that_of_the_heads_outputs_alone(seed: int, temperature: float) -> None:
    f_ref, f = outputs(seed, 5), outputs(seed + 1, 5)
    head = torch.tensor([False, True, True, False, True])

    def masked(g: Tensor) -> Tensor:
        return KL(temperature)(Categorical(), *(Categorical().mask(x, head) for x in (f_ref, g)))

    def alone(g: Tensor) -> Tensor:
        return KL(temperature)(Categorical(), f_ref[:, head], g[:, head])

    torch.testing.assert_close(masked(f), alone(f))
    torch.testing.assert_close(gradient(masked, f), gradient(alone, f))

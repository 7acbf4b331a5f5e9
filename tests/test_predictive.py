"""The label's law given the law of the outputs: closed forms, and the law of total covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lifelong import Bernoulli, Categorical, Gaussian, Poisson, StaleAnchorError, hooks
from lifelong.predictive import averaged, gaussian_draws, holding, linearised

LIKELIHOODS = (Gaussian(0.5), Poisson(), Bernoulli(), Categorical())


def outputs(b: int = 3, c: int = 3, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """f (b, c) and a covariance of rank c - 1, (b, c, c)."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(b, c, generator=generator, dtype=torch.float64)
    root = torch.randn(b, c, c - 1, generator=generator, dtype=torch.float64)
    return f, scale * root @ root.mT


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda x: type(x).__name__)
def test_without_uncertainty_it_is_the_plain_prediction(likelihood):
    f, v = outputs(scale=0.0)
    for made in (linearised(f, v, likelihood), averaged([f, f], likelihood)):
        assert torch.allclose(made.mean, likelihood.mean(f))
        assert not made.epistemic.any()
    assert torch.allclose(made.sd, made.aleatoric.diagonal(dim1=1, dim2=2).sqrt())


def test_gaussian_labels_have_both_variances():
    f, v = outputs()
    made = linearised(f, v, Gaussian(0.5))
    assert torch.equal(made.mean, f)
    assert torch.allclose(made.covariance, v + 0.25 * torch.eye(3).double())


@pytest.mark.parametrize(
    ("likelihood", "tolerance"), [(Gaussian(0.5), 0.03), (Poisson(), 0.05), (Bernoulli(), 0.02)]
)
def test_the_closed_forms_agree_with_draws(likelihood, tolerance):
    f, v = outputs(scale=0.2)
    made = linearised(f, v, likelihood)
    drawn = averaged(gaussian_draws(f, v, 20_000, torch.Generator().manual_seed(0)), likelihood)
    assert (made.mean - drawn.mean).abs().max() < tolerance
    assert (made.epistemic - drawn.epistemic).abs().max() < 3 * tolerance


@given(st.floats(-6, 6), st.floats(0.01, 30))
def test_mackay_is_close_to_the_integral(f, v):
    """E[sigmoid(a)], a ~ N(f, v), by quadrature; two classes whose logits differ by a."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    w = (-0.5 * z**2).exp()
    truth = float((torch.sigmoid(f + v**0.5 * z) * w).sum() / w.sum())
    one = torch.tensor([[f]]), torch.tensor([[[v]]])
    assert abs(float(linearised(*one, Bernoulli()).mean) - truth) < 0.02


def test_more_variance_means_less_sure_and_a_mask_holds():
    f, v = outputs()
    mask = torch.tensor([True, True, False])
    inside = mask.double()[:, None] * v * mask
    sure = linearised(f, 0 * inside, Categorical(), mask).mean
    less = linearised(f, 10 * inside, Categorical(), mask)
    assert torch.allclose(less.mean.sum(1), torch.ones(3).double())
    assert not less.mean[:, 2].any()
    assert not less.covariance[:, 2].any()
    entropy = [-(p[:, :2] * p[:, :2].log()).sum(1) for p in (sure, less.mean)]
    assert (entropy[1] > entropy[0]).all()


@given(st.integers(0, 50))
def test_total_covariance_of_classes_is_that_of_their_mean(seed):
    """A mixture of categorical labels is categorical: diag(p) - p pᵀ at the mean p."""
    f, v = outputs(seed=seed)
    made = averaged(gaussian_draws(f, v, 7, torch.Generator().manual_seed(seed)), Categorical())
    p = made.mean
    expected = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    assert torch.allclose(made.covariance, expected, atol=1e-12)


def test_draws_have_the_mean_and_the_covariance(monkeypatch):
    monkeypatch.setattr(hooks, "WORKING_SET", 1000)  # many pieces
    f, v = outputs(b=2)
    n = 4000
    draws = torch.stack(list(gaussian_draws(f, v, n, torch.Generator().manual_seed(0))))
    assert draws.shape == (n, 2, 3)
    sd = v.diagonal(dim1=1, dim2=2).sqrt()
    assert ((draws.mean(0) - f).abs() < 4.5 * sd / n**0.5).all()
    step = draws - f
    found = torch.einsum("sbc,sbd->bcd", step, step) / n
    assert ((found - v).abs() < 4.5 * 2**0.5 * sd[:, :, None] * sd[:, None] / n**0.5).all()


def test_weights_are_swapped_and_come_back():
    model = nn.Linear(2, 1)
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    where = model.weight.data_ptr()

    def fail() -> None:
        with holding(model, {n: p + 1 for n, p in own.items()}):
            assert torch.equal(model.bias, own["bias"] + 1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(model.weight, own["weight"])
    assert model.weight.data_ptr() == where
    with (
        pytest.raises(StaleAnchorError, match="missing from the model"),
        holding(model, {"w": torch.zeros(1)}),
    ):
        pass


@dataclass(frozen=True)
class NoHessian:
    def mean(self, f: Tensor) -> Tensor:
        return f

    def mask(self, f: Tensor, mask: Tensor | None) -> Tensor:
        return f


@dataclass(frozen=True)
class Own(NoHessian):
    def hessian(self, f: Tensor) -> Tensor:
        return torch.diag_embed(torch.ones_like(f))


def test_errors():
    f, v = outputs()
    own: Any = Own()
    assert averaged([f], own).mean is not None
    with pytest.raises(TypeError, match="no closed form is known for Own: pass num_samples"):
        linearised(f, v, own)
    lacking: Any = NoHessian()
    with pytest.raises(TypeError, match="NoHessian has no hessian, which the label's covariance"):
        averaged([f], lacking)
    with pytest.raises(ValueError, match="at least one draw"):
        averaged([], Gaussian())

"""Scores against their formulas, and the errors of ``identify``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lifelong import Bernoulli, Categorical, Examples, Gaussian, NonFiniteError, Posterior, identify
from lifelong.testing.reference import flatten, jacobian


def mlp(outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


DATA = Examples(torch.randn(11, 3).double(), torch.arange(11) % 4)


def test_lambda_is_the_trace_of_the_hessian_of_the_nll():
    model = mlp()
    f = model(DATA.inputs).detach()
    traces = [
        torch.autograd.functional.hessian(
            lambda g, y=y: nn.functional.cross_entropy(g, y), row
        ).trace()
        for row, y in zip(f, DATA.labels, strict=True)
    ]
    assert torch.allclose(identify(model, DATA, Categorical()), torch.stack(traces))


def test_residual_is_the_norm_of_the_slope_of_the_nll():
    model = mlp()
    f = model(DATA.inputs).detach().requires_grad_()
    nn.functional.cross_entropy(f, DATA.labels, reduction="sum").backward()
    assert f.grad is not None
    scores = identify(model, DATA, Categorical(), score="residual")
    assert torch.allclose(scores, f.grad.norm(dim=1))


@pytest.mark.parametrize("head", [None, (0, 1, 2, 3), (1, 0, 3, 2)])
def test_leverage_is_the_hessian_times_the_spread_of_the_outputs(head):
    model = mlp()
    variance = Posterior.laplace(model, DATA, Categorical(), prior_precision=0.5).variance()
    j = flatten(jacobian(model, DATA.inputs))
    sigma = torch.cat([v.flatten() for v in variance.values()])
    spread = torch.einsum("bcp,p,bcp->bc", j, sigma, j)
    p = model(DATA.inputs).softmax(-1)
    scores = identify(
        model, DATA, Categorical(), score="leverage", variance=variance, head=head, batch_size=4
    )
    assert torch.allclose(scores, (p * (1 - p) * spread).sum(-1).detach())


def test_under_a_head_the_other_outputs_do_not_count():
    model, data = mlp(), Examples(DATA.inputs, DATA.labels % 2, head=(0, 1))
    p = model(data.inputs)[:, :2].softmax(-1)
    assert torch.allclose(identify(model, data, Categorical()), (p * (1 - p)).sum(-1).detach())


@pytest.mark.parametrize("score", ["lambda", "residual", lambda f, y: f.sum(-1) + y])
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_scores_do_not_depend_on_the_batch_size(score, batch_size):
    whole = identify(mlp(), DATA, Categorical(), score=score)
    parts = identify(mlp(), DATA, Categorical(), score=score, batch_size=batch_size)
    assert torch.allclose(whole, parts, atol=1e-14)


def test_random_keys_are_uniform_and_seeded():
    data = Examples(torch.zeros(2000, 3).double(), torch.zeros(2000, dtype=torch.int64))

    def keys(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return identify(mlp(), data, Categorical(), score="random", generator=generator)

    assert torch.equal(keys(0), keys(0))
    assert not torch.equal(keys(0), keys(1))
    assert abs(float(keys(0).mean()) - 0.5) < 4 * (1 / 12 / 2000) ** 0.5


def test_other_likelihoods_have_scores_too():
    y = torch.rand(11, 2).double()
    assert torch.allclose(
        identify(mlp(2), Examples(DATA.inputs, y), Gaussian(0.5)), torch.tensor(8.0).double()
    )
    p = mlp(2)(DATA.inputs).sigmoid()
    scores = identify(mlp(2), Examples(DATA.inputs, y.round()), Bernoulli())
    assert torch.allclose(scores, (p * (1 - p)).sum(-1).detach())


def test_a_model_in_training_mode_is_read_in_eval_mode_and_handed_back():
    model = nn.Sequential(nn.Dropout(0.9), mlp()).train()
    model[1].eval()
    scores = identify(model, DATA, Categorical())
    assert torch.allclose(scores, identify(mlp(), DATA, Categorical()))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "leverage"}, "the leverage score needs .* pass variance=Posterior"),
        ({"score": "sensitivity"}, "the sensitivity score needs .* pass variance=Posterior"),
        (
            {"score": "lamda"},
            "unknown score 'lamda': expected lambda, leverage, residual, sensitivity, ",
        ),
        ({"score": lambda f, y: f}, r"one number for each of the 11 examples, got shape \(11, 4\)"),
        ({"head": (0, 1)}, r"labels \[2, 3\] lie outside of the head"),
        ({"head": (0, 9)}, "the head names classes 0 to 9, but the model has 4 outputs"),
        ({"head": ()}, "a head needs at least one class; use head=None"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        identify(mlp(), DATA, Categorical(), **arguments)


def test_outputs_that_are_no_numbers_are_named():
    inputs = DATA.inputs.clone()
    inputs[3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="the model's output is NaN or infinite; .*inputs of"):
        identify(mlp(), Examples(inputs, DATA.labels), Categorical())

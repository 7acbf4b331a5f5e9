"""Leaving out without refitting, against refitting: exact where the model is linear-Gaussian."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lifelong import (
    IVON,
    VON,
    Bernoulli,
    Categorical,
    Diagonal,
    Examples,
    Gaussian,
    NonFiniteError,
    NotRepeatableError,
    Posterior,
    Recipe,
    SensitivityTrace,
    StaleAnchorError,
    dense_curvature,
    diagonal_curvature,
    gaussian_posterior,
    group_change,
    identify,
    kprior,
    loo_nll,
    memorise,
    sensitivities,
    variance_from_optimizer,
)
from lifelong.data import Shard
from lifelong.models import forward, parameters, snapshot
from lifelong.sensitivity import (
    as_curvature,
    class_changes,
    mean_change,
    output_change,
    output_shift,
    removal,
    score,
)
from lifelong.testing.reference import flatten, jacobian, minimise

DELTA = 0.7
CATEGORICAL = Categorical()


def mlp(outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def draw(n: int = 12, outputs: int = 3, seed: int = 1) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return Examples(x, torch.randint(0, outputs, (n,), generator=generator))


def fit(model: nn.Module, data: Examples, likelihood, delta: float = DELTA) -> nn.Module:
    """A copy of the model at the minimum of sum l + delta/2 ||theta||²."""
    fitted = deepcopy(model)

    def loss() -> Tensor:
        nll = likelihood.nll(forward(fitted, data.inputs), data.labels).sum()
        return nll + 0.5 * delta * sum(p.square().sum() for p in fitted.parameters())

    minimise(fitted, loss)
    return fitted


def without(data: Examples, left_out: Tensor) -> Examples:
    keep = torch.ones(len(data), dtype=torch.bool)
    keep[left_out] = False
    return data[keep.nonzero().squeeze(1)]


def posterior_parts(model: nn.Module, data: Examples, likelihood, delta: float = DELTA):
    """f, r, H, J and Sigma by the slow reference."""
    f = forward(model, data.inputs).detach()
    j = flatten(jacobian(model, data.inputs))
    h = likelihood.hessian(f)
    g = torch.einsum("ncp,ncd,ndq->pq", j, h, j)
    sigma = torch.linalg.inv(g + delta * torch.eye(len(g), dtype=g.dtype))
    return f, likelihood.residual(f, data.labels), h, j, sigma


# ------------------------------------------------------------------ linear regression: exact


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(3, 9),
    noise=st.sampled_from([0.3, 1.0, 2.5]),
    delta=st.sampled_from([0.05, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_linear_regression_left_out_one_by_one_is_refitting(n, noise, delta, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    likelihood, model = Gaussian(noise), nn.Linear(2, 2).double()

    def solve(x: Tensor, y: Tensor) -> None:
        """Ridge regression by its normal equations, weights and bias penalised alike."""
        z = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        gram = z.T @ z / noise**2 + delta * torch.eye(3, dtype=x.dtype)
        w = torch.linalg.solve(gram, z.T @ y / noise**2)
        with torch.no_grad():
            model.weight.copy_(w[:2].T)
            model.bias.copy_(w[2])

    left_out = []
    for i in range(n):
        keep = torch.arange(n) != i
        solve(x[keep], y[keep])
        left_out.append(model(x[i]).detach())
    solve(x, y)
    truth, data = torch.stack(left_out), Examples(x, y)
    found = sensitivities(model, data, likelihood, dense_curvature(model, data, likelihood), delta)
    assert torch.allclose(found.outputs + found.output_change(exact=True), truth, atol=1e-9)
    assert torch.allclose(found.loo_nll(), likelihood.nll(truth, y), atol=1e-8)
    assert torch.allclose(
        loo_nll(model, data, likelihood, dense_curvature(model, data, likelihood), delta),
        likelihood.nll(truth, y).sum(),
    )
    # One noise level for all: V H is a multiple v of I, and the exact form is v e / (1 - v).
    v = found.covariance[:, 0, 0] / noise**2
    e = (found.outputs - y) * v.unsqueeze(1)
    assert torch.allclose(found.output_change(), e, atol=1e-12)
    assert torch.allclose(found.output_change(exact=True), e / (1 - v).unsqueeze(1), atol=1e-10)


def test_a_group_of_a_linear_regression_is_refitting():
    model, data = nn.Linear(4, 2).double(), draw(9)
    data = Examples(data.inputs, torch.randn(9, 2).double())
    likelihood = Gaussian(0.5)
    model = fit(model, data, likelihood)
    group = torch.tensor([1, 4, 5])
    refitted = fit(model, without(data, group), likelihood)
    curvature = dense_curvature(model, data, likelihood)
    for on in (None, data.inputs):
        at = data.inputs[group] if on is None else data.inputs
        truth = (refitted(at) - model(at)).detach()
        change = group_change(model, data[group], likelihood, curvature, DELTA, on=on, exact=True)
        assert torch.allclose(change, truth, atol=1e-9)


# ------------------------------------------------------------------ others: to first order


def test_logistic_regression_errs_by_the_square_of_what_is_left_out():
    """The change by (1 - w) of an example is linear in w up to w²: Sigma J r is the derivative."""
    data = draw(10)
    model = fit(nn.Linear(4, 3).double(), data, CATEGORICAL, delta=1.0)
    curvature = dense_curvature(model, data, CATEGORICAL)
    target = 3
    errors = []
    for part in (0.1, 0.05, 0.025):
        weights = torch.zeros(len(data), dtype=torch.float64)
        weights[target] = part
        refitted = deepcopy(model)

        def loss(refitted=refitted, weights=weights) -> Tensor:
            nll = CATEGORICAL.nll(refitted(data.inputs), data.labels) @ (1 - weights)
            return nll + 0.5 * sum(p.square().sum() for p in refitted.parameters())

        minimise(refitted, loss)
        step = removal(model, data, CATEGORICAL, curvature, 1.0, weights=weights)
        truth = {n: (p - parameters(model)[n]).detach() for n, p in parameters(refitted).items()}
        errors.append(max(float((step[n] - truth[n]).abs().max()) for n in step))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_the_exact_form_of_a_logistic_regression_is_nearer_to_refitting_than_the_first_order():
    data = draw(30)
    model = fit(nn.Linear(4, 3).double(), data, CATEGORICAL)
    found = sensitivities(
        model, data, CATEGORICAL, dense_curvature(model, data, CATEGORICAL), DELTA
    )
    truth = torch.stack(
        [
            fit(model, without(data, torch.tensor([i])), CATEGORICAL)(data.inputs[i]).detach()
            for i in range(8)
        ]
    )
    change = truth - found.outputs[:8]
    exact = (found.output_change(exact=True)[:8] - change).norm()
    assert exact < 0.3 * (found.output_change()[:8] - change).norm()
    assert exact < 0.1 * change.norm()
    mean = truth.softmax(-1) - found.outputs[:8].softmax(-1)
    assert (found.mean_change(exact=True)[:8] - mean).norm() < 0.1 * mean.norm()
    nll = CATEGORICAL.nll(truth, data.labels[:8])
    assert (found.loo_nll()[:8] - nll).norm() < 0.1 * (nll - found.nll()[:8]).norm()


# ------------------------------------------------------------------ formulas, on a network


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.5)])
def test_changes_are_those_of_the_dense_reference(likelihood):
    model, data = mlp(), draw()
    if not isinstance(likelihood, Categorical):
        data = Examples(data.inputs, torch.rand(12, 3).double().round())
    f, r, h, j, sigma = posterior_parts(model, data, likelihood)
    curvature = dense_curvature(model, data, likelihood)
    found = sensitivities(model, data, likelihood, curvature, DELTA, batch_size=5)
    v = j @ sigma @ j.mT
    first = (v @ r.unsqueeze(-1)).squeeze(-1)
    # The exact form is a step of Newton's with the example's curvature taken out of G.
    out = torch.linalg.inv(torch.linalg.inv(sigma) - j.mT @ h @ j)
    exact = (j @ out @ j.mT @ r.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(found.covariance, v)
    assert torch.allclose(found.output_change(), first)
    assert torch.allclose(found.output_change(exact=True), exact)
    assert torch.allclose(found.mean_change(), (h @ first.unsqueeze(-1)).squeeze(-1))
    moved = likelihood.mean(f + exact) - likelihood.mean(f)
    assert torch.allclose(found.mean_change(exact=True), moved)
    assert torch.allclose(found.nll(), likelihood.nll(f, data.labels))
    assert torch.allclose(found.loo_nll(exact=False), likelihood.nll(f + first, data.labels))
    for is_exact in (True, False):
        total = loo_nll(
            model, data, likelihood, curvature, DELTA, exact=is_exact, batch_size=5
        )  # fmt: skip
        assert torch.allclose(total, found.loo_nll(exact=is_exact).sum())


@pytest.mark.parametrize("exact", [False, True])
def test_a_group_is_one_example_with_more_outputs(exact):
    model, data = mlp(), draw()
    group = torch.tensor([0, 3, 7])
    _, r, h, j, sigma = posterior_parts(model, data, CATEGORICAL)
    together = j[group].flatten(0, 1)  # (M C, P)
    k = together @ sigma @ together.T
    change = output_change(
        k.unsqueeze(0),
        r[group].reshape(1, -1),
        torch.block_diag(*h[group]).unsqueeze(0) if exact else None,
    )
    curvature = dense_curvature(model, data, CATEGORICAL)
    found = group_change(model, data[group], CATEGORICAL, curvature, DELTA, exact=exact)
    assert torch.allclose(found, change.reshape(3, 3))
    # On other examples, and on the group as a part of them.
    everywhere = group_change(
        model, data[group], CATEGORICAL, curvature, DELTA, on=data.inputs, exact=exact
    )
    assert torch.allclose(everywhere[group], found)
    prior = torch.linalg.inv(sigma)
    if exact:
        prior = prior - torch.einsum("ncp,ncd,ndq->pq", j[group], h[group], j[group])
    step = torch.linalg.solve(prior, torch.einsum("ncp,nc->p", j[group], r[group]))
    assert torch.allclose(everywhere, j @ step)


def test_a_group_of_one_is_the_example_and_first_order_groups_add_up():
    model, data = mlp(), draw()
    curvature = diagonal_curvature(model, data, CATEGORICAL)
    found = sensitivities(model, data, CATEGORICAL, curvature, 5.0)
    for exact in (False, True):
        one = group_change(model, data[2:3], CATEGORICAL, curvature, 5.0, exact=exact)
        assert torch.allclose(one, found.output_change(exact=exact)[2:3])
    parts = [
        group_change(model, data[i : i + 4], CATEGORICAL, curvature, 5.0, on=data.inputs)
        for i in (0, 4, 8)
    ]
    whole = group_change(model, data, CATEGORICAL, curvature, 5.0, on=data.inputs)
    assert torch.allclose(torch.stack(parts).sum(0), whole)


def test_weights_of_a_removal():
    model, data = mlp(), draw()
    curvature = dense_curvature(model, data, CATEGORICAL)
    whole = removal(model, data, CATEGORICAL, curvature, DELTA)
    added = removal(
        model, data, CATEGORICAL, curvature, DELTA, weights=torch.full((12,), -2.0).double()
    )
    assert all(torch.allclose(added[n], -2 * whole[n]) for n in whole)
    _, r, _, j, sigma = posterior_parts(model, data, CATEGORICAL)
    flat = torch.cat([v.flatten() for v in whole.values()])
    assert torch.allclose(flat, sigma @ torch.einsum("ncp,nc->p", j, r))
    assert torch.allclose(output_shift(model, data.inputs, whole), j @ flat)


def test_leaving_classes_out():
    model, data = mlp(), draw()
    curvature = dense_curvature(model, data, CATEGORICAL)
    found = class_changes(model, data, CATEGORICAL, curvature, DELTA, batch_size=5)
    assert list(found) == sorted(set(data.labels.tolist()))
    for c, rise in found.items():
        own = data[(data.labels == c).nonzero().squeeze(1)]
        f = model(own.inputs).detach()
        change = group_change(model, own, CATEGORICAL, curvature, DELTA)
        truth = CATEGORICAL.nll(f + change, own.labels) - CATEGORICAL.nll(f, own.labels)
        assert torch.allclose(rise, truth.mean())


@pytest.mark.parametrize("head", [None, (0, 2, 3, 5)])
def test_classes_are_left_out_by_their_own_rows(head):
    """The data are read once, whatever the number of classes; weights of 0 for the others and the
    nll's slope, row by row in float64, give the same numbers."""
    read = []

    def counted(x: Tensor) -> Tensor:
        read.append(len(x))
        return x

    model, labels = mlp(6), torch.tensor([5, 0, 2, 2, 3, 0, 5, 3, 3, 0, 2, 2])
    data = Examples(draw().inputs, labels, head=head)
    curvature = dense_curvature(model, data, CATEGORICAL)
    counting = replace(data, transform=counted)
    found = class_changes(model, counting, CATEGORICAL, curvature, DELTA, batch_size=5)
    assert sum(read) <= len(data) + 16  # and a look at whether they can be read again
    mask = torch.ones(6).bool() if head is None else torch.isin(torch.arange(6), torch.tensor(head))
    f = model(data.inputs).detach()
    f, j = f.masked_fill(~mask, -torch.inf), flatten(jacobian(model, data.inputs))
    for c in (0, 2, 3, 5):
        weights = (labels == c).double()
        step = removal(model, data, CATEGORICAL, curvature, DELTA, weights=weights)
        shift = (j @ torch.cat([v.flatten() for v in step.values()])) * mask
        rise = CATEGORICAL.nll(f + shift, labels) - CATEGORICAL.nll(f, labels)
        torch.testing.assert_close(found[c], (weights * rise).sum() / weights.sum())


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("head", [None, (0, 2)])
def test_scores_from_their_formulas_and_identify(head):
    model = mlp()
    data = (
        draw() if head is None else Examples(draw().inputs, draw(outputs=2).labels * 2, head=head)
    )
    curvature = dense_curvature(model, data, CATEGORICAL)
    found = sensitivities(model, data, CATEGORICAL, curvature, DELTA, batch_size=7)
    v, r = found.covariance, found.residual
    if head is not None:
        assert torch.equal(v[:, 1], torch.zeros(12, 3).double())
        assert torch.equal(r[:, 1], torch.zeros(12).double())
    e = (v @ r.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(found.score("output"), e.square().sum(-1).sqrt())
    assert torch.allclose(found.score("loss"), (e * r).sum(-1))
    p = found.outputs.softmax(-1)
    change = p * (e - (p * e).sum(-1, keepdim=True))  # H e
    assert torch.allclose(found.score("mean"), change.abs().sum(-1))
    scores = identify(
        model, data, CATEGORICAL, score="sensitivity", curvature=curvature, damping=DELTA
    )
    assert torch.allclose(scores, found.score())


def test_identify_takes_a_variance_or_a_curvature():
    model, data = mlp(), draw()
    posterior = Posterior.laplace(model, data, CATEGORICAL, prior_precision=DELTA)
    for name in ("sensitivity", "leverage"):
        by_variance = identify(
            model, data, CATEGORICAL, score=name, variance=posterior.variance(), batch_size=5
        )
        by_curvature = identify(
            model, data, CATEGORICAL, score=name, curvature=posterior.curvature, damping=DELTA
        )
        assert torch.allclose(by_variance, by_curvature)


def test_a_wrong_label_is_the_most_sensitive_example():
    data = draw(60)
    labels = (data.inputs @ torch.randn(4, 3).double()).argmax(-1)
    labels[7] = (labels[7] + 1) % 3
    data = Examples(data.inputs, labels)
    model = fit(nn.Linear(4, 3).double(), data, CATEGORICAL)
    curvature = dense_curvature(model, data, CATEGORICAL)
    scores = identify(
        model, data, CATEGORICAL, score="sensitivity", curvature=curvature, damping=DELTA
    )
    assert int(scores.argmax()) == 7


def test_a_memory_by_sensitivity():
    model, data = mlp(), draw(40)
    variance = Posterior.laplace(model, data, CATEGORICAL, prior_precision=DELTA).variance()
    chosen = memorise(
        model,
        data,
        CATEGORICAL,
        budget=5,
        per_class=False,
        score="sensitivity",
        variance=variance,
        batch_size=8,
    )
    scores = identify(model, data, CATEGORICAL, score="sensitivity", variance=variance)
    assert set(chosen.origin.tolist()) == set(scores.topk(5).indices.tolist())
    assert Recipe(memory=5, score="sensitivity").score == "sensitivity"
    with pytest.raises(ValueError, match="a total memory compares old and new examples"):
        Recipe(memory=5, total=True, score="sensitivity")
    prior = kprior(CATEGORICAL, memory=5, score="sensitivity").update(model, data)
    assert prior.memory is not None
    assert len(prior.memory) == 5
    assert torch.isfinite(
        kprior(CATEGORICAL, memory=5, score="sensitivity").identify(model, data)
    ).all()


# ------------------------------------------------------------------ invariances


def test_the_order_of_the_outputs_and_copies_of_the_data_do_not_matter():
    model, data = mlp(), draw()
    order = torch.tensor([2, 0, 1])
    turned = deepcopy(model)
    with torch.no_grad():
        turned[2].weight.copy_(model[2].weight[order])
        turned[2].bias.copy_(model[2].bias[order])
    other = Examples(data.inputs, order.argsort()[data.labels])
    a = sensitivities(model, data, CATEGORICAL, dense_curvature(model, data, CATEGORICAL), DELTA)
    b = sensitivities(
        turned, other, CATEGORICAL, dense_curvature(turned, other, CATEGORICAL), DELTA
    )
    for of in ("mean", "output", "loss"):
        assert torch.allclose(a.score(of), b.score(of))
    assert torch.allclose(a.output_change(exact=True)[:, order], b.output_change(exact=True))
    # Each example twice, and twice the damping: half of the variance.
    twice = Examples(data.inputs.repeat(2, 1), data.labels.repeat(2))
    c = sensitivities(
        model, twice, CATEGORICAL, dense_curvature(model, twice, CATEGORICAL), 2 * DELTA
    )
    assert torch.allclose(c.score(), a.score().repeat(2) / 2)


def test_the_model_comes_back_as_it_was():
    model, data = nn.Sequential(nn.Dropout(0.5), mlp()).train(), draw()
    model[1].eval()
    model[1][0].weight.grad = torch.ones(5, 4).double()
    before, state = snapshot(parameters(model)), torch.get_rng_state()
    curvature = Diagonal({n: torch.ones_like(p) for n, p in before.items()})
    sensitivities(model, data, CATEGORICAL, curvature, DELTA)
    loo_nll(model, data, CATEGORICAL, curvature, 1e3)
    group_change(model, data, CATEGORICAL, curvature, 1e3, exact=True)
    group_change(model, data, CATEGORICAL, curvature, DELTA)
    class_changes(model, data, CATEGORICAL, curvature, DELTA)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.equal(model[1][0].weight.grad, torch.ones(5, 4).double())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in parameters(model).items())


# ------------------------------------------------------------------ from optimisers


def stepped(kind, model: nn.Module, data: Examples, steps: int = 3, **options):
    optimizer = kind(model.parameters(), lr=0.01, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        CATEGORICAL.nll(model(data.inputs), data.labels).mean().backward()
        optimizer.step()
    return optimizer


def test_the_variance_of_adam_by_hand():
    model, data = mlp(), draw()
    gradients, beta = [], 0.9
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.5, beta))
    for _ in range(3):
        optimizer.zero_grad()
        CATEGORICAL.nll(model(data.inputs), data.labels).mean().backward()
        gradients.append(model[0].weight.grad.clone())
        optimizer.step()
    found = variance_from_optimizer(optimizer, model, 12, damping=DELTA)
    weights = torch.tensor([beta**2, beta, 1.0]).double()
    second = torch.stack(gradients).square()
    second = torch.tensordot(weights, second, 1) / weights.sum()  # the corrected average
    assert torch.allclose(found["0.weight"], 1 / (12 * second.sqrt() + DELTA))
    assert list(found) == list(parameters(model))
    scores = identify(model, data, CATEGORICAL, score="sensitivity", variance=found)
    assert scores.shape == (12,)


def test_the_variances_of_others():
    model, data = mlp(), draw()
    rms = stepped(torch.optim.RMSprop, model, data)
    second = rms.state[model[2].bias]["square_avg"]
    found = variance_from_optimizer(rms, model, 12, damping=1.0)
    assert torch.allclose(found["2.bias"], 1 / (12 * second.sqrt() + 1))
    amsgrad = stepped(torch.optim.Adam, model, data, amsgrad=True)
    highest = amsgrad.state[model[2].bias]["max_exp_avg_sq"]
    found = variance_from_optimizer(amsgrad, model, 12, damping=1.0)
    assert torch.allclose(found["2.bias"], 1 / (12 * (highest / (1 - 0.999**3)).sqrt() + 1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    found = variance_from_optimizer(sgd, model, 12, damping=1.0)
    assert all(torch.equal(v, torch.full_like(v, 1 / 13)) for v in found.values())


def test_variational_optimisers_are_read_by_what_they_offer():
    model = mlp()
    size = sum(p.numel() for p in model.parameters())

    class FlatHessian(torch.optim.SGD):
        pass

    optimizer = FlatHessian(model.parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    group |= {"ess": 50.0, "weight_decay": 0.1, "hess": torch.arange(size).double() + 1}
    found = variance_from_optimizer(optimizer, model, 12)
    flat = torch.cat([v.flatten() for v in found.values()])
    assert torch.allclose(flat, 1 / (50 * (torch.arange(size).double() + 1.1)))


def test_the_variance_of_a_variational_optimiser_is_that_of_its_gaussian():
    model, data = mlp(), draw()
    model.spare = nn.Parameter(torch.zeros(2).double())
    ivon = IVON(model.named_parameters(), ess=12, weight_decay=0.5, hess_init=3.0)
    with ivon.sampled_params(train=True):
        CATEGORICAL.nll(model(data.inputs), data.labels).mean().backward()
    ivon.step()
    found = variance_from_optimizer(ivon, model, 12, damping=0.1)
    curvature = gaussian_posterior(ivon, model).curvature
    for name, v in curvature.inverse_diagonal(12 * 0.5 + 0.1).items():
        assert torch.allclose(found[name], v)
    # Without a gradient hess_init says nothing: the prior's precision is left.
    assert torch.allclose(found["spare"], torch.full((2,), 1 / 6.1).double())
    small = mlp()
    von = VON(small, CATEGORICAL, ess=12)
    von.observe(data.inputs, data.labels)
    von.step()
    full = torch.linalg.inv(von.precision + 0.1 * torch.eye(len(von.precision)).double())
    found = variance_from_optimizer(von, small, 12, damping=0.1)
    assert torch.allclose(torch.cat([v.flatten() for v in found.values()]), full.diagonal())


def test_a_loader_that_shuffles_is_refused():
    model, data = mlp(), draw()
    curvature = diagonal_curvature(model, data, CATEGORICAL)
    loader = DataLoader(TensorDataset(data.inputs, data.labels), 4, shuffle=True)
    for use in (
        lambda: class_changes(model, loader, CATEGORICAL, curvature, 1.0),
        lambda: sensitivities(model, loader, CATEGORICAL, curvature, 1.0),
        lambda: identify(model, loader, CATEGORICAL, score="lambda"),
        lambda: removal(model, loader, CATEGORICAL, curvature, 1.0, weights=torch.ones(12)),
        lambda: SensitivityTrace(model, loader, CATEGORICAL),
    ):
        with pytest.raises(NotRepeatableError, match="the loader shuffles"):
            use()


def test_a_parameter_without_gradient_has_the_prior_s_variance():
    model = mlp()
    model.spare = nn.Parameter(torch.zeros(2).double())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model[0](draw().inputs).sum().backward()
    optimizer.step()
    found = variance_from_optimizer(optimizer, model, 12, damping=0.5)
    assert torch.equal(found["spare"], torch.full((2,), 2.0).double())
    with pytest.raises(ValueError, match="infinite variance: .* pass damping"):
        variance_from_optimizer(optimizer, model, 12)


# ------------------------------------------------------------------ during training


def test_a_trace_keeps_the_scores_of_each_moment():
    model, data = mlp(), draw()
    optimizer = stepped(torch.optim.Adam, model, data)
    trace = SensitivityTrace(
        model, data, CATEGORICAL, optimizer=optimizer, damping=DELTA, batch_size=5
    )
    first = trace.record()
    variance = variance_from_optimizer(optimizer, model, 12, damping=DELTA)
    assert torch.allclose(
        first, identify(model, data, CATEGORICAL, score="sensitivity", variance=variance)
    )
    curvature = diagonal_curvature(model, data, CATEGORICAL)
    by_curvature = trace.record(10, curvature=curvature)
    found = sensitivities(model, data, CATEGORICAL, curvature, DELTA)
    assert torch.allclose(by_curvature, found.score())
    by_variance = trace.record(20, variance=variance)
    assert trace.steps == [0, 10, 20]
    assert torch.equal(trace.values, torch.stack([first, by_curvature, by_variance]))


# ------------------------------------------------------------------ errors


def test_a_covariance_that_does_not_hold_the_example_is_told():
    model, data = mlp(), draw()
    wide = Diagonal({n: torch.full_like(p, 1e-3) for n, p in parameters(model).items()})
    with pytest.raises(ValueError, match=r"of 12 examples have a leverage .* of 1 or more"):
        loo_nll(model, data, CATEGORICAL, wide, 0.0)
    assert torch.isfinite(loo_nll(model, data, CATEGORICAL, wide, 0.0, exact=False))
    with pytest.raises(ValueError, match="of 1 examples have a leverage"):
        group_change(model, data, CATEGORICAL, wide, 0.0, exact=True)


def test_singular_exactly_where_the_leverage_is_one():
    one = torch.ones(1, 1, 1).double()
    with pytest.raises(ValueError, match="up to 1: expected below 1"):
        output_change(one, torch.ones(1, 1).double(), one)
    assert float(output_change(0.5 * one, torch.ones(1, 1).double(), one)) == pytest.approx(1.0)


def test_errors():
    model, data = mlp(), draw()
    curvature = diagonal_curvature(model, data, CATEGORICAL)
    f, r = torch.zeros(1, 2), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"of must be one of .* got 'mode'"):
        score(CATEGORICAL, f, r, torch.zeros(1, 2, 2), "mode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not positive definite"):
        sensitivities(model, data, CATEGORICAL, curvature * 0.0, 0.0)
    with pytest.raises(ValueError, match="not positive definite"):
        removal(model, data, CATEGORICAL, curvature * 0.0, 0.0)
    with pytest.raises(StaleAnchorError):
        sensitivities(mlp(outputs=4), data, CATEGORICAL, curvature, DELTA)
    with pytest.raises(StaleAnchorError):
        output_shift(mlp(outputs=4), data.inputs, snapshot(parameters(model)))
    with pytest.raises(TypeError, match="class labels must be int64"):
        sensitivities(model, (data.inputs, data.labels.int()), CATEGORICAL, curvature, DELTA)
    bad = Examples(data.inputs * torch.inf, data.labels)
    with pytest.raises(NonFiniteError):
        sensitivities(model, bad, CATEGORICAL, curvature, DELTA)
    soft = Examples(data.inputs, torch.full((12, 3), 1 / 3).double())
    with pytest.raises(ValueError, match=r"needs \(N,\) integer labels"):
        class_changes(model, soft, CATEGORICAL, curvature, DELTA)
    part = Shard(data, SimpleNamespace(size=2, rank=0), 0, 24)
    with pytest.raises(ValueError, match="expected the whole data, got a Shard"):
        class_changes(model, part, CATEGORICAL, curvature, DELTA)
    with pytest.raises(ValueError, match="variances must be positive and finite"):
        as_curvature({"w": torch.tensor([1.0, 0.0])})


def test_errors_of_optimisers_and_traces():
    model, data = mlp(), draw()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="Adam has no state yet"):
        variance_from_optimizer(adam, model, 12)
    with pytest.raises(ValueError, match="num_data must be at least 1, got 0"):
        variance_from_optimizer(adam, model, 0)
    with pytest.raises(ValueError, match="holds no trainable parameter of this model"):
        variance_from_optimizer(torch.optim.SGD(mlp().parameters(), lr=0.1), model, 12)
    with pytest.raises(TypeError, match="cannot read a variance off Adagrad"):
        variance_from_optimizer(stepped(torch.optim.Adagrad, model, data), model, 12)
    trace = SensitivityTrace(model, data, CATEGORICAL)
    with pytest.raises(ValueError, match="needs the variance of the weights; pass variance="):
        trace.record()
    with pytest.raises(ValueError, match="nothing was recorded yet"):
        _ = trace.values


def test_mean_changes_at_first_order_and_exactly():
    f = torch.tensor([[0.2, -0.4, 1.0]]).double()
    change = torch.tensor([[0.3, 0.1, -0.2]]).double()
    small = 1e-5 * change
    exact = mean_change(CATEGORICAL, f, small, exact=True)
    assert torch.allclose(mean_change(CATEGORICAL, f, small), exact, rtol=1e-4)
    assert not torch.allclose(
        mean_change(CATEGORICAL, f, change), mean_change(CATEGORICAL, f, change, exact=True)
    )


def test_copies_are_minimised_as_one_alone_is():
    """The benchmark's retraining: weight 0 is leaving out, and all end at a gradient of 0."""
    stacked = pytest.importorskip("benchmarks.stacked", reason="needs the repository")
    data, model = draw(), nn.Linear(4, 3).double()
    weights = torch.ones(2, 12).double()
    weights[0, 5] = 0

    def nll(f: Tensor) -> Tensor:
        return torch.stack([CATEGORICAL.nll(each, data.labels) for each in f])

    found, slopes = stacked.minimise(
        model,
        stacked.stack(model, 2),
        nll,
        data.inputs,
        weights,
        torch.full((2,), DELTA).double(),
        max_iter=200,
    )
    assert float(slopes.max()) < 1e-7
    for k, kept in enumerate((without(data, torch.tensor([5])), data)):
        truth = fit(model, kept, CATEGORICAL)
        assert torch.allclose(found["weight"][k], truth.weight.detach(), atol=1e-6)


def test_the_benchmark_runs_in_small(tmp_path):
    bench = pytest.importorskip("benchmarks.sensitivity", reason="needs the repository")
    config, log = replace(bench.SMOKE, networks=("linear",)), bench.Log()
    result = bench.run(config, None, log)
    bench.write(tmp_path, config, result, log)
    case = result["correlation"]["digits, linear"]
    assert case["largest_gradient_norm_retrained"] < 1e-6
    assert case["estimates"]["dense, exact"]["pearson_output"] > 0.99
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "versions.json",
        "result.json",
        "log.txt",
    }

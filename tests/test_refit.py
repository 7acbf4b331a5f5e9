"""Refit: the minimum of data and prior from the anchor, against the slow exact minimiser."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lifelong
from lifelong import refit as module
from lifelong.curvature import estimate
from lifelong.data import Examples
from lifelong.divergences import KL, Logit
from lifelong.errors import (
    NonFiniteError,
    NotConvergedError,
    NotRepeatableError,
    StaleAnchorError,
)
from lifelong.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from lifelong.models import parameters
from lifelong.presets import fromp
from lifelong.prior import Prior
from lifelong.recipe import Recipe
from lifelong.refit import Refit, is_convex, refit
from lifelong.terms import MemoryTerm, Regulariser, WeightTerm
from lifelong.testing import laws
from lifelong.testing.cases import SPLITS, glms, linear_gaussian, mlp, networks

CONVEX = {case.name: case for case in (linear_gaussian(), *glms())}
NETWORKS = {case.name: case for case in networks()}


def learned(case, split=SPLITS[3]):
    """A model at the minimum of the first task, and the prior that remembers it."""
    prior = laws.law_prior(case.likelihood)
    model = laws.minimum(
        case.make_model(0), lambda m: laws.nats(case.likelihood, m, case.data[0]) + prior(m)
    )
    return model, prior.recall(model, case.data[0], split.remember(case, model, 0))


def truth(case, model, prior):
    return laws.minimum(model, lambda m: laws.nats(case.likelihood, m, case.data[1]) + prior(m))


# -------------------------------------------------------------------- the minimum


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: s.name)
@pytest.mark.parametrize("name", CONVEX)
def test_newton_is_the_exact_minimum(name, split):
    case = CONVEX[name]
    model, prior = learned(case, split)
    exact = truth(case, model, prior)
    done = refit(model, prior, case.data[1])
    assert done.method == "newton"
    assert done.converged
    assert laws.distance(laws.weights(model), laws.weights(exact)) < 1e-8


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
@pytest.mark.parametrize("name", CONVEX)
def test_without_a_matrix(name, method, monkeypatch):
    monkeypatch.setattr(module, "_DENSE", 0)
    case = CONVEX[name]
    model, prior = learned(case)
    exact = truth(case, model, prior)
    done = refit(model, prior, case.data[1], method=method)
    assert done.converged
    assert laws.distance(laws.weights(model), laws.weights(exact)) < 1e-8


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
@pytest.mark.parametrize("name", [n for n in NETWORKS if not n.startswith("linear")])
def test_networks_come_to_a_stationary_point(name, method):
    case = NETWORKS[name]
    model = case.make_model(0)
    prior = laws.law_prior(case.likelihood, structure="diagonal")
    start = float((laws.nats(case.likelihood, model, case.data[0]) + prior(model)).detach())
    done = refit(model, prior, case.data[0], method=method)
    value = laws.nats(case.likelihood, model, case.data[0]) + prior(model)
    assert done.converged
    assert done.value == pytest.approx(float(value.detach()), rel=1e-12)
    assert done.value < start
    assert laws.slope(model, value).norm() == pytest.approx(done.gradient_norm, abs=1e-12)
    assert done.gradient_norm < 1e-6


def test_adam_comes_near():
    case = CONVEX["logistic"]
    model, prior = learned(case)
    exact = truth(case, model, prior)
    best = float((laws.nats(case.likelihood, exact, case.data[1]) + prior(exact)).detach())
    start = float((laws.nats(case.likelihood, model, case.data[1]) + prior(model)).detach())
    done = refit(model, prior, case.data[1], method="adam", lr=0.03, max_iterations=300)
    assert not done.converged
    assert done.value - best < 0.02 * (start - best)


@pytest.mark.parametrize("method", ["newton", "lbfgs", "adam"])
def test_the_past_alone(method):
    case = CONVEX["multinomial"]
    model, prior = learned(case)
    prior = prior.replace(regulariser=Regulariser(3.0))
    exact = laws.minimum(model, prior)
    before = float(prior(model).detach())
    done = refit(model, prior, method=method)
    assert done.value <= before
    if method != "adam":
        assert laws.distance(laws.weights(model), laws.weights(exact)) < 1e-8


def test_weights_alone_cost_no_example():
    model = mlp(3, 2)(0)
    done = refit(model, Prior(Gaussian(), Recipe(), (Regulariser(2.0),)))
    assert done == replace(done, method="newton", gradients=0, passes=0.0)
    assert done.iterations <= 2  # one, and one for what rounding left
    assert float(laws.weights(model).abs().max()) < 1e-12


def test_at_the_minimum_there_is_nothing_to_do():
    model, prior = learned(CONVEX["poisson"])
    before = laws.weights(model)
    done = refit(model, prior)
    assert done.converged
    assert done.iterations == 0
    assert torch.equal(laws.weights(model), before)


def test_without_a_regulariser_a_softmax_is_singular_and_newton_still_ends():
    case = CONVEX["multinomial"]
    x = case.data[0].inputs
    labels = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(3))
    model = case.make_model(0)
    done = refit(model, Prior(Categorical()), Examples(torch.cat([x, x]), labels.repeat(2)))
    assert done.converged
    assert float(laws.weights(model).norm()) < 100


@given(seed=st.integers(0, 10**6), precision=st.floats(1e-3, 10.0), scale=st.floats(0.1, 30.0))
def test_from_anywhere(seed, precision, scale):
    """Also from weights so far away that full Newton steps overshoot, or rates overflow."""
    case = CONVEX["multinomial"]
    prior = Prior(case.likelihood, terms=(Regulariser(precision),))
    near, far = case.make_model(0), laws.moved(case.make_model(0), by=scale, seed=seed)
    for model in (near, far):
        assert refit(model, prior, case.data[0]).converged
    assert laws.distance(laws.weights(far), laws.weights(near)) < 1e-6


def test_float32():
    case = CONVEX["logistic"]
    model, prior = learned(case)
    exact = truth(case, model, prior)
    single = Examples(case.data[1].inputs.float(), case.data[1].labels.float())
    model32 = deepcopy(model).float()
    done = refit(model32, prior.to(dtype=torch.float32), single)
    assert done.converged
    assert laws.distance(laws.weights(model32).double(), laws.weights(exact)) < 1e-3


def test_heads_and_loaders():
    case = CONVEX["multinomial heads"]
    model, prior = learned(case)
    exact = truth(case, model, prior)
    data = case.data[1]
    pairs = TensorDataset(data.inputs, data.labels)
    assert data.head == (2, 3)
    for given_ in (DataLoader(pairs, batch_size=5), pairs, (data.inputs, data.labels)):
        other = deepcopy(model)
        refit(other, prior, given_, head=data.head, batch_size=7)
        assert laws.distance(laws.weights(other), laws.weights(exact)) < 1e-8
    loader = DataLoader(pairs, batch_size=5)
    assert refit(model, prior, loader, head=data.head, method="adam", max_iterations=3).value


@pytest.mark.parametrize("divergence", [KL(2.0), KL(2.0, rescale=True), Logit()], ids=str)
def test_other_divergences(divergence):
    case = CONVEX["multinomial"]
    model, prior = learned(case, SPLITS[1])
    terms = [
        replace(t, divergence=divergence) if isinstance(t, MemoryTerm) else t for t in prior.terms
    ]
    prior = replace(prior, terms=tuple(terms))
    exact = truth(case, model, prior)
    assert refit(model, prior, case.data[1]).method == "newton"
    assert laws.distance(laws.weights(model), laws.weights(exact)) < 1e-8


# -------------------------------------------------------------------- convexity


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w * self.w).T


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w @ self.w.T


class Divided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w.T) / self.w.sum()


class Affine(nn.Module):
    """Reshaped, sliced, scaled and summed, yet affine in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        left, right = (torch.tanh(x) @ self.w.T).split(2, dim=1)
        return torch.stack([left / 3, right], dim=0).sum(0) + self.b - x[:, :2].square()


class Hidden(nn.Module):
    """Not affine, by masks and indices that depend on the weights: the graph does not show it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.kind == "mask":
            return h * (h > 0)
        if self.kind == "filled":
            return h.masked_fill(h < 0, 0.0)
        if self.kind == "detached":
            return h * h.detach()
        return h.gather(0, h.argsort(0))


@pytest.mark.parametrize("kind", ["mask", "filled", "detached", "sorted"])
def test_what_the_graph_does_not_show_is_seen_in_the_values(kind):
    model = Hidden(kind)
    before = laws.weights(model)
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert not is_convex(model, Prior(Gaussian()), (x, torch.zeros(8, 2)))
    assert torch.equal(laws.weights(model), before)


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
@pytest.mark.parametrize("start", [4.0, 8.0, 40.0])
def test_converged_is_beside_the_gradient_where_it_ends(method, start):
    """A start where rates are huge must not make every later gradient look small."""
    case = CONVEX["poisson"]
    prior = Prior(case.likelihood, terms=(Regulariser(1.0),))
    model, exact = case.make_model(0), case.make_model(0)
    refit(exact, prior, case.data[0])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(start)
    try:
        done = refit(model, prior, case.data[0], method=method, max_iterations=400)
    except NonFiniteError:
        return
    if done.converged:
        assert laws.distance(laws.weights(model), laws.weights(exact)) < 1e-6


def test_a_hessian_that_is_not_finite_ends():
    with pytest.raises(NonFiniteError, match="Hessian"):
        module._cholesky(torch.tensor([[1.0, math.inf], [math.inf, 1.0]]))


def frozen_body() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    for p in model[0].parameters():
        p.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "affine"),
    [
        (nn.Linear(4, 2).double(), True),
        (nn.Sequential(nn.Conv1d(1, 2, 4), nn.Flatten()).double(), True),
        (frozen_body(), True),
        (Affine(), True),
        (nn.Sequential(nn.Linear(4, 2), nn.ReLU()).double(), False),
        (nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)).double(), False),
        (Squared(), False),
        (Tied(), False),
        (Divided(), False),
    ],
    ids=lambda v: type(v).__name__,
)
def test_convexity_is_read_off_the_graph(model, affine):
    x = torch.randn(6, 4, dtype=torch.float64)
    if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Conv1d):
        x = x.unsqueeze(1)
    prior = Prior(Gaussian(), terms=(Regulariser(1.0),))
    assert is_convex(model, prior, (x, torch.zeros(6, 2))) is affine
    # What is called affine has no second difference, wherever it is measured.
    if affine:
        near, far, middle = deepcopy(model), laws.moved(model, by=3.0), deepcopy(model)
        ends = zip(parameters(middle).values(), parameters(near).values(), parameters(far).values())
        with torch.no_grad():
            for m, a, b in ends:
                m.copy_((a + b) / 2)
        torch.testing.assert_close(2 * middle(x), near(x) + far(x))


def test_convexity_of_the_terms():
    case = CONVEX["multinomial"]
    model, prior = learned(case)
    assert is_convex(model, prior)
    memory = prior.memory
    assert memory is not None
    negative = replace(prior, terms=(MemoryTerm(memory.weighted(-1.0, 0.0)),))
    kernels = fromp(Categorical(), memory=6).update(model, case.data[0])
    own = replace(prior, likelihood=Own())
    strange = replace(prior, terms=(MemoryTerm(memory.weighted(1.0, 0.0), Strange()),))
    weight = prior.weight
    assert weight is not None
    for prior_ in (negative, kernels, own, strange):
        assert not is_convex(model, prior_, case.data[1])


@pytest.mark.parametrize("structure", ["diagonal", "isotropic", "dense", "block", "low_rank",
                                       "kronecker", "eigen_kronecker"])  # fmt: skip
def test_a_negative_curvature_is_not_convex(structure: Any) -> None:
    case = CONVEX["multinomial"]
    model, data = case.make_model(0), case.data[0]
    G = estimate(model, data, case.likelihood, structure=structure)
    anchor = {n: p.detach() for n, p in parameters(model).items()}
    assert is_convex(model, Prior(case.likelihood, terms=(WeightTerm(anchor, None, G),)))
    sunk = Prior(case.likelihood, terms=(WeightTerm(anchor, None, G * -1.0),))
    assert not is_convex(model, sunk)


class Own(Categorical):
    """A subclass may do anything."""


class Strange:
    def __call__(self, likelihood, f_ref, f):
        return (f - f_ref).abs().sqrt().sum(-1)


def test_auto_takes_what_fits(monkeypatch):
    case = NETWORKS["mlp Categorical"]
    model, prior = case.make_model(0), laws.law_prior(Categorical())
    assert refit(model, prior, case.data[0], max_iterations=2).method == "lbfgs"
    monkeypatch.setattr(module, "_FULL_BATCH", 5)
    assert refit(model, prior, case.data[0], max_iterations=2).method == "adam"


# -------------------------------------------------------------------- cost


class Counting(nn.Module):
    """Counts the examples whose outputs were differentiated."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.count = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        f = self.inner(x)
        if f.requires_grad:
            f.register_hook(lambda g: self.add(len(g)))
        return f

    def add(self, n: int) -> None:
        self.count += n


@pytest.mark.parametrize("name", ["linear Poisson", "mlp Categorical"])
def test_gradients_are_counted_one_by_one(name):
    case = NETWORKS[name]
    inner, prior = case.make_model(0), laws.law_prior(case.likelihood, structure="diagonal")
    prior = prior.recall(inner, case.data[0], SPLITS[1].remember(case, inner, 0))
    prior = replace(prior, terms=tuple(t for t in prior.terms if isinstance(t, MemoryTerm)))
    model = Counting(inner)
    done = refit(model, prior, case.data[1], method="lbfgs", max_iterations=15)
    assert done.gradients == model.count
    assert done.passes == done.gradients / (len(case.data[0]) + len(case.data[1]))


def test_the_count_of_newton(monkeypatch):
    """One gradient a point and C columns a matrix; without it, one for each Hessian product."""
    case = CONVEX["linear-gaussian"]
    prior = laws.law_prior(case.likelihood)
    done = refit(case.make_model(0), prior, case.data[0])
    n = len(case.data[0])
    assert (done.iterations, done.gradients) == (1, 2 * n + 2 * n)
    products = []
    inside = module._Objective.hessian_product

    def product(self, v):
        products.append(n)
        return inside(self, v)

    monkeypatch.setattr(module, "_DENSE", 0)
    monkeypatch.setattr(module._Objective, "hessian_product", product)
    done = refit(case.make_model(0), prior, case.data[0])
    assert done.gradients == (done.iterations + 1) * n + sum(products)


def test_is_public_and_frozen():
    assert lifelong.Refit is Refit
    done = refit(nn.Linear(2, 1), Prior(Gaussian(), terms=(Regulariser(1.0),)))
    assert isinstance(done, Refit)
    with pytest.raises(AttributeError):
        done.value = 0.0  # type: ignore[misc]


# -------------------------------------------------------------------- nothing is left changed


@pytest.mark.parametrize("method", ["newton", "lbfgs", "adam"])
def test_only_the_weights_change(method):
    case = NETWORKS["mlp Categorical"]
    body = case.make_model(0)
    model = nn.Sequential(body, nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    model[2].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    random = torch.get_rng_state()
    prior = laws.law_prior(Categorical(), structure="diagonal")
    refit(model, prior, case.data[0], method=method, max_iterations=3)
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("method", ["newton", "lbfgs", "adam"])
def test_what_raises_changes_no_weight(method):
    case = CONVEX["multinomial"]
    model, prior = learned(case)
    before = laws.weights(model)
    x, y = case.data[1].inputs, case.data[1].labels
    broken = x.clone()
    broken[3, 1] = math.nan
    for data, error in (
        ((broken, y), NonFiniteError),
        ((x, y + 7), ValueError),
        ((x, y.int()), TypeError),
        (DataLoader(TensorDataset(x, y), shuffle=True), NotRepeatableError),
    ):
        with pytest.raises(error):
            refit(model, prior, data, method=method)
        assert torch.equal(laws.weights(model), before)
    wider = nn.Linear(4, 5).double()
    with pytest.raises(StaleAnchorError):
        refit(wider, prior, case.data[1], method=method)


def test_objectives_that_are_not_finite():
    case = CONVEX["poisson"]
    model = case.make_model(0)
    with torch.no_grad():
        model.weight.fill_(1e4)
    before = laws.weights(model)
    with pytest.raises(NonFiniteError, match="where the refit begins"):
        refit(model, laws.law_prior(Poisson()), case.data[0])
    assert torch.equal(laws.weights(model), before)


def test_adam_that_goes_up_or_away():
    case = CONVEX["linear-gaussian"]
    model, prior = learned(case)
    before = laws.weights(model)
    with pytest.raises(NotConvergedError, match="lower lr"):
        refit(model, prior, case.data[1], method="adam", lr=1e3, max_iterations=5)
    assert torch.equal(laws.weights(model), before)
    with pytest.raises(NonFiniteError, match="lower lr"):
        refit(model, prior, case.data[1], method="adam", lr=1e200, max_iterations=5)
    assert torch.equal(laws.weights(model), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "sgd"}, "method must be"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"minibatch": 0}, "minibatch"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"lr": math.nan}, "lr"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        refit(nn.Linear(2, 1), Prior(Gaussian(), terms=(Regulariser(1.0),)), **options)


def test_frozen_models():
    model = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        refit(model, Prior(Bernoulli(), terms=(Regulariser(1.0),)))


def test_few_steps_are_usable_and_say_so():
    case = CONVEX["logistic"]
    model = case.make_model(0)
    prior = laws.law_prior(case.likelihood)
    start = float((laws.nats(case.likelihood, model, case.data[0]) + prior(model)).detach())
    done = refit(model, prior, case.data[0], max_iterations=1)
    assert not done.converged
    assert done.iterations == 1
    assert done.value < start

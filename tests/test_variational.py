"""Variational optimisers: closed forms, slow references, and what a loop can do to them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

import lifelong
from benchmarks import variational as benchmark
from lifelong import Bernoulli, Categorical, Dense, Diagonal, Gaussian, Poisson, Posterior
from lifelong.errors import NonFiniteError, NotRepeatableError, StaleAnchorError
from lifelong.testing import reference
from lifelong.variational import IVON, VOGN, VON, Vadam, gaussian_posterior

F64 = torch.float64
NOISE = Gaussian(0.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(features: int = 3, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(features, outputs, dtype=F64)


def network(outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).to(F64)


def regression(n: int = 20, seed: int = 0, features: int = 3) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    x = torch.randn(n, features, generator=g, dtype=F64)
    return x, x.sum(1, keepdim=True) + torch.randn(n, 1, generator=g, dtype=F64)


def bayes(x: Tensor, y: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """Mean (P,) and precision (P, P) of the weights and the bias of a linear model."""
    z = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    S = z.T @ z / NOISE.noise_sd**2 + precision * torch.eye(z.shape[1], dtype=F64)
    return torch.linalg.solve(S, z.T @ y / NOISE.noise_sd**2).squeeze(1), S


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def close(a: Any, b: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


def ivon(model: nn.Module, **options: Any) -> IVON:
    chosen: dict[str, Any] = {"ess": 20.0, "hess_init": 0.5, "weight_decay": 0.01, "beta2": 0.9}
    return IVON(model.named_parameters(), **{**chosen, **options})


def train(model: nn.Module, optimizer: Any, data: Any, steps: int, loss: Any = None) -> None:
    x, y = data
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            (loss or F.mse_loss)(model(x), y).backward()
        optimizer.step()


# ------------------------------------------------------------------ VON


@pytest.mark.parametrize("hessian", ["ggn", "exact"])
@pytest.mark.parametrize("mc_samples", [0, 1, 3])
def test_von_is_bayes_rule_in_one_step(hessian: Any, mc_samples: int) -> None:
    model, (x, y) = linear(), regression()
    optimizer = VON(
        model, NOISE, ess=len(x), prior_precision=0.7, hessian=hessian, mc_samples=mc_samples
    )
    optimizer.observe(x, y)
    optimizer.step()
    mean, precision = bayes(x, y, 0.7)
    close(flat(model), mean)
    close(optimizer.precision, precision)


def test_von_in_a_chain_is_bayes_on_all_data() -> None:
    (x, y), (u, v) = regression(12), regression(25, seed=1)
    model = linear()
    optimizer = VON(model, NOISE, ess=len(x), prior_precision=0.3)
    optimizer.observe(x[:5], y[:5])  # in two parts of different size
    optimizer.observe(x[5:], y[5:])
    optimizer.step()
    today = gaussian_posterior(optimizer, model)
    with torch.no_grad():  # another start changes nothing
        for p in model.parameters():
            p.add_(1.0)
    optimizer = VON(model, NOISE, ess=len(u), prior=today)
    optimizer.observe(u, v)
    optimizer.step()
    mean, precision = bayes(torch.cat([x, u]), torch.cat([y, v]), 0.3)
    close(flat(model), mean)
    posterior = gaussian_posterior(optimizer, model)
    assert isinstance(posterior.curvature, Dense)
    base = posterior.prior_precision * torch.eye(4, dtype=F64)
    close(posterior.curvature.matrix + base, precision)
    assert posterior.prior_precision == 0.3


def test_the_posterior_of_von_is_a_prior_for_any_loop() -> None:
    (x, y), (u, v) = regression(12), regression(25, seed=1)
    model = linear()
    optimizer = VON(model, NOISE, ess=len(x), prior_precision=0.3)
    optimizer.observe(x, y)
    optimizer.step()
    prior = gaussian_posterior(optimizer, model).as_prior(NOISE)
    reference.minimise(model, lambda: NOISE.nll(model(u), v).sum() + prior(model))
    close(flat(model), bayes(torch.cat([x, u]), torch.cat([y, v]), 0.3)[0], rtol=1e-6)


def test_von_goes_part_of_the_way() -> None:
    model, (x, y) = linear(), regression()
    m = flat(model)
    optimizer = VON(model, NOISE, 0.25, ess=len(x), precision_lr=0.5, mc_samples=0)
    optimizer.observe(x, y)
    optimizer.step()
    mean, S = bayes(x, y, 1.0)
    half = 0.5 * torch.eye(4, dtype=F64) + 0.5 * S
    close(optimizer.precision, half)
    close(flat(model), m - 0.25 * torch.linalg.solve(half, S @ (m - mean)))


def test_the_exact_hessian_of_von() -> None:
    model, (x, _) = network(), regression()
    y = torch.arange(20) % 2
    optimizer = VON(model, Categorical(), ess=20, hessian="exact", mc_samples=0, lr=1e-3)
    optimizer.observe(x, y)
    found = optimizer.state[next(model.parameters())]["hess_sum"]
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes])
        params = {n: t.reshape(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, params, x), y, reduction="sum")

    expected = torch.autograd.functional.hessian(loss, flat(model))
    close(found, expected)
    assert torch.linalg.eigvalsh(expected)[0] < 0  # not the GGN


def test_an_indefinite_hessian_changes_nothing() -> None:
    model, (x, _) = network(), regression()
    optimizer = VON(
        model, Categorical(), ess=1e6, hessian="exact", mc_samples=0, prior_precision=1e-3
    )
    optimizer.observe(x, torch.arange(20) % 2)
    before, S = flat(model), optimizer.precision.clone()
    with pytest.raises(ValueError, match="not positive definite"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert torch.equal(optimizer.precision, S)


def test_draws_of_von_have_the_covariance() -> None:
    model, (x, y) = linear(2), regression(features=2)
    optimizer = VON(model, NOISE, ess=20)
    optimizer.observe(x, y)
    optimizer.step()
    draws = []
    for _ in range(4000):
        with optimizer.sampled_params():
            draws.append(flat(model))
    covariance = torch.linalg.inv(optimizer.precision)
    root = torch.linalg.cholesky(optimizer.precision)
    white = (torch.stack(draws) - flat(model)) @ root  # N(0, I)
    assert float((white.T.cov() - torch.eye(3)).abs().max()) * math.sqrt(4000 / 2) < 4.5
    assert covariance.shape == (3, 3)


def test_von_takes_a_prior_of_any_structure() -> None:
    model, (x, y) = linear(), regression()
    posterior = Posterior.laplace(model, (x, y), NOISE, prior_precision=1.0, structure="diagonal")
    S = VON(model, NOISE, ess=20, prior=posterior).precision
    G = posterior.curvature.diagonal()
    close(S, torch.cat([G["weight"].flatten(), G["bias"]]).diag() + torch.eye(4, dtype=F64))

    class Other:
        def diagonal(self) -> Any:
            return G

        def mv(self, v: Any) -> Any:
            return {n: G[n] * v[n] for n in G}

    other: Any = Other()
    again = VON(model, NOISE, ess=20, prior=Posterior(posterior.mean, other, 1.0)).precision
    close(again, S)


# ------------------------------------------------------------------ one step, by hand


def test_ivon_by_hand() -> None:
    """Three steps of two weighted passes each, against the formulas in plain tensors."""
    model, (x, y) = linear(outputs=1), regression()
    ess, h0, wd, b1, b2, lr = 20.0, 0.5, 0.01, 0.8, 0.95, 0.2
    optimizer = ivon(
        model, lr=lr, hess_init=h0, weight_decay=wd, beta1=b1, beta2=b2, generator=seeded(3)
    )
    m = {n: p.detach().clone() for n, p in model.named_parameters()}
    h = {n: torch.full_like(p, h0) for n, p in m.items()}
    g = {n: torch.zeros_like(p) for n, p in m.items()}
    noise = seeded(3)
    for t in range(1, 4):
        grads: list[dict[str, Tensor]] = []
        stats: list[dict[str, Tensor]] = []
        for part, weight in ((slice(0, 5), 5.0), (slice(5, 20), 15.0)):
            with optimizer.sampled_params(train=True, weight=weight):
                F.mse_loss(model(x[part]), y[part]).backward()
            eps = {
                n: torch.randn(p.shape, generator=noise, dtype=F64) / (ess * (h[n] + wd)).sqrt()
                for n, p in m.items()
            }
            theta = {n: (m[n] + eps[n]).requires_grad_() for n in m}
            f = torch.func.functional_call(model, theta, x[part])
            each = torch.autograd.grad(F.mse_loss(f, y[part]), list(theta.values()))
            found = dict(zip(theta, each, strict=True))
            grads.append({n: weight / 20 * v for n, v in found.items()})
            stats.append({n: weight / 20 * v * eps[n] for n, v in found.items()})
        optimizer.step()
        for n in m:
            g[n] = b1 * g[n] + (1 - b1) * (grads[0][n] + grads[1][n])
            fh = ess * (h[n] + wd) * (stats[0][n] + stats[1][n])
            old = h[n]
            h[n] = b2 * old + (1 - b2) * fh + 0.5 * (1 - b2) ** 2 * (old - fh) ** 2 / (old + wd)
            step = (g[n] / (1 - b1**t) + wd * m[n]) / (h[n] + wd)
            m[n] = m[n] - lr * (h0 + wd) * step
        close(dict(model.named_parameters()), {n: v.requires_grad_() for n, v in m.items()})
        m = {n: v.detach() for n, v in m.items()}
    posterior = gaussian_posterior(optimizer, model)
    close(posterior.variance(), {n: 1 / (ess * (h[n] + wd)) for n in h})


def test_the_curvature_of_ivon_is_unbiased() -> None:
    """E[ess (h + delta) noise · gradient] = the diagonal of the Hessian, on a quadratic."""
    A = torch.tensor([[2.0, 0.7], [0.7, 0.5]], dtype=F64)
    p = nn.Parameter(torch.tensor([0.3, -1.0], dtype=F64))
    optimizer = IVON([p], ess=9.0, hess_init=1.5, weight_decay=0.1, beta2=0.0)
    draws = []
    for _ in range(3000):
        with optimizer.sampled_params(train=True):
            (0.5 * p @ A @ p).backward()
        draws.append(9.0 * 1.6 * optimizer.state[p].pop("statistic_sum"))
        optimizer.state[p].pop("grad_sum")
    values = torch.stack(draws)
    z = (values.mean(0) - A.diagonal()) / values.std(0) * math.sqrt(len(values))
    assert float(z.abs().max()) < 4.5


@given(
    h=st.floats(-0.99, 10.0),
    statistic=st.floats(-100.0, 100.0),
    beta2=st.floats(0.0, 0.9999),
)
@settings(max_examples=60, deadline=None)
def test_the_precision_of_ivon_stays_positive(h: float, statistic: float, beta2: float) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=F64))
    optimizer = IVON([p], ess=1.0, weight_decay=1.0, beta2=beta2)
    group = optimizer.param_groups[0]
    optimizer.precision(p, group)
    state = optimizer.state[p]
    state["hess"].fill_(h)
    state["grad_sum"] = torch.zeros(1, dtype=F64)
    state["statistic_sum"] = torch.full((1,), statistic, dtype=F64)
    optimizer._weight = 1.0
    optimizer.step()
    assert float(optimizer.precision(p, group)) > 0.49 * (h + 1)  # a step halves it at most


def test_clip_radius_and_rescale_lr() -> None:
    model, data = linear(), regression()
    before = flat(model)
    train(model, ivon(model, lr=2.0, clip_radius=1e-3, rescale_lr=False), data, 1)
    close((flat(model) - before).abs(), torch.full((4,), 2e-3, dtype=F64))


def test_vadam_by_hand() -> None:
    model, (x, y) = linear(), regression()
    ess, p0, start, b1, b2, lr = 20.0, 2.0, 5.0, 0.8, 0.9, 0.1
    optimizer = Vadam(
        model.parameters(), lr, ess=ess, beta1=b1, beta2=b2, prior_precision=p0,
        precision_init=start, mc_samples=2, generator=seeded(3),
    )  # fmt: skip
    noise, params = seeded(3), list(model.parameters())
    m = [p.detach().clone() for p in params]
    s, g = [torch.full_like(p, (start - p0) / ess) for p in m], [torch.zeros_like(p) for p in m]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss.detach()

    for t in (1, 2):
        total = [torch.zeros_like(p) for p in m]
        square = [torch.zeros_like(p) for p in m]
        losses = []
        for _ in range(2):
            theta = [
                (p + torch.randn(p.shape, generator=noise, dtype=F64) / (ess * v + p0).sqrt())
                .requires_grad_() for p, v in zip(m, s, strict=True)
            ]  # fmt: skip
            losses.append(F.mse_loss(F.linear(x, theta[0], theta[1]), y))
            each = torch.autograd.grad(losses[-1], theta)
            total = [a + b / 2 for a, b in zip(total, each, strict=True)]
            square = [a + b.square() / 2 for a, b in zip(square, each, strict=True)]
        close(optimizer.step(closure), torch.stack(losses).mean().detach())
        for i in range(2):
            g[i] = b1 * g[i] + (1 - b1) * (total[i] + p0 / ess * m[i])
            s[i] = b2 * s[i] + (1 - b2) * square[i]
            root = (s[i] / (1 - b2**t)).sqrt() + p0 / ess
            m[i] = m[i] - lr * g[i] / (1 - b1**t) / root
        close([p.detach() for p in params], m)
    close(1 / gaussian_posterior(optimizer, model).variance()["weight"], ess * s[0] + p0)


@pytest.mark.parametrize(
    ("likelihood", "labels"),
    [
        (Categorical(), torch.arange(10) % 2),
        (NOISE, torch.randn(10, 2, generator=seeded(), dtype=F64)),
        (Bernoulli(), torch.arange(20).reshape(10, 2) % 2),
        (Poisson(), torch.arange(20).reshape(10, 2) % 4),
    ],
    ids=lambda v: type(v).__name__,
)
def test_vogn_by_hand(likelihood: Any, labels: Tensor) -> None:
    model, x = network(), regression(10)[0]
    optimizer = VOGN(
        model, likelihood, 0.05, ess=10, beta1=0.5, beta2=0.75, prior_precision=2.0,
        precision_init=3.0, damping=0.1, generator=seeded(3),
    )  # fmt: skip
    m = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.observe(x[:4], labels[:4])
    optimizer.observe(x[4:], labels[4:])
    optimizer.step()
    noise, sums, squares = seeded(3), dict.fromkeys(m, 0.0), dict.fromkeys(m, 0.0)
    for part in (range(4), range(4, 10)):
        theta = {
            n: p + torch.randn(p.shape, generator=noise, dtype=F64) / math.sqrt(3.0)
            for n, p in m.items()
        }
        for i in part:
            leaves = {n: p.clone().requires_grad_() for n, p in theta.items()}
            f = torch.func.functional_call(model, leaves, x[i : i + 1])
            nll = likelihood.nll(f, labels[i : i + 1]).sum()
            for n, g in zip(m, torch.autograd.grad(nll, list(leaves.values())), strict=True):
                sums[n], squares[n] = sums[n] + g / 10, squares[n] + g.square() / 10
    for n, p in model.named_parameters():
        s = 0.75 * 0.1 + 0.25 * squares[n]
        close(p.detach(), m[n] - 0.05 * (sums[n] + 0.2 * m[n]) / (s + 0.2 + 0.1))
        close(1 / gaussian_posterior(optimizer, model).variance()[n], 10 * s + 2.0)


# ------------------------------------------------------------------ yesterday's posterior


def test_todays_prior_is_yesterdays_posterior() -> None:
    """With a prior that is N(0, 1/p0) in vectors, all is as with weight_decay = p0 / ess."""
    data, twins = regression(), []
    for with_prior in (False, True):
        model = linear()
        zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        prior = Posterior(zeros, Diagonal({n: z + 0.15 for n, z in zeros.items()}), 0.05)
        options = {"prior": prior, "rescale_lr": False} if with_prior else {"rescale_lr": False}
        optimizer = ivon(model, generator=seeded(1), weight_decay=0.01, **options)
        train(model, optimizer, data, 5)
        posterior = gaussian_posterior(optimizer, model)
        assert posterior.prior_precision == pytest.approx(0.05 if with_prior else 0.2)
        twins.append((flat(model), posterior.variance()))
    close(twins[0], twins[1])


def test_a_prior_of_vogn_in_vectors() -> None:
    (x, y), twins = regression(), []
    for with_prior in (False, True):
        model = linear()
        zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        prior = Posterior(zeros, Diagonal({n: z + 1.5 for n, z in zeros.items()}), 0.5)
        options: dict[str, Any] = {"prior": prior} if with_prior else {"prior_precision": 2.0}
        optimizer = VOGN(model, NOISE, ess=20, generator=seeded(1), **options)
        for _ in range(3):
            optimizer.observe(x, y)
            optimizer.step()
        twins.append(flat(model))
    close(*twins)


@pytest.mark.parametrize("kind", ["ivon", "vadam"])
def test_without_data_the_mean_goes_to_that_of_the_prior(kind: str) -> None:
    model = linear()
    mean = {n: torch.full_like(p, 2.0).detach() for n, p in model.named_parameters()}
    prior = Posterior(mean, Diagonal({n: 3.0 + torch.rand_like(v) for n, v in mean.items()}), 1.0)
    if kind == "vadam":
        optimizer: Any = Vadam(model.named_parameters(), 0.05, ess=1.0, prior=prior)
    else:
        optimizer = ivon(model, lr=0.05, ess=1.0, prior=prior, rescale_lr=False)
    for _ in range(500):
        with optimizer.sampled_params(train=True):
            sum((0.0 * p).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    close(flat(model), torch.full((4,), 2.0, dtype=F64), rtol=1e-6)


def test_a_new_head_starts_from_the_original_prior() -> None:
    model = network()
    old = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("0.")}
    prior = Posterior(old, Diagonal({n: torch.ones_like(p) for n, p in old.items()}), 1.0)
    posterior = gaussian_posterior(ivon(model, prior=prior, ess=20, weight_decay=0.2), model)
    # Nothing was trained: what the first h says is not knowledge.
    close({n: 1 / v for n, v in posterior.variance().items()}, {
        n: torch.full_like(p, 2.0 if n in old else 4.0).detach()
        for n, p in model.named_parameters()
    })  # fmt: skip


def test_a_chain_of_ivon_remembers_the_first_digits() -> None:
    """Two tasks of two digits: yesterday's posterior as the prior, against nothing."""
    case = benchmark.Case((64, 50, 10), 15, seeds=(0,))
    tasks = [(task.train, task.test) for task in benchmark.digit_tasks().tasks[:2]]
    setting = {"lr": 0.3, "hess_init": 0.1, "beta2": 0.98, "weight_decay": 1e-3}
    kept = benchmark.learn_stream("ivon", setting, tasks, case, 0)["ivon@mean"]  # type: ignore[arg-type]
    lost = benchmark.learn_stream("adam", {"lr": 3e-3}, tasks, case, 0)["adam"]  # type: ignore[arg-type]
    assert kept["first_task_when_learned"] > 0.95
    assert kept["first_task"] > lost["first_task"]

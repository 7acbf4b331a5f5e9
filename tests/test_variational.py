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
from benchmarks import variational as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

from lifelong import Bernoulli, Categorical, Dense, Diagonal, Gaussian, Poisson, Posterior
from lifelong.distributed import Ranks
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


def optimizers(model: nn.Module) -> dict[str, Any]:
    return {
        "IVON": ivon(model),
        "Vadam": Vadam(model.named_parameters(), ess=20.0),
        "VOGN": VOGN(model, NOISE, ess=20.0),
        "VON": VON(model, NOISE, ess=20.0),
    }


@pytest.mark.parametrize("kind", ["IVON", "Vadam", "VOGN", "VON"])
def test_the_state_of_another_kind_is_refused(kind: str) -> None:
    """The same names hold other quantities there; nothing is changed."""
    model = linear()
    optimizer = optimizers(model)[kind]
    before = optimizer.state_dict()
    for name, other in optimizers(model).items():
        if name == kind:
            optimizer.load_state_dict(other.state_dict())
            continue
        with pytest.raises(ValueError, match=f"the state of {kind}, got that of {name}"):
            optimizer.load_state_dict(other.state_dict())
        assert optimizer.param_groups[0].keys() == before["param_groups"][0].keys()
    del before["kind"]  # as files of before have it
    optimizer.load_state_dict(before)


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


# ------------------------------------------------------------------ what a loop does


class TwoHeads(nn.Module):
    """A shared layer and two heads, of which one is asked at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4, dtype=F64)
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=F64) for _ in range(2))
        self.active = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.active](torch.tanh(self.body(x)))


@pytest.mark.parametrize("kind", ["ivon", "vadam", "vogn"])
def test_a_head_without_gradients_keeps_everything(kind: str) -> None:
    model, (x, y) = TwoHeads(), regression()
    if kind == "vogn":
        optimizer: Any = VOGN(model, NOISE, ess=20, precision_init=5.0)
    elif kind == "vadam":
        optimizer = Vadam(model.named_parameters(), ess=20, precision_init=5.0)
    else:
        optimizer = ivon(model)

    def learn(head: int) -> None:
        model.active = head
        if kind == "vogn":
            optimizer.observe(x, y)
            optimizer.step()
        else:
            train(model, optimizer, (x, y), 1)

    learn(0)
    learn(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    learn(1)
    for n, p in model.named_parameters():
        changed = not torch.equal(p, before[n])
        assert changed == ("heads.0" not in n)
        if "heads.0" in n:
            assert torch.equal(optimizer.state[p]["hess"], state[n]["hess"])
            assert torch.equal(optimizer.state[p]["momentum"], state[n]["momentum"])
            assert optimizer.state[p]["step"] == 2
        assert (
            optimizer.state[p]["step"]
            == {"body": 3, "heads.0": 2, "heads.1": 1}[n.rpartition(".")[0]]
        )


def test_a_gradient_that_is_missing_in_one_pass_counts_as_zero() -> None:
    models = [TwoHeads(), TwoHeads()]
    x, y = regression()
    for model, zero in zip(models, (False, True), strict=True):
        optimizer = ivon(model, generator=seeded(2))
        for head in (0, 1):
            model.active = head
            with optimizer.sampled_params(train=True):
                loss = F.mse_loss(model(x), y)
                if zero:
                    loss = loss + sum((0 * p).sum() for p in model.parameters())
                loss.backward()
        optimizer.step()
    close(flat(models[0]), flat(models[1]))


def test_the_samples_leave_no_trace() -> None:
    model, (x, y) = network(1), regression()
    optimizer = ivon(model)
    before, state = flat(model), torch.get_rng_state()
    model.eval()
    next(model.parameters()).grad = torch.ones(4, 3, dtype=F64)
    with optimizer.sampled_params():
        assert not torch.equal(flat(model), before)
    assert next(model.parameters()).grad is not None  # evaluation leaves gradients alone
    optimizer.zero_grad()
    with pytest.raises(KeyError), optimizer.sampled_params(train=True):  # noqa: PT012
        F.mse_loss(model(x), y).backward()
        raise KeyError
    assert torch.equal(flat(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="without a pass"):  # the broken pass does not count
        optimizer.step()


def test_groups_schedulers_and_frozen_parameters() -> None:
    model, data = network(1), regression()
    model[0].weight.requires_grad_(False)
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": model[2].named_parameters(), "weight_decay": 0.1},
    ]
    optimizer = IVON(groups, 0.1, ess=20.0, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, data, 1)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.05]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"2.weight", "2.bias"}
    posterior = gaussian_posterior(optimizer, model)
    assert set(posterior.mean) == {"0.bias", "2.weight", "2.bias"}
    assert posterior.prior_precision == pytest.approx(2.0)
    head = optimizer.precision(model[2].bias, optimizer.param_groups[1])
    close(posterior.variance()["2.bias"], 1 / head)


def test_parameters_of_several_dtypes() -> None:
    torch.manual_seed(0)
    low, high = nn.Linear(3, 4, dtype=torch.bfloat16), nn.Linear(4, 1, dtype=F64)
    model = nn.ModuleList([low, high])
    x, y = regression()
    optimizer = IVON(model.named_parameters(), 1e-4, ess=1e8, hess_init=1.0)
    start = low.weight.detach().clone()
    for _ in range(30):
        with optimizer.sampled_params(train=True):
            F.mse_loss(high(torch.tanh(low(x.bfloat16())).double()), y).backward()
        optimizer.step()
    state = optimizer.state[low.weight]
    assert state["hess"].dtype == state["mean"].dtype == torch.float32
    assert optimizer.state[high.weight]["hess"].dtype == F64
    # Steps too small for bfloat16 add up beside it.
    assert float((state["mean"] - start.float()).abs().max()) > 1e-4
    assert torch.equal(state["mean"].bfloat16(), low.weight)
    posterior = gaussian_posterior(optimizer, model)
    assert posterior.mean["0.weight"].dtype == torch.float32
    other = IVON(model.named_parameters(), 1e-4, ess=1e8)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state[low.weight]["hess"], state["hess"])  # not rounded by torch
    with torch.no_grad():
        low.weight.fill_(1.0)  # changed from outside: the copy follows
    close(gaussian_posterior(optimizer, model).mean["0.weight"], torch.ones(4, 3))


@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_precision(autocast: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    x, y = (v.float() for v in regression())
    optimizer = IVON(model.parameters(), 0.2, ess=20.0)
    for _ in range(100):
        with optimizer.sampled_params(train=True), torch.autocast("cpu", enabled=autocast):
            F.mse_loss(model(x).float(), y).backward()
        optimizer.step()
    assert float(F.mse_loss(model(x), y).detach()) < 1.2


@pytest.mark.parametrize("kind", ["ivon", "vadam", "vogn", "von"])
@pytest.mark.parametrize("between", [False, True])
def test_a_resumed_run_is_equal(kind: str, between: bool, tmp_path: Path) -> None:
    """Also where it stops between the passes of a step, and through a file without pickle."""
    x, y = regression()

    def make(model: nn.Module, seed: int) -> Any:
        mean = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        prior = Posterior(mean, Diagonal(mean), 1.0) if seed == 1 else None
        options: dict[str, Any] = {"ess": 20.0, "generator": seeded(seed), "prior": prior}
        if kind == "von":
            return VON(model, NOISE, 0.3, **options)
        if kind == "vogn":
            return VOGN(model, NOISE, **options)
        cls = IVON if kind == "ivon" else Vadam
        return cls(model.named_parameters(), **options)

    def observe(model: nn.Module, optimizer: Any, part: slice) -> None:
        if kind in ("von", "vogn"):
            optimizer.observe(x[part], y[part])
        else:
            with optimizer.sampled_params(train=True):
                F.mse_loss(model(x[part]), y[part]).backward()

    def rest(model: nn.Module, optimizer: Any) -> Tensor:
        if between:
            observe(model, optimizer, slice(7, 20))
            optimizer.step()
        for _ in range(2):
            observe(model, optimizer, slice(0, 20))
            optimizer.step()
        return flat(model)

    model = network(1)
    optimizer = make(model, 1)
    observe(model, optimizer, slice(0, 20))
    optimizer.step()
    if between:
        observe(model, optimizer, slice(0, 7))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    straight = rest(model, optimizer)

    again = network(1)
    again.load_state_dict(weights)
    resumed = make(again, 2)
    resumed.load_state_dict(state)
    assert torch.equal(rest(again, resumed), straight)
    close(
        gaussian_posterior(resumed, again).variance(),
        gaussian_posterior(optimizer, model).variance(),
        rtol=0.0,
    )


def on_rank(rank: int, folder: str) -> None:
    """Each of two ranks sees half of the data; the second head is asked on the second rank only."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model, (x, y) = TwoHeads(), regression()
    ranks = Ranks()
    optimizer = ivon(model, ranks=ranks)
    part = slice(0, 5) if rank == 0 else slice(5, 20)
    for _ in range(3):
        model.active = rank
        with optimizer.sampled_params(train=True, weight=len(x[part])):
            F.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    von_model = linear()
    von = VON(von_model, NOISE, ess=20, ranks=ranks)
    von.observe(x[part], y[part])
    von.step()
    torch.save((flat(model), flat(von_model)), f"{folder}/{rank}")
    distributed.destroy_process_group()


def test_two_ranks_are_one_run_of_two_passes(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    # Daemons: ranks that wait for each other must not keep the tests from ending.
    workers = [
        processes.Process(target=on_rank, args=(r, str(tmp_path)), daemon=True) for r in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    (here, von), (there, von_there) = (torch.load(tmp_path / str(r)) for r in range(2))
    assert torch.equal(here, there)
    assert torch.equal(von, von_there)
    model, (x, y) = TwoHeads(), regression()
    optimizer, generators = ivon(model), (seeded(0), seeded(1))  # by default the seed is the rank
    for _ in range(3):
        for rank, part in enumerate((slice(0, 5), slice(5, 20))):
            model.active, optimizer.generator = rank, generators[rank]
            with optimizer.sampled_params(train=True, weight=len(x[part])):
                F.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    close(here, flat(model))
    close(von, bayes(x, y, 1.0)[0])


# ------------------------------------------------------------------ what is refused


def test_misuse_of_a_loop_is_told() -> None:
    model, (x, y) = network(1), regression()
    optimizer = ivon(model)
    with pytest.raises(RuntimeError, match=r"without a pass over data.*sampled_params"):
        optimizer.step()
    F.mse_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="outside of sampled_params"):
        optimizer.step()
    optimizer.zero_grad()
    with (
        pytest.raises(RuntimeError, match="without a gradient"),
        optimizer.sampled_params(train=True),
    ):
        model(x)
    with optimizer.sampled_params():
        for call in (
            optimizer.step,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict({}),
            lambda: optimizer.sampled_params().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="sampled_params"):
                call()
        with pytest.raises(RuntimeError, match="sampled_params"):
            gaussian_posterior(optimizer, model)
    with pytest.raises(ValueError, match="weight must be positive"):
        optimizer.sampled_params(train=True, weight=0.0).__enter__()
    with pytest.raises(ValueError, match="expected the state of IVON"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    model, data = network(1), regression()
    optimizer = ivon(model)
    train(model, optimizer, data, 2)
    before, h = flat(model), optimizer.state[model[0].bias]["hess"].clone()
    with optimizer.sampled_params(train=True):
        (value * model(data[0])).sum().backward()
    with pytest.raises(NonFiniteError, match="sampled passes"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert torch.equal(optimizer.state[model[0].bias]["hess"], h)
    train(model, optimizer, data, 1)  # the passes were dropped


def test_misuse_of_observe_is_told() -> None:
    model, (x, y) = network(1), regression()
    vogn, von = VOGN(model, NOISE, ess=20), VON(model, NOISE, ess=20)
    with pytest.raises(TypeError, match=r"observe\(inputs, labels\)"):
        vogn.sampled_params(train=True).__enter__()
    for optimizer in (vogn, von):
        with pytest.raises(RuntimeError, match="observe"):
            optimizer.step()
        with pytest.raises(ValueError, match="do not fit|as many labels"):
            optimizer.observe(x, y[:3])
        with pytest.raises(NonFiniteError):
            optimizer.observe(math.nan * x, y)
        with pytest.raises(ValueError, match="weight must be positive"):
            optimizer.observe(x, y, weight=-1.0)
        with pytest.raises(RuntimeError, match="observe"):  # nothing of these counts
            optimizer.step()
    with pytest.raises(TypeError, match="closure"):
        von.step(lambda: None)
    dropping = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, dtype=F64))
    with pytest.raises(NotRepeatableError, match="Dropout"):
        VOGN(dropping, NOISE, ess=20).observe(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ess": 0.0}, "ess must be positive"),
        ({"hess_init": -1.0}, "hess_init must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be finite"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"beta1": 1.0}, "beta1 must lie"),
        ({"beta2": -0.1}, "beta2 must lie"),
        ({"mc_samples": 0}, "mc_samples must be at least 1"),
        ({"clip_radius": 0.0}, "clip_radius must be positive"),
    ],
)
def test_values_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ivon(linear(), **options)


def test_values_out_of_range_elsewhere() -> None:
    model = linear()
    for make, message in (
        (lambda: Vadam(model.parameters(), ess=1.0, precision_init=0.5), "at least prior_prec"),
        (lambda: Vadam(model.parameters(), ess=1.0, prior_precision=0.0), "prior_precision must"),
        (lambda: VOGN(model, NOISE, ess=1.0, damping=-1.0), "damping must be"),
        (lambda: VON(model, NOISE, 1.5, ess=1.0), "lr must lie in"),
        (lambda: VON(model, NOISE, ess=1.0, precision_lr=-1.0), "precision_lr must lie in"),
        (lambda: VON(model, NOISE, ess=-1.0), "ess must be positive"),
        (lambda: VON(model, NOISE, ess=1.0, mc_samples=-1), "mc_samples must not be"),
        (lambda: VON(model, NOISE, ess=1.0, hessian="?"), "hessian must be"),  # type: ignore[arg-type]
        (lambda: VON(nn.Linear(200, 200), NOISE, ess=1.0), "use VOGN or IVON"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_prior_that_does_not_fit() -> None:
    model = linear()
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    prior = Posterior(ones, Diagonal(ones), 1.0)
    with pytest.raises(ValueError, match=r"named_parameters\(\)"):
        IVON(model.parameters(), ess=1.0, prior=prior)
    for other in (linear(4), nn.Sequential(linear())):
        with pytest.raises(StaleAnchorError):
            ivon(other, prior=prior)
        with pytest.raises(StaleAnchorError):
            VON(other, NOISE, ess=1.0, prior=prior)
    with pytest.raises(ValueError, match="not positive everywhere"):
        ivon(model, prior=Posterior(ones, Diagonal({n: -2 * v for n, v in ones.items()}), 1.0))


# ------------------------------------------------------------------ gaussian_posterior


class Elsewhere(torch.optim.SGD):
    """A stand-in for an IVON from elsewhere: flat vectors in the groups."""

    def __init__(self, params: Any, **group: Any) -> None:
        super().__init__(params, lr=0.1)
        for g in self.param_groups:
            size = sum(p.numel() for p in g["params"])
            g.update({"ess": 50.0, "weight_decay": 0.02, "hess": torch.arange(float(size))})
            g.update(group)


def test_an_ivon_from_elsewhere_is_read() -> None:
    model = linear()
    posterior = gaussian_posterior(Elsewhere(model.parameters()), model)
    assert posterior.prior_precision == 1.0
    close(posterior.variance()["weight"], 1 / (50 * torch.arange(3.0, dtype=F64)[None] + 1))
    close(posterior.variance()["bias"], 1 / (50 * torch.tensor([3.0], dtype=F64) + 1))
    close(posterior.mean["bias"], model.bias.detach())
    with torch.no_grad():
        model.bias.add_(1.0)  # a snapshot
    assert not torch.equal(posterior.mean["bias"], model.bias)


def test_what_gaussian_posterior_refuses() -> None:
    model = linear()
    with pytest.raises(TypeError, match=r"Adam holds no Gaussian.*ess"):
        gaussian_posterior(torch.optim.Adam(model.parameters()), model)
    with pytest.raises(ValueError, match="4 weights, but its hess has 3"):
        gaussian_posterior(Elsewhere(model.parameters(), hess=torch.ones(3)), model)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    uneven = Elsewhere(groups)
    uneven.param_groups[1]["weight_decay"] = 1.0
    with pytest.raises(ValueError, match="different prior precisions"):
        gaussian_posterior(uneven, model)
    with pytest.raises(ValueError, match="must be positive"):
        gaussian_posterior(Elsewhere(model.parameters(), weight_decay=0.0), model)
    with pytest.raises(ValueError, match=r"lacks \['bias'\]"):
        gaussian_posterior(IVON([model.weight], ess=1.0), model)
    with pytest.raises(ValueError, match="4 parameters|2 parameters"):
        gaussian_posterior(ivon(linear()), model)


# ------------------------------------------------------------------ the benchmark


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["digits", "chain", "--smoke", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["digits"]["summary"]) == {
        "adam",
        "ivon",
        "ivon@mean",
        "ivon, as chosen",
    }
    assert set(result["chain"]["seeds"]["ivon"][0]) > {"accuracy", "nll", "ece", "first_task"}
    assert "digits ivon: accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--data"):
        benchmark.main(["mnist", "--smoke", "--out", str(tmp_path)])


def test_a_copy_is_refused_with_what_to_do() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="IVON cannot be copied or pickled; make a new one"):
        copy.deepcopy(IVON(model.named_parameters(), ess=10))


@pytest.mark.parametrize("kind", [VOGN, VON])
def test_parameters_that_were_frozen_since(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = kind(model, Gaussian(), ess=10)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen or freed since .*\['0.bias', '0.weight'\]"):
        optimizer.observe(torch.randn(3, 2), torch.randn(3, 1))


def test_loaded_passes_of_a_step_are_those_that_were_saved() -> None:
    first, again = (IVON(nn.Linear(2, 1).named_parameters(), ess=10, mc_samples=n) for n in (4, 1))
    again.load_state_dict(first.state_dict())
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        loss = sum(p.square().sum() for p in again.param_groups[0]["params"])
        loss.backward()
        return loss.detach()

    again.step(closure)
    assert len(calls) == 4

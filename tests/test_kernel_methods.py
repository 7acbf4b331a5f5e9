"""K-priors of kernel machines: every adaptation is retraining on all that is left.

The references share no code with the library: closed forms for Gaussian processes, bounded least
squares (scipy) and libsvm (scikit-learn) for support vector machines, dense minimisers in the
features of a Cholesky factor for the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from benchmarks import kernel_methods as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as gp
from sklearn.svm import SVC
from torch import Tensor, nn

import lifelong
from lifelong import (
    Bernoulli,
    Categorical,
    CheckpointError,
    Examples,
    Gaussian,
    Hinge,
    KernelMachine,
    KernelPrior,
    NonFiniteError,
    Poisson,
    checkpoint,
    kernel_methods,
)
from lifelong.curvature import Isotropic
from lifelong.kernels import RBF, Linear, Polynomial
from lifelong.models import parameters, snapshot
from lifelong.testing import laws, reference

F64 = torch.float64


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(likelihood: Any, f: Tensor, seed: int) -> Tensor:
    f = f + 0.7 * normal(len(f), seed=seed)
    if isinstance(likelihood, Gaussian):
        return f
    if isinstance(likelihood, Bernoulli):
        return (f > 0).double()
    if isinstance(likelihood, Poisson):
        return f.exp().round()
    if isinstance(likelihood, Categorical):
        return (f > -0.5).long() + (f > 0.8).long()
    return (f > 0).double() * 2 - 1


def task(likelihood: Any, n: int, seed: int = 0) -> Examples:
    """n examples of three features, with ids of their own."""
    x = normal(n, 3, seed=seed)
    y = labels(likelihood, x[:, 0] + x[:, 1] * x[:, 2], seed + 100)
    return Examples(x, y, ids=1000 * seed + torch.arange(n))


# ------------------------------------------------------------------ the slow truth


@dataclass(frozen=True)
class Batch:
    """All that was learned and not forgotten, to be trained on from nothing."""

    likelihood: Any
    kernel: Any
    precision: float
    x: Tensor
    y: Tensor
    ids: Tensor

    def train(self) -> Callable[[Tensor], Tensor]:
        """x -> f (B, C) at the minimum."""
        k = self.kernel(self.x, self.x)
        alpha = retrain(self.likelihood, k, self.y, self.precision)
        return lambda z: self.kernel(z, self.x) @ alpha


def retrain(likelihood: Any, k: Tensor, y: Tensor, precision: float) -> Tensor:
    """alpha (N, C)."""
    if isinstance(likelihood, Gaussian):
        noise = precision * likelihood.noise_sd**2 * torch.eye(len(k), dtype=F64)
        return torch.linalg.solve(k + noise, y.reshape(len(k), -1))
    if isinstance(likelihood, Hinge):
        columns = y.reshape(len(k), -1).unbind(1)
        return torch.stack([benchmark.bounded_least_squares(k, c, precision) for c in columns], 1)
    root = torch.linalg.cholesky(k)
    outputs = 3 if isinstance(likelihood, Categorical) else 1
    model = nn.Linear(len(k), outputs, bias=False, dtype=F64)
    nn.init.zeros_(model.weight)

    def loss() -> Tensor:
        nll = likelihood.nll(model(root), y).sum()
        return nll + 0.5 * precision * model.weight.square().sum()

    reference.minimise(model, loss, tolerance=1e-10, max_iter=20)
    return torch.linalg.solve_triangular(root.T, model.weight.detach().T, upper=True)


def libsvm(k: Tensor, y: Tensor, precision: float) -> Tensor:
    """alpha by libsvm. It has an offset that is not regularised; beside a mirror image of all the
    data, -phi(x) with the label -y, the offset is 0 by symmetry, and each half counts half."""
    both = torch.cat([torch.cat([k, -k], 1), torch.cat([-k, k], 1)])
    svc = SVC(C=0.5 / precision, kernel="precomputed", tol=1e-10, shrinking=False)
    svc.fit(both.numpy(), torch.cat([y, -y]).numpy())
    beta = torch.zeros(len(both), dtype=F64)
    beta[torch.from_numpy(svc.support_).long()] = torch.from_numpy(svc.dual_coef_[0])
    return (beta[: len(k)] - beta[len(k) :]).unsqueeze(1)


# ------------------------------------------------------------------ the four adaptations

KERNEL, OTHER = RBF(1.2, bias=0.3), RBF(0.9, variance=1.5, bias=0.1)
CASES = {
    "Gaussian process": (Gaussian(0.4), 1, 1.0),
    "logistic": (Bernoulli(), 1, 0.3),
    "Poisson": (Poisson(), 1, 0.7),
    "three classes": (Categorical(), 3, 0.5),
    "support vector machine": (Hinge(), 1, 0.4),
}
cases = pytest.mark.parametrize("case", CASES)


def learned(case: str, n: int = 24) -> tuple[KernelPrior, Batch]:
    likelihood, outputs, precision = CASES[case]
    data = task(likelihood, n)
    prior = KernelPrior(KERNEL, likelihood, precision, outputs).update(data)
    return prior, Batch(likelihood, KERNEL, precision, data.inputs, data.labels, data.ids)  # type: ignore[arg-type]


def add(prior: KernelPrior, batch: Batch) -> tuple[KernelPrior, Batch]:
    new = task(batch.likelihood, 10, seed=7)
    x, y = torch.cat([batch.x, _seen(batch, new.inputs)]), torch.cat([batch.y, new.labels])  # type: ignore[arg-type,list-item]
    after = prior.update(Examples(_seen(batch, new.inputs), new.labels, new.ids))  # type: ignore[arg-type]
    return after, replace(batch, x=x, y=y, ids=torch.cat([batch.ids, new.ids]))


def remove(prior: KernelPrior, batch: Batch) -> tuple[KernelPrior, Batch]:
    ids = batch.ids[[1, 4, 5, len(batch.ids) - 1]]
    stays = ~torch.isin(batch.ids, ids)
    return prior.forget(ids), replace(
        batch, x=batch.x[stays], y=batch.y[stays], ids=batch.ids[stays]
    )


def regularise(prior: KernelPrior, batch: Batch) -> tuple[KernelPrior, Batch]:
    likelihood, changes = batch.likelihood, {}
    if isinstance(likelihood, Gaussian):
        likelihood = changes["likelihood"] = Gaussian(0.6)
    after = prior.replace(precision=2.5 * batch.precision, **changes)
    return after, replace(batch, precision=2.5 * batch.precision, likelihood=likelihood)


def transfer(prior: KernelPrior, batch: Batch) -> tuple[KernelPrior, Batch]:
    after = prior.transfer(kernel=OTHER, features=lambda x: x[:, :2])
    return after, replace(batch, kernel=OTHER, x=batch.x[:, :2])


def _seen(batch: Batch, x: Tensor) -> Tensor:
    """The features that the function sees by now."""
    return x[:, : batch.x.shape[1]]


ADAPTATIONS = {"add": add, "remove": remove, "regularise": regularise, "transfer": transfer}


def error(prior: KernelPrior, batch: Batch) -> float:
    """Of the function, at its inputs and elsewhere."""
    z = torch.cat([batch.x, _seen(batch, normal(30, 3, seed=50))])
    return laws.distance(prior.machine(z), batch.train()(z))


@cases
def test_learning_is_training(case):
    prior, batch = learned(case)
    assert error(prior, batch) < 1e-9
    assert prior.certified


@cases
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_an_adaptation_is_retraining(case, adaptation):
    prior, batch = ADAPTATIONS[adaptation](*learned(case))
    assert error(prior, batch) < 1e-9
    assert len(prior) == prior.num_data == len(batch.x)


@cases
@pytest.mark.parametrize("order", list(itertools.permutations(ADAPTATIONS, 3)), ids="-".join)
def test_three_adaptations_in_a_row_are_retraining(case, order):
    prior, batch = learned(case)
    for adaptation in order:
        prior, batch = ADAPTATIONS[adaptation](prior, batch)
    assert error(prior, batch) < 1e-9


# ------------------------------------------------------------------ the prior as a function


def objective(batch: Batch, machine: KernelMachine) -> Tensor:
    nll = batch.likelihood.nll(machine(batch.x), batch.y).sum()
    return nll + 0.5 * batch.precision * machine.squared_norm


def some_machine(prior: KernelPrior, seed: int, by: float = 0.3) -> KernelMachine:
    """f* and a random function, with points of its own, whose coefficients want a gradient."""
    x = torch.cat([prior.machine.inputs, normal(5, prior.machine.inputs.shape[1], seed=seed)])  # type: ignore[list-item,union-attr]
    alpha = by * normal(len(x), prior.num_outputs, seed=seed + 1)
    alpha[: len(prior)] += prior.machine.coefficients
    return replace(prior.machine, inputs=x, coefficients=alpha.requires_grad_())


@cases
def test_a_full_memory_is_the_objective_of_all_the_past_at_every_function(case):
    """Values up to one constant, and gradients in alpha, after some adaptations; without labels."""
    prior, batch = remove(*add(*learned(case)))
    gaps = []
    for seed in range(4):
        machine = some_machine(prior, 10 * seed)
        ours, truth = prior(machine), objective(batch, machine)
        gaps.append(float((truth - ours).detach()))
        slopes = (torch.autograd.grad(v, machine.coefficients)[0] for v in (ours, truth))
        assert laws.distance(*slopes) < 1e-10
    assert max(gaps) - min(gaps) < 1e-10 * max(map(abs, gaps))


@cases
def test_the_value_is_that_of_a_k_prior(case):
    """½ delta ‖f - f*‖² + a divergence that is not negative, 0 at f*, over ½ delta ‖f*‖²."""
    prior, _ = learned(case)
    least = 0.5 * prior.precision * prior.machine.squared_norm
    torch.testing.assert_close(prior(prior.machine), least, rtol=1e-12, atol=0)
    for seed in range(3):
        machine = some_machine(prior, seed, by=0.1)
        change = machine.coefficients.detach().clone()
        change[: len(prior)] -= prior.machine.coefficients
        far = replace(machine, coefficients=change).squared_norm
        assert float(prior(machine).detach() - least) >= 0.5 * prior.precision * float(far) - 1e-12


def test_an_empty_prior_is_the_regulariser():
    prior = KernelPrior(KERNEL, Gaussian(), 0.5)
    x, alpha = normal(4, 3), normal(4, 1, seed=1)
    machine = KernelMachine(KERNEL, x, alpha, Gaussian(), 0.5)
    k = KERNEL(x, x)
    torch.testing.assert_close(prior(machine), 0.25 * (alpha.T @ k @ alpha).squeeze())
    assert prior.machine(x).equal(torch.zeros(4, 1, dtype=F64))
    assert prior.machine.squared_norm == 0
    assert len(prior) == prior.num_bytes == 0
    for same in (
        prior.replace(precision=2.0), prior.transfer(kernel=OTHER), prior.memorise(3),
        prior.forget([]),
    ):  # fmt: skip
        assert len(same) == 0
    mean, covariance = prior.posterior(x)
    assert not mean.any()
    torch.testing.assert_close(covariance.flatten(), 2 * k.diagonal())


def test_labels_can_be_read_off_the_coefficients():
    """Not storing them hides nothing: y = E[t | f*] - r, up to the noise of a Gaussian."""
    for case in ("logistic", "Poisson", "Gaussian process"):
        prior, batch = learned(case)
        b = prior.beliefs
        unit = 0.4**2 if case == "Gaussian process" else 1.0
        found = batch.likelihood.mean(b.outputs) - unit * b.residuals  # type: ignore[union-attr]
        torch.testing.assert_close(found.squeeze(1), batch.y, rtol=0, atol=1e-9)


# ------------------------------------------------------------------ well-kept packages agree


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_error_bars_are_those_of_scikit_learn(adaptation):
    prior, batch = ADAPTATIONS[adaptation](*learned("Gaussian process"))
    z = _seen(batch, normal(9, 3, seed=3))

    k, noise = batch.kernel, batch.likelihood.noise_sd**2 * batch.precision
    kernel = gp.ConstantKernel(k.variance) * gp.RBF(k.lengthscale) + gp.ConstantKernel(k.bias)
    theirs = GaussianProcessRegressor(kernel=kernel, alpha=noise, optimizer=None)
    theirs.fit(batch.x.numpy(), batch.y.numpy())
    mean, sd = (torch.from_numpy(v) for v in theirs.predict(z.numpy(), return_std=True))
    ours, covariance = prior.posterior(z)
    torch.testing.assert_close(ours.squeeze(1), mean, rtol=1e-9, atol=1e-9)
    expected = sd.square() / batch.precision
    torch.testing.assert_close(covariance.flatten(), expected, rtol=1e-8, atol=1e-9)
    label = prior.predict(z)
    torch.testing.assert_close(
        label.sd.flatten(), (expected + batch.likelihood.noise_sd**2).sqrt(), rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("kernel", [Polynomial(2), Linear(bias=2.0)])
def test_support_vector_machines_are_those_of_libsvm(kernel):
    """On whole numbers, which the float32 inside libsvm holds; many points are copies."""
    x = torch.randint(-2, 3, (60, 2), generator=torch.Generator().manual_seed(0)).double()
    y = labels(Hinge(), x[:, 0] + 0.5 * x[:, 1] ** 2 - 1, 3)
    prior = KernelPrior(kernel, Hinge(), 2.0).update((x[:40], y[:40])).update((x[40:], y[40:]))
    prior = prior.forget(torch.arange(10)).replace(precision=8.0)
    k = kernel(x[10:], x[10:])
    assert laws.distance(prior.machine(x[10:]), k @ libsvm(k, y[10:], 8.0)) < 1e-6


# ------------------------------------------------------------------ a memory that is smaller


@cases
def test_dropping_projects_the_function_on_the_span_of_the_memory(case):
    prior, _ = learned(case)
    small = prior.memorise(ids=prior.beliefs.ids[3:11])  # type: ignore[union-attr]
    kept, f, g = small.machine.inputs, prior.machine, small.machine
    torch.testing.assert_close(g(kept), f(kept), rtol=1e-8, atol=1e-9)  # type: ignore[arg-type]
    k = KERNEL(f.inputs, g.inputs)  # type: ignore[arg-type]
    inner = (f.coefficients * (k @ g.coefficients)).sum()  # ⟨f, Pf⟩ = ‖Pf‖²
    torch.testing.assert_close(inner, g.squared_norm, rtol=1e-8, atol=0)
    if case != "support vector machine":
        assert float(torch.autograd.grad(small(_wanting(g)), g.coefficients)[0].norm()) < 1e-9


def _wanting(machine: KernelMachine) -> KernelMachine:
    machine.coefficients.requires_grad_()
    return machine


@cases
def test_a_larger_memory_holds_a_smaller_one_and_is_nearer(case):
    prior, _ = learned(case)
    ids, norms = [], []
    for size in range(1, 25):
        small = prior.memorise(size)
        ids.append(set(small.beliefs.ids.tolist()))  # type: ignore[union-attr]
        norms.append(float(small.machine.squared_norm))
    assert all(a < b for a, b in itertools.pairwise(ids))
    # ‖f - Pf‖² = ‖f‖² - ‖Pf‖²
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(norms))
    assert norms[-1] == pytest.approx(float(prior.machine.squared_norm), rel=1e-12)


@pytest.mark.parametrize("case", ["Gaussian process", "logistic", "Poisson", "three classes"])
def test_the_error_falls_to_zero_as_the_memory_grows(case):
    means = []
    for size in (4, 10, 16, 21, 24):
        errors = []
        for adaptation in (add, regularise):
            prior, batch = learned(case)
            errors.append(error(*adaptation(prior.memorise(size), batch)))
        means.append(sum(errors) / 2)
    assert all(a > b for a, b in itertools.pairwise(means))
    assert means[0] > 1e-2
    assert means[-1] < 1e-9


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_memory_that_spans_the_features_is_exact_for_linear_gaussian_models(outputs):
    """Four points carry thirty, in every later change, and in the error bars: k has rank 4."""
    kernel, likelihood = Linear(bias=0.5), Gaussian(0.5)
    x, new = normal(30, 3), normal(8, 3, seed=2)
    y, new_y = normal(30, outputs, seed=1), normal(8, outputs, seed=3)
    z = normal(11, 3, seed=4)

    def same(prior: KernelPrior, x: Tensor, y: Tensor, precision: float, sd: float = 0.5) -> None:
        whole = KernelPrior(kernel, Gaussian(sd), precision, outputs).update((x, y))
        for ours, theirs in zip(prior.posterior(z), whole.posterior(z), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)

    small = KernelPrior(kernel, likelihood, 0.7, outputs).update((x, y)).memorise(4)
    assert len(small) == 4
    assert not small.certified
    same(small, x, y, 0.7)
    more = small.update((new, new_y))
    same(more, torch.cat([x, new]), torch.cat([y, new_y]), 0.7)
    same(more.memorise(4), torch.cat([x, new]), torch.cat([y, new_y]), 0.7)
    same(more.replace(precision=0.1, likelihood=Gaussian(0.9)), torch.cat([x, new]),
         torch.cat([y, new_y]), 0.1, 0.9)  # fmt: skip
    kept = torch.isin(torch.arange(30), small.beliefs.ids)  # type: ignore[union-attr]
    dropped = (~kept).nonzero().squeeze(1)[:6]
    stays = ~torch.isin(torch.arange(30), dropped)
    same(
        more.forget(dropped, (x, y)), torch.cat([x[stays], new]), torch.cat([y[stays], new_y]), 0.7
    )
    # Remembered ones too, as long as the others span the features.
    gone = torch.cat([dropped, kept.nonzero().squeeze(1)[:2]])
    stays = ~torch.isin(torch.arange(30), gone)
    same(more.forget(gone, (x, y)), torch.cat([x[stays], new]), torch.cat([y[stays], new_y]), 0.7)


# ------------------------------------------------------------------ support vectors as the memory


def moons(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two half circles: few support vectors."""
    angle = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64) * torch.pi
    y = (torch.arange(n) % 2).double() * 2 - 1
    x = torch.stack([y * angle.cos() + 0.4 * y, y * angle.sin() - 0.3 * y], 1)
    return x + 0.05 * normal(n, 2, seed=seed + 1), y


def bregman(prior: KernelPrior, x: Tensor, y: Tensor, f: Tensor) -> Tensor:
    """sum D of non-support vectors of the prior: their hinge loss at another function."""
    loss = Hinge()
    assert float(loss.nll(prior.machine(x), y).sum()) == 0
    return loss.nll(f, y).sum()


def support_alone(seed: int, n: int = 60, precision: float = 0.1):
    """(the prior with all, the prior with its support vectors, x, y, which are support vectors)."""
    x, y = moons(n, seed)
    full = KernelPrior(RBF(0.7), Hinge(), precision).update((x, y))
    used = (full.machine.coefficients != 0).squeeze(1)
    return full, full.memorise(ids=used.nonzero().squeeze(1)), x, y, used


def test_support_vectors_give_back_the_machine():
    full, small, x, y, used = support_alone(0)
    assert 0 < len(small) == int(used.sum()) < 30
    assert len(full.machine.support.coefficients) == len(small)
    assert small.certified
    assert small.radius > 0
    z = normal(20, 2)
    torch.testing.assert_close(small.machine(z), full.machine(z), rtol=0, atol=1e-12)
    retrained = KernelPrior(RBF(0.7), Hinge(), 0.1).update((x[used], y[used]))
    torch.testing.assert_close(retrained.machine(z), full.machine(z), rtol=1e-9, atol=1e-9)


def test_forgetting_a_non_support_vector_changes_nothing():
    full, small, x, y, used = support_alone(1)
    ids = (~used).nonzero().squeeze(1)[:5]
    z = normal(20, 2)
    for prior in (full.forget(ids), small.forget(ids, (x, y))):
        torch.testing.assert_close(prior.machine(z), full.machine(z), rtol=0, atol=1e-10)
        assert prior.num_data == 55


CHANGES: dict[str, Callable[[KernelPrior, float, Tensor], KernelPrior]] = {
    "add": lambda prior, size, _: prior.update(_pushed(size), ids=torch.arange(500, 504)),
    "remove": lambda prior, size, ids: prior.forget(ids[: 1 + int(size)]),
    "regularise": lambda prior, size, _: prior.replace(precision=0.1 * (1 + size)),
}


def _pushed(size: float) -> tuple[Tensor, Tensor]:
    """New points beyond the boundary by about so much."""
    x, y = moons(4, 77)
    return x - size * y.unsqueeze(1) * torch.tensor([0.5, -0.5], dtype=F64), y


@settings(max_examples=60)
@given(st.sampled_from(list(CHANGES)), st.floats(0, 3), st.integers(0, 20), st.integers(0, 30))
def test_a_certificate_is_never_wrong_and_the_error_is_bounded(change, size, seed, extra):
    """certified: the same function as with all examples. And, with all support vectors kept,

    delta ‖f_M - f‖²_H <= sum_dropped D(f*, f_M).
    """
    full, small, x, y, _ = support_alone(seed)
    small = full.memorise(len(small) + extra)
    ids = small.beliefs.ids  # type: ignore[union-attr]
    dropped = ~torch.isin(torch.arange(len(x)), ids)
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    ours, truth = (CHANGES[change](prior, size, shuffled) for prior in (small, full))
    points = torch.cat([ours.machine.inputs, truth.machine.inputs])  # type: ignore[list-item]
    alpha = torch.cat([ours.machine.coefficients, -truth.machine.coefficients])
    far = replace(truth.machine, inputs=points, coefficients=alpha).squared_norm
    missed = bregman(full, x[dropped], y[dropped], ours.machine(x[dropped]))
    assert ours.precision * float(far) <= float(missed) + 1e-9
    if ours.certified:
        assert float(far) < 1e-12 * float(truth.machine.squared_norm)
        assert float(missed) < 1e-9


def test_what_is_lost_is_a_point_that_becomes_a_support_vector():
    """A softer margin takes in points that were dropped: not certified, and not exact."""
    full, small, *_ = support_alone(0)
    soft, truth = small.replace(precision=5.0), full.replace(precision=5.0)
    assert truth.certified
    assert not soft.certified
    z = normal(20, 2)
    assert laws.distance(soft.machine(z), truth.machine(z)) > 0.1
    # Those that can become active, kept beside them, mend it: here the memory may stay small.
    active = (truth.machine.coefficients != 0).squeeze(1) | (
        full.machine.coefficients != 0
    ).squeeze(1)
    mended = full.memorise(ids=active.nonzero().squeeze(1)).replace(precision=5.0)
    assert len(mended) < len(full)
    assert laws.distance(mended.machine(z), truth.machine(z)) < 1e-9


def test_how_much_new_loss_a_memory_can_take_is_known_beforehand():
    """½ delta radius² nats of hinge loss at f* move f by less than the radius."""
    _, small, *_ = support_alone(3)
    small = small.memorise(len(small))
    x, y = moons(4, 91)
    for push in torch.linspace(0, 2, 21).tolist():
        new = (x + push * normal(4, 2, seed=9), y)
        loss = float(Hinge().nll(small.machine(new[0]), y).sum())
        if loss <= 0.5 * small.precision * small.radius**2:
            assert small.update(new).certified


def test_where_all_is_forgotten_learning_begins_anew():
    """Nothing that was dropped is left: the next fit is of all examples, and certified."""
    data, fresh = Examples(normal(8, 2), normal(8, 1, seed=1)), KernelPrior(RBF(), Gaussian(0.5))
    prior = fresh.update(data).memorise(4)
    assert not prior.certified
    again, truth = prior.forget(torch.arange(8), data).update(data), fresh.update(data)
    assert again.certified
    assert torch.equal(again.machine(data.inputs), truth.machine(data.inputs))


def test_dropped_support_vectors_are_never_certified():
    full, small, *_ = support_alone(2)
    fewer = full.memorise(len(small) - 2)
    assert not fewer.certified
    assert not fewer.replace(precision=0.2).certified
    gone = ~torch.isin(full.beliefs.ids, fewer.beliefs.ids)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="support vectors were dropped"):
        fewer.forget(gone.nonzero().squeeze(1)[:1], moons(60, 2))
    # With another kernel the distance means nothing any more; with all examples it need not.
    assert not small.transfer(kernel=RBF(1.0)).certified
    assert full.transfer(kernel=RBF(1.0)).certified


def test_several_classes_are_one_machine_each():
    x = normal(40, 3)
    y = F64_one_hot(task(Categorical(), 40).labels)
    prior = KernelPrior(KERNEL, Hinge(), 0.4, num_outputs=3).update((x[:25], y[:25]))
    prior = prior.update((x[25:], y[25:])).forget([0, 30])
    stays = [i for i in range(40) if i not in (0, 30)]
    for c in range(3):
        alone = KernelPrior(KERNEL, Hinge(), 0.4).update((x[stays], y[stays, c]))
        torch.testing.assert_close(
            prior.machine(x)[:, c], alone.machine(x)[:, 0], rtol=1e-9, atol=1e-9
        )


def F64_one_hot(y: Tensor) -> Tensor:
    return 2 * nn.functional.one_hot(y, 3).double() - 1


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bool])
def test_hinge_labels_may_be_0_and_1(kind):
    x, y = moons(30, 0)
    one = KernelPrior(RBF(), Hinge()).update((x, y))
    other = KernelPrior(RBF(), Hinge()).update((x, (y > 0).to(kind)))
    assert torch.equal(one.machine.coefficients, other.machine.coefficients)


@settings(max_examples=60)
@given(st.integers(1, 25), st.integers(1, 6), st.floats(-4, 4), st.integers(0, 1000), st.booleans())
def test_quadratic_programmes_of_any_rank_end_at_a_stationary_point(n, rank, size, seed, warm):
    rows = normal(n, rank, seed=seed) * 10**size
    q, b = rows @ rows.T, 1 + 0.5 * normal(n, seed=seed + 1)
    start = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64).round()
    a, _ = kernel_methods._minimise_in_box(q, b, start, 20 if warm else 0)
    assert bool(((a >= 0) & (a <= 1)).all())
    s = q @ a - b
    scale = float((q.abs() @ a + b.abs()).max())
    gap = ((1 - a) * (-s).clamp(min=0) + a * s.clamp(min=0)).sum()
    assert float(gap) < 1e-9 * max(1.0, scale)


# ------------------------------------------------------------------ care with numbers


@cases
def test_copies_of_a_point_count_as_often_as_they_occur(case):
    """Learned at once or one after another; a singular kernel, and labels that disagree."""
    likelihood, outputs, precision = CASES[case]
    data = task(likelihood, 12)
    x, y = torch.cat([data.inputs] * 3), torch.cat([data.labels, data.labels, data.labels.flip(0)])  # type: ignore[list-item]
    prior = KernelPrior(KERNEL, likelihood, precision, outputs)
    at_once = prior.update((x, y))
    in_turn = prior.update((x[:12], y[:12])).update((x[12:24], y[12:24])).update((x[24:], y[24:]))
    z = normal(10, 3, seed=8)
    torch.testing.assert_close(in_turn.machine(z), at_once.machine(z), rtol=1e-9, atol=1e-9)
    without = in_turn.forget(torch.arange(12, 24))
    batch = prior.update((torch.cat([x[:12], x[24:]]), torch.cat([y[:12], y[24:]])))
    torch.testing.assert_close(without.machine(z), batch.machine(z), rtol=1e-9, atol=1e-9)


@cases
@pytest.mark.parametrize("kernel", [RBF(30.0), RBF(1e-3), Polynomial(4), Linear()])
def test_kernels_near_singular_or_of_rank_three_do_no_harm(case, kernel):
    likelihood, outputs, precision = CASES[case]
    a, b = task(likelihood, 20), task(likelihood, 10, seed=3)
    prior = KernelPrior(kernel, likelihood, precision, outputs)
    both = (torch.cat([a.inputs, b.inputs]), torch.cat([a.labels, b.labels]))  # type: ignore[list-item]
    z = normal(10, 3, seed=8)
    expected = prior.update(both).machine(z)
    found = prior.update(a).update(b).memorise(30).machine(z)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("case", ["logistic", "Poisson", "three classes"])
@pytest.mark.parametrize("far", [10.0, 100.0, 1e4])
def test_a_start_that_is_far_off_does_no_harm(case, far):
    """Counts whose rate begins at exp(100), or beyond all numbers."""
    prior, batch = learned(case)
    alpha, _, _ = prior._newton(far * normal(24, prior.num_outputs, seed=3))
    f = KERNEL(batch.x, batch.x) @ alpha
    torch.testing.assert_close(f, prior.machine(batch.x), rtol=1e-9, atol=1e-9)


def test_float32_inputs_are_computed_in_float64():
    x, y = normal(20, 3), normal(20, seed=1)
    one = KernelPrior(KERNEL, Gaussian(0.1)).update((x.float(), y.float()))
    other = KernelPrior(KERNEL, Gaussian(0.1)).update((x.float().double(), y.float().double()))
    assert one.machine.coefficients.dtype == F64
    torch.testing.assert_close(one.machine(x), other.machine(x), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ values


@cases
def test_a_change_leaves_the_prior_and_the_users_tensors_alone(case, tmp_path):
    likelihood, outputs, precision = CASES[case]
    data = task(likelihood, 24)
    prior = KernelPrior(KERNEL, likelihood, precision, outputs).update(data)
    before = prior.save(tmp_path / "before").read_bytes()
    for adaptation in ADAPTATIONS.values():
        batch = Batch(likelihood, KERNEL, precision, data.inputs, data.labels, data.ids)  # type: ignore[arg-type]
        adaptation(prior, batch)
    prior.memorise(5)
    data.inputs.zero_()  # type: ignore[union-attr]
    data.ids.zero_()
    assert prior.save(tmp_path / "after").read_bytes() == before


@cases
def test_a_saved_prior_comes_back(case, tmp_path):
    prior, _ = learned(case)
    for one in (
        prior,
        prior.memorise(9),
        KernelPrior(Linear(), CASES[case][0], 1.0, CASES[case][1]),
    ):
        other = KernelPrior.load(one.save(tmp_path / "prior"))
        assert (other.kernel, other.likelihood, other.radius) == (
            one.kernel, one.likelihood, one.radius,
        )  # fmt: skip
        assert other.num_bytes == one.num_bytes
        z = normal(5, 3)
        assert torch.equal(other.machine(z), one.machine(z))
        new = task(one.likelihood, 5, seed=4)
        assert torch.equal(other.update(new).machine(z), one.update(new).machine(z))


def test_what_was_forgotten_or_transformed_is_not_in_the_file(tmp_path):
    prior, batch = learned("three classes")
    gone = batch.x[4]
    for after in (prior.forget(batch.ids[4:5]), prior.transfer(features=lambda x: x[:, :2])):
        raw = after.save(tmp_path / "prior").read_bytes()
        assert gone[2].numpy().tobytes() not in raw
    assert gone[2].numpy().tobytes() in prior.save(tmp_path / "prior").read_bytes()


def test_costs_are_counted():
    prior, batch = learned("Gaussian process")
    assert prior.cost.kernel_entries == 24 * 24
    more, _ = add(prior, batch)
    assert more.cost.kernel_entries == 10 * 34  # of the new rows alone
    less = prior.forget(batch.ids[:3])
    assert less.cost.kernel_entries == 0
    assert less.cost.iterations == 1  # quadratic: one Newton step
    assert less.cost.gradients == 2 * 21
    assert less.cost.seconds > 0


def test_what_is_known_of_the_others_does_not_go_with_the_memory():
    batch = task(Gaussian(0.3), 30)
    prior = KernelPrior(RBF(1.0), Gaussian(0.3)).update(batch).memorise(6)
    with pytest.raises(ValueError, match="known of the 24 others"):
        prior.forget(prior.beliefs.ids)  # type: ignore[union-attr]
    empty = prior.forget(batch.ids, batch)
    assert empty.num_data == 0
    assert empty.beliefs is None


def test_an_id_that_was_dropped_names_the_example_that_got_it_next():
    batch = task(Gaussian(0.3), 30)
    prior = KernelPrior(RBF(1.0), Gaussian(0.3)).update(batch).memorise(6)
    free = batch.ids[~torch.isin(batch.ids, prior.beliefs.ids)][:2]  # type: ignore[union-attr]
    other = task(Gaussian(0.3), 2, seed=4)
    again = prior.update(other, ids=free).forget(free)
    x = normal(5, 3, seed=9)
    torch.testing.assert_close(again.machine(x), prior.machine(x))


def test_forgetting_everything_leaves_the_regulariser():
    prior, batch = learned("logistic")
    empty = prior.forget(batch.ids)
    assert (len(empty), empty.num_data) == (0, 0)
    assert not empty.machine(batch.x).any()
    again = empty.update((batch.x, batch.y), ids=batch.ids)
    torch.testing.assert_close(again.machine(batch.x), prior.machine(batch.x), rtol=0, atol=1e-9)


def test_ids_count_on_where_data_have_none():
    x, y = normal(9, 2), normal(9)
    prior = KernelPrior(RBF(), Gaussian()).update((x[:5], y[:5])).update((x[5:], y[5:]))
    assert prior.beliefs.ids.tolist() == list(range(9))  # type: ignore[union-attr]
    assert prior.forget([8]).update((x[:1], y[:1])).beliefs.ids.tolist() == [*range(8), 9]  # type: ignore[union-attr]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    same = KernelPrior(RBF(), Gaussian()).update(loader)
    torch.testing.assert_close(same.machine(x), prior.machine(x), rtol=0, atol=1e-12)


def test_it_says_what_it_is():
    prior, _ = learned("support vector machine")
    assert repr(prior) == (
        "KernelPrior(RBF(lengthscale=1.2, variance=1.0, bias=0.3), Hinge(), precision=0.4, "
        "24 examples, 24 remembered)"
    )


# ------------------------------------------------------------------ the rest of the library


def test_it_is_the_prior_of_a_linear_model():
    """A linear kernel is ``kprior`` with a full memory: w = sum_i alpha_i x_i, in nats."""
    x, y = normal(20, 3), labels(Bernoulli(), normal(20, seed=1), 2)
    model = nn.Linear(3, 1, bias=False, dtype=F64)
    weights = lifelong.kprior(Bernoulli(), precision=0.6, memory=None)
    fitted = laws.minimum(model, lambda m: Bernoulli().nll(m(x), y).sum() + weights(m))
    weights = weights.update(fitted, (x, y))
    functions = KernelPrior(Linear(), Bernoulli(), 0.6).update((x, y))
    torch.testing.assert_close(
        functions.machine.coefficients.T @ x, laws.weights(fitted).unsqueeze(0), rtol=1e-8, atol=0
    )
    for seed in range(3):
        machine = some_machine(functions, seed)
        with torch.no_grad():
            model.weight.copy_(machine.coefficients.T @ machine.inputs)
        torch.testing.assert_close(functions(machine), weights(model), rtol=1e-9, atol=0)


def test_it_is_the_gaussian_process_of_a_network():
    """A network's own kernel, J J'ᵀ, as a function of one's own: ``GaussianProcess``, where it was
    trained to a minimum."""
    x, y = normal(15, 2), normal(15, seed=1)
    model = nn.Sequential(nn.Linear(2, 1, dtype=F64))
    likelihood = Gaussian(0.3)
    model = laws.minimum(
        model,
        lambda m: (
            likelihood.nll(m(x), y).sum() + 0.4 * sum(p.square().sum() for p in m.parameters())
        ),
    )
    flat = Isotropic.zeros_like(snapshot(parameters(model)))

    def tangent(a: Tensor, b: Tensor) -> Tensor:
        return lifelong.function_kernel(model, a, flat, 1.0, others=b)[:, 0, :, 0].double()

    theirs = lifelong.GaussianProcess.fit(model, (x, y), likelihood, prior_precision=0.8)
    z = normal(6, 2, seed=5)
    ours = KernelPrior(tangent, likelihood, 0.8).update((x, y))
    for a, b in zip(ours.posterior(z), theirs.outputs(model, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------ kernels


@given(
    st.sampled_from([RBF(0.7, 2.0, 0.1), Linear(0.5, 0.2), Polynomial(3, 0.5, 0.3), Polynomial(1)]),
    st.integers(1, 12), st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_kernels_are_symmetric_and_positive(kernel, n, features, seed):
    x = normal(n, features, seed=seed)
    k = kernel(x, x)
    torch.testing.assert_close(k, kernel(x.reshape(n, features, 1), x).T)
    assert float(torch.linalg.eigvalsh(k)[0]) > -1e-10 * float(k.abs().max())
    torch.testing.assert_close(kernel(x, x[:1]), k[:, :1])


def test_kernels_are_their_formulas():
    a, b = normal(4, 2), normal(3, 2, seed=1)
    for i, j in itertools.product(range(4), range(3)):
        u, v = a[i], b[j]
        far = ((u - v) ** 2).sum()
        expected = {
            RBF(0.5, 3.0, 0.2): 3 * (-far / 0.5).exp() + 0.2,
            Linear(2.0, 0.1): 2 * u @ v + 0.1,
            Polynomial(2, 0.5, 1.0): 0.5
            * (1 + 2 * u @ v + (u[0] * v[0]) ** 2 + (u[1] * v[1]) ** 2 + 2 * u.prod() * v.prod()),
        }
        for kernel, value in expected.items():
            torch.testing.assert_close(kernel(a, b)[i, j], value)
    assert Linear()(a[:0], b).shape == (0, 3)
    assert torch.equal(Linear()(a[:, 0], b[:, 0]), torch.outer(a[:, 0], b[:, 0]))
    points = torch.cat([a, a])
    assert torch.equal(RBF(1e-6)(points, points), torch.eye(4, dtype=F64).repeat(2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RBF(0.0), "lengthscale must be finite and positive, got 0.0"),
        (lambda: RBF(1.0, -1.0), "variance must be finite and positive"),
        (lambda: RBF(bias=-0.1), "bias must be finite and not negative"),
        (lambda: Linear(math.inf), "variance must be finite"),
        (lambda: Linear(bias=math.nan), "bias must be finite"),
        (lambda: Polynomial(0), "degree must be a whole number of at least 1, got 0"),
        (lambda: Polynomial(1.5), "degree must be a whole number"),
        (lambda: Polynomial(2, bias=-1.0), "bias must be finite and not negative"),
    ],
)
def test_kernels_refuse_what_is_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ errors


def small_prior(likelihood: Any = None, kernel: Any = None) -> KernelPrior:
    likelihood = likelihood or Gaussian()
    return KernelPrior(kernel or RBF(), likelihood).update(task(likelihood, 8))


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda p: KernelPrior(RBF(), Gaussian(), 0.0), ValueError, "precision must be positive"),
        (lambda p: KernelPrior(RBF(), Gaussian(), num_outputs=0), ValueError, "num_outputs must"),
        (lambda p: KernelPrior(RBF(), Hinge), TypeError, "add the parentheses"),
        (lambda p: p.replace(precision=-1.0), ValueError, "precision must be positive"),
        (lambda p: p.replace(likelihood=Bernoulli()), ValueError, "learn anew for another loss"),
        (lambda p: p.forget([1, 99]), ValueError, r"ids \[99\] are not remembered"),
        (lambda p: p.forget([99], (normal(3, 3), normal(3))), ValueError, r"ids \[99\] are not"),
        (lambda p: p.forget([9], (normal(10, 3), normal(10))), ValueError, "were never learned"),
        (
            lambda p: small_prior(kernel=Linear()).memorise(3).forget(
                [20], (5 * normal(30, 3), normal(30))
            ), ValueError,
            "the curvature would be indefinite",
        ),
        (lambda p: p.update((normal(2, 3), normal(2)), ids=[1, 2]), ValueError, "occur already"),
        (lambda p: p.update((normal(2, 3), normal(2)), ids=[11, 11]), ValueError, "occur already"),
        (lambda p: p.update((normal(2, 3), normal(2)), ids=[11]), ValueError, "one id for each"),
        (lambda p: p.update((normal(2, 3), normal(2, 2))), ValueError, "do not fit outputs"),
        (lambda p: p.update((normal(0, 3), normal(0))), ValueError, "no examples"),
        (lambda p: p.update((normal(2, 3) / 0, normal(2))), NonFiniteError, "an input is NaN"),
        (lambda p: p.update((normal(2, 3), normal(2) / 0)), ValueError, "NaN or infinite"),
        (
            lambda p: p.update(Examples({"a": normal(2, 3)}, normal(2), torch.tensor([50, 51]))),
            TypeError, "one tensor of inputs, got a dict",
        ),
        (lambda p: p.memorise(), ValueError, "either how many examples to remember, or which"),
        (lambda p: p.memorise(2, ids=[1]), ValueError, "either how many"),
        (lambda p: p.memorise(0), ValueError, "at least 1 example, got 0"),
        (lambda p: p.memorise(ids=[70]), ValueError, r"ids \[70\] are not remembered"),
        (lambda p: p.memorise(ids=[]), ValueError, "are not remembered; expected some"),
        (lambda p: p.transfer(features=lambda x: x[1:]), ValueError, "made 7 inputs of 8"),
        (lambda p: p.transfer(kernel=lambda a, b: a), ValueError, r"the kernel made \(8, 3\) of"),
        (
            lambda p: p.transfer(kernel=lambda a, b: Linear()(a, 2 * b) + a[:, :1]), ValueError,
            "not symmetric",
        ),
        (lambda p: p.transfer(kernel=lambda a, b: -RBF()(a, b)), ValueError, "not positive semi"),
        (
            lambda p: p.transfer(kernel=lambda a, b: RBF()(a, b) / 0), NonFiniteError,
            "the kernel is NaN",
        ),
        (lambda p: p(replace(p.machine, kernel=RBF(2.0))), ValueError, "call prior.transfer"),
        (
            lambda p: p(replace(p.machine, coefficients=torch.zeros(8, 2, dtype=F64))), ValueError,
            "with 1 outputs",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(act, kind, message, tmp_path):
    prior = small_prior()
    before = prior.save(tmp_path / "a").read_bytes()
    with pytest.raises(kind, match=message):
        act(prior)
    assert prior.save(tmp_path / "b").read_bytes() == before


def test_a_memory_too_large_is_refused_before_anything_is_computed():
    def never(a: Tensor, b: Tensor) -> Tensor:
        raise AssertionError

    data = (torch.zeros(20_000, 1), torch.zeros(20_000))
    with pytest.raises(ValueError, match="beyond 2 GiB; call prior.memorise.*16,384 examples fit"):
        KernelPrior(never, Gaussian()).update(data)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([1.0, 2.0]), "are -1 and 1, or 0 and 1; got"),
        (torch.tensor([1.0, math.nan]), "are -1 and 1"),
        (torch.ones(2, 3), r"labels of shape \(2, 3\) do not fit outputs of shape \(2, 1\)"),
    ],
)
def test_hinge_refuses_other_labels(y, message):
    with pytest.raises(ValueError, match=message):
        small_prior(Hinge()).update((normal(2, 3), y))


def test_a_hinge_has_no_error_bars():
    prior = small_prior(Hinge())
    for ask in (prior.posterior, prior.predict):
        with pytest.raises(TypeError, match="no likelihood.*take Bernoulli"):
            ask(normal(2, 3))


def test_only_what_has_a_name_is_saved(tmp_path):
    own = small_prior(kernel=lambda a, b: RBF()(a, b))
    with pytest.raises(TypeError, match="cannot be saved: a file holds names"):
        own.save(tmp_path / "prior")
    assert list(tmp_path.iterdir()) == []
    prior = small_prior()
    state = prior.state_dict()
    with pytest.raises(ValueError, match="'Evil' is not known"):
        KernelPrior.from_state_dict({**state, "kernel": {"name": "Evil"}})
    file = checkpoint.save(tmp_path / "other", state, kind="prior")
    with pytest.raises(CheckpointError, match="holds a prior, expected a kernel prior"):
        KernelPrior.load(file)


def test_a_minimum_that_is_not_reached_is_an_error(monkeypatch):
    prior, _ = learned("Poisson")
    with pytest.raises(RuntimeError, match="the gradient's norm stopped at .* raise the precision"):
        prior._newton(torch.zeros(24, 1, dtype=F64), max_iterations=1)
    monkeypatch.setattr(kernel_methods._Box, "interior", lambda box: (0 * box.b, 0))
    monkeypatch.setattr(kernel_methods._Box, "active_set", lambda box, a, steps: (a, 0))
    with pytest.raises(RuntimeError, match="the duality gap stopped at .* nats"):
        small_prior(Hinge())


# ------------------------------------------------------------------ the benchmark


@pytest.mark.parametrize("machine", benchmark.MACHINES)
def test_the_benchmark_measures(machine):
    likelihood = benchmark.MACHINES[machine][0]
    past, new, test = (
        Examples(3 * normal(n, 140, seed=n), labels(likelihood, normal(n, seed=n + 1), 0), ids)
        for n, ids in ((20, torch.arange(20)), (4, torch.arange(50, 54)), (15, torch.arange(15)))
    )
    if machine != "logistic":
        assert max(benchmark.exact(machine, past, new, test.inputs).values()) < 1e-9
    found = benchmark.memory(machine, past, new, test)
    assert all(found["1"][name]["error"] < 1e-9 for name in ADAPTATIONS)
    assert all(found["1"][name]["certified"] for name in ADAPTATIONS)
    assert found["0.1"]["add"]["error"] > 1e-3
    assert set(benchmark.steps(machine, past, new)) == set(ADAPTATIONS)

"""Published methods against their formulas, written out the slow way: one loop for each sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Examples, Gaussian, KernelTerm, Prior, Recipe
from lifelong.data import head_mask
from lifelong.models import parameters, snapshot
from lifelong.terms import MemoryTerm, Regulariser, WeightTerm
from lifelong.testing import cases, laws
from lifelong.testing.cases import Case, Split
from lifelong.testing.reference import empirical_fisher, flatten, ggn, jacobian

NETWORKS = {case.name: case for case in cases.networks()}
HEADS = NETWORKS["mlp Categorical heads"]
SHARED = NETWORKS["mlp Categorical"]
by_head = pytest.mark.parametrize("case", [HEADS, SHARED], ids=["task heads", "shared head"])


def models(case: Case) -> list[nn.Module]:
    """The weights after each task: random, nothing is fitted."""
    return [case.make_model(task) for task in range(len(case.data))]


def after(prior: Prior, case: Case, tasks: int = 3) -> Prior:
    """The prior that has seen some tasks, each at the weights of ``models``."""
    for model, data in list(zip(models(case), case.data, strict=True))[:tasks]:
        prior = prior.update(model, data)
    return prior


# -------------------------------------------------------------------- FROMP (Pan et al. 2020)


def probabilities(model: nn.Module, data: Examples) -> Tensor:
    """m (M, H): the softmax over the head's outputs alone."""
    f = model(data.inputs)
    return torch.softmax(f if data.head is None else f[:, list(data.head)], dim=1)


def remembered(term: KernelTerm, case: Case) -> list[Examples]:
    """The memory of each task, in the order of the term's rows."""
    return [
        Examples(
            term.memory.inputs[block.start : block.stop],  # type: ignore[index]
            term.memory.labels[block.start : block.stop],
            head=case.data[task].head,
        )
        for task, block in enumerate(term.blocks)
    ]


def rows_of(model: nn.Module, value: Tensor) -> Tensor:
    """(M, P): the gradient of each of M values."""
    params = list(parameters(model).values())
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)])
            for v in value
        ]
    )


def kernel_term(prior: Prior) -> KernelTerm:
    (term,) = prior.terms
    assert isinstance(term, KernelTerm)
    return term


@by_head
def test_fromp_with_k_the_identity_is_half_a_square(case: Case) -> None:
    prior = after(lifelong.fromp(case.likelihood, memory=4, kernel="identity", strength=3.0), case)
    anchor = models(case)[-1]
    model = laws.moved(anchor)
    truth = torch.zeros((), dtype=torch.float64)
    for data in remembered(kernel_term(prior), case):
        gap = probabilities(model, data) - probabilities(anchor, data).detach()
        truth = truth + 3.0 * 0.5 * gap.square().sum()
    assert laws.distance(prior(model).detach(), truth.detach()) < 1e-13
    assert laws.distance(laws.slope(model, prior(model)), laws.slope(model, truth)) < 1e-13


@by_head
def test_fromp_gradient_by_a_jacobian_for_each_task_and_class(case: Case) -> None:
    """sum_s sum_c A(w)ᵀ K⁻¹ Dm with K = A* Sigma A*ᵀ + eps I, as the published code computes it."""
    delta, jitter = 0.1, 1e-4
    prior = lifelong.fromp(
        case.likelihood, memory=4, strength=1.0, prior_precision=delta, jitter=jitter
    )
    prior = after(prior, case)
    anchor = models(case)[-1]
    model = laws.moved(anchor)
    fisher = sum(
        ggn(m, data, case.likelihood).diagonal()
        for m, data in zip(models(case), case.data, strict=True)
    )
    sigma = 1 / (fisher + delta)
    gradient = torch.zeros(len(sigma), dtype=torch.float64)
    value = 0.0
    tasks = remembered(kernel_term(prior), case)
    assert len(tasks) == 3
    for data in tasks:
        m, m_old = probabilities(model, data), probabilities(anchor, data)
        for c in range(m.shape[1]):
            a_old, a = rows_of(anchor, m_old[:, c]), rows_of(model, m[:, c])
            k = (a_old * sigma) @ a_old.T + jitter * torch.eye(len(a), dtype=torch.float64)
            gap = (m[:, c] - m_old[:, c]).detach()
            solved = torch.linalg.solve(k, gap)
            value += 0.5 * float(gap @ solved)
            gradient += a.T @ solved
    assert abs(float(prior(model).detach()) / value - 1) < 1e-8
    assert laws.distance(laws.slope(model, prior(model)), gradient) < 1e-8


def test_fromp_counts_a_head_of_two_classes_twice() -> None:
    prior = after(lifelong.fromp(HEADS.likelihood, memory=4, strength=1.0), HEADS)
    model = laws.moved(models(HEADS)[-1])
    term = kernel_term(prior)
    for block, data in zip(term.blocks, remembered(term, HEADS), strict=True):
        gap = (probabilities(model, data) - block.mean).detach()
        assert block.precision is not None
        first, second = (0.5 * gap[:, c] @ block.precision[c] @ gap[:, c] for c in range(2))
        assert first > 0
        assert laws.distance(first, second) < 1e-8


@by_head
@pytest.mark.parametrize("kernel", ["gp", "identity"])
def test_fromp_is_zero_and_flat_at_the_start_of_a_task(case: Case, kernel: str) -> None:
    prior = lifelong.fromp(case.likelihood, memory=4, strength=1.0, kernel=kernel)  # type: ignore[arg-type]
    prior, anchor = after(prior, case), models(case)[-1]
    assert float(prior(anchor).detach()) < 1e-20
    other = laws.moved(anchor)
    size = laws.slope(other, prior(other)).norm()
    assert size > 1e-3
    assert laws.slope(anchor, prior(anchor)).norm() < 1e-9 * size


@settings(max_examples=10)
@given(features=st.integers(1, 4), seed=st.integers(0, 100))
def test_fromp_of_a_linear_model_with_a_spanning_memory_is_the_weight_space_quadratic(
    features: int, seed: int
) -> None:
    """½ Dmᵀ (X Sigma Xᵀ)⁻¹ Dm = ½ dᵀ Sigma⁻¹ d where X is square and invertible."""
    delta, likelihood = 0.3, Gaussian(0.7)
    (data,) = cases.draw(likelihood, (features,), 1, size=8, heads=(None,), seed=seed)
    model = cases.linear(features, 1, bias=False)(seed)
    prior = lifelong.fromp(
        likelihood, memory=features, strength=1.0, prior_precision=delta, jitter=1e-14
    )
    x = lifelong.memorise(model, data, likelihood, budget=features).inputs
    if float(torch.linalg.cond(x)) > 100:  # type: ignore[arg-type]
        return
    prior = prior.update(model, data)
    other = laws.moved(model)
    d = laws.weights(other) - laws.weights(model)
    precision = ggn(model, data, likelihood).diagonal() + delta
    truth = 0.5 * (precision * d * d).sum()
    assert laws.distance(prior(other).detach(), truth) < 1e-8
    assert laws.distance(laws.slope(other, prior(other)), precision * d) < 1e-8


# -------------------------------------------------------------------- EWC and the Fisher


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
@by_head
def test_the_curvature_does_not_change_with_the_batch_size(case: Case, structure: str) -> None:
    prior = lifelong.online_laplace(case.likelihood, structure=structure)  # type: ignore[arg-type]
    model = case.make_model(0)
    found = []
    for batch_size in (1, 5, 512):
        weight = prior.update(model, case.data[0], batch_size=batch_size).weight
        assert weight is not None
        assert weight.curvature is not None
        found.append(torch.cat([v.flatten() for v in weight.curvature.diagonal().values()]))
    assert laws.distance(found[0], found[2]) < 1e-13
    assert laws.distance(found[1], found[2]) < 1e-13


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_the_curvature_of_unused_heads_is_exactly_zero(estimator: str) -> None:
    prior = lifelong.ewc(HEADS.likelihood, estimator=estimator)  # type: ignore[arg-type]
    seen = [False] * 6
    for model, data in zip(models(HEADS), HEADS.data, strict=True):
        prior = prior.update(model, data)
        for c in data.head or ():
            seen[c] = True
        weight = prior.weight
        assert weight is not None
        assert weight.curvature is not None
        diagonal = weight.curvature.diagonal()
        for name in ("2.weight", "2.bias"):
            nonzero = diagonal[name].flatten(1).any(1) if name == "2.weight" else diagonal[name] > 0
            assert nonzero.tolist() == seen, name


def test_the_exact_fisher_is_the_expectation_over_labels() -> None:
    """sum_i sum_c p_c g_c², with g_c the gradient of -log p_c of one example: C passes for each."""
    model, data, likelihood = HEADS.make_model(0), HEADS.data[0], HEADS.likelihood
    mask = head_mask(data.head, 6)
    fisher = torch.zeros(len(laws.weights(model)), dtype=torch.float64)
    for i in range(len(data)):
        for c in data.head or ():
            f = likelihood.mask(model(data.inputs[i : i + 1]), mask)
            p = torch.softmax(f, 1)[0, c].detach()
            g = laws.slope(model, likelihood.nll(f, torch.tensor([c])).sum())
            fisher += p * g**2
    curvatures = {
        estimator: torch.cat(
            [
                v.flatten()
                for v in lifelong.diagonal_curvature(
                    model, data, likelihood, estimator=estimator, num_samples=samples
                ).values.values()
            ]
        )
        for estimator, samples in (("exact", 1), ("mc", 2000), ("empirical", 1))
    }
    assert laws.distance(curvatures["exact"], fisher) < 1e-13
    assert laws.distance(curvatures["mc"], fisher) < 0.05
    assert laws.distance(curvatures["empirical"], fisher) > 0.1
    empirical = empirical_fisher(model, data, likelihood).diagonal()
    assert laws.distance(curvatures["empirical"], empirical) < 1e-13


@settings(max_examples=8)
@given(features=st.integers(1, 4), seed=st.integers(0, 100))
def test_online_laplace_is_recursive_bayes_on_linear_regression(features: int, seed: int) -> None:
    """Lambda <- Lambda + XᵀX / sigma²,  m <- Lambda⁻¹ (Lambda m + Xᵀy / sigma²), from I delta."""
    delta, likelihood = 0.4, Gaussian(0.7)
    heads = (None,) * 3
    data = cases.draw(likelihood, (features,), 1, size=6, heads=heads, seed=seed)
    case = Case("regression", cases.linear(features, 1, bias=False), likelihood, data)
    precision = delta * torch.eye(features, dtype=torch.float64)
    mean = torch.zeros(features, dtype=torch.float64)
    for task in data:
        x, y = task.inputs, task.labels.flatten() / 0.49
        new = precision + x.T @ x / 0.49  # type: ignore[union-attr, operator]
        mean, precision = torch.linalg.solve(new, precision @ mean + x.T @ y), new  # type: ignore[union-attr, operator]
    prior = lifelong.online_laplace(likelihood, structure="dense", precision=delta)
    model, prior = laws.learn(prior, case, tasks=3)
    assert laws.distance(laws.weights(model), mean) < 1e-10
    assert prior.weight is not None
    curvature = prior.weight.curvature
    assert isinstance(curvature, lifelong.Dense)
    eye = torch.eye(features, dtype=torch.float64)
    assert laws.distance(curvature.matrix + delta * eye, precision) < 1e-12


def test_an_anchor_for_each_task_is_not_bayes() -> None:
    """Huszár's point: the later anchors hold the earlier tasks already, which count again."""
    case = cases.linear_gaussian()
    model, terms = case.make_model(0), ()
    for data in case.data:
        past = Prior(case.likelihood, terms=terms)
        model = laws.minimum(
            model, lambda m, p=past, d=data: laws.nats(case.likelihood, m, d) + p(m)
        )
        fisher = lifelong.dense_curvature(model, data, case.likelihood)
        terms = (*terms, WeightTerm(snapshot(parameters(model)), None, fisher))
    batch = laws.retrained(case, model, Regulariser(), *case.data)
    assert laws.distance(laws.weights(model), laws.weights(batch)) > 0.01
    online = lifelong.online_laplace(case.likelihood, structure="dense", precision=0.0)
    assert laws.add(online, case, tasks=3) < 1e-10
    assert laws.add(lifelong.ewc(Gaussian(1.0)), cases.orthogonal(), tasks=3) > 0.01


# -------------------------------------------------------------------- K-priors and distillation


@pytest.mark.parametrize("name", [case.name for case in cases.glms()])
@pytest.mark.parametrize("memory", [0, 6, None])
def test_the_error_of_a_kprior_is_the_sum_over_those_left_out(
    name: str, memory: int | None
) -> None:
    """grad base - grad K = sum over the forgotten of phi (h(f) - h(f*)), at every weight."""
    case = {c.name: c for c in cases.glms()}[name]
    prior = lifelong.kprior(case.likelihood, precision=0.5, memory=memory)
    anchor, kprior = laws.learn(prior, case, tasks=1)
    data, items = case.data[0], kprior.memory
    kept = torch.empty(0, dtype=torch.int64) if items is None else items.origin
    left = data[(~torch.isin(data.ids, kept)).nonzero().squeeze(1)]
    for seed in range(3):
        model = laws.moved(anchor, by=1.0, seed=seed)
        base = laws.slope(model, laws.nats(case.likelihood, model, data) + prior(model))
        error = torch.zeros_like(base)
        if len(left):
            mask = head_mask(data.head, len(anchor.bias))  # type: ignore[arg-type]
            mean = [
                case.likelihood.mean(case.likelihood.mask(m(left.inputs), mask))
                for m in (model, anchor)
            ]
            j = flatten(jacobian(model, left.inputs))
            error = torch.einsum("ncp,nc->p", j, (mean[0] - mean[1]).detach())
        gap = base - laws.slope(model, kprior(model)) - error
        assert float(gap.norm() / base.norm()) < 1e-10
    assert memory is not None or not len(left)


def test_the_error_of_a_kprior_falls_as_its_memory_grows() -> None:
    case = {c.name: c for c in cases.glms(size=30)}["multinomial"]
    errors = []
    for memory in (0, 6, 12, 18, 24, 30):
        prior = lifelong.kprior(case.likelihood, precision=0.5, memory=memory)
        anchor, kprior = laws.learn(prior, case, tasks=1)
        gaps = []
        for seed in range(10):
            model = laws.moved(anchor, by=1.0, seed=seed)
            base = laws.nats(case.likelihood, model, case.data[0]) + prior(model)
            gaps.append(laws.distance(laws.slope(model, kprior(model)), laws.slope(model, base)))
        errors.append(sum(gaps) / len(gaps))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 < errors[-2]


@pytest.mark.parametrize("name", ["mlp Categorical", "conv Poisson", "mlp Categorical heads"])
def test_the_error_of_gradient_reconstruction_has_two_parts(name: str) -> None:
    """(a) sum over the left out of J(w)ᵀ (h - h*), and (b) sum of all (J(w) - J*)ᵀ r: for any
    network, where no quadratic stands for those who are left out (Daxberger et al. 2023)."""
    case = NETWORKS[name]
    anchor, data, f = case.make_model(0), case.data[0], case.likelihood
    prior = Prior(f, Recipe(gradient="stored"), (Regulariser(0.5),))
    items = Split("half", memory=0.5).remember(case, anchor, 0)
    assert items is not None
    after_task = prior.recall(anchor, data, items)
    model = laws.moved(anchor, by=0.5)
    mask = head_mask(data.head, anchor(data.inputs).shape[1])
    outputs, before = (f.mask(m(data.inputs), mask).detach() for m in (model, anchor))
    j, j_old = (flatten(jacobian(m, data.inputs)) for m in (model, anchor))
    moved_mean = f.mean(outputs) - f.mean(before)
    left = ~torch.isin(data.ids, items.origin)
    a = torch.einsum("ncp,nc->p", j[left], moved_mean[left])
    b = torch.einsum("ncp,nc->p", j - j_old, f.residual(before, data.labels))
    truth = laws.slope(model, laws.nats(f, model, data) + prior(model))
    error = truth - laws.slope(model, after_task(model))
    assert error.norm() > 1e-2
    assert laws.distance(error, a + b) < 1e-12


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
def test_distillation_and_the_residual_make_the_true_label(seed: int, classes: int) -> None:
    """CE(q, f) + f · (q - y) = CE(y, f) for every distribution q."""
    generator = torch.Generator().manual_seed(seed)
    f = 3 * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    q = torch.softmax(torch.randn(5, classes, generator=generator, dtype=torch.float64), 1)
    y = torch.randint(classes, (5,), generator=generator)
    likelihood = Categorical()
    onehot = torch.nn.functional.one_hot(y, classes)
    left = likelihood.nll(f, q) + (f * (q - onehot)).sum(1)
    assert laws.distance(left, likelihood.nll(f, y)) < 1e-13


@pytest.mark.parametrize("name", [n for n in NETWORKS if n.startswith("mlp")])
def test_distillation_is_the_ggn_to_second_order(name: str) -> None:
    """KL(p* ‖ p) = ½ dᵀ GGN d + O(‖d‖³): half the step, an eighth of the difference."""
    case = NETWORKS[name]
    anchor, data = case.make_model(0), case.data[0]
    items = lifelong.memorise(anchor, data, case.likelihood)
    prior = Prior(case.likelihood, terms=(MemoryTerm(items),))
    g = ggn(anchor, data, case.likelihood)
    gaps = []
    for step in (0.02, 0.01, 0.005):
        model = laws.moved(anchor, by=step)
        d = laws.weights(model) - laws.weights(anchor)
        value, quadratic = float(prior(model).detach()), float(0.5 * d @ g @ d)
        gaps.append(abs(value - quadratic))
        assert gaps[-1] < 0.2 * quadratic
    assert 6 < gaps[0] / gaps[1] < 10
    assert 6 < gaps[1] / gaps[2] < 10


# -------------------------------------------------------------------- SI (Zenke et al. 2017)


def walk(
    case: Case, prior: Prior, *, lr: float, length: float
) -> tuple[nn.Module, nn.Module, lifelong.PathIntegral]:
    """(start, end, path) of gradient descent on nll.mean() + prior / n, ``length`` / lr steps."""
    start, data = case.make_model(0), case.data[0]
    model = laws.moved(start, by=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with lifelong.PathIntegral(model, optimizer, prior, len(data)) as path:
        for _ in range(round(length / lr)):
            optimizer.zero_grad()
            loss = prior.loss(model, data.inputs, data.labels, num_data=len(data), head=data.head)
            loss.backward()
            optimizer.step()
    return start, model, path


@pytest.mark.parametrize("precision", [0.0, 3.0])
def test_the_path_integral_is_the_loss_that_was_won(precision: float) -> None:
    """sum_j omega_j = decrease of the data's own loss, up to the size of a step; whatever the
    prior wins or loses beside it."""
    prior = lifelong.weight_decay(SHARED.likelihood, precision=precision)
    gaps = []
    for lr in (0.02, 0.01):
        start, end, path = walk(SHARED, prior, lr=lr, length=2.0)
        data = SHARED.data[0]
        before, now = (
            laws.nats(SHARED.likelihood, m, data).item() / len(data) for m in (start, end)
        )
        omega = sum(float(v.sum()) for v in path.omega.values())
        assert before - now > 0.01
        gaps.append(abs(omega - (before - now)) / (before - now))
    assert gaps[0] < 0.05
    assert 1.6 < gaps[0] / gaps[1] < 2.4  # first order in the step


def test_path_importance_can_be_negative_before_it_is_clipped() -> None:
    """A weight that the prior pulls against the data loses by its path."""
    prior = lifelong.weight_decay(SHARED.likelihood, precision=30.0)
    _, end, path = walk(SHARED, prior, lr=0.02, length=0.5)
    raw = torch.cat([v.flatten() for v in path.curvature(0.1, clip=False).values.values()])
    clipped = torch.cat([v.flatten() for v in path.curvature(0.1).values.values()])
    assert raw.min() < 0 < raw.max()
    assert torch.equal(clipped, raw.clamp(min=0))
    si = lifelong.si(SHARED.likelihood, strength=2.0).update(end, SHARED.data[0], path=path)
    other = laws.moved(end)
    d, start = laws.weights(other) - laws.weights(end), SHARED.make_model(0)
    delta = laws.weights(end) - laws.weights(start)
    omega = torch.cat([v.flatten() for v in path.omega.values()]) * len(SHARED.data[0])
    big_omega = (omega / (delta**2 + 0.1)).clamp(min=0)
    truth = 2.0 * (big_omega * d * d).sum()  # c sum Omega d², in nats
    assert laws.distance(si(other).detach(), truth) < 1e-12


def test_soft_labels_of_an_old_task_are_asked_again() -> None:
    """K-priors and FROMP compare with the newest model, DER with the one of each task's end."""
    last = models(HEADS)[-1]
    for preset, fresh in ((lifelong.kprior, True), (lifelong.der, False)):
        memory = after(preset(HEADS.likelihood, memory=12), HEADS).memory
        assert memory is not None
        first = memory[(memory.task == 0).nonzero().squeeze(1)]
        with torch.no_grad():
            now = last(first.inputs)
        assert torch.equal(first.reference, now) == fresh

"""Compact memory: exact where it should be, and how the EM and the closed form relate."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benchmarks import compact as benchmark
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lifelong
from lifelong import (
    Bernoulli,
    Categorical,
    Examples,
    Gaussian,
    NonFiniteError,
    Poisson,
    Prior,
    compact,
)
from lifelong.compact import (
    CompactMemory,
    compress,
    curvature_rows,
    features,
    learn,
    match_closed_form,
    match_em,
    match_with_constant,
    scale_of,
)
from lifelong.learner import adam
from lifelong.recipe import Recipe
from lifelong.testing import laws, reference

F64 = torch.float64


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gram(rows: Tensor) -> Tensor:
    return rows.T @ rows


def logistic(u: Tensor) -> Tensor:
    """lambda of one logit with weights 1, 2, ..."""
    f = u @ torch.arange(1.0, u.shape[1] + 1, dtype=u.dtype)
    return torch.sigmoid(f) * torch.sigmoid(-f)


def spread(sizes: list[float], rows: int = 30, seed: int = 0) -> Tensor:
    """Rows whose S has these eigenvalues."""
    q = torch.linalg.qr(normal(rows, len(sizes), seed=seed)).Q
    v = torch.linalg.qr(normal(len(sizes), len(sizes), seed=seed + 1)).Q
    return q @ (torch.tensor(sizes, dtype=F64).sqrt().unsqueeze(1) * v)


def total(head: nn.Module, likelihood: Any, data: list[Any], precision: float) -> Tensor:
    nll = sum(likelihood.nll(head(x), y).sum() for x, y in data)
    return nll + 0.5 * precision * sum(p.square().sum() for p in head.parameters())


def _fit(head: nn.Linear, likelihood: Any, x: Tensor, y: Tensor, prior: Prior) -> None:
    reference.minimise(head, lambda: likelihood.nll(head(x), y).sum() + prior(head))


def run(
    likelihood: Any, outputs: int, prior: Prior,
    *, tasks: int = 3, rank: int = 4, bias: bool = False,
) -> tuple[nn.Linear, Prior, list[Any]]:  # fmt: skip
    """Tasks of features in one subspace of R^6, each learned to its minimum."""
    head, basis, past = nn.Linear(6, outputs, bias=bias, dtype=F64), normal(rank, 6, seed=9), []
    for t in range(tasks):
        x = normal(30, rank, seed=10 + t) @ basis
        y = normal(30, outputs, seed=20 + t)
        if isinstance(likelihood, Bernoulli):
            y = (y > 0).double()
        elif isinstance(likelihood, Categorical):
            y = y.argmax(1)
        _fit(head, likelihood, x, y, prior)
        past.append((x, y))
        prior = prior.update(head, past[-1])
    return head, prior, past


# ------------------------------------------------------------------ exact


@pytest.mark.parametrize("bias", [False, True])
def test_linear_regression_with_a_memory_of_the_rank_reproduces_all_of_the_past(bias):
    """Loss, gradient and Hessian, to 1e-8, at any weights, after three tasks."""
    likelihood = Gaussian(0.7)
    prior = lifelong.compact_memory(likelihood, memory=4 + bias, total=True, precision=0.3)
    head, prior, past = run(likelihood, 3, prior, bias=bias)
    assert len(prior.memory or ()) == 4 + bias

    def truth() -> Tensor:
        return total(head, likelihood, past, 0.3)

    def differences() -> tuple[float, float, float]:
        constant = float((truth() - prior(head)).detach())
        gradient = laws.slope(head, truth()) - laws.slope(head, prior(head))
        hessian = laws.hessian(head, truth())
        return (
            constant,
            float(gradient.norm()),
            laws.distance(laws.hessian(head, prior(head)), hessian),
        )

    constant, _, _ = differences()
    head = laws.moved(head, by=1.0)  # type: ignore[assignment]
    there, gradient, hessian = differences()
    assert abs(there - constant) < 1e-8 * float(truth().detach())
    assert gradient < 1e-8 * float(laws.slope(head, truth()).norm())
    assert hessian < 1e-8


@pytest.mark.parametrize(
    ("method", "bias"), [("closed_form", False), ("closed_form", True), ("em", False)]
)
def test_a_memory_that_spans_has_the_gradient_of_a_kprior_in_regression(method, bias):
    """With every direction in memory, the K-prior of all examples and the compact one agree."""
    options = {"method": method, "damping": 1.0, "iterations": 3000}
    prior = lifelong.compact_memory(Gaussian(), memory=7, total=True, precision=0.5, **options)
    head, prior, past = run(Gaussian(), 2, prior, tasks=1, rank=6, bias=bias)
    full = lifelong.kprior(Gaussian(), memory=None, precision=0.5).update(head, past[0])
    head = laws.moved(head)  # type: ignore[assignment]
    a, b = (laws.slope(head, p(head)) for p in (prior, full))
    # The EM's fixed point has eps less of each eigenvalue, in units of lambda.
    assert laws.distance(a, b) < (1e-10 if method == "closed_form" else 0.1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("likelihood", "outputs"), [(Bernoulli(), 1), (Poisson(), 1)])
def test_the_curvature_of_one_output_is_matched_at_the_anchor(likelihood, outputs, bias):
    prior = lifelong.compact_memory(likelihood, memory=7, precision=0.5)
    x, y = 0.5 * normal(30, 6), (normal(30, 1, seed=1) > 0).double()
    head = nn.Linear(6, outputs, bias=bias, dtype=F64)
    reference.minimise(head, lambda: likelihood.nll(head(x), y).sum() + prior(head))
    prior = prior.update(head, (x, y))
    truth = total(head, likelihood, [(x, y)], 0.5)
    assert float(laws.slope(head, prior(head)).norm()) < 1e-9  # flat at theta*, as the truth is
    hessian = laws.hessian(head, truth)
    assert laws.distance(laws.hessian(head, prior(head)), hessian) < 1e-9


def test_of_several_classes_the_sum_of_the_diagonal_blocks_is_matched():
    prior = lifelong.compact_memory(Categorical(), memory=6)
    head, prior, past = run(Categorical(), 3, prior, tasks=1, rank=6)
    full = lifelong.kprior(Categorical(), memory=None).update(head, past[0])

    def blocks(p: Prior) -> Tensor:
        matrix = laws.hessian(head, p(head)).reshape(3, 6, 3, 6)
        return matrix.diagonal(dim1=0, dim2=2).sum(-1)

    assert laws.distance(blocks(prior), blocks(full)) < 1e-9
    # What that leaves out: the blocks themselves differ.
    assert laws.distance(laws.hessian(head, prior(head)), laws.hessian(head, full(head))) > 1e-3


# ------------------------------------------------------------------ closed form


SHAPES = {"n": st.integers(1, 12), "p": st.integers(1, 8), "k": st.integers(1, 10)}


@given(**SHAPES, seed=st.integers(0, 1000))
def test_the_closed_form_is_the_best_of_its_rank(n, p, k, seed):
    rows = normal(n, p, seed=seed)
    found = match_closed_form(rows, k, logistic)
    assert len(found) == min(k, n, p)
    assert torch.allclose(found.vectors.norm(dim=1), torch.ones(len(found), dtype=F64))
    assert bool((found.weights > 0).all())
    values, vectors = torch.linalg.eigh(gram(rows))
    values, vectors = values[-len(found) :], vectors[:, -len(found) :]
    best = vectors @ (values.unsqueeze(1) * vectors.T)
    assert laws.distance(gram(found.rows(logistic)), best) < 1e-7


@given(**SHAPES, seed=st.integers(0, 1000))
def test_with_a_constant_mass_and_mean_are_exact(n, p, k, seed):
    weight = normal(n, seed=seed + 1).abs() + 0.1
    x = normal(n, p, seed=seed)
    rows = weight.sqrt().unsqueeze(1) * torch.cat([x, torch.ones(n, 1, dtype=F64)], 1)
    found = match_with_constant(rows, k)
    assert len(found) == min(k, 1 + min(n - 1, p))
    assert torch.equal(found.vectors[:, -1], torch.ones(len(found), dtype=F64))
    assert torch.allclose(found.weights, found.weights[:1])
    matched, S = gram(found.rows()), gram(rows)
    assert torch.allclose(matched[-1], S[-1], atol=1e-9)
    mean = S[-1, :-1] / S[-1, -1]
    left = S - matched  # scatter of the directions that were left out: never negative
    assert float(torch.linalg.eigvalsh(left).min()) > -1e-8 * float(S.diagonal().sum())
    assert torch.allclose(found.vectors.mean(0)[:-1], mean, atol=1e-9)
    if k > min(n - 1, p):
        assert laws.distance(matched, S) < 1e-7


def test_vectors_are_signed_the_same_way_each_time():
    rows = normal(9, 5)
    one, other = match_closed_form(rows, 3), match_closed_form(rows.flip(0), 3)
    assert torch.allclose(one.vectors, other.vectors)
    assert bool((one.vectors.gather(1, one.vectors.abs().argmax(1, keepdim=True)) > 0).all())


@given(n=st.integers(1, 20), p=st.integers(1, 8), seed=st.integers(0, 100))
def test_compressed_rows_have_the_same_curvature(n, p, seed):
    rows = normal(n, p, seed=seed)
    assert len(compress(rows)) <= min(n, max(p, 1))
    assert torch.allclose(gram(compress(rows)), gram(rows), atol=1e-10)


# ------------------------------------------------------------------ EM


def span_error(rows: Tensor, found: CompactMemory) -> float:
    """1 - mean cos² of the angles to the leading eigenvectors."""
    V = torch.linalg.svd(rows, full_matrices=False)[2][: len(found)]
    return float(1 - (V @ torch.linalg.qr(found.vectors.T).Q).square().sum() / len(found))


@pytest.mark.parametrize("rows", [4, 30], ids=["fewer rows than features", "more"])
def test_em_with_a_large_eps_ends_at_the_eigenvectors_with_eps_off_the_eigenvalues(rows):
    sizes = [900.0, 500.0, 260.0] + [20.0] * (1 if rows == 4 else 4)
    A = spread(sizes, 30) if rows > 8 else compress(spread([*sizes, 0.0, 0.0], 30))[:4]
    if rows == 4:
        s, V = torch.linalg.svd(spread([900.0, 500.0, 260.0, 20.0, 1e-12, 1e-12]))[1:]
        A = s[:4].unsqueeze(1) * V[:4]
    start = CompactMemory(normal(3, A.shape[1], seed=3), torch.ones(3, dtype=F64))
    found = match_em(A, start, damping=100.0, iterations=300)
    assert span_error(A, found) < 1e-10
    values = torch.linalg.eigvalsh(gram(found.rows()))[-3:]
    assert torch.allclose(values, torch.tensor([160.0, 400.0, 800.0], dtype=F64), rtol=1e-6)
    closed = match_closed_form(A, 3)
    assert laws.distance(gram(found.rows()), gram(closed.rows())) < 0.2  # 100 less of each


def test_em_with_a_small_eps_finds_the_span_and_keeps_the_scale():
    A = spread([2000.0, 1500.0, 1100.0, 50.0, 20.0, 1.0])
    start = CompactMemory(normal(3, 6, seed=3), torch.ones(3, dtype=F64))
    found = match_em(A, start, damping=1e-4, iterations=100)
    assert span_error(A, found) < 1e-10
    assert float(found.weights.sum()) < 0.02 * float(match_closed_form(A, 3).weights.sum())
    early = match_em(A, start, damping=1e-4, iterations=30)
    assert float((found.weights - early.weights).abs().max()) < 0.1  # 2 eps in each iteration
    # One more iteration changes nothing to speak of: a fixed point but for the scale.
    again = match_em(A, found, damping=1e-4, iterations=1)
    assert torch.allclose(again.vectors, found.vectors, atol=1e-4)


@given(
    s=st.floats(1.0, 1e4), eps=st.floats(1e-5, 0.5), c=st.floats(0.01, 10.0),
)  # fmt: skip
def test_the_scale_of_em_moves_as_the_formula_says(s, eps, c):
    """c'/c = ((s c + s eps) / (s c + eps c + eps²))² ~ 1 + 2 eps (1/c - 1/s)."""
    row, one = torch.tensor([[s**0.5]], dtype=F64), torch.ones(1, 1, dtype=F64)
    found = match_em(row, CompactMemory(one, one[0] * c), damping=eps, iterations=1)
    expected = ((s * c + s * eps) / (s * c + eps * c + eps**2)) ** 2
    assert float(found.weights[0]) / c == pytest.approx(expected, rel=1e-8)


def test_em_with_a_large_eps_and_lambda_solves_the_equation():
    A = spread([900.0, 500.0, 260.0, 20.0])
    start = CompactMemory(normal(3, 4, seed=3), torch.ones(3, dtype=F64))
    found = match_em(A, start, logistic, damping=100.0, iterations=2000)
    values = torch.linalg.eigvalsh(gram(found.rows(logistic)))[-3:]
    assert torch.allclose(values, torch.tensor([160.0, 400.0, 800.0], dtype=F64), rtol=1e-5)


def test_em_takes_vectors_that_depend_on_each_other():
    A = spread([900.0, 500.0, 260.0])
    start = CompactMemory(normal(8, 3, seed=3).repeat(2, 1), torch.ones(16, dtype=F64))
    found = match_em(A, start, logistic, damping=1e-4, iterations=50)
    assert bool(found.vectors.isfinite().all())
    assert bool((found.weights > 0).all())
    assert torch.allclose(found.vectors.norm(dim=1), torch.ones(16, dtype=F64))


# ------------------------------------------------------------------ in a prior


METHODS = ["closed_form", "em"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("likelihood", "outputs"), [(Bernoulli(), 1), (Categorical(), 3), (Gaussian(), 2)]
)
def test_it_grows_by_a_task_and_is_learned_again_and_round_trips(
    method, likelihood, outputs, tmp_path
):
    prior = lifelong.compact_memory(likelihood, memory=2, method=method, iterations=5)
    head, prior, _ = run(likelihood, outputs, prior, tasks=2)
    memory = prior.memory
    assert memory is not None
    assert len(memory) == 4
    assert set(memory.labels.tolist()) == set(memory.origin.tolist()) == {-1}
    assert float(memory.hard_weight.abs().sum()) == 0
    assert torch.allclose(torch.as_tensor(memory.inputs).norm(dim=1), torch.ones(4, dtype=F64))
    laws.round_trip(prior, head, tmp_path)
    data = (normal(9, 6), _labels(likelihood, outputs))
    generator = torch.Generator().manual_seed(0)
    with laws.untouched(head):
        prior.update(head, data, generator=generator)


def _labels(likelihood: Any, outputs: int) -> Tensor:
    if isinstance(likelihood, Categorical):
        return torch.arange(9) % outputs
    return torch.ones(9, outputs, dtype=F64)


def test_the_same_generator_gives_the_same_memory_and_the_closed_form_needs_none():
    x, y = normal(20, 4), torch.arange(20) % 3
    head = nn.Linear(4, 3, bias=False, dtype=F64)
    for method in METHODS:
        prior = lifelong.compact_memory(Categorical(), memory=3, method=method)  # type: ignore[arg-type]
        draws = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
        a, b, c = (prior.update(head, (x, y), generator=g).memory for g in draws)
        assert a is not None and b is not None and c is not None  # noqa: PT018
        assert torch.equal(torch.as_tensor(a.inputs), torch.as_tensor(b.inputs))
        same = torch.equal(torch.as_tensor(a.inputs), torch.as_tensor(c.inputs))
        assert same == (method == "closed_form")


def test_the_strength_multiplies_the_curvature_of_new_data():
    x, y = normal(20, 4), normal(20, 2, seed=1)
    head = nn.Linear(4, 2, dtype=F64)
    one, three = (
        lifelong.compact_memory(Gaussian(), memory=5, strength=s, precision=0.0).update(
            head, (x, y)
        )
        for s in (1.0, 3.0)
    )  # fmt: skip
    other = laws.moved(head)
    assert torch.allclose(three(other), 3 * one(other))


def test_many_examples_and_batches_give_the_same_memory():
    x, y = normal(300, 4).float(), torch.arange(300) % 3
    head = nn.Linear(4, 3)
    rows = [curvature_rows(head, (x, y), Categorical(), batch_size=size) for size in (7, 100, 1000)]
    assert all(len(r) == 5 and r.dtype == F64 for r in rows)
    assert all(torch.allclose(gram(r), gram(rows[0])) for r in rows)


def test_lambda_is_never_so_small_that_a_weight_explodes():
    head = nn.Linear(1, 1, bias=False, dtype=F64)
    nn.init.constant_(head.weight, 100.0)
    smallest = float(scale_of(head, Bernoulli())(torch.ones(1, 1, dtype=F64)))
    assert smallest == pytest.approx(1e-4)
    nn.init.constant_(head.weight, 1.0)
    exact = float(scale_of(head, Gaussian(1e3))(torch.ones(1, 1, dtype=F64)))
    assert exact == pytest.approx(1e-6)


def test_features_of_a_frozen_extractor():
    extractor = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    x, y = torch.randn(11, 1, 4, 4), torch.arange(11) % 2
    data = Examples(x, y, ids=torch.arange(100, 111), head=(0, 1))
    with laws.untouched(extractor):
        found = features(extractor, data, constant=True, batch_size=4)
    inputs = torch.as_tensor(found.inputs)
    assert inputs.shape == (11, 9)
    assert not inputs.requires_grad
    assert torch.equal(inputs[:, -1], torch.ones(11))
    assert torch.equal(found.ids, data.ids)
    assert found.head == (0, 1)
    with lifelong.evaluating(extractor), torch.no_grad():
        assert torch.allclose(inputs[:, :-1], extractor(x).flatten(1), atol=1e-6)
    assert torch.as_tensor(features(nn.Identity(), (x, y)).inputs).shape == (11, 16)


@pytest.mark.parametrize("bias", [False, True])
def test_in_the_learner_class_by_class(bias):
    centres = 4 * torch.eye(6, 8)
    y = torch.arange(240) % 6
    data = Examples(centres[y] + torch.randn(240, 8, generator=torch.Generator().manual_seed(1)), y)
    stream = lifelong.split_by_class(data, data, classes_per_task=2, scenario="class")
    accuracies = []
    for prior in (
        lifelong.compact_memory(Categorical(), memory=4, precision=1e-2),
        lifelong.weight_decay(Categorical(), precision=1e-2),
    ):
        head = nn.Linear(8, 6, bias=bias)
        learner = lifelong.Learner(head, prior, optimizer=adam(1e-2), epochs=30)
        accuracies.append(learner.run(stream).average_accuracy)
    assert accuracies[0] > accuracies[1] + 0.2


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("iterations", [1, 10])
def test_em_leaves_out_what_lies_across_all_rows(iterations):
    """Of no curvature at all: the others are as without it."""
    A = torch.cat([normal(6, 3), torch.zeros(6, 1, dtype=F64)], dim=1)
    along, across = torch.eye(4, dtype=F64)[:2], torch.eye(4, dtype=F64)[3:]
    start = CompactMemory(torch.cat([along, across]), torch.ones(3, dtype=F64))
    found = match_em(A, start, logistic, iterations=iterations)
    truth = match_em(A, start[:2], logistic, iterations=iterations)
    assert torch.allclose(gram(found.rows(logistic)), gram(truth.rows(logistic)))
    with pytest.raises(ValueError, match="no vector of the start has a part along"):
        match_em(A, start[2:], logistic, iterations=iterations)


ROWS = normal(5, 3)
START = CompactMemory(normal(2, 3), torch.ones(2, dtype=F64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: match_closed_form(ROWS, 0), "at least one vector, got k=0"),
        (lambda: match_closed_form(ROWS[0], 1), r"rows of shape \(R, P\), got \(3,\)"),
        (lambda: match_closed_form(ROWS[:0], 1), r"rows of shape \(R, P\), got \(0, 3\)"),
        (lambda: match_closed_form(0 * ROWS, 1), "nothing that a memory could hold"),
        (lambda: match_with_constant(ROWS * torch.tensor([1, 1, 0]), 2), "append a 1"),
        (lambda: match_em(ROWS, START, damping=0.0), "damping of EM must be positive.*got 0.0"),
        (lambda: match_em(ROWS, START, damping=float("nan")), "damping of EM must be positive"),
        (lambda: match_em(ROWS, START, iterations=0), "at least one iteration, got 0"),
        (lambda: match_em(ROWS[:, :2], START), r"shape \(K, 2\), as wide as the rows, got \(2, 3"),
        (lambda: match_em(ROWS, START[:0]), r"got \(0, 3\)"),
        (lambda: match_em(ROWS, CompactMemory(0 * START.vectors, START.weights)), "start is 0"),
    ],
)
def test_bad_matrices(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_finite():
    rows = ROWS.clone()
    rows[1, 1] = float("nan")
    for call in (
        lambda: match_closed_form(rows, 1),
        lambda: match_em(ROWS, CompactMemory(START.vectors / 0, START.weights)),
        lambda: features(nn.Identity(), (rows, torch.arange(5))),
        lambda: lifelong.compact_memory(Categorical(), memory=1).update(
            nn.Linear(3, 5, dtype=F64), (rows, torch.arange(5))
        ),
    ):
        with pytest.raises(NonFiniteError):
            call()


def test_bad_heads_and_data_change_nothing():
    x, y = normal(8, 3), torch.arange(8) % 2
    head = nn.Linear(3, 2, dtype=F64)
    plain = nn.Linear(3, 2, bias=False, dtype=F64)
    draws = torch.Generator().manual_seed(0)
    closed, by_em = (lifelong.compact_memory(Categorical(), memory=4, method=m) for m in METHODS)  # type: ignore[arg-type]

    def update(prior: Prior, model: nn.Module, data: Any) -> Prior:
        return prior.update(model, data, generator=draws)

    cases: list[tuple[Any, type[Exception], str]] = [
        (
            lambda: update(closed, nn.Sequential(head), (x, y)),
            TypeError,
            "got Sequential; train nn",
        ),
        (
            lambda: update(by_em, head, (x, y)),
            ValueError,
            r"features\(..., constant=True\)",
        ),
        (lambda: update(closed, head, Examples(x, y, head=(0, 1))), ValueError, "without a head"),
        (
            lambda: update(closed, head, (x[:3], y[:3])),
            ValueError,
            "memory=3 or less",
        ),
        (lambda: update(closed, head, (x.reshape(8, 1, 3), y)), ValueError, "expected|shape"),
        (
            lambda: update(closed, head, (x, y)).forget(head, ids=y),
            ValueError,
            "learned vectors",
        ),
        (
            lambda: learn(plain, (x, y), Categorical(), size=2, method="em"),
            ValueError,
            "EM needs a start",
        ),
        (
            lambda: curvature_rows(head, (x.reshape(8, 1, 3), y), Categorical()),
            ValueError,
            r"features of shape \(N, P\), got \(8, 1, 3\)",
        ),
    ]
    for call, kind, message in cases:
        with laws.untouched(head), pytest.raises(kind, match=message):
            call()
    assert closed.recall(head, (x, y)).memory is None  # nothing was to be kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compact": "svd"}, "compact must be one of .*'svd'"),
        ({"compact": "em"}, "memory of at least 1"),
        ({"compact": "em", "memory": None}, "memory of at least 1"),
        ({"compact": "em", "memory": 3, "structure": "diagonal"}, "no structure"),
        ({"compact": "em", "memory": 3, "hard": 1.0}, "no true labels"),
        ({"compact_iterations": 0}, "compact_iterations must be at least 1, got 0"),
        ({"compact_damping": 0.0}, "compact_damping must be finite and positive, got 0.0"),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
    with pytest.raises(ValueError, match="strength must be finite and not negative"):
        lifelong.compact_memory(Categorical(), strength=-1.0)


# ------------------------------------------------------------------ the benchmark


def test_the_benchmark_runs(tmp_path):
    benchmark.main(
        ["moons", "--data", ".", "--out", str(tmp_path), "--memory", "0", "7", "--smoke"]
    )
    found = json.loads((tmp_path / "moons_7.json").read_text())
    assert "compact, EM, eps 0.0001" in found
    assert 0.5 < json.loads((tmp_path / "moons.json").read_text())["batch"]["final"]["mean"] <= 1


def test_the_benchmark_trains_to_the_minimum():
    tasks = benchmark.moons_tasks(0, 40)
    head = benchmark.blank(tasks, Bernoulli())
    prior = lifelong.compact_memory(Bernoulli(), memory=7, precision=0.01)
    for _ in range(2):
        benchmark.fit(head, tasks[0][0], prior)
        x, y = torch.as_tensor(tasks[0][0].inputs), tasks[0][0].labels
        loss = Bernoulli().nll(head(x), y).sum() + prior(head)
        assert float(laws.slope(head, loss).norm()) < 1e-6
        prior = prior.update(head, tasks[0][0])
    points = torch.as_tensor(tasks[2][0].inputs)[:, 1:3]
    assert benchmark.moons_grid().shape == (158_632, 21)
    assert float(points.abs()[:, 0].max()) < 3.6


@pytest.mark.parametrize("size", [1, 2, 3, 8, 50])
def test_the_rotation_of_points_is_orthogonal_level_and_spread(size: int) -> None:
    q = compact._level(size, torch.zeros(1, dtype=torch.float64))
    assert torch.allclose(q.T @ q, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(q[:, 0], torch.full((size,), size**-0.5, dtype=torch.float64))
    assert q.abs().max() <= (2 / size) ** 0.5 + 1e-12

"""The estimators: scikit-learn's own checks, and the laws that the library adds to them."""

from __future__ import annotations

import copy
import pickle
import re
import runpy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import lifelong
from lifelong.integrations.sklearn import LifelongClassifier, LifelongRegressor

# Networks stop early here: what is checked is the interface.
CHECKED = [
    LifelongClassifier(),
    LifelongRegressor(),
    LifelongRegressor(hidden=(4,), max_iter=5),
    LifelongClassifier(hidden=(4,), max_iter=5),
]


@parametrize_with_checks(CHECKED)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


# -------------------------------------------------------------------- data


def numbers(n: int = 40, d: int = 4, c: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    X = random.normal(size=(n, d))
    y = X @ random.normal(size=(d, c)) + 1.0 + 0.3 * random.normal(size=(n, c))
    return X, y[:, 0] if c == 1 else y


def classes(n: int = 45, d: int = 3, c: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    y = np.arange(n) % c
    return random.normal(size=(n, d)) + 4.0 * random.normal(size=(c, d))[y], y


def parts(estimator: Any, X: Any, y: Any, bounds: list[int]) -> Any:
    edges = [0, *bounds, len(X)]
    for a, b in pairwise(edges):
        estimator.partial_fit(X[a:b], y[a:b])
    return estimator


def weights(estimator: Any) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in estimator.model_.parameters()])


def error(a: Any, b: Any) -> float:
    """Of a's weights beside b's, relative."""
    one, other = weights(a), weights(b)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


splits = st.lists(st.integers(1, 39), min_size=1, max_size=4, unique=True).map(sorted)


# -------------------------------------------------------------------- what fit is


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_regressor_is_ridge_regression(outputs: int) -> None:
    X, y = numbers(c=outputs)
    ones = np.hstack([X, np.ones((len(X), 1))])
    ridge = Ridge(alpha=0.7, fit_intercept=False).fit(ones, y)
    ours = LifelongRegressor(alpha=0.7).fit(X, y)
    assert ours.predict(X).shape == y.shape
    np.testing.assert_allclose(ours.predict(X), ridge.predict(ones), rtol=1e-10)


def test_the_classifier_is_logistic_regression() -> None:
    X, y = classes()
    ones = np.hstack([X, np.ones((len(X), 1))])
    theirs = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-12, max_iter=10_000)
    theirs.fit(ones, y)
    ours = LifelongClassifier(alpha=0.5).fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(ones), atol=1e-7)
    np.testing.assert_allclose(np.exp(ours.predict_log_proba(X)), ours.predict_proba(X))


# -------------------------------------------------------------------- laws


@given(bounds=splits, memory=st.sampled_from([0, 7, None]), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_parts_are_all_for_numbers(bounds: list[int], memory: int | None, seed: int) -> None:
    X, y = numbers(c=2, seed=seed)
    whole = LifelongRegressor().fit(X, y)
    assert error(parts(LifelongRegressor(memory=memory), X, y, bounds), whole) < 1e-8


@given(bounds=splits, seed=st.integers(0, 99), by_class=st.booleans())
@settings(max_examples=8)
def test_parts_are_all_for_classes(bounds: list[int], seed: int, by_class: bool) -> None:
    X, y = classes(seed=seed)
    if by_class:  # new ones come in the middle of the order, too
        order = np.argsort((y + 1) % 3, kind="stable")
        X, y = X[order], np.array(["a", "c", "b"])[y[order]]
    whole = LifelongClassifier().fit(X, y)
    split = parts(LifelongClassifier(memory=None), X, y, bounds)
    assert list(split.classes_) == list(whole.classes_)
    assert error(split, whole) < 1e-6


@given(rows=st.sets(st.integers(0, 39), min_size=1, max_size=20), seed=st.integers(0, 99))
@settings(max_examples=8)
@pytest.mark.parametrize("memory", [0, 7, None])
def test_forgotten_numbers_were_never_there(memory: int | None, rows: set[int], seed: int) -> None:
    X, y = numbers(seed=seed)
    gone = np.isin(np.arange(40), list(rows))
    without = LifelongRegressor().fit(X[~gone], y[~gone])
    learned = parts(LifelongRegressor(memory=memory, random_state=0), X, y, [13, 20])
    ids = copy.deepcopy(learned).forget(X[gone], y[gone], ids=np.flatnonzero(gone))
    assert error(ids, without) < 1e-6
    assert error(learned.forget(X[gone], y[gone]), without) < 1e-6
    assert learned.prior_.num_data == 40 - gone.sum()


@given(rows=st.sets(st.integers(0, 44), min_size=1, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_forgotten_classes_were_never_there(rows: set[int], seed: int) -> None:
    X, y = classes(seed=seed)
    gone = np.isin(np.arange(45), list(rows))
    without = LifelongClassifier().partial_fit(X[~gone], y[~gone], classes=[0, 1, 2])
    learned = parts(LifelongClassifier(), X, y, [20])
    by_id = copy.deepcopy(learned).forget(ids=np.flatnonzero(gone))
    assert error(by_id, without) < 1e-6
    assert error(learned.forget(X[gone], y[gone]), without) < 1e-6


def test_equal_rows_leave_one_by_one() -> None:
    X, y = classes(30)
    twice = LifelongClassifier().fit(np.vstack([X, X]), np.concatenate([y, y]))
    once = twice.forget(X, y)
    assert error(once, LifelongClassifier().fit(X, y)) < 1e-6
    assert once.prior_.num_data == 30


def test_many_features_have_a_kronecker_curvature() -> None:
    X, y = numbers(30, 400, 3)
    whole = LifelongRegressor().fit(X, y)
    split = parts(LifelongRegressor(memory=0), X, y, [10, 20])
    assert whole.prior_.recipe.structure == "kronecker"
    assert error(split, whole) < 1e-8


def test_forgets_less_than_learning_on() -> None:
    X, y = load_digits(return_X_y=True)
    X = X / 16.0
    order = np.argsort(y, kind="stable")[::8]  # all zeros, then all ones, ...
    learned = parts(LifelongClassifier(memory=50), X[order], y[order], [75, 150])
    plain = parts(
        LifelongClassifier(prior=lifelong.weight_decay(CATEGORICAL)), X[order], y[order], [75, 150]
    )
    assert learned.score(X, y) > 0.8 > 0.5 > plain.score(X, y)


# -------------------------------------------------------------------- priors and parameters

CATEGORICAL = lifelong.Categorical()


@pytest.mark.parametrize(
    "prior", ["recommended", "kprior", "online_laplace", "experience_replay", "a Prior"]
)
@pytest.mark.parametrize("hidden", [(), (6,)])
def test_every_prior_learns_in_parts(prior: Any, hidden: tuple[int, ...]) -> None:
    X, y = classes(60)
    if prior == "a Prior":
        prior = lifelong.ewc(CATEGORICAL, precision=1.0)
    estimator = LifelongClassifier(hidden, prior=prior, memory=20, max_iter=30, random_state=0)
    parts(estimator, X, y, [20, 40])
    assert estimator.score(X, y) > 0.8


def test_a_network_forgets_rows_it_remembers() -> None:
    X, y = classes(30)
    network = LifelongClassifier((4,), random_state=0).fit(X, y)
    before = weights(network)
    assert network.forget(ids=[0, 1]).prior_.num_data == 28
    assert not np.array_equal(before, weights(network))


def test_random_state_decides_all() -> None:
    X, y = classes(30)
    made = [
        parts(LifelongClassifier((4,), memory=5, max_iter=20, random_state=1), X, y, [15])
        for _ in range(2)
    ]
    assert np.array_equal(weights(made[0]), weights(made[1]))


def test_pickled_and_cloned() -> None:
    X, y = classes()
    learned = LifelongClassifier(memory=10, random_state=0).partial_fit(X[:30], y[:30])
    again = pickle.loads(pickle.dumps(learned))
    assert np.array_equal(again.predict_proba(X), learned.predict_proba(X))
    for estimator in (learned, again):
        estimator.partial_fit(X[30:], y[30:])
    assert np.array_equal(weights(again), weights(learned))
    assert not hasattr(clone(learned), "model_")
    with_prior = LifelongClassifier(prior=lifelong.ewc(CATEGORICAL))
    assert clone(with_prior).prior.recipe == with_prior.prior.recipe  # type: ignore[union-attr]


def test_in_pipelines_and_searches() -> None:
    X, y = classes(60)
    pipeline = make_pipeline(StandardScaler(), LifelongClassifier())
    search = GridSearchCV(pipeline, {"lifelongclassifier__alpha": [0.1, 10.0]}, cv=3).fit(X, y)
    assert search.best_score_ > 0.8
    assert cross_val_score(LifelongRegressor(), *numbers(), cv=3).min() > 0.8


# -------------------------------------------------------------------- wrong use


def test_wrong_use_says_so_and_changes_nothing() -> None:
    X, y = classes()
    learned = LifelongClassifier(memory=10, random_state=0).fit(X, y)
    before = pickle.dumps(learned)
    wrong: list[tuple[str, Any]] = [
        ("expected X and y, or ids", lambda: learned.forget()),
        ("expected X and y, or ids", lambda: learned.forget(X)),
        ("ids from 0 to 44", lambda: learned.forget(ids=[45])),
        ("ids from 0 to 44", lambda: learned.forget(ids=[3, 3])),
        ("whole number", lambda: learned.forget(ids=[0.5])),
        ("whole number", lambda: learned.forget(ids=np.array([True, False]))),  # a mask
        ("none of these examples is in memory", lambda: learned.forget(ids=unremembered(learned))),
        ("never learned", lambda: learned.forget(X, y + 1)),
        ("not in classes", lambda: learned.partial_fit(X, y, classes=[0, 1])),
        ("3 features", lambda: learned.partial_fit(X[:, :2], y)),
        ("expecting 3 features", lambda: learned.forget(X[:, :2], y)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
        assert pickle.dumps(learned) == before, message


def unremembered(estimator: Any) -> list[int]:
    held = set(estimator.prior_.memory.origin.tolist())
    return [i for i in range(estimator.n_seen_) if i not in held][:2]


def test_rows_that_were_never_learned_are_told_where_all_are_remembered() -> None:
    X, y = classes()
    with pytest.raises(ValueError, match="none of those learned"):
        LifelongClassifier().fit(X, y).forget(X[:2] + 1.0, y[:2])


def test_a_failed_call_leaves_new_classes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = classes()
    learned = LifelongClassifier().fit(X, y)
    before = weights(learned)

    def broken(*_: Any, **__: Any) -> Any:
        raise lifelong.NonFiniteError("no")

    monkeypatch.setattr("lifelong.integrations.sklearn.refit", broken)
    with pytest.raises(lifelong.NonFiniteError):
        learned.partial_fit(X, y + 1)
    assert list(learned.classes_) == [0, 1, 2]
    assert np.array_equal(weights(learned), before)


@pytest.mark.parametrize(
    ("estimator", "make"),
    [(LifelongClassifier, classes), (LifelongRegressor, numbers)],
)
def test_a_failed_fit_leaves_all_as_it_was(estimator: Any, make: Any) -> None:
    """A fitted one predicts as before, and one that was not fitted still is not."""
    X, y = make()
    learned = estimator(random_state=0).fit(X, y)
    learned.set_params(prior=learned.prior_)  # is not fresh
    before = pickle.dumps(learned)
    new = clone(learned)
    for _ in range(2):
        for call in (learned.fit, new.fit, new.partial_fit):
            with pytest.raises(ValueError, match="fresh"):
                call(X, y)
    assert pickle.dumps(learned) == before
    with pytest.raises(NotFittedError):
        new.predict(X)


def test_sizes_may_be_numpys() -> None:
    X, y = classes()
    a, b = (LifelongClassifier(memory=m, random_state=0).fit(X, y) for m in (5, np.int64(5)))
    assert np.array_equal(weights(a), weights(b))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"prior": "none"}, "prior must be one of"),
        ({"prior": lifelong.ewc(lifelong.Gaussian())}, "Categorical likelihood and fresh"),
        ({"prior": lifelong.si(CATEGORICAL)}, "lifelong.Learner"),
        ({"hidden": (0,)}, "sizes of layers"),
        ({"memory": -1}, "number of rows"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"tol": 0.0}, "tolerance must be"),
        ({"max_iter": 0}, "max_iterations must be"),
    ],
)
def test_wrong_parameters_are_told(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LifelongClassifier(**parameters).fit(*classes())


def test_columns_must_stay() -> None:
    X, y = numbers(c=2)
    with pytest.raises(ValueError, match="1 columns, expected 2"):
        LifelongRegressor().fit(X, y).partial_fit(X, y[:, 0])


def test_unfitted_and_unconverged() -> None:
    X, y = classes()
    with pytest.raises(NotFittedError):
        LifelongClassifier().forget(ids=[0])
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        LifelongClassifier(max_iter=1).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LifelongClassifier().fit(X, y).n_iter_ > 1


def test_the_callers_arrays_and_random_state_are_left_alone() -> None:
    X, y = numbers()
    learned = LifelongRegressor().fit(X, y)
    state = torch.get_rng_state()
    X[:] = 0.0
    assert float(learned.prior_.memory.inputs.abs().sum()) > 0
    LifelongRegressor((4,), max_iter=5).fit(X, y)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parent.parent / "examples" / "integrations" / "sklearn_stream.py"
    assert len(path.read_text().splitlines()) < 120
    accuracy = runpy.run_path(str(path))["main"](memory=100)
    assert sorted(accuracy) == accuracy
    assert accuracy[-1] > 0.85
    assert "forgotten" in capsys.readouterr().out


def test_the_page_runs() -> None:
    page = Path(__file__).parent.parent / "docs" / "integrations" / "scikit-learn.md"
    X, y = classes(60)
    values = {"lifelong": lifelong, "X": X[:45], "y": y[:45] % 2, "X_new": X[45:], "y_new": y[45:]}
    values |= {"Y": X[:45] @ np.ones(3), "Y_new": X[45:] @ np.ones(3)}
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for code in found:
        exec(code, values)
    assert len(found) == 3
    assert values["classifier"].n_seen_ == 60
    assert values["classifier"].prior_.num_data == 56
    assert error(values["regressor"], LifelongRegressor().fit(values["X"], values["Y"])) < 1e-6
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target

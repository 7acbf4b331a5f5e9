r"""scikit-learn estimators that learn in parts without forgetting: extra ``sklearn``.

    classifier = LifelongClassifier().fit(X, y)
    classifier.partial_fit(X_new, y_new)       # new rows, also of new classes
    classifier.forget(ids=[3, 17])             # as if they had never been seen

``fit`` and each ``partial_fit`` minimise

    sum_new l(y_i, f(x_i)) + Prior(theta),    Prior = R at first,  R = ½ alpha ‖theta‖²,

by ``refit``, and make the prior of the next call by ``Prior.update``. f is linear, W x + b, or a
network of ReLU layers (``hidden``); l = -log softmax for classes, ½ (y - f)² for numbers. R holds
the intercept too: a class that is declared and not yet seen would otherwise go to minus infinity.
So ``LifelongRegressor`` is ridge regression, and ``LifelongClassifier`` logistic regression with
C = 1 / alpha, each with a column of ones instead of an intercept.

What is exact, with hidden=() and the prior "recommended", beside ``fit`` on all rows at once:

    LifelongRegressor    any split into calls, any memory; forget too, from memory or given again
    LifelongClassifier   while no more than ``memory`` rows were seen, or memory=None; forget too

Beyond that the rows that are no longer remembered are carried by the gradient and the curvature of
their loss. Everything is computed in float64 on the CPU.
Sources: Khan & Swaroop 2021; Daxberger et al. 2023.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "the estimators need scikit-learn 1.6 or newer, the extra 'sklearn': pip install "
        f"'lifelong[sklearn]' ({error})"
    ) from error

from ..data import Examples
from ..likelihoods import Categorical, Gaussian, Likelihood
from ..models import parameters
from ..presets import experience_replay, gradient_reconstruction, kprior, online_laplace
from ..prior import Prior
from ..recipe import Fitted
from ..refit import Refit, refit, steps_of_removal
from ..terms import Regulariser

PriorName = Literal["recommended", "kprior", "online_laplace", "experience_replay"]

_DENSE = 1024  # weights, up to which the curvature of a linear model is kept as one matrix


class _Lifelong(BaseEstimator):
    """What both estimators share: a model, its prior, and the number of rows seen so far."""

    model_: nn.Sequential
    prior_: Prior
    n_seen_: int
    n_features_in_: int

    def __init__(
        self,
        hidden: Sequence[int] = (),
        *,
        prior: PriorName | Prior = "recommended",
        memory: int | None = 1000,
        alpha: float = 1.0,
        max_iter: int | None = None,
        tol: float = 1e-8,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.prior = prior
        self.memory = memory
        self.alpha = alpha
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    # ---------------------------------------------------------------- to be given by each

    def _likelihood(self) -> Likelihood:
        raise NotImplementedError  # of classes or of numbers

    def _targets(self, y: Any) -> tuple[Any, Tensor]:
        """What is learned from y, and its labels; changes nothing."""
        raise NotImplementedError  # the classifier's classes, or the regressor's numbers

    # ---------------------------------------------------------------- learning

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What raises inside leaves the estimator as it was, fitted or not."""
        before = dict(vars(self))  # models and priors are replaced, never changed
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _start(self, num_outputs: int) -> None:
        self.n_seen_ = 0
        self._bounds: tuple[int, ...] = (0,)  # of the ids of each call
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.model_ = _model(self.n_features_in_, self.hidden, num_outputs, self._seed)
        self.prior_ = self._fresh_prior()

    def _learn(self, X: Any, labels: Tensor, model: nn.Sequential, prior: Prior) -> None:
        """Refit and update."""
        ids = torch.arange(self.n_seen_, self.n_seen_ + len(labels))
        data = Examples(_tensor(X), labels, ids)
        prior = prior.prepare(model, data)
        done = self._refit(model, prior, data)
        generator = torch.Generator().manual_seed(self._seed + prior.num_tasks)
        learned = _as_task(prior, data).update(model, data, generator=generator)
        self.prior_, self.model_ = replace(learned, recipe=prior.recipe), model
        self.n_seen_ += len(labels)
        self._bounds = (*self._bounds, self.n_seen_)
        self._note(done)

    def _refit(self, model: nn.Module, prior: Prior, data: Examples | None) -> Refit:
        steps, method = self.max_iter, "auto"
        if data is None:
            method, steps = steps_of_removal(model, prior, "auto", steps)
        generator = torch.Generator().manual_seed(self._seed)
        return refit(
            model,
            prior,
            data,
            method=method,  # type: ignore[arg-type]
            tolerance=self.tol,
            max_iterations=steps,
            generator=generator,
        )

    def _note(self, done: Refit) -> None:
        self.n_iter_ = max(1, done.iterations)  # the first value is a step, as others count
        if not done.converged and done.method == "newton":
            warnings.warn(
                f"the refit stopped after {done.iterations} iterations at a relative gradient of "
                f"{done.relative_norm:.2g}; raise max_iter, scale the features, or raise tol",
                ConvergenceWarning,
                stacklevel=4,
            )

    # ---------------------------------------------------------------- forgetting

    def forget(self, X: Any = None, y: Any = None, *, ids: Any = None) -> Self:
        """Unlearn rows: ``Prior.forget``, then a refit to what the others say.

        X, y: the rows as they were learned. Those that are remembered are found by their values,
        one for each row given; of the others gradient and curvature leave the prior, which takes
        them at their word. ids: numbers of rows in the order in which they were learned, from 0
        over all calls; alone where they are remembered, beside X and y else. They may be left
        out, but where calls differ in strength (hidden layers), rows that are not remembered need
        theirs.

        Raises ValueError where neither is given, for ids that were never given out or are not
        remembered, for rows that are no row of a memory that holds all, for a prior that cannot
        forget (``Prior.forget`` says which), and where the curvature would turn indefinite, as
        for rows that were never learned; NotFittedError. Then nothing was changed.
        """
        check_is_fitted(self)
        if (X is None) != (y is None) or (X is None and ids is None):
            raise ValueError("say which rows to forget: expected X and y, or ids, or all three")
        chosen = None if ids is None else self._known_ids(ids)
        model = copy.deepcopy(self.model_)
        if X is None:
            prior = self.prior_.forget(model, ids=chosen)
        else:
            X, y = validate_data(self, X, y, reset=False, dtype=np.float64, **self._checks)
            known, labels = self._targets(y)
            if len(known) != _num_outputs(model):
                raise ValueError("y holds labels that were never learned, so no such row was seen")
            data = self._found(_tensor(X), labels, chosen)
            prior = self.prior_
            for call, part in self._by_call(data, chosen):
                prior = prior.forget(model, part, task=call)
        done = self._refit(model, prior, None)
        self.prior_, self.model_ = prior.rebase(model), model
        self._note(done)
        return self

    def _known_ids(self, ids: Any) -> Tensor:
        chosen = torch.as_tensor(np.asarray(ids)).reshape(-1)
        if chosen.is_floating_point() or chosen.dtype == torch.bool or not len(chosen):
            raise ValueError(f"expected at least one whole number as ids, got {ids!r}")
        unknown = chosen[(chosen < 0) | (chosen >= self.n_seen_)]
        if len(unknown) or len(chosen.unique()) < len(chosen):
            raise ValueError(
                f"expected ids from 0 to {self.n_seen_ - 1}, each once, got {chosen.tolist()[:10]}"
            )
        return chosen.long()

    def _found(self, inputs: Tensor, labels: Tensor, ids: Tensor | None) -> Examples:
        """The rows with their ids: those of equal rows in memory, else numbers that nobody has."""
        if ids is not None:
            return Examples(inputs, labels, ids)
        memory = self.prior_.memory
        held: dict[bytes, list[int]] = {}
        if memory is not None:
            for key, origin in zip(
                _keys(memory.inputs, memory.labels), memory.origin.tolist(), strict=True
            ):
                held.setdefault(key, []).append(origin)
        found = [
            held[k].pop() if held.get(k) else -1 - i for i, k in enumerate(_keys(inputs, labels))
        ]
        lost = sum(i < 0 for i in found)
        if lost and memory is not None and len(memory) == self.prior_.num_data:
            raise ValueError(
                f"{lost} of these rows are none of those learned, which are all remembered: "
                "expected rows as they were given to fit or partial_fit, each as often"
            )
        return Examples(inputs, labels, torch.tensor(found))

    def _by_call(self, data: Examples, ids: Tensor | None) -> list[tuple[int | None, Examples]]:
        """The rows of each call with its number, where ids tell."""
        if ids is None:
            return [(None, data)]
        call = torch.bucketize(ids, torch.tensor(self._bounds[1:]), right=True)
        return [(int(c), data[(call == c).nonzero().squeeze(1)]) for c in call.unique()]

    # ---------------------------------------------------------------- small things

    _checks: Mapping[str, Any] = MappingProxyType({})

    def _fresh_prior(self) -> Prior:
        likelihood = self._likelihood()
        if isinstance(self.prior, Prior):
            _require_fresh(self.prior, likelihood)
            return self.prior
        num_weights = sum(p.numel() for p in self.model_.parameters())
        make, memory = _PRIORS[self.prior], None if self.memory is None else int(self.memory)
        prior = make(likelihood, memory, bool(self.hidden), num_weights)
        others = tuple(t for t in prior.terms if not isinstance(t, Regulariser))
        # Bayes' rule counts rows: calls are parts of one data set, and need not be equal tasks.
        recipe = replace(prior.recipe, total=self.memory is not None, equal_tasks=False)
        terms = (Regulariser(float(self.alpha)), *others) if self.alpha else others
        return replace(prior, recipe=recipe, terms=terms)

    def _require_parameters(self) -> None:
        if not isinstance(self.prior, Prior) and self.prior not in _PRIORS:
            raise ValueError(
                f"prior must be one of {get_args(PriorName)} or a Prior, got {self.prior!r}"
            )
        if any(not isinstance(h, Integral) or h < 1 for h in self.hidden):
            raise ValueError(f"hidden must be sizes of layers, at least 1, got {self.hidden!r}")
        if self.memory is not None and (not isinstance(self.memory, Integral) or self.memory < 0):
            raise ValueError(f"memory must be a number of rows, or None, got {self.memory!r}")
        if not isinstance(self.alpha, Real) or not 0 <= self.alpha < np.inf:
            raise ValueError(f"alpha must be finite and not negative, got {self.alpha!r}")

    @torch.no_grad()
    def _outputs(self, X: Any) -> np.ndarray:
        """f (N, C)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return self.model_(_tensor(X)).numpy()


class LifelongClassifier(ClassifierMixin, _Lifelong):
    """Logistic regression, or a network, that goes on learning.

    hidden: widths of ReLU layers; () is linear, and convex. prior: what carries the past to the
    next call, see ``priors`` below. memory: rows that are remembered in all, None for all of
    them; 0 for none. alpha: precision of the prior of weights and intercepts, nats (1 / C of
    ``LogisticRegression``, whose intercept has none). max_iter, tol: of ``refit``, of the relative
    norm of the gradient; by default 50 steps (linear) or 500 (networks). random_state: of a
    network's first weights and of who is remembered.

    priors: "recommended" (``lifelong.recommended`` for parts of one data set, see
    ``_recommended``), "kprior", "online_laplace" (nothing remembered), "experience_replay"; or a
    ``Prior`` with this likelihood, whose memory and precision are then its own.

    Attributes: classes_ (C,); n_features_in_, feature_names_in_; model_, an ``nn.Sequential`` in
    float64; prior_, a ``lifelong.Prior``; n_seen_: rows seen; n_iter_: steps of the last refit.

    A ConvergenceWarning tells of a linear model whose refit did not converge. There is no
    sample_weight.
    """

    _checks: Mapping[str, Any] = MappingProxyType({"accept_sparse": False})

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from nothing. X (N, D), y (N,) classes. Raises ValueError for parameters or data
        that do not fit; then nothing was changed."""
        return self._fit(X, y, None, fresh=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Learn more, under the prior of all that came before; the first call is ``fit``.

        classes: all that may come, if known; else they are taken in as they come, in sorted
        order, at probability 0 for the rows of before. Raises ValueError as ``fit``, and for a y
        outside of ``classes``; then nothing was changed.
        """
        return self._fit(X, y, classes, fresh=not hasattr(self, "model_"))

    def _fit(self, X: Any, y: Any, classes: Any, *, fresh: bool) -> Self:
        with self._all_or_nothing():
            self._require_parameters()
            X, y = validate_data(self, X, y, reset=fresh, dtype=np.float64, **self._checks)
            check_classification_targets(y)
            given = np.unique(y if classes is None else classes)
            if classes is not None and (strange := np.setdiff1d(y, given)).size:
                raise ValueError(f"y has labels that are not in classes: {strange.tolist()}")
            if fresh:
                self.classes_ = given
                self._start(len(given))
            known = np.union1d(self.classes_, given)
            model, prior = self._grown(known)
            self._learn(X, _places(known, y), model, prior)
            self.classes_ = known
        return self

    def _grown(self, classes: np.ndarray) -> tuple[nn.Sequential, Prior]:
        """Model and prior with an output for each of ``classes``, in their order."""
        model = copy.deepcopy(self.model_)
        if len(classes) == len(self.classes_):
            return model, self.prior_
        old = {label: i for i, label in enumerate(self.classes_.tolist())}
        source = [old.get(label) for label in classes.tolist()]
        layer: Any = model[-1]
        head: Any = _model(self.n_features_in_, self.hidden, len(classes), self._seed)[-1]
        with torch.no_grad():
            for row, at in enumerate(source):
                if at is not None:
                    head.weight[row], head.bias[row] = layer.weight[at], layer.bias[at]
        model[-1] = head
        names = [f"{len(model) - 1}.{name}" for name in ("weight", "bias")]
        prior = self.prior_.transfer(model, classes=source, head=names, previous=self.model_)
        return model, prior

    def _likelihood(self) -> Likelihood:
        return Categorical()

    def _targets(self, y: Any) -> tuple[np.ndarray, Tensor]:
        known = np.union1d(self.classes_, y)
        return known, _places(known, y)

    def decision_function(self, X: Any) -> np.ndarray:
        """f (N, C), the logits; of two classes (N,), f_1 - f_0."""
        f = self._outputs(X)
        return f[:, 1] - f[:, 0] if f.shape[1] == 2 else f

    def predict_proba(self, X: Any) -> np.ndarray:
        """softmax f (N, C), in the order of ``classes_``."""
        return torch.from_numpy(self._outputs(X)).softmax(1).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """log softmax f (N, C)."""
        return torch.from_numpy(self._outputs(X)).log_softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The class of the largest f, (N,)."""
        best = self._outputs(X).argmax(1)
        return self.classes_[best]


class LifelongRegressor(RegressorMixin, _Lifelong):
    """Ridge regression, or a network, that goes on learning; of one number or several.

    Parameters as ``LifelongClassifier``; alpha as in ``Ridge``, in units of 1 / variance of the
    noise, and on the intercept too. Linear, it equals ``fit`` on all rows after any
    ``partial_fit`` and ``forget``, whatever the memory.
    """

    _checks: Mapping[str, Any] = MappingProxyType({"multi_output": True, "y_numeric": True})

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from nothing. X (N, D), y (N,) or (N, C). Raises ValueError for parameters or
        data that do not fit; then nothing was changed."""
        return self._fit(X, y, fresh=True)

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Learn more, under the prior of all that came before; the first call is ``fit``. Raises
        ValueError as ``fit``, and where y has another number of columns."""
        return self._fit(X, y, fresh=not hasattr(self, "model_"))

    def _fit(self, X: Any, y: Any, *, fresh: bool) -> Self:
        with self._all_or_nothing():
            self._require_parameters()
            X, y = validate_data(self, X, y, reset=fresh, dtype=np.float64, **self._checks)
            outputs, labels = self._targets(y)
            if fresh:
                self._flat = np.ndim(y) == 1
                self._start(len(outputs))
            elif len(outputs) != (before := _num_outputs(self.model_)):
                raise ValueError(f"y has {len(outputs)} columns, expected {before} as before")
            self._learn(X, labels, copy.deepcopy(self.model_), self.prior_)
        return self

    def _likelihood(self) -> Likelihood:
        return Gaussian()

    def _targets(self, y: Any) -> tuple[range, Tensor]:
        labels = torch.from_numpy(np.array(y, dtype=np.float64))
        labels = labels.unsqueeze(1) if labels.ndim == 1 else labels
        return range(labels.shape[1]), labels

    def predict(self, X: Any) -> np.ndarray:
        """f (N,) or (N, C), as y was."""
        f = self._outputs(X)
        return f[:, 0] if self._flat else f

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


# -------------------------------------------------------------------- priors


def _recommended(likelihood: Likelihood, memory: int | None, deep: bool, weights: int) -> Prior:
    """``gradient_reconstruction`` with g, so that a refit need not converge. Linear: each past row
    counts once, remembered or in the whole G, which Bayes' rule is for a Gaussian likelihood.
    Networks: as ``lifelong.recommended``: remembered rows stand for the others, beside a diagonal
    G whose strength is found."""
    if deep:
        how: dict[str, Any] = {"structure": "diagonal", "curvature_examples": 2_000}
    else:
        structure: Fitted = "dense" if weights <= _DENSE else "kronecker"
        how = {"structure": structure, "strength": 1.0, "population": False}
    return gradient_reconstruction(likelihood, memory=memory, gradient="stored", **how)


def _kprior(likelihood: Likelihood, memory: int | None, deep: bool, weights: int) -> Prior:
    return kprior(likelihood, memory=memory, population=True)


def _laplace(likelihood: Likelihood, memory: int | None, deep: bool, weights: int) -> Prior:
    dense: Fitted = "diagonal" if deep else "dense" if weights <= _DENSE else "kronecker"
    return online_laplace(likelihood, structure=dense)


def _replay(likelihood: Likelihood, memory: int | None, deep: bool, weights: int) -> Prior:
    prior = experience_replay(likelihood)
    return replace(prior, recipe=replace(prior.recipe, memory=memory))


_PRIORS = MappingProxyType(
    {
        "recommended": _recommended,
        "kprior": _kprior,
        "online_laplace": _laplace,
        "experience_replay": _replay,
    }
)


def _require_fresh(prior: Prior, likelihood: Likelihood) -> None:
    """Raise ValueError for a prior that these estimators cannot begin with."""
    if type(prior.likelihood) is not type(likelihood) or prior.num_tasks:
        raise ValueError(
            f"prior must be of a {type(likelihood).__name__} likelihood and fresh, got {prior!r}"
        )
    recipe = prior.recipe
    if recipe.structure == "path" or recipe.reference is not None or recipe.distil:
        raise ValueError(
            f"the {recipe.name} prior needs a loop that trains; use lifelong.Learner, or another "
            "prior"
        )


def _as_task(prior: Prior, data: Examples) -> Prior:
    """The prior with no more to keep of a call than it has rows."""
    size = prior.recipe.memory
    if not isinstance(size, int) or size <= len(data) or prior.recipe.total:
        return prior
    return replace(prior, recipe=replace(prior.recipe, memory=len(data)))


# -------------------------------------------------------------------- arrays and models


def _model(inputs: int, hidden: Sequence[int], outputs: int, seed: int) -> nn.Sequential:
    """Linear layers with ReLU between; a single one begins at 0."""
    widths = [inputs, *(int(h) for h in hidden)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b, dtype=torch.float64), nn.ReLU()]
        head = nn.Linear(widths[-1], outputs, dtype=torch.float64)
    if not hidden:
        for p in parameters(head).values():
            nn.init.zeros_(p)
    return nn.Sequential(*layers, head)


def _num_outputs(model: nn.Sequential) -> int:
    head: Any = model[-1]
    return head.out_features


def _tensor(X: Any) -> Tensor:
    """A copy: the caller's array may change, or not be writable."""
    return torch.from_numpy(np.array(X, dtype=np.float64))


def _places(known: np.ndarray, y: np.ndarray) -> Tensor:
    """The output of each label, (N,) int64."""
    return torch.from_numpy(np.searchsorted(known, y)).long()


def _keys(inputs: Any, labels: Tensor) -> list[bytes]:
    """One for each row, equal for equal rows."""
    pairs = zip(inputs.numpy(), labels.numpy(), strict=True)
    return [(x + 0.0).tobytes() + np.asarray(y).tobytes() for x, y in pairs]

"""Metrics: the accuracy matrix of a stream, and how good the probabilities are.

R[t, i] is the accuracy, between 0 and 1, on the test examples of task i after training on task t;
T is the number of tasks; indices count from 1 in the formulas. "Forward transfer" is two different
quantities in the literature, so neither bears that name here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from .data import BATCH_SIZE, Data, Shard, batches, head_mask, head_of
from .likelihoods import Bernoulli, Categorical, Likelihood
from .models import Inputs, evaluating, forward, move, require_finite, rows, take
from .notebook import table

NUM_BINS = 15


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """values: (T, T) float64, R[t, i] in [0, 1], NaN where it was not evaluated.

    Metrics are fractions, not percent. One that needs an entry that was not evaluated is NaN. One
    that compares tasks (backward transfer, forgetting, both transfers) is 0.0 for a single task.

    Raises ValueError where the values are not square, or one lies outside of [0, 1].
    """

    values: Tensor

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values, dtype=torch.float64)
        if values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) == 0:
            raise ValueError(f"expected a (T, T) matrix, T >= 1, got shape {tuple(values.shape)}")
        _require_fractions(values, "accuracies")
        object.__setattr__(self, "values", values.detach().cpu().clone())

    def _repr_html_(self) -> str:
        def text(value: float) -> str:
            return "" if math.isnan(value) else f"{100 * value:.1f}"

        rows = [(f"after {t + 1}", *map(text, row)) for t, row in enumerate(self.values.tolist())]
        means = {"average": self.average_accuracy, "forgetting": self.forgetting}
        known = [f"{n} {100 * v:.1f}" for n, v in means.items() if not math.isnan(v)]
        columns = [f"on {t + 1}" for t in range(len(rows))]
        return table("Accuracy (%)", rows, columns=columns, note="; ".join(known))

    @classmethod
    def empty(cls, num_tasks: int) -> AccuracyMatrix:
        """Nothing evaluated yet."""
        return cls(torch.full((num_tasks, num_tasks), math.nan))

    @classmethod
    def from_list(cls, rows: Sequence[Sequence[float | None]]) -> AccuracyMatrix:
        """The inverse of ``to_list``."""
        filled = [[math.nan if r is None else float(r) for r in row] for row in rows]
        if any(len(row) != len(filled) for row in filled):
            raise ValueError(
                f"expected {len(filled)} rows of {len(filled)}, got lengths {[*map(len, filled)]}"
            )
        return cls(torch.tensor(filled, dtype=torch.float64))

    def to_list(self) -> list[list[float | None]]:
        """Rows for JSON, which has no NaN: None stands for it."""
        return [[None if math.isnan(r) else r for r in row] for row in self.values.tolist()]

    def with_row(self, t: int, row: Sequence[float] | Tensor) -> AccuracyMatrix:
        """With the accuracies on the first ``len(row)`` tasks after task ``t`` (from 0).

        Raises ValueError where ``t`` or ``row`` do not fit, or an accuracy is outside of [0, 1].
        """
        row = torch.as_tensor(row, dtype=torch.float64)
        if not 0 <= t < self.num_tasks or row.ndim != 1 or len(row) > self.num_tasks:
            raise ValueError(
                f"expected t from 0 to {self.num_tasks - 1} and at most {self.num_tasks} "
                f"accuracies, got t={t} and a row of shape {tuple(row.shape)}"
            )
        values = self.values.clone()
        values[t] = math.nan
        values[t, : len(row)] = row
        return AccuracyMatrix(values)

    def after(self, t: int) -> AccuracyMatrix:
        """The matrix of the first ``t + 1`` tasks, as it stood after task ``t`` (from 0)."""
        if not 0 <= t < self.num_tasks:
            raise ValueError(f"expected t from 0 to {self.num_tasks - 1}, got {t}")
        return AccuracyMatrix(self.values[: t + 1, : t + 1])

    @property
    def num_tasks(self) -> int:
        return len(self.values)

    @property
    def average_accuracy(self) -> float:
        """ACC = (1/T) sum_i R[T, i] (Lopez-Paz & Ranzato 2017)."""
        return float(self.values[-1].mean())

    @property
    def backward_transfer(self) -> float:
        """BWT = 1/(T-1) sum_{i<T} (R[T, i] - R[i, i]); negative is forgetting (ibid.)."""
        return _mean_or_zero((self.values[-1] - self.values.diagonal())[:-1])

    @property
    def forgetting(self) -> float:
        """F = 1/(T-1) sum_{i<T} (max_{t<T} R[t, i] - R[T, i]), at least -BWT (Chaudhry 2018).

        The maximum is over the entries that were evaluated, R[i, i] among them.
        """
        before = self.values[:-1, :-1]
        best = before.nan_to_num(-math.inf).amax(0) if len(before) else before.diagonal()
        best = torch.where(before.diagonal().isnan(), math.nan, best)
        return _mean_or_zero(best - self.values[-1, :-1])

    @property
    def curve(self) -> tuple[float, ...]:
        """(1/t) sum_{i<=t} R[t, i] after t = 1, ..., T tasks."""
        return tuple(float(self.values[t, : t + 1].mean()) for t in range(self.num_tasks))

    @property
    def anytime_accuracy(self) -> float:
        """The mean of ``curve``: average incremental accuracy (Rebuffi 2017)."""
        return sum(self.curve) / self.num_tasks

    @property
    def learning_accuracy(self) -> float:
        """LA = (1/T) sum_i R[i, i]: how well each task is learned when it comes (Riemer 2019)."""
        return float(self.values.diagonal().mean())

    @property
    def worst_task(self) -> float:
        """min_i R[T, i]."""
        return float(self.values[-1].amin())

    def zero_shot_transfer(self, untrained: Sequence[float] | Tensor) -> float:
        """1/(T-1) sum_{i>=2} (R[i-1, i] - b_i): GEM's forward transfer (Lopez-Paz & Ranzato 2017).

        untrained: (T,) b_i, the accuracy of the untrained network on task i. Needs R[i-1, i].
        """
        return _mean_or_zero(self.values.diagonal(1) - self._per_task(untrained, "untrained")[1:])

    def learning_transfer(self, separate: Sequence[float] | Tensor) -> float:
        """1/(T-1) sum_{i>=2} (R[i, i] - s_i): the forward transfer that FROMP reports.

        separate: (T,) s_i, the accuracy of a fresh network trained on task i alone.
        """
        return _mean_or_zero((self.values.diagonal() - self._per_task(separate, "separate"))[1:])

    def intransigence(self, joint: Sequence[float] | Tensor) -> float:
        """(1/T) sum_i (joint_i - R[i, i]): what was never learned (Chaudhry 2018).

        joint: (T,) the accuracy on task i of a network trained on all tasks (or on tasks 1..i).
        """
        return float((self._per_task(joint, "joint") - self.values.diagonal()).mean())

    def _per_task(self, accuracies: Sequence[float] | Tensor, name: str) -> Tensor:
        accuracies = torch.as_tensor(accuracies, dtype=torch.float64)
        if accuracies.shape != (self.num_tasks,):
            raise ValueError(
                f"expected one {name} accuracy for each of the {self.num_tasks} tasks, "
                f"got shape {tuple(accuracies.shape)}"
            )
        _require_fractions(accuracies, f"{name} accuracies")
        return accuracies


def _mean_or_zero(differences: Tensor) -> float:
    return float(differences.mean()) if differences.numel() else 0.0


def _require_fractions(values: Tensor, what: str) -> None:
    outside = values[(values < 0) | (values > 1)]  # NaN compares as neither
    if outside.numel():
        raise ValueError(
            f"{what} must lie in [0, 1] or be NaN, got {outside.flatten()[0].item():g}; "
            "divide percentages by 100"
        )


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a set of examples; NaN where a quantity has no meaning.

    accuracy: fraction of right labels (Bernoulli: of right outputs); nll: mean nats per example;
    ece: expected calibration error, 15 bins; brier: mean of sum_c (p_c - y_c)², from 0 to 2
    (Bernoulli: mean of (p - y)² over examples and outputs); rmse: root of the mean squared error
    of E[y | f] over examples and outputs, for likelihoods without classes.
    """

    accuracy: float
    nll: float
    ece: float
    brier: float
    rmse: float
    num_examples: int


def evaluate(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    head: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """One pass over the data in eval mode without gradients; the mode is restored.

    head: the output units that compete, by default the one that the data carry. Batches are
    moved to the device of the model. The result does not depend on ``batch_size`` (but for
    rounding, and for models whose outputs depend on the batch). Of a ``Shard`` every rank gets
    that of all examples.

    Raises ValueError where there are no examples or labels lie outside of the outputs or of the
    head, NonFiniteError where an output is NaN or infinite.
    """
    head = head_of(data, head)
    device = next((p.device for p in model.parameters()), None)
    nll = squared = correct = 0.0
    n = num_predictions = 0
    bins = CalibrationBins.zeros(NUM_BINS)
    with torch.no_grad(), evaluating(model):
        for inputs, y, _ in batches(data, batch_size):
            inputs, y = move(inputs, device), move(y, device)
            f = forward(model, inputs)
            require_finite(f, "the model's output")
            mask = head_mask(head, f.shape[-1], f.device)
            likelihood.validate(f, y, mask)
            f = likelihood.mask(f, mask).double()
            n += len(f)
            nll += float(likelihood.nll(f, y).sum())
            mean = likelihood.mean(f)
            if isinstance(likelihood, Categorical):
                target = nn.functional.one_hot(y, f.shape[-1]) if y.ndim == 1 else y
                confidence, predicted = mean.max(-1)
                right = predicted == (y if y.ndim == 1 else y.argmax(-1))
                num_predictions += len(f)
            else:
                target = y.reshape(f.shape)
                confidence, right = torch.maximum(mean, 1 - mean), (mean > 0.5) == (target > 0.5)
                num_predictions += f.numel()
            squared += float((mean - target.double()).square().sum())
            if isinstance(likelihood, Categorical | Bernoulli):
                correct += float(right.sum())
                bins = bins.add(confidence, right)
    if isinstance(data, Shard):
        sums = torch.tensor([nll, squared, correct, n, num_predictions], dtype=torch.float64)
        held = [sums, bins.count, bins.confidence, bins.right]
        sums, *parts = (t.cpu() for t in data.sum([t.to(device or "cpu") for t in held]))
        (nll, squared, correct), (n, num_predictions) = sums[:3].tolist(), sums[3:].long().tolist()
        bins = CalibrationBins(*parts)
    if isinstance(likelihood, Categorical | Bernoulli):
        return Evaluation(
            accuracy=correct / num_predictions,
            nll=nll / n,
            ece=bins.error(),
            brier=squared / num_predictions,
            rmse=math.nan,
            num_examples=n,
        )
    rmse = math.sqrt(squared / num_predictions)
    return Evaluation(math.nan, nll / n, math.nan, math.nan, rmse, n)


class RowLearner(Protocol):
    """What learns a stream row by row; ``LaplaceFilter`` is one."""

    def predict(self, inputs: Any) -> Tensor:
        """(B, C) probabilities of C classes, or (B, 1) of class 1, before the labels are known."""
        ...

    def learn(self, inputs: Any, labels: Tensor) -> Self:
        """The learner after these rows; it may be the same object."""
        ...


L = TypeVar("L", bound=RowLearner)


@dataclass(frozen=True, eq=False)
class Prequential:
    """What was said of each row before it was learned (Dawid 1984), in the order of the stream.

    right: (N,) bool; nll: (N,) nats.
    """

    right: Tensor
    nll: Tensor

    def accuracy(self, start: int = 0, stop: int | None = None) -> float:
        """The fraction of rows start to stop - 1 that were foretold; NaN where there is none."""
        return float(self.right[start:stop].double().mean())

    def curve(self, window: int) -> Tensor:
        """(N // window,) the accuracy of each ``window`` rows, one after another.

        Raises ValueError where the window is not between 1 and N.
        """
        if not 1 <= window <= len(self.right):
            raise ValueError(f"expected a window from 1 to {len(self.right)} rows, got {window}")
        count = len(self.right) // window
        return self.right[: count * window].double().view(count, window).mean(1)


def prequential(
    learner: L,
    inputs: Inputs,
    labels: Tensor,
    *,
    block: int = 1,
    on_row: Callable[[int], None] | None = None,
) -> tuple[Prequential, L]:
    """Predict, then learn, each row once; and the learner after the last one.

    labels: (N,) int64. block: rows that are predicted before the first of their labels is known:
    1 where each label comes before the next row, 48 where those of a day come at midnight. on_row:
    called with the number of rows so far, after each block.

    Raises ValueError where rows and labels differ in number, block is below 1 or a prediction is
    no probability.
    """
    if len(labels) != rows(inputs) or len(labels) == 0 or block < 1:
        raise ValueError(
            "expected as many labels as rows, at least one, and block of at least 1, got "
            f"{len(labels)} labels of {rows(inputs)} rows and block={block}"
        )
    right, nll = [], []
    for start in range(0, len(labels), block):
        part, y = take(inputs, slice(start, start + block)), labels[start : start + block]
        p = learner.predict(part).detach().cpu().double()
        if p.ndim != 2 or len(p) != len(y) or not bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError(
                f"expected probabilities of shape ({len(y)}, C) from predict, got values "
                f"from {float(p.min()):g} to {float(p.max()):g} of shape {tuple(p.shape)}"
            )
        if p.shape[1] == 1:
            p = torch.cat([1 - p, p], dim=1)
        right.append(p.argmax(1) == y.cpu())
        nll.append(-p.gather(1, y.cpu().unsqueeze(1)).squeeze(1).clamp(min=_SMALLEST).log())
        learner = learner.learn(part, y)
        if on_row is not None:
            on_row(start + len(y))
    return Prequential(torch.cat(right), torch.cat(nll)), learner


_SMALLEST = 1e-12  # of a probability: one who was sure, and wrong, has lost 27.6 nats


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """Sums over the predictions whose confidence lies in (k/K, (k+1)/K]; each is (K,) float64.

    count: predictions; confidence: the sum of their probabilities; right: how many were right.
    """

    count: Tensor
    confidence: Tensor
    right: Tensor

    @classmethod
    def zeros(cls, num_bins: int) -> CalibrationBins:
        """No predictions yet."""
        return cls(*torch.zeros(3, num_bins, dtype=torch.float64))

    def add(self, confidence: Tensor, right: Tensor) -> CalibrationBins:
        """With these predictions too: their confidence in [0, 1] and whether they were right."""
        confidence, right = confidence.flatten().cpu().double(), right.flatten().cpu().double()
        num_bins = len(self.count)
        index = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
        return CalibrationBins(
            self.count + torch.bincount(index, minlength=num_bins),
            self.confidence + torch.bincount(index, confidence, num_bins),
            self.right + torch.bincount(index, right, num_bins),
        )

    @property
    def mean_confidence(self) -> Tensor:
        """(K,), NaN where a bin is empty."""
        return self.confidence / self.count

    @property
    def accuracy(self) -> Tensor:
        """(K,) the fraction of right predictions, NaN where a bin is empty."""
        return self.right / self.count

    def error(self) -> float:
        """ECE = sum_k (n_k / N) |accuracy_k - confidence_k| (Guo 2017)."""
        return float((self.right - self.confidence).abs().sum() / self.count.sum())


def calibration_bins(
    probabilities: Tensor, labels: Tensor, num_bins: int = NUM_BINS
) -> CalibrationBins:
    """Confidence beside accuracy, in bins of equal width: what a reliability diagram shows.

    probabilities: (N, C) of the classes, or (N,) of class 1; labels: (N,) int64. The confidence is
    the probability of the predicted class. Raises ValueError where the shapes do not fit or a
    probability lies outside of [0, 1].
    """
    if num_bins < 1 or len(probabilities) == 0 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            "expected at least one bin and one label for each of N >= 1 predictions, got "
            f"num_bins={num_bins}, probabilities of shape {tuple(probabilities.shape)} and labels "
            f"of shape {tuple(labels.shape)}"
        )
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("probabilities must lie in [0, 1]; apply softmax or sigmoid to logits")
    if probabilities.ndim == 1:
        probabilities = torch.stack([1 - probabilities, probabilities], dim=1)
    confidence, predicted = probabilities.max(-1)
    return CalibrationBins.zeros(num_bins).add(confidence, predicted == labels)


def calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> float:
    """ECE (Guo 2017), 0 is perfect; arguments and errors as in ``calibration_bins``."""
    return calibration_bins(probabilities, labels, num_bins).error()


def mean_and_standard_error(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and the standard error sd / sqrt(n) with sd of n - 1 degrees of freedom (ddof=1).

    One value has no spread: its standard error is NaN. Raises ValueError where there is none.
    """
    x = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if len(x) == 0:
        raise ValueError("expected at least one value, got none")
    error = float(x.std(correction=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), error

"""elec2: 45,312 half-hours of electricity prices, in the order of time, without tasks.

Each row is predicted, then learned, once (``metrics.prequential``): does the price lie above its
mean of the last day? Labels follow each other, so a learner may be told the ones before. Each
contestant is run twice: with the eight inputs alone, and with past labels beside them. ours and
river's get the same columns, one row at a time, by the same loop.

Ours was settled on the first tenth, by hand (docs/task-free.md). Settings of river's in the rows
"chosen" are the run's own choice: each candidate learns that tenth, and the best in accuracy then
learns the stream from its beginning. "accuracy_rest" is of the rows after it.
Data: Harries 1999; Gama et al. 2004.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...likelihoods import Bernoulli
from ...metrics import Prequential, RowLearner, prequential
from ...online import LaplaceFilter
from ...readers import find, load
from ..table import Cell, Context, Goal, Method, Table

LAGS = (1, 2, 48, 336)  # half-hours: the two before, yesterday and a week ago


def with_past_labels(inputs: Tensor, labels: Tensor, lags: Sequence[int]) -> Tensor:
    """(N, D + L): beside each row, the labels of the rows ``lags`` before it as ±1, 0 for none."""
    signs = 2.0 * labels.to(inputs.dtype) - 1
    columns = [torch.cat([signs.new_zeros(min(lag, len(signs))), signs[:-lag]]) for lag in lags]
    return torch.cat([inputs, torch.stack(columns, dim=1)], dim=1)


@dataclass
class NoChange:
    """The label before, for ever; half for the first row."""

    last: float = 0.5

    def predict(self, inputs: Tensor) -> Tensor:
        return torch.full((len(inputs), 1), self.last, dtype=torch.float64)

    def learn(self, inputs: Tensor, labels: Tensor) -> Self:
        self.last = float(labels[-1])
        return self


@dataclass
class River:
    """A classifier of ``river`` in the loop that ours is run in; rows go to it one at a time."""

    model: Any

    def predict(self, inputs: Tensor) -> Tensor:
        said = [self.model.predict_proba_one(_as_dict(x)).get(1, 0.5) for x in inputs]
        return torch.tensor(said, dtype=torch.float64).clamp(0, 1).unsqueeze(1)

    def learn(self, inputs: Tensor, labels: Tensor) -> Self:
        for x, y in zip(inputs, labels.tolist(), strict=True):
            self.model.learn_one(_as_dict(x), y)
        return self


def _as_dict(x: Tensor) -> dict[int, float]:
    return dict(enumerate(x.tolist()))


def _river(module: str) -> Any:
    try:
        return import_module(f"river.{module}")
    except ImportError as error:
        raise ImportError("river is not installed: pip install 'lifelong[river]'") from error


def _logistic(seed: int, *, lr: float | None = None) -> River:
    scale = _river("preprocessing").StandardScaler()
    options = {} if lr is None else {"optimizer": _river("optim").SGD(lr)}
    return River(scale | _river("linear_model").LogisticRegression(**options))


def _hoeffding(seed: int, **options: Any) -> River:
    return River(_river("tree").HoeffdingAdaptiveTreeClassifier(seed=seed, **options))


def _forest(seed: int, **options: Any) -> River:
    return River(_river("forest").ARFClassifier(seed=seed, **options))


def _ours(
    seed: int, *, num_inputs: int, networks: int, hidden: int, width: float, **options: Any
) -> RowLearner:
    """``networks`` small ones from different beginnings, each with all discounts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = [Skip(num_inputs, hidden, width) for _ in range(networks)]
    return LaplaceFilter.of(models, Bernoulli(), standardise=num_inputs, **options)


class Skip(nn.Module):
    """A hidden layer of tanh units, and a linear function beside it: (B, D) -> (B, 1).

    The linear function is ``width`` times what its weights say: under the prior N(theta_0, I) it
    can be that much steeper, and drifts that much faster.
    """

    def __init__(self, num_inputs: int, hidden: int, width: float) -> None:
        super().__init__()
        self.inner = nn.Linear(num_inputs, hidden)
        self.outer = nn.Linear(hidden, 1, bias=False)
        self.linear = nn.Linear(num_inputs, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x))) + self.width * self.linear(x)


_RIVERS: Mapping[str, Callable[..., RowLearner]] = {
    "logistic_regression": _logistic,
    "hoeffding_adaptive_tree": _hoeffding,
    "adaptive_random_forest": _forest,
}


@dataclass(frozen=True)
class PrequentialRun:
    """The ``run`` of the table: a cell is one pass over the stream.

    settings of a method: ``past_labels`` tells whether it sees them; ``grid``, values of each
    option among which the first ``tenth`` of the stream chooses; the rest are options of the
    learner. lags: which past labels. window: rows of each point of the curve.
    """

    data: str = "stream_elec"
    lags: tuple[int, ...] = LAGS
    tenth: float = 0.1
    window: int = 1008  # three weeks
    smoke_rows: int = 60

    def __call__(self, table: Table, cell: Cell, context: Context) -> dict[str, Any]:
        method = table.method(cell.method)
        options = dict(method.settings)
        inputs, labels = self.stream(context, past_labels=options.pop("past_labels"))
        first = max(1, int(self.tenth * len(labels)))
        tried = []
        for chosen in _grid(options.pop("grid", {})):
            learner = self.learner(method.preset, cell.seed, inputs, options | chosen)
            said, _ = prequential(learner, inputs[:first], labels[:first])
            tried.append({"options": chosen, "accuracy": said.accuracy()})
        if tried:
            options |= max(tried, key=lambda t: t["accuracy"])["options"]
        start = time.perf_counter()
        learner = self.learner(method.preset, cell.seed, inputs, options)
        said, learner = prequential(
            learner, inputs, labels, on_row=lambda n: context.report(n / len(labels))
        )
        seconds = time.perf_counter() - start
        return {
            **_measured(said, first),
            "curve": said.curve(min(self.window, len(labels))).tolist(),
            "river": version("river") if method.preset in _RIVERS else None,
            "options": options,
            "tried": tried,
            "seconds": seconds,
            "microseconds_per_row": 1e6 * seconds / len(labels),
            "stored_bytes": getattr(learner, "num_bytes", None),
        }

    def stream(self, context: Context, *, past_labels: bool) -> tuple[Tensor, Tensor]:
        """Inputs (N, D), float64, and labels (N,)."""
        if context.data is None:
            raise FileNotFoundError(f"expected a folder with {self.data}.parquet: give --data")
        examples = load(find(context.data, self.data))
        inputs, labels = examples.batch(slice(None)).inputs, examples.labels
        if not isinstance(inputs, Tensor):
            raise TypeError(f"expected rows of numbers in {self.data}, got a mapping")
        if context.smoke:
            inputs, labels = inputs[: self.smoke_rows], labels[: self.smoke_rows]
        inputs = inputs.double()
        return (with_past_labels(inputs, labels, self.lags) if past_labels else inputs), labels

    def learner(
        self, preset: str, seed: int, inputs: Tensor, options: Mapping[str, Any]
    ) -> RowLearner:
        if preset == "no_change":
            return NoChange()
        if preset == "laplace_filter":
            return _ours(seed, num_inputs=inputs.shape[1], **options)
        return _RIVERS[preset](seed, **options)


def _measured(said: Prequential, first: int) -> dict[str, Any]:
    return {
        "accuracy": said.accuracy(),
        "accuracy_first_tenth": said.accuracy(0, first),
        "accuracy_rest": said.accuracy(first),
        "nll": float(said.nll.mean()),
    }


def _grid(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination; none where nothing is to be chosen."""
    if not values:
        return []
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


_OURS = {"networks": 2, "hidden": 8, "width": 10.0}
_BY_HAND = "on the first tenth of the stream, by hand: docs/task-free.md"
_TENTH = "on the first tenth of the stream, among {}"
_RIVER = {
    "logistic regression": ("logistic_regression", {"lr": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}),
    "Hoeffding adaptive tree": (
        "hoeffding_adaptive_tree",
        {"grace_period": (50, 200), "delta": (1e-7, 1e-3)},
    ),
    "adaptive random forest": (
        "adaptive_random_forest",
        {"grace_period": (20, 50), "max_features": ("sqrt", None)},
    ),
}


def _rows(past_labels: bool) -> tuple[Method, ...]:
    said = ", past labels" if past_labels else ""
    told = {"past_labels": past_labels}
    rivals = [
        row
        for name, (preset, grid) in _RIVER.items()
        for row in (
            Method(f"river {name}{said}", preset, told, note="river's defaults"),
            Method(
                f"river {name}, chosen{said}",
                preset,
                {**told, "grid": grid},
                tuned=_TENTH.format("; ".join(f"{n} {list(v)}" for n, v in grid.items())),
            ),
        )
    ]
    return (
        Method(f"Laplace filter{said}", "laplace_filter", {**told, **_OURS}, tuned=_BY_HAND),
        *rivals,
    )


_NO_CHANGE = Method("no change", "no_change", {"past_labels": False}, note="the label before")
_RAW, _TOLD = _rows(False), _rows(True)
_OURS_ALONE = (_NO_CHANGE, _RAW[0], _TOLD[0])

ELEC2 = Table(
    name="elec2",
    title="elec2, a stream that drifts, without tasks: prequential accuracy",
    methods=(_NO_CHANGE, *_RAW, *_TOLD),
    memories=(0,),
    run=PrequentialRun(),
    goals=tuple(
        Goal(
            rows[0].name,
            0,
            kind="above",
            of=tuple(m.name for m in rows[1:]),
            why=f"river's best with the same inputs{', past labels among them' if told else ''}",
        )
        for told, rows in ((False, _RAW), (True, _TOLD))
    ),
    needs_data=True,
    smoke={"methods": _OURS_ALONE, "goals": ()},  # river's own are tested where it is installed
)

TABLES = (ELEC2,)

r"""Classes that keep coming, seen once, on frozen features: a linear head learned task by task.

    animals    13 tasks of 3 animals, EfficientNet-Lite0 features of 22 photos of each animal
    clinc150   10 tasks, each the 15 intents of a domain, MiniLM features of 100 texts of each

One head for all classes, and no task label when it is asked. The problem is convex, so that every
method is fitted to its minimum by ``refit`` and differs from the others by what it keeps alone. A
seed decides the order of the tasks and which examples are kept; memory is counted in examples of a
task. Every softmax row has the precision 0.01, the default of ``kprior``. The rows of regression
(one-hot labels, squares) have the precision of the largest evidence, found again after each task
from what is kept: X'X, X'Y and the squares, which are exact. So nothing is tuned anywhere.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import checkpoint, embeddings, presets
from ...data import Examples
from ...likelihoods import Categorical, Gaussian
from ...metrics import AccuracyMatrix, evaluate
from ...models import nbytes, parameters
from ...prior import Prior
from ...refit import refit
from ...terms import Regulariser
from ..lock import held
from ..table import Cell, Context, Goal, Method, Table

PRECISION = 1e-2  # of R in the softmax rows, nats
ITERATIONS = 3000  # of L-BFGS: stiff quadratics take many
_STEPS = 49  # precisions that the evidence is asked about, eight to a factor of ten
_KIND = "features"


# Features -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Features (N, D) and labels to learn from and to be tested on; groups: each task's classes."""

    train: Examples
    test: Examples
    groups: tuple[tuple[int, ...], ...]

    @property
    def num_classes(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def num_features(self) -> int:
        return self.train.inputs.shape[1]  # type: ignore[union-attr]

    def task(self, *tasks: int) -> Examples:
        """What there is to learn in these tasks."""
        return of_classes(self.train, [c for t in tasks for c in self.groups[t]])


def of_classes(data: Examples, classes: list[int]) -> Examples:
    """The examples of those classes."""
    return data[torch.isin(data.labels, torch.tensor(classes)).nonzero().squeeze(1)]


TEST_PHOTOS, HELD_OUT = 8, 5  # of the 30 of each animal: the last 8; of the other 22 the last 5


def animals(context: Context, validation: bool) -> Split:
    """The last 8 photos of each animal are for the test; with ``validation`` the 5 before them are
    tested on instead and 17 are left to learn from."""

    def make() -> dict[str, Tensor]:
        table = parquet(context, "caltech101_animals30")
        return {
            "inputs": embeddings.image_features([row["bytes"] for row in table["image"]]),
            "labels": torch.tensor(table["label"]),
        }

    found = cached(context, "animals30", make)
    data = Examples(found["inputs"], found["labels"])
    rank = torch.zeros_like(data.labels)
    for c in data.labels.unique():
        rank[data.labels == c] = torch.arange(int((data.labels == c).sum()))
    last = int(rank.max()) + 1 - TEST_PHOTOS
    test = (rank >= last - HELD_OUT) & (rank < last) if validation else rank >= last
    train = rank < (last - HELD_OUT if validation else last)
    classes = data.labels.unique().tolist()
    groups = tuple(tuple(classes[i : i + 3]) for i in range(0, len(classes), 3))
    return Split(data[train.nonzero().squeeze(1)], data[test.nonzero().squeeze(1)], groups)


def clinc150(context: Context, validation: bool) -> Split:
    """The set's own splits; with ``validation`` that of this name stands for the test."""

    def make(split: str) -> dict[str, Tensor]:
        table = parquet(context, f"clinc150-{split}")
        domains = sorted(set(table["domain"]))
        return {
            "inputs": embeddings.text_features(table["text"]),
            "labels": torch.tensor(table["label"]),
            "domains": torch.tensor([domains.index(d) for d in table["domain"]]),
        }

    found = {
        split: cached(context, f"clinc150-{split}", lambda split=split: make(split))
        for split in ("train", "val" if validation else "test")
    }
    train, test = (Examples(of["inputs"], of["labels"]) for of in found.values())
    domains = found["train"]["domains"]
    groups = tuple(
        tuple(train.labels[domains == d].unique().tolist()) for d in domains.unique().tolist()
    )
    return Split(train, test, groups)


def synthetic(context: Context, validation: bool) -> Split:
    """Six noisy points in eight dimensions, two to a task: for a smoke test, nothing else."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    parts = []
    for count in (40, 6):
        labels = torch.arange(6).repeat_interleave(count)
        noise = 0.5 * torch.randn(len(labels), 8, generator=generator)
        parts.append(Examples(centres[labels] + noise, labels))
    return Split(*parts, groups=((0, 1), (2, 3), (4, 5)))


SOURCES: Mapping[str, Callable[[Context, bool], Split]] = {
    "animals": animals,
    "clinc150": clinc150,
    "synthetic": synthetic,
}


def parquet(context: Context, stem: str) -> dict[str, list[Any]]:
    """The columns of a file of the data folder. Raises ValueError without a folder,
    FileNotFoundError, ImportError without pyarrow."""
    if context.data is None:
        raise ValueError("this table reads data: say in which folder they are, with --data")
    path = context.data / f"{stem}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in the data folder")
    try:
        from pyarrow import parquet as reader
    except ImportError as error:
        raise ImportError(
            "reading Parquet files needs pyarrow: pip install 'lifelong[data]'"
        ) from error
    return reader.read_table(path).to_pydict()


def cached(context: Context, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` returns, made once for all cells, again of other data or by other code."""
    of = str(context.data).encode() + Path(embeddings.__file__).read_bytes()
    code = hashlib.sha256(of).hexdigest()[:8]
    path = context.cache / f"{name}-{code}.safetensors"
    with held(path.with_suffix(".lock")):
        if not path.is_file():
            checkpoint.save(path, make(), kind=_KIND)
    return checkpoint.load(path, kind=_KIND)


# Learning -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenRun:
    """Calling it computes one cell.

    source: of ``SOURCES``. precision: of R in the softmax rows. tolerance: of the gradient at the
    minimum, beside its parts. curve: train jointly after every task, not after the last one alone.
    validation: test on held-out training examples, for choosing settings. first_seed: of the cell
    with seed 0.
    """

    source: str
    precision: float = PRECISION
    tolerance: float = 1e-3
    curve: bool = False
    validation: bool = False
    first_seed: int = 0

    def __call__(self, table: Table, cell: Cell, context: Context) -> dict[str, Any]:
        method = table.method(cell.method)
        split = SOURCES["synthetic" if context.smoke else self.source](context, self.validation)
        generator = torch.Generator().manual_seed(self.first_seed + cell.seed)
        order = torch.randperm(len(split.groups), generator=generator).tolist()
        states = self._states(method, cell.memory, split, order, generator)
        return measured(states, split, order, context.report)

    def _states(
        self,
        method: Method,
        memory: int,
        split: Split,
        order: list[int],
        generator: torch.Generator,
    ) -> Iterator[State]:
        if method.preset == "joint":
            return jointly(split, self._seen(order), self.precision, self._solve)
        if method.preset == "joint_regression":
            return jointly_by_squares(split, self._seen(order))
        if method.preset == "regression":
            return by_squares(split, [split.task(t) for t in order])
        prior = make_prior(method.preset, method.settings, memory, self.precision)
        return in_a_row(split, order, prior, self._solve, generator)

    def _seen(self, order: list[int]) -> list[list[int]]:
        """The tasks after which there is joint training."""
        first = 1 if self.curve else len(order)
        return [order[:count] for count in range(first, len(order) + 1)]

    def _solve(self, model: nn.Module, prior: Prior, data: Examples) -> int:
        found = refit(
            model,
            prior,
            data,
            method="lbfgs",
            tolerance=self.tolerance,
            max_iterations=ITERATIONS,
        )
        return found.gradients


def make_prior(
    preset: str, settings: Mapping[str, Any], memory: int, precision: float = PRECISION
) -> Prior:
    """A prior that has seen nothing: ``memory`` examples of each task, R of that precision."""
    make: Callable[..., Prior] = getattr(presets, preset)
    known = inspect.signature(make).parameters
    given = {"memory": memory, "precision": precision, "total": False, **settings}
    prior = make(Categorical(), **{k: v for k, v in given.items() if k in known or k in settings})
    if "precision" in known:
        return prior
    return prior + presets.weight_decay(Categorical(), precision=precision)


Solve = Callable[[nn.Module, Prior, Examples], int]  # examples that were backpropagated


@dataclass(frozen=True)
class State:
    """After some tasks: the head, what is kept, and how many examples were backpropagated."""

    tasks: int
    model: nn.Linear
    kept: Prior | Examples
    gradients: int


def head(split: Split) -> nn.Linear:
    """A linear head at 0: where the problem is convex the start decides no number."""
    model = nn.Linear(split.num_features, split.num_classes)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def in_a_row(
    split: Split, order: list[int], prior: Prior, solve: Solve, generator: torch.Generator
) -> Iterator[State]:
    """Fit each task, then update the prior."""
    model, gradients = head(split), 0
    for count, t in enumerate(order, 1):
        data = split.task(t)
        gradients += solve(model, prior, data)
        prior = prior.update(model, data, generator=generator)
        yield State(count, model, prior, gradients)


def jointly(split: Split, seen: list[list[int]], precision: float, solve: Solve) -> Iterator[State]:
    """All data of the tasks so far, again, for each of ``seen``."""
    model, gradients = head(split), 0
    prior = presets.weight_decay(Categorical(), precision=precision)
    for tasks in seen:
        data = split.task(*tasks)
        gradients += solve(model, prior, data)
        yield State(len(tasks), model, data, gradients)


# Regression ---------------------------------------------------------------------------------------


def by_squares(split: Split, parts: list[Examples]) -> Iterator[State]:
    """Linear regression on one-hot labels by g and G alone: exact, whatever the order."""
    model, gradients = head(split), 0
    prior = presets.gradient_reconstruction(
        Gaussian(), memory=0, gradient="stored", structure="kronecker", strength=1.0, precision=1.0
    )
    for count, data in enumerate(parts, 1):
        rows = nn.functional.one_hot(data.labels, split.num_classes).float()
        prior = prior.update(model, replace(data, labels=rows))
        prior = most_evident(model, prior)
        gradients += len(data)
        yield State(count, model, prior, gradients)


def jointly_by_squares(split: Split, seen: list[list[int]]) -> Iterator[State]:
    """The same with all data so far at once."""
    for tasks in seen:
        data = split.task(*tasks)
        for state in by_squares(split, [data]):
            yield replace(state, tasks=len(tasks), kept=data)


def most_evident(model: nn.Linear, prior: Prior) -> Prior:
    r"""``prior`` with the precision of the largest evidence, and the model at its minimum there.

    With a precision delta beside unit noise, b = X'Y and n numbers y of squares yy (one-hot labels:
    the number of examples), noise and weights integrate out of

        log p(Y) = ½ (P log delta - log |G + delta I| - n log(yy - <b, (G + delta I)⁻¹ b>)) + ...

    where the variance of the noise is at its best for each delta (MacKay 1992). Raises ValueError
    for a prior that no data have been learned under.
    """
    weight = prior.weight
    if weight is None or weight.curvature is None:
        raise ValueError("expected a prior with the curvature of data; update it first")
    slope = weight.slope({n: torch.zeros_like(a) for n, a in weight.anchor.items()})
    b = {n: -g.double() for n, g in slope.items()}
    G = weight.curvature.to(dtype=torch.float64)
    size = sum(v.numel() for v in b.values())
    count, squares = prior.num_data * model.out_features, prior.num_data

    def evidence(delta: float) -> float:
        theta = G.inverse_mv(b, delta)
        left = squares - sum(float((b[n] * theta[n]).sum()) for n in b)
        return size * math.log(delta) - float(G.logdet(delta)) - count * math.log(left)

    # Down to a millionth: what is below is rounding in float32.
    largest = max(float(v.max()) for v in G.diagonal().values())
    delta = max((largest * 10.0 ** (-k / 8) for k in range(_STEPS)), key=evidence)
    with torch.no_grad():
        for name, value in G.inverse_mv(b, delta).items():
            parameters(model)[name].copy_(value)
    return prior.replace(regulariser=Regulariser(delta))


# Measuring ----------------------------------------------------------------------------------------


def measured(
    states: Iterator[State], split: Split, order: list[int], report: Callable[[float], None]
) -> dict[str, Any]:
    """What a cell's record holds: fractions, nats, bytes, seconds. Task i of the matrix is the
    i-th that was learned; all classes compete, those that have not come yet as well."""
    tests = [of_classes(split.test, list(split.groups[t])) for t in order]
    matrix, state, seconds, start = AccuracyMatrix.empty(len(order)), None, 0.0, time.perf_counter()
    for state in states:
        seconds += time.perf_counter() - start
        row = [evaluate(state.model, test, Categorical()).accuracy for test in tests[: state.tasks]]
        matrix = matrix.with_row(state.tasks - 1, row)
        report(state.tasks / len(order))
        start = time.perf_counter()
    if state is None:
        raise ValueError("there is no task to learn")
    found = evaluate(state.model, split.test, Categorical())
    return {
        "accuracy": found.accuracy,
        "anytime_accuracy": matrix.anytime_accuracy,
        "backward_transfer": matrix.backward_transfer,
        "forgetting": matrix.forgetting,
        "learning_accuracy": matrix.learning_accuracy,
        "worst_task": matrix.worst_task,
        "nll": found.nll,
        "ece": found.ece,
        "matrix": matrix.to_list(),
        "order": order,
        "seconds": seconds,
        "gradients": state.gradients,
        **_kept(state.kept),
    }


def _kept(kept: Prior | Examples) -> dict[str, Any]:
    if isinstance(kept, Examples):
        return {
            "memory_examples": len(kept),
            "memory_bytes": nbytes(kept.inputs) + nbytes(kept.labels),
        }
    memory, regulariser = kept.memory, kept.regulariser
    return {
        "memory_examples": 0 if memory is None else len(memory),
        "memory_origins": [] if memory is None else memory.origin.tolist(),
        "memory_bytes": kept.num_bytes,
        "strengths": list(kept.strengths),
        "precision": None if regulariser is None else regulariser.precision,
    }


# Tables -------------------------------------------------------------------------------------------

_ALL = "all data so far, again"
_EVIDENCE = "on one-hot labels; precision by the evidence of what is kept"

METHODS = (
    Method("joint", "joint", note=_ALL),
    Method("joint_regression", "joint_regression", memories=(0,), note=_ALL + "; " + _EVIDENCE),
    Method("finetune", "finetune"),
    Method("experience_replay", "experience_replay", {"balanced": True}),
    Method("derpp", "derpp"),
    Method("kprior", "kprior", {"population": True, "score": "random"}),
    Method("kprior, lambda", "kprior", {"population": True}),
    Method("compact_memory", "compact_memory", note="learned vectors instead of examples"),
    Method("gradient_reconstruction", "gradient_reconstruction"),
    Method("recommended", "recommended"),
    Method("online_ewc", "online_ewc", {"strength": "auto"}),
    Method(
        "online_laplace, kronecker",
        "online_laplace",
        {"structure": "kronecker", "strength": "auto", "precision": PRECISION},
    ),
    Method("regression", "regression", memories=(0,), note=_EVIDENCE),
)


def _table(name: str, title: str, memories: tuple[int, ...], memory: int, bar: float) -> Table:
    """memory: the examples of each task for which joint training is the goal, less ``bar``."""
    kronecker = Method(
        "gradient_reconstruction, kronecker",
        "gradient_reconstruction",
        {"structure": "kronecker"},
        memories=(memory,),
    )
    ours = ("gradient_reconstruction", kronecker.name, "recommended", "regression")
    return Table(
        name=name,
        title=title,
        methods=(*METHODS, kronecker),
        memories=memories,
        run=FrozenRun(name, curve=name == "animals"),
        goals=tuple(Goal(row, memory, bar, "below", ("joint",)) for row in ours),
        needs_data=True,
        smoke={"memories": (2,), "needs_data": False},
    )


ANIMALS = _table(
    "animals",
    "Animals seen once: 13 tasks of 3, class-incremental, a head on frozen EfficientNet-Lite0",
    (3, 6, 15),
    6,
    3.0,
)
CLINC150 = _table(
    "clinc150",
    "CLINC150: 10 domains of 15 intents, class-incremental, a head on frozen MiniLM",
    (15, 30, 75),
    75,
    1.5,
)
TABLES: tuple[Table, ...] = (ANIMALS, CLINC150)

"""What each part of the recommended prior brings: one part changed at a time.

A row's settings are fields of the ``Recipe`` of ``BASE``, each in place of what BASE has; a change
that BASE has made already is left out. The choices of BASE come from such comparisons, so the test
data take no part: of 6,000 training examples of each task a sixth stands for them, with other
seeds than those of the other tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...config import Training
from ...likelihoods import Categorical
from ...presets import PRESETS
from ...prior import Prior
from ...streams import TaskStream
from ..streams import StreamRun, held_out, reduced
from ..table import Context, Method, Table

BASE = "recommended"

# name -> fields of the recipe
PARTS: Mapping[str, Mapping[str, Any]] = {
    "gradient: stored": {"gradient": "stored"},
    "gradient: stationary": {"gradient": "stationary"},
    "gradient: anchored": {"gradient": "anchored"},
    "curvature: none": {"structure": None, "strength": 1.0},
    "curvature: diagonal": {"structure": "diagonal"},
    "curvature: kronecker": {"structure": "kronecker"},
    "estimator: exact": {"estimator": "exact"},
    "estimator: mc": {"estimator": "mc"},
    "estimator: empirical": {"estimator": "empirical"},
    "curvature of: all examples": {"curvature_examples": None},
    "curvature of: 1,000 examples": {"curvature_examples": 1000},
    "memory in the curvature too": {"exclude_memory": False},
    "score: random": {"score": "random"},
    "score: lambda": {"score": "lambda"},
    "score: k_centre": {"score": "k_centre"},
    "score: residual": {"score": "residual"},
    "soft labels: asked at the changed input": {"refresh": True, "ask": True},
    "soft labels: of the input as it is": {"refresh": True, "ask": False},
    "soft labels: as recorded": {"refresh": False, "ask": False},
    "labels: soft": {"soft": 1.0, "hard": 0.0, "replay_fraction": 0.0},
    "labels: half soft, half true": {"soft": 0.5, "hard": 0.5, "replay_fraction": 0.0},
    "labels: half of the items true": {"soft": 1.0, "hard": 0.0, "replay_fraction": 0.5},
    "labels: true": {"soft": 0.0, "hard": 1.0, "replay_fraction": 0.0},
    "weights: N/M": {"population": True},
    "weights: 1": {"population": False},
    "tasks: by their size": {"equal_tasks": False},
    "tasks: equal": {"equal_tasks": True},
    "strength: auto": {"strength": "auto"},
    "strength: 1": {"strength": 1.0},
}


def methods(base: str = BASE) -> tuple[Method, ...]:
    """The yardsticks, the base, and a row for each part that differs from the base's."""
    recipe = PRESETS[base](Categorical(), memory=1).recipe
    changed = {
        name: fields
        for name, fields in PARTS.items()
        if any(getattr(recipe, field) != value for field, value in fields.items())
    }
    if recipe.structure is None:  # then no estimator and no strength make a difference
        changed = {n: f for n, f in changed.items() if n.split(":")[0] not in _OF_A_CURVATURE}
    return (
        Method("finetune", "finetune"),
        Method("joint", "joint"),
        Method("as recommended", base),
        *(Method(name, base, dict(fields)) for name, fields in changed.items()),
    )


_OF_A_CURVATURE = ("estimator", "curvature of", "strength", "memory in the curvature too")


@dataclass(frozen=True)
class Ablation(StreamRun):
    """A stream of which ``examples`` of each task are used; the rows of ``base`` have fields of
    the recipe as settings."""

    base: str = BASE
    examples: int = 6000
    validation: float = 1 / 6
    first_seed: int = 100
    smoke_tasks: int = 2

    def stream(self, context: Context) -> TaskStream:
        whole = replace(self, validation=0.0)
        stream = StreamRun.stream(whole, context)
        return held_out(reduced(stream, self.examples), self.validation)

    def _key(self, training: Training, seed: int, context: Context) -> str:
        return f"{super()._key(training, seed, context)}-{self.examples}"

    def prior_of(self, method: Method, memory: int, num_tasks: int) -> Prior:
        if method.preset != self.base:
            return super().prior_of(method, memory, num_tasks)
        prior = super().prior_of(replace(method, settings={}), memory, num_tasks)
        return replace(prior, recipe=replace(prior.recipe, **method.settings))


# Chosen for time alone, not by any accuracy.
_TRAINING = Training(epochs=4, batch_size=128, memory_batch_size=128, lr=2e-3, schedule="one-cycle")
_DISTORTED = replace(_TRAINING, augment="elastic")  # as the tables of Split MNIST
_NOTE = (
    "One part of the recommended prior changed at a time. On a sixth of 6,000 training examples of "
    "each task, held out; the test data take no part."
)


def _table(
    name: str, title: str, memory: int, run: Ablation, *, smoke_rows: int | None = None
) -> Table:
    """smoke_rows: how many the tiny version has; all of them in one table are enough."""
    return Table(
        name=f"ablation-{name}",
        title=f"{title}: what each part brings",
        methods=methods(run.base),
        memories=(memory,),
        run=run,
        seeds=3,
        needs_data=True,
        note=_NOTE,
        smoke={"memories": (4,), "methods": methods(run.base)[:smoke_rows]},
    )


TABLES = (
    _table(
        "split-mnist-class",
        "Split MNIST, class-incremental, 40 a task",
        40,
        Ablation("split-mnist", "class", _DISTORTED),
    ),
    _table(
        "split-mnist",
        "Split MNIST, task-incremental, 40 a task",
        40,
        Ablation("split-mnist", "task", _DISTORTED),
        smoke_rows=4,
    ),
    _table(
        "permuted-mnist",
        "Permuted MNIST, 200 a task",
        200,
        Ablation("permuted-mnist", "domain", _TRAINING),
        smoke_rows=4,
    ),
)

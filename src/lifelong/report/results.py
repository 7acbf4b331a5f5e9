"""What a report is made of: plain values, and the few numbers that are computed from them.

Nothing here knows a model, so a report can be made again from what a run wrote to disk. Accuracies
are fractions in [0, 1]; they become percent only where a person reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..metrics import AccuracyMatrix, mean_and_standard_error

Row = tuple[float | None, ...]

# Joint training and one network per task see more than a continual learner may: they are bounds
# to compare with, and never the best method.
REFERENCES = frozenset({"joint", "separate"})
# Training on the new task alone, first name first: what every method is measured against.
PLAIN = ("finetune", "weight_decay")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``error`` is its standard error (ddof 1), None where there is one seed."""

    mean: float
    error: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """None where a value is missing: a mean over some of the seeds would mislead."""
        if not values or not all(math.isfinite(v) for v in values):
            return None
        if len(values) == 1:
            return cls(float(values[0]))
        mean, error = mean_and_standard_error(values)
        return cls(float(mean), float(error))


@dataclass(frozen=True)
class RunSummary:
    """One seed of one method.

    ``accuracy[t][i]`` is the accuracy on task i after task t was learned, in [0, 1]; None or NaN
    where it was not measured. Memory is what is kept for the next task, seconds are wall clock.
    """

    seed: int
    accuracy: tuple[Row, ...]  # (T, T)
    seconds: float
    memory_examples: int
    memory_bytes: int

    def __post_init__(self) -> None:
        size = len(self.accuracy)
        if size == 0 or any(len(row) != size for row in self.accuracy):
            raise ValueError(
                "accuracy must have one row and one column per task, got rows of length "
                f"{[len(row) for row in self.accuracy]}; put None where nothing was measured"
            )
        for t, row in enumerate(self.accuracy):
            for i, value in enumerate(row):
                if value is not None and not math.isnan(value) and not 0 <= value <= 1:
                    raise ValueError(
                        f"accuracy[{t}][{i}] must lie in [0, 1], got {value}; "
                        "divide percentages by 100"
                    )
        for name in ("seconds", "memory_examples", "memory_bytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")

    @cached_property
    def matrix(self) -> AccuracyMatrix:
        return AccuracyMatrix.from_list(self.accuracy)

    @property
    def final_accuracy(self) -> float:
        """Mean over all tasks after the last one; NaN where one was not measured."""
        return self.matrix.average_accuracy

    @property
    def forgetting(self) -> float:
        """Best accuracy before the end minus the final one, over the earlier tasks; or NaN."""
        return self.matrix.forgetting

    def accuracy_after(self, tasks: int) -> float:
        """Mean accuracy on the first ``tasks`` tasks once those were learned; NaN if unmeasured."""
        return self.matrix.after(tasks - 1).average_accuracy


def _measured(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


@dataclass(frozen=True)
class MethodResult:
    """The runs of one method; ``name`` is the preset's, ``label`` is for people. preset: where the
    name is another, of one method with several settings."""

    name: str
    label: str
    runs: tuple[RunSummary, ...]
    note: str = ""
    preset: str = ""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"method {self.name!r} has no runs; give at least one RunSummary")

    @property
    def is_reference(self) -> bool:
        return (self.preset or self.name) in REFERENCES

    @cached_property
    def final_accuracy(self) -> Estimate | None:
        return Estimate.of([run.final_accuracy for run in self.runs])

    @cached_property
    def forgetting(self) -> Estimate | None:
        return Estimate.of([run.forgetting for run in self.runs])

    @property
    def memory_examples(self) -> float:
        return math.fsum(run.memory_examples for run in self.runs) / len(self.runs)

    @property
    def memory_bytes(self) -> float:
        return math.fsum(run.memory_bytes for run in self.runs) / len(self.runs)

    @property
    def seconds(self) -> float:
        return math.fsum(run.seconds for run in self.runs) / len(self.runs)

    @cached_property
    def curve(self) -> tuple[Estimate | None, ...]:
        """Average accuracy over the tasks seen so far, after each task."""
        tasks = len(self.runs[0].accuracy)
        return tuple(
            Estimate.of([run.accuracy_after(t) for run in self.runs]) for t in range(1, tasks + 1)
        )

    @cached_property
    def mean_matrix(self) -> tuple[tuple[float | None, ...], ...]:
        """Lower triangle of the mean over seeds; None where any seed was not measured."""

        def cell(t: int, i: int) -> float | None:
            values = [_measured(run.accuracy[t][i]) for run in self.runs]
            known = [v for v in values if v is not None]
            return math.fsum(known) / len(known) if len(known) == len(values) else None

        return tuple(
            tuple(cell(t, i) for i in range(t + 1)) for t in range(len(self.runs[0].accuracy))
        )


@dataclass(frozen=True)
class Section:
    """One experiment: several methods on the same tasks.

    ``examples`` names what a memory holds ("digits"), for the sentences.
    """

    title: str
    description: str
    task_names: tuple[str, ...]
    methods: tuple[MethodResult, ...]
    examples: str = "examples"

    def __post_init__(self) -> None:
        if not self.task_names or not self.methods:
            raise ValueError(f"section {self.title!r} needs at least one task and one method")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(
                f"section {self.title!r} names a method twice: {names}; give each its own name"
            )
        for method in self.methods:
            for run in method.runs:
                if len(run.accuracy) != len(self.task_names):
                    raise ValueError(
                        f"section {self.title!r} has {len(self.task_names)} tasks, but seed "
                        f"{run.seed} of {method.name!r} has {len(run.accuracy)}; a matrix needs "
                        "one row and one column per task"
                    )

    @property
    def seeds(self) -> int:
        """The largest number of seeds of any method."""
        return max(len(method.runs) for method in self.methods)

    def best(self, quantity: str) -> MethodResult | None:
        """The method whose "final_accuracy" is highest, or "forgetting" lowest, if one really is.

        It must be ahead of every other method by more than two standard errors of the difference,
        so with one seed, or one method, there is none. References do not take part.
        """
        sign = {"final_accuracy": 1.0, "forgetting": -1.0}[quantity]
        values = [(m, _value(m, quantity)) for m in self.methods if not m.is_reference]
        known = [(m, e) for m, e in values if e is not None and e.error is not None]
        if len(known) < 2 or len(known) < len(values):
            return None
        winner, top = max(known, key=lambda pair: sign * pair[1].mean)
        others = [e for m, e in known if m is not winner]
        return winner if all(_apart(top, e, sign) for e in others) else None

    def within_error(self, method: MethodResult) -> tuple[MethodResult, ...]:
        """The other methods that ``method`` is not ahead of by two standard errors."""
        top = method.final_accuracy
        return tuple(
            m
            for m in self.methods
            if m is not method
            and not m.is_reference
            and top is not None
            and m.final_accuracy is not None
            and not _apart(top, m.final_accuracy, 1.0)
        )

    @property
    def plain(self) -> MethodResult | None:
        named = {method.name: method for method in self.methods}
        return next((named[name] for name in PLAIN if name in named), None)

    @property
    def leader(self) -> MethodResult | None:
        """Highest mean final accuracy, references left out, ahead by much or by little."""
        known = [
            (e.mean, m)
            for m in self.methods
            if not m.is_reference and (e := m.final_accuracy) is not None
        ]
        return max(known, key=lambda pair: pair[0])[1] if known else None


def _value(method: MethodResult, quantity: str) -> Estimate | None:
    return method.final_accuracy if quantity == "final_accuracy" else method.forgetting


def _apart(a: Estimate, b: Estimate, sign: float) -> bool:
    if a.error is None or b.error is None:
        return False
    return sign * (a.mean - b.mean) > 2 * math.hypot(a.error, b.error)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image, uint8 (H, W) grey or (H, W, 3) RGB, or the bytes of a PNG file."""

    image: NDArray[np.uint8] | bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    title: str
    caption: str
    items: tuple[Picture, ...]


@dataclass(frozen=True)
class Report:
    title: str
    subtitle: str
    sections: tuple[Section, ...]
    galleries: tuple[Gallery, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    command: str = ""

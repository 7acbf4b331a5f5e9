"""The exact diagonal GGN of a data set against C plain forward-backward passes over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lifelong import Categorical, Examples, diagonal_curvature
from lifelong.data import BATCH_SIZE, batches

from .cases import CASES, CLASSES
from .conftest import Compare
from .ratios import Work

# How many examples, so that a round takes seconds; the cost of both sides is linear in it.
EXAMPLES = {"MLP 784-256-256-10": 10_000, "small CNN": 512, "CifarNet": 128}
CURVATURE: dict[str, Callable[[nn.Module, Examples], object]] = {
    "exact": lambda model, data: diagonal_curvature(model, data, Categorical()),
    "mc": lambda model, data: diagonal_curvature(model, data, Categorical(), estimator="mc"),
    "empirical": lambda model, data: diagonal_curvature(
        model, data, Categorical(), estimator="empirical"
    ),
}


def passes(model: nn.Module, data: Examples, count: int) -> Work:
    """``count`` forward-backward passes over the data, in the same batches."""
    params = list(model.parameters())

    def run() -> None:
        for _ in range(count):
            for inputs, labels, _ids in batches(data, BATCH_SIZE):
                loss = F.cross_entropy(model(inputs), labels, reduction="sum")  # type: ignore[arg-type]
                torch.autograd.grad(loss, params)

    return run


@pytest.mark.parametrize("case", EXAMPLES)
def test_exact_diagonal(compare: Compare, case: str) -> None:
    model, data = CASES[case].build().eval(), CASES[case].examples(EXAMPLES[case])
    compare(
        lambda: CURVATURE["exact"](model, data),
        passes(model, data, CLASSES),
        bar=f"4 exact diagonal GGN / {CLASSES} forward-backward passes",
        case=f"{case}, {EXAMPLES[case]} examples",
        limit=1.3,
        rounds=3,
    )


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
@pytest.mark.parametrize("case", EXAMPLES)
def test_one_pass_diagonal(compare: Compare, case: str, estimator: str) -> None:
    model, data = CASES[case].build().eval(), CASES[case].examples(EXAMPLES[case])
    compare(
        lambda: CURVATURE[estimator](model, data),
        passes(model, data, 1),
        bar="4 one-sample diagonal / one forward-backward pass",
        case=f"{estimator}, {case}, {EXAMPLES[case]} examples",
        limit=None,
        rounds=3,
    )


@pytest.mark.parametrize("side", ["one pass", *CURVATURE])
def test_table_of_curvature(benchmark: Any, side: str) -> None:
    case = "MLP 784-256-256-10"
    benchmark.group = f"curvature of 2,000 examples, {case}"
    model, data = CASES[case].build().eval(), CASES[case].examples(2_000)
    if side == "one pass":
        benchmark.pedantic(passes(model, data, 1), rounds=3)
    else:
        benchmark.pedantic(lambda: CURVATURE[side](model, data), rounds=3)

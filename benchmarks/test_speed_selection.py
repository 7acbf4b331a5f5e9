"""Scoring and selecting a memory against an inference pass over the same data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lifelong import Categorical, Examples, evaluating, memorise
from lifelong.data import BATCH_SIZE, batches

from .cases import CASES
from .conftest import Compare
from .ratios import Work

SIZE = 200
# The part of a stream that comes near the memory, and so is copied, falls as the stream grows.
EXAMPLES = [("MLP 784-256-256-10", 10_000), ("MLP 784-256-256-10", 60_000), ("small CNN", 2_048)]


def inference(model: nn.Module, data: Examples) -> Work:
    """Outputs of all examples, in the same batches."""

    def run() -> None:
        with evaluating(model), torch.no_grad():
            for inputs, _labels, _ids in batches(data, BATCH_SIZE):
                model(inputs)

    return run


def selection(model: nn.Module, data: Examples, score: str = "lambda") -> Work:
    return lambda: memorise(model, data, Categorical(), budget=SIZE, score=score, per_class=True)


@pytest.mark.parametrize(("case", "count"), EXAMPLES)
def test_score_and_select(compare: Compare, case: str, count: int) -> None:
    model, data = CASES[case].build(), CASES[case].examples(count)
    compare(
        selection(model, data),
        inference(model, data),
        bar="5 score and select 200 / inference",
        case=f"lambda, {case}, {count} examples",
        limit=1.2,
        rounds=11,
    )


@pytest.mark.parametrize("side", ["inference", "lambda", "residual", "random"])
def test_table_of_selection(benchmark: Any, side: str) -> None:
    case = "MLP 784-256-256-10"
    benchmark.group = f"select 200 of 10,000, {case}"
    model, data = CASES[case].build(), CASES[case].examples(10_000)
    work = inference(model, data) if side == "inference" else selection(model, data, side)
    benchmark.pedantic(work, rounds=5, warmup_rounds=1)

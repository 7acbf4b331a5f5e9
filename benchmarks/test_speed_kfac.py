"""K-FAC with one Monte-Carlo sample against one plain forward-backward pass over the data."""

from __future__ import annotations

import pytest

from lifelong import Categorical, kronecker_curvature

from .cases import CASES
from .conftest import Compare
from .test_speed_curvature import passes

# How many examples, so that a round takes seconds; the cost of both sides is linear in it.
EXAMPLES = {"MLP 784-256-256-10": 10_000, "CifarNet": 1_024}


@pytest.mark.parametrize("case", EXAMPLES)
def test_kronecker(compare: Compare, case: str) -> None:
    model, data = CASES[case].build().eval(), CASES[case].examples(EXAMPLES[case])
    compare(
        lambda: kronecker_curvature(model, data, Categorical(), estimator="mc"),
        passes(model, data, 1),
        bar="K-FAC, one sample / one forward-backward pass",
        case=f"{case}, {EXAMPLES[case]} examples",
        limit=2.0,
        rounds=5,
    )

"""``Recipe.curvature_examples``: G of some examples, each for several; right on average."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lifelong
from lifelong import Categorical, Examples, Prior
from lifelong.curvature import diagonal_curvature
from lifelong.presets import PRESETS
from lifelong.recall import thinned
from lifelong.recipe import Recipe

PRESETS_WITH_IT = ("ewc", "fromp", "gradient_reconstruction")


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def task(size: int = 24) -> Examples:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return Examples(x, torch.arange(size) % 4, torch.arange(size) + 100)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learned(limit: int | None, seed: int = 0, **changes: Any) -> Prior:
    recipe = Recipe(structure="diagonal", curvature_examples=limit, **changes)
    return Prior(Categorical(), recipe).update(net(), task(), generator=drawn(seed))


def diagonal(prior: Prior) -> torch.Tensor:
    assert prior.weight is not None
    assert prior.weight.curvature is not None
    return torch.cat([v.flatten() for v in prior.weight.curvature.diagonal().values()])


def test_weights_stand_for_those_that_are_not_kept() -> None:
    kept = torch.tensor([100, 105, 123])
    weights = thinned(task(), 7, kept, drawn(0))
    assert weights is not None
    assert torch.equal(weights.unique(), torch.tensor([0.0, 21 / 7]).double())
    assert weights.count_nonzero() == 7
    assert not weights[kept - 100].any()
    plain = thinned(TensorDataset(task().inputs, task().labels), 7, kept - 100, drawn(0))
    assert torch.equal(weights, torch.as_tensor(plain))  # ids are positions there
    assert torch.equal(torch.as_tensor(thinned(task(), 7)), torch.as_tensor(thinned(task(), 7)))


@pytest.mark.parametrize("limit", [None, 21, 30])
def test_where_all_may_be_read_all_are(limit: int | None) -> None:
    assert thinned(task(), limit, torch.tensor([100, 105, 123])) is None


def test_each_is_drawn_equally_often() -> None:
    total = sum(torch.as_tensor(thinned(task(), 6, None, drawn(s))) for s in range(400))
    assert torch.allclose(total / 400, torch.ones(24).double(), atol=0.35)  # 4 sigma


def test_the_curvature_is_that_of_the_weighted_examples() -> None:
    weights = thinned(task(), 6, None, drawn(3))
    expected = diagonal_curvature(net(), task(), Categorical(), weights=weights)
    flat = torch.cat([v.flatten() for v in expected.values.values()])
    assert torch.allclose(diagonal(learned(6, seed=3)), flat)
    assert torch.allclose(diagonal(learned(24)), diagonal(learned(None)))


def test_what_is_kept_is_left_out_and_the_others_count_for_all_of_them() -> None:
    """Of copies of one example any sample has the same G, without what is kept."""
    model = net()
    one = task()[torch.zeros(12, dtype=torch.int64)]
    data = replace(one, ids=torch.arange(12))
    recipe = Recipe(structure="diagonal", memory=3, score="random", curvature_examples=4)
    prior = Prior(Categorical(), recipe).update(model, data, generator=drawn(0))
    each = diagonal_curvature(model, data[:1], Categorical()).values
    flat = torch.cat([v.flatten() for v in each.values()])
    assert torch.allclose(diagonal(prior), 9 * flat)


def test_auto_reads_the_same_examples() -> None:
    strengths = [learned(n, strength="auto", seed=5).strengths for n in (6, 24, None)]
    assert strengths[1] == strengths[2]
    assert strengths[0] != strengths[2]


@pytest.mark.parametrize("name", PRESETS_WITH_IT)
def test_presets_take_it(name: str) -> None:
    prior = PRESETS[name](Categorical(), curvature_examples=5, estimator="mc")
    assert (prior.recipe.curvature_examples, prior.recipe.estimator) == (5, "mc")
    assert Recipe.from_dict(prior.recipe.to_dict()) == prior.recipe
    assert prior.update(net(), task(240)).num_data == 240


def test_it_is_a_number_of_examples() -> None:
    with pytest.raises(ValueError, match="curvature_examples must be at least 1, or None"):
        lifelong.ewc(Categorical(), curvature_examples=0)

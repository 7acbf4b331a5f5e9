"""The table of Split Tiny ImageNet: which rows are the same method, and what they keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lifelong import Categorical
from lifelong.bench.tables.tiny import SPLIT_TINY_IMAGENET as TABLE
from lifelong.bench.tables.tiny import TABLES
from lifelong.presets import PRESETS

RUN: Any = TABLE.run


def test_the_goal_is_of_recommended_but_for_the_sample() -> None:
    """All tasks are of one size, where equal tasks change nothing."""
    (goal,) = TABLE.goals
    prior = RUN.prior_of(TABLE.method(goal.method), goal.memory, 10)
    recommended = PRESETS["recommended"](Categorical(), memory=goal.memory)
    same = {"name": "", "curvature_examples": None, "equal_tasks": False, "estimator": "mc"}
    assert replace(prior.recipe, **same) == replace(recommended.recipe, **same)
    assert prior.terms == recommended.terms


def test_every_method_keeps_as_much_of_each_task() -> None:
    for method in TABLE.methods:
        for memory in method.memories_of(TABLE):
            recipe = RUN.prior_of(method, memory, 10).recipe
            if method.preset != "joint":  # which keeps everything
                assert (recipe.memory, recipe.total) == (memory, False), method.name


@pytest.mark.parametrize(
    ("name", "structure", "parts"),
    [
        ("FR", None, (1.0, 0.0, 0.0)),
        ("FR+R", None, (1.0, 0.0, 0.5)),
        ("EWC+FR", "diagonal", (1.0, 0.0, 0.0)),
        ("EWC+FR+R", "diagonal", (1.0, 0.0, 0.5)),
    ],
)
def test_the_published_parts(
    name: str, structure: str | None, parts: tuple[float, float, float]
) -> None:
    recipe = RUN.prior_of(TABLE.method(name), 100, 10).recipe
    assert recipe.structure == structure
    assert (recipe.soft, recipe.hard, recipe.replay_fraction) == parts


def test_all_methods_are_trained_alike() -> None:
    assert {RUN.training_of(method) for method in TABLE.methods} == {RUN.training}
    assert TABLES == (TABLE,)

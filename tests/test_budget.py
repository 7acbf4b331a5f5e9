"""Budgets: what is written is what is read, and a budget of bytes is never exceeded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lifelong
from lifelong import Bytes, Categorical, Examples, Fidelity, Recipe
from lifelong.budget import parse, plain

LIKELIHOOD = Categorical()
BUDGETS = st.one_of(
    st.none(),
    st.integers(0, 10**9),
    st.integers(1, 10**12).map(Bytes),
    st.floats(0, 1, exclude_min=True).map(Fidelity),
)


def data(n: int = 30, features: int = 6, start: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(start)
    x = torch.randn(n, features, generator=generator)
    return Examples(x, torch.arange(n) % 3, torch.arange(start, start + n))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


@given(BUDGETS)
def test_plain_values_are_read_again(budget):
    text = json.loads(json.dumps(plain(budget)))
    assert parse(text) == budget
    if budget is not None:
        assert parse(str(text)) == budget  # as a flag


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("200", 200),
        ("1_000", 1000),
        ("12,345,678", 12_345_678),
        ("1,000.5kB", Bytes(1_000_500)),
        (np.int64(7), 7),
        ("20MB", Bytes(20_000_000)),
        ("20 MiB", Bytes(20 * 2**20)),
        ("1.5kB", Bytes(1500)),
        ("2gib", Bytes(2 * 2**30)),
        ("700B", Bytes(700)),
        ("fidelity:0.95", Fidelity(0.95)),
        ("Fidelity:1", Fidelity(1.0)),
    ],
)
def test_texts(text, budget):
    assert parse(text) == budget


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("few", ValueError, "'few' is no budget: expected a number of examples"),
        ("20 XB", ValueError, "is no budget"),
        ("1.5", ValueError, "is no budget"),
        ("1,5MB", ValueError, "is no budget"),
        ("fidelity:0,95", ValueError, "names no fidelity"),
        ("fidelity:high", ValueError, "names no fidelity"),
        ("fidelity:1.5", ValueError, r"a fidelity to reach lies in \(0, 1\], got 1.5"),
        ("0B", ValueError, "at least 1, got 0"),
        (-1, ValueError, "memory must not be negative, got -1"),
        (0.5, TypeError, "a budget of 0.5 makes no memory"),
        (True, TypeError, "a budget of True makes no memory"),
    ],
)
def test_what_is_no_budget(given, error, message):
    with pytest.raises(error, match=message):
        parse(given)


@given(st.integers(1, 5000))
def test_bytes_hold_as_many_items_as_fit(count):
    net, examples = model(), data()
    one = lifelong.memorise(net, examples, LIKELIHOOD, budget=1).num_bytes
    if count < one:
        with pytest.raises(ValueError, match=f"holds no example: one takes {one}"):
            lifelong.memorise(net, examples, LIKELIHOOD, budget=Bytes(count))
        return
    items = lifelong.memorise(net, examples, LIKELIHOOD, budget=Bytes(count))
    assert items.num_bytes <= count
    assert len(items) == min(30, count // one)
    same = lifelong.memorise(net, examples, LIKELIHOOD, budget=len(items))
    assert torch.equal(items.origin, same.origin)


@pytest.mark.parametrize("score", ["random", "lambda"])
def test_a_total_memory_never_exceeds_its_bytes(score):
    net = model()
    recipe = Recipe("total", memory="1kB", total=True, score=score, per_class=score != "random")
    prior = lifelong.Prior(LIKELIHOOD, recipe)
    for task in range(4):
        generator = torch.Generator().manual_seed(task)
        prior = prior.update(net, data(start=30 * task), generator=generator)
        assert prior.memory.num_bytes <= 1000
    one = prior.memory[:1].num_bytes
    assert len(prior.memory) == 1000 // one
    assert len(prior.memory.task.unique()) > 1


def test_recipes_are_plain_values():
    for given_, found in (
        ("20MB", Bytes(20_000_000)),
        (Fidelity(0.9), Fidelity(0.9)),
        ("200", 200),
        (None, None),
    ):
        recipe = lifelong.kprior(LIKELIHOOD, memory=given_).recipe
        assert recipe.memory == found
        assert recipe.keeps_memory
        again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert again == recipe


def test_a_prior_with_a_budget_is_saved_and_goes_on(tmp_path):
    net = model()
    prior = lifelong.kprior(LIKELIHOOD, memory="2kB").update(net, data())
    again = lifelong.Prior.load(prior.save(tmp_path / "prior.safetensors"))
    assert again.recipe == prior.recipe
    assert torch.equal(
        again.update(net, data(start=30)).memory.origin,
        prior.update(net, data(start=30)).memory.origin,
    )


def test_learners_take_budgets():
    net = model()
    prior = lifelong.kprior(LIKELIHOOD, memory="fidelity:0.7")
    learner = lifelong.Learner(net, prior, epochs=1)
    learner.learn(lifelong.Task(0, "one", data()))
    assert 1 <= len(learner.prior.memory) < 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(memory="fidelity:0.9", total=True), "a total memory has a size"),
        (lambda: lifelong.fromp(LIKELIHOOD, memory=Fidelity(0.9)), "couples its examples"),
        (lambda: lifelong.compact_memory(LIKELIHOOD, memory="1kB"), "compact vectors have no true"),
    ],
)
def test_budgets_that_a_recipe_cannot_keep(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ids_that_are_named_win_over_the_budget():
    items = lifelong.memorise(
        model(), data(), LIKELIHOOD, ids=torch.tensor([3, 4]), budget=Fidelity(0.5)
    )
    assert items.origin.tolist() == [3, 4]

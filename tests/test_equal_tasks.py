"""``Recipe.equal_tasks``: tasks count, not examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lifelong
from lifelong import Categorical, Examples, Learner, Prior, Recipe
from lifelong.streams import Task

EVERY = {"memory": None, "score": "random", "soft": 0.0, "hard": 1.0, "gradient": "none"}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def task(size: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return Examples(x, torch.arange(size) % 4)


def learned(sizes: list[int], **recipe: Any) -> Prior:
    prior = Prior(Categorical(), Recipe(**recipe))
    for t, size in enumerate(sizes):
        prior = prior.prepare(net(), task(size, t)).update(net(), task(size, t))
    return prior


def changed() -> nn.Module:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    return model


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(4, 30), min_size=1, max_size=4), st.integers(1, 50))
def test_the_loss_is_a_mean_over_tasks_of_means_over_their_examples(sizes, now):
    """Times the number of tasks, where all examples are replayed."""
    new, model = task(now, 9), changed()
    prior = learned(sizes, equal_tasks=True, **EVERY).prepare(model, new)
    got = prior.loss(model, new.inputs, new.labels, num_data=now)
    tasks = [task(size, t) for t, size in enumerate(sizes)]
    means = [F.cross_entropy(model(t.inputs), t.labels) for t in (*tasks, new)]
    assert torch.allclose(got, sum(means), rtol=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.integers(4, 30), st.integers(4, 30))
def test_weights_and_memory_are_scaled_alike_and_beliefs_tell(first, second):
    how = {"structure": "diagonal", "memory": 2, "score": "random", "gradient": "stored"}
    plain = learned([first], **how)
    prior = learned([first], equal_tasks=True, **how).prepare(net(), task(second))
    model = changed()
    assert torch.allclose(prior(model), second / first * plain(model), rtol=1e-9)
    assert prior.beliefs == pytest.approx((second / first,))
    assert (prior.task_size, plain.task_size) == (second, 0)


def test_tasks_of_one_size_change_nothing():
    how = {"structure": "diagonal", "memory": 4, "score": "lambda"}
    model = changed()
    equal = learned([12, 12], equal_tasks=True, **how)
    assert torch.equal(equal(model), learned([12, 12], **how)(model))


def test_an_update_without_prepare_comes_to_the_same():
    how = {"structure": "diagonal", "gradient": "carried", "equal_tasks": True}
    prepared = learned([12, 30, 7], **how)
    prior = Prior(Categorical(), Recipe(**how))
    for t, size in enumerate([12, 30, 7]):
        prior = prior.update(net(), task(size, t))
    assert torch.allclose(prior(changed()), prepared(changed()))
    assert prior.beliefs == pytest.approx((7 / 12, 7 / 30, 1.0))


def test_a_prior_from_a_file_goes_on():
    prior = learned([12, 30], equal_tasks=True, **EVERY)
    again = Prior.from_state_dict(prior.state_dict())
    assert again.task_size == prior.task_size == 30
    old = {k: v for k, v in prior.state_dict().items() if k != "task_size"}
    assert Prior.from_state_dict(old).task_size == 0


def test_a_regulariser_is_of_no_task():
    prior = lifelong.gradient_reconstruction(
        Categorical(), memory=4, precision=3.0, equal_tasks=True, strength=1.0
    ).update(net(), task(10))
    after = prior.prepare(net(), task(40))
    assert after.regulariser is prior.regulariser


def test_the_learner_prepares():
    prior = lifelong.experience_replay(Categorical(), memory=4, total=False, equal_tasks=True)
    learner = Learner(net(), prior, batch_size=4)
    for t, size in enumerate([12, 30]):
        learner.learn(Task(t, str(t), task(size, t)))
    assert learner.prior.beliefs == pytest.approx((30 / 12, 1.0))
    memory = learner.prior.memory
    assert memory is not None
    assert memory.hard_weight.tolist() == pytest.approx([30 / 4] * 8)


@pytest.mark.parametrize(
    "changes", [{"total": True, "score": "random"}, {"kernel": "identity"}, {"distil": 1.0}]
)
def test_terms_must_be_of_one_task_each(changes):
    with pytest.raises(ValueError, match="equal tasks need terms that are each of one task"):
        Recipe(equal_tasks=True, memory=3, **changes)


def test_the_sum_of_two_priors_counts_the_tasks_of_both_alike():
    """Whatever size each had been brought to before."""
    recipe = {"equal_tasks": True, **EVERY}
    one, other = learned([20], **recipe), learned([8], **recipe)
    model, new = changed(), task(10, 9)
    both = (one + other).prepare(model, new)
    apart = one.prepare(model, new)(model) + other.prepare(model, new)(model)
    assert torch.allclose(both(model), apart, rtol=1e-12)
    assert (Prior(Categorical(), one.recipe) + other).task_size == 8


def test_no_examples_change_nothing():
    prior = learned([20], equal_tasks=True, **EVERY)
    assert prior.prepare(net(), task(20)[:0]) is prior


def test_a_few_examples_that_are_added_are_no_task_beside_the_others():
    learner = Learner(net(), Prior(Categorical(), Recipe(equal_tasks=True, **EVERY)))
    learner.learn(Task(0, "first", task(20)))
    learner.add(task(3, 1), max_iterations=2)
    assert learner.prior.beliefs == (1.0, 1.0)
    assert learner.prior.recipe.equal_tasks


def test_groups_of_a_sampled_task_add_up_to_its_curvature():
    prior = Prior(Categorical(), Recipe(structure="diagonal", curvature_examples=5))
    groups = torch.arange(20) % 4
    prior = prior.update(net(), task(20), groups=groups)
    left = prior.forget(net(), groups=[0, 1, 2, 3]).weight
    assert (
        left is None
        or left.curvature is None
        or all(v.abs().max() < 1e-9 for v in left.curvature.diagonal().values())
    )


@pytest.mark.parametrize("batch_size", [None, 4, 10, 15, 30])
def test_examples_drawn_are_counted_as_they_are_drawn(batch_size):
    """Kernels draw whole tasks."""
    for make in (lifelong.fromp, lifelong.kprior):
        prior = make(Categorical(), memory=8)
        for t in range(3):
            prior = prior.update(net(), task(20, t))
        drawn = prior._draw(batch_size, torch.Generator())
        assert prior.num_drawn(batch_size) == sum(len(d.inputs) for _, d in drawn)


def test_what_a_sample_cannot_give_back_is_told_as_such():
    """An example that the curvature does not hold cannot be taken out of it."""
    recipe = Recipe(structure="diagonal", curvature_examples=1)
    data = task(20)
    prior = Prior(Categorical(), recipe).update(net(), data, generator=torch.Generator())

    def forget_all(prior: Prior) -> None:
        for i in range(20):
            prior = prior.forget(net(), data[i : i + 1])

    with pytest.raises(ValueError, match=r"of a sample \(curvature_examples\)"):
        forget_all(prior)

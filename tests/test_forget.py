"""Forgetting: by id, by a property, by group; a group leaves as if its data had been read again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lifelong
from lifelong import Examples, Prior, Recipe, Regulariser, removal
from lifelong.curvature import Kronecker, estimate
from lifelong.errors import ClippedWarning, NotHeldWarning
from lifelong.groups import Groups
from lifelong.terms import MemoryTerm
from lifelong.testing import cases, laws
from lifelong.testing.cases import Case, Split
from lifelong.unlearning import unlearn

GLMS = {c.name: c for c in cases.glms()}
NETWORKS = {c.name: c for c in cases.networks()}
GAUSSIAN = cases.linear_gaussian()
SPLITS = cases.SPLITS


def of(data: Examples, groups: int = 3, seed: int = 5) -> Tensor:
    """A group for each example, at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(groups, (len(data),), generator=generator)


def learned(
    prior: Prior, case: Case, tasks: int, split: Split, *, fit: bool = True
) -> tuple[nn.Module, Prior]:
    """As ``laws.learn``, with groups that go on from task to task."""
    model = case.make_model(0)
    for task, data in enumerate(case.data[:tasks]):
        now = prior
        if fit:
            model = laws.minimum(
                model, lambda m, d=data, p=now: laws.nats(case.likelihood, m, d) + p(m)
            )
        items = split.remember(case, model, task, 0)
        prior = prior.recall(model, data, items, groups=of(data, seed=5 + task))
    return model, prior


def without(case: Case, tasks: int, group: int) -> list[Examples]:
    parts = enumerate(case.data[:tasks])
    return [d[(of(d, seed=5 + t) != group).nonzero().squeeze(1)] for t, d in parts]


# ------------------------------------------------------------------ groups


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: s.name)
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("case", [GAUSSIAN, cases.orthogonal()], ids=lambda c: c.name)
def test_a_group_leaves_as_if_it_had_never_been(case: Case, tasks: int, split: Split) -> None:
    """Linear-Gaussian, any split into memory and quadratic, over several tasks and anchors: refit
    without reading the group = retraining without it."""
    prior = laws.law_prior(case.likelihood)
    model, after = learned(prior, case, tasks, split)
    left = after.forget(model, groups=[1])
    refit = laws.minimum(model, left)
    rest = without(case, tasks, 1)
    batch = laws.retrained(case, model, Regulariser(0.5), *rest)
    assert laws.distance(laws.weights(refit), laws.weights(batch)) < 1e-9
    assert left.num_data == sum(len(d) for d in rest)


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: s.name)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_group_leaves_at_the_anchor(name: str, split: Split) -> None:
    """Any network, at any weights: exactly sum_group J*ᵀ r leaves the gradient."""
    case = NETWORKS[name]
    prior = laws.law_prior(case.likelihood, structure="diagonal")
    model, after = learned(prior, case, 1, split, fit=False)
    left = after.forget(model, groups=[0, 2])
    (rest,) = [case.data[0][(of(case.data[0]) == 1).nonzero().squeeze(1)]]
    truth = laws.slope(model, laws.nats(case.likelihood, model, rest) + prior(model))
    assert laws.distance(laws.slope(model, left(model)), truth) < 1e-12


@pytest.mark.parametrize("structure", ["diagonal", "dense", "block", "isotropic", "low_rank"])
@pytest.mark.parametrize("memory", [0, 4])
def test_statistics_are_the_data_given_again(structure: Any, memory: int) -> None:
    case = NETWORKS["mlp Categorical"]
    recipe = Recipe("t", structure=structure, rank=200, memory=memory, score="random")
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    groups = of(data)
    after = prior.update(model, data, groups=groups, generator=torch.Generator().manual_seed(3))
    which = (groups == 2).nonzero().squeeze(1)
    by_statistics = after.forget(model, groups=[2])
    by_data = after.forget(model, data[which], groups=groups[which])
    plain = replace(after, terms=tuple(_ungrouped(t) for t in after.terms))
    by_data_without_groups = plain.forget(model, data[which])
    place = laws.moved(model, by=0.2, seed=4)
    value = by_statistics(place)
    torch.testing.assert_close(value, by_data(place))
    torch.testing.assert_close(value, by_data_without_groups(place))
    assert by_statistics.num_data == by_data.num_data == len(data) - len(which)
    for left in (by_statistics, by_data):
        assert left.weight is not None
        assert left.weight.groups is not None
        assert left.weight.groups.known == {0, 1}


def _ungrouped(term: Any) -> Any:
    return replace(term, groups=None) if hasattr(term, "groups") else term


def test_part_of_a_group_then_the_rest():
    """An example in memory first, then some that were not, then what is left of the group: each
    leaves once, in any order."""
    case = GLMS["multinomial"]
    recipe = Recipe("t", structure="dense", memory=6, score="random")
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    groups = of(data, groups=2)
    after = prior.update(model, data, groups=groups, generator=torch.Generator().manual_seed(0))
    assert after.memory is not None
    origin = after.memory.origin
    inside = origin[groups[origin] == 1][:1]
    outside = torch.tensor([i for i in range(len(data)) if i not in origin and groups[i] == 1])[:2]
    once = after.forget(model, groups=[1])
    steps = after.forget(model, ids=inside)
    steps = steps.forget(model, data[outside], groups=groups[outside])
    steps = steps.forget(model, groups=[1])
    place = laws.moved(model, by=0.2, seed=4)
    torch.testing.assert_close(once(place), steps(place))
    assert once.num_data == steps.num_data == int((groups == 0).sum())
    left = once.forget(model, groups=[0])
    assert left.num_data == 0
    assert left.memory is None
    torch.testing.assert_close(left(place), prior(place))


def test_what_is_evicted_joins_its_group():
    """A memory bounded in total: an example that had to leave it is forgotten with its group all
    the same. Linear-Gaussian, so exactly."""
    case = GAUSSIAN
    recipe = Recipe("t", structure="dense", memory=5, total=True, score="random", per_class=False)
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    model = case.make_model(0)
    for task, data in enumerate(case.data[:3]):
        now = prior
        model = laws.minimum(
            model, lambda m, d=data, p=now: laws.nats(case.likelihood, m, d) + p(m)
        )
        generator = torch.Generator().manual_seed(task)
        prior = prior.update(model, data, groups=of(data, seed=5 + task), generator=generator)
    left = prior.forget(model, groups=[1])
    assert left.num_data == sum(len(d) for d in without(case, 3, 1))
    batch = laws.retrained(case, model, Regulariser(0.5), *without(case, 3, 1))
    assert laws.distance(laws.weights(laws.minimum(model, left)), laws.weights(batch)) < 1e-9


def test_replay_forgets_the_members_of_a_group():
    """A prior without g and G holds of a group what is in memory, and nothing else."""
    case = NETWORKS["mlp Categorical"]
    prior = lifelong.experience_replay(case.likelihood, memory=6)
    model, data = case.make_model(0), case.data[0]
    groups = of(data)
    after = prior.update(model, data, groups=groups, generator=torch.Generator().manual_seed(0))
    with pytest.warns(NotHeldWarning, match="holds nothing of 1 of these"):
        left = after.forget(model, groups=[0])
    assert left.memory is not None
    assert after.memory is not None
    expected = after.memory.origin[groups[after.memory.origin] != 0]
    assert torch.equal(left.memory.origin, expected)
    assert left.num_data == int((groups != 0).sum())


@pytest.mark.parametrize(
    "name", ["finetune", "lwf", "experience_replay", "der", "weight_decay", "ewc"]
)
def test_what_is_in_no_part_of_a_prior_is_not_said_to_be_removed(name: str) -> None:
    """Either something of an example changes the prior, or the call says that nothing did."""
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    options = {"memory": 5} if name in ("experience_replay", "der") else {}
    after = getattr(lifelong, name)(case.likelihood, **options).update(model, data)
    held = torch.tensor([], dtype=torch.long) if after.memory is None else after.memory.origin
    outside = data[(~torch.isin(data.ids, held)).nonzero().squeeze(1)]
    place = laws.moved(model, by=0.2, seed=4)
    if after.weight is not None and after.weight.curvature is not None:
        found = after._removal(model, outside[:4])
        assert (found.given, found.not_held) == (4, 0)
        assert not torch.equal(after._without(found)(place), after(place))
        return
    with laws.untouched(model), pytest.raises(ValueError, match="use gradient_reconstruction"):
        after.forget(model, outside[:4])
    if not len(held):
        return
    with pytest.warns(NotHeldWarning, match="holds nothing of") as caught:
        left = after.forget(model, data)
    (told,) = (w.message for w in caught)
    assert isinstance(told, NotHeldWarning)
    assert told.count == len(data) - len(held)
    assert left.num_data == 0
    assert left.memory is None


@pytest.mark.parametrize("loader", [False, True])
def test_groups_of_any_data(loader: bool) -> None:
    case = NETWORKS["mlp Categorical"]
    data = case.data[0]
    recipe = Recipe("t", structure="diagonal")
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    pairs = TensorDataset(data.inputs, data.labels)  # type: ignore[arg-type]
    given: Any = DataLoader(pairs, batch_size=5) if loader else pairs
    model, groups = case.make_model(0), of(data)
    groups[:2] = -1
    head = data.head
    a = prior.update(model, data, groups=groups).forget(model, groups=[1])
    b = prior.update(model, given, head=head, groups=groups, batch_size=4).forget(model, groups=[1])
    place = laws.moved(model, by=0.2, seed=4)
    torch.testing.assert_close(a(place), b(place))


def test_groups_are_saved_moved_scaled_and_transferred(tmp_path: Path):
    case = NETWORKS["mlp Categorical"]
    model, prior = learned(
        laws.law_prior(case.likelihood, structure="diagonal"), case, 2, Split("part", memory=0.3)
    )
    place = laws.moved(model, by=0.2, seed=4)
    truth = prior.forget(model, groups=[1])(place)
    loaded = Prior.load(prior.save(tmp_path / "prior.safetensors"))
    assert loaded.num_bytes == prior.num_bytes
    assert torch.equal(loaded.forget(model, groups=[1])(place), truth)
    torch.testing.assert_close(prior.transfer(model).forget(model, groups=[1])(place), truth)
    half = prior.discount(0.5).forget(model, groups=[1])
    regulariser = prior.regulariser
    assert regulariser is not None
    r = regulariser(place)
    torch.testing.assert_close(half(place) - r, 0.5 * (truth - r))
    single = prior.to(dtype=torch.float32)
    assert single.weight is not None
    assert single.weight.groups is not None
    share = single.weight.groups.shares[1]
    assert share.gradient is not None
    assert {v.dtype for v in share.gradient.values()} == {torch.float32}
    ungrouped = replace(prior, terms=tuple(_ungrouped(t) for t in prior.terms))
    size = sum(p.numel() for p in model.parameters())
    assert prior.num_bytes - ungrouped.num_bytes >= 3 * 2 * 8 * size


def test_groups_take_no_part_in_the_value():
    case = NETWORKS["mlp Categorical"]
    prior, model, data = laws.law_prior(case.likelihood), case.make_model(0), case.data[0]
    place = laws.moved(model, by=0.2, seed=4)
    grouped, plain = prior.update(model, data, groups=of(data)), prior.update(model, data)
    assert torch.equal(grouped(place), plain(place))


# ------------------------------------------------------------------ ids, beliefs, strengths

# The same ids in each task, as Examples have them unless told.
TASKS = [replace(data, ids=torch.arange(len(data))) for data in GAUSSIAN.data]
KEEPS_SOME = Recipe("t", structure="dense", memory=5, score="random", per_class=False)


def two_tasks(
    recipe: Recipe, *, strengths: tuple[float, ...] = (), **options: Any
) -> tuple[nn.Module, Prior]:
    """The linear-Gaussian case, two tasks whose ids are the same."""
    prior = Prior(GAUSSIAN.likelihood, recipe, (Regulariser(0.5),))
    model = GAUSSIAN.make_model(0)
    for task, data in enumerate(TASKS[:2]):
        if strengths:
            prior = replace(prior, recipe=replace(recipe, strength=strengths[task]))
        now = prior
        model = laws.minimum(
            model, lambda m, d=data, p=now: laws.nats(GAUSSIAN.likelihood, m, d) + p(m)
        )
        prior = prior.update(model, data, generator=torch.Generator().manual_seed(task), **options)
    return model, prior


def origins(prior: Prior, task: int) -> list[int]:
    assert prior.memory is not None
    return prior.memory.origin[prior.memory.task == task].tolist()


def only_in(prior: Prior, task: int) -> Tensor:
    """Ids that memory holds of this task alone."""
    return torch.tensor(sorted(set(origins(prior, task)) - set(origins(prior, 1 - task))))


def big_g(prior: Prior) -> Tensor:
    assert prior.weight is not None
    assert prior.weight.curvature is not None
    return prior.weight.curvature.dense().matrix


def test_an_id_counts_within_its_task() -> None:
    """Ids of task 0 that memory holds of task 1 alone: what leaves is never the item of task 1."""
    model, prior = two_tasks(KEEPS_SOME)
    ids, first = only_in(prior, 1), TASKS[0]
    with laws.untouched(model), pytest.raises(ValueError, match="say of which task the data are"):
        prior.forget(model, first[ids])
    relabelled = replace(TASKS[1], labels=TASKS[1].labels + 1)
    with pytest.raises(ValueError, match="say of which task the data are"):
        prior.forget(model, relabelled[ids])
    left = prior.forget(model, first[ids], task=0)
    assert origins(left, 1) == origins(prior, 1)
    stays = torch.tensor([i for i in range(len(first)) if i not in ids])
    batch = laws.retrained(GAUSSIAN, model, Regulariser(0.5), first[stays], TASKS[1])
    assert laws.distance(laws.weights(laws.minimum(model, left)), laws.weights(batch)) < 1e-9


@pytest.mark.parametrize("task", [None, 0])
def test_an_id_is_no_proof_of_an_example(task: int | None) -> None:
    """Other people's examples that were given these ids: one task, or one that is named."""
    case = GLMS["multinomial"]
    prior = Prior(case.likelihood, KEEPS_SOME, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data, generator=torch.Generator().manual_seed(0))
    others = replace(data[10:], ids=torch.arange(len(data) - 10))
    with laws.untouched(model), pytest.raises(ValueError, match="with other inputs or labels"):
        after.forget(model, others, task=task)
    place = laws.moved(model, by=0.2, seed=4)
    turned = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(1))]
    for size in (3, 512):  # in any order, in any batches
        left = after.forget(model, turned, task=task, batch_size=size)
        torch.testing.assert_close(left(place), prior(place))


def test_an_example_leaves_once() -> None:
    case = GLMS["multinomial"]
    prior = Prior(case.likelihood, KEEPS_SOME, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data, generator=torch.Generator().manual_seed(0))
    twice = data[torch.tensor([3, 7, 3])]
    with laws.untouched(model), pytest.raises(ValueError, match=r"ids \[3\] are given twice"):
        after.forget(model, twice)


def test_the_same_examples_need_no_task() -> None:
    """Inputs and labels tell as well; also in a dict, and in another dtype."""
    model, prior = two_tasks(KEEPS_SOME)
    mine = TASKS[1][only_in(prior, 1)]
    place = laws.moved(model, by=0.2, seed=4)
    truth = prior.forget(model, mine, task=1)(place)
    assert torch.equal(prior.forget(model, mine)(place), truth)
    single = replace(mine, inputs=mine.inputs.float())  # type: ignore[union-attr]
    rounded = replace(prior, terms=tuple(_rounded(t) for t in prior.terms))
    assert len(origins(rounded.forget(model, single), 1)) == 5 - len(mine)
    pair = {"x": torch.ones(2, 3), "n": torch.arange(2)}
    assert removal._equal(pair, {"n": torch.arange(2), "x": torch.ones(2, 3).double()})
    assert not removal._equal(pair, {**pair, "n": torch.arange(2) + 1})
    assert not removal._equal(pair, {"x": pair["x"]})
    assert not removal._equal(pair["x"], pair)


def _rounded(term: Any) -> Any:
    if not isinstance(term, MemoryTerm):
        return term
    inputs: Any = term.memory.inputs
    return replace(term, memory=replace(term.memory, inputs=inputs.float().double()))


@pytest.mark.parametrize("population", [False, True])
@pytest.mark.parametrize("soft", [1.0, 0.0])
def test_what_is_believed_less_leaves_as_much_less(population: bool, soft: float) -> None:
    """Discount or multiply, then forget = forget, then discount or multiply: of items in memory
    and of the others."""
    recipe = replace(KEEPS_SOME, population=population, soft=soft, hard=1.0 - soft)
    model, prior = two_tasks(recipe)
    place = laws.moved(model, by=0.2, seed=4)
    some = TASKS[0][torch.tensor(origins(prior, 0)[:2] + _unseen(prior)[:3])]
    for less in (lambda p: p.discount(0.5), lambda p: 3 * p, lambda p: 0.5 * p.discount(0.25)):
        a = less(prior).forget(model, some, task=0)
        b = less(prior.forget(model, some, task=0))
        torch.testing.assert_close(a(place), b(place))
        torch.testing.assert_close(big_g(a), big_g(b))
        assert a.beliefs == b.beliefs


def _unseen(prior: Prior) -> list[int]:
    return [i for i in range(len(TASKS[0])) if i not in origins(prior, 0)]


@pytest.mark.parametrize("total", [False, True])
def test_an_old_task_is_forgotten_as_it_is_believed(total: bool, tmp_path: Path) -> None:
    """By its data as by its groups, where each task discounts those before."""
    groups = of(TASKS[0])
    recipe = replace(KEEPS_SOME, discount=0.5, total=total)
    model, prior = two_tasks(recipe, groups=groups)
    assert prior.beliefs == (0.5, 1.0)
    assert Prior.load(prior.save(tmp_path / "p.safetensors")).beliefs == (0.5, 1.0)
    place = laws.moved(model, by=0.2, seed=4)
    which = (groups == 1).nonzero().squeeze(1)
    by_data = prior
    for task in (0, 1):
        data = TASKS[task][which]
        by_data = by_data.forget(model, data, task=task, groups=groups[which])
    torch.testing.assert_close(by_data(place), prior.forget(model, groups=[1])(place))
    plain = replace(prior, terms=tuple(_ungrouped(t) for t in prior.terms))
    some = TASKS[1][
        torch.tensor([i for i in range(len(TASKS[1])) if i not in origins(prior, 1)])[:1]
    ]
    with pytest.raises(ValueError, match=r"believed \(0.5, 1.0\) times.* say which by task="):
        plain.forget(model, replace(some, ids=some.ids + 100))
    with pytest.raises(ValueError, match="one of the 2 that were learned, got 2"):
        plain.forget(model, replace(some, ids=some.ids + 100), task=2)


def test_each_task_leaves_at_its_own_strength() -> None:
    """Also what its memory held before it was evicted."""
    recipe = replace(KEEPS_SOME, total=True)
    model, prior = two_tasks(recipe, strengths=(2.0, 3.0))
    assert prior.strengths == (2.0, 3.0)
    parts = [TASKS[t][torch.tensor(origins(prior, t))] for t in (0, 1)]
    whole = [2.0 * dense(model, TASKS[0]), 3.0 * dense(model, TASKS[1])]
    held = 2.0 * dense(model, parts[0]) + 3.0 * dense(model, parts[1])
    torch.testing.assert_close(big_g(prior), whole[0] + whole[1] - held)
    left = prior.forget(model, TASKS[0], task=0)
    torch.testing.assert_close(big_g(left), whole[1] - 3.0 * dense(model, parts[1]))
    fresh = replace(TASKS[0], ids=TASKS[0].ids + 100)
    with pytest.raises(ValueError, match=r"at the strengths \(2.0, 3.0\).* say which by task="):
        prior.forget(model, fresh)


def dense(model: nn.Module, data: Examples) -> Tensor:
    if not len(data):
        return torch.zeros(())
    return estimate(model, data, GAUSSIAN.likelihood, structure="dense").dense().matrix


def test_tasks_of_a_sum_are_told_apart() -> None:
    """The second prior's tasks come after the first one's, in memory and in groups."""
    parts = []
    for seed in (0, 1):
        prior = Prior(GAUSSIAN.likelihood, KEEPS_SOME, (Regulariser(0.5),))
        data, model = TASKS[seed], GAUSSIAN.make_model(seed)
        groups, generator = of(data) + 10 * seed, torch.Generator().manual_seed(seed)
        parts.append(prior.update(model, data, groups=groups, generator=generator))
    both = 0.5 * parts[0] + parts[1]
    assert both.num_tasks == 2
    assert both.beliefs == (0.5, 1.0)
    assert origins(both, 0) == origins(parts[0], 0)
    assert origins(both, 1) == origins(parts[1], 0)
    data, model = TASKS[2], GAUSSIAN.make_model(2)
    after = both.update(model, data, groups=of(data), generator=torch.Generator().manual_seed(2))
    assert after.memory is not None
    assert after.weight is not None
    assert after.weight.groups is not None
    assert after.memory.task.unique().tolist() == [0, 1, 2]
    found = after.weight.groups.of(after.memory)
    for task, part in enumerate(parts):
        old = of(TASKS[task]) + 10 * task
        assert torch.equal(found[after.memory.task == task], old[origins(part, 0)])
    left = after.forget(model, task=1)
    assert origins(left, 0) == origins(after, 0)
    assert origins(left, 1) == []
    fromp = lifelong.fromp(GLMS["multinomial"].likelihood, memory=4)
    kernels = fromp.update(GLMS["multinomial"].make_model(0), GLMS["multinomial"].data[0])
    assert (kernels + kernels).memory.task.unique().tolist() == [0, 1]  # type: ignore[union-attr]


def test_items_are_of_the_task_that_is_learned() -> None:
    case, model = GAUSSIAN, GAUSSIAN.make_model(0)
    prior = Prior(case.likelihood, KEEPS_SOME, (Regulariser(0.5),))
    for data in TASKS[:2]:
        items = lifelong.memorise(model, data, case.likelihood, budget=3, score="random")
        prior = prior.recall(model, data, items)
    assert prior.memory is not None
    assert prior.memory.task.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_share_stays_while_its_items_do() -> None:
    """With G of the remembered examples too, a group that is all in memory has a share of none."""
    case = GLMS["multinomial"]
    recipe = Recipe("t", structure="dense", memory=None, exclude_memory=False)
    prior, data = Prior(case.likelihood, recipe, (Regulariser(0.5),)), case.data[0]
    model = case.make_model(0)
    after = prior.update(model, data, groups=of(data))
    in_turn = after.forget(model, groups=[0]).forget(model, groups=[1])
    torch.testing.assert_close(big_g(in_turn), big_g(after.forget(model, groups=[0, 1])))
    last = in_turn.forget(model, groups=[2])
    assert float(big_g(last).abs().max()) < 1e-9


@pytest.mark.parametrize("grouped", [False, True])
def test_what_memory_and_curvature_both_hold_leaves_both(grouped: bool) -> None:
    """By id, by data, and with its group: once."""
    recipe = replace(KEEPS_SOME, exclude_memory=False)
    groups = of(TASKS[0]) if grouped else None
    model, prior = two_tasks(recipe, strengths=(2.0, 3.0), groups=groups)
    ids = torch.tensor(origins(prior, 0)[:2])
    by_id = prior.forget(model, ids=ids, task=0)
    some = TASKS[0][ids]
    torch.testing.assert_close(big_g(prior) - big_g(by_id), 2.0 * dense(model, some))
    torch.testing.assert_close(big_g(prior.forget(model, some, task=0)), big_g(by_id))
    if grouped:
        k = of(TASKS[0])[ids[:1]]
        torch.testing.assert_close(
            big_g(prior.forget(model, ids=ids[:1], task=0).forget(model, groups=k)),
            big_g(prior.forget(model, groups=k)),
        )


# ------------------------------------------------------------------ what g holds of an item


@pytest.mark.parametrize("memory", [5, None])
@pytest.mark.parametrize("gradient", ["stored", "stationary"])
def test_a_belief_that_is_not_asked_again_leaves_as_it_was(memory: Any, gradient: Any) -> None:
    recipe = replace(KEEPS_SOME, memory=memory, refresh=False, gradient=gradient)
    model, prior = two_tasks(recipe)
    ids = torch.tensor(origins(prior, 0)[:3])
    stays = torch.tensor([i for i in range(len(TASKS[0])) if i not in ids])
    left = prior.forget(model, ids=ids, task=0)
    first, second = TASKS[0][stays], TASKS[1]
    batch = laws.retrained(GAUSSIAN, model, Regulariser(0.5), first, second)
    assert laws.distance(laws.weights(laws.minimum(model, left)), laws.weights(batch)) < 1e-9


@pytest.mark.parametrize("population", [False, True])
def test_what_stays_in_g_of_an_item_of_another_weight(population: bool) -> None:
    """After a refresh: (soft - 1) J*ᵀ (h(f') - h(f*)); nothing where items stand for themselves."""
    model, prior = two_tasks(replace(KEEPS_SOME, population=population, gradient="stored"))
    items = prior.memory.drop(prior.memory.task == 0)  # type: ignore[union-attr]
    place = laws.moved(model, by=0.2, seed=4)
    there = prior.rebase(place)
    left = there.forget(place, ids=items.origin, task=1)
    truth = prior.forget(model, ids=items.origin, task=1).rebase(place)
    f = place(items.inputs)
    change = GAUSSIAN.likelihood.residual(f.detach(), items.outputs)
    value = (f * change * (items.soft_weight - 1).unsqueeze(1)).sum()
    slope = torch.autograd.grad(value, list(place.parameters()))
    stays = [
        left.weight.gradient[n] - truth.weight.gradient[n]  # type: ignore[union-attr, index]
        for n, _ in place.named_parameters()
    ]
    torch.testing.assert_close(stays, list(slope))
    assert population == any(bool(v.abs().max() > 0.1) for v in stays)


def test_a_new_class_does_not_change_what_leaves() -> None:
    """Grow the head, then forget = forget, then grow: at any weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    data = Examples(x, torch.arange(30) % 3)
    torch.manual_seed(0)
    small, wide = nn.Linear(4, 3).double(), nn.Linear(4, 4).double()
    prior = lifelong.kprior(lifelong.Categorical(), memory=10, precision=0.5)
    after = prior.update(small, data, generator=generator)
    ids = after.memory.origin[:4]  # type: ignore[union-attr]
    a = after.grow(wide).forget(wide, ids=ids)
    b = after.forget(small, ids=ids).grow(wide)
    place = laws.moved(wide, by=0.2, seed=4)
    torch.testing.assert_close(a(place), b(place))


def test_quadratics_of_several_anchors_forget_nothing() -> None:
    case = NETWORKS["mlp Categorical"]
    model, prior = case.make_model(0), lifelong.ewc(case.likelihood)
    for data in case.data[:2]:
        prior = prior.update(model, data)
    with pytest.raises(ValueError, match="each of its 2 tasks to be flat at its own anchor"):
        prior.forget(model, case.data[1][:2], task=1)


# ------------------------------------------------------------------ by a property


def test_where_chooses_among_the_memory():
    case = GLMS["multinomial"]
    prior = lifelong.kprior(case.likelihood, precision=0.5, memory=None)
    model, after = laws.learn(prior, case, tasks=2)
    data = case.data[0]
    gone = (data.labels == 1).nonzero().squeeze(1)
    a = after.forget(model, where=lambda memory: memory.labels == 1, task=0)
    b = after.forget(model, ids=data.ids[gone], task=0)
    assert torch.equal(a(model), b(model))
    assert a.num_data == b.num_data
    rest = data[(data.labels != 1).nonzero().squeeze(1)]
    batch = laws.retrained(case, model, Regulariser(0.5), rest, case.data[1])
    assert laws.distance(laws.weights(laws.minimum(model, a)), laws.weights(batch)) < 1e-7


# ------------------------------------------------------------------ where G turns indefinite


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        yield


@pytest.mark.parametrize("structure", ["diagonal", "dense", "block", "isotropic", "low_rank"])
def test_clip_is_the_positive_part(structure: Any) -> None:
    """Forgetting twice is the mistake that shows: the result is positive, nearest and reported."""
    case = NETWORKS["mlp Categorical"]
    prior = Prior(case.likelihood, Recipe("t", structure=structure, rank=200), (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data).forget(model, data[:9])
    with pytest.raises(ValueError, match="on_indefinite='clip'"):
        after.forget(model, data[:9])
    with pytest.warns(ClippedWarning, match="% of the curvature to be removed stays in it"):
        clipped = after.forget(model, data[:9], on_indefinite="clip")
    assert clipped.weight is not None
    assert after.weight is not None
    found, before = clipped.weight.curvature, after.weight.curvature
    assert found is not None
    assert before is not None
    leaving = prior.update(model, data[:9]).weight
    assert leaving is not None
    assert leaving.curvature is not None
    wanted = before.dense().matrix - leaving.curvature.dense().matrix
    if structure == "diagonal":
        wanted = wanted.diagonal().clamp(min=0).diag()
    elif structure == "isotropic":
        wanted = wanted.clamp(min=0)
    elif structure != "block":
        values, vectors = torch.linalg.eigh(wanted)
        wanted = (vectors * values.clamp(min=0)) @ vectors.T
    if structure != "block":
        torch.testing.assert_close(found.dense().matrix, wanted, rtol=1e-6, atol=1e-8)
    assert float(torch.linalg.eigvalsh(found.dense().matrix).min()) > -1e-9


def test_kronecker_factors_are_clipped_to_one_positive_product():
    case = NETWORKS["mlp Categorical"]
    recipe = Recipe("t", structure="kronecker")
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data[:12])
    with pytest.raises(ValueError, match="would be indefinite"):
        after.forget(model, data[6:12])
    with pytest.warns(ClippedWarning):
        clipped = after.forget(model, data[6:12], on_indefinite="clip")
    whole, left = after.weight.curvature, clipped.weight.curvature
    assert float(torch.linalg.eigvalsh(left.dense().matrix).min()) > -1e-9
    part = prior.update(model, data[:6]).weight.curvature  # what stays, made from the data
    gap = (left.dense().matrix - part.dense().matrix).norm()
    assert gap < 0.75 * (whole.dense().matrix - part.dense().matrix).norm()
    for n, v in left.diagonal().items():
        assert v.shape == whole.diagonal()[n].shape


@pytest.mark.parametrize("structure", ["kronecker", "low_rank"])
def test_a_curvature_does_not_grow_with_removals(structure: Any) -> None:
    case = NETWORKS["mlp Categorical"]
    recipe = Recipe("t", structure=structure, rank=5)
    model, data = case.make_model(0), case.data[0]
    left = Prior(case.likelihood, recipe, (Regulariser(0.5),)).update(model, data)
    size = left.weight.curvature.num_bytes  # type: ignore[union-attr]
    with quiet():
        for i in range(6):
            left = left.forget(model, data[i : i + 1], on_indefinite="clip").rebase(model)
            assert left.weight.curvature.num_bytes <= size  # type: ignore[union-attr]
    unlearn(model, left, data[6:7], on_indefinite="clip", step=True, method=None)
    assert bool(laws.weights(model).isfinite().all())


@pytest.mark.parametrize("merge", [True, False])
def test_what_is_left_of_products_has_the_trace_of_the_difference(merge: bool) -> None:
    """And merged it is positive: the nearest product of a positive matrix is (Van Loan)."""
    case = NETWORKS["mlp Categorical"]
    recipe = Recipe("t", structure="kronecker", merge=merge, curvature_examples=None)
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data)
    left = after.forget(model, data[:1]).weight
    whole, part = after.weight, prior.update(model, data[:1]).weight
    wanted = whole.curvature + part.curvature * -1.0  # type: ignore[union-attr, operator]
    found = left.curvature  # type: ignore[union-attr]
    for block, exact in zip(found.blocks, wanted.blocks, strict=True):  # type: ignore[union-attr]
        a, b = block.dense().matrix, exact.dense().matrix
        assert block.num_products == 1 or not merge
        torch.testing.assert_close(a.trace(), b.trace())
        assert float(torch.linalg.eigvalsh(a)[0]) > -1e-9 * float(a.trace())
        if not merge:
            torch.testing.assert_close(a, b)


def difference(seed: int, share: float) -> tuple[Kronecker, Kronecker]:
    """A Kronecker product of 108 weights with eigenvalues of many sizes; and it, less a share of
    one in a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": torch.Size((12, 8)), "bias": torch.Size((12,))}

    def product(columns: int, decay: float) -> Kronecker:
        rows = (
            torch.randn(n, columns, generator=generator, dtype=torch.float64)
            * torch.logspace(0, -decay, n, dtype=torch.float64).unsqueeze(1)
            for n in (12, 9)
        )
        return Kronecker(*((x @ x.T)[None, None] for x in rows), shapes)

    whole = product(24, 3.0)
    return whole, whole + product(1, 0.0) * -share


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.floats(-5.0, -1.0))
def test_a_small_negative_eigenvalue_is_found(seed: int, exponent: float) -> None:
    whole, left = difference(seed, 10.0**exponent)
    values = torch.linalg.eigvalsh(left.dense().matrix)
    largest = float(torch.linalg.eigvalsh(whole.dense().matrix)[-1])
    assume(abs(float(values[0]) + 1e-6 * largest) > 1e-8 * largest)
    assert removal._is_indefinite(left, beside=whole) == bool(values[0] < -1e-6 * largest)


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3])
def test_lanczos_finds_both_ends(share: float) -> None:
    _, left = difference(0, share)
    values = torch.linalg.eigvalsh(left.dense().matrix)
    assert removal._ends(left) == pytest.approx((float(values[0]), float(values[-1])), rel=1e-9)
    zero = left * 0.0
    assert removal._ends(zero) == (0.0, 0.0)


def test_an_eigenbasis_has_no_positive_part():
    case = NETWORKS["mlp Categorical"]
    recipe = Recipe("t", structure="eigen_kronecker")
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data[:6])
    with pytest.raises(ValueError, match="has no positive part that is a sum of products"):
        after.forget(model, data[6:12], on_indefinite="clip")


def test_clip_changes_nothing_that_is_positive():
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    after = laws.law_prior(case.likelihood).update(model, data)
    place = laws.moved(model, by=0.2, seed=4)
    a, b = after.forget(model, data[:3]), after.forget(model, data[:3], on_indefinite="clip")
    assert torch.equal(a(place), b(place))


# ------------------------------------------------------------------ errors


def test_what_groups_cannot_do():
    case = NETWORKS["mlp Categorical"]
    model, data, groups = case.make_model(0), case.data[0], of(case.data[0])
    prior = laws.law_prior(case.likelihood, structure="diagonal")
    prior = replace(prior, recipe=replace(prior.recipe, memory=0))
    after = prior.update(model, data, groups=groups)
    once = after.forget(model, groups=[1])
    first = (groups == 0).nonzero().squeeze(1)
    less = after.forget(model, data[first[:-1]], groups=groups[first[:-1]])
    attempts: list[tuple[Any, str]] = [
        (lambda: once.forget(model, groups=[1]), r"groups \[1\] are not known: they were forgott"),
        (lambda: prior.update(model, data).forget(model, groups=[0]), r"without prior.update\(..."),
        (lambda: after.forget(model, groups=[0], task=0), "a group is forgotten as a whole"),
        (lambda: after.forget(model, data[:2]), "say of which group each is"),
        (lambda: after.forget(model, data[:2], groups=torch.tensor([0])), "one integer for each"),
        (lambda: after.forget(model, data[:2], groups=torch.tensor([7, 7])), "are not known"),
        (lambda: less.forget(model, data[first], groups=groups[first]), "and 1 such are left"),
        (lambda: prior.update(model, data, groups=groups.double()), "one integer for each"),
        (lambda: prior.update(model, data, groups=groups - 3), "groups count from 0"),
        (lambda: prior.update(model, data, groups=groups, max_groups=2), "at most 2 may"),
        (lambda: after.forget(model, data[:2], where=lambda m: m.labels == 1), "where looks at t"),
        (lambda: after.forget(model, where=lambda m: m.labels), "none of these examples is in"),
        (lambda: after.forget(model, data[:2], on_indefinite="no"), "must be 'raise' or 'clip'"),  # type: ignore[arg-type]
    ]
    for mixed in (lifelong.fromp(case.likelihood, memory=6), lifelong.lwf(case.likelihood)):
        attempts.append(
            (lambda p=mixed: p.update(model, data, groups=groups), "has no share of a group")
        )
    for attempt, message in attempts:
        with laws.untouched(model), pytest.raises(ValueError, match=message):
            attempt()
    kept = lifelong.kprior(case.likelihood, memory=4).update(model, data)
    for wrong in (lambda m: m.labels, lambda m: True, lambda m: (m.labels == 1)[:1]):
        with pytest.raises(ValueError, match="where must give one bool for each of the 4"):
            kept.forget(model, where=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [[], [0.7], [True], torch.tensor([])])
def test_a_group_is_named_by_its_number(groups: Any) -> None:
    """Nothing that is no number of a group stands for one, nor for all."""
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    after = lifelong.kprior(case.likelihood, memory=4).update(model, data, groups=of(data))
    with laws.untouched(model), pytest.raises(ValueError, match="expected the numbers of the gro"):
        after.forget(model, groups=groups)


def test_ids_are_no_mask():
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    after = lifelong.kprior(case.likelihood, memory=4).update(model, data)
    for wrong in (after.memory.labels == 1, after.memory.origin.double()):  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="ids are integers, got"):
            after.forget(model, ids=wrong)


def test_groups_as_values():
    empty = Groups.from_state_dict({"shares": [], "members": torch.empty(0, 3).long()})
    assert empty.known == set()
    assert empty.num_bytes == 0

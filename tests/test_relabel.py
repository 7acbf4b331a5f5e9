"""Relabelling: the prior that the right labels would have made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from torch import Tensor, nn

import lifelong
from lifelong import Examples, Learner, Memory, Prior, Recipe, Regulariser, Task
from lifelong.learner import adam
from lifelong.metrics import evaluate
from lifelong.testing import cases, laws
from lifelong.testing.cases import Case, Split
from lifelong.toys import digits

GLMS = {c.name: c for c in cases.glms()}
NETWORKS = {c.name: c for c in cases.networks()}
GAUSSIAN = cases.linear_gaussian()
SPLITS = cases.SPLITS
EVERY_THIRD = slice(0, None, 3)


def others(case: Case, model: nn.Module, labels: Tensor, task: int = 0) -> Tensor:
    """Labels of the same kind that differ from these, within the task's head."""
    data = case.data[task]
    if data.head is None:
        outputs = model(data.inputs[:1] if isinstance(data.inputs, Tensor) else data.inputs)
        return laws._other_labels(case.likelihood, labels, outputs.shape[1])
    following = dict(zip(data.head, (*data.head[1:], data.head[0]), strict=True))
    return torch.tensor([following[int(y)] for y in labels])


def wrong(case: Case, model: nn.Module, task: int = 0) -> tuple[Examples, Tensor]:
    """A task with every third label wrong, and which are."""
    data = case.data[task]
    which = torch.arange(len(data))[EVERY_THIRD]
    labels = data.labels.clone()
    labels[which] = others(case, model, labels[which], task)
    return replace(data, labels=labels), which


# ------------------------------------------------------------------ laws


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: s.name)
@pytest.mark.parametrize("case", [GAUSSIAN, cases.orthogonal()], ids=lambda c: c.name)
def test_the_right_labels_as_if_learned_from_the_start(case: Case, split: Split) -> None:
    """Linear-Gaussian, two tasks, any split into memory and quadratic: relabel and refit =
    retraining on the right labels."""
    prior = laws.law_prior(case.likelihood)
    model = case.make_model(0)
    bad, which = wrong(case, model)
    for task, data in enumerate([bad, case.data[1]]):
        model = laws.minimum(
            model, lambda m, d=data, p=prior: laws.nats(case.likelihood, m, d) + p(m)
        )
        seen = replace(case, data=(bad, *case.data[1:]))
        prior = prior.recall(model, data, split.remember(seen, model, task, 0))
    right = prior.relabel(model, bad[which], case.data[0].labels[which], task=0, exactly=True)
    batch = laws.retrained(case, model, Regulariser(0.5), *case.data[:2])
    refit = laws.minimum(model, right)
    assert laws.distance(laws.weights(refit), laws.weights(batch)) < 1e-9
    assert right.num_data == prior.num_data


@pytest.mark.parametrize("name", sorted(GLMS))
def test_a_whole_memory_of_a_glm_is_exact(name: str) -> None:
    """Any likelihood, linear, all examples kept: relabel and refit = retraining."""
    case = GLMS[name]
    model = case.make_model(0)
    bad, which = wrong(case, model)
    prior = Prior(case.likelihood, Recipe("k", memory=None, gradient="stored"), (Regulariser(0.5),))
    model = laws.minimum(model, lambda m: laws.nats(case.likelihood, m, bad) + prior(m))
    after = prior.update(model, bad)
    right = after.relabel(model, bad[which], case.data[0].labels[which], exactly=True)
    batch = laws.retrained(case, model, Regulariser(0.5), case.data[0])
    assert laws.distance(laws.weights(laws.minimum(model, right)), laws.weights(batch)) < 1e-8


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: s.name)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_gradient_at_the_anchor_is_that_of_the_right_labels(name: str, split: Split) -> None:
    case = NETWORKS[name]
    prior = laws.law_prior(case.likelihood, structure="diagonal")
    model = case.make_model(0)
    bad, which = wrong(case, model)
    after = prior.recall(model, bad, split.remember(replace(case, data=(bad,)), model, 0, 0))
    right = after.relabel(model, bad[which], case.data[0].labels[which], exactly=True)
    truth = laws.slope(model, laws.nats(case.likelihood, model, case.data[0]) + prior(model))
    assert laws.distance(laws.slope(model, right(model)), truth) < 1e-12


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: s.name)
def test_back_and_forth_is_where_it_was(split: Split) -> None:
    """Of a linear-Gaussian model, whose nll is its own Taylor expansion, up to a constant."""
    case = GAUSSIAN
    model, prior = case.make_model(0), laws.law_prior(case.likelihood)
    data = case.data[0]
    after = prior.recall(model, data, split.remember(case, model, 0, 0))
    which = torch.arange(len(data))[EVERY_THIRD]
    new = others(case, model, data.labels[which])
    there = after.relabel(model, data[which], new, exactly=True)
    old = replace(data[which], labels=new)
    back = there.relabel(model, old, data.labels[which], exactly=True)
    assert laws.identical(after, back, model, constant=True) < 1e-10
    place = laws.moved(model, by=0.4, seed=3)
    difference = laws.slope(place, there(place)) - laws.slope(place, after(place))
    assert float(difference.abs().max()) > 1e-3


@pytest.mark.parametrize("memory", [0, 4, None])
def test_it_is_forgetting_and_learning_again_at_the_anchor(memory: int | None) -> None:
    case = NETWORKS["mlp Categorical"]
    recipe = Recipe("t", structure="diagonal", memory=memory, score="random")
    model, data = case.make_model(0), case.data[0]
    after = Prior(case.likelihood, recipe, (Regulariser(0.5),)).update(model, data)
    which = torch.tensor([1, 4, 7])
    new = others(case, model, data.labels[which])
    right = after.relabel(model, data[which], new, exactly=True)
    again = after.forget(model, data[which], on_indefinite="clip")
    loss = laws.nats(case.likelihood, model, replace(data[which], labels=new))
    one = laws.slope(model, right(model))
    two = laws.slope(model, again(model) + loss)
    assert laws.distance(one, two) < 1e-12


# ------------------------------------------------------------------ memory


def test_a_remembered_example_counts_by_its_label() -> None:
    """It stands for itself by its label from then on, and for others as before."""
    case = NETWORKS["mlp Categorical"]
    recipe = Recipe("t", memory=6, score="random", population=True)
    model, data = case.make_model(0), case.data[0]
    after = Prior(case.likelihood, recipe, (Regulariser(0.5),)).update(model, data)
    assert after.memory is not None
    some = after.memory.origin[:2]
    new = others(case, model, data.labels[some])
    right = after.relabel(model, data[some], new).memory
    assert isinstance(right, Memory)
    assert torch.equal(right.labels[:2], new)
    assert torch.equal(right.labels[2:], after.memory.labels[2:])
    assert torch.equal(right.hard_weight[:2], torch.ones(2).to(right.hard_weight))
    assert torch.allclose(right.soft_weight[:2], after.memory.soft_weight[:2] - 1)
    assert torch.equal(right.soft_weight[2:], after.memory.soft_weight[2:])
    assert torch.equal(right.reference, after.memory.reference)
    assert right.labels.dtype == after.memory.labels.dtype


@pytest.mark.parametrize("name", ["experience_replay", "kprior", "gradient_reconstruction"])
def test_what_was_not_remembered_is_from_then_on(name: str) -> None:
    """Beyond the budget, by its label alone; g and G are left as they are."""
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    options: dict[str, Any] = {"memory": 4}
    after = getattr(lifelong, name)(case.likelihood, **options).update(model, data)
    assert after.memory is not None
    outside = (~torch.isin(data.ids, after.memory.origin)).nonzero().squeeze(1)[:3]
    new = others(case, model, data.labels[outside])
    right = after.relabel(model, data[outside], new)
    assert right.memory is not None
    assert len(right.memory) == len(after.memory) + 3
    added = right.memory[slice(-3, None)]
    assert torch.equal(added.labels, new)
    assert torch.equal(added.origin, data.ids[outside])
    assert float(added.soft_weight.abs().sum()) == 0
    assert torch.equal(added.hard_weight, torch.ones(3).to(added.hard_weight))
    with torch.no_grad():
        assert torch.allclose(added.reference, model(data[outside].batch(slice(None)).inputs))
    if after.weight is not None:
        assert right.weight is after.weight
    loss = laws.nats(case.likelihood, model, replace(data[outside], labels=new))
    place = laws.moved(model, by=0.1, seed=2)
    more = laws.nats(case.likelihood, place, replace(data[outside], labels=new))
    torch.testing.assert_close(right(model), after(model) + loss)
    torch.testing.assert_close(right(place), after(place) + more)
    back = right.forget(model, replace(data[outside], labels=new))
    assert back.memory is not None
    assert len(back.memory) == len(after.memory)


def test_a_memory_that_was_empty_and_a_prior_without_any() -> None:
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    new = others(case, model, data.labels[:2])
    plain = lifelong.finetune(case.likelihood).update(model, data)
    with laws.untouched(model), pytest.raises(ValueError, match="learn them again"):
        plain.relabel(model, data[:2], new)
    ewc = lifelong.online_ewc(case.likelihood).update(model, data)
    right = ewc.relabel(model, data[:2], new)  # by g: it promised to keep no example
    assert right.memory is None
    truth = laws.nats(case.likelihood, model, replace(data[:2], labels=new))
    truth = truth - laws.nats(case.likelihood, model, data[:2])
    moved = laws.slope(model, right(model)) - laws.slope(model, ewc(model))
    assert laws.distance(moved, laws.slope(model, truth)) < 1e-12


@pytest.mark.parametrize("name", ["kprior", "gradient_reconstruction", "recommended"])
def test_nothing_is_lost_where_many_labels_were_not_learned(name: str) -> None:
    """40 wrong labels that the network has mostly not learned, of which few are remembered: the
    linear pull of each would lead weights away; correcting them keeps what is known."""
    train, test = digits()
    train = Examples(train.inputs, train.labels)
    wrong = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:40]
    labels = train.labels.clone()
    labels[wrong] = (labels[wrong] + 1) % 10
    data = Examples(train.inputs, labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 10))
    prior = getattr(lifelong, name)(lifelong.Categorical(), memory=100)
    learner = Learner(model, prior, epochs=25, batch_size=32)
    learner.learn(Task(0, "digits", data))
    before = evaluate(learner.model, test, lifelong.Categorical()).accuracy
    learner.relabel(data[wrong], train.labels[wrong], task=0)
    right = evaluate(learner.model, train[wrong], lifelong.Categorical()).accuracy
    after = evaluate(learner.model, test, lifelong.Categorical()).accuracy
    assert before > 0.94
    assert after > before - 0.02
    assert right >= 0.95


@pytest.mark.parametrize(
    "name", ["ewc", "online_ewc", "kprior", "gradient_reconstruction", "derpp"]
)
def test_presets_relabel(name: str) -> None:
    """Something changes, and only by the label."""
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    options = {} if name.endswith("ewc") else {"memory": 5}
    after = getattr(lifelong, name)(case.likelihood, **options).update(model, data)
    some = after.memory.origin[:3] if after.memory is not None else torch.arange(3)
    place = laws.moved(model, by=0.2, seed=4)
    new = others(case, model, data.labels[some])
    right = after.relabel(model, data[some], new)
    assert not torch.equal(laws.slope(place, right(place)), laws.slope(place, after(place)))
    if after.weight is not None and after.weight.curvature is not None:
        assert right.weight is not None
        assert right.weight.curvature is after.weight.curvature


# ------------------------------------------------------------------ learners


def test_a_learner_learns_the_right_labels() -> None:
    """A network that learned wrong labels by heart says the right ones, and the rest as before."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    bad, which = y.clone(), torch.tensor([3, 17, 40])
    bad[which] = 1 - y[which]
    data = Examples(x, bad)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    prior = lifelong.kprior(lifelong.Categorical(), memory=60)
    learner = Learner(model, prior, epochs=700, batch_size=60, optimizer=adam(2e-2))
    learner.learn(Task(0, "a", data))
    assert torch.equal(model(x).argmax(1)[which], bad[which])
    done = learner.relabel(data[which], y[which], task=0)
    assert done.iterations <= 10
    after = learner.model(x).argmax(1)
    assert torch.equal(after[which], y[which])
    assert float((after == y).float().mean()) > 0.95
    memory = learner.prior.memory
    assert memory is not None
    assert torch.equal(memory.labels[memory.origin.argsort()], y)


def test_a_learner_is_untouched_by_a_wrong_call() -> None:
    case = NETWORKS["mlp Categorical"]
    learner = Learner(case.make_model(0), lifelong.kprior(case.likelihood, memory=5), epochs=1)
    learner.learn(Task(0, "a", case.data[0]))
    prior = learner.prior
    with laws.untouched(learner.model), pytest.raises(ValueError, match="expected a label for"):
        learner.relabel(case.data[0][torch.tensor([0, 1])], [1])
    assert learner.prior is prior


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("preset", "match"),
    [
        ("fromp", "mixes its examples"),
        ("si", "mixes its examples"),
        ("ewc", "estimator 'empirical'"),
    ],
)
def test_priors_that_cannot(preset: str, match: str) -> None:
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    prior: Any = getattr(lifelong, preset)(case.likelihood)
    if preset == "ewc":
        prior = replace(prior, recipe=replace(prior.recipe, estimator="empirical"))
    if preset == "fromp":
        prior = replace(prior, recipe=replace(prior.recipe, memory=4))
    with pytest.raises(ValueError, match=match):
        prior.relabel(model, data[:2], data.labels[:2])


def test_labels_are_as_those_that_were_learned() -> None:
    """Neither spread over outputs nor rounded to a class."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    pairs = Examples(x, torch.randn(6, 2, generator=generator, dtype=torch.float64))
    classes = Examples(x, torch.tensor([0, 1, 0, 1, 0, 1]))
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    for likelihood, data, bad in (
        (lifelong.Gaussian(), pairs, torch.tensor([5.0, 7.0])),
        (lifelong.Gaussian(), pairs, torch.zeros(2, 1)),
        (lifelong.Gaussian(), pairs, torch.zeros(2, 3)),
        (lifelong.Categorical(), classes, torch.tensor([1.5, 1.0])),
        (lifelong.Categorical(), classes, torch.tensor([[0], [1]])),
    ):
        for memory in (0, None):
            recipe = Recipe("t", structure="diagonal", memory=memory)
            after = Prior(likelihood, recipe, (Regulariser(0.5),)).update(model, data)
            with laws.untouched(model), pytest.raises(ValueError, match="that the examples had"):
                after.relabel(model, data[:2], bad)


def test_what_does_not_fit() -> None:
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    recipe = Recipe("t", structure="diagonal", memory=6)
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    one = prior.update(model, data)
    whole = replace(prior, recipe=replace(recipe, memory=None))
    both = whole.update(model, data).update(model, replace(case.data[1], ids=data.ids))
    some = data[:3]
    assert one.memory is not None
    held = data[one.memory.origin[:2]]
    with laws.untouched(model):
        with pytest.raises(ValueError, match="expected a label for each of the 3"):
            one.relabel(model, some, [0])
        with pytest.raises(ValueError, match="given twice"):
            one.relabel(model, data[torch.tensor([1, 1])], [0, 0])
        with pytest.raises(ValueError, match="other inputs or labels"):
            one.relabel(model, replace(held, labels=others(case, model, held.labels)), held.labels)
        with pytest.raises(ValueError, match=r"label"):
            one.relabel(model, held, [99, 99])
        with pytest.raises(ValueError, match="say which by task="):
            both.relabel(model, data, data.labels)
        with pytest.raises(ValueError, match="several anchors"):
            (one + prior.update(model, case.data[1])).relabel(model, some, some.labels)
        grouped = prior.update(model, data, groups=torch.zeros(len(data), dtype=torch.int64))
        with pytest.raises(ValueError, match="keeps a sum for each group"):
            grouped.relabel(model, some, some.labels)
        carried = replace(recipe, gradient="carried")
        two = replace(prior, recipe=carried).update(model, data).update(model, case.data[1])
        with pytest.raises(ValueError, match="flat at its own"):
            two.relabel(model, some, some.labels, task=0)

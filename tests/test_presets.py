"""Each preset is the terms that its docstring promises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lifelong
from lifelong import Categorical, Examples, KernelTerm, MemoryTerm, Prior, Regulariser, WeightTerm
from lifelong.presets import PRESETS

X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
DATA = Examples(X, torch.arange(20) % 4)
MEMORY: dict[str, Any] = {"memory": 8}
TERMS: dict[str, tuple[dict[str, Any], set[type]]] = {
    "finetune": ({}, set()),
    "weight_decay": ({}, {Regulariser}),
    "ewc": ({}, {WeightTerm}),
    "online_ewc": ({}, {WeightTerm}),
    "online_laplace": ({}, {Regulariser, WeightTerm}),
    "kprior": (MEMORY, {Regulariser, WeightTerm, MemoryTerm}),
    "fromp": (MEMORY, {KernelTerm}),
    "gradient_reconstruction": (MEMORY, {WeightTerm, MemoryTerm}),
    "recommended": (MEMORY, {WeightTerm, MemoryTerm}),
    "lwf": ({}, {WeightTerm}),
    "experience_replay": (MEMORY, {MemoryTerm}),
    "der": (MEMORY, {MemoryTerm}),
    "derpp": (MEMORY, {MemoryTerm}),
    "joint": ({}, {MemoryTerm}),
    "separate": ({}, set()),
}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def after(prior: Prior, model: nn.Module, times: int = 1) -> Prior:
    generator = torch.Generator().manual_seed(0)
    for _ in range(times):
        prior = prior.update(model, DATA, generator=generator)
    return prior


def moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def test_each_preset_is_here():
    assert TERMS.keys() | {"si"} == PRESETS.keys()


@pytest.mark.parametrize("name", TERMS)
def test_terms_and_memory(name):
    options, kinds = TERMS[name]
    prior = after(PRESETS[name](Categorical(), **options), net(), times=2)
    assert {type(t) for t in prior.terms} == kinds
    total = prior.recipe.total
    expected = 40 if name == "joint" else 0 if not options else 8 if total else 16
    assert len(prior.memory or ()) == expected
    assert prior.heads == (None,)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_says_what_it_is_and_names_its_settings(name):
    doc = inspect.getdoc(PRESETS[name])
    assert doc
    own = {"lwf", "kprior", "fromp", "ewc", "si", "derpp", "experience_replay"}
    assert name not in own or "epart" in doc  # where it departs from the released code


@pytest.mark.parametrize("name", ["ewc", "online_ewc", "online_laplace", "fromp", "kprior", "lwf"])
def test_right_after_a_task_the_prior_is_flat(name):
    model = net()
    prior = after(PRESETS[name](Categorical(), **TERMS[name][0]), model)
    value = prior(model)
    if value.requires_grad:
        value.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(g, torch.zeros_like(g), atol=1e-12) for g in grads)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("ewc", "strength"), ("online_laplace", "strength"), ("kprior", "strength"),
     ("fromp", "strength"), ("experience_replay", "strength"), ("der", "alpha")],
)  # fmt: skip
def test_strengths_multiply_nats(name, argument):
    values = []
    for strength in (1.0, 3.0):
        options = {**TERMS[name][0], argument: strength}
        if "precision" in inspect.signature(PRESETS[name]).parameters:
            options["precision"] = 0.0
        model = net()
        prior = after(PRESETS[name](Categorical(), **options), model)
        values.append(prior(moved(model)).detach())
    assert torch.allclose(values[1], 3 * values[0])


def test_derpp_without_labels_is_der():
    model = net()
    one = after(lifelong.derpp(Categorical(), memory=8, alpha=0.3, beta=0.0), model)
    other = after(lifelong.der(Categorical(), memory=8, alpha=0.3), model)
    assert one.recipe == other.recipe
    assert torch.equal(one(moved(model)), other(model))


def test_the_parts_of_gradient_reconstruction_can_be_left_out():
    def make(**options: Any) -> Prior:
        options = {"memory": 8, "population": False, **options}
        return after(lifelong.gradient_reconstruction(Categorical(), **options), net())

    both, no_function = make(), make(function=False)
    assert (both.weight is None, len(both.memory or ())) == (False, 8)
    no_weight = make(weight=False).weight
    assert no_weight is None or no_weight.curvature is None
    assert no_function.memory is None
    only_replay = make(function=False, weight=False, replay=1.0)
    assert only_replay.memory is not None
    assert float(only_replay.memory.soft_weight.sum()) == 0
    assert float(only_replay.memory.hard_weight.sum()) == 8
    split = make(replay=0.25).memory
    assert split is not None
    assert float(split.hard_weight.sum()) == 2
    assert float(split.soft_weight.sum()) == 6
    blended = make(blend=0.25).memory
    assert blended is not None
    assert set(blended.hard_weight.tolist()) == {0.25}
    assert set(blended.soft_weight.tolist()) == {0.75}


def test_online_ewc_forgets_by_its_discount():
    model = net()
    full = after(lifelong.online_ewc(Categorical()), model, times=2)
    half = after(lifelong.online_ewc(Categorical(), discount=0.5), model, times=2)
    moved(model)
    assert torch.allclose(half(model), 0.75 * full(model))


def test_a_population_stands_for_the_whole_task():
    prior = after(lifelong.kprior(Categorical(), memory=8, population=True), net())
    assert prior.memory is not None
    assert torch.allclose(prior.memory.soft_weight, torch.tensor(2.5).double())


def test_the_default_strength_of_fromp_is_tau_one() -> None:
    """strength None: N, the mean number of examples of a task so far, at every update."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    sizes = (20, 40)
    priors = [lifelong.fromp(Categorical(), memory=4, strength=s) for s in (None, 1.0)]
    for count, size in enumerate(sizes, start=1):
        data = lifelong.Examples(torch.randn(size, 3), torch.arange(size) % 2)
        priors = [prior.update(model, data) for prior in priors]
        with torch.no_grad():
            model.weight += 0.1 * torch.randn(2, 3)
        default, bayes = (prior(model).detach() for prior in priors)
        torch.testing.assert_close(default, bayes * sum(sizes[:count]) / count)


@pytest.mark.parametrize("preset", [lifelong.gradient_reconstruction, lifelong.recommended])
def test_one_memory_for_all_tasks_stands_for_all_that_is_not_in_the_curvature(preset):
    """Items that leave are stood for by those that stay: as many examples as there were."""
    prior = after(preset(Categorical(), memory=8, total=True), net(), times=3)
    assert prior.memory is not None
    assert len(prior.memory) == 8
    assert float(prior.memory.soft_weight.sum()) == pytest.approx(3 * len(DATA), rel=1e-6)


@pytest.mark.parametrize("preset", [lifelong.recommended, lifelong.experience_replay])
def test_several_yes_and_no_of_an_example_may_be_integers_in_one_memory_for_all_tasks(preset):
    """They are no classes: what stays is that of the same labels as floating point numbers."""
    labels = torch.arange(80).reshape(20, 4) % 3 // 2
    kept = []
    for y in (labels, labels.double()):
        prior, generator = preset(lifelong.Bernoulli(), total=True, memory=8), torch.Generator()
        for _ in range(3):
            prior = prior.update(net(), Examples(X, y), generator=generator.manual_seed(0))
        kept.append(prior.memory)
    assert torch.equal(kept[0].origin, kept[1].origin)
    for weight in ("soft_weight", "hard_weight"):
        assert torch.equal(getattr(kept[0], weight), getattr(kept[1], weight))
    total = kept[0].soft_weight.sum() + kept[0].hard_weight.sum()
    assert float(total) == pytest.approx(60)

"""Streams as they come: every scenario, heads of any kind, a head that grows, every preset."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lifelong
from lifelong import (
    Bernoulli,
    Categorical,
    Examples,
    Gaussian,
    Learner,
    Poisson,
    Prior,
    StaleAnchorError,
    blurred,
    evaluate,
    permuted,
    split_by_class,
    widen,
)
from lifelong.learner import adam
from lifelong.presets import PRESETS
from lifelong.streams import Task


def clouds(n: int = 30, classes: int = 6, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n * classes) % classes
    angle = y * (2 * torch.pi / classes)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return Examples(centre + 0.3 * torch.randn(len(y), 2, generator=generator), y)


def mlp(outputs: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, outputs))


def kprior() -> Prior:
    return lifelong.kprior(
        Categorical(), memory=18, precision=1e-3, score="random", population=True
    )


def run(stream: Any, prior: Prior, epochs: int = 30) -> Learner:
    learner = Learner(
        mlp(stream.num_outputs), prior, optimizer=adam(1e-2), epochs=epochs, batch_size=20
    )
    learner.run(stream)
    return learner


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_the_three_scenarios_are_remembered(scenario):
    stream = split_by_class(clouds(), clouds(seed=1), classes_per_task=2, scenario=scenario)
    matrix = run(stream, kprior()).matrix
    assert matrix.worst_task > 0.85
    if scenario == "class":  # where forgetting is worst
        assert run(stream, lifelong.finetune(Categorical())).matrix.average_accuracy < 0.75


def test_permuted_inputs_are_remembered():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 2
    x = torch.randn(120, 8, generator=generator) + 1.5 * y[:, None] * (torch.arange(8) < 4)
    stream = permuted(Examples(x, y), Examples(x, y), num_tasks=3, seed=1)
    learner = Learner(
        nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2)),
        kprior(), optimizer=adam(1e-2), epochs=15,
    )  # fmt: skip
    assert learner.run(stream).worst_task > 0.75
    memory = learner.prior.memory
    assert memory is not None
    for task in stream:  # remembered as the model saw them, permuted
        kept = memory[(memory.task == task.index).nonzero().squeeze(1)]
        assert torch.equal(kept.inputs, task.train.batch(kept.origin).inputs)


@pytest.mark.parametrize(
    "prior",
    [kprior(), lifelong.ewc(Categorical()), lifelong.fromp(Categorical(), memory=8),
     lifelong.experience_replay(Categorical(), memory=40)],
    ids=lambda prior: prior.recipe.name,
)  # fmt: skip
def test_a_stream_without_boundaries_in_chunks(prior):
    tasks = split_by_class(clouds(), classes_per_task=3, scenario="class")
    stream = blurred(tasks, overlap=0.3, num_chunks=5)
    model = mlp()
    for chunk in stream:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for x, y in chunk.loader(batch_size=32, epochs=20):
            loss = prior.loss(model, x, y, num_data=len(chunk))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        half = len(chunk) // 2  # and an update in the middle of a chunk
        prior = prior.update(model, chunk.train[:half]).update(model, chunk.train[half:])
    assert (prior.num_tasks, prior.num_data) == (10, 180)
    assert torch.isfinite(prior(model))
    if prior.recipe.name == "kprior":
        assert evaluate(model, clouds(), Categorical()).accuracy > 0.9


def test_arbitrary_heads_overlapping_and_of_unequal_sizes():
    data, heads = clouds(), [(0, 1, 2), (2, 3), (5, 0, 4, 1)]
    prior, model = kprior(), mlp()
    tasks = []
    for index, head in enumerate(heads):
        rows = torch.isin(data.labels, torch.tensor(head)).nonzero().squeeze(1)
        tasks.append(Task(index, str(head), replace(data[rows], head=head)))
    learner = Learner(model, prior, optimizer=adam(1e-2), epochs=25)
    for task in tasks:
        learner.learn(task)
    assert learner.prior.heads == tuple(heads)
    memory = learner.prior.memory
    assert memory is not None
    for index, head in enumerate(heads):
        of_task = memory[(memory.task == index).nonzero().squeeze(1)]
        assert of_task.mask is not None
        assert of_task.mask.nonzero()[:, 1].unique().tolist() == sorted(head)
    # Every task is told apart within its own head, classes that it shares with others too.
    assert all(evaluate(model, task.train, Categorical()).accuracy > 0.9 for task in tasks)


def test_logits_outside_of_the_head_have_no_gradient():
    model, data = mlp(), clouds()
    first = replace(data[(data.labels < 2).nonzero().squeeze(1)], head=(0, 1))
    prior = lifelong.gradient_reconstruction(
        Categorical(), memory=10, gradient="stored", blend=0.5
    ).update(model, first)
    with torch.no_grad():
        model[0].weight += 0.1
    prior.loss(model, first.inputs, first.labels, num_data=60, head=(0, 1)).backward()
    grad = model[2].weight.grad
    assert isinstance(grad, Tensor)
    assert bool((grad[2:] == 0).all())
    assert bool((grad[:2] != 0).all())


# ------------------------------------------------------------------ growing heads

GROWING = {
    "kprior": (lifelong.kprior(Categorical(), memory=20, precision=0.01), {}),
    "ewc": (lifelong.ewc(Categorical()), {}),
    "dense laplace": (lifelong.online_laplace(Categorical(), structure="dense"), {}),
    "gradient_reconstruction": (
        lifelong.gradient_reconstruction(Categorical(), memory=20, gradient="stored"), {},
    ),
    "fromp": (lifelong.fromp(Categorical(), memory=20), {}),
    "experience_replay": (lifelong.experience_replay(Categorical(), memory=20), {}),
    "derpp": (lifelong.derpp(Categorical(), memory=20), {"new_classes": "mask"}),
}  # fmt: skip


def regulariser(prior: Prior, model: nn.Module) -> Tensor:
    return torch.zeros(()) if prior.regulariser is None else prior.regulariser(model)


@pytest.mark.parametrize("name", GROWING)
def test_a_head_that_grows(name):
    fresh, how = GROWING[name]
    small, large = clouds(classes=6), clouds(classes=6)
    first = small[(small.labels < 3).nonzero().squeeze(1)]
    learner = Learner(mlp(3), fresh, optimizer=adam(1e-2), epochs=15)
    learner.learn(Task(0, "three classes", first))
    model, before = learner.model, learner.prior
    with torch.no_grad():
        model[0].weight += 0.05
    value = before(model) - regulariser(before, model)
    # Without a word the new rows would be a different model.
    widen(model, "2", 6)
    with pytest.raises(StaleAnchorError, match=r"prior\.grow\(model\)"):
        before(model)
    learner.prior = before.grow(model, **how)
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure[2].bias[3:] = -50.0  # where the new classes are out of question, nothing has changed
    grown = before.grow(sure, **how)
    assert torch.allclose(grown(sure) - regulariser(grown, sure), value, rtol=1e-2)
    learner.learn(Task(1, "six classes", large))
    assert torch.isfinite(learner.prior(model))
    assert evaluate(model, large, Categorical()).accuracy > 0.8
    weight = learner.prior.weight
    assert weight is None or weight.anchor["2.weight"].shape == (6, 32)


def test_squared_logits_say_nothing_of_a_new_class():
    model, data = mlp(), clouds()
    prior = lifelong.der(Categorical(), memory=10).update(model, data)
    widen(model, "2", 8)
    with pytest.raises(ValueError, match="no value that means probability 0.*new_classes='mask'"):
        prior.grow(model)
    with pytest.raises(ValueError, match="new_classes must be 'zero' or 'mask', got 'none'"):
        prior.grow(model, new_classes="none")  # type: ignore[arg-type]


def test_outputs_that_are_no_classes_cannot_be_added():
    model, x = mlp(1), clouds().inputs
    prior = lifelong.kprior(Gaussian(), memory=10).update(model, (x, x[:, :1]))
    widen(model, "2", 2)
    with pytest.raises(ValueError, match="keep the number of outputs, or start a fresh prior"):
        prior.grow(model)


def test_new_and_frozen_parameters_follow_by_transfer():
    model, data = mlp(), clouds()
    model[0].bias.requires_grad_(False)
    for fresh in (lifelong.ewc(Categorical()), lifelong.online_laplace(
            Categorical(), structure="dense")):  # fmt: skip
        prior = fresh.update(model, data)
        model[0].bias.requires_grad_(True)
        with pytest.raises(StaleAnchorError, match=r"does not know: \['0.bias'\]; freeze them, or"):
            prior.update(model, data)
        grown = prior.grow(model)
        assert grown.weight is not None
        assert grown.weight.anchor.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
        grown = grown.update(model, data)
        model[0].bias.requires_grad_(False)
        with pytest.raises(StaleAnchorError, match=r"frozen now: \['0.bias'\].*allow_unmatched"):
            grown.update(model, data)
        with pytest.warns(UserWarning, match="leaves behind .* 1 parameters"):
            fewer = grown.transfer(model, allow_unmatched=True)
        fewer = fewer.update(model, data)
        assert fewer.weight is not None
        assert "0.bias" not in fewer.weight.anchor


# ------------------------------------------------------------------ all presets, all likelihoods

MEMORY = {
    "kprior", "fromp", "gradient_reconstruction", "recommended",
    "experience_replay", "der", "derpp",
}  # fmt: skip


@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_in_the_learner(name, scenario):
    stream = split_by_class(
        clouds(10, 4), clouds(10, 4), classes_per_task=2, scenario=scenario, num_outputs=4
    )
    options: dict[str, Any] = {"memory": 6} if name in MEMORY else {}
    learner = run(stream, PRESETS[name](Categorical(), **options), epochs=2)
    assert learner.prior.recipe.name == name
    assert (learner.prior.num_tasks, learner.prior.num_data) == (2, 40)
    assert 0 <= learner.matrix.average_accuracy <= 1
    assert learner.prior.num_bytes >= 0
    again = Prior.from_state_dict(learner.prior.state_dict())
    with torch.no_grad():
        learner.model[0].weight += 0.1
    assert torch.equal(again(learner.model), learner.prior(learner.model))


@pytest.mark.parametrize(
    ("likelihood", "labels"),
    [
        (Bernoulli(), lambda x: (x > 0).float()),
        (Bernoulli(), lambda x: (x[:, 0] > 0).float()),
        (Gaussian(0.3), lambda x: x.flip(1)),
        (Poisson(), lambda x: x.abs().round()),
    ],
    ids=["Bernoulli", "one Bernoulli", "Gaussian", "Poisson"],
)
@pytest.mark.parametrize("name", ["kprior", "ewc", "fromp", "gradient_reconstruction", "derpp"])
def test_other_likelihoods(likelihood, labels, name):
    x = clouds().inputs
    y = labels(x)
    # Each task sees one side; what it learns of the other side is kept by the prior alone.
    left = [i for i in range(len(x)) if x[i, 0] < 0]
    right = [i for i in range(len(x)) if x[i, 0] >= 0]
    options: dict[str, Any] = {"memory": 20} if name != "ewc" else {}
    learner = Learner(
        mlp(y.shape[1] if y.ndim == 2 else 1),
        PRESETS[name](likelihood, **options),
        optimizer=adam(1e-2),
        epochs=8,
    )
    for index, rows in enumerate((left, right)):
        learner.learn(Task(index, "side", Examples(x[rows], y[rows])))
    assert math.isfinite(float(learner.prior(learner.model).detach()))
    nll = evaluate(learner.model, Examples(x, y), likelihood).nll
    untrained = evaluate(mlp(y.shape[1] if y.ndim == 2 else 1), Examples(x, y), likelihood).nll
    assert nll < untrained


def test_lwf_distils_the_old_classes_on_the_new_inputs():
    stream = split_by_class(clouds(), classes_per_task=2)
    model, prior = mlp(), lifelong.lwf(Categorical(), temperature=2.0)
    prior = prior.prepare(model, stream[0].train).update(model, stream[0].train)
    prepared = prior.prepare(model, stream[1].train)
    old = model(stream[1].train.inputs)[:, :2].detach()
    with torch.no_grad():
        model[2].weight += 0.1 * torch.randn(6, 32)
    new = model(stream[1].train.inputs)[:, :2]
    expected = 4 * F.kl_div(F.log_softmax(new / 2, -1), F.softmax(old / 2, -1), reduction="sum")
    assert torch.allclose(prepared(model), expected, rtol=1e-4)
    assert prepared.update(model, stream[1].train).memory is None

"""Three lines in the user's own loop: that they learn, and that every habit of a loop is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lifelong
from lifelong import Categorical, Examples, Prior, TaskStream, evaluate, split_by_class
from lifelong.models import parameters

KPrior = lifelong.kprior(Categorical(), precision=1e-2, memory=20)


def mlp(*extra: nn.Module, outputs: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 32), *extra, nn.Tanh(), nn.Linear(32, outputs))


def clouds(n: int = 40, classes: int = 6) -> Examples:
    """Classes on a circle, told apart by a small network."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n * classes) % classes
    angle = y * (2 * torch.pi / classes)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return Examples(centre + 0.3 * torch.randn(len(y), 2, generator=generator), y)


def stream() -> TaskStream:
    return split_by_class(clouds(), clouds(), classes_per_task=2, scenario="class")


def learned() -> tuple[nn.Sequential, Prior]:
    """A model and a K-prior with every kind of term, after one task."""
    prior = lifelong.gradient_reconstruction(
        Categorical(), memory=20, replay=0.5, gradient="stored", precision=0.1
    )
    model, task = mlp(), stream()[0]
    return model, prior.update(model, task.train, generator=torch.Generator().manual_seed(0))


def test_the_example_of_the_design_runs_as_written_and_remembers():
    def run(prior: Prior) -> list[float]:
        model, dataset = mlp(), clouds()
        for task in split_by_class(dataset, classes_per_task=2, scenario="class"):
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for x, y in task.loader(batch_size=64, epochs=30):
                loss = F.cross_entropy(model(x), y) + prior(model) / len(task)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            prior = prior.update(model, task.train)
        return [evaluate(model, task.train, Categorical()).accuracy for task in stream()]

    with_prior = run(lifelong.kprior(Categorical(), precision=1e-2, memory=20))
    without = run(lifelong.finetune(Categorical()))
    assert min(with_prior) > 0.9
    assert sum(without[:2]) / 2 < 0.75


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize(
    ("clip", "schedule", "dtype"),
    [(None, False, None), (1.0, False, None), (None, True, None), (1.0, True, torch.bfloat16)],
)
def test_optimisers_clipping_schedules_and_autocast(make, clip, schedule, dtype):
    model, prior, tasks = mlp(), lifelong.kprior(Categorical(), memory=20), stream()[:2]
    for task in tasks:
        optimizer = make(model)
        loader = task.loader(batch_size=40, epochs=20)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
        for x, y in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
                loss = F.cross_entropy(model(x), y) + prior(model) / len(task)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule:
                scheduler.step()
        prior = prior.update(model, task.train)
    assert all(evaluate(model, task.train, Categorical()).accuracy > 0.9 for task in tasks)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_under_autocast_only_the_model_loses_digits():
    prior = lifelong.fromp(Categorical(), memory=12)
    model, task = mlp(), stream()[0]
    prior = prior.update(model, task.train)
    term, moved = prior.terms[-1], mlp()
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = prior(moved)
        f = moved(term.memory.inputs)  # type: ignore[union-attr]
    assert f.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    expected = term.value(f.float(), term.draw(None), Categorical())  # type: ignore[union-attr]
    assert torch.allclose(value, expected, rtol=1e-5)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_accumulated_gradients_are_those_of_one_batch():
    model, prior = learned()
    model, task = model.double(), stream()[1]
    prior = prior.to(dtype=torch.float64)
    for p in model.parameters():
        p.data += 0.1
    inputs, labels = task.train.inputs.double(), task.train.labels
    whole = F.cross_entropy(model(inputs), labels) + prior(model) / len(task)
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    for part in torch.arange(len(task)).split(20):
        share = len(part) / len(task)
        nll = F.cross_entropy(model(inputs[part]), labels[part])
        (share * (nll + prior(model) / len(task))).backward()
    assert torch.allclose(gradients(model), expected, atol=1e-13)


# ------------------------------------------------------------------ models


class Keyworded(nn.Module):
    """As Hugging Face models are called: by keyword, and an object with ``.logits`` comes back."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.net, self.wrap = mlp(), wrap

    def forward(self, x: Tensor, scale: Tensor) -> Any:
        return self.wrap(self.net(x) * scale)


@pytest.mark.parametrize(
    "wrap", [lambda f: SimpleNamespace(logits=f), lambda f: {"logits": f}, lambda f: f]
)
@pytest.mark.parametrize(
    "prior",
    [KPrior, lifelong.fromp(Categorical(), memory=6), lifelong.ewc(Categorical())],
    ids=lambda prior: prior.recipe.name,
)
def test_dict_inputs_and_outputs_with_logits(wrap, prior):
    model, task = Keyworded(wrap), stream()[0]
    inputs = {"x": task.train.inputs, "scale": torch.ones(len(task), 1)}
    data = Examples(inputs, task.train.labels)
    named, plain = prior.update(model, data), prior.update(model.net, task.train)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05
    assert torch.allclose(named(model), plain(model.net), rtol=1e-5)
    value = named.loss(model, inputs, task.train.labels, num_data=len(task))
    nll = F.cross_entropy(model.net(task.train.inputs), task.train.labels)
    assert torch.allclose(value, nll + plain(model.net) / len(task), rtol=1e-5)


# ------------------------------------------------------------------ the fused path


@dataclass(frozen=True)
class Kind:
    model: Any
    prior: Prior
    scenario: Any = "class"


def kinds() -> dict[str, Kind]:
    full = lifelong.gradient_reconstruction(
        Categorical(), memory=20, replay=0.5, gradient="stored", precision=0.1
    )
    return {
        "plain": Kind(mlp, full),
        "dropout": Kind(lambda: mlp(nn.Dropout(0.5)), full),
        "batch norm": Kind(lambda: mlp(nn.BatchNorm1d(32)), full),
        "heads": Kind(mlp, full, "task"),
        "kernels": Kind(mlp, lifelong.fromp(Categorical(), memory=20), "task"),
        "nothing": Kind(mlp, lifelong.finetune(Categorical())),
    }


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("training", [True, False])
def test_the_fused_loss_is_the_mean_nll_plus_the_prior(name, batch_size, training):
    kind = kinds()[name]
    model = kind.model().double()
    tasks = split_by_class(clouds(), classes_per_task=2, scenario=kind.scenario)
    first, task = (replace(t.train, inputs=t.train.inputs.double()) for t in tasks[:2])
    prior = kind.prior.update(model, first, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    model.train(training)

    def value_and_gradient(fused: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        twin = kind.model().double()
        twin.load_state_dict(model.state_dict())
        twin.train(training)
        torch.manual_seed(4)  # of dropout
        draws: Any = {"batch_size": batch_size, "generator": torch.Generator().manual_seed(5)}
        if fused:
            loss = prior.loss(
                twin, task.inputs, task.labels, num_data=len(task), head=task.head, **draws
            )
        else:
            f = twin(task.inputs)
            if task.head is not None:
                outside = torch.ones(6, dtype=torch.bool)
                outside[list(task.head)] = False
                f = f.masked_fill(outside, -1e300)
            loss = F.cross_entropy(f, task.labels) + prior(twin, **draws) / len(task)
        loss.backward()
        return loss.detach(), gradients(twin), twin.state_dict()

    fused, separate = value_and_gradient(True), value_and_gradient(False)
    assert torch.allclose(fused[0], separate[0], atol=1e-13)
    assert torch.allclose(fused[1], separate[1], atol=1e-12)
    assert all(torch.allclose(fused[2][k], separate[2][k]) for k in fused[2])  # running statistics


class Noise(nn.Module):
    """Stochastic depth and the like: no module of torch's, no number named after dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, self.training)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("module", "passes"),
    [
        (nn.Tanh(), 1),
        (Doubled(), 1),
        (Noise(), 2),
        (nn.Dropout(0.0), 1),
        (nn.LayerNorm(32), 1),
        (nn.Dropout(0.1), 2),
        (nn.BatchNorm1d(32), 2),
        (nn.RReLU(), 2),
    ],
)
def test_one_forward_pass_unless_the_mode_matters(module, passes):
    model = mlp(module)
    task = stream()[0]
    prior = KPrior.update(model, task.train)
    calls: list[bool] = []
    model.register_forward_hook(lambda m, *_: calls.append(m.training))
    prior.loss(model.train(), task.train.inputs, task.train.labels, num_data=80)
    assert calls == [True, False][:passes]
    calls.clear()
    prior.loss(model.eval(), task.train.inputs, task.train.labels, num_data=80)
    assert calls == [False]
    calls.clear()
    module.train()  # as for Monte-Carlo dropout: the rest of the model is in eval mode
    prior.loss(model, task.train.inputs, task.train.labels, num_data=80)
    assert len(calls) == passes


# ------------------------------------------------------------------ cost and bias


@pytest.mark.parametrize("batch_size", [1, 7, 19])
def test_a_memory_batch_gives_the_whole_prior_on_average(batch_size):
    model, prior = learned()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
        whole = float(prior(model))
        generator = torch.Generator().manual_seed(0)
        values = torch.stack(
            [prior(model, batch_size=batch_size, generator=generator) for _ in range(200)]
        )
    error = float(values.std()) / 200**0.5
    assert error > 0
    assert abs(float(values.mean()) - whole) < 4 * error


def test_the_cost_does_not_grow_with_the_tasks():
    model, task = mlp(), stream()[0]
    prior = lifelong.kprior(Categorical(), memory=4)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    forwarded = {}
    for number in range(1, 51):
        prior = prior.update(model, task.train)
        if number in (2, 50):
            rows.clear()
            prior(model, batch_size=8)
            prior.loss(
                model, task.train.inputs[:8], task.train.labels[:8], num_data=8, batch_size=8
            )
            forwarded[number] = list(rows)
    assert len(prior.memory or ()) == 200
    assert forwarded == {2: [8, 16], 50: [8, 16]}


def test_a_prior_leaves_the_gradient_and_mode_of_the_model_alone():
    model, prior = learned()
    model.train()
    model[0].requires_grad_(False)
    prior(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert list(parameters(model)) == ["2.weight", "2.bias"]

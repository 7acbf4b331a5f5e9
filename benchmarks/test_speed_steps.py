"""A training step with a prior against a plain one, with the optimiser's step on both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lifelong
from lifelong import Categorical, Examples, KernelTerm, MemoryTerm, Prior

from .cases import CASES, CLASSES, draw
from .conftest import Compare
from .ratios import Work

BATCH = 128
MEMORY = 200
TASK = 1000
ROUNDS = {
    "MLP 784-256-256-10": {"rounds": 41, "inner": 2},
    "small CNN": {"rounds": 15, "inner": 1},
}

PRIORS: dict[str, Callable[[], Prior]] = {
    "kprior": lambda: lifelong.kprior(Categorical(), memory=MEMORY),
    "gradient_reconstruction": lambda: lifelong.gradient_reconstruction(
        Categorical(), memory=MEMORY, gradient="stored"
    ),
    "fromp": lambda: lifelong.fromp(Categorical(), memory=MEMORY, prior_precision=1.0),
    "ewc": lambda: lifelong.ewc(Categorical()),
    "derpp": lambda: lifelong.derpp(Categorical(), memory=MEMORY, total=False),
}
OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-4),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-4),
}


def step(model: nn.Module, loss: Callable[[], torch.Tensor], optimiser: str) -> Work:
    opt = OPTIMISERS[optimiser](model.parameters())

    def run() -> None:
        opt.zero_grad()
        loss().backward()
        opt.step()

    return run


def plain_step(case: str, batch: int, optimiser: str) -> Work:
    model = CASES[case].build()
    x, y = draw(CASES[case].shape, batch, seed=1)
    return step(model, lambda: F.cross_entropy(model(x), y), optimiser)


def prior_step(
    case: str, name: str, optimiser: str, tasks: int = 1, batch_size: int | None = BATCH
) -> Work:
    model = CASES[case].build()
    data = CASES[case].examples(TASK)
    prior = after(PRIORS[name]().update(model, data), tasks, data)
    x, y = draw(CASES[case].shape, BATCH, seed=1)
    g = torch.Generator().manual_seed(0)

    def loss() -> torch.Tensor:
        return prior.loss(model, x, y, num_data=TASK, batch_size=batch_size, generator=g)

    return step(model, loss, optimiser)


def after(prior: Prior, tasks: int, data: Examples) -> Prior:
    """The prior with its memory repeated for ``tasks`` tasks, each with its own copy in RAM."""
    return replace(prior, terms=tuple(_repeated(term, tasks) for term in prior.terms))


def _repeated(term: Any, tasks: int) -> Any:
    if not isinstance(term, (MemoryTerm, KernelTerm)):
        return term
    size = len(term.memory)
    memory = term.memory.add(*[term.memory] * (tasks - 1))
    if isinstance(term, MemoryTerm):
        return replace(term, memory=memory)
    (block,) = term.blocks
    blocks = tuple(
        replace(
            block,
            start=i * size,
            stop=(i + 1) * size,
            mean=block.mean.clone(),
            precision=None if block.precision is None else block.precision.clone(),
        )
        for i in range(tasks)
    )
    return replace(term, memory=memory, blocks=blocks)


@pytest.mark.parametrize("optimiser", ["Adam", "SGD"])
@pytest.mark.parametrize("case", ["MLP 784-256-256-10", "small CNN"])
@pytest.mark.parametrize("name", ["kprior", "gradient_reconstruction"])
def test_step_with_a_prior(compare: Compare, name: str, case: str, optimiser: str) -> None:
    compare(
        prior_step(case, name, optimiser),
        plain_step(case, 2 * BATCH, optimiser),
        bar="1 step with a prior / plain step of the joint batch",
        case=f"{name}, {case}, {optimiser}",
        limit=1.15,
        **ROUNDS[case],
    )


def test_fromp_step_at_nine_past_tasks(compare: Compare) -> None:
    case, tasks = "MLP 784-100-100-10", 9
    model = CASES[case].build()
    remembered = [CASES[case].examples(MEMORY, seed=i) for i in range(tasks)]
    x, y = draw(CASES[case].shape, BATCH, seed=1)
    inputs = torch.cat([x, *[past.inputs for past in remembered]])  # type: ignore[list-item]
    labels = torch.cat([y, *[past.labels for past in remembered]])

    def replay() -> torch.Tensor:
        # Replay as a user would write it: the rows are gathered in each step.
        f = model(torch.cat([x, inputs[BATCH:]]))
        past = F.cross_entropy(f[BATCH:], labels[BATCH:], reduction="sum")
        return F.cross_entropy(f[:BATCH], y) + past / TASK

    compare(
        prior_step(case, "fromp", "Adam", tasks, batch_size=None),
        step(model, replay, "Adam"),
        bar="2 FROMP step, 9 tasks of 200 / replay step over the same 1800",
        case=f"{case}, Adam",
        limit=1.5,
        rounds=21,
    )


@pytest.mark.parametrize("name", PRIORS)
def test_step_at_task_100(compare: Compare, name: str) -> None:
    case = "MLP 784-256-256-10"
    compare(
        prior_step(case, name, "Adam", tasks=100),
        prior_step(case, name, "Adam", tasks=2),
        bar="3 step at task 100 / step at task 2",
        case=f"{name}, {case}, Adam",
        limit=1.05,
        inner=2,
        rounds=41,
    )


@pytest.mark.parametrize("name", ["plain", "kprior", "gradient_reconstruction"])
@pytest.mark.parametrize("case", ["MLP 784-256-256-10", "small CNN"])
def test_table_of_steps(benchmark: Any, case: str, name: str) -> None:
    benchmark.group = f"step of 256, Adam, {case}"
    if name == "plain":
        work = plain_step(case, 2 * BATCH, "Adam")
    else:
        work = prior_step(case, name, "Adam")
    benchmark.pedantic(work, rounds=10, warmup_rounds=1)


def test_classes_match() -> None:
    """The memory of a task holds every class, as the cases promise."""
    data = CASES["MLP 784-100-100-10"].examples(TASK)
    assert len(data.labels.unique()) == CLASSES

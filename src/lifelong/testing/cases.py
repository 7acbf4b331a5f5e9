r"""Cases: small models with data in float64, on which the laws of ``laws.py`` are tried.

Three kinds, by what holds on them:

    linear_gaussian()   one batch of formulas gives every answer; dense quadratics are exact
    glms()              convex; exact where every past example is remembered
    networks()          anything; the gradient at the anchor is still exact

Labels are drawn from a random model of the same likelihood, so that minima are finite. A case of
one's own is one more ``Case``; nothing here is random beyond its seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..data import Examples, Head, head_mask
from ..likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from ..memory import Memory, memorise

MakeModel = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Case:
    """A model for a seed, a likelihood, and one ``Examples`` for each task, all in float64."""

    name: str
    make_model: MakeModel = field(repr=False)
    likelihood: Likelihood
    data: tuple[Examples, ...] = field(repr=False)

    @property
    def heads(self) -> tuple[Head | None, ...]:
        """The class set of each task; None where all outputs compete."""
        return tuple(task.head for task in self.data)


@dataclass(frozen=True)
class Split:
    """How the examples of a task are kept.

    memory: this part of them at random, the others in g and G. replay: this part of the memory by
    its true label. blend: each of the other items mixes blend of its true label into the soft one.
    """

    name: str
    memory: float = 1.0
    replay: float = 0.0
    blend: float = 0.0

    def remember(self, case: Case, model: nn.Module, task: int, seed: int = 0) -> Memory | None:
        """The items of task ``task`` with their weights; None where none is kept."""
        data, generator = case.data[task], torch.Generator().manual_seed(seed + task)
        size = round(self.memory * len(data))
        if size == 0:
            return None
        ids = data.ids[torch.randperm(len(data), generator=generator)[:size]]
        items = memorise(model, data, case.likelihood, ids=ids, task=task)
        hard = torch.full((size,), self.blend, dtype=torch.float64)
        hard[torch.randperm(size, generator=generator)[: round(self.replay * size)]] = 1.0
        return items.weighted(1.0 - hard, hard)


SPLITS = (
    Split("all weight", memory=0.0),
    Split("all function"),
    Split("all replay", replay=1.0),
    Split("thirds", memory=2 / 3, replay=0.5),
    Split("blended", memory=0.5, blend=0.3),
    Split("all blended", blend=0.6),
)


# -------------------------------------------------------------------- models


def build(make: Callable[[], nn.Module]) -> MakeModel:
    """A float64 model for a seed; the global random state stays as it was."""

    def make_model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make().double()

    return make_model


def linear(features: int, outputs: int, *, bias: bool = True) -> MakeModel:
    """f = W x + b."""
    return build(lambda: nn.Linear(features, outputs, bias=bias))


def mlp(features: int, outputs: int, *, hidden: int = 6) -> MakeModel:
    """One hidden layer of tanh units."""
    return build(
        lambda: nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    )


def conv(channels: int, outputs: int) -> MakeModel:
    """A 2 x 2 convolution on images of 3 x 3, then a linear layer."""
    return build(
        lambda: nn.Sequential(
            nn.Conv2d(channels, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, outputs)
        )
    )


class First(nn.Module):
    """A linear model of the first ``features`` inputs alone: the others were dropped."""

    def __init__(self, features: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.randn(outputs, features) / features)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x[:, : self.features], self.weight, self.bias)


# -------------------------------------------------------------------- data


def draw(
    likelihood: Likelihood,
    shape: tuple[int, ...],
    outputs: int,
    *,
    size: int,
    heads: tuple[Head | None, ...],
    seed: int = 0,
) -> tuple[Examples, ...]:
    """One task for each head: normal inputs of ``shape``, labels from a random linear model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    features = torch.Size(shape).numel()
    weight = normal(features, outputs) / features**0.5
    tasks = []
    for index, head in enumerate(heads):
        x = normal(size, *shape) + 0.3 * index
        f = likelihood.mask(x.flatten(1) @ weight, head_mask(head, outputs))
        # Ids of their own, as a stream gives them: an example is found by its id in later tasks.
        ids = torch.arange(size) + index * size
        tasks.append(Examples(x, likelihood.sample(f, generator), ids, head))
    return tuple(tasks)


def linear_gaussian(
    *, tasks: int = 3, size: int = 18, features: int = 4, outputs: int = 2, seed: int = 0
) -> Case:
    """Linear regression with known noise."""
    likelihood = Gaussian(0.7)
    data = draw(likelihood, (features,), outputs, size=size, heads=(None,) * tasks, seed=seed)
    return Case("linear-gaussian", linear(features, outputs), likelihood, data)


def orthogonal(likelihood: Likelihood | None = None, *, tasks: int = 3, seed: int = 0) -> Case:
    """Linear regression in which each example has one feature: diagonal curvature is exact, for
    any part of the examples too."""
    likelihood = likelihood or Gaussian(1.0)
    generator = torch.Generator().manual_seed(seed)
    data = []
    for index in range(tasks):
        scale = 0.5 + torch.rand(16, 1, generator=generator, dtype=torch.float64)
        x = scale * torch.eye(4, dtype=torch.float64).repeat(4, 1)
        y = likelihood.sample(x.sum(1, keepdim=True), generator)
        data.append(Examples(x, y, torch.arange(16) + 16 * index))
    return Case("orthogonal", linear(4, 1, bias=False), likelihood, tuple(data))


def glms(*, tasks: int = 3, size: int = 18, features: int = 4, seed: int = 0) -> tuple[Case, ...]:
    """Logistic, multinomial (with and without a head for each task) and Poisson regression."""
    shared: tuple[Head | None, ...] = (None,) * tasks
    kinds: tuple[tuple[str, Likelihood, int, tuple[Head | None, ...]], ...] = (
        ("logistic", Bernoulli(), 2, shared),
        ("multinomial", Categorical(), 3, shared),
        ("multinomial heads", Categorical(), 2 * tasks, _pairs(tasks)),
        ("poisson", Poisson(), 2, shared),
    )
    return tuple(
        Case(
            name,
            linear(features, outputs),
            likelihood,
            draw(likelihood, (features,), outputs, size=size, heads=heads, seed=seed + i),
        )
        for i, (name, likelihood, outputs, heads) in enumerate(kinds)
    )


def networks(*, tasks: int = 3, size: int = 12, seed: int = 0) -> tuple[Case, ...]:
    """Linear, MLP and convolution, each with every likelihood, and with heads for classes."""
    models: tuple[tuple[str, tuple[int, ...], Callable[[int], MakeModel]], ...] = (
        ("linear", (4,), lambda outputs: linear(4, outputs)),
        ("mlp", (4,), lambda outputs: mlp(4, outputs)),
        ("conv", (1, 3, 3), lambda outputs: conv(1, outputs)),
    )
    shared: tuple[Head | None, ...] = (None,) * tasks
    likelihoods: tuple[tuple[Likelihood, int, tuple[Head | None, ...]], ...] = (
        (Categorical(), 3, shared),
        (Categorical(), 2 * tasks, _pairs(tasks)),
        (Bernoulli(), 2, shared),
        (Gaussian(0.5), 2, shared),
        (Poisson(), 2, shared),
    )
    return tuple(
        Case(
            f"{name} {type(likelihood).__name__}{' heads' if heads[0] else ''}",
            make(outputs),
            likelihood,
            draw(likelihood, shape, outputs, size=size, heads=heads, seed=seed),
        )
        for name, shape, make in models
        for likelihood, outputs, heads in likelihoods
    )


def _pairs(tasks: int) -> tuple[Head | None, ...]:
    return tuple((2 * t, 2 * t + 1) for t in range(tasks))


def same_inputs(case: Case) -> Case:
    """Every task with the inputs of the first, and labels of its own: where LwF is exact."""
    first = case.data[0]
    tasks = tuple(replace(task, inputs=first.inputs) for task in case.data)
    return replace(case, name=f"{case.name} same inputs", data=tasks)

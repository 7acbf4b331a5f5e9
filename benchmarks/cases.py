"""Models and data of the benchmarks: shapes of the real ones, values from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lifelong import Examples

CLASSES = 10


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them; images are flattened first."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


def small_cnn() -> nn.Sequential:
    """Two convolutions and two linear layers on (1, 28, 28); 0.2 million parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def cifar_net(num_outputs: int = CLASSES) -> nn.Sequential:
    """The network of FROMP's Split CIFAR on (3, 32, 32); 1.25 to 1.28 million parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(2304, 512),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(512, num_outputs),
    )


@dataclass(frozen=True)
class Case:
    """A model and the shape of its inputs."""

    model: Callable[[], nn.Sequential]
    shape: tuple[int, ...]

    def build(self, seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        return self.model()

    def examples(self, n: int, seed: int = 0) -> Examples:
        return Examples(*draw(self.shape, n, seed))


CASES = {
    "MLP 784-256-256-10": Case(lambda: mlp(784, 256, 256, CLASSES), (1, 28, 28)),
    "small CNN": Case(small_cnn, (1, 28, 28)),
    "CifarNet": Case(cifar_net, (3, 32, 32)),
    "MLP 784-100-100-10": Case(lambda: mlp(784, 100, 100, CLASSES), (1, 28, 28)),
}


def draw(shape: tuple[int, ...], n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n inputs in [0, 1] and balanced labels in random order."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(n, *shape, generator=generator)
    return inputs, torch.randperm(n, generator=generator) % CLASSES


@dataclass(frozen=True)
class Lazy:
    """n examples that are made a batch at a time and never held together."""

    shape: tuple[int, ...]
    n: int
    batch_size: int = 512

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.n, self.batch_size):
            yield draw(self.shape, min(self.batch_size, self.n - start), seed=start)

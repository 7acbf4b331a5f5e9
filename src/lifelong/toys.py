"""Small data that need no download: handwritten digits, and points in the plane to look at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .data import Examples
from .streams import Task, TaskStream

# Centre (x, y) and standard deviation (x, y) of each task's two Gaussians.
_FROMP_CENTRES = (
    ((0.0, 0.2), (0.6, 0.9), (1.3, 0.4), (1.6, -0.1), (2.0, 0.3)),
    ((0.45, 0.0), (0.7, 0.45), (1.0, 0.1), (1.7, -0.4), (2.3, 0.1)),
)
_FROMP_SDS = (
    ((0.08, 0.22), (0.24, 0.08), (0.04, 0.2), (0.16, 0.05), (0.05, 0.16)),
    ((0.08, 0.16), (0.16, 0.08), (0.06, 0.16), (0.24, 0.05), (0.05, 0.22)),
)
_FROMP_SIXTH = (((1.65, 0.1), (0.7, 0.25)), (0.14, 0.14))  # both centres, one deviation


def digits(*, test_fraction: float = 0.25, seed: int = 0) -> tuple[Examples, Examples]:
    """scikit-learn's bundled handwritten digits (Alpaydin & Kaynak 1998): train and test.

    1797 images, float32 (N, 1, 8, 8) in [0, 1]. The same fraction of each class is held out for
    testing; ids are positions in the original order. Needs no network.

    Raises ImportError where scikit-learn is missing, ValueError where the fraction leaves a class
    without training or test examples.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the handwritten digits come with scikit-learn: pip install 'lifelong[demo]'"
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = Examples(images, torch.tensor(classes, dtype=torch.int64))
    return _hold_out(data, test_fraction, seed)


def _hold_out(data: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    generator = torch.Generator().manual_seed(seed)
    is_test = torch.zeros(len(data), dtype=torch.bool)
    for c in data.labels.unique():
        members = (data.labels == c).nonzero().squeeze(1)
        held_out = round(fraction * len(members))
        if not 0 < held_out < len(members):
            raise ValueError(
                f"test_fraction={fraction} holds out {held_out} of the {len(members)} examples "
                "of a class; expected a fraction between 0 and 1 that leaves some on both sides"
            )
        is_test[members[torch.randperm(len(members), generator=generator)[:held_out]]] = True
    return data[~is_test], data[is_test]


def fromp_toy(option: int = 0, *, num_per_class: int = 2000, seed: int = 0) -> TaskStream:
    """The toy of FROMP (Pan et al. 2020): five tasks of two Gaussians each, along a line.

    Inputs float32 (N, 2), labels 0 and 1 for all tasks: one head of two outputs, scenario
    "domain". Options: 0 as published; 1 adds a sixth task between the others; 4 has two tasks with
    the same two Gaussians, those of the first. Test sets are as large as the training sets.

    Raises ValueError for another option, or fewer than one point per class.
    """
    if option not in (0, 1, 4):
        raise ValueError(f"option must be 0, 1 (a sixth task) or 4 (one task twice), got {option}")
    _positive(num_per_class)
    centres = torch.tensor(_FROMP_CENTRES).transpose(0, 1)  # (task, class, 2)
    sds = torch.tensor(_FROMP_SDS).transpose(0, 1)
    if option == 1:
        centre, sd = torch.tensor(_FROMP_SIXTH[0]), torch.tensor(_FROMP_SIXTH[1])
        centres = torch.cat([centres, centre.unsqueeze(0)])
        sds = torch.cat([sds, sd.expand(1, 2, 2)])
    if option == 4:
        centres, sds = centres[[0, 0]], sds[[0, 0]]
    generator = torch.Generator().manual_seed(seed)

    def draw(centre: Tensor, sd: Tensor) -> Examples:  # (class, 2) each
        noise = torch.randn(2, num_per_class, 2, generator=generator)
        points = centre.unsqueeze(1) + sd.unsqueeze(1) * noise
        labels = torch.arange(2).repeat_interleave(num_per_class)
        return Examples(points.flatten(0, 1), labels)

    tasks = [
        Task(t, f"blobs {t + 1}", draw(*pair), draw(*pair))
        for t, pair in enumerate(zip(centres, sds, strict=True))
    ]
    return TaskStream("fromp-toy", tuple(tasks), 2, "domain")


def two_moons(*, num_per_class: int = 500, noise: float = 0.1, seed: int = 0) -> TaskStream:
    """Two interleaved half circles, met in two tasks: the points left of x = 0.5, then the rest.

    Class 0 is (cos a, sin a), class 1 is (1 - cos a, 0.5 - sin a), a uniform in [0, pi], plus
    Gaussian noise of standard deviation ``noise``. Each half holds both classes. Inputs float32
    (N, 2); one head of two outputs, scenario "domain"; a test set of the same size. The idea of
    showing how a boundary adapts is that of K-priors' first figure (Khan & Swaroop 2021); its
    exact data are not published.

    Raises ValueError for fewer than one point per class, a negative noise, or so few points that
    a half stays empty.
    """
    _positive(num_per_class)
    if not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"noise must be a finite standard deviation of at least 0, got {noise}")
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Examples:
        angle = math.pi * torch.rand(2, num_per_class, generator=generator)
        outer = torch.stack([angle[0].cos(), angle[0].sin()], dim=1)
        inner = torch.stack([1 - angle[1].cos(), 0.5 - angle[1].sin()], dim=1)
        points = torch.cat([outer, inner])
        points = points + noise * torch.randn(points.shape, generator=generator)
        return Examples(points, torch.arange(2).repeat_interleave(num_per_class))

    train, test = draw(), draw()
    left, left_test = (_points(data)[:, 0] < 0.5 for data in (train, test))
    tasks = (
        Task(0, "left half", train[left], test[left_test]),
        Task(1, "right half", train[~left], test[~left_test]),
    )
    return TaskStream("two-moons", tasks, 2, "domain")


def _points(data: Examples) -> Tensor:
    return torch.as_tensor(data.inputs)


def _positive(num_per_class: int) -> None:
    if num_per_class < 1:
        raise ValueError(f"num_per_class must be at least 1, got {num_per_class}")

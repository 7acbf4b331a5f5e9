"""Benchmarks: the streams, networks and published settings that ``lifelong run`` knows by name.

A benchmark is a stream and a network; ``settings`` says how a method is trained and set on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from .augment import AUGMENTATIONS, Augment
from .config import Augmentation, Optimizer, Scenario, Schedule, Training, suggestion
from .data import Examples
from .learner import MakeOptimizer, MakeScheduler
from .networks import cifarnet, mlp, resnet18, strided_vgg
from .photos import Photos, redraw, references, scan
from .readers import class_names, find, load
from .streams import TaskStream, permuted, split_by_class
from .toys import digits, fromp_toy, two_moons


@dataclass(frozen=True)
class Settings:
    """How one method is used on one benchmark: the training, and arguments of its preset."""

    training: Training
    prior: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Tasks and a network to learn them.

    make_stream: (folder with the data, scenario) -> the tasks, always the same ones.
    make_model: number of outputs -> a fresh network from torch's global generator, which the
    caller seeds. reader: folder -> the layer before it, where inputs only say what is to be read.
    scenarios: those it offers, the default first. training: of methods without an entry in
    ``published``, which also holds what we chose ourselves, with how. memory: examples of each task
    that a method with memory keeps. needs_data: whether the folder is read at all.
    """

    name: str
    description: str
    make_stream: Callable[[Path | None, Scenario], TaskStream]
    make_model: Callable[[int], nn.Module]
    scenarios: tuple[Scenario, ...]
    training: Training
    memory: int
    published: Mapping[str, Settings] = field(default_factory=dict)
    needs_data: bool = False
    reader: Callable[[Path | None], Photos] | None = None

    def settings(self, preset: str) -> Settings:
        """How ``preset`` is used here where nobody says otherwise."""
        return self.published.get(preset, Settings(self.training))


# Training -----------------------------------------------------------------------------------------


def make_optimizer(training: Training) -> MakeOptimizer:
    """A function that makes the optimiser of ``training`` for given parameters."""
    kind: Optimizer = training.optimizer

    def make(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(params, lr=training.lr, momentum=training.momentum)
        return torch.optim.Adam(params, lr=training.lr)

    return make


def make_scheduler(training: Training) -> MakeScheduler | None:
    """A function (optimiser, number of steps) -> scheduler; None for a constant rate."""
    kind: Schedule = training.schedule
    if kind == "constant":
        return None

    def make(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        if kind == "triangular":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(triangle, steps=steps))
        if kind == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=training.lr, total_steps=max(2, steps)
        )

    return make


def triangle(step: int, *, steps: int) -> float:
    """The part of the rate at a step: up in a straight line over an eighth of the steps, then down
    to 0 over the others, as the ImageNet runs of Daxberger et al. 2023 have it (2 of 16 epochs)."""
    peak = max(1.0, steps / 8)
    return min((step + 1) / peak, max(0.0, (steps - step) / max(1.0, steps - peak)))


def learner_options(training: Training) -> dict[str, Any]:
    """The arguments of ``Learner`` that ``training`` stands for."""
    return {
        "optimizer": make_optimizer(training),
        "scheduler": make_scheduler(training),
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "memory_batch_size": training.memory_batch_size,
        "clip": training.clip,
        "autocast": torch.bfloat16 if training.autocast else None,
        "augment": _augment(training.augment),
        "min_steps": training.min_steps,
    }


def _augment(name: Augmentation) -> Augment | None:
    if name == "photo":
        return redraw
    return None if name == "none" else AUGMENTATIONS[name]


# The registry -------------------------------------------------------------------------------------


def _split_digits(data_dir: Path | None, scenario: Scenario) -> TaskStream:
    return split_by_class(*digits(), scenario=scenario, name="split-digits")


def _split_mnist(data_dir: Path | None, scenario: Scenario) -> TaskStream:
    train, test = (load(find(_folder(data_dir), "mnist", s), split=s) for s in ("train", "test"))
    return split_by_class(train, test, scenario=scenario, name="split-mnist")


def _permuted_mnist(
    data_dir: Path | None, scenario: Scenario, *, num_tasks: int = 10, name: str = "permuted-mnist"
) -> TaskStream:
    train, test = (load(find(_folder(data_dir), "mnist", s), split=s) for s in ("train", "test"))
    return permuted(train, test, num_tasks=num_tasks, name=name)


def _split_cifar_t(data_dir: Path | None, scenario: Scenario) -> TaskStream:
    train, test = (_cifar_t(_folder(data_dir), split) for split in ("train", "test"))
    tens = [range(first, first + 10) for first in range(0, 60, 10)]
    return split_by_class(
        train, test, classes_per_task=tens, scenario=scenario, name="split-cifar-t"
    )


def _cifar_t(folder: Path, split: str) -> Examples:
    """CIFAR-10 as labels 0 to 9, the first fifty classes of Tiny ImageNet as 10 to 59; uint8."""
    cifar = load(find(folder, "cifar10_jpegq75", split), mode="RGB", dtype=torch.uint8)
    tiny = load(
        find(folder, "tiny_imagenet", split),
        mode="RGB",
        size=(32, 32),
        dtype=torch.uint8,
        classes=range(50),
    )
    return Examples(
        torch.cat([torch.as_tensor(cifar.inputs), torch.as_tensor(tiny.inputs)]),
        torch.cat([cifar.labels, tiny.labels + 10]),
    )


def _split_tiny_imagenet(data_dir: Path | None, scenario: Scenario) -> TaskStream:
    folder = _folder(data_dir)
    parts = {split: find(folder, "tiny_imagenet", split) for split in ("train", "test")}
    train, test = (
        load(paths, split=split, mode="RGB", dtype=torch.uint8) for split, paths in parts.items()
    )
    return split_by_class(
        train,
        test,
        classes_per_task=20,
        class_order=_tiny_imagenet_order(folder, class_names(parts["train"])),
        scenario=scenario,
        name="split-tiny-imagenet",
    )


def _tiny_imagenet_order(folder: Path, names: Sequence[str] | None) -> list[int]:
    """The labels in the order of the archive's own list of classes, which the paper dealt out.

    names: of the labels 0, 1, ..., each beginning with its WordNet id. Raises FileNotFoundError
    where the list is not in the folder, ValueError where it is not of the same classes.
    """
    path = folder / "tiny_imagenet-wnids.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {folder}: expected the classes in order, one WordNet id a line "
            "(wnids.txt of the Tiny ImageNet archive)"
        )
    order = path.read_text(encoding="utf-8").split()
    label = {name.split()[0]: i for i, name in enumerate(names or ())}
    if sorted(order) != sorted(label):
        raise ValueError(
            f"{path.name} lists {len(order)} classes and the images have the names of "
            f"{len(label)}; expected the same WordNet ids in both"
        )
    return [label[wnid] for wnid in order]


def photos(
    data_dir: Path | None, scenario: Scenario, *, tasks: int = 10, name: str = "imagenet-1000"
) -> TaskStream:
    """Photos of train/CLASS and val/CLASS, the classes dealt out in the order of seed 1993, as many
    to each task. Raises ValueError where they cannot be, or val has other classes than train."""
    root = _photos_folder(_folder(data_dir))
    train, test = scan(root, "train"), scan(root, "val")
    if train.classes != test.classes:
        other = sorted(set(train.classes) ^ set(test.classes))[:5]
        raise ValueError(f"train and val of {root} differ in their classes: {other}")
    if len(train.classes) % tasks:
        raise ValueError(f"{len(train.classes)} classes make no {tasks} tasks of equal size")
    order = np.random.RandomState(1993).permutation(len(train.classes)).tolist()
    return split_by_class(
        references(train),
        references(test, first=len(train.paths)),
        classes_per_task=len(order) // tasks,
        class_order=order,
        scenario=scenario,
        name=name,
    )


def photos_reader(data_dir: Path | None, *, size: int = 224) -> Photos:
    """What reads the photos of ``photos``: those to learn from, then those to test on."""
    root = _photos_folder(_folder(data_dir))
    return Photos((*scan(root, "train").paths, *scan(root, "val").paths), size)


def _photos_folder(folder: Path) -> Path:
    inner = folder / "imagenet"
    return inner if inner.is_dir() else folder


def _folder(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise ValueError("this benchmark reads data: say in which folder they are")
    return data_dir


def _fromp(
    tau: float, num_data: int, clip: float | None, precision: float, jitter: float
) -> tuple[dict[str, Any], float | None]:
    """FROMP's published settings in our units: arguments of the preset, and the clip.

    The released code minimises (1/tau) mean CE + ½ sum Delta' K⁻¹ Delta and clips the norm of that
    gradient. Ours is the same loss times tau: mean CE + strength / N ½ sum Delta' K⁻¹ Delta with
    strength = tau N, whose gradient is tau times as long; so clip = tau clip_published.
    """
    prior = {
        "strength": tau * num_data,
        "prior_precision": precision,
        "jitter": jitter,
    }
    return prior, None if clip is None else tau * clip


def _published(
    training: Training, prior: dict[str, Any], **others: Settings
) -> Mapping[str, Settings]:
    return MappingProxyType({"fromp": Settings(training, MappingProxyType(prior)), **others})


def _benchmarks() -> Iterable[Benchmark]:
    every: tuple[Scenario, ...] = ("task", "class", "domain")
    # Chosen on a quarter of the *training* digits that was held out, three seeds, by the mean of
    # the task- and the class-incremental scenario; the test digits took no part. Network and rate:
    # of eight pairs, one at which plain training forgets in both and every method still learns.
    # Then EWC's strength among 100, 1e3 and 1e4 (1 is no better than nothing: a network that is
    # sure of all its training digits has next to no Fisher) and FROMP's among 1, 30 and 1e3. The
    # gradient-reconstruction prior keeps its defaults, strength "auto" (1 gave 93.4 %, 100 93.2 %).
    digits_training = Training(epochs=15, batch_size=32, lr=5e-3)
    yield Benchmark(
        "split-digits",
        "scikit-learn's handwritten digits, 8 x 8, five tasks of two digits; MLP 64-100-100-10",
        _split_digits,
        lambda outputs: mlp(64, 100, 100, outputs),
        every,
        digits_training,
        20,
        MappingProxyType(
            {
                "ewc": Settings(digits_training, {"strength": 1000.0}),
                "fromp": Settings(digits_training, {"strength": 30.0}),
            }
        ),
    )

    # tau 10, N = 12,000 on average (11,263 to 12,665), clip 0.1, delta 1e-3, jitter 1e-6.
    prior, clip = _fromp(10, 12_000, 0.1, 1e-3, 1e-6)
    yield Benchmark(
        "split-mnist",
        "MNIST, five tasks of two digits; MLP 784-256-256-10",
        _split_mnist,
        lambda outputs: mlp(784, 256, 256, outputs),
        every,
        Training(epochs=15, batch_size=128, lr=1e-4),
        40,
        _published(Training(epochs=15, batch_size=128, lr=1e-4, clip=clip), prior),
        needs_data=True,
    )

    # tau 0.5, N = 60,000, clip 0.01, delta 1e-5, jitter 1e-5.
    prior, clip = _fromp(0.5, 60_000, 0.01, 1e-5, 1e-5)
    yield Benchmark(
        "permuted-mnist",
        "MNIST, ten tasks, the pixels of each in another order; MLP 784-100-100-10",
        _permuted_mnist,
        lambda outputs: mlp(784, 100, 100, outputs),
        ("domain",),
        Training(epochs=10, batch_size=128, lr=1e-3),
        200,
        _published(
            Training(epochs=10, batch_size=128, lr=1e-3, clip=clip),
            prior,
            # Not published. Chosen on 10,000 of the training images, one seed, 3 epochs, and not on
            # a full grid: strengths 1 and 4 with random examples, then 2 with random and lambda.
            gradient_reconstruction=Settings(
                Training(
                    epochs=10, batch_size=128, memory_batch_size=200, lr=2e-3, schedule="one-cycle"
                ),
                MappingProxyType({"strength": 2.0, "score": "lambda"}),
            ),
        ),
        needs_data=True,
    )

    # A stress test of many tasks: nothing published, one pass over each task.
    yield Benchmark(
        "permuted-mnist-50",
        "MNIST, fifty tasks, the pixels of each in another order; MLP 784-100-100-10",
        partial(_permuted_mnist, num_tasks=50, name="permuted-mnist-50"),
        lambda outputs: mlp(784, 100, 100, outputs),
        ("domain",),
        Training(epochs=1, batch_size=128, memory_batch_size=128, lr=2e-3, schedule="one-cycle"),
        200,
        needs_data=True,
    )

    # The papers have CIFAR-100 where this has Tiny ImageNet; see the table's note. Chosen on
    # training files alone, one seed (CIFAR-10 45,000 to 5,000; for the later tasks classes 50 to 99
    # of Tiny ImageNet, which are not in the stream, 160 images of each to 40). Dropout: 8 epochs
    # of the first task with the published rates reach 74.0 %, 5 epochs with a quarter of them
    # too. A second task: 200 steps of 64 at 2e-3 54.0 %, 600 steps 56.8, 600 at 5e-4 53.5, 300 of
    # 32 at 1e-3 50.2 (standard error 2.5). Epochs by what the time allows.
    yield Benchmark(
        "split-cifar-t",
        "CIFAR-10 (JPEG), then fifty classes of Tiny ImageNet at 32 x 32, ten a task; CifarNet",
        _split_cifar_t,
        partial(cifarnet, dropout=0.25),
        ("task",),
        Training(
            epochs=10,
            batch_size=64,
            memory_batch_size=64,
            lr=2e-3,
            schedule="one-cycle",
            augment="crop-flip",
            autocast=True,
        ),
        200,
        needs_data=True,
    )

    # By time alone, no accuracy was measured: about ten minutes on one core for nine tasks with
    # their memory. On a busy core the published network trains 230 images a second, this one 630.
    # The rate is Adam's own.
    yield Benchmark(
        "split-tiny-imagenet",
        "Tiny ImageNet, 64 x 64, ten tasks of twenty classes; a small VGG with a stride",
        _split_tiny_imagenet,
        strided_vgg,
        ("task", "class"),
        Training(
            epochs=6,
            batch_size=64,
            memory_batch_size=32,
            lr=1e-3,
            schedule="one-cycle",
            augment="crop-flip",
            autocast=True,
        ),
        100,
        needs_data=True,
    )

    # Daxberger et al. 2023 (docs/imagenet.md has what differs, and why): SGD at 0.5 with momentum,
    # a triangle over 16 epochs, 1024 images a step; weight decay 5e-5 on the mean loss of 120,000
    # images is a precision of 6 nats. With 100 outputs a task, labels are drawn from the model for
    # the curvature where all examples are read, and it is diagonal.
    imagenet = Training(
        epochs=16,
        batch_size=1024,
        memory_batch_size=256,
        lr=0.5,
        optimizer="sgd",
        momentum=0.9,
        schedule="triangular",
        augment="photo",
        autocast=True,
    )
    decay, sampled = {"precision": 6.0}, {"precision": 6.0, "estimator": "mc"}
    yield Benchmark(
        "imagenet-1000",
        "ImageNet, ten tasks of a hundred classes; ResNet-18 (docs/imagenet.md)",
        photos,
        resnet18,
        ("task", "class"),
        imagenet,
        2000,
        MappingProxyType(
            {
                "recommended": Settings(imagenet, {**decay, "structure": "diagonal"}),
                "gradient_reconstruction": Settings(imagenet, sampled),
                "ewc": Settings(imagenet, sampled),
                "online_ewc": Settings(imagenet, decay),
                "online_laplace": Settings(imagenet, sampled),
                "fromp": Settings(imagenet, {"estimator": "mc"}),
                "kprior": Settings(imagenet, decay),
                "joint": Settings(replace(imagenet, epochs=40), decay),
                "separate": Settings(imagenet, decay),
            }
        ),
        needs_data=True,
        reader=photos_reader,
    )

    # tau 1, N = 4,000, no clip, delta 1e-4, jitter 1e-3.
    prior, _ = _fromp(1, 4_000, None, 1e-4, 1e-3)
    yield Benchmark(
        "fromp-toy",
        "five tasks of two Gaussians in the plane, along a line; MLP 2-20-20-2, sigmoid",
        lambda data_dir, scenario: fromp_toy(),
        lambda outputs: mlp(2, 20, 20, outputs, activation=nn.Sigmoid),
        ("domain",),
        Training(epochs=50, batch_size=20, lr=1e-2),
        20,
        _published(Training(epochs=50, batch_size=20, lr=1e-2), prior),
    )
    yield Benchmark(
        "two-moons",
        "two half circles in the plane, first the left half, then the right; MLP 2-20-20-2, tanh",
        lambda data_dir, scenario: two_moons(),
        lambda outputs: mlp(2, 20, 20, outputs, activation=nn.Tanh),
        ("domain",),
        Training(epochs=50, batch_size=20, lr=1e-2),
        20,
    )


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({b.name: b for b in _benchmarks()})


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Raises ValueError with a suggestion where there is none."""
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; " + suggestion(name, BENCHMARKS))
    return BENCHMARKS[name]

"""Run one piece of work in this process and print by how much it raised the peak of memory.

    python -m benchmarks.memory_peak select 60000

A child process each, because the peak of a process never falls.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import resource
import sys
from collections.abc import Callable

import torch

from lifelong import Categorical, diagonal_curvature, memorise
from lifelong.curvature import kronecker_curvature
from lifelong.jacobians import kernel, leverage

from .cases import CASES, Case, Lazy

Work = Callable[[int], Callable[[], object]]
MLP, CIFAR = CASES["MLP 784-256-256-10"], CASES["CifarNet"]


def select(n: int) -> Callable[[], object]:
    """200 of n examples that are made a batch at a time."""
    model = MLP.build()
    memorise(model, Lazy(MLP.shape, 1024), Categorical(), budget=200)  # first uses of everything
    return lambda: memorise(model, Lazy(MLP.shape, n), Categorical(), budget=200)


def curvature(n: int) -> Callable[[], object]:
    model, data = CIFAR.build().eval(), CIFAR.examples(n)
    return lambda: diagonal_curvature(model, data, Categorical())


def estimators(estimate: Callable[..., object], **options: str) -> Work:
    """Curvature of n examples that are made a batch at a time."""

    def prepare(n: int) -> Callable[[], object]:
        model = CIFAR.build().eval()
        estimate(model, Lazy(CIFAR.shape, 256, batch_size=256), Categorical(), **options)
        data = Lazy(CIFAR.shape, n, batch_size=256)
        return lambda: estimate(model, data, Categorical(), **options)

    return prepare


def kernels(n: int) -> Callable[[], object]:
    model, data, variance = _with_variance(CIFAR, n)
    return lambda: kernel(model, data.inputs, variance, likelihood=Categorical())


def leverages(n: int) -> Callable[[], object]:
    model, data, variance = _with_variance(CIFAR, n)
    return lambda: leverage(model, data.inputs, Categorical(), variance)


def forward_backward(n: int) -> Callable[[], object]:
    """For comparison: one plain gradient of the same examples in one batch."""
    model, data = CIFAR.build().eval(), CIFAR.examples(n)
    params = list(model.parameters())

    def run() -> object:
        loss = torch.nn.functional.cross_entropy(model(data.inputs), data.labels)
        return torch.autograd.grad(loss, params)

    return run


def _with_variance(case: Case, n: int):
    model = case.build().eval()
    variance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    return model, case.examples(n), variance


WORK: dict[str, Work] = {
    "select": select,
    "curvature": curvature,
    "curvature-lazy": estimators(diagonal_curvature),
    "curvature-mc": estimators(diagonal_curvature, estimator="mc"),
    "kfac-mc": estimators(kronecker_curvature, estimator="mc"),
    "kernel": kernels,
    "leverage": leverages,
    "forward-backward": forward_backward,
}


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that the peak rose above what was resident before."""
    gc.collect()
    _trim()
    before = _resident()
    _reset_peak()
    work()
    return max(0, _peak() - before)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak() -> int:
    with open("/proc/self/status") as file:
        line = next(x for x in file if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _trim() -> None:
    """Give freed memory back, so that work cannot hide in it."""
    ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(f"{peak_of(WORK[sys.argv[1]](int(sys.argv[2])))}\n")

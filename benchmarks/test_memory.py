"""Peak memory: it does not grow with the data, and no Jacobian of all weights is ever held."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .cases import CASES
from .records import Row

MEMORY = 200
MIB = 2**20


@cache
def peak(work: str, n: int, run: int = 0) -> float:
    """MiB that ``work`` on n examples adds to the process, at its peak."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_peak", work, str(n)],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return int(done.stdout) / MIB


def test_selection_does_not_grow(record: Callable[[Row], None]) -> None:
    """Ten thousand against sixty thousand examples, made a batch at a time; least of three runs."""
    few, many = (min(peak("select", n, run) for run in range(3)) for n in (10_000, 60_000))
    held = 60_000 * 784 * 4 / MIB
    details = {"MiB at 10,000": few, "MiB at 60,000": many, "MiB of 60,000 inputs": held}
    # The allocator's own noise is a few MiB; fifty thousand more inputs would be 150.
    bar = "5 growth of selection's peak, 10,000 to 60,000 examples"
    record(Row(bar, "MLP 784-256-256-10", many - few, 8, "MiB", details))


@pytest.mark.parametrize("work", ["curvature", "kernel", "leverage"])
def test_no_jacobian_is_held(record: Callable[[Row], None], work: str) -> None:
    """200 examples x 1.25 million weights in float32, of one class, would be 954 MiB."""
    weights = sum(p.numel() for p in CASES["CifarNet"].build().parameters())
    jacobian = MEMORY * weights * 4 / MIB
    found, plain = peak(work, MEMORY), peak("forward-backward", MEMORY)
    details = {"MiB": found, "MiB of B x P": jacobian, "MiB of a plain gradient": plain}
    bar = "7 peak of 200 examples on CifarNet / a B x P Jacobian"
    record(Row(bar, work, found / jacobian, 1.0, "×", details))

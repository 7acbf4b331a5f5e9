"""Ratios of cost, measured side by side: A, B, B, A, A, B, ... in one process and one thread.

A round times both sides right after each other, each side first in every other round, so that
whatever slows the machine for longer than a round slows both. The ratio is the median over rounds
of ours / reference. Time is the CPU time of this process, all its threads: what other processes
take from the wall clock is not in it (what they take from the caches is). The ratio of wall
times is recorded beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """value: median of the rounds' CPU-time ratios; low, high: their quartiles."""

    value: float
    low: float
    high: float
    wall: float
    rounds: int
    ours_ms: float
    reference_ms: float


def side_by_side(ours: Work, reference: Work, *, rounds: int = 41, inner: int = 1) -> Ratio:
    """``inner`` calls of each side a round; one round before the first is not counted."""
    cpu, wall, times = [], [], []
    for i in range(rounds + 1):
        first, second = (ours, reference) if i % 2 else (reference, ours)
        a, b = _timed(first, inner), _timed(second, inner)
        mine, theirs = (a, b) if i % 2 else (b, a)
        if i == 0:
            continue
        cpu.append(mine[0] / theirs[0])
        wall.append(mine[1] / theirs[1])
        times.append((mine[0], theirs[0]))
    low, _, high = quantiles(cpu, n=4)
    return Ratio(
        value=median(cpu),
        low=low,
        high=high,
        wall=median(wall),
        rounds=rounds,
        ours_ms=1e3 * median(t[0] for t in times) / inner,
        reference_ms=1e3 * median(t[1] for t in times) / inner,
    )


def _timed(work: Work, inner: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(inner):
        work()
    return time.process_time() - cpu, time.perf_counter() - wall

"""What a classifier says all over the plane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arrays import Array, Numbers, integers, numbers
from .style import COLOURS, INK, dress, placed, tints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def decision_regions(
    x: Array,
    y: Array,
    probability: Array,
    *,
    points: Array | None = None,
    labels: Array | None = None,
    marked: Array | None = None,
    title: str = "",
    note: str = "",
    ax: Axes | None = None,
) -> Figure:
    """The probability of class 1 of two over a grid, the boundary at 1/2, and what was learned.

    x: (W,) and y: (H,) increasing; probability: (H, W) in [0, 1], drawn from rust (class 0) over
    white to blue (class 1). points: (N, 2) with their labels (N,), dots for class 0 and squares
    for class 1; marked: (M, 2), such as the memorable ones, ringed.

    Raises ValueError, too, for a grid that does not increase, probabilities outside of [0, 1], and
    points without labels of 0 and 1.
    """
    x, y = numbers(x, "x", (None,)), numbers(y, "y", (None,))
    p = numbers(probability, "probability", (len(y), len(x)))
    if len(x) < 2 or len(y) < 2 or np.diff(x).min() <= 0 or np.diff(y).min() <= 0:
        raise ValueError("x and y must increase, with two values or more: the grid of the plane")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"probabilities must lie in [0, 1], got {p.min():.3g} to {p.max():.3g}")
    groups: list[Numbers] = []
    if points is not None:
        at = numbers(points, "points", (None, 2))
        classes = integers(labels, "labels", len(at))
        if classes.min() < 0 or classes.max() > 1:
            raise ValueError(f"labels must be 0 or 1, got {classes.min()} .. {classes.max()}")
        groups = [at[classes == c] for c in (0, 1)]
    rings = None if marked is None else numbers(marked, "marked", (None, 2))

    figure, ax = placed(ax, 3.2)
    ax.contourf(x, y, p, np.linspace(0, 1, 11), cmap=tints())
    if p.min() < 0.5 < p.max():
        ax.contour(x, y, p, [0.5], colors=INK, linewidths=1.4)
    for group, colour, marker in zip(groups, (COLOURS[1], COLOURS[0]), "os"):
        ax.plot(*group.T, linestyle="", marker=marker, markersize=1.3, color=colour, alpha=0.5,
                markeredgewidth=0)  # fmt: skip
    if rings is not None:
        ax.plot(*rings.T, linestyle="", marker="o", markersize=3.4, markerfacecolor="none",
                markeredgecolor=INK, markeredgewidth=0.8)  # fmt: skip
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    dress(ax, title, note=note)
    return figure

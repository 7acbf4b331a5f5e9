"""How a stream was learned: accuracy after each task, and on each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import dress, placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "X")


def learning_curves(
    lines: Mapping[str, Sequence[Sequence[float]]],
    *,
    title: str = "Average accuracy on the tasks seen so far",
    ax: Axes | None = None,
) -> Figure:
    """name -> (S, T) accuracies in [0, 1] of S seeds after 1, 2, ... tasks; a band is the standard
    error over seeds. NaN where nothing was measured.

    Raises ValueError for lines of several lengths.
    """
    values = {name: np.asarray(line, dtype=np.float64) for name, line in lines.items()}
    if not values or any(v.ndim != 2 or not v.size for v in values.values()):
        raise ValueError("expected for each name accuracies of shape (seeds, tasks)")
    if len({v.shape[1] for v in values.values()}) > 1:
        raise ValueError(
            f"expected as many tasks in each line, got {[v.shape[1] for v in values.values()]}"
        )
    figure, ax = placed(ax, 3.0)
    for number, (name, each) in enumerate(values.items()):
        x, mean = np.arange(1, each.shape[1] + 1), 100 * each.mean(0)
        dash, marker = _DASHES[number // 6 % 4], _MARKERS[number % 6]
        (line,) = ax.plot(x, mean, dash, marker=marker, markersize=4, linewidth=1.4, label=name)
        if len(each) > 1:
            error = 100 * each.std(0, ddof=1) / math.sqrt(len(each))
            ax.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.15)
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[attr-defined]
    dress(ax, title, "tasks learned", "accuracy on the tasks seen (%)")
    if len(values) > 1:
        ax.legend(fontsize=7, frameon=False)
    return figure


def matrix(
    accuracy: Sequence[Sequence[float | None]],
    names: Sequence[str],
    *,
    title: str = "Accuracy (%)",
    ax: Axes | None = None,
) -> Figure:
    """R[t][i], i <= t, in [0, 1]: accuracy on task i after task t; None where it was not measured.

    Raises ValueError where there are not as many rows as names.
    """
    size = len(accuracy)
    if size != len(names):
        raise ValueError(f"expected as many rows as names, got {size} and {len(names)}")
    values = np.full((size, size), np.nan)
    for t, row in enumerate(accuracy):
        for i, value in enumerate(row[: t + 1]):
            values[t, i] = math.nan if value is None else 100 * value
    figure, ax = placed(ax, 3.2)
    shown: Any = np.ma.masked_invalid(values)
    low = float(np.nanmin(values)) if np.isfinite(values).any() else 0.0
    image = ax.imshow(shown, cmap="cividis_r", vmin=min(low, 90.0), vmax=100.0)
    if size <= 12:
        for t, i in zip(*np.nonzero(np.isfinite(values)), strict=True):
            dark = values[t, i] > (min(low, 90.0) + 100) / 2
            ax.text(i, t, f"{values[t, i]:.0f}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "black")  # fmt: skip
    short = all(len(name) <= 5 for name in names)
    ticks = range(0, size, math.ceil(size / 12))
    labels = [names[t] if short else str(t + 1) for t in ticks]
    ax.set_xticks(list(ticks), labels)
    ax.set_yticks(list(ticks), labels)
    figure.colorbar(image, ax=ax, shrink=0.8, label="accuracy (%)")
    dress(ax, title, "tested on task", "after task")
    return figure

"""How much of the past must be kept?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .arrays import Array, counted, mean_and_error, numbers, short, to_numpy
from .style import COLOURS, DASHES, INK, MARKERS, PLAIN, add_legend, dress, placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def memory_curves(
    lines: Mapping[str, tuple[Array, Array]],
    *,
    reference: Array | None = None,
    reference_name: str = "batch",
    title: str = "Accuracy after adapting",
    y_name: str = "test accuracy (%)",
    legend: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Accuracy against the part of the past that is in memory, a line for each method.

    lines: by name, at most 6, the fractions (F,) in (0, 1], in any order, and the accuracies
    (S, F) in [0, 1] of S seeds there; reference: (S,) those of what keeps everything, a level.
    Drawn are means, with bands of a standard error where there are two seeds or more.

    Raises ValueError, too, for no line or more than 6, and for numbers outside of these ranges.
    """
    if not 1 <= len(lines) <= len(COLOURS):
        raise ValueError(f"expected 1 to {len(COLOURS)} lines, got {len(lines)}")
    curves, level, spread = [], None, np.zeros(1)
    for name, (fractions, accuracy) in lines.items():
        x = numbers(fractions, f"the fractions of {name}", (None,))
        y = numbers(accuracy, f"the accuracies of {name}", (None, len(x)))
        if x.min() <= 0 or x.max() > 1 or y.min() < 0 or y.max() > 1:
            raise ValueError(
                f"fractions must lie in (0, 1] and accuracies in [0, 1], got {short(x.min())} to "
                f"{short(x.max())} and {short(y.min())} to {short(y.max())} for {name}"
            )
        order = np.argsort(x, kind="stable")
        curves.append((100 * x[order], *mean_and_error(100 * y[:, order])))
    if reference is not None:
        level, spread = mean_and_error(100 * numbers(reference, "reference", (None,))[:, None])
    figure, ax = placed(ax, 2.9)
    ax.set_xscale("log")
    handles = []
    if level is not None:
        middle, half = float(level[0]), float(spread[0])
        ax.axhspan(middle - half, middle + half, color=PLAIN, alpha=0.25, linewidth=0)
        handles.append(ax.axhline(middle, color=INK, linewidth=1.1, linestyle=DASHES[2]))
    for i, (x, mean, error) in enumerate(curves):
        ax.fill_between(x, mean - error, mean + error, color=COLOURS[i], alpha=0.2, linewidth=0)
        (line,) = ax.plot(x, mean, color=COLOURS[i], linestyle=DASHES[i], linewidth=1.5,
                          marker=MARKERS[i], markersize=3.6)  # fmt: skip
        handles.append(line)
    ticks = np.unique(np.concatenate([x for x, _, _ in curves]))
    apart = [ticks[0]]  # on a log axis those closer than a quarter would overlap
    for tick in ticks[1:]:
        if tick >= 1.3 * apart[-1]:
            apart.append(tick)
    ax.set_xticks(apart, [f"{tick:.3g}" for tick in apart])
    ax.minorticks_off()
    seeds = max(np.shape(to_numpy(accuracy))[0] for _, accuracy in lines.values())
    note = counted(seeds, "seed") + ("; bands: ± 1 standard error" if seeds > 1 else "")
    dress(ax, title, "past data in memory (%)", y_name, note)
    if legend:
        names = ([] if level is None else [reference_name]) + list(lines)
        add_legend(ax, handles, names)
    return figure

r"""Pictures of what a memory holds: arrays in, a matplotlib ``Figure`` out, as in ``plots``.

fidelity_against_memory    how many examples are enough, before the data are thrown away
predicted_against_lost     did a number measured beforehand say what the next task would cost?

Both raise ValueError where shapes do not fit, NonFiniteError where a number is NaN or infinite,
before anything is drawn; ImportError where matplotlib is missing (the extra ``plots``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .plots.arrays import Array, numbers
from .plots.style import COLOURS, DASHES, MARKERS, RULE, add_legend, dress, placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = -1.0  # worse than nothing is worse than nothing, however much


def fidelity_against_memory(
    sizes: Array,
    curves: Mapping[str, Array],
    *,
    target: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Fidelity (1 exact, 0 nothing) against examples kept; a line for each named curve.

    sizes: (M,) ascending; curves: name -> (M,), drawn no lower than -1. target: a line across.
    The sizes are on a log scale; 0 is left out. Raises ValueError, too, where there is no curve, or
    no size above 0.
    """
    sizes = numbers(sizes, "sizes", (None,))
    if not curves or sizes.max() <= 0:
        raise ValueError("expected at least one curve, and one size above 0")
    lines = {name: numbers(v, name, sizes.shape) for name, v in curves.items()}
    figure, ax = placed(ax, 3.0)
    ax.set_xscale("log")
    ax.axhline(0, color=RULE, linewidth=0.9)
    if target is not None:
        ax.axhline(target, color=RULE, linewidth=0.9, linestyle=DASHES[1])
    some, handles = sizes > 0, []
    for k, values in enumerate(lines.values()):
        (line,) = ax.plot(
            sizes[some],
            np.maximum(values[some], _FLOOR),
            color=COLOURS[k % len(COLOURS)],
            linestyle=DASHES[k % len(DASHES)],
            marker=MARKERS[k % len(MARKERS)],
            markersize=3.5,
            linewidth=1.4,
        )
        handles.append(line)
    add_legend(ax, handles, list(lines))
    dress(ax, "What a memory gives back", "examples kept", "fidelity")
    return figure


def predicted_against_lost(
    predicted: Array,
    lost: Array,
    *,
    groups: Sequence[str] | None = None,
    predicted_name: str = "missed beforehand (nats per example)",
    log: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Accuracy lost afterwards, in points, against what was predicted; Spearman's rank correlation.

    predicted, lost: (N,), lost a fraction of 1. groups: (N,) names, told apart by colour and mark.
    log: a symmetric log scale of what was predicted. Raises ValueError, too, for fewer than three
    points.
    """
    predicted = numbers(predicted, "predicted", (None,))
    lost = numbers(lost, "lost", predicted.shape)
    if len(predicted) < 3:
        raise ValueError(f"ranks of fewer than three points say nothing, got {len(predicted)}")
    names = ["cells"] * len(predicted) if groups is None else list(groups)
    if len(names) != len(predicted):
        raise ValueError(f"expected {len(predicted)} groups, one for each point, got {len(names)}")
    figure, ax = placed(ax, 3.4)
    handles = []
    for k, name in enumerate(dict.fromkeys(names)):
        here = np.array([n == name for n in names])
        handles.append(
            ax.scatter(
                predicted[here],
                100 * lost[here],
                s=14,
                color=COLOURS[k % len(COLOURS)],
                marker=MARKERS[k % len(MARKERS)],
                alpha=0.7,
                linewidths=0,
            )
        )
    if log:
        ax.set_xscale("symlog", linthresh=1e-2)
    if groups is not None:
        add_legend(ax, handles, list(dict.fromkeys(names)))
    dress(
        ax,
        f"Rank correlation {spearman(predicted, lost):.2f}",
        predicted_name,
        "accuracy lost (points)",
        f"{len(lost)} cells: a memory, a method and a task each",
    )
    return figure


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's correlation of the ranks, ties at their mean; NaN where all are alike."""
    ranks = []
    for x in (a, b):
        _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[where])
    if np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])

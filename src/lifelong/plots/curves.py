"""How much of the past must be kept?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Array, Numbers, counted, mean_and_error, numbers, short, to_numpy
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
    _ticks(ax, np.concatenate([x for x, _, _ in curves]))
    seeds = max(np.shape(to_numpy(accuracy))[0] for _, accuracy in lines.values())
    note = counted(seeds, "seed") + ("; bands: ± 1 standard error" if seeds > 1 else "")
    dress(ax, title, "past data in memory (%)", y_name, note)
    if legend:
        names = ([] if level is None else [reference_name]) + list(lines)
        add_legend(ax, handles, names)
    return figure


def _ticks(ax: Axes, values: Numbers) -> None:
    """On a log axis, at the values; those closer than a quarter would overlap."""
    ticks = np.unique(values)
    apart = [ticks[0]]
    for tick in ticks[1:]:
        if tick >= 1.3 * apart[-1]:
            apart.append(tick)
    ax.set_xticks(apart, [f"{tick:.4g}" for tick in apart])
    ax.minorticks_off()


_LEVELS: Mapping[str, int] = {"joint": 1, "separate": 2, "ewc": 3}  # as published: -- : -.


def accuracy_against_memory(
    record: Mapping[str, Any],
    *,
    methods: Sequence[str] | None = None,
    levels: Sequence[str] = tuple(_LEVELS),
    names: Mapping[str, str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A table's accuracies over the examples kept of each task, beside what needs no memory.

    record: the ``result.json`` of ``lifelong bench``, with its "rows". methods: at most 6 of its
    rows, by default those at two memories or more; levels: of its rows, drawn across, at most 6,
    those that the record lacks left out; names: how rows are called in the legend. Means over
    seeds, with bands of a standard error where there are two seeds or more.

    Raises ValueError, too, for a method that the record lacks and for no method or more than 6.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    seeds = 0
    for row in record["rows"]:
        if "accuracy" in row:  # else no cell of it is done
            of, memory = row["accuracy"], row["memory"]
            seeds = max(seeds, len(of["per_seed"]))
            point = (memory, 100 * of["mean"], 100 * (of["standard_error"] or 0.0))
            found.setdefault(row["method"], []).append(point)
    if methods is None:
        methods = [n for n, at in found.items() if len(at) > 1 and n not in levels]
    if not 1 <= len(methods) <= len(COLOURS) or len(levels) > len(COLOURS):
        raise ValueError(
            f"expected 1 to {len(COLOURS)} methods and no more levels, got {list(methods)} and "
            f"{list(levels)}; the record has {list(found)}"
        )
    lacking = [n for n in methods if n not in found or min(found[n])[0] <= 0]
    if lacking:
        raise ValueError(
            f"the record has no accuracy with a memory for {lacking}; it has {list(found)}"
        )
    figure, ax = placed(ax, 3.6)
    ax.set_xscale("log")
    names, handles, said = names or {}, [], []
    for i, name in enumerate(methods):
        x, mean, error = numbers(sorted(found[name]), name, (None, 3)).T
        ax.fill_between(x, mean - error, mean + error, color=COLOURS[i], alpha=0.2, linewidth=0)
        handles += ax.plot(x, mean, color=COLOURS[i], linestyle=DASHES[i], linewidth=1.5,
                           marker=MARKERS[i], markersize=3.8)  # fmt: skip
        said.append(names.get(name, name))
    for k, name in enumerate(n for n in levels if n in found):
        _, mean, error = found[name][0]
        ax.axhspan(mean - error, mean + error, color=PLAIN, alpha=0.2, linewidth=0)
        dash = DASHES[_LEVELS.get(name, k % len(DASHES))]
        handles.append(ax.axhline(mean, color=INK, linewidth=1.1, linestyle=dash))
        said.append(f"{names.get(name, name)} {mean:.1f}")
    _ticks(ax, np.array([at[0] for name in methods for at in found[name]]))
    add_legend(ax, handles, said, columns=3)
    note = counted(seeds, "seed") + ("; bands: ± 1 standard error" if seeds > 1 else "")
    dress(
        ax,
        record.get("title", "") if title is None else title,
        "examples kept of each task",
        "test accuracy (%)",
        note,
    )
    return figure

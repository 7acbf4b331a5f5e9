"""Which examples matter, since when, and whether retraining without them agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Array, Numbers, brief, capital, classes_of, counted, numbers, padded, steps_of
from .style import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    PLAIN,
    SOFT,
    TICK_SIZE,
    add_legend,
    dress,
    placed,
    sequential,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sensitivity_histogram(
    scores: Array,
    *,
    score_name: str = "sensitivity",
    bins: int = 40,
    log_counts: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """How many of N examples have which score; a dashed line at the median.

    scores: (N,). Counts are on a log scale by default, since the few examples far out are the
    interesting ones. Of at least 100 scores, none of them negative, the note says what share of
    the sum the upper hundredth holds.
    """
    scores = numbers(scores, "scores", (None,))
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    low, high = scores.min(), scores.max()
    size = max(abs(low), abs(high))
    if high - low < max(1e-14 * bins * size, 1e-300):  # all the same, but for rounding
        pad = max(0.5, 0.01 * size)
        low, high = low - pad, high + pad
    counts, edges = np.histogram(scores, bins, (low, high))
    figure, ax = placed(ax, 2.7)
    floor = 0.7 if log_counts else 0.0
    ax.stairs(counts, edges, baseline=floor, fill=True, color=COLOURS[0], alpha=0.85)
    middle = float(np.median(scores))
    ax.axvline(middle, color=INK, linewidth=1.0, linestyle=DASHES[1])
    if log_counts:
        ax.set_yscale("log")
        ax.set_ylim(floor, max(10.0, 1.5 * counts.max()))
    note = f"median {middle:.2g} (dashed)"
    if len(scores) >= 100 and scores.min() >= 0 and scores.sum() > 0:
        top = np.sort(scores)[-round(len(scores) / 100) :]
        note += f"; the top 1 % hold {100 * top.sum() / scores.sum():.0f} % of the sum"
    title = f"{capital(score_name)} of {counted(len(scores), 'example')}"
    dress(ax, title, score_name, "examples", note)
    return figure


def sensitivity_evolution(
    trace: Array,
    *,
    steps: Array | None = None,
    labels: Array | None = None,
    class_names: Sequence[str] | None = None,
    score_name: str = "sensitivity",
    step_name: str = "epoch",
    log: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Scores during training: quantile bands of all examples, or with labels each class's mean.

    trace: (T, N) scores of N examples at T steps; steps: (T,) increasing, 1 .. T by default.
    Bands hold the middle 50 % and 90 % of the examples, the line is the median. Of more than six
    classes the three highest and the three lowest at the end are named, the others are grey.

    Raises ValueError, too, for a single step (use ``sensitivity_histogram``), and where log=True
    meets a quantile or mean that is not positive.
    """
    trace = numbers(trace, "trace", (None, None))
    x = steps_of(steps, len(trace))
    if len(x) < 2:
        raise ValueError("expected at least two steps, got one; use sensitivity_histogram for it")
    if labels is None:
        levels = np.quantile(trace, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
        lines, named = levels, []
    else:
        classes, names = classes_of(labels, trace.shape[1], class_names)
        present = np.unique(classes)
        lines = np.stack([trace[:, classes == c].mean(1) for c in present])
        order = np.argsort(-lines[:, -1], kind="stable")
        lines, named = lines[order], [names[c] for c in present[order]]
    if log and lines.min() <= 0:
        raise ValueError(
            f"a log scale needs positive values, got {lines.min():.3g}; leave log=False"
        )
    figure, ax = placed(ax, 2.9)
    if log:
        ax.set_yscale("log")
    if labels is None:
        outer = ax.fill_between(x, lines[0], lines[4], color=COLOURS[0], alpha=0.18, linewidth=0)
        inner = ax.fill_between(x, lines[1], lines[3], color=COLOURS[0], alpha=0.38, linewidth=0)
        (median,) = ax.plot(x, lines[2], color=COLOURS[0], linewidth=1.8)
        add_legend(ax, [median, inner, outer], ["median", "middle 50 %", "middle 90 %"])
        note = f"of {trace.shape[1]:,} examples, quantiles at each {step_name}"
    else:
        _class_lines(ax, x, lines, named)
        note = f"mean over each of {len(named)} classes, the highest at the end first"
    title = f"{capital(score_name)} during training" + (", by class" if named else "")
    dress(ax, title, step_name, score_name, note)
    return figure


def ranked_sensitivity(
    trace: Array,
    *,
    steps: Array | None = None,
    num_groups: int = 60,
    num_curves: int = 5,
    score_name: str = "sensitivity",
    step_name: str = "epoch",
    ax: Axes | None = None,
) -> Figure:
    """Who is sensitive in the end, and was it so before? Group means, by the rank of the last step.

    trace: (T, N). The examples are sorted by their scores at the last step, cut into
    ``num_groups`` groups of equal size (at most N), and each curve shows the means of the same
    groups at one step: the first, the last and ``num_curves`` - 2 between, darker for later.
    """
    trace = numbers(trace, "trace", (None, None))
    x = steps_of(steps, len(trace))
    if num_groups < 1 or num_curves < 1:
        raise ValueError(
            f"expected at least one group and one curve, got num_groups={num_groups}, "
            f"num_curves={num_curves}"
        )
    groups = np.array_split(np.argsort(-trace[-1], kind="stable"), min(num_groups, trace.shape[1]))
    last = len(trace) - 1
    spread = np.linspace(0, last, min(num_curves, len(trace))) if num_curves > 1 else [last]
    figure, ax = placed(ax, 2.9)
    ramp, rank = sequential(), np.arange(1, len(groups) + 1)
    handles, shown = [], np.unique(np.round(spread).astype(int))
    for place, t in enumerate(shown):
        late = (place + 1) / len(shown)
        (line,) = ax.plot(
            rank,
            [trace[t, group].mean() for group in groups],
            color=ramp(0.3 + 0.7 * late),
            linewidth=0.9 + 1.1 * late,
            linestyle=DASHES[0] if t == last else DASHES[1 + place % 3],
            marker="o" if len(groups) == 1 else "",
        )
        handles.append(line)
    add_legend(ax, handles, [f"{x[t]:g}" for t in shown], title=step_name)
    size = counted(len(groups[0]), "example")
    dress(
        ax,
        f"{capital(score_name)} during training, by final rank",
        f"groups of {size}, ranked at the last {step_name}",
        f"mean {score_name}",
    )
    return figure


def sensitivity_scatter(
    true: Array,
    estimated: Array,
    *,
    names: Sequence[str] | None = None,
    quantity: str = "deviation",
    unit: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Estimated against true deviations, the line of equality, and Pearson's r.

    true: (N,) what retraining without each example (or group) changed; estimated: (N,) what was
    predicted without retraining. names: N labels, written at the twelve largest true deviations.
    r is not defined for fewer than two points or for constant values, and the note says so.
    """
    true = numbers(true, "true", (None,))
    estimated = numbers(estimated, "estimated", true.shape)
    if names is not None and len(names) != len(true):
        raise ValueError(f"expected {len(true)} names, one for each point, got {len(names)}")
    r = pearson(true, estimated)
    figure, ax = placed(ax, 3.9)
    both = np.concatenate([true, estimated])
    low, high = padded(both.min(), both.max())
    ax.plot([low, high], [low, high], color=SOFT, linewidth=0.9, linestyle=DASHES[1], zorder=1)
    ax.scatter(true, estimated, s=15, color=COLOURS[0], alpha=0.6, linewidths=0, zorder=2)
    said = [] if names is None else list(names)
    for i in np.argsort(-np.abs(true), kind="stable")[:12].tolist() if said else ():
        # Away from the line of equality, unless that leads out of the axes.
        above, place = estimated[i] > true[i], (true[i] - low) / (high - low)
        left = place > 0.25 if above else place > 0.75
        ax.annotate(
            brief(said[i]),
            (true[i], estimated[i]),
            xytext=(-3 if left else 3, 3 if above else -9),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=TICK_SIZE,
            color=INK,
            parse_math=False,
        )
    ax.set(xlim=(low, high), ylim=(low, high))
    ax.set_aspect("equal", adjustable="box")
    found = "not defined" if math.isnan(r) else f"{r:.3f}"
    note = f"Pearson r {found}, N = {len(true):,}; dashed: equal"
    tail = f" ({unit})" if unit else ""
    dress(
        ax,
        "Left out: estimated against retrained",
        f"true {quantity}{tail}",
        f"estimated {quantity}{tail}",
        note,
    )
    return figure


def pearson(a: Array, b: Array) -> float:
    """Pearson's correlation of (N,) and (N,), NaN for N < 2 or where one of them is constant."""
    a = numbers(a, "a", (None,))
    b = numbers(b, "b", a.shape)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _class_lines(ax: Axes, x: Numbers, lines: Numbers, names: Sequence[str]) -> None:
    """lines (C, T) from the highest at the end to the lowest; the middle ones of many are grey."""
    num = len(names)
    spoken = range(num) if num <= 6 else [0, 1, 2, num - 3, num - 2, num - 1]
    handles: dict[int, Any] = {}
    every = max(len(x) // 8, 1)
    for i in range(num):
        if i not in spoken:
            (line,) = ax.plot(x, lines[i], color=PLAIN, alpha=0.45, linewidth=0.7, zorder=1)
            handles.setdefault(3, line)
            continue
        style = list(spoken).index(i)
        (handles[i if i < 3 or num <= 6 else i + 1],) = ax.plot(
            x,
            lines[i],
            color=COLOURS[style],
            linestyle=DASHES[style],
            linewidth=1.5,
            marker=MARKERS[style],
            markersize=3.6,
            markevery=every,
        )
    said = [brief(names[i]) for i in spoken]
    if num > 6:
        said.insert(3, f"{num - 6} others")
    add_legend(ax, [handles[i] for i in sorted(handles)], said)
    legend = ax.get_legend()
    if legend is not None:
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((1.0, 1.0))

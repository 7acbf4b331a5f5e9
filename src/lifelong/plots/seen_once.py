"""A stream of classes: how much is still known, above what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, counted, mean_and_error, numbers, short, to_numpy
from .style import COLOURS, DASHES, INK, LABEL_SIZE, PLAIN, RULE, SOFT, TICK_SIZE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE = 10.0  # inches: a column for each of a dozen tasks
_LEFT, _RIGHT, _TOP, _CURVES = 0.55, 1.45, 0.62, 2.5  # inches
_GAP = 0.05  # inches between photos
_NAME = 0.17  # inches above the photos of a class
_APART = 0.19  # inches between names of lines
# The yardstick, the line that the picture is about, and others: colour, dash, width.
_STYLES = (
    (INK, DASHES[2], 1.6),
    (COLOURS[0], DASHES[0], 2.6),
    (COLOURS[1], DASHES[1], 1.6),
    (PLAIN, DASHES[3], 1.6),
    (COLOURS[2], DASHES[5], 1.6),
    (COLOURS[3], DASHES[2], 1.6),
)


def seen_once(
    lines: Mapping[str, Array],
    photos: Sequence[Sequence[Array]],
    names: Sequence[Sequence[str]],
    *,
    title: str = "Classes that keep coming, each example seen once",
    note: str = "",
) -> Figure:
    """Accuracy on all classes so far, a line for each method; below, a column for each task, the
    examples that are kept of it.

    lines: by name, at most 6, the accuracies (S, T) in [0, 1] of S seeds after each of T tasks:
    means, with bands of a standard error where there are two seeds or more; the first line is the
    yardstick, dotted, the second is drawn thick. photos: of each task, of each of its classes,
    uint8 images (K, H, W, 3), all of one shape; names: those of the classes. Ten inches wide.

    Raises ValueError, too, for no line or more than 6, for numbers outside of [0, 1], and where
    tasks, classes and photos do not fit.
    """
    if not 1 <= len(lines) <= len(_STYLES):
        raise ValueError(f"expected 1 to {len(_STYLES)} lines, got {len(lines)}")
    count = len(names)
    curves = {}
    for name, accuracy in lines.items():
        y = numbers(accuracy, f"the accuracies of {name}", (None, count))
        if y.min() < 0 or y.max() > 1:
            raise ValueError(
                f"accuracies must lie in [0, 1], got {short(y.min())} to {short(y.max())} for "
                f"{name}"
            )
        curves[name] = mean_and_error(100 * y)
    columns = [[to_numpy(kept) for kept in task] for task in photos]
    shape = _shape_of(columns, names)
    column = (_WIDE - _LEFT - _RIGHT) / count
    width = column - _GAP
    height = width * shape[1] / shape[2]
    of_class = _NAME + shape[0] * (height + _GAP)
    strip = max(map(len, columns)) * of_class
    total = _TOP + _CURVES + 0.42 + strip + 0.08
    figure = new_figure(total)
    figure.set_layout_engine("none")
    figure.set_size_inches(_WIDE, total)
    figure.text(_LEFT / _WIDE, 1 - 0.2 / total, title, fontsize=13, fontweight="bold", color=INK,
                va="center", parse_math=False)  # fmt: skip
    seeds = max(len(to_numpy(y)) for y in lines.values())
    said = counted(seeds, "seed") + (", bands ± 1 standard error" if seeds > 1 else "")
    subtitle = f"accuracy on all classes so far, %; {said}" + (f"; {note}" if note else "")
    figure.text(_LEFT / _WIDE, 1 - 0.43 / total, subtitle, fontsize=LABEL_SIZE, color=SOFT,
                va="center", parse_math=False)  # fmt: skip
    across = (_WIDE - _LEFT - _RIGHT) / _WIDE
    ax = figure.add_axes(
        (_LEFT / _WIDE, 1 - (_TOP + _CURVES) / total, across, _CURVES / total), facecolor="none"
    )
    _draw_lines(ax, curves, count)
    under = figure.add_axes((_LEFT / _WIDE, 0.08 / total, across, strip / total))
    under.set(xlim=(0, count * column), ylim=(strip, 0))
    under.set_axis_off()
    for t, task in enumerate(columns):
        for c, kept in enumerate(task):
            _draw_class(under, kept, names[t][c], t * column, c * of_class, width, height)
    figure.text(1 - (_RIGHT - 0.1) / _WIDE, (strip + 0.08 - _NAME) / total,
                f"kept: {counted(shape[0], 'photo')}\nof each class", fontsize=LABEL_SIZE,
                color=INK, va="top", linespacing=1.4)  # fmt: skip
    return figure


def _shape_of(
    columns: Sequence[Sequence[NDArray[Any]]], names: Sequence[Sequence[str]]
) -> tuple[int, ...]:
    """(K, H, W, 3) of every class's photos. Raises ValueError where they differ, or do not fit
    the names."""
    if [len(task) for task in columns] != [len(task) for task in names] or not columns:
        raise ValueError(
            f"expected photos of {[len(task) for task in names]} classes in the tasks, as there "
            f"are names, got {[len(task) for task in columns]}"
        )
    shapes = {kept.shape for task in columns for kept in task}
    kinds = {kept.dtype for task in columns for kept in task}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or shape[3] != 3 or kinds != {np.dtype(np.uint8)}:
        raise ValueError(
            "expected uint8 photos (K, H, W, 3) of one shape for every class, got "
            f"{sorted(map(str, shapes))} of {sorted(map(str, kinds))}"
        )
    return shape


def _draw_lines(ax: Axes, curves: Mapping[str, Any], count: int) -> None:
    x, ends = np.arange(1, count + 1), []
    for i, (name, (mean, error)) in enumerate(curves.items()):
        colour, dash, width = _STYLES[i]
        ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, mean, color=colour, linestyle=dash, linewidth=width, zorder=3 - 0.1 * i)
        ends.append((float(mean[-1]), name, colour, i == 1))
    ax.set(xlim=(0.5, count + 0.5), ylim=(0, 101))
    ax.set_xticks(x, [str(t) for t in x])
    ax.set_yticks([0, 20, 40, 60, 80, 100])
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=LABEL_SIZE, colors=SOFT, length=0, pad=4)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=RULE, linewidth=0.9)
    ax.annotate("task", (0, 0), (-6, -7), xycoords="axes fraction", textcoords="offset points",
                ha="right", va="top", fontsize=LABEL_SIZE, color=SOFT)  # fmt: skip
    apart = 101 * _APART / _CURVES
    for y, (end, name, colour, ours) in zip(
        _spread([e[0] for e in ends], apart), ends, strict=True
    ):
        ax.annotate(f"{name}  {end:.0f}", (1, y), (7, 0), xycoords=ax.get_yaxis_transform(),
                    textcoords="offset points", va="center", fontsize=LABEL_SIZE + 0.5,
                    color=colour, fontweight="bold" if ours else "normal",
                    annotation_clip=False, parse_math=False)  # fmt: skip


def _spread(ends: Sequence[float], apart: float) -> list[float]:
    """Places near ``ends``, in their order, at least ``apart`` from each other, none above 100."""
    order = sorted(range(len(ends)), key=lambda i: -ends[i])
    places, above = [0.0] * len(ends), 100.0 + apart
    for i in order:
        above = places[i] = min(ends[i], above - apart)
    return places


def _draw_class(
    ax: Axes, kept: NDArray[Any], name: str, x: float, y: float, width: float, height: float
) -> None:
    """The name, and the photos below it; unit: an inch."""
    ax.text(x, y + _NAME - 0.04, name, fontsize=min(TICK_SIZE, 72 * 1.75 * width / len(name)),
            color=INK, va="baseline", parse_math=False)  # fmt: skip
    for k, photo in enumerate(kept):
        top = y + _NAME + k * (height + _GAP)
        ax.imshow(photo, extent=(x, x + width, top + height, top), interpolation="lanczos",
                  aspect="auto")  # fmt: skip

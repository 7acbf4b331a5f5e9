"""Figures, their axes, and the report's colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# The light scheme of the report: blue, rust, green, plum, ochre, violet, 4.5:1 on white or better.
COLOURS = ("#0067a5", "#b8450b", "#00775a", "#a03a84", "#806000", "#5a4fc4")
INK, SOFT, RULE, PLAIN = "#1b242c", "#55616c", "#dcdfe1", "#6b747c"
# Sand to navy, as in the report's heat maps: lightness falls all the way.
RAMP = ("#f7e3be", "#e3c69a", "#8fb3b0", "#3f80a6", "#123f70")
_BELOW_ZERO = ("#6b2606", "#b8450b", "#e39a6b", "#f6f3ee")  # to white, then on to navy
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), "-", (0, (6, 2)))
MARKERS = ("o", "s", "^", "D", "v", "X")

WIDTH = 4.0  # inches: 400 pixels at 100 dpi
TITLE_SIZE, LABEL_SIZE, TICK_SIZE = 9.0, 8.0, 7.5  # points


def new_figure(height: float) -> Figure:
    """One that a notebook shows, though pyplot, which tells notebooks how, was not imported."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'lifelong[plots]'") from error

    figure = Figure(figsize=(WIDTH, height), dpi=100, facecolor="white", layout="constrained")
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def placed(ax: Axes | None, height: float) -> tuple[Figure, Axes]:
    """The axes to draw in, of a new figure where none are given."""
    if ax is None:
        figure = new_figure(height)
        return figure, figure.add_subplot()
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure; they were removed from theirs")
    return figure, ax


def stacked(
    axes: Sequence[Axes] | None, height: float, ratios: tuple[int, int]
) -> tuple[Figure, Sequence[Axes]]:
    if axes is not None:
        if len(axes) != 2:
            raise ValueError(f"expected two axes, the upper and the lower, got {len(axes)}")
        return placed(axes[0], height)[0], axes
    figure = new_figure(height)
    return figure, figure.subplots(2, 1, sharex=True, height_ratios=ratios)


def dress(ax: Axes, title: str, x_name: str = "", y_name: str = "", note: str = "") -> None:
    """Title, note below it, names of the axes; only the two spines that are read."""
    ax.set_facecolor("white")
    pad = 17 if note else 6
    ax.set_title(title, loc="left", fontsize=TITLE_SIZE, color=INK, fontweight="bold", pad=pad,
                 parse_math=False)  # fmt: skip
    if note:
        ax.annotate(note, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points",
                    fontsize=LABEL_SIZE, color=SOFT, parse_math=False)  # fmt: skip
    ax.set_xlabel(x_name, fontsize=LABEL_SIZE, color=SOFT, parse_math=False)
    ax.set_ylabel(y_name, fontsize=LABEL_SIZE, color=SOFT, parse_math=False)
    ax.tick_params(labelsize=TICK_SIZE, colors=SOFT, width=0.7)
    ax.tick_params(which="minor", length=1.5, width=0.5, colors=SOFT, labelsize=TICK_SIZE)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=RULE, linewidth=0.9)
    ax.set_axisbelow(True)


def add_legend(
    ax: Axes, handles: Sequence[Any], labels: Sequence[str], title: str = "", columns: int = 0
) -> None:
    """Inside where there is most room; with ``columns``, below the axes and their names."""
    where: dict[str, Any] = {"loc": "best"}
    if columns:
        where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.0,
                 "ncols": columns}  # fmt: skip
    legend = ax.legend(
        handles,
        labels,
        title=title or None,
        fontsize=TICK_SIZE,
        title_fontsize=TICK_SIZE,
        frameon=False,
        labelcolor=INK,
        handlelength=1.8,
        columnspacing=1.2,
        **where,
    )
    legend.get_title().set_color(SOFT)
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)


def rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def sequential() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("lifelong", RAMP)


def diverging() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("lifelong_two_sided", (*_BELOW_ZERO, *RAMP[2:]))


def tints() -> Colormap:
    """From a tint of rust over white to one of blue: a ground on which points are still seen."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("lifelong_tints", ("#f2cdb6", "#ffffff", "#b5d3e6"))

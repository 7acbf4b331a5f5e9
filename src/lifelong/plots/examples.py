"""What a score calls most and least memorable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .arrays import Array, brief, classes_of, counted, extremes, numbers
from .cells import image_cells, images, room, text_cells
from .style import dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def memorable_examples(
    examples: Array,
    scores: Array,
    *,
    labels: Array | None = None,
    k: int = 5,
    per_class: bool = False,
    class_names: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    score_name: str = "score",
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The ``k`` examples of the highest scores and the ``k`` of the lowest, overall or per class.

    examples: images (N, H, W), (N, 1, H, W) or (N, 3, H, W), uint8 or floats in any scale; or N
    texts; or N rows of a table, whose columns ``feature_names`` names. scores: (N,), larger for
    more memorable; labels: (N,) integers. Ties go to the earlier example. No example is shown
    twice: of fewer than 2k, the upper half counts as most memorable.

    Images share one scale of brightness, from the lowest to the highest value among those shown.
    Scores and class names are written under images where there are at most ten in a row.

    Raises ValueError, too, for k < 1 and for per_class without labels.
    """
    scores = numbers(scores, "scores", (None,))
    n = len(scores)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(examples) != n:
        raise ValueError(f"expected one score for each of the {len(examples)} examples, got {n}")
    classes, names = classes_of(labels, n, class_names)
    if per_class and labels is None:
        raise ValueError("per_class=True needs labels: one class number for each example")
    if per_class:
        groups = [(names[c], np.flatnonzero(classes == c)) for c in np.unique(classes)]
    else:
        groups = [("", np.arange(n))]
    ranked = [(name, *extremes(scores, members, k)) for name, members in groups]
    captions = [brief(names[c], 9) for c in classes] if labels is not None else [""] * n

    cells = images(examples, np.concatenate([i for _, *rows in ranked for i in rows]))
    if cells is None:
        figure, ax = text_cells(examples, scores, ranked, feature_names, ax)
    else:
        figure, ax = image_cells(cells, scores, ranked, None if per_class else captions, k, ax)
    beside = cells is None or room(k, per_class)
    note = f"by {score_name}" + (", written beside each" if beside else "")
    if title is None:
        title = f"Most and least memorable of {counted(n, 'example')}"
    dress(ax, title, note=note)
    ax.set_axis_off()
    return figure

"""Examples to look at: images in a mosaic, texts and rows of a table in lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import Numbers, brief, numbers, short, to_numpy
from .style import INK, LABEL_SIZE, SOFT, TICK_SIZE, WIDTH, placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ranked = Sequence[tuple[str, NDArray[np.intp], NDArray[np.intp]]]


def images(examples: Any, chosen: NDArray[np.intp]) -> dict[int, NDArray[Any]] | None:
    """index -> (H, W) or (H, W, 3), uint8 or in [0, 1]; None where examples are no images."""
    if isinstance(examples, Sequence):
        return None
    if examples.ndim == 2 or (examples.ndim == 1 and to_numpy(examples).dtype.kind in "OU"):
        return None
    some = to_numpy(examples[torch.from_numpy(chosen) if isinstance(examples, Tensor) else chosen])
    if some.ndim == 4 and some.shape[1] in (1, 3):
        some = some[:, 0] if some.shape[1] == 1 else some.transpose(0, 2, 3, 1)
    elif some.ndim != 3:
        raise ValueError(
            "examples must be images (N, H, W), (N, 1, H, W) or (N, 3, H, W), channels before "
            f"rows, a table (N, D), or a list of texts; got shape {tuple(examples.shape)}"
        )
    if 0 in some.shape:
        raise ValueError(f"images must not be empty, got shape {tuple(examples.shape)}")
    if some.dtype != np.uint8:
        some = numbers(some, "the images that are shown", (None,) * some.ndim)
        low, high = some.min(), some.max()
        some = (some - low) / (high - low) if high > low else np.zeros_like(some)
    return dict(zip(chosen.tolist(), some, strict=True))


def room(k: int, per_class: bool) -> bool:
    """Whether a number is legible under each image."""
    return (2 * k if per_class else k) <= 10


def image_cells(
    cells: dict[int, NDArray[Any]],
    scores: Numbers,
    ranked: Ranked,
    captions: list[str] | None,
    k: int,
    ax: Axes | None,
) -> tuple[Figure, Axes]:
    """A mosaic in one axes, unit: the width of a cell. Per class without captions."""
    some = next(iter(cells.values()))
    per_class = captions is None
    written = room(k, per_class)
    tall = min(some.shape[0] / some.shape[1], 4.0)
    lines = 0 if not written else 2 if captions is not None and any(captions) else 1
    if per_class:
        rows = [(name, np.concatenate([most, least]), len(most)) for name, most, least in ranked]
        columns, split = 2 * k, 0.5
    else:
        _, most, least = ranked[0]
        rows = [
            (name, index, k) for name, index in (("most", most), ("least", least)) if len(index)
        ]
        columns, split = k, 0.0
    widest = max(len(brief(name)) for name, *_ in rows)
    inches = WIDTH - 0.1  # what the layout leaves
    margin = 0.12 + 0.08 * widest  # inches
    unit = (inches - margin) / (columns + split)
    line = 0.105 / unit  # of text under an image
    slot, gap = max(tall, 0.15 / unit), (0.08 if per_class else 0.12) / unit
    step = slot + lines * line + gap
    head = 0.18 / unit if per_class else 0.0
    figure, ax = placed(ax, unit * (head + step * len(rows) - gap) + 0.54)
    text = {"fontsize": 6.0, "color": SOFT, "linespacing": 1.0, "parse_math": False}
    white = 255 if some.dtype == np.uint8 else 1
    for r, (name, index, most_here) in enumerate(rows):
        y = r * step
        ax.text(-0.05 / unit, y + slot / 2, brief(name), ha="right", va="center",
                fontsize=LABEL_SIZE, color=INK, parse_math=False)  # fmt: skip
        for place, i in enumerate(index.tolist()):
            least_here = per_class and place >= most_here
            x = place + (k - most_here + split if least_here else 0.0)
            place_of = (x + 0.03, x + 0.97, y + tall, y)
            ax.imshow(cells[i], cmap="gray", vmin=0, vmax=white, extent=place_of,
                      interpolation="nearest")  # fmt: skip
            if written:
                said = short(float(scores[i]))
                said = f"{captions[i]}\n{said}" if captions and captions[i] else said
                ax.text(x + 0.5, y + tall + 0.02, said, ha="center", va="top", **text)
    if per_class:
        for x, name in ((0.03, "most"), (k + split + 0.03, "least")):
            ax.text(x, -0.03 / unit, name, va="bottom", fontsize=LABEL_SIZE, color=INK)
    ax.set(xlim=(-margin / unit, columns + split), ylim=(len(rows) * step - gap, -head))
    ax.set_aspect("equal")
    return figure, ax


def text_cells(
    examples: Any,
    scores: Numbers,
    ranked: Ranked,
    feature_names: Sequence[str] | None,
    ax: Axes | None,
) -> tuple[Figure, Axes]:
    """Lines of text, or the columns of a table, with the score before each."""
    blocks = [
        (", ".join(part for part in (name, which) if part), index)
        for name, most, least in ranked
        for which, index in (("most", most), ("least", least))
        if len(index)
    ]
    rows = {int(i): _fields(examples[int(i)]) for _, index in blocks for i in index}
    width = max(map(len, rows.values()))
    if feature_names is not None and any(len(row) != len(feature_names) for row in rows.values()):
        raise ValueError(f"expected {width} feature_names, one for each column, got "
                         f"{len(feature_names)}")  # fmt: skip
    shown = min(width, 6)
    room = 52 if shown == 1 else 54 // shown - 1
    at = [0.14 + 0.86 * c / shown for c in range(shown)]
    lines = sum(1 + len(index) for _, index in blocks) + 0.5 * (len(blocks) - 1)
    lines += feature_names is not None
    figure, ax = placed(ax, 0.16 * lines + 0.55)
    ax.set(xlim=(0, 1), ylim=(lines, 0))
    text = {"fontsize": TICK_SIZE, "va": "center", "parse_math": False}
    y = 0.5
    if feature_names is not None:
        for x, name in zip(at, feature_names):
            ax.text(x, y, brief(name, room), color=SOFT, **text)
        y += 1
    for heading, index in blocks:
        ax.text(0, y, brief(heading, 40), fontweight="bold", color=INK, **text)
        for i in index.tolist():
            y += 1
            ax.text(0.115, y, short(float(scores[i])), color=SOFT, ha="right", **text)
            fields = rows[i][:shown]
            if width > shown:
                fields = [*fields[:-1], "…"]
            for x, field in zip(at, fields):
                ax.text(x, y, brief(field, room, tail=0), color=INK, **text)
        y += 1.5
    return figure, ax


def _fields(example: Any) -> list[str]:
    example = to_numpy(example)
    if isinstance(example, str) or not hasattr(example, "__len__"):
        return [str(example)]
    return [f"{v:.3g}" if isinstance(v, float | np.floating) else str(v) for v in example]

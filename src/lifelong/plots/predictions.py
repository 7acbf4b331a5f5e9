"""Who resembles whom, how certain, how good: kernels, bands, evidence, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..metrics import NUM_BINS, calibration_bins
from .arrays import Array, brief, capital, classes_of, counted, integers, numbers, to_numpy
from .style import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    PLAIN,
    SOFT,
    TICK_SIZE,
    add_legend,
    diverging,
    dress,
    placed,
    rgb,
    sequential,
    stacked,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_TICKS = 20  # names along an axis


def kernel_matrix(
    kernel: Array,
    labels: Array | None = None,
    *,
    class_names: Sequence[str] | None = None,
    clip: float = 0.99,
    name: str = "kernel matrix",
    ax: Axes | None = None,
) -> Figure:
    """K (N, N), rows and columns sorted by class, with lines between classes and their names.

    labels: (N,) integers; within a class the order stays. The colours end at the ``clip``
    quantile of |K|, so that the diagonal does not hide the rest; what lies beyond has the last
    colour, and the bar an arrow. A matrix with negative entries gets colours on both sides of 0.

    Raises ValueError, too, where clip is not in (0, 1].
    """
    kernel = numbers(kernel, "kernel", (None, None))
    n = len(kernel)
    if kernel.shape != (n, n):
        raise ValueError(f"kernel must be square, got shape {kernel.shape}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip must lie in (0, 1], got {clip}")
    classes, names = classes_of(labels, n, class_names)
    order = np.argsort(classes, kind="stable")
    signed = bool(kernel.min() < 0)
    most = float(np.quantile(np.abs(kernel), clip)) or float(np.abs(kernel).max()) or 1.0
    present, first, count = np.unique(classes[order], return_index=True, return_counts=True)
    every = math.ceil(len(present) / _MAX_TICKS)
    written = [brief(names[c]) for c in present[::every]]
    widest = max(map(len, written))
    figure, ax = placed(ax, 3.6 + (0.03 * widest if widest > 2 else 0))
    image = ax.imshow(
        kernel[np.ix_(order, order)],
        cmap=diverging() if signed else sequential(),
        vmin=-most if signed else 0.0,
        vmax=most,
    )
    over, under = kernel.max() > most, kernel.min() < -most
    extend = "both" if over and under else "max" if over else "min" if under else "neither"
    bar = ax.get_figure(root=True).colorbar(  # type: ignore[union-attr]
        image, ax=ax, extend=extend, shrink=0.85, aspect=24, pad=0.03
    )
    bar.ax.set_ylim(max(kernel.min(), -most) if signed else 0, most)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=TICK_SIZE, colors=SOFT, length=2.5, width=0.7)
    note = counted(n, "example")
    if labels is not None:
        note += f" of {counted(len(present), 'class', 'es')}, sorted by class"
    dress(ax, capital(name), note=note)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for edge in first[1:] - 0.5:
        width = 0.8 if len(present) <= _MAX_TICKS else 0.3
        ax.axhline(edge, color="white", linewidth=width)
        ax.axvline(edge, color="white", linewidth=width)
    centres = (first + (count - 1) / 2)[::every] if labels is not None else []
    written = written if labels is not None else []
    ax.set_xticks(centres, written, rotation=90 if widest > 2 else 0, parse_math=False)
    ax.set_yticks(centres, written, parse_math=False)
    ax.tick_params(length=0)
    return figure


def predictive_bands(
    x: Array,
    mean: Array,
    epistemic_sd: Array,
    noise_sd: Array | float = 0.0,
    *,
    data: tuple[Array, Array] | None = None,
    truth: Array | None = None,
    width: float = 2.0,
    title: str = "What the model knows",
    x_name: str = "x",
    y_name: str = "y",
    ax: Axes | None = None,
) -> Figure:
    """The prediction of a 1-D regression, with bands of ``width`` standard deviations.

    x, mean, epistemic_sd: (G,) a grid, in any order, the posterior mean of the function there and
    its standard deviation; noise_sd: (G,) or one number, that of an observation. The inner band is
    mean ± width epistemic_sd, the outer one adds the noise: sqrt(epistemic² + noise²). data:
    ((N,), (N,)) observations; truth: (G,) the function that they were drawn from.

    Raises ValueError, too, for a grid of one point, a negative standard deviation, and a width that
    is not positive.
    """
    x = numbers(x, "x", (None,))
    if len(x) < 2:
        raise ValueError("expected a grid of at least two points, got one")
    mean = numbers(mean, "mean", x.shape)
    sd = numbers(epistemic_sd, "epistemic_sd", x.shape)
    noise = np.asarray(to_numpy(noise_sd), dtype=np.float64)
    noise = numbers(np.broadcast_to(noise, x.shape) if noise.ndim == 0 else noise,
                     "noise_sd", x.shape)  # fmt: skip
    if sd.min() < 0 or noise.min() < 0:
        raise ValueError("standard deviations must not be negative; take roots of variances")
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width must be positive, got {width}")
    points = None
    if data is not None:
        points = (numbers(data[0], "the data's x", (None,)),)
        points += (numbers(data[1], "the data's y", points[0].shape),)
    known = None if truth is None else numbers(truth, "truth", x.shape)

    figure, ax = placed(ax, 2.9)
    order = np.argsort(x, kind="stable")
    x, mean, sd = x[order], mean[order], sd[order]
    total = np.sqrt(sd**2 + noise[order] ** 2)
    handles, said = [], []
    if noise.max() > 0:
        band = (mean - width * total, mean + width * total)
        handles.append(ax.fill_between(x, *band, color=COLOURS[0], alpha=0.16, linewidth=0))
        said.append("with noise")
    band = (mean - width * sd, mean + width * sd)
    handles.insert(0, ax.fill_between(x, *band, color=COLOURS[0], alpha=0.36, linewidth=0))
    said.insert(0, "of the function")
    handles[:0] = ax.plot(x, mean, color=COLOURS[0], linewidth=1.8)
    said.insert(0, "mean")
    if known is not None:
        handles += ax.plot(x, known[order], color=INK, linewidth=1.0, linestyle=DASHES[1])
        said.append("truth")
    if points is not None:
        handles += ax.plot(*points, linestyle="", marker="o", markersize=2.6, color=COLOURS[1],
                           alpha=0.8, markeredgewidth=0)  # fmt: skip
        said.append("data")
    add_legend(ax, handles, said, columns=3)
    ax.margins(x=0.01)
    dress(ax, title, x_name, y_name, f"bands of ± {width:g} standard deviations")
    return figure


def evidence_against_test(
    grid: Array,
    log_evidence: Array,
    test_loss: Array,
    *,
    evidence_se: Array | None = None,
    test_se: Array | None = None,
    train_loss: Array | None = None,
    grid_name: str = "prior precision",
    loss_name: str = "test loss (nats per example)",
    log: bool = True,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Minus the log evidence above the test loss, over the same grid; a star at each minimum.

    grid, log_evidence, test_loss: (G,), evidence in nats, in any order; evidence_se, test_se: (G,)
    standard errors, drawn as bands; train_loss: (G,) beside the test loss. Lower is better in both
    panels; each minimum's line crosses both, so that one sees how far apart they are.

    Raises ValueError, too, where log=True meets a grid that is not positive, and where ``axes`` are
    not two.
    """
    grid = numbers(grid, "grid", (None,))
    shape = grid.shape
    loss_above = -numbers(log_evidence, "log_evidence", shape)
    test_loss = numbers(test_loss, "test_loss", shape)
    errors = [
        None if se is None else numbers(se, name, shape)
        for se, name in ((evidence_se, "evidence_se"), (test_se, "test_se"))
    ]
    train = None if train_loss is None else numbers(train_loss, "train_loss", shape)
    if log and grid.min() <= 0:
        raise ValueError(f"a log scale needs a positive grid, got {grid.min():.3g}; set log=False")
    order = np.argsort(grid, kind="stable")
    figure, (top, bottom) = stacked(axes, 4.3, (1, 1))
    x, curves = grid[order], (loss_above[order], test_loss[order])
    best = [int(np.argmin(curve)) for curve in curves]
    for index, (ax, curve, error) in enumerate(zip((top, bottom), curves, errors, strict=True)):
        if log:
            ax.set_xscale("log")
        colour = COLOURS[index]
        if error is not None:
            band = (curve - error[order], curve + error[order])
            ax.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)
        ax.plot(x, curve, color=colour, linewidth=1.6, marker=MARKERS[index], markersize=3)
        for other, i in enumerate(best):
            ax.axvline(x[i], color=COLOURS[other], linewidth=0.9, linestyle=DASHES[1 + other])
        i = best[index]
        ax.plot(x[i], curve[i], marker="*", markersize=13, color=colour, zorder=4,
                markeredgecolor="white", markeredgewidth=0.8)  # fmt: skip
    if train is not None:
        (line,) = bottom.plot(x, train[order], color=PLAIN, linewidth=1.2, linestyle=DASHES[3])
        add_legend(bottom, [bottom.lines[0], line], ["test", "training"])
    some = any(error is not None for error in errors)
    tail = "; bands: ± 1 standard error" if some else ""
    dress(
        top,
        f"The evidence is highest at {x[best[0]]:.3g}",
        "",
        "−log evidence (nats)",
        f"from the training data alone{tail}",
    )
    dress(bottom, f"The test loss is lowest at {x[best[1]]:.3g}", grid_name, loss_name)
    top.tick_params(labelbottom=False)
    return figure


def reliability_diagram(
    probabilities: Array,
    labels: Array,
    *,
    num_bins: int = NUM_BINS,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Accuracy against confidence in bins, above the share of examples in each bin.

    probabilities: (N, C) of the classes, or (N,) of class 1; labels: (N,) integers. The numbers are
    those of ``lifelong.metrics.calibration_bins``. Bars are accuracies; the hatched part reaches
    to the bin's mean confidence, and the expected calibration error (ECE) is the mean of these
    gaps, weighted by the shares below. Whiskers: ± 1 standard error sqrt(a (1 − a) / n).

    Raises ValueError, too, for labels that are no classes and where ``axes`` are not two.
    """
    plain = np.asarray(to_numpy(probabilities), dtype=np.float64)
    p = numbers(plain, "probabilities", (None,) if plain.ndim == 1 else (None, None))
    y = integers(labels, "labels", len(p))
    num_classes = 2 if p.ndim == 1 else p.shape[1]
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(f"labels must lie in 0 .. {num_classes - 1}, got {y.min()} .. {y.max()}")
    bins = calibration_bins(torch.from_numpy(p), torch.from_numpy(y), num_bins)
    count, accuracy, confidence = (
        t.numpy() for t in (bins.count, bins.accuracy, bins.mean_confidence)
    )
    used = count > 0
    edges = np.linspace(0, 1, num_bins + 1)
    centre, wide = (edges[:-1] + edges[1:])[used] / 2, 1 / num_bins
    a, c, n = accuracy[used], confidence[used], count[used]

    figure, (top, bottom) = stacked(axes, 4.4, (3, 1))
    top.plot([0, 1], [0, 1], color=SOFT, linewidth=0.9, linestyle=DASHES[1], zorder=3)
    tint = (*rgb(COLOURS[0]), 0.3)
    bars = top.bar(centre, a, wide, facecolor=tint, edgecolor="white", linewidth=0.8)
    top.hlines(a, centre - wide / 2, centre + wide / 2, color=COLOURS[0], linewidth=2.0, zorder=4)
    gaps = top.bar(
        centre,
        c - a,
        0.8 * wide,
        a,
        facecolor="none",
        edgecolor=COLOURS[1],
        linewidth=0.8,
        hatch="/////",
        hatch_linewidth=0.7,
    )
    top.errorbar(
        centre, a, np.sqrt(a * (1 - a) / n), fmt="none", ecolor=INK, elinewidth=0.9, zorder=5
    )
    add_legend(bottom, [bars, gaps], ["accuracy", "gap to the confidence"], columns=2)
    bottom.bar(centre, n / n.sum(), wide, color=PLAIN, edgecolor="white", linewidth=0.8)
    right, sure, total = bins.right.sum(), bins.confidence.sum(), bins.count.sum()
    note = f"ECE {bins.error():.3f}, accuracy {right / total:.3f}, confidence {sure / total:.3f}"
    dress(top, f"Reliability of {counted(len(p), 'prediction')}", "", "accuracy", note)
    dress(bottom, "", "confidence: probability of the predicted class", "share")
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    bottom.set(xlim=(0, 1), ylim=(0, None))
    top.tick_params(labelbottom=False)
    return figure

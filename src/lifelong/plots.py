"""Pictures: arrays in, a matplotlib ``Figure`` out.

    from lifelong import plots

    plots.memorable_examples(images, scores, labels=labels).savefig("memorable.png", dpi=150)

memorable_examples                      what a score calls most and least memorable (FROMP, MPE)
sensitivity_histogram, _evolution,      which examples matter, since when, and whether retraining
ranked_sensitivity, _scatter            without them agrees (Memory Perturbation Equation)
kernel_matrix                           who resembles whom, sorted by class (DNN2GP)
predictive_bands                        what a 1-D regression does not know, and what is noise
evidence_against_test                   does the training data's evidence find the best test loss?
reliability_diagram                     does a confidence of 0.8 mean right in 80 % of the cases?
memory_curves                           how much of the past must be kept to adapt to a change?

Arrays are tensors, numpy arrays or nested lists. Figures are 4 inches wide, so that at 400 pixels
the text is still legible, on white; ``savefig(..., transparent=True)`` leaves the ground out.
Colour never speaks alone: lines differ by dash and marker too, and lightness falls along each
scale. With ``ax`` (or ``axes``) they draw there, and the figure of those axes comes back. No
pyplot, no settings changed: a figure that is not kept is gone.

Each function raises ValueError where shapes do not fit, NonFiniteError where a number is NaN or
infinite, before anything is drawn; ImportError where matplotlib is missing (the extra ``plots``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import NonFiniteError
from .metrics import NUM_BINS, calibration_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Array: TypeAlias = "Tensor | NDArray[Any] | Sequence[Any]"
Numbers: TypeAlias = NDArray[np.float64]

# The light scheme of the report: blue, rust, green, plum, ochre, violet, 4.5:1 on white or better.
COLOURS = ("#0067a5", "#b8450b", "#00775a", "#a03a84", "#806000", "#5a4fc4")
INK, SOFT, RULE, PLAIN = "#1b242c", "#55616c", "#dcdfe1", "#6b747c"
# Sand to navy, as in the report's heat maps: lightness falls all the way.
RAMP = ("#f7e3be", "#e3c69a", "#8fb3b0", "#3f80a6", "#123f70")
_BELOW_ZERO = ("#6b2606", "#b8450b", "#e39a6b", "#f6f3ee")  # to white, then on to navy
_DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), "-", (0, (6, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "X")

_WIDTH = 4.0  # inches: 400 pixels at 100 dpi
_TITLE, _LABEL, _TICK = 9.0, 8.0, 7.5  # points
_MAX_NAME = 14  # characters of a class name; longer ones have "…" inside
_MAX_TICKS = 20  # names along an axis


# ---------------------------------------------------------------------------- which examples matter


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
    scores = _numbers(scores, "scores", (None,))
    n = len(scores)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(examples) != n:
        raise ValueError(f"expected one score for each of the {len(examples)} examples, got {n}")
    classes, names = _classes(labels, n, class_names)
    if per_class and labels is None:
        raise ValueError("per_class=True needs labels: one class number for each example")
    if per_class:
        groups = [(names[c], np.flatnonzero(classes == c)) for c in np.unique(classes)]
    else:
        groups = [("", np.arange(n))]
    ranked = [(name, *_extremes(scores, members, k)) for name, members in groups]
    captions = [_brief(names[c], 9) for c in classes] if labels is not None else [""] * n

    cells = _images(examples, np.concatenate([i for _, *rows in ranked for i in rows]))
    if cells is None:
        figure, ax = _text_cells(examples, scores, ranked, feature_names, ax)
    else:
        figure, ax = _image_cells(cells, scores, ranked, None if per_class else captions, k, ax)
    beside = cells is None or _room(k, per_class)
    note = f"by {score_name}" + (", written beside each" if beside else "")
    _dress(ax, f"Most and least memorable of {_count(n, 'example')}", note=note)
    ax.set_axis_off()
    return figure


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
    scores = _numbers(scores, "scores", (None,))
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    low, high = scores.min(), scores.max()
    size = max(abs(low), abs(high))
    if high - low < max(1e-14 * bins * size, 1e-300):  # all the same, but for rounding
        pad = max(0.5, 0.01 * size)
        low, high = low - pad, high + pad
    counts, edges = np.histogram(scores, bins, (low, high))
    figure, ax = _place(ax, 2.7)
    floor = 0.7 if log_counts else 0.0
    ax.stairs(counts, edges, baseline=floor, fill=True, color=COLOURS[0], alpha=0.85)
    middle = float(np.median(scores))
    ax.axvline(middle, color=INK, linewidth=1.0, linestyle=_DASHES[1])
    if log_counts:
        ax.set_yscale("log")
        ax.set_ylim(floor, max(10.0, 1.5 * counts.max()))
    note = f"median {middle:.2g} (dashed)"
    if len(scores) >= 100 and scores.min() >= 0 and scores.sum() > 0:
        top = np.sort(scores)[-round(len(scores) / 100) :]
        note += f"; the top 1 % hold {100 * top.sum() / scores.sum():.0f} % of the sum"
    title = f"{_capital(score_name)} of {_count(len(scores), 'example')}"
    _dress(ax, title, score_name, "examples", note)
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
    trace = _numbers(trace, "trace", (None, None))
    x = _steps(steps, len(trace))
    if len(x) < 2:
        raise ValueError("expected at least two steps, got one; use sensitivity_histogram for it")
    if labels is None:
        levels = np.quantile(trace, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
        lines, named = levels, []
    else:
        classes, names = _classes(labels, trace.shape[1], class_names)
        present = np.unique(classes)
        lines = np.stack([trace[:, classes == c].mean(1) for c in present])
        order = np.argsort(-lines[:, -1], kind="stable")
        lines, named = lines[order], [names[c] for c in present[order]]
    if log and lines.min() <= 0:
        raise ValueError(
            f"a log scale needs positive values, got {lines.min():.3g}; leave log=False"
        )
    figure, ax = _place(ax, 2.9)
    if log:
        ax.set_yscale("log")
    if labels is None:
        outer = ax.fill_between(x, lines[0], lines[4], color=COLOURS[0], alpha=0.18, linewidth=0)
        inner = ax.fill_between(x, lines[1], lines[3], color=COLOURS[0], alpha=0.38, linewidth=0)
        (median,) = ax.plot(x, lines[2], color=COLOURS[0], linewidth=1.8)
        _legend(ax, [median, inner, outer], ["median", "middle 50 %", "middle 90 %"])
        note = f"of {trace.shape[1]:,} examples, quantiles at each {step_name}"
    else:
        _class_lines(ax, x, lines, named)
        note = f"mean over each of {len(named)} classes, the highest at the end first"
    title = f"{_capital(score_name)} during training" + (", by class" if named else "")
    _dress(ax, title, step_name, score_name, note)
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
    trace = _numbers(trace, "trace", (None, None))
    x = _steps(steps, len(trace))
    if num_groups < 1 or num_curves < 1:
        raise ValueError(
            f"expected at least one group and one curve, got num_groups={num_groups}, "
            f"num_curves={num_curves}"
        )
    groups = np.array_split(np.argsort(-trace[-1], kind="stable"), min(num_groups, trace.shape[1]))
    last = len(trace) - 1
    spread = np.linspace(0, last, min(num_curves, len(trace))) if num_curves > 1 else [last]
    figure, ax = _place(ax, 2.9)
    ramp, rank = _ramp(), np.arange(1, len(groups) + 1)
    handles, shown = [], np.unique(np.round(spread).astype(int))
    for place, t in enumerate(shown):
        late = (place + 1) / len(shown)
        (line,) = ax.plot(
            rank,
            [trace[t, group].mean() for group in groups],
            color=ramp(0.3 + 0.7 * late),
            linewidth=0.9 + 1.1 * late,
            linestyle=_DASHES[0] if t == last else _DASHES[1 + place % 3],
            marker="o" if len(groups) == 1 else "",
        )
        handles.append(line)
    _legend(ax, handles, [f"{x[t]:g}" for t in shown], title=step_name)
    size = _count(len(groups[0]), "example")
    _dress(
        ax,
        f"{_capital(score_name)} during training, by final rank",
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
    true = _numbers(true, "true", (None,))
    estimated = _numbers(estimated, "estimated", true.shape)
    if names is not None and len(names) != len(true):
        raise ValueError(f"expected {len(true)} names, one for each point, got {len(names)}")
    r = pearson(true, estimated)
    figure, ax = _place(ax, 3.9)
    both = np.concatenate([true, estimated])
    low, high = _padded(both.min(), both.max())
    ax.plot([low, high], [low, high], color=SOFT, linewidth=0.9, linestyle=_DASHES[1], zorder=1)
    ax.scatter(true, estimated, s=15, color=COLOURS[0], alpha=0.6, linewidths=0, zorder=2)
    said = [] if names is None else list(names)
    for i in np.argsort(-np.abs(true), kind="stable")[:12].tolist() if said else ():
        # Away from the line of equality, unless that leads out of the axes.
        above, place = estimated[i] > true[i], (true[i] - low) / (high - low)
        left = place > 0.25 if above else place > 0.75
        ax.annotate(
            _brief(said[i]),
            (true[i], estimated[i]),
            xytext=(-3 if left else 3, 3 if above else -9),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=_TICK,
            color=INK,
            parse_math=False,
        )
    ax.set(xlim=(low, high), ylim=(low, high))
    ax.set_aspect("equal", adjustable="box")
    found = "not defined" if math.isnan(r) else f"{r:.3f}"
    note = f"Pearson r {found}, N = {len(true):,}; dashed: equal"
    tail = f" ({unit})" if unit else ""
    _dress(
        ax,
        "Left out: estimated against retrained",
        f"true {quantity}{tail}",
        f"estimated {quantity}{tail}",
        note,
    )
    return figure


def pearson(a: Array, b: Array) -> float:
    """Pearson's correlation of (N,) and (N,), NaN for N < 2 or where one of them is constant."""
    a = _numbers(a, "a", (None,))
    b = _numbers(b, "b", a.shape)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


# ----------------------------------------------------------------------------- kernels, predictions


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
    kernel = _numbers(kernel, "kernel", (None, None))
    n = len(kernel)
    if kernel.shape != (n, n):
        raise ValueError(f"kernel must be square, got shape {kernel.shape}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip must lie in (0, 1], got {clip}")
    classes, names = _classes(labels, n, class_names)
    order = np.argsort(classes, kind="stable")
    signed = bool(kernel.min() < 0)
    most = float(np.quantile(np.abs(kernel), clip)) or float(np.abs(kernel).max()) or 1.0
    present, first, count = np.unique(classes[order], return_index=True, return_counts=True)
    every = math.ceil(len(present) / _MAX_TICKS)
    written = [_brief(names[c]) for c in present[::every]]
    widest = max(map(len, written))
    figure, ax = _place(ax, 3.6 + (0.03 * widest if widest > 2 else 0))
    image = ax.imshow(
        kernel[np.ix_(order, order)],
        cmap=_two_sided() if signed else _ramp(),
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
    bar.ax.tick_params(labelsize=_TICK, colors=SOFT, length=2.5, width=0.7)
    note = _count(n, "example")
    if labels is not None:
        note += f" of {_count(len(present), 'class', 'es')}, sorted by class"
    _dress(ax, _capital(name), note=note)
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
    x = _numbers(x, "x", (None,))
    if len(x) < 2:
        raise ValueError("expected a grid of at least two points, got one")
    mean = _numbers(mean, "mean", x.shape)
    sd = _numbers(epistemic_sd, "epistemic_sd", x.shape)
    noise = np.asarray(_plain(noise_sd), dtype=np.float64)
    noise = _numbers(np.broadcast_to(noise, x.shape) if noise.ndim == 0 else noise,
                     "noise_sd", x.shape)  # fmt: skip
    if sd.min() < 0 or noise.min() < 0:
        raise ValueError("standard deviations must not be negative; take roots of variances")
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width must be positive, got {width}")
    points = None
    if data is not None:
        points = (_numbers(data[0], "the data's x", (None,)),)
        points += (_numbers(data[1], "the data's y", points[0].shape),)
    known = None if truth is None else _numbers(truth, "truth", x.shape)

    figure, ax = _place(ax, 2.9)
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
        handles += ax.plot(x, known[order], color=INK, linewidth=1.0, linestyle=_DASHES[1])
        said.append("truth")
    if points is not None:
        handles += ax.plot(*points, linestyle="", marker="o", markersize=2.6, color=COLOURS[1],
                           alpha=0.8, markeredgewidth=0)  # fmt: skip
        said.append("data")
    _legend(ax, handles, said, columns=3)
    ax.margins(x=0.01)
    _dress(ax, title, x_name, y_name, f"bands of ± {width:g} standard deviations")
    return figure


# ---------------------------------------------------------------------------- how good, how certain


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
    grid = _numbers(grid, "grid", (None,))
    shape = grid.shape
    loss_above = -_numbers(log_evidence, "log_evidence", shape)
    test_loss = _numbers(test_loss, "test_loss", shape)
    errors = [
        None if se is None else _numbers(se, name, shape)
        for se, name in ((evidence_se, "evidence_se"), (test_se, "test_se"))
    ]
    train = None if train_loss is None else _numbers(train_loss, "train_loss", shape)
    if log and grid.min() <= 0:
        raise ValueError(f"a log scale needs a positive grid, got {grid.min():.3g}; set log=False")
    order = np.argsort(grid, kind="stable")
    figure, (top, bottom) = _stacked(axes, 4.3, (1, 1))
    x, curves = grid[order], (loss_above[order], test_loss[order])
    best = [int(np.argmin(curve)) for curve in curves]
    for index, (ax, curve, error) in enumerate(zip((top, bottom), curves, errors, strict=True)):
        if log:
            ax.set_xscale("log")
        colour = COLOURS[index]
        if error is not None:
            band = (curve - error[order], curve + error[order])
            ax.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)
        ax.plot(x, curve, color=colour, linewidth=1.6, marker=_MARKERS[index], markersize=3)
        for other, i in enumerate(best):
            ax.axvline(x[i], color=COLOURS[other], linewidth=0.9, linestyle=_DASHES[1 + other])
        i = best[index]
        ax.plot(x[i], curve[i], marker="*", markersize=13, color=colour, zorder=4,
                markeredgecolor="white", markeredgewidth=0.8)  # fmt: skip
    if train is not None:
        (line,) = bottom.plot(x, train[order], color=PLAIN, linewidth=1.2, linestyle=_DASHES[3])
        _legend(bottom, [bottom.lines[0], line], ["test", "training"])
    some = any(error is not None for error in errors)
    tail = "; bands: ± 1 standard error" if some else ""
    _dress(
        top,
        f"The evidence is highest at {x[best[0]]:.3g}",
        "",
        "−log evidence (nats)",
        f"from the training data alone{tail}",
    )
    _dress(bottom, f"The test loss is lowest at {x[best[1]]:.3g}", grid_name, loss_name)
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
    plain = np.asarray(_plain(probabilities), dtype=np.float64)
    p = _numbers(plain, "probabilities", (None,) if plain.ndim == 1 else (None, None))
    y = _integers(labels, "labels", len(p))
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

    figure, (top, bottom) = _stacked(axes, 4.4, (3, 1))
    top.plot([0, 1], [0, 1], color=SOFT, linewidth=0.9, linestyle=_DASHES[1], zorder=3)
    tint = (*_rgb(COLOURS[0]), 0.3)
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
    _legend(bottom, [bars, gaps], ["accuracy", "gap to the confidence"], columns=2)
    bottom.bar(centre, n / n.sum(), wide, color=PLAIN, edgecolor="white", linewidth=0.8)
    right, sure, total = bins.right.sum(), bins.confidence.sum(), bins.count.sum()
    note = f"ECE {bins.error():.3f}, accuracy {right / total:.3f}, confidence {sure / total:.3f}"
    _dress(top, f"Reliability of {_count(len(p), 'prediction')}", "", "accuracy", note)
    _dress(bottom, "", "confidence: probability of the predicted class", "share")
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    bottom.set(xlim=(0, 1), ylim=(0, None))
    top.tick_params(labelbottom=False)
    return figure


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
        x = _numbers(fractions, f"the fractions of {name}", (None,))
        y = _numbers(accuracy, f"the accuracies of {name}", (None, len(x)))
        if x.min() <= 0 or x.max() > 1 or y.min() < 0 or y.max() > 1:
            raise ValueError(
                f"fractions must lie in (0, 1] and accuracies in [0, 1], got {_short(x.min())} to "
                f"{_short(x.max())} and {_short(y.min())} to {_short(y.max())} for {name}"
            )
        order = np.argsort(x, kind="stable")
        curves.append((100 * x[order], *_mean_and_error(100 * y[:, order])))
    if reference is not None:
        level, spread = _mean_and_error(100 * _numbers(reference, "reference", (None,))[:, None])
    figure, ax = _place(ax, 2.9)
    ax.set_xscale("log")
    handles = []
    if level is not None:
        middle, half = float(level[0]), float(spread[0])
        ax.axhspan(middle - half, middle + half, color=PLAIN, alpha=0.25, linewidth=0)
        handles.append(ax.axhline(middle, color=INK, linewidth=1.1, linestyle=_DASHES[2]))
    for i, (x, mean, error) in enumerate(curves):
        ax.fill_between(x, mean - error, mean + error, color=COLOURS[i], alpha=0.2, linewidth=0)
        (line,) = ax.plot(x, mean, color=COLOURS[i], linestyle=_DASHES[i], linewidth=1.5,
                          marker=_MARKERS[i], markersize=3.6)  # fmt: skip
        handles.append(line)
    ticks = np.unique(np.concatenate([x for x, _, _ in curves]))
    apart = [ticks[0]]  # on a log axis those closer than a quarter would overlap
    for tick in ticks[1:]:
        if tick >= 1.3 * apart[-1]:
            apart.append(tick)
    ax.set_xticks(apart, [f"{tick:.3g}" for tick in apart])
    ax.minorticks_off()
    seeds = max(np.shape(_plain(accuracy))[0] for _, accuracy in lines.values())
    note = _count(seeds, "seed") + ("; bands: ± 1 standard error" if seeds > 1 else "")
    _dress(ax, title, "past data in memory (%)", y_name, note)
    if legend:
        names = ([] if level is None else [reference_name]) + list(lines)
        _legend(ax, handles, names)
    return figure


def _mean_and_error(values: Numbers) -> tuple[Numbers, Numbers]:
    """Over the first dimension; the standard error of one value is not known, and drawn as 0."""
    n = len(values)
    error = values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(values.shape[1])
    return values.mean(axis=0), error


# ------------------------------------------------------------------------------ input, checked once


def _plain(values: Any) -> Any:
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _numbers(values: Any, name: str, shape: tuple[int | None, ...]) -> Numbers:
    """float64 in this shape (None: any length above 0), all finite."""
    try:
        array = np.asarray(_plain(values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    fits = array.ndim == len(shape) and all(
        size > 0 if wanted is None else size == wanted
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("≥ 1" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")
    if not np.isfinite(array).all():
        at = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise NonFiniteError(
            f"{name} must be finite, got {array[at]} at {list(at)}; leave such examples out, or "
            "look at how they were computed"
        )
    return array


def _integers(labels: Any, name: str, n: int) -> NDArray[np.int64]:
    array = np.asarray(_plain(labels))
    if array.shape != (n,) or array.dtype.kind not in "iub":
        raise ValueError(
            f"{name} must be {n} integers, one for each example, got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(np.int64)


def _classes(
    labels: Any, n: int, class_names: Sequence[str] | None
) -> tuple[NDArray[np.int64], dict[int, str]]:
    """The class of each example (0 without labels), and the name of each class."""
    if labels is None:
        return np.zeros(n, dtype=np.int64), {0: ""}
    classes = _integers(labels, "labels", n)
    if class_names is None:
        return classes, {int(c): str(c) for c in np.unique(classes)}
    if classes.min() < 0 or classes.max() >= len(class_names):
        raise ValueError(
            f"expected a name for each class, labels {classes.min()} .. {classes.max()}, got "
            f"{len(class_names)} names"
        )
    return classes, dict(enumerate(map(str, class_names)))


def _steps(steps: Any, length: int) -> Numbers:
    if steps is None:
        return np.arange(1.0, length + 1)
    x = _numbers(steps, "steps", (length,))
    if not (np.diff(x) > 0).all():
        raise ValueError("steps must increase: one for each row of the trace, in order")
    return x


def _extremes(
    scores: Numbers, members: NDArray[np.intp], k: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The members of the highest scores, falling, and of the lowest, rising; disjoint."""
    order = members[np.argsort(-scores[members], kind="stable")]
    upper = math.ceil(len(order) / 2)
    return order[: min(k, upper)], order[::-1][: min(k, len(order) - upper)]


def _brief(text: str, length: int = _MAX_NAME, tail: int = 4) -> str:
    """On one line, cut so that the last characters, where names often differ, stay."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    return text[: length - 1 - tail].rstrip() + "…" + text[len(text) - tail :]


def _short(value: float) -> str:
    """Two digits where they fit in five characters, else one."""
    two = f"{value:.2g}"
    return two if len(two) <= 5 else f"{value:.1g}"


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n:,} {noun}{plural if n != 1 else ''}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


# ------------------------------------------------------------------------------ figures and colours


def _new_figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'lifelong[plots]'") from error
    return Figure(figsize=(_WIDTH, height), dpi=100, facecolor="white", layout="constrained")


def _place(ax: Axes | None, height: float) -> tuple[Figure, Axes]:
    """The axes to draw in, of a new figure where none are given."""
    if ax is None:
        figure = _new_figure(height)
        return figure, figure.add_subplot()
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure; they were removed from theirs")
    return figure, ax


def _stacked(
    axes: Sequence[Axes] | None, height: float, ratios: tuple[int, int]
) -> tuple[Figure, Sequence[Axes]]:
    if axes is not None:
        if len(axes) != 2:
            raise ValueError(f"expected two axes, the upper and the lower, got {len(axes)}")
        return _place(axes[0], height)[0], axes
    figure = _new_figure(height)
    return figure, figure.subplots(2, 1, sharex=True, height_ratios=ratios)


def _dress(ax: Axes, title: str, x_name: str = "", y_name: str = "", note: str = "") -> None:
    """Title, note below it, names of the axes; only the two spines that are read."""
    ax.set_facecolor("white")
    pad = 17 if note else 6
    ax.set_title(title, loc="left", fontsize=_TITLE, color=INK, fontweight="bold", pad=pad,
                 parse_math=False)  # fmt: skip
    if note:
        ax.annotate(note, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points",
                    fontsize=_LABEL, color=SOFT, parse_math=False)  # fmt: skip
    ax.set_xlabel(x_name, fontsize=_LABEL, color=SOFT, parse_math=False)
    ax.set_ylabel(y_name, fontsize=_LABEL, color=SOFT, parse_math=False)
    ax.tick_params(labelsize=_TICK, colors=SOFT, width=0.7)
    ax.tick_params(which="minor", length=1.5, width=0.5, colors=SOFT, labelsize=_TICK)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=RULE, linewidth=0.9)
    ax.set_axisbelow(True)


def _legend(
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
        fontsize=_TICK,
        title_fontsize=_TICK,
        frameon=False,
        labelcolor=INK,
        handlelength=1.8,
        columnspacing=1.2,
        **where,
    )
    legend.get_title().set_color(SOFT)
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)


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
            linestyle=_DASHES[style],
            linewidth=1.5,
            marker=_MARKERS[style],
            markersize=3.6,
            markevery=every,
        )
    said = [_brief(names[i]) for i in spoken]
    if num > 6:
        said.insert(3, f"{num - 6} others")
    _legend(ax, [handles[i] for i in sorted(handles)], said)
    legend = ax.get_legend()
    if legend is not None:
        legend.set_loc("upper left")
        legend.set_bbox_to_anchor((1.0, 1.0))


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def _ramp() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("lifelong", RAMP)


def _two_sided() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("lifelong_two_sided", (*_BELOW_ZERO, *RAMP[2:]))


# --------------------------------------------------------------------------------- cells to look at

_Ranked = Sequence[tuple[str, NDArray[np.intp], NDArray[np.intp]]]


def _images(examples: Any, chosen: NDArray[np.intp]) -> dict[int, NDArray[Any]] | None:
    """index -> (H, W) or (H, W, 3), uint8 or in [0, 1]; None where examples are no images."""
    if isinstance(examples, Sequence):
        return None
    if examples.ndim == 2 or (examples.ndim == 1 and _plain(examples).dtype.kind in "OU"):
        return None
    some = _plain(examples[torch.from_numpy(chosen) if isinstance(examples, Tensor) else chosen])
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
        some = _numbers(some, "the images that are shown", (None,) * some.ndim)
        low, high = some.min(), some.max()
        some = (some - low) / (high - low) if high > low else np.zeros_like(some)
    return dict(zip(chosen.tolist(), some, strict=True))


def _room(k: int, per_class: bool) -> bool:
    """Whether a number is legible under each image."""
    return (2 * k if per_class else k) <= 10


def _image_cells(
    cells: dict[int, NDArray[Any]],
    scores: Numbers,
    ranked: _Ranked,
    captions: list[str] | None,
    k: int,
    ax: Axes | None,
) -> tuple[Figure, Axes]:
    """A mosaic in one axes, unit: the width of a cell. Per class without captions."""
    some = next(iter(cells.values()))
    per_class = captions is None
    written = _room(k, per_class)
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
    widest = max(len(_brief(name)) for name, *_ in rows)
    inches = _WIDTH - 0.1  # what the layout leaves
    margin = 0.12 + 0.08 * widest  # inches
    unit = (inches - margin) / (columns + split)
    line = 0.105 / unit  # of text under an image
    slot, gap = max(tall, 0.15 / unit), (0.08 if per_class else 0.12) / unit
    step = slot + lines * line + gap
    head = 0.18 / unit if per_class else 0.0
    figure, ax = _place(ax, unit * (head + step * len(rows) - gap) + 0.46)
    text = {"fontsize": 6.0, "color": SOFT, "linespacing": 1.0, "parse_math": False}
    white = 255 if some.dtype == np.uint8 else 1
    for r, (name, index, most_here) in enumerate(rows):
        y = r * step
        ax.text(-0.05 / unit, y + slot / 2, _brief(name), ha="right", va="center", fontsize=_LABEL,
                color=INK, parse_math=False)  # fmt: skip
        for place, i in enumerate(index.tolist()):
            least_here = per_class and place >= most_here
            x = place + (k - most_here + split if least_here else 0.0)
            place_of = (x + 0.03, x + 0.97, y + tall, y)
            ax.imshow(cells[i], cmap="gray", vmin=0, vmax=white, extent=place_of,
                      interpolation="nearest")  # fmt: skip
            if written:
                said = _short(float(scores[i]))
                said = f"{captions[i]}\n{said}" if captions and captions[i] else said
                ax.text(x + 0.5, y + tall + 0.02, said, ha="center", va="top", **text)
    if per_class:
        for x, name in ((0.03, "most"), (k + split + 0.03, "least")):
            ax.text(x, -0.03 / unit, name, va="bottom", fontsize=_LABEL, color=INK)
    ax.set(xlim=(-margin / unit, columns + split), ylim=(len(rows) * step - gap, -head))
    ax.set_aspect("equal")
    return figure, ax


def _text_cells(
    examples: Any,
    scores: Numbers,
    ranked: _Ranked,
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
    figure, ax = _place(ax, 0.16 * lines + 0.55)
    ax.set(xlim=(0, 1), ylim=(lines, 0))
    text = {"fontsize": _TICK, "va": "center", "parse_math": False}
    y = 0.5
    if feature_names is not None:
        for x, name in zip(at, feature_names):
            ax.text(x, y, _brief(name, room), color=SOFT, **text)
        y += 1
    for heading, index in blocks:
        ax.text(0, y, _brief(heading, 40), fontweight="bold", color=INK, **text)
        for i in index.tolist():
            y += 1
            ax.text(0.115, y, _short(float(scores[i])), color=SOFT, ha="right", **text)
            fields = rows[i][:shown]
            if width > shown:
                fields = [*fields[:-1], "…"]
            for x, field in zip(at, fields):
                ax.text(x, y, _brief(field, room, tail=0), color=INK, **text)
        y += 1.5
    return figure, ax


def _fields(example: Any) -> list[str]:
    example = _plain(example)
    if isinstance(example, str) or not hasattr(example, "__len__"):
        return [str(example)]
    return [f"{v:.3g}" if isinstance(v, float | np.floating) else str(v) for v in example]

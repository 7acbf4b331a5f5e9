"""Pictures: what is drawn are the numbers that came in, and bad input draws nothing."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import lifelong.plots as plots
from lifelong.errors import NonFiniteError
from lifelong.metrics import CalibrationBins, calibration_bins, calibration_error
from lifelong.report import pictures

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.random((12, 5, 4))
SCORES = np.arange(12.0)[::-1]
LABELS = np.arange(12) % 3
K = (lambda A: A @ A.T)(RNG.normal(size=(12, 3)))
GRID = np.linspace(-1, 1, 9)
P = RNG.dirichlet(np.ones(3), 40)
Y = RNG.integers(0, 3, 40)
CURVES = {
    "K-prior": ([1.0, 0.02, 0.1], [[0.9, 0.8, 0.85], [0.92, 0.7, 0.85]]),
    "replay": (np.array([0.02, 0.1]), torch.tensor([[0.3, 0.6]])),
}


def of_seeds(*values: float) -> dict[str, Any]:
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error, "per_seed": list(values)}


RECORD = {
    "title": "A table",
    "rows": [
        {"method": "joint", "memory": 0, "accuracy": of_seeds(0.97, 0.99)},
        {"method": "ewc", "memory": 0, "accuracy": of_seeds(0.2)},
        {"method": "separate", "memory": 0},  # failed
        {"method": "replay", "memory": 100, "accuracy": of_seeds(0.8, 0.9)},
        {"method": "replay", "memory": 10, "accuracy": of_seeds(0.5, 0.7)},
        {"method": "ours", "memory": 10, "accuracy": of_seeds(0.9)},
    ],
}
PLANE = 1 / (1 + np.exp(-3 * GRID - GRID[:5, None]))

FUNCTIONS: dict[str, Callable[..., Figure]] = {
    "memorable images": lambda ax=None: plots.memorable_examples(IMAGES, SCORES, ax=ax),
    "memorable texts": lambda ax=None: plots.memorable_examples(["a"] * 12, SCORES, ax=ax),
    "histogram": lambda ax=None: plots.sensitivity_histogram(SCORES, ax=ax),
    "evolution": lambda ax=None: plots.sensitivity_evolution(IMAGES[:, 0].T, ax=ax),
    "by class": lambda ax=None: plots.sensitivity_evolution(IMAGES[:, 0].T, labels=LABELS, ax=ax),
    "ranked": lambda ax=None: plots.ranked_sensitivity(IMAGES[:, 0].T, ax=ax),
    "scatter": lambda ax=None: plots.sensitivity_scatter(SCORES, SCORES**2, ax=ax),
    "kernel": lambda ax=None: plots.kernel_matrix(K, LABELS, ax=ax),
    "bands": lambda ax=None: plots.predictive_bands(GRID, GRID, GRID**2, 0.1, ax=ax),
    "evidence": lambda ax=None: plots.evidence_against_test(
        GRID + 2, GRID, GRID, axes=None if ax is None else [ax, ax.twinx()]
    ),
    "memory": lambda ax=None: plots.memory_curves(CURVES, reference=[0.9, 0.94], ax=ax),
    "record": lambda ax=None: plots.accuracy_against_memory(RECORD, ax=ax),
    "regions": lambda ax=None: plots.decision_regions(
        GRID,
        GRID[:5],
        PLANE,
        points=K[:, :2],
        labels=LABELS % 2,
        marked=K[:3, :2],
        title="t",
        ax=ax,
    ),
    "reliability": lambda ax=None: plots.reliability_diagram(
        P, Y, axes=None if ax is None else [ax, ax.twinx()]
    ),
}


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def render(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", FUNCTIONS)
class TestEach:
    def test_is_400_pixels_wide_titled_and_the_same_again(self, name: str) -> None:
        one, other = FUNCTIONS[name](), FUNCTIONS[name]()
        assert one.get_size_inches()[0] * one.dpi == 400
        assert one.axes[0].get_title(loc="left")
        assert render(one) == render(other)

    def test_nothing_sticks_out(self, name: str) -> None:
        figure = FUNCTIONS[name]()
        render(figure)  # which lays it out
        for ax in figure.axes:
            box = ax.get_tightbbox()
            assert box is not None
            assert box.x0 >= -1
            assert box.y0 >= -1
            assert box.x1 <= figure.bbox.width + 1
            assert box.y1 <= figure.bbox.height + 1

    def test_draws_in_the_axes_that_are_given(self, name: str) -> None:
        figure = Figure(layout="constrained")
        left, right = figure.subplots(1, 2)
        assert FUNCTIONS[name](ax=right) is figure
        assert right.get_title(loc="left")
        assert not left.has_data()
        render(figure)

    def test_changes_no_settings(self, name: str) -> None:
        before = dict(matplotlib.rcParams)
        render(FUNCTIONS[name]())
        assert dict(matplotlib.rcParams) == before

    def test_ground_is_white_or_left_out(self, name: str) -> None:
        from PIL import Image

        def corner(**options: Any) -> Any:
            png = render(FUNCTIONS[name](), format="png", **options)
            return Image.open(io.BytesIO(png)).convert("RGBA").getpixel((0, 0))

        assert corner() == (255, 255, 255, 255)
        assert corner(transparent=True)[3] == 0

    def test_says_which_extra_is_missing(self, name: str, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"pip install 'lifelong\[plots\]'"):
            FUNCTIONS[name]()


def test_matplotlib_is_loaded_at_the_first_picture_and_pyplot_never() -> None:
    code = (
        "import sys; from lifelong import plots; print('matplotlib' in sys.modules); "
        "plots.kernel_matrix([[1.0, 0.0], [0.0, 1.0]], [0, 1]); "
        "plots.sensitivity_evolution([[1.0, 2.0], [2.0, 3.0]], labels=[0, 1]); "
        "plots.reliability_diagram([0.2, 0.7], [0, 1]); "
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr == ""
    assert found.stdout.split() == ["False", "True", "False"]


def test_colours_are_those_of_the_report() -> None:
    source = files("lifelong.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", source[: source.index("@media")]))
    assert tuple(light[f"c{i}"] for i in range(6)) == plots.COLOURS
    assert (light["ink"], light["soft"], light["rule"], light["plain"]) == (
        plots.INK, plots.SOFT, plots.RULE, plots.PLAIN,
    )  # fmt: skip
    low_to_high = [pictures.cell_colours(k / 4, 0.0)[0] for k in range(5)]
    assert tuple(low_to_high) == plots.RAMP


def test_scales_survive_grey_print() -> None:
    def lightness(colour: Any) -> float:
        return pictures.contrast("#{:02x}{:02x}{:02x}".format(*colour[:3]), "#ffffff")

    ramp = plots.style.sequential()(np.linspace(0, 1, 33), bytes=True)
    assert all(lightness(a) < lightness(b) for a, b in pairwise(ramp))
    both = plots.style.diverging()(np.linspace(0, 1, 65), bytes=True)
    assert all(lightness(a) > lightness(b) for a, b in pairwise(both[:33]))
    assert all(lightness(a) < lightness(b) for a, b in pairwise(both[32:]))


def test_lines_differ_without_colour() -> None:
    styles = list(zip(plots.style.DASHES, plots.style.MARKERS, strict=True))
    assert len(set(styles)) == len(plots.COLOURS)


def test_axes_of_another_number_and_removed_axes() -> None:
    figure = Figure()
    ax = figure.add_subplot()
    with pytest.raises(ValueError, match="expected two axes, the upper and the lower, got 1"):
        plots.reliability_diagram(P, Y, axes=[ax])
    with pytest.raises(ValueError, match="expected two axes"):
        plots.evidence_against_test([1, 2], [1, 2], [1, 2], axes=[ax] * 3)
    ax.remove()
    with pytest.raises(ValueError, match="belong to no figure"):
        plots.sensitivity_histogram(SCORES, ax=ax)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_draw_nothing(bad: float) -> None:
    figure = Figure()
    ax = figure.add_subplot()
    wrong = np.where(SCORES == 3, bad, SCORES)
    matrix, table = K.copy(), IMAGES[:, 0].T.copy()
    matrix[1, 2] = table[1, 2] = bad
    calls: list[tuple[str, Callable[[], Figure]]] = [
        (r"scores must be finite, got (nan|inf) at \[8\]",
         lambda: plots.sensitivity_histogram(wrong, ax=ax)),
        ("scores", lambda: plots.memorable_examples(IMAGES, wrong, ax=ax)),
        ("images that are shown",
         lambda: plots.memorable_examples(IMAGES * bad, SCORES, ax=ax)),
        (r"trace .* at \[1, 2\]", lambda: plots.sensitivity_evolution(table, ax=ax)),
        ("trace", lambda: plots.ranked_sensitivity(table, ax=ax)),
        ("estimated", lambda: plots.sensitivity_scatter(SCORES, wrong, ax=ax)),
        ("kernel", lambda: plots.kernel_matrix(matrix, ax=ax)),
        ("mean", lambda: plots.predictive_bands(SCORES, wrong, SCORES, ax=ax)),
        ("noise_sd", lambda: plots.predictive_bands(SCORES, SCORES, SCORES, bad, ax=ax)),
        ("log_evidence", lambda: plots.evidence_against_test(SCORES + 1, wrong, SCORES,
                                                             axes=[ax, ax])),
        ("probabilities", lambda: plots.reliability_diagram(wrong, LABELS, axes=[ax, ax])),
    ]  # fmt: skip
    for message, call in calls:
        with pytest.raises(NonFiniteError, match=message):
            call()
    assert not ax.has_data()
    assert ax.get_title(loc="left") == ""


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"scores must have shape \(≥ 1\), got \(0,\)", lambda: plots.sensitivity_histogram([])),
        ("scores must be an array of numbers", lambda: plots.sensitivity_histogram(["a"])),
        ("bins must be at least 1", lambda: plots.sensitivity_histogram(SCORES, bins=0)),
        ("k must be at least 1", lambda: plots.memorable_examples(IMAGES, SCORES, k=0)),
        ("one score for each of the 12 examples, got 11",
         lambda: plots.memorable_examples(IMAGES, SCORES[1:])),
        ("per_class=True needs labels",
         lambda: plots.memorable_examples(IMAGES, SCORES, per_class=True)),
        ("examples must be images",
         lambda: plots.memorable_examples(np.zeros((12, 4, 4, 2)), SCORES)),
        ("images must not be empty",
         lambda: plots.memorable_examples(np.zeros((12, 0, 4)), SCORES)),
        ("expected 2 feature_names, one for each column, got 1",
         lambda: plots.memorable_examples(np.zeros((12, 2)), SCORES, feature_names=["a"])),
        ("labels must be 12 integers, one for each example, got float64",
         lambda: plots.memorable_examples(IMAGES, SCORES, labels=SCORES)),
        ("a name for each class, labels 0 .. 2, got 2 names",
         lambda: plots.kernel_matrix(K, LABELS, class_names=["a", "b"])),
        (r"trace must have shape \(≥ 1, ≥ 1\)", lambda: plots.sensitivity_evolution(SCORES)),
        ("at least two steps", lambda: plots.sensitivity_evolution([[1.0, 2.0]])),
        ("steps must increase", lambda: plots.ranked_sensitivity(K[:2], steps=[2, 1])),
        ("log scale needs positive values, got -1; leave log=False",
         lambda: plots.sensitivity_evolution(-np.ones((2, 3)), log=True)),
        ("at least one group and one curve", lambda: plots.ranked_sensitivity(K, num_groups=0)),
        ("expected 12 names, one for each point, got 1",
         lambda: plots.sensitivity_scatter(SCORES, SCORES, names=["a"])),
        (r"estimated must have shape \(12\), got \(11,\)",
         lambda: plots.sensitivity_scatter(SCORES, SCORES[1:])),
        ("kernel must be square", lambda: plots.kernel_matrix(K[:5])),
        (r"clip must lie in \(0, 1\], got 0", lambda: plots.kernel_matrix(K, clip=0)),
        ("at least two points", lambda: plots.predictive_bands([0.0], [0.0], [1.0])),
        ("must not be negative", lambda: plots.predictive_bands(GRID, GRID, GRID)),
        ("width must be positive",
         lambda: plots.predictive_bands(GRID, GRID, GRID**2, width=math.nan)),
        ("the data's y", lambda: plots.predictive_bands(GRID, GRID, GRID**2, data=([1], [1, 2]))),
        ("needs a positive grid, got 0; set log=False",
         lambda: plots.evidence_against_test([0, 1], [1, 2], [1, 2])),
        ("labels must lie in 0 .. 2, got 0 .. 3",
         lambda: plots.reliability_diagram(P, np.where(Y == 2, 3, Y))),
        ("one bin", lambda: plots.reliability_diagram(P, Y, num_bins=0)),
        (r"probabilities must lie in \[0, 1\]", lambda: plots.reliability_diagram(2 * P, Y)),
    ],
)  # fmt: skip
def test_wrong_input_is_named(message: str, call: Callable[[], Figure]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------- memorable examples


def shown(ax: Axes) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in ax.images]


class TestMemorable:
    def test_shows_the_extremes_in_order(self) -> None:
        ax = plots.memorable_examples(IMAGES, SCORES, k=2).axes[0]
        chosen = IMAGES[[0, 1, 11, 10]]
        scaled = (chosen - chosen.min()) / (chosen.max() - chosen.min())
        np.testing.assert_allclose(shown(ax), scaled)
        assert texts(ax) == [
            "most", "11", "10", "least", "0", "1", "by score, written beside each",
        ]  # fmt: skip

    def test_per_class(self) -> None:
        images = np.arange(12, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
        figure = plots.memorable_examples(
            images, SCORES, labels=LABELS, per_class=True, k=1, class_names=["a", "b", "c"]
        )
        ax = figure.axes[0]
        # Of class c, example c has the highest score and example 9 + c the lowest.
        assert [int(image[0, 0]) for image in shown(ax)] == [0, 9, 1, 10, 2, 11]
        assert {"a", "b", "c", "most", "least"} < set(texts(ax))

    @pytest.mark.parametrize("n", [1, 2, 3, 7])
    def test_no_example_twice(self, n: int) -> None:
        ax = plots.memorable_examples(np.eye(n)[:, None], np.zeros(n), k=5).axes[0]
        assert len(ax.images) == min(n, 10)
        assert len({image.tobytes() for image in shown(ax)}) == len(ax.images)

    def test_kinds_of_images_are_shown_as_they_are(self) -> None:
        bright = RNG.integers(0, 256, (4, 3, 6, 5), dtype=np.uint8)
        ax = plots.memorable_examples(torch.from_numpy(bright), torch.arange(4), k=2).axes[0]
        np.testing.assert_array_equal(shown(ax), bright[[3, 2, 0, 1]].transpose(0, 2, 3, 1))
        one = plots.memorable_examples(IMAGES[:, None], SCORES).axes[0]
        np.testing.assert_array_equal(
            shown(one), shown(plots.memorable_examples(IMAGES, SCORES).axes[0])
        )
        flat = plots.memorable_examples(np.full((2, 3, 3), 7.0), [1, 2]).axes[0]
        assert not np.any(shown(flat))

    def test_the_images_and_their_numbers_are_in_view(self) -> None:
        ax = plots.memorable_examples(IMAGES, SCORES, labels=LABELS, per_class=True, k=3).axes[0]
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        for image in ax.images:
            x0, x1, y1, y0 = image.get_extent()
            assert left <= x0 < x1 <= right
            assert top <= y0 < y1 <= bottom

    def test_crowded_rows_have_no_numbers(self) -> None:
        ax = plots.memorable_examples(IMAGES, SCORES, k=11).axes[0]
        assert sorted(texts(ax)) == ["by score", "least", "most"]

    def test_texts_on_a_line_each(self) -> None:
        long = "one two\nthree $x_{ " + "word " * 30
        ax = plots.memorable_examples([long, "short", "middling"], [3, 1, 2], k=1).axes[0]
        said = texts(ax)
        assert any(t.startswith("one two three $x_{") and t.endswith("…") for t in said)
        assert "short" in said
        assert "middling" not in said
        render(ax.figure)  # an open $x_{ is no formula

    def test_rows_of_a_table(self) -> None:
        table = np.array([[1.0, 0.1234567], [2.0, 5.0], [3.0, 6.0]])
        figure = plots.memorable_examples(table, [3, 1, 2], k=1, feature_names=["age", "pH"])
        said = texts(figure.axes[0])
        assert {"age", "pH", "1", "0.123", "2", "5"} <= set(said)
        assert "6" not in said
        wide = texts(plots.memorable_examples(np.ones((2, 9)), [1, 2]).axes[0])
        assert "…" in wide

    @given(st.floats(-1e9, 1e9))
    def test_numbers_are_short(self, value: float) -> None:
        said = plots.arrays.short(value)
        assert len(said) <= (6 if value == 0 or abs(value) > 1e-90 else 7)
        assert float(said) == pytest.approx(value, rel=0.5)

    def test_names_keep_their_ends(self) -> None:
        assert plots.arrays.brief("class with a long name 97") == "class wit…e 97"
        assert plots.arrays.brief("fourteen chars") == "fourteen chars"
        assert plots.arrays.brief("a  b\nc") == "a b c"


# ------------------------------------------------------------------------------------ sensitivity


class TestHistogram:
    @given(
        arrays.arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e6, 1e6)),
        st.integers(1, 30),
    )
    def test_counts_every_example(self, scores: np.ndarray, bins: int) -> None:
        ax = plots.sensitivity_histogram(scores, bins=bins).axes[0]
        (stairs,) = ax.patches
        values, edges, _ = stairs.get_data()  # type: ignore[attr-defined]
        assert values.sum() == len(scores)
        assert edges[0] <= scores.min()
        assert scores.max() <= edges[-1]
        assert ax.lines[0].get_xdata()[0] == np.median(scores)

    @pytest.mark.parametrize("scores", [[5e-324, 0.0], [0.3, 0.3 + 1e-16], [1e20] * 3, [0.0]])
    def test_scores_that_differ_by_rounding_alone(self, scores: list[float]) -> None:
        figure = plots.sensitivity_histogram(scores)
        render(figure)
        (stairs,) = figure.axes[0].patches
        assert stairs.get_data().values.max() == len(scores)  # type: ignore[attr-defined]

    def test_the_share_of_the_first_hundredth(self) -> None:
        scores = np.r_[np.full(198, 1.0), 51.0, 51.0]
        figure = plots.sensitivity_histogram(scores)
        assert "the top 1 % hold 34 % of the sum" in texts(figure.axes[0])[0]
        few = plots.sensitivity_histogram(scores[:99], log_counts=False)
        assert texts(few.axes[0]) == ["median 1 (dashed)"]
        assert few.axes[0].get_yscale() == "linear"


class TestEvolution:
    def test_bands_are_quantiles(self) -> None:
        trace = RNG.random((4, 21))
        ax = plots.sensitivity_evolution(trace, steps=[1, 5, 10, 20]).axes[0]
        np.testing.assert_allclose(ax.lines[0].get_xdata(), [1, 5, 10, 20])
        np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(trace, 1))
        for band, share in zip(ax.collections, (0.9, 0.5), strict=True):
            y = band.get_paths()[0].vertices[:, 1]
            assert y.min() == pytest.approx(np.quantile(trace, 0.5 - share / 2, axis=1).min())
            assert y.max() == pytest.approx(np.quantile(trace, 0.5 + share / 2, axis=1).max())

    def test_lines_are_means_of_classes_from_the_highest(self) -> None:
        trace = np.array([[1.0, 2, 3, 4], [1.0, 2, 3, 40]])
        ax = plots.sensitivity_evolution(
            trace, labels=[0, 1, 1, 0], class_names=["_a", "$b"], log=True
        ).axes[0]
        np.testing.assert_allclose(
            [line.get_ydata() for line in ax.lines], [[2.5, 20.5], [2.5, 2.5]]
        )
        legend = ax.get_legend()
        assert [t.get_text() for t in legend.get_texts()] == ["_a", "$b"]
        assert ax.get_yscale() == "log"

    def test_of_many_classes_six_are_named(self) -> None:
        trace = np.stack([np.zeros(20), np.arange(20.0)])
        ax = plots.sensitivity_evolution(trace, labels=np.arange(20)).axes[0]
        said = [t.get_text() for t in ax.get_legend().get_texts()]
        assert said == ["19", "18", "17", "14 others", "2", "1", "0"]
        assert len(ax.lines) == 20
        drawn = {line.get_color() for line in ax.lines}
        assert drawn == {*plots.COLOURS, plots.PLAIN}
        # Beside each name stands the style of its line.
        styles = {float(line.get_ydata()[-1]): line.get_color() for line in ax.lines}
        for text, handle in zip(said, ax.get_legend().legend_handles, strict=True):
            if text.isdigit():
                assert handle.get_color() == styles[float(text)]

    def test_ranked_by_the_last_step(self) -> None:
        trace = RNG.random((7, 10))
        figure = plots.ranked_sensitivity(trace, num_groups=5, num_curves=3)
        lines = figure.axes[0].lines
        order = np.argsort(-trace[-1])
        expected = [trace[t, order].reshape(5, 2).mean(1) for t in (0, 3, 6)]
        np.testing.assert_allclose([line.get_ydata() for line in lines], expected)
        assert np.all(np.diff(lines[-1].get_ydata()) <= 0)
        (only,) = plots.ranked_sensitivity(trace, num_curves=1).axes[0].lines
        np.testing.assert_allclose(only.get_ydata(), np.sort(trace[-1])[::-1])


class TestScatter:
    def test_points_and_correlation(self) -> None:
        true, estimated = RNG.normal(size=(2, 30))
        ax = plots.sensitivity_scatter(torch.tensor(true), estimated, unit="nats").axes[0]
        np.testing.assert_allclose(ax.collections[0].get_offsets(), np.stack([true, estimated], 1))
        r = np.corrcoef(true, estimated)[0, 1]
        assert texts(ax)[-1] == f"Pearson r {r:.3f}, N = 30; dashed: equal"
        assert ax.get_xlabel() == "true deviation (nats)"
        assert ax.get_xlim() == ax.get_ylim()
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), ax.lines[0].get_ydata())

    def test_names_of_the_largest(self) -> None:
        figure = plots.sensitivity_scatter(SCORES, SCORES, names=[f"n{i}" for i in range(12)])
        assert set(texts(figure.axes[0])[:-1]) == {f"n{i}" for i in range(12)}
        many = plots.sensitivity_scatter(range(30), range(30), names=[f"n{i}" for i in range(30)])
        assert set(texts(many.axes[0])[:-1]) == {f"n{i}" for i in range(18, 30)}

    def test_correlation_is_not_made_up(self) -> None:
        assert math.isnan(plots.pearson([1.0], [2.0]))
        assert math.isnan(plots.pearson([1.0, 1.0], [2.0, 3.0]))
        assert plots.pearson([1.0, 2.0], [5.0, 3.0]) == pytest.approx(-1)
        ax = plots.sensitivity_scatter([1.0], [1.0]).axes[0]
        assert "r not defined" in texts(ax)[-1]


# ------------------------------------------------------------------------------------ the kernel


class TestKernel:
    def test_is_sorted_by_class(self) -> None:
        figure = plots.kernel_matrix(K, LABELS, class_names=["a", "b", "c"])
        ax = figure.axes[0]
        order = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
        np.testing.assert_array_equal(shown(ax)[0], K[np.ix_(order, order)])
        assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
        np.testing.assert_array_equal(ax.get_yticks(), [1.5, 5.5, 9.5])
        edges = [line.get_ydata()[0] for line in ax.lines[::2]]
        assert edges == [3.5, 7.5]

    def test_colours_end_where_clip_says(self) -> None:
        positive = np.abs(K)
        image = plots.kernel_matrix(positive, clip=0.5).axes[0].images[0]
        assert image.get_clim() == (0, pytest.approx(np.quantile(positive, 0.5)))
        signed = plots.kernel_matrix(K - 2, clip=1).axes[0].images[0]
        most = np.abs(K - 2).max()
        assert signed.get_clim() == (pytest.approx(-most), pytest.approx(most))
        # The middle of the two-sided scale is 0, and all but white.
        assert min(signed.cmap(0.5)[:3]) > 0.9

    def test_without_labels_the_order_stays(self) -> None:
        ax = plots.kernel_matrix(K).axes[0]
        np.testing.assert_array_equal(shown(ax)[0], K)
        assert ax.get_xticks().size == 0

    @pytest.mark.parametrize("matrix", [[[2.0]], np.zeros((3, 3)), [[-1.0]]])
    def test_awkward_matrices(self, matrix: Any) -> None:
        render(plots.kernel_matrix(matrix, [0] * len(matrix)))

    def test_of_a_hundred_classes_twenty_are_named(self) -> None:
        ax = plots.kernel_matrix(np.eye(200), np.arange(200) % 100).axes[0]
        assert [t.get_text() for t in ax.get_xticklabels()] == [str(c) for c in range(0, 100, 5)]


# ------------------------------------------------------------------------------ the other figures


class TestBands:
    def test_are_as_wide_as_their_deviations(self) -> None:
        sd, order = GRID**2, RNG.permutation(9)
        noise = np.full(9, 0.5)
        ax = plots.predictive_bands(
            GRID[order], GRID[order], sd[order], noise, data=([0.0], [3.0]), truth=GRID[order]
        ).axes[0]
        outer, inner = (c.get_paths()[0].vertices for c in ax.collections)
        assert inner[:, 1].max() == pytest.approx((GRID + 2 * sd).max())
        assert inner[:, 1].min() == pytest.approx((GRID - 2 * sd).min())
        assert outer[:, 1].max() == pytest.approx((GRID + 2 * np.sqrt(sd**2 + 0.25)).max())
        mean, truth, data = ax.lines
        np.testing.assert_array_equal(mean.get_xdata(), GRID)
        np.testing.assert_array_equal(truth.get_ydata(), GRID)
        np.testing.assert_array_equal(data.get_xydata(), [[0.0, 3.0]])

    def test_without_noise_there_is_one_band(self) -> None:
        ax = plots.predictive_bands(GRID, GRID, GRID**2, width=1).axes[0]
        assert len(ax.collections) == 1
        said = [t.get_text() for t in ax.get_legend().get_texts()]
        assert said == ["mean", "of the function"]
        assert texts(ax) == ["bands of ± 1 standard deviations"]


class TestEvidence:
    def test_stars_at_the_minima(self) -> None:
        grid, log_evidence, test = [10.0, 1.0, 100.0], [-5.0, -9.0, -7.0], [0.5, 0.2, 0.3]
        figure = plots.evidence_against_test(
            grid, log_evidence, test, evidence_se=[1, 2, 3], test_se=[0.1] * 3, train_loss=[3, 2, 1]
        )
        top, bottom = figure.axes
        np.testing.assert_array_equal(top.lines[0].get_xydata(), [[1, 9], [10, 5], [100, 7]])
        np.testing.assert_array_equal(bottom.lines[0].get_ydata(), [0.2, 0.5, 0.3])
        stars = [[line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "*"]
                 for ax in (top, bottom)]  # fmt: skip
        assert stars == [[[10, 5]], [[1, 0.2]]]
        assert top.get_title(loc="left") == "The evidence is highest at 10"
        assert bottom.get_title(loc="left") == "The test loss is lowest at 1"
        band = top.collections[0].get_paths()[0].vertices
        assert {(x, y) for x, y in band} >= {(1, 7), (1, 11), (10, 4), (10, 6), (100, 4), (100, 10)}
        assert top.get_xscale() == "log"
        np.testing.assert_array_equal(bottom.lines[-1].get_ydata(), [2, 3, 1])

    def test_a_linear_grid(self) -> None:
        figure = plots.evidence_against_test([-1, 0], [1, 2], [1, 2], log=False, grid_name="$w")
        assert figure.axes[0].get_xscale() == "linear"
        render(figure)


class TestReliability:
    def test_draws_the_bins(self) -> None:
        top, bottom = plots.reliability_diagram(P, torch.tensor(Y), num_bins=5).axes
        bins = calibration_bins(torch.tensor(P), torch.tensor(Y), 5)
        used = bins.count > 0
        accuracy, gaps = top.containers[:2]
        np.testing.assert_allclose([b.get_height() for b in accuracy], bins.accuracy[used])
        np.testing.assert_allclose(
            [b.get_y() + b.get_height() for b in gaps], bins.mean_confidence[used]
        )
        share = [b.get_height() for b in bottom.containers[0]]
        np.testing.assert_allclose(share, bins.count[used] / 40)
        drawn = sum(abs(b.get_height()) * n for b, n in zip(gaps, share, strict=True))
        assert drawn == pytest.approx(bins.error())
        assert f"ECE {bins.error():.3f}" in texts(top)[0]

    def test_of_two_classes(self) -> None:
        p = P[:, 0]
        one = plots.reliability_diagram(p, Y == 0)
        two = plots.reliability_diagram(np.stack([1 - p, p], 1), (Y == 0).astype(int))
        assert texts(one.axes[0]) == texts(two.axes[0])

    @given(
        arrays.arrays(np.float64, (30, 3), elements=st.floats(0.01, 1)),
        st.lists(st.integers(0, 2), min_size=30, max_size=30),
        st.integers(1, 20),
    )
    def test_bins_hold_everything_once(self, weights: Any, labels: list[int], k: int) -> None:
        p = torch.tensor(weights / weights.sum(1, keepdims=True))
        y = torch.tensor(labels)
        bins = calibration_bins(p, y, k)
        assert isinstance(bins, CalibrationBins)
        assert bins.count.sum() == 30
        assert bins.right.sum() == (p.argmax(1) == y).sum()
        assert float(bins.confidence.sum()) == pytest.approx(float(p.amax(1).sum()))
        assert bins.error() == calibration_error(p, y, k)
        edges = torch.linspace(0, 1, k + 1, dtype=torch.float64)
        used = bins.count > 0
        assert (bins.mean_confidence[used] >= edges[:-1][used] - 1e-12).all()
        assert (bins.mean_confidence[used] <= edges[1:][used] + 1e-12).all()
        assert bins.accuracy[~used].isnan().all()


class TestMemoryCurves:
    def test_draws_means_in_order_and_the_level(self) -> None:
        ax = plots.memory_curves(CURVES, reference=[0.9, 0.94]).axes[0]
        level, first, second = ax.lines
        np.testing.assert_allclose(level.get_ydata(), 92)
        np.testing.assert_allclose(first.get_xydata(), [[2, 75], [10, 85], [100, 91]])
        np.testing.assert_allclose(second.get_xydata(), [[2, 30], [10, 60]])
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["batch", *CURVES]
        assert "2 seeds; bands: ± 1 standard error" in texts(ax)

    def test_the_band_is_a_standard_error(self) -> None:
        figure = plots.memory_curves({"a": ([0.5], [[0.2], [0.4], [0.9]])}, legend=False)
        (band,) = figure.axes[0].collections
        ends = band.get_paths()[0].vertices[:, 1]
        error = 100 * np.std([0.2, 0.4, 0.9], ddof=1) / math.sqrt(3)
        np.testing.assert_allclose([ends.min(), ends.max()], [50 - error, 50 + error])
        assert figure.axes[0].get_legend() is None

    @pytest.mark.parametrize(
        ("lines", "match"),
        [
            ({}, "1 to 6 lines, got 0"),
            ({str(i): ([0.1], [[0.5]]) for i in range(7)}, "got 7"),
            ({"a": ([0.0], [[0.5]])}, "must lie in"),
            ({"a": ([2.0], [[0.5]])}, "must lie in"),
            ({"a": ([0.1], [[-0.5]])}, "must lie in"),
            ({"a": ([0.1], [[50.0]])}, "must lie in"),
            ({"a": ([0.1], [[0.5, 0.5]])}, "accuracies of a must have shape"),
            ({"a": (0.1, [[0.5]])}, "fractions of a must have shape"),
        ],
    )
    def test_bad_input(self, lines: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            plots.memory_curves(lines)

    def test_not_finite(self) -> None:
        with pytest.raises(NonFiniteError):
            plots.memory_curves({"a": ([0.1], [[math.nan]])})


def test_all_kinds_of_arrays() -> None:
    values = [3.0, 1.0, 2.0]
    for kind in (
        torch.tensor(values, requires_grad=True),
        torch.tensor(values, dtype=torch.bfloat16),
        np.array(values, dtype=np.float16),
        np.array([3, 1, 2]),
    ):
        (stairs,) = plots.sensitivity_histogram(kind, bins=2).axes[0].patches
        np.testing.assert_array_equal(stairs.get_data().values, [1, 2])  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------- the docs' script


def test_the_script_of_the_page_runs(tmp_path: Any, capsys: Any) -> None:
    from benchmarks.pictures import SMOKE, main

    folder = main(["--smoke", "--out", str(tmp_path)])
    assert folder == tmp_path
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    page = (files("lifelong").parent.parent / "docs" / "pictures.md").read_text()  # type: ignore[union-attr]
    of_records = {"fromp-toy", "memorable-mnist"}  # drawn by benchmarks.record_pictures
    assert drawn | of_records == set(re.findall(r"\(images/([\w-]+)\.png\)", page))
    assert not drawn & of_records
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".png"} == {
        "config.json", "result.json", "versions.json", "log.txt",
    }  # fmt: skip
    assert SMOKE.epochs == 2
    assert "left out" in capsys.readouterr().out


class TestAccuracyAgainstMemory:
    def test_draws_the_means_and_the_errors_of_the_record(self) -> None:
        ax = plots.accuracy_against_memory(RECORD, methods=["replay", "ours"]).axes[0]
        lines = [line for line in ax.lines if line.get_marker() != "None"]
        assert [list(line.get_xdata()) for line in lines] == [[10, 100], [10]]
        np.testing.assert_allclose(lines[0].get_ydata(), [60, 85])
        band = ax.collections[0].get_paths()[0].vertices
        np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [50, 90])
        across = [line for line in ax.lines if line.get_marker() == "None"]
        np.testing.assert_allclose([line.get_ydata()[0] for line in across], [98, 20])
        assert len({str(line._unscaled_dash_pattern) for line in across}) == 2
        legend = [t.get_text() for t in ax.get_legend().get_texts()]
        assert legend == ["replay", "ours", "joint 98.0", "ewc 20.0"]
        assert ax.get_xscale() == "log"
        assert texts(ax)[0] == "2 seeds; bands: ± 1 standard error"

    def test_takes_the_rows_with_two_memories_by_default_and_calls_them_as_told(self) -> None:
        named = {"replay": "Replay", "joint": "All data"}
        ax = plots.accuracy_against_memory(RECORD, levels=["joint"], names=named).axes[0]
        legend = [t.get_text() for t in ax.get_legend().get_texts()]
        assert legend == ["Replay", "All data 98.0"]

    def test_says_what_the_record_lacks(self) -> None:
        with pytest.raises(ValueError, match=r"no accuracy with a memory for \['joint', 'us'\]"):
            plots.accuracy_against_memory(RECORD, methods=["joint", "us"])
        with pytest.raises(ValueError, match="expected 1 to 6 methods"):
            plots.accuracy_against_memory(RECORD, methods=[])
        with pytest.raises(ValueError, match="expected 1 to 6 methods"):
            plots.accuracy_against_memory({"rows": []})


class TestDecisionRegions:
    def test_the_boundary_is_where_the_probability_is_a_half(self) -> None:
        ax = plots.decision_regions(GRID, GRID[:5], PLANE).axes[0]
        vertices = np.concatenate([p.vertices for p in ax.collections[-1].get_paths()])
        np.testing.assert_allclose(3 * vertices[:, 0] + vertices[:, 1], 0, atol=0.02)

    def test_a_plane_without_a_boundary_has_none_and_points_are_told_apart(self) -> None:
        figure = plots.decision_regions(
            GRID, GRID, np.full((9, 9), 0.8), points=K[:, :2], labels=LABELS % 2, marked=K[:2, :2]
        )
        ax = figure.axes[0]
        assert len(ax.collections) == 1
        zeros, ones, rings = ax.lines
        np.testing.assert_array_equal(zeros.get_xydata(), K[LABELS % 2 == 0, :2])
        np.testing.assert_array_equal(ones.get_xydata(), K[LABELS % 2 == 1, :2])
        np.testing.assert_array_equal(rings.get_xydata(), K[:2, :2])
        assert zeros.get_marker() != ones.get_marker()

    @pytest.mark.parametrize(
        ("message", "options"),
        [
            ("must increase", {"x": GRID[::-1]}),
            ("must increase", {"y": [0.0], "probability": PLANE[:1]}),
            (r"in \[0, 1\], got .* to 1.1", {"probability": PLANE + 0.1 + 1 - PLANE.max()}),
            ("labels must be 0 or 1", {"points": K[:, :2], "labels": LABELS}),
            ("labels must be 12 integers", {"points": K[:, :2]}),
            (r"probability must have shape \(5, 9\)", {"probability": PLANE.T}),
        ],
    )
    def test_says_what_does_not_fit(self, message: str, options: dict[str, Any]) -> None:
        given = {"x": GRID, "y": GRID[:5], "probability": PLANE, **options}
        with pytest.raises(ValueError, match=message):
            plots.decision_regions(**given)

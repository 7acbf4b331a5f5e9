"""Pictures of fidelity: what is drawn are the numbers that came in, and bad input draws nothing."""

from __future__ import annotations

import numpy as np
import pytest

from lifelong import memory_plots
from lifelong.errors import NonFiniteError

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure


def test_a_curve_is_drawn_as_it_came_and_never_below_minus_one():
    figure = memory_plots.fidelity_against_memory(
        [0, 1, 10, 100], {"kprior": [0, -5.0, 0.5, 1.0], "fromp": [0, 0.1, 0.2, 0.3]}, target=0.9
    )
    (ax,) = figure.axes
    first, second = ax.lines[-2:]
    assert np.allclose(first.get_xdata(), [1, 10, 100])
    assert np.allclose(first.get_ydata(), [-1, 0.5, 1])
    assert np.allclose(second.get_ydata(), [0.1, 0.2, 0.3])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["kprior", "fromp"]
    assert ax.get_xscale() == "log"


@pytest.mark.parametrize("log", [False, True])
def test_a_scatter_is_in_points_with_its_rank_correlation(log):
    figure = memory_plots.predicted_against_lost(
        [1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3], groups=["a", "b", "a", "a"], log=log
    )
    (ax,) = figure.axes
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    assert np.allclose(drawn, [[1, 10], [3, 40], [4, 30], [2, 20]])
    assert ax.get_title(loc="left") == "Rank correlation 0.80"


def test_it_draws_in_given_axes_and_without_groups():
    ax = Figure().add_subplot()
    figure = memory_plots.predicted_against_lost([1, 1, 1], [0, 0.1, 0.2], ax=ax)
    assert figure is ax.get_figure()
    assert ax.get_legend() is None
    assert "nan" in ax.get_title(loc="left")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memory_plots.fidelity_against_memory([1, 2], {}), "at least one curve"),
        (lambda: memory_plots.fidelity_against_memory([0], {"a": [0]}), "one size above 0"),
        (lambda: memory_plots.fidelity_against_memory([1, 2], {"a": [1]}), "a"),
        (lambda: memory_plots.predicted_against_lost([1, 2], [1, 2]), "fewer than three points"),
        (
            lambda: memory_plots.predicted_against_lost([1, 2, 3], [1, 2, 3], groups=["a"]),
            "expected 3 groups",
        ),
        (lambda: memory_plots.predicted_against_lost([1, 2, 3], [1, 2]), "lost"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(NonFiniteError):
        memory_plots.predicted_against_lost([1, 2, float("nan")], [1, 2, 3])


def test_ranks_share_ties():
    def spearman(*values):
        return memory_plots.spearman(*map(np.array, values))

    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 of variances 4.5 and 5.
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)

"""The picture of a stream of classes: what is drawn are the numbers and photos that came in."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelong.errors import NonFiniteError
from lifelong.plots import seen_once
from lifelong.plots.seen_once import _spread

pytest.importorskip("matplotlib")

RNG = np.random.default_rng(0)
LINES = {
    "all again": [[1.0, 0.95, 0.9], [1.0, 0.93, 0.92]],
    "ours": [[1.0, 0.9, 0.85], [1.0, 0.94, 0.87]],
    "nothing": [[1.0, 0.5, 0.34]],
}
PHOTOS = [[RNG.integers(0, 255, (2, 6, 9, 3)).astype(np.uint8) for _ in range(2)] for _ in range(3)]
NAMES = [["ant", "bee"], ["cat", "a rather long name"], ["emu", "fly"]]


def texts(figure: Any) -> list[str]:
    return [t.get_text() for t in [*figure.texts, *(t for ax in figure.axes for t in ax.texts)]]


def test_draws_means_bands_photos_and_names():
    figure = seen_once(LINES, PHOTOS, NAMES, title="A title", note="a note")
    curves, strip = figure.axes
    for line, rows in zip(curves.lines, LINES.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * np.mean(rows, 0))
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
    band = curves.collections[1].get_paths()[0].vertices[:, 1]
    error = 100 * np.std([0.85, 0.87], ddof=1) / 2**0.5
    assert band.max() >= 100
    assert band.min() == pytest.approx(86 - error)
    shown = [image.get_array() for image in strip.images]
    expected = [photo for task in PHOTOS for kept in task for photo in kept]
    assert len(shown) == len(expected) == 12
    for a, b in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    said = " ".join(texts(figure))
    for text in (
        "A title",
        "a note",
        "2 seeds",
        "ours  86",
        "kept: 2 photos",
        *NAMES[1],
        *NAMES[2],
    ):
        assert text in said


def test_each_column_is_below_its_task_and_nothing_sticks_out():
    figure = seen_once(LINES, PHOTOS, NAMES)
    figure.canvas.draw()
    curves, strip = figure.axes
    for t in range(3):
        task = curves.transData.transform((t + 1, 0))[0]
        image = strip.images[4 * t]
        left, right = (strip.transData.transform((x, 0))[0] for x in image.get_extent()[:2])
        assert left < task < right
    canvas = figure.bbox
    for text in [*figure.texts, *(t for ax in figure.axes for t in ax.texts)]:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= canvas.x1
        assert box.y0 >= 0
        assert box.y1 <= canvas.y1


@given(st.lists(st.floats(30, 100), min_size=1, max_size=6), st.floats(0.5, 10))
def test_names_of_lines_keep_apart_and_in_order(ends, apart):
    places = _spread(ends, apart)
    assert max(places) <= 100
    for (a, x), (b, y) in zip(sorted(zip(ends, places)), sorted(zip(ends, places))[1:]):
        assert a <= b
        assert abs(x - y) >= apart * (1 - 1e-9) - 1e-9
    assert all(place <= end + 1e-9 for place, end in zip(places, ends))


def bad(**changes: Any) -> Any:
    return {"lines": LINES, "photos": PHOTOS, "names": NAMES, **changes}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (bad(lines={}), "1 to 6 lines, got 0"),
        (bad(lines={"a": [[0.5, 0.5]]}), "accuracies of a"),
        (bad(lines={"a": [[0.5, 0.5, 1.5]]}), r"accuracies must lie in \[0, 1\]"),
        (bad(names=[["a", "b"]] * 2 + [["c"]]), r"\[2, 2, 1\] classes"),
        (bad(photos=[[p[:, :, :4] for p in PHOTOS[0]], *PHOTOS[1:]]), "one shape"),
        (bad(photos=[[p / 255 for p in task] for task in PHOTOS]), "uint8 photos"),
    ],
)
def test_wrong_input_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        seen_once(given["lines"], given["photos"], given["names"])


def test_not_finite_draws_nothing():
    with pytest.raises(NonFiniteError):
        seen_once({"a": [[0.5, 0.5, float("nan")]]}, PHOTOS, NAMES)


def test_says_which_extra_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lifelong\[plots\]"):
        seen_once(LINES, PHOTOS, NAMES)

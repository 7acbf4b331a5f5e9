"""The tables of the page on K-priors are those of its record, and nothing else."""

from __future__ import annotations

import json

import pytest
from benchmarks import adaptation_page as page

RECORDS = sorted((page.HERE / "results").glob("????-??-??_adaptation"))


def test_the_page_has_the_numbers_of_the_record():
    result = json.loads((RECORDS[-1] / "result.json").read_text())
    text = page.PAGE.read_text()
    for name, body in (
        ("accuracy-5", page.accuracies(result, "0.05")),
        ("accuracy-2", page.accuracies(result, "0.02")),
        ("hard", page.hard(result)),
        ("gradients", page.gradients(result)),
        ("convex", page.convex(result)),
    ):
        assert page.fill(text, name, body) == text, "run python -m benchmarks.adaptation_page"


def test_cells():
    assert page.cell(None) == "–"
    assert page.cell({"mean": 0.9123, "standard_error": None, "n": 1}) == "91.2 (1)"
    assert page.cell({"mean": 0.9123, "standard_error": 0.0004, "n": 3}) == "91.2"
    assert page.cell({"mean": 0.9123, "standard_error": 0.002, "n": 3}) == "91.2 ± 0.2"


def test_parts_of_what_batch_costs():
    assert page.part([1, 2, 3], [10, 20, 30]) == "0.100"
    assert page.part([1, None, 3], [10, 20, 30]) == "0.100 (in 2 of 3)"
    assert page.part([None], [10]) == "never"


def test_a_page_without_marks_is_told():
    with pytest.raises(ValueError, match="no marks"):
        page.fill("nothing", "accuracy-5", "")

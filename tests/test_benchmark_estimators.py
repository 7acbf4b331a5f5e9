"""The comparison of the estimators runs, and its batches are what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks import estimators


def test_batches_hold_each_row_once_in_the_order_of_classes() -> None:
    y = np.arange(100) % 10
    batches = estimators.sorted_batches(np.arange(100)[:, None], y)
    assert [sorted(set(part)) for _, part in batches] == [[2 * i, 2 * i + 1] for i in range(5)]
    assert sorted(np.concatenate([X[:, 0] for X, _ in batches])) == list(range(100))
    two = np.concatenate([part for _, part in estimators.sorted_batches(np.zeros((100, 1)), y % 2)])
    assert list(two) == sorted(y % 2)


def test_a_record_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["estimators", "--out", str(tmp_path), "--seeds", "1", "--only", "breast cancer"]
    monkeypatch.setattr("sys.argv", out)
    estimators.main()
    results = json.loads((tmp_path / "result.json").read_text())
    assert {r["method"] for r in results} == set(estimators.METHODS)
    assert all(0 < r["runs"][0]["accuracy"] <= 1 for r in results)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "log.txt", "result.json", "versions.json",
    }  # fmt: skip
    assert "breast cancer" in capsys.readouterr().out

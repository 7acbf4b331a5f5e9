"""The benchmark of weak scaling runs, and what it counts is what is sent."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from benchmarks import weak_scaling
from benchmarks.weak_scaling import Config

SMOKE = Config(
    cases=("mlp",), batch=8, tasks=2, memory=20, examples=60, rounds=2, inner=1, repeats=1
)


def here(size: int, case: str, config: Config) -> list[dict[str, Any]]:
    """One process, this one: starting others takes seconds."""
    with TemporaryDirectory() as out:
        weak_scaling.on_rank(0, 1, out, case, config)
        return [pickle.loads(Path(out, "0.pkl").read_bytes())] * size


def test_a_step_sends_the_gradient_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weak_scaling, "group", here)
    (row,) = weak_scaling.run(SMOKE, tmp_path)
    assert (
        row["sent"]["plain"] == row["sent"]["prior"] == {"gloo:all_reduce": row["gradient_bytes"]}
    )
    for kind in ("cpu", "wall"):
        times = row[kind]["milliseconds"]
        assert set(times) == {"plain, 1", "plain, 2", "prior, 1", "prior, 2"}
        growth = (times["prior, 2"] / times["prior, 1"]) / (times["plain, 2"] / times["plain, 1"])
        assert row[kind]["excess"] == pytest.approx(growth)
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == [row]

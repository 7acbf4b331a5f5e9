"""Choosing settings on held-out training data."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported

from lifelong.bench import tune as tuning
from lifelong.bench.table import Cell, Context, Method, Table
from lifelong.bench.tables import table
from lifelong.bench.tune import grid_table, tune, values
from lifelong.config import UsageError


@dataclass(frozen=True)
class Peak:
    """Best at strength 10; fails at strength 0."""

    validation: float = 0.0
    first_seed: int = 0

    def __call__(self, table: Table, cell: Cell, context: Context) -> dict[str, Any]:
        method = table.method(cell.method)
        strength, lr = method.settings["strength"], method.training.get("lr", 1)
        if self.validation != 0.2 or self.first_seed != 100:
            raise ValueError("the test data were read")
        if strength == 0:
            raise ValueError("no strength")
        off = abs(strength - 10) / 100 + abs(lr - 2) / 10
        return {"accuracy": 0.9 - off - (cell.memory == 8) * 0.1 - cell.seed / 100}


TABLE = Table("toy", "Toy", (Method("k", "kprior", {"strength": 3.0}),), (4, 8), Peak())


def test_the_best_of_a_grid(tmp_path: Path) -> None:
    found = tune(TABLE, "k", {"strength": [1, 10, 0], "training.lr": [1, 2]}, tmp_path, jobs=0)
    assert found["chosen"] == {"strength": 10, "training.lr": 2}
    assert [t["accuracy"] and t["accuracy"]["mean"] for t in found["tried"]] == [
        pytest.approx(0.705), pytest.approx(0.805), pytest.approx(0.795), pytest.approx(0.895),
        None, None,
    ]  # fmt: skip
    assert found["tried"][-1]["errors"][0].startswith("ValueError: no strength")
    assert (found["memory"], found["validation"], found["seeds"]) == (4, 0.2, 2)


def test_one_folder_holds_several_grids(tmp_path: Path) -> None:
    tune(TABLE, "k", {"strength": [1, 10]}, tmp_path, jobs=0)
    tune(TABLE, "k", {"strength": [1, 10]}, tmp_path, memory=8, jobs=0)
    tune(TABLE, "k", {"strength": [1, 10, 100]}, tmp_path, jobs=0)
    kept = json.loads((tmp_path / "tune.json").read_text())
    assert [(entry["memory"], len(entry["tried"])) for entry in kept] == [(8, 2), (4, 3)]
    assert kept[0]["tried"][1]["accuracy"]["mean"] == pytest.approx(0.695)


def test_points_are_compared_on_the_same_seeds(tmp_path: Path) -> None:
    """A seed more costs 0.01 in each point, and strength 9 is 0.005 worse than 9.5."""
    tune(TABLE, "k", {"strength": [9.5]}, tmp_path, seeds=3, jobs=0)
    found = tune(TABLE, "k", {"strength": [9.5, 9]}, tmp_path, seeds=1, jobs=0)
    assert found["chosen"] == {"strength": 9.5}
    assert [len(t["accuracy"]["per_seed"]) for t in found["tried"]] == [1, 1]


def test_a_stream_holds_its_own_data_out(tmp_path: Path) -> None:
    digits = table("split-digits")
    points = grid_table(digits, "ewc", {"strength": [1.0, 5.0]})
    assert [dict(m.settings) for m in points.methods] == [{"strength": 1.0}, {"strength": 5.0}]
    assert points.definition(points.methods[0].name)["setup"]["validation"] == 0.2
    found = tune(digits, "ewc", {"strength": [1.0, 1e3]}, tmp_path, jobs=0, seeds=1, smoke=True)
    assert all(0 <= t["accuracy"]["mean"] <= 1 for t in found["tried"])


def no_run(table: Table, cell: Cell, context: Context) -> dict[str, Any]:
    return {"accuracy": 1.0}


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot hold out training data"):
        grid_table(replace(TABLE, run=no_run), "k", {"strength": [1]})
    for grid in ({}, {"strength": []}):
        with pytest.raises(UsageError, match="settings with their values"):
            grid_table(TABLE, "k", grid)
    with pytest.raises(UsageError, match="no method 'j'"):
        grid_table(TABLE, "j", {"strength": [1]})
    with pytest.raises(UsageError, match="every point of the grid failed: ValueError: no str"):
        tune(TABLE, "k", {"strength": [0]}, tmp_path, jobs=0)


def test_values() -> None:
    assert values("strength=1,1e4,auto") == ("strength", [1, 1e4, "auto"])
    assert values("population=true,false") == ("population", [True, False])
    for wrong in ("strength", "=1", "strength="):
        with pytest.raises(UsageError, match="expected NAME=VALUE"):
            values(wrong)


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "find", lambda name: TABLE)
    args = ["toy", "k", "strength=1,10", "--out", str(tmp_path), "--jobs", "0"]
    assert tuning.main(args) == 0
    captured = capsys.readouterr()
    assert captured.out == "strength 1: 70.50\nstrength 10: 79.50 <- best\n"
    assert captured.err.count("accuracy 0.") == 4
    assert tuning.main(["toy", "j", *args[2:]]) == 2
    assert "no method 'j'" in capsys.readouterr().err

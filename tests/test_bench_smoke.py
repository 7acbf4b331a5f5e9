"""Every table of ``lifelong bench`` runs, at a size that means nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported

from lifelong.bench.execute import execute
from lifelong.bench.tables import tables


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets of the right names and shapes, and of noise."""
    pytest.importorskip("pyarrow")
    from noise import write

    return write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", tables())
def test_smoke(name: str, data: Path, tmp_path: Path) -> None:
    table = tables()[name].tiny()
    summary = execute(tables()[name], tmp_path / "out", data=data, jobs=0, smoke=True)
    assert [(row["method"], row["failed"]) for row in summary["rows"]] == [
        (m.name, []) for m in table.methods for _ in m.memories_of(table)
    ]
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in summary["rows"])


def test_trials_of_permuted_digits(data: Path, tmp_path: Path) -> None:
    """What was tried is made once, and can be made again by its name."""
    pytest.importorskip("benchmarks")
    from benchmarks.permuted_trials import TRIALS, main

    names = ["kronecker, strength 4, by lambda", "kronecker, strength 1, a product for each task"]
    args = ["--data", str(data), "--out", str(tmp_path), "--smoke", "--only"]
    main([*args, names[0]])
    once = (tmp_path / "result.json").read_text()
    main([*args, names[0]])
    assert (tmp_path / "result.json").read_text() == once
    main([*args, *names])
    rows = json.loads((tmp_path / "result.json").read_text())
    assert [row["trial"] for row in rows] == names
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    record = Path("benchmarks/results/2026-11-25_permuted-trials/result.json")
    recorded = {row["trial"]: row["kept"] for row in json.loads(record.read_text())}
    assert {t.name for t in TRIALS} <= recorded.keys()


def test_what_the_past_loses_beside_what_was_foretold(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("benchmarks")
    from benchmarks.foretold import Config, run

    small = Config(margins=(1.0, 3.0), tasks=2, epochs=1, memory=10, examples=60)
    plain, wide = run(small, data, tmp_path)
    assert (plain["margin"], wide["margin"], plain["task"]) == (1.0, 3.0, 2)
    assert wide["strength"] == 3 * plain["strength"]  # of the first task, learned before
    for row in (plain, wide):
        assert row["foretold"] > 0 <= row["memory"]
        assert row["ratio"] * row["foretold"] == pytest.approx(row["lost"] - row["memory"])
    assert json.loads((tmp_path / "result.json").read_text()) == [plain, wide]

"""The benchmark of the cost model: a tiny version runs, and bytes are as foretold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import planning


def test_the_smoke_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = planning.Config(("ewc", "experience_replay"), 1, 8, 16, 4, rounds=1)
    rows = planning.run(config, tmp_path)
    assert "ewc: bytes" in capsys.readouterr().out
    for row in rows:
        assert row["bytes"][0] == row["bytes"][1]
        foretold, file = row["file"]
        assert foretold < file < foretold + 10_000  # the header
        assert min(row["step"]) > 0
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["rows"] == rows
    assert replace(config, methods=()) == replace(planning.Config(), methods=(), tasks=1, memory=8,
                                                  examples=16, batch=4, rounds=1)  # fmt: skip


def test_the_page_has_the_record() -> None:
    root = Path(__file__).parent.parent
    record = root / "benchmarks" / "results" / "2026-11-25_planning" / "result.json"
    rows = json.loads(record.read_text())["rows"]
    assert {row["method"] for row in rows} == set(planning.Config().methods)
    assert planning.table(rows) in (root / "docs" / "scaling.md").read_text()

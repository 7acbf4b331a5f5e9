"""The record of exactness: its small setting runs, and the record holds what the docs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import exactness

RECORDS = sorted((Path(exactness.__file__).parent / "results").glob("*_exactness"))


def test_the_small_setting_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = exactness.main(["--smoke", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "result.json", "versions.json", "log.txt",
    }  # fmt: skip
    assert set(result) == {
        "linear-gaussian", "logistic", "multinomial", "multinomial heads", "poisson",
        "linear-gaussian, G alone",
    }  # fmt: skip
    assert max(max(errors.values()) for errors in result.values()) < 1e-6
    assert "three in a row" in capsys.readouterr().out


@pytest.mark.parametrize("record", RECORDS, ids=lambda p: p.name)
def test_the_record_holds_what_the_docs_say(record: Path) -> None:
    result = json.loads((record / "result.json").read_text())
    assert len(result) == 6
    assert max(max(errors.values()) for errors in result.values()) < 1e-8

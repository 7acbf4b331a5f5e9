"""The comparison of curvature runs without the other packages, and writes a whole record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import curvature

    for module in curvature.PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    curvature.main(["--out", str(tmp_path), "--examples", "16", "--rounds", "1"])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert len(rows) == len(curvature.QUANTITIES) * (1 + len(curvature.PACKAGES))
    for row in rows:
        if row["side"] == "lifelong":
            assert row["ratio"] > 0
        else:
            assert row["error"].startswith("missing")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "result.json", "versions.json", "log.txt"
    }  # fmt: skip

"""The benchmark of served memories: its smoke setting, and that both sides do the same."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import served


def test_smoke(tmp_path: Path) -> None:
    found = served.run(served.SMOKE, tmp_path)
    assert found[0]["same_losses"]
    assert found[0]["same_weights"]
    assert found[0]["read_ahead"] > 0.8
    assert json.loads((tmp_path / "result.json").read_text())[0]["items"] == 40
    assert (tmp_path / "log.txt").exists()

"""The benchmark of the page runs: the server starts as a user starts it, each page is there."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import app
from benchmarks.app import Config


def test_the_smoke_setting(tmp_path: Path) -> None:
    found = app.run(Config(items=1_000, rounds=1, pages=2), tmp_path)
    assert set(found) == {"cold", "scrolled", *app.PATHS}
    for name in app.PATHS:
        assert found[name]["ratio"] == found[name]["seconds"] / found[name]["static"]
    assert found["scrolled"]["blank"] == 0
    assert found["scrolled"]["peak"] >= found["scrolled"]["after"]
    assert json.loads((tmp_path / "result.json").read_text()) == found

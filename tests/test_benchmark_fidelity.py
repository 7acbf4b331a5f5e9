"""The benchmark of fidelity runs small and leaves a whole record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported

ROOT = Path(__file__).parent.parent


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import fidelity

    config = replace(fidelity.SMOKE, memory=(0, 3), trials=2)
    found = fidelity.run(config, None, tmp_path / "a", ("cells", "coverage"))
    assert len(found["cells"]) == 4 * 7
    assert found["development"]["all"]["cells"] == 28
    for row in found["cells"]:
        assert row["missed_per_example"] == row["missed_per_example"]  # a number
    fidelity.run(config, None, tmp_path / "b", ("curve",), merged=(tmp_path / "a",))
    merged = json.loads((tmp_path / "b" / "result.json").read_text())
    assert merged["cells"] == found["cells"]
    assert merged["curve"]["kprior"]["curve"][-1] <= 1
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "config.json", "result.json", "versions.json", "log.txt"
    }  # fmt: skip

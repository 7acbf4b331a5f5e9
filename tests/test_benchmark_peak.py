"""The benchmark of flat peaks runs, and reads the peak of the process that learned."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import flat_peak
from benchmarks.flat_peak import Config

SMOKE = Config(examples=(64, 128), tasks=(1,), task_size=64, memory=20, batch=32)


def test_the_smoke_setting(tmp_path: Path) -> None:
    found = flat_peak.run(SMOKE, tmp_path, ["examples"])
    peaks = found["examples"]["peaks"]
    assert found["examples"]["points"] == [(1, 64), (1, 128)]
    assert found["examples"]["growth"] == max(peaks) / min(peaks) - 1
    middle = (max(peaks) + min(peaks)) / 2
    assert abs(found["examples"]["deviation"] - (max(peaks) / middle - 1)) < 1e-12
    assert min(peaks) > 50 * 2**20  # torch alone
    assert json.loads((tmp_path / "result.json").read_text())["examples"]["peaks"] == peaks


def test_a_point_is_learned_as_it_says() -> None:
    assert flat_peak.peak() > 0
    flat_peak.learn(2, 64, SMOKE)

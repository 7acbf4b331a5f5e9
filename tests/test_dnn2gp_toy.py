"""The toy of DNN2GP: its small setting runs, and its record holds what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import dnn2gp_toy

RECORDS = sorted((Path(dnn2gp_toy.__file__).parent / "results").glob("*_dnn2gp-toy*"))


def test_the_small_setting_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = dnn2gp_toy.main(["--smoke", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "result.json", "versions.json", "log.txt",
    }  # fmt: skip
    assert len(result["evidence"]["mean"]) == len(result["precisions"]) == 3
    assert "finished: evidence picks" in capsys.readouterr().out


def test_networks_trained_together_are_those_trained_alone() -> None:
    config = dnn2gp_toy.Config(width=3, steps=20)
    generator = torch.Generator().manual_seed(0)
    x, y = dnn2gp_toy.draw(10, generator)
    both = dnn2gp_toy.Networks(3, [1, 2])
    both.fit(x.expand(2, -1, -1), y.expand(2, -1, -1), torch.tensor([0.1, 3.0]).double(), config)
    alone = dnn2gp_toy.Networks(3, [2])
    alone.fit(x.unsqueeze(0), y.unsqueeze(0), torch.tensor([3.0]).double(), config)
    for name, value in alone.params.items():
        torch.testing.assert_close(value[0], both.params[name][1])


@pytest.mark.parametrize("folder", RECORDS, ids=lambda p: p.name)
def test_what_the_record_picks_is_in_its_curves(folder: Path) -> None:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    evidence, test = (torch.tensor(found[k]["mean"]) for k in ("evidence", "test_loss"))
    grid = found["precisions"]
    assert found["evidence_picks"] == grid[int(evidence.argmax())]
    assert found["test_picks"] == grid[int(test.argmin())]
    assert found["factor"] == pytest.approx(found["evidence_picks"] / found["test_picks"])

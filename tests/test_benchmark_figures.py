"""What the figures and the cost of steps are made from, in smoke settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lifelong.presets import PRESETS

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parent.parent))  # however pytest was started
from benchmarks import fromp_toy, memorable, record_pictures, step_cost


def test_cost_of_steps(tmp_path: Path) -> None:
    tiny = {"tasks": 1, "memory": 4, "examples": 12, "next": 12, "batch": 4, "epochs": 1}
    methods = ("experience_replay", "si", "fromp")
    config = step_cost.Config(("mlp",), ("batch", "task"), methods, seconds=0, **tiny)  # type: ignore[arg-type]
    result = step_cost.run(config, tmp_path)
    assert list(result) == ["mlp, batch", "mlp, task"]
    for rows in result.values():
        found = {row["method"]: row for row in rows}
        assert set(found) == set(methods)
        assert found["experience_replay"]["ratio"] == 1
        assert all(row["ratio"] > 0 and row["rounds"] >= 3 for row in rows)
    again = step_cost.run(
        step_cost.Config(
            ("mlp",),
            ("batch",),
            ("experience_replay", "lwf"),
            seconds=0,
            **tiny,  # type: ignore[arg-type]
        ),
        tmp_path,
    )
    assert {row["method"] for row in again["mlp, batch"]} == {*methods, "lwf"}
    assert again["mlp, task"] == result["mlp, task"]
    lines = step_cost.table({"mlp, batch": [{"method": "a", "ratio": 1.6}]}).splitlines()
    assert lines[-1] == "| a | **1.60** |"


def test_every_preset_has_its_cost_measured() -> None:
    assert {preset for preset, _ in step_cost.METHODS.values()} | {"joint", "separate"} == set(
        PRESETS
    )


def test_toy_of_fromp(tmp_path: Path) -> None:
    tiny = fromp_toy.Config(num_per_class=20, epochs=1, memory=4, columns=7, rows=5)
    result = fromp_toy.run(tiny, tmp_path)
    assert set(result) == {"fromp", "finetune"}
    with np.load(tmp_path / "regions.npz") as arrays:
        assert arrays["fromp"].shape == arrays["finetune"].shape == (5, 5, 7)
        assert arrays["memorable"].shape == (20, 2)
    figure = record_pictures.boundaries(tmp_path)
    assert len(figure.axes) == 10
    json.loads((tmp_path / "result.json").read_text())


def test_memorable(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from noise import write

    data = write(tmp_path)
    tiny = memorable.Config(("mnist",), epochs=1, k=2, examples=40)
    result = memorable.run(tiny, data, tmp_path / "record")
    for sides in result["mnist"]["chosen"].values():
        high, low = ([e["score"] for e in sides[side]] for side in ("most", "least"))
        assert high == sorted(high, reverse=True)
        assert low == sorted(low)
        assert min(high) >= max(low)
    (figure,) = record_pictures.memorable(tmp_path / "record", data).values()
    assert "digits" in figure.axes[0].get_title(loc="left")


def test_extremes_are_those_of_each_class() -> None:
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.0])
    found = memorable.extremes(scores, torch.tensor([0, 0, 0, 1, 1]), 1)
    assert found == {"0": {"most": [1], "least": [0]}, "1": {"most": [3], "least": [4]}}

"""What the figures and the cost of steps are made from, in smoke settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lifelong.bench.record import over_seeds
from lifelong.bench.table import Goal, Method, Table
from lifelong.presets import PRESETS

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parent.parent))  # however pytest was started
from benchmarks import (
    fromp_toy,
    memorable,
    prior_page,
    record_pictures,
    step_cost,
    stream_pages,
)


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


def record(folder: Path, **rows: tuple[int, dict[int, float]]) -> Path:
    """A record of a table with these rows: (memory, seed -> accuracy)."""
    made = [
        {
            "method": name.replace("_is_", ": "),
            "memory": memory,
            "seeds": list(values),
            "accuracy": over_seeds(list(values.values())),
        }
        for name, (memory, values) in rows.items()
    ]
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"rows": made}))
    return folder


def table_of(name: str, *methods: Method, goals: tuple[Goal, ...] = ()) -> Table:
    return Table(name, name, methods, (4,), run=lambda *_: {}, goals=goals)


def test_page_shows_the_presets_at_the_memories_of_the_goals(tmp_path: Path) -> None:
    table = table_of(
        "t", Method("ewc", "ewc"), Method("kprior", "kprior"), goals=(Goal("kprior", 4),)
    )
    none = table_of("none", Method("kprior", "kprior"))
    folder = record(tmp_path / "d_t", ewc=(0, {0: 0.5}), kprior=(4, {0: 0.6, 1: 0.8}))
    lines = prior_page.overview([table, none], {"t": folder}, "..").splitlines()
    assert lines == [
        "| preset | [t](../d_t), 4 a task |",
        "|---|---:|",
        "| `ewc` | 50.00 |",
        "| `kprior` | 70.00 ± 10.00 |",
    ]
    assert prior_page.overview([table], {}, "..").splitlines()[-1] == "| `kprior` |  |"


def test_page_pairs_the_changes_by_seed(tmp_path: Path) -> None:
    table = table_of(
        "ablation-t",
        Method("as recommended", "kprior"),
        Method("part: other", "kprior", {"soft": 2.0}),
        Method("part: undone", "kprior", {"soft": 3.0}),
    )
    folder = record(
        tmp_path / "d",
        **{
            "as recommended": (4, {0: 0.5, 1: 0.7, 2: 0.9}),
            "part_is_other": (4, {1: 0.71, 2: 0.93}),
        },
    )
    lines = prior_page.ablation([table], {"ablation-t": folder}, "..").splitlines()
    assert lines[2:] == [
        "| as recommended | 70.00 % |",
        "| part: other | +2.00 ± 1.00 |",
        "| part: undone |  |",
    ]


def test_page_shows_the_newest_cost(tmp_path: Path) -> None:
    assert prior_page.cost(tmp_path, "..") == "No record yet."
    folder = tmp_path / "2026-01-01_step-cost"
    folder.mkdir()
    found = {"mlp, batch": [{"method": "ewc", "ratio": 0.5}]}
    (folder / "result.json").write_text(json.dumps(found))
    (folder / "config.json").write_text(json.dumps({"memory": 4, "tasks": 5, "bar": 1.5}))
    text = prior_page.cost(tmp_path, "..")
    assert "| ewc | 0.50 |" in text
    assert "[Record](../2026-01-01_step-cost)" in text


def row_of(method: str, memory: int, accuracy: list[float], **numbers: float) -> dict[str, Any]:
    """A row of a record."""
    of = {name: {"mean": value} for name, value in numbers.items()}
    seeds = list(range(len(accuracy)))
    return {
        "method": method,
        "memory": memory,
        "seeds": seeds,
        "accuracy": over_seeds(accuracy),
    } | of


def test_seen_once_has_every_row_at_the_memory_of_the_goal_best_first(tmp_path: Path) -> None:
    kept = {"memory_examples": 6, "memory_bytes": 2.5e6}
    rows = [
        row_of("finetune", 0, [0.1], memory_examples=0, memory_bytes=0),
        row_of("kprior", 4, [0.6, 0.8], **kept, forgetting=0.123),
        row_of("kprior", 8, [0.9], **kept),
        {"method": "derpp", "memory": 4, "seeds": [], "failed": [{"seed": 0, "error": "no"}]},
    ]
    (tmp_path / "result.json").write_text(json.dumps({"rows": rows}))
    table = table_of("t", Method("kprior", "kprior"), goals=(Goal("kprior", 4),))
    assert stream_pages.seen_once(table, tmp_path, 3, "texts").splitlines() == [
        "| method | texts of each class | accuracy, % | forgetting | kept, MB | seeds |",
        "|---|---:|---:|---:|---:|---:|",
        "| K-prior, N/M | 2 | 70.00 ± 10.00 | 12.3 | 2.5 | 2 |",
        "| nothing kept | 0 | 10.00 |  | 0.0 | 1 |",
    ]
    assert stream_pages.seen_once(table, None, 3, "texts") == "No record yet."


def test_task_free_has_a_contestant_s_two_rows_beside_each_other(tmp_path: Path) -> None:
    rest = {"accuracy_rest": over_seeds([0.25])}
    rows = [row_of("tree", 0, [0.5]) | rest, row_of("tree, past labels", 0, [0.5, 0.7]) | rest]
    (tmp_path / "result.json").write_text(
        json.dumps({"rows": [*rows, row_of("last", 0, [1]) | rest]})
    )
    assert stream_pages.task_free(tmp_path).splitlines()[2:] == [
        "| tree | 50.00 | 25.00 | 1 | 60.00 ± 10.00 | 25.00 | 2 |",
        "| last | 100.00 | 25.00 | 1 |  |  |  |",
    ]
    assert stream_pages.task_free(None) == "No record yet."

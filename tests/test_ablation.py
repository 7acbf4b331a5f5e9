"""The ablation: each row is the base with one part changed, on held-out training data."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from lifelong import Categorical, Examples, Task, TaskStream
from lifelong.bench import streams
from lifelong.bench.table import Context
from lifelong.bench.tables import ablation
from lifelong.bench.tables.ablation import BASE, PARTS, TABLES, Ablation, methods
from lifelong.presets import PRESETS


def test_each_row_is_the_base_with_one_part_changed() -> None:
    run = TABLES[0].run
    base = PRESETS[BASE](Categorical(), memory=7)
    rows = [m for m in TABLES[0].methods if m.preset == BASE]
    assert rows[0].settings == {}
    for row in rows:
        prior = run.prior_of(row, 7, 5)
        different = {
            f.name: getattr(prior.recipe, f.name)
            for f in fields(base.recipe)
            if getattr(prior.recipe, f.name) != getattr(base.recipe, f.name)
        }
        assert different.items() <= dict(row.settings).items()
        assert bool(different) == bool(row.settings)
        assert prior.terms == base.terms


def test_every_part_is_a_row_or_in_the_base() -> None:
    base = PRESETS[BASE](Categorical(), memory=1).recipe
    rows = {m.name for m in methods()}
    for name, changed in PARTS.items():
        assert (name in rows) != all(getattr(base, k) == v for k, v in changed.items())


@pytest.mark.parametrize("preset", ["kprior", "experience_replay"])
def test_without_a_curvature_nothing_of_it_is_changed(preset: str) -> None:
    names = [m.name for m in methods(preset)]
    assert not any(n.startswith(("estimator", "strength")) for n in names)
    assert "curvature: diagonal" in names


def test_yardsticks_keep_their_own_recipes() -> None:
    run = TABLES[0].run
    assert run.prior_of(TABLES[0].method("finetune"), 0, 5).recipe.name == "finetune"


def test_the_test_data_take_no_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = torch.arange(120.0)
    train, test = Examples(x.view(-1, 1), x.long() % 2), Examples(-1 - x.view(-1, 1), x.long() % 2)
    tasks = tuple(Task(i, f"{i}", train, test) for i in range(2))
    stream = TaskStream("s", tasks, 2, "domain")
    monkeypatch.setattr(streams, "loaded", lambda *_: stream)
    run = Ablation("split-mnist", "domain", ablation._TRAINING, examples=60)
    for task in run.stream(Context(tmp_path, tmp_path)):
        kept, out = (part.batch(slice(None)).inputs for part in (task.train, task.test))
        assert (len(kept), len(out)) == (50, 10)
        assert len(torch.cat([kept, out]).unique()) == 60  # type: ignore[arg-type]
        assert float(out.min()) >= 0  # type: ignore[union-attr]

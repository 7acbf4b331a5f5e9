"""The K-priors experiments: exact where they must be, whole and resumable records."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from torch import nn

from lifelong import Categorical, Examples, identify
from lifelong.models import parameters

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import adaptation

    return adaptation


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in parameters(model).values()])


def test_smoke_and_resume(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--out", str(tmp_path), "--sets", "digits-linear", "digits-mlp"]
    bench.main(arguments)
    names = {"config.json", "result.json", "versions.json", "log.txt", "cells.jsonl", "tables.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    cells, result = (tmp_path / "cells.jsonl").read_text(), (tmp_path / "result.json").read_text()
    found = json.loads(result)
    assert set(found) == {"digits-linear", "digits-mlp"}
    for changes in found.values():
        assert set(changes) == {"add", "remove", "regulariser", "model"}
        for change in changes.values():
            assert {"batch", "anchor", "K-prior", "replay"} <= set(change["accuracy"])
            assert any("points above replay" not in bar for bar in change["bars"])
    # Cut off in the middle: what is missing comes out as it was, but for the seconds.
    kept = cells.splitlines()[:30]
    (tmp_path / "cells.jsonl").write_text("\n".join(kept) + "\n")
    bench.main(arguments)
    assert (tmp_path / "cells.jsonl").read_text().splitlines()[:30] == kept
    assert json.loads((tmp_path / "result.json").read_text()) == found
    before = (tmp_path / "cells.jsonl").read_text()
    bench.main(arguments)
    assert (tmp_path / "cells.jsonl").read_text() == before
    assert "begins: digits-linear" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["add", "remove", "regulariser"])
def test_full_memory_is_batch(bench: Any, kind: str) -> None:
    chosen = bench.SETS["digits-linear"]
    change = chosen.make("digits", None, 200, 100, 0)[kind]
    solver = change.solvers["newton"]
    task = bench.begin(change, solver, 0)
    models = []
    lines = ["batch", "K-prior", "K-prior, G of the rest"]
    lines += ["K-prior" + bench.KEPT] if kind == "remove" else []
    for method in lines:
        cell = bench.Cell("digits-linear", kind, method, 1.0, "newton", 0)
        models.append(flat(bench.train(cell, task, solver, bench.Trace())))
    anchor = flat(task.base)
    for weights in models[1:]:
        assert (weights - models[0]).norm() < 1e-6 * models[0].norm()
        assert (weights - anchor).norm() > 1e-3 * models[0].norm()


def test_quadratic_is_linear_in_the_products(bench: Any) -> None:
    from benchmarks.adaptation_sets import Quadratic

    torch.manual_seed(0)
    x = torch.cat([torch.ones(5, 1), torch.randn(5, 3)], dim=1).double()
    model = Quadratic(4, 2).double()
    pairs = list(combinations_with_replacement(range(4), 2))
    products = torch.stack([x[:, i] * x[:, j] for i, j in pairs], dim=1)
    torch.testing.assert_close(model(x), products @ model.weight.T)
    assert torch.equal(products[:, :4], x)  # so that the first weights are those of the linear one


def test_sampled_weights_are_unbiased(bench: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    data = Examples(3 * torch.randn(60, 3), torch.arange(60) % 2)
    values = torch.randn(60)
    score = identify(model, data, Categorical(), score="lambda")
    share = score / score.sum() + 1 / 60
    sums, counts = [], torch.zeros(60)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        items = bench.sampled(model, data, 20, generator)
        assert len(items) == 20
        sums.append(float(items.soft_weight @ values[items.origin]))
        counts[items.origin] += 1 / 500
    sums = torch.tensor(sums)
    assert abs(sums.mean() - values.sum()) < 4 * sums.std() / 500**0.5
    assert torch.corrcoef(torch.stack([counts, share]))[0, 1] > 0.98


def test_traces(bench: Any) -> None:
    trace = bench.Trace(lambda model: 0.0)
    trace.gradients, trace.accuracy = [0, 10, 20, 30, 40], [0.1, 0.9, 0.5, 0.8, 0.9]
    assert trace.first(0.8) == 10
    assert trace.settled(0.8) == 30
    assert trace.settled(0.1) == 0
    assert trace.first(0.95) is None
    assert trace.settled(0.95) is None
    assert bench.Trace().first(0.0) is None

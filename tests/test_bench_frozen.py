"""The tables on frozen features: their splits, what stands behind their rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal

from lifelong import Categorical, Regulariser, embeddings, presets
from lifelong.bench.table import Cell, Context
from lifelong.bench.tables import frozen
from lifelong.bench.tables.frozen import FrozenRun, Split, by_squares, in_a_row, jointly, synthetic


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "cache", tmp_path / "work", tmp_path, smoke=True)


@pytest.fixture
def split(context: Context) -> Split:
    return synthetic(context, False)


def last(states):
    return list(states)[-1]


exactly = FrozenRun("synthetic", tolerance=1e-5)._solve


def run(method: str, memory: int, seed: int, context: Context) -> dict:
    table = frozen.ANIMALS.tiny()
    return table.run(table, Cell("animals", method, memory, seed), context)


# Regression ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_regression_in_a_row_is_joint_regression(split, order):
    row = last(by_squares(split, [split.task(t) for t in order]))
    together = last(by_squares(split, [split.task(0, 1, 2)]))
    torch.testing.assert_close(row.model.weight, together.model.weight, rtol=1e-3, atol=1e-5)
    assert row.kept.regulariser.precision == pytest.approx(together.kept.regulariser.precision)


def test_regression_is_at_the_minimum_of_the_squares(split):
    state = last(by_squares(split, [split.task(t) for t in range(3)]))
    X = torch.cat([split.train.inputs, torch.ones(len(split.train), 1)], 1).double()
    Y = torch.nn.functional.one_hot(split.train.labels, 6).double()
    delta = state.kept.regulariser.precision
    theta = torch.linalg.solve(X.T @ X + delta * torch.eye(9, dtype=torch.float64), X.T @ Y)
    found = torch.cat([state.model.weight, state.model.bias.unsqueeze(1)], 1)
    torch.testing.assert_close(found.double(), theta.T, rtol=1e-3, atol=1e-5)


def test_the_precision_is_that_of_the_largest_evidence(split):
    """Beside the density of Y itself, N(0, s² (I + X Xᵀ / delta)) for each output."""
    state = last(by_squares(split, [split.task(t) for t in range(3)]))
    X = torch.cat([split.train.inputs, torch.ones(len(split.train), 1)], 1).double()
    Y = torch.nn.functional.one_hot(split.train.labels, 6).double()

    def evidence(delta: float) -> float:
        K = torch.eye(len(X), dtype=torch.float64) + X @ X.T / delta
        noise = float((Y * torch.linalg.solve(K, Y)).sum()) / Y.numel()  # the best variance
        zero = torch.zeros(len(X), dtype=torch.float64)
        return float(MultivariateNormal(zero, noise * K).log_prob(Y.T).sum())

    found = state.kept.regulariser.precision
    step = 10 ** (1 / 8)
    assert evidence(found) >= max(evidence(found * step), evidence(found / step))


def test_regression_costs_the_same_after_any_number_of_tasks(split):
    sizes = [state.kept.num_bytes for state in by_squares(split, [split.task(t) for t in range(3)])]
    assert len(set(sizes)) == 1


def test_evidence_needs_data(split):
    prior = presets.online_laplace(Categorical(), structure="kronecker")
    with pytest.raises(ValueError, match="update it first"):
        frozen.most_evident(frozen.head(split), prior)


def test_joint_regression_ends_where_regression_does(context):
    together, row = (run(m, 0, 3, context) for m in ("joint_regression", "regression"))
    assert together["accuracy"] == row["accuracy"]
    assert together["memory_examples"] == 240
    assert row["memory_examples"] == 0


# Softmax ------------------------------------------------------------------------------------------


def test_everything_kept_is_joint_training(split):
    generator = torch.Generator().manual_seed(0)
    prior = frozen.make_prior("kprior", {}, 80)
    row = last(in_a_row(split, [2, 0, 1], prior, exactly, generator))
    together = last(jointly(split, [[2, 0, 1]], frozen.PRECISION, exactly))
    torch.testing.assert_close(row.model.weight, together.model.weight, rtol=1e-2, atol=1e-2)
    assert len(together.kept) == 240


def test_rows_have_the_precision_once():
    kprior = frozen.make_prior("kprior", {"precision": 2.0}, 5, 0.1)
    replay = frozen.make_prior("experience_replay", {}, 5, 0.1)
    for prior, precision in ((kprior, 2.0), (replay, 0.1)):
        found = [t.precision for t in prior.terms if isinstance(t, Regulariser)]
        assert found == [precision]
    assert replay.recipe.memory == 5
    assert not replay.recipe.total
    with pytest.raises(TypeError):
        frozen.make_prior("kprior", {"no_such_setting": 1}, 5)


def test_a_seed_decides_the_order_and_what_is_kept(context):
    first, same, other = (run("kprior", 2, seed, context) for seed in (0, 0, 1))
    assert first["memory_origins"] == same["memory_origins"]
    assert first["accuracy"] == same["accuracy"]
    assert first["memory_origins"] != other["memory_origins"]


def test_what_a_cell_holds(context):
    told = []
    found = run("gradient_reconstruction", 4, 0, replace(context, report=told.append))
    assert found["memory_examples"] == 12
    assert len(found["matrix"]) == 3
    assert found["matrix"][0][1:] == [None, None]
    assert sorted(found["order"]) == [0, 1, 2]
    assert math.isclose(found["accuracy"], sum(found["matrix"][-1]) / 3)
    assert told == [1 / 3, 2 / 3, 1.0]


def test_joint_training_is_repeated_after_every_task_where_a_curve_is_wanted(context):
    table = frozen.ANIMALS.tiny()
    last_only = replace(table, run=replace(table.run, curve=False))
    for method in ("joint", "joint_regression"):
        cell = Cell("animals", method, 0, 0)
        every, once = (t.run(t, cell, context) for t in (table, last_only))
        assert once["matrix"][:-1] == [[None] * 3] * 2
        assert None not in [every["matrix"][i][j] for i in range(3) for j in range(i + 1)]
        assert every["matrix"][-1] == once["matrix"][-1]


def test_no_tasks_raise(split):
    with pytest.raises(ValueError, match="no task"):
        frozen.measured(iter(()), split, [0], lambda fraction: None)


# Splits -------------------------------------------------------------------------------------------


def write_animals(folder: Path, classes: int = 6) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    labels = [c for c in range(classes) for _ in range(30)]
    images = [{"bytes": f"{i}".encode(), "path": ""} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels})
    pyarrow.parquet.write_table(table, folder / "caltech101_animals30.parquet")


def test_animals_are_tested_on_the_last_photos(context, tmp_path, monkeypatch):
    write_animals(tmp_path)
    asked = []

    def features(contents):
        asked.append(len(contents))
        return torch.tensor([[float(c)] for c in contents])

    monkeypatch.setattr(embeddings, "image_features", features)
    split, chosen = frozen.animals(context, False), frozen.animals(context, True)
    assert asked == [180]  # made once
    assert split.groups == ((0, 1, 2), (3, 4, 5))
    assert (len(split.train), len(split.test)) == (6 * 22, 6 * 8)
    assert set(split.test.inputs.flatten().long().tolist()) == {
        30 * c + i for c in range(6) for i in range(22, 30)
    }
    # What settings are chosen by is neither learned from nor of the test.
    assert (len(chosen.train), len(chosen.test)) == (6 * 17, 6 * 5)
    test = set(split.test.ids.tolist())
    assert not test & {*chosen.train.ids.tolist(), *chosen.test.ids.tolist()}
    assert not {*chosen.train.ids.tolist()} & {*chosen.test.ids.tolist()}


def test_clinc150_has_a_task_for_each_domain(context, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for split, count in (("train", 4), ("val", 1), ("test", 2)):
        labels = [c for c in range(6) for _ in range(count)]
        domains = ["bank" if c in (0, 3, 5) else "auto" for c in labels]
        texts = [f"{split} {c}" for c in labels]
        table = pa.table({"text": texts, "label": labels, "domain": domains})
        pyarrow.parquet.write_table(table, tmp_path / f"clinc150-{split}.parquet")
    monkeypatch.setattr(embeddings, "text_features", lambda texts: torch.zeros(len(texts), 2))
    found = frozen.clinc150(context, False)
    assert found.groups == ((1, 2, 4), (0, 3, 5))
    assert (len(found.train), len(found.test)) == (24, 12)
    assert len(frozen.clinc150(context, True).test) == 6
    assert len(found.task(1)) == 12


def test_data_that_are_not_there_say_so(context, tmp_path):
    with pytest.raises(FileNotFoundError, match="caltech101_animals30"):
        frozen.animals(context, False)
    with pytest.raises(ValueError, match="--data"):
        frozen.animals(replace(context, data=None), False)


def test_tables_are_of_their_sources():
    assert {t.run.source for t in frozen.TABLES} == {t.name for t in frozen.TABLES}
    assert FrozenRun("animals").source in frozen.SOURCES
    # One, two and five of each class.
    assert [m // 3 for m in frozen.ANIMALS.memories] == [1, 2, 5]
    assert [m // 15 for m in frozen.CLINC150.memories] == [1, 2, 5]

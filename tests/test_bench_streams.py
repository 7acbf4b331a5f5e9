"""Cells that are a learner over a stream: shared first tasks, resuming, joint training, metrics."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from torch import nn
from torch.nn import functional as F

from lifelong import Categorical, Examples, Learner, Task, fromp
from lifelong.bench import record, streams
from lifelong.bench.execute import Place, next_cell
from lifelong.bench.streams import held_out, reduced, run_stream, union
from lifelong.bench.table import Cell, Context, Method, Table
from lifelong.benchmarks import benchmark
from lifelong.config import Training
from lifelong.metrics import evaluate
from lifelong.presets import PRESETS
from lifelong.streams import TaskStream, permuted, split_by_class

METHODS = (
    Method("finetune", "finetune"),
    Method("joint", "joint"),
    Method("separate", "separate"),
    Method("ewc", "ewc", {"strength": 100.0}),
    Method("si", "si"),
    Method("lwf", "lwf"),
    Method("fromp", "fromp"),
    Method("derpp", "derpp", training={"memory_batch_size": 8}),
    Method("decayed", "kprior", {"precision": 0.1, "memory": 6}),
)
TRAINING = Training(epochs=2, batch_size=64, lr=5e-3, schedule="one-cycle")
TABLE = Table("t", "T", METHODS, (10,), run_stream("split-digits", "class", TRAINING))
TASKS = replace(TABLE, run=run_stream("split-digits", "task", TRAINING))


def cell(
    table: Table, method: str, folder: Path, seed: int = 0, own: str = "", **how: Any
) -> dict[str, Any]:
    """The result but for its seconds; ``folder`` holds what is shared, and the cell's own."""
    place = folder / f"{method}-{seed}-{own}"
    place.mkdir(parents=True, exist_ok=True)
    memory = table.method(method).memories_of(table)[0]
    found = table.run(table, Cell("t", method, memory, seed), Context(folder, place, **how))
    assert found.pop("seconds") > 0
    if method != "joint":  # in one go
        steps = found.pop("step_seconds")
        assert len(steps) == len(found["matrix"])
        assert all(s > 0 for s in steps[1:])
        assert steps[0] is None or steps[0] > 0
    return record.without_nan(found)


def sharing(table: Table, share: bool) -> Table:
    return replace(table, run=replace(table.run, share=share))  # type: ignore[type-var]


@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_a_shared_first_task_changes_no_number(method: str, tmp_path: Path) -> None:
    cell(TABLE, "finetune", tmp_path, seed=0)  # so that it is there
    shared = cell(TABLE, method, tmp_path)
    assert cell(sharing(TABLE, False), method, tmp_path / "alone") == shared


def test_the_first_task_is_trained_once_for_a_seed_and_a_training(tmp_path: Path) -> None:
    def there() -> set[str]:
        return {p.name for p in tmp_path.glob("first-task-*")}

    for method in ("finetune", "ewc", "derpp", "separate"):
        cell(TABLE, method, tmp_path)
    assert len(there()) == 1
    cell(TABLE, "si", tmp_path)  # follows the path of the training
    cell(TABLE, "joint", tmp_path)
    cell(TABLE, "decayed", tmp_path)  # has a regulariser from the start
    assert len(there()) == 1
    cell(TABLE, "ewc", tmp_path, seed=1)
    assert len(there()) == 2
    faster = replace(TABLE, run=replace(TABLE.run, training=replace(TRAINING, lr=1e-3)))  # type: ignore[type-var]
    cell(faster, "ewc", tmp_path, seed=0, own="faster")
    assert len(there()) == 3


class StopError(Exception):
    pass


@pytest.mark.parametrize("method", ["finetune", "joint", "separate", "si", "fromp", "derpp"])
def test_a_cell_goes_on_at_any_epoch(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SAVE_EVERY", 0.0)
    whole = cell(TABLE, method, tmp_path / "whole")
    calls = 0

    def stop(fraction: float) -> None:
        nonlocal calls
        calls += 1
        if calls % (2 if method == "joint" else 3) == 0:
            raise StopError

    stops = 0
    while stops < 20:
        try:
            found = cell(TABLE, method, tmp_path / "parts", report=stop)
            break
        except StopError:
            stops += 1
    assert stops >= (1 if method == "joint" else 3)
    assert found == whole


def test_it_saves_no_more_than_every_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    save = Learner.save
    monkeypatch.setattr(Learner, "save", lambda self, path: saved.append(path) or save(self, path))
    cell(sharing(TABLE, False), "ewc", tmp_path)
    assert len(saved) == 2  # as it begins, and as it ends


# Streams ------------------------------------------------------------------------------------------


def digits(scenario: Any = "class") -> TaskStream:
    return benchmark("split-digits").make_stream(None, scenario)


def test_held_out_is_a_part_of_the_training_data() -> None:
    stream = digits("task")
    for old, new in zip(stream, held_out(stream, 0.25), strict=True):
        assert new.test is not None
        both = torch.cat([new.train.ids, new.test.ids])
        assert torch.equal(both.sort().values, old.train.ids.sort().values)
        assert len(new.test) == round(0.25 * len(old))
        assert new.head == old.head == new.test.head
    again = held_out(stream, 0.25)
    assert torch.equal(again[0].train.ids, held_out(stream, 0.25)[0].train.ids)
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            held_out(stream, fraction)
    with pytest.raises(ValueError, match="one part empty"):
        held_out(reduced(stream, 3), 0.01)


def test_permuted_tasks_share_what_is_held_out_and_copy_it_once() -> None:
    x, y = torch.randn(20, 6), torch.arange(20) % 2
    stream = held_out(permuted((x, y), (x, y), num_tasks=3), 0.2)
    first, second, _ = stream
    assert first.train.inputs is second.train.inputs
    assert first.test is not None
    assert second.test is not None
    order = second.train.transform.permutation  # type: ignore[union-attr]
    plain, turned = (t.batch(slice(None)).inputs for t in (first.test, second.test))
    assert torch.equal(plain[:, order], turned)  # type: ignore[index]


def test_reduced_keeps_some_examples_always_the_same() -> None:
    small = reduced(digits(), 7)
    assert [(len(t.train), len(t.test or ())) for t in small] == [(7, 7)] * 5
    assert torch.equal(small[2].train.ids, reduced(digits(), 7)[2].train.ids)


def test_the_union_reads_each_example_as_its_task_does() -> None:
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    stream = permuted((x, y), (x, y), num_tasks=3)
    whole = union(stream).train
    assert len(whole) == 27
    index = torch.randperm(27)[:11]
    batch = whole.batch(index)
    for row, label, place in zip(batch.inputs, batch.labels, index.tolist(), strict=True):
        task, position = divmod(place, 9)
        own = stream[task].train.batch(slice(position, position + 1))
        assert torch.equal(row, own.inputs[0])  # type: ignore[index]
        assert label == own.labels[0]


def test_joint_training_of_heads_is_under_each_examples_own_head() -> None:
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 4
    stream = split_by_class((x, y), (x, y), classes_per_task=2, scenario="task", num_outputs=5)
    f = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    likelihood = streams._labels_heads(stream)
    heads = [(0, 1) if label < 2 else (2, 3) for label in y.tolist()]
    slow = torch.stack([
        -F.log_softmax(f[i, list(head)], 0)[head.index(int(y[i]))] for i, head in enumerate(heads)
    ])  # fmt: skip
    torch.testing.assert_close(likelihood.nll(f, y), slow, rtol=0, atol=1e-12)
    free = split_by_class((x, y), (x, y), classes_per_task=2, scenario="class")
    assert type(streams._labels_heads(free)) is Categorical


def test_a_decoded_stream_is_kept_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(data: Path | None, scenario: Any) -> TaskStream:
        made.append(digits(scenario))
        return made[-1]

    needy = replace(benchmark("split-digits"), make_stream=make, needs_data=True)
    monkeypatch.setattr(streams, "benchmark", lambda name: needy)
    for scenario in ("class", "task"):
        first = streams.loaded("x", scenario, tmp_path, tmp_path)
        streams.loaded.cache_clear()
        again = streams.loaded("x", scenario, tmp_path, tmp_path)
        streams.loaded.cache_clear()
        assert made == [*made[:-1], first]
        assert (again.name, again.num_outputs, again.scenario) == (
            first.name, first.num_outputs, first.scenario,
        )  # fmt: skip
        for old, new in zip(first, again, strict=True):
            assert (old.index, old.name, old.head) == (new.index, new.name, new.head)
            assert old.test is not None
            assert new.test is not None
            for a, b in ((old.train, new.train), (old.test, new.test)):
                assert torch.equal(a.inputs, b.inputs)  # type: ignore[arg-type]
                assert torch.equal(a.labels, b.labels)
                assert torch.equal(a.ids, b.ids)
    assert len(made) == 2
    turned = permuted((torch.randn(4, 3), torch.arange(4) % 2), num_tasks=2)
    assert streams._stream_state(turned) is None  # it has transforms
    monkeypatch.setattr(streams, "LARGEST_KEPT", 10)
    assert streams._stream_state(digits()) is None


# What is measured ---------------------------------------------------------------------------------


def test_what_a_cell_tells(tmp_path: Path) -> None:
    found = cell(TABLE, "fromp", tmp_path)
    matrix = found["matrix"]
    assert [[a is not None for a in row] for row in matrix] == [
        [i <= t + 1 for i in range(5)] for t in range(5)
    ]  # one ahead
    assert found["accuracy"] == pytest.approx(sum(matrix[-1]) / 5)
    ahead = [matrix[i - 1][i] - found["untrained"][i] for i in range(1, 5)]
    assert found["zero_shot_transfer"] == pytest.approx(sum(ahead) / 4)
    assert found["nll"] == pytest.approx(sum(found["nll_per_task"]) / 5)
    assert len(found["ece_per_task"]) == 5
    assert found["memory_examples"] == 50
    stream = digits()
    # Twice through each task, and in each step of later ones all that is remembered.
    new = 2 * sum(map(len, stream))
    old = sum(2 * -(-len(task) // 64) * 10 * t for t, task in enumerate(stream))
    assert found["gradients"] == new + old
    few = cell(TABLE, "derpp", tmp_path)
    old = sum(2 * -(-len(task) // 64) * 8 for task in stream[1:])
    assert few["gradients"] == new + old
    assert few["memory_examples"] == 50  # in total, of which 10 a task


def test_joint_is_trained_once_on_everything(tmp_path: Path) -> None:
    for table in (TABLE, TASKS):
        found = cell(table, "joint", tmp_path / table.run.scenario)  # type: ignore[attr-defined]
        total = sum(map(len, digits()))
        assert found["gradients"] == 2 * total
        assert found["memory_examples"] == total
        assert found["memory_bytes"] == total * (64 * 4 + 8)
        assert all(a is None for row in found["matrix"][:-1] for a in row)
        assert found["accuracy"] == pytest.approx(sum(found["matrix"][-1]) / 5)
        assert found["forgetting"] is None
        assert found["accuracy"] > 0.8


def test_separate_networks_answer_for_their_own_tasks(tmp_path: Path) -> None:
    found = cell(TABLE, "separate", tmp_path)
    assert found["forgetting"] == 0
    assert found["zero_shot_transfer"] is None
    assert found["nll"] < cell(TABLE, "finetune", tmp_path)["nll"]


def done(method: str, preset: str, seed: int, matrix: list[list[float | None]]) -> dict[str, Any]:
    """A cell's file."""
    return {
        "table": "t", "method": method, "memory": 0, "seed": seed, "status": "done",
        "error": None, "revision": "r", "definition": {"preset": preset},
        "result": {"accuracy": 0.5, "matrix": matrix},
    }  # fmt: skip


def test_transfer_and_intransigence_come_from_other_rows_of_the_seed() -> None:
    cells = [
        done("ewc", "ewc", 0, [[0.9, None], [0.5, 0.8]]),
        done("ewc", "ewc", 1, [[0.7, None], [0.5, 0.6]]),
        done("separate", "separate", 0, [[0.9, None], [0.9, 0.95]]),
        done("joint", "joint", 0, [[None, None], [0.96, 0.98]]),
    ]
    rows = {r["method"]: r for r in record.summarise(TABLE, cells)["rows"]}
    assert "learning_transfer" not in rows["ewc"]  # seed 1 has no reference yet
    cells.append(done("separate", "separate", 1, [[0.9, None], [0.8, 0.7]]))
    cells.append(done("joint", "joint", 1, [[None, None], [0.9, 0.9]]))
    rows = {r["method"]: r for r in record.summarise(TABLE, cells)["rows"]}
    # R[2, 2] - s_2; mean over tasks of joint_i - R[i, i].
    assert rows["ewc"]["learning_transfer"]["per_seed"] == pytest.approx([0.8 - 0.95, 0.6 - 0.7])
    assert rows["ewc"]["intransigence"]["per_seed"] == pytest.approx([0.12 / 1, 0.5 / 2])
    assert "intransigence" not in rows["joint"]  # it never learned the first task alone
    assert list(rows) == ["joint", "separate", "ewc"]  # the table's order


def test_results_are_those_of_a_plain_learner(tmp_path: Path) -> None:
    """The same numbers as a loop that knows of no bench."""
    stream = digits()
    torch.manual_seed(3)
    model = benchmark("split-digits").make_model(10)
    options = streams.learner_options(TRAINING)
    learner = Learner(model, fromp(Categorical(), memory=10), seed=3, **options)
    matrix = learner.run(stream)
    found = cell(TABLE, "fromp", tmp_path, seed=3)
    lower = [row[: t + 1] for t, row in enumerate(found["matrix"])]
    assert lower == [row[: t + 1] for t, row in enumerate(matrix.to_list())]
    tests = [task.test for task in stream if task.test is not None]
    assert found["nll_per_task"] == [evaluate(model, t, Categorical()).nll for t in tests]
    later = replace(TABLE, run=replace(TABLE.run, first_seed=3))  # type: ignore[type-var]
    assert cell(later, "fromp", tmp_path / "later") == found


def test_total_memories_get_their_share_of_each_task() -> None:
    assert streams.arguments("derpp", {}, 10, 5) == {"memory": 50}
    assert streams.arguments("derpp", {"total": False}, 10, 5) == {"total": False, "memory": 10}
    assert streams.arguments("fromp", {"strength": 2.0}, 10, 5) == {"strength": 2.0, "memory": 10}
    assert streams.arguments("kprior", {"memory": 3}, 10, 5) == {"memory": 3}
    assert streams.arguments("ewc", {"strength": 2.0}, 10, 5) == {"strength": 2.0}


def test_published_settings_are_what_the_benchmark_has() -> None:
    training = Training(epochs=5, batch_size=128, memory_batch_size=64, schedule="one-cycle")
    row = Method("fromp", "fromp", **streams.published("permuted-mnist", "fromp", training))
    settings = benchmark("permuted-mnist").settings("fromp")
    run = run_stream("permuted-mnist", "domain", training)
    assert run.training_of(row) == settings.training
    assert dict(row.settings) == dict(settings.prior)


def test_a_task_without_a_test_cannot_be_measured() -> None:
    data = Examples(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    learner = Learner(nn.Linear(2, 2), PRESETS["finetune"](Categorical()))
    with pytest.raises(ValueError, match="no test examples"):
        learner.test(Task(0, "a", data))


def test_cells_that_would_train_the_same_first_task_are_not_begun_together(tmp_path: Path) -> None:
    place = Place(TABLE, tmp_path, None, tmp_path, smoke=False)
    cells = {(c.method, c.seed): c for c in TABLE.cells(seeds=2)}
    running = [cells["finetune", 0]]
    waiting = [cells["ewc", 0], cells["fromp", 0], cells["si", 0], cells["ewc", 1]]
    assert next_cell(place, waiting, []) == cells["ewc", 0]
    assert next_cell(place, waiting, running) == cells["si", 0]
    assert next_cell(place, [*waiting[:2], waiting[3]], running) == cells["ewc", 1]
    assert next_cell(place, waiting[:2], running) is None
    assert next_cell(place, waiting, [cells["si", 0]]) == cells["ewc", 0]
    cell(TABLE, "finetune", tmp_path)
    assert next_cell(place, waiting, running) == cells["ewc", 0]
    # A row with settings that make no prior fails in its cell, not here.
    wrong = replace(TABLE, methods=(Method("wrong", "ewc", {"strngth": 1}),))
    assert next_cell(replace(place, table=wrong), list(wrong.cells(seeds=1)), []) is not None
    assert next_cell(replace(place, table=replace(TABLE, run=cell)), waiting, running) is not None


def test_seconds_of_the_tasks_outlive_a_write_that_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be read would fail its cell in every call that comes."""
    context = Context(tmp_path, tmp_path)
    streams._add_seconds(context, 0, 1.0)

    def full(handle: int) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not write"):
        streams._add_seconds(context, 1, 2.0)
    assert json.loads((tmp_path / streams._SECONDS).read_text()) == {"0": 1.0}

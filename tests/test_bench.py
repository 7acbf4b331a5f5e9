"""The engine behind ``lifelong bench``: cells, records, failures, resuming, time left."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported

from lifelong import cli, runs
from lifelong.bench import record
from lifelong.bench.execute import Running, Status, execute, seconds_left
from lifelong.bench.table import Cell, Context, Goal, Method, Table
from lifelong.bench.tables import table, tables
from lifelong.config import UsageError
from lifelong.errors import CheckpointError

Command = Callable[..., tuple[int, str, str]]


def toy(table: Table, cell: Cell, context: Context) -> dict[str, Any]:
    """Accuracies that are known; "breaks" fails, until a file says that it was mended."""
    context.report(0.5)
    if cell.method == "breaks" and not (context.cache / "mended").is_file():
        raise ValueError(f"no luck in {context.data}")
    if cell.method == "dies":
        os._exit(7)
    return {"accuracy": 0.5 + 0.1 * cell.seed + cell.memory / 1000, "nothing": math.nan, "n": 3}


TOY = Table(
    name="toy",
    title="Toy",
    methods=(
        Method("plain", "finetune"),
        Method("keeps, some", "kprior", {"precision": 0.1}),
        Method("own", "of the table's", memories=(1, 2)),
    ),
    memories=(4, 8),
    run=toy,
    seeds=3,
)
BREAKS = replace(TOY, methods=(Method("breaks", "finetune"), Method("plain", "finetune")))


def untimed(summary: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(summary, dict):
        timed = ("seconds", "wall_seconds", "cpu_seconds", "peak_memory", "resumed")
        return {k: untimed(v) for k, v in summary.items() if k not in timed}
    return [untimed(v) for v in summary] if isinstance(summary, list) else summary


# Tables -------------------------------------------------------------------------------------------


def test_cells_come_seed_by_seed() -> None:
    cells = [(c.method, c.memory, c.seed) for c in TOY.cells(seeds=2)]
    once = [("plain", 0), ("keeps, some", 4), ("keeps, some", 8), ("own", 1), ("own", 2)]
    assert cells == [(*row, seed) for seed in (0, 1) for row in once]
    chosen = TOY.cells(["own", "plain"], memories=[16], seeds=1)
    assert [(c.method, c.memory) for c in chosen] == [("own", 16), ("plain", 0)]


def test_tables_refuse_what_makes_no_table() -> None:
    with pytest.raises(ValueError, match="not unique"):
        replace(TOY, methods=(Method("a b", "ewc"), Method("a-b", "ewc")))
    with pytest.raises(ValueError, match="at least one method"):
        replace(TOY, methods=())
    with pytest.raises(ValueError, match="a goal of rows it lacks: \\['joint'\\]"):
        replace(TOY, goals=(Goal("plain", 0, 1.0, "below", ("joint",)),))
    with pytest.raises(UsageError, match="did you mean 'plain'"):
        TOY.method("plan")
    with pytest.raises(UsageError, match="did you mean 'split-mnist'"):
        table("split-mnits")
    with pytest.raises(UsageError, match="did you mean 'own'"):
        list(TOY.cells(["onw"]))


def test_the_registry_is_of_tables_that_can_be_sent_to_a_process() -> None:
    import pickle

    for name, item in tables().items():
        assert (name, item.name) == (item.name, name)
        again = pickle.loads(pickle.dumps(item))
        assert [again.definition(m.name) for m in again.methods] == [
            item.definition(m.name) for m in item.methods
        ]
        json.dumps([item.definition(m.name) for m in item.methods], allow_nan=False)


# Records ------------------------------------------------------------------------------------------


def test_a_record(tmp_path: Path) -> None:
    seen: list[Status] = []
    summary = execute(TOY, tmp_path / "out", jobs=0, watch=seen.append)
    rows = {(r["method"], r["memory"]): r for r in summary["rows"]}
    assert list(rows) == [
        ("plain", 0), ("keeps, some", 4), ("keeps, some", 8), ("own", 1), ("own", 2),
    ]  # fmt: skip
    accuracy = rows["keeps, some", 8]["accuracy"]
    assert accuracy["per_seed"] == pytest.approx([0.508, 0.608, 0.708])
    assert accuracy["mean"] == pytest.approx(0.608)
    assert accuracy["standard_error"] == pytest.approx(0.1 / math.sqrt(3))  # ddof 1
    assert rows["plain", 0]["n"]["mean"] == 3
    assert "nothing" not in rows["plain", 0]
    assert (seen[-1].done, seen[-1].total, seen[-1].failed, seen[-1].seconds_left) == (15, 15, 0, 0)
    names = {p.name for p in (tmp_path / "out").iterdir() if p.name != runs.LOCK}
    files = {"config.json", "versions.json", "machine.json", "result.json", "log.txt"}
    assert names == files | {"cells", "cache"}
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 15
    assert (tmp_path / "out" / "cells" / "keeps-some_8_seed-2.json").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["methods"]["own"]["memories"] == [1, 2]
    # The same call again computes nothing, and says the same.
    log = (tmp_path / "out" / "log.txt").read_text()
    assert execute(TOY, tmp_path / "out", jobs=0) == summary
    assert (tmp_path / "out" / "log.txt").read_text() == log


def test_other_methods_and_seeds_extend_a_record(tmp_path: Path) -> None:
    whole = execute(TOY, tmp_path / "whole", jobs=0)
    execute(TOY, tmp_path / "parts", methods=["own"], seeds=1, jobs=0)
    half = execute(TOY, tmp_path / "parts", methods=["plain"], jobs=0)
    assert [(r["method"], r["seeds"]) for r in half["rows"]] == [
        ("plain", [0, 1, 2]), ("own", [0]), ("own", [0]),
    ]  # fmt: skip
    assert untimed(execute(TOY, tmp_path / "parts", jobs=0)) == untimed(whole)


def test_one_seed_has_no_standard_error(tmp_path: Path) -> None:
    summary = execute(TOY, tmp_path, seeds=1, jobs=0)
    assert summary["rows"][0]["accuracy"]["standard_error"] is None


def test_a_changed_definition_is_refused_unless_it_is_done_anew(tmp_path: Path) -> None:
    execute(TOY, tmp_path, seeds=1, jobs=0)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json")}
    kprior = replace(TOY.methods[1], settings={"precision": 0.2})
    changed = replace(TOY, methods=(TOY.methods[0], kprior, TOY.methods[2]))
    with pytest.raises(UsageError) as error:
        execute(changed, tmp_path, seeds=1, jobs=0)
    assert "keeps, some: settings.precision 0.1 -> 0.2); put them back" in str(error.value)
    assert str(error.value).endswith('--redo "keeps, some"')
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.json")}
    with pytest.raises(UsageError, match="no method 'kprior'"):
        execute(changed, tmp_path, redo=["kprior"], jobs=0)
    execute(changed, tmp_path, seeds=1, jobs=0, redo=["keeps, some"])
    cell = json.loads((tmp_path / "cells" / "keeps-some_4_seed-0.json").read_text())
    assert cell["definition"]["settings"] == {"precision": 0.2}
    # What is no setting may change: notes, what a row is called tuned on.
    noted = replace(kprior, note="a note", tuned="published")
    execute(replace(changed, methods=(noted,)), tmp_path, seeds=1, jobs=0)


def test_a_setting_that_is_new_had_its_default() -> None:
    digits = table("split-digits")
    then = json.loads(json.dumps(digits.definition("ewc")))
    del then["setup"]["share"], then["setup"]["training"]["clip"]
    assert record.changes(digits, "ewc", then) == []
    then["setup"]["training"]["momentum"] = 0.5
    then["setup"]["gone"] = 1
    assert record.changes(digits, "ewc", then) == [
        "setup.training.momentum 0.5 -> 0.0", "setup.gone 1 -> unset",
    ]  # fmt: skip
    del then["setup"]["training"]["epochs"]  # of which this table does not have the default
    assert "setup.training.epochs 10 -> 15" in record.changes(digits, "ewc", then)


def test_a_preset_with_another_default_makes_another_row() -> None:
    digits = table("split-digits")
    definition = json.loads(json.dumps(digits.definition("recommended")))
    assert "memory" not in definition["recipe"]
    assert record.changes(digits, "recommended", definition) == []
    definition["recipe"]["equal_tasks"] = False
    assert record.changes(digits, "recommended", definition) == [
        "recipe.equal_tasks false -> true",
    ]  # fmt: skip
    del definition["recipe"]["equal_tasks"]  # a field that came later, one that went
    definition["recipe"]["gone"] = 1
    assert record.changes(digits, "recommended", definition) == []
    del definition["recipe"]  # of before there were any
    assert record.changes(digits, "recommended", definition) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b [1, 2] -> [1, 3]"]),
        ({"a": "x"}, {"c": None, "b": True}, ['a "x" -> unset', "b unset -> true"]),
    ],
)  # fmt: skip
def test_differences(old: Any, new: Any, told: list[str]) -> None:
    assert record.differences(old, new) == told


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        execute(TOY, tmp_path / "else", jobs=0)
    execute(TOY, tmp_path / "toy", seeds=1, jobs=0)
    with pytest.raises(UsageError, match="holds the table 'toy'"):
        execute(replace(TOY, name="other"), tmp_path / "toy", jobs=0)
    with pytest.raises(UsageError, match="holds the table 'toy'"):
        execute(TOY, tmp_path / "toy", jobs=0, smoke=True)
    config = tmp_path / "toy" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(UsageError, match="newer lifelong"):
        execute(TOY, tmp_path / "toy", jobs=0)
    config.write_text(json.dumps({"format": 1}))
    with pytest.raises(UsageError, match="another kind of run"):
        execute(TOY, tmp_path / "toy", jobs=0)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        execute(TOY, tmp_path / "toy", jobs=0)
    config.write_text(json.dumps(content))
    (tmp_path / "toy" / "cells" / "plain_0_seed-0.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        execute(TOY, tmp_path / "toy", jobs=0)


def test_a_record_names_no_folder_and_no_host(tmp_path: Path) -> None:
    import platform

    execute(BREAKS, tmp_path / "out", data=tmp_path / "data", seeds=1, jobs=0)
    written = "".join(p.read_text() for p in (tmp_path / "out").rglob("*.*") if p.is_file())
    assert "no luck in $LIFELONG_DATA" in written
    assert str(tmp_path) not in written
    assert platform.node() not in written


def test_two_calls_do_not_write_one_record(tmp_path: Path) -> None:
    with runs.claimed(tmp_path), pytest.raises(UsageError, match="another lifelong run"):
        execute(TOY, tmp_path, jobs=0)


# Failures -----------------------------------------------------------------------------------------


def test_a_cell_that_fails_stays_visible_and_is_tried_again(tmp_path: Path) -> None:
    summary = execute(BREAKS, tmp_path, seeds=1, jobs=0)
    broken, whole = summary["rows"]
    assert (broken["seeds"], whole["seeds"]) == ([], [0])
    assert broken["failed"][0]["seed"] == 0
    assert broken["failed"][0]["error"].startswith("ValueError: no luck in None (")
    assert "FAILED" in (tmp_path / "log.txt").read_text()
    (tmp_path / "cache" / "mended").touch()
    again = execute(BREAKS, tmp_path, seeds=1, jobs=0)
    assert [(r["seeds"], r["failed"]) for r in again["rows"]] == [([0], []), ([0], [])]


def test_an_accuracy_in_percent_is_a_failure(tmp_path: Path) -> None:
    summary = execute(replace(TOY, memories=(800,)), tmp_path, methods=["keeps, some"], jobs=0)
    assert "in [0, 1], got 1.3" in summary["rows"][0]["failed"][0]["error"]


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    """Also where one of them ends without a word."""
    methods = (*BREAKS.methods, Method("dies", "finetune"))
    both = replace(BREAKS, methods=methods, seeds=1)
    alone = execute(BREAKS, tmp_path / "one", seeds=1, jobs=0)["rows"]
    rows = execute(both, tmp_path / "two", jobs=3)["rows"]
    assert untimed(rows[:2]) == [{**r} for r in untimed(alone)]
    assert rows[1]["peak_memory"]["mean"] > 1e7
    assert rows[2]["failed"] == [{"seed": 0, "error": "its process ended with code 7"}]


def half(table: Table, cell: Cell, context: Context) -> dict[str, Any]:
    """Its first process leaves a checkpoint and no more."""
    if cell.seed == 1 and not any(context.folder.iterdir()):
        (context.folder / "checkpoint").touch()
        raise ValueError("ended")
    return {"accuracy": 0.5}


def test_a_cell_that_went_on_does_not_pass_for_one_that_took_less(tmp_path: Path) -> None:
    both = replace(TOY, methods=TOY.methods[:1], run=half, seeds=2)
    assert "cpu_seconds" in execute(both, tmp_path, jobs=1)["rows"][0]  # of the seed that is done
    row = execute(both, tmp_path, jobs=1)["rows"][0]
    assert row["seeds"] == [0, 1]
    assert "cpu_seconds" not in row
    assert "peak_memory" in row


def test_a_cell_goes_on_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    one = replace(TOY, methods=TOY.methods[:1], run=half, seeds=2)
    for data in ("here", "there"):  # the second does not find the first one's checkpoint
        row = execute(one, tmp_path / "out", data=tmp_path / data, jobs=0)["rows"][0]
        assert (row["seeds"], len(row["failed"])) == ([0], 1)
    row = execute(one, tmp_path / "out", data=tmp_path / "here", jobs=0)["rows"][0]
    assert row["seeds"] == [0, 1]


def test_versions_and_machine_are_of_a_call_that_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(TOY, tmp_path, seeds=1, jobs=0)
    files = [tmp_path / record.VERSIONS, tmp_path / record.MACHINE]
    before = [path.read_bytes() for path in files]
    monkeypatch.setattr(record, "machine", lambda: {"processor": "another"})
    monkeypatch.setattr(runs, "versions", lambda: {"torch": "another"})
    execute(TOY, tmp_path, seeds=1, jobs=0)
    assert [path.read_bytes() for path in files] == before
    execute(TOY, tmp_path, seeds=2, jobs=0)
    assert all("another" in path.read_text() for path in files)


def test_what_is_done_anew_has_no_number_meanwhile(tmp_path: Path) -> None:
    execute(TOY, tmp_path, seeds=1, jobs=0)

    def stop(status: Status) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(TOY, tmp_path, seeds=1, jobs=0, redo=["own"], watch=stop)
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"plain", "keeps, some"}


# Time left ----------------------------------------------------------------------------------------


def test_in_this_process_cells_come_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    asked: list[int] = []
    engine = importlib.import_module("lifelong.bench.execute")
    monkeypatch.setattr(engine, "seconds_left", lambda *args: asked.append(args[-1]))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    execute(TOY, tmp_path, seeds=1, jobs=0, watch=lambda status: None)
    assert set(asked) == {1}


A = [Cell("t", "a", 0, seed) for seed in range(4)]
B = [Cell("t", "b", 9, seed) for seed in range(4)]


def test_nothing_is_known_at_first() -> None:
    assert seconds_left(A, [], {}, 2) is None
    assert seconds_left(A[1:], [Running(A[0])], {}, 2) is None


def test_time_left_is_when_the_last_process_ends() -> None:
    known = {A[0]: 10.0, B[0]: 4.0}
    assert seconds_left([A[1]], [], known, 1) == 10
    assert seconds_left([A[1], B[1], B[2]], [], known, 1) == 18
    assert seconds_left([A[1], B[1], B[2]], [], known, 2) == 10  # 10 beside 4 + 4
    assert seconds_left([B[1], B[2], A[1]], [], known, 2) == 14  # in order: 4 + 10 beside 4
    assert seconds_left([], [], known, 2) == 0


def test_running_cells_tell_of_their_row() -> None:
    # A quarter in 5 seconds: 20 in all, of which 15 are left; then another like it.
    running = [Running(A[0], fraction=0.25, elapsed=5.0)]
    assert seconds_left([], running, {}, 1) == 15
    assert seconds_left([A[1]], running, {}, 1) == 35
    assert seconds_left([A[1]], running, {}, 2) == 20
    # Resumed at a half, it did a tenth in 3 seconds.
    resumed = [Running(A[0], fraction=0.6, began=0.5, elapsed=3.0)]
    assert seconds_left([], resumed, {}, 1) == pytest.approx(12)
    # Another memory of the method is a better guess than another method.
    other = Cell("t", "a", 7, 0)
    assert seconds_left([other], [], {A[0]: 10.0, B[0]: 4.0}, 1) == 10
    assert seconds_left([Cell("t", "c", 0, 0)], [], {A[0]: 10.0, B[0]: 4.0}, 1) == 7


# The command line ---------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """(exit code, standard output, standard error) of ``lifelong bench ...`` in this process."""
    monkeypatch.delenv("LIFELONG_DATA", raising=False)
    monkeypatch.setattr(
        "lifelong.bench.tables.tables", lambda: {"toy": TOY, "breaks": BREAKS_NAMED}
    )

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = cli.main(["bench", *(str(a) for a in args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


BREAKS_NAMED = replace(BREAKS, name="breaks", needs_data=True)


def test_without_a_name_it_lists_the_tables(command: Command) -> None:
    code, out, err = command()
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["table", "toy", "breaks"]
    told = json.loads(command("--json")[1])["tables"]
    assert [t["table"] for t in told] == ["toy", "breaks"]
    assert told[1]["needs_data"]
    assert told[0]["methods"] == [m.name for m in TOY.methods]


def test_a_table_from_the_command_line(command: Command, tmp_path: Path) -> None:
    args = ("toy", "--out", tmp_path / "out", "--jobs", "0", "--seeds", "2")
    code, out, err = command(*args, "--methods", "own", "plain")
    assert code == 0
    assert "5/6 own, memory 2, seed 1: accuracy 0.6020, 0.0 s" in err
    assert "55.20 ± 5.00" in out
    assert command(*args, "--json", "--quiet", "--memories", "4")[2] == ""
    code, out, err = command(*args, "--json", "--quiet")
    summary = json.loads(out)
    assert summary["out"] == str(tmp_path / "out")
    assert [len(row["seeds"]) for row in summary["rows"]] == [2] * 6  # own at 1, 2 and 4


def test_a_failure_is_told(command: Command, tmp_path: Path) -> None:
    args = ("breaks", "--out", tmp_path / "out", "--jobs", "0", "--seeds", "1", "--data", tmp_path)
    code, out, err = command(*args, "--redo=breaks")
    assert code == 1
    assert err.endswith(f"again with: lifelong bench {' '.join(map(str, args))}\n")
    code, out, err = command(*args, "--redo", "breaks")
    assert code == 1
    assert "breaks, seed 0: FAILED, ValueError: no luck in $LIFELONG_DATA" in err
    assert "0, 1 failed" in out
    assert command(*args, "--methods", "plain")[0] == 0  # which did not fail
    assert err.endswith(f"again with: lifelong bench {' '.join(map(str, args))}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tyo"], "no table 'tyo'; did you mean 'toy'?"),
        (["toy", "--methods", "pln"], "did you mean 'plain'?"),
        (["breaks"], "give --data DIR"),
        (["breaks", "--data", "nowhere"], "nowhere is no folder"),
        (["toy", "--seeds", "0"], "seeds must be at least 1"),
        (["toy", "--jobs", "-1"], "jobs must be at least 0"),
        (["toy", "--memories", "0"], "memories must be at least 1"),
        (["--seeds", "3"], "which table?"),
    ],
)
def test_mistakes_say_what_is_right(
    command: Command, tmp_path: Path, args: list[str], message: str
) -> None:
    code, out, err = command(*args, "--quiet", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_interrupted_table_ends_its_workers_and_goes_on(tmp_path: Path) -> None:
    """Ctrl-C once, a kill once; then the same numbers as without."""
    base = [sys.executable, "-m", "lifelong", "bench", "split-digits", "--smoke", "--jobs", "2"]
    methods = ["--methods", "finetune", "ewc", "derpp", "--out"]
    out = tmp_path / "out"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*base, *methods, str(out)], stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for(pattern: str) -> None:
        end = time.monotonic() + 60
        while not list(out.glob(pattern)):
            assert time.monotonic() < end
            time.sleep(0.02)

    def wait_for_the_end_of_all(process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):
            while os.killpg(process.pid, 0) is None:
                assert time.monotonic() < end
                time.sleep(0.02)

    process = start()
    wait_for("work/ewc*")
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    told = err.strip().splitlines()[-1]
    assert told == "Interrupted. Go on with: " + " ".join(
        ["lifelong", *base[3:], *methods, str(out)]
    )
    wait_for_the_end_of_all(process)
    before = len(list(out.glob("cells/*")))
    assert before < 3

    process = start()
    wait_for("work/derpp*")
    process.kill()
    process.communicate(timeout=60)
    wait_for_the_end_of_all(process)  # workers whose parent is gone end by themselves

    chosen = {"methods": ["finetune", "ewc", "derpp"], "smoke": True, "jobs": 0}
    found = execute(table("split-digits"), out, **chosen)  # type: ignore[arg-type]
    whole = execute(table("split-digits"), tmp_path / "whole", **chosen)  # type: ignore[arg-type]
    assert untimed(found) == untimed(whole)
    assert not (out / "work").exists()

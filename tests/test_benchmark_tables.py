"""The README files are what the records say; goals, in hand-made rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
from benchmarks import tables
from benchmarks.tables import goals, newest, readmes, section

from lifelong.bench import record
from lifelong.bench.execute import execute
from lifelong.bench.goals import Verdict, goal_text, judge, verdict_text
from lifelong.bench.table import Cell, Context, Goal, GoalKind, Method, Published, Table


def test_what_is_committed_is_what_the_generator_writes() -> None:
    for path, text in readmes().items():
        assert path.read_text() == text, "run python -m benchmarks.tables --readme"


def run(table: Table, cell: Cell, context: Context) -> dict[str, Any]:
    if cell.method == "broken":
        raise ValueError("no luck")
    found = {"finetune": 0.2, "joint": 0.98, "ours": 0.9 + cell.memory / 1000}[cell.method]
    size = {
        "memory_examples": cell.memory,
        "memory_bytes": 2_000_000,
        "seconds": 12.3,
        "forgetting": 0.05,
    }
    return {"accuracy": found + cell.seed / 100, **size}


TABLE = Table(
    name="toy",
    title="Toy",
    methods=(
        Method("finetune", "finetune"),
        Method("joint", "joint"),
        Method("ours", "kprior", note="what is ours", tuned="published"),
        Method("broken", "kprior", memories=(10,)),
        Method("later", "ewc"),
    ),
    memories=(10, 20),
    run=run,
    published=(
        Published("ours", 10, 90.5, "P", "a paper"),
        Published("theirs", 20, 91, "X", "somebody"),
        Published("ours", 20, 92.5, "P", "a paper"),
    ),
    goals=(
        Goal("ours", 20, 94.0, why="somebody 91"),
        Goal("ours", 10, 50, "gap", ("finetune", "joint")),
        Goal("ours", 20, 1.0, "below", ("joint",)),
        Goal("later", 20, 10.0),
    ),
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A record of two seeds in which one method fails and one has not been computed."""
    methods = ["finetune", "joint", "ours", "broken"]
    execute(TABLE, tmp_path / "2026-01-02_toy", methods=methods, seeds=2, jobs=0)
    return tmp_path


def test_a_table_from_its_record(results: Path) -> None:
    lines = section(TABLE, results).splitlines()
    assert lines[0] == "### Toy"
    assert "[Record](results/2026-01-02_toy)" in lines[2]
    rows = [line for line in lines if line.startswith("| ")][2:]
    ended = "5.00 ± 0.00 | 2"  # forgetting, seeds
    assert rows == [
        "| finetune |  |  | 20.50 ± 0.50 | 5.00 ± 0.00 | 2 | 0 examples, 2.0 MB | 12 | no |",
        "| joint |  |  | 98.50 ± 0.50 | 5.00 ± 0.00 | 2 | 0 examples, 2.0 MB | 12 | no |",
        f"| ours | 10 | 90.5 [P] | 91.50 ± 0.50 | {ended} | 10 examples, 2.0 MB | 12 | published |",
        f"| ours | 20 | 92.5 [P] | 92.50 ± 0.50 | {ended} | 20 examples, 2.0 MB | 12 | published |",
        "| broken | 10 |  | 2 failed (ValueError) |  | 0 |  |  | no |",
        "| later |  |  |  |  |  |  |  | no |",
        "| theirs | 20 | 91 [X] |  |  |  |  |  |  |",
    ]
    assert lines[-3:] == [
        "- ours: what is ours",
        "- [P] ours: a paper.",
        "- [X] theirs: somebody.",
    ]


def test_without_a_record_all_cells_are_empty(tmp_path: Path) -> None:
    text = section(TABLE, tmp_path)
    assert "No record yet" in text
    assert "| ours | 10 | 90.5 [P] |  |  |  |  |  | published |" in text
    assert goals([TABLE], tmp_path).splitlines()[2].endswith("| somebody 91 |  |  |  |")


def test_goals_from_the_record(results: Path) -> None:
    first, gap, below, later = goals([TABLE], results).splitlines()[2:]
    table = "[toy](results/2026-01-02_toy)"
    assert first == (
        f"| {table} | 20 | ours | at least 94 % | somebody 91 | 92.50 % | 2 of 5 | **missed** |"
    )
    assert gap.endswith(
        "| at least 50 % of the gap from finetune to joint |  | 91 % | 2 of 5 | met |"
    )
    assert below.endswith("| 6.00 points below | 2 of 5 | **missed** |")
    assert later.endswith("|  |  |  |")


def test_a_goal_counts_the_seeds_that_its_rows_share(results: Path) -> None:
    """Those over which it is judged: of seeds 0, 1 and 0, 2 that is one."""
    of_joint = results / "2026-01-02_toy" / "cells" / "joint_0_seed-1.json"
    content = json.loads(of_joint.read_text())
    of_joint.unlink()
    moved = of_joint.with_name("joint_0_seed-2.json")
    moved.write_text(json.dumps({**content, "seed": 2}))
    record.write_result(results / "2026-01-02_toy", TABLE)
    gap, below = goals([TABLE], results).splitlines()[3:5]
    assert gap.endswith("| 1 of 5 | met |")
    assert below.endswith("| 1 of 5 | **missed** |")


def test_the_newest_record_counts_and_smoke_does_not(results: Path) -> None:
    assert newest("toy", results) == results / "2026-01-02_toy"
    execute(TABLE, results / "2026-01-03_toy", methods=["joint"], jobs=0, smoke=True)
    (results / "2026-01-04_toy").mkdir()
    assert newest("toy", results) == results / "2026-01-02_toy"
    execute(TABLE, results / "2026-01-05_toy", methods=["joint"], jobs=0)
    assert newest("toy", results) == results / "2026-01-05_toy"
    assert newest("oy", results) is None


def test_a_row_that_changed_since_is_told(results: Path) -> None:
    ours = replace(TABLE.methods[2], settings={"precision": 2.0})
    changed = replace(TABLE, methods=(*TABLE.methods[:2], ours, *TABLE.methods[3:]))
    told = "- ours: recorded with other settings than the table has now."
    assert told in section(changed, results)
    assert told not in section(TABLE, results)


def test_rows_that_the_table_lost_stay(results: Path) -> None:
    fewer = replace(TABLE, methods=TABLE.methods[1:], goals=())
    assert "| finetune |  |  | 20.50 ± 0.50 |" in section(fewer, results)


def test_earlier_records_are_rows_of_their_table() -> None:
    known = tables.tables()
    text = section(known["split-mnist"])
    assert (
        "| fromp, [`lifelong run`](results/2026-11-24_split-mnist_fromp) | 40 |  | 99.30 " in text
    )
    assert all(name in known for name in tables.EARLIER)


@pytest.mark.parametrize("arguments", [["nothing"], ["demo", "nothing"]])
def test_unknown_tables(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tables.main(arguments)
    assert "unknown: nothing; choose from demo, split-digits" in capsys.readouterr().err


# Goals --------------------------------------------------------------------------------------------


def row(method: str, memory: int, mean: float, error: float | None = 0.002, **more: Any) -> Any:
    return {
        "method": method,
        "memory": memory,
        "accuracy": {"mean": mean, "standard_error": error},
        **more,
    }


ROWS = [
    row("ours", 10, 0.90),
    row("ours", 20, 0.95, 0.004),
    row("ewc", 0, 0.80),
    row("replay", 20, 0.953, 0.001),
    row("joint", 0, 0.97, preset="joint"),
    {"method": "broken", "memory": 20, "failed": [{}]},
]


@pytest.mark.parametrize(
    ("kind", "bar", "of", "value", "met"),
    [
        ("accuracy", 95.0, (), 95.0, True),
        ("accuracy", 95.1, (), 95.0, False),
        ("below", 2.5, ("joint",), 2.0, True),
        ("below", 1.5, ("joint",), 2.0, False),
        ("above", 14.0, ("ewc",), 15.0, True),
        ("above", 0.0, ("ewc", "replay"), -0.3, False),
        ("gap", 75.0, ("ewc", "joint"), 15 / 0.17, True),
        ("gap", 90.0, ("ewc", "joint"), 15 / 0.17, False),
        ("gap", 90.0, ("ewc", "ewc"), None, None),
        ("first", 0.0, (), -0.3, True),  # 0.3 behind, within ours' standard error of 0.4
        ("accuracy", 1.0, ("broken",), None, None),
    ],
)
def test_judge(kind: GoalKind, bar: float, of: tuple[str, ...], value: Any, met: Any) -> None:
    found = judge(Goal("ours", 20, bar, kind, of), ROWS)
    assert found.value == (None if value is None else pytest.approx(value))
    assert found.met == met


def test_rows_are_compared_over_the_seeds_that_they_share() -> None:
    def of(method: str, seeds: list[int], values: list[float]) -> Any:
        mean = sum(values) / len(values)
        accuracy = {"mean": mean, "standard_error": 0.0, "per_seed": values}
        return {"method": method, "memory": 20, "seeds": seeds, "accuracy": accuracy}

    rows = [of("ours", [0, 2], [0.9, 0.8]), of("joint", [0, 1], [0.91, 0.99])]
    found = judge(Goal("ours", 20, 1.0, "below", ("joint",)), rows)
    assert found.value == pytest.approx(1.0)
    rows[1] = of("joint", [1], [0.99])
    assert judge(Goal("ours", 20, 1.0, "below", ("joint",)), rows) == Verdict()


def test_first_is_among_rows_of_the_same_memory_and_without() -> None:
    assert judge(Goal("ours", 10, kind="first"), ROWS) == Verdict(0.0, True)
    behind = [*ROWS, row("other", 10, 0.91)]
    assert judge(Goal("ours", 10, kind="first"), behind) == Verdict(pytest.approx(-1.0), False)
    assert judge(Goal("missing", 10, kind="first"), ROWS) == Verdict()
    variant = [*ROWS, row("ours, other settings", 10, 0.92, preset="ours")]
    assert judge(Goal("ours", 10, kind="first"), variant) == Verdict(0.0, True)
    other = [*ROWS, row("theirs, other settings", 10, 0.92, preset="theirs")]
    assert judge(Goal("ours", 10, kind="first"), other) == Verdict(pytest.approx(-2.0), False)


@pytest.mark.parametrize(
    ("goal", "text", "value", "reached"),
    [
        (Goal("a", 1, 94.5), "at least 94.5 %", 93.216, "93.22 %"),
        (Goal("a", 1, 1.2, "below", ("joint",)), "at most 1.2 points below joint", 1.0,
         "1.00 points below"),
        (Goal("a", 1, 0.0, "above", ("b", "c")), "above b; c", 1.0, "+1.00 points"),
        (Goal("a", 1, 2.0, "above", ("b",)), "at least 2 points above b", -1.0, "-1.00 points"),
        (Goal("a", 1, 50, "gap", ("b", "c")), "at least 50 % of the gap from b to c", 49.6, "50 %"),
        (Goal("a", 1, kind="first"), "first, or within one standard error", 0.0, "first"),
        (Goal("a", 1, kind="first"), "first, or within one standard error", -0.5,
         "0.50 points behind"),
    ],
)  # fmt: skip
def test_goals_in_words(goal: Goal, text: str, value: float, reached: str) -> None:
    assert goal_text(goal) == text
    assert verdict_text(goal, Verdict(value, True)) == reached
    assert verdict_text(goal, Verdict()) == ""

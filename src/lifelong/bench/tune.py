"""Choose a method's settings on held-out training data, and keep what was tried.

    python -m lifelong.bench.tune split-mnist ewc strength=1,100,1e4 --data DIR --out DIR

A grid over settings of one row of a table (``training.lr=...`` for one of its training), each point
a cell of a table of its own: trained on a part of each task's training data, tested on the rest,
with other seeds than the record's. The test data take no part. It resumes, and one OUT holds the
grids of several rows; OUT/tune.json says what was tried, with figures, and what is best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import UsageError
from . import record
from .execute import Watch, execute, line
from .table import Method, Table, plain
from .tables import table as find

TUNE = "tune.json"
VALIDATION, FIRST_SEED, SEEDS = 0.2, 100, 2


def grid_table(
    table: Table,
    method: str,
    grid: Mapping[str, Sequence[Any]],
    *,
    validation: float = VALIDATION,
    first_seed: int = FIRST_SEED,
    seeds: int = SEEDS,
) -> Table:
    """The table "tune-NAME" whose rows are the points of the grid.

    Raises UsageError where the table's ``run`` cannot hold data out (it has no fields
    ``validation`` and ``first_seed``), or where the grid is empty.
    """
    run: Any = table.run
    if not {"validation", "first_seed"} <= getattr(run, "__dataclass_fields__", {}).keys():
        raise UsageError(
            f"the table {table.name!r} cannot hold out training data; its run needs the fields "
            "validation and first_seed"
        )
    if not grid or not all(grid.values()):
        raise UsageError("expected settings with their values, as in strength=1,10,100")
    return replace(
        table,
        name=f"tune-{table.name}",
        title=f"{table.title}: settings, on held-out training data",
        methods=tuple(_point(table.method(method), point) for point in _points(grid)),
        run=replace(run, validation=validation, first_seed=first_seed),
        seeds=seeds,
        smoke={k: v for k, v in table.smoke.items() if k != "methods"},
        published=(),
        goals=(),
    )


def _points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _point(method: Method, point: Mapping[str, Any]) -> Method:
    inside = "training."
    training = {k.removeprefix(inside): v for k, v in point.items() if k.startswith(inside)}
    settings = {k: v for k, v in point.items() if not k.startswith(inside)}
    return replace(
        method,
        name=_name(method.name, point),
        settings={**method.settings, **settings},
        training={**method.training, **training},
        tuned="no",
    )


def _name(method: str, point: Mapping[str, Any]) -> str:
    return ", ".join([method, *(f"{k}={v}" for k, v in point.items())])


def tune(
    table: Table,
    method: str,
    grid: Mapping[str, Sequence[Any]],
    out: Path,
    *,
    memory: int | None = None,
    validation: float = VALIDATION,
    first_seed: int = FIRST_SEED,
    seeds: int = SEEDS,
    data: Path | None = None,
    jobs: int | None = None,
    smoke: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Compute the grid at ``memory`` (by default the table's first); what was tried, and the best.

    The best has the highest mean accuracy over ``seeds`` seeds, of which an earlier grid may have
    computed more; of equals the first. A point that failed is listed with its error. Raises
    UsageError as ``grid_table`` and ``execute``, and where every point failed.
    """
    how: dict[str, Any] = {"validation": validation, "first_seed": first_seed, "seeds": seeds}
    points = grid_table(table, method, grid, **how)
    chosen = table.method(method).memories_of(table)[0] if memory is None else memory
    summary = execute(
        points, out, memories=[chosen], data=data, jobs=jobs, smoke=smoke, watch=watch
    )
    rows = {r["method"]: r for r in summary["rows"] if r["memory"] in (0, chosen)}
    tried = []
    for point in _points(grid):
        row = rows[_name(method, point)]
        errors = [f["error"] for f in row["failed"] if f["seed"] < seeds]
        tried.append({**point, "accuracy": _accuracy(row, seeds), "errors": errors})
    whole = [t for t in tried if t["accuracy"] is not None and not t["errors"]]
    if not whole:
        raise UsageError(f"every point of the grid failed: {tried[0]['errors'][0]}")
    best = max(whole, key=lambda t: t["accuracy"]["mean"])
    found = {
        "table": table.name,
        "method": method,
        "memory": chosen,
        **how,
        "chosen": {name: best[name] for name in grid},
        "tried": tried,
    }
    _keep(out / TUNE, plain(found))
    return found


def _accuracy(row: Mapping[str, Any], seeds: int) -> dict[str, Any] | None:
    """Over the seeds that every point of the grid has; None where none is done."""
    accuracies = row["accuracy"]["per_seed"] if row["seeds"] else []
    same = [a for seed, a in zip(row["seeds"], accuracies, strict=True) if seed < seeds]
    return record.over_seeds(same) if same else None


def _keep(path: Path, found: dict[str, Any]) -> None:
    """Add to the file, in place of an earlier grid of the same row and settings."""

    def of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return entry["method"], entry["memory"], sorted(entry["chosen"])

    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    record.write_json(path, [*(entry for entry in before if of(entry) != of(found)), found])


def values(text: str) -> tuple[str, list[Any]]:
    """ "strength=1,10" -> ("strength", [1, 10]). Raises UsageError for what is not so."""
    name, equals, listed = text.partition("=")
    if not equals or not name or not listed:
        raise UsageError(f"expected NAME=VALUE,VALUE,..., got {text!r}")
    return name, [_value(item) for item in listed.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m lifelong.bench.tune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("table")
    parser.add_argument("method", help="a row of the table")
    parser.add_argument("grid", nargs="+", metavar="NAME=V,V,...")
    parser.add_argument("--memory", type=int, help="the table's first by default")
    parser.add_argument("--validation", type=float, default=VALIDATION, help="fraction held out")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, help="processes at once; the cores by default")
    parser.add_argument("--smoke", action="store_true", help="a tiny version")
    data = os.environ.get("LIFELONG_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) if data else None)
    parser.add_argument("--out", type=Path, help="runs/tune-TABLE by default")
    given = parser.parse_args(argv)

    def watch(status: Any) -> None:
        for content in status.ended:
            sys.stderr.write(f"{status.done + status.failed}/{status.total} {line(content)}\n")

    try:
        found = tune(
            find(given.table),
            given.method,
            dict(values(text) for text in given.grid),
            given.out or Path("runs", f"tune-{given.table}"),
            memory=given.memory,
            validation=given.validation,
            seeds=given.seeds,
            data=given.data,
            jobs=given.jobs,
            smoke=given.smoke,
            watch=watch,
        )
    except UsageError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    for point in found["tried"]:
        named = ", ".join(f"{name} {point[name]}" for name in found["chosen"])
        mean = "failed" if point["accuracy"] is None else f"{100 * point['accuracy']['mean']:.2f}"
        best = " <- best" if all(point[k] == v for k, v in found["chosen"].items()) else ""
        sys.stdout.write(f"{named}: {mean}{best}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

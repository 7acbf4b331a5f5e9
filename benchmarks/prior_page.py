"""The generated parts of docs/which-prior.md, from the newest records; empty cells where none is.

overview   each preset in each table that has a goal, at that memory
cost       a step, and a task, beside experience replay's
ablation   the recommended prior with one part changed, in points, paired over seeds

``python -m benchmarks.tables --readme`` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lifelong.bench.table import Table
from lifelong.metrics import mean_and_standard_error
from lifelong.presets import PRESETS

from . import step_cost

Newest = Mapping[str, Path]  # table -> folder of its newest record


def overview(known: Iterable[Table], newest: Newest, link: str) -> str:
    """Markdown: accuracy of the presets at the memories of the goals."""
    columns = [
        (table, memory)
        for table in known
        for memory in sorted({goal.memory for goal in table.goals})
    ]
    found = {(t.name, m): _accuracies(newest.get(t.name), m) for t, m in columns}
    heads = (_linked(t, newest, link, f", {m} a task" if m else "") for t, m in columns)
    lines = [f"| preset | {' | '.join(heads)} |", "|---" + "|---:" * len(columns) + "|"]
    for name in PRESETS:
        if any(name in {method.name for method in t.methods} for t, _ in columns):
            cells = (found[t.name, m].get(name, "") for t, m in columns)
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracies(folder: Path | None, memory: int) -> dict[str, str]:
    """method -> mean ± standard error in %, at this memory or at none."""
    rows = [] if folder is None else _read(folder / "result.json").get("rows", [])
    return {
        row["method"]: percent(row["accuracy"])
        for row in rows
        if "accuracy" in row and row["memory"] in (0, memory)
    }


def percent(value: Mapping[str, Any]) -> str:
    error = value["standard_error"]
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return f"{100 * value['mean']:.2f}{spread}"


def _linked(table: Table, newest: Newest, link: str, tail: str = "") -> str:
    folder = newest.get(table.name)
    name = table.name if folder is None else f"[{table.name}]({link}/{folder.name})"
    return name + tail


def cost(results: Path, link: str) -> str:
    """Markdown: the newest record of ``step_cost``."""
    folders = sorted(results.glob("????-??-??_step-cost"))
    if not folders:
        return "No record yet."
    config, table = (_read(folders[-1] / f"{n}.json") for n in ("config", "result"))
    return (
        f"{step_cost.table(table)}\n\nTime over that of `experience_replay`, {config['memory']} "
        f"examples a task, {config['tasks']} tasks before; above {config['bar']:g} in bold. "
        f"[Record]({link}/{folders[-1].name})."
    )


def ablation(known: Iterable[Table], newest: Newest, link: str) -> str:
    """Markdown: points gained or lost by each change, of the tables that are called ablation-*."""
    tables = [table for table in known if table.name.startswith("ablation-")]
    lines = [
        "| changed | " + " | ".join(_linked(t, newest, link) for t in tables) + " |",
        "|---" + "|---:" * len(tables) + "|",
    ]
    found = [_changes(newest.get(table.name)) for table in tables]
    for name in dict.fromkeys(m.name for table in tables for m in table.methods):
        cells = (of.get(name, "") for of in found)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


BASE_ROW = "as recommended"


def _changes(folder: Path | None) -> dict[str, str]:
    """row -> its accuracy less the base's, in points; of the base its accuracy itself."""
    rows = [] if folder is None else _read(folder / "result.json").get("rows", [])
    by_seed = {
        row["method"]: dict(zip(row["seeds"], row["accuracy"]["per_seed"], strict=True))
        for row in rows
        if "accuracy" in row
    }
    base, told = by_seed.get(BASE_ROW, {}), {}
    for name, values in by_seed.items():
        seeds = values.keys() & base.keys()
        if not seeds:
            continue
        if name == BASE_ROW:
            told[name] = f"{100 * sum(values.values()) / len(values):.2f} %"
            continue
        mean, error = mean_and_standard_error([100 * (values[s] - base[s]) for s in sorted(seeds)])
        told[name] = f"{mean:+.2f}" + ("" if error != error else f" ± {error:.2f}")
    return told


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else {}

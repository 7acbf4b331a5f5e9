"""The generated tables of docs/seen-once.md and docs/task-free.md, from the newest records.

seen_once    every row at the memory of the goals, the best first, with what it keeps of a class
task_free    each contestant on the eight inputs and with past labels beside them

``python -m benchmarks.tables --readme`` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lifelong.bench.table import Table

from .prior_page import percent

NAMES: Mapping[str, str] = {
    "joint": "joint training",
    "joint_regression": "regression, jointly",
    "regression": "regression, exact G",
    "gradient_reconstruction, kronecker": "gradient reconstruction, Kronecker G",
    "recommended": "`recommended`",
    "gradient_reconstruction": "gradient reconstruction, diagonal G (its default)",
    "kprior": "K-prior, N/M",
    "kprior, lambda": "K-prior, N/M, by λ",
    "compact_memory": "compact memory, at most as many vectors",
    "online_ewc": "online EWC, strength auto",
    "experience_replay": "replay",
    "derpp": "DER++",
    "finetune": "nothing kept",
}
TOLD = ", past labels"

Row = Mapping[str, Any]


def seen_once(table: Table, folder: Path | None, classes: int, unit: str) -> str:
    """Markdown: accuracy, forgetting and what is kept of each of ``classes``, in ``unit``."""
    if folder is None:
        return "No record yet."
    memories = {0, *(goal.memory for goal in table.goals)}
    rows = [r for r in _rows(folder) if "accuracy" in r and r["memory"] in memories]
    heads = ("method", f"{unit} of each class", "accuracy, %", "forgetting", "kept, MB", "seeds")
    lines = [_line(heads), "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in sorted(rows, key=lambda r: -r["accuracy"]["mean"]):
        forgetting = f"{100 * row['forgetting']['mean']:.1f}" if "forgetting" in row else ""
        cells = (
            f"{row['memory_examples']['mean'] / classes:.3g}",
            percent(row["accuracy"]),
            forgetting,
            f"{row['memory_bytes']['mean'] / 1e6:.1f}",
            str(len(row["seeds"])),
        )
        lines.append(_line((NAMES.get(row["method"], row["method"]), *cells)))
    return "\n".join(lines)


def task_free(folder: Path | None) -> str:
    """Markdown: accuracy of all rows and of those after the first tenth, without past labels and
    with them."""
    if folder is None:
        return "No record yet."
    found = {row["method"]: row for row in _rows(folder) if "accuracy" in row}
    later = "after the first tenth"
    heads = ("", "eight inputs", f"of these, {later}", "seeds", "with past labels", later, "seeds")
    lines = [_line(heads), "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name in found:
        if not name.endswith(TOLD):
            cells = (*_prequential(found[name]), *_prequential(found.get(name + TOLD)))
            lines.append(_line((name, *cells)))
    return "\n".join(lines)


def _prequential(row: Row | None) -> tuple[str, ...]:
    if row is None:
        return ("",) * 3
    return percent(row["accuracy"]), percent(row["accuracy_rest"]), str(len(row["seeds"]))


def _rows(folder: Path) -> list[Row]:
    return json.loads((folder / "result.json").read_text())["rows"]


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"

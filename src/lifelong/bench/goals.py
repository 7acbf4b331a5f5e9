"""Is a goal met? From the rows of a record alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .table import Goal

Row = Mapping[str, Any]
YARDSTICKS = ("joint", "separate")


@dataclass(frozen=True)
class Verdict:
    """value: what was reached, in the goal's own measure (accuracy in %, points, % of a gap);
    None where a row that it needs has no record. met: None with it."""

    value: float | None = None
    met: bool | None = None


def judge(goal: Goal, rows: Sequence[Row]) -> Verdict:
    """Whether ``rows`` (of ``result.json``) meet ``goal``, by means over seeds; where rows are
    compared by name, over those seeds that all of them have."""
    mine = _row(rows, goal.method, goal.memory)
    others = [_row(rows, name, goal.memory) for name in goal.of]
    if mine is None or any(row is None for row in others) or mine.get("failed"):
        return Verdict()  # of the seeds that happened to succeed nothing follows
    ours, *theirs = _means([mine, *(row for row in others if row is not None)])
    if any(math.isnan(x) for x in (ours, *theirs)):
        return Verdict()
    if goal.kind == "accuracy":
        return Verdict(ours, ours >= goal.bar)
    if goal.kind == "below":
        return Verdict(theirs[0] - ours, theirs[0] - ours <= goal.bar)
    if goal.kind == "above":
        return Verdict(ours - max(theirs), ours - max(theirs) >= goal.bar)
    if goal.kind == "gap":
        if theirs[0] == theirs[1]:
            return Verdict()
        closed = 100 * (ours - theirs[0]) / (theirs[1] - theirs[0])
        return Verdict(closed, closed >= goal.bar)
    best = max((mine, *_others(rows, mine, goal.memory)), key=_mean)
    ours = _mean(mine)
    return Verdict(ours - _mean(best), _mean(best) - ours <= max(_error(mine), _error(best)))


def goal_text(goal: Goal) -> str:
    """What is asked for, in words."""
    of = "; ".join(goal.of)  # names of rows have commas
    return {
        "accuracy": f"at least {goal.bar:g} %",
        "below": f"at most {goal.bar:g} points below {of}",
        "above": f"at least {goal.bar:g} points above {of}" if goal.bar else f"above {of}",
        "gap": f"at least {goal.bar:g} % of the gap from {' to '.join(goal.of)}",
        "first": "first, or within one standard error",
    }[goal.kind]


def verdict_text(goal: Goal, verdict: Verdict) -> str:
    """What was reached, in the same words; empty where there is no record."""
    if verdict.value is None:
        return ""
    value = verdict.value
    return {
        "accuracy": f"{value:.2f} %",
        "below": f"{value:.2f} points below",
        "above": f"{value:+.2f} points",
        "gap": f"{value:.0f} %",
        "first": "first" if value == 0 else f"{-value:.2f} points behind",
    }[goal.kind]


def _row(rows: Sequence[Row], method: str, memory: int) -> Row | None:
    """The row at this memory, or else the one that keeps nothing."""
    found = {r["memory"]: r for r in rows if r["method"] == method and _done(r)}
    return found.get(memory, found.get(0))


def _others(rows: Sequence[Row], mine: Row, memory: int) -> list[Row]:
    """Those that ``mine`` is to be first among: at its memory or none, of other presets."""
    return [
        row
        for row in rows
        if _done(row)
        and row["memory"] in (0, memory)
        and not _yardstick(row)
        and _preset(row) != _preset(mine)
    ]


def _preset(row: Row) -> str:
    return row.get("preset", row["method"])


def _done(row: Row) -> bool:
    return "accuracy" in row


def _yardstick(row: Row) -> bool:
    return _preset(row) in YARDSTICKS


def _means(rows: Sequence[Row]) -> list[float]:
    """Over the seeds that all rows have; NaN where there is none, plain means where rows do not
    say which seeds they have."""
    if not all("seeds" in row and "per_seed" in row["accuracy"] for row in rows):
        return [_mean(row) for row in rows]
    common = set.intersection(*(set(row["seeds"]) for row in rows))
    if not common:
        return [math.nan] * len(rows)
    by_seed = [dict(zip(r["seeds"], r["accuracy"]["per_seed"], strict=True)) for r in rows]
    return [100 * sum(of[seed] for seed in common) / len(common) for of in by_seed]


def _mean(row: Row) -> float:
    return 100 * row["accuracy"]["mean"]


def _error(row: Row) -> float:
    return 100 * (row["accuracy"]["standard_error"] or 0.0)

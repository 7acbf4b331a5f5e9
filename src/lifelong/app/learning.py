"""What a run's folder says of its learning: matrices, curves, calibration of time, what goes on."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..metrics import AccuracyMatrix
from ..report import pictures
from ..report.results import Estimate
from ..runs import ACCURACY, CONFIG, LOG, RESULT

_LINE = re.compile(r"seed (\d+): task (\d+), accuracy so far ([\d.]+)")


@dataclass(frozen=True)
class Seed:
    """One seed: matrix R[t][i] of fractions, None above the diagonal; accuracy and forgetting at
    the end; what was kept for it."""

    seed: int
    matrix: list[list[float | None]]
    accuracy: float
    forgetting: float
    seconds: float
    memory_examples: int
    memory_bytes: int

    @property
    def curve(self) -> list[float | None]:
        """Mean accuracy on the tasks seen, after each task."""
        means = []
        for t, row in enumerate(self.matrix):
            seen = [v for v in row[: t + 1] if v is not None]
            means.append(sum(seen) / len(seen) if seen else None)
        return means


@dataclass(frozen=True)
class Learning:
    """Of one run. tasks: their names, as far as they are known; reached: per seed that is not
    finished, its mean accuracy after each task so far; log: the newest lines."""

    folder: Path
    name: str
    method: str
    benchmark: str
    tasks: list[str]
    seeds: list[Seed]
    reached: dict[int, list[float]]
    finished: bool
    wanted: int
    log: list[str]
    changed: dict[str, Any] | None

    @property
    def running(self) -> bool:
        """Whether something of it is not learned yet."""
        return not self.finished and self.changed is None


def learning(folder: Path, name: str) -> Learning:
    """Read a run's folder, also while it is being written to. name: of the run, for people."""
    config = _json(folder / CONFIG) or {}
    flags = config.get("flags", {})
    result = _json(folder / RESULT)
    seeds = []
    for place in sorted(folder.glob("seed-*")):
        content = _json(place / ACCURACY)
        if content is not None:
            seeds.append(Seed(**content))
    lines = _lines(folder / LOG)
    reached: dict[int, dict[int, float]] = {}
    for line in lines:
        if match := _LINE.search(line):
            seed, task, value = int(match[1]), int(match[2]), float(match[3])
            reached.setdefault(seed, {})[task] = value
    done = {seed.seed for seed in seeds}
    going = {
        s: [v for _, v in sorted(each.items())] for s, each in reached.items() if s not in done
    }
    size = max((len(seed.matrix) for seed in seeds), default=0)
    tasks = (result or {}).get("tasks") or [str(t + 1) for t in range(size)]
    return Learning(
        folder,
        name,
        str(flags.get("prior", "")),
        str(flags.get("benchmark", "")),
        [str(task) for task in tasks],
        seeds,
        going,
        result is not None,
        int(flags.get("seeds", 1) or 1),
        lines[-12:],
        _json(folder / "adaptation.json"),
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-5_000:]
    except OSError:
        return []


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------------- drawings


def curves(runs: list[Learning]) -> Markup:
    """Mean accuracy on the tasks seen, one line for each run."""
    lines = []
    for number, run in enumerate(_drawn(runs)):
        points: list[Estimate | None] = []
        length = max((len(seed.matrix) for seed in run.seeds), default=0)
        length = max([length, *(len(v) for v in run.reached.values())], default=0)
        for t in range(length):
            values = [seed.curve[t] for seed in run.seeds if t < len(seed.curve)]
            values += [v[t] for v in run.reached.values() if t < len(v)]
            known = [v for v in values if v is not None]
            points.append(Estimate.of(known))
        if points:
            lines.append(pictures.Line(run.name, pictures.line_style(number), tuple(points)))
    if not lines:
        return Markup("")
    last = "; ".join(
        f"{line.label} {100 * line.points[-1].mean:.1f} %" for line in lines if line.points[-1]
    )
    title = "Average accuracy on the tasks seen so far"
    return Markup(pictures.line_chart("curve", title, f"After the last task: {last}.", lines))


def legend(runs: list[Learning]) -> list[tuple[str, Markup]]:
    """Names and their pieces of line, in the order of ``curves``."""
    return [
        (
            run.name,
            Markup(pictures.swatch(f"swatch{n}", run.name, pictures.line_style(n))),
        )
        for n, run in enumerate(_drawn(runs))
    ]


def _drawn(runs: list[Learning]) -> list[Learning]:
    """Those with a curve of their own: an adapted run has the log of the one that it is from."""
    return [run for run in runs if (run.seeds or run.reached) and run.changed is None][:6]


def matrix(run: Learning) -> Markup:
    """The mean accuracy matrix of the seeds that are finished; empty where none is."""
    if not run.seeds:
        return Markup("")
    size = len(run.seeds[0].matrix)
    same = [seed for seed in run.seeds if len(seed.matrix) == size]
    rows = []
    for t in range(size):
        row: list[float | None] = []
        for i in range(size):
            values = [seed.matrix[t][i] for seed in same]
            known = [v for v in values if v is not None]
            row.append(sum(known) / len(known) if len(known) == len(same) else None)
        rows.append(tuple(row))
    title = f"Accuracy of {run.method or run.name} on each task, in percent"
    text = "Rows: after learning a task. Columns: the task tested."
    low = pictures.scale_floor([rows])
    names = run.tasks if len(run.tasks) == size else [str(t + 1) for t in range(size)]
    return Markup(pictures.heat_map("matrix", title, text, rows, names, low))


def numbers(run: Learning) -> dict[str, float | None]:
    """Means over seeds that the tables show."""
    found: dict[str, float | None] = {}
    for name in ("accuracy", "forgetting", "seconds", "memory_examples", "memory_bytes"):
        values = [float(getattr(seed, name)) for seed in run.seeds]
        known = [v for v in values if math.isfinite(v)]
        found[name] = sum(known) / len(known) if known and len(known) == len(values) else None
    if run.changed is not None:
        after = [seed["accuracy_after"] for seed in run.changed["seeds"]]
        known = [value for value in after if value is not None]
        found["accuracy"] = sum(known) / len(known) if known else None
    if run.seeds and len(run.seeds[0].matrix) > 1:
        each = [AccuracyMatrix.from_list(seed.matrix) for seed in run.seeds]
        found["worst"] = sum(min(v for v in m.to_list()[-1] if v is not None) for m in each) / len(
            each
        )
    return found

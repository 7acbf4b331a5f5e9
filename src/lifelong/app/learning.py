"""What a run's folder says of its learning: matrices, curves, calibration of time, what goes on."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..metrics import AccuracyMatrix
from ..report import pictures
from ..report.results import Estimate
from ..runs import ACCURACY, CONFIG, LOG, RESULT
from .measures import Measures

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
    finished, its mean accuracy after each task so far; log: the newest lines; left: seconds, by
    the time that the tasks took since it was started or resumed."""

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
    left: float | None = None

    @property
    def share(self) -> float:
        """Of all tasks of all seeds, the part that is learned."""
        tasks = len(self.tasks) * self.wanted
        done = len(self.seeds) * len(self.tasks) + sum(map(len, self.reached.values()))
        return min(1.0, done / tasks) if tasks else 0.0

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
    tasks = (result or config).get("tasks") or [str(t + 1) for t in range(size)]
    wanted = int(flags.get("seeds", 1) or 1)
    return Learning(
        folder,
        name,
        str(flags.get("prior", "")),
        str(flags.get("benchmark", "")),
        [str(task) for task in tasks],
        seeds,
        going,
        result is not None,
        wanted,
        lines[-12:],
        _json(folder / "adaptation.json"),
        _left(lines, len(tasks) * wanted) if result is None else None,
    )


def _left(lines: list[str], tasks: int) -> float | None:
    """Seconds until all tasks are learned, if they take as long as those since the last start."""
    times: list[datetime] = []
    done = 0
    for line in lines:
        stamp, _, said = line.partition(" ")
        if said.startswith("started") or "resumed after" in said:
            times = [_time(stamp)]
        elif _LINE.search(said) and times:
            times.append(_time(stamp))
            done += 1
        elif _LINE.search(said):
            done += 1
    if len(times) < 2:
        return None
    each = (times[-1] - times[0]).total_seconds() / (len(times) - 1)
    return max(0.0, (tasks - done) * each)


def _time(stamp: str) -> datetime:
    try:
        found = datetime.fromisoformat(stamp)
    except ValueError:
        found = datetime.fromtimestamp(0, UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


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


def reliability(measured: Measures | None) -> Markup:
    """How often a prediction of some confidence is right; empty where nothing was measured."""
    if measured is None or not measured.bins:
        return Markup("")
    columns = zip(*(measured.bins[n] for n in ("count", "confidence", "right")), strict=True)
    points = [
        None if not n else (confidence / n, Estimate(right / n, None))
        for n, confidence, right in columns
    ]  # fmt: skip
    line = pictures.Points("accuracy", pictures.line_style(0), tuple(points))
    x = pictures.percent_axis("confidence (%)", 0.0, 1.0)
    y = pictures.percent_axis("right (%)", 0.0, 1.0)
    title = "Accuracy of the predictions by their confidence"
    said = f"Expected calibration error {100 * (measured.ece or 0):.1f} points; dots: perfect."
    return Markup(pictures.chart("reliability", title, said, [line], x, y, diagonal=True))


def fidelity(measured: Measures | None) -> Markup:
    """Fidelity against the size of a task's memory, a line for each task that was measured."""
    if measured is None or not measured.fidelity:
        return Markup("")
    lines = []
    for number, curve in enumerate(measured.fidelity):
        pairs = zip(curve["sizes"], curve["values"], strict=True)
        points = [
            None if value is None else (math.log10(size), Estimate(value, None))
            for size, value in pairs if size
        ]  # fmt: skip
        style = pictures.line_style(number)
        lines.append(pictures.Points(f"task {curve['task'] + 1}", style, tuple(points)))
    sizes = [curve["sizes"][-1] for curve in measured.fidelity]
    x = pictures.log_axis("examples kept of the task", sizes)
    y = pictures.percent_axis("fidelity (%)", 0.0, 1.0)
    said = "; ".join(
        f"task {c['task'] + 1} keeps {c['kept']} of {c['read']}" for c in measured.fidelity
    )
    title = "How much of the gradient of the past a memory of each size gives back"
    return Markup(pictures.chart("fidelity", title, f"{said}.", lines, x, y, marked=False))


def fidelity_legend(measured: Measures | None) -> list[tuple[str, Markup]]:
    """Names and pieces of line of ``fidelity``."""
    curves = [] if measured is None else measured.fidelity
    return [
        (f"task {c['task'] + 1}: keeps {c['kept']} of {c['read']}",
         Markup(pictures.swatch(f"fidelity{n}", f"task {c['task'] + 1}", pictures.line_style(n))))
        for n, c in enumerate(curves)
    ]  # fmt: skip


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

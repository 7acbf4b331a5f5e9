"""All tables: `make tables`. Each is a `lifelong bench`, resumable after a kill.

    python -m benchmarks.tables [NAME ...] [--data DIR] [--seeds N] [--jobs N]
    python -m benchmarks.tables --readme          # only write the README files

A table goes on in the newest benchmarks/results/DATE_NAME of its name, or begins one of today;
"demo" is the demo's record. README.md here and the one above are generated from the records; a
cell without a record is empty, and failures stay in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lifelong.bench import record
from lifelong.bench.goals import goal_text, judge, verdict_text
from lifelong.bench.table import Goal, Published, Table
from lifelong.bench.tables import tables

from . import prior_page, stream_pages

HERE = Path(__file__).parent
RESULTS = HERE / "results"

# Records of `lifelong run` from before there was `lifelong bench`: table -> (row, memory, record).
EARLIER: Mapping[str, tuple[tuple[str, int, str], ...]] = {
    "split-mnist": (("fromp", 40, "2026-11-24_split-mnist_fromp"),),
    "permuted-mnist": (
        ("fromp", 200, "2026-11-24_permuted-mnist_fromp"),
        (
            "gradient_reconstruction, strength 2, lambda",
            200,
            "2026-11-24_permuted-mnist_gradient-reconstruction",
        ),
    ),
}
TAGS = {
    "P": "the paper",
    "C": "the authors' code or its README",
    "RR": "computed from the authors' raw results",
    "F": "read off a figure",
    "T": "a thesis",
    "X": "an independent reproduction",
    "A": "abstract or project page",
}


# Records ------------------------------------------------------------------------------------------


def newest(name: str, results: Path = RESULTS) -> Path | None:
    """The newest record of a table."""
    folders = sorted(results.glob(f"????-??-??_{name}"))
    return next((f for f in reversed(folders) if _is_of(f, name)), None)


def _is_of(folder: Path, name: str) -> bool:
    config = _read(folder / record.CONFIG)
    return config is not None and config.get("table") == name and not config["smoke"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def compute(table: Table, data: Path | None, seeds: int | None, jobs: int | None) -> int:
    """Go on with a table's record; the exit code."""
    folder = newest(table.name) or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_{table.name}"
    command = [sys.executable, "-m", "lifelong", "bench", table.name, "--out", str(folder)]
    for name, value in (("data", data), ("seeds", seeds), ("jobs", jobs)):
        command += [] if value is None else [f"--{name}", str(value)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def demo(seeds: int) -> Path:
    """The demo's record: its page and its numbers."""
    folder = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_demo"
    command = [sys.executable, "-m", "lifelong", "demo", "--seeds", str(seeds), "--quiet"]
    log = subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True)
    (folder / "log.txt").write_bytes(log.stdout.replace(str(RESULTS.parent).encode(), b""))
    for name in ("result.json", "report.html"):
        path = folder / name
        path.write_text(path.read_text().replace(str(folder), "runs/demo"))
    return folder


# Markdown -----------------------------------------------------------------------------------------

HEADINGS = (
    "method", "memory", "published, %", "ours, %", "forgetting", "seeds", "kept", "s", "tuned",
)  # fmt: skip


def section(table: Table, results: Path = RESULTS) -> str:
    """A table as Markdown: every row that it has or had, with what was published and recorded."""
    folder = newest(table.name, results)
    config = {} if folder is None else _read(folder / record.CONFIG)
    summary = {} if folder is None else _read(folder / record.RESULT) or {}
    recorded = {(r["method"], r["memory"]): r for r in summary.get("rows", ())}
    printed: dict[tuple[str, int], list[Published]] = {}
    for item in table.published:
        printed.setdefault((item.method, item.memory), []).append(item)
    own = [(m.name, memory) for m in table.methods for memory in m.memories_of(table)]
    changed = {m.name for m in table.methods if config and _changed(table, m.name, config)}
    lines, notes = [], []
    for name, memory in dict.fromkeys((*own, *recorded, *printed)):
        row, numbers = recorded.get((name, memory)), printed.get((name, memory), [])
        said = ", ".join(f"{item.value:g} [{item.tag}]" for item in numbers)
        if row is not None and name in changed:
            notes.append(f"{name}: recorded with other settings than the table has now.")
        lines.append(
            _row_of((name, str(memory or ""), said, *_ours(row), _tuned(table, name, config)))
        )
    for name, memory, earlier in EARLIER.get(table.name, ()):
        lines.append(_earlier(name, memory, earlier, results))
    where = f"[Record](results/{folder.name})" if folder else "No record yet"
    head = [f"### {table.title}", "", f"`lifelong bench {table.name}`. {where}."]
    if table.note:
        head.append(table.note)
    notes += [f"{m.name}: {m.note}" for m in table.methods if m.note]
    return "\n".join(
        [*head, "", _row_of(HEADINGS), _row_of("---" for _ in HEADINGS), *lines, ""]
        + [f"- {note}" for note in (*dict.fromkeys(notes), *_sources(table.published))]
    ).rstrip()


def _row_of(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _changed(table: Table, name: str, config: Mapping[str, Any]) -> bool:
    """Whether the record was made with other settings than ``table`` has now."""
    then = config["methods"].get(name)
    if then is None:
        return False
    definition = {k: then[k] for k in table.definition(name) if k in then}  # once without a recipe
    return bool(record.changes(table, name, {**definition, "setup": config["setup"]}))


def _tuned(table: Table, name: str, config: Mapping[str, Any]) -> str:
    for method in table.methods:
        if method.name == name:
            return method.tuned
    return config.get("methods", {}).get(name, {}).get("tuned", "")


def _ours(row: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Accuracy, forgetting, seeds, what is kept, seconds."""
    if row is None:
        return ("",) * 5
    found = [percent(row["accuracy"])] if "accuracy" in row else []
    errors = sorted({f["error"].split(":")[0] for f in row["failed"]})
    found += [f"{len(row['failed'])} failed ({', '.join(errors)})"] if errors else []
    memory = ""
    if "memory_bytes" in row:
        memory = kept(row["memory_examples"]["mean"], row["memory_bytes"]["mean"])
    return (
        ", ".join(found),
        percent(row["forgetting"]) if "forgetting" in row else "",
        str(len(row["seeds"])),
        memory,
        f"{row['seconds']['mean']:.0f}" if "seconds" in row else "",
    )


def kept(examples: float, size: float) -> str:
    return f"{examples:.0f} examples, {size / 1e6:.1f} MB"


def _earlier(name: str, memory: int, folder: str, results: Path) -> str:
    found = _read(results / folder / "result.json")
    if found is None:
        return _row_of((name, str(memory), "", "", "", "", "", "", ""))
    cells = (
        percent(found["accuracy"]),
        percent(found["forgetting"]),
        str(len(found["seeds"])),
        kept(found["memory_examples"], found["memory_bytes"]),
        f"{found['seconds']['mean']:.0f}",
        "published" if name == "fromp" else "on 10,000 of the training images, not on a full grid",
    )
    linked = f"{name}, [`lifelong run`](results/{folder})"
    return _row_of((linked, str(memory), "", *cells))


def percent(value: Mapping[str, Any]) -> str:
    error = value.get("standard_error")
    spread = "" if error is None or error != error else f" ± {100 * error:.2f}"
    return f"{100 * value['mean']:.2f}{spread}"


def _sources(published: Iterable[Published]) -> list[str]:
    """Where the published numbers stand, those of one source together."""
    by_source: dict[tuple[str, str], list[Published]] = {}
    for item in published:
        by_source.setdefault((item.tag, item.source), []).append(item)
    lines = []
    for (tag, source), items in by_source.items():
        names = ", ".join(dict.fromkeys(item.method for item in items))
        lines.append(f"[{tag}] {names}: {source}.")
    return lines


def goals(known: Iterable[Table], results: Path = RESULTS) -> str:
    """Markdown: every goal of every table, and whether it is met; empty where nothing is known."""
    heads = ("table", "memory", "method", "goal", "published", "reached", "seeds", "")
    lines = [_row_of(heads), _row_of("---" for _ in heads)]
    for table in known:
        folder = newest(table.name, results)
        summary = {} if folder is None else _read(folder / record.RESULT) or {}
        for goal in table.goals:
            lines.append(_goal(table, goal, summary.get("rows", ()), folder))
    return "\n".join(lines)


def _goal(table: Table, goal: Goal, rows: Sequence[Any], folder: Path | None) -> str:
    verdict = judge(goal, rows)
    met = {True: "met", False: "**missed**", None: ""}[verdict.met]
    title = f"[{table.name}](results/{folder.name})" if folder else table.name
    reached = verdict_text(goal, verdict)
    wanted = {goal.method, *goal.of}
    compared = [set(r["seeds"]) for r in rows if r["method"] in wanted and _at(r, goal.memory)]
    seeds = f"{len(set.intersection(*compared))} of {table.seeds}" if compared and reached else ""
    cells = (title, str(goal.memory or ""), goal.method, goal_text(goal), goal.why, reached, seeds)
    return _row_of((*cells, met))


def _at(row: Mapping[str, Any], memory: int) -> bool:
    return row["memory"] in (0, memory) and bool(row["seeds"])


def demo_table(results: Path = RESULTS) -> str:
    """Markdown: the tables of the newest demo."""
    folders = sorted(results.glob("????-??-??_demo"))
    if not folders:
        return ""
    found = json.loads((folders[-1] / "result.json").read_text())
    lines = []
    for part in found["sections"]:
        lines += [f"**{part['title']}**", ""]
        lines += ["| method | final accuracy, % | forgetting, points | examples | bytes | time |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in part["table"]:
            cells = ("method", "accuracy", "forgetting", "memory_examples", "memory_bytes")
            lines.append("| " + " | ".join(row[c] for c in (*cells, "seconds")) + " |")
        lines.append("")
    source = f"benchmarks/results/{folders[-1].name}"
    lines += [
        "From the report, class-incremental, and the digits that are hardest to be sure of:",
        "",
        "![Accuracy on the tasks seen so far, for each method](docs/images/demo-accuracy.png)",
        "",
        "![Eighteen of the most memorable digits](docs/images/demo-memorable.png)",
        "",
    ]
    lines.append(f"Mean ± standard error over three seeds; time for one seed. [Record]({source}).")
    return "\n".join(lines)


# The README files ---------------------------------------------------------------------------------


def readmes(results: Path = RESULTS) -> dict[Path, str]:
    """What stands in the README files and in the pages of docs that have generated parts, with
    those as the records have them."""
    known = list(tables().values())
    parts = [goals(known, results), *(section(table, results) for table in known)]
    tags = "; ".join(f"[{tag}] {what}" for tag, what in TAGS.items())
    parts.append(f"Where published numbers come from: {tags}.")
    here, top = HERE / "README.md", HERE.parent / "README.md"
    folders = {table.name: newest(table.name, results) for table in known}
    there = {name: folder for name, folder in folders.items() if folder is not None}
    link, docs = "../benchmarks/results", HERE.parent / "docs"
    linked = goals(known, results).replace("](results/", "](benchmarks/results/")
    by_name = {table.name: table for table in known}

    def once(name: str, classes: int, unit: str) -> str:
        return stream_pages.seen_once(by_name[name], folders[name], classes, unit)

    bodies: Mapping[Path, Mapping[str, str]] = {
        here: {"tables": "\n\n".join(parts)},
        top: {"results": linked, "demo": demo_table(results)},
        docs / "which-prior.md": {
            "overview": prior_page.overview(known, there, link),
            "cost": prior_page.cost(results, link),
            "ablation": prior_page.ablation(known, there, link),
        },
        docs / "seen-once.md": {
            "animals": once("animals", 39, "photos"),
            "clinc150": once("clinc150", 150, "texts"),
        },
        docs / "task-free.md": {"elec2": stream_pages.task_free(folders["elec2"])},
    }
    return {page: _filled(page.read_text(), of) for page, of in bodies.items()}


def _filled(text: str, bodies: Mapping[str, str]) -> str:
    for name, body in bodies.items():
        text = _with(text, name, body)
    return text


def _with(text: str, name: str, body: str) -> str:
    start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(start)
    return f"{head}{start}\n{body}\n{end}{rest.split(end)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the last table in which a cell failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="which ones; all by default")
    default = os.environ.get("LIFELONG_DATA")
    parser.add_argument("--data", type=Path, default=Path(default) if default else None)
    parser.add_argument("--seeds", type=int, help="the tables' by default")
    parser.add_argument("--jobs", type=int, help="processes at once; the cores by default")
    parser.add_argument("--readme", action="store_true", help="only write the README files")
    options = parser.parse_args(argv)
    known, code = tables(), 0
    unknown = [name for name in options.names if name not in (*known, "demo")]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from demo, {', '.join(known)}")
    chosen = [] if options.readme else options.names or ["demo", *known]
    for name in chosen:
        if name == "demo":
            print(f"{demo(3).name}: done")
        else:
            code = compute(known[name], options.data, options.seeds, options.jobs) or code
    for path, text in readmes().items():
        path.write_text(text)
    return code


if __name__ == "__main__":
    sys.exit(main())

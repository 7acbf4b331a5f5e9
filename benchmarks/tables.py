"""The long reproductions: `make tables`. Each is a `lifelong run`, resumable after a kill.

    python -m benchmarks.tables [NAME ...] [--data DIR] [--parallel 2]

A result stays under benchmarks/results/DATE_NAME: config, versions, log, matrix of each seed. A
run that was interrupted goes on where it was. README.md of this folder is generated from the
records; a cell without a record is empty.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Reproduction:
    """One row of the table: the flags of `lifelong run`, and what was published."""

    name: str
    flags: tuple[str, ...]
    published: str
    note: str = ""


def _run(name: str, benchmark: str, prior: str, published: str, *more: str) -> Reproduction:
    return Reproduction(name, ("--benchmark", benchmark, "--prior", prior, *more), published)


# Settings that are not published were chosen on 10,000 of the training images, never on test ones.
REPRODUCTIONS: tuple[Reproduction, ...] = (
    _run("split-mnist_fromp", "split-mnist", "fromp", "99.3 (one run)", "--memory", "40"),
    _run("permuted-mnist_fromp", "permuted-mnist", "fromp", "94.8 (one run)", "--memory", "200"),
    _run(
        "permuted-mnist_gradient-reconstruction",
        "permuted-mnist",
        "gradient_reconstruction",
        "",
        "--memory",
        "200",
    ),
)


def reproduce(item: Reproduction, data: Path, seeds: int) -> Path:
    """Run, or go on with, one reproduction; its folder. Raises CalledProcessError."""
    folders = sorted(RESULTS.glob(f"????-??-??_{item.name}"))
    command = [sys.executable, "-m", "lifelong", "run"]
    if folders and (folders[-1] / "result.json").is_file():
        return folders[-1]
    if folders:
        command += ["--resume", str(folders[-1])]
    else:
        folders = [RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_{item.name}"]
        command += [*item.flags, "--data", str(data), "--seeds", str(seeds)]
        command += ["--threads", "1", "--out", str(folders[-1])]
    subprocess.run([*command, "--quiet"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _tidy(folders[-1])
    return folders[-1]


def _tidy(folder: Path) -> None:
    """A record needs no weights, and names no folder of one machine."""
    for checkpoint in folder.rglob("*.safetensors"):
        checkpoint.unlink()
    where = json.loads((folder / "config.json").read_text())["flags"]["data"]
    for path in (*folder.rglob("*.json"), *folder.rglob("*.toml"), *folder.rglob("*.txt")):
        path.write_text(path.read_text().replace(where, "$LIFELONG_DATA"))


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


def demo_table() -> str:
    """Markdown: the tables of the newest demo."""
    folders = sorted(RESULTS.glob("????-??-??_demo"))
    if not folders:
        return ""
    found = json.loads((folders[-1] / "result.json").read_text())
    lines = []
    for section in found["sections"]:
        lines += [f"**{section['title']}**", ""]
        lines += ["| method | final accuracy, % | forgetting, points | examples | bytes | time |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in section["table"]:
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


def table() -> str:
    """Markdown: a line for each reproduction that has a record."""
    lines = [
        "| benchmark and method | published, % | ours, % | forgetting, % | memory | seeds | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in REPRODUCTIONS:
        folders = sorted(RESULTS.glob(f"????-??-??_{item.name}"))
        result = folders[-1] / "result.json" if folders else None
        if result is None or not result.is_file():
            lines.append(f"| {item.name} | {item.published} | | | | | |")
            continue
        found = json.loads(result.read_text())
        size = f"{found['memory_examples']} examples, {found['memory_bytes'] / 1e6:.1f} MB"
        lines.append(
            f"| [{item.name}](results/{folders[-1].name}) | {item.published} "
            f"| {_percent(found['accuracy'])} | {_percent(found['forgetting'])} | {size} "
            f"| {len(found['accuracy']['per_seed'])} | {found['seconds']['mean']:.0f} |"
        )
    return "\n".join(lines)


def _percent(value: dict[str, float]) -> str:
    error = value.get("standard_error")
    spread = "" if error is None or error != error else f" ± {100 * error:.2f}"
    return f"{100 * value['mean']:.2f}{spread}"


def update_readmes() -> None:
    """Replace what stands between the marks of the two README files."""
    results = table()
    _fill(HERE / "README.md", "<!-- accuracy: start -->", "<!-- accuracy: end -->", results)
    top = HERE.parent / "README.md"
    _fill(top, "<!-- demo:begin -->", "<!-- demo:end -->", demo_table())
    linked = results.replace("](results/", "](benchmarks/results/")
    _fill(top, "<!-- results:begin -->", "<!-- results:end -->", linked)


def _fill(path: Path, start: str, end: str, body: str) -> None:
    head, rest = path.read_text().split(start)
    path.write_text(f"{head}{start}\n{body}\n{end}{rest.split(end)[1]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="which ones; all by default")
    default = os.environ.get("LIFELONG_DATA")
    parser.add_argument("--data", type=Path, default=Path(default) if default else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="how many at once, a thread each")
    options = parser.parse_args(argv)
    known = {item.name: item for item in REPRODUCTIONS}
    unknown = [name for name in options.names if name not in (*known, "demo")]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from demo, {', '.join(known)}")
    if not options.names or "demo" in options.names:
        print(f"{demo(3).name}: done")
    if options.data is None and options.names != ["demo"]:
        parser.error("say where the data are: --data DIR, or LIFELONG_DATA=DIR make tables")
    chosen = [known[name] for name in options.names if name != "demo"]
    if not options.names:
        chosen = list(REPRODUCTIONS)
    with ThreadPoolExecutor(options.parallel) as pool:
        for folder in pool.map(lambda item: reproduce(item, options.data, options.seeds), chosen):
            print(f"{folder.name}: done")
    update_readmes()


if __name__ == "__main__":
    main()

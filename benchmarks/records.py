"""A record of each run: benchmarks/results/DATE_speed/{config,versions,results}.json and log.txt.

``python -m benchmarks.records`` writes the newest record's table into benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_START, _END = "<!-- results: start -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Row:
    """One measurement: what, of which case, the value beside its bar (None: reported only)."""

    bar: str
    case: str
    value: float
    limit: float | None
    unit: str = "×"
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.limit is None or self.value <= self.limit

    @property
    def line(self) -> str:
        limit = "reported" if self.limit is None else f"bar {self.limit:g}"
        verdict = "" if self.limit is None else (", met" if self.met else ", MISSED")
        return f"{self.bar} | {self.case}: {self.value:.3f} {self.unit} ({limit}{verdict})"


def write(rows: list[Row], config: Mapping[str, Any]) -> Path:
    """Write the record of today; of measurements repeated on one day the last one stays."""
    now = datetime.now(UTC)
    folder = RESULTS / f"{now:%Y-%m-%d}_speed"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    old = json.loads(path.read_text()) if path.exists() else []
    new = [{**asdict(row), "met": row.met, "at": f"{now:%H:%M:%S}Z"} for row in rows]
    taken = {(row["bar"], row["case"]) for row in new}
    kept = [row for row in old if (row["bar"], row["case"]) not in taken]
    _dump(path, sorted(kept + new, key=lambda row: (row["bar"], row["case"])))
    _dump(folder / "config.json", dict(config))
    _dump(folder / "versions.json", _versions())
    with (folder / "log.txt").open("a") as log:
        log.write(f"{now:%Y-%m-%d %H:%M:%S}Z {' '.join(config.get('arguments', []))}\n")
        log.writelines(f"  {row.line}\n" for row in rows)
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for each measurement."""
    lines = ["| bar | case | measured | quartiles | at most | |", "|---|---|---:|---|---:|---|"]
    for row in rows:
        details = row["details"]
        spread = f"{details['low']:.2f} to {details['high']:.2f}" if "low" in details else ""
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        verdict = "" if row["limit"] is None else ("met" if row["met"] else "**missed**")
        value = f"{row['value']:.2f} {row['unit']}"
        lines.append(f"| {row['bar']} | {row['case']} | {value} | {spread} | {limit} | {verdict} |")
    return "\n".join(lines)


def update_readme() -> None:
    """Replace what stands between the two marks of the README."""
    folder = max(RESULTS.glob("*_speed"))
    rows = json.loads((folder / "results.json").read_text())
    readme = HERE / "README.md"
    head, rest = readme.read_text().split(_START)
    tail = rest.split(_END)[1]
    body = f"\nFrom `results/{folder.name}`:\n\n{table(rows)}\n"
    readme.write_text(f"{head}{_START}{body}{_END}{tail}")


def _versions() -> dict[str, str]:
    names = ("lifelong", "torch", "numpy", "pytest", "pytest-benchmark")
    found = {name: version(name) for name in names}
    return {
        **found,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=isinstance(value, dict)) + "\n")


if __name__ == "__main__":
    update_readme()
    sys.stdout.write((HERE / "README.md").read_text())

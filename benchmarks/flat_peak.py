"""The peak of memory as a data set and the number of tasks grow: flat, where memory has a budget.

    python -m benchmarks.flat_peak --out DIR [--only examples tasks returned]

examples   one task of 5,000 to 50,000 examples that are made a batch at a time, as a file or a
           stream would give them: steps of training, then the update of the recommended prior
           (scoring, choosing, curvature, strength)
tasks      1 to 50 tasks of 1,000 examples, one memory of 500 examples for all of them
returned   the same where the C library gives large freed blocks back to the system at once
           (``MALLOC_MMAP_THRESHOLD_=131072``, glibc's own first value, which it otherwise raises as
           it goes): what is alive, without what the library keeps for later

Each point is a process of its own, whose peak (VmHWM) is read at its end, with the interpreter and
torch in it. The bar: all within 5 % of their middle, half-way between the smallest and the largest;
how far the largest lies above the smallest is told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lifelong import Categorical, recommended
from lifelong.runs import log, versions

from .cases import CASES, Lazy

BAR = 0.05
SERIES = ("examples", "tasks", "returned")
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
CASE = CASES["MLP 784-256-256-10"]


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    examples: tuple[int, ...] = (5_000, 10_000, 25_000, 50_000)
    tasks: tuple[int, ...] = (1, 2, 5, 20, 50)
    task_size: int = 1_000
    memory: int = 500
    batch: int = 128


def learn(tasks: int, size: int, config: Config) -> None:
    """Train and update, task after task, never holding more than a batch of new examples."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, g = CASE.build(), torch.Generator().manual_seed(0)
    prior = recommended(Categorical(), memory=config.memory, total=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(tasks):
        data = Lazy(CASE.shape, size, batch_size=config.batch)
        prior = prior.prepare(model, data)
        for x, y in data:
            optimizer.zero_grad()
            prior.loss(model, x, y, num_data=size, batch_size=config.batch, generator=g).backward()
            optimizer.step()
        prior = prior.update(model, data, generator=g, batch_size=config.batch)


def peak() -> int:
    """VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("the system does not tell a process's peak of memory (VmHWM)")


def in_a_process(
    tasks: int, size: int, config: Config, environment: Mapping[str, str] | None = None
) -> int:
    """The peak of a process that learns so, with these variables beside ours."""
    words = [sys.executable, "-m", "benchmarks.flat_peak", "--point", str(tasks), str(size)]
    words += ["--config", json.dumps(asdict(config))]
    env = {**os.environ, **(environment or {})}
    return int(subprocess.run(words, check=True, capture_output=True, text=True, env=env).stdout)


def run(config: Config, out: Path, only: Sequence[str] = SERIES) -> dict:
    """Measure, and write the record."""
    over_tasks = [(tasks, config.task_size) for tasks in config.tasks]
    points = {
        "examples": [(1, size) for size in config.examples],
        "tasks": over_tasks,
        "returned": over_tasks,
    }
    found: dict[str, dict] = {}
    for name in only:
        peaks = []
        for tasks, size in points[name]:
            environment = RETURNED if name == "returned" else {}
            peaks.append(in_a_process(tasks, size, config, environment))
            line = f"{name}: {tasks} tasks of {size} examples: {peaks[-1] / 2**20:.1f} MiB"
            log(out, line)
            print(line, flush=True)
        growth = max(peaks) / min(peaks) - 1
        deviation = growth / (growth + 2)  # of either end from the middle
        found[name] = {"points": points[name], "peaks": peaks} | {
            "growth": growth,
            "deviation": deviation,
            "met": deviation <= BAR,
        }
    for name, value in (
        ("result.json", {"bar": BAR, **found}),
        ("config.json", asdict(config)),
        ("versions.json", versions()),
    ):
        (out / name).write_text(json.dumps(value, indent=1) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=SERIES, choices=SERIES)
    parser.add_argument("--point", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=json.loads, default={}, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.point is not None:
        learn(*given.point, Config(**given.config))
        print(peak())
        return 0
    if given.out is None:
        parser.error("--out DIR: where the record goes")
    run(Config(), given.out, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())

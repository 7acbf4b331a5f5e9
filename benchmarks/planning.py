"""What ``lifelong plan`` foretells beside what is measured here, for every preset.

    python -m benchmarks.planning --out DIR [--rounds 7]

CifarNet with heads of two classes, in the shapes of CIFAR, on one thread; values are drawn, since
they do not change what anything costs. Three readings, each as (foretold, measured):

bytes    ``Prior.num_bytes`` and the size of the file that ``Prior.save`` writes
step     milliseconds of a step of Adam with as many remembered examples as new ones
update   milliseconds of ``prior.prepare`` and ``prior.update`` of a task

Seconds start from one number, the examples a second that the network trains without a prior
(``networks.measured``), and are medians over rounds of CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lifelong import PathIntegral, planning
from lifelong.models import multiplies_bfloat16
from lifelong.networks import counted, measured
from lifelong.planning import Device, Work
from lifelong.presets import PRESETS
from lifelong.runs import log, versions

from . import step_cost
from .cases import CASES

CASE = "cifarnet"
OMITTED = ("joint", "separate")  # no prior of their own


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these.

    tasks: learned before; memory, examples: of each; batch: of new and of remembered examples.
    """

    methods: tuple[str, ...] = tuple(name for name in PRESETS if name not in OMITTED)
    tasks: int = 2
    memory: int = 100
    examples: int = 400
    batch: int = 64
    rounds: int = 7


def work_of(config: Config) -> Work:
    """The same in the terms of the cost model."""
    return Work(
        tasks=config.tasks,
        examples=config.tasks * config.examples,
        memory=config.tasks * config.memory,
        head=2,
        batch=config.batch,
        memory_batch=config.batch,
        optimizer="adam",
        augment=False,
    )


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median CPU time, after one that does not count."""
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def compare(method: str, config: Config, device: Device) -> dict[str, Any]:
    """Foretold and measured, of one preset."""
    case = CASES[step_cost.NETWORKS[CASE]]
    network = counted(CASE, case.build, case.shape, 4.0 * torch.Size(case.shape).numel())
    work = work_of(config)
    inner = step_cost.Config(
        methods=(method,),
        tasks=config.tasks,
        memory=config.memory,
        examples=config.examples,
        batch=config.batch,
    )
    model = case.build()
    prior = step_cost.prior_after(CASE, method, inner, model)
    fresh = planning.preset(method, work)
    with TemporaryDirectory() as folder:
        file = prior.save(Path(folder) / "prior").stat().st_size
    step = planning.step_seconds(fresh, network, work, device)
    heads = step_cost.heads(CASE, config.tasks)
    data = step_cost.examples(CASE, config.examples, heads[-1], seed=config.tasks)
    after = replace(
        work,
        tasks=work.tasks + 1,
        examples=work.examples + config.examples,
        memory=work.memory + config.memory,
    )
    update = planning.update_seconds(fresh, network, after, device)
    with ExitStack() as stack:
        one = step_cost.step(CASE, method, inner, stack, config.batch)
        took = seconds(one, config.rounds)
    path = None
    if prior.recipe.structure == "path":
        path = PathIntegral(model, torch.optim.SGD(model.parameters(), lr=0.1), prior, len(data))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # learned a little: at the old weights no strength is looked for
        for p in model.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=g))

    def again() -> object:
        return prior.prepare(model, data).update(model, data, path=path, generator=g)

    renewed = seconds(again, 3)
    foretold = planning.prior_bytes(fresh, network, work)
    return {
        "method": method,
        "bytes": [foretold, prior.num_bytes],
        "file": [foretold, file],
        "step": [1e3 * sum(step.values()), 1e3 * took],
        "update": [1e3 * sum(update.values()), 1e3 * renewed],
    }


def run(config: Config, out: Path) -> list[dict[str, Any]]:
    """Measure, and write the record."""
    torch.set_num_threads(1)
    case = CASES[step_cost.NETWORKS[CASE]]
    network = counted(CASE, case.build, case.shape)
    rate, bandwidth = measured(case.build(), case.shape, batch=2 * config.batch, steps=5)
    products = 4.0 if multiplies_bfloat16() else 1.0
    device = Device("one thread", 3 * network.flops * rate, 1e12, bandwidth, 1e9, products=products)
    rows = []
    for method in config.methods:
        rows.append(compare(method, config, device))
        text = "; ".join(
            f"{name} {p:,.1f} foretold, {m:,.1f} measured"
            for name, (p, m) in list(rows[-1].items())[1:]
        )
        log(out, f"{method}: {text}")
        print(f"{method}: {text}", flush=True)
    content = {"examples_per_second": rate, "bytes_per_second": bandwidth, "rows": rows}
    for name, value in (
        ("result.json", content),
        ("config.json", asdict(config)),
        ("versions.json", versions()),
    ):
        (out / name).write_text(json.dumps(value, indent=1) + "\n")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: measured over foretold, of each preset; docs/scaling.md has it."""
    lines = ["| preset | bytes | seconds of a step | of an update |", "|---|---|---|---|"]
    for row in rows:
        cells = []
        for kind in ("bytes", "step", "update"):
            foretold, took = row[kind]
            cells.append(f"{took / foretold:.2f}" if foretold else "none foretold")
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    given = parser.parse_args(argv)
    run(Config(rounds=given.rounds), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

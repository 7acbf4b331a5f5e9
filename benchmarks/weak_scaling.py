"""Weak scaling of a step with a prior beside that of a plain one, and what a step sends.

    python -m benchmarks.weak_scaling --out DIR [--cases mlp cifarnet] [--repeats 5]

Each process reads as many new and as many remembered examples as one process alone does, by
DistributedDataParallel over gloo. In every process a plain step and one with the recommended prior
take turns, A, B, B, A; groups of 1 and of 2 processes take turns too. The growth of a step is its
time with two processes over that with one, and

    excess = growth with the prior / growth of plain DDP,

whose bar is 1.05. Time is CPU time, summed over the processes and divided by their number, which
leaves out what processes wait for each other and for a machine with others on it; the same of wall
times stands beside it. One thread each.

What is sent is read from torch's profiler over one step: bytes of each collective. The bar: those
of the model's gradient, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from lifelong.data import head_mask
from lifelong.distributed import Ranks
from lifelong.models import multiplies_bfloat16
from lifelong.runs import log, versions

from . import step_cost
from .cases import CASES

METHOD = "recommended"
BAR = 1.05


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these.

    batch: new examples of each process, and as many remembered ones. rounds: of ``inner`` steps of
    each kind, in each group of processes. repeats: groups of each size.
    """

    cases: tuple[str, ...] = ("mlp", "cifarnet")
    sizes: tuple[int, ...] = (1, 2)
    batch: int = 64
    tasks: int = 3
    memory: int = 200
    examples: int = 1000
    rounds: int = 11
    inner: int = 5
    repeats: int = 5


def on_rank(rank: int, size: int, out: str, case: str, config: Config) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=5),
    )
    try:
        found = _measured(case, config)
        Path(out, f"{rank}.pkl").write_bytes(pickle.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _measured(case: str, config: Config) -> dict[str, Any]:
    sides = {"plain": _step(case, config, False), "prior": _step(case, config, True)}
    for work in sides.values():  # the first steps settle DDP's buckets
        for _ in range(3):
            work()
    sent = {name: _sent(work) for name, work in sides.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(config.rounds):
        names = list(sides) if number % 2 else list(sides)[::-1]
        for name in names:
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(config.inner):
                sides[name]()
            took = time.process_time() - cpu, time.perf_counter() - wall
            times[name].append((took[0] / config.inner, took[1] / config.inner))
    return {"sent": sent, "times": times}


def _step(case: str, config: Config, with_prior: bool) -> Callable[[], None]:
    inner = step_cost.Config(
        tasks=config.tasks, memory=config.memory, examples=config.examples, batch=config.batch
    )
    torch.manual_seed(0)
    model = CASES[step_cost.NETWORKS[case]].build()
    prior = step_cost.prior_after(case, METHOD, inner, model)
    head = step_cost.heads(case, config.tasks)[-1]
    data = step_cost.examples(case, config.examples, head, seed=config.tasks)
    prior = prior.prepare(model, data)
    if multiplies_bfloat16():
        prior = prior.rounded()  # as the learner does
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-5)
    ranks, g = Ranks(), torch.Generator().manual_seed(0)
    mine = slice(ranks.rank * config.batch, (ranks.rank + 1) * config.batch)
    x, y = data.inputs[mine], data.labels[mine]
    mask = head_mask(head, CASES[step_cost.NETWORKS[case]].build()(x[:1]).shape[1])

    def work() -> None:
        optimizer.zero_grad()
        if with_prior:
            loss = prior.loss(
                ddp,
                x,
                y,
                num_data=len(data),
                head=head,
                batch_size=config.batch * ranks.size,
                generator=g,
                ranks=ranks,
            )
        else:
            f = ddp(x)
            f = f if mask is None else f.masked_fill(~mask, -torch.inf)
            loss = F.cross_entropy(f, y)
        loss.backward()
        optimizer.step()

    return work


def _sent(work: Callable[[], None]) -> dict[str, int]:
    """Bytes that each kind of collective is given in one step, 4 a number."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        work()
    found: dict[str, int] = {}
    for event in seen.events() or ():
        if event.name.startswith("gloo:"):
            sizes = [torch.Size(shape).numel() for shape in event.input_shapes]
            found[event.name] = found.get(event.name, 0) + 4 * sum(sizes)
    return found


def group(size: int, case: str, config: Config) -> list[dict[str, Any]]:
    """What each of ``size`` processes has measured."""
    with TemporaryDirectory() as out:
        mp.spawn(on_rank, (size, out, case, config), nprocs=size)  # type: ignore[attr-defined]
        return [pickle.loads(Path(out, f"{rank}.pkl").read_bytes()) for rank in range(size)]


def compare(case: str, config: Config) -> dict[str, Any]:
    """Growths, their ratio, and what is sent."""
    cpu: dict[tuple[str, int], list[float]] = {}
    wall: dict[tuple[str, int], list[float]] = {}
    sent: Mapping[str, Any] = {}
    for _ in range(config.repeats):
        for size in config.sizes:
            found = group(size, case, config)
            sent = found[0]["sent"]
            for name in ("plain", "prior"):
                each = [[t[i] for t in f["times"][name]] for i in (0, 1) for f in found]
                cpu.setdefault((name, size), []).append(
                    sum(median(times) for times in each[:size]) / size
                )
                wall.setdefault((name, size), []).append(max(median(t) for t in each[size:]))
    few, many = config.sizes
    model = CASES[step_cost.NETWORKS[case]].build()
    return {
        "case": case,
        "gradient_bytes": 4 * sum(p.numel() for p in model.parameters()),
        "sent": sent,
        **{
            kind: {
                "milliseconds": {f"{n}, {s}": 1e3 * median(v) for (n, s), v in times.items()},
                "excess": (median(times["prior", many]) / median(times["prior", few]))
                / (median(times["plain", many]) / median(times["plain", few])),
            }
            for kind, times in (("cpu", cpu), ("wall", wall))
        },
    }


def run(config: Config, out: Path) -> list[dict[str, Any]]:
    """Measure, and write the record."""
    rows = []
    for case in config.cases:
        rows.append(compare(case, config))
        row = rows[-1]
        text = (
            f"{case}: excess {row['cpu']['excess']:.3f} of CPU and {row['wall']['excess']:.3f} of "
            f"wall time; sent {row['sent']['prior']}, of {row['gradient_bytes']} in the gradient"
        )
        log(out, text)
        print(text, flush=True)
    for name, value in (
        ("result.json", {"bar": BAR, "rows": rows}),
        ("config.json", asdict(config)),
        ("versions.json", versions()),
    ):
        (out / name).write_text(json.dumps(value, indent=1) + "\n")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(Config.cases), choices=Config.cases)
    parser.add_argument("--repeats", type=int, default=Config.repeats)
    given = parser.parse_args(argv)
    run(Config(cases=tuple(given.cases), repeats=given.repeats), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a training step costs with each preset's prior, beside experience replay's.

    python -m benchmarks.step_cost --out DIR [--cases mlp cifarnet] [--readings batch all task]

The bar: no method slower than 1.5 times experience replay at the same memory. Each prior has
learned 5 tasks, of which it keeps as many examples as replay does. Three readings:

batch    a step with 128 new examples and 128 remembered ones
all      a step with 128 new examples and everything that is remembered, as FROMP was published
task     a whole task: its epochs of steps with 128 remembered ones, then memorise and recall

Values are drawn, since they do not change what a step costs, in the shapes of MNIST (no heads) and
of CIFAR (heads of 2 classes). All methods are timed in each round, in an order that turns from
round to round, in one process and one thread; a method's ratio is the median over rounds of its
time over that of replay in the same round. Time is the CPU time of the process. ``separate`` has
no prior, and ``joint`` grows with the past by design.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, get_args

import torch
from torch import nn

from lifelong import Categorical, Examples, Learner, PathIntegral, Prior, Task
from lifelong.data import Head
from lifelong.models import multiplies_bfloat16
from lifelong.presets import PRESETS
from lifelong.runs import log, versions

from .cases import CASES, CLASSES, draw
from .ratios import Work

REFERENCE = "experience_replay"
BAR = 1.5
OMITTED = ("joint", "separate")
TOTAL = ("experience_replay", "der", "derpp")  # one memory for all tasks, unless told otherwise
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gradient_reconstruction, stored": ("gradient_reconstruction", {"gradient": "stored"}),
    "gradient_reconstruction, kronecker": ("gradient_reconstruction", {"structure": "kronecker"}),
    "gradient_reconstruction, curvature of 1,000": (
        "gradient_reconstruction",
        {"curvature_examples": 1000},
    ),
    "recommended, kronecker": ("recommended", {"structure": "kronecker"}),
    "online_laplace, kronecker": ("online_laplace", {"structure": "kronecker"}),
    "fromp, identity": ("fromp", {"kernel": "identity"}),
}
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS if name not in OMITTED},
    **VARIANTS,
}
Reading = Literal["batch", "all", "task"]
READINGS: tuple[Reading, ...] = get_args(Reading)
NETWORKS = {"mlp": "MLP 784-256-256-10", "cifarnet": "CifarNet"}


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these.

    memory: examples kept of each task; examples: of each of ``tasks`` before; next: of the whole
    task that is timed; seconds: for each case and reading.
    """

    cases: tuple[str, ...] = tuple(NETWORKS)
    readings: tuple[Reading, ...] = READINGS
    methods: tuple[str, ...] = tuple(METHODS)
    tasks: int = 5
    memory: int = 200
    examples: int = 1000
    next: int = 5000
    batch: int = 128
    epochs: int = 5
    seconds: float = 50.0


@dataclass(frozen=True)
class Cost:
    """ratio: median over rounds of the time over replay's; low, high: its quartiles."""

    method: str
    ratio: float
    low: float
    high: float
    milliseconds: float
    rounds: int


# ------------------------------------------------------------------------------- what is measured


def heads(case: str, tasks: int) -> list[Head | None]:
    """Of the tasks that were learned and of the next one."""
    if case == "mlp":
        return [None] * (tasks + 1)
    pairs = [(2 * i, 2 * i + 1) for i in range(CLASSES // 2)]
    return [pairs[i % len(pairs)] for i in range(tasks + 1)]


def examples(case: str, n: int, head: Head | None, seed: int) -> Examples:
    """n of them with the labels of the head."""
    inputs, labels = draw(CASES[NETWORKS[case]].shape, n, seed)
    if head is not None:
        labels = torch.tensor(head)[labels % len(head)]
    return Examples(inputs, labels, head=head)


def prior_after(case: str, method: str, config: Config, model: nn.Module) -> Prior:
    """The method's prior after all tasks but the last."""
    preset, settings = METHODS[method]
    if preset in TOTAL:
        settings = {**settings, "memory": config.memory, "total": False}
    elif preset in ("kprior", "fromp", "gradient_reconstruction", "recommended"):
        settings = {**settings, "memory": config.memory}
    prior = PRESETS[preset](Categorical(), **settings)
    g = torch.Generator().manual_seed(0)
    for seed, head in enumerate(heads(case, config.tasks)[:-1]):
        data = examples(case, config.examples, head, seed)
        path = None
        if prior.recipe.structure == "path":
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            path = PathIntegral(model, optimizer, prior, len(data))
        prior = prior.update(model, data, path=path, generator=g)
    return prior


def step(case: str, method: str, config: Config, stack: ExitStack, memory: int | None) -> Work:
    """One step of Adam with ``memory`` remembered examples, None for all of them."""
    model = CASES[NETWORKS[case]].build()
    prior = prior_after(case, method, config, model)
    head = heads(case, config.tasks)[-1]
    data = examples(case, config.examples, head, seed=config.tasks)
    prior = prior.prepare(model, data)
    if multiplies_bfloat16():
        prior = prior.rounded()  # as the learner does
    x, y = data.inputs[: config.batch], data.labels[: config.batch]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    if prior.recipe.structure == "path":
        stack.enter_context(PathIntegral(model, optimizer, prior, len(data)))
    g = torch.Generator().manual_seed(0)

    def work() -> None:
        optimizer.zero_grad()
        loss = prior.loss(
            model, x, y, num_data=len(data), head=head, batch_size=memory, generator=g
        )
        loss.backward()
        optimizer.step()

    return work


def whole_task(case: str, method: str, config: Config) -> Work:
    """The next task, from the same weights and prior each time."""
    model = CASES[NETWORKS[case]].build()
    prior = prior_after(case, method, config, model)
    data = examples(case, config.next, heads(case, config.tasks)[-1], seed=config.tasks)
    task = Task(config.tasks, "next", data)

    def work() -> None:
        Learner(
            copy.deepcopy(model),
            prior,
            epochs=config.epochs,
            batch_size=config.batch,
            memory_batch_size=config.batch,
        ).learn(task)

    return work


# -------------------------------------------------------------------------------------- measuring


def compare(works: Mapping[str, Work], seconds: float, *, warm: bool) -> list[Cost]:
    """Rounds over all of ``works`` until the time is up, three at least and one uncounted before.

    warm: once untimed before each, which pays for what the method before left in the caches.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    start, turn = time.perf_counter(), 0
    while turn < 4 or time.perf_counter() - start < seconds:
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            if warm:
                works[name]()
            before = time.process_time()
            works[name]()
            if turn:
                times[name].append(time.process_time() - before)
        turn += 1
    return [_cost(name, times[name], times[REFERENCE]) for name in names]


def _cost(name: str, ours: list[float], reference: list[float]) -> Cost:
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return Cost(name, median(ratios), low, high, 1e3 * median(ours), len(ratios))


def measure(case: str, reading: Reading, config: Config) -> list[Cost]:
    """All methods of one case in one reading."""
    with ExitStack() as stack:
        works: dict[str, Work] = {}
        for method in config.methods:
            if reading == "task":
                works[method] = whole_task(case, method, config)
            else:
                memory = config.batch if reading == "batch" else None
                works[method] = step(case, method, config, stack, memory)
        return compare(works, config.seconds, warm=reading != "task")


def run(config: Config, out: Path) -> dict[str, Any]:
    """Measure, and write the record; what is not measured now stays in it."""
    path = out / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for case in config.cases:
        for reading in config.readings:
            costs = measure(case, reading, config)
            rows = {row["method"]: row for row in result.get(f"{case}, {reading}", [])}
            rows |= {cost.method: asdict(cost) for cost in costs}
            result[f"{case}, {reading}"] = [rows[name] for name in METHODS if name in rows]
            for cost in costs:
                log(out, f"{case} | {reading} | {cost.method}: {cost.ratio:.3f} x replay")
            _dump(path, result)
    settings = asdict(config)
    for chosen in ("cases", "readings", "methods"):
        del settings[chosen]  # the result says it
    _dump(out / "config.json", {"bar": BAR, "reference": REFERENCE, **settings})
    _dump(out / "versions.json", versions())
    return result


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each method, a column for each reading of a case; bold above the bar."""
    columns = list(result)
    ratios = {c: {row["method"]: row["ratio"] for row in result[c]} for c in columns}
    methods = dict.fromkeys(m for c in columns for m in ratios[c])
    lines = ["| method | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for method in methods:
        cells = (_cell(ratios[c].get(method)) for c in columns)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"**{ratio:.2f}**" if ratio > BAR else f"{ratio:.2f}"


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--readings", nargs="*", default=list(READINGS), choices=list(READINGS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seconds", type=float, default=Config.seconds)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = Config(
        cases=tuple(options.cases),
        readings=tuple(options.readings),
        methods=tuple(dict.fromkeys([REFERENCE, *options.methods])),
        seconds=options.seconds,
    )
    print(table(run(config, options.out)))


if __name__ == "__main__":
    main()

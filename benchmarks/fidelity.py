"""Does fidelity, measured beforehand, say how much accuracy the next task will cost?

    python -m benchmarks.fidelity --data DIR --out DIR [--smoke] [--parts cells coverage curve]

cells: a network learns the first t tasks of a stream together. A prior is made of them, with a
method and a number of examples kept of each task; its fidelity is measured with the past at hand.
Then task t + 1 is learned under it, and the accuracy lost on the past's test examples is written
down beside. Which number predicts was chosen on the digits (development) and then read once on
MNIST (confirmation).
coverage: of how many samples of the past does the bootstrap's interval hold the full data's value?
curve: the curve of one reading beside the fidelity of priors that were really made, and its time.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lifelong
from lifelong import Categorical, Examples, Posterior, Prior, TaskStream, memory_plots
from lifelong.benchmarks import mlp
from lifelong.budget import Fidelity
from lifelong.data import head_mask
from lifelong.memory_plots import spearman
from lifelong.models import parameters, snapshot
from lifelong.readers import find, load
from lifelong.reconstruction import fidelity, fidelity_curve, rehearse
from lifelong.runs import versions
from lifelong.streams import permuted, split_by_class
from lifelong.toys import digits

LIKELIHOOD = Categorical()
SIDE = 10  # MNIST's images, shrunk by a box filter


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    development: tuple[str, ...] = ("split-digits", "permuted-digits")
    confirmation: tuple[str, ...] = ("split-mnist", "permuted-mnist")
    memory: tuple[int, ...] = (0, 2, 10, 50, 200)
    tasks: int = 4  # of the permuted streams
    per_task: int = 1000  # training examples of a MNIST task
    hidden: int = 64
    epochs: int = 15
    batch_size: int = 32
    lr: float = 5e-3
    precision: float = 1.0  # of the weights, in the posterior that measures
    samples: int = 4
    scale: float = 0.1
    seeds: tuple[int, ...] = (0,)
    trials: int = 200
    trial_examples: int = 300
    trial_memory: int = 20


SMOKE = Config(
    development=("split-digits",),
    confirmation=(),
    memory=(0, 5),
    hidden=8,
    epochs=1,
    samples=1,
    trials=3,
    trial_examples=60,
    trial_memory=5,
)

METHODS: dict[str, Callable[[int], Prior]] = {
    "kprior": lambda m: lifelong.kprior(LIKELIHOOD, memory=m),
    "kprior, N/M": lambda m: lifelong.kprior(LIKELIHOOD, memory=m, population=True),
    "gradient_reconstruction": lambda m: lifelong.gradient_reconstruction(
        LIKELIHOOD, memory=m, strength=1.0
    ),
    "fromp": lambda m: lifelong.fromp(LIKELIHOOD, memory=m, strength=1.0),
    "experience_replay": lambda m: lifelong.experience_replay(
        LIKELIHOOD, memory=m, total=False, balanced=True
    ),
}
WITHOUT_MEMORY = ("kprior", "gradient_reconstruction")  # of the others nothing is left


def stream(name: str, config: Config, data: Path | None) -> TaskStream:
    if name.endswith("digits"):
        train, test = digits()
    else:
        if data is None:
            raise SystemExit("mnist needs --data, the folder that holds mnist-train.parquet")
        train, test = (load(find(data, "mnist", s), size=(SIDE, SIDE)) for s in ("train", "test"))
        some = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        train = train[some[: config.per_task * (5 if name.startswith("split") else 1)]]
    if name.startswith("split"):
        return split_by_class(train, test, scenario="class", name=name)
    return permuted(train, test, num_tasks=config.tasks, name=name)


# --- cells ----------------------------------------------------------------------------------------


def masked(model: nn.Module, inputs: Any, head: Any) -> torch.Tensor:
    f = model(inputs)
    return LIKELIHOOD.mask(f, head_mask(head, f.shape[1]))


def learn(model: nn.Module, tasks: list[Examples], prior: Prior, config: Config, seed: int) -> None:
    """All tasks together under the prior; the batches of each are of that task alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = adam(config)(parameters(model).values())
    count = sum(len(task) for task in tasks)
    for _ in range(config.epochs):
        parts = [
            (task, index)
            for task in tasks
            for index in torch.randperm(len(task), generator=generator).split(config.batch_size)
        ]
        for k in torch.randperm(len(parts), generator=generator).tolist():
            task, index = parts[k]
            inputs, labels, _ = task.batch(index)
            loss = prior.loss(model, inputs, labels, num_data=count, head=task.head)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def adam(config: Config) -> Callable[..., torch.optim.Optimizer]:
    return lambda params: torch.optim.Adam(params, lr=config.lr)


@torch.no_grad()
def accuracy(model: nn.Module, tests: list[Examples]) -> float:
    hits = 0
    for test in tests:
        inputs, labels, _ = test.batch(slice(None))
        hits += int((masked(model, inputs, test.head).argmax(1) == labels).sum())
    return hits / sum(len(test) for test in tests)


def posterior(model: nn.Module, past: list[Examples], config: Config) -> Posterior:
    parts = [lifelong.diagonal_curvature(model, task, LIKELIHOOD) for task in past]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return Posterior(snapshot(parameters(model)), total, config.precision)


def cells(name: str, config: Config, data: Path | None, seed: int, log: Log) -> list[dict]:
    """One row for each method, memory and number of past tasks."""
    tasks, rows = list(stream(name, config, data)), []
    features = tasks[0].train.batch(slice(0, 1)).inputs.flatten(1).shape[1]
    for t in range(1, len(tasks)):
        torch.manual_seed(seed)
        model = mlp(features, config.hidden, config.hidden, 10)
        past, tests = [x.train for x in tasks[:t]], [x.test for x in tasks[:t]]
        learn(model, past, lifelong.finetune(LIKELIHOOD), config, seed)
        before, measure = accuracy(model, tests), posterior(model, past, config)
        for method, make in METHODS.items():
            for memory in config.memory:
                if memory == 0 and method not in WITHOUT_MEMORY:
                    continue
                prior = make(memory)
                for part in past:
                    generator = torch.Generator().manual_seed(seed)
                    prior = prior.update(model, part, generator=generator)
                row = {"stream": name, "seed": seed, "past_tasks": t, "method": method}
                row |= {"memory": memory, "accuracy_before": before}
                row |= measured(prior, model, past, measure, config, seed)
                net = copy.deepcopy(model)
                learn(net, [tasks[t].train], prior, config, seed + 1)
                row["lost"] = before - accuracy(net, tests)
                row["accuracy_new"] = accuracy(net, [tasks[t].test])
                rows.append(row)
        log(f"  {name}, {t} past tasks: {len(rows)} cells so far")
    return rows


def measured(
    prior: Prior,
    model: nn.Module,
    past: list[Examples],
    measure: Posterior,
    config: Config,
    seed: int,
) -> dict[str, float]:
    """Numbers of the past and the prior alone; the next task takes no part."""
    generator = torch.Generator().manual_seed(seed)
    path = rehearse(prior, model, past, optimizer=adam(config), generator=generator)
    found = fidelity(
        prior, model, past, posterior=measure, samples=config.samples, scale=config.scale,
        path=path, generator=generator,
    )  # fmt: skip
    assert found.samples is not None
    assert found.path is not None
    count = found.num_data
    return {
        "missed_per_example": found.path.missed / count,
        "charged_per_example": found.path.charged / count,
        "fidelity_on_path": found.path.fidelity,
        "cosine_on_path": found.path.cosine,
        "fidelity": found.samples.fidelity,
        "cosine": found.samples.cosine,
        "share": sum(min(1.0, max(0.0, s.value)) for s in found.strata) / len(found.strata),
    }


PREDICTORS = {  # name -> sign: what should rise with the accuracy lost
    "missed_per_example": 1,
    "charged_per_example": 1,
    "fidelity_on_path": -1,
    "cosine_on_path": -1,
    "fidelity": -1,
    "cosine": -1,
    "share": -1,
}
CHOSEN = "missed_per_example"


def correlations(rows: list[dict]) -> dict[str, float | None]:
    """Of each predictor with the accuracy lost; None where one of the two is constant."""
    lost = np.array([row["lost"] for row in rows])
    found = {
        name: spearman(sign * np.array([row[name] for row in rows]), lost)
        for name, sign in PREDICTORS.items()
    }
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def interval(rows: list[dict], seed: int = 0, resamples: int = 1000) -> list[float]:
    """Bootstrap over cells of the chosen predictor's rank correlation: 95 %."""
    generator = np.random.default_rng(seed)
    a = np.array([PREDICTORS[CHOSEN] * row[CHOSEN] for row in rows])
    b = np.array([row["lost"] for row in rows])
    draws = generator.integers(len(rows), size=(resamples, len(rows)))
    values = [spearman(a[i], b[i]) for i in draws]
    return [float(q) for q in np.nanquantile(values, [0.025, 0.975])]


def summary(rows: list[dict], names: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    groups = {name: [r for r in rows if r["stream"] == name] for name in names}
    groups["all"] = [r for r in rows if r["stream"] in names]
    for method in METHODS:
        groups[f"all, {method}"] = [r for r in groups["all"] if r["method"] == method]
    for name, group in groups.items():
        if len(group) > 2:
            found[name] = {"cells": len(group), "spearman": correlations(group)}
            found[name]["interval_95"] = interval(group)
    return found


# --- coverage -------------------------------------------------------------------------------------


def coverage(config: Config, log: Log) -> dict[str, Any]:
    """How often the interval from a sample holds the value of all data, at the same weights."""
    train, _ = digits()
    torch.manual_seed(0)
    model = mlp(64, config.hidden, config.hidden, 10)
    learn(model, [train], lifelong.finetune(LIKELIHOOD), config, 0)
    measure = posterior(model, [train], config)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for method in ("kprior", "gradient_reconstruction"):
        prior = METHODS[method](config.trial_memory)
        prior = prior.update(model, train, generator=torch.Generator().manual_seed(0))
        draws = measure.sample(config.samples, generator)
        path = [
            {n: a + config.scale * (draws[n][s] - a) for n, a in measure.mean.items()}
            for s in range(config.samples)
        ]

        def look(n: int | None, seed: int, prior: Prior = prior, path: Any = path) -> Any:
            return fidelity(
                prior, model, train, posterior=measure, samples=0, path=path, num_examples=n,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip

        truth = look(None, 0)
        inside, shares, widths, values = 0, 0, [], []
        for trial in range(config.trials):
            one = look(config.trial_examples, 1000 + trial)
            low, high = one.path.interval
            inside += low <= truth.path.fidelity <= high
            values.append(one.path.fidelity)
            widths.append(high - low)
            held = [
                s.interval[0] <= truth.classes[c].value <= s.interval[1]
                for c, s in one.classes.items()
            ]
            shares += sum(held) / len(held)
        rate = inside / config.trials
        found[method] = {
            "fidelity_of_all": truth.path.fidelity,
            "median_estimate": float(np.median(values)),
            "median_width": float(np.median(widths)),
            "coverage": rate,
            "standard_error": math.sqrt(max(rate * (1 - rate), 1e-4) / config.trials),
            "coverage_of_class_shares": shares / config.trials,
            "trials": config.trials,
            "examples": config.trial_examples,
            "of": len(train),
        }
        log(f"  coverage, {method}: {json.dumps(found[method])}")
    return found


# --- curve ----------------------------------------------------------------------------------------


def curve(config: Config, log: Log) -> dict[str, Any]:
    """The curve of one reading, priors really made, and the time beside passes over the data."""
    train, _ = digits()
    torch.manual_seed(0)
    model = mlp(64, config.hidden, config.hidden, 10)
    learn(model, [train], lifelong.finetune(LIKELIHOOD), config, 0)
    sizes = tuple(m for m in (*config.memory, 500, 1000) if 0 < m < len(train))
    found: dict[str, Any] = {"sizes": sizes}

    def made_of(method: str, m: int) -> Prior:
        """With the data's own gradient: an error at the anchor is not the memory's."""
        prior = METHODS[method](m)
        return replace(prior, recipe=replace(prior.recipe, gradient="stored"))

    for method in ("kprior", "kprior, N/M", "gradient_reconstruction"):
        predicted, made = [], []
        for seed in range(3):
            one = fidelity_curve(
                made_of(method, 200), model, train, sizes=sizes, probes=16,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            predicted.append(one.values)
        for m in sizes:
            prior = made_of(method, m).update(
                model, train, generator=torch.Generator().manual_seed(0)
            )
            report = fidelity(
                prior, model, train, samples=8, scale=config.scale,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            made.append(report.fidelity)
        mean = [sum(v) / len(v) for v in zip(*predicted, strict=True)]
        found[method] = {"curve": mean, "made": made, "curve_by_seed": predicted}
        log(f"  curve, {method}: {[f'{v:.2f}' for v in mean]}, made {[f'{v:.2f}' for v in made]}")
    found["budgets"] = {}
    for target in (0.5, 0.8, 0.95):
        prior = lifelong.kprior(LIKELIHOOD, memory=Fidelity(target))
        items = prior.memorise(model, train, generator=torch.Generator().manual_seed(0))
        found["budgets"][str(target)] = 0 if items is None else len(items)
    log(f"  examples that reach a fidelity: {found['budgets']}")
    return found


def speed(config: Config, log: Log) -> dict[str, Any]:
    """Medians of seconds: one pass (forward and backward, batches of 512), curve, update."""
    train, _ = digits()
    big = Examples(train.inputs.repeat(8, 1, 1, 1), train.labels.repeat(8))
    torch.manual_seed(0)
    model = mlp(64, 256, 256, 10)

    def one_pass() -> None:
        for start in range(0, len(big), 512):
            inputs, labels, _ = big.batch(slice(start, start + 512))
            loss = LIKELIHOOD.nll(model(inputs), labels).mean()
            torch.autograd.grad(loss, list(model.parameters()))

    prior = lifelong.kprior(LIKELIHOOD, memory=200)
    weights = lifelong.gradient_reconstruction(LIKELIHOOD, memory=200, strength=1.0)
    jobs: dict[str, Callable[[], Any]] = {
        "pass": one_pass,
        "curve, kprior": lambda: fidelity_curve(prior, model, big),
        "curve, gradient_reconstruction": lambda: fidelity_curve(
            weights, model, big, sizes=(0, 50, 200)
        ),
        "update, kprior": lambda: prior.update(model, big),
        "update, gradient_reconstruction": lambda: weights.update(model, big),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(2 if config == SMOKE else 7):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratios = {name: value / medians["pass"] for name, value in medians.items()}
    log(f"  passes of {len(big):,} examples: {ratios}")
    return {"examples": len(big), "seconds": medians, "passes": ratios}


# --- record ---------------------------------------------------------------------------------------


class Log:
    """Lines on the screen, and for log.txt."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)


PARTS = ("cells", "coverage", "curve", "speed", "figures")


def run(
    config: Config,
    data: Path | None,
    out: Path,
    parts: tuple[str, ...] = PARTS,
    streams: tuple[str, ...] = (),
    merged: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """Parts and streams that were not asked for stay as they are in the record, and those of the
    records in ``merged`` are added."""
    out.mkdir(parents=True, exist_ok=True)
    log, path = Log(), out / "result.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    for other in merged:
        found = json.loads((other / "result.json").read_text())
        result = {**result, **found, "cells": result.get("cells", []) + found.get("cells", [])}
        log.lines += (other / "log.txt").read_text().splitlines()
    start = time.perf_counter()
    if "cells" in parts:
        names = streams or (*config.development, *config.confirmation)
        rows = [row for row in result.get("cells", []) if row["stream"] not in names]
        for name in names:
            for seed in config.seeds:
                rows += cells(name, config, data, seed, log)
        result["cells"] = rows
    result |= told(result.get("cells", []), config, log)
    if "coverage" in parts:
        result["coverage"] = coverage(config, log)
    if "curve" in parts:
        result["curve"] = curve(config, log)
    if "speed" in parts:
        result["speed"] = speed(config, log)
    if "figures" in parts:
        figures(result, config, out)
    log(f"{', '.join(parts)}: {time.perf_counter() - start:.0f} s")
    path.write_text(json.dumps(result, indent=1) + "\n")
    settings = {**asdict(config), "git": revision()}
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (out / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    with (out / "log.txt").open("a") as file:
        file.writelines(line + "\n" for line in log.lines)
    return result


def figures(result: dict[str, Any], config: Config, out: Path) -> None:
    """predicted.png of the confirmation's cells, curve.png: what the record holds of them."""
    rows = [row for row in result.get("cells", []) if row["stream"] in config.confirmation]
    if rows:
        figure = memory_plots.predicted_against_lost(
            [row[CHOSEN] for row in rows],
            [row["lost"] for row in rows],
            groups=[row["method"] for row in rows],
            log=True,
        )
        figure.savefig(out / "predicted.png")
    if "curve" in result:
        found = result["curve"]
        lines = {}
        for method in ("kprior", "kprior, N/M"):
            lines[f"{method}: curve"] = found[method]["curve"]
            lines[f"{method}: made"] = found[method]["made"]
        memory_plots.fidelity_against_memory(found["sizes"], lines).savefig(out / "curve.png")


def told(rows: list[dict], config: Config, log: Log) -> dict[str, Any]:
    """The rank correlations of both sets of streams, on the screen too."""
    result: dict[str, Any] = {"chosen": CHOSEN}
    for name in ("development", "confirmation"):
        result[name] = summary(rows, getattr(config, name))
        for group, found in result[name].items():
            value, (low, high) = found["spearman"][CHOSEN], found["interval_95"]
            log(
                f"{name}, {group}: {found['cells']} cells, {CHOSEN} {value or 0:.3f} "
                f"({low:.2f} to {high:.2f}); {json.dumps(found['spearman'])}"
            )
    return result


def revision() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with mnist-train.parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--streams", nargs="*", default=[], help="of the cells; all by default")
    parser.add_argument("--merge", nargs="*", type=Path, default=[], help="records to add first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(
        SMOKE if options.smoke else Config(),
        options.data,
        options.out,
        tuple(options.parts),
        tuple(options.streams),
        tuple(options.merge),
    )


if __name__ == "__main__":
    main()

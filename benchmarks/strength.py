"""Strength "auto" beside a grid: the final average accuracy of gradient reconstruction on streams.

    python -m benchmarks.strength --data DIR --out DIR [--only STREAM] [--epochs 2] [--seeds 3]

Each stream has one file, written after each run, so that the same command goes on where it was
stopped. The rule was developed on held-out *training* digits, 10,000 training images of MNIST and
held-out training images of USPS (``--validate`` holds out a quarter of the training examples, as
there); the tests took no part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lifelong
from lifelong.benchmarks import BENCHMARKS, learner_options, mlp
from lifelong.checkpoint import write as write_file
from lifelong.config import Training
from lifelong.data import Examples
from lifelong.learner import Learner
from lifelong.presets import PRESETS
from lifelong.readers import find, load
from lifelong.runs import versions
from lifelong.streams import TaskStream, permuted, split_by_class
from lifelong.toys import digits

GRID = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)


@dataclass(frozen=True)
class Setting:
    """A stream with its network, its training and the strengths of the grid."""

    data: str  # "digits", "mnist" or "usps"
    scenario: str  # "task", "class" or "permuted"
    sizes: tuple[int, ...]
    memory: int
    training: Training
    grid: tuple[float, ...] = GRID
    seeds: int = 3


_MNIST = Training(epochs=3, batch_size=128, lr=1e-4)
_USPS = Training(epochs=10, batch_size=64, lr=1e-3)
_PERMUTED = Training(epochs=2, batch_size=128, memory_batch_size=200, lr=2e-3, schedule="one-cycle")
_DIGITS = BENCHMARKS["split-digits"].training
SETTINGS: Mapping[str, Setting] = {
    "split-digits-task": Setting("digits", "task", (64, 100, 100, 10), 20, _DIGITS),
    "split-digits-class": Setting("digits", "class", (64, 100, 100, 10), 20, _DIGITS),
    "split-usps-task": Setting("usps", "task", (256, 100, 100, 10), 20, _USPS),
    "split-usps-class": Setting("usps", "class", (256, 100, 100, 10), 20, _USPS),
    "split-mnist-task": Setting("mnist", "task", (784, 256, 256, 10), 40, _MNIST, GRID[:5]),
    "permuted-mnist": Setting(
        "mnist", "permuted", (784, 100, 100, 10), 200, _PERMUTED, GRID[:4], seeds=1
    ),
}


def stream(setting: Setting, folder: Path | None, *, validate: bool = False) -> TaskStream:
    """Its tasks; with ``validate`` the tests are a quarter of the training examples, held out."""
    if setting.data == "digits":
        train, test = digits()
    else:
        if folder is None:
            raise SystemExit("this stream reads data: say --data DIR")
        train, test = (load(find(folder, setting.data, s), split=s) for s in ("train", "test"))
    if validate:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        held, kept = order[: len(train) // 4], order[len(train) // 4 :]
        train, test = (Examples(train.inputs[i], train.labels[i]) for i in (kept, held))  # type: ignore[index]
    if setting.scenario == "permuted":
        return permuted(train, test, num_tasks=10)
    return split_by_class(train, test, scenario=setting.scenario)  # type: ignore[arg-type]


def run(
    setting: Setting, tasks: TaskStream, preset: str, strength: float | str, seed: int
) -> dict[str, Any]:
    """Learn the stream once."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = mlp(*setting.sizes)
    options = {"memory": setting.memory} if preset == "gradient_reconstruction" else {}
    prior = PRESETS[preset](lifelong.Categorical(), strength=strength, **options)
    learner = Learner(model, prior, seed=seed, **learner_options(setting.training))
    learner.run(tasks)
    last = learner.accuracy[-1]
    return {
        "accuracy": sum(last) / len(last),
        "tasks": last,
        "strengths": list(learner.prior.strengths),
        "seconds": time.perf_counter() - start,
    }


def cells(setting: Setting) -> Iterable[tuple[str, float | str, int]]:
    """(key, strength, seed): the chosen strength first."""
    for strength in ("auto", *setting.grid):
        for seed in range(setting.seeds):
            name = strength if isinstance(strength, str) else f"{strength:g}"
            yield f"{name}/{seed}", strength, seed


def measure(
    name: str,
    setting: Setting,
    out: Path,
    folder: Path | None,
    *,
    preset: str = "gradient_reconstruction",
    validate: bool = False,
) -> dict[str, Any]:
    """All cells of one stream that ``out`` does not hold yet."""
    path = out / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    tasks = None
    for key, strength, seed in cells(setting):
        if key in found:
            continue
        tasks = tasks or stream(setting, folder, validate=validate)
        found[key] = run(setting, tasks, preset, strength, seed)
        out.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(found, indent=1) + "\n")
        line = f"{name} {preset} {key}: {100 * found[key]['accuracy']:.2f}"
        line += f" in {found[key]['seconds']:.0f} s; strengths "
        line += ", ".join(f"{s:.3g}" for s in found[key]["strengths"])
        print(line, flush=True)
        with (out / "log.txt").open("a") as log:
            log.write(line + "\n")
    return found


def summary(setting: Setting, found: Mapping[str, Any]) -> dict[str, Any]:
    """Mean accuracies in per cent by strength, the grid's best, and how far auto is from it."""
    means: dict[str, list[float]] = {}
    for key, _, _ in cells(setting):
        means.setdefault(key.split("/")[0], []).append(100 * found[key]["accuracy"])
    mean = {name: sum(values) / len(values) for name, values in means.items()}
    best = max((name for name in mean if name != "auto"), key=lambda name: mean[name])
    return {
        "mean": mean,
        "seeds": means,
        "best": best,
        "auto_minus_best": mean["auto"] - mean[best],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--preset", default="gradient_reconstruction")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="one seed, one epoch, two strengths")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in args.only:
        setting = SETTINGS[name]
        if args.smoke:
            short = replace(setting.training, epochs=1)
            setting = replace(setting, seeds=1, grid=setting.grid[:1], training=short)
        if args.epochs:
            setting = replace(setting, training=replace(setting.training, epochs=args.epochs))
        if args.seeds:
            setting = replace(setting, seeds=args.seeds)
        found = measure(
            name, setting, args.out, args.data, preset=args.preset, validate=args.validate
        )
        result = args.out / "result.json"
        known = json.loads(result.read_text()) if result.exists() else {}
        known[name] = {"setting": asdict(setting), **summary(setting, found)}
        write_file(result, json.dumps(known, indent=1) + "\n")
        write_file(args.out / "versions.json", json.dumps(dict(versions()), indent=1) + "\n")


if __name__ == "__main__":
    main()

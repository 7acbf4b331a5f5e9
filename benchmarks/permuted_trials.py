"""What was tried for Permuted MNIST at 200 examples a task, on held-out training images.

    python -m benchmarks.permuted_trials --data DIR --out DIR [--only NAME ...]

A sixth of each task's training images stands for the test images, which take no part; one seed,
another than the table's. Trials of which OUT has a line already are not made again. Lines with
``kept: false`` are of code that was given up after them:

mixed      a remembered input is u x_i + (1 - u) x_j of one task, u uniform, and its soft label what
           the old weights say of that very input (Zhang et al. 2018; Beyer et al. 2022)
every 4th  G d is computed in every fourth step only, with the diagonal of G in between
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lifelong.bench.streams import StreamRun, run_stream
from lifelong.bench.table import Cell, Context, Method, Table
from lifelong.config import Training
from lifelong.prior import Prior
from lifelong.runs import versions

BASE = Training(epochs=5, batch_size=128, memory_batch_size=128, lr=2e-3, schedule="one-cycle")
KRONECKER = {"structure": "kronecker"}
STRONG = {**KRONECKER, "strength": 4.0}
MEMORY, SEED, HELD_OUT = 200, 100, 1 / 6
RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """A preset with settings, fields of its recipe and of the training in place of BASE's."""

    name: str
    preset: str = "gradient_reconstruction"
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


TRIALS = (
    Trial("joint", "joint"),
    Trial("joint, 10 epochs", "joint", training={"epochs": 10}),
    Trial("diagonal", "recommended", {"structure": "diagonal"}),
    Trial("diagonal, 10 epochs", "recommended", {"structure": "diagonal"}, training={"epochs": 10}),
    Trial("diagonal, strength 4", settings={"strength": 4.0}),
    Trial("kronecker", "recommended", KRONECKER),
    Trial("kronecker, stored", "recommended", KRONECKER, recipe={"gradient": "stored"}),
    Trial("kronecker, strength 1", settings={**KRONECKER, "strength": 1.0}),
    Trial(
        "kronecker, strength 1, a product for each task",
        settings={**KRONECKER, "strength": 1.0},
        recipe={"merge": False},
    ),
    Trial(
        "kronecker, strength 1, an item counts once",
        settings={**KRONECKER, "strength": 1.0, "population": False},
    ),
    Trial("kronecker, strength 4", settings=STRONG),
    Trial("kronecker, strength 10", settings={**KRONECKER, "strength": 10.0}),
    Trial("kronecker, strength 4, by lambda", settings=STRONG, recipe={"score": "lambda"}),
    Trial("kronecker, strength 4, 10 epochs", settings=STRONG, training={"epochs": 10}),
    Trial(
        "kronecker, strength 4, 10 epochs, 256 remembered a step",
        settings=STRONG,
        training={"epochs": 10, "memory_batch_size": 256},
    ),
    Trial(
        "kronecker, strength 4, 10 epochs, rate 1e-3",
        settings=STRONG,
        training={"epochs": 10, "lr": 1e-3},
    ),
    Trial("kronecker, strength 4, 20 epochs", settings=STRONG, training={"epochs": 20}),
)


@dataclass(frozen=True)
class _Tried(StreamRun):
    fields: tuple[tuple[str, Any], ...] = ()  # of the recipe

    def prior_of(self, method: Method, memory: int, num_tasks: int) -> Prior:
        prior = super().prior_of(method, memory, num_tasks)
        return replace(prior, recipe=replace(prior.recipe, **dict(self.fields)))


def attempt(trial: Trial, data: Path, cache: Path, *, smoke: bool = False) -> dict[str, Any]:
    """One trial; accuracies are fractions, on what was held out."""
    training = replace(BASE, **trial.training)
    base = run_stream("permuted-mnist", "domain", training)
    own = {**vars(base), "validation": HELD_OUT, "first_seed": SEED}
    run = _Tried(**own, fields=tuple(trial.recipe.items()))
    memory = 10 if smoke else MEMORY
    method = Method("trial", trial.preset, trial.settings)
    table = Table("trial", "trial", (method,), (memory,), run)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        context = Context(cache, Path(folder), data, smoke)
        found = run(table, Cell("trial", "trial", memory, 0), context)
    return {
        "trial": trial.name,
        "kept": True,
        "accuracy": found["accuracy"],
        "learning_accuracy": None if trial.preset == "joint" else found["learning_accuracy"],
        "strengths": found["strengths"],
        "cpu_seconds": time.process_time() - start,
        "revision": versions().get("revision"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[t.name for t in TRIALS])
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = options.out / RESULT
    rows = json.loads(path.read_text()) if path.is_file() else []
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as cache:
        for trial in TRIALS:
            wanted = options.only is None or trial.name in options.only
            if wanted and trial.name not in {row["trial"] for row in rows}:
                rows.append(attempt(trial, options.data, Path(cache), smoke=options.smoke))
                path.write_text(json.dumps(rows, indent=1) + "\n")
                print(f"{trial.name}: {100 * rows[-1]['accuracy']:.2f}")


if __name__ == "__main__":
    main()

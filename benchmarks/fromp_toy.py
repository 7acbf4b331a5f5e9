"""FROMP's toy: five tasks of two Gaussians in the plane, learned in a row with and without a past.

    python -m benchmarks.fromp_toy --out DIR

FROMP and plain fine-tuning, both as published for the toy but for 12 epochs of a task where FROMP's
code takes 50; Adam. After each task the record keeps the probability of class 1 on a grid, in
255ths (``regions.npz``), and where the memorable points lie; ``python -m
benchmarks.record_pictures`` draws them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lifelong import Categorical, Learner, Prior, TaskStream
from lifelong.benchmarks import BENCHMARKS, learner_options
from lifelong.presets import PRESETS
from lifelong.runs import log, versions
from lifelong.toys import fromp_toy

METHODS = ("fromp", "finetune")


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    seed: int = 0
    num_per_class: int = 2000
    epochs: int = 12
    memory: int = 20
    columns: int = 120
    rows: int = 90
    margin: float = 0.2


def grid(stream: TaskStream, config: Config) -> tuple[Tensor, Tensor]:
    """(W,) and (H,): the box of all points, but for a hundredth on each side, and a margin."""
    points = torch.cat([task.train.batch(slice(None)).inputs for task in stream])
    low, high = points.quantile(0.005, 0) - config.margin, points.quantile(0.995, 0) + config.margin
    x, y = (
        torch.linspace(float(a), float(b), n)
        for a, b, n in zip(low, high, (config.columns, config.rows), strict=True)
    )
    return x, y


def learn(method: str, stream: TaskStream, config: Config) -> tuple[list[Tensor], Prior, Any]:
    """p(class 1) on the grid after each task, the last prior, and the accuracy matrix."""
    toy = BENCHMARKS["fromp-toy"]
    settings = toy.settings(method)
    given = dict(settings.prior)
    if method == "fromp":
        given["memory"] = config.memory
    torch.manual_seed(config.seed)
    model = toy.make_model(stream.num_outputs)
    options = learner_options(replace(settings.training, epochs=config.epochs))
    prior = PRESETS[method](Categorical(), **given)
    learner = Learner(model, prior, seed=config.seed, **options)
    x, y = grid(stream, config)
    plane = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    found = []

    def look(_: int) -> None:
        with torch.no_grad():
            found.append(model(plane).softmax(-1)[:, 1].view(len(y), len(x)))

    matrix = learner.run(stream, on_task=look)
    return found, learner.prior, matrix


def run(config: Config, out: Path) -> dict[str, Any]:
    """Learn with both methods, and write the record."""
    out.mkdir(parents=True, exist_ok=True)
    stream = fromp_toy(num_per_class=config.num_per_class, seed=config.seed)
    x, y = grid(stream, config)
    arrays, result = {"x": x.numpy(), "y": y.numpy()}, {}
    for method in METHODS:
        planes, prior, matrix = learn(method, stream, config)
        arrays[method] = (255 * torch.stack(planes)).round().to(torch.uint8).numpy()
        result[method] = {"accuracy": matrix.average_accuracy, "matrix": matrix.to_list()}
        memory = prior.memory
        if memory is not None:
            arrays["memorable"] = memory.inputs.numpy()  # type: ignore[union-attr]
            arrays["task"] = memory.task.numpy()
        log(out, f"{method}: mean accuracy {matrix.average_accuracy:.4f} after the last task")
    np.savez_compressed(out / "regions.npz", **arrays)
    for name, value in (("config", asdict(config)), ("result", result), ("versions", versions())):
        text = json.dumps(value, indent=1).replace("NaN", "null")
        (out / f"{name}.json").write_text(text + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for method, found in run(Config(), options.out).items():
        print(f"{method}: {100 * found['accuracy']:.2f} %")


if __name__ == "__main__":
    main()

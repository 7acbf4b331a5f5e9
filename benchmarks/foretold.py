"""What the past loses while a task is learned, beside what the prior foretold.

    python -m benchmarks.foretold --data DIR --out DIR [--margins 1 4]

Permuted MNIST, the recommended prior with 200 images a task, five epochs. After each task, at
d = theta - anchor:

foretold   ½ <d, G d> without its strength, nats
memory     N / M sum_memory KL(p* ‖ p), what the remembered images have lost
lost       N times the mean of KL(p* ‖ p) over held-out images of the past tasks, summed over tasks
ratio      (lost - memory) / foretold: the strength that G should have had

The held-out images are a sixth of the training images; the test images take no part.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lifelong import Categorical, Learner, Prior, recommended
from lifelong.bench.streams import held_out, loaded, reduced
from lifelong.benchmarks import benchmark, learner_options
from lifelong.memory import reference_outputs
from lifelong.models import parameters
from lifelong.runs import log, versions
from lifelong.streams import Task
from lifelong.terms import WeightTerm

from .permuted_trials import BASE, HELD_OUT, MEMORY, SEED


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    margins: tuple[float, ...] = (1.0, 4.0)
    tasks: int = 5
    epochs: int = BASE.epochs
    memory: int = MEMORY
    examples: int | None = None  # of each task


def outputs(model: nn.Module, task: Task) -> Tensor:
    """f (N, 10) at the held-out images."""
    assert task.test is not None
    return reference_outputs(model, task.test.inputs)


def measured(
    prior: Prior, before: nn.Module, after: nn.Module, past: Sequence[Task], n: int
) -> dict[str, float]:
    """One task's row; ``prior`` as it was while the task was learned."""
    params, weight = parameters(after), prior.weight
    assert isinstance(weight, WeightTerm)
    assert weight.curvature is not None
    d = {name: params[name].detach() - a for name, a in weight.anchor.items()}
    quadratic = 0.5 * float(weight.curvature.quad(d))
    kl = [Categorical().kl(outputs(before, task), outputs(after, task)).mean() for task in past]
    strength = sum(prior.strengths) / len(prior.strengths)
    row = {
        "strength": strength,
        "foretold": quadratic / strength,
        "memory": float(prior(after).detach()) - quadratic,
        "lost": n * float(torch.stack(kl).sum()),
    }
    return {**row, "ratio": (row["lost"] - row["memory"]) / row["foretold"]}


def run(config: Config, data: Path, out: Path) -> list[dict[str, float]]:
    """Measure, and write the record."""
    torch.set_num_threads(1)
    chosen = benchmark("permuted-mnist")
    with tempfile.TemporaryDirectory() as cache:
        stream = loaded("permuted-mnist", "domain", data, Path(cache))[: config.tasks]
    if config.examples is not None:
        stream = reduced(stream, config.examples)
    stream = held_out(stream, HELD_OUT)
    rows = []
    for margin in config.margins:
        torch.manual_seed(SEED)
        model = chosen.make_model(stream.num_outputs)
        prior = recommended(Categorical(), memory=config.memory, margin=margin)
        options = learner_options(replace(BASE, epochs=config.epochs))
        learner = Learner(model, prior, seed=SEED, **options)
        for number, task in enumerate(stream):
            before = copy.deepcopy(model)
            learner.fit(task)
            if number:
                past = stream[:number]
                row = measured(learner.prior, before, model, list(past), len(task.train))
                rows.append({"margin": margin, "task": number + 1, **row})
                log(out, json.dumps(rows[-1]))
            learner.conclude(task)
    for name, value in (
        ("result.json", rows),
        ("config.json", {**asdict(config), "seed": SEED, "held_out": HELD_OUT}),
        ("versions.json", versions()),
    ):
        (out / name).write_text(json.dumps(value, indent=1) + "\n")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--margins", type=float, nargs="+", default=Config.margins)
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    for row in run(Config(margins=tuple(given.margins)), given.data, given.out):
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

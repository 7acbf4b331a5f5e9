"""The most and the least memorable digits and photos of each class, by FROMP's score.

    python -m benchmarks.memorable --data DIR --out DIR [--sets mnist cifar10]

lambda is the trace of the likelihood's Hessian at an example: how undecided the trained network is
about its label. It is trained plainly on the whole training set, in one go. The record keeps which
examples come out (the k highest and the k lowest of each class, by position in the training set),
their scores, and quantiles of all scores; ``python -m benchmarks.record_pictures --data DIR``
draws them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lifelong
from lifelong import Categorical, Examples
from lifelong.networks import cifarnet, mlp
from lifelong.readers import find, load
from lifelong.runs import log, versions

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Set:
    """A data set, its network, and the names of its classes."""

    file: str
    build: Callable[[], nn.Module]
    class_names: tuple[str, ...]
    dtype: torch.dtype = torch.float32


SETS = {
    "mnist": Set("mnist", lambda: mlp(784, 256, 256, 10), tuple("0123456789")),
    "cifar10": Set("cifar10_jpegq75", lambda: cifarnet(10), CIFAR10, torch.uint8),
}


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    sets: tuple[str, ...] = tuple(SETS)
    seed: int = 0
    epochs: int = 5
    batch_size: int = 128
    lr: float = 2e-3
    k: int = 4
    examples: int | None = None  # all


def read(name: str, data: Path, split: str, config: Config) -> Examples:
    of = SETS[name]
    examples = load(find(data, of.file, split), split=split, dtype=of.dtype)
    return examples if config.examples is None else examples[torch.arange(config.examples)]


def train(name: str, data: Examples, config: Config) -> nn.Module:
    """Adam at a one-cycle rate; convolutions in bfloat16 where torch thinks it safe."""
    torch.manual_seed(config.seed)
    model, order = SETS[name].build(), torch.Generator().manual_seed(config.seed)
    steps = config.epochs * -(-len(data) // config.batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    model.train()
    for _ in range(config.epochs):
        for index in torch.randperm(len(data), generator=order).split(config.batch_size):
            x, y, _ = data.batch(index)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                f = model(x)  # type: ignore[operator]
            F.cross_entropy(f.float(), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def extremes(scores: Tensor, labels: Tensor, k: int) -> dict[str, dict[str, list[int]]]:
    """class -> the positions of the k highest scores, falling, and of the k lowest, rising."""
    found = {}
    for c in labels.unique().tolist():
        members = (labels == c).nonzero().squeeze(1)
        order = members[scores[members].sort(descending=True, stable=True).indices]
        found[str(c)] = {"most": order[:k].tolist(), "least": order.flip(0)[:k].tolist()}
    return found


def run(config: Config, data: Path, out: Path) -> dict[str, Any]:
    """Train, score and write the record; sets that are not asked for now stay in it."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name in config.sets:
        train_set = read(name, data, "train", config)
        model = train(name, train_set, config)
        accuracy = lifelong.evaluate(
            model, read(name, data, "test", config), Categorical()
        ).accuracy
        scores = lifelong.identify(model, train_set, Categorical(), score="lambda")
        chosen = extremes(scores, train_set.labels, config.k)
        quantiles = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=scores.dtype)
        result[name] = {
            "test_accuracy": accuracy,
            "quantiles": dict(zip(quantiles.tolist(), scores.quantile(quantiles).tolist())),
            "chosen": {
                c: {
                    side: [{"index": i, "score": float(scores[i])} for i in of[side]] for side in of
                }
                for c, of in chosen.items()
            },
        }
        log(out, f"{name}: test accuracy {accuracy:.4f}, median score {scores.median():.3g}")
    for name, value in (
        ("config", _settings(config)),
        ("result", result),
        ("versions", versions()),
    ):
        (out / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    return result


def _settings(config: Config) -> dict[str, Any]:
    settings = asdict(config)
    del settings["sets"]  # the result says it
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name, found in run(Config(sets=tuple(options.sets)), options.data, options.out).items():
        print(f"{name}: test accuracy {100 * found['test_accuracy']:.2f} %")


if __name__ == "__main__":
    main()

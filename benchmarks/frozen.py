"""Classes that keep coming, seen once, on frozen features: a linear head learned task by task.

    python -m benchmarks.features --data DIR --out FEATURES
    python -m benchmarks.frozen --features FEATURES --out DIR [--sets animals clinc150]

*animals*: 13 tasks of 3 animals, EfficientNet-Lite0 features; *clinc150*: 10 tasks, each the 15
intents of a domain, MiniLM features. One head for all classes, no task label when it is asked.
The head is convex, so every method is fitted to its minimum by ``refit``, and differs from the
others by what it keeps alone. Precision of the regulariser: the best for *joint* training on
validation examples (5 of the 22 training photos of each animal; clinc150's own validation split),
the same for all methods; nothing else is tuned, and the test examples are read once. A seed
decides the order of the tasks and the examples that are kept.

``regression`` fits one-hot labels by squares instead: G = X'X for each output is exact, so that the
tasks in a row are joint regression whatever their order, without one example kept. Its precision
is that of joint regression.

Each cell (set, method, memory, seed) is a file under OUT/cells; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lifelong
from lifelong import AccuracyMatrix, Categorical, Examples, Gaussian, Prior
from lifelong.likelihoods import Likelihood
from lifelong.metrics import evaluate
from lifelong.refit import refit
from lifelong.runs import log, versions

LIKELIHOOD = Categorical()
HELD_OUT = 5  # of the 22 training photos of each animal, to choose the precision


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    sets: tuple[str, ...] = ("animals", "clinc150")
    memories: tuple[int, ...] = (1, 2, 5)  # examples of each class
    precisions: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Split:
    """Features and labels: to learn from, to choose the precision by, and to be tested on."""

    train: Examples
    validation: Examples
    test: Examples
    groups: tuple[tuple[int, ...], ...]  # the classes of each task

    @property
    def num_classes(self) -> int:
        return sum(len(group) for group in self.groups)


# A method is its prior: examples kept of each task, precision -> a prior that has seen nothing.
Make = Callable[[int, float], Prior]
KEEPING: dict[str, Make] = {
    "experience_replay": lambda m, d: (
        lifelong.experience_replay(LIKELIHOOD, memory=m, total=False)
        + lifelong.weight_decay(LIKELIHOOD, precision=d)
    ),
    "kprior": lambda m, d: lifelong.kprior(
        LIKELIHOOD, precision=d, memory=m, population=True, score="random"
    ),
    "kprior_lambda": lambda m, d: lifelong.kprior(
        LIKELIHOOD, precision=d, memory=m, population=True, score="lambda"
    ),
    "gradient_reconstruction": lambda m, d: lifelong.gradient_reconstruction(
        LIKELIHOOD, precision=d, memory=m
    ),
    "gradient_reconstruction_kronecker": lambda m, d: lifelong.gradient_reconstruction(
        LIKELIHOOD, precision=d, memory=m, structure="kronecker"
    ),
}
ALONE: dict[str, Callable[[float], Prior]] = {
    "plain": lambda d: lifelong.weight_decay(LIKELIHOOD, precision=d),
    "online_ewc": lambda d: lifelong.online_ewc(LIKELIHOOD, precision=d),
    "regression": lambda d: lifelong.online_laplace(Gaussian(), structure="kronecker", precision=d),
    "online_laplace_kronecker": lambda d: lifelong.online_laplace(
        LIKELIHOOD, structure="kronecker", precision=d
    ),
}


def load(name: str, folder: Path) -> Split:
    """The set of that name. Raises FileNotFoundError where its features were not made."""
    stem = {"animals": "animals30", "clinc150": "clinc150"}[name]
    train = _examples(folder / f"{stem}-train.npz")
    test = _examples(folder / f"{stem}-test.npz")
    if name == "clinc150":
        domain = torch.from_numpy(np.load(folder / f"{stem}-train.npz")["domain"])
        groups = tuple(tuple(train.labels[domain == d].unique().tolist()) for d in domain.unique())
        return Split(train, _examples(folder / f"{stem}-val.npz"), test, groups)
    rank = torch.zeros_like(train.labels)
    for c in train.labels.unique():
        mine = train.labels == c
        rank[mine] = torch.arange(int(mine.sum()))
    held = rank >= rank.max() + 1 - HELD_OUT
    classes = train.labels.unique().tolist()
    groups = tuple(tuple(classes[i : i + 3]) for i in range(0, len(classes), 3))
    # The validation photos are learned from as well, once the precision is chosen.
    return Split(train, train[held.nonzero().squeeze(1)], test, groups)


def _examples(path: Path) -> Examples:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it: python -m benchmarks.features")
    arrays = np.load(path)
    inputs, labels, ids = (torch.from_numpy(arrays[k]) for k in ("inputs", "labels", "ids"))
    return Examples(inputs, labels, ids=ids)


def head(split: Split) -> nn.Linear:
    """A linear head at 0: of a convex problem the start decides no number."""
    layer = nn.Linear(split.train.inputs.shape[1], split.num_classes)  # type: ignore[union-attr]
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    return layer


def of_classes(data: Examples, classes: Iterable[int]) -> Examples:
    """The examples of those classes."""
    wanted = torch.tensor(sorted(classes))
    return data[torch.isin(data.labels, wanted).nonzero().squeeze(1)]


def encoded(data: Examples, likelihood: Likelihood, num_classes: int) -> Examples:
    """Labels as the likelihood reads them: one-hot rows for regression."""
    if isinstance(likelihood, Categorical):
        return data
    rows = nn.functional.one_hot(data.labels, num_classes).float()
    return Examples(data.inputs, rows, ids=data.ids)


def joint(
    split: Split,
    precision: float,
    train: Examples | None = None,
    likelihood: Likelihood = LIKELIHOOD,
) -> nn.Linear:
    """A head trained on all at once."""
    model, data = head(split), split.train if train is None else train
    prior = lifelong.weight_decay(likelihood, precision=precision)
    refit(model, prior, encoded(data, likelihood, split.num_classes), method="lbfgs")
    return model


def choose_precision(
    split: Split, precisions: Sequence[float], likelihood: Likelihood = LIKELIHOOD
) -> dict[float, float]:
    """precision -> accuracy of joint training on validation examples that it did not see."""
    seen = ~torch.isin(split.train.ids, split.validation.ids)
    if bool(seen.all()) or split.validation.inputs is split.train.inputs:
        train = split.train
    else:
        train = split.train[seen.nonzero().squeeze(1)]
    return {
        d: evaluate(joint(split, d, train, likelihood), split.validation, LIKELIHOOD).accuracy
        for d in precisions
    }


def learn(split: Split, prior: Prior, seed: int) -> dict[str, Any]:
    """One pass over the tasks, each seen once."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split.groups), generator=generator).tolist()
    model, rows, gradients = head(split), [], 0
    start = time.perf_counter()
    for t in range(len(order)):
        data = of_classes(split.train, split.groups[order[t]])
        data = encoded(data, prior.likelihood, split.num_classes)
        gradients += refit(model, prior, data, method="lbfgs").gradients
        prior = prior.update(model, data, generator=generator)
        rows.append(_accuracies(model, split.test, [split.groups[i] for i in order[: t + 1]]))
    seconds = time.perf_counter() - start
    matrix = AccuracyMatrix.from_list([[*r, *[None] * (len(order) - len(r))] for r in rows])
    memory = prior.memory
    return {
        "accuracy": evaluate(model, split.test, LIKELIHOOD).accuracy,
        "forgetting": matrix.forgetting,
        "memory_examples": 0 if memory is None else len(memory),
        "memory_bytes": prior.num_bytes,
        "gradients": gradients,
        "seconds": seconds,
        "matrix": matrix.to_list(),
    }


def _accuracies(model: nn.Module, test: Examples, groups: list[tuple[int, ...]]) -> list[float]:
    with torch.no_grad():
        right: Tensor = model(test.inputs).argmax(1) == test.labels
    found = (right[torch.isin(test.labels, torch.tensor(g))].double().mean() for g in groups)
    return [float(a) for a in found]


def cells(config: Config, split: Split) -> Iterable[tuple[str, int, int]]:
    """(method, examples of each class, seed)."""
    for seed in config.seeds:
        for name in ALONE:
            yield name, 0, seed
        for name in KEEPING:
            for m in config.memories:
                yield name, m, seed


def run(config: Config, features: Path, out: Path) -> dict[str, Any]:
    """Every cell that is not done yet; the summary, which is written as result.json."""
    result: dict[str, Any] = {}
    for name in config.sets:
        split = load(name, features)
        found = {
            kind: _yardstick(config, split, likelihood, out / "cells" / f"{name}-{kind}.json")
            for kind, likelihood in (("softmax", LIKELIHOOD), ("regression", Gaussian()))
        }
        log(out, f"{name}: {found}")
        rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for method, m, seed in cells(config, split):
            size = m * len(split.groups[0])
            kind = "regression" if method == "regression" else "softmax"
            precision = found[kind]["precision"]
            prior = KEEPING[method](size, precision) if m else ALONE[method](precision)
            cell = _cached(
                out / "cells" / f"{name}-{method}-{m}-{seed}.json",
                lambda split=split, prior=prior, seed=seed: learn(split, prior, seed),
            )
            log(out, f"{name} {method} {m} seed {seed}: {cell['accuracy']:.4f}")
            rows.setdefault((method, m), []).append(cell)
        result[name] = {
            "joint": found,
            "rows": [summary(method, m, of) for (method, m), of in rows.items()],
        }
    _dump(out / "config.json", asdict(config))
    _dump(out / "result.json", result)
    _dump(out / "versions.json", versions())
    return result


def _yardstick(config: Config, split: Split, likelihood: Likelihood, path: Path) -> dict[str, Any]:
    """Joint training: the precision, what chose it, and the accuracy on the test examples."""

    def make() -> dict[str, Any]:
        tried = choose_precision(split, config.precisions, likelihood)
        best = max(tried, key=tried.__getitem__)
        model = joint(split, best, likelihood=likelihood)
        accuracy = evaluate(model, split.test, LIKELIHOOD).accuracy
        validation = {str(d): a for d, a in tried.items()}
        return {"precision": best, "validation": validation, "accuracy": accuracy}

    return _cached(path, make)


def summary(method: str, memory: int, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds, with the standard error of the accuracy."""
    accuracy = np.array([cell["accuracy"] for cell in seeds])
    error = float(accuracy.std(ddof=1) / len(accuracy) ** 0.5) if len(accuracy) > 1 else None
    mean = {
        key: float(np.mean([cell[key] for cell in seeds]))
        for key in (
            "accuracy",
            "forgetting",
            "memory_examples",
            "memory_bytes",
            "gradients",
            "seconds",
        )
    }
    return {
        "method": method,
        "per_class": memory,
        **mean,
        "standard_error": error,
        "per_seed": accuracy.tolist(),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown, one table for each set."""
    lines = []
    for name, found in result.items():
        each = (f"{kind} {100 * of['accuracy']:.2f} %" for kind, of in found["joint"].items())
        lines += [f"**{name}**, joint: {', '.join(each)}", ""]
        lines += ["| method | per class | accuracy, % | forgetting, % | bytes | s |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for row in found["rows"]:
            error = row["standard_error"]
            spread = "" if error is None else f" ± {100 * error:.2f}"
            lines.append(
                f"| {row['method']} | {row['per_class']} | {100 * row['accuracy']:.2f}{spread} "
                f"| {100 * row['forgetting']:.2f} | {row['memory_bytes'] / 1e6:.2f} MB "
                f"| {row['seconds']:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        _dump(path, make())
    return json.loads(path.read_text())


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="*", default=list(Config.sets), choices=list(Config.sets))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = Config(sets=tuple(options.sets), seeds=tuple(range(options.seeds)))
    print(table(run(config, options.features, options.out)))


if __name__ == "__main__":
    main()

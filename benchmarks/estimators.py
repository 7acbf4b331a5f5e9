"""``LifelongClassifier.partial_fit`` in five batches sorted by class, beside ``SGDClassifier``.

    python -m benchmarks.estimators --out DIR [--seeds 5]

Results are written after each method, so that the same command goes on where it was stopped.
Data that scikit-learn bundles: digits (two new classes in each batch) and breast cancer (the
benign rows come after the malignant ones). A quarter is the test, drawn anew with each seed,
stratified. Features are scaled by the training rows' mean and deviation, the same for all. Nothing
is tuned: every estimator has its defaults, but the numbers that the table names. Rows of
``SGDClassifier`` are told all classes from the start, which it needs; those of
``LifelongClassifier`` are not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from lifelong.integrations.sklearn import LifelongClassifier
from lifelong.runs import versions

DATA: dict[str, Callable[..., Any]] = {"digits": load_digits, "breast cancer": load_breast_cancer}
BATCHES = 5

Arrays = tuple[np.ndarray, np.ndarray]


def ours(memory: int | None) -> Callable[[list[Arrays], int], Any]:
    def run(batches: list[Arrays], seed: int) -> Any:
        estimator = LifelongClassifier(memory=memory, random_state=seed)
        for X, y in batches:
            estimator.partial_fit(X, y)
        return estimator

    return run


def sgd(passes: int) -> Callable[[list[Arrays], int], Any]:
    def run(batches: list[Arrays], seed: int) -> Any:
        random = np.random.default_rng(seed)
        classes = np.unique(np.concatenate([y for _, y in batches]))
        estimator = SGDClassifier(loss="log_loss", random_state=seed)
        for X, y in batches:
            for _ in range(passes):
                order = random.permutation(len(y))
                estimator.partial_fit(X[order], y[order], classes=classes)
        return estimator

    return run


def at_once(make: Callable[[int], Any]) -> Callable[[list[Arrays], int], Any]:
    def run(batches: list[Arrays], seed: int) -> Any:
        X, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        order = np.random.default_rng(seed).permutation(len(y))
        return make(seed).fit(X[order], y[order])

    return run


METHODS: dict[str, Callable[[list[Arrays], int], Any]] = {
    "LifelongClassifier.partial_fit, memory=0": ours(0),
    "LifelongClassifier.partial_fit, memory=50": ours(50),
    "LifelongClassifier.partial_fit, memory=200": ours(200),
    "LifelongClassifier.partial_fit, memory=None": ours(None),
    "SGDClassifier.partial_fit, once": sgd(1),
    "SGDClassifier.partial_fit, 20 times a batch": sgd(20),
    "LifelongClassifier.fit on all": at_once(lambda _: LifelongClassifier()),
    "LogisticRegression.fit on all": at_once(lambda _: LogisticRegression(max_iter=1000)),
    "SGDClassifier.fit on all": at_once(lambda s: SGDClassifier(loss="log_loss", random_state=s)),
}


def sorted_batches(X: np.ndarray, y: np.ndarray) -> list[Arrays]:
    """Two classes each of ten; else five equal parts of the rows in the order of their classes."""
    labels = np.unique(y)
    if len(labels) >= 2 * BATCHES:
        groups = [np.flatnonzero(np.isin(y, part)) for part in np.array_split(labels, BATCHES)]
    else:
        groups = np.array_split(np.argsort(y, kind="stable"), BATCHES)
    return [(X[rows], y[rows]) for rows in groups]


def measure(name: str, method: str, seed: int) -> dict[str, float]:
    """Accuracy on the test rows, the mean nll there in nats, and seconds of learning."""
    X, y = DATA[name](return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, random_state=seed, stratify=y)
    scaler = StandardScaler().fit(X)
    batches = sorted_batches(scaler.transform(X), y)
    start = time.perf_counter()
    estimator = METHODS[method](batches, seed)
    seconds = time.perf_counter() - start
    X_test = scaler.transform(X_test)
    p = estimator.predict_proba(X_test)[np.arange(len(y_test)), y_test]
    nll = float(-np.log(np.maximum(p, 1e-15)).mean())
    return {"accuracy": estimator.score(X_test, y_test), "nll": nll, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(DATA), choices=list(DATA))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {**versions(), "scikit-learn": version("scikit-learn")}
    config = {"seeds": options.seeds, "data": options.only, "batches": BATCHES, "test": 0.25}
    _dump(options.out / "config.json", config)
    _dump(options.out / "versions.json", found)
    path = options.out / "result.json"
    results = json.loads(path.read_text()) if path.exists() else []
    done = {(row["data"], row["method"]) for row in results}
    with (options.out / "log.txt").open("a") as log:
        for name in options.only:
            for method in METHODS:
                if (name, method) in done:
                    continue
                runs = [measure(name, method, seed) for seed in range(options.seeds)]
                results.append({"data": name, "method": method, "runs": runs})
                cells = [f"{np.mean([r[k] for r in runs]):.4g}" for k in runs[0]]
                spread = f"{np.std([r['accuracy'] for r in runs]):.2g}"
                line = f"{name} | {method} | {' | '.join(cells)} | ± {spread}"
                print(line, flush=True)
                log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")
                _dump(path, results)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""IVON against Adam at equal epochs, and IVON's posterior as tomorrow's prior.

    python -m benchmarks.variational [digits pairs chain mnist] --data DIR --out DIR

    digits  scikit-learn's handwritten digits, ten classes at once; MLP 64-100-100-10
    pairs   the five tasks of the split-digits stream, a fresh network for each; means over tasks
    chain   the stream itself: after five tasks, how well are all of them known?
    mnist   MNIST; MLP 784-256-256-10

Both optimisers have a grid of six settings. The one with the lowest nll on a validation part of
the training data is trained again on all of it, with five other seeds; test data are read once,
at the end. Both have the same epochs, batches, cosine schedule and initial weights. IVON takes one
sample a step and predicts by the mean of the probabilities at 64 draws ("ivon"), or by the mean
weights ("ivon@mean"); which of the two is chosen with the setting ("ivon, as chosen"). Its ess is
the number of training examples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong import Posterior
from lifelong.data import Examples, head_mask
from lifelong.likelihoods import Categorical
from lifelong.metrics import calibration_error, mean_and_standard_error
from lifelong.readers import find, load
from lifelong.runs import versions
from lifelong.streams import TaskStream, split_by_class
from lifelong.toys import digits
from lifelong.variational import IVON, MeanField, gaussian_posterior

SEEDS = (0, 1, 2, 3, 4)
SELECTION_SEEDS = (100, 101, 102)
Setting = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """What is trained, and how long; the grids of both optimisers."""

    widths: tuple[int, ...]
    epochs: int
    batch_size: int = 64
    num_samples: int = 64
    seeds: tuple[int, ...] = SEEDS
    selection_seeds: tuple[int, ...] = SELECTION_SEEDS
    adam: Mapping[str, tuple[float, ...]] = None  # type: ignore[assignment]
    ivon: Mapping[str, tuple[float, ...]] = None  # type: ignore[assignment]


_ADAM = {"lr": (3e-4, 1e-3, 3e-3), "weight_decay": (0.0, 1e-4)}
_IVON = {"lr": (0.5, 1.0, 2.0), "hess_init": (0.1, 0.5), "beta2": (0.999,), "weight_decay": (1e-4,)}
# Where h is to be tomorrow's prior, the first h must be forgotten within a task of 300 steps.
_CHAIN = {
    "lr": (0.1, 0.3, 1.0),
    "hess_init": (0.1,),
    "beta2": (0.98, 0.99),
    "weight_decay": (1e-3,),
}
CASES: dict[str, Case] = {
    "digits": Case((64, 100, 100, 10), 60, adam=_ADAM, ivon=_IVON),
    "pairs": Case((64, 100, 100, 10), 60, adam=_ADAM, ivon=_IVON),
    "chain": Case((64, 100, 100, 10), 60, adam=_ADAM, ivon=_CHAIN),
    "mnist": Case(
        (784, 256, 256, 10),
        6,
        128,
        selection_seeds=(100,),
        adam=_ADAM,
        ivon={**_IVON, "beta2": (0.9995,)},
    ),
}


def mlp(widths: Sequence[int], seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pairs = itertools.pairwise(widths)
        layers: list[nn.Module] = [m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def grid(values: Mapping[str, Iterable[float]]) -> list[dict[str, float]]:
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def hold_out(data: Examples, fraction: float, seed: int = 0) -> tuple[Examples, Examples]:
    """Training data in a larger part, and a smaller one to choose settings on."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    cut = round(fraction * len(data))
    return data[order[cut:]], data[order[:cut]]


# ------------------------------------------------------------------ training


def make(
    kind: str,
    setting: Setting,
    model: nn.Module,
    num_data: int,
    seed: int,
    prior: Posterior | None = None,
) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), **setting)
    generator = torch.Generator().manual_seed(seed)
    named = model.named_parameters()
    return IVON(named, ess=num_data, generator=generator, prior=prior, **setting)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Examples,
    case: Case,
    seed: int,
) -> None:
    x, y = torch.as_tensor(data.inputs), data.labels
    generator = torch.Generator().manual_seed(seed)
    steps = case.epochs * math.ceil(len(y) / case.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mask = head_mask(data.head, case.widths[-1])
    sampled = optimizer.sampled_params if isinstance(optimizer, MeanField) else None
    for _ in range(case.epochs):
        for index in torch.randperm(len(y), generator=generator).split(case.batch_size):
            optimizer.zero_grad()
            with sampled(train=True) if sampled else nullcontext():
                f = Categorical().mask(model(x[index]), mask)
                F.cross_entropy(f, y[index]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def probabilities(
    model: nn.Module, data: Examples, case: Case, optimizer: MeanField | None = None
) -> Tensor:
    """(N, C) in float64; the mean over draws from the optimiser's posterior, or of the weights."""
    mask, x = head_mask(data.head, case.widths[-1]), torch.as_tensor(data.inputs)

    def once() -> Tensor:
        return F.softmax(Categorical().mask(model(x), mask).double(), -1)

    if optimizer is None:
        return once()
    total = torch.zeros(len(x), case.widths[-1], dtype=torch.float64)
    for _ in range(case.num_samples):
        with optimizer.sampled_params():
            total += once()
    return total / case.num_samples


def measure(p: Tensor, labels: Tensor) -> dict[str, float]:
    right = p.gather(1, labels.unsqueeze(1)).squeeze(1)
    return {
        "accuracy": float((p.argmax(1) == labels).double().mean()),
        "nll": float(-right.clamp(min=1e-300).log().mean()),
        "ece": calibration_error(p.clamp(0, 1), labels),
    }


def run(
    kind: str, setting: Setting, data: Examples, test: Examples, case: Case, seed: int
) -> dict[str, dict[str, float]]:
    """What one network does on test: {"adam": ...} or {"ivon@mean": ..., "ivon": ...}."""
    model = mlp(case.widths, seed)
    optimizer = make(kind, setting, model, len(data), seed)
    train(model, optimizer, data, case, seed)
    if kind == "adam":
        return {"adam": measure(probabilities(model, test, case), test.labels)}
    assert isinstance(optimizer, MeanField)
    return {
        "ivon@mean": measure(probabilities(model, test, case), test.labels),
        "ivon": measure(probabilities(model, test, case, optimizer), test.labels),
    }


def mean_of(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(r[key] for r in results) / len(results) for key in results[0]}


# ------------------------------------------------------------------ cases

Log = Callable[[str], None]
Pair = tuple[Examples, Examples]  # to learn from, to be measured on


def on_all(
    kind: str, setting: Setting, pairs: Sequence[Pair], case: Case, seed: int
) -> dict[str, dict[str, float]]:
    """The mean over independent tasks, a fresh network each."""
    found = [run(kind, setting, data, test, case, seed) for data, test in pairs]
    return {name: mean_of([f[name] for f in found]) for name in found[0]}


def compare(pairs: Sequence[Pair], case: Case, log: Log) -> dict[str, Any]:
    """Choose settings on a part of the training data; train again on all; test."""
    return select_and_test(
        lambda *args: on_all(*args), [hold_out(train, 0.2) for train, _ in pairs], pairs, case, log
    )


def select_and_test(
    once: Callable[..., dict[str, dict[str, float]]],
    validation: Any,
    final: Any,
    case: Case,
    log: Log,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        key: {} for key in ("selection", "chosen", "predicts", "seeds", "seconds")
    }
    for kind, values in (("adam", case.adam), ("ivon", case.ivon)):
        tried = []
        for setting in grid(values):
            found = [once(kind, setting, validation, case, seed) for seed in case.selection_seeds]
            for name in found[0]:
                means = mean_of([f[name] for f in found])
                tried.append({"setting": setting, "predicts": name, **means})
                log(f"{name} {setting} on validation: {_line(tried[-1])}")
        best = min(tried, key=lambda t: t["nll"] if math.isfinite(t["nll"]) else math.inf)
        record["selection"][kind] = tried
        record["chosen"][kind], record["predicts"][kind] = best["setting"], best["predicts"]
        log(f"{kind}: chosen {best['setting']}, {best['predicts']}")
    for kind, setting in record["chosen"].items():
        start = time.perf_counter()
        for seed in case.seeds:
            found = once(kind, setting, final, case, seed)
            if len(found) > 1:
                found[f"{kind}, as chosen"] = found[record["predicts"][kind]]
            for name, values in found.items():
                record["seeds"].setdefault(name, []).append(values)
                log(f"{name} seed {seed} on test: {_line(values)}")
        record["seconds"][kind] = (time.perf_counter() - start) / len(case.seeds)
    record["summary"] = summary(record["seeds"])
    for name, values in record["summary"].items():
        log(f"{name}: {', '.join(f'{k} {m:.4f} ± {e:.4f}' for k, (m, e) in values.items())}")
    return record


def summary(seeds: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Mean and standard error over seeds (ddof 1)."""
    return {
        name: {key: mean_and_standard_error(v[key] for v in values) for key in values[0]}
        for name, values in seeds.items()
    }


def learn_stream(
    kind: str, setting: Setting, tasks: Sequence[Pair], case: Case, seed: int
) -> dict[str, dict[str, float]]:
    """Five tasks in a row with one network: the mean over tasks, after the last.

    adam: nothing is kept, which is finetuning. ivon: each posterior is the next prior.
    """
    model, prior, optimizer = mlp(case.widths, seed), None, None
    first = 0.0
    for t, (data, test) in enumerate(tasks):
        optimizer = make(kind, setting, model, len(data), seed + t, prior)
        train(model, optimizer, data, case, seed)
        if isinstance(optimizer, MeanField):
            prior = gaussian_posterior(optimizer, model)
        if t == 0:
            first = measure(probabilities(model, test, case), test.labels)["accuracy"]
    chosen = {"adam": [("adam", None)], "ivon": [("ivon@mean", None), ("ivon", optimizer)]}[kind]
    out = {}
    for name, q in chosen:
        assert q is None or isinstance(q, MeanField)
        each = [measure(probabilities(model, test, case, q), test.labels) for _, test in tasks]
        kept = {"first_task": each[0]["accuracy"], "first_task_when_learned": first}
        out[name] = {**mean_of(each), **kept}
    return out


def digit_tasks() -> TaskStream:
    return split_by_class(*digits(), name="split-digits")


def case_pairs(name: str, data_dir: Path | None, limit: int | None) -> list[Pair]:
    if name == "mnist":
        if data_dir is None:
            raise SystemExit("mnist reads data: say --data DIR")
        pair = [load(find(data_dir, "mnist", s), split=s) for s in ("train", "test")]
        pairs = [(pair[0], pair[1])]
    elif name == "digits":
        pairs = [digits()]
    else:
        pairs = [(task.train, task.test) for task in digit_tasks().tasks]
        assert all(test is not None for _, test in pairs)
    return [(a[:limit], b[:limit]) for a, b in pairs] if limit else pairs  # type: ignore[misc]


def run_case(name: str, case: Case, data_dir: Path | None, log: Log, limit: int | None = None):
    pairs = case_pairs(name, data_dir, limit)
    if name != "chain":
        return compare(pairs, case, log)
    validation = [hold_out(train, 0.2) for train, _ in pairs]
    return select_and_test(learn_stream, validation, pairs, case, log)


def _line(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))


def smoke(case: Case) -> Case:
    """A few steps of everything."""
    ivon = {key: values[:1] for key, values in case.ivon.items()}
    small = (case.widths[0], 8, case.widths[-1])
    return replace(
        case, widths=small, epochs=1, num_samples=2, seeds=(0, 1), selection_seeds=(100,),
        adam={"lr": (1e-3,)}, ivon=ivon,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"some of {list(CASES)}")
    parser.add_argument("--data", type=Path, help="the folder with MNIST")
    parser.add_argument("--out", type=Path, required=True, help="where the record goes")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    for name in options.cases:
        case = smoke(CASES[name]) if options.smoke else CASES[name]

        def log(line: str, name: str = name) -> None:
            print(name, line, flush=True)
            with (options.out / "log.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name} {line}\n")

        record = run_case(name, case, options.data, log, limit=64 if options.smoke else None)
        for file, value in (("config", asdict(case)), ("result", record)):
            path = options.out / f"{file}.json"
            old = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**old, name: value}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

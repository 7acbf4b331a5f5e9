"""Unlearning from the prior beside retraining: what the model gives away, what it keeps, and when.

    python -m benchmarks.unlearning --data DIR --out DIR [--smoke] [--part main|lira]
        [--num-train N] [--seeds N]

An MLP learns MNIST; a prior (``gradient_reconstruction``, diagonal G, 5 % of the data in memory) is
made of it. Then 1 % and 5 % of the data at random, or a whole class, are unlearned: forgotten by
the prior and refitted from it, without reading the data that stay.

1. validation: all variants on one seed, 50,000 digits learned and 10,000 held out. The variant with
   the smallest worst ratio to the bars is taken, among those at least 10 x faster than retraining.
2. main: that variant on all 60,000 digits, attacks against test digits, for each seed.
3. lira: membership inference by likelihood ratio on a subset and a smaller network, with a stack
   of shadow models; the attacked models are trained in the same stack. The memory holds a larger
   part of so few.

For a class, the attack tells its removed digits from its held-out ones, and "test" is the test set
of the other classes; accuracy on all of it is given too. Retraining has the epochs, batches and
rates of the original training. Seconds are of one core in one process, forgetting included.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lifelong import Categorical, Examples, gradient_reconstruction
from lifelong.metrics import evaluate
from lifelong.prior import Prior
from lifelong.readers import find, load
from lifelong.runs import versions
from lifelong.toys import digits
from lifelong.unlearning import (
    Evidence,
    attack,
    audit,
    halves,
    lira,
    train_shadows,
    unlearn,
)

LIKELIHOOD = Categorical()
AUC_BAR, ACCURACY_BAR, SPEED_BAR = 0.02, 0.3, 10.0


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    dataset: str = "mnist"
    num_train: int | None = None  # None: all
    hidden: tuple[int, ...] = (100, 100)
    epochs: int = 20
    minibatch: int = 128
    lr: float = 1e-3
    precision: float = 1.0
    memory: float = 0.05
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_seed: int = 100
    held_out: int = 10_000
    removed_class: int = 3
    steps: tuple[int, ...] = (50, 150)
    rates: tuple[float, ...] = (1e-3, 3e-4)
    pool: int = 4000
    lira_hidden: tuple[int, ...] = (64,)
    lira_epochs: int = 30
    lira_memory: float = 0.2
    shadows: int = 32
    targets: int = 4


SMOKE = Config(
    dataset="digits",
    hidden=(8,),
    epochs=2,
    memory=0.2,
    seeds=(0,),
    held_out=300,
    steps=(5,),
    rates=(1e-3,),
    pool=200,
    lira_hidden=(8,),
    lira_epochs=2,
    shadows=4,
    targets=2,
)


def read(config: Config, data: Path | None) -> tuple[Examples, Examples]:
    if config.dataset == "digits":
        train, test = digits(seed=0)
    else:
        if data is None:
            raise SystemExit("mnist needs --data, the folder that holds mnist-train.parquet")
        train, test = (load(find(data, "mnist", part)) for part in ("train", "test"))
    flat = [Examples(d.inputs.float().flatten(1), d.labels) for d in (train, test)]  # type: ignore[union-attr]
    if config.num_train is not None:
        # The held-out digits of the validation are beside these.
        order = torch.randperm(len(flat[0]), generator=torch.Generator().manual_seed(42))
        flat[0] = flat[0][order[: config.num_train + config.held_out]]
    return flat[0], flat[1]


def network(inputs: int, hidden: tuple[int, ...], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (inputs, *hidden)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def train(data: Examples, config: Config, seed: int) -> tuple[nn.Module, float]:
    """The model, and its seconds."""
    start = time.perf_counter()
    x, y = data.inputs, data.labels
    model = network(x.shape[1], config.hidden, seed)  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    steps = config.epochs * -(-len(data) // config.minibatch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        for index in torch.randperm(len(data), generator=generator).split(config.minibatch):
            optimizer.zero_grad()
            nll = nn.functional.cross_entropy(model(x[index]), y[index])  # type: ignore[index]
            decay = sum(p.square().sum() for p in model.parameters())
            (nll + 0.5 * config.precision * decay / len(data)).backward()
            optimizer.step()
            schedule.step()
    return model, time.perf_counter() - start


def prior_of(model: nn.Module, data: Examples, memory: float, precision: float) -> Prior:
    prior = gradient_reconstruction(
        LIKELIHOOD, memory=round(memory * len(data)), precision=precision, gradient="stationary"
    )
    return prior.update(model, data, generator=torch.Generator().manual_seed(0))


Variants = dict[str, dict[str, Any]]


def variants(config: Config) -> Variants:
    """name -> what ``unlearn`` is told."""
    found: Variants = {"step": {"step": True, "method": None}}
    for steps in config.steps:
        for lr in config.rates:
            told = {"method": "adam", "max_iterations": steps, "lr": lr, "minibatch": 256}
            found[f"adam {steps} {lr:g}"] = told
    found["step, then adam"] = {"step": True, **told}  # type: ignore[possibly-undefined]
    found["lbfgs 10"] = {"method": "lbfgs", "max_iterations": 10}
    return found


def removals(data: Examples, config: Config, seed: int) -> dict[str, Tensor]:
    """name -> positions of what is removed."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1000 + seed))
    n = len(data)
    return {
        "1 %": order[: round(0.01 * n)],
        "5 %": order[: round(0.05 * n)],
        "class": (data.labels == config.removed_class).nonzero().squeeze(1),
    }


def rest_of(data: Examples, index: Tensor) -> Examples:
    keep = torch.ones(len(data), dtype=torch.bool)
    keep[index] = False
    return data[keep.nonzero().squeeze(1)]


def compare(
    train_data: Examples, held_out: Examples, config: Config, seed: int, chosen: Variants, say: Say
) -> list[dict[str, Any]]:
    """A row for each removal and variant."""
    before, _ = train(train_data, config, seed)
    start = time.perf_counter()
    prior = prior_of(before, train_data, config.memory, config.precision)
    making = time.perf_counter() - start
    rows = []
    for name, index in removals(train_data, config, seed).items():
        removed, kept = train_data[index], rest_of(train_data, index)
        retrained, seconds = train(kept, config, 500 + seed)
        whole = name == "class"
        of_class = held_out.labels == config.removed_class
        test = held_out[(~of_class).nonzero().squeeze(1)] if whole else held_out
        others = held_out[of_class.nonzero().squeeze(1)] if whole else held_out
        for variant, told in chosen.items():
            model = copy.deepcopy(before)
            row: dict[str, Any] = {"seed": seed, "removal": name, "variant": variant}
            try:
                done = unlearn(model, prior, removed, on_indefinite="clip", **told)
            except ValueError as error:
                rows.append({**row, "failed": str(error)})
                say(f"{name} | {variant}: failed, {error}")
                continue
            found = audit(
                before,
                model,
                retrained,
                likelihood=LIKELIHOOD,
                removed=removed,
                kept=kept,
                test=test,
                others=others,
                seconds={"unlearning": done.seconds, "retraining": seconds},
            )
            accuracy = {
                place: {m: 100 * e.accuracy for m, e in by_model.items()}
                for place, by_model in found.quality.items()
            }
            row |= {
                "auc_gap": found.gap["threshold"],
                "accuracy_gap": accuracy["test"]["unlearned"] - accuracy["test"]["retrained"],
                "speedup": found.speedup,
                "making_the_prior": making,
                "forgetting": done.forgetting,
                "clipped": done.removal.clipped,
                "accuracy_all_test": {
                    m: 100 * evaluate(x, held_out, LIKELIHOOD).accuracy
                    for m, x in (("unlearned", model), ("retrained", retrained))
                },
                "audit": found.to_dict(),
            }
            rows.append(row)
            aucs = {m: a["threshold"].auc for m, a in found.attacks.items()}
            say(
                f"seed {seed} | {name} | {variant}: AUC before {aucs['before']:.4f}, unlearned "
                f"{aucs['unlearned']:.4f}, retrained {aucs['retrained']:.4f}; test "
                f"{accuracy['test']['unlearned']:.2f} (retrained "
                f"{accuracy['test']['retrained']:.2f}); removed "
                f"{accuracy['removed']['unlearned']:.2f} "
                f"({accuracy['removed']['retrained']:.2f}); "
                f"{done.seconds:.2f} s, {found.speedup:.1f} x faster"
            )
    return rows


Say = Callable[[str], None]


def worst_ratio(rows: list[dict[str, Any]]) -> float:
    """How far the worst removal is beside the bars: at most 1 meets them all."""
    if any("failed" in row or row["speedup"] < SPEED_BAR for row in rows):
        return float("inf")
    return max(
        max(abs(r["auc_gap"]) / AUC_BAR, abs(r["accuracy_gap"]) / ACCURACY_BAR) for r in rows
    )


def choose(rows: list[dict[str, Any]], names: list[str]) -> str:
    ratios = {n: worst_ratio([r for r in rows if r["variant"] == n]) for n in names}
    return min(ratios, key=lambda n: ratios[n])


def likelihood_ratio(pool: Examples, config: Config, told: dict[str, Any], say: Say) -> Any:
    """AUC and TPR of LiRA on models before, unlearned and retrained, for each target."""
    generator = torch.Generator().manual_seed(7)
    num = config.shadows + config.targets
    inside = torch.cat(
        [
            halves(config.shadows, len(pool), generator),
            torch.rand(config.targets, len(pool), generator=generator) < 0.5,
        ]
    )
    options: dict[str, Any] = {
        "epochs": config.lira_epochs,
        "minibatch": config.minibatch // 2,
        "lr": config.lr,
        "precision": config.precision,
    }

    def make(seed: int) -> nn.Module:
        return network(pool.inputs.shape[1], config.lira_hidden, seed)  # type: ignore[union-attr]

    start = time.perf_counter()
    stack = train_shadows(make, pool, LIKELIHOOD, inside, generator=generator, **options)
    say(f"lira: {num} models in {time.perf_counter() - start:.1f} s")
    gone = torch.zeros(config.targets, len(pool), dtype=torch.bool)
    for k in range(config.targets):
        members = inside[config.shadows + k].nonzero().squeeze(1)
        some = torch.randperm(len(members), generator=generator)[: round(0.05 * len(members))]
        gone[k, members[some]] = True
    retrained = train_shadows(
        lambda seed: make(1000 + seed),
        pool,
        LIKELIHOOD,
        inside[config.shadows :] & ~gone,
        generator=generator,
        **options,
    )
    scores = stack.confidence(pool, LIKELIHOOD)
    shadow, known = scores[: config.shadows], inside[: config.shadows]
    rows = []
    for k in range(config.targets):
        before = stack.take(config.shadows + k)
        members = inside[config.shadows + k]
        data = pool[members.nonzero().squeeze(1)]
        prior = prior_of(before, data, config.lira_memory, config.precision)
        model = copy.deepcopy(before)
        unlearn(model, prior, pool[gone[k].nonzero().squeeze(1)], on_indefinite="clip", **told)
        a, b = gone[k].nonzero().squeeze(1), (~members).nonzero().squeeze(1)
        found = audit(
            before,
            model,
            retrained.take(k),
            likelihood=LIKELIHOOD,
            removed=pool[a],
            kept=rest_of(data, (gone[k][members]).nonzero().squeeze(1)),
            test=pool[b],
            evidence=Evidence(shadow[:, a], known[:, a], shadow[:, b], known[:, b]),
        )
        # The whole of what the target learned, for the strength of the attack itself.
        every = lira(scores[config.shadows + k], shadow, known)
        strength = attack(every[members], every[~members])
        rows.append({"target": k, "all_members": asdict(strength), "audit": found.to_dict()})
        for form in ("threshold", "lira online", "lira offline"):
            aucs = ", ".join(
                f"{m} {x[form].auc:.3f} ± {x[form].auc_error:.3f} (TPR {x[form].tpr:.3f})"
                for m, x in found.attacks.items()
            )
            say(f"lira target {k} | {form}: {aucs}; gap {found.gap[form]:+.4f}")
        say(f"lira target {k} | all members: AUC {strength.auc:.3f}, TPR {strength.tpr:.3f}")
    return rows


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def run(config: Config, data: Path | None, out: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "log.txt").open("a")

    def say(line: str) -> None:
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    def dump(name: str, value: Any) -> None:
        (out / name).write_text(json.dumps(value, indent=1) + "\n")

    dump("config.json", asdict(config))
    dump("versions.json", {k: v for k, v in versions().items() if k != "platform"})
    train_data, test = read(config, data)
    everything, result = variants(config), {}
    order = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(123))
    learn, validate = train_data[order[config.held_out :]], train_data[order[: config.held_out]]
    if config.num_train is not None:
        train_data = learn
    if "main" in parts:
        rows = compare(learn, validate, config, config.validation_seed, everything, say)
        dump("validation.json", rows)
        best = choose(rows, list(everything))
        say(f"chosen on the validation set: {best}")
        result["chosen"] = best
        tests = []
        for seed in config.seeds:
            tests += compare(train_data, test, config, seed, {best: everything[best]}, say)
            dump("test.json", tests)
        for name in ("1 %", "5 %", "class"):
            chosen = [r for r in tests if r["removal"] == name and "failed" not in r]
            result[name] = {
                key: {"mean": mean([r[key] for r in chosen]), "each": [r[key] for r in chosen]}
                for key in ("auc_gap", "accuracy_gap", "speedup")
                if chosen
            }
        result["bars"] = {"auc": AUC_BAR, "accuracy": ACCURACY_BAR, "speed": SPEED_BAR}
        dump("result.json", result)
        say(json.dumps(result))
    if "lira" in parts:
        best = result.get("chosen") or json.loads((out / "result.json").read_text())["chosen"]
        rows = likelihood_ratio(train_data[: config.pool], config, everything[best], say)
        dump("lira.json", rows)
        result["lira"] = rows
    log.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--num-train", type=int, help="default: all, and all of the seeds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=("main", "lira"))
    flags = parser.parse_args()
    torch.set_num_threads(1)
    parts = ("main", "lira") if flags.part is None else (flags.part,)
    config = Config(num_train=flags.num_train, seeds=tuple(range(flags.seeds)))
    run(SMOKE if flags.smoke else config, flags.data, flags.out, parts)


if __name__ == "__main__":
    main()

"""Sensitivities against the truth: retraining without each example, and labels known to be wrong.

    python -m benchmarks.sensitivity --data DIR --out DIR [--smoke]

1. correlation: leave-one-out deviations by actual retraining of examples drawn at random, beside
   their estimates. The full solution and all retrained copies are minimised to a gradient near 0
   by the same L-BFGS, the copies from the full solution; one more copy with nothing left out is the
   control, and deviations are differences to it.
2. precision: the leave-one-out loss and the test loss over a grid of prior precisions delta, on
   five splits of the data and for the mean curves over them.
3. mislabelled: a share of digits gets a wrong label; which score finds them?

Softmax regression and an MLP with one hidden layer of tanh, float64, loss sum_i nll + delta/2
||theta||². The delta of parts 1 and 3 is the one with the smallest leave-one-out loss on the
training data; test data are read for part 2's comparison alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong import Categorical, Examples, dense_curvature, diagonal_curvature, identify
from lifelong import sensitivity as lib
from lifelong.readers import find, load
from lifelong.runs import versions
from lifelong.toys import digits

from . import stacked

LIKELIHOOD = Categorical()
SIDE = 10  # MNIST's images, shrunk by a box filter: the dense curvature of the MLP then fits


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these."""

    datasets: tuple[str, ...] = ("digits", "mnist")
    networks: tuple[str, ...] = ("linear", "mlp")
    hidden: int = 32
    num_train: int = 1000  # of MNIST; digits has 1,347
    deltas: tuple[float, ...] = tuple(10 ** (k / 3) for k in range(-6, 7))
    grid_iter: int = 500
    splits: tuple[int, ...] = tuple(range(5))  # of part 2; the first is that of part 1
    left_out: int = 120
    fit_rounds: int = 15  # of 200 iterations, the curvature taken again before each
    retrain_iter: int = 300
    tolerance: float = 1e-7
    planted: float = 0.05
    looked_at: float = 0.1
    planted_seeds: tuple[int, ...] = tuple(range(5))
    planted_deltas: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-2, 5))
    planted_iter: int = 300


SMOKE = Config(
    datasets=("digits",),
    hidden=3,
    num_train=60,
    deltas=(1.0, 10.0),
    grid_iter=30,
    splits=(0, 1),
    left_out=3,
    fit_rounds=2,
    retrain_iter=30,
    planted_seeds=(0,),
    planted_deltas=(1.0, 10.0),
    planted_iter=30,
)


@dataclass(frozen=True, eq=False)
class Split:
    """Flat inputs (N, D) in float64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def read(name: str, config: Config, data: Path | None, seed: int) -> Split:
    if name == "digits":
        train, test = digits(seed=seed)
        if config.num_train < len(train) // 2:  # the smoke setting
            train = train[: config.num_train]
    else:
        if data is None:
            raise SystemExit("mnist needs --data, the folder that holds mnist-train.parquet")
        train = load(find(data, "mnist", "train"), size=(SIDE, SIDE))
        test = load(find(data, "mnist", "test"), size=(SIDE, SIDE))
        generator = torch.Generator().manual_seed(seed)
        train = train[torch.randperm(len(train), generator=generator)[: config.num_train]]
    return Split(_flat(train), train.labels, _flat(test), test.labels)


def _flat(data: Examples) -> Tensor:
    return data.inputs.double().flatten(1)  # type: ignore[union-attr]


def network(kind: str, inputs: int, config: Config, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(inputs, 10).double()
        hidden = config.hidden
        return nn.Sequential(
            nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 10)
        ).double()  # fmt: skip


def nll(y: Tensor) -> Callable[[Tensor], Tensor]:
    """(K, N, C) -> (K, N)."""

    def of(f: Tensor) -> Tensor:
        chosen = y.expand(*f.shape[:-1]).unsqueeze(-1)
        return -F.log_softmax(f, dim=-1).gather(-1, chosen).squeeze(-1)

    return of


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# --- 1 and 2 --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grid:
    """One fit for each delta, from one start."""

    params: stacked.Stacked
    slopes: Tensor
    loo: list[float]  # mean nats for each example
    first_order: list[float]


def over_deltas(
    model: nn.Module, x: Tensor, y: Tensor, deltas: tuple[float, ...], max_iter: int
) -> Grid:
    count = len(deltas)
    params, slopes = stacked.minimise(
        model,
        stacked.stack(model, count),
        nll(y),
        x,
        torch.ones(count, len(x), dtype=x.dtype),
        torch.tensor(deltas, dtype=x.dtype),
        max_iter=max_iter,
        tolerance=1e-5,
    )
    exact, first = [], []
    for k, delta in enumerate(deltas):
        fitted = stacked.load(model, params, k)
        curvature = dense_curvature(fitted, (x, y), LIKELIHOOD)
        found = lib.sensitivities(fitted, (x, y), LIKELIHOOD, curvature, delta, batch_size=len(x))
        exact.append(float(found.loo_nll().mean()))
        first.append(float(found.loo_nll(exact=False).mean()))
    return Grid(params, slopes, exact, first)


def precision(
    name: str, kind: str, config: Config, data: Path | None, log: Log
) -> tuple[dict, float, nn.Module]:
    """Part 2: the two curves, and how many steps of the grid their minima are apart.

    On each split of the data, and for the mean curves over the splits. What is returned besides
    is the first split's choice, and the network that was fitted there with it.
    """
    found, first = [], None
    for seed in config.splits:
        split = read(name, config, data, seed)
        model = network(kind, split.x.shape[1], config, seed)
        grid = over_deltas(model, split.x, split.y, config.deltas, config.grid_iter)
        with torch.no_grad():
            losses = nll(split.y)(stacked.outputs(model, grid.params, split.x)).mean(1)
            test = nll(split.test_y)(stacked.outputs(model, grid.params, split.test_x)).mean(1)
        curves = {
            "loo_nll": grid.loo,
            "loo_nll_first_order": grid.first_order,
            "test_nll": test.tolist(),
            "train_nll": losses.tolist(),
            "gradient_norm": grid.slopes.tolist(),
        }
        found.append({"seed": seed, **curves, **_minima(curves, config.deltas)})
        log(f"  split {seed}: {_told(found[-1])}")
        if first is None:
            first = found[-1]["chosen"], model
            stacked.load(model, grid.params, config.deltas.index(found[-1]["chosen"]))
    if first is None:
        raise SystemExit("part 2 needs at least one split")
    names = ("loo_nll", "loo_nll_first_order", "test_nll", "train_nll")
    means = {curve: torch.tensor([one[curve] for one in found]).mean(0).tolist() for curve in names}
    result = {
        "delta": list(config.deltas),
        **means,
        **_minima(means, config.deltas),
        "splits": found,
    }
    log(f"  mean of {len(found)} splits: {_told(result)}")
    return result, *first


def _minima(curves: dict[str, Any], deltas: tuple[float, ...]) -> dict[str, Any]:
    loo, first, test = (
        curves[name].index(min(curves[name]))
        for name in ("loo_nll", "loo_nll_first_order", "test_nll")
    )
    return {
        "chosen": deltas[loo],
        "best_on_test": deltas[test],
        "steps_apart": abs(loo - test),
        "steps_apart_first_order": abs(first - test),
        "test_nll_at_chosen": curves["test_nll"][loo],
        "test_nll_at_best": curves["test_nll"][test],
    }


def _told(found: dict[str, Any]) -> str:
    return (
        f"delta by leave-one-out {found['chosen']:.3g} (first order "
        f"{found['steps_apart_first_order']} steps off), by test {found['best_on_test']:.3g}: "
        f"{found['steps_apart']} steps apart; test nll {found['test_nll_at_chosen']:.4f} against "
        f"{found['test_nll_at_best']:.4f}"
    )


def correlation(
    split: Split, model: nn.Module, delta: float, config: Config, seed: int, log: Log
) -> dict:
    """Part 1, at one delta. The model holds where the full solution is searched from."""
    x, y, n = split.x, split.y, len(split.x)
    one = torch.tensor([delta], dtype=x.dtype)
    start = time.perf_counter()
    for _ in range(config.fit_rounds):
        base, slope = stacked.minimise(
            model, stacked.stack(model, 1), nll(y), x, torch.ones(1, n, dtype=x.dtype), one,
            max_iter=200, tolerance=config.tolerance, factor=_factor(model, x, y, delta),
        )  # fmt: skip
        stacked.load(model, base, 0)
        if float(slope[0]) <= config.tolerance:
            break
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(n, generator=generator)[: config.left_out]
    weights = torch.ones(len(index) + 1, n, dtype=x.dtype)
    weights[torch.arange(len(index)), index] = 0  # the last copy is the control
    fitted = time.perf_counter()
    copies, slopes = stacked.minimise(
        model, stacked.stack(model, len(weights)), nll(y), x, weights, one.expand(len(weights)),
        max_iter=config.retrain_iter, tolerance=config.tolerance,
        factor=_factor(model, x, y, delta),
    )  # fmt: skip
    retrained = time.perf_counter()
    with torch.no_grad():
        f = stacked.outputs(model, copies, x[index])  # (K + 1, K, C)
        control, without = f[-1], f[:-1].diagonal().T  # (K, C) each
        drift = float((control - model(x[index])).abs().max())
        truth = {
            "output": without - control,
            "mean": without.softmax(-1) - control.softmax(-1),
            "nll": (nll(y[index])(without) - nll(y[index])(control)).unsqueeze(-1),
        }
    result: dict[str, Any] = {
        "delta": delta,
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": n,
        "left_out": len(index),
        "index": index.tolist(),
        "labels": y[index].tolist(),
        "gradient_norm": float(slope[0]),
        "largest_gradient_norm_retrained": float(slopes.max()),
        "largest_change_of_the_control": drift,
        "true_mean": truth["mean"].abs().sum(-1).tolist(),
        "true_output": truth["output"].norm(dim=-1).tolist(),
        "true_nll": truth["nll"].squeeze(-1).tolist(),
        "estimates": {},
    }
    log(
        f"  retrained {len(index)} of {n}: gradients at most {slopes.max():.1e}, control moved "
        f"{drift:.1e}, median output change {truth['output'].norm(dim=-1).median():.1e} "
        f"({fitted - start:.0f} s to fit, {retrained - fitted:.0f} s to retrain)"
    )
    for name, make in curvatures().items():
        curvature = make(model, (x, y))
        few = lib.sensitivities(
            model, (x[index], y[index]), LIKELIHOOD, curvature, delta, batch_size=len(index)
        )
        for exact in (True, False):
            key = f"{name}, {'exact' if exact else 'first order'}"
            try:
                estimate = {
                    "output": few.output_change(exact=exact),
                    "mean": few.mean_change(exact=exact),
                    "nll": (few.loo_nll(exact=exact) - few.nll()).unsqueeze(-1),
                }
            except ValueError as error:  # a diagonal may say that an example's leverage is above 1
                result["estimates"][key] = {"error": str(error)}
                log(f"    {key}: {error}")
                continue
            sizes = {what: _size(what, value) for what, value in estimate.items()}
            true_sizes = {what: _size(what, value) for what, value in truth.items()}
            row = {
                **{f"pearson_{w}": pearson(sizes[w], true_sizes[w]) for w in sizes},
                **{f"pearson_{w}_entries": pearson(estimate[w], truth[w]) for w in estimate},
                **{f"slope_{w}": _slope(sizes[w], true_sizes[w]) for w in sizes},
                **{f"estimated_{w}": sizes[w].tolist() for w in sizes},
            }
            result["estimates"][key] = row
            log(
                f"    {key}: Pearson of the mean's change {row['pearson_mean']:.4f}, of the "
                f"output's {row['pearson_output']:.4f}, of the nll's {row['pearson_nll']:.4f}; "
                f"true / estimated {row['slope_mean']:.2f}, {row['slope_output']:.2f}"
            )
    return result


def _factor(model: nn.Module, x: Tensor, y: Tensor, delta: float) -> Tensor:
    matrix = dense_curvature(model, (x, y), LIKELIHOOD).matrix
    return torch.linalg.cholesky(matrix + delta * torch.eye(len(matrix), dtype=x.dtype))


def _size(what: str, value: Tensor) -> Tensor:
    """(K, C) -> (K,): the numbers whose correlation is reported."""
    if what == "nll":
        return value.squeeze(-1)
    return value.norm(dim=-1) if what == "output" else value.abs().sum(-1)


def _slope(estimate: Tensor, truth: Tensor) -> float:
    """Of the least-squares line through 0."""
    return float((estimate * truth).sum() / estimate.square().sum())


def curvatures() -> dict[str, Callable[..., Any]]:
    return {
        "dense": lambda model, data: dense_curvature(model, data, LIKELIHOOD),
        "diagonal": lambda model, data: diagonal_curvature(model, data, LIKELIHOOD),
    }


# --- 3 --------------------------------------------------------------------------------------------


def plant(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels with a share of them wrong, uniformly among the other classes; which (N,) bool."""
    generator = torch.Generator().manual_seed(1000 + seed)
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[chosen] = True
    shift = torch.randint(1, 10, (len(y),), generator=generator)
    return torch.where(wrong, (y + shift) % 10, y), wrong


def mislabelled(kind: str, config: Config, log: Log) -> dict:
    """Part 3: the recall of planted labels among the highest scores, for each score and seed."""
    recalls: dict[str, list[float]] = {}
    chosen = []
    for seed in config.planted_seeds:
        split = read("digits", config, None, seed)
        y, wrong = plant(split.y, config.planted, seed)
        model = network(kind, split.x.shape[1], config, seed)
        grid = over_deltas(model, split.x, y, config.planted_deltas, config.planted_iter)
        best = grid.loo.index(min(grid.loo))
        delta = config.planted_deltas[best]
        chosen.append(delta)
        stacked.load(model, grid.params, best)
        for name, scores in _scores(model, (split.x, y), delta, seed).items():
            top = scores.argsort(descending=True, stable=True)[: round(config.looked_at * len(y))]
            recalls.setdefault(name, []).append(float(wrong[top].sum() / wrong.sum()))
        now = {name: f"{values[-1]:.3f}" for name, values in recalls.items()}
        log(f"  seed {seed}, delta {delta:.3g}: {now}")
    return {
        "delta": chosen,
        "recall": recalls,
        "mean": {name: sum(v) / len(v) for name, v in recalls.items()},
        "standard_error": {
            name: float(torch.tensor(v).std() / math.sqrt(len(v))) if len(v) > 1 else None
            for name, v in recalls.items()
        },
        "lowest": {name: min(v) for name, v in recalls.items()},
    }


def _scores(
    model: nn.Module, data: tuple[Tensor, Tensor], delta: float, seed: int
) -> dict[str, Tensor]:
    found = {}
    for name, make in curvatures().items():
        curvature = make(model, data)
        for score in ("sensitivity", "leverage"):
            found[f"{score}, {name}"] = identify(
                model, data, LIKELIHOOD, score=score, curvature=curvature, damping=delta
            )
        change = lib.sensitivities(model, data, LIKELIHOOD, curvature, delta)
        found[f"sensitivity of the mean, {name}"] = change.score("mean")
        found[f"sensitivity of the nll, {name}"] = change.score("loss")
    generator = torch.Generator().manual_seed(seed)
    for score in ("residual", "lambda", "random"):
        found[score] = identify(model, data, LIKELIHOOD, score=score, generator=generator)
    return found


# --- the whole ------------------------------------------------------------------------------------


class Log:
    """Prints, and keeps what was printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)


def run(config: Config, data: Path | None, log: Log) -> dict:
    """The three parts; ``planted_seeds=()`` leaves out the third, ``datasets=()`` the others."""
    result: dict[str, Any] = {"correlation": {}, "precision": {}, "mislabelled": {}}
    for name in config.datasets:
        for kind in config.networks:
            case = f"{name}, {kind}"
            log(case)
            result["precision"][case], delta, model = precision(name, kind, config, data, log)
            if config.left_out:
                split = read(name, config, data, config.splits[0])
                result["correlation"][case] = correlation(
                    split, model, delta, config, config.splits[0], log
                )
    for kind in config.networks if config.planted_seeds else ():
        log(f"digits with wrong labels, {kind}")
        result["mislabelled"][kind] = mislabelled(kind, config, log)
        means = {k: f"{v:.3f}" for k, v in result["mislabelled"][kind]["mean"].items()}
        log(f"  mean recall: {means}")
    return result


def write(folder: Path, config: Config, result: dict, log: Log) -> None:
    """Parts that another call made before are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    result = {part: {**old.get(part, {}), **found} for part, found in result.items()}
    for name, content in (
        ("config.json", asdict(config)),
        ("versions.json", versions()),
        ("result.json", result),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    with (folder / "log.txt").open("a") as file:
        file.write("\n".join(log.lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with mnist-train.parquet and -test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--datasets", nargs="*", help="of parts 1 and 2: digits, mnist, or none")
    parser.add_argument("--networks", nargs="+", help="linear, mlp; default both")
    parser.add_argument("--no-retraining", action="store_true", help="leave out part 1")
    parser.add_argument("--no-mislabelled", action="store_true", help="leave out part 3")
    parser.add_argument("--smoke", action="store_true", help="seconds; the numbers mean nothing")
    options = parser.parse_args()
    whole = SMOKE if options.smoke else Config()
    config = replace(
        whole,
        datasets=whole.datasets if options.datasets is None else tuple(options.datasets),
        networks=tuple(options.networks or whole.networks),
        left_out=0 if options.no_retraining else whole.left_out,
        planted_seeds=() if options.no_mislabelled else whole.planted_seeds,
    )
    torch.set_num_threads(1)
    log = Log()
    result = run(config, options.data, log)
    write(options.out, whole, result, log)


if __name__ == "__main__":
    main()

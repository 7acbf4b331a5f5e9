"""Compact memory against the published curves: USPS, four moons, Split MNIST as regression, the EM.

    python -m benchmarks.compact PART --data DIR --out DIR [--seeds 5] [--memory 10 20 50 100]

PART    usps         five tasks of two digits, odd or even, [1, x] of 257 features
        moons        four half moons, polynomials of degree 5, one logit
        regression   Split MNIST, ten targets onehot - 1/10, raw pixels
        em           how far the EM of the paper is after so many iterations
Each writes PART[_MEMORY].json into the folder, beside config.json, versions.json and log.txt.

The published code trains by Adam, thousands of steps on the whole batch. These objectives are
convex with one minimum, which a Newton step in float64 finds to rounding, so that is what is used:
no difference between methods can come from an optimiser that had not arrived.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lifelong
from lifelong import Bernoulli, Examples, Gaussian, Prior, Regulariser, compact, readers
from lifelong.likelihoods import Likelihood
from lifelong.runs import versions

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
EPSILONS = (1e-3, 1e-4, 1e-5)
ITERATIONS = {"usps": 5000, "moons": 200, "regression": 10_000}
DELTA = {"usps": 0.5, "moons": 0.01, "regression": 0.01}
MEMORY = {"usps": (10, 20, 50, 100), "moons": (7, 14, 21), "regression": (10, 20, 40, 160, 320)}
SEEDS = {"usps": 5, "moons": 5, "regression": 1, "em": 1}

Tasks = list[tuple[Examples, Examples]]  # (train, test), float64
MakePrior = Callable[[Likelihood, int, float], Prior]  # memory for a task, delta


# ------------------------------------------------------------------ exact training


def fit(head: nn.Linear, data: Examples, prior: Prior, tolerance: float = 1e-8) -> float:
    """The minimum of sum nll + prior, in place, by Newton with halving; the gradient's norm there.

    For one logit, or a Gaussian: every output has the same Hessian, sum_i lambda_i phi_i phi_iᵀ.
    """
    x, y = torch.as_tensor(data.inputs), data.labels
    params = list(head.parameters())

    def loss() -> Tensor:
        return prior.likelihood.nll(head(x), y).sum() + prior(head)

    norm = math.inf
    for _ in range(100):
        value = loss()
        g = _joined(head, torch.autograd.grad(value, params))
        norm = float(g.norm())
        if norm <= tolerance * max(1.0, float(value.detach())):
            break
        step, scale = torch.linalg.solve(_hessian(head, x, prior), g.T).T, 1.0
        start = _joined(head, params).detach()
        while True:
            _set(head, start - scale * step)
            if scale < 1e-6 or float(loss().detach()) <= float(value.detach()):
                break
            scale /= 2
        if scale < 1e-6:
            break
    return norm


def _hessian(head: nn.Linear, x: Tensor, prior: Prior) -> Tensor:
    groups = [(x, torch.ones(len(x), dtype=x.dtype))]
    if prior.memory is not None:
        m = prior.memory
        groups.append((torch.as_tensor(m.inputs), m.soft_weight + m.hard_weight))
    total: Tensor | None = None
    for phi, weight in groups:
        f = head(phi).detach()
        each = weight * prior.likelihood.hessian_trace(f) / f.shape[1]
        phi = phi if head.bias is None else torch.cat([phi, torch.ones_like(phi[:, :1])], 1)
        new = phi.T @ (each.unsqueeze(1) * phi)
        total = new if total is None else total + new
    assert total is not None
    if prior.regulariser is not None:
        total.diagonal().add_(prior.regulariser.precision)
    if prior.weight is not None and prior.weight.curvature is not None:
        total = total + prior.weight.curvature.matrix  # type: ignore[attr-defined]
    return total


def _joined(head: nn.Linear, values: Iterable[Tensor]) -> Tensor:
    """(C, P) or (C, P + 1)."""
    weight, *bias = values
    return torch.cat([weight, *(b.unsqueeze(1) for b in bias)], dim=1)


@torch.no_grad()
def _set(head: nn.Linear, theta: Tensor) -> None:
    head.weight.copy_(theta[:, : head.in_features])
    if head.bias is not None:
        head.bias.copy_(theta[:, -1])


def blank(tasks: Tasks, likelihood: Likelihood, bias: bool = False) -> nn.Linear:
    train = tasks[0][0]
    outputs = 1 if isinstance(likelihood, Bernoulli) else train.labels.shape[1]
    width = torch.as_tensor(train.inputs).shape[1]
    head = nn.Linear(width - bias, outputs, bias=bias, dtype=torch.float64)
    for p in head.parameters():
        nn.init.zeros_(p)
    return head


# ------------------------------------------------------------------ methods


def _regularised(prior: Prior, delta: float) -> Prior:
    return dataclasses.replace(prior, terms=(Regulariser(delta),))


def replay(lik: Likelihood, memory: int, delta: float, population: bool) -> Prior:
    prior = lifelong.experience_replay(lik, memory=memory, total=False, balanced=True)
    recipe = dataclasses.replace(prior.recipe, population=population)
    return _regularised(dataclasses.replace(prior, recipe=recipe), delta)


def em(epsilon: float, iterations: int) -> MakePrior:
    return lambda lik, memory, delta: lifelong.compact_memory(
        lik, memory=memory, precision=delta, method="em", damping=epsilon, iterations=iterations
    )


def closed(lik: Likelihood, memory: int, delta: float) -> Prior:
    return lifelong.compact_memory(lik, memory=memory, precision=delta)


BASELINES: dict[str, MakePrior] = {
    "none": lambda lik, m, delta: lifelong.weight_decay(lik, precision=delta),
    "batch": lambda lik, m, delta: lifelong.joint(lik, precision=delta),
    "laplace, dense": lambda lik, m, delta: lifelong.online_laplace(
        lik, structure="dense", precision=delta
    ),
}
EXAMPLES: dict[str, MakePrior] = {
    "replay, weight 1": lambda lik, m, delta: replay(lik, m, delta, False),
    "replay, weight N/M": lambda lik, m, delta: replay(lik, m, delta, True),
    "K-prior, lambda": lambda lik, m, delta: lifelong.kprior(lik, memory=m, precision=delta),
    "K-prior, random, N/M": lambda lik, m, delta: lifelong.kprior(
        lik, memory=m, precision=delta, score="random", population=True
    ),
}


def methods(part: str, iterations: int) -> dict[str, MakePrior]:
    """Those that depend on the size of the memory."""
    found = {**EXAMPLES, "compact, closed form": closed, "compact, closed form, bias": closed}
    epsilons = {"usps": EPSILONS, "moons": (1e-4,), "regression": (1e-3,)}[part]
    if part == "regression":
        found = {"K-prior, random, N/M": EXAMPLES["K-prior, random, N/M"]}
        found["compact, closed form"] = closed
    for epsilon in epsilons:
        found[f"compact, EM, eps {epsilon:g}"] = em(epsilon, iterations)
    return found


def learn(
    tasks: Tasks, likelihood: Likelihood, make: MakePrior, memory: int, delta: float,
    *, bias: bool = False, seed: int = 0,
) -> tuple[nn.Linear, list[list[float]], Prior, float]:  # fmt: skip
    """Each task in turn: the head, the accuracy on the tasks so far after each, the last prior,
    and the share of the past's curvature that its memory holds.

    bias: the features' constant comes first, and is left to the head's own bias.
    """
    head, prior = blank(tasks, likelihood, bias), make(likelihood, memory, delta)
    if bias:
        tasks = [(_without_constant(a), _without_constant(b)) for a, b in tasks]
    generator, matrix, share = torch.Generator().manual_seed(seed), [], 0.0
    for t, (train, _) in enumerate(tasks):
        fit(head, train, prior)
        matrix.append([accuracy(head, test) for _, test in tasks[: t + 1]])
        if t + 1 < len(tasks):  # nothing is learned after the last, so nothing is kept of it
            prior = prior.update(head, train, generator=generator)
        if t + 2 == len(tasks):
            share = curvature_share(head, [a for a, _ in tasks[: t + 1]], prior)
    return head, matrix, prior, share


@torch.no_grad()
def curvature_share(head: nn.Linear, past: Sequence[Examples], prior: Prior) -> float:
    """The trace of the memory's curvature over that of all past examples, at the anchor."""

    def trace(inputs: Any, weight: Tensor | float) -> float:
        x = inputs if head.bias is None else torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        each = weight * prior.likelihood.hessian_trace(head(inputs))
        return float((each * x.square().sum(1)).sum())

    if prior.memory is None:
        return 0.0
    held = trace(prior.memory.inputs, prior.memory.soft_weight + prior.memory.hard_weight)
    return held / sum(trace(data.inputs, 1.0) for data in past)


def _without_constant(data: Examples) -> Examples:
    return dataclasses.replace(data, inputs=torch.as_tensor(data.inputs)[:, 1:])


@torch.no_grad()
def accuracy(head: nn.Linear, data: Examples) -> float:
    f = head(torch.as_tensor(data.inputs))
    if f.shape[1] == 1:
        return float(((f[:, 0] > 0) == (data.labels > 0.5)).double().mean())
    return float((f.argmax(1) == data.labels.argmax(1)).double().mean())


# ------------------------------------------------------------------ tasks


def with_constant(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x.double().flatten(1)], dim=1)


def usps_tasks(data: Path, seed: int, train: int = 1000, test: int = 300) -> Tasks:
    """Odd or even, two digits a task; so many examples of each, drawn by the seed."""
    found = {
        split: readers.load(readers.find(data, "usps", split), split=split)
        for split in ("train", "test")
    }
    generator, tasks = torch.Generator().manual_seed(seed), []
    for pair in PAIRS:
        parts = []
        for split, size in (("train", train), ("test", test)):
            rows = torch.isin(found[split].labels, torch.tensor(pair)).nonzero().squeeze(1)
            rows = rows[torch.randperm(len(rows), generator=generator)[:size]]
            labels = (found[split].labels[rows] % 2).double()
            parts.append(
                Examples(with_constant(torch.as_tensor(found[split].inputs)[rows]), labels)
            )
        tasks.append((parts[0], parts[1]))
    return tasks


def polynomials(points: Tensor, degree: int = 5) -> Tensor:
    """Every monomial of two variables up to the degree, the constant first: 21 for degree 5."""
    a, b = points[:, 0].double(), points[:, 1].double()
    return torch.stack([a ** (n - k) * b**k for n in range(degree + 1) for k in range(n + 1)], 1)


def moons_points(n: int, generator: torch.Generator, strip: int, noise: float = 0.1) -> Examples:
    """Strip 0 to 3 of two pairs of interleaved half circles, side by side, both classes in each.

    A pair is (cos a - .5, sin a - .25) and (.5 - cos a, .25 - sin a), a uniform in [0, pi], with
    Gaussian noise; the pairs are centred on x = -1.6 and 1.6, and a strip is the half of a pair
    left or right of its centre.
    """
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    while sum(len(p) for p in kept) < n:
        angle = math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
        y = (torch.rand(n, generator=generator) < 0.5).double()
        sign = (1 - 2 * y).unsqueeze(1)
        points = sign * torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
        points = points + noise * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        inside = (points[:, 0] >= 0) if strip % 2 else (points[:, 0] < 0)
        centre = torch.tensor([-1.6 if strip < 2 else 1.6, 0.0], dtype=torch.float64)
        kept.append(points[inside] + centre)
        labels.append(y[inside])
    return Examples(polynomials(torch.cat(kept)[:n]), torch.cat(labels)[:n])


def moons_tasks(seed: int, size: int = 500) -> Tasks:
    generator = torch.Generator().manual_seed(seed)
    return [
        (moons_points(size, generator, strip), moons_points(size, generator, strip))
        for strip in range(4)
    ]


@functools.cache
def moons_grid() -> Tensor:
    """Features of 632 x 251 points of (-3.2, 3.2) x (-1.2, 1.2), as many as the paper's."""
    a = torch.linspace(-3.2, 3.2, 632, dtype=torch.float64)
    b = torch.linspace(-1.2, 1.2, 251, dtype=torch.float64)
    return polynomials(torch.cartesian_prod(a, b))


def regression_tasks(data: Path, limit: int | None = None) -> Tasks:
    """Split MNIST, two digits a task; targets onehot - 1/10, pixels as they are."""
    parts: list[list[Examples]] = []
    for split in ("train", "test"):
        found = readers.load(readers.find(data, "mnist", split), split=split)
        x = torch.as_tensor(found.inputs).flatten(1)
        parts.append([])
        for pair in PAIRS:
            rows = torch.isin(found.labels, torch.tensor(pair)).nonzero().squeeze(1)[:limit]
            y = nn.functional.one_hot(found.labels[rows], 10).double() - 0.1
            parts[-1].append(Examples(x[rows].double(), y))
    return list(zip(*parts, strict=True))


# ------------------------------------------------------------------ parts


def _row(matrix: list[list[float]]) -> dict[str, float]:
    """final: mean over the tasks after the last; average: mean over t of the tasks seen by then."""
    means = [sum(row) / len(row) for row in matrix]
    return {"final": means[-1], "average": sum(means) / len(means)}


def _summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in rows[0]:
        values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
        found[key] = {
            "mean": float(values.mean()), "standard_error": error, "per_seed": values.tolist()
        }  # fmt: skip
    return found


def compare(
    part: str, tasks_of: Callable[[int], Tasks], likelihood: Likelihood, memory: int | None,
    seeds: int, iterations: int, log: Callable[[str], None], only: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All methods of a part at one size of memory, or (None) those that have no such size."""
    table = BASELINES if memory is None else methods(part, iterations)
    table = {name: make for name, make in table.items() if only is None or only in name}
    if part == "regression" and memory is None:
        table = {name: make for name, make in table.items() if "laplace" not in name}
    tasks_by_seed = [tasks_of(seed) for seed in range(seeds)]
    bests = [_batch(tasks) for tasks in tasks_by_seed] if part == "moons" else []
    found: dict[str, Any] = {}
    for name, make in table.items():
        rows, start = [], time.perf_counter()
        for seed, tasks in enumerate(tasks_by_seed):
            bias = name.endswith("bias")
            head, matrix, prior, share = learn(
                tasks, likelihood, make, memory or 0, DELTA[part], bias=bias, seed=seed
            )
            row = _row(matrix)
            if part == "moons":
                row["grid"] = _agreement(head, bias, bests[seed])
            if memory is not None:
                row |= {"kept": float(len(prior.memory or ())), "curvature": share}
            rows.append(row)
        found[name] = _summary(rows)
        cells = ", ".join(
            f"{key} {v['mean']:.4f} ± {v['standard_error'] or 0:.4f}"
            for key, v in found[name].items()
        )
        seconds = time.perf_counter() - start
        log(f"{part} memory {memory}: {name}: {cells} ({seconds:.0f} s)")
    return found


def _batch(tasks: Tasks) -> nn.Linear:
    """A head trained on the moons of all tasks at once."""
    x = torch.cat([torch.as_tensor(train.inputs) for train, _ in tasks])
    everything = Examples(x, torch.cat([train.labels for train, _ in tasks]))
    best = blank(tasks, Bernoulli())
    fit(best, everything, _regularised(lifelong.finetune(Bernoulli()), DELTA["moons"]))
    return best


@torch.no_grad()
def _agreement(head: nn.Linear, bias: bool, best: nn.Linear) -> float:
    """The part of the grid where the head and ``best`` say the same."""
    grid = moons_grid()
    theta = _joined(head, head.parameters())
    theta = torch.cat([theta[:, -1:], theta[:, :-1]], dim=1) if bias else theta
    return float((((grid @ theta.T) > 0) == (best(grid) > 0)).double().mean())


def examine(data: Path, log: Callable[[str], None], most: int, memory: int = 20) -> dict[str, Any]:
    """The EM at the second update of USPS: how near the span, the scale and the Hessian are.

    subspace: 1 - mean cos² of the angles to the K leading eigenvectors of S, the mean over those
    that carry curvature (weighted by eigenvalue); scale: trace of the memory's curvature over the
    sum of the K leading eigenvalues; hessian: ‖F Fᵀ - S_K‖ / ‖S_K‖, S_K the best rank K.
    """
    tasks, likelihood = usps_tasks(data, 0), Bernoulli()
    head, prior = blank(tasks, likelihood), em(1e-4, 10)(likelihood, memory, DELTA["usps"])
    generator = torch.Generator().manual_seed(0)
    fit(head, tasks[0][0], prior)
    prior = prior.update(head, tasks[0][0], generator=generator)
    fit(head, tasks[1][0], prior)
    assert prior.memory is not None
    items = prior.memorise(head, tasks[1][0], generator=generator)
    assert items is not None
    old = prior.memory.refresh(head)
    with torch.no_grad():
        rows = compact.curvature_rows(head, tasks[1][0], likelihood, old=old)
        scale = compact.scale_of(head, likelihood)
        start = compact.CompactMemory.of(old, items)
        s, V = torch.linalg.svd(rows, full_matrices=False)[1:]
        k = len(start)
        best = V[:k].T @ (s[:k].square().unsqueeze(1) * V[:k])
        report: dict[str, Any] = {
            "vectors": k,
            "eigenvalues": s.square()[[0, k // 2, k - 1, k]].tolist(),
            "trace": float(s.square().sum()),
            "epsilons": {},
        }
        marks = [m for m in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000) if m <= most]
        for epsilon in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0):
            memory_, done, curve = start, 0, []
            for mark in [0, *marks]:
                if mark:
                    memory_ = compact.match_em(
                        rows, memory_, scale, damping=epsilon, iterations=mark - done
                    )
                    done = mark
                F = memory_.unit().rows(scale)
                Q = torch.linalg.qr(F.T).Q
                cos2 = (V[:k] @ Q).square().sum(1)
                weight = s[:k].square() / s[:k].square().sum()
                curve.append({
                    "iterations": mark,
                    "subspace": float(1 - cos2.mean()),
                    "subspace by eigenvalue": float(1 - weight @ cos2),
                    "scale": float(F.square().sum() / s[:k].square().sum()),
                    "hessian": float((F.T @ F - best).norm() / best.norm()),
                })  # fmt: skip
            report["epsilons"][f"{epsilon:g}"] = curve
            log(f"em eps {epsilon:g}: " + "; ".join(
                f"{c['iterations']}: subspace {c['subspace']:.2e}, scale {c['scale']:.3f}, "
                f"hessian {c['hessian']:.3f}" for c in curve
            ))  # fmt: skip
    report["accuracy by iterations"] = {}
    for iterations in [m for m in (1, 10, 100, 1000, 5000) if m <= most]:
        rows_ = []
        for seed in range(SEEDS["usps"] if most > 100 else 1):
            matrix = learn(
                usps_tasks(data, seed), likelihood, em(1e-4, iterations), memory, DELTA["usps"],
                seed=seed,
            )[1]  # fmt: skip
            rows_.append(_row(matrix))
        report["accuracy by iterations"][iterations] = _summary(rows_)
        found = report["accuracy by iterations"][iterations]["final"]
        log(f"em eps 1e-4, {iterations} iterations, memory {memory}: final {found['mean']:.4f}")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["usps", "moons", "regression", "em"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--memory", type=int, nargs="*", help="a task; 0 for what keeps none")
    parser.add_argument("--only", help="methods whose name has this in it")
    parser.add_argument("--smoke", action="store_true", help="few examples and iterations")
    options = parser.parse_args(argv)
    part, smoke = options.part, options.smoke
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = 1 if smoke else options.seeds or SEEDS[part]
    iterations = 3 if smoke else ITERATIONS.get(part, 10_000)

    def log(line: str) -> None:
        stamped = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {line}"
        print(stamped, flush=True)
        with (options.out / "log.txt").open("a") as file:
            file.write(stamped + "\n")

    _dump(options.out / "versions.json", versions())
    _dump(
        options.out / "config.json",
        {
            "delta": DELTA, "memory": MEMORY, "epsilons": EPSILONS, "iterations": ITERATIONS,
            "seeds": SEEDS, "usps": {"train": 1000, "test": 300, "pairs": PAIRS},
            "moons": {"size": 500, "degree": 5, "noise": 0.1}, "smoke": smoke,
        },
    )  # fmt: skip
    if part == "em":
        _dump(options.out / "em.json", examine(options.data, log, 3 if smoke else iterations))
        return
    kinds: dict[str, tuple[Callable[[int], Tasks], Likelihood]] = {
        "usps": (
            lambda seed: usps_tasks(options.data, seed, *((60, 20) if smoke else (1000, 300))),
            Bernoulli(),
        ),
        "moons": (lambda seed: moons_tasks(seed, 40 if smoke else 500), Bernoulli()),
        "regression": (
            lambda seed: regression_tasks(options.data, 50 if smoke else None),
            Gaussian(),
        ),
    }
    tasks_of, likelihood = kinds[part]
    sizes = (0, *MEMORY[part]) if options.memory is None else options.memory
    for memory in sizes:
        found = compare(
            part, tasks_of, likelihood, memory or None, seeds, iterations, log, options.only
        )
        path = options.out / (f"{part}_{memory}.json" if memory else f"{part}.json")
        old = json.loads(path.read_text()) if path.exists() else {}
        _dump(path, {**old, **found})


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()

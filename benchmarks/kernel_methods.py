"""K-priors of kernel machines on USPS, odd or even: exactness, small memories, steps.

    python -m benchmarks.kernel_methods --data DIR --out DIR

exact: relative error of the function on test inputs against retraining by other solvers (closed
form; bounded least squares of scipy), each adaptation alone and the worst of the 24 orders of
three. memory: the same against the prior that remembers everything, for memories of some sizes.
steps: systems solved and gradients from the anchor, and from nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from lifelong import Bernoulli, Examples, Gaussian, Hinge, KernelPrior, readers
from lifelong.kernels import RBF
from lifelong.runs import versions

KERNEL, OTHER = RBF(6.0, bias=0.1), RBF(4.0, bias=0.2)
MACHINES: dict[str, tuple[Any, float]] = {
    "gp": (Gaussian(0.3), 1.0),
    "logistic": (Bernoulli(), 0.3),
    "svm": (Hinge(), 0.3),
}
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def bounded_least_squares(k: Tensor, y: Tensor, precision: float) -> Tensor:
    """alpha (N,) of a support vector machine: its dual ½ aᵀ Q a - sum a as ½ ‖R a - R⁻ᵀ 1‖²."""
    q = y.unsqueeze(1) * k * y / precision
    r = torch.linalg.cholesky(q).T
    target = torch.linalg.solve_triangular(r.T, torch.ones_like(q[:, :1]), upper=False)
    found = lsq_linear(
        r.numpy(), target.squeeze(1).numpy(), (0, 1), method="bvls", tol=1e-15, max_iter=5000
    )
    return torch.from_numpy(found.x) * y / precision


@dataclass(frozen=True)
class Past:
    """All that was learned and not forgotten, and the function that it should have given."""

    machine: str
    x: Tensor
    y: Tensor
    ids: Tensor
    kernel: Any = KERNEL
    factor: float = 1.0  # of the precision

    def train(self, z: Tensor) -> Tensor:
        """f at z by another solver: (B, 1)."""
        likelihood, precision = MACHINES[self.machine]
        precision, k = self.factor * precision, self.kernel(self.x, self.x)
        if isinstance(likelihood, Gaussian):
            k = k + precision * likelihood.noise_sd**2 * torch.eye(len(k), dtype=k.dtype)
            alpha = torch.linalg.solve(k, self.y)
        else:
            alpha = bounded_least_squares(k, self.y, precision)
        return self.kernel(z, self.x) @ alpha.unsqueeze(1)


Pair = tuple[KernelPrior, Past]


def adaptations(new: Examples, count: int) -> dict[str, Callable[[KernelPrior, Past], Pair]]:
    """Learn ``new``; forget ``count``; 3 times the precision; another kernel of half the pixels."""

    def seen(past: Past) -> Tensor:
        return torch.as_tensor(new.inputs)[:, : past.x.shape[1]]

    def add(prior: KernelPrior, past: Past) -> Pair:
        after = prior.update(Examples(seen(past), new.labels, new.ids))
        x, y = torch.cat([past.x, seen(past)]), torch.cat([past.y, new.labels])
        return after, replace(past, x=x, y=y, ids=torch.cat([past.ids, new.ids]))

    def remove(prior: KernelPrior, past: Past) -> Pair:
        kept = prior.beliefs.ids if prior.beliefs is not None else past.ids
        gone = torch.isin(past.ids, kept[:: max(1, len(kept) // count)][:count])
        after = prior.forget(past.ids[gone])
        return after, replace(past, x=past.x[~gone], y=past.y[~gone], ids=past.ids[~gone])

    def regularise(prior: KernelPrior, past: Past) -> Pair:
        return prior.replace(precision=3 * prior.precision), replace(past, factor=3 * past.factor)

    def transfer(prior: KernelPrior, past: Past) -> Pair:
        after = prior.transfer(kernel=OTHER, features=lambda x: x[:, :128])
        return after, replace(past, x=past.x[:, :128], kernel=OTHER)

    return {"add": add, "remove": remove, "regularise": regularise, "transfer": transfer}


def learned(machine: str, data: Examples) -> Pair:
    likelihood, precision = MACHINES[machine]
    past = Past(machine, torch.as_tensor(data.inputs), data.labels, data.ids)
    return KernelPrior(KERNEL, likelihood, precision).update(data), past


def labelled(data: Examples, machine: str) -> Examples:
    """Odd is 1; even -1, or 0 for the logistic machine."""
    odd = data.labels.double()
    return replace(data, labels=odd if machine == "logistic" else 2 * odd - 1)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def exact(machine: str, data: Examples, new: Examples, test: Tensor) -> dict[str, float]:
    changes, start = adaptations(new, len(new) // 2), learned(machine, data)

    def error(prior: KernelPrior, past: Past) -> float:
        z = test[:, : past.x.shape[1]]
        return distance(prior.machine(z), past.train(z))

    found = {"nothing": error(*start)} | {name: error(*f(*start)) for name, f in changes.items()}
    rows = []
    for order in itertools.permutations(changes, 3):
        pair = start
        for name in order:
            pair = changes[name](*pair)
        rows.append(error(*pair))
    return found | {"worst of three in a row": max(rows)}


def memory(machine: str, data: Examples, new: Examples, test: Examples) -> dict[str, Any]:
    """By share of the examples that is remembered: error and test accuracy of each adaptation."""
    full, past = learned(machine, data)
    nonzero = int((full.machine.coefficients != 0).sum())
    sizes = {f"{s:g}": max(2, round(s * len(data))) for s in SHARES}
    if machine == "svm":
        sizes |= {"support vectors": nonzero}
    z, odd = torch.as_tensor(test.inputs), test.labels > 0
    whole = {name: f(full, past)[0] for name, f in adaptations(new, 1).items()}
    found: dict[str, Any] = {"coefficients that are not 0": nonzero}
    for share, size in sizes.items():
        small = full.memorise(size)
        row: dict[str, Any] = {"size": size}
        for name, change in adaptations(new, max(1, size // 10)).items():
            ours = change(small, past)[0]
            if name == "remove":  # the same examples
                gone = ~torch.isin(small.beliefs.ids, ours.beliefs.ids)  # type: ignore[union-attr]
                truth = full.forget(small.beliefs.ids[gone])  # type: ignore[union-attr]
            else:
                truth = whole[name]
            at = z[:, :128] if name == "transfer" else z
            f, g = ours.machine(at), truth.machine(at)
            row[name] = {
                "error": distance(f, g),
                "accuracy": float(((f[:, 0] > 0) == odd).double().mean()),
                "full accuracy": float(((g[:, 0] > 0) == odd).double().mean()),
                "certified": ours.certified,
            }
        found[share] = row
    return found


def steps(machine: str, data: Examples, new: Examples) -> dict[str, Any]:
    """[systems solved, gradients] of each adaptation, and of training on the same from nothing."""
    start, found = learned(machine, data), {}
    for name, change in adaptations(new, len(new) // 2).items():
        prior, past = change(*start)
        fresh = KernelPrior(past.kernel, prior.likelihood, prior.precision)
        costs = (prior.cost, fresh.update((past.x, past.y)).cost)
        found[name] = {
            which: [cost.iterations, cost.gradients]
            for which, cost in zip(("adapted", "from nothing"), costs, strict=True)
        }
    return found


def load(data: Path, seed: int, sizes: Sequence[int]) -> list[Examples]:
    """Past, new and test examples, odd (1) or even (0), drawn by the seed."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for split, counts in (("train", sizes[:2]), ("test", sizes[2:])):
        whole = readers.load(readers.find(data, "usps", split), split=split)
        order = torch.randperm(len(whole), generator=generator)[: sum(counts)]
        for rows in order.split(list(counts)):
            x = torch.as_tensor(whole.inputs)[rows].flatten(1).double()
            parts.append(Examples(x, whole.labels[rows] % 2, ids=rows))
    return parts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="few examples, one seed")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    small, large = ((20, 6, 20), (30, 6, 20)) if options.smoke else ((80, 20, 300), (300, 30, 1000))

    def log(line: str) -> None:
        stamped = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {line}"
        print(stamped, flush=True)
        with (options.out / "log.txt").open("a") as file:
            file.write(stamped + "\n")

    def dump(name: str, value: Any) -> None:
        (options.out / name).write_text(json.dumps(value, indent=2) + "\n")

    dump("versions.json", {n: v for n, v in versions().items() if n != "platform"})
    dump("config.json", {
        "kernel": repr(KERNEL), "other kernel": repr(OTHER), "pixels of the other": 128,
        "machines": {n: [repr(v[0]), v[1]] for n, v in MACHINES.items()}, "shares": SHARES,
        "past, new, test": {"exact": small, "memory and steps": large}, "seeds": options.seeds,
        "smoke": options.smoke,
    })  # fmt: skip
    result: dict[str, Any] = {"exact": {}, "memory": {}, "steps": {}}
    for seed in range(1 if options.smoke else options.seeds):
        for machine in MACHINES:
            key = f"{machine}, seed {seed}"
            past, new, test = (labelled(d, machine) for d in load(options.data, seed, small))
            if machine != "logistic":
                result["exact"][key] = exact(machine, past, new, torch.as_tensor(test.inputs))
                log(f"exact, {key}: {result['exact'][key]}")
            past, new, test = (labelled(d, machine) for d in load(options.data, seed, large))
            result["memory"][key] = memory(machine, past, new, test)
            log(f"memory, {key}: {result['memory'][key]}")
            result["steps"][key] = steps(machine, past, new)
            log(f"steps, {key}: {result['steps'][key]}")
            dump("result.json", result)


if __name__ == "__main__":
    main()

r"""Does the evidence of the training data pick the prior precision that is best on test data?

The toy of Khan et al. 2019 (DNN2GP), figure "toy, delta": an MLP of two layers of 20 tanh units,
Gaussian noise of sd 1 in the model, 100 training and 2000 test points, 10 data sets, delta on 21
points from 1e-2 to 1e2. For each delta the MAP weights, their Laplace evidence (dense Gauss-Newton)
and their test loss.

The data follow the paper's recipe (three clusters of x: left and right with probability 0.45 each
and noise 0.1, middle with 0.1 and noise 1). The paper's files do not say which function is learned,
so this one is ours, fixed before the first run: y = sin(2 x) + noise, on [-2, 2], because it is
smooth, of order 1 like the published losses, and neither linear nor symmetric about 0.

All networks (10 data sets x 21 precisions) are trained at once, their weights stacked.

    python -m benchmarks.dnn2gp_toy --out DIR
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
from torch.func import functional_call, stack_module_state, vmap

from lifelong import Gaussian, Posterior
from lifelong.dnn2gp import GaussianProcess
from lifelong.runs import log, versions

PUBLISHED = {"evidence_picks": 0.631, "test_picks": 0.631, "evidence": -110.15, "test_loss": 0.135}


@dataclass(frozen=True)
class Config:
    """What could change a number; ``width`` and ``steps`` are smaller in the smoke test."""

    data_sets: int = 10
    precisions: int = 21
    lowest: float = 1e-2
    highest: float = 1e2
    train: int = 100
    test: int = 2000
    width: int = 20
    noise_sd: float = 1.0
    steps: int = 10_000
    lr: float = 0.02
    refits: int = 5
    seed: int = 7

    @property
    def grid(self) -> Tensor:
        low, high = torch.tensor([self.lowest, self.highest]).log10()
        return torch.logspace(float(low), float(high), self.precisions, dtype=torch.float64)


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (n, 1) from three clusters, y (n, 1) = sin(2 x) + noise that depends on the cluster."""
    shares = torch.tensor([0.45, 0.1, 0.45])
    cluster = torch.multinomial(shares, n, replacement=True, generator=generator)
    left, width = torch.tensor([-2.0, -1.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])
    x = left[cluster] + width[cluster] * torch.rand(n, generator=generator)
    noise = torch.tensor([0.1, 1.0, 0.1])[cluster] * torch.randn(n, generator=generator)
    return x.unsqueeze(1), (torch.sin(2 * x) + noise).unsqueeze(1)


def make_model(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )


class Networks:
    """M networks with their weights stacked, name -> (M, *shape)."""

    def __init__(self, width: int, seeds: Sequence[int]) -> None:
        made = {}
        for seed in dict.fromkeys(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made[seed] = make_model(width)
        self.base = make_model(width)
        stacked, _ = stack_module_state([made[seed] for seed in seeds])
        self.params = {n: p.detach().requires_grad_() for n, p in stacked.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """(M, N, 1) -> (M, N, 1)."""

        def one(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
            return functional_call(self.base, params, (inputs,))

        return vmap(one)(self.params, x)

    def fit(self, x: Tensor, y: Tensor, precisions: Tensor, config: Config) -> Tensor:
        """MAP weights by Adam on the full batch; the norm of each network's last gradient, (M,)."""
        weights = list(self.params.values())
        optimizer = torch.optim.Adam(weights, lr=config.lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        precisions = precisions.to(x.dtype)
        for _ in range(config.steps):
            optimizer.zero_grad()
            nll = 0.5 * (y - self(x)).square().flatten(1).sum(1) / config.noise_sd**2
            squares = torch.stack([w.square().flatten(1).sum(1) for w in weights]).sum(0)
            (nll + 0.5 * precisions * squares).sum().backward()
            optimizer.step()
            decay.step()
        grads = torch.stack([w.grad.square().flatten(1).sum(1) for w in weights])  # type: ignore[union-attr]
        return grads.sum(0).sqrt()

    def model(self, index: int) -> nn.Module:
        """One of the networks, in float64."""
        module = make_model(self.base[0].out_features).double()  # type: ignore[index, union-attr, arg-type]
        module.load_state_dict({n: p[index].detach().double() for n, p in self.params.items()})
        return module


def mse(f: Tensor, y: Tensor) -> Tensor:
    """(M, N, 1), (M, N, 1) -> (M,)."""
    return (f - y).square().flatten(1).mean(1)


def laplace(model: nn.Module, x: Tensor, y: Tensor, precision: float, noise_sd: float) -> Posterior:
    return Posterior.laplace(
        model,
        (x.double(), y.double()),
        Gaussian(noise_sd),
        prior_precision=precision,
        structure="dense",
    )


def measure(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """The curves over the grid, what they pick, and the precision found without a grid."""
    generators = [torch.Generator().manual_seed(config.seed + i) for i in range(config.data_sets)]
    train, test = ([draw(n, g) for g in generators] for n in (config.train, config.test))
    x, y = (torch.stack(parts) for parts in zip(*train, strict=True))
    x_test, y_test = (torch.stack(parts) for parts in zip(*test, strict=True))
    grid, shape = config.grid, (config.data_sets, config.precisions)

    each = torch.arange(config.data_sets).repeat_interleave(config.precisions)
    networks = Networks(config.width, [config.seed + i for i in each.tolist()])
    gradient = networks.fit(x[each], y[each], grid.repeat(config.data_sets), config)
    say(f"{len(each)} networks trained, largest gradient norm {float(gradient.max()):.2g}")
    with torch.no_grad():
        test_loss = mse(networks(x_test[each]), y_test[each]).double().reshape(shape)
    evidence = torch.stack(
        [
            laplace(
                networks.model(k), x[i], y[i], float(grid[k % len(grid)]), config.noise_sd
            ).log_evidence()
            for k, i in enumerate(each.tolist())
        ]
    ).reshape(shape)
    say("evidence of each computed")
    result = picks(grid, evidence, test_loss)
    result["largest_gradient_norm"] = float(gradient.max())
    result["by_function_space"] = function_space_gap(networks, x, y, grid, evidence, config)
    result["without_a_grid"] = without_a_grid(x, y, x_test, y_test, config, say)
    return {"published": PUBLISHED, **result}


def picks(grid: Tensor, evidence: Tensor, test_loss: Tensor) -> dict[str, Any]:
    """What the curves (data sets, precisions) say, on average and for each data set."""

    def curve(values: Tensor) -> dict[str, Any]:
        error = values.std(0) / len(values) ** 0.5
        return {"mean": values.mean(0).tolist(), "standard_error": error.tolist()}

    chosen, best = int(evidence.mean(0).argmax()), int(test_loss.mean(0).argmin())
    own, oracle = evidence.argmax(1), test_loss.argmin(1)
    at = torch.arange(len(evidence))
    factor = float(grid[chosen] / grid[best])
    return {
        "precisions": grid.tolist(),
        "evidence": curve(evidence),
        "test_loss": curve(test_loss),
        "evidence_per_data_set": evidence.tolist(),
        "test_loss_per_data_set": test_loss.tolist(),
        "evidence_picks": float(grid[chosen]),
        "test_picks": float(grid[best]),
        "factor": factor,
        "within_a_factor_of_3": 1 / 3 <= factor <= 3,
        "evidence_at_its_pick": float(evidence.mean(0)[chosen]),
        "test_loss_at_the_evidence_pick": float(test_loss.mean(0)[chosen]),
        "test_loss_at_the_test_pick": float(test_loss.mean(0)[best]),
        "per_data_set": {
            "evidence_picks": grid[own].tolist(),
            "test_picks": grid[oracle].tolist(),
            "test_loss_at_the_evidence_pick": test_loss[at, own].tolist(),
            "test_loss_at_the_test_pick": test_loss[at, oracle].tolist(),
            "mean_regret": float((test_loss[at, own] - test_loss[at, oracle]).mean()),
        },
    }


def function_space_gap(
    networks: Networks, x: Tensor, y: Tensor, grid: Tensor, evidence: Tensor, config: Config
) -> dict[str, float]:
    """The first data set's evidence once more, by the Gaussian process: the largest difference, in
    nats. The two agree where the weights are a minimum, so it also tells how well they are."""
    by_functions = [
        GaussianProcess.fit(
            networks.model(k),
            (x[0].double(), y[0].double()),
            Gaussian(config.noise_sd),
            prior_precision=float(precision),
        ).log_evidence()
        for k, precision in enumerate(grid)
    ]
    gap = (torch.stack(by_functions) - evidence[0]).abs()
    return {"largest_difference": float(gap.max()), "median_difference": float(gap.median())}


def without_a_grid(
    x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, config: Config, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train, maximise the evidence, train on with that precision, and so on, from delta = 1."""
    networks = Networks(config.width, [config.seed + i for i in range(config.data_sets)])
    precisions = torch.ones(config.data_sets, dtype=torch.float64)
    history = []
    for _ in range(config.refits):
        networks.fit(x, y, precisions, config)
        posteriors = [
            laplace(networks.model(i), x[i], y[i], float(delta), config.noise_sd)
            for i, delta in enumerate(precisions)
        ]
        precisions = torch.tensor(
            [p.maximise_evidence().prior_precision for p in posteriors], dtype=torch.float64
        )
        history.append(precisions.tolist())
        say(f"refit: the precisions lie between {precisions.min():.3g} and {precisions.max():.3g}")
    with torch.no_grad():
        losses = mse(networks(x_test), y_test)
    return {
        "precisions": precisions.tolist(),
        "geometric_mean": float(precisions.log().mean().exp()),
        "history": history,
        "test_loss_per_data_set": losses.tolist(),
        "test_loss": float(losses.mean()),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write config.json, result.json, versions.json and log.txt; the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = Config()
    if options.smoke:
        config = Config(data_sets=2, precisions=3, test=50, width=4, steps=60, refits=2)
    options.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, value: Any) -> None:
        (options.out / name).write_text(json.dumps(value, indent=2) + "\n")

    def say(line: str) -> None:
        log(options.out, line)
        print(line, flush=True)

    write("config.json", asdict(config))
    write("versions.json", versions())
    say("started")
    result = measure(config, say)
    write("result.json", result)
    say(
        f"finished: evidence picks {result['evidence_picks']:.3g}, test loss picks "
        f"{result['test_picks']:.3g}, a factor of {result['factor']:.3g}"
    )
    return result


if __name__ == "__main__":
    main()

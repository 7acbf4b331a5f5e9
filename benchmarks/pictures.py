"""The pictures of docs/pictures.md, from scikit-learn's handwritten digits.

    python -m benchmarks.pictures                          # docs/images, and the record of today
    python -m benchmarks.pictures --out DIR --smoke        # a few seconds, for the tests

One network (64-32-10) is trained on 1,347 digits; leverage and sensitivity come from its diagonal
Laplace posterior. Retraining and evidence use softmax regression, where both are exact up to
Newton's tolerance. Only the regression in one dimension has made-up data: a sine with a gap.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import lifelong
from lifelong import Categorical, Examples, Gaussian, Posterior, plots, sensitivities
from lifelong.jacobians import kernel
from lifelong.metrics import calibration_bins
from lifelong.toys import digits

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
LIKELIHOOD = Categorical()


@dataclass(frozen=True)
class Config:
    """What the numbers depend on; ``prior_precision`` is that of all Laplace posteriors."""

    seed: int = 0
    epochs: int = 15
    prior_precision: float = 1.0
    per_class_in_kernel: int = 10
    num_retrained: int = 60  # examples that are left out, one at a time
    num_for_retraining: int = 400
    num_few: int = 120  # examples that the network of the reliability diagram learned from
    num_splits: int = 5
    num_for_evidence: int = 300
    grid_size: int = 13
    regression_steps: int = 3000


SMOKE = Config(epochs=2, per_class_in_kernel=3, num_retrained=3, num_for_retraining=40,
               num_splits=2, num_for_evidence=40, grid_size=3, regression_steps=30)  # fmt: skip


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def trained(data: Examples, config: Config, epochs: int) -> Iterator[nn.Sequential]:
    """The network after each epoch, the same object."""
    torch.manual_seed(config.seed)
    model, generator = network(), torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(data), generator=generator).split(32):
            optimizer.zero_grad()
            decay = sum(p.square().sum() for p in model.parameters())
            loss = F.cross_entropy(model(data.inputs[index]), data.labels[index])
            (loss + 0.5 * config.prior_precision / len(data) * decay).backward()
            optimizer.step()
        yield model


def laplace(model: nn.Module, data: Examples, config: Config) -> Posterior:
    return Posterior.laplace(model, data, LIKELIHOOD, prior_precision=config.prior_precision)


def sensitivity(model: nn.Module, data: Examples, config: Config) -> Tensor:  # (N,)
    """sum_c |change of p_c|: what leaving an example out changes about its own prediction."""
    posterior = laplace(model, data, config)
    found = sensitivities(model, data, LIKELIHOOD, posterior.curvature, config.prior_precision)
    return found.score("mean")


# ----------------------------------------------------------- softmax regression, solved by Newton


def solve(x: Tensor, y: Tensor, precision: float, start: Tensor, weight: Tensor) -> Tensor:
    """The minimum over W (D, C) of sum_i weight_i nll_i + precision / 2 ||W||²."""
    for _ in range(50):
        p = (x @ start).softmax(-1)
        slope = x.T @ (weight[:, None] * (p - F.one_hot(y, 10))) + precision * start
        step = torch.linalg.solve(hessian(x, p, weight, precision), slope.flatten())
        start = start - step.view_as(start)
        if step.norm() < 1e-10:
            break
    return start


def hessian(x: Tensor, p: Tensor, weight: Tensor, precision: float) -> Tensor:  # (D C, D C)
    spread = weight[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    G = torch.einsum("nd,nce,nf->dcfe", x, spread, x)
    size = x.shape[1] * p.shape[1]
    return G.reshape(size, size) + precision * torch.eye(size, dtype=x.dtype)


def rows(data: Examples) -> tuple[Tensor, Tensor]:
    flat = data.inputs.flatten(1).double()
    return torch.cat([flat, torch.ones(len(flat), 1, dtype=flat.dtype)], 1), data.labels


def left_out(data: Examples, config: Config) -> tuple[Tensor, Tensor]:
    """(true, estimated) change of the probability of its label as an example is left out."""
    x, y = rows(data[torch.arange(config.num_for_retraining)])
    one = torch.ones(len(x), dtype=x.dtype)
    fit = solve(x, y, config.prior_precision, torch.zeros(x.shape[1], 10, dtype=x.dtype), one)
    p = (x @ fit).softmax(-1)
    covariance = torch.linalg.inv(hessian(x, p, one, config.prior_precision))
    blocks = covariance.view(x.shape[1], 10, x.shape[1], 10)
    true, estimated = [], []
    for i in range(config.num_retrained):
        weight = one.clone()
        weight[i] = 0
        refit = solve(x, y, config.prior_precision, fit, weight)
        true.append((x[i] @ refit).softmax(-1)[y[i]] - p[i, y[i]])
        V = torch.einsum("d,dcfe,f->ce", x[i], blocks, x[i])
        moved = V @ (p[i] - F.one_hot(y[i], 10))
        estimated.append(((torch.diag(p[i]) - p[i][:, None] * p[i]) @ moved)[y[i]])
    return torch.stack(true), torch.stack(estimated)


def evidence(config: Config) -> dict[str, Tensor]:
    """Laplace's log evidence and the test loss over prior precisions, a row for each split."""
    grid = torch.logspace(-2, 2, config.grid_size, dtype=torch.float64)
    found: dict[str, list[list[float]]] = {"log_evidence": [], "test": [], "train": []}
    for split in range(config.num_splits):
        train, test = digits(seed=split)
        few = torch.randperm(len(train), generator=torch.Generator().manual_seed(split))
        (x, y), (x_test, y_test) = rows(train[few[: config.num_for_evidence]]), rows(test)
        one, fit = torch.ones(len(x), dtype=x.dtype), torch.zeros(x.shape[1], 10, dtype=x.dtype)
        values: dict[str, list[float]] = {name: [] for name in found}
        for delta in grid.flip(0).tolist():
            fit = solve(x, y, delta, fit, one)
            nll = F.cross_entropy(x @ fit, y, reduction="sum")
            H = hessian(x, (x @ fit).softmax(-1), one, delta)
            fitted = -nll - 0.5 * delta * fit.square().sum()
            occam = 0.5 * fit.numel() * torch.tensor(delta).log() - 0.5 * torch.logdet(H)
            values["log_evidence"].append(float(fitted + occam))
            values["test"].append(float(F.cross_entropy(x_test @ fit, y_test)))
            values["train"].append(float(nll / len(x)))
        for name in found:
            found[name].append(values[name][::-1])
    return {"grid": grid, **{name: torch.tensor(rows) for name, rows in found.items()}}


# ------------------------------------------------------------------------------ regression in 1-D


def regression(config: Config) -> dict[str, Tensor]:
    """A network on a sine with a gap, its dense Laplace posterior, and its predictions."""
    torch.manual_seed(config.seed)
    noise, delta = 0.3, 1.0
    x = torch.cat([torch.linspace(-4, -1.2, 40), torch.linspace(1.2, 4, 40)]).double()
    y = torch.sin(1.5 * x) + noise * torch.randn(len(x), dtype=x.dtype)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(config.regression_steps):
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        fit = (model(x[:, None])[:, 0] - y).square().sum() / noise**2
        (0.5 * (fit + delta * decay)).backward()
        optimizer.step()
    posterior = Posterior.laplace(model, Examples(x[:, None], y[:, None]), Gaussian(noise),
                                  prior_precision=delta, structure="dense")  # fmt: skip
    grid = torch.linspace(-5.5, 5.5, 221, dtype=x.dtype)
    told = posterior.predictive(model, grid[:, None], Gaussian(noise))
    mean, sd = told.mean[:, 0], told.epistemic[:, 0, 0].sqrt()
    return {"x": grid, "mean": mean, "sd": sd, "noise": torch.tensor(noise), "data_x": x,
            "data_y": y, "truth": torch.sin(1.5 * grid)}  # fmt: skip


# ------------------------------------------------------------------------------------ the pictures


def draw(config: Config, say: Callable[[str], None]) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Each picture by its file's name, and the numbers that the page states."""
    train, test = digits(seed=config.seed)
    figures, numbers = {}, {}
    trace = []
    for model in trained(train, config, config.epochs):
        trace.append(sensitivity(model, train, config))
    trace = torch.stack(trace)
    accuracy = lifelong.evaluate(model, test, LIKELIHOOD).accuracy
    numbers["network"] = {"test_accuracy": accuracy}
    say(f"network: test accuracy {accuracy:.3f}")

    spread = laplace(model, train, config).variance()
    scores = lifelong.identify(model, train, LIKELIHOOD, score="leverage", variance=spread)
    figures["memorable-examples"] = plots.memorable_examples(
        train.inputs, scores, labels=train.labels, score_name="leverage"
    )
    figures["memorable-per-class"] = plots.memorable_examples(
        train.inputs, scores, labels=train.labels, per_class=True, score_name="leverage"
    )
    numbers["leverage"] = {"least": float(scores.min()), "most": float(scores.max())}

    figures["sensitivity-histogram"] = plots.sensitivity_histogram(trace[-1])
    ordered = trace[-1].sort(descending=True).values
    top = max(round(len(ordered) / 100), 1)
    numbers["sensitivity"] = {
        "median": float(trace[-1].quantile(0.5)),
        "share_of_the_top_hundredth": float(ordered[:top].sum() / ordered.sum()),
    }
    figures["sensitivity-evolution"] = plots.sensitivity_evolution(trace, log=True)
    figures["sensitivity-by-class"] = plots.sensitivity_evolution(trace, labels=train.labels)
    means = torch.stack([trace[-1][train.labels == c].mean() for c in range(10)])
    numbers["sensitivity"]["most_sensitive_class"] = int(means.argmax())
    numbers["sensitivity"]["least_sensitive_class"] = int(means.argmin())
    figures["sensitivity-ranked"] = plots.ranked_sensitivity(trace)

    true, estimated = left_out(train, config)
    r = plots.pearson(true, estimated)
    figures["sensitivity-scatter"] = plots.sensitivity_scatter(
        true, estimated, quantity="change of p(label)"
    )
    numbers["left_out"] = {"pearson_r": r, "num_retrained": len(true)}
    say(f"left out: r {r:.4f} over {len(true)} retrainings")

    chosen = torch.cat([(train.labels == c).nonzero()[: config.per_class_in_kernel, 0]
                        for c in range(10)])  # fmt: skip
    some = train[chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]]
    prior = {n: torch.full_like(v, 1 / config.prior_precision) for n, v in spread.items()}
    K = kernel(model, some.inputs, prior).sum(0)
    same = some.labels[:, None] == some.labels
    inside, across = K[same].mean(), K[~same].mean()
    figures["kernel-matrix"] = plots.kernel_matrix(K, some.labels)
    numbers["kernel"] = {"mean_in_class": float(inside), "mean_across": float(across)}

    toy = regression(config)
    figures["predictive-bands"] = plots.predictive_bands(
        toy["x"], toy["mean"], toy["sd"], toy["noise"], data=(toy["data_x"], toy["data_y"]),
        truth=toy["truth"], title="A network on a sine with a gap",
    )  # fmt: skip
    gap, seen = toy["x"].abs() < 0.6, (toy["x"].abs() - 2.6).abs() < 0.6
    numbers["regression"] = {
        "sd_in_the_gap": float(toy["sd"][gap].mean()),
        "sd_among_the_data": float(toy["sd"][seen].mean()),
    }

    found = evidence(config)
    grid, root = found["grid"], config.num_splits**0.5
    mean = {name: found[name].mean(0) for name in ("log_evidence", "test", "train")}
    error = {name: found[name].std(0) / root for name in ("log_evidence", "test")}
    figures["evidence-against-test"] = plots.evidence_against_test(
        grid, mean["log_evidence"], mean["test"], evidence_se=error["log_evidence"],
        test_se=error["test"], train_loss=mean["train"], loss_name="loss (nats per example)",
        grid_name="prior precision δ",
    )  # fmt: skip
    at, best = mean["log_evidence"].argmax(), mean["test"].argmin()
    numbers["evidence"] = {
        "grid": grid.tolist(), "argmax_evidence": float(grid[at]), "argmin_test": float(grid[best]),
        "test_loss_there": float(mean["test"][at]), "least_test_loss": float(mean["test"][best]),
        "se_there": float(error["test"][at]), **{n: v.tolist() for n, v in mean.items()},
    }  # fmt: skip
    say(f"evidence: largest at {grid[at]:.3g}, test loss smallest at {grid[best]:.3g}")

    few = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
                [: config.num_few]]  # fmt: skip
    *_, model = trained(few, config, 10 * config.epochs)
    with torch.no_grad():
        p = model(test.inputs).softmax(-1)
    figures["reliability-diagram"] = plots.reliability_diagram(p, test.labels)
    bins = calibration_bins(p, test.labels)
    numbers["reliability"] = {
        "ece": bins.error(), "accuracy": float(bins.right.sum() / bins.count.sum()),
        "confidence": float(bins.confidence.sum() / bins.count.sum()),
    }  # fmt: skip
    say(f"reliability: {numbers['reliability']}")
    return figures, numbers


def write(figure: Figure, path: Path, *, photos: bool = False) -> None:
    """As PNG of 128 colours: a fraction of the bytes, and nothing that the eye would miss.
    ``photos``: of 256, mixed, at fewer pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110 if photos else 150)
    picture = Image.open(buffer).convert("RGB")
    if photos:
        picture = picture.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    else:
        picture = picture.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="a folder for pictures and record")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args(arguments)
    config = SMOKE if options.smoke else Config()
    now, start = datetime.now(UTC), time.perf_counter()
    record = options.out or ROOT / "benchmarks" / "results" / f"{now:%Y-%m-%d}_pictures"
    images = options.out or IMAGES
    record.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    lines = [f"{now:%Y-%m-%d %H:%M:%S}Z benchmarks.pictures"]

    def say(line: str) -> None:
        print(line)
        lines.append("  " + line)

    figures, numbers = draw(config, say)
    for name, figure in figures.items():
        write(figure, images / f"{name}.png")
    say(f"{len(figures)} pictures in {time.perf_counter() - start:.0f} s")
    versions = {name: version(name) for name in ("lifelong", "torch", "numpy", "matplotlib")}
    versions["python"] = platform.python_version()
    versions["revision"] = revision()
    for name, value in (("config", asdict(config)), ("result", numbers), ("versions", versions)):
        (record / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    (record / "log.txt").write_text("\n".join(lines) + "\n")
    return record


def revision() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()

"""Curvature beside other packages, in one run: the cost of each as a ratio to plain PyTorch.

    python -m benchmarks.curvature --out benchmarks/results/DATE_curvature

Three matrices of the same data: the exact diagonal of the Gauss-Newton matrix, its Monte-Carlo
diagonal and Monte-Carlo K-FAC (one sample each). A round times a plain forward-backward pass over
the data and then every side, in turning order; the ratio is the median over rounds of side /
plain, in CPU time of one thread. The plain pass and the other packages read batches of the size
that makes the plain pass fastest; ours reads its default. BackPACK, curvlinops and laplace-torch
are used where they can be imported, else their rows are empty.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lifelong import Categorical, Examples, diagonal_curvature
from lifelong.curvature import kronecker_curvature

from .cases import CASES
from .records import _dump, _versions

Work = Callable[[], object]
Batches = list[tuple[Tensor, Tensor]]
PACKAGES = {
    "laplace-torch": "laplace",
    "curvlinops-for-pytorch": "curvlinops",
    "backpack-for-pytorch": "backpack",
}
QUANTITIES = ("exact diagonal", "mc diagonal", "mc K-FAC")
LIMITS = {"exact diagonal": 13.0, "mc diagonal": 1.5, "mc K-FAC": 2.0}
BATCHES = (64, 128, 256, 512)


# --- sides --------------------------------------------------------------------------------------


def plain(model: nn.Module, batches: Batches) -> Work:
    params = list(model.parameters())

    def run() -> None:
        for x, y in batches:
            torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), params)

    return run


def ours(model: nn.Module, data: Examples) -> dict[str, Work]:
    likelihood = Categorical()
    return {
        "exact diagonal": lambda: diagonal_curvature(model, data, likelihood),
        "mc diagonal": lambda: diagonal_curvature(model, data, likelihood, estimator="mc"),
        "mc K-FAC": lambda: kronecker_curvature(model, data, likelihood, estimator="mc"),
    }


def of_backpack(model: nn.Module, batches: Batches) -> dict[str, Work]:
    backpack = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    extended = backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

    def side(extension: Any, attribute: str) -> Work:
        def run() -> dict[str, Any]:
            total: dict[str, Any] = {}
            for x, y in batches:
                for p in extended.parameters():
                    p.grad = None
                with backpack.backpack(extension):
                    loss(extended(x), y).backward()
                for name, p in extended.named_parameters():
                    new = getattr(p, attribute)
                    if isinstance(new, list):
                        old = total.get(name)
                        new = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
                        total[name] = new
                    else:
                        total[name] = new if name not in total else total[name] + new
            return total

        return run

    return {
        "exact diagonal": side(extensions.DiagGGNExact(), "diag_ggn_exact"),
        "mc diagonal": side(extensions.DiagGGNMC(mc_samples=1), "diag_ggn_mc"),
        "mc K-FAC": side(extensions.KFAC(mc_samples=1), "kfac"),
    }


def of_curvlinops(model: nn.Module, batches: Batches) -> dict[str, Work]:
    """K-FAC alone: the package has no diagonal of the Gauss-Newton matrix."""
    curvlinops = importlib.import_module("curvlinops")

    def run() -> None:
        curvlinops.KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            list(model.parameters()),
            batches,
            check_deterministic=False,
            num_per_example_loss_terms=1,
            num_data=sum(len(y) for _, y in batches),
            separate_weight_and_bias=False,
        ).compute_kronecker_factors()

    return {"mc K-FAC": run}


def of_laplace(model: nn.Module, batches: Batches) -> dict[str, Work]:
    laplace = importlib.import_module("laplace")
    backends = importlib.import_module("laplace.curvature")
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=len(batches[0][1]))

    def side(structure: Any, backend: Any, stochastic: bool) -> Work:
        def run() -> None:
            found = structure(
                model, "classification", backend=backend, backend_kwargs={"stochastic": stochastic}
            )
            found.fit(loader)

        return run

    return {
        "exact diagonal": side(laplace.DiagLaplace, backends.BackPackGGN, False),
        "mc diagonal": side(laplace.DiagLaplace, backends.BackPackGGN, True),
        "mc K-FAC": side(laplace.KronLaplace, backends.CurvlinopsGGN, True),
    }


PEERS: dict[str, Callable[[nn.Module, Batches], dict[str, Work]]] = {
    "backpack-for-pytorch": of_backpack,
    "curvlinops-for-pytorch": of_curvlinops,
    "laplace-torch": of_laplace,
}


def load_peers() -> dict[str, str]:
    """package -> version, or why it is missing."""
    try:
        # torchvision beside a CPU build of torch: two operators that it expects are declared.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        load_peers.library = library  # type: ignore[attr-defined]
    except RuntimeError:
        pass  # declared already
    found = {}
    for package, module in PACKAGES.items():
        try:
            importlib.import_module(module)
            found[package] = version(package)
        except (ImportError, PackageNotFoundError, RuntimeError) as error:
            found[package] = f"missing: {type(error).__name__}: {error}"
    return found


# --- measuring ----------------------------------------------------------------------------------


def split(data: Examples, size: int) -> Batches:
    x: Any = data.inputs
    return list(zip(x.split(size), data.labels.split(size), strict=True))


def seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def fastest_batch(model: nn.Module, data: Examples) -> int:
    """The batch size of the plain pass with the least time of two."""
    few = data[torch.arange(min(len(data), 512))]
    cost = {b: min(seconds(plain(model, split(few, b))) for _ in range(2)) for b in BATCHES}
    return min(cost, key=lambda b: cost[b])


def measure(case: str, n: int, rounds: int, quantities: list[str], peers: list[str]) -> list[dict]:
    """A row for each quantity and side: the ratio to the plain pass, its quartiles, or why not."""
    made, data = CASES[case], CASES[case].examples(n)
    model = made.build().eval()
    size = fastest_batch(model, data)
    batches = split(data, size)
    reference = plain(model, batches)
    rows: list[dict] = []
    for quantity in quantities:
        sides: dict[str, Work] = {"lifelong": ours(model, data)[quantity]}
        errors: dict[str, str] = {}
        for package in peers:
            work = PEERS[package](made.build().eval(), batches).get(quantity)
            if work is None:
                errors[package] = "has no such quantity"
                continue
            try:
                work()  # first uses, and whether it runs at all
                sides[package] = work
            except Exception as error:  # whatever another package may raise: its row says so
                errors[package] = f"{type(error).__name__}: {error}"
        sides["lifelong"]()
        ratios: dict[str, list[float]] = {name: [] for name in sides}
        plain_s = []
        for i in range(rounds):
            order = list(sides)[i % len(sides) :] + list(sides)[: i % len(sides)]
            before = seconds(reference)
            times = {name: seconds(sides[name]) for name in order}
            both = (before + seconds(reference)) / 2
            plain_s.append(both)
            for name, value in times.items():
                ratios[name].append(value / both)
        common = {"case": case, "examples": n, "quantity": quantity, "batch": size}
        for name, values in ratios.items():
            rows.append(
                {**common, "side": name, "ratio": median(values), "low": min(values),
                 "high": max(values), "rounds": rounds, "plain_s": median(plain_s)}
            )  # fmt: skip
        rows += [{**common, "side": name, "error": error} for name, error in errors.items()]
    return rows


def peaks(sizes: tuple[int, int]) -> list[dict]:
    """MiB that each quantity adds at its peak, at two numbers of examples, a process each."""
    rows = []
    for work in ("curvature-lazy", "curvature-mc", "kfac-mc"):
        each = {}
        for n in sizes:
            command = [sys.executable, "-m", "benchmarks.memory_peak", work, str(n)]
            root = Path(__file__).parent.parent
            done = subprocess.run(command, capture_output=True, check=True, cwd=root)
            each[n] = int(done.stdout) / 2**20
        rows.append({"work": work, "MiB": {str(n): value for n, value in each.items()}})
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| case | quantity | side | × a plain pass | rounds from, to |",
        "|---|---|---|---:|---|",
    ]
    for row in rows:
        label = f"| {row['case']}, {row['examples']} | {row['quantity']} | {row['side']} |"
        if "error" in row:
            lines.append(f"{label} | {row['error'].splitlines()[0][:80]} |")
        else:
            lines.append(f"{label} {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", choices=list(CASES), default="MLP 784-256-256-10")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantity", choices=QUANTITIES, action="append")
    parser.add_argument("--alone", action="store_true", help="without the other packages")
    parser.add_argument("--peaks", type=int, nargs=2, default=None, help="peak memory at two sizes")
    parser.add_argument("--revision", default="", help="the git revision that is measured")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the other packages' deprecations
    versions = {} if options.alone else load_peers()
    present = [name for name, found in versions.items() if not found.startswith("missing")]
    rows: list[dict] = []
    found_peaks: list[dict] = []
    if options.peaks:
        found_peaks = peaks(tuple(options.peaks))
    else:
        quantities = options.quantity or list(QUANTITIES)
        rows = measure(options.case, options.examples, options.rounds, quantities, present)
        rows += [
            {"case": options.case, "examples": options.examples, "quantity": quantity,
             "side": name, "error": found}
            for quantity in quantities for name, found in versions.items() if name not in present
        ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "result.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "peaks": []}
    key = ("case", "examples", "quantity", "side")
    taken = {tuple(row[k] for k in key) for row in rows}
    kept = [row for row in old["rows"] if tuple(row[k] for k in key) not in taken]
    result = {"rows": kept + rows, "peaks": found_peaks or old["peaks"]}
    _dump(path, result)
    settings = {
        "clock": "CPU time of one thread; median over rounds of side / plain pass",
        "limits": LIMITS,
        "revision": options.revision,
        "inputs": "random, in the shape of the real ones; seed 0",
    }
    _dump(options.out / "config.json", settings)
    used = options.out / "versions.json"
    before = json.loads(used.read_text()) if used.exists() else {}
    _dump(used, {**before, **_versions(), **versions})
    report = table(rows) if rows else "\n".join(str(row) for row in found_peaks)
    with (options.out / "log.txt").open("a") as log:
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime())} ")
        log.write(" ".join(sys.argv[1:] if arguments is None else arguments).replace(
            str(options.out), "OUT") + f"\n{report}\n")  # fmt: skip
    print(report)


if __name__ == "__main__":
    main()

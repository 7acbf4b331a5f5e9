"""The tables of docs/kprior-experiments.md, from the record of the K-priors experiments.

    python -m benchmarks.adaptation_page [--record benchmarks/results/DATE_adaptation]

Each stands between two marks, <!-- NAME: start --> and <!-- NAME: end -->.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "kprior-experiments.md"
SETS = {
    "usps-linear": "USPS linear",
    "adult": "Adult",
    "usps-mlp": "USPS MLP",
    "mnist-cnn": "MNIST, CNN",
    "cifar-cnn": "CIFAR-10 (JPEG 75), CNN",
}
LINES = {
    "batch": "batch",
    "K-prior": "K-prior",
    "replay": "replay",
    "K-prior, N/M": "K-prior, N/M",
    "K-prior, random, N/M": "random, N/M",
    "K-prior, sampled by h', weighted": "sampled by h′",
    "K-prior, G of the rest": "G of the rest",
    "replay, random, N/M": "replay, random, N/M",
}
HARD = {
    "remove": (
        "K-prior, N/M",
        "K-prior, removed kept in memory",
        "K-prior, N/M, removed kept in memory",
    ),
    "model": (
        "K-prior, N/M",
        "K-prior, N/M, first layer shared",
        "K-prior, random, N/M, first layer shared",
        "replay, random, N/M, first layer shared",
    ),
}
WALKED = {
    "add": ("K-prior, N/M", "K-prior, random, N/M", "K-prior, sampled by h', weighted", "warm"),
    "remove": (
        "K-prior, N/M, removed kept in memory",
        "K-prior, N/M",
        "K-prior, random, N/M",
        "K-prior, sampled by h', weighted",
        "warm",
    ),
    "regulariser": (
        "K-prior, N/M",
        "K-prior, random, N/M",
        "K-prior, sampled by h', weighted",
        "warm",
    ),
    "model": (
        "K-prior, N/M, first layer shared",
        "K-prior, random, N/M, first layer shared",
        "K-prior, N/M",
    ),
}
MOST = 3  # seeds of a cell that is whole


def cell(value: Mapping[str, Any] | None) -> str:
    """Percent, with a standard error from 0.05 up and the number of seeds where it is not all."""
    if not value:
        return "–"
    error = value.get("standard_error")
    spread = "" if error is None or 100 * error < 0.05 else f" ± {100 * error:.1f}"
    seeds = "" if value["n"] >= MOST else f" ({value['n']})"
    return f"{100 * value['mean']:.1f}{spread}{seeds}"


def accuracies(result: Mapping[str, Any], memory: str) -> str:
    """A row for each set and change, a column for each line, with that part of the past kept."""
    rows = [f"| accuracy, % | {' | '.join(LINES.values())} |", "|---" * (len(LINES) + 1) + "|"]
    for name, title in SETS.items():
        for change, found in result.get(name, {}).items():
            of = found["accuracy"]
            cells = [
                cell(of.get(line, {}).get("all" if line == "batch" else memory)) for line in LINES
            ]
            rows.append(f"| {title}, {change} | {' | '.join(cells)} |")
    return "\n".join(rows)


def hard(result: Mapping[str, Any]) -> str:
    """The lines for the MLP's two hard changes, over the sizes of the memory."""
    sizes = ("0.02", "0.05", "0.07", "0.1")
    rows = ["| USPS MLP | line | 2 % | 5 % | 7 % | 10 % |", "|---|---|---|---|---|---|"]
    for change, lines in HARD.items():
        of = result["usps-mlp"][change]["accuracy"]
        for line in lines:
            cells = (cell(of.get(line, {}).get(size)) for size in sizes)
            rows.append(f"| {change} | {line} | {' | '.join(cells)} |")
    return "\n".join(rows)


def gradients(result: Mapping[str, Any]) -> str:
    """What the MLP's lines cost by Adam, part of batch's, summed over seeds that got there."""
    rows = [
        "| USPS MLP | line | accuracy at the end, batch − line | to 0.1 point "
        "| to 1 point for good | all |",
        "|---|---|---|---|---|---|",
    ]
    for change, lines in WALKED.items():
        of = result["usps-mlp"][change]["gradients"]["adam"]
        for line in lines:
            gap = 100 * (_mean(of["batch"]["accuracy"]) - _mean(of[line]["accuracy"]))
            cells = [part(of[line][k], of["batch"][k]) for k in ("to_batch", "near", "gradients")]
            rows.append(f"| {change} | {line} | {gap:.2f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def convex(result: Mapping[str, Any]) -> str:
    """The same of the linear models, by Newton and by L-BFGS, beside warm retraining."""
    solvers = {"newton": "Newton", "lbfgs": "L-BFGS"}
    heads = [f"{s}: to 0.1 point, all | warm: to 0.1, all" for s in solvers.values()]
    rows = [f"| gradients / batch's | line | {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for name in ("usps-linear", "adult"):
        for change, found in result[name].items():
            line = "K-prior, random, N/M" if change == "model" else "K-prior, G of the rest"
            cells = [
                ", ".join(part(of[who][k], of["batch"][k]) for k in ("to_batch", "gradients"))
                for of in (found["gradients"][solver] for solver in solvers)
                for who in (line, "warm")
            ]
            rows.append(f"| {SETS[name]}, {change} | {LINES[line]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def part(spent: Sequence[int | None], batch: Sequence[int | None]) -> str:
    """The sum as a part of batch's, over the seeds in which both got there."""
    both = [(a, b) for a, b in zip(spent, batch, strict=False) if a is not None and b is not None]
    if not both:
        return "never"
    ratio = sum(a for a, _ in both) / sum(b for _, b in both)
    seeds = "" if len(both) == len(spent) else f" (in {len(both)} of {len(spent)})"
    return f"{ratio:.3f}{seeds}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def fill(text: str, name: str, body: str) -> str:
    """The page with ``body`` between the two marks of that name. Raises ValueError without them."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    if start not in text or end not in text:
        raise ValueError(f"the page has no marks {start} and {end}")
    head, rest = text.split(start)
    return f"{head}{start}\n{body}\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    records = sorted((HERE / "results").glob("????-??-??_adaptation"))
    parser.add_argument("--record", type=Path, default=records[-1] if records else None)
    options = parser.parse_args(arguments)
    result = json.loads((options.record / "result.json").read_text())
    text = PAGE.read_text()
    for name, body in (
        ("accuracy-5", accuracies(result, "0.05")),
        ("accuracy-2", accuracies(result, "0.02")),
        ("hard", hard(result)),
        ("gradients", gradients(result)),
        ("convex", convex(result)),
    ):
        text = fill(text, name, body)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()

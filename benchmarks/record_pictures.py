"""Pictures of the newest records: docs/images/sensitivity-retrained.png, dnn2gp-toy.png, and
kprior-SET.png for each set of the K-priors experiments, as svg in their record too.

python -m benchmarks.record_pictures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lifelong.plots import evidence_against_test, memory_curves, sensitivity_scatter

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"


def newest(name: str) -> Any:
    record = max((HERE / "results").glob(f"*_{name}"))
    return json.loads((record / "result.json").read_text())


def retrained() -> Figure:
    """Estimated against retrained changes, a panel for each case."""
    figure = Figure(figsize=(8, 8.6), layout="constrained")
    found = newest("sensitivity")["correlation"]
    for ax, (name, case) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        estimated = case["estimates"]["dense, exact"]["estimated_mean"]
        sensitivity_scatter(case["true_mean"], estimated, quantity="Σ|Δp|", ax=ax)
        ax.set_ylabel(f"{name}: estimated Σ|Δp|")
    return figure


def toy() -> Figure:
    """Evidence and test loss over the prior precision, means over the data sets."""
    found = newest("dnn2gp-toy")
    return evidence_against_test(
        found["precisions"],
        found["evidence"]["mean"],
        found["test_loss"]["mean"],
        evidence_se=found["evidence"]["standard_error"],
        test_se=found["test_loss"]["standard_error"],
        loss_name="mean squared test error",
    )


PANELS = {
    "add": "Add data",
    "remove": "Remove data",
    "regulariser": "Change the regulariser",
    "model": "Change the model",
}
LINES = ("K-prior", "replay", "K-prior, random, N/M", "replay, random, N/M")


def adaptations(name: str, record: Path) -> Figure:
    """The four changes of one set: accuracy against the part of the past that is kept."""
    rows = [json.loads(line) for line in (record / "cells.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["set"] == name and row["solver"] != "lbfgs"]
    figure = Figure(figsize=(8, 6), layout="constrained")
    for ax, (change, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        of: dict[str, dict[float, dict[int, float]]] = {}
        for row in rows:
            if row["change"] == change:
                at = of.setdefault(row["method"], {}).setdefault(row["fraction"], {})
                at[row["seed"]] = row["accuracy"]
        lines = {}
        for line in LINES:
            at = of.get(line, {})
            seeds = set.intersection(*map(set, at.values())) if at else ()  # at every fraction
            if seeds:
                lines[line] = (list(at), [[found[s] for found in at.values()] for s in seeds])
        memory_curves(
            lines,
            reference=list(of["batch"][None].values()),
            title=title,
            legend=change == "model",
            ax=ax,
        )
    return figure


def main() -> None:
    record = max((HERE / "results").glob("*_adaptation"))
    for name, changes in json.loads((record / "result.json").read_text()).items():
        if not PANELS.keys() <= changes.keys():
            continue  # not finished yet
        figure = adaptations(name, record)
        figure.savefig(IMAGES / f"kprior-{name}.png", dpi=110)
        figure.savefig(record / f"{name}.svg")
    retrained().savefig(IMAGES / "sensitivity-retrained.png", dpi=110)
    toy().savefig(IMAGES / "dnn2gp-toy.png", dpi=110)


if __name__ == "__main__":
    main()

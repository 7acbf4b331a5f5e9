"""Pictures of the newest records: docs/images/sensitivity-retrained.png, dnn2gp-toy.png.

python -m benchmarks.record_pictures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lifelong.plots import evidence_against_test, sensitivity_scatter

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


def main() -> None:
    retrained().savefig(IMAGES / "sensitivity-retrained.png", dpi=110)
    toy().savefig(IMAGES / "dnn2gp-toy.png", dpi=110)


if __name__ == "__main__":
    main()

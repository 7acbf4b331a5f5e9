"""docs/images/sensitivity-retrained.png from the newest record: estimated against retrained.

python -m benchmarks.sensitivity_picture
"""

from __future__ import annotations

import json
from pathlib import Path

from lifelong.plots import sensitivity_scatter

HERE = Path(__file__).parent


def main() -> None:
    import matplotlib.pyplot as plt

    record = max((HERE / "results").glob("*_sensitivity"))
    found = json.loads((record / "result.json").read_text())["correlation"]
    figure, axes = plt.subplots(2, 2, figsize=(8, 8.6), layout="constrained")
    for ax, (name, case) in zip(axes.flat, found.items(), strict=True):
        sensitivity_scatter(
            case["true_mean"],
            case["estimates"]["dense, exact"]["estimated_mean"],
            quantity="Σ|Δp|",
            ax=ax,
        )
        ax.set_ylabel(f"{name}: estimated Σ|Δp|")
    figure.savefig(HERE.parent / "docs" / "images" / "sensitivity-retrained.png", dpi=110)


if __name__ == "__main__":
    main()

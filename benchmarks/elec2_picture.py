"""docs/images/elec2.png: prequential accuracy over time, from a record of the table elec2.

python -m benchmarks.elec2_picture [--record DIR] [--out FILE]     by default the newest record
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lifelong.plots.style import COLOURS, DASHES, add_legend, dress

HERE = Path(__file__).parent
LINES = {
    "Laplace filter": "Laplace filter",
    "river logistic regression, chosen": "logistic regression, chosen step",
    "river adaptive random forest": "adaptive random forest",
    "river Hoeffding adaptive tree": "Hoeffding adaptive tree",
    "river logistic regression": "logistic regression",
}
PANELS = {"": "Eight inputs", ", past labels": "Past labels beside them"}


def draw(record: Path) -> Figure:
    """Two panels; a line is a mean over seeds, and each of its points that of three weeks."""
    figure = Figure(figsize=(8, 3.2), layout="constrained", facecolor="white")
    window = json.loads((record / "config.json").read_text())["setup"]["window"]
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (told, title) in zip(axes, PANELS.items(), strict=True):
        handles, names = [], []
        for i, (method, name) in enumerate(LINES.items()):
            found = results(record, method + told)
            if not found:
                continue
            mean = 100 * np.mean([result["curve"] for result in found], axis=0)
            whole = 100 * np.mean([result["accuracy"] for result in found])
            days = (np.arange(len(mean)) + 0.5) * window / 48
            handles += ax.plot(days, mean, color=COLOURS[i], linestyle=DASHES[i], linewidth=1.3)
            names.append(f"{name}, {whole:.1f}")
        y_name = "" if told else "accuracy of three weeks (%)"
        dress(ax, title, "days", y_name, "each row predicted, then learned")
        add_legend(ax, handles, names)
    return figure


def results(record: Path, method: str) -> list[dict[str, Any]]:
    """Of each seed."""
    cells = [json.loads(p.read_text()) for p in sorted((record / "cells").glob("*.json"))]
    return [c["result"] for c in cells if c["method"] == method and c["result"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--record", type=Path)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images" / "elec2.png")
    args = parser.parse_args()
    record = args.record or max((HERE / "results").glob("*_elec2"))
    draw(record).savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()

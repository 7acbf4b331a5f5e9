"""docs/images/elec2.png: prequential accuracy over time, from a record of the table elec2.

python -m benchmarks.elec2_picture [--record DIR] [--out FILE]     by default the newest record
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lifelong.plots.style import COLOURS, DASHES, add_legend, dress

HERE = Path(__file__).parent
LINES = {
    "Laplace filter": "Laplace filter",
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
            curves = curves_of(record, method + told)
            if not curves:
                continue
            mean = 100 * np.mean(curves, axis=0)
            days = (np.arange(len(mean)) + 0.5) * window / 48
            handles += ax.plot(days, mean, color=COLOURS[i], linestyle=DASHES[i], linewidth=1.3)
            names.append(f"{name}, {mean.mean():.1f}")
        y_name = "" if told else "accuracy of three weeks (%)"
        dress(ax, title, "days", y_name, "each row predicted, then learned")
        add_legend(ax, handles, names)
    return figure


def curves_of(record: Path, method: str) -> list[list[float]]:
    """Of each seed."""
    cells = [json.loads(p.read_text()) for p in sorted((record / "cells").glob("*.json"))]
    return [c["result"]["curve"] for c in cells if c["method"] == method and c["result"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--record", type=Path)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images" / "elec2.png")
    args = parser.parse_args()
    record = args.record or max((HERE / "results").glob("*_elec2"))
    draw(record).savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()

"""Pictures of the newest records, in docs/images.

    python -m benchmarks.record_pictures [--data DIR]

sensitivity-retrained, dnn2gp-toy   estimates against retraining; evidence against test error
kprior-SET                          the four adaptations of each set, as svg in their record too
fromp-toy                           decision boundaries after each of five tasks
memorable-SET                       most and least memorable examples, which are read from --data
memory-TABLE                        accuracy against memory, of each table with several memories
animals                             accuracy over the tasks above the photos kept, from --data
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pyarrow import parquet

from lifelong.embeddings import thumbnail
from lifelong.plots import (
    accuracy_against_memory,
    decision_regions,
    evidence_against_test,
    memorable_examples,
    memory_curves,
    seen_once,
    sensitivity_scatter,
)
from lifelong.readers import find, load
from lifelong.toys import fromp_toy

from .memorable import SETS
from .pictures import write

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


def boundaries(record: Path) -> Figure:
    """FROMP above fine-tuning: what each says of the plane after each of the five tasks."""
    config = json.loads((record / "config.json").read_text())
    result = json.loads((record / "result.json").read_text())
    with np.load(record / "regions.npz") as arrays:
        found = dict(arrays)
    stream = fromp_toy(num_per_class=config["num_per_class"], seed=config["seed"])
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    rows = {"fromp": "FROMP", "finetune": "Fine-tuning"}
    panels = figure.subplots(len(rows), len(stream), sharex=True, sharey=True)
    for axes, (method, name) in zip(panels, rows.items(), strict=True):
        for t, ax in enumerate(axes):
            seen = [task.train.batch(slice(None)) for task in stream[: t + 1]]
            few = slice(None, None, 16)  # of both classes, which come one after the other
            old = found["memorable"][found["task"] <= t]
            accuracy = np.mean(result[method]["matrix"][t][: t + 1])
            decision_regions(
                found["x"],
                found["y"],
                found[method][t] / 255,
                points=torch.cat([batch.inputs[few] for batch in seen]),  # type: ignore[index]
                labels=torch.cat([batch.labels[few] for batch in seen]),
                marked=old if method == "fromp" else None,
                title=f"{name}: task {t + 1}" if t == 0 else f"task {t + 1}",
                note=f"{100 * accuracy:.0f} % right so far",
                ax=ax,
            )
            ax.set(xticks=[], yticks=[])
    return figure


def memorable(record: Path, data: Path) -> dict[str, Figure]:
    """The examples of the record, by set."""
    figures = {}
    for name, of in json.loads((record / "result.json").read_text()).items():
        train = load(find(data, SETS[name].file), dtype=torch.uint8)
        chosen = [
            (entry["index"], entry["score"])
            for sides in of["chosen"].values()
            for side in sides.values()
            for entry in side
        ]
        index, scores = (torch.tensor(values) for values in zip(*chosen, strict=True))
        some = train[index].batch(slice(None))
        kind = "photos" if name == "cifar10" else "digits"
        figures[name] = memorable_examples(
            some.inputs,  # type: ignore[arg-type]
            scores,
            labels=some.labels,
            k=len(next(iter(of["chosen"].values()))["most"]),
            per_class=True,
            class_names=SETS[name].class_names,
            score_name="λ, how undecided the network is",
            title=f"Most and least memorable of {len(train):,} {kind}",
        )
    return figures


# Of a table's rows those that a picture has room for, the first six that are there.
ROWS = ("recommended", "gradient_reconstruction", "fromp", "kprior", "experience_replay", "derpp")


def memories(record: Path) -> Figure | None:
    """Accuracy against memory, where a table has several memories."""
    result = json.loads((record / "result.json").read_text())
    kept: dict[str, set[int]] = {}
    for row in result.get("rows", ()) if "table" in result else ():
        if row["memory"] and "accuracy" in row:
            kept.setdefault(row["method"], set()).add(row["memory"])
    methods = [name for name in ROWS if len(kept.get(name, ())) > 1]
    return accuracy_against_memory(result, methods=methods) if methods else None


# In the picture that shows them: the yardstick, ours, others.
LINES = {
    "joint": "all photos again",
    "gradient_reconstruction, kronecker": "lifelong",
    "experience_replay": "replay",
    "finetune": "nothing kept",
}


def animals(record: Path, data: Path, memory: int = 6, seed: int = 0) -> Figure:
    """The table of animals seen once, above the photos that one seed keeps."""
    lines: dict[str, list[list[float]]] = {name: [] for name in LINES.values()}
    kept: dict[str, Any] = {}
    for path in sorted((record / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        if cell["method"] in LINES and cell["memory"] in (0, memory) and cell["result"]:
            rows = cell["result"]["matrix"]
            means = [sum(row[: t + 1]) / (t + 1) for t, row in enumerate(rows)]
            lines[LINES[cell["method"]]].append(means)
            if (LINES[cell["method"]], cell["seed"]) == ("lifelong", seed):
                kept = cell["result"]
    table = parquet.read_table(data / "caltech101_animals30.parquet")
    of_classes = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]
    labels, images = table["label"].to_pylist(), table["image"]
    of: dict[int, list[Any]] = {}
    for row in sorted(kept["memory_origins"]):
        photo = np.asarray(thumbnail(images[row]["bytes"].as_py(), 120))
        of.setdefault(labels[row], []).append(photo)
    tasks = [range(3 * group, 3 * group + 3) for group in kept["order"]]
    return seen_once(
        lines,
        [[np.stack(of[c]) for c in task] for task in tasks],
        [[of_classes["names"][c].replace("_", " ").lower() for c in task] for task in tasks],
        title="39 animals, three at a time, each photo seen once",
        note="a linear head on frozen features; "
        "lifelong: gradient reconstruction with Kronecker curvature",
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST, CIFAR-10 and the animals")
    options = parser.parse_args(argv)
    results = HERE / "results"
    record = max(results.glob("*_adaptation"))
    for name, changes in json.loads((record / "result.json").read_text()).items():
        if not PANELS.keys() <= changes.keys():
            continue  # not finished yet
        figure = adaptations(name, record)
        figure.savefig(IMAGES / f"kprior-{name}.png", dpi=110)
        figure.savefig(record / f"{name}.svg")
    retrained().savefig(IMAGES / "sensitivity-retrained.png", dpi=110)
    toy().savefig(IMAGES / "dnn2gp-toy.png", dpi=110)
    write(boundaries(max(results.glob("*_fromp-toy"))), IMAGES / "fromp-toy.png")
    if options.data is not None:
        for name, figure in memorable(max(results.glob("*_memorable")), options.data).items():
            write(figure, IMAGES / f"memorable-{name}.png")
        figure = animals(max(results.glob("*_animals")), options.data)
        write(figure, IMAGES / "animals.png", photos=True)
    newest_of: dict[str, Path] = {}
    for path in sorted(results.glob("*/result.json")):
        newest_of[path.parent.name.partition("_")[2]] = path.parent
    for name, folder in newest_of.items():
        figure = memories(folder)
        if figure is not None:
            write(figure, IMAGES / f"memory-{name}.png")


if __name__ == "__main__":
    main()

"""How long it takes to remove many examples from a large memory: in RAM, and in the store on disk.

    python -m benchmarks.removals --out DIR [--sizes 100000 1000000] [--fraction 0.01]

Items are eight numbers and a label. ``update``: memorise and recall, of all examples (``kprior``)
or of half of them (``gradient_reconstruction``: the others' curvature leaves with them).
``forget``: ``Prior.forget`` of a hundredth of the examples, given again or by their ids.
``append``, ``drop``, ``forget`` of the store (SQLite), the last with its bytes overwritten. Seconds
of wall clock, beside whatever else the machine does. ``growth``: from one size to the next, where
that of the sizes is linear.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lifelong
from lifelong import Categorical, Examples
from lifelong.runs import log, versions
from lifelong.store import open_store

WIDTH, CLASSES = 8, 3


def examples(count: int) -> Examples:
    """Of a linear rule, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, WIDTH, generator=generator)
    rule = torch.randn(WIDTH, CLASSES, generator=generator)
    return Examples(inputs, (inputs @ rule).argmax(1))


def measure(count: int, removed: int, folder: Path) -> dict[str, float]:
    """Seconds of each part at one size."""
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = work()
        found[name] = time.perf_counter() - start
        return value

    torch.manual_seed(0)
    model, data = nn.Linear(WIDTH, CLASSES), examples(count)
    ids = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:removed]
    f = Categorical()
    for name, empty in (
        ("all kept", lifelong.kprior(f, memory=None)),
        ("half kept", lifelong.gradient_reconstruction(f, memory=count // 2, strength=1.0)),
    ):
        prior = timed(f"{name}, update", lambda empty=empty: empty.update(model, data))
        left = timed(f"{name}, forget", lambda prior=prior: prior.forget(model, data[ids]))
        if left.num_data != count - removed:
            raise RuntimeError(f"{left.num_data} examples are left of {count} less {removed}")
        if name == "all kept":
            memory = prior.memory
            timed(f"{name}, forget by id", lambda prior=prior: prior.forget(model, ids=ids))
    store = open_store(folder / f"memory-{count}")
    timed("store, append", lambda: store.append(memory))
    names = [f"0:{i}" for i in ids.tolist()]
    timed("store, drop", lambda: store.drop(names[: removed // 2]))
    timed("store, forget", lambda: store.forget(names))
    if len(store) != count - removed:
        raise RuntimeError(f"{len(store)} items are left of {count} less {removed}")
    store.close()
    return found


def run(sizes: Sequence[int], fraction: float, out: Path) -> dict[str, Any]:
    """All sizes, and how the seconds grow; writes the record."""
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in sizes:
            seconds[str(count)] = measure(count, max(1, int(fraction * count)), Path(folder))
            for name, value in seconds[str(count)].items():
                log(out, f"{count} items | {name}: {value:.3f} s")
    ordered = list(seconds.values())
    growth = [
        {name: later[name] / earlier[name] for name in later}
        for earlier, later in pairwise(ordered)
    ]
    result = {"seconds": seconds, "growth": growth}
    for name, value in (
        ("result", result),
        ("config", {"sizes": list(sizes), "fraction": fraction, "width": WIDTH}),
        ("versions", versions()),
    ):
        (out / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--fraction", type=float, default=0.01)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = run(options.sizes, options.fraction, options.out)
    for size, parts in result["seconds"].items():
        for name, value in parts.items():
            print(f"{size:>9} items  {name:<24} {value:9.3f} s")


if __name__ == "__main__":
    main()

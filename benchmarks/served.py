"""A training step with its memory on the disk beside the same step with it in RAM.

    python -m benchmarks.served --out DIR [--scratch DIR] [--data DIR] [--smoke]

pixels-64   20,000 items of uint8 (3, 64, 64), 12 KB each, as tensors
pixels-224  2,000 items of uint8 (3, 224, 224), 150 KB each, as tensors
jpeg-64     Tiny ImageNet's training photos as the JPEG files they are, decoded by the threads
            (with --data alone; the memory in RAM holds them decoded)

The step: 32 new examples, 32 remembered ones, forward, backward, SGD, on a convolutional network
whose step in RAM takes about 20 ms. Blocks of ``inner`` steps, the sides in turn, each side first
in every other round; what was read ahead is waited for between blocks, so that no side works during
the other's time (of ``inner`` batches ``ahead`` are then read outside of the time). The ratio is
the median over rounds of wall times. The files are in the system's cache: what is compared is the
work of reading, checking each row's digest and decoding, not a disk. Draws and gradients of both
sides are compared bit for bit on the way.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from lifelong import Categorical, Prior
from lifelong.memory import Memory
from lifelong.readers import find
from lifelong.recipe import Recipe
from lifelong.runs import log, versions
from lifelong.store import MemoryStore, open_store
from lifelong.store.codec import decode_images
from lifelong.terms import MemoryTerm

CLASSES = 100


@dataclass(frozen=True)
class Config:
    """All settings of one trial. width: channels of the network's first layer."""

    kind: str
    items: int
    side: int
    width: int
    batch: int = 32
    ahead: int = 2
    workers: int = 1
    rounds: int = 15
    inner: int = 40
    seed: int = 0


FULL = (
    Config("pixels", 20_000, 64, 8),
    Config("pixels", 2_000, 224, 8),
    Config("jpeg", 20_000, 64, 8),
)
SMOKE = (Config("pixels", 40, 16, 4, batch=4, rounds=2, inner=3),)


class Net(nn.Module):
    """Any side to 32 x 32 by strides, then two convolutions."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        stride = max(1, side // 32)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, stride, stride),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.float() / 255)


def memory_of(inputs: Tensor, seed: int) -> Memory:
    n, g = len(inputs), torch.Generator().manual_seed(seed)
    return Memory(
        inputs=inputs,
        labels=torch.randint(CLASSES, (n,), generator=g),
        reference=torch.randn(n, CLASSES, generator=g),
        soft_weight=torch.ones(n),
        hard_weight=torch.zeros(n),
        task=torch.zeros(n, dtype=torch.int64),
        origin=torch.arange(n),
        head=torch.zeros(n, dtype=torch.int64),
    )


def photos(folder: Path, count: int) -> list[bytes]:
    """JPEG files as they came, of one size; a few are grey, and left out."""
    found: list[bytes] = []
    for path in find(folder, "tiny_imagenet"):
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["image"]):
            every = (row["bytes"] for row in batch["image"].to_pylist())
            found += [one for one in every if Image.open(io.BytesIO(one)).mode == "RGB"]
            if len(found) >= count:
                return found[:count]
    return found


def fill(store: MemoryStore, config: Config, data: Path | None) -> Memory:
    """The store's items; the same memory in RAM."""
    g = torch.Generator().manual_seed(config.seed)
    if config.kind == "jpeg":
        encoded = photos(data or Path(), config.items)
        parts = [decode_images(encoded[i : i + 500]) for i in range(0, len(encoded), 500)]
        memory = memory_of(torch.cat(parts), config.seed)
        store.append(memory, inputs=encoded)
        return memory
    shape = (config.items, 3, config.side, config.side)
    memory = memory_of(torch.randint(256, shape, generator=g, dtype=torch.uint8), config.seed)
    store.append(memory)
    return memory


class Side:
    """A model in training with one of the memories."""

    def __init__(self, memory: Memory, config: Config) -> None:
        torch.manual_seed(config.seed)
        self.model = Net(config.side, config.width)
        self.prior = Prior(Categorical(), Recipe(memory=len(memory)), terms=(MemoryTerm(memory),))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(config.seed)
        g = torch.Generator().manual_seed(config.seed + 1)
        shape = (config.batch, 3, config.side, config.side)
        self.x = torch.randint(256, shape, generator=g, dtype=torch.uint8)
        self.y = torch.randint(CLASSES, (config.batch,), generator=g)
        self.batch, self.memory = config.batch, memory

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.prior.loss(
            self.model,
            self.x,
            self.y,
            num_data=10_000,
            batch_size=self.batch,
            generator=self.generator,
        )
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def steps(self, count: int) -> tuple[float, list[Tensor]]:
        """Seconds and losses."""
        start = time.perf_counter()
        losses = [self.step() for _ in range(count)]
        return time.perf_counter() - start, losses

    def settle(self) -> None:
        """Wait for what is read ahead."""
        wait: Callable[[], object] | None = getattr(self.memory.inputs, "wait", None)
        if wait is not None:
            wait()


def trial(config: Config, scratch: Path, data: Path | None) -> dict[str, Any]:
    with open_store(scratch / f"{config.kind}-{config.side}") as store:
        in_ram = fill(store, config, data)
        decode = decode_images if config.kind == "jpeg" else None
        served = store.serve(decode=decode, ahead=config.ahead, workers=config.workers)
        size = store.num_bytes
    ram, disk = Side(in_ram, config), Side(served, config)
    ratios, times, equal = [], [], True
    for i in range(config.rounds + 1):
        found = {}
        for side in (ram, disk) if i % 2 else (disk, ram):
            found[side] = side.steps(config.inner)
            side.settle()
        (a, losses), (b, expected) = found[disk], found[ram]
        equal = equal and all(torch.equal(x, y) for x, y in zip(losses, expected, strict=True))
        if i:  # the first round is not counted
            ratios.append(a / b)
            times.append((a / config.inner, b / config.inner))
    same = zip(disk.model.parameters(), ram.model.parameters(), strict=True)
    low, _, high = quantiles(ratios, n=4)
    inputs: Any = served.inputs
    return {
        **asdict(config),
        "ratio": median(ratios),
        "low": low,
        "high": high,
        "served_ms": 1e3 * median(t[0] for t in times),
        "ram_ms": 1e3 * median(t[1] for t in times),
        "read_ahead": inputs.hits / ((config.rounds + 1) * config.inner),
        "item_bytes": in_ram.num_bytes // len(in_ram),
        "on_disk_bytes": size,
        "same_losses": equal,
        "same_weights": all(torch.equal(a, b) for a, b in same),
    }


def run(
    configs: Sequence[Config], out: Path, scratch: Path | None = None, data: Path | None = None
) -> list[dict[str, Any]]:
    """Measure, and write the record."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for config in configs:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            found.append(result := trial(config, Path(folder), data))
        line = (
            f"{config.kind}-{config.side}: served {result['served_ms']:.1f} ms, in RAM "
            f"{result['ram_ms']:.1f} ms, ratio {result['ratio']:.3f} "
            f"({result['low']:.3f} to {result['high']:.3f}), "
            f"{100 * result['read_ahead']:.0f} % read ahead, "
            f"bit for bit: {result['same_losses'] and result['same_weights']}"
        )
        log(out, line)
        print(line, flush=True)
    for name, value in (
        ("result.json", found),
        ("config.json", [asdict(config) for config in configs]),
        ("versions.json", {**versions(), "numpy": np.__version__}),
    ):
        (out / name).write_text(json.dumps(value, indent=1) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="where the stores are made, and removed")
    parser.add_argument("--data", type=Path, help="the folder with tiny_imagenet")
    parser.add_argument("--only", nargs="+", help="kind-side of the trials to run")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args(argv)
    configs = SMOKE if given.smoke else FULL
    configs = [c for c in configs if given.data is not None or c.kind != "jpeg"]
    if given.only:
        configs = [c for c in configs if f"{c.kind}-{c.side}" in given.only]
    run(configs, given.out, given.scratch, given.data)
    return 0


if __name__ == "__main__":
    sys.exit(main())

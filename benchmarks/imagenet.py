"""The ImageNet recipe from end to end on photos that are drawn: killed on the way, and resumed.

    python -m benchmarks.imagenet --out DIR [--photos DIR] [--processes 2] [--limit SECONDS]

Photos of the true shape and number of classes, few of each (noise on a colour and a slope of each
class's own), so that accuracies say nothing: what is shown is that ``lifelong run --benchmark
imagenet-1000`` reads, trains, remembers, saves and goes on. The process is killed (SIGKILL) each
time that another task of ``--kill`` is learned, and resumed. ``--limit`` kills it too, after so
many seconds; the same command goes on. result.json is written once all tasks are learned.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lifelong.runs import log, versions


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these.

    kill: after how many tasks the run is killed. flags: of ``lifelong run``.
    """

    classes: int = 1000
    train: int = 2
    test: int = 1
    size: int = 224
    processes: int = 1
    kill: tuple[int, ...] = (3, 7)
    flags: tuple[str, ...] = ()


FEW_STEPS = (
    *("--prior", "gradient_reconstruction", "--memory", "20", "--epochs", "1"),
    *("--batch-size", "50", "--memory-batch-size", "10", "--lr", "0.01"),
    *("--set", "strength=1", "--set", "precision=6"),
)


def draw_photos(folder: Path, config: Config) -> None:
    """The photos, once."""
    done = folder / "done"
    if done.is_file():
        return
    g = np.random.default_rng(0)
    slope = np.linspace(-40, 40, config.size)[:, None, None]
    for label in range(config.classes):
        colour, along = g.integers(40, 216, 3), g.normal(size=3)
        for split, count in (("train", config.train), ("val", config.test)):
            place = folder / split / f"n{label:08d}"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = g.normal(0, 20, (config.size // 4, config.size // 4, 3))
                noise = noise.repeat(4, 0).repeat(4, 1)
                pixels = np.clip(colour + along * slope + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.JPEG", quality=85)
    done.write_text("")


def tasks_learned(run: Path) -> int:
    """As the run's log tells."""
    path = run / "log.txt"
    return path.read_text().count(": task ") if path.is_file() else 0


def command(config: Config, photos: Path, run: Path) -> list[str]:
    """Starts the run, or goes on with it."""
    python = [sys.executable, "-m"]
    if config.processes > 1:
        python += ["torch.distributed.run", "--standalone"]
        python += [f"--nproc-per-node={config.processes}", "-m"]
    where = ["--data", str(photos), "--quiet"]
    if (run / "config.json").is_file():
        return [*python, "lifelong", "run", "--resume", str(run), *where]
    new = ["--benchmark", "imagenet-1000", "--out", str(run), *config.flags]
    return [*python, "lifelong", "run", *new, *where]


def descendants(pid: int) -> list[int]:
    """All processes that a process has started, and that these have."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def go_on(config: Config, photos: Path, out: Path, limit: float) -> bool:
    """Until all is learned, True, or the time is up. Raises RuntimeError where the run fails."""
    run, end = out / "run", time.monotonic() + limit
    while not (run / "result.json").is_file():
        begun, start = tasks_learned(run), time.monotonic()
        at = next((k for k in config.kill if k > begun), None)
        log(out, f"started with {begun} tasks learned")
        child = subprocess.Popen(
            command(config, photos, run), stdout=subprocess.DEVNULL, start_new_session=True
        )
        while child.poll() is None:
            due = at is not None and tasks_learned(run) >= at
            if due or time.monotonic() > end:
                for pid in (child.pid, *descendants(child.pid)):  # torchrun's have own sessions
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                child.wait()
                log(out, f"killed with {tasks_learned(run)} tasks learned, "
                    f"{time.monotonic() - start:.0f} s after its start")  # fmt: skip
                break
            time.sleep(0.05)
        else:
            if child.returncode:
                raise RuntimeError(f"the run ended with {child.returncode}")
            log(out, f"ended with {tasks_learned(run)} tasks learned, "
                f"{time.monotonic() - start:.0f} s after its start")  # fmt: skip
        if time.monotonic() > end:
            return (run / "result.json").is_file()
    return True


def record(config: Config, out: Path) -> None:
    """What the run's own record says, without the folders of this machine."""
    run = out / "run"
    found = json.loads((run / "result.json").read_text())
    settings = found.pop("config")
    settings.pop("data", None)
    lines = (out / "log.txt").read_text().splitlines()
    result = {
        **found,
        "kills": sum("killed with" in line for line in lines),
        "starts": sum("started with" in line for line in lines),
        "checkpoint_bytes": (run / "seed-0" / "learner.safetensors").stat().st_size,
    }
    for name, content in (
        ("result.json", result),
        ("config.json", {**asdict(config), "run": settings}),
        ("versions.json", versions()),
    ):
        (out / name).write_text(json.dumps(content, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=Path, default=None)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--limit", type=float, default=float("inf"))
    given = parser.parse_args(argv)
    config = Config(processes=given.processes, flags=FEW_STEPS)
    photos = given.photos or given.out / "photos"
    draw_photos(photos, config)
    done = go_on(config, photos, given.out, given.limit)
    if done:
        record(config, given.out)
    print("all tasks are learned" if done else "not done; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())

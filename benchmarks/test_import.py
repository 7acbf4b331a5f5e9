"""What ``import lifelong`` adds to ``import torch``, each time in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median, quantiles

from .records import Row

ROUNDS = 11
_CODE = """
import json, time
import torch
wall, cpu = time.perf_counter(), time.process_time()
import lifelong
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]))
"""
_FIRST_USE = _CODE.replace("import lifelong\n", "import lifelong\nlifelong.kprior\n")


def seconds(code: str) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    cpu, wall = json.loads(done.stdout)
    return cpu, wall


def test_import(record: Callable[[Row], None]) -> None:
    """The first import writes bytecode and is not counted."""
    seconds(_FIRST_USE)
    times = {"import lifelong": [], "import lifelong, lifelong.kprior": []}
    for _ in range(ROUNDS):
        times["import lifelong"].append(seconds(_CODE))
        times["import lifelong, lifelong.kprior"].append(seconds(_FIRST_USE))
    for case, found in times.items():
        cpu = [1e3 * c for c, _ in found]
        low, _, high = quantiles(cpu, n=4)
        details = {"low": low, "high": high, "wall": 1e3 * median(w for _, w in found)}
        bar = "6 import on top of torch, CPU time"
        limit = 150 if case == "import lifelong" else None
        record(Row(bar, case, median(cpu), limit, "ms", {**details, "rounds": ROUNDS}))

"""A memory on disk that is killed, read while it is written, and searched for what it forgot.

    python -m benchmarks.store_trust --out DIR [--only kills readers] [--smoke]

kills: a child appends, drops, restores, saves priors, forgets and compacts at random until a kill
-9 at a random moment. It says what it is about to do, and what was committed; afterwards the
store must hold exactly what was committed, or that and the whole of what was under way, and what
was forgotten must be in no file. readers: four processes read while one writes, and must see whole
transactions only. forgetting: items of random bytes go through everything that a store can do with
them, and are searched for in every file. churn: the same for many small rows that come and go.
speed: erasing and dropping in a large store.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lifelong import Categorical, MemoryTerm, Prior, Recipe, Regulariser, WeightTerm, checkpoint
from lifelong.memory import Memory
from lifelong.store import Where, open_store
from lifelong.store.sqlite import SqliteStore

NUM_OUTPUTS = 4
Log = Callable[[str], None]


def pattern(number: int, size: int = 600) -> bytes:
    """Random bytes that nothing else holds, of item ``number``."""
    return random.Random(number).randbytes(size)


def examples(numbers: list[int], size: int = 600) -> Memory:
    """Items whose input and outputs are their ``pattern``; the number is the origin."""
    raw = [bytearray(pattern(n, size)) for n in numbers]
    inputs = torch.stack([torch.frombuffer(r, dtype=torch.uint8) for r in raw])
    words = inputs[:, : NUM_OUTPUTS * 7].reshape(len(numbers), NUM_OUTPUTS, 7)
    # Seven random bytes and an exponent: finite float64 whose bytes can be searched for.
    exponent = torch.full((len(numbers), NUM_OUTPUTS, 1), 0x3F, dtype=torch.uint8)
    outputs = torch.cat([words, exponent], -1).reshape(len(numbers), -1).view(torch.float64)
    n = len(numbers)
    return Memory(
        inputs=inputs,
        labels=torch.tensor(numbers) % NUM_OUTPUTS,
        reference=outputs.clone(),
        soft_weight=torch.ones(n, dtype=torch.float64),
        hard_weight=torch.zeros(n, dtype=torch.float64),
        task=torch.zeros(n, dtype=torch.int64),
        origin=torch.tensor(numbers),
        head=torch.zeros(n, dtype=torch.int64),
    )


def needles(number: int, size: int = 600) -> list[bytes]:
    """Byte strings that tell item ``number``: of its input and of its soft label."""
    item = examples([number], size)
    soft = item.reference.numpy().tobytes()
    raw = pattern(number, size)
    return [raw[:16], raw[size // 2 : size // 2 + 16], raw[-16:], soft[:16], soft[-16:]]


def prior_of(memory: Memory, seed: int) -> Prior:
    """A prior with that memory, and an anchor that tells its seed."""
    weight = WeightTerm(
        {"w": torch.full((50,), seed, dtype=torch.float64)}, {"w": torch.ones(50)}, None
    )
    terms = (Regulariser(0.5), weight, MemoryTerm(memory))
    return Prior(Categorical(), Recipe(), terms, num_data=len(memory), num_tasks=1)


def holding(folder: Path, wanted: Iterable[bytes]) -> set[bytes]:
    """Those byte strings, of at least 8 bytes, that lie in some file below a folder.

    At every offset of every file: eight bytes are looked up among the beginnings, then compared.
    """
    by_start: dict[int, list[bytes]] = {}
    for needle in set(wanted):
        by_start.setdefault(int.from_bytes(needle[:8], "little"), []).append(needle)
    starts = np.array(sorted(by_start), np.uint64)
    first = np.zeros(65536, np.bool_)
    first[starts & 0xFFFF] = True
    found: set[bytes] = set()
    for path in (Path(root, name) for root, _, names in os.walk(folder) for name in names):
        raw = np.fromfile(path, np.uint8)
        for shift in range(min(8, len(raw))):
            words = raw[shift : shift + (len(raw) - shift) // 8 * 8].view("<u8")
            places = np.flatnonzero(first[words & 0xFFFF])
            places = places[np.isin(words[places], starts)]
            for place in places.tolist():
                rest = raw[shift + 8 * place : shift + 8 * place + 4096].tobytes()
                found |= {n for n in by_start[int(words[place])] if rest.startswith(n)}
    return found


# ------------------------------------------------------------------------ kills


@dataclass
class Oracle:
    """What the store must hold, by what was reported: live items and the prior, by version."""

    version: int = 0
    oldest: int = 0
    live: dict[int, frozenset[int]] = field(default_factory=lambda: {0: frozenset()})
    prior: dict[int, int | None] = field(default_factory=lambda: {0: None})
    forgotten: set[int] = field(default_factory=set)

    def apply(self, kind: str, values: list[int]) -> None:
        """One committed operation."""
        live, prior = self.live[self.version], self.prior[self.version]
        new = self.version + 1
        if kind == "append":
            live = live | set(values)
        elif kind == "drop":
            live = live - set(values)
        elif kind == "restore":
            live, prior = self.live[values[0]], self.prior[values[0]]
        elif kind == "prior":
            prior = values[0]
        elif kind == "forget":
            self.forgotten |= set(values)
            self.live = {v: items - set(values) for v, items in self.live.items()}
            self.prior = {v: p if p == prior else None for v, p in self.prior.items()}
            live = live - set(values)
        elif kind == "compact":
            self.oldest = new - values[0]
        self.version, self.live[new], self.prior[new] = new, live, prior


def work(folder: Path, oracle: Oracle, pipe: int, seed: int) -> None:
    """The child: random operations until it is killed, each told before and after."""
    rng = random.Random(seed)

    def tell(*words: Any) -> None:
        os.write(pipe, (json.dumps(words) + "\n").encode())

    with open_store(folder) as store:
        tell("ready")
        fresh = seed * 100_000 + 1
        while True:
            kinds = ["append"] * 6 + ["drop", "restore", "prior", "prior", "forget", "compact"]
            kind = rng.choice(kinds)
            live = sorted(oracle.live[oracle.version])
            some = rng.sample(live, min(len(live), rng.randint(1, 4)))
            if kind == "append":
                values = list(range(fresh, fresh + rng.randint(1, 12)))
                fresh = values[-1] + 1
            elif kind == "restore":
                values = [rng.randint(max(oracle.oldest, 0), oracle.version)]
            elif kind == "prior":
                values = [fresh]
                fresh += 1
            elif kind == "compact":
                values = [rng.randint(1, 5)]
            else:
                values = some
            if kind in ("drop", "forget", "prior") and not live:
                continue
            if kind == "compact" and values[0] > oracle.version:
                continue
            tell("intend", kind, values)
            if kind == "append":
                done = store.append(examples(values))
            elif kind == "drop":
                done = store.drop([f"0:{n}" for n in values])
            elif kind == "restore":
                done = store.restore(values[0])
            elif kind == "prior":
                done = store.save_prior(prior_of(store.memory(), values[0]))
            elif kind == "forget":
                done = store.forget([f"0:{n}" for n in values]).version
            else:
                done = store.compact(keep=values[0])
            tell("done", done)
            oracle.apply(kind, values)


def kill_round(folder: Path, oracle: Oracle, seed: int, longest: float) -> tuple[int, str]:
    """Fork, work, kill, check; how many commits there were, and what was under way.

    Raises AssertionError where the store is not as reported.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            work(folder, oracle, write, seed)
        except BaseException as error:
            os.write(write, (json.dumps(["error", repr(error)]) + "\n").encode())
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as told:
        first = json.loads(told.readline())
        assert first == ["ready"], first
        time.sleep(random.Random(-seed).uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = [json.loads(line) for line in told.read().splitlines() if line.endswith("]")]
    under_way, commits = None, 0
    for word, *rest in lines:
        assert word != "error", rest
        if word == "intend":
            under_way = rest
        else:
            assert under_way is not None
            oracle.apply(*under_way)
            assert oracle.version == rest[0]
            under_way, commits = None, commits + 1
    check(folder, oracle, under_way)
    return commits, "nothing" if under_way is None else under_way[0]


def check(folder: Path, oracle: Oracle, under_way: list[Any] | None) -> None:
    """The store holds exactly what was committed, and what was forgotten is in no file."""
    with open_store(folder, "r") as store:  # as a reader first, before anything is tidied
        assert store.version in (oracle.version, oracle.version + 1)
        if store.version > oracle.version:
            assert under_way is not None
            oracle.apply(*under_way)
        expected = sorted(oracle.live[oracle.version])
        assert [item.origin for item in store.items(limit=10**6)] == expected or not expected
        assert len(store) == len(expected)
        if expected:
            held, true = store.memory(), examples(expected)
            order = held.origin.argsort()
            assert torch.equal(held.origin[order], true.origin)
            assert torch.equal(held.inputs[order], true.inputs)
            assert torch.equal(held.reference[order], true.reference)
        seed = oracle.prior[oracle.version]
        if seed is not None:
            weight = store.load_prior().weight
            assert weight is not None
            assert float(weight.anchor["w"][0]) == seed
    with open_store(folder) as store:  # finishes what a killed forget began
        found = store.verify()
        assert found.ok, found.findings
    gone = [needle for n in oracle.forgotten for needle in needles(n)]
    assert not holding(folder, gone)


def kills(folder: Path, rounds: int, longest: float = 0.06, seed: int = 0) -> dict[str, Any]:
    """``kill_round`` on one store that lives on."""
    open_store(folder).close()
    oracle, commits, interrupted = Oracle(), 0, {}
    for i in range(rounds):
        done, kind = kill_round(folder, oracle, seed + i + 1, longest)
        commits += done
        interrupted[kind] = interrupted.get(kind, 0) + 1
        if len(oracle.forgotten) > 400:  # the search would take most of the time
            oracle.forgotten = set(sorted(oracle.forgotten)[-200:])
    return {
        "rounds": rounds,
        "commits": commits,
        "killed during": dict(sorted(interrupted.items())),
        "lost": 0,
        "unreadable": 0,
        "items at the end": len(oracle.live[oracle.version]),
        "versions": oracle.version,
    }


# ---------------------------------------------------------------------- readers


def readers(folder: Path, seconds: float, count: int = 4, batch: int = 7) -> dict[str, Any]:
    """Readers beside a writer, all counting what they saw.

    The writer appends batches of one task each and drops whole tasks: in any one read each
    task must be whole or absent.
    """
    open_store(folder).close()
    pipes, children = [], []
    for i in range(count):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            reads = torn = 0
            versions: set[int] = set()
            try:
                end = time.monotonic() + seconds
                with open_store(folder, "r") as store:
                    while time.monotonic() < end:
                        if i % 2:  # half of them by number of version
                            versions.add(v := store.version)
                            memory = store.memory(version=v) if v else None
                        else:
                            memory = store.memory() if len(store) else None
                        if memory is not None:
                            _, sizes = memory.task.unique(return_counts=True)
                            torn += int((sizes != batch).sum())
                            stamps = memory.inputs[:, 0].double()
                            torn += int((stamps != memory.task % 251).sum())
                        reads += 1
                os.write(write, json.dumps([reads, torn, ""]).encode())
            except BaseException as error:
                os.write(write, json.dumps([reads, torn, repr(error)]).encode())
            finally:
                os._exit(0)
        os.close(write)
        pipes.append(read)
        children.append(child)
    end, commits, rng, task = time.monotonic() + seconds, 0, random.Random(0), 0
    with open_store(folder) as store:
        while time.monotonic() < end:
            memory = examples([task * batch + i for i in range(batch)], 64)
            memory.inputs[:, 0] = task % 251
            memory = Memory(**{**memory.state_dict(), "heads": (None,),
                               "task": torch.full((batch,), task)})  # fmt: skip
            store.append(memory)
            commits, task = commits + 1, task + 1
            if task % 5 == 0:
                gone = rng.randrange(task)
                if store.count(Where(task=gone)):
                    store.drop(Where(task=gone))
                    commits += 1
    results = []
    for child, read in zip(children, pipes, strict=True):
        os.waitpid(child, 0)
        with os.fdopen(read) as told:
            results.append(json.loads(told.read()))
    assert all(error == "" for _, _, error in results), results
    assert sum(torn for _, torn, _ in results) == 0, results
    return {
        "readers": count,
        "commits": commits,
        "reads": [reads for reads, _, _ in results],
        "torn": 0,
    }


# ------------------------------------------------------------------- forgetting


def forgetting(
    folder: Path, items: int, forget: int, seed: int = 0, name: str = "store"
) -> dict[str, Any]:
    """Everything a store can do with items, then forget some, then search every file."""
    rng, run = random.Random(seed), folder / "run"
    store_folder = folder / name
    ids = {n: pattern(n, 640)[600:].hex() for n in range(1, items + 1)}
    notes = {n: pattern(n, 680)[640:].hex() for n in ids}
    messages = {}
    gone = rng.sample(sorted(ids), forget)
    with open_store(store_folder) as store:
        for start in range(1, items + 1, 10):
            some = [n for n in ids if start <= n < start + 10]
            messages[start] = pattern(-start, 20).hex()
            store.append(
                examples(some),
                ids=[ids[n] for n in some],
                notes=[notes[n] for n in some],
                scores={"lambda": [float(n) + 0.125 for n in some]},
                message=messages[start],
            )
        store.save_prior(prior_of(store.memory(), 1))
        middle = store.version
        for _ in range(5):
            live = [item.id for item in store.items(limit=items)]
            store.drop(rng.sample(live, len(live) // 3))
            store.restore(rng.randint(middle, store.version))
        store.save_prior(prior_of(store.memory(), 2))
        store.restore(middle)
        store.export(store_folder / "copy.safetensors")
        (store_folder / "thumbnails").mkdir()
        for item in store.items(limit=items):
            (store_folder / "thumbnails" / f"{item.item}.png").write_bytes(
                pattern(item.origin)[:300]
            )
        learner = {"prior": prior_of(store.memory(), 3).state_dict(), "within": None}
        checkpoint.save(run / "seed-0" / "learner.safetensors", learner, kind="learner")
        (run / ".learner.safetensors.left").write_bytes(pattern(gone[0]))
        (run / "report.html").write_text(ids[gone[0]])
        store.compact(keep=4)
        started = time.perf_counter()
        report = store.forget([ids[n] for n in gone], runs=[run])
        seconds = time.perf_counter() - started
        assert report.items == len(gone)
        assert report.influenced
        assert store.verify().ok, store.verify()
        assert all(store.forgotten(ids[n]) is not None for n in gone)
        texts = {n: [ids[n].encode(), notes[n].encode()] for n in ids}
        searched = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        lost = holding(folder, (x for n in gone for x in needles(n) + texts[n]))
        assert not lost, f"{len(lost)} of the forgotten patterns are still there"
        kept = [n for n in ids if n not in gone]
        wanted = {x for n in kept for x in needles(n) + texts[n]}
        assert holding(folder, wanted) == wanted
        batches = {1 + (n - 1) // 10 * 10 for n in gone}
        assert not holding(folder, (messages[b].encode() for b in batches))
        assert len(store) == len(kept)
        assert store.load_prior().memory is not None
    return {
        "items": items,
        "forgotten": len(gone),
        "patterns of the forgotten found": 0,
        "patterns of the kept found": len(wanted),
        "files searched": len(searched),
        "seconds": round(seconds, 4),
    }


def churn(folder: Path, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Appending, dropping, restoring, compacting and forgetting small rows; then the search."""
    rng, live, gone, fresh = random.Random(seed), set(), set(), 1
    with open_store(folder) as store:
        for _ in range(rounds):
            size, most = rng.choice([(40, 80), (600, 60), (5000, 30), (70_000, 4)])
            numbers = list(range(fresh, fresh + rng.randint(1, most)))
            fresh = numbers[-1] + 1
            store.append(examples(numbers, size))
            live |= set(numbers)
            if rng.random() < 0.5:
                some = rng.sample(sorted(live), min(len(live), 5))
                store.drop([f"0:{n}" for n in some])
                store.restore(store.version - 1)
            if rng.random() < 0.6:
                some = rng.sample(sorted(live), min(len(live), rng.randint(1, 20)))
                store.forget([f"0:{n}" for n in some])
                live, gone = live - set(some), gone | set(some)
            if rng.random() < 0.15:
                store.compact(keep=rng.randint(1, 3))
        assert store.verify().ok
    starts = [
        x
        for n in gone
        for x in (pattern(n, 40)[:16], examples([n], 40).reference[0].numpy().tobytes()[:16])
    ]
    assert not holding(folder, starts)
    return {"rounds": rounds, "items": fresh - 1, "forgotten": len(gone), "found": 0}


# ------------------------------------------------------------------------ speed


def speed(folder: Path, items: int, side: int = 64) -> dict[str, Any]:
    """Seconds on ``items`` images of side x side x 3: append, a batch, forget, drop."""
    result: dict[str, Any] = {"items": items, "bytes of an item": side * side * 3}
    rng = torch.Generator().manual_seed(0)
    with open_store(folder) as store:
        started = time.perf_counter()
        for start in range(0, items, 500):
            n = min(500, items - start)
            small = examples(list(range(start, start + n)), 64)
            pixels = torch.randint(0, 256, (n, 3, side, side), generator=rng, dtype=torch.uint8)
            store.append(Memory(**{**small.state_dict(), "inputs": pixels, "heads": (None,)}))
        result["append, items a second"] = round(items / (time.perf_counter() - started))
        len(store)
        started = time.perf_counter()
        for _ in range(20):
            store.draw(128, rng)
        result["batch of 128, ms"] = round((time.perf_counter() - started) / 20 * 1e3, 2)

        def timed(name: str, call: Callable[[], Any]) -> None:
            started = time.perf_counter()
            call()
            result[name] = round(time.perf_counter() - started, 4)

        step = items // 100
        timed("forget 100 scattered, s", lambda: store.forget(list(range(1, items, step))[:100]))
        live = [item.item for item in store.items(limit=items)]
        for n in (items // 20, items // 10, items // 5):
            some, live = live[:n], live[n:]
            timed(f"forget {n:,}, s", lambda some=some: store.forget(some))
        for n in (items // 20, items // 10, items // 5):
            some, live = live[:n], live[n:]
            timed(f"drop {n:,}, s", lambda some=some: store.drop(some))
        timed("verify, s", store.verify)
        timed("compact, s", store.compact)
        assert isinstance(store, SqliteStore)
        assert store.verify().ok
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="these parts; the others' results stay")
    parser.add_argument("--work", type=Path, help="where the stores are written and removed")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--items", type=int, default=20_000, help="of the timed store")
    parser.add_argument("--smoke", action="store_true", help="few rounds, few items")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    place = options.work or options.out / "work"

    def log(line: str) -> None:
        stamped = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {line}"
        print(stamped, flush=True)
        with (options.out / "log.txt").open("a") as file:
            file.write(stamped + "\n")

    smoke = options.smoke
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": lambda p: kills(p, *((3, 0.06) if smoke else (options.rounds, 0.25))),
        "readers": lambda p: readers(p, 0.3 if smoke else 5.0),
        "forgetting": lambda p: forgetting(p, *((40, 7) if smoke else (1000, 100))),
        "churn": lambda p: churn(p, 4 if smoke else 150),
        "speed": lambda p: speed(p, 400 if smoke else options.items),
    }
    path = options.out / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, part in parts.items():
        if options.only and name not in options.only:
            continue
        shutil.rmtree(place, ignore_errors=True)
        started = time.perf_counter()
        result[name] = {**part(place), "revision": _versions()["revision"]}
        shutil.rmtree(place, ignore_errors=True)
        log(f"{name} ({time.perf_counter() - started:.1f} s): {json.dumps(result[name])}")
    config = {"rounds": options.rounds, "items": options.items, "smoke": smoke, "seed": 0}
    for name, value in (("config", config), ("result", result), ("versions", _versions())):
        (options.out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def _versions() -> dict[str, str]:
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "revision": revision.stdout.strip(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: version(name) for name in ("torch", "numpy", "safetensors")},
    }


if __name__ == "__main__":
    main()

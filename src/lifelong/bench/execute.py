"""Compute the cells of a table: in several processes, one after another in each, resumable."""

from __future__ import annotations

import hashlib
import heapq
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from .. import runs
from . import record
from .source import fingerprint
from .table import Cell, Context, Table

_REPORT_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class Running:
    """A cell that is being computed. fraction: done of it; began: that which was done when the
    present process started; elapsed: seconds since then."""

    cell: Cell
    fraction: float = 0.0
    began: float = 0.0
    elapsed: float = 0.0


@dataclass(frozen=True)
class Status:
    """Where a table is. ``ended`` are the cells that ended since the last status, each with what
    its file holds; seconds_left: None while nothing is known."""

    total: int
    done: int
    failed: int
    running: tuple[Running, ...] = ()
    ended: tuple[Mapping[str, Any], ...] = ()
    seconds_left: float | None = None


Watch = Callable[[Status], None]


def execute(
    table: Table,
    out: Path,
    *,
    methods: Sequence[str] | None = None,
    memories: Sequence[int] | None = None,
    seeds: int | None = None,
    data: Path | None = None,
    jobs: int | None = None,
    smoke: bool = False,
    redo: Sequence[str] = (),
    cache: Path | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Compute the cells that the record in ``out`` lacks or in which they failed; the summary.

    jobs: processes at once, by default the cores; 0 computes in this process. cache: by default
    in ``out``. A cell that fails is recorded as such, and the others go on.
    Raises UsageError for unknown methods, where the record cannot be gone on with
    (``record.open_record``), or where another process writes to it.
    """
    table = table.tiny() if smoke else table
    at_once = 1 if jobs == 0 else max(1, jobs or os.cpu_count() or 1)
    wanted = list(table.cells(methods, memories, seeds))
    with runs.claimed(out):
        record.open_record(out, table, smoke=smoke, redo=redo)
        place = Place(table, out, data, cache or out / record.CACHE, smoke)
        there = {
            record.cell_of(content): content
            for content in record.read_cells(out)
            if content["status"] == "done"
        }
        durations = {cell: content["wall_seconds"] for cell, content in there.items()}
        waiting = [cell for cell in wanted if cell not in there]
        if redo:
            record.write_result(out, table)  # no number without its cell, also if this is killed
        if waiting:
            record.write_origin(out)
            runs.log(out, f"started: {len(waiting)} of {len(wanted)} cells to compute")
        total, failed = len(wanted), 0
        done = total - len(waiting)
        states = (
            _one_by_one(place, waiting) if jobs == 0 else _in_processes(place, waiting, at_once)
        )
        for running, ended in states:
            for content in ended:
                cell = record.cell_of(content)
                waiting.remove(cell)
                if content["status"] == "done":
                    durations[cell] = content["wall_seconds"]
                    done += 1
                else:
                    failed += 1
                runs.log(out, line(content))
            if ended:
                record.write_result(out, table)
            if watch is not None:
                at = {r.cell for r in running}
                later = [cell for cell in waiting if cell not in at]
                left = seconds_left(later, running, durations, at_once)
                watch(Status(total, done, failed, tuple(running), tuple(ended), left))
        summary = record.write_result(out, table)
        if not failed:
            shutil.rmtree(out / record.WORK, ignore_errors=True)
    return summary


def line(content: Mapping[str, Any]) -> str:
    """A cell that ended, for people."""
    cell = record.cell_of(content)
    if content["status"] == "failed":
        return f"{cell}: FAILED, {content['error']}"
    found = f"accuracy {content['result']['accuracy']:.4f}"
    return f"{cell}: {found}, {content['wall_seconds']:.1f} s"


@dataclass(frozen=True)
class Place:
    """Where and of what the cells are."""

    table: Table
    out: Path
    data: Path | None
    cache: Path
    smoke: bool

    def shared(self, cell: Cell) -> Path | None:
        """What the cell makes for others too, if its table's ``run`` tells."""
        shared = getattr(self.table.run, "shared", None)
        if shared is None:
            return None
        try:
            return shared(self.table, cell, Context(self.cache, self.out, self.data, self.smoke))
        except Exception:  # wrong settings: the cell will fail by itself, and tell
            return None

    def context(self, cell: Cell, report: Callable[[float], None]) -> Context:
        of = [self.table.definition(cell.method), fingerprint(), str(self.data)]
        begun = json.dumps(of, sort_keys=True)  # other settings, code or data start anew
        other = hashlib.sha256(begun.encode()).hexdigest()[:8]
        folder = self.out / record.WORK / f"{record.stem(self.table, cell)}-{other}"
        folder.mkdir(parents=True, exist_ok=True)
        self.cache.mkdir(parents=True, exist_ok=True)
        return Context(self.cache, folder, self.data, self.smoke, report)


States = Iterator[tuple[list[Running], list[dict[str, Any]]]]


def compute(
    place: Place, cell: Cell, report: Callable[[float], None], *, fresh: bool
) -> dict[str, Any]:
    """Compute one cell and write its file; what it holds. fresh: this process is of the cell
    alone, so that its peak of memory and its time of the processor are the cell's."""
    start = time.perf_counter()
    context = place.context(cell, report)
    resumed = any(context.folder.iterdir())

    def write(**outcome: Any) -> dict[str, Any]:
        seconds = time.perf_counter() - start
        return record.write_cell(
            place.out, place.table, cell, seconds=seconds, resumed=resumed, **outcome
        )

    try:
        with torch.random.fork_rng(devices=[]):
            result = dict(place.table.run(place.table, cell, context))
        if not 0 <= result["accuracy"] <= 1:
            raise ValueError(f"expected an accuracy in [0, 1], got {result['accuracy']!r}")
    except Exception as error:
        return write(error=described(error, place))
    if fresh:
        result.setdefault("peak_memory", peak_memory())
        if not resumed:  # the processor's time of an earlier process is not known
            result.setdefault("cpu_seconds", time.process_time())
    content = write(result=result)
    shutil.rmtree(context.folder, ignore_errors=True)
    return content


def described(error: BaseException, place: Place) -> str:
    """An error and where it came from, without folders of the machine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:])
    text = " ".join(str(error).split())
    for folder, name in ((place.data, "$LIFELONG_DATA"), (place.out, "OUT"), (Path.cwd(), ".")):
        if folder is not None:
            text = text.replace(str(folder.absolute()), name).replace(str(folder), name)
    return f"{type(error).__name__}: {text} ({where})"


def peak_memory() -> int | None:
    """Bytes: the largest resident set of this process so far; None where it is not told.

    Linux's ``ru_maxrss`` is never less than what the parent had when it began the process.
    """
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# In this process ----------------------------------------------------------------------------------


def _one_by_one(place: Place, cells: Sequence[Cell]) -> States:
    for cell in list(cells):
        yield [Running(cell)], []
        yield [], [compute(place, cell, lambda fraction: None, fresh=False)]


# In processes of their own ------------------------------------------------------------------------


@dataclass
class _Worker:
    cell: Cell
    process: Any
    messages: Any
    started: float = field(default_factory=time.monotonic)
    began: float | None = None
    fraction: float = 0.0

    def read(self) -> None:
        with suppress(EOFError, OSError):
            while self.messages.poll():
                self.fraction = self.messages.recv()
                if self.began is None:
                    self.began = self.fraction

    @property
    def state(self) -> Running:
        elapsed = time.monotonic() - self.started
        return Running(self.cell, self.fraction, self.began or 0.0, elapsed)


def _in_processes(place: Place, cells: Sequence[Cell], jobs: int) -> States:
    waiting, workers = list(cells), []
    try:
        while waiting or workers:
            while len(workers) < jobs:
                cell = next_cell(place, waiting, [w.cell for w in workers])
                if cell is None:
                    break
                waiting.remove(cell)
                workers.append(_start(place, cell))
            wait([w.process.sentinel for w in workers], timeout=1.0)
            for worker in workers:
                worker.read()
            over = [w for w in workers if not w.process.is_alive()]
            workers = [w for w in workers if w not in over]
            ended = [_end(place, worker) for worker in over]
            yield [w.state for w in workers], ended
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def next_cell(place: Place, waiting: Sequence[Cell], running: Sequence[Cell]) -> Cell | None:
    """The first that need not wait for what a running one is making for both; None for none."""
    making = {place.shared(cell) for cell in running} - {None}
    for cell in waiting:
        shared = place.shared(cell)
        if shared is None or shared not in making or shared.exists():
            return cell
    return None


def _start(place: Place, cell: Cell) -> _Worker:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(place, cell, sender), daemon=True)
    with _no_interrupt():  # Ctrl-C is for us, who end the workers
        process.start()
    sender.close()
    return _Worker(cell, process, receiver)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C waits; a process that is started here never gets it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(place: Place, worker: _Worker) -> dict[str, Any]:
    """What a worker that ended has written; a failure where it ended without a word."""
    worker.process.join()
    code = worker.process.exitcode
    worker.messages.close()
    path = record.cell_path(place.out, place.table, worker.cell)
    if code == 0 and path.is_file():
        return next(c for c in record.read_cells(place.out) if record.cell_of(c) == worker.cell)
    told = f"its process ended with code {code}"
    if code is not None and code < 0:
        told = f"its process was ended by signal {-code} (out of memory?)"
    seconds = time.monotonic() - worker.started
    return record.write_cell(place.out, place.table, worker.cell, error=told, seconds=seconds)


def _work(place: Place, cell: Cell, messages: Any) -> None:
    """The whole life of a worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    last = -_REPORT_EVERY

    def report(fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_EVERY:
            last = time.monotonic()
            with suppress(OSError):
                messages.send(float(fraction))

    compute(place, cell, report, fresh=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would go on beside the one of the next call."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# Time left ----------------------------------------------------------------------------------------


def seconds_left(
    waiting: Sequence[Cell],
    running: Sequence[Running],
    durations: Mapping[Cell, float],
    jobs: int,
) -> float | None:
    """Until the last cell ends, if ``jobs`` processes take the cells in order.

    A cell is thought to take what others of its row took, and those that run now are on the way
    to take; else what those of its method took; else what all took. None where nothing is known.
    """
    known = dict(durations)
    for r in running:
        if r.fraction > r.began:
            known[r.cell] = r.elapsed / (r.fraction - r.began)
    if not known:
        return None

    def expected(cell: Cell) -> float:
        kinds: tuple[Callable[[Cell], bool], ...] = (
            lambda c: c == cell,
            lambda c: (c.method, c.memory) == (cell.method, cell.memory),
            lambda c: c.method == cell.method,
            lambda c: True,
        )
        for kind in kinds:
            alike = [seconds for c, seconds in known.items() if kind(c)]
            if alike:
                return sum(alike) / len(alike)
        return 0.0

    ends = [expected(r.cell) * max(0.0, 1.0 - r.fraction) for r in running]
    ends += [0.0] * max(0, jobs - len(ends))
    heapq.heapify(ends)
    for cell in waiting:
        heapq.heappush(ends, heapq.heappop(ends) + expected(cell))
    return max(ends)

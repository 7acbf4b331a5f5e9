"""Rows that stay where they lie: a memory larger than RAM, read by threads ahead of the training.

A ``Source`` reads rows by place; ``Served`` are M such rows that a ``Memory`` holds as its inputs.
What will be drawn next is found by drawing it from a copy of the generator, and read meanwhile: the
draws are those of a memory in RAM, whatever was foreseen, and where the loop draws something
else from the same generator in between (its own shuffling, at the end of an epoch), that batch is
read when it is needed. So give the memory a generator of its own for every batch to be foreseen.
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from .models import Inputs, Unread, concat, move, rows, take

_GIVE_UP, _TRY_AGAIN = 4, 32  # draws that were foreseen wrongly in a row


class Source(Protocol):
    """Where rows lie."""

    def submit(self, places: Sequence[int], *, urgent: bool) -> Future[Inputs]:
        """The rows at those places in that order, read by another thread; urgent ones first."""
        ...

    def version(self) -> Any:
        """Another value whenever rows may have gone since."""
        ...


@dataclass(frozen=True, eq=False)
class Foreseen:
    """A draw to come: its index, and the part of it that is being read."""

    index: Tensor
    part: slice
    version: Any
    rows: _Gathered


class _Ahead:
    """What is being read before it is asked for. Not copied with the rows: it is made anew."""

    def __init__(self) -> None:
        self.queue: deque[Foreseen] = deque()
        self.current: Foreseen | None = None
        self.index: Tensor | None = None  # of the draw at hand, foreseen or not
        self.part = slice(None)  # of each draw that is asked for: a rank's, where there are several
        self.generator: torch.Generator | None = None
        self.hits = self.misses = 0
        self.wrong = 0  # in a row

    def __reduce__(self) -> Any:
        return _Ahead, ()

    def clear(self) -> None:
        for draw in self.queue:
            draw.rows.cancel()
        self.queue.clear()
        self.current = None


@dataclass(frozen=True, eq=False, repr=False)
class Served(Unread):
    """M rows of some sources, in any order.

    sources: what reads them, or inputs in RAM; source, place (M,) int64: which, and where in it;
    empty: no rows of the dtype and shape; ahead: draws that are read in advance.
    """

    sources: tuple[Any, ...]
    source: Tensor
    place: Tensor
    empty: Any
    ahead: int = 2
    _ahead: _Ahead = field(default_factory=_Ahead)

    def __repr__(self) -> str:
        return f"Served({len(self):,} rows of {len(self.sources)} sources)"

    def __len__(self) -> int:
        return len(self.place)

    @property
    def num_bytes(self) -> int:
        """Of all rows once they are read: a budget in bytes holds as many items on disk."""
        parts = [self.empty] if isinstance(self.empty, Tensor) else self.empty.values()
        return len(self) * sum(math.prod(x.shape[1:]) * x.element_size() for x in parts)

    @property
    def hits(self) -> int:
        """Draws that had been read in advance."""
        return self._ahead.hits

    def wait(self) -> None:
        """Until what is being read in advance is there."""
        for draw in self._ahead.queue:
            draw.rows.result()

    def __getitem__(self, index: Tensor | slice) -> Any:
        """Those rows, read now or in advance."""
        if isinstance(index, Tensor) and (found := self._foreseen(index)) is not None:
            return found
        return self._finish(self._submit(self._positions(index), urgent=True).result())

    def select(self, index: Tensor | slice) -> Served:
        at = self._positions(index)
        return replace(self, source=self.source[at], place=self.place[at], _ahead=_Ahead())

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Served:
        return replace(self, empty=move(self.empty, device, dtype), _ahead=_Ahead())

    def join(self, parts: Sequence[Any]) -> Served:
        sources: list[Any] = []
        source, place = [], []
        for part in parts:
            if isinstance(part, Served):
                which = torch.empty(len(part.sources), dtype=torch.int64)
                for i, each in enumerate(part.sources):
                    known = next((k for k, s in enumerate(sources) if s is each), len(sources))
                    if known == len(sources):
                        sources.append(each)
                    which[i] = known
                source.append(which[part.source])
                place.append(part.place)
            else:
                source.append(torch.full((rows(part),), len(sources)))
                place.append(torch.arange(rows(part)))
                sources.append(part)
        joined = (tuple(sources), torch.cat(source), torch.cat(place))
        return Served(*joined, self.empty, self.ahead)

    # ------------------------------------------------------------ ahead of time

    def foresee(
        self,
        index: Tensor,
        generator: torch.Generator | None,
        draw: Callable[[torch.Generator], Tensor | None],
    ) -> None:
        """``index`` was just drawn from the generator and will be asked for, all of it or a
        stretch; the draws that ``draw`` gives next are read meanwhile."""
        ahead, self._ahead.index = self._ahead, index
        if ahead.queue and torch.equal(ahead.queue[0].index, index):
            ahead.current, ahead.wrong = ahead.queue.popleft(), 0
        else:
            ahead.clear()
            ahead.wrong += 1
            drawn_from = torch.default_generator if generator is None else generator
            ahead.generator = drawn_from.clone_state()
        if ahead.wrong > _GIVE_UP and ahead.wrong % _TRY_AGAIN:
            return
        while len(ahead.queue) < self.ahead and ahead.generator is not None:
            following = draw(ahead.generator)
            if following is None:
                return
            ahead.queue.append(self._draw_to_come(following))

    def _draw_to_come(self, index: Tensor) -> Foreseen:
        part = self._ahead.part
        version = self._version()  # before it is read
        reading = self._submit(self._positions(index[part]), urgent=False)
        return Foreseen(index, part, version, reading)

    def _foreseen(self, index: Tensor) -> Inputs | None:
        """What was read in advance, where that is what is asked for and still there."""
        ahead = self._ahead
        (draw, ahead.current), (whole, ahead.index) = (ahead.current, None), (ahead.index, None)
        if draw is not None and torch.equal(draw.index[draw.part], index):
            if draw.version == self._version():
                ahead.hits += 1
                return self._finish(draw.rows.result())
        elif whole is not None:
            self._learn_part(whole, index)
        ahead.misses += 1
        return None

    def _learn_part(self, whole: Tensor, index: Tensor) -> None:
        """From the next draw on, read the stretch that was asked for of this one."""
        start = int(torch.searchsorted(whole, index[0])) if len(index) else 0
        part = slice(start, start + len(index))
        ahead = self._ahead
        if torch.equal(whole[part], index) and part != ahead.part and len(index) < len(whole):
            ahead.part = part
            coming = [draw.index for draw in ahead.queue]
            ahead.clear()
            ahead.queue.extend(self._draw_to_come(draw) for draw in coming)

    # ------------------------------------------------------------------ reading

    def _version(self) -> tuple[Any, ...]:
        return tuple(s.version() for s in self.sources if _is_source(s))

    def _positions(self, index: Tensor | slice) -> Tensor:
        if isinstance(index, slice):
            return torch.arange(len(self))[index]
        index = index.cpu()
        return index.nonzero().squeeze(1) if index.dtype == torch.bool else index

    def _submit(self, at: Tensor, *, urgent: bool) -> _Gathered:
        if not len(at):
            return _Gathered([], None)
        source, place = self.source[at], self.place[at]
        parts, order = [], []
        for k in source.unique().tolist():
            here = (source == k).nonzero().squeeze(1)
            order.append(here)
            origin, wanted = self.sources[k], place[here]
            if _is_source(origin):
                parts.append(origin.submit(wanted.tolist(), urgent=urgent))
            else:
                parts.append(take(origin, wanted.to(_device(origin))))
        return _Gathered(parts, None if len(parts) == 1 else torch.cat(order))

    def _finish(self, found: Inputs | None) -> Inputs:
        """On the device, in the dtype, that these rows are of."""
        if found is None:
            return self.empty
        if isinstance(self.empty, dict):
            return {k: _as(v, found[k]) for k, v in self.empty.items()}  # type: ignore[call-overload]
        return _as(self.empty, found)  # type: ignore[arg-type]


class _Gathered:
    """Rows that are on their way from several sources, as one future."""

    def __init__(self, parts: list[Any], order: Tensor | None) -> None:
        self.parts, self.order = parts, order

    def result(self) -> Any:
        read = [p.result() if isinstance(p, Future) else p for p in self.parts]
        if not read:
            return None
        if self.order is None:
            return read[0]
        together = concat([move(part, "cpu") for part in read])
        return take(together, self.order.argsort())

    def cancel(self) -> None:
        for part in self.parts:
            if isinstance(part, Future):
                part.cancel()


def _is_source(origin: Any) -> bool:
    return callable(getattr(origin, "submit", None))


def _as(like: Tensor, found: Tensor) -> Tensor:
    dtype = like.dtype if found.is_floating_point() else None
    return found.to(device=like.device, dtype=dtype)


def _device(inputs: Inputs) -> torch.device:
    return next(iter(inputs.values())).device if not isinstance(inputs, Tensor) else inputs.device


# ------------------------------------------------------------------------ threads


class Reading:
    """Threads that each open something to read from, and read what they are asked for.

    open: called in the thread, where it will be closed too (a database's connection belongs to
    one thread). They end when this object is let go, and start again after a fork.
    """

    def __init__(self, open: Callable[[], Any], workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"reading needs at least one worker, got workers={workers}")
        self._open, self.workers = open, workers
        self._jobs: _Jobs | None = None
        self._pid = 0

    def __reduce__(self) -> Any:
        return Reading, (self._open, self.workers)

    def submit(self, work: Callable[[Any], Any], *, urgent: bool = False) -> Future[Any]:
        """``work(opened)`` in one of the threads; what it or opening raises is the result's."""
        if self._jobs is None or self._pid != os.getpid():
            self._jobs, self._pid = _Jobs(), os.getpid()
            for _ in range(self.workers):
                target = (self._jobs, self._open)
                threading.Thread(target=_read, args=target, daemon=True).start()
            weakref.finalize(self, self._jobs.end)
        return self._jobs.put(work, urgent)


class _Jobs:
    """A queue whose urgent jobs come first."""

    def __init__(self) -> None:
        self._heap: list[Any] = []
        self._number = count()
        self._change = threading.Condition()
        self._ended = False

    def put(self, work: Callable[[Any], Any], urgent: bool) -> Future[Any]:
        future: Future[Any] = Future()
        with self._change:
            heapq.heappush(self._heap, (not urgent, next(self._number), work, future))
            self._change.notify()
        return future

    def get(self) -> Any:
        """The next job; None at the end."""
        with self._change:
            while not self._heap and not self._ended:
                self._change.wait()
            return heapq.heappop(self._heap) if self._heap else None

    def end(self) -> None:
        with self._change:
            self._ended = True
            self._change.notify_all()


def _read(jobs: _Jobs, open: Callable[[], Any]) -> None:
    opened = None
    try:
        while (job := jobs.get()) is not None:
            _, _, work, future = job
            if future.set_running_or_notify_cancel():
                try:
                    opened = open() if opened is None else opened
                    future.set_result(work(opened))
                except BaseException as error:
                    future.set_exception(error)
            del job, work, future
    finally:
        if opened is not None and hasattr(opened, "close"):
            opened.close()

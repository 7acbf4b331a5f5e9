r"""Memory: the few past examples that are kept, and what the model believed about them.

An item's two weights say how many past examples it stands for, and how it carries them: with
``soft_weight`` by the divergence to its soft label (*function*), with ``hard_weight`` by the nll
of its true label (*replay*). Experience replay is (0, N/M), a K-prior (1, 0), EWC+FR+Replay
(1, 0) for half of the items and (0, 1) for the others, DER++ (alpha, beta), and a blended label
(1 - b, b), all in the one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from . import curve, select
from .budget import Bytes, Fidelity, Given, parse
from .data import (
    BATCH_SIZE,
    Batch,
    Data,
    Head,
    Shard,
    among,
    batches,
    every_id,
    every_label,
    head_mask,
    head_of,
    num_examples,
    num_known,
)
from .distributed import Ranks
from .likelihoods import Likelihood
from .models import (
    Inputs,
    Params,
    concat,
    device_of,
    evaluating,
    forward,
    move,
    nbytes,
    read,
    require_finite,
    rows,
    take,
)
from .models import select as select_rows
from .notebook import table
from .scores import Score, outputs, score_batch
from .serving import Served
from .top_outputs import TopOutputs


@dataclass(frozen=True, eq=False, repr=False)
class Memory:
    """M remembered examples. Frozen: every change makes a new one.

    inputs (M, ...) or a dict of such, or ``Served`` from a disk; labels (M,) or (M, C);
    reference (M, C): the model's outputs f* when it was last asked, before any mask, or
    ``TopOutputs``, the largest of them; ``outputs`` is either as a tensor;
    soft_weight, hard_weight (M,): past examples that each stands for, by soft and by true label;
    task, origin (M,) int64: from which task, under which id there; head (M,) int64: index into
    ``heads``, the class sets (None: all outputs compete).
    """

    inputs: Inputs
    labels: Tensor
    reference: Tensor | TopOutputs
    soft_weight: Tensor
    hard_weight: Tensor
    task: Tensor
    origin: Tensor
    head: Tensor
    heads: tuple[Head | None, ...] = (None,)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Memory({len(self):,} examples, {self.num_bytes:,} bytes)"

    def _repr_html_(self) -> str:
        tasks, counts = self.task.unique(return_counts=True)
        each = ", ".join(f"{int(t) + 1}: {int(n):,}" for t, n in zip(tasks, counts, strict=True))
        stands = f"{self.soft_weight.sum():,.0f} by soft, {self.hard_weight.sum():,.0f} by true"
        rows = [
            ("examples", f"{len(self):,}"),
            ("bytes", f"{self.num_bytes:,}"),
            ("of each task", each if len(tasks) <= 20 else f"{len(tasks)} tasks"),
            ("stand for", f"{stands} labels"),
        ]
        return table("Memory", rows)

    def __getitem__(self, index: Tensor | slice) -> Memory:
        """The items ``index``, in that order."""
        rows_of = {name: select_rows(getattr(self, name), index) for name in _ROWS}
        return replace(self, **rows_of)  # type: ignore[arg-type]

    @property
    def num_bytes(self) -> int:
        """Bytes held: inputs, labels, beliefs and bookkeeping."""
        return sum(nbytes(getattr(self, name)) for name in _ROWS)

    def add(self, *others: Memory) -> Memory:
        """All the items, this memory's first; heads are merged."""
        if not others:
            return self
        k = max((m.reference.k for m in (self, *others) if is_top(m.reference)), default=None)
        heads = tuple(dict.fromkeys(h for m in (self, *others) for h in m.heads))
        parts = []
        for m in (self, *others):
            index = torch.tensor([heads.index(h) for h in m.heads], device=m.head.device)
            parts.append(replace(m.with_top(k), head=index[m.head]))
        merged: dict[str, Any] = {
            name: concat([getattr(part, name) for part in parts]) for name in _ROWS
        }
        return Memory(**merged, heads=heads)

    def drop(self, which: Tensor) -> Memory:
        """Without the items marked True in ``which`` (M,) bool."""
        return self[(~which).nonzero().squeeze(1)]

    def refresh(self, model: nn.Module, batch_size: int = BATCH_SIZE) -> Memory:
        """The same items with the beliefs of the present model, read in eval mode."""
        f = reference_outputs(model, self.inputs, batch_size)
        top = self.reference
        return replace(self, reference=top.like(f, self.mask) if is_top(top) else f)

    @property
    def outputs(self) -> Tensor:
        """f* (M, C) as a tensor."""
        return read(self.reference)

    @property
    def is_whole(self) -> bool:
        """Whether the soft labels are all that the model said."""
        return not is_top(self.reference)

    def with_top(self, k: int | None) -> Memory:
        """Of the outputs of each item the k largest that compete, and one number for the others
        (``top_outputs.TopOutputs``); None keeps them as they are."""
        if k is None or (is_top(self.reference) and self.reference.k == k):
            return self
        return replace(self, reference=TopOutputs.of(self.outputs, k, self.mask))

    @cached_property
    def head_masks(self) -> Tensor | None:
        """(len(heads), C) bool, or None where no item has a head: what ``mask`` gathers from."""
        if all(h is None for h in self.heads):
            return None
        num_outputs = self.reference.shape[1]
        full = torch.ones(num_outputs, dtype=torch.bool)
        masks = [head_mask(h, num_outputs) for h in self.heads]
        return torch.stack([full if m is None else m for m in masks]).to(self.head.device)

    @property
    def mask(self) -> Tensor | None:
        """(M, C) bool: which outputs compete for each item; None where all do."""
        return None if self.head_masks is None else self.head_masks[self.head]

    def draw(self, n: int | None, generator: torch.Generator | None = None) -> Memory:
        """n items whose weights make every weighted sum over them unbiased; None draws all.

        Stratified: the items in order are cut into n equal stretches and one is drawn from each,
        so a draw is spread evenly over tasks and classes. Cost n, whatever the size of memory.
        """
        index = self._drawn(n, generator)
        if index is None:
            return self
        drawn = self[index].scaled(len(self) / len(index))
        return replace(drawn, inputs=read(drawn.inputs))

    def sample(self, n: int | None, generator: torch.Generator | None = None) -> Memory | Sample:
        """As ``draw``, but each column is copied only when it is asked for."""
        index = self._drawn(n, generator)
        if index is not None and isinstance(self.inputs, Served):
            self.inputs.foresee(index, generator, lambda g: self._drawn(n, g))
        return self if index is None else Sample(self, index, len(self) / len(index))

    def part(self, rank: int, size: int) -> Memory:
        """The stretch of the items that is rank's of ``size`` ranks, each item believed ``size``
        times as much: the mean over the ranks of a weighted sum is that over all items."""
        return self[_stretch(len(self), rank, size)].scaled(size)

    def _drawn(self, n: int | None, generator: torch.Generator | None) -> Tensor | None:
        """(n,) int64; None for all."""
        m = len(self)
        if n is None or n >= m:
            return None
        if n < 1:
            raise ValueError(f"a memory batch needs at least one item, got batch_size={n}")
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        places = torch.arange(n, dtype=torch.float64).add_(u).mul_(m / n)
        return places.long().clamp_(max=m - 1).to(self.labels.device)

    def spread(self, rank: int, size: int) -> Memory:
        """Every ``size``-th item from ``rank`` on, believed ``size`` times as much: what is left on
        one of ``size`` ranks, so that the mean over the ranks is that of all."""
        return self[torch.arange(len(self), device=self.labels.device)[rank::size]].scaled(size)

    @classmethod
    def joined(cls, parts: Sequence[Memory]) -> Memory:
        """The memory whose ``spread`` the parts are, in the order of ranks."""
        size, count = len(parts), sum(len(part) for part in parts)
        both = parts[0].add(*parts[1:])
        place = torch.cat([torch.arange(count)[rank::size] for rank in range(size)])
        return both[place.argsort().to(both.labels.device)].scaled(1 / size)

    def collected(self, ranks: Ranks) -> Memory:
        """``joined``, of the parts that the ranks hold; on every rank."""
        counts = ranks.objects(len(self))
        top = self.reference
        held = {name: getattr(self, name) for name in _ROWS}
        if is_top(top):
            held["reference"] = top.columns
        columns = {name: ranks.gather_each(value) for name, value in held.items()}
        if is_top(top):
            columns["reference"] = TopOutputs(**columns["reference"], width=top.width)
        every = replace(self, **columns)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return Memory.joined([every[slice(a, a + n)] for a, n in zip(starts, counts, strict=True)])

    def scaled(self, factor: float) -> Memory:
        """The same items, believed ``factor`` times as much."""
        return self.weighted(self.soft_weight * factor, self.hard_weight * factor)

    def weighted(self, soft: Tensor | float, hard: Tensor | float) -> Memory:
        """The same items with other weights, (M,) each or one number for all."""
        like = self.soft_weight
        # Contiguous, as a file gives them back: a dot product of a stride of 0 sums otherwise.
        soft, hard = (
            torch.as_tensor(w, dtype=like.dtype, device=like.device).expand_as(like).contiguous()
            for w in (soft, hard)
        )
        return replace(self, soft_weight=soft, hard_weight=hard)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Memory:
        """On another device; ``dtype`` changes inputs, beliefs and weights, not labels."""
        return replace(self, **{name: move(getattr(self, name), device, dtype) for name in _ROWS})

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and plain values, as ``checkpoint.save`` takes it; inputs that
        are served from a disk are read."""
        state: dict[str, Any] = {name: read(getattr(self, name)) for name in _ROWS}
        if isinstance(self.inputs, Mapping):
            state["inputs"] = dict(self.inputs)
        if is_top(self.reference):
            state["reference"] = self.reference.state_dict()
        return {**state, "heads": [None if h is None else list(h) for h in self.heads]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Memory:
        heads = tuple(None if h is None else tuple(h) for h in state["heads"])
        columns = {name: state[name] for name in _ROWS}
        if isinstance(columns["reference"], Mapping):
            columns["reference"] = TopOutputs.from_state_dict(columns["reference"])
        return cls(**columns, heads=heads)


@dataclass(frozen=True, eq=False)
class Sample:
    """The rows ``index`` of a memory as a loss needs them: of eight columns it reads three or four.

    soft_weight and hard_weight times ``scale``: weighted sums are then unbiased for all of memory.
    """

    memory: Memory
    index: Tensor
    scale: float

    def __len__(self) -> int:
        return len(self.index)

    def part(self, rank: int, size: int) -> Sample:
        """As ``Memory.part``."""
        index = self.index[_stretch(len(self.index), rank, size)]
        return replace(self, index=index, scale=self.scale * size)

    @cached_property
    def inputs(self) -> Inputs:
        return take(self.memory.inputs, self.index)

    @property
    def labels(self) -> Tensor:
        return self.memory.labels.index_select(0, self.index)

    @property
    def reference(self) -> Tensor:
        return take(self.memory.reference, self.index)  # type: ignore[return-value, arg-type]

    @property
    def head(self) -> Tensor:
        return self.memory.head.index_select(0, self.index)

    @property
    def soft_weight(self) -> Tensor:
        return self.memory.soft_weight.index_select(0, self.index) * self.scale

    @property
    def hard_weight(self) -> Tensor:
        return self.memory.hard_weight.index_select(0, self.index) * self.scale


def _stretch(n: int, rank: int, size: int) -> slice:
    return slice(n * rank // size, n * (rank + 1) // size)


_ROWS = tuple(field.name for field in fields(Memory) if field.name != "heads")


def is_top(reference: Tensor | TopOutputs) -> TypeGuard[TopOutputs]:
    return isinstance(reference, TopOutputs)


def reference_outputs(model: nn.Module, inputs: Inputs, batch_size: int = BATCH_SIZE) -> Tensor:
    """f (N, C) in eval mode and without gradients, a batch at a time."""
    with evaluating(model), torch.no_grad():
        parts = [
            forward(model, move(take(inputs, slice(i, i + batch_size)), device_of(model)))
            for i in range(0, rows(inputs), batch_size)
        ]
    f = torch.cat(parts)
    return f.float() if f.dtype in (torch.bfloat16, torch.float16) else f


def remember(batch: Batch, f: Tensor, *, head: Head | None = None, task: int = 0) -> Memory:
    """Every example of a batch as an item that stands for itself by its soft label."""
    n = len(batch.labels)
    device = batch.labels.device
    floating = f.detach()
    return Memory(
        inputs=batch.inputs,
        labels=batch.labels,
        reference=floating,
        soft_weight=torch.ones(n, dtype=floating.dtype, device=device),
        hard_weight=torch.zeros(n, dtype=floating.dtype, device=device),
        task=torch.full((n,), task, dtype=torch.int64, device=device),
        origin=batch.ids.to(device),
        head=torch.zeros(n, dtype=torch.int64, device=device),
        heads=(head,),
    )


def memorise(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    budget: Given | None = None,
    ids: Tensor | None = None,
    score: Score | str = "lambda",
    per_class: bool = True,
    descending: bool = True,
    head: Head | None = None,
    task: int = 0,
    variance: Params | None = None,
    carry: curve.Carry | None = None,
    top_outputs: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH_SIZE,
) -> Memory:
    """Score every example, keep some of them, in one pass whose memory does not grow.

    budget: how many; or "20MB": as many as fit, counted as ``Memory.num_bytes`` counts; or
    ``Fidelity(0.95)``: as few as reach it, by a second reading (``curve.py``) in which the items
    and the rest are carried as ``carry`` says, by default items by themselves and the rest not at
    all; None keeps all. ids: keep just these instead of scoring. score: see
    ``identify``, or "k_centre" (farthest outputs first; holds all outputs, two passes).
    per_class: spread evenly over the classes of integer labels. descending: False keeps the
    lowest scores. The items come back sorted by label and then score, so that ``draw`` spreads
    over the classes. top_outputs: as ``Memory.with_top``; bytes are then those of what is kept.

    Raises ValueError where a number exceeds that of the examples, bytes hold not one of them, or no
    memory reaches the fidelity; for ids that are not in the data, and as ``identify`` does.
    """
    head = head_of(data, head)
    passing = _Pass(model, data, likelihood, head, task, batch_size, top_outputs)
    size = parse(budget)
    if isinstance(data, Shard):
        over = _Choice(size, score, per_class, descending, variance, generator)
        return _of_all_ranks(passing, over, None if ids is None else torch.as_tensor(ids))
    # At random nothing but the labels is needed until it is known who stays.
    asks = score != "random"
    if ids is None and isinstance(size, Fidelity):
        probed = curve.probe(
            model,
            data,
            likelihood,
            carry,
            score=score,
            per_class=per_class,
            descending=descending,
            head=head,
            variance=variance,
            generator=generator,
            batch_size=batch_size,
        )
        return _at(passing, probed.chosen(probed.smallest(size.target)))
    if isinstance(size, Bytes):
        size = min(size.items(_bytes_of_one(passing) or 0), num_examples(data))
    if isinstance(size, Fidelity):  # of ids that were named
        size = None
    if ids is None and score == "k_centre":
        ids = _k_centre_ids(passing, size)
    if ids is None and size is not None:
        _require_enough(size, num_known(data))
    if ids is not None or size is None:
        return _gather(passing, None if ids is None else torch.as_tensor(ids))

    def classes(labels: Tensor) -> Tensor | None:
        balanced = per_class and labels.ndim == 1 and not labels.is_floating_point()
        return labels if balanced else None

    pool: _Pool | None = None
    bar: select.Bar | None = None
    since = 0  # newcomers after the bar was set
    for group in _groups(replace(passing, asks=asks), score, variance, generator):
        labels = classes(group.labels)
        # Only newcomers that could be chosen are copied out of their batches.
        if bar is None:
            rows_ = select.candidates(group.keys, labels, size, descending=descending)
        else:
            rows_ = select.passing(group.keys, labels, bar, descending=descending)
        if len(rows_) == 0:
            continue
        newcomers = group.take(rows_)
        pool, since = (
            newcomers if pool is None else _together([pool, newcomers]),
            since + len(rows_),
        )
        if len(pool.keys) > 4 * size:  # seldom, since it copies every row that stays
            labels = classes(pool.labels)
            pool = pool.take(select.candidates(pool.keys, labels, size, descending=descending))
        if since >= size // 2:
            labels, since = classes(pool.labels), 0
            bar = select.bar(pool.keys, labels, size, descending=descending)
    if pool is None:  # batches() raises before; this tells the type checker so
        raise ValueError("the data hold no examples")
    _require_enough(size, len(pool.keys))  # of data whose number was not known
    labels = classes(pool.labels)
    if labels is None:
        chosen = select.top_k(pool.keys, size, descending=descending)
    else:
        chosen = select.per_class(pool.keys, labels, size, descending=descending)
        chosen = chosen[torch.sort(labels[chosen], stable=True).indices]
    batch, f = pool.joined(chosen)
    if not asks:
        with evaluating(model):
            parts = [batch.rows(slice(i, i + batch_size)) for i in range(0, size, batch_size)]
            f = torch.cat([outputs(model, part, likelihood, None) for part in parts])
    return passing.items(batch, f)


def _require_enough(size: int, available: int | None) -> None:
    if available is not None and size > available > 0:  # of no data at all ``batches`` tells
        raise ValueError(
            f"a memory of {size} examples was asked for, but the task has {available}; "
            f"pass memory={available} or less"
        )


_GROUP = 8 * 2**20  # bytes of inputs that are held until one selection is made among them


class _Pool(NamedTuple):
    """Scored examples: inputs batch by batch, for they are large, the rest in one piece each."""

    inputs: list[Inputs]
    keys: Tensor  # (K,)
    labels: Tensor
    ids: Tensor
    f: Tensor  # (K, C)

    def take(self, index: Tensor) -> _Pool:
        """Those rows alone, copied; ``index`` ascends."""
        ends = torch.tensor([rows(x) for x in self.inputs]).cumsum(0)
        cuts = [0, *torch.searchsorted(index.cpu(), ends).tolist()]
        starts = [0, *ends.tolist()]
        inputs = [
            take(x, index[cuts[i] : cuts[i + 1]] - starts[i])
            for i, x in enumerate(self.inputs)
            if cuts[i + 1] > cuts[i]
        ]
        return _Pool(inputs, *(take(column, index) for column in self[1:]))  # type: ignore[arg-type]

    def joined(self, index: Tensor) -> tuple[Batch, Tensor]:
        """Those rows in that order, in one batch, and their outputs."""
        return Batch(concat(self.inputs), self.labels, self.ids).rows(index), self.f[index]


def _groups(
    passing: _Pass,
    score: Score | str,
    variance: Params | None,
    generator: torch.Generator | None,
) -> Iterator[_Pool]:
    """The scored data, a few batches at a time: so many as ``_GROUP`` lets."""
    group: list[_Pool] = []
    held = 0
    for batch, f, mask in passing:
        keys = score_batch(
            score,  # type: ignore[arg-type]
            passing.model,
            batch,
            passing.likelihood.mask(f, mask),
            passing.likelihood,
            mask=mask,
            variance=variance,
            generator=generator,
        )
        keys = keys.detach().to(batch.labels.device)  # random ones are where the generator is
        group.append(_Pool([batch.inputs], keys, batch.labels, batch.ids, f))
        held += nbytes(batch.inputs)
        if held > _GROUP:
            yield _together(group)
            group, held = [], 0
    if group:
        yield _together(group)


def _together(pools: list[_Pool]) -> _Pool:
    inputs, *columns = zip(*pools, strict=True)
    return _Pool([x for some in inputs for x in some], *(torch.cat(c) for c in columns))


@dataclass(frozen=True, eq=False)
class _Pass:
    """One pass over data: (batch, outputs before the mask, mask) in eval mode, checked. ``asks``:
    of every example; else of the first one, whose outputs stand for all, and labels alone are
    checked."""

    model: nn.Module
    data: Data
    likelihood: Likelihood
    head: Head | None
    task: int
    batch_size: int
    top: int | None = None
    asks: bool = True

    def __iter__(self) -> Iterator[tuple[Batch, Tensor, Tensor | None]]:
        device = device_of(self.model)
        first: Tensor | None = None
        with evaluating(self.model):
            for batch in batches(self.data, self.batch_size):
                batch = batch.to(device)
                # The number of outputs is known only after a forward.
                if self.asks:
                    f = outputs(self.model, batch, self.likelihood, None)
                else:
                    _require_finite_inputs(batch.inputs)
                    if first is None:
                        with torch.no_grad():
                            first = forward(self.model, take(batch.inputs, slice(0, 1)))
                    f = first.expand(len(batch.labels), *first.shape[1:])
                    self.likelihood.validate(f, batch.labels, None)
                mask = head_mask(self.head, f.shape[1], f.device)
                if mask is not None:
                    self.likelihood.validate(f, batch.labels, mask)
                yield batch, f, mask

    def items(self, batch: Batch, f: Tensor) -> Memory:
        return remember(batch, f, head=self.head, task=self.task).with_top(self.top)


def _require_finite_inputs(inputs: Inputs) -> None:
    for part in inputs.values() if isinstance(inputs, Mapping) else (inputs,):
        require_finite(part, "an input, and so the model's output,")


def _gather(passing: _Pass, ids: Tensor | None) -> Memory:
    """Every example, or those with the given ids."""
    parts = []
    wanted = None if ids is None else ids.sort().values
    for batch, f, _ in passing:
        index = slice(None) if wanted is None else among(batch.ids, wanted).nonzero().squeeze(1)
        parts.append(passing.items(batch.rows(index), f[index]))
    found = parts[0].add(*parts[1:])
    if ids is not None:
        missing = ids[~torch.isin(ids, found.origin.to(ids.device))]
        if len(missing):
            raise ValueError(f"ids {missing[:10].tolist()} are not in the data")
    return found


class _Choice(NamedTuple):
    """How items are chosen: the arguments of ``memorise``."""

    size: Any
    score: Score | str
    per_class: bool
    descending: bool
    variance: Params | None
    generator: torch.Generator | None


def _of_all_ranks(passing: _Pass, by: _Choice, ids: Tensor | None) -> Memory:
    """The memory that one process would choose from the examples of all ranks; all of it on each.

    Scores and labels of all examples are gathered, of inputs those that stay alone.
    """
    data: Any = passing.data
    if isinstance(by.size, Fidelity):
        raise ValueError(
            f"over several ranks a memory is a number of examples, or bytes; got memory={by.size}"
        )
    every = every_id(data)
    if len(every.unique()) != len(every):
        raise ValueError("two examples on some ranks have one id; leave ids to shard()")
    if isinstance(by.size, Bytes):
        each = data.ranks.objects(_bytes_of_one(passing))
        fit = by.size.items(next(n for n in each if n is not None))
        by = by._replace(size=min(fit, len(every)))
    if ids is None and by.score == "k_centre":
        ids = _k_centre_ids(passing, by.size)
    if ids is not None:
        missing = ids[~torch.isin(ids, every)]
        if len(missing):
            raise ValueError(f"ids {missing[:10].tolist()} are not in the data of any rank")
        wanted = every[torch.isin(every, ids)]
    elif by.size is None:
        wanted = every
    else:
        _require_enough(by.size, len(every))
        wanted = every[_chosen_positions(passing, by, len(every))]
    parts = []
    ordered = wanted.sort().values
    for batch, f, _ in passing:
        index = among(batch.ids, ordered).nonzero().squeeze(1)
        if len(index):
            parts.append(replace(passing, top=None).items(batch.rows(index), f[index]))
    mine = parts[0].add(*parts[1:]) if parts else None
    heads = (passing.head,)
    columns = {
        name: data.ranks.gather_each(None if mine is None else getattr(mine, name))
        for name in _ROWS
    }
    found = Memory(**columns, heads=heads)
    found = found[found.origin.argsort()]
    return found[wanted.argsort().argsort()].with_top(passing.top)


def _chosen_positions(passing: _Pass, by: _Choice, count: int) -> Tensor:
    """Positions among the examples of all ranks, in the order in which ``memorise`` has them."""
    data: Any = passing.data
    if by.score == "random":
        keys = torch.rand(count, generator=by.generator, dtype=torch.float64)
    else:
        mine = [pool.keys for pool in _groups(passing, by.score, by.variance, by.generator)]
        keys = data.ranks.gather(torch.cat(mine) if mine else None)
    labels = every_label(data)
    if not (by.per_class and labels.ndim == 1 and not labels.is_floating_point()):
        return select.top_k(keys, by.size, descending=by.descending)
    chosen = select.per_class(keys, labels, by.size, descending=by.descending)
    return chosen[torch.sort(labels[chosen], stable=True).indices]


def _at(passing: _Pass, positions: Tensor) -> Memory:
    """The examples at those positions, sorted by label and then in the order of ``positions``."""
    parts, start = [], 0
    for batch, f, _ in passing:
        n = len(batch.labels)
        here = positions[(positions >= start) & (positions < start + n)] - start
        index = here.sort().values.to(batch.labels.device)
        parts.append(passing.items(batch.rows(index), f[index]))
        start += n
    found = parts[0].add(*parts[1:])[positions.argsort().argsort()]
    if found.labels.ndim == 1 and not found.labels.is_floating_point():
        found = found[torch.sort(found.labels, stable=True).indices]
    return found


def _bytes_of_one(passing: _Pass) -> int | None:
    """What one item takes, with all that it stores; None of a rank that has no example."""
    for batch, f, _ in passing:
        one = slice(0, 1)
        return passing.items(batch.rows(one), f[one]).num_bytes
    return None


def _k_centre_ids(passing: _Pass, size: int | None) -> Tensor:
    """Of the examples whose outputs are farthest from each other, of all ranks."""
    data = passing.data
    with evaluating(passing.model), torch.no_grad():
        parts = [
            forward(passing.model, move(batch.inputs, device_of(passing.model)))
            for batch in batches(data, passing.batch_size)
        ]
    own = torch.cat(parts) if parts else None
    features = data.ranks.gather(own) if isinstance(data, Shard) else own
    if features is None:  # batches() raises before; this tells the type checker so
        raise ValueError("the data hold no examples")
    chosen = select.k_centre(features, len(features) if size is None else size)
    return every_id(data)[chosen]

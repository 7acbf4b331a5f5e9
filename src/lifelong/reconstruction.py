r"""Fidelity: how well a prior gives the gradient of the past back, measured before it is needed.

With P(theta) the summed nll of the past, K(theta) the prior without its regulariser (both sides
share it), theta* the anchor and d = theta - theta*:

    change    c(theta) = ∇P(theta) - ∇P(theta*)       what must be known of the past beyond theta*
    error     e(theta) = ∇K(theta) - ∇P(theta)
    fidelity  1 - rms‖e‖ / rms‖c‖                     over some weights theta, ‖v‖² = vᵀ Sigma v

1 is the past itself. 0 is as good as the past's gradient at theta* and nothing else, since then
e = -c; below 0 it is worse than that. The total gradient of past and regulariser is 0 at a minimum,
so that nothing can be relative to it there; how much it changes is a scale that never vanishes.

Where the model is linear (a GLM) and its items stand for themselves, e = -E d near theta*, with
E the GGN of the forgotten examples and G that of all, so that over d ~ N(0, Sigma)

    fidelity = 1 - ‖Sigma^½ E Sigma^½‖ / ‖Sigma^½ G Sigma^½‖   (Frobenius norms):

a memory of exchangeable examples has the fidelity that is its share of them. A full memory has 1:
Khan & Swaroop 2021. Sigma is the covariance of the weights: the numbers do not change with the
scale of a weight, and each direction counts by how much the data leave it open.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import hooks, recall
from .curvature import Curvature, diagonal_curvature
from .curve import PROBES, SCALE, Curve, probe, require_scale
from .data import BATCH_SIZE, Batch, Data, Examples, Head, batches, head_of, require_repeatable
from .jacobians import gradient as data_gradient
from .likelihoods import Categorical, Likelihood
from .models import Params, concat, device_of, evaluating, forward, parameters, snapshot
from .notebook import table
from .posterior import Posterior
from .predictive import holding
from .prior import Prior
from .recall import Pass
from .terms import MemoryTerm, WeightTerm, is_belief

Norm = Literal["posterior", "euclidean"]
Interval = tuple[float, float]
_CHUNKS = 100  # pieces of the sample that are resampled


@dataclass(frozen=True)
class Agreement:
    """The prior's gradient beside the past's, over some weights.

    fidelity: 1 - relative_error; interval: of the fidelity, None where all of the past was read.
    relative_error: rms error / rms change. cosine: between the change of the gradient that the
    prior gives and the true one. error, change: the two, root mean square, in the norm chosen.
    missed: nats by which the prior is too low at these weights, on average: what the past would
    have charged for going there, and the prior does not (½ <d, e(theta*) + e(theta)>, the trapezoid
    rule, exact for quadratics). charged: the past's own charge, by the same rule.
    points: the fidelity at each of the weights alone.
    """

    fidelity: float
    relative_error: float
    cosine: float
    error: float
    change: float
    missed: float
    charged: float
    interval: Interval | None = None
    points: tuple[float, ...] = ()


@dataclass(frozen=True)
class AtAnchor:
    """e(theta*) beside ∇P(theta*): norms, their ratio (NaN where ∇P is 0), and the cosine."""

    error: float
    gradient: float
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class Share:
    """Of the push with which a group of examples resists a move, how much the prior gives.

    value: sum <c + e, c_group> / sum <c, c_group> over the weights, with c_group the change of the
    group's own gradient: 1 exact, 0 nothing, above 1 too much.
    """

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class FidelityReport:
    """What ``fidelity`` found.

    anchor: (a) at theta*, of all examples. samples: (b) at posterior samples. path: (c) along
    weights that were given. tasks, classes: by position and label, over the samples (over the path
    where there are none). num_examples: that were read at the other weights, of num_data.
    """

    anchor: AtAnchor
    samples: Agreement | None
    path: Agreement | None
    tasks: Mapping[int, Share] = field(default_factory=dict)
    classes: Mapping[int, Share] = field(default_factory=dict)
    strata: tuple[Share, ...] = ()
    num_examples: int = 0
    num_data: int = 0

    @property
    def fidelity(self) -> float:
        """At the samples; along the path where there are none."""
        found = self.samples or self.path
        return float("nan") if found is None else found.fidelity

    def _repr_html_(self) -> str:
        rows: list[tuple[str, ...]] = [
            (name, *_told(found).split(", ", 1))
            for name, found in (("posterior samples", self.samples), ("path", self.path))
            if found is not None
        ]
        rows.append(("anchor", f"error {self.anchor.error:.3g}",
                     f"beside a gradient of {self.anchor.gradient:.3g}"))  # fmt: skip
        for name, shares in (("task", self.tasks), ("class", self.classes)):
            rows += [(f"{name} {key}", f"{share.value:.2f}", "") for key, share in shares.items()]
        title = f"Fidelity of {self.num_data:,} examples, {self.num_examples:,} read"
        return table(title, rows)

    def __str__(self) -> str:
        lines = [f"fidelity of {self.num_data:,} examples, {self.num_examples:,} read"]
        for name, found in (("posterior samples", self.samples), ("path", self.path)):
            if found is not None:
                lines.append(f"  {name}: {_told(found)}")
        at = self.anchor
        lines.append(f"  anchor: error {at.error:.3g} beside a gradient of {at.gradient:.3g}")
        for name, shares in (("task", self.tasks), ("class", self.classes)):
            if shares:
                each = ", ".join(f"{key}: {share.value:.2f}" for key, share in shares.items())
                lines.append(f"  share by {name}: {each}")
        return "\n".join(lines)


def _told(found: Agreement) -> str:
    low_high = "" if found.interval is None else " ({:.3f} to {:.3f})".format(*found.interval)
    return f"{found.fidelity:.3f}{low_high}, cosine {found.cosine:.3f}"


class Trail:
    """Weights along an adaptation, copied at every ``every``-th call.

    Whatever it is called with is ignored, so that it is a callback of ``Learner.fit``
    (``on_epoch=trail``), a hook (``optimizer.register_step_post_hook(trail)``) or a call in a loop.
    Raises ValueError for ``every`` below 1.
    """

    def __init__(self, model: nn.Module, *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.model, self.every, self.calls = model, every, 0
        self.weights: list[Params] = []

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            self.weights.append(snapshot(parameters(self.model)))


def rehearse(
    prior: Prior,
    model: nn.Module,
    past: Data | Sequence[Data],
    *,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    steps: int = 60,
    every: int = 60,
    num_examples: int = 300,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> list[Params]:
    """Weights along an imagined adaptation: a path for ``fidelity`` before there is a real one.

    A copy of the model learns, under the prior, an imagined task: inputs of the past whose features
    are shuffled by one permutation, with labels that are shuffled too (one permutation of the
    classes that may occur: those in no head of the past where there are two of them, else all
    outputs; other labels change places among the examples). No real task is used. The weights
    after each ``every`` of ``steps`` steps; the model is left alone.

    optimizer: makes one, best the one that the real task will be trained with; Adam by default.
    A draw of about ``num_examples`` of the past. Raises ValueError for settings below 1, TypeError
    for inputs that are no tensor; else as ``Prior.loss``.
    """
    for name, value in (("steps", steps), ("every", every), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    tasks = _tasks(past)
    sample = _draw(
        [(data, head_of(data)) for data in tasks], max(2, num_examples), 2, generator, BATCH_SIZE
    )
    imagined = _imagined(prior, model, tasks, sample, generator)
    net = copy.deepcopy(model)
    trail = Trail(net, every=every)
    made = (optimizer or _adam)(parameters(net).values())
    n, done = len(imagined), 0
    with evaluating(net):
        while done < steps:
            for index in torch.randperm(n, generator=generator).split(batch_size)[: steps - done]:
                inputs, labels, _ = imagined.batch(index)
                made.zero_grad()
                value = prior.loss(net, inputs, labels, num_data=n, head=imagined.head)
                value.backward()
                made.step()
                trail()
                done += 1
    return trail.weights


def _adam(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def _imagined(
    prior: Prior,
    model: nn.Module,
    tasks: list[Data],
    sample: _Sample,
    generator: torch.Generator | None,
) -> Examples:
    """Inputs and labels of the sample, both shuffled."""
    parts = [(data.inputs, data.labels) for _, data, _, _ in sample.pieces()]
    if not all(isinstance(x, Tensor) for x, _ in parts):
        raise TypeError(
            "an imagined task shuffles the features of a tensor, and these inputs are a dict; "
            "record a path with Trail instead"
        )
    device = device_of(model)
    inputs = torch.cat([x for x, _ in parts]).to(device)  # type: ignore[misc]
    labels = torch.cat([y for _, y in parts]).to(device)
    shape = inputs.shape
    features = torch.randperm(shape[1:].numel(), generator=generator).to(device)
    inputs = inputs.flatten(1)[:, features].reshape(shape)
    if labels.ndim > 1 or labels.is_floating_point():
        return Examples(inputs, labels[torch.randperm(len(labels), generator=generator).to(device)])
    with evaluating(model), torch.no_grad():
        num_outputs = forward(model, inputs[:1]).shape[1]
    if num_outputs == 1 or not isinstance(prior.likelihood, Categorical):
        return Examples(inputs, labels[torch.randperm(len(labels), generator=generator).to(device)])
    heads = [head_of(data) for data in tasks]
    known = set(range(num_outputs)) if None in heads else {c for h in heads for c in h or ()}
    free = [c for c in range(num_outputs) if c not in known]
    classes = torch.tensor(free if len(free) > 1 else range(num_outputs))
    order = classes[torch.randperm(len(classes), generator=generator)].to(device)
    return Examples(inputs, order[labels % len(order)], head=tuple(free) if len(free) > 1 else None)


def fidelity(
    prior: Prior,
    model: nn.Module,
    past: Data | Sequence[Data],
    *,
    head: Head | None = None,
    posterior: Posterior | None = None,
    samples: int = 8,
    scale: float = SCALE,
    path: Iterable[Mapping[str, Tensor]] = (),
    num_examples: int | None = None,
    norm: Norm = "posterior",
    resamples: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH_SIZE,
) -> FidelityReport:
    """How faithfully ``prior`` gives the gradient of ``past`` back: see the module's formulas.

    model: at the anchor, as it was when the prior was updated; read in eval mode and given back.
    past: the examples that the prior stands for; a list of data sets is a list of tasks, each with
    the head that it carries. posterior: where the weights are drawn and what measures a gradient;
    by default Laplace's, diagonal, at the anchor, with the regulariser's precision, or 1 where
    there is none. samples: draws, theta* + scale (draw - theta*): further out a diagonal posterior
    leaves all that was learned. path: weights of an adaptation (``Trail``, ``rehearse``).
    norm: "posterior", vᵀ Sigma v, or "euclidean", vᵀ v.

    num_examples: read so many away from the anchor, drawn without replacement and evenly from each
    class of each task (at least two of each), and say by the bootstrap how sure that is: an
    interval of ``level`` from ``resamples``. The gradient at the anchor is still summed over all.
    Cost: a pass for the anchor, then a backward pass for each weight and example read. Holds about
    100 gradients where it samples, one for each class otherwise.

    Raises ValueError for settings out of range, no weights to look at, and data without examples;
    StaleAnchorError for a model of other parameters; NotRepeatableError as ``Prior.update``.
    """
    _require(samples, num_examples, norm, resamples, level, scale)
    tasks = [(data, head_of(data, head)) for data in _tasks(past)]
    for data, _ in tasks:
        require_repeatable(data)
    prior._require_anchor(model)
    anchor = prior.weight.anchor if prior.weight is not None else snapshot(parameters(model))
    likelihood = prior.likelihood
    with evaluating(model), holding(model, anchor):
        whole = _whole_gradient(model, tasks, likelihood, batch_size)
        sample = _draw(tasks, num_examples, _most_chunks(anchor), generator, batch_size)
        if posterior is None:
            posterior = _laplace(prior, model, sample, anchor)
        first = _Past.at(prior, model, sample, anchor, whole, posterior, norm)
        found = _Moments.over(first, _drawn(posterior, anchor, samples, scale, generator))
        along = _Moments.over(first, path)
    if found is None and along is None:
        raise ValueError("no weights to look at: pass samples=8, or a path with some weights")
    draws = _Resampling.of(sample, resamples, level, generator)
    whichever = found or along
    by_task, by_class = ({}, {}) if whichever is None else whichever.shares(sample, draws)
    strata = () if whichever is None else whichever.strata(sample, draws)
    return FidelityReport(
        anchor=first.at_anchor(),
        samples=None if found is None else found.agreement(draws),
        path=None if along is None else along.agreement(draws),
        tasks=by_task,
        classes=by_class,
        strata=strata,
        num_examples=sample.read,
        num_data=sample.count,
    )


def fidelity_curve(
    prior: Prior,
    model: nn.Module,
    data: Data,
    *,
    sizes: Sequence[int] | None = None,
    head: Head | None = None,
    probes: int = PROBES,
    scale: float = SCALE,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH_SIZE,
) -> Curve:
    """Fidelity against the examples of ``data`` that the prior's recipe would keep, for all sizes.

    model: at the weights that were learned from the data, before ``prior.update``. sizes: by
    default 0, 1, 2, 3, 4, 6, 9, ..., all. One reading, ``probes`` + 1 forward passes; see
    ``curve.py`` for the formulas and when they are exact. ``curve.smallest(0.95)`` reads it the
    other way round, and ``memory=Fidelity(0.95)`` acts on it.

    A strength of "auto" counts as 1: it is found once the memory is chosen, and for longer moves.

    Raises ValueError for sizes beyond the data, and for priors that couple their examples (kernels,
    path integrals, learned vectors); else as ``Prior.memorise``.
    """
    recipe = prior.recipe
    require_repeatable(data)
    variance = prior._score_variance(model, data, head, generator, batch_size)
    probed = probe(
        model,
        data,
        prior.likelihood,
        recipe.carry(_precision(prior)),
        score=recipe.score,
        per_class=recipe.per_class,
        descending=recipe.descending,
        head=head,
        variance=variance,
        probes=probes,
        scale=scale,
        generator=generator,
        batch_size=batch_size,
    )
    return probed.curve(None if sizes is None else tuple(sizes))


def _precision(prior: Prior) -> float:
    """Of the weights before any data: the regulariser's, or 1 where there is none."""
    return (prior.regulariser.precision if prior.regulariser is not None else 0.0) or 1.0


def _require(
    samples: int,
    num_examples: int | None,
    norm: str,
    resamples: int,
    level: float,
    scale: float,
) -> None:
    if samples < 0:
        raise ValueError(f"samples must not be negative, got {samples}")
    if num_examples is not None and num_examples < 2:
        raise ValueError(f"num_examples must be at least 2, or None for all, got {num_examples}")
    if norm not in ("posterior", "euclidean"):
        raise ValueError(f"norm must be 'posterior' or 'euclidean', got {norm!r}")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"expected at least one resample and a level in (0, 1), got {resamples} and {level}"
        )
    require_scale(scale)


def _tasks(past: Any) -> list[Data]:
    """A list of data sets as it is; one data set as a list of one."""
    several = isinstance(past, (list, tuple)) and all(
        isinstance(part, (Dataset, DataLoader)) for part in past
    )
    return list(past) if several and len(past) else [past]


# -------------------------------------------------------------------- the sample of the past


@dataclass(frozen=True, eq=False)
class _Sample:
    """Examples of the past in chunks: of one stratum (a class of a task) each.

    stratum (B,): of each chunk; fraction (H,): read of each stratum; task, label (H,): what each
    stratum is; weight (H,): examples that each one read stands for. held: chunk -> its examples,
    or None where all are read, from ``tasks``.
    """

    tasks: list[tuple[Data, Head | None]]
    stratum: Tensor
    fraction: Tensor
    task: Tensor
    label: Tensor
    weight: Tensor
    held: list[Batch] | None
    read: int
    count: int
    batch_size: int

    def pieces(self) -> Iterator[tuple[int, Examples, Head | None, float]]:
        """(chunk, some of its examples, their head, the weight of each)."""
        if self.held is not None:
            for chunk, batch in enumerate(self.held):
                h = int(self.stratum[chunk])
                head = self.tasks[int(self.task[h])][1]
                yield chunk, Examples(batch.inputs, batch.labels), head, float(self.weight[h])
            return
        places = {pair: h for h, pair in enumerate(zip(self.task.tolist(), self.label.tolist()))}
        for index, (data, head) in enumerate(self.tasks):
            for batch in batches(data, self.batch_size):
                labels = _classes(batch.labels)
                for label in labels.unique().tolist():
                    part = batch.rows((labels == label).nonzero().squeeze(1))
                    yield places[index, label], Examples(part.inputs, part.labels), head, 1.0


def _classes(labels: Tensor) -> Tensor:
    """(B,) the class of each; all one class where labels are no classes."""
    if labels.ndim == 1 and not labels.is_floating_point():
        return labels.long()
    return torch.full((len(labels),), -1, dtype=torch.int64, device=labels.device)


def _draw(
    tasks: list[tuple[Data, Head | None]],
    num_examples: int | None,
    most: int,
    generator: torch.Generator | None,
    batch_size: int,
) -> _Sample:
    """All of the past, or a stratified sample of it, cut into chunks at random."""
    labels = [
        torch.cat([_classes(batch.labels).cpu() for batch in batches(data, batch_size)])
        for data, _ in tasks
    ]
    task = torch.cat([torch.full_like(part, t) for t, part in enumerate(labels)])
    pairs = torch.stack([task, torch.cat(labels)], 1)
    strata, member = torch.unique(pairs, dim=0, return_inverse=True)
    size = torch.bincount(member, minlength=len(strata))
    count, all_of_it = len(member), num_examples is None or num_examples >= len(member)
    if all_of_it:
        ones = torch.ones(len(strata), dtype=torch.float64)
        chunks = torch.arange(len(strata))
        return _Sample(
            tasks, chunks, ones, strata[:, 0], strata[:, 1], ones, None, count, count, batch_size
        )
    share = (num_examples or 0) / count
    wanted = (size * share).round().long().clamp(min=2).minimum(size)
    chunks_of = (most * wanted / wanted.sum()).round().long().clamp(min=2).minimum(wanted)
    chunk_of = torch.full((count,), -1, dtype=torch.int64)
    stratum: list[int] = []
    for h in range(len(strata)):
        members = (member == h).nonzero().squeeze(1)
        chosen = members[torch.randperm(len(members), generator=generator)[: int(wanted[h])]]
        cut = torch.arange(len(chosen)) * int(chunks_of[h]) // len(chosen)
        chunk_of[chosen] = len(stratum) + cut
        stratum += [h] * int(chunks_of[h])
    parts: list[list[Batch]] = [[] for _ in stratum]
    start = 0
    for data, _ in tasks:
        for batch in batches(data, batch_size):
            here = chunk_of[start : start + len(batch.labels)]
            for chunk in here[here >= 0].unique().tolist():
                parts[chunk].append(batch.rows((here == chunk).nonzero().squeeze(1)))
            start += len(batch.labels)
    held = [
        Batch(concat([b.inputs for b in one]), *(torch.cat(x) for x in zip(*(b[1:] for b in one))))
        for one in parts
    ]
    read = wanted.double() / size
    return _Sample(
        tasks, torch.tensor(stratum), read, strata[:, 0], strata[:, 1], 1 / read, held,
        int(wanted.sum()), count, batch_size,
    )  # fmt: skip


def _most_chunks(anchor: Mapping[str, Tensor]) -> int:
    """As many as leave room for two gradients of each."""
    each = sum(a.numel() for a in anchor.values()) * 8
    return max(2, min(_CHUNKS, 16 * hooks.WORKING_SET // (2 * each)))


def _laplace(prior: Prior, model: nn.Module, sample: _Sample, anchor: Params) -> Posterior:
    if sample.held is None:
        parts = [(data, head, 1.0) for data, head in sample.tasks]
    else:
        parts = [(data, head, weight) for _, data, head, weight in sample.pieces()]
    total: Curvature = reduce(
        add,
        (diagonal_curvature(model, d, prior.likelihood, head=head) * w for d, head, w in parts),
    )
    return Posterior(anchor, total, _precision(prior))


def _drawn(
    posterior: Posterior,
    anchor: Params,
    samples: int,
    scale: float,
    generator: torch.Generator | None,
) -> Iterator[Params]:
    """One at a time: each is as large as the model."""
    for _ in range(samples):
        draw = posterior.sample(1, generator)
        yield {
            n: a + scale * (draw[n][0].to(a) - posterior.mean[n].to(a)) for n, a in anchor.items()
        }


def _whole_gradient(
    model: nn.Module, tasks: list[tuple[Data, Head | None]], likelihood: Likelihood, batch_size: int
) -> Params:
    """∇P of all examples at the model's present weights."""
    total: Params = {}
    for data, head in tasks:
        part = data_gradient(model, data, likelihood, head=head, batch_size=batch_size)
        total = recall.plus(part, total)
    return total


# -------------------------------------------------------------------- errors and changes


@dataclass(frozen=True, eq=False)
class _Past:
    """The past and the prior at other weights, as differences to the anchor.

    whole: ∇P(theta*), of all examples; chunks: name -> (B, *shape), of each chunk there; own:
    ∇K(theta*). measure: the curvature whose inverse measures gradients, or None for Euclid.
    """

    prior: Prior
    model: nn.Module
    sample: _Sample
    anchor: Params
    whole: Params
    chunks: Params
    own: Params
    measure: Curvature | None
    precision: float

    @classmethod
    def at(
        cls,
        prior: Prior,
        model: nn.Module,
        sample: _Sample,
        anchor: Params,
        whole: Params,
        posterior: Posterior,
        norm: Norm,
    ) -> _Past:
        chunks = _chunk_gradients(prior, model, sample)
        if sample.held is None:  # the same numbers as the chunks', to the last digit
            whole = {n: c.sum(0) for n, c in chunks.items()}
        measure = posterior.curvature if norm == "posterior" else None
        own = _own_gradient(prior, model, sample.batch_size)
        return cls(
            prior, model, sample, anchor, whole, chunks, own, measure, posterior.prior_precision
        )

    def rows(self, weights: Mapping[str, Tensor]) -> Params:
        """name -> (2 + B, *shape): e, c, and the change of each chunk's gradient."""
        with holding(self.model, weights):
            there = _chunk_gradients(self.prior, self.model, self.sample)
            own = _own_gradient(self.prior, self.model, self.sample.batch_size)
        found = {}
        for n, first in self.chunks.items():
            changes = there[n] - first
            change = changes.sum(0)
            error = own[n] - self.whole[n] - change
            found[n] = torch.cat([error[None], change[None], changes])
        return found

    def products(self, left: Params, right: Params) -> Tensor:
        """vᵀ Sigma w of rows: (R, R')."""
        if self.measure is None:
            a, b = (torch.cat([x.flatten(1) for x in rows.values()], 1) for rows in (left, right))
        else:
            a, b = (self.measure.half(rows, self.precision) for rows in (left, right))
        return a.double() @ b.double().T

    def at_anchor(self) -> AtAnchor:
        error = {n: self.own[n] - self.whole[n] for n in self.anchor}
        both = {n: torch.stack([error[n], self.whole[n], self.own[n]]) for n in self.anchor}
        gram = self.products(both, both)
        size, own = float(gram[1, 1]) ** 0.5, float(gram[2, 2]) ** 0.5
        off = float(gram[0, 0]) ** 0.5
        return AtAnchor(off, size, _ratio(off, size), _ratio(float(gram[1, 2]), size * own))


def _chunk_gradients(prior: Prior, model: nn.Module, sample: _Sample) -> Params:
    """name -> (B, *shape): the weighted gradient of each chunk at the model's present weights."""
    params, count = parameters(model), len(sample.stratum)
    total = {
        n: torch.zeros(count, *p.shape, dtype=_accumulator(p), device=p.device)
        for n, p in params.items()
    }
    for chunk, data, head, weight in sample.pieces():
        part = data_gradient(model, data, prior.likelihood, head=head, batch_size=sample.batch_size)
        for n, g in part.items():
            total[n][chunk] += weight * g
    return total


def _accumulator(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _own_gradient(prior: Prior, model: nn.Module, batch_size: int) -> Params:
    """∇K: of every term but the beliefs beside the data, a batch of memory at a time."""
    params = parameters(model)
    total = {n: torch.zeros_like(p, dtype=_accumulator(p)) for n, p in params.items()}
    over = Pass(model, (), prior.likelihood, batch_size=batch_size)
    others: list[Any] = []
    for term in prior.terms:
        if isinstance(term, WeightTerm):
            total = recall.plus(total, term.slope(params))
        elif isinstance(term, MemoryTerm):
            total = recall.plus(total, recall._memory_slope(term, over))
        elif not is_belief(term):
            others.append(term)
    if others:  # kernels couple their block, so that it is read whole
        with torch.enable_grad():
            value = replace(prior, terms=tuple(others))(model)
        grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
        total = recall.plus(total, dict(zip(params, grads, strict=True)))
    return total


# -------------------------------------------------------------------- sums over weights


@dataclass(frozen=True, eq=False)
class _Moments:
    """Sums over some weights, from which every number follows for any weights of the chunks.

    gram (2 + B, 2 + B): products of the rows; work (2 + B,): <d, row>; offset: <d, e(theta*)>.
    points: (rms error, rms change) at each. How many: count.
    """

    gram: Tensor
    work: Tensor
    offset: float
    points: tuple[tuple[float, float], ...]

    @classmethod
    def over(cls, past: _Past, weights: Iterable[Mapping[str, Tensor]]) -> _Moments | None:
        """None where there are no weights."""
        gram, work, offset, points = None, None, 0.0, []
        for theta in weights:
            rows = past.rows(theta)
            products = past.products(rows, rows)
            d = {n: theta[n].detach().to(a) - a for n, a in past.anchor.items()}
            along = sum(rows[n].flatten(1).double() @ d[n].flatten().double() for n in rows)
            offset += sum(
                float(((past.own[n] - past.whole[n]) * d[n]).double().sum()) for n in past.anchor
            )
            gram = products if gram is None else gram + products
            work = along if work is None else work + along
            points.append((float(products[0, 0]), float(products[1, 1])))
        if gram is None or not isinstance(work, Tensor):
            return None
        return cls(gram, work, offset, tuple(points))

    def agreement(self, draws: _Resampling) -> Agreement:
        count = len(self.points)
        ones = torch.ones(1, len(self.gram) - 2, dtype=torch.float64)
        ee, cc, ec = (float(x) for x in self.squares(ones, draws, 1.0))
        relative = _relative(*torch.tensor([[ee], [cc]], dtype=torch.float64))
        interval = None
        if draws.weights is not None:
            # Resampled squares are too large by what is taken off the sample's, once more.
            ee_, cc_, _ = self.squares(draws.weights, draws, 2.0)
            interval = draws.interval(1.0 - _relative(ee_, cc_))
        whole = ee + 2 * ec + cc
        work_e, work_c = float(self.work[0]), float(self.work[1])
        return Agreement(
            fidelity=1.0 - float(relative),
            relative_error=float(relative),
            cosine=_ratio(ec + cc, math.sqrt(max(0.0, whole) * max(0.0, cc))),
            error=math.sqrt(max(0.0, ee) / count),
            change=math.sqrt(max(0.0, cc) / count),
            missed=-0.5 * (self.offset + work_e) / count,
            charged=0.5 * work_c / count,
            interval=interval,
            points=tuple(1.0 - _ratio(math.sqrt(e), math.sqrt(c)) for e, c in self.points),
        )

    def squares(
        self, weights: Tensor, draws: _Resampling, times: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(K,) each: <e, e>, <c, c>, <e, c> where chunk b counts ``weights`` (K, B) times.

        Less ``times`` their expected excess: the error's square is too large by the variance of
        the sample's sum, as the change's is, and their product is too small by as much.
        """
        e, c = self._combined(weights)
        excess = times * draws.excess(self.gram[2:, 2:])
        products = [((x @ self.gram) * y).sum(1) for x, y in ((e, e), (c, c), (e, c))]
        return products[0] - excess, products[1] - excess, products[2] + excess

    def _combined(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """e and c as combinations of the rows, (K, 2 + B): more of a chunk is more of its change,
        and less of the error e = ∇K - ∇P."""
        extra = weights - 1.0
        one, none = torch.ones(len(weights), 1).double(), torch.zeros(len(weights), 1).double()
        return torch.cat([one, none, -extra], 1), torch.cat([none, one, extra], 1)

    def shares(
        self, sample: _Sample, draws: _Resampling
    ) -> tuple[dict[int, Share], dict[int, Share]]:
        """By task and by class; empty where labels are no classes."""
        of_task, of_label = sample.task[sample.stratum], sample.label[sample.stratum]
        by_task = {int(t): self._share(of_task == t, draws) for t in of_task.unique()}
        labels = [int(c) for c in of_label.unique() if c >= 0]
        return by_task, {c: self._share(of_label == c, draws) for c in labels}

    def strata(self, sample: _Sample, draws: _Resampling) -> tuple[Share, ...]:
        """Of each class of each task."""
        each = range(len(sample.fraction))
        return tuple(self._share(sample.stratum == h, draws) for h in each)

    def _share(self, members: Tensor, draws: _Resampling) -> Share:
        def values(weights: Tensor, times: float) -> Tensor:
            e, c = self._combined(weights)
            group = torch.cat([torch.zeros(len(weights), 2).double(), weights * members], 1)
            excess = times * draws.excess(self.gram[2:, 2:], members)
            push = (((e + c) @ self.gram) * group).sum(1)  # the excesses of e and c cancel
            return push / (((c @ self.gram) * group).sum(1) - excess)

        ones = torch.ones(1, len(members), dtype=torch.float64)
        interval = None
        if draws.weights is not None:
            interval = draws.interval(values(draws.weights, 2.0))
        return Share(float(values(ones, 1.0)), interval)


def _relative(ee: Tensor, cc: Tensor) -> Tensor:
    """sqrt(<e, e> / <c, c>), 0 where the error is below what the sample can tell."""
    found = (ee.clamp(min=0) / cc.clamp(min=0)).sqrt()
    return torch.where((ee <= 0) & (cc <= 0), torch.zeros_like(ee), found)


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


# -------------------------------------------------------------------- the bootstrap


@dataclass(frozen=True, eq=False)
class _Resampling:
    """Weights of the chunks in each resample, (K, B), or None where all of the past was read.

    Chunks are drawn within their stratum, one fewer than it has, and their deviations scaled so
    that the variance is right for few chunks too, and where much was read (Rao & Wu 1988).
    """

    weights: Tensor | None
    stratum: Tensor
    spread: Tensor  # (B,): (1 - read) m / (m - 1) of the chunk's stratum, m its chunks
    level: float

    @classmethod
    def of(
        cls, sample: _Sample, resamples: int, level: float, generator: torch.Generator | None
    ) -> _Resampling:
        chunks = torch.bincount(sample.stratum, minlength=len(sample.fraction)).double()
        unread = 1.0 - sample.fraction
        spread = (unread * chunks / (chunks - 1).clamp(min=1))[sample.stratum]
        if sample.held is None:
            return cls(None, sample.stratum, torch.zeros_like(spread), level)
        weights = torch.ones(resamples, len(sample.stratum), dtype=torch.float64)
        for h, m in enumerate(chunks.long().tolist()):
            if m < 2:
                continue
            columns = (sample.stratum == h).nonzero().squeeze(1)
            drawn = torch.randint(m, (resamples, m - 1), generator=generator)
            times = torch.zeros(resamples, m, dtype=torch.float64)
            times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
            weights[:, columns] += unread[h].sqrt() * (times * m / (m - 1) - 1.0)
        return cls(weights, sample.stratum, spread, level)

    def excess(self, gram: Tensor, members: Tensor | None = None) -> float:
        """E‖sum - truth‖² from the chunks' Gram matrix (B, B), of all strata or of members'."""
        if self.weights is None:
            return 0.0
        same = self.stratum.unsqueeze(0) == self.stratum.unsqueeze(1)
        means = (gram * same).sum(1) / same.sum(1)  # <chunk, mean of its stratum>
        each = self.spread * (gram.diagonal() - means)
        return float((each if members is None else each * members).sum())

    def interval(self, values: Tensor) -> Interval:
        """The middle ``level`` of the resamples."""
        ordered = torch.where(values.isnan(), -torch.inf, values).sort().values
        out = int((1.0 - self.level) / 2 * len(values))  # of the resamples, at each end
        return float(ordered[out]), float(ordered[-1 - out])

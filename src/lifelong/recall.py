r"""Recall: the parts of a new prior, computed at the weights that were just learned.

Each function returns a part (memory, G, g) and changes nothing, so that ``Prior.recall`` can put
them together only when all have succeeded. The accounting rule is kept here:

    g  <-  grad(weight and function terms)(theta_new) + sum_new J*ᵀ r - what replay carries itself
    G  <-  G + sum_new J*ᵀ H J*  of the examples that did not go into memory
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import compact, select
from .budget import Bytes
from .curvature import BlockDiagonal, Curvature, estimate
from .curvature.block_diagonal import merged
from .data import BATCH_SIZE, Data, Head, Shard, every_id
from .hooks import accumulator, upcast
from .jacobians import gradient as data_gradient
from .likelihoods import Likelihood
from .memory import Memory
from .models import Params, forward, parameters
from .path import PathIntegral
from .recipe import Recipe, require_strength
from .strength import beginning, find_strength
from .terms import KernelTerm, MemoryTerm, Regulariser, WeightTerm, belief_gradient, is_belief

Terms = tuple[Regulariser | WeightTerm | MemoryTerm | KernelTerm, ...]


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over new data at the learned weights: what every part below needs.

    model: in eval mode. head: the class set of the data. batch_size: examples at a time.
    """

    model: nn.Module
    data: Data
    likelihood: Likelihood
    head: Head | None = None
    generator: torch.Generator | None = None
    batch_size: int = 512


# -------------------------------------------------------------------- memory


class Merged(NamedTuple):
    """held: the memory from now on, old items first; new: those of it that are of the new task;
    evicted: the old items that had to leave. Each None where there are none."""

    held: Memory | None
    new: Memory | None
    evicted: Memory | None


def merge(
    old: Memory | None,
    items: Memory | None,
    recipe: Recipe,
    seen: int,
    new: int,
    likelihood: Likelihood,
    generator: torch.Generator | None = None,
) -> Merged:
    """The old memory and the new items, within the recipe's bounds.

    seen, new: how many examples came before and with this task: a total memory that is a
    reservoir holds each of them with the same probability. Where items stand for a population,
    those that stay stand for the evicted ones too.
    """
    evicted, survivors = None, 0 if old is None else len(old)
    if items is None or old is None:
        held = items if old is None else old
    elif recipe.total and recipe.memory is not None:
        held, evicted = _bounded(old, items, recipe, seen, new, likelihood, generator)
        survivors -= len(evicted)
        if recipe.population and len(held) < len(old) + len(items):
            held = _for_all(held, survivors, old, items, recipe, seen, new)
    else:
        held = old.add(items)
    return Merged(
        held,
        held[survivors:] if held is not None and len(held) > survivors else None,
        evicted if evicted is not None and len(evicted) else None,
    )


def compacted(old: Memory | None, items: Memory | None, recipe: Recipe, over: Pass) -> Merged:
    """The old vectors and the new data in vectors learned together, a task's items more than
    before, or ``memory`` in all. ``items`` are where EM starts.

    Raises ValueError for a head (a set of classes): vectors of several tasks have none.
    """
    if isinstance(over.data, Shard):
        raise ValueError(
            "a compact memory is learned from all data in one process; expected plain data, or "
            "another prior"
        )
    if over.head is not None:
        raise ValueError(
            "a compact memory mixes the tasks, so that all outputs must compete for each vector; "
            "expected data without a head, as scenario='class' or 'domain' gives them"
        )
    parts = [m for m in (old, items) if m is not None]
    if not parts:
        return Merged(None, None, None)
    start = compact.CompactMemory.of(*parts)
    size = recipe.memory if recipe.total and isinstance(recipe.memory, int) else len(start)
    held = compact.learn(
        over.model,
        over.data,
        over.likelihood,
        size=size,
        start=start[:size],
        old=old,
        method=recipe.compact or "closed_form",
        damping=recipe.compact_damping,
        iterations=recipe.compact_iterations,
        strength=recipe.soft,
        batch_size=over.batch_size,
    )
    return Merged(held, None, None)


def _bounded(
    old: Memory,
    items: Memory,
    recipe: Recipe,
    seen: int,
    new: int,
    likelihood: Likelihood,
    generator: torch.Generator | None,
) -> tuple[Memory, Memory]:
    both = old.add(items)
    size = _size(both, recipe)
    if len(both) <= size:
        return both, old[:0]
    balanced = recipe.per_class and _are_classes(both.labels)
    if recipe.score == "random" and not balanced:
        # A reservoir: how many of the survivors are new follows the hypergeometric law.
        order = torch.randperm(seen + new, generator=generator)
        from_new = int((order[:size] >= seen).sum())
        from_new = max(size - len(old), min(from_new, len(items)))
        keys = torch.rand(len(both), generator=generator).to(both.labels.device)
        survivors = select.top_k(keys[: len(old)], size - from_new)
        newcomers = len(old) + select.top_k(keys[len(old) :], from_new)
        chosen = torch.cat([survivors, newcomers])
    else:
        keys = _keys(both, recipe, likelihood, generator)
        chosen = (
            select.per_class(keys, both.labels, size, descending=recipe.descending)
            if balanced
            else select.top_k(keys, size, descending=recipe.descending)
        )
    kept = torch.zeros(len(both), dtype=torch.bool, device=both.labels.device)
    kept[chosen] = True
    return both.drop(~kept), old.drop(kept[: len(old)])


def _for_all(
    held: Memory, survivors: int, old: Memory, items: Memory, recipe: Recipe, seen: int, new: int
) -> Memory:
    """The items that stay, as heavy together as ``old`` and ``items`` were: of each class, where
    as many of each are kept at random, so that a past that was discounted stays so.

    An item keeps the shares of its soft and its true label. Beside the others it counts by what it
    weighed over the probability with which it stayed: within a class that is the same for all; in
    a reservoir proportional to seen / len(old) for old items and new / len(items) for new ones.
    """
    before = torch.cat([_weights(old), _weights(items)])
    weights = _weights(held)
    if recipe.by_class and _are_classes(held.labels):
        classes, of_both = torch.cat([old.labels, items.labels]).unique(return_inverse=True)
        of_held = torch.searchsorted(classes, held.labels)
    else:
        weights[:survivors] *= len(old) / max(1, seen)
        weights[survivors:] *= len(items) / new
        of_both, of_held = torch.zeros_like(before).long(), torch.zeros_like(weights).long()
    count = int(of_both.max()) + 1
    due = torch.bincount(of_both, before, minlength=count)
    found = torch.bincount(of_held, weights, minlength=count)
    after = weights * torch.where(found > 0, due / found, 0.0)[of_held]
    after = after * (due.sum() / after.sum()) if after.sum() > 0 else after  # classes that left
    factor = torch.where(weights > 0, after / _weights(held), 0.0)
    return held.weighted(held.soft_weight * factor, held.hard_weight * factor)


def _weights(memory: Memory) -> Tensor:
    """(M,) by either label."""
    return memory.soft_weight.double() + memory.hard_weight.double()


def _are_classes(labels: Tensor) -> bool:
    """Whether each example has one class, and not soft labels, or several yes and no."""
    return labels.ndim == 1 and not labels.is_floating_point()


def _size(memory: Memory, recipe: Recipe) -> int:
    """How many of these items the recipe's total memory holds, in examples or in bytes."""
    if isinstance(recipe.memory, Bytes):
        return recipe.memory.items(memory.num_bytes / len(memory))
    return recipe.memory if isinstance(recipe.memory, int) else len(memory)


def _keys(
    memory: Memory, recipe: Recipe, likelihood: Likelihood, generator: torch.Generator | None
) -> Tensor:
    """Scores of old and new items by their present beliefs, so that they compare."""
    if recipe.score == "random":
        return torch.rand(len(memory), generator=generator).to(memory.labels.device)
    f = likelihood.mask(memory.outputs, memory.mask)
    if recipe.score == "residual":
        return likelihood.residual(f, memory.labels).norm(dim=-1)
    return likelihood.hessian_trace(f)


# -------------------------------------------------------------------- curvature


class Weighed(NamedTuple):
    """curvature: G, the past's and the new; strength: of the new part. None where there is none."""

    curvature: Curvature | None
    strength: float | None


def curvature(
    terms: Terms,
    recipe: Recipe,
    over: Pass,
    *,
    extra: Curvature | None = None,
    kept: Memory | None = None,
    evicted: Memory | None = None,
    path: PathIntegral | None = None,
    beliefs: tuple[float, ...] = (),
    strengths: tuple[float, ...] = (),
) -> Weighed:
    """G of the examples that the weight term stands for, and how strongly the new ones count.

    extra: what the kernels held; kept: the new items; evicted: the old ones that had to leave,
    whose curvature G carries from now on, as strongly as that of the others of their task, and
    believed as much: strengths, beliefs, of each past task.
    """
    old = total_curvature(terms, extra)
    if recipe.structure is None:
        return Weighed(old, None)
    if recipe.structure == "path":
        if path is None:
            raise ValueError(
                "this prior learns from the path of training: watch it with "
                "`with PathIntegral(model, optimizer, prior, num_data) as path:` and call "
                "prior.update(model, data, path=path)"
            )
        new: Curvature = path.curvature(recipe.path_damping) * number(recipe.strength)
        return Weighed(new if old is None else old + new, number(recipe.strength))
    # FROMP's covariance is of all data: there the curvature is not a term of the sum.
    leaves_out = recipe.exclude_memory and not recipe.kernel
    excluded = kept.origin if kept is not None and leaves_out else None
    weights = thinned(over.data, recipe.curvature_examples, excluded, over.generator)
    if recipe.strength == "auto":
        plain = recipe.with_strength(1.0)
        new = fit_curvature(plain, over, weights=weights, exclude=excluded)
        found = recipe.margin * _find_strength(terms, recipe, over, new, kept, excluded, weights)
        new, recipe = new * found, recipe.with_strength(found)
    else:
        new = fit_curvature(recipe, over, weights=weights, exclude=excluded)
    parts = [new] if old is None else [old, new]
    del new, old  # merged() lets go what it has read
    if evicted is not None and leaves_out:
        moved = evicted_curvature(evicted, recipe, over, beliefs, strengths)
        parts += [] if moved is None else [moved]
        del moved
    if recipe.merge and all(isinstance(g, BlockDiagonal) for g in parts):
        return Weighed(merged(parts), number(recipe.strength))  # type: ignore[arg-type]
    return Weighed(sum(parts[1:], start=parts[0]), number(recipe.strength))


def _find_strength(
    terms: Terms,
    recipe: Recipe,
    over: Pass,
    new: Curvature,
    kept: Memory | None,
    excluded: Tensor | None,
    weights: Tensor | None,
) -> float:
    start = next((t.anchor for t in terms if isinstance(t, WeightTerm)), None)
    if start is None:
        regulariser = next((t for t in terms if isinstance(t, Regulariser)), None)
        start = beginning(parameters(over.model), regulariser)
    return find_strength(
        over.model,
        over.data,
        over.likelihood,
        new,
        start,
        memory=None if kept is None else MemoryTerm(kept, recipe.divergence),
        head=over.head,
        exclude=excluded,
        weights=weights,
        generator=over.generator,
        batch_size=over.batch_size,
    )


def thinned(
    data: Data,
    limit: int | None,
    exclude: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """(N,) weights N' / n of n = ``limit`` examples drawn at random from the N' whose ids are not
    in ``exclude``, 0 of the others: sums over them are unbiased. None where all are to be read.
    """
    if limit is None:
        return None
    ids = every_id(data)
    candidates = torch.ones(len(ids), dtype=torch.bool)
    if exclude is not None:
        candidates = ~torch.isin(ids, exclude.to(ids.device)).cpu()
    places = candidates.nonzero().squeeze(1)
    if len(places) <= limit:
        return None
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    order = torch.randperm(len(places), generator=generator)[:limit]
    weights = torch.zeros(len(ids), dtype=torch.float64)
    weights[places[order]] = len(places) / limit
    return weights


def evicted_curvature(
    items: Memory,
    recipe: Recipe,
    over: Pass,
    beliefs: tuple[float, ...],
    strengths: tuple[float, ...],
) -> Curvature | None:
    """sum_i belief_i strength_i J*ᵀ H J* of items that leave the memory, each by its own task's
    belief and strength, at the present weights; None where the recipe has no curvature."""
    total: Curvature | None = None
    if recipe.structure is None:
        return total
    for group, head in by_head(items):  # not by task: a G for each would be held at once
        of_group = replace(over, data=(group.inputs, group.labels), head=head)
        weights = each_of(strengths, group).double() * each_of(beliefs, group).double()
        new = fit_curvature(recipe.with_strength(1.0), of_group, weights=weights)
        total = new if total is None else total + new
    return total


def of_task(values: tuple[float, ...], task: int) -> float:
    """A task's own value; 1 for a task that is not known."""
    return values[task] if 0 <= task < len(values) else 1.0


def each_of(values: tuple[float, ...], items: Memory) -> Tensor:
    """(M,) the value of each item's task."""
    found = [of_task(values, task) for task in items.task.tolist()]
    return torch.tensor(found, dtype=items.soft_weight.dtype, device=items.soft_weight.device)


def fit_curvature(
    recipe: Recipe,
    over: Pass,
    *,
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Curvature:
    """strength · sum_i w_i J*ᵀ H J* over one pass, in the recipe's structure.

    Raises ValueError for a recipe without one, with SI's path integral, or with strength "auto".
    """
    if recipe.structure is None or recipe.structure == "path":
        raise ValueError(f"structure {recipe.structure!r} is not fitted to data; name one that is")
    options = {"rank": recipe.rank} if recipe.structure == "low_rank" else {}
    new = estimate(
        over.model,
        over.data,
        over.likelihood,
        structure=recipe.structure,
        estimator=recipe.estimator,
        head=over.head,
        weights=weights,
        exclude=exclude,
        generator=over.generator,
        batch_size=over.batch_size,
        **options,
    )
    return new * number(recipe.strength)


def number(strength: float | str) -> float:
    """The strength, where one was given or found. Raises ValueError for "auto"."""
    require_strength("strength", strength)
    return float(strength)


def total_curvature(terms: Terms, extra: Curvature | None = None) -> Curvature | None:
    """The sum of the terms' curvatures, or None."""
    total = extra
    for term in terms:
        if isinstance(term, WeightTerm) and term.curvature is not None:
            total = term.curvature if total is None else total + term.curvature
    return total


def variance(curvature: Curvature, precision: float) -> Params:
    """1 / (diag G + precision): the diagonal Laplace covariance of the weights."""
    if not precision > 0:
        raise ValueError(f"the prior precision of a covariance must be positive, got {precision}")
    return {n: 1.0 / (v.clamp(min=0) + precision) for n, v in curvature.diagonal().items()}


# -------------------------------------------------------------------- gradient


def gradient(
    terms: Terms,
    recipe: Recipe,
    over: Pass,
    *,
    held: Memory | None = None,
    kept: Memory | None = None,
) -> Params | None:
    """g at the present weights, by the recipe's choice (``Recipe.gradient``); None for 0.

    held: the memory from now on; kept: the part of it that is new. "stored" is what the past
    terms and the new data say here, less what the memory goes on saying by itself.
    """
    if recipe.gradient == "none":
        return None
    params = parameters(over.model)
    g = {n: torch.zeros_like(p) for n, p in params.items()}
    if recipe.gradient in ("stored", "carried"):
        for term in terms:
            if isinstance(term, WeightTerm):
                g = plus(g, term.slope(params))
            elif isinstance(term, MemoryTerm):
                g = plus(g, _memory_slope(term, over))
        if recipe.gradient == "stored":
            new = data_gradient(
                over.model,
                over.data,
                over.likelihood,
                head=over.head,
                batch_size=over.batch_size,
            )
            g = plus(g, new)
        elif kept is not None:
            g = plus(g, _own_slope(kept, recipe, over))
        return g if held is None else plus(g, _own_slope(held, recipe, over), -1.0)
    for term in terms:
        if is_belief(term):
            g = plus(g, belief_gradient(term, over.model, params), -1.0)
    if recipe.gradient == "stationary" and held is not None:
        g = plus(g, _own_slope(held, recipe, over), -1.0)
    return g if any(bool(v.any()) for v in g.values()) else None


def _own_slope(memory: Memory, recipe: Recipe, over: Pass) -> Params:
    """The gradient that a memory carries itself: of its true labels, and of soft labels that were
    not refreshed, or of which only the largest were kept; fresh whole ones are flat."""
    soft = 0.0 if recipe.refresh and memory.is_whole else memory.soft_weight
    items = memory.weighted(soft, memory.hard_weight)
    return _memory_slope(MemoryTerm(items, recipe.divergence), over)


def _memory_slope(term: MemoryTerm, over: Pass) -> Params:
    return slope(term, over.model, over.likelihood, over.batch_size)


def slope(
    term: MemoryTerm, model: nn.Module, likelihood: Likelihood, batch_size: int = BATCH_SIZE
) -> Params:
    """The gradient of a memory term, a batch at a time, in float32 at least; ``.grad`` is left
    alone."""
    params = parameters(model)
    total = {n: torch.zeros_like(p, dtype=accumulator(p.dtype)) for n, p in params.items()}
    for start in range(0, len(term.memory), batch_size):
        part = replace(term, memory=term.memory[slice(start, start + batch_size)])
        if not (part.has_soft or part.has_hard):
            continue
        with torch.enable_grad():
            f = upcast(forward(model, part.memory.inputs))
            value = part.value(f, part.memory, likelihood)
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for n, grad in zip(params, grads, strict=True):
            if grad is not None:
                total[n] = total[n] + grad
    return total


def plus(a: Params, b: Mapping[str, Tensor], factor: float = 1.0) -> Params:
    """a + factor b, over the names of a; a name that b lacks counts as 0."""
    return {n: v + factor * b[n] if n in b else v for n, v in a.items()}


def by_head(memory: Memory) -> Iterator[tuple[Memory, Head | None]]:
    """The items of each head in turn; the memory itself where they have one in common."""
    present = memory.head.unique().tolist()
    if len(present) == 1:
        yield memory, memory.heads[present[0]]
        return
    for index in present:
        yield memory[(memory.head == index).nonzero().squeeze(1)], memory.heads[index]

r"""Forget examples: what they said is taken out of memory, gradient and curvature; or relabel
them: they say something else.

Pure functions from terms to terms; ``Prior.forget``, ``Prior.relabel`` and ``Prior.update`` (the
shares of groups) call them. Source: Khan & Swaroop 2021.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .curvature import BlockDiagonal, Curvature, Dense, Diagonal, Isotropic, Kronecker, LowRank
from .curvature.base import flatten, unflatten
from .data import BATCH_SIZE, Examples, among, as_data, batches, head_mask
from .errors import NotHeldWarning
from .groups import NO_MEMBERS, Groups, Share
from .jacobians import differentiating, residual
from .jacobians import gradient as data_gradient
from .likelihoods import Likelihood
from .memory import Memory, reference_outputs, remember
from .models import (
    Inputs,
    Params,
    concat,
    device_of,
    evaluating,
    forward,
    match,
    move,
    parameters,
    read,
    take,
)
from .recall import Pass, Terms, by_head, each_of, evicted_curvature, fit_curvature, plus
from .recipe import Recipe
from .terms import MemoryTerm, WeightTerm

OnIndefinite = Literal["raise", "clip"]
Where = Callable[[Memory], Tensor]

_WHOLE = 1024  # weights of a block whose eigenvalues are all computed
_ITERATIONS = 50  # of Lanczos: vectors of a layer's size that are held at once


@dataclass(frozen=True, eq=False)
class Removal:
    """What ``forget`` took out, and what is left.

    terms: without those examples. removed: the items that were in memory, None where none.
    given, by_statistics: how many examples of the data, and how many by their group's share, left
    g or G. not_held: how many more of either were in no part of the prior, so that nothing could
    be taken out.
    clipped: of the curvature that was taken out, the part (a fraction of its trace) that had to
    be put back to keep G positive; 0 unless ``on_indefinite="clip"``.
    """

    terms: Terms
    removed: Memory | None = None
    given: int = 0
    by_statistics: int = 0
    clipped: float = 0.0
    not_held: int = 0

    @property
    def count(self) -> int:
        in_memory = 0 if self.removed is None else len(self.removed)
        return in_memory + self.given + self.by_statistics + self.not_held


def forget(
    terms: Terms,
    recipe: Recipe,
    over: Pass | None,
    *,
    model: nn.Module,
    likelihood: Any,
    task: int | None = None,
    ids: Tensor | None = None,
    where: Where | None = None,
    groups: Tensor | None = None,
    on_indefinite: OnIndefinite = "raise",
    beliefs: tuple[float, ...] = (1.0,),
    strengths: tuple[float, ...] = (1.0,),
) -> Removal:
    """The terms without those examples; see ``Prior.forget``.

    beliefs, strengths: of each task, as ``Prior`` has them, one of each for every task.

    Warns with NotHeldWarning where some of them are in no part of the prior, and raises ValueError
    where all are.
    """
    if recipe.kernel or recipe.structure == "path" or recipe.compact:
        raise ValueError(
            f"the {recipe.name} prior cannot forget single examples, since its kernels, its path "
            "or its learned vectors mix them; use a prior with a memory or a curvature, such as "
            "gradient_reconstruction"
        )
    if recipe.gradient == "carried" and len(beliefs) > 1:
        raise ValueError(
            f"the {recipe.name} prior takes each of its {len(beliefs)} tasks to be flat at its own "
            "anchor, so its g does not hold the gradients of examples that should leave it; use a "
            "prior whose gradient is 'stored' or 'anchored', such as online_ewc"
        )
    if on_indefinite not in get_args(OnIndefinite):
        raise ValueError(f"on_indefinite must be 'raise' or 'clip', got {on_indefinite!r}")
    weight = next((t for t in terms if isinstance(t, WeightTerm)), None)
    shares = None if weight is None else weight.groups
    whole = _whole_groups(shares, over, task, ids, where, groups)
    given = torch.empty(0, dtype=torch.int64)
    if over is not None:
        if where is not None:
            raise ValueError("where looks at the memory; with data say which by ids=")
        given = _once(_ids(over))
    elif ids is None and task is None and where is None and groups is None:
        raise ValueError("say which examples to forget: pass data, ids, where, task or groups")
    if ids is not None and ids.numel() and not _are_integers(ids):
        raise ValueError(
            f"ids are integers, got {ids.dtype}; for a mask over the memory pass where=lambda "
            "memory: mask, or the ids themselves, memory.origin[mask]"
        )
    ids = None if ids is None else ids.cpu()
    wanted = given if ids is None and over is not None else ids
    kept_terms: list[Any] = []
    gone: list[Memory] = []
    for term in terms:
        if isinstance(term, MemoryTerm):
            which = _chosen(term.memory, task, wanted, where)
            if shares is not None and whole is not None:
                which &= shares.within(term.memory, whole)
            gone.append(term.memory.drop(~which))
            term = replace(term, memory=term.memory.drop(which))
        kept_terms.append(term)
    in_memory = torch.cat([m.origin.cpu() for m in gone]) if gone else given[:0]
    if task is None and whole is None and _of_several_tasks(gone):
        raise ValueError(
            "the memory holds these ids of several tasks; say which by task=, or give the "
            "examples of each task ids of their own"
        )
    if over is not None and not _are_the_given(gone, over, given):
        raise ValueError(
            "some of these ids are remembered with other inputs or labels than those given: pass "
            "the examples with the ids, inputs and labels that they have in memory; an id counts "
            "within its task, so of several tasks say of which task the data are by task="
        )
    if over is None and whole is None and not len(in_memory):
        raise ValueError(
            "none of these examples is in memory and the data were not given; pass "
            "prior.forget(model, data) with the examples to forget"
        )
    if ids is not None:
        missing = ids[~torch.isin(ids, torch.cat([in_memory, given]))]
        if len(missing):
            raise ValueError(
                f"ids {missing[:10].tolist()} are neither in memory nor in the data; pass data "
                "that hold them, so that their gradient and curvature can be taken out"
            )
    others = given[:0] if wanted is None else given[~torch.isin(given, wanted)]
    rest = torch.cat([in_memory, others])  # of the data, what does not leave g and G here
    leaving: dict[int, Share] = {}
    unseen = over is not None and not bool(torch.isin(given, rest).all())
    if unseen and weight is not None:
        recipe, belief = _of_task(recipe, task, beliefs, strengths)
    else:
        belief = 1.0
    with _at_anchor(model, None if weight is None else weight.anchor), evaluating(model):
        slopes = [
            _residual_slope(model, items, likelihood, _in_gradient(items, beliefs))
            for items in gone
            if recipe.gradient != "none" and len(items)
        ]
        if over is not None:
            of = _groups_of(over, shares, rest, groups)
            leaving = _shares(over, recipe, of, rest, rest)
            leaving = {k: share * belief for k, share in leaving.items()}
        elif whole is not None and shares is not None:
            leaving = {k: s for k, s in shares.shares.items() if k in whole}
        if not recipe.exclude_memory and whole is None and weight is not None:
            for items in gone:  # these are in G, too
                belongs = torch.full_like(items.origin, -1) if shares is None else shares.of(items)
                for k in belongs.unique().tolist():
                    pair = (items.inputs, items.labels)
                    reading = Pass(model, pair, likelihood)
                    G = evicted_curvature(
                        items.drop(belongs != k), _exact(recipe), reading, beliefs, strengths
                    )
                    leaving[k] = leaving.get(k, Share(0)) + Share(0, None, G)
    held = {k: s for k, s in leaving.items() if _is_held(s, weight)}
    counted = sum(share.count for share in held.values())
    not_held = sum(share.count for share in leaving.values()) - counted
    if not_held:
        _tell_not_held(not_held, len(in_memory), anything=bool(held), name=recipe.name)
    clipped = 0.0
    if weight is not None:
        changed, clipped = _without(weight, slopes, leaving, on_indefinite, recipe.merge)
        memories = [t.memory for t in kept_terms if isinstance(t, MemoryTerm)]
        if changed.groups is not None:
            left = memories[0].add(*memories[1:]) if memories else None
            members = changed.groups.held(left)
            # A share of none still holds the curvature of its items in memory, unless that is
            # left out of G.
            known = set(members.members[:, 2].tolist())
            shares_left = {k: s for k, s in members.shares.items() if s.count or k in known}
            changed = replace(changed, groups=replace(members, shares=shares_left))
        kept_terms = [changed if isinstance(t, WeightTerm) else t for t in kept_terms]
    removed = gone[0].add(*gone[1:]) if gone else None
    return Removal(
        tuple(t for t in kept_terms if not isinstance(t, MemoryTerm) or len(t.memory)),
        removed if removed is not None and len(removed) else None,
        given=counted if whole is None else 0,
        by_statistics=0 if whole is None else counted,
        clipped=clipped,
        not_held=not_held,
    )


def relabel(
    terms: Terms,
    recipe: Recipe,
    over: Pass,
    labels: Tensor,
    *,
    exactly: bool,
    task: int | None = None,
    beliefs: tuple[float, ...] = (1.0,),
    strengths: tuple[float, ...] = (1.0,),
) -> Terms:
    """The terms with other labels for the examples ``over``; see ``Prior.relabel``.

    beliefs, strengths: as ``forget``.
    """
    weight = next((t for t in terms if isinstance(t, WeightTerm)), None)
    _require_labels_apart(recipe, weight, beliefs)
    ids = _once(_ids(over))
    if len(labels) != len(ids):
        raise ValueError(f"expected a label for each of the {len(ids)} examples, got {len(labels)}")
    _require_alike(labels, next(batches(over.data, over.batch_size)).labels)
    place = {i: n for n, i in enumerate(ids.tolist())}
    old, new, kept_terms = [], [], []
    for term in terms:
        if isinstance(term, MemoryTerm):
            memory = term.memory
            which = _chosen(memory, task, ids, None).nonzero().squeeze(1)
            at = torch.tensor([place[i] for i in memory.origin[which].tolist()], dtype=torch.int64)
            changed = _by_label(memory, which, labels[at.to(labels.device)], beliefs)
            old.append(memory[which])
            new.append(changed[which])
            term = replace(term, memory=changed)
        kept_terms.append(term)
    if task is None and _of_several_tasks(old):
        raise ValueError("the memory holds these ids of several tasks; say which by task=")
    if not _are_the_given(old, over, ids):
        raise ValueError(
            "some of these ids are remembered with other inputs or labels than those given: pass "
            "the examples as they were learned, with the labels that they had, and their task"
        )
    for items in new:
        over.likelihood.validate(items.outputs, items.labels, items.mask)
    held = torch.cat([m.origin.cpu() for m in old]) if old else ids[:0]
    others = ~torch.isin(ids, held)
    in_g = weight is not None and recipe.gradient != "none"
    if bool(others.any()) and not (in_g or recipe.keeps_memory):
        raise ValueError(
            f"the {recipe.name} prior holds nothing of the labels of these examples: it keeps "
            "neither examples nor a gradient of the past; learn them again with their labels"
        )
    _, belief = _of_task(recipe, task, beliefs, strengths) if bool(others.any()) else (None, 1.0)
    rest = _rows(over, others)
    right = replace(rest, labels=labels[others].to(rest.labels))
    with _at_anchor(over.model, None if weight is None else weight.anchor), evaluating(over.model):
        if bool(others.any()) and recipe.keeps_memory and not (exactly and in_g):
            items = _learned(over, right, task or 0, belief)
            held_terms = [t for t in kept_terms if isinstance(t, MemoryTerm)] or [
                MemoryTerm(items[:0], recipe.divergence)
            ]
            first = held_terms[0]
            more = replace(first, memory=first.memory.add(items))
            kept_terms = [t for t in kept_terms if t is not first] + [more]
            others = torch.zeros_like(others)
        if weight is None or not in_g or not (exactly or bool(others.any())):
            return tuple(kept_terms)
        g = weight.gradient
        if g is None:  # None stood for 0
            g = {n: torch.zeros_like(v) for n, v in weight.anchor.items()}
        for before, after in zip(old, new, strict=True):
            for items, sign in ((before, -1.0), (after, 1.0)) if exactly else ():
                within = _in_gradient(items, beliefs)
                if bool((within != 0).any()):
                    slope = _residual_slope(over.model, items, over.likelihood, within)
                    g = plus(g, slope, sign)
        for data, sign in ((right, belief), (rest, -belief)) if bool(others.any()) else ():
            slope = data_gradient(
                over.model, data, over.likelihood, head=over.head, batch_size=over.batch_size
            )
            g = plus(g, slope, sign)
    changed_weight = replace(weight, gradient=g)
    return tuple(changed_weight if t is weight else t for t in kept_terms)


def _learned(over: Pass, data: Examples, task: int, belief: float) -> Memory:
    """Items that count by their labels, with what the model says of them."""
    batch = data.batch(slice(None))
    f = reference_outputs(over.model, batch.inputs, over.batch_size)
    over.likelihood.validate(f, batch.labels, head_mask(over.head, f.shape[1], f.device))
    return remember(batch, f, head=over.head, task=task).weighted(0.0, belief)


def _require_alike(labels: Tensor, old: Tensor) -> None:
    """Raise ValueError for labels of another shape than the old ones, or numbers for classes."""
    if labels.shape[1:] != old.shape[1:] or not torch.can_cast(labels.dtype, old.dtype):
        raise ValueError(
            f"expected labels as those that the examples had, {old.dtype} of shape "
            f"{('N', *old.shape[1:])}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )


def _by_label(memory: Memory, which: Tensor, labels: Tensor, beliefs: tuple[float, ...]) -> Memory:
    """With these labels for the items ``which``, each counting itself by its label from now on.

    Its soft label came of the wrong one. And s D(f*, f) + <Jᵀ (h(f*) - t(y)), d> with another y
    is not bounded below: no f has h(f) = h(f*) + t(y) - t(y'). Its nll is, and it is the same
    function of a generalised linear model's weights.
    """
    values, soft = memory.labels.clone(), memory.soft_weight
    hard = memory.hard_weight.clone()
    values[which] = labels.to(values)
    hard[which] = torch.maximum(hard, each_of(beliefs, memory).to(hard))[which]
    soft = (soft - (hard - memory.hard_weight)).clamp(min=0)
    return replace(memory, labels=values, soft_weight=soft, hard_weight=hard)


def _require_labels_apart(
    recipe: Recipe, weight: WeightTerm | None, beliefs: tuple[float, ...]
) -> None:
    """Raise ValueError for a prior in which one example's label cannot be changed."""
    instead = "forget the examples and learn them again with their labels"
    if recipe.kernel or recipe.structure == "path" or recipe.compact:
        raise ValueError(
            f"the {recipe.name} prior mixes its examples in kernels, a path or learned vectors, so "
            "that none of them can be relabelled; use a prior with a memory or a curvature"
        )
    if recipe.gradient == "carried" and len(beliefs) > 1:
        raise ValueError(
            f"the {recipe.name} prior takes each of its {len(beliefs)} tasks to be flat at its own "
            f"anchor, so its g does not hold what labels said; {instead}"
        )
    if recipe.structure is not None and recipe.estimator == "empirical":
        raise ValueError(
            "the curvature of this prior is of the true labels (estimator 'empirical'), so that it "
            f"would have to change, too; {instead}, or use the estimator 'exact'"
        )
    if weight is not None and weight.groups is not None:
        raise ValueError(
            f"this prior keeps a sum for each group, which holds the old labels; {instead}"
        )


def _is_held(share: Share, weight: WeightTerm | None) -> bool:
    """Whether the weight term has a g or G that this share is part of; a g of None stands for 0."""
    if weight is None:
        return False
    in_curvature = share.curvature is not None and weight.curvature is not None
    return share.gradient is not None or in_curvature


def _tell_not_held(count: int, in_memory: int, *, anything: bool, name: str) -> None:
    """Warn of examples of which nothing was held; ValueError where nothing was held of any."""
    what = f"the {name} prior holds nothing of {count} of these examples: they are not in memory, "
    what += "and it keeps no gradient or curvature of the past"
    if not in_memory and not anything:
        raise ValueError(
            f"{what}, so that there is nothing to forget, and what the weights hold of them "
            "would stay; train afresh without them, or use gradient_reconstruction from the start"
        )
    warnings.warn(NotHeldWarning(f"{what}; only the others were taken out", count), stacklevel=5)


def _without(
    weight: WeightTerm,
    slopes: list[Params],
    leaving: dict[int, Share],
    on_indefinite: OnIndefinite,
    merge: bool,
) -> tuple[WeightTerm, float]:
    """The weight term less the memory's residuals and these shares, and what was clipped."""
    groups = weight.groups
    if groups is not None:
        left = dict(groups.shares)
        for k in leaving.keys() - {-1}:
            have = left.get(k, Share(0))
            if leaving[k].count > have.count:
                raise ValueError(
                    f"{leaving[k].count} examples of group {k} were given that are not in memory, "
                    f"and {have.count} such are left; some were forgotten before, or are of "
                    "another group"
                )
            left[k] = have - leaving[k]
        groups = replace(groups, shares=left)
    g, curvature = weight.gradient, weight.curvature
    gradients = [s.gradient for s in leaving.values() if s.gradient is not None]
    for slope in (*slopes, *gradients):
        if g is None:  # None stood for 0
            g = {n: torch.zeros_like(v) for n, v in weight.anchor.items()}
        g = plus(g, slope, -1.0)
    out = [s.curvature for s in leaving.values() if s.curvature is not None]
    clipped = 0.0
    if curvature is not None and out:
        whole = sum(out[1:], start=out[0])
        curvature, clipped = _minus(curvature, whole, on_indefinite)
        if merge and isinstance(curvature, BlockDiagonal):
            curvature = curvature.merge()
    return replace(weight, gradient=g, curvature=curvature, groups=groups), clipped


# -------------------------------------------------------------------- groups


def grouped(
    terms: Terms,
    recipe: Recipe,
    over: Pass,
    groups: Tensor | None,
    *,
    held: Memory | None,
    kept: Memory | None,
    evicted: Memory | None,
    max_groups: int,
    beliefs: tuple[float, ...],
    strengths: tuple[float, ...],
) -> Groups | None:
    """The shares of g and G by group, at the present weights; None where nobody asked for any.

    terms: of the past, whose shares are rebased; groups: (N,) of the new data, -1 for none; held,
    kept, evicted: as ``recall.merge`` gives them; beliefs, strengths: of the past tasks, as
    ``Prior`` has them. What leaves the memory joins its group's share.
    Raises ValueError for groups that are not N integers of at least -1, more than ``max_groups``,
    and priors that mix their examples.
    """
    params = parameters(over.model)
    found: Groups | None = None
    for term in terms:
        if isinstance(term, WeightTerm) and term.groups is not None:
            d = {n: params[n].detach() - a for n, a in term.anchor.items()}
            moved = term.groups.mapped(lambda share, d=d: share.rebased(d))
            found = moved if found is None else found + moved
    if groups is None and found is None:
        return None
    if recipe.kernel or recipe.structure == "path" or recipe.compact or recipe.distil:
        raise ValueError(
            f"the {recipe.name} prior mixes its examples, so it has no share of a group; use a "
            "prior with a memory or a curvature, such as gradient_reconstruction"
        )
    found = Groups({}, NO_MEMBERS) if found is None else found
    leaves_out = recipe.exclude_memory
    if evicted is not None:
        belongs = found.of(evicted)
        for k in belongs[belongs >= 0].unique().tolist():
            items = evicted.drop(belongs != k)
            share = _evicted(items, recipe, over, beliefs, strengths, curvature=leaves_out)
            found = found + Groups({k: share}, NO_MEMBERS)
    if groups is not None:
        ids = _ids(over)
        groups = _require_groups(groups, len(ids))
        inside = ids[:0] if kept is None else kept.origin.cpu()
        new = _shares(over, recipe, groups, inside, inside if leaves_out else ids[:0])
        members = NO_MEMBERS
        if kept is not None:
            place = dict(zip(ids.tolist(), groups.tolist(), strict=True))
            rows = zip(kept.task.tolist(), kept.origin.tolist(), strict=True)
            # What an eviction made room for may not hold all that was chosen.
            named = [(t, i, place[i]) for t, i in rows if place.get(i, -1) >= 0]
            members = torch.tensor(named, dtype=torch.int64).reshape(-1, 3)
        found = found + Groups({k: s for k, s in new.items() if k >= 0}, members)
    found = found.held(held)
    if len(found.shares) > max_groups:
        size = sum(p.numel() for p in params.values())
        raise ValueError(
            f"{len(found.shares)} groups would each keep a gradient and a curvature of {size:,} "
            f"parameters, and at most {max_groups} may; pass a larger max_groups, or coarser groups"
        )
    return found


def _require_groups(groups: Tensor, count: int) -> Tensor:
    groups = torch.as_tensor(groups)
    if groups.shape != (count,) or not _are_integers(groups):
        raise ValueError(
            f"groups must be one integer for each of the {count} examples, got "
            f"{groups.dtype} of shape {tuple(groups.shape)}"
        )
    if count and int(groups.min()) < -1:
        raise ValueError(f"groups count from 0, and -1 is none; got {int(groups.min())}")
    return groups.to("cpu", torch.int64)


def _are_integers(numbers: Tensor) -> bool:
    return numbers.dtype != torch.bool and torch.can_cast(numbers.dtype, torch.int64)


def _shares(
    over: Pass, recipe: Recipe, groups: Tensor, exclude: Tensor, exclude_curvature: Tensor
) -> dict[int, Share]:
    """What each group's examples put into g and G at the present weights; ids that are excluded
    count in neither, or in G alone."""
    exact = _exact(recipe)
    shares = {}
    for k in groups.unique().tolist():
        data = over.data if bool((groups == k).all()) else _rows(over, groups == k)
        part = replace(over, data=data)
        ids = _ids(part)
        count = int((~torch.isin(ids, exclude)).sum())
        gradient = curvature = None
        if count and recipe.gradient != "none":
            gradient = data_gradient(
                over.model,
                data,
                over.likelihood,
                head=over.head,
                exclude=exclude,
                batch_size=over.batch_size,
            )
        if recipe.structure is not None and not bool(torch.isin(ids, exclude_curvature).all()):
            curvature = fit_curvature(exact, part, exclude=exclude_curvature)
        if count or curvature is not None:
            shares[k] = Share(count, gradient, curvature)
    return shares


def _exact(recipe: Recipe) -> Recipe:
    return recipe if recipe.estimator != "mc" else replace(recipe, estimator="exact")


def _evicted(
    items: Memory,
    recipe: Recipe,
    over: Pass,
    beliefs: tuple[float, ...],
    strengths: tuple[float, ...],
    *,
    curvature: bool,
) -> Share:
    """What examples that had to leave the memory put into g and G now, as ``recall`` does."""
    gradient: Params | None = None
    if recipe.gradient != "none":
        gradient = {}
        for group, head in by_head(items):
            pair, believed = (group.inputs, group.labels), each_of(beliefs, group)
            g = data_gradient(over.model, pair, over.likelihood, head=head, weights=believed)
            gradient = plus(g, gradient)
    G = evicted_curvature(items, recipe, over, beliefs, strengths) if curvature else None
    return Share(len(items), gradient, G)


def _ids(over: Pass) -> Tensor:
    """(N,) int64, on the CPU: memory, data and groups may lie on different devices."""
    return torch.cat([batch.ids.cpu() for batch in batches(over.data, over.batch_size)])


def _rows(over: Pass, which: Tensor) -> Examples:
    """The marked examples, by position, read into memory."""
    data = as_data(over.data)
    if isinstance(data, Examples):
        return data[which.nonzero().squeeze(1)]
    parts, start = [], 0
    for batch in batches(data, over.batch_size):
        n = len(batch.labels)
        index = which[start : start + n].nonzero().squeeze(1)
        parts.append(batch.rows(index))
        start += n
    return Examples(
        concat([p.inputs for p in parts]),
        torch.cat([p.labels for p in parts]),
        torch.cat([p.ids for p in parts]),
    )


def _whole_groups(
    shares: Groups | None,
    over: Pass | None,
    task: int | None,
    ids: Tensor | None,
    where: Where | None,
    groups: Tensor | None,
) -> set[int] | None:
    """The groups to forget as a whole; None where single examples are meant."""
    if over is not None or groups is None:
        return None
    if task is not None or ids is not None or where is not None:
        raise ValueError(
            "a group's share is one sum, so a group is forgotten as a whole: expected groups "
            "alone; for some of its examples pass data and groups, the group of each"
        )
    if not groups.numel() or not _are_integers(groups):
        raise ValueError(
            "expected the numbers of the groups to forget, such as groups=[3], got "
            f"{groups.numel()} of {groups.dtype}"
        )
    wanted = set(groups.flatten().tolist())
    known = set() if shares is None else shares.known
    if wanted - known:
        raise ValueError(
            f"groups {sorted(wanted - known)[:10]} are not known: they were forgotten before, or "
            "the data were learned without prior.update(..., groups=...)"
        )
    return wanted


def _groups_of(over: Pass, shares: Groups | None, rest: Tensor, groups: Tensor | None) -> Tensor:
    """(N,) the group of each of the data: whose shares shrink with them."""
    ids = _ids(over)
    if groups is not None:
        groups = _require_groups(groups, len(ids))
        known = set() if shares is None else shares.known
        unknown = sorted(set(groups[groups >= 0].tolist()) - known)
        if unknown:
            raise ValueError(
                f"groups {unknown[:10]} are not known: they were forgotten before, or the data "
                "were learned without prior.update(..., groups=...)"
            )
        return groups
    if shares is not None and not bool(torch.isin(ids, rest).all()):
        raise ValueError(
            "this prior keeps shares by group, and these examples are not in memory: say of which "
            "group each is, groups=(N,) as in update and -1 for none, so that none leaves twice"
        )
    return torch.full((len(ids),), -1)


# -------------------------------------------------------------------- examples


def _of_several_tasks(gone: list[Memory]) -> bool:
    """Whether one id stands for examples of more than one task."""
    pairs = {pair for m in gone for pair in zip(m.origin.tolist(), m.task.tolist(), strict=True)}
    return len({origin for origin, _ in pairs}) < len(pairs)


def _once(ids: Tensor) -> Tensor:
    """The ids; ValueError where one is given twice, since its example would leave twice."""
    values, counts = ids.unique(return_counts=True)
    if bool((counts > 1).any()):
        raise ValueError(
            "each example may be given once, and of examples of several tasks under one id those "
            f"of a task at a time; ids {values[counts > 1][:10].tolist()} are given twice"
        )
    return ids


def _are_the_given(gone: list[Memory], over: Pass, ids: Tensor) -> bool:
    """Whether the items hold the inputs and labels that the data have under the same ids, which
    are ``ids`` in the order of the data."""
    ordered, place = ids.sort()
    found: list[tuple[Memory, Tensor]] = []  # items in the order of the data, and their places
    for memory in gone:
        origin = memory.origin.cpu()
        index = among(origin, ordered).nonzero().squeeze(1)
        places, order = place[torch.searchsorted(ordered, origin[index])].sort()
        found += [(memory[index[order]], places)] if len(index) else []
    start = 0
    for batch in batches(over.data, over.batch_size) if found else ():
        stop = start + len(batch.labels)
        for memory, places in found:
            low, high = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
            mine, theirs = memory[slice(low, high)], places[low:high] - start
            if not _equal(read(mine.inputs), take(batch.inputs, theirs)):
                return False
            if not _equal(mine.labels, batch.labels[theirs]):
                return False
        start = stop
    return True


def _equal(a: Inputs, b: Inputs) -> bool:
    """Whether the numbers are the same, in the dtype and on the device of the first."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(v, b[key]) for key, v in a.items())
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.shape == b.shape and torch.equal(a, b.to(a))


def _of_task(
    recipe: Recipe, task: int | None, beliefs: tuple[float, ...], strengths: tuple[float, ...]
) -> tuple[Recipe, float]:
    """The recipe with the strength at which a task's curvature was added, and how much the task
    is believed now. Raises ValueError for a task that was never learned, and for none where the
    tasks differ."""
    found = list(zip(strengths, beliefs, strict=True))
    if task is not None and not 0 <= task < len(found):
        raise ValueError(f"task must be one of the {len(found)} that were learned, got {task}")
    if task is None and len(set(found)) > 1:
        raise ValueError(
            f"the tasks were added at the strengths {strengths} and are believed {beliefs} times, "
            "so how much these examples said depends on their task; say which by task="
        )
    strength, belief = found[task or 0] if found else (1.0, 1.0)
    return recipe.with_strength(strength), belief


def _in_gradient(items: Memory, beliefs: tuple[float, ...]) -> Tensor:
    """(M,) how much of each item's J*ᵀ r is in g: all that it does not replay itself.

    So it is at any anchor where soft and hard weight make the belief. Of another soft weight each
    refresh added soft J*ᵀ (h(f') - h(f*)), of which as much stays as soft + hard exceed it.
    """
    return each_of(beliefs, items) - items.hard_weight


def _residual_slope(
    model: nn.Module, items: Memory, likelihood: Likelihood, weights: Tensor
) -> Params:
    """sum_i w_i J_iᵀ r_i of remembered items, r_i = h(f*_i) - t(y_i) by the stored belief: that one
    is in g, whatever the model says now (beliefs that are not refreshed, other outputs)."""
    params = parameters(model)
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for start in range(0, len(items), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        part = items[rows]
        r = residual(likelihood, part.outputs, part.labels, part.mask)
        with differentiating(model):
            f = forward(model, move(part.inputs, device_of(model)))
            value = (f * (r * weights[rows].unsqueeze(1)).to(f)).sum()
            grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for n, grad in zip(params, grads, strict=True):
            if grad is not None:
                total[n] = total[n] + grad
    return total


def _chosen(memory: Memory, task: int | None, ids: Tensor | None, where: Where | None) -> Tensor:
    """(M,) bool: the items of that task with those ids and the property; None stands for any."""
    which = torch.ones(len(memory), dtype=torch.bool, device=memory.origin.device)
    if task is not None:
        which &= memory.task == task
    if ids is not None:
        which &= torch.isin(memory.origin, ids.to(memory.origin.device))
    if where is not None:
        marked = where(memory)
        if (
            not isinstance(marked, Tensor)
            or marked.dtype != torch.bool
            or marked.shape != (len(memory),)
        ):
            found = (
                f"{marked.dtype} of shape {tuple(marked.shape)}"
                if isinstance(marked, Tensor)
                else type(marked).__name__
            )
            raise ValueError(
                f"where must give one bool for each of the {len(memory)} remembered examples, "
                f"such as lambda memory: memory.labels == 3, got {found}"
            )
        which &= marked.to(which.device)
    return which


def _minus(
    curvature: Curvature, leaving: Curvature, on_indefinite: OnIndefinite
) -> tuple[Curvature, float]:
    """curvature - leaving, and what clipping put back as a fraction of the trace of ``leaving``.

    Raises ValueError where the result is indefinite, or has no positive part to be clipped to.
    """
    left = curvature + leaving * -1.0
    bad = indefinite(left, beside=curvature)
    if bad and on_indefinite == "raise":
        raise ValueError(
            f"without these examples the curvature would be indefinite in {bad[:5]}: they were "
            "not learned at this anchor, or were forgotten before, or the structure approximates "
            "(diagonal, block and dense are exact), or the curvature is of a sample "
            "(curvature_examples), and an approximation of all examples less one of some need not "
            "be positive; refit the prior from the data that stay, or pass on_indefinite='clip' to "
            "keep the positive part, which removes less"
        )
    if isinstance(left, Diagonal):  # rounding, or clipped
        clamped = Diagonal({n: v.clamp(min=0) for n, v in left.values.items()})
        return clamped, _put_back(left, clamped, leaving) if bad else 0.0
    if not bad:  # what a subtraction of directions leaves is spanned by as many as there were
        return (_positive_part(left) if isinstance(left, LowRank) else left), 0.0
    if isinstance(left, BlockDiagonal):
        blocks = tuple(
            _positive_part(b) if any(n in bad for n in b.shapes) else b for b in left.blocks
        )
        positive: Curvature = replace(left, blocks=blocks)
    else:
        positive = _positive_part(left)
    return positive, _put_back(left, positive, leaving)


def _put_back(left: Curvature, positive: Curvature, leaving: Curvature) -> float:
    def trace(c: Curvature) -> float:
        return sum(float(v.double().sum()) for v in c.diagonal().values())

    whole = trace(leaving)
    return (trace(positive) - trace(left)) / whole if whole > 0 else 0.0


def _positive_part(curvature: Curvature) -> Curvature:
    """The nearest positive semi-definite one, in the Frobenius norm (of Kronecker products, the
    positive part of the nearest one); raises ValueError where the structure has none of its own
    kind."""
    if isinstance(curvature, Diagonal):
        return Diagonal({n: v.clamp(min=0) for n, v in curvature.values.items()})
    if isinstance(curvature, Isotropic):
        return replace(curvature, value=curvature.value.clamp(min=0))
    if isinstance(curvature, Dense):
        values, vectors = torch.linalg.eigh(curvature.matrix)
        return replace(curvature, matrix=(vectors * values.clamp(min=0)) @ vectors.T)
    if isinstance(curvature, LowRank):
        basis, values = curvature._spectrum
        # The last, largest one stays in any case: there is no curvature without a direction.
        above = values > torch.finfo(values.dtype).eps * len(values) * values.abs().max()
        above[-1] = True
        basis, values = basis[:, above], values[above]
        directions = (basis * values.clamp(min=0).sqrt()).T
        factors, start = {}, 0
        for name, shape in curvature.shapes.items():
            part = directions[:, start : start + shape.numel()]
            factors[name], start = part.reshape(-1, *shape), start + shape.numel()
        return LowRank(factors, torch.ones_like(values))
    if isinstance(curvature, Kronecker):
        return curvature.positive_part()
    raise ValueError(
        f"a {type(curvature).__name__} curvature has no positive part that is a sum of products "
        "again; clip works for diagonal, isotropic, dense, block, low_rank and kronecker"
    )


def indefinite(curvature: Curvature, beside: Curvature | None = None) -> list[str]:
    """The parameters in blocks with a negative eigenvalue, beyond rounding in numbers of the size
    of ``beside``, by default its own."""
    beside = curvature if beside is None else beside
    before, after = beside.diagonal(), curvature.diagonal()
    bad = [n for n, v in after.items() if bool((v < -1e-6 * before[n].abs().max()).any())]
    for block in curvature.blocks if isinstance(curvature, BlockDiagonal) else (curvature,):
        if isinstance(block, Diagonal):
            continue
        name = next(iter(block.shapes))
        whole = beside.block_of(name) if isinstance(beside, BlockDiagonal) else beside
        if _is_indefinite(block, beside=whole):
            bad += [n for n in block.shapes if n not in bad]
    return bad


def _is_indefinite(curvature: Curvature, beside: Curvature) -> bool:
    """Whether an eigenvalue is negative, beyond rounding in numbers of the size of ``beside``.

    Exact for a dense one and up to ``_WHOLE`` weights. A larger one by Lanczos, which finds the
    outermost eigenvalues first, and may miss one below 0 by a few
    thousandths of the largest.
    """
    diagonal = curvature.diagonal()
    size = sum(v.numel() for v in diagonal.values())
    eps = max(torch.finfo(v.dtype).eps for v in diagonal.values())
    rounding = max(1e-6, 8 * eps * size**0.5) * _ends(beside)[1]
    if isinstance(curvature, Dense) or size <= _WHOLE:
        return bool(torch.linalg.eigvalsh(curvature.dense().matrix)[0] < -rounding)
    return _ends(curvature)[0] < -rounding


def _ends(curvature: Curvature) -> tuple[float, float]:
    """The smallest and the largest eigenvalue in the Krylov space of a random vector: Lanczos,
    each product made orthogonal to all before, twice, as rounding asks (Parlett 1980)."""
    shapes, generator = curvature.shapes, torch.Generator().manual_seed(0)
    start = flatten(shapes, curvature.diagonal())
    x = torch.randn(len(start), generator=generator, dtype=start.dtype).to(start.device)
    basis = start.new_zeros(min(_ITERATIONS, len(start)), len(start))
    within = start.new_zeros(len(basis), len(basis))  # the matrix in the basis
    for k in range(len(basis)):
        basis[k] = x / x.norm()
        x = flatten(shapes, curvature.mv(unflatten(shapes, basis[k])))
        size = x.norm()
        for _ in range(2):
            along = basis[: k + 1] @ x
            within[: k + 1, k] += along
            x = x - along @ basis[: k + 1]
        if not bool(x.norm() > torch.finfo(x.dtype).eps * len(x) ** 0.5 * size):
            within = within[: k + 1, : k + 1]  # nothing new: the space holds its products
            break
    values = torch.linalg.eigvalsh(within.double(), UPLO="U")
    return float(values[0]), float(values[-1])


@contextmanager
def _at_anchor(model: nn.Module, anchor: Params | None) -> Iterator[None]:
    """The anchor's weights inside, the present ones restored after."""
    if anchor is None:
        yield
        return
    params = match(model, anchor)
    present = {n: p.detach().clone() for n, p in params.items()}
    try:
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(anchor[n])
        yield
    finally:
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(present[n])

r"""Carry the past to another model: other layers, features, classes or names.

Pure functions from terms to terms; ``Prior.transfer`` and ``.grow`` call them. What moves how:

    memory  D(f*, f) and l(y, f) need inputs and outputs alone, so they move to any model. Outputs
            are found by ``classes``; a class that is dropped takes its examples along, and the
            others' soft labels are renormalised over the classes that are kept.
    g, G    follow the parameters that both models have (``curvature.follow``). The weights of a
            feature or unit that is dropped become 0, and g feels it through G: g + G d; a bias
            that is dropped, too, and a module that is gone as a whole stays at its anchor.
    R       is of the model that there is: new parameters get it, lost ones take it along.

Where g cannot follow, the residuals r_i = h(f*_i) - t(y_i) that it carried are lost, unless labels
carry them: for an exponential family l(y, f) = D(f*, f) + <r, f> + a constant, so an item that is
turned from function to replay has its own, whatever the model. If memory holds all of the past,
that is exact for any change, and is what happens unless told otherwise. If it holds a part, it
is not done: at a minimum the residuals of *all* the past nearly cancel (their pull on the old
weights is only -R's), those of a part do not, least of all of the doubtful examples that scores
choose. Then soft labels alone are the better estimate: distillation.
Source: Khan & Swaroop 2021 (change the model class).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .curvature import Curvature
from .curvature.follow import Place, Places, follow, followed
from .data import Head
from .errors import StaleAnchorError
from .groups import Groups, Share
from .jacobians import gradient as data_gradient
from .likelihoods import Bernoulli, Categorical, Likelihood
from .memory import Memory, is_top
from .models import Params, device_of, evaluating, forward, move, parameters, rows, snapshot, take
from .recall import Terms, by_head, plus
from .recipe import Recipe
from .removal import _at_anchor, _in_gradient
from .terms import KernelTerm, MemoryTerm, Regulariser, WeightTerm

NewClasses = Literal["zero", "mask"]
Classes = Sequence[int | None]

ABSENT = -1e4  # the logit of a new output: probability 0 in every dtype, and finite in float16 too


@dataclass(frozen=True, eq=False)
class Plan:
    """How the new model's parameters and outputs lie in the old ones.

    current: its trained parameters. places: where each lies. classes: for each output the old
    one, None for a new one; ``None`` in place of all: the same outputs. dropped: old outputs that
    are gone. outputs: the parameters whose rows are the outputs. lost: old parameters that none
    stands for; zero: those of them that count as 0 from now on. novel: whether some number of the
    new model, other than those of a new output, has no counterpart.
    """

    current: Params
    places: Places
    classes: tuple[int | None, ...] | None
    dropped: tuple[int, ...]
    outputs: frozenset[str]
    lost: tuple[str, ...]
    zero: tuple[str, ...]
    novel: bool

    @property
    def shares(self) -> bool:
        return any(place.old is not None for place in self.places.values())


def plan(
    terms: Terms,
    model: nn.Module,
    *,
    names: Mapping[str, str] | None = None,
    classes: Classes | None = None,
    head: Sequence[str] | None = None,
    curvature: Curvature | None = None,
    previous: nn.Module | None = None,
    allow_unmatched: bool = False,
) -> Plan:
    """See ``Prior.transfer`` for the arguments and what is raised."""
    current = {n: p.detach() for n, p in parameters(model).items()}
    known = next((t.anchor for t in terms if isinstance(t, WeightTerm)), None)
    if known is None and curvature is not None:  # FROMP's, of which no term holds the anchor
        known = curvature.diagonal()
    olds = known
    if olds is None:
        olds = current if previous is None else snapshot(parameters(previous))
    mapping = _mapping(current, olds, names, allow_unmatched)
    memory = next((t.memory for t in terms if isinstance(t, (MemoryTerm, KernelTerm))), None)
    old = width = None
    if memory is not None and len(memory):
        old, width = memory.reference.shape[1], _num_outputs(model, memory)
    chosen = _classes(classes, old, width)
    moves = chosen is not None and any(c not in (None, i) for i, c in enumerate(chosen))
    # Without a memory the width of the old outputs is not known: rows may have gone at the end.
    asked = moves or (old is None and (head is not None or _resized(current, olds, mapping)))
    heads: set[str] = set()
    if chosen is not None and asked and mapping:
        heads = set(_head_parameters(model, current, memory, len(chosen), head))
    index = None if chosen is None else torch.tensor([-1 if c is None else c for c in chosen])
    places = {n: Place(mapping.get(n), index if n in heads else None) for n in current}
    if old is not None and width is not None and old != width and not moves:
        # The leading outputs are the same, so a guess by size does: it decides no place.
        heads = {
            n
            for n, p in current.items()
            if _sizes(p, olds.get(places[n].old or "")) == (old, width)
        }
    lost = () if known is None else tuple(sorted(known.keys() - set(mapping.values())))
    return Plan(
        current=current,
        places=places,
        classes=chosen,
        dropped=() if chosen is None or old is None else tuple(set(range(old)) - set(chosen)),
        outputs=frozenset(heads),
        lost=lost,
        zero=_without_a_part(model, mapping, lost),
        novel=any(_is_novel(p, places[n], olds, n in heads) for n, p in current.items()),
    )


def transfer(
    terms: Terms,
    model: nn.Module,
    how: Plan,
    *,
    likelihood: Likelihood,
    recipe: Recipe,
    holds_all: bool,
    new_classes: NewClasses = "zero",
    labels: bool | None = None,
    previous: nn.Module | None = None,
    allow_unmatched: bool = False,
    beliefs: tuple[float, ...] = (1.0,),
) -> tuple[Terms, list[str]]:
    """(the terms for another model, the old parameters whose g or G were left behind)."""
    weights = [t for t in terms if isinstance(t, WeightTerm)]
    if how.lost and not allow_unmatched:
        raise StaleAnchorError(
            f"no trained parameter of the new model stands for {list(how.lost[:5])}; map them by "
            "parameters={new: old}, or pass allow_unmatched=True to leave behind what they said"
        )
    exactly = holds_all and not (recipe.kernel or recipe.compact) and _counts_once(terms)
    if labels is None:
        labels = exactly and bool(how.lost or how.dropped or how.novel)
    if labels and any(isinstance(t, KernelTerm) for t in terms):
        raise ValueError("a kernel has no place for true labels; expected labels=False, or None")
    whole = labels and exactly  # g and G have nothing left to carry
    behind: list[str] = []
    changed: list[Any] = []
    for term in terms:
        if isinstance(term, WeightTerm):
            if not whole:
                behind += [n for n in how.lost if n not in behind]
            if whole or not how.shares:
                if labels and term.groups is not None:
                    changed.append(_membership(term.groups, how))
                continue
            if labels or how.dropped:
                if len(weights) > 1:
                    raise ValueError(
                        "a sum of priors has several anchors, so nothing tells whose residuals "
                        "must move; transfer each prior before adding them"
                    )
                term = _without_residuals(
                    term, terms, how, likelihood, recipe, labels, previous, beliefs
                )
            term, lost = _followed_weight(term, how, leave=allow_unmatched)
            behind += [n for n in lost if n not in behind]
        elif isinstance(term, Regulariser):
            if term.mean is not None:
                zeros = {n: torch.zeros_like(p) for n, p in how.current.items()}
                term = replace(term, mean=followed(term.mean, zeros, how.places))
        elif isinstance(term, MemoryTerm):
            memory = _narrowed(term.memory, how.dropped, likelihood, recipe)
            memory = _reindexed(memory, how.classes, new_classes)
            if labels:
                memory = memory.weighted(0.0, memory.soft_weight + memory.hard_weight)
            term = replace(term, memory=memory)
        elif isinstance(term, KernelTerm):
            term = _reindexed_kernel(term, how, new_classes)
        changed.append(term)
    return _held_alone(changed), behind


def _counts_once(terms: Terms) -> bool:
    """Whether each item stands for itself and nothing else, by the likelihood's own divergence."""
    for term in terms:
        if isinstance(term, MemoryTerm):
            total = term.memory.soft_weight + term.memory.hard_weight
            own = not term.has_soft or getattr(term.divergence, "temperature", None) == 1
            if not own or bool(((total - 1).abs() > 1e-6).any()):
                return False
    return True


def _membership(groups: Groups, how: Plan) -> WeightTerm:
    """Whose example each is, where g and G stay behind: replay leaves without them."""
    counts = {k: Share(share.count) for k, share in groups.shares.items() if share.count}
    return WeightTerm(snapshot(how.current), groups=Groups(counts, groups.members))


def _held_alone(terms: Sequence[Any]) -> Terms:
    """The same terms; groups do without the examples that left memory with their class."""
    memories = [t.memory for t in terms if isinstance(t, (MemoryTerm, KernelTerm))]

    def changed(term: Any) -> Any:
        if not isinstance(term, WeightTerm) or term.groups is None:
            return term
        held = memories[0].add(*memories[1:]) if memories else None
        return replace(term, groups=term.groups.held(held))

    return tuple(changed(term) for term in terms)


# -------------------------------------------------------------------- names and outputs


def _mapping(
    current: Params, olds: Params, names: Mapping[str, str] | None, allow_unmatched: bool
) -> dict[str, str]:
    if names is None:
        alike = (n for n in current if n in olds)
        return {n: n for n in alike if not allow_unmatched or current[n].ndim == olds[n].ndim}
    unknown = [n for n in names if n not in current] + [o for o in names.values() if o not in olds]
    if unknown:
        raise ValueError(
            f"parameters={{new: old}} names {unknown[:5]}, which no trained parameter of either "
            f"model has; the new model's are {list(current)[:5]}, the prior's {list(olds)[:5]}"
        )
    twice = sorted({o for o in names.values() if list(names.values()).count(o) > 1})
    if twice:
        raise ValueError(
            f"two new parameters stand for {twice[:5]}: what these said would count twice; "
            "expected each old name once"
        )
    return dict(names)


def _num_outputs(model: nn.Module, memory: Memory) -> int:
    few = move(take(memory.inputs, slice(0, 1)), device_of(model))
    with evaluating(model), torch.no_grad():
        return forward(model, few).shape[1]


def _classes(
    classes: Classes | None, old: int | None, width: int | None
) -> tuple[int | None, ...] | None:
    """For each new output the old one; None where nothing is known of either."""
    if classes is None:
        if width is None or old is None:
            return None
        if width < old:
            raise StaleAnchorError(
                f"the memory holds beliefs about {old} outputs, the model has {width}; say which "
                "are kept: classes=(...), for each output of the model the old one"
            )
        return (*range(old), *([None] * (width - old)))
    chosen = tuple(classes)
    kept = [c for c in chosen if c is not None]
    if len(set(kept)) < len(kept) or not kept or min(kept) < 0 or max(kept) >= (old or 10**9):
        among = "" if old is None else f" of 0 to {old - 1}"
        raise ValueError(
            f"classes names for each new output the old one, or None: expected different numbers"
            f"{among}, at least one, got {chosen}"
        )
    if width is not None and width != len(chosen):
        raise ValueError(
            f"classes names {len(chosen)} outputs, but the model has {width}; expected one entry "
            "for each output of the new model"
        )
    return chosen


def _head_parameters(
    model: nn.Module,
    current: Params,
    memory: Memory | None,
    width: int,
    given: Sequence[str] | None,
) -> list[str]:
    """The parameters whose row c bears on output c alone."""
    if given is not None:
        wrong = [n for n in given if n not in current or len(current[n]) != width]
        if wrong:
            raise ValueError(
                f"head names {wrong[:5]}, which are no trained parameters with {width} rows; "
                f"expected those whose rows are the outputs, among {list(current)[:8]}"
            )
        return list(given)
    if memory is None or not len(memory):
        raise ValueError(
            "without a memory nothing tells which parameters belong to which output; name them: "
            "head=('fc.weight', 'fc.bias')"
        )
    few = move(take(memory.inputs, slice(0, min(8, rows(memory.inputs)))), device_of(model))
    candidates = [n for n, p in current.items() if p.ndim and len(p) == width]
    params = parameters(model)
    alone = set(candidates)
    touched: set[str] = set()
    with evaluating(model), torch.enable_grad():
        f = forward(model, few)
        for c in range(width if candidates else 0):
            grads = torch.autograd.grad(
                f[:, c].sum(), [params[n] for n in candidates], retain_graph=True,
                materialize_grads=True,
            )  # fmt: skip
            for n, g in zip(candidates, grads, strict=True):
                others = torch.arange(width, device=g.device) != c
                if bool(g[others].any()):
                    alone.discard(n)
                if bool(g[c].any()):
                    touched.add(n)
    return [n for n in candidates if n in alone and n in touched]


def _resized(current: Params, olds: Params, mapping: Mapping[str, str]) -> bool:
    """Whether some parameter has more or fewer rows than the old one."""
    sizes = (_sizes(current[n], olds[old]) for n, old in mapping.items())
    return any(s is not None and s[0] != s[1] for s in sizes)


def _without_a_part(
    model: nn.Module, mapping: Mapping[str, str], lost: tuple[str, ...]
) -> tuple[str, ...]:
    """The lost parameters whose module is still there, but has no such part, not even frozen."""
    names = dict(model.named_parameters(remove_duplicate=False))
    gone = []
    for name in lost:
        module, _, part = name.rpartition(".")
        now = {n.rpartition(".")[0] for n, o in mapping.items() if o.rpartition(".")[0] == module}
        if now and not any(f"{m}.{part}".lstrip(".") in names for m in now):
            gone.append(name)
    return tuple(gone)


def _sizes(new: Tensor, old: Tensor | None) -> tuple[int, int] | None:
    return None if old is None or not old.ndim or not new.ndim else (len(old), len(new))


def _is_novel(new: Tensor, place: Place, olds: Params, of_outputs: bool) -> bool:
    """Whether a number of this parameter, not of a new output, has no old counterpart."""
    if place.old is None:
        return True
    old = olds[place.old]
    if old.ndim != new.ndim:
        return True
    grown = [b > a for a, b in zip(old.shape, new.shape, strict=True)]
    return any(grown[1:] if of_outputs else grown)


# -------------------------------------------------------------------- weights


def _followed_weight(term: WeightTerm, how: Plan, *, leave: bool) -> tuple[WeightTerm, list[str]]:
    away, lost = _dropped_features(term, how), []

    def follow_share(share: Share) -> Share:
        gradient, curvature = share.rebased(away).gradient if away else share.gradient, None
        if share.curvature is not None:
            curvature, left = follow(share.curvature, how.current, how.places, leave=leave)
            lost.extend(n for n in left if n not in lost)
        if gradient is not None:
            zeros = {n: torch.zeros_like(p) for n, p in how.current.items()}
            gradient = followed(gradient, zeros, how.places)
        return Share(share.count, gradient, curvature)

    of_all = follow_share(Share(0, term.gradient, term.curvature))
    groups = None if term.groups is None else term.groups.mapped(follow_share)
    anchor = followed(term.anchor, how.current, how.places)
    return WeightTerm(anchor, of_all.gradient, of_all.curvature, groups), lost


def _dropped_features(term: WeightTerm, how: Plan) -> Params | None:
    """d where the numbers that the new model lacks are 0, as the weight of a feature that is not
    there, and the others at the anchor: the slope G d there is the others' new g. So is a lost
    parameter of a module that stays, as a bias; the model without a module is not the one where it
    is 0, so that stays at the anchor. None where nothing is dropped but outputs, of which a weight
    of 0 would say something."""
    away = {n: torch.zeros_like(v) for n, v in term.anchor.items()}
    for n, p in how.current.items():
        old = how.places[n].old
        if old not in away or old is None or p.ndim != away[old].ndim:
            continue
        kept = [slice(0, min(a, b)) for a, b in zip(away[old].shape, p.shape, strict=True)]
        if n in how.outputs and kept:
            kept[0] = slice(None)
        away[old] = -term.anchor[old]
        away[old][tuple(kept)] = 0.0
    for old in how.zero:
        if old in away:
            away[old] = -term.anchor[old]
    return away if any(bool(v.any()) for v in away.values()) else None


def _without_residuals(
    term: WeightTerm,
    terms: Terms,
    how: Plan,
    likelihood: Likelihood,
    recipe: Recipe,
    labels: bool,
    previous: nn.Module | None,
    beliefs: tuple[float, ...],
) -> WeightTerm:
    """g less what memory will carry itself, or in another way, from now on:

    g - sum_all w J*ᵀ r + sum_kept w J*ᵀ r' - (with labels) sum_kept s J*ᵀ r',

    w: how much of an item is in g; s: its soft weight; r': its residual among the kept outputs.
    """
    held = [t.memory for t in terms if isinstance(t, MemoryTerm) and len(t.memory)]
    if not held or (term.gradient is None and recipe.gradient == "none"):
        return term
    if previous is None:
        raise ValueError(
            "the residuals of the remembered examples are in g, by the old model's Jacobian; pass "
            "previous=, the model that this prior was learned with, so that they can be moved"
        )
    g = term.gradient or {n: torch.zeros_like(v) for n, v in term.anchor.items()}

    def moved(memory: Memory, weights: Tensor, sign: float) -> None:
        nonlocal g
        for group, head in by_head(memory.weighted(weights, 0.0)):
            pair = (group.inputs, group.labels)
            of_group = data_gradient(
                previous, pair, likelihood, head=head, weights=group.soft_weight
            )
            g = plus(g, of_group, sign)

    with _at_anchor(previous, term.anchor), evaluating(previous):
        for memory in held:
            kept = _narrowed(memory, how.dropped, likelihood, recipe)
            if how.dropped:
                moved(memory, _in_gradient(memory, beliefs), -1.0)
                moved(kept, _in_gradient(kept, beliefs), 1.0)
            if labels:
                moved(kept, kept.soft_weight, -1.0)
    return replace(term, gradient=g)


# -------------------------------------------------------------------- memory


def _narrowed(
    memory: Memory, dropped: tuple[int, ...], likelihood: Likelihood, recipe: Recipe
) -> Memory:
    """Without some outputs, though they still have their columns: examples of a dropped class
    leave, and the others choose among the rest. Outputs that do not compete are left without a
    residual."""
    if not dropped or not len(memory):
        return memory
    if recipe.compact:
        raise ValueError(
            "compact vectors mix all classes, so none can be dropped; learn them anew from data "
            "of the classes that are kept"
        )
    num_outputs = memory.reference.shape[1]
    gone = torch.zeros(num_outputs, dtype=torch.bool, device=memory.labels.device)
    gone[list(dropped)] = True
    if not isinstance(likelihood, Categorical):
        if memory.labels.ndim < 2:
            return memory
        said = likelihood.mean(memory.outputs).to(memory.labels)
        return replace(memory, labels=torch.where(gone, said, memory.labels))
    if memory.labels.ndim == 1:
        memory = memory.drop(gone[memory.labels])
    else:
        left = memory.labels.masked_fill(gone, 0.0)
        mass = left.sum(-1, keepdim=True)
        memory = replace(memory, labels=left / mass.clamp(min=torch.finfo(left.dtype).tiny))
        memory = memory.drop(mass.squeeze(1) <= 0)
    kept = tuple(c for c in range(num_outputs) if c not in dropped)
    heads = tuple(kept if h is None else tuple(c for c in h if c in kept) for h in memory.heads)
    return _with_heads(memory, heads)


def _with_heads(memory: Memory, heads: tuple[Head | None, ...]) -> Memory:
    """The same items under other heads; those that no item has are left out, equal ones are one."""
    used = [heads[i] for i in memory.head.unique().tolist()]
    unique: tuple[Head | None, ...] = tuple(dict.fromkeys(used)) or (None,)
    where = {h: i for i, h in enumerate(unique)}
    index = torch.tensor([where.get(h, 0) for h in heads], device=memory.head.device)
    return replace(memory, head=index[memory.head], heads=unique)


def _reindexed(
    memory: Memory, classes: tuple[int | None, ...] | None, new_classes: NewClasses
) -> Memory:
    """Soft labels, labels and heads in the order of the new outputs."""
    old = memory.reference.shape[1]
    if classes is None or classes == tuple(range(old)):
        return memory
    if None in classes and new_classes not in ("zero", "mask"):
        raise ValueError(f"new_classes must be 'zero' or 'mask', got {new_classes!r}")
    where = {c: i for i, c in enumerate(classes) if c is not None}
    labels = memory.labels
    if labels.is_floating_point() and labels.ndim == 2:
        labels = _columns(labels, classes, 0.0)
    elif not labels.is_floating_point():
        table = torch.tensor([where.get(c, -1) for c in range(old)], device=labels.device)
        labels = torch.where(labels < 0, labels, table[labels.clamp(min=0)])  # vectors have none
    every = tuple(range(len(classes)))
    known = tuple(i for i in every if classes[i] is not None)
    all_of_old = known if new_classes == "mask" and None in classes else None

    def found(head: Head | None) -> Head | None:
        if head is None:
            return all_of_old
        new = tuple(sorted(where[c] for c in head if c in where))
        return None if new == every else new

    # One number for the others cannot say 0 of a class and something of the rest.
    zero = None in classes and new_classes == "zero"
    k = memory.reference.k if is_top(memory.reference) and not zero else None
    f = _columns(memory.outputs, classes, ABSENT)
    memory = _with_heads(
        replace(memory, reference=f, labels=labels), tuple(found(h) for h in memory.heads)
    )
    return memory.with_top(k)


def _columns(x: Tensor, classes: tuple[int | None, ...], fill: float) -> Tensor:
    index = torch.tensor([-1 if c is None else c for c in classes], device=x.device)
    return x[:, index.clamp(min=0)].masked_fill(index < 0, fill)


def _reindexed_kernel(term: KernelTerm, how: Plan, new_classes: NewClasses) -> KernelTerm:
    """A block competes among the classes that existed when its kernel was made."""
    if how.dropped:
        raise ValueError(
            "kernels couple the means of all classes, so none can be dropped; use a prior whose "
            "memory holds soft labels, such as kprior"
        )
    if how.classes is None:
        return term
    old = tuple(range(term.memory.reference.shape[1]))
    where = {c: i for i, c in enumerate(how.classes) if c is not None}

    def found(head: Head | None) -> Head | None:
        if head is None and how.classes == old:
            return None
        return tuple(where[c] for c in (old if head is None else head))

    blocks = tuple(replace(b, head=found(b.head)) for b in term.blocks)
    return replace(term, memory=_reindexed(term.memory, how.classes, new_classes), blocks=blocks)


def renamed_heads(heads: tuple[Head | None, ...], how: Plan) -> tuple[Head | None, ...]:
    """The class sets that occurred, by their new numbers; those of dropped classes are gone."""
    if how.classes is None:
        return heads
    where = {c: i for i, c in enumerate(how.classes) if c is not None}
    found = (h if h is None else tuple(sorted(where[c] for c in h if c in where)) for h in heads)
    return tuple(dict.fromkeys(h for h in found if h is None or h))


def require_classes(likelihood: Likelihood, classes: tuple[int | None, ...] | None) -> None:
    """Raise ValueError for new outputs of a likelihood that has no value for "nothing known"."""
    if classes and None in classes and not isinstance(likelihood, (Categorical, Bernoulli)):
        raise ValueError(
            f"remembered {type(likelihood).__name__} outputs have no value that says "
            "nothing of a new output; keep the number of outputs, or start a fresh prior"
        )

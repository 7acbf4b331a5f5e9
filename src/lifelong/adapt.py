r"""Changes other than new data: forget examples, or carry the past to another model.

Pure functions from terms to terms; ``Prior.forget``, ``.transfer`` and ``.grow`` call them.
Sources: Khan & Swaroop 2021 (remove data, change the model class).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .curvature import BlockDiagonal, Curvature, Dense, Diagonal
from .data import batches
from .errors import StaleAnchorError
from .jacobians import gradient as data_gradient
from .memory import Memory, reference_outputs
from .models import Params, evaluating, match, parameters, take
from .recall import Pass, Terms, by_head, fit_curvature, plus
from .recipe import Recipe
from .terms import KernelTerm, MemoryTerm, Regulariser, WeightTerm

NewClasses = Literal["zero", "mask"]

_ITERATIONS = 50  # of the power method


# -------------------------------------------------------------------- forget


def forget(
    terms: Terms,
    recipe: Recipe,
    over: Pass | None,
    *,
    model: nn.Module,
    likelihood: Any,
    task: int | None,
    ids: Tensor | None,
) -> tuple[Terms, int]:
    """(the terms without those examples, how many left); see ``Prior.forget``."""
    if recipe.kernel or recipe.structure == "path" or recipe.compact:
        raise ValueError(
            f"the {recipe.name} prior cannot forget single examples, since its kernels, its path "
            "or its learned vectors mix them; use a prior with a memory or a curvature, such as "
            "gradient_reconstruction"
        )
    given = torch.empty(0, dtype=torch.int64)
    if over is not None:
        given = torch.cat([batch.ids for batch in batches(over.data, over.batch_size)])
    elif ids is None and task is None:
        raise ValueError("say which examples to forget: pass data, ids or task")
    wanted = given if ids is None and over is not None else ids
    weight = next((t for t in terms if isinstance(t, WeightTerm)), None)
    g = None if weight is None else weight.gradient
    if weight is not None and g is None and recipe.gradient != "none":
        g = {n: torch.zeros_like(v) for n, v in weight.anchor.items()}  # None stood for 0
    curvature = None if weight is None else weight.curvature
    kept_terms: list[Any] = []
    gone: list[Memory] = []
    for term in terms:
        if isinstance(term, MemoryTerm):
            which = _chosen(term.memory, task, wanted)
            gone.append(term.memory.drop(~which))
            term = replace(term, memory=term.memory.drop(which))
        kept_terms.append(term)
    in_memory = torch.cat([m.origin for m in gone]) if gone else given[:0]
    if task is None and _of_several_tasks(gone):
        raise ValueError(
            "the memory holds these ids of several tasks; say which by task=, or give the "
            "examples of each task ids of their own"
        )
    if over is None and not len(in_memory):
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
    with _at_anchor(model, None if weight is None else weight.anchor), evaluating(model):
        for items in gone:
            for group, head in by_head(items):
                if g is not None:
                    pair, w = (group.inputs, group.labels), _in_gradient(group, recipe)
                    g = plus(g, data_gradient(model, pair, likelihood, head=head, weights=w), -1.0)
        if over is not None:
            if g is not None:
                leaving = data_gradient(model, over.data, likelihood, head=over.head, exclude=rest)
                g = plus(g, leaving, -1.0)
            if curvature is not None:
                exact = "exact" if recipe.estimator == "mc" else recipe.estimator
                excluded = rest if recipe.exclude_memory else others
                leaving = fit_curvature(replace(recipe, estimator=exact), over, exclude=excluded)
                curvature = _minus(curvature, leaving)
    changed = [
        replace(t, gradient=g, curvature=curvature) if isinstance(t, WeightTerm) else t
        for t in kept_terms
    ]
    final = tuple(t for t in changed if not isinstance(t, MemoryTerm) or len(t.memory))
    return final, len(in_memory) + int((~torch.isin(given, rest)).sum())


def _of_several_tasks(gone: list[Memory]) -> bool:
    """Whether one id stands for examples of more than one task."""
    pairs = {pair for m in gone for pair in zip(m.origin.tolist(), m.task.tolist(), strict=True)}
    return len({origin for origin, _ in pairs}) < len(pairs)


def _in_gradient(items: Memory, recipe: Recipe) -> Tensor:
    """(M,) how much of each item's J*ᵀ r is in g: all that it does not replay itself.

    A memory that was believed less since (a discount, a multiple) has a smaller sum of weights.
    """
    total = recipe.soft + recipe.hard
    if recipe.population or not total:
        return 1.0 - items.hard_weight
    return (items.soft_weight + items.hard_weight) / total - items.hard_weight


def _chosen(memory: Memory, task: int | None, ids: Tensor | None) -> Tensor:
    """(M,) bool: the items of that task with those ids; None stands for any."""
    which = torch.ones(len(memory), dtype=torch.bool, device=memory.origin.device)
    if task is not None:
        which &= memory.task == task
    if ids is not None:
        which &= torch.isin(memory.origin, ids.to(memory.origin.device))
    return which


def _minus(curvature: Curvature, leaving: Curvature) -> Curvature:
    """curvature - leaving; raises ValueError where the result is indefinite."""
    left = curvature + leaving * -1.0
    before, after = curvature.diagonal(), left.diagonal()
    bad = [n for n, v in after.items() if bool((v < -1e-6 * before[n].abs().max()).any())]
    for block in left.blocks if isinstance(left, BlockDiagonal) else (left,):
        if isinstance(block, Diagonal):
            continue
        name = next(iter(block.shapes))
        whole = curvature.block_of(name) if isinstance(curvature, BlockDiagonal) else curvature
        if _is_indefinite(block, beside=whole):
            bad += [n for n in block.shapes if n not in bad]
    if bad:
        raise ValueError(
            f"without these examples the curvature would be indefinite in {bad[:5]}: they were "
            "not learned at this anchor, or were forgotten before, or the structure approximates, "
            "and an approximation of all examples less one of some need not be positive (diagonal, "
            "block and dense are exact); refit the prior from the data that stay"
        )
    if isinstance(left, Diagonal):  # rounding
        return Diagonal({n: v.clamp(min=0) for n, v in left.values.items()})
    return left


def _is_indefinite(curvature: Curvature, beside: Curvature) -> bool:
    """Whether an eigenvalue is negative, beyond rounding in numbers of the size of ``beside``.

    Without the whole matrix: the largest of c I - G by power iteration, c above that of G. What
    is as close to 0 as the iteration has still to go is taken for positive.
    """
    diagonal = curvature.diagonal()
    size = sum(v.numel() for v in diagonal.values())
    eps = max(torch.finfo(v.dtype).eps for v in diagonal.values())
    rounding = max(1e-6, 8 * eps * size**0.5) * abs(_leading(beside.mv, diagonal))
    if isinstance(curvature, Dense):
        return bool(torch.linalg.eigvalsh(curvature.matrix)[0] < -rounding)
    largest = abs(_leading(curvature.mv, diagonal))
    shifted = _leading(
        lambda x: plus({n: largest * v for n, v in x.items()}, curvature.mv(x), -1.0), diagonal
    )
    return largest - shifted < -rounding


def _leading(product: Callable[[Params], Params], like: Params) -> float:
    """The eigenvalue of the largest absolute value, by power iteration."""
    generator = torch.Generator().manual_seed(0)
    x = {
        n: torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device)
        for n, v in like.items()
    }
    value = 0.0
    for _ in range(_ITERATIONS):
        norm = torch.stack([v.square().sum() for v in x.values()]).sum().sqrt()
        if not bool(norm > 0):
            return 0.0
        x = {n: v / norm for n, v in x.items()}
        y = product(x)
        value = float(torch.stack([(x[n] * y[n]).sum() for n in x]).sum())
        x = y
    return value


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


# -------------------------------------------------------------------- transfer


def transfer(
    terms: Terms,
    model: nn.Module,
    *,
    names: Mapping[str, str] | None,
    new_classes: NewClasses,
    allow_unmatched: bool,
) -> Terms:
    """The terms for another model; see ``Prior.transfer``."""
    current, mapping = _mapping(model, names)
    changed: list[Any] = []
    for term in terms:
        if isinstance(term, WeightTerm):
            lost = sorted(term.anchor.keys() - set(mapping.values()))
            if lost and not allow_unmatched:
                raise StaleAnchorError(
                    f"no trained parameter of the new model stands for {lost[:5]}; map them by "
                    "parameters={new: old}, or pass allow_unmatched=True to leave them behind"
                )
            term = _transfer_weight(term, current, mapping)
        elif isinstance(term, Regulariser):
            if term.mean is not None:
                zeros = {n: torch.zeros_like(p) for n, p in current.items()}
                term = replace(term, mean=_followed(term.mean, zeros, mapping))
        elif isinstance(term, (MemoryTerm, KernelTerm)):
            width = reference_outputs(model, take(term.memory.inputs, slice(0, 1))).shape[1]
            old = tuple(range(term.memory.reference.shape[1]))
            memory = _widen(term.memory, width, new_classes)
            if isinstance(term, KernelTerm):
                # A block competes among the classes that existed when its kernel was made.
                blocks = tuple(
                    replace(b, head=old if b.head is None else b.head) for b in term.blocks
                )
                term = replace(term, memory=memory, blocks=blocks)
            else:
                term = replace(term, memory=memory)
        changed.append(term)
    return tuple(changed)


def transfer_curvature(
    curvature: Curvature | None, model: nn.Module, names: Mapping[str, str] | None
) -> Curvature | None:
    """A diagonal curvature by name, new entries 0; other structures cannot follow a change."""
    if curvature is None:
        return None
    return _followed_curvature(curvature, *_mapping(model, names))


def _mapping(model: nn.Module, names: Mapping[str, str] | None) -> tuple[Params, Mapping[str, str]]:
    """(the parameters that are trained, new name -> old name)."""
    current = {n: p.detach() for n, p in parameters(model).items()}
    return current, {n: n for n in current} if names is None else names


def _transfer_weight(term: WeightTerm, current: Params, mapping: Mapping[str, str]) -> WeightTerm:
    zeros = {n: torch.zeros_like(p) for n, p in current.items()}
    gradient, curvature = term.gradient, term.curvature
    return WeightTerm(
        _followed(term.anchor, current, mapping),
        None if gradient is None else _followed(gradient, zeros, mapping),
        None if curvature is None else _followed_curvature(curvature, current, mapping),
    )


def _followed(old: Params, new: Params, mapping: Mapping[str, str]) -> Params:
    """``new`` with what it shares with ``old`` copied in."""
    return {
        n: _fitted(old[mapping[n]], value) if mapping.get(n) in old else value.clone()
        for n, value in new.items()
    }


def _followed_curvature(
    curvature: Curvature, current: Params, mapping: Mapping[str, str]
) -> Curvature:
    """The entries that both models have, by name; the others 0."""
    if isinstance(curvature, Diagonal):
        zeros = Diagonal.zeros_like(current).values
        return Diagonal(_followed(curvature.values, zeros, mapping))
    if not isinstance(curvature, Dense):
        if {n: curvature.shapes.get(old) for n, old in mapping.items() if n in current} == {
            n: p.shape for n, p in current.items()
        } and all(n == old for n, old in mapping.items()):
            return curvature
        raise ValueError(
            f"a {type(curvature).__name__} curvature cannot follow a change of the model; use "
            "structure='diagonal' or 'dense' where the model will change"
        )
    positions, start = {}, 0
    for name, shape in curvature.shapes.items():
        positions[name] = torch.arange(start, start + shape.numel()).reshape(shape)
        start += shape.numel()
    absent = {n: torch.full(p.shape, -1) for n, p in current.items()}
    index = torch.cat([i.flatten() for i in _followed(positions, absent, mapping).values()])
    index = index.to(curvature.matrix.device)
    present, clamped = index >= 0, index.clamp(min=0)
    block = curvature.matrix[clamped][:, clamped]
    keep = present[:, None] & present[None, :]
    shapes = {n: p.shape for n, p in current.items()}
    return Dense(torch.where(keep, block, torch.zeros_like(block)), shapes)


def _fitted(old: Tensor, new: Tensor) -> Tensor:
    """``new`` with the leading block that it shares with ``old`` copied in."""
    if old.ndim != new.ndim:
        raise StaleAnchorError(
            f"a parameter of shape {tuple(old.shape)} cannot become one of {tuple(new.shape)}"
        )
    fitted = new.clone()
    common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
    fitted[common] = old[common]
    return fitted


def _widen(memory: Memory, width: int, new_classes: NewClasses) -> Memory:
    """Soft labels over more outputs: probability 0 for the new ones, or no opinion on them."""
    old = memory.reference.shape[1]
    if width == old:
        return memory
    if width < old:
        raise StaleAnchorError(
            f"the memory holds beliefs about {old} outputs, the model has {width}; outputs can be "
            "added, not taken away"
        )
    if new_classes not in ("zero", "mask"):
        raise ValueError(f"new_classes must be 'zero' or 'mask', got {new_classes!r}")
    lowest = torch.finfo(memory.reference.dtype).min / 2
    fill = memory.reference.new_full((len(memory), width - old), lowest)
    reference = torch.cat([memory.reference, fill], dim=1)
    heads = memory.heads
    if new_classes == "mask":
        heads = tuple(tuple(range(old)) if h is None else h for h in heads)
    return replace(memory, reference=reference, heads=heads)

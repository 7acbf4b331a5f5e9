r"""Forget examples: what they said is taken out of memory, gradient and curvature.

Pure functions from terms to terms; ``Prior.forget`` calls them. Source: Khan & Swaroop 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .curvature import BlockDiagonal, Curvature, Dense, Diagonal
from .data import batches
from .jacobians import gradient as data_gradient
from .memory import Memory
from .models import Params, evaluating, match
from .recall import Pass, Terms, by_head, fit_curvature, plus
from .recipe import Recipe
from .terms import MemoryTerm, WeightTerm

_ITERATIONS = 50  # of the power method


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

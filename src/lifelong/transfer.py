r"""Carry the past to another model: fewer or more parameters, other names, more classes.

Pure functions from terms to terms; ``Prior.transfer`` and ``.grow`` call them.
Source: Khan & Swaroop 2021 (change the model class).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .curvature import Curvature, Dense, Diagonal
from .errors import StaleAnchorError
from .groups import Share
from .memory import Memory, reference_outputs
from .models import Params, parameters, take
from .recall import Terms
from .terms import KernelTerm, MemoryTerm, Regulariser, WeightTerm

NewClasses = Literal["zero", "mask"]


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

    def follow(share: Share) -> Share:
        g, c = share.gradient, share.curvature
        return Share(
            share.count,
            None if g is None else _followed(g, zeros, mapping),
            None if c is None else _followed_curvature(c, current, mapping),
        )

    return WeightTerm(
        _followed(term.anchor, current, mapping),
        None if gradient is None else _followed(gradient, zeros, mapping),
        None if curvature is None else _followed_curvature(curvature, current, mapping),
        None if term.groups is None else term.groups.mapped(follow),
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

r"""Strength without tuning: how far a quadratic at the learned weights falls short of the loss.

A weight term says that the loss L of the examples it stands for grows by ½ <d, G d> when the
weights move by d. Where a network is sure of its data G all but vanishes, and L grows far faster
than that as soon as the weights move as far as learning moves them. The strength that Bayes' rule
wants is the ratio of the two over such a move, and one such move is known: the one that has just
been made. From the learned weights theta* back to where learning began, d = theta0 - theta*,

    c = (L(theta0) - L(theta*) - <grad L(theta*), d>) / (½ <d, G d>).

L falls on the way in as it will rise on the way out. Some properties:

- It costs one pass with gradients over the task and two without.
- It is in nats over nats: neither the number of examples nor the scale of G or of the weights
  matters. c G says L's own value at theta0, so no strength can be too large by many orders.
- It is exactly 1 where L is quadratic and G is its Hessian (a linear model with Gaussian noise and
  a dense G), and so is every prior that is exact there. Where all examples are kept, G is 0.

theta0 is the anchor of the prior. Before the first update nobody knows it: then it is halfway
from theta* to the mean of the regulariser (0 if there is none), since a network moves about half
of its norm when it is learned from fresh weights.

With a memory, the weights will not move straight back: the memory holds them. So the way out is
rehearsed: from theta0 the new items alone are learned, ``STEPS`` steps of Adam, each ``RATE`` of
the root mean square of d. What the data still lose there is what the memory does not see and the
weight term must say.

Two losses that hardly differ differ by their rounding. What that may have made of the numerator, a
few eps of the losses and of each output times its residual, is taken off it: it never raises c.

The strength is max(1, c), never below Bayes' rule with G as it is: a loss that grows less than its
curvature on one way is no reason to believe the past less. SI's Omega (Zenke et al. 2017) is a
relative: it shares the same fall of the loss out among the weights, where this takes the shares
from G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .curvature import Curvature
from .data import BATCH_SIZE, Data, Head, summed
from .hooks import upcast
from .jacobians import checked, differentiating, gradient, weighted_batches
from .likelihoods import Likelihood
from .models import Params, at, evaluating, forward, forward_at, parameters, snapshot
from .terms import MemoryTerm, Regulariser

STEPS = 100  # of the rehearsal
RATE = 0.1  # its step, in root mean squares of the move: a few steps cross it
_SMALLEST = 32  # items of memory in a step of the rehearsal, at least
_ROUNDINGS = 4  # relative errors of eps that an output or a loss is thought to have


def find_strength(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    curvature: Curvature,
    start: Params,
    *,
    memory: MemoryTerm | None = None,
    head: Head | None = None,
    exclude: Tensor | None = None,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH_SIZE,
) -> float:
    """The factor by which ``curvature``, of ``data`` at the model's weights, is to count.

    start: where learning began. memory: the new items, kept beside the curvature. exclude: ids of
    examples that the curvature leaves out. weights: (N,) of the examples, as in the curvature.
    generator: of draws from a memory that is too large to
    be read in every step. The model is left as it was.

    1 where the weights did not move, the curvature is 0 on the way, what it predicts is less than
    the losses may be wrong by through rounding, or the loss at the other end is no finite number.
    Raises as ``lifelong.jacobians.gradient``.
    """
    theta = snapshot(parameters(model))
    with evaluating(model):
        away = dict(start)
        if memory is not None:
            away = rehearse(model, theta, start, memory, likelihood, generator)
        d = {n: away[n] - p for n, p in theta.items()}
        predicted = 0.5 * float(curvature.quad(d))
        if not predicted > 0:
            return 1.0
        over: dict[str, Any] = {"head": head, "exclude": exclude, "batch_size": batch_size}
        over["weights"] = weights
        g = gradient(model, data, likelihood, **over)
        linear = sum(float((g[n] * v).double().sum()) for n, v in d.items())
        there, there_size = _nats(model, away, data, likelihood, **over)
        here, here_size = _nats(model, theta, data, likelihood, **over)
    eps = torch.finfo(next(iter(theta.values())).dtype).eps
    blur = _ROUNDINGS * eps * (there_size + here_size + abs(linear))
    if not predicted > blur:
        return 1.0
    ratio = (there - here - linear - blur) / predicted
    if not math.isfinite(ratio) or ratio <= 1 + math.sqrt(eps):
        return 1.0
    return ratio


def beginning(theta: Mapping[str, Tensor], regulariser: Regulariser | None) -> Params:
    """Where learning began, as far as can be told before the first update: halfway from theta to
    the regulariser's mean."""
    mean = (regulariser.mean if regulariser is not None else None) or {}
    middle = {n: (p + mean[n]) / 2 if n in mean else p / 2 for n, p in theta.items()}
    return snapshot(middle)


def rehearse(
    model: nn.Module,
    theta: Params,
    start: Params,
    memory: MemoryTerm,
    likelihood: Likelihood,
    generator: torch.Generator | None = None,
) -> Params:
    """The weights that the remembered items alone lead to, from ``start``.

    A step reads all items, or a hundredth of the examples that they stand for where that is
    fewer: about one pass over the task in all.
    """
    items = memory.memory
    stands_for = float(items.soft_weight.sum() + items.hard_weight.sum())
    squares = sum(float((start[n] - p).square().sum()) for n, p in theta.items())
    length = math.sqrt(squares / sum(p.numel() for p in theta.values()))
    if not (length > 0 and stands_for > 0):
        return dict(start)
    size = min(len(items), max(_SMALLEST, int(stands_for / STEPS)))
    moving = {n: start[n].clone().requires_grad_() for n in theta}
    adam = torch.optim.Adam(list(moving.values()), lr=RATE * length, fused=_can_fuse(moving))
    with differentiating(model):
        for _ in range(STEPS):
            drawn = memory.draw(size if size < len(items) else None, generator)

            def slope(other: nn.Module, drawn: Any = drawn) -> None:
                f = upcast(forward(other, drawn.inputs))
                (memory.value(f, drawn, likelihood) / stands_for).backward()

            adam.zero_grad()
            at(model, moving, slope)
            adam.step()
    return snapshot(moving)


def _can_fuse(params: Mapping[str, Tensor]) -> bool:
    """Whether Adam has one kernel for these: a third of its time, which small steps are made of."""
    return {p.device.type for p in params.values()} <= {"cpu", "cuda"}


def _nats(
    model: nn.Module,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    head: Head | None,
    exclude: Tensor | None,
    weights: Tensor | None,
    batch_size: int,
) -> tuple[float, float]:
    """Weighted sum of nll at these weights, and how large the numbers are whose relative errors are
    in it: sum |l| + sum |r f|. Infinity where an output is no finite number."""
    total, size = 0.0, 0.0
    with torch.no_grad():
        for batch in weighted_batches(model, data, head, weights, exclude, batch_size):
            w = batch.weights.double()
            f = upcast(forward_at(model, params, batch.inputs))
            if not bool(torch.isfinite(f).all()):
                total, size = math.inf, math.inf
                break  # and not return: other ranks wait for this one's sum
            y, mask = checked(likelihood, f, batch)
            masked = likelihood.mask(f, mask)
            nll = likelihood.nll(masked, y).double()
            total += float(w @ nll)
            size += float(w @ nll.abs())
            size += float(w @ (likelihood.residual(masked, y) * f).double().abs().sum(1))
    found = summed(data, [torch.tensor([total, size], dtype=torch.float64)])[0].tolist()
    return found[0], found[1]

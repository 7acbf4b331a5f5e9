"""Many small networks at once: K copies of a model, each with its own weighted, regularised loss.

    L_k(theta_k) = sum_n w_kn l(y_n, f(x_n; theta_k)) + delta_k/2 ||theta_k||²      (nats)

w_kn = 0 leaves example n out of copy k, so that leave-one-out retraining of a hundred examples is
one batched minimisation. All copies take the same number of L-BFGS iterations in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Stacked = dict[str, Tensor]  # name -> (K, *shape)


def stack(model: nn.Module, copies: int) -> Stacked:
    """The model's parameters, ``copies`` times."""
    return {
        name: p.detach().expand(copies, *p.shape).clone() for name, p in model.named_parameters()
    }


def load(model: nn.Module, params: Stacked, copy: int) -> nn.Module:
    """Write one copy into the model."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(params[name][copy])
    return model


def outputs(model: nn.Module, params: Stacked, inputs: Tensor) -> Tensor:
    """(K, N, C)."""
    return vmap(lambda p: functional_call(model, p, (inputs,)))(params)


def minimise(
    model: nn.Module,
    start: Stacked,
    nll: Callable[[Tensor], Tensor],  # (K, N, C) -> (K, N) in nats
    inputs: Tensor,
    weights: Tensor,  # (K, N)
    precision: Tensor,  # (K,)
    *,
    max_iter: int,
    tolerance: float = 1e-7,
    history: int = 20,
    factor: Tensor | None = None,
) -> tuple[Stacked, Tensor]:
    """L-BFGS with backtracking, each copy with its own step length; the gradients' norms (K,).

    factor: the Cholesky factor (P, P) of a rough Hessian, the same for all copies, from which
    L-BFGS starts instead of a multiple of I. It changes the path, not where the gradient is 0.
    """
    shapes = {name: p.shape[1:] for name, p in start.items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def unflat(x: Tensor) -> Stacked:
        parts = x.split(sizes, dim=1)
        return {n: p.reshape(-1, *s) for (n, s), p in zip(shapes.items(), parts, strict=True)}

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = (weights * nll(outputs(model, unflat(x), inputs))).sum(1)
        value = value + 0.5 * precision * x.square().sum(1)
        (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), slope

    x = torch.cat([p.flatten(1) for p in start.values()], dim=1)
    value, slope = loss(x)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y, rho; rho = 0 makes a pair inert
    scale = 1 / slope.norm(dim=1, keepdim=True).clamp(min=1.0)

    def start_from(q: Tensor) -> Tensor:
        return scale * q if factor is None else torch.cholesky_solve(q.T, factor).T

    for _ in range(max_iter):
        if float(slope.norm(dim=1).max()) <= tolerance:
            break
        step = -_inverse_hessian(slope, pairs, start_from)
        descent = (step * slope).sum(1)
        step = torch.where((descent < 0).unsqueeze(1), step, -start_from(slope))
        descent = (step * slope).sum(1)
        length = torch.ones_like(value)
        slack = 1e-14 * value.abs() * len(inputs) ** 0.5  # rounding of the sum
        for _ in range(25):
            new_value, new_slope = loss(x + length.unsqueeze(1) * step)
            short = ~(new_value <= value + 1e-4 * length * descent + slack)
            if not bool(short.any()):
                break
            length = torch.where(short, length / 2, length)
        else:
            length = torch.where(short, torch.zeros_like(length), length)
            new_value, new_slope = loss(x + length.unsqueeze(1) * step)
        s, y = length.unsqueeze(1) * step, new_slope - slope
        sy = (s * y).sum(1, keepdim=True)
        good = sy > 1e-10 * s.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True)
        rho = torch.where(good, 1 / sy.where(good, torch.ones_like(sy)), torch.zeros_like(sy))
        pairs = [*pairs[1 - history :], (s, y, rho)]
        scale = torch.where(good, sy / y.square().sum(1, keepdim=True).clamp(min=1e-300), scale)
        x, value, slope = x + s, new_value, new_slope
    return unflat(x), slope.norm(dim=1)


def _inverse_hessian(
    slope: Tensor,
    pairs: list[tuple[Tensor, Tensor, Tensor]],
    start_from: Callable[[Tensor], Tensor],
) -> Tensor:
    """The two loops of L-BFGS (Nocedal & Wright, algorithm 7.4) on K rows at once."""
    q, alphas = slope, []
    for s, y, rho in reversed(pairs):
        alpha = rho * (s * q).sum(1, keepdim=True)
        alphas.append(alpha)
        q = q - alpha * y
    q = start_from(q)
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + s * (alpha - rho * (y * q).sum(1, keepdim=True))
    return q

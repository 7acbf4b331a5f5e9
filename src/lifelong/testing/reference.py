r"""The slow truth: dense Jacobians by plain autograd loops in float64, and exact minimisers.

Nothing here is fast, and nothing here shares code with what it is the reference of. Per-example
Jacobians come from one forward and C backward passes for each example alone, so they hold for
any model; the matrices are sums of their products, the parameters flattened in the order of
``named_parameters()``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..data import Data, batches, head_mask, head_of
from ..likelihoods import Likelihood
from ..models import Inputs, forward, move, parameters, rows, take


def jacobian(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """df_nc/dtheta for each trainable parameter: name -> (B, C, *shape), in float64."""
    model = deepcopy(model).double()
    inputs = move(inputs, dtype=torch.float64)
    params = parameters(model)
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for n in range(rows(inputs)):
        f = forward(model, take(inputs, slice(n, n + 1)))[0]
        each = [
            torch.autograd.grad(
                f_c, list(params.values()), retain_graph=True, materialize_grads=True
            )
            for f_c in f
        ]
        for name, parts in zip(params, zip(*each, strict=True), strict=True):
            found[name].append(torch.stack(parts))
    return {name: torch.stack(parts) for name, parts in found.items()}


def flatten(jacobian: Mapping[str, Tensor]) -> Tensor:
    """name -> (B, C, *shape) to one (B, C, P)."""
    return torch.cat([j.flatten(2) for j in jacobian.values()], dim=-1)


def ggn(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    head: Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """sum_n w_n J_nᵀ H_n J_n: (P, P), in float64 and nats."""
    j, f, _ = _outputs(model, data, likelihood, head)
    w = torch.ones(len(f), dtype=f.dtype) if weights is None else weights.double()
    return torch.einsum("n,ncp,ncd,ndq->pq", w, j, likelihood.hessian(f), j)


def empirical_fisher(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    head: Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """sum_n w_n (J_nᵀ r_n)(J_nᵀ r_n)ᵀ with the labels of the data: (P, P), in float64."""
    rows_ = _gradients(model, data, likelihood, head)
    w = torch.ones(len(rows_), dtype=rows_.dtype) if weights is None else weights.double()
    return torch.einsum("n,np,nq->pq", w, rows_, rows_)


def gradient(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    head: Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """sum_n w_n J_nᵀ r_n: (P,), in float64 and nats."""
    rows_ = _gradients(model, data, likelihood, head)
    return rows_.sum(0) if weights is None else weights.double() @ rows_


def _gradients(
    model: nn.Module, data: Data, likelihood: Likelihood, head: Sequence[int] | None
) -> Tensor:
    j, f, y = _outputs(model, data, likelihood, head)
    return torch.einsum("ncp,nc->np", j, likelihood.residual(f, y))


def _outputs(
    model: nn.Module, data: Data, likelihood: Likelihood, head: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobians (N, C, P), masked outputs (N, C) and labels of all the data, in float64."""
    exact = deepcopy(model).double()
    jacobians, outputs, labels = [], [], []
    for batch in batches(data):
        jacobians.append(flatten(jacobian(exact, batch.inputs)))
        with torch.no_grad():
            f = forward(exact, move(batch.inputs, dtype=torch.float64))
        outputs.append(likelihood.mask(f, head_mask(head_of(data, head), f.shape[1])))
        labels.append(batch.labels)
    return torch.cat(jacobians), torch.cat(outputs), torch.cat(labels)


def minimise(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    tolerance: float = 1e-10,
    max_iter: int = 2000,
) -> None:
    """Change the model's trainable parameters in place to a minimum of ``loss()``.

    LBFGS with a strong Wolfe line search, then Newton steps with the dense Hessian (of a few
    hundred parameters at most) until the gradient's norm is below ``tolerance``. For convex
    losses in float64.

    Raises ValueError for parameters that are not float64, and RuntimeError where it does not
    converge; the parameters are then as they were before.
    """
    params = list(parameters(model).values())
    if any(p.dtype != torch.float64 for p in params):
        raise ValueError("expected parameters in float64; call model.double() first")
    before = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    try:
        _lbfgs(params, loss, tolerance, max_iter)
        norm = _newton(params, loss, tolerance)
    finally:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
    if not norm <= tolerance:
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
        raise RuntimeError(
            f"the gradient's norm stopped at {norm:.2g}, above the tolerance {tolerance:.2g}; "
            "make the loss strictly convex (a regulariser), or raise max_iter or tolerance"
        )


def _lbfgs(
    params: list[nn.Parameter], loss: Callable[[], Tensor], tolerance: float, max_iter: int
) -> None:
    optimizer = torch.optim.LBFGS(
        params,
        max_iter=max_iter,
        history_size=50,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value = loss()
        for p, g in zip(params, _grads(value, params), strict=True):
            p.grad = g
        return value

    optimizer.step(closure)


def _newton(
    params: list[nn.Parameter], loss: Callable[[], Tensor], tolerance: float, steps: int = 50
) -> float:
    """Newton steps, each halved until the loss's gradient shrinks; the last gradient norm."""
    g = _flat_grad(loss(), params)
    for _ in range(steps):
        norm = float(g.norm())
        if norm <= tolerance or not norm < float("inf"):
            break
        hessian = _hessian(loss, params)
        step = torch.linalg.lstsq(hessian, g.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        scale = 1.0
        for _ in range(20):
            _add(params, step, -scale)
            new = _flat_grad(loss(), params)
            if float(new.norm()) < norm:
                break
            _add(params, step, scale)
            scale /= 2
        else:
            break
        g = new
    return float(g.norm())


def _grads(value: Tensor, params: list[nn.Parameter], graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, params, create_graph=graph, materialize_grads=True)


def _flat_grad(value: Tensor, params: list[nn.Parameter]) -> Tensor:
    return torch.cat([g.flatten() for g in _grads(value, params)])


def _hessian(loss: Callable[[], Tensor], params: list[nn.Parameter]) -> Tensor:
    g = torch.cat([g.flatten() for g in _grads(loss(), params, graph=True)])
    rows_ = [
        torch.autograd.grad(g_p, params, retain_graph=True, materialize_grads=True)
        if g_p.requires_grad
        else [torch.zeros_like(p) for p in params]
        for g_p in g
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows_])


@torch.no_grad()
def _add(params: list[nn.Parameter], step: Tensor, scale: float) -> None:
    for p, part in zip(params, step.split([p.numel() for p in params]), strict=True):
        p.add_(part.reshape(p.shape), alpha=scale)

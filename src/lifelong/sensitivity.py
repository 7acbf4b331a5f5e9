r"""Sensitivity: how the model would change if examples were left out, without refitting it.

The memory perturbation equation (Nickl, Xu, Tailor, Moellenhoff, Khan 2023) steps back on what is
removed. For a Gaussian N(theta*, Sigma), Sigma = (G + damping I)⁻¹, over the weights, with
J_i = df_i/dtheta (C, P), r_i = dl/df_i = E[y | f_i] - y_i (C,), H_i = d2l/df_i2 (C, C),

    V_i = J_i Sigma J_iᵀ  (C, C)                  the variance of the output,
    theta^(-i) - theta*   = Sigma J_iᵀ r_i
    f_i^(-i) - f_i        = V_i r_i               first order: variance x error
                          = (I - V_i H_i)⁻¹ V_i r_i     exact for a linear-Gaussian model
    E[y]^(-i) - E[y]      = H_i V_i r_i           first order

**Signs**: every change is *without minus with* the example. r points away from the label, so the
output without an example moves away from that example's label, and its nll rises. The exact form
takes the example's curvature J_iᵀ H_i J_i out of G, too, which is one Newton step of refitting; it
needs a G that holds the example: the eigenvalues of V_i H_i (its leverage) are below 1 then.

Three sources of Sigma: the curvature of a posterior (``posterior.curvature`` and
``posterior.prior_precision``), the state of an optimiser (``variance_from_optimizer``), or any
diagonal variance. Three things fall out: a score for each example (``identify`` with
score="sensitivity"), the change by a group or a class, and a leave-one-out loss that chooses
hyper-parameters without validation data (``loo_nll``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .curvature import Curvature, Diagonal
from .data import (
    BATCH_SIZE,
    Data,
    Examples,
    Head,
    Shard,
    head_of,
    num_examples,
    require_repeatable,
)
from .function_space import function_covariance, function_kernel
from .hooks import upcast
from .jacobians import checked, differentiating, gradient, residual, weighted_batches
from .likelihoods import Likelihood
from .models import (
    Inputs,
    Params,
    at,
    concat,
    device_of,
    evaluating,
    forward,
    match,
    move,
    parameters,
    take,
)

Of = Literal["mean", "output", "loss"]

# --- arrays ---------------------------------------------------------------------------------------


def output_change(covariance: Tensor, residual: Tensor, hessian: Tensor | None = None) -> Tensor:
    """f without the example minus f with it: V r, or (I - V H)⁻¹ V r with a hessian: (N, C).

    covariance: V (N, C, C), residual: r (N, C), hessian: H (N, C, C). The exact form is solved as
    B (I - Bᵀ H B)⁻¹ Bᵀ r with V = B Bᵀ, which is symmetric. A group of M examples is one example
    with M C outputs, V_M with its off-diagonal blocks.

    Raises ValueError where I - V H is not positive definite: V is not the covariance of a
    posterior that holds the example, or lacks damping.
    """
    if hessian is None:
        return (covariance @ residual.unsqueeze(-1)).squeeze(-1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # B
    inner = root.mT @ hessian @ root
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    factor, info = torch.linalg.cholesky_ex(eye - inner)
    if bool((info != 0).any()):
        top = float(torch.linalg.eigvalsh(inner).max())
        raise ValueError(
            f"{int((info != 0).sum())} of {len(info)} examples have a leverage (the largest "
            f"eigenvalue of V H) of 1 or more, up to {top:.3g}: expected below 1, as under a "
            "curvature that was summed over these examples and is damped. Raise the damping, take "
            "the exact curvature of all the data, or use exact=False"
        )
    inside = torch.cholesky_solve(root.mT @ residual.unsqueeze(-1), factor)
    return (root @ inside).squeeze(-1)


def mean_change(
    likelihood: Likelihood, f: Tensor, change: Tensor, *, exact: bool = False
) -> Tensor:
    """E[y] without the example minus E[y] with it, from the change of f: (N, C).

    H change at first order; exact: mean(f + change) - mean(f).
    """
    if exact:
        return likelihood.mean(f + change) - likelihood.mean(f)
    return (likelihood.hessian(f) @ change.unsqueeze(-1)).squeeze(-1)


def score(
    likelihood: Likelihood, f: Tensor, residual: Tensor, covariance: Tensor, of: Of
) -> Tensor:
    """One number for each example, larger for more sensitive: (N,).

        mean    sum_c |H V r|_c   how far the prediction moves; for classes twice the distance in
                                  total variation, so that it is at most 2 at small changes
        output  ||V r||           how far the output moves, also where the mean is saturated
        loss    rᵀ V r            how much the example's own nll rises, in nats

    Raises ValueError for another ``of``.
    """
    if of not in get_args(Of):
        raise ValueError(f"of must be one of {get_args(Of)}, got {of!r}")
    change = output_change(covariance, residual)
    if of == "output":
        return change.norm(dim=-1)
    if of == "loss":
        return (residual * change).sum(-1)
    return mean_change(likelihood, f, change).abs().sum(-1)


# --- examples of a model --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """The parts of every deviation, for N examples under one posterior.

    outputs f (N, C), under the head's mask; labels (N,) or (N, C); residual r (N, C); hessian H and
    covariance V (N, C, C). All that is held is N C² numbers: for many classes see ``loo_nll`` and
    ``identify``, which keep one number for each example.
    """

    likelihood: Likelihood
    outputs: Tensor
    labels: Tensor
    residual: Tensor
    hessian: Tensor
    covariance: Tensor

    def output_change(self, *, exact: bool = False) -> Tensor:
        """f without the example minus f with it: (N, C). Raises as ``output_change``."""
        return output_change(self.covariance, self.residual, self.hessian if exact else None)

    def mean_change(self, *, exact: bool = False) -> Tensor:
        """The same of the mean, for classes the probabilities: (N, C)."""
        return mean_change(
            self.likelihood, self.outputs, self.output_change(exact=exact), exact=exact
        )

    def score(self, of: Of = "output") -> Tensor:
        """One number for each example: (N,); ``score`` says what ``of`` means."""
        return score(self.likelihood, self.outputs, self.residual, self.covariance, of)

    def nll(self) -> Tensor:
        """With the example: (N,), in nats."""
        return self.likelihood.nll(self.outputs, self.labels)

    def loo_nll(self, *, exact: bool = True) -> Tensor:
        """The nll of each example under the model without it: (N,), in nats."""
        return self.likelihood.nll(self.outputs + self.output_change(exact=exact), self.labels)


def sensitivities(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    curvature: Curvature,
    damping: float,
    *,
    head: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Sensitivities:
    """The sensitivity of each example to its own removal, in the order of the data.

    curvature, damping: Sigma = (G + damping I)⁻¹; G in nats, summed over the data; for a posterior,
    its curvature and prior precision. The model is read in eval mode.

    Raises ValueError where G + damping I is not positive definite, ValueError and TypeError for
    labels that do not fit; NotRepeatableError for a loader that shuffles or augments;
    StaleAnchorError, NotRepeatableError, NonFiniteError as ``function_covariance``.
    """
    require_repeatable(data)
    parts = list(_pass(model, data, likelihood, curvature, damping, head, batch_size))
    fields = ("outputs", "labels", "residual", "hessian", "covariance")
    return Sensitivities(
        likelihood, *(torch.cat([getattr(part, name) for part in parts]) for name in fields)
    )


def loo_nll(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    curvature: Curvature,
    damping: float,
    *,
    exact: bool = True,
    head: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """sum_i l(y_i, f_i without example i) in nats: leave-one-out cross-validation, no refitting.

    A scalar; divide by the number of examples to compare it with a mean test loss. Fit the model
    with each of some hyper-parameters, and keep that of the smallest value. It says nothing about
    copies: an example whose twin stays in the data is easy to predict.

    exact=False is the first-order form of the paper, sum_i l(y_i, f_i + V_i r_i). Raises as
    ``sensitivities`` and, where exact, as ``output_change``.
    """
    parts = [
        part.loo_nll(exact=exact).sum()
        for part in _pass(model, data, likelihood, curvature, damping, head, batch_size)
    ]
    return torch.stack(parts).sum()


class _Part(NamedTuple):
    """A batch in eval mode: inputs, labels, masked f (B, C), r (B, C), mask (C,)."""

    inputs: Inputs
    labels: Tensor
    f: Tensor
    r: Tensor
    mask: Tensor | None


def _parts(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    head: Sequence[int] | None,
    batch_size: int,
) -> Iterator[_Part]:
    with evaluating(model), torch.no_grad():
        for batch in weighted_batches(model, data, head, None, None, batch_size):
            f = upcast(forward(model, batch.inputs))
            y, mask = checked(likelihood, f, batch)
            masked = likelihood.mask(f, mask)
            yield _Part(batch.inputs, y, masked, residual(likelihood, f, y, mask), mask)


def _pass(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    curvature: Curvature,
    damping: float,
    head: Sequence[int] | None,
    batch_size: int,
) -> Iterator[Sensitivities]:
    for part in _parts(model, data, likelihood, head, batch_size):
        covariance = function_covariance(
            model, part.inputs, curvature, damping, likelihood=likelihood, mask=part.mask
        )
        hessian = likelihood.hessian(part.f)
        yield Sensitivities(
            likelihood, part.f, part.labels, part.r, hessian, covariance.to(part.f.dtype)
        )


# --- groups ---------------------------------------------------------------------------------------


def removal(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    curvature: Curvature,
    damping: float,
    *,
    weights: Tensor | None = None,
    head: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Params:
    """theta without the examples minus theta, at first order: Sigma sum_i w_i J_iᵀ r_i.

    weights: (N,) by position, how much of each example is removed: 0 leaves it in, -1 adds it once
    more. One backward pass over the data, whatever the size of the group. Raises as ``gradient``,
    ValueError where G + damping I is not positive definite, and with weights NotRepeatableError for
    a loader that shuffles or augments.
    """
    if weights is not None:
        require_repeatable(data)
    names = list(curvature.diagonal())
    with evaluating(model):
        slope = gradient(
            model, data, likelihood, head=head, weights=weights, params=names, batch_size=batch_size
        )
    return curvature.inverse_mv(slope, damping)


def output_shift(model: nn.Module, inputs: Inputs, step: Params) -> Tensor:
    """J step for each example, the change of the linearised output: (B, C).

    A backward pass and one through it: <v, J step> is linear in v, and its slope is J step.
    Raises StaleAnchorError where the model has not the names and shapes of ``step``.
    """
    params = {name: p.detach().requires_grad_() for name, p in match(model, step).items()}
    inputs = move(inputs, device_of(model))

    def shift(other: nn.Module) -> Tensor:
        f = forward(other, inputs)
        v = torch.zeros_like(f, requires_grad=True)
        pulled = torch.autograd.grad(
            f, list(params.values()), v, create_graph=True, materialize_grads=True
        )
        parts = [(g * step[name].to(g)).sum() for name, g in zip(params, pulled, strict=True)]
        return torch.autograd.grad(torch.stack(parts).sum(), v, materialize_grads=True)[0]

    with evaluating(model), differentiating(model):
        return at(model, params, shift)


def group_change(
    model: nn.Module,
    group: Data,
    likelihood: Likelihood,
    curvature: Curvature,
    damping: float,
    *,
    on: Inputs | None = None,
    exact: bool = False,
    head: Head | None = None,
) -> Tensor:
    """The outputs at ``on`` without the whole group, minus those with it: (B, C).

    on: inputs; by default the group's own, in order. First order: J_on Sigma J_Mᵀ r_M over all of
    the group's M examples. exact: the group's curvature leaves G as well; with K the kernel
    between the group's outputs, (M C, M C), the change is a = (I - K H)⁻¹ K r on the group and
    K_on (r + H a) elsewhere. That costs (M C)³; the first order's cost is linear in M. Outputs
    outside of the head do not change.

    Raises as ``removal`` and, where exact, as ``output_change``.
    """
    parts = list(_parts(model, group, likelihood, head_of(group, head), BATCH_SIZE))
    members, mask = concat([part.inputs for part in parts]), parts[0].mask
    if not exact:
        step = removal(model, group, likelihood, curvature, damping, head=head)
        shift = output_shift(model, members if on is None else on, step)
        return shift if mask is None else shift * mask
    f, r = torch.cat([part.f for part in parts]), torch.cat([part.r for part in parts])
    hessian = torch.block_diag(*likelihood.hessian(f))
    with evaluating(model):
        kernel = function_kernel(model, members, curvature, damping, mask=mask)
    kernel = kernel.reshape(f.numel(), f.numel()).to(f.dtype)
    flat = output_change(kernel.unsqueeze(0), r.reshape(1, -1), hessian.unsqueeze(0)).squeeze(0)
    if on is None:
        return flat.reshape(f.shape)
    with evaluating(model):
        cross = function_kernel(model, on, curvature, damping, others=members, mask=mask)
    return cross.flatten(2).to(f.dtype) @ (r.flatten() + hessian @ flat)


def class_changes(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    curvature: Curvature,
    damping: float,
    *,
    head: Head | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[int, Tensor]:
    """How much worse each class would be predicted, had none of its examples been seen.

    Class -> the rise of the mean nll over its examples, a scalar in nats, at first order in the
    weights (``removal``), the outputs linearised. A class that others resemble rises little. That
    is a large removal: read the order, not the number. The data are read once, and held.

    Raises ValueError for labels that are not (N,) integers and a ``Shard`` of several ranks, else
    as ``removal``.
    """
    require_repeatable(data)
    if isinstance(data, Shard) and data.ranks.size > 1:
        raise ValueError(
            "leaving classes out reads all examples of a class at once; expected the whole data, "
            "got a Shard of them"
        )
    head = head_of(data, head)
    parts = list(_parts(model, data, likelihood, head, batch_size))
    inputs, mask = concat([part.inputs for part in parts]), parts[0].mask
    labels, f = torch.cat([part.labels for part in parts]), torch.cat([part.f for part in parts])
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"leaving classes out needs (N,) integer labels, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; use group_change on groups of your own"
        )
    classes, counts = labels.unique(return_counts=True)
    each = labels.argsort(stable=True).split(counts.tolist())
    changes = {}
    for c, index in zip(classes.tolist(), each, strict=True):
        own = Examples(take(inputs, index), labels[index])
        step = removal(model, own, likelihood, curvature, damping, head=head, batch_size=batch_size)
        on = (take(own.inputs, slice(i, i + batch_size)) for i in range(0, len(own), batch_size))
        shift = torch.cat([output_shift(model, x, step) for x in on]).to(f.dtype)
        without = f[index] + (shift if mask is None else shift * mask)
        rise = likelihood.nll(without, own.labels) - likelihood.nll(f[index], own.labels)
        changes[c] = rise.mean()
    return changes


# --- from an optimiser, and during training -------------------------------------------------------


def variance_from_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, num_data: int, *, damping: float = 0.0
) -> Params:
    r"""The diagonal of Sigma that an optimiser's state implies: name -> variances > 0.

        Adam, AdamW, ...   1 / (num_data sqrt(v) + damping), v the second moment, bias corrected
        RMSprop            the same; its v has no correction
        VON, IVON, ...     diag (S + damping I)⁻¹, S the precision of ``gaussian_posterior``
        ivon.IVON          1 / (ess (hess + weight_decay) + damping), from its groups
        SGD                1 / (num_data + damping): h = 1, so only the scores' order means anything

    The loss that was minimised is a mean over ``num_data`` examples; damping is the prior precision
    in nats, that is num_data times the L2 coefficient. sqrt(v) stands for the curvature as in Adam
    itself, and is no estimate of its size. Parameters that the optimiser does not hold are left
    out.

    Raises ValueError where the optimiser has not stepped yet, holds nothing of the model, or where
    a variance would be infinite; TypeError for an optimiser whose state says nothing.
    """
    if num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}")
    names = {id(p): name for name, p in parameters(model).items()}
    out: Params = {}
    own = callable(getattr(optimizer, "gaussian", None))
    if own:
        out = _of_gaussian(optimizer, names, damping)
    for group in () if own else optimizer.param_groups:
        held = [p for p in group["params"] if p.requires_grad]
        for p, precision in zip(held, _precisions(optimizer, group, held, num_data), strict=True):
            if id(p) in names:
                out[names[id(p)]] = 1 / (precision + damping)
    if not out:
        raise ValueError(
            "the optimiser holds no trainable parameter of this model; pass the model it trains"
        )
    if not all(bool((torch.isfinite(v) & (v > 0)).all()) for v in out.values()):
        raise ValueError(
            "some weights would have an infinite variance: the optimiser has seen no gradient for "
            "them; pass damping, the prior precision (num_data times the L2 coefficient)"
        )
    return {name: out[name] for name in names.values() if name in out}


def _of_gaussian(optimizer: Any, names: Mapping[int, str], damping: float) -> Params:
    """Of an optimiser that holds a Gaussian: parameters that never had a gradient are as unsure as
    their prior."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    every = {id(p): names.get(id(p), f"{i} is not of the model") for i, p in enumerate(held)}
    posterior = optimizer.gaussian(every)
    found = posterior.curvature.inverse_diagonal(posterior.prior_precision + damping)
    return {name: value for name, value in found.items() if name in set(names.values())}


def _precisions(
    optimizer: Any, group: dict[str, Any], held: list[nn.Parameter], num_data: int
) -> list[Tensor]:
    """One precision for each parameter of the group, in nats, before damping."""
    if isinstance(group.get("hess"), Tensor) and "ess" in group:
        flat = group["ess"] * (group["hess"].detach().flatten() + group.get("weight_decay", 0.0))
        parts = flat.split([p.numel() for p in held])
        return [part.reshape(p.shape) for part, p in zip(parts, held, strict=True)]
    if isinstance(optimizer, torch.optim.SGD):
        return [torch.full_like(p, float(num_data), requires_grad=False) for p in held]
    if not optimizer.state:
        raise ValueError(
            f"{type(optimizer).__name__} has no state yet: expected one that has stepped; train "
            "first, or use the curvature of the data"
        )
    return [num_data * _second(optimizer, group, p).sqrt() for p in held]


def _second(optimizer: Any, group: dict[str, Any], p: nn.Parameter) -> Tensor:
    """The second moment of the gradient; 0 where none has reached the parameter."""
    state = optimizer.state.get(p, {})
    if "exp_avg_sq" in state:
        second = state.get("max_exp_avg_sq", state["exp_avg_sq"]).detach()
        return second / (1 - group["betas"][1] ** float(state["step"]))
    if "square_avg" in state:
        return state["square_avg"].detach()
    if not state and any({"exp_avg_sq", "square_avg"} & set(s) for s in optimizer.state.values()):
        return torch.zeros_like(p, requires_grad=False)
    raise TypeError(
        f"cannot read a variance off {type(optimizer).__name__}: expected SGD, an optimiser of "
        "the Adam or RMSprop family, or a variational one; take "
        "lifelong.diagonal_curvature of the data instead"
    )


class SensitivityTrace:
    """Sensitivities while the model trains: which examples matter early, and which late.

    ``record`` once in a while, for instance each epoch. One record costs what the leverage score
    costs, a forward and C backward passes over ``data``, so pass a part of the data where training
    is short. optimizer: whose state gives the variance where ``record`` is not given one, with
    num_data (default: the size of data) and damping as in ``variance_from_optimizer``.

    steps: T ints; values: (T, N) float64, on the CPU. Raises NotRepeatableError for a loader that
    shuffles or augments, since its columns would mix examples.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        likelihood: Likelihood,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        num_data: int | None = None,
        damping: float = 0.0,
        of: Of = "output",
        head: Head | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        require_repeatable(data)
        self._model, self._data, self._likelihood = model, data, likelihood
        self._optimizer, self._damping = optimizer, damping
        self._of: Of = of
        self._num_data = num_examples(data) if num_data is None else num_data
        self._head, self._batch_size = head, batch_size
        self.steps: list[int] = []
        self._values: list[Tensor] = []

    def record(
        self,
        step: int | None = None,
        *,
        variance: Params | None = None,
        curvature: Curvature | None = None,
        damping: float | None = None,
    ) -> Tensor:
        """Append the scores at the model's present weights, and give them back: (N,).

        step: what to call this moment; default the next number. Sigma comes from ``variance``, or
        ``curvature`` with damping (default: the trace's), or the optimiser.

        Raises ValueError where there is none of these; nothing is recorded then.
        """
        damping = self._damping if damping is None else damping
        if curvature is None:
            if variance is None:
                if self._optimizer is None:
                    raise ValueError(
                        "a sensitivity needs the variance of the weights; pass variance= or "
                        "curvature=, or SensitivityTrace(optimizer=...)"
                    )
                variance = variance_from_optimizer(
                    self._optimizer, self._model, self._num_data, damping=damping
                )
            curvature, damping = as_curvature(variance), 0.0
        parts = _pass(
            self._model, self._data, self._likelihood, curvature, damping,
            self._head, self._batch_size,
        )  # fmt: skip
        scores = torch.cat([part.score(self._of) for part in parts]).double().cpu()
        self.steps.append(len(self.steps) if step is None else step)
        self._values.append(scores)
        return scores

    @property
    def values(self) -> Tensor:
        """(T, N): a row for each record. Raises ValueError where nothing was recorded."""
        if not self._values:
            raise ValueError("nothing was recorded yet; call record() during training")
        return torch.stack(self._values)


def as_curvature(variance: Params) -> Diagonal:
    """diag(variance)⁻¹: the curvature whose inverse, undamped, is this diagonal variance.

    Raises ValueError where a variance is not positive and finite.
    """
    if not all(bool((torch.isfinite(v) & (v > 0)).all()) for v in variance.values()):
        raise ValueError("variances must be positive and finite; leave out frozen weights instead")
    return Diagonal({name: 1 / v for name, v in variance.items()})

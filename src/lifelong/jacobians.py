r"""Products with the Jacobian J = df/dtheta of each example, without forming it where it is large.

f is (B, C), theta the named parameters, v a direction in output space, (B, C). The per-example
gradients Jᵀ v come factored from ``hooks``, for K directions at once, and three methods fall out:
sums of squares over examples (diagonal curvature), norms under a diagonal covariance (leverage),
and Gram matrices (FROMP's kernels).

Every function runs the model in the mode it is in and leaves its ``.grad``, ``requires_grad``,
hooks and the global random state as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import hooks
from .data import BATCH_SIZE, Data, Shard, among, batches, head_mask, head_of, num_local, summed
from .errors import NotRepeatableError
from .hooks import PROBE_ROWS, Engine, Outer, Trace, accumulator, output_vjp, upcast
from .likelihoods import Likelihood, require_likelihood
from .models import (
    Inputs,
    ParamFilter,
    Params,
    forward,
    match,
    move,
    parameters,
    require_finite,
    rows,
    take,
)

ParamChoice = Sequence[str] | ParamFilter | None


# --- public functions ---------------------------------------------------------------------------


def gradient(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    head: Sequence[int] | None = None,
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
    params: ParamChoice = None,
    batch_size: int = BATCH_SIZE,
) -> Params:
    """sum_i w_i J_iᵀ r_i in nats: the gradient of the data's summed nll. One backward a batch.

    weights: (N,) by position, default 1; exclude: (K,) ids left out; head: classes that compete,
    default those of the data; params: names or a filter, default all that are trainable. Sums
    are kept in float32 or better.

    Raises ValueError and TypeError for labels that do not fit, NonFiniteError for outputs that
    are NaN or infinite.
    """
    chosen = choose(model, params)
    with differentiating(model):
        total = {
            name: torch.zeros_like(p, dtype=accumulator(p.dtype)) for name, p in chosen.items()
        }
        for batch in weighted_batches(model, data, head, weights, exclude, batch_size):
            f = forward(model, batch.inputs)
            y, mask = checked(likelihood, f, batch)
            with torch.no_grad():
                r = residual(likelihood, upcast(f), y, mask) * batch.weights.unsqueeze(1)
            parts = output_vjp(f, list(chosen.values()), r.to(f.dtype), again=False)
            for name, part in zip(chosen, parts, strict=True):
                total[name] += part
    return dict(zip(total, summed(data, list(total.values())), strict=True))


def per_example_jacobian(
    model: nn.Module, inputs: Inputs, *, params: ParamChoice = None
) -> dict[str, Tensor]:
    """df_nc/dtheta of each example: name -> (B, C, *shape). For small models: all of it is held.

    Raises NotRepeatableError where the model is random or couples the examples of a batch.
    """
    engine = Engine(model, choose(model, params))
    with differentiating(model):
        inputs = move(inputs, engine.device)
        require_independent(model, inputs)
        parts: list[dict[str, Tensor]] = []
        for piece in engine.pieces(inputs, whole=True):
            trace = engine.trace(take(inputs, piece))
            parts.append(trace.rows(_basis(trace.f)))
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    return {name: value.transpose(0, 1).contiguous() for name, value in joined.items()}


def leverage(
    model: nn.Module,
    inputs: Inputs,
    likelihood: Likelihood,
    variance: Params,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """diag(J Sigma Jᵀ) over the outputs, Sigma = diag(variance): (B, C).

    The variance of each output under the Gaussian posterior N(theta, Sigma), in output units
    squared. Outputs outside of ``mask`` (C,) get 0. Never forms B x P for Linear layers:
    sum_oi g_o² sigma_oi a_i² = (g² sigma) . a².

    Raises StaleAnchorError where the variance has names or shapes that the model has not, and
    NotRepeatableError where the model is random or couples the examples of a batch.
    """
    engine = Engine(model, choose_like(model, variance))
    out: list[Tensor] = []
    with differentiating(model):
        inputs = move(inputs, engine.device)
        require_independent(model, inputs)
        for piece in engine.pieces(inputs):
            trace = engine.trace(take(inputs, piece))
            likelihood.mask(trace.f.detach(), mask)  # raises where no mask is possible
            v, used = _used(_basis(trace.f), mask)
            part = torch.zeros(trace.f.shape, dtype=v.dtype, device=v.device)
            for name, factor in trace.pull(v).items():
                part[:, used] += factor.norms(variance[name].to(v.device)).T
            out.append(part)
    return torch.cat(out)


def kernel(
    model: nn.Module,
    inputs: Inputs,
    variance: Params,
    *,
    likelihood: Likelihood | None = None,
    mask: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """K_c = A_c Sigma A_cᵀ between M examples, one matrix for each output c: (C, M, M).

    Sigma = diag(variance). A_c (M, P) holds the gradients of output c, or of the likelihood's
    mean where one is given (the probability of class c under ``mask``: A = Lambda J, FROMP,
    Pan et al. 2020, section 2). Outputs outside of ``mask`` (C,) have a matrix of zeros, so that
    the first index is always the output. blocks: (M,) labels; examples of different blocks (tasks)
    have covariance 0, and it is not computed. M x P is never held at once.

    Raises StaleAnchorError where the variance has names or shapes that the model has not, and
    NotRepeatableError where the model is random or couples the examples of a batch.
    """
    engine = Engine(model, choose_like(model, variance))
    m = rows(inputs)
    if blocks is not None and blocks.shape != (m,):
        raise ValueError(
            f"expected one block label for each of the {m} examples, got shape "
            f"{tuple(blocks.shape)}"
        )
    groups = [torch.arange(m)] if blocks is None else _groups(blocks)
    with differentiating(model):
        inputs = move(inputs, engine.device)
        require_independent(model, inputs)
        parts = [
            _kernel(engine, inputs if len(index) == m else take(inputs, index), variance,
                    likelihood, mask)
            for index in groups
        ]  # fmt: skip
    if len(groups) == 1:
        return parts[0]
    out = parts[0].new_zeros(parts[0].shape[0], m, m)
    for index, part in zip(groups, parts, strict=True):
        at = index.to(out.device)
        out[:, at.unsqueeze(1), at] = part
    return out


# --- choosing parameters, reading data ----------------------------------------------------------


def choose(model: nn.Module, params: ParamChoice = None) -> dict[str, nn.Parameter]:
    """The trainable parameters that are named, or that a filter keeps; all by default.

    Raises ValueError for a name that is unknown or frozen, or where nothing is left, and TypeError
    for sharded parameters (DTensor, as FSDP2 makes them).
    """
    if params is None or callable(params):
        chosen = parameters(model, params)
    else:
        every = parameters(model)
        unknown = [name for name in params if name not in every]
        if unknown:
            raise ValueError(
                f"no trainable parameters of these names: {unknown[:5]}; "
                f"the model has {list(every)[:5]}, ..."
            )
        chosen = {name: every[name] for name in every if name in set(params)}
    if not chosen:
        raise ValueError("no trainable parameter is left; set requires_grad, or widen the filter")
    # FSDP2's forward runs on other tensors, so the graph would not lead to these: zeros, silently.
    sharded = [name for name, p in chosen.items() if hasattr(p, "placements")]
    if sharded:
        raise TypeError(
            f"expected plain parameters, got sharded ones (DTensor): {sharded[:5]}; take gradients "
            "and curvature on the unsharded module, each process on its part of the examples, "
            "and add the results up"
        )
    return chosen


def choose_like(model: nn.Module, anchor: Params) -> dict[str, nn.Parameter]:
    """The model's parameters under the names of ``anchor``; StaleAnchorError where they differ."""
    match(model, anchor)
    return choose(model, list(anchor))


class WeightedBatch(NamedTuple):
    """A batch on the model's device, rows of weight 0 left out."""

    inputs: Inputs
    labels: Tensor
    weights: Tensor  # (B,)
    mask: Tensor | None  # (C,) bool; filled by ``checked``
    head: tuple[int, ...] | None
    number: int


def weighted_batches(
    model: nn.Module,
    data: Data,
    head: Sequence[int] | None,
    weights: Tensor | None,
    exclude: Tensor | None,
    batch_size: int,
) -> Iterator[WeightedBatch]:
    """The data in order, each example with its weight; ``exclude`` and weight 0 are skipped."""
    some = next(model.parameters())
    classes = head_of(data, head)
    if weights is not None and not bool(torch.isfinite(weights).all()):
        raise ValueError("expected finite weights, got NaN or infinite ones")
    if exclude is not None:
        exclude = exclude.sort().values
    if weights is not None and isinstance(data, Shard):  # of all ranks' examples
        if len(weights) != data.total:
            raise ValueError(f"expected {data.total} weights, one for each, got {len(weights)}")
        weights = weights[data.start : data.start + num_local(data)]
    start = 0
    for number, batch in enumerate(batches(data, batch_size)):
        n = len(batch.labels)
        if weights is None:
            w = torch.ones(n, dtype=accumulator(some.dtype))
        else:
            if weights.ndim != 1 or len(weights) < start + n:
                raise ValueError(
                    "expected one weight for each example, (N,), got shape "
                    f"{tuple(weights.shape)} for at least {start + n} examples"
                )
            w = weights[start : start + n].detach().to(accumulator(some.dtype))
        start += n
        keep = w != 0
        if exclude is not None:
            keep = keep & ~among(batch.ids, exclude).to(w.device)
        inputs, labels = batch.inputs, batch.labels
        if not bool(keep.all()):
            index = keep.nonzero().squeeze(1)
            if len(index) == 0:
                continue
            inputs, labels, w = take(inputs, index), labels[index], w[index]
        device = some.device
        yield WeightedBatch(
            move(inputs, device), labels.to(device), w.to(device), None, classes, number
        )
    if weights is not None and len(weights) != start:
        raise ValueError(f"expected {start} weights, one for each example, got {len(weights)}")


def checked(
    likelihood: Likelihood, f: Tensor, batch: WeightedBatch
) -> tuple[Tensor, Tensor | None]:
    """Labels and head mask of a batch whose outputs are finite and whose labels fit.

    Raises TypeError for what is no likelihood.
    """
    require_likelihood(likelihood)
    if f.ndim != 2:
        raise ValueError(f"expected outputs of shape (B, C), got {tuple(f.shape)}")
    require_finite(f, f"an output of the model in batch {batch.number}")
    mask = head_mask(batch.head, f.shape[1], f.device)
    likelihood.validate(f.detach(), batch.labels, mask)
    return batch.labels, mask


def residual(likelihood: Likelihood, f: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """dl/df under the head's mask: exactly 0 on the outputs that the head leaves out."""
    r = likelihood.residual(likelihood.mask(f.detach(), mask), y)
    return r if mask is None else r * mask


# --- guards -------------------------------------------------------------------------------------


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Gradients are on, and the random states (CPU, and the model's device) are restored after."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def require_deterministic_mode(model: nn.Module) -> None:
    """Raise NotRepeatableError where dropout or BatchNorm is in training mode."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        dropout = isinstance(module, _DROPOUT) and module.p > 0
        if dropout or isinstance(module, _BATCH_NORM):
            raise NotRepeatableError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode, where an "
                "example's output is random or depends on its batch; expected evaluation mode. "
                "Call model.eval() first, or use `with lifelong.models.evaluating(model):`"
            )


def require_independent(model: nn.Module, inputs: Inputs) -> None:
    """Raise NotRepeatableError where an output is random, or depends on the rest of its batch."""
    require_deterministic_mode(model)
    few = take(inputs, slice(0, PROBE_ROWS))
    n = rows(few)
    with torch.no_grad():
        first, again = forward(model, few), forward(model, few)
        if not _close(first, again):
            raise NotRepeatableError(
                "two forward passes of the same inputs differ: the model is random; expected the "
                "same outputs. Call model.eval(), or take the randomness out of its forward"
            )
        half = n // 2
        if half and first.shape[:1] == (n,):
            pieces = (take(few, slice(0, half)), take(few, slice(half, n)))
            split = torch.cat([forward(model, piece) for piece in pieces])
            if not _close(first, split):
                raise NotRepeatableError(
                    "an example's output depends on the other examples of its batch; expected "
                    "independent examples. Call model.eval(), or replace the layers that mix "
                    "examples (batch statistics) by ones that do not (GroupNorm, LayerNorm)"
                )


def _close(x: Tensor, y: Tensor) -> bool:
    """Equal to about half of the digits; NaN and infinity are left to a later, clearer check."""
    x, y = torch.nan_to_num(upcast(x)), torch.nan_to_num(upcast(y))
    if x.shape != y.shape:
        return False
    tolerance = math.sqrt(torch.finfo(x.dtype).eps)
    return bool((x - y).abs().max() <= tolerance * (1 + x.abs().max()))


def _basis(f: Tensor) -> Tensor:
    """The C unit directions: (C, B, C)."""
    eye = torch.eye(f.shape[1], dtype=accumulator(f.dtype), device=f.device)
    return eye.unsqueeze(1).expand(-1, len(f), -1)


def _used(v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The directions of the outputs in the mask, and their indices."""
    count = v.shape[0]
    if mask is None:
        return v, torch.arange(count, device=v.device)
    if mask.shape != (count,):
        raise ValueError(f"expected a mask of shape ({count},), got {tuple(mask.shape)}")
    index = mask.to(v.device).nonzero().squeeze(1)
    return v[index], index


# --- kernels ------------------------------------------------------------------------------------


def _groups(blocks: Tensor) -> list[Tensor]:
    return [(blocks == label).nonzero().squeeze(1) for label in blocks.unique()]


def _mean_directions(f: Tensor, likelihood: Likelihood | None, mask: Tensor | None) -> Tensor:
    """dh_c/df for h the likelihood's mean under the mask, or h = f: (C, B, C)."""
    if likelihood is None:
        return _basis(f)
    f = upcast(f.detach()).requires_grad_()
    h = likelihood.mean(likelihood.mask(f, mask))
    return torch.stack([output_vjp(h[:, c].sum(), [f], None)[0] for c in range(h.shape[1])])


def _kernel(
    engine: Engine,
    inputs: Inputs,
    variance: Params,
    likelihood: Likelihood | None,
    mask: Tensor | None,
) -> Tensor:
    trace = engine.trace(inputs)
    require_finite(trace.f, "an output of the model")
    m, count = trace.f.shape
    v, used = _used(_mean_directions(trace.f, likelihood, mask), mask)
    sigma = {name: variance[name].to(v.device, v.dtype) for name in engine.params}
    out = v.new_zeros(count, m, m)
    outer: dict[str, list[Outer]] = {}
    # A few classes at a time, so that the gradients at all layers fit the working set.
    step = max(1, hooks.WORKING_SET // (4 * m * trace.plan.floats + 1))
    for start in range(0, len(v), step):
        at = used[start : start + step]
        for name, factor in trace.pull(v[start : start + step], trace.plan.hooked).items():
            if isinstance(factor, Outer):
                outer.setdefault(name, []).append(factor)
            else:
                out[at] += factor.kernel(sigma[name])
    for name, factors in outer.items():
        joined = Outer(torch.cat([factor.g for factor in factors]), factors[0].a)
        out[used] += joined.kernel(sigma[name])
    generic = trace.plan.functional | trace.plan.looped
    if generic:
        _add_generic_kernel(out, trace, v, used, generic, sigma)
    return out


def _add_generic_kernel(
    out: Tensor, trace: Trace, v: Tensor, used: Tensor, names: frozenset[str], sigma: Params
) -> None:
    """Blocks of examples against blocks: two of them are held, whatever the parameters' size."""
    engine, m = trace.engine, v.shape[1]
    size = sum(engine.params[name].numel() for name in names)
    step = max(1, min(m, hooks.WORKING_SET // (4 * size * len(v) + 1)))
    parts = [slice(i, min(m, i + step)) for i in range(0, m, step)]

    def gradients(part: slice) -> dict[str, Tensor]:
        piece = Trace(engine, take(trace.inputs, part), trace.f[part], [])
        piece.plan = trace.plan._replace(hooked=frozenset())
        return {name: x.rows().flatten(2) for name, x in piece.pull(v[:, part]).items()}

    for i, left in enumerate(parts):
        x = gradients(left)
        for right in parts[: i + 1]:
            y = x if right == left else gradients(right)
            gram = sum((x[n] * sigma[n].flatten()) @ y[n].mT for n in x)
            for k, c in enumerate(used.tolist()):
                out[c, left, right] += gram[k]  # type: ignore[index]
                if right != left:
                    out[c, right, left] += gram[k].T  # type: ignore[index]

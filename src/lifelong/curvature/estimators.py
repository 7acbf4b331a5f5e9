r"""Curvature of data: G = sum_n w_n J_nᵀ M_n J_n, where the estimator chooses M_n (C, C).

    exact       M = H, the Hessian of the nll in the outputs: the generalised Gauss-Newton matrix,
                which is the Fisher for every likelihood here.
    mc          M = mean over sampled labels y ~ p(. | f) of r(y) r(y)ᵀ: unbiased for ``exact``.
    empirical   M = r rᵀ with the labels of the data: another matrix, which vanishes where the
                model fits every label. EWC implementations use it; it is no curvature.

Each is a sum over examples of per-example quantities, in nats, with M = sum_k v_k v_kᵀ: a few
directions v in output space, each pulled back to the weights once. Sources: Martens 2020 (GGN and
Fisher); Kunstner et al. 2019 (why the empirical one differs); Kirkpatrick et al. 2017 (EWC).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..data import BATCH_SIZE, Data, require_repeatable
from ..hooks import Engine, Trace, upcast
from ..jacobians import (
    ParamChoice,
    WeightedBatch,
    checked,
    choose,
    differentiating,
    require_deterministic_mode,
    require_independent,
    residual,
    weighted_batches,
)
from ..likelihoods import Likelihood
from ..models import take
from .dense import Dense
from .diagonal import Diagonal

G = TypeVar("G", Diagonal, Dense)
Estimator = Literal["exact", "mc", "empirical"]

_DENSE_LIMIT = 8 * 2**30  # bytes of a matrix


def diagonal_curvature(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    estimator: Estimator = "exact",
    head: Sequence[int] | None = None,
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
    params: ParamChoice = None,
    batch_size: int = BATCH_SIZE,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Diagonal:
    """The diagonal of G, summed over the data.

    head: classes that compete, default those of the data; weights: (N,) by position; exclude: (K,)
    ids left out (those in memory); params: names or a filter; num_samples and generator are for
    "mc", where without a generator the labels are drawn from a fixed seed. The result does not
    depend on batch_size, except through which labels "mc" draws.

    Raises NotRepeatableError for a loader that shuffles or augments, and for a model that is
    random, in training mode, or couples examples; NonFiniteError for outputs that are NaN or
    infinite; ValueError and TypeError for labels, heads, weights or estimators that do not fit.
    """
    chosen = choose(model, params)
    total = _zeros(Diagonal, chosen).values

    def add(trace: Trace, v: Tensor, w: Tensor) -> None:
        for name, factor in trace.pull(v).items():
            total[name] += factor.square_sum(w)

    source = _Source(data, head, weights, exclude, batch_size)
    _visit(add, model, chosen, source, likelihood, estimator, num_samples, generator)
    return Diagonal(total)


def dense_curvature(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    estimator: Estimator = "exact",
    head: Sequence[int] | None = None,
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
    params: ParamChoice = None,
    batch_size: int = BATCH_SIZE,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Dense:
    """The whole of G, summed over the data; arguments and errors as in ``diagonal_curvature``.

    Raises ValueError also where the matrix would not fit in 8 GiB.
    """
    chosen = choose(model, params)
    size = sum(p.numel() for p in chosen.values())
    if size**2 * 4 > _DENSE_LIMIT:
        raise ValueError(
            f"a dense curvature of {size} parameters takes {size**2 * 4 / 2**30:.0f} GiB; "
            "use diagonal_curvature, or choose fewer parameters with params="
        )
    total = _zeros(Dense, chosen)

    def add(trace: Trace, v: Tensor, w: Tensor) -> None:
        j = torch.cat([x.flatten(2) for x in trace.rows(v).values()], dim=-1)  # (K, B, P)
        weighted = (j * w.unsqueeze(-1)).flatten(0, 1)
        total.matrix.addmm_(weighted.T.to(total.matrix.dtype), j.flatten(0, 1))

    source = _Source(data, head, weights, exclude, batch_size)
    _visit(add, model, chosen, source, likelihood, estimator, num_samples, generator, whole=True)
    return total


def _zeros(structure: type[G], chosen: dict[str, nn.Parameter]) -> G:
    with torch.inference_mode(False):  # a tensor of inference mode could not be added to
        return structure.zeros_like(chosen)


class _Source(NamedTuple):
    """Which examples, in which head, with which weights."""

    data: Data
    head: Sequence[int] | None
    weights: Tensor | None
    exclude: Tensor | None
    batch_size: int


def _visit(
    add: Callable[[Trace, Tensor, Tensor], None],
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    source: _Source,
    likelihood: Likelihood,
    estimator: Estimator,
    num_samples: int,
    generator: torch.Generator | None,
    whole: bool = False,
) -> None:
    """Call ``add(trace, v, w)`` on a few examples at a time, with directions v and weights w.

    The pieces of a batch are as large as the working set allows, whatever the batch size.
    """
    if estimator not in ("exact", "mc", "empirical"):
        raise ValueError(f"estimator must be 'exact', 'mc' or 'empirical', got {estimator!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    require_deterministic_mode(model)
    engine = Engine(model, chosen)
    if generator is None:
        generator = torch.Generator(engine.device).manual_seed(0)
    count = {"exact": None, "mc": num_samples, "empirical": 1}[estimator]
    with differentiating(model):
        require_repeatable(source.data)
        for batch in weighted_batches(model, *source):
            if not engine.plans:
                require_independent(model, batch.inputs)
            for piece in engine.pieces(batch.inputs, count, whole):
                part = batch._replace(
                    inputs=take(batch.inputs, piece),
                    labels=batch.labels[piece],
                    weights=batch.weights[piece],
                )
                trace = engine.trace(part.inputs)
                v = _directions(likelihood, trace.f, part, estimator, num_samples, generator)
                if len(v):
                    add(trace, v, part.weights.to(v.dtype))


@torch.no_grad()
def _directions(
    likelihood: Likelihood,
    f: Tensor,
    batch: WeightedBatch,
    estimator: Estimator,
    num_samples: int,
    generator: torch.Generator,
) -> Tensor:
    """v (K, B, C) with sum_k v_k v_kᵀ = M; exactly 0 on the outputs outside of the head."""
    labels, mask = checked(likelihood, f, batch)
    f = upcast(f.detach())
    if estimator == "empirical":
        return residual(likelihood, f, labels, mask).unsqueeze(0)
    inside = likelihood.mask(f, mask)
    if estimator == "mc":
        scale = num_samples**-0.5
        draws = [likelihood.sample(inside, generator) for _ in range(num_samples)]
        return torch.stack([scale * residual(likelihood, f, y, mask) for y in draws])
    v = likelihood.hessian_factor(inside).permute(2, 0, 1)
    # Outside of the head the columns are 0: a head of 2 classes out of 10 costs 2 backward passes.
    return v[v.flatten(1).any(dim=1)]

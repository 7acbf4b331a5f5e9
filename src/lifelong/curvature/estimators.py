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

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..data import BATCH_SIZE, Data, require_repeatable
from ..jacobians import (
    Engine,
    Factor,
    ParamChoice,
    WeightedBatch,
    checked,
    choose,
    preserved_rng,
    require_deterministic_mode,
    require_independent,
    residual,
    upcast,
    weighted_batches,
)
from ..likelihoods import Likelihood
from ..models import take
from .dense import Dense
from .diagonal import Diagonal

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
    total = Diagonal.zeros_like(chosen).values
    for factors, w in _factors(
        model, chosen, data, likelihood, estimator, head, weights, exclude, batch_size,
        num_samples, generator,
    ):  # fmt: skip
        for name, factor in factors.items():
            total[name] += factor.square_sum(w)
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
    total = Dense.zeros_like(chosen)
    for factors, w in _factors(
        model, chosen, data, likelihood, estimator, head, weights, exclude, batch_size,
        num_samples, generator, whole=True,
    ):  # fmt: skip
        j = torch.cat([factors[name].rows().flatten(2) for name in chosen], dim=-1)  # (K, B, P)
        weighted = (j * w.unsqueeze(-1)).flatten(0, 1)
        total.matrix.addmm_(weighted.T, j.flatten(0, 1))
    return total


def _factors(
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    data: Data,
    likelihood: Likelihood,
    estimator: Estimator,
    head: Sequence[int] | None,
    weights: Tensor | None,
    exclude: Tensor | None,
    batch_size: int,
    num_samples: int,
    generator: torch.Generator | None,
    whole: bool = False,
) -> Iterator[tuple[dict[str, Factor], Tensor]]:
    """Pulled-back directions and weights (B,), a few examples at a time."""
    if estimator not in ("exact", "mc", "empirical"):
        raise ValueError(
            f"estimator must be 'exact', 'mc' or 'empirical', got {estimator!r}"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    require_deterministic_mode(model)
    engine = Engine(model, chosen)
    if generator is None:
        generator = torch.Generator(engine.device).manual_seed(0)
    with preserved_rng(model), torch.enable_grad():
        require_repeatable(data)
        for batch in weighted_batches(model, data, head, weights, exclude, batch_size):
            if not engine.plans:
                require_independent(model, batch.inputs)
            count = {"exact": None, "mc": num_samples, "empirical": 1}[estimator]
            for piece in engine.pieces(batch.inputs, count, whole=whole):
                part = batch._replace(
                    inputs=take(batch.inputs, piece),
                    labels=batch.labels[piece],
                    weights=batch.weights[piece],
                )
                trace = engine.trace(part.inputs)
                v = _directions(likelihood, trace.f, part, estimator, num_samples, generator)
                if len(v):
                    w = part.weights.to(v.dtype)
                    yield trace.pull(v), w


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

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
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from ..data import BATCH_SIZE, Data, Shard, require_repeatable, summed
from ..hooks import Engine, Trace, accumulator, upcast
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
from ..likelihoods import Likelihood, require_likelihood
from ..models import take
from .base import Curvature, eigh, unflatten
from .block_diagonal import BlockDiagonal
from .dense import Dense
from .diagonal import Diagonal
from .isotropic import Isotropic
from .kfac import Corrections, Other, PositionRule, Sums
from .kronecker import Kronecker
from .low_rank import LowRank

G = TypeVar("G", Diagonal, Dense)
Estimator = Literal["exact", "mc", "empirical"]
Structure = Literal[
    "isotropic", "diagonal", "kronecker", "eigen_kronecker", "low_rank", "block", "dense"
]

_DENSE_LIMIT = 8 * 2**30  # bytes of a matrix
_OVERSAMPLE = 10  # directions beyond the rank


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
    return Diagonal(dict(zip(total, summed(data, list(total.values())), strict=True)))


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
    need = size**2 * _itemsize(chosen)
    if need > _DENSE_LIMIT:
        raise ValueError(
            f"a dense curvature of {size} parameters takes {need / 2**30:.0f} GiB; "
            "use diagonal_curvature, or choose fewer parameters with params="
        )
    total = _zeros(Dense, chosen)

    def add(trace: Trace, v: Tensor, w: Tensor) -> None:
        j = torch.cat([x.flatten(2) for x in trace.rows(v).values()], dim=-1)  # (K, B, P)
        _add_outer(total.matrix, j, w)

    source = _Source(data, head, weights, exclude, batch_size)
    _visit(add, model, chosen, source, likelihood, estimator, num_samples, generator, whole=True)
    return Dense(summed(data, [total.matrix])[0], total.shapes)


class Options(TypedDict, total=False):
    """What every estimator takes beside the model, the data and the likelihood; the meanings are
    those of ``diagonal_curvature``."""

    estimator: Estimator
    head: Sequence[int] | None
    weights: Tensor | None
    exclude: Tensor | None
    params: ParamChoice
    batch_size: int
    num_samples: int
    generator: torch.Generator | None


def isotropic_curvature(
    model: nn.Module, data: Data, likelihood: Likelihood, **options: Unpack[Options]
) -> Isotropic:
    """(tr G / P) I: the nearest multiple of the identity in the Frobenius norm.

    Arguments and errors as in ``diagonal_curvature``, whose cost it has.
    """
    values = diagonal_curvature(model, data, likelihood, **options).values
    size = sum(value.numel() for value in values.values())
    trace = torch.stack([value.sum() for value in values.values()]).sum()
    return Isotropic(trace / size, {name: value.shape for name, value in values.items()})


def block_curvature(
    model: nn.Module, data: Data, likelihood: Likelihood, **options: Unpack[Options]
) -> BlockDiagonal:
    """G without what is between modules: a dense block for the parameters of each module.

    Arguments and errors as in ``diagonal_curvature``. Raises ValueError also where the blocks
    would not fit in 8 GiB.
    """
    chosen = choose(model, options.get("params"))
    modules: dict[str, dict[str, nn.Parameter]] = {}
    for name, p in chosen.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = p
    each = {module: sum(p.numel() for p in found.values()) for module, found in modules.items()}
    need = sum(each[module] ** 2 * _itemsize(found) for module, found in modules.items())
    if need > _DENSE_LIMIT:
        largest = max(each, key=lambda module: each[module])
        raise ValueError(
            f"dense blocks take {need / 2**30:.0f} GiB, the largest of {each[largest]} parameters "
            f"in {largest or 'the model'!r}; use kronecker_curvature, or choose fewer parameters "
            "with params="
        )
    totals = {module: _zeros(Dense, found) for module, found in modules.items()}

    def add(trace: Trace, v: Tensor, w: Tensor) -> None:
        rows = trace.rows(v)
        for module, found in modules.items():
            j = torch.cat([rows[name].flatten(2) for name in found], dim=-1)
            _add_outer(totals[module].matrix, j, w)

    _visit_all(add, model, chosen, data, likelihood, options, whole=True)
    whole = summed(data, [total.matrix for total in totals.values()])
    return BlockDiagonal(
        tuple(Dense(x, t.shapes) for x, t in zip(whole, totals.values(), strict=True))
    )


def kronecker_curvature(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    corrected: bool = False,
    positions: PositionRule = "expand",
    other: Other = "diagonal",
    **options: Unpack[Options],
) -> BlockDiagonal:
    """K-FAC: a ``Kronecker`` block for each Linear and convolutional layer; see ``kfac``.

    corrected: ``EigenKronecker`` blocks, the exact diagonal in the factors' eigenbases (EKFAC),
    for a second pass over the data. positions: how a layer that is used at several positions is
    read. other: what parameters of other layers get (normalisation, biases alone, embeddings):
    a "diagonal" block, a "dense" one, or "raise". Other arguments as in ``diagonal_curvature``;
    estimator="mc" with one sample costs one backward pass.

    Exact for one example; for layers of a network without nonlinearities under a Gaussian
    likelihood (Bernacchia et al. 2018), without weight sharing; the trace of a layer's block is
    right where inputs and gradients are independent.

    Raises ValueError for parameters that have no factors where other="raise", or that batches use
    in different ways; else as ``diagonal_curvature``.
    """
    if positions not in ("expand", "reduce"):
        raise ValueError(f"positions must be 'expand' or 'reduce', got {positions!r}")
    if other not in ("diagonal", "dense", "raise"):
        raise ValueError(f"other must be 'diagonal', 'dense' or 'raise', got {other!r}")
    chosen = choose(model, options.get("params"))
    sums = Sums(chosen, positions, other)
    _visit_all(sums.add, model, chosen, data, likelihood, options)
    if isinstance(data, Shard):
        sums.over(data.ranks)
    blocks = sums.blocks()
    if not corrected:
        return BlockDiagonal(blocks)
    factors = [block for block in blocks if isinstance(block, Kronecker)]
    corrections = Corrections({next(iter(k.shapes)): k.eigen for k in factors})
    _visit_all(corrections.add, model, chosen, data, likelihood, options)
    if isinstance(data, Shard):
        corrections.over(data.ranks)
    exact = corrections.blocks()
    return BlockDiagonal(tuple(exact.get(next(iter(b.shapes)), b) for b in blocks))


def low_rank_curvature(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    rank: int = 20,
    iterations: int = 2,
    **options: Unpack[Options],
) -> LowRank:
    """The leading ``rank`` eigenvalues and eigenvectors of G, by randomised subspace iteration.

    G is applied to rank + 10 directions at once, the data read iterations + 2 times, nothing of
    them kept: memory is that of the directions, whatever N. The error of an eigenvector falls with
    the power iterations + 1 of lambda_(rank + 11) / lambda_rank, that of an eigenvalue with twice
    that power, and both are 0 where G has rank + 10 directions or fewer (Halko et al. 2011).
    Other arguments as in ``diagonal_curvature``; with "mc" all passes draw the same labels, and
    the starting directions come from the generator too.

    Raises ValueError for a rank below 1 and fewer than 0 iterations, and for directions that
    would not fit in 8 GiB; else as ``diagonal_curvature``.
    """
    if rank < 1 or iterations < 0:
        raise ValueError(
            f"expected a rank of at least 1 and iterations of at least 0, got {rank} and "
            f"{iterations}"
        )
    chosen = choose(model, options.get("params"))
    shapes = {name: p.shape for name, p in chosen.items()}
    some = next(iter(chosen.values()))
    size = sum(p.numel() for p in chosen.values())
    width, dtype = min(size, rank + _OVERSAMPLE), accumulator(some.dtype)
    need = 2 * dtype.itemsize * size * width
    if need > _DENSE_LIMIT:
        raise ValueError(
            f"{width} directions of {size} parameters, twice, take "
            f"{need / 2**30:.0f} GiB; lower the rank, or choose fewer parameters with "
            "params="
        )
    generator = options.get("generator") or torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        x = torch.randn(size, width, generator=generator, dtype=dtype, device=generator.device)
        x = torch.linalg.qr(x.to(some.device))[0]
        labels = generator.get_state()

        def product(x: Tensor) -> Tensor:
            """G x: (P, R)."""
            y = torch.zeros_like(x)
            again = torch.Generator(generator.device)
            again.set_state(labels)

            def add(trace: Trace, v: Tensor, w: Tensor) -> None:
                j = torch.cat([part.flatten(2) for part in trace.rows(v).values()], dim=-1)
                j = j.to(x.dtype)
                y.addmm_(j.flatten(0, 1).T, ((j @ x) * w.to(x.dtype).unsqueeze(-1)).flatten(0, 1))

            _visit_all(
                add, model, chosen, data, likelihood, {**options, "generator": again}, whole=True
            )
            generator.set_state(again.get_state())
            return summed(data, [y])[0]

        for _ in range(iterations + 1):
            x = torch.linalg.qr(product(x))[0]
        values, vectors = eigh(x.T @ product(x))
    keep = values.abs().argsort(descending=True)[:rank]
    factors = unflatten(shapes, (x @ vectors[:, keep]).T)
    return LowRank({name: part.clone() for name, part in factors.items()}, values[keep])


STRUCTURES: dict[str, Callable[..., Curvature]] = {
    "isotropic": isotropic_curvature,
    "diagonal": diagonal_curvature,
    "kronecker": kronecker_curvature,
    "eigen_kronecker": partial(kronecker_curvature, corrected=True),
    "low_rank": low_rank_curvature,
    "block": block_curvature,
    "dense": dense_curvature,
}


def estimate(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    structure: Structure = "kronecker",
    **options: Any,
) -> Curvature:
    """The curvature of the data in a structure by name, by the function that its name stands for.

    Raises ValueError for an unknown structure; else as that function.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {list(STRUCTURES)}, got {structure!r}")
    return STRUCTURES[structure](model, data, likelihood, **options)


def _add_outer(total: Tensor, j: Tensor, w: Tensor) -> None:
    """total (P, P) += sum_kn w_n j_kn j_knᵀ for j (K, B, P)."""
    weighted = (j * w.unsqueeze(-1)).flatten(0, 1)
    total.addmm_(weighted.T.to(total.dtype), j.flatten(0, 1).to(total.dtype))


def _visit_all(
    add: Callable[[Trace, Tensor, Tensor], None],
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    data: Data,
    likelihood: Likelihood,
    options: Options,
    whole: bool = False,
) -> None:
    source = _Source(
        data,
        options.get("head"),
        options.get("weights"),
        options.get("exclude"),
        options.get("batch_size", BATCH_SIZE),
    )
    estimator, num_samples = options.get("estimator", "exact"), options.get("num_samples", 1)
    generator = options.get("generator")
    _visit(add, model, chosen, source, likelihood, estimator, num_samples, generator, whole)


def _itemsize(chosen: dict[str, nn.Parameter]) -> int:
    """Bytes of a number in their sums."""
    return accumulator(next(iter(chosen.values())).dtype).itemsize


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
    _require_methods(likelihood, estimator)
    require_deterministic_mode(model)
    engine = Engine(model, chosen)
    if generator is None:
        generator = torch.Generator(engine.device).manual_seed(0)
    if estimator == "mc" and isinstance(source.data, Shard):
        generator = _own_generator(generator, source.data.ranks.rank)
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
                add(trace, v, part.weights.to(v.dtype))


def _own_generator(shared: torch.Generator, rank: int) -> torch.Generator:
    """For what a rank draws by itself: the shared one, from which all ranks take one number, would
    stand elsewhere on each rank afterwards."""
    seed = int(torch.randint(2**62, (), generator=shared, device=shared.device))
    return torch.Generator(shared.device).manual_seed(seed + rank)


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
    v = _root(likelihood, inside).permute(2, 0, 1)
    # Outside of the head the columns are 0: a head of 2 classes out of 10 costs 2 backward passes.
    used = v.flatten(1).any(dim=1)
    used[0] |= not bool(used.any())  # saturated examples count in the mean of a layer's inputs
    return v[used]


def _require_methods(likelihood: Likelihood, estimator: Estimator) -> None:
    """Raise TypeError where the likelihood lacks what the estimator needs, or is none."""
    require_likelihood(likelihood)
    needs = {"exact": ("hessian_factor", "hessian"), "mc": ("sample",)}.get(estimator, ())
    if needs and not any(callable(getattr(likelihood, name, None)) for name in needs):
        raise TypeError(
            f"{type(likelihood).__name__} has no {' or '.join(needs)}, which "
            f"estimator={estimator!r} needs; add that method, or pass estimator='empirical', which "
            "needs the residual alone (but is another matrix: see docs/curvature.md)"
        )


def _root(likelihood: Likelihood, f: Tensor) -> Tensor:
    """S (B, C, K) with S Sᵀ = H: the likelihood's, or by the eigenvectors of its Hessian."""
    if callable(getattr(likelihood, "hessian_factor", None)):
        return likelihood.hessian_factor(f)
    values, vectors = eigh(likelihood.hessian(f))
    if bool((values < 0).any()):
        raise ValueError(
            f"the Hessian of {type(likelihood).__name__} in the outputs is indefinite (its "
            f"smallest eigenvalue is {float(values.min()):.3g}), so the Gauss-Newton matrix is no "
            "sum of squares; pass estimator='mc' for the Fisher, which is never indefinite"
        )
    return vectors * values.sqrt().unsqueeze(-2)

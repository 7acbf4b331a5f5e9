r"""Compact memory: a few weighted vectors whose curvature stands for that of all past features.

For a linear head f = theta phi(x) on frozen features a past example matters by the rank-one matrix
lambda_i phi_i phi_iᵀ, lambda = tr d²l/df². Any K vectors u_k with weights w_k for which

    sum_k w_k lambda(u_k) u_k u_kᵀ  =  S  =  sum_i lambda(phi_i) phi_i phi_iᵀ

say the same about the head, near the anchor, as all the examples do. Known methods are choices of
them: the examples themselves with weight 1 are a K-prior with full memory, which solves this with
K = N; the K leading eigenvectors of S are ``match_closed_form``; probabilistic PCA's EM, which
goes to the same subspace from random examples, is ``match_em``, as published.

    rows (R, P)    any A with AᵀA = S: the examples, each times sqrt(lambda). A P x P matrix is
                   made only where there are more rows than features.
    scale          u (K, P) -> lambda(u) (K,), at the head's present weights; None for 1.

With several outputs the curvature has a P x P block for each pair of classes. Only the sum of the
blocks of a class with itself is matched, tr in place of d²l/df²: the memory does not know which
class a direction belongs to, nor of the blocks that couple two classes. Each vector's soft label
brings its own split over the classes. Exact for one logit and for a Gaussian.

Source: compact memory for continual logistic regression, NeurIPS 2025; Khan & Swaroop 2021 for
the prior that uses it; Tipping & Bishop 1999 for the EM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .data import BATCH_SIZE, Data, Examples, batches, head_of
from .likelihoods import Likelihood
from .memory import Memory
from .models import device_of, evaluating, forward, move, read, require_finite

Scale = Callable[[Tensor], Tensor]
Method = Literal["em", "closed_form"]

# For one logit: p is kept within [1e-4, 1 - 1e-4], as published.
_FLOOR = 4e-4


@dataclass(frozen=True, eq=False)
class CompactMemory:
    """K vectors that stand for the past. vectors (K, P); weights (K,): past examples at each."""

    vectors: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Tensor | slice) -> CompactMemory:
        return CompactMemory(self.vectors[index], self.weights[index])

    @classmethod
    def of(cls, *memories: Memory) -> CompactMemory:
        """The inputs and soft weights of memories of features, one after another.

        Raises ValueError for inputs that are not (M, P).
        """
        inputs = [require_features(read(m.inputs)) for m in memories]
        return cls(torch.cat(inputs), torch.cat([m.soft_weight for m in memories]))

    def rows(self, scale: Scale | None = None) -> Tensor:
        """(K, P) whose Gram matrix is the memory's curvature: sqrt(w lambda(u)) u."""
        return (self.weights * _values(scale, self.vectors)).sqrt().unsqueeze(1) * self.vectors

    def unit(self) -> CompactMemory:
        """The same directions at norm 1, weights times the squared norms; zeros are left out."""
        norm = self.vectors.norm(dim=1)
        kept = (norm > 0).nonzero().squeeze(1)
        norm = norm[kept]
        vectors = self.vectors[kept] / norm.unsqueeze(1)
        return CompactMemory(vectors, self.weights[kept] * norm.square())


def match_closed_form(rows: Tensor, k: int, scale: Scale | None = None) -> CompactMemory:
    """The K leading eigenvectors of S, with w_k = eigenvalue / lambda(u_k): the best rank K.

    In linear regression with K at least the rank of the data this is the past itself: loss,
    gradient and Hessian at any weights. At most as many vectors come back as S has rank; more
    would say nothing. The largest entry of each vector is positive.

    Raises ValueError for k below 1, rows that are not (R, P) or all zero; NonFiniteError.
    """
    _require_rows(rows, k)
    _, s, u = torch.linalg.svd(compress(rows), full_matrices=False)
    found = _rank(s, rows)
    u, values = u[: min(k, found)], s[: min(k, found)].square()
    largest = u.gather(1, u.abs().argmax(1, keepdim=True))  # u and -u have the same curvature
    u = u * largest.sign()
    return CompactMemory(u, values / _values(scale, u))


def match_with_constant(rows: Tensor, k: int, scale: Scale | None = None) -> CompactMemory:
    r"""``match_closed_form`` for a head with a bias: vectors whose last entry is 1.

    rows (R, P + 1): the last column is the constant's. S then holds a mass s, a mean mu and a
    scatter C of the features, each weighted by lambda. The K points (v_k, 1), of equal curvature
    s / K, have that mass and mean exactly, and of C the K - 1 leading directions: the rows
    sqrt(s) (mu, 1) and sigma_j (q_j, 0), rotated until the constant is the same in all, which
    changes no Gram matrix and spreads each direction over all points (``_level``). They stay nearer
    to the data than unit vectors, which have no constant.

    scale takes vectors (K, P + 1). Raises as ``match_closed_form``, and ValueError where the
    constant is 0 throughout.
    """
    _require_rows(rows, k)
    rows = compress(rows)
    features, constant = rows[:, :-1], rows[:, -1]
    mass = constant @ constant
    if not mass > 0:
        raise ValueError(
            "the last column, the constant of the bias, is 0 in every row; append a 1 to the "
            "features before they are weighted"
        )
    mean = constant @ features / mass
    _, s, q = torch.linalg.svd(features - constant.unsqueeze(1) * mean, full_matrices=False)
    found = _rank(s, rows)
    size = min(k, found + 1)
    spread = s[: size - 1].unsqueeze(1) * q[: size - 1]
    points = mean + (size / mass).sqrt() * _level(size, rows)[:, 1:] @ spread
    vectors = torch.cat([points, torch.ones_like(points[:, :1])], dim=1)
    return CompactMemory(vectors, mass / size / _values(scale, vectors))


def match_em(
    rows: Tensor,
    start: CompactMemory,
    scale: Scale | None = None,
    *,
    damping: float = 1e-4,
    iterations: int = 10,
) -> CompactMemory:
    r"""The published EM: from ``start`` towards sum_k w_k lambda(u_k) u_k u_kᵀ + eps I = S.

    eps = damping. Each iteration takes the columns F of ``rows`` of the memory, lambda included,

        F <- S F (eps M + Fᵀ S F)⁻¹ M,   M = Fᵀ F + eps I,

    divides lambda out again, and gives the vectors norm 1. A fixed point spans K leading
    eigenvectors of S, with the eigenvalues less eps. The span is found in few iterations; the
    curvature along an eigenvector grows by about 2 eps in each, so with eps far below the
    eigenvalues the scale stays near that of ``start`` for as many iterations as anyone waits
    (docs/compact-memory.md). ``match_closed_form`` is where it would go.

    A vector of the start across all of ``rows`` is left out. Raises ValueError for rows or a start
    of the wrong shape, a start of such vectors alone, an eps that is not positive or iterations
    below 1; NonFiniteError.
    """
    _require_rows(rows, 1)
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(f"the damping of EM must be positive and finite, got {damping}")
    if iterations < 1:
        raise ValueError(f"EM needs at least one iteration, got {iterations}")
    if start.vectors.ndim != 2 or start.vectors.shape[1] != rows.shape[1] or not len(start):
        raise ValueError(
            f"expected a start with vectors of shape (K, {rows.shape[1]}), as wide as the rows, "
            f"got {tuple(start.vectors.shape)}"
        )
    require_finite(start.vectors, "the start of EM")
    memory = start.unit()
    if not len(memory):
        raise ValueError("every vector of the start is 0; start from features of the data")
    apply = _curvature(rows)
    for _ in range(iterations):
        memory = _em_step(apply, memory, scale, damping)
        if not len(memory):
            raise ValueError(
                "no vector of the start has a part along the examples' curvature; start from "
                "features of these examples"
            )
    return memory


def _em_step(
    apply: Callable[[Tensor], Tensor], memory: CompactMemory, scale: Scale | None, damping: float
) -> CompactMemory:
    values = _values(scale, memory.vectors)
    F = ((memory.weights * values).sqrt().unsqueeze(1) * memory.vectors).T  # (P, K)
    SF = apply(F)
    M = F.T @ F
    M.diagonal().add_(damping)
    A = F.T @ SF + damping * M
    # Where columns depend on each other, only eps² keeps A from being singular.
    A.diagonal().add_(1e-12 * A.diagonal().mean())
    F = SF @ torch.cholesky_solve(M, torch.linalg.cholesky(A))
    return CompactMemory(F.T, 1 / values).unit()


def _curvature(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """v (P, K) -> S v, through whichever of the rows and S is smaller."""
    if len(rows) < rows.shape[1]:
        return lambda v: rows.T @ (rows @ v)
    S = rows.T @ rows
    return lambda v: S @ v


def compress(rows: Tensor) -> Tensor:
    """(min(R, P), P) rows with the same Gram matrix, by QR: no digits are lost to squaring."""
    if len(rows) <= rows.shape[1]:
        return rows
    return torch.linalg.qr(rows, mode="r").R


def _level(size: int, like: Tensor) -> Tensor:
    """(K, K) orthogonal, its first column 1 / sqrt(K) throughout: the cosine transform.

    No entry of the others exceeds sqrt(2 / K), so that no point takes a direction for itself and
    lies far out along it, as with a reflection.
    """
    k = torch.arange(size, dtype=like.dtype, device=like.device)
    out = torch.cos(math.pi * (k.unsqueeze(1) + 0.5) * k / size) * math.sqrt(2 / size)
    out[:, 0] = 1 / math.sqrt(size)
    return out


def _values(scale: Scale | None, vectors: Tensor) -> Tensor:
    return torch.ones_like(vectors[:, 0]) if scale is None else scale(vectors)


def _rank(s: Tensor, rows: Tensor) -> int:
    """How many singular values are more than the rounding of ``rows``."""
    rounding = 2 * max(rows.shape) * torch.finfo(s.dtype).eps * rows.norm()
    return int((s > rounding).sum())


def _require_rows(rows: Tensor, k: int) -> None:
    if k < 1:
        raise ValueError(f"a compact memory needs at least one vector, got k={k}")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"expected rows of shape (R, P), got {tuple(rows.shape)}")
    require_finite(rows, "the rows of the curvature")
    if not rows.any():
        raise ValueError(
            "the examples have no curvature: all features are 0, or the head is certain of all "
            "of them; there is nothing that a memory could hold"
        )


# -------------------------------------------------------------------- of a head, on data


def features(
    extractor: nn.Module,
    data: Data,
    *,
    constant: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Examples:
    """The data seen through a frozen extractor: (N, P) features, with labels, ids and head.

    Read in eval mode, a batch at a time, without gradients; the modes are restored. What comes
    back is on the CPU. Features of more dimensions are flattened. constant: append a 1, the bias
    of a head without one. Raises as reading the data does; NonFiniteError.
    """
    parts, device = [], device_of(extractor)
    with evaluating(extractor), torch.no_grad():
        for batch in batches(data, batch_size):
            phi = forward(extractor, move(batch.inputs, device)).flatten(1).cpu()
            require_finite(phi, "a feature")
            if constant:
                phi = torch.cat([phi, torch.ones_like(phi[:, :1])], dim=1)
            parts.append((phi, batch.labels, batch.ids))
    inputs, labels, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    return Examples(inputs, labels, ids=ids, head=head_of(data))


def scale_of(head: nn.Linear, likelihood: Likelihood) -> Scale:
    """lambda(u) = tr d²l/df² at the head's outputs, for vectors with the bias's constant if any.

    Not below 4e-4 of that at f = 0, since weights are divided by it: for one logit that is p
    within [1e-4, 1 - 1e-4].
    """
    theta = _affine(head)
    smallest = _FLOOR * likelihood.hessian_trace(theta.new_zeros(1, len(theta)))

    def scale(vectors: Tensor) -> Tensor:
        return likelihood.hessian_trace(vectors @ theta.T).maximum(smallest)

    return scale


def curvature_rows(
    head: nn.Linear,
    data: Data,
    likelihood: Likelihood,
    *,
    old: Memory | None = None,
    strength: float = 1.0,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """(R, P) float64: the curvature of the data, times ``strength``, and of an old memory.

    R is at most P; P includes the bias's constant. Raises ValueError for inputs that are not
    (N, P).
    """
    theta = _affine(head)
    rows = theta.new_zeros(0, theta.shape[1])

    def add(inputs: object, weight: Tensor | float) -> Tensor:
        phi = _with_constant(head, require_features(inputs).to(theta))
        size = weight * likelihood.hessian_trace(phi @ theta.T)
        return compress(torch.cat([rows, size.sqrt().unsqueeze(1) * phi]))

    for batch in batches(data, batch_size):
        rows = add(batch.inputs, strength)
    if old is not None:
        rows = add(old.inputs, old.soft_weight.to(theta))
    return rows


def learn(
    head: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    size: int,
    start: CompactMemory | None = None,
    old: Memory | None = None,
    method: Method = "closed_form",
    damping: float = 1e-4,
    iterations: int = 10,
    strength: float = 1.0,
    batch_size: int = BATCH_SIZE,
) -> Memory:
    """At most ``size`` items that carry the curvature of the data and of an old memory together.

    head: nn.Linear, at the weights just learned. start: where EM begins. An item is of no one
    example: it has no label (-1), task (-1) or id (-1).

    Raises TypeError where the head is no ``nn.Linear``; ValueError for EM with a bias or without
    a start, and as ``match_closed_form`` and ``match_em``.
    """
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"a compact memory is of a linear head on frozen features, got {type(head).__name__}; "
            "train nn.Linear on lifelong.compact.features(extractor, data)"
        )
    if method == "em" and head.bias is not None:
        raise ValueError(
            "EM learns vectors of norm 1, which have no constant for the bias; use "
            "features(..., constant=True) with nn.Linear(P + 1, C, bias=False), or the closed form"
        )
    with torch.no_grad():
        rows = curvature_rows(
            head, data, likelihood, old=old, strength=strength, batch_size=batch_size
        )
        scale = scale_of(head, likelihood)
        if method == "em":
            if start is None:
                raise ValueError("EM needs a start; pass features of the data with weight 1")
            first = CompactMemory(start.vectors.to(rows), start.weights.to(rows))
            found = match_em(rows, first, scale, damping=damping, iterations=iterations)
        elif head.bias is None:
            found = match_closed_form(rows, size, scale)
        else:
            found = match_with_constant(rows, size, scale)
        vectors = found.vectors if head.bias is None else found.vectors[:, :-1]
        weight = head.weight
        inputs = vectors.to(weight)
        none = torch.full((len(found),), -1, device=weight.device)
        return Memory(
            inputs=inputs,
            labels=none,
            reference=head(inputs),
            soft_weight=found.weights.to(weight),
            hard_weight=torch.zeros_like(found.weights).to(weight),
            task=none.clone(),
            origin=none.clone(),
            head=torch.zeros_like(none),
        )


def require_features(inputs: object) -> Tensor:
    """``inputs`` (N, P); ValueError where they are not."""
    if isinstance(inputs, Tensor) and inputs.ndim == 2:
        return inputs
    shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ValueError(
        f"a compact memory is of features of shape (N, P), got {shape}; flatten the inputs, or "
        "pass lifelong.compact.features(extractor, data)"
    )


def _affine(head: nn.Linear) -> Tensor:
    """(C, P) or, with a bias, (C, P + 1) in float64."""
    weight = head.weight.detach().double()
    if head.bias is None:
        return weight
    return torch.cat([weight, head.bias.detach().double().unsqueeze(1)], dim=1)


def _with_constant(head: nn.Linear, inputs: Tensor) -> Tensor:
    return inputs if head.bias is None else torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)

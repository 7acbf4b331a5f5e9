r"""What a Gaussian over the weights says of the outputs, the model linearised: J Sigma Jᵀ.

f(x) ~ N(f*(x), J(x) Sigma J(x)ᵀ) with Sigma = (G + damping I)⁻¹ and J the Jacobian at the model's
present weights: the linearised (GLM) predictive, and, between examples, the kernel of the Gaussian
process that a network is (Khan et al. 2019, DNN2GP). Both come from one product,
``curvature.half(J)``, whose rows have Sigma as their inner product, a few examples at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from .curvature import Curvature
from .hooks import Engine, accumulator
from .jacobians import (
    choose_like,
    differentiating,
    require_independent,
)
from .likelihoods import Likelihood
from .models import Inputs, Params, move, require_finite, rows, take

Outputs = Literal["full", "diag", "sum"]


def function_covariance(
    model: nn.Module,
    inputs: Inputs,
    curvature: Curvature,
    damping: float,
    *,
    likelihood: Likelihood | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """J Sigma Jᵀ of each example, Sigma = (G + damping I)⁻¹: (B, C, C), in output units squared.

    Outputs outside of ``mask`` (C,) have covariance 0; no backward pass is spent on them. A
    likelihood, where one is given, says whether a mask is possible. Only a few examples' Jacobians
    are held at a time (``hooks.WORKING_SET``).

    Raises ValueError where G + damping I is not positive definite, or for a mask that does not fit;
    StaleAnchorError where the curvature has names or shapes that the model has not;
    NotRepeatableError where the model is random or couples the examples of a batch;
    NonFiniteError for outputs that are NaN or infinite.
    """
    features = _Features(model, curvature, damping, likelihood, mask)
    with differentiating(model):
        inputs = features.prepare(inputs)
        parts = []
        for piece in features.pieces(inputs):
            u = features(take(inputs, piece))
            parts.append(features.spread(u @ u.mT))
    return torch.cat(parts)


def function_kernel(
    model: nn.Module,
    inputs: Inputs,
    curvature: Curvature,
    damping: float,
    *,
    others: Inputs | None = None,
    outputs: Outputs = "full",
    likelihood: Likelihood | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """k(x, x') = J(x) Sigma J(x')ᵀ between all inputs and all ``others`` (default: themselves).

    outputs:
        "full"  every pair of outputs: (B, C, B', C')
        "diag"  sum_c k_cc, one process for each output, added up: (B, B')
        "sum"   sum_cd k_cd, the covariance of the sum of the outputs: (B, B')

    mask, likelihood, errors: as ``function_covariance``. Blocks of a few examples are multiplied
    with blocks, so that B x P is never held; with ``others`` left out, each pair is made once.
    Raises ValueError for another choice of outputs.
    """
    join = _JOIN.get(outputs)
    if join is None:
        raise ValueError(f"outputs must be one of {tuple(_JOIN)}, got {outputs!r}")
    features = _Features(model, curvature, damping, likelihood, mask)
    with differentiating(model):
        left = features.prepare(inputs)
        right = left if others is None else features.prepare(others)
        columns = list(features.pieces(right))
        bands = []
        for i, piece in enumerate(features.pieces(left)):
            u = features(take(left, piece))
            band = []
            for j, other in enumerate(columns):
                if others is None and j < i:
                    band.append(_transposed(bands[j][i]))
                    continue
                same = others is None and j == i
                v = u if same else features(take(right, other))
                band.append(join(features, u, v))
            bands.append(band)
    along = 2 if outputs == "full" else 1
    return torch.cat([torch.cat(band, dim=along) for band in bands])


def linear_part(model: nn.Module, inputs: Inputs, v: Params) -> Tensor:
    """J v of each example, over the parameters that v names: (B, C). Errors as above."""
    engine = Engine(model, choose_like(model, v))
    with differentiating(model):
        inputs, parts = move(inputs, engine.device), []
        for piece in engine.pieces(inputs, whole=True):
            trace = engine.trace(take(inputs, piece))
            jacobian = trace.rows(_directions(trace.f.detach(), None))  # (C, b, *shape)
            each = [x.flatten(2) @ v[name].to(x).flatten() for name, x in jacobian.items()]
            parts.append(torch.stack(each).sum(0).T)
    return torch.cat(parts)


def _full(features: _Features, u: Tensor, v: Tensor) -> Tensor:
    small = torch.einsum("bkr,ncr->bknc", u, v)
    return features.spread(small.transpose(1, 2)).transpose(1, 2)


def _diag(features: _Features, u: Tensor, v: Tensor) -> Tensor:
    return u.flatten(1) @ v.flatten(1).T


def _sum(features: _Features, u: Tensor, v: Tensor) -> Tensor:
    return u.sum(1) @ v.sum(1).T


_JOIN: dict[str, Callable[[_Features, Tensor, Tensor], Tensor]] = {
    "full": _full,
    "diag": _diag,
    "sum": _sum,
}


def _transposed(block: Tensor) -> Tensor:
    """k(x', x) from k(x, x')."""
    return block.permute(2, 3, 0, 1) if block.ndim == 4 else block.T


class _Features:
    """Examples -> (b, K, R), rows whose inner products are J Sigma Jᵀ, K the outputs in a mask."""

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature,
        damping: float,
        likelihood: Likelihood | None,
        mask: Tensor | None,
    ) -> None:
        anchor = {n: torch.empty(s, device="meta") for n, s in curvature.shapes.items()}
        self.engine = Engine(model, choose_like(model, anchor))
        self.curvature = _on(curvature, self.engine.device)
        self.damping, self.likelihood, self.mask = damping, likelihood, mask
        self.used: Tensor = torch.empty(0)
        self.count = 0

    def prepare(self, inputs: Inputs) -> Inputs:
        """On the model's device, and checked."""
        inputs = move(inputs, self.engine.device)
        if rows(inputs) == 0:
            raise ValueError("expected at least one example, got none")
        require_independent(self.engine.model, inputs)
        return inputs

    def pieces(self, inputs: Inputs) -> Iterator[slice]:
        directions = None if self.mask is None else int(self.mask.sum())
        return self.engine.pieces(inputs, directions, whole=True)

    def __call__(self, inputs: Inputs) -> Tensor:
        trace = self.engine.trace(inputs)
        f = trace.f.detach()
        require_finite(f, "an output of the model")
        if self.likelihood is not None:
            self.likelihood.mask(f, self.mask)  # raises where no mask is possible
        v = _directions(f, self.mask)
        self.used, self.count = v[:, 0].argmax(dim=1), f.shape[1]
        jacobian = {name: x.transpose(0, 1) for name, x in trace.rows(v).items()}
        return self.curvature.half(jacobian, self.damping)

    def spread(self, small: Tensor) -> Tensor:
        """(..., K, K) -> (..., C, C), zeros outside of the mask."""
        if len(self.used) == self.count:
            return small
        out = small.new_zeros(*small.shape[:-2], self.count, self.count)
        out[..., self.used.unsqueeze(1), self.used] = small
        return out


def _on(curvature: Curvature, device: torch.device) -> Curvature:
    """The very same where it is there already: it may keep eigenvectors that were computed once."""
    there = all(value.device == device for value in curvature.state_dict().values())
    return curvature if there else curvature.to(device)


def _directions(f: Tensor, mask: Tensor | None) -> Tensor:
    """The unit directions of the outputs in the mask: (K, B, C)."""
    count = f.shape[1]
    eye = torch.eye(count, dtype=accumulator(f.dtype), device=f.device)
    if mask is not None:
        if mask.shape != (count,) or not bool(mask.any()):
            raise ValueError(
                f"expected a mask of shape ({count},) with an output in it, got "
                f"{int(mask.sum())} outputs of shape {tuple(mask.shape)}"
            )
        eye = eye[mask.to(f.device)]
    return eye.unsqueeze(1).expand(-1, len(f), -1)

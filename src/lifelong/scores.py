r"""Scores: which examples matter? Each is a number per example, larger for more.

lambda    tr H(f): how undecided the model is about its label (Pan et al. 2020)
leverage  sum_c H_cc (J Sigma Jᵀ)_cc: how much the weights lean on it (needs Sigma)
residual  ||dl/df||: how wrong the model is about it
sensitivity  ||J Sigma Jᵀ dl/df||: variance times error, how far the example's own output would
          move if it were left out (Nickl et al. 2023; needs Sigma)
random    a uniform key: the baseline that every clever score must beat

Sigma, the posterior covariance of the weights, is a diagonal ``variance``, or the inverse of a
``curvature`` plus ``damping`` times I. Without its labels an example has lambda and leverage only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from . import sensitivity
from .curvature import Curvature
from .data import BATCH_SIZE, Batch, Data, Head, batches, head_mask, head_of, require_repeatable
from .function_space import function_covariance
from .jacobians import leverage
from .likelihoods import Likelihood, require_likelihood
from .models import Params, device_of, evaluating, forward, require_finite

ScoreName = Literal["lambda", "leverage", "residual", "sensitivity", "random"]
Score = ScoreName | Callable[[Tensor, Tensor], Tensor]


def score_batch(
    score: Score,
    model: nn.Module,
    batch: Batch,
    f: Tensor,  # (B, C) masked outputs
    likelihood: Likelihood,
    *,
    mask: Tensor | None = None,  # (C,) bool
    variance: Params | None = None,
    curvature: Curvature | None = None,
    damping: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B,)
    """The scores of one batch whose outputs are at hand; ``identify`` says what they mean."""
    if callable(score):
        scores = score(f, batch.labels)
        if scores.shape != (len(f),):
            raise ValueError(
                f"a score must give one number for each of the {len(f)} examples, "
                f"got shape {tuple(scores.shape)}"
            )
        return scores
    if score == "lambda":
        return likelihood.hessian_trace(f)
    if score == "residual":
        return likelihood.residual(f, batch.labels).norm(dim=-1)
    if score == "random":
        return torch.rand(len(f), generator=generator, dtype=torch.float64)
    if score == "leverage":
        if curvature is None and variance is not None:
            spread = leverage(model, batch.inputs, likelihood, variance, mask=mask)
        else:
            spread = _covariance(
                score, model, batch, likelihood, mask, variance, curvature, damping
            ).diagonal(dim1=-2, dim2=-1)
        return (likelihood.hessian(f).diagonal(dim1=-2, dim2=-1) * spread).sum(-1)
    if score == "sensitivity":
        V = _covariance(score, model, batch, likelihood, mask, variance, curvature, damping)
        r = likelihood.residual(f, batch.labels)
        return sensitivity.score(likelihood, f, r, V.to(f.dtype), "output")
    raise ValueError(
        f"unknown score {score!r}: expected lambda, leverage, residual, sensitivity, random or a "
        "function (f, y) -> (B,)"
    )


def _covariance(
    score: Score,
    model: nn.Module,
    batch: Batch,
    likelihood: Likelihood,
    mask: Tensor | None,
    variance: Params | None,
    curvature: Curvature | None,
    damping: float,
) -> Tensor:
    """J Sigma Jᵀ (B, C, C); ValueError where neither a variance nor a curvature was given."""
    if curvature is None:
        if variance is None:
            raise ValueError(
                f"the {score} score needs the posterior variance of the weights; "
                "pass variance=Posterior(...).variance(), or curvature= and damping=, "
                "or use score='lambda'"
            )
        curvature, damping = sensitivity.as_curvature(variance), 0.0
    return function_covariance(
        model, batch.inputs, curvature, damping, likelihood=likelihood, mask=mask
    )


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch, likelihood: Likelihood, mask: Tensor | None) -> Tensor:
    """Masked outputs (B, C) of one batch, after checking them, the labels and the likelihood."""
    require_likelihood(likelihood)
    f = forward(model, batch.inputs)
    f = f.float() if f.dtype in (torch.bfloat16, torch.float16) else f
    require_finite(f, "the model's output")
    likelihood.validate(f, batch.labels, mask)
    return likelihood.mask(f, mask)


def identify(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    score: Score = "lambda",
    head: Head | None = None,
    variance: Params | None = None,
    curvature: Curvature | None = None,
    damping: float = 0.0,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:  # (N,)
    """One score per example, in the order of the data; the model is read in eval mode.

    leverage and sensitivity need Sigma: variance, its diagonal, or curvature and damping, Sigma =
    (G + damping I)⁻¹, which wins where both are given.

    Raises TypeError for what is no likelihood, ValueError for labels outside of the head and for
    scores that do not exist, NotRepeatableError for a loader that shuffles or augments,
    NonFiniteError for outputs that are NaN or infinite.
    """
    require_repeatable(data)
    head, parts = head_of(data, head), []
    with evaluating(model):
        for batch in batches(data, batch_size):
            batch = batch.to(device_of(model))
            # The number of outputs is known only after a forward.
            f = outputs(model, batch, likelihood, None)
            mask = head_mask(head, f.shape[1], f.device)
            if mask is not None:
                likelihood.validate(f, batch.labels, mask)
            parts.append(
                score_batch(
                    score,
                    model,
                    batch,
                    likelihood.mask(f, mask),
                    likelihood,
                    mask=mask,
                    variance=variance,
                    curvature=curvature,
                    damping=damping,
                    generator=generator,
                ).cpu()
            )
    return torch.cat(parts)

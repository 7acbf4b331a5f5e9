r"""The curve of fidelity against memory, for every size at once, before the data are thrown away.

The error e of a prior (``reconstruction.py``) is a sum: what each example's gradient changes by,
less what its item in memory says, times its weight, less G d of the rest. Both norms are seen
through S probes, theta_s = theta* + d_s with d_s ~ scale N(0, Sigma): <e(theta_s), d_t> over t ≠ s
has a mean square of scale² e(theta_s)ᵀ Sigma e(theta_s). An example's part of <c(theta_s), d_t> is

    t_i = <r_i(theta_s) - r_i(theta*), f_i(theta_t) - f_i(theta*)>:    S x S numbers,

r the residuals, so one reading of the data and S + 1 forward passes give t_i of them all, and the
memory of any size by any rule is a sum of some. Exact where the model is linear; elsewhere the
secant of f stands for its Jacobian at theta_s. An error at theta* itself, of a prior that takes its
anchor for a minimum, is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import select
from .curvature import Curvature, Structure, diagonal_curvature, estimate
from .data import BATCH_SIZE, Data, Head, batches, head_mask, head_of, num_examples
from .divergences import KL, Divergence, Logit
from .likelihoods import Likelihood
from .models import Params, device_of, evaluating, forward, parameters, snapshot
from .predictive import holding
from .scores import Score, outputs, score_batch

PROBES = 8
_SIGMA_FROM = 1000  # examples that Sigma is estimated from
SCALE = 0.1  # of a posterior's draw: further out a diagonal one leaves all that was learned
_GROWTH = 1.5  # of the sizes that are tried


@dataclass(frozen=True)
class Carry:
    """How a prior carries the examples of a task.

    soft, hard: how much an item counts by its soft label (in ``divergence``) and by its true one;
    population: times N / m, or N_c / m_c of its own class where by_class. structure: of the
    curvature G of the rest, times strength, or None for none; exclude: G leaves out what is kept.
    precision: of the weights, for Sigma.
    """

    soft: float = 1.0
    hard: float = 0.0
    population: bool = False
    by_class: bool = False
    divergence: Divergence = field(default_factory=KL)
    structure: Structure | None = None
    strength: float = 1.0
    estimator: str = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)
    exclude: bool = True
    precision: float = 1.0


@dataclass(frozen=True)
class Curve:
    """Fidelity against the number of examples kept.

    sizes, values: what was asked for; num_data: N, where the curve ends.
    """

    sizes: tuple[int, ...]
    values: tuple[float, ...]
    num_data: int

    def smallest(self, target: float) -> int | None:
        """The least of ``sizes`` that reaches ``target``; None where none does."""
        return next((m for m, v in zip(self.sizes, self.values) if v >= target - 1e-9), None)


@dataclass(frozen=True, eq=False)
class Probed:
    """What one reading of the data leaves: scores, labels and parts of every example.

    scores, labels (N,); whole, items (N, S, S): an example's t_i, and what it carries as an item.
    rest: (N,) weights -> (S, S): the products of G of those examples, or None for no G.
    """

    scores: Tensor
    labels: Tensor | None
    whole: Tensor
    items: Tensor
    carry: Carry
    rest: Callable[[Tensor | None], Tensor] | None
    descending: bool

    def __len__(self) -> int:
        return len(self.scores)

    def chosen(self, m: int) -> Tensor:
        """(m,) positions of the examples that a memory of m keeps."""
        return self._ranking.first(m)

    @cached_property
    def _ranking(self) -> select.Ranking:
        return select.ranking(self.scores, self.labels, descending=self.descending)

    def value(self, m: int) -> float:
        """Fidelity of a memory of m examples."""
        n, kept = len(self), self.chosen(m)
        carried = torch.einsum("m,mst->st", self._stands_for(kept), self.items[kept])
        if self.rest is not None:
            carried = carried + self._all_in_weights
            if self.carry.exclude and m:
                weights = torch.zeros(n, dtype=torch.float64)
                weights[kept] = 1.0
                carried = carried - self.rest(weights)
        return 1.0 - _off_diagonal(carried - self._total) / _off_diagonal(self._total)

    @cached_property
    def _total(self) -> Tensor:
        return self.whole.sum(0)

    def _stands_for(self, kept: Tensor) -> Tensor:
        """(m,) as ``Prior.memorise`` weighs the items."""
        if self.carry.population and self.carry.by_class and self.labels is not None:
            return select.represented(self.labels[kept], self.labels)
        each = len(self) / max(1, len(kept)) if self.carry.population else 1.0
        return torch.full((len(kept),), each, dtype=torch.float64)

    @cached_property
    def _all_in_weights(self) -> Tensor:
        return torch.zeros_like(self.whole[0]) if self.rest is None else self.rest(None)

    def curve(self, sizes: tuple[int, ...] | None = None) -> Curve:
        """At ``sizes``; by default at 0 and then each half as large again, up to all.

        Raises ValueError for a size that is negative or beyond the data.
        """
        n = len(self)
        chosen = _geometric(n) if sizes is None else tuple(sizes)
        if any(not 0 <= m <= n for m in chosen):
            raise ValueError(f"sizes must lie in 0 to {n}, the number of examples, got {chosen}")
        return Curve(chosen, tuple(self.value(m) for m in chosen), n)

    def smallest(self, target: float) -> int:
        """The smallest memory, of at least one example, that reaches ``target``: the first of
        growing sizes that does, then bisection between it and the one before.

        Raises ValueError where none does, saying what was reached.
        """
        below, best = 0, (-float("inf"), 0)
        for m in _geometric(len(self))[1:]:
            value = self.value(m)
            best = max(best, (value, m))
            if value >= target - 1e-9:
                break
            below = m
        else:
            raise ValueError(
                f"no memory reaches a fidelity of {target:g}: the best is {best[0]:.3f}, with "
                f"{best[1]} of {len(self)} examples, since this prior gives its items and the rest "
                "another weight than the past had; lower the target, or give a number of examples"
            )
        while m - below > 1:
            middle = (below + m) // 2
            if self.value(middle) >= target - 1e-9:
                m = middle
            else:
                below = middle
        return m


def _geometric(n: int) -> tuple[int, ...]:
    sizes, m = [0], 1.0
    while m < n:
        if int(m) > sizes[-1]:
            sizes.append(int(m))
        m = max(m * _GROWTH, m + 1)
    return (*sizes, n)


def _off_diagonal(x: Tensor) -> float:
    return float((x - torch.diag(x.diagonal())).norm())


def probe(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    carry: Carry | None = None,
    *,
    score: Score | str = "lambda",
    per_class: bool = True,
    descending: bool = True,
    head: Head | None = None,
    variance: Params | None = None,
    probes: int = PROBES,
    scale: float = SCALE,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH_SIZE,
) -> Probed:
    """Read the data once, at the model's present weights: the anchor.

    Cost: probes + 1 forward passes, a diagonal curvature of up to 1,000 examples for Sigma, and the
    curvature of the data where ``carry`` has a structure. Holds N x probes² numbers.

    Raises ValueError for fewer than two probes, a scale that is not positive, score="k_centre"
    (which has no score of one example) and a divergence of the user's own; else as ``identify``.
    """
    carry = carry or Carry()
    require_scale(scale)
    if probes < 2:
        raise ValueError(f"the norm of a matrix needs at least 2 probes, got {probes}")
    if score == "k_centre":
        raise ValueError(
            "k_centre orders examples without a score, so that no curve can be summed; use another "
            "score, or a number of examples"
        )
    head = head_of(data, head)
    anchor = snapshot(parameters(model))
    with evaluating(model):
        sigma = _diagonal(model, data, likelihood, head, generator, batch_size)
        drawn = sigma.sample(carry.precision, num_samples=probes, generator=generator)
        steps = {n: scale * v.to(anchor[n]) for n, v in drawn.items()}
        near = [{n: a + steps[n][s] for n, a in anchor.items()} for s in range(probes)]
        scores, labels, whole, items = [], [], [], []
        for batch in batches(data, batch_size):
            batch = batch.to(device_of(model))
            f = outputs(model, batch, likelihood, None)
            mask = head_mask(head, f.shape[1], f.device)
            if mask is not None:
                likelihood.validate(f, batch.labels, mask)
            with torch.no_grad():
                masked = likelihood.mask(f, mask)
                there = [_outputs_at(model, weights, batch.inputs) for weights in near]
                moved = [likelihood.mask(g.to(f.dtype), mask) for g in there]
                step = torch.stack(there).double() - f  # (S, B, C)
                if mask is not None:
                    step = step * mask
                t = _products(_residuals(likelihood, moved, masked, batch.labels), step)
                soft = _soft(carry.divergence, likelihood, moved, masked, batch.labels, step, t)
            keys = score_batch(
                score,  # type: ignore[arg-type]
                model, batch, masked, likelihood, mask=mask, variance=variance,
                generator=generator,
            )  # fmt: skip
            scores.append(keys.detach().cpu())
            labels.append(batch.labels.cpu())
            whole.append(t.cpu())
            items.append((carry.soft * soft + carry.hard * t).cpu())
        y = torch.cat(labels)
        balanced = per_class and y.ndim == 1 and not y.is_floating_point()
        rest = None
        if carry.structure is not None:
            rest = _rest(model, data, likelihood, carry, head, steps, generator, batch_size)
    return Probed(
        torch.cat(scores), y if balanced else None, torch.cat(whole), torch.cat(items), carry, rest,
        descending,
    )  # fmt: skip


def _outputs_at(model: nn.Module, weights: Params, inputs: Any) -> Tensor:
    with holding(model, weights):
        return forward(model, inputs)


def _products(change: Tensor, step: Tensor) -> Tensor:
    """(S, B, C), (S, B, C) -> (B, S, S)."""
    return torch.einsum("sbc,tbc->bst", change, step)


def _residuals(likelihood: Likelihood, moved: list[Tensor], f: Tensor, labels: Tensor) -> Tensor:
    """r(f_s) - r(f*): (S, B, C); free of the labels, since l is linear in them."""
    here = likelihood.residual(f, labels)
    return torch.stack([(likelihood.residual(g, labels) - here).double() for g in moved])


def _soft(
    divergence: Divergence,
    likelihood: Likelihood,
    moved: list[Tensor],
    f: Tensor,
    labels: Tensor,
    step: Tensor,
    t: Tensor,
) -> Tensor:
    """What an item carries by its soft label, (B, S, S): the divergence's slope in f."""
    if isinstance(divergence, Logit):
        return _products(step, step)
    if not isinstance(divergence, KL):
        raise ValueError(
            f"the curvature of a {type(divergence).__name__} is not known; expected KL or Logit"
        )
    temperature = divergence.temperature
    if temperature == 1:
        return t
    factor = temperature if divergence.rescale else 1 / temperature
    warm = [g / temperature for g in moved]
    return factor * _products(_residuals(likelihood, warm, f / temperature, labels), step)


def require_scale(scale: float) -> None:
    """Raise ValueError where a scale is not positive and finite."""
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be finite and positive, got {scale}")


def _diagonal(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    head: Head | None,
    generator: torch.Generator | None,
    batch_size: int,
) -> Curvature:
    """The diagonal GGN of the data, from some of them: it only says where to look."""
    n = num_examples(data)
    weights = None
    if n > _SIGMA_FROM:
        weights = torch.zeros(n, dtype=torch.float64)
        weights[torch.randperm(n, generator=generator)[:_SIGMA_FROM]] = n / _SIGMA_FROM
    return diagonal_curvature(
        model, data, likelihood, head=head, weights=weights, batch_size=batch_size
    )


def _rest(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    carry: Carry,
    head: Head | None,
    steps: Params,
    generator: torch.Generator | None,
    batch_size: int,
) -> Callable[[Tensor | None], Tensor]:
    def products(weights: Tensor | None) -> Tensor:
        with evaluating(model):
            g = estimate(
                model,
                data,
                likelihood,
                structure=carry.structure or "diagonal",
                estimator=carry.estimator,
                head=head,
                weights=weights,
                generator=generator,
                batch_size=batch_size,
                **carry.options,
            )
        count = len(next(iter(steps.values())))
        flat = torch.cat([v.flatten(1) for v in steps.values()], 1).double()
        rows = []
        for s in range(count):
            image = g.mv({n: v[s] for n, v in steps.items()})
            rows.append(torch.cat([image[n].flatten() for n in steps]).double())
        return carry.strength * (torch.stack(rows) @ flat.T).cpu()

    return products

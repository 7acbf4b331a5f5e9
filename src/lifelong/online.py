r"""Learning without tasks: each row is predicted, then learned, at a cost that stays the same.

Where the data come as one stream that drifts, yesterday's weights are not quite today's: each row
they move at random, and are drawn back to where they began,

    theta <- theta_0 + sqrt(gamma) (theta - theta_0) + sqrt((1 - gamma) / delta) noise,

so that of a row infinitely far away no more is believed than the prior N(theta_0, I / delta).
Today's posterior N(m, S), moved that way, is the prior of the next row; J = df/dtheta:

    predict   f = f(x; m),  V = J S Jᵀ                        before the label is known
    learn     f' = argmin ½ (f' - f)ᵀ V⁻¹ (f' - f) + l(y, f'),   r' and H: its gradient, curvature
              m <- m - S Jᵀ r',   S <- S - S Jᵀ H (I + V H)⁻¹ J S
    drift     m <- theta_0 + sqrt(gamma) (m - theta_0),   S <- gamma S + (1 - gamma) I / delta

So three known filters are one: recursive least squares (a linear model, Gaussian labels, gamma =
1), the Kalman filter (gamma < 1), and the extended Kalman filter of a network (Singhal & Wu 1989),
which is online natural gradient (Ollivier 2018). For linear models with Gaussian labels it is
exact: a Gaussian process whose kernel fades with gamma^(rows between / 2). For others each row has
its own Laplace approximation. ``Prior.discount`` forgets in another way, for tasks: it loosens
least what is known best, and a drift most.

How much to forget is not a setting: members with several discounts run beside each other, and what
they say is mixed by how well each foretold the labels of late. With rate ``switch`` any of them may
become the best one (a hidden Markov model over members; Herbster & Warmuth 1998, fixed share).
Units: nats, summed. Everything is float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .curvature import Dense
from .likelihoods import Bernoulli, Categorical, Likelihood, require_hessian
from .models import Inputs, Params, logits, move, nbytes, parameters, require_finite, rows, take
from .predictive import linearised
from .prior import Prior
from .recipe import Recipe
from .terms import Regulariser, WeightTerm

DISCOUNTS = (1.0, 0.9999, 0.999, 0.997, 0.99, 0.97)
"""gamma: weights that stay, or are forgotten in about 10,000, 1000, 300, 100, 30 rows."""


@dataclass(frozen=True, eq=False)
class RunningScale:
    """(x - mean) / sd of the rows so far, within ±limit; 0 where a value never changed.

    count: rows; mean, squares: (D,), squares of sum (x - mean)² (Welford 1962). limit: a value that
    leaves a long calm lies many standard deviations off at first.
    """

    mean: Tensor
    squares: Tensor
    count: int = 0
    limit: float = 4.0

    @classmethod
    def zeros(cls, num_inputs: int, device: torch.device | None = None) -> RunningScale:
        """No rows yet."""
        zeros = torch.zeros(num_inputs, dtype=torch.float64, device=device)
        return cls(zeros, zeros)

    def add(self, rows: Tensor) -> RunningScale:
        """With these rows too, (B, D)."""
        n, k = self.count, len(rows)
        mean = rows.mean(0)
        gap = mean - self.mean
        squares = self.squares + (rows - mean).square().sum(0) + gap.square() * (n * k / (n + k))
        return replace(self, mean=self.mean + gap * (k / (n + k)), squares=squares, count=n + k)

    def __call__(self, rows: Tensor) -> Tensor:
        sd = (self.squares / max(1, self.count)).sqrt()
        gap = rows - self.mean
        return torch.where(sd > 0, gap / sd, 0.0).clamp(-self.limit, self.limit)


class _Outputs(NamedTuple):
    """f: (M, C) at each member's mean; J: (M, C, P); SJ: S Jᵀ, (M, P, C); V = J S Jᵀ, (M, C, C);
    scale: with this row."""

    scale: RunningScale | None
    f: Tensor
    J: Tensor
    SJ: Tensor
    V: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LaplaceFilter:
    """Members that learn row by row, and how much each is believed. Make one with ``of``.

    likelihood: of the outputs. precision: delta. discounts: (M,) gamma of each member, for each
    row. switch: the rate at which another member becomes the best. start: theta_0, mean: m, both
    (M, P). covariance: S, (M, P, P). weights: (M,), sum to 1. scale: of the inputs. num_data: rows
    so far. A model has P weights and C outputs; a row costs O(M P²).
    """

    model: nn.Module
    shapes: Mapping[str, torch.Size]
    fixed: Params
    likelihood: Likelihood
    precision: float
    discounts: Tensor
    switch: float
    start: Tensor
    mean: Tensor
    covariance: Tensor
    weights: Tensor
    scale: RunningScale | None = None
    num_data: int = 0
    _last: list[tuple[Tensor, _Outputs]] = field(default_factory=list, init=False)

    @classmethod
    def of(
        cls,
        models: nn.Module | Sequence[nn.Module],
        likelihood: Likelihood,
        *,
        discounts: Sequence[float] = DISCOUNTS,
        precision: float = 1.0,
        switch: float = 0.02,
        standardise: int | None = None,
    ) -> LaplaceFilter:
        """One member for each model and each discount, at the models' present weights.

        models: of one architecture, such as of several random
        beginnings; they are copied, and read
        in eval mode. Only what requires a gradient is learned. standardise: the number D of inputs,
        which are then (B, D) and brought to ``RunningScale`` as they come; None leaves them.

        Raises ValueError where there is no model, discount or trainable parameter, a discount lies
        outside of (0, 1], the precision is not positive, switch is not in [0, 1] or the models
        differ in shape; TypeError for a likelihood without a Hessian.
        """
        models = [models] if isinstance(models, nn.Module) else list(models)
        require_hessian(likelihood, "learning row by row")
        gammas = torch.tensor([float(g) for g in discounts], dtype=torch.float64)
        if not models or not len(gammas) or not bool(((gammas > 0) & (gammas <= 1)).all()):
            raise ValueError(
                "expected at least one model and one discount, each above 0 and at most 1, got "
                f"{len(models)} models and discounts {gammas.tolist()}"
            )
        if not (precision > 0 and math.isfinite(precision)) or not 0 <= switch <= 1:
            raise ValueError(
                "expected precision > 0 and switch from 0 to 1, got "
                f"precision={precision}, switch={switch}"
            )
        trained = [parameters(m) for m in models]
        held = [
            {n: v.detach() for n, v in _tensors(m).items() if n not in p}
            for m, p in zip(models, trained, strict=True)
        ]
        kinds = {
            tuple((n, v.shape) for n, v in (*p.items(), *h.items()))
            for p, h in zip(trained, held, strict=True)
        }
        if len(kinds) > 1 or not trained[0]:
            raise ValueError(
                "expected models of one architecture with something to train, got "
                + ("none that is trainable" if len(kinds) == 1 else f"{len(kinds)} kinds of them")
            )
        count = len(gammas)

        def stacked(values: list[Tensor]) -> Tensor:
            return torch.stack([move(v, dtype=torch.float64) for v in values]).repeat_interleave(
                count, dim=0
            )

        start = stacked([torch.cat([v.detach().flatten() for v in p.values()]) for p in trained])
        fixed = {n: stacked([h[n] for h in held]) for n in held[0]}
        members, size = start.shape
        eye = torch.eye(size, dtype=torch.float64, device=start.device).expand(members, -1, -1)
        return cls(
            model=copy.deepcopy(models[0]).double().eval(),
            shapes={n: p.shape for n, p in trained[0].items()},
            fixed=fixed,
            likelihood=likelihood,
            precision=float(precision),
            discounts=gammas.to(start.device).repeat(len(models)),
            switch=float(switch),
            start=start,
            mean=start,
            covariance=eye / precision,
            weights=torch.full_like(start[:, 0], 1 / members),
            scale=None if standardise is None else RunningScale.zeros(standardise, start.device),
        )

    def __repr__(self) -> str:
        members, size = self.mean.shape
        return (
            f"LaplaceFilter({self.likelihood!r}, {members} members of {size} weights, "
            f"{self.num_data:,} rows, {self.num_bytes:,} bytes)"
        )

    @property
    def num_bytes(self) -> int:
        """What is kept; the same after any number of rows."""
        kept = [self.start, self.mean, self.covariance, self.weights, *self.fixed.values()]
        if self.scale is not None:
            kept += [self.scale.mean, self.scale.squares]
        return sum(map(nbytes, kept))

    # ---------------------------------------------------------------- rows

    def predict(self, inputs: Inputs) -> Tensor:
        """(B, C) E[y] of each row (probabilities, for classes) by all members, before its label.

        Raises NonFiniteError where an output is NaN or infinite.
        """
        return torch.einsum("m,mbc->bc", self.weights, self.predict_each(inputs))

    def predict_each(self, inputs: Inputs) -> Tensor:
        """(M, B, C): what each member says."""
        with torch.inference_mode(False):
            seen = map(self._seen, _each(_normal(inputs)))
            said = [linearised(o.f, o.V, self.likelihood) for o in seen]
            return torch.stack([law.mean for law in said], dim=1)

    def learn(self, inputs: Inputs, labels: Tensor) -> LaplaceFilter:
        """The learner after these rows, one after another in their order.

        Raises ValueError or TypeError for labels that the likelihood does not know or that are not
        as many as the rows; NonFiniteError. This learner stays as it is.
        """
        if len(labels) != rows(inputs):
            raise ValueError(
                f"expected a label for each row, got {len(labels)} labels of {rows(inputs)} rows"
            )
        learner = self
        with torch.inference_mode(False):
            given = zip(_each(_normal(inputs)), _normal(labels).split(1), strict=True)
            for row, y in given:
                learner = learner._learned(row, move(y, self.mean.device))
        return learner

    def _learned(self, row: Inputs, y: Tensor) -> LaplaceFilter:
        seen = self._seen(row)
        y = y.expand(len(seen.f), *y.shape[1:])
        self.likelihood.validate(seen.f, y)
        r, H, evidence = _update(seen.f, seen.V, y, self.likelihood)
        gain = _solve(_plus_identity(H @ seen.V), H)  # H (I + V H)⁻¹
        mean = self.mean - (seen.SJ @ r.unsqueeze(2)).squeeze(2)
        S = torch.baddbmm(self.covariance, seen.SJ @ gain, seen.SJ.mT, alpha=-1)
        # The drift, in place: S is new.
        gamma = self.discounts
        S.mul_(gamma[:, None, None]).diagonal(dim1=1, dim2=2).add_(
            ((1 - gamma) / self.precision).unsqueeze(1)
        )
        weights = (self.weights.log() + self._told(seen, y, evidence)).softmax(0)
        return replace(
            self,
            mean=torch.lerp(self.start, mean, gamma.sqrt().unsqueeze(1)),
            covariance=S,
            weights=(1 - self.switch) * weights + self.switch / len(weights),
            scale=seen.scale,
            num_data=self.num_data + 1,
        )

    def _told(self, seen: _Outputs, y: Tensor, evidence: Tensor) -> Tensor:
        """(M,) log p(y) as each member foretold it. Of classes, by the probabilities it gave: for
        wide V, Laplace's evidence is far off."""
        if isinstance(self.likelihood, Bernoulli | Categorical):
            v = seen.V.diagonal(dim1=1, dim2=2)
            return -self.likelihood.nll(seen.f * (1 + math.pi / 8 * v).rsqrt(), y)
        return evidence

    def _seen(self, row: Inputs) -> _Outputs:
        """``_outputs``, kept for the row that is learned as soon as it was predicted."""
        if not isinstance(row, Tensor):
            return self._outputs(row)
        for known, seen in self._last:
            if known.dtype == row.dtype and torch.equal(known, row):
                return seen
        seen = self._outputs(row)
        self._last[:] = [(row.clone(), seen)]  # NumPy may write into its memory unseen
        return seen

    def _outputs(self, row: Inputs) -> _Outputs:
        """f and its Jacobian of one row at each member's mean."""
        scale = self.scale
        if scale is not None:
            if not isinstance(row, Tensor) or row.shape[1:] != scale.mean.shape:
                raise ValueError(
                    f"expected rows of {len(scale.mean)} numbers, as ``standardise`` says, got "
                    + (f"shape {tuple(row.shape)}" if isinstance(row, Tensor) else "a mapping")
                )
            scale = scale.add(row)
            row = scale(row)
        with torch.enable_grad():
            weights = self.mean.detach().requires_grad_()
            f = torch.func.vmap(partial(_call, self.model, row))(self._shaped(weights), self.fixed)
            slopes = [
                torch.autograd.grad(f[:, c].sum(), weights, retain_graph=c + 1 < f.shape[1])[0]
                for c in range(f.shape[1])
            ]
        f, J = f.detach(), torch.stack(slopes, dim=1)
        require_finite(f, "the model's output")
        SJ = self.covariance @ J.mT
        return _Outputs(scale, f, J, SJ, J @ SJ)

    def _shaped(self, weights: Tensor) -> Params:
        """(..., P) -> name: (..., *shape)."""
        parts = weights.split([s.numel() for s in self.shapes.values()], dim=-1)
        shapes = self.shapes.items()
        return {n: v.unflatten(-1, s) for (n, s), v in zip(shapes, parts, strict=True)}

    # ---------------------------------------------------------------- the library's other parts

    def prior(self, member: int | None = None) -> Prior:
        """What a member, by default the most believed one, has learned, as a ``Prior``.

        Its anchor is that member's mean, and G its curvature of the data, S⁻¹ - delta I. Raises
        IndexError for a member that there is not.
        """
        i = int(self.weights.argmax()) if member is None else range(len(self.weights))[member]
        G = torch.cholesky_inverse(torch.linalg.cholesky(self.covariance[i]))
        G.diagonal().sub_(self.precision)
        gradient = self._shaped(-self.precision * (self.mean[i] - self.start[i]))
        return Prior(
            self.likelihood,
            Recipe(structure="dense", gradient="stationary"),
            terms=(
                Regulariser(self.precision, self._shaped(self.start[i])),
                WeightTerm(self._shaped(self.mean[i]), gradient, Dense(G, dict(self.shapes))),
            ),
            num_data=self.num_data,
            num_tasks=1,
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _each(inputs: Inputs) -> list[Inputs]:
    """Rows as batches of one; floating-point inputs in float64."""
    inputs = move(inputs, dtype=torch.float64)
    if rows(inputs) == 1:
        return [inputs]
    return [take(inputs, slice(i, i + 1)) for i in range(rows(inputs))]


def _normal(values: Any) -> Any:
    """Copies that autograd may save, of tensors that were made in inference mode."""
    if isinstance(values, Mapping):
        return {name: _normal(x) for name, x in values.items()}
    return values.clone() if isinstance(values, Tensor) and values.is_inference() else values


def _call(model: nn.Module, row: Inputs, trained: Params, fixed: Params) -> Tensor:
    """(C,) of one row."""
    args, named = ((), dict(row)) if isinstance(row, Mapping) else ((row,), {})
    return logits(torch.func.functional_call(model, (trained, fixed), args, named))[0]


def _plus_identity(x: Tensor) -> Tensor:
    return x + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _update(
    f: Tensor, V: Tensor, y: Tensor, likelihood: Likelihood
) -> tuple[Tensor, Tensor, Tensor]:
    """r' (M, C) and H (M, C, C) at f', the mode of N(f, V) exp(-l(y, .)), and the log evidence.

    f' = f - V r', so that r' itself is sought, by Newton's method with halved steps; V may be
    singular. The evidence (M,), log of the integral of N(f, V) p(y | .), is Laplace's: exact for
    Gaussian labels.
    """

    u, inside, now = torch.zeros_like(f), f, likelihood.nll(f, y)
    r, H = likelihood.residual(f, y), likelihood.hessian(f)
    for _ in range(_MAX_STEPS):
        step = _solve(_plus_identity(H @ V), (r - u).unsqueeze(2)).squeeze(2)
        for _ in range(_MAX_STEPS):
            there = u + step
            shift = (V @ there.unsqueeze(2)).squeeze(2)
            inside = f - shift
            then = 0.5 * (there * shift).sum(1) + likelihood.nll(inside, y)
            better = then <= now + _ROUNDING * (1 + now.abs())
            if bool(better.all()):
                break
            step = torch.where(better.unsqueeze(1), step, 0.5 * step)
        u, now = there, then  # type: ignore[possibly-undefined]
        r, H = likelihood.residual(inside, y), likelihood.hessian(inside)
        if bool(((r - u).abs() <= _TOLERANCE * (1 + r.abs())).all()):
            break
    return u, H, -now - 0.5 * _plus_identity(V @ H).det().log()


def _solve(A: Tensor, b: Tensor) -> Tensor:
    """A⁻¹ b; a library call for each row is dear, and most models have one output."""
    return b / A if A.shape[-1] == 1 else torch.linalg.solve(A, b)


_MAX_STEPS, _TOLERANCE, _ROUNDING = 50, 1e-9, 1e-14

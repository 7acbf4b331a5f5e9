"""VON: a Gaussian with a full covariance, for small models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..curvature import Curvature, Dense, Diagonal, dense_curvature
from ..data import head_mask
from ..distributed import Ranks
from ..errors import StaleAnchorError
from ..hooks import accumulator
from ..jacobians import differentiating, gradient
from ..likelihoods import Likelihood
from ..models import Inputs, Params, evaluating, forward, move, parameters, require_finite, rows
from ..posterior import Posterior
from .base import Variational, positive, require_held

_LIMIT = 2**30  # bytes of a matrix


class VON(Variational):
    r"""Variational online Newton (Khan et al. 2018), with the full precision matrix S.

        S ← (1 - rho_S) S + rho_S (ess E_q[H] + P0)
        m ← m - rho S⁻¹ (ess E_q[g] + P0 (m - m0))          with the new S

    g and H are the gradient and the Hessian of the mean nll over the examples of the passes since
    the last step; the prior is N(m0, P0⁻¹). With rho = 1 and all examples, this is Bayes' rule on
    linear-Gaussian models: the exact posterior in one step.

    lr: rho. precision_lr: rho_S, by default lr. hessian: "ggn", J H Jᵀ of the likelihood, never
    indefinite, or "exact". mc_samples: pairs of draws m + e, m - e for each pass, so that an
    expectation of a quadratic is exact; 0 takes m itself (the delta method: online Newton).
    q starts as the prior's precision round the model's weights. The model is read in eval mode.

        optimizer = VON(model, Gaussian(0.1), ess=len(x), lr=1.0, prior_precision=0.5)
        optimizer.observe(x, y)
        optimizer.step()
        posterior = gaussian_posterior(optimizer, model)

    The cost is P² numbers and P³ operations for P weights. Raises ValueError for values out of
    range, or more weights than 1 GiB of matrix holds; StaleAnchorError where the prior is of other
    names or shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        lr: float = 1.0,
        *,
        ess: float,
        precision_lr: float | None = None,
        prior_precision: float = 1.0,
        hessian: Literal["ggn", "exact"] = "ggn",
        mc_samples: int = 1,
        prior: Posterior | None = None,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        rates = {"lr": lr, "precision_lr": lr if precision_lr is None else precision_lr}
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {rate}")
        positive(ess=ess, prior_precision=prior_precision)
        if hessian not in ("ggn", "exact"):
            raise ValueError(f"hessian must be 'ggn' or 'exact', got {hessian!r}")
        if mc_samples < 0:
            raise ValueError(f"mc_samples must not be negative, got {mc_samples}")
        chosen = parameters(model)
        super().__init__(chosen.items(), {**rates, "ess": ess}, generator=generator, ranks=ranks)
        self.model, self.likelihood, self.hessian, self.mc_samples = (
            model, likelihood, hessian, mc_samples,
        )  # fmt: skip
        self.params, self.shapes = chosen, {name: p.shape for name, p in chosen.items()}
        size = sum(p.numel() for p in chosen.values())
        first = next(iter(chosen.values()))
        dtype = accumulator(first.dtype)
        if size**2 * dtype.itemsize > _LIMIT:
            raise ValueError(
                f"VON of {size} weights needs matrices of {size**2 * dtype.itemsize / 2**30:.1f} "
                "GiB; use VOGN or IVON, whose Gaussians are diagonal"
            )
        if prior is None:
            self.base = float(prior_precision)
            mean = torch.zeros(size, dtype=dtype, device=first.device)
            precision = self.base * torch.eye(size, dtype=dtype, device=first.device)
        else:
            _require_same(self.shapes, prior.mean)
            self.base = float(prior.prior_precision)
            mean = self._flat(prior.mean).to(first.device, dtype)
            precision = _matrix(prior.curvature, self.shapes).to(first.device, dtype)
            precision = precision + self.base * torch.eye(size, dtype=dtype, device=first.device)
        # One Gaussian for all parameters: it is kept with the first of them.
        self.state[first].update(
            {"prior_mean": mean, "prior_precision": precision, "precision": precision.clone()}
        )

    @property
    def precision(self) -> Tensor:
        """S (P, P), in nats, over the flat parameters in the order of the model."""
        return self._own["precision"]

    def gaussian(self, names: Mapping[int, str]) -> Posterior:
        eye = torch.eye(len(self.precision), dtype=self.precision.dtype)
        matrix = self.precision - self.base * eye.to(self.precision.device)
        mean = {name: self._mean(p).clone() for name, p in self.params.items()}
        return Posterior(mean, Dense(matrix, self.shapes), self.base)

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """The weights are a draw from q inside, for predictions. Raises as ``IVON``'s."""
        with self._perturbed(self._noise()):
            yield

    def observe(
        self,
        inputs: Inputs,
        labels: Tensor,
        *,
        head: Sequence[int] | None = None,
        weight: float | None = None,
    ) -> None:
        """A pass over a batch for the next ``step``: means of g and H over draws from q.

        weight: of this batch among those before the step, by default the number of its examples.

        Raises ValueError where parameters were frozen or freed since the optimiser was made;
        ValueError and TypeError for labels that do not fit, NotRepeatableError for a model that is
        random or couples examples, NonFiniteError for outputs that are NaN or infinite.
        """
        require_held(self.model, self.params)
        device = self.precision.device
        data, n = (move(inputs, device), labels.to(device)), rows(inputs)
        weight = float(n) if weight is None else weight
        positive(weight=weight)
        draws = [self._noise() for _ in range(self.mc_samples)]
        points = [[(p, sign * e) for p, e in draw] for draw in draws for sign in (1.0, -1.0)]
        g, h = torch.zeros_like(self._own["prior_mean"]), torch.zeros_like(self.precision)
        with evaluating(self.model):
            for point in points or [[]]:
                with self._perturbed(point):
                    slope, matrix = self._derivatives(data, head)
                g, h = g + slope, h + matrix
        scale = weight / (n * max(1, len(points)))
        own = self._own
        own["grad_sum"] = own.get("grad_sum", 0.0) + scale * g
        own["hess_sum"] = own.get("hess_sum", 0.0) + scale * h
        self._weight += weight

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step from the passes since the last one.

        Raises TypeError for a closure; RuntimeError without a pass, inside of ``sampled_params``,
        or where there are gradients of a backward pass; NonFiniteError and ValueError where the
        new S is not finite or not positive definite (hessian="exact"): then the passes are
        dropped, and nothing else is changed.
        """
        if closure is not None:
            raise TypeError("VON needs the Hessian, which no closure gives; call observe(x, y)")
        self._require_passes("`optimizer.observe(inputs, labels)`")
        own, group = self._own, self.param_groups[0]
        g = own.pop("grad_sum", torch.zeros_like(own["prior_mean"]))
        h = own.pop("hess_sum", torch.zeros_like(own["precision"]))
        total, self._weight = g.new_tensor([self._weight]), 0.0
        if self.ranks is not None:
            g, h, total = self.ranks.sum([g, h, total])
        scale = group["ess"] / total
        target = scale * h + own["prior_precision"]
        precision = torch.lerp(own["precision"], target, group["precision_lr"])
        require_finite(precision, "the precision")
        factor, failed = torch.linalg.cholesky_ex(precision)
        if int(failed):
            raise ValueError(
                "the new precision is not positive definite, since the exact Hessian was not; "
                'use hessian="ggn", a smaller precision_lr, or more prior_precision'
            )
        m = self._flat({name: self._mean(p) for name, p in self.params.items()})
        slope = scale * g + own["prior_precision"] @ (m - own["prior_mean"])
        m = m - group["lr"] * torch.cholesky_solve(slope.unsqueeze(1), factor).squeeze(1)
        require_finite(m, "the new mean")
        own["precision"] = precision
        for name, value in self._shaped(m).items():
            self._move(self.params[name], value)

    # ------------------------------------------------------------------ flat and back

    @property
    def _own(self) -> dict[str, Any]:
        return self.state[next(iter(self.params.values()))]

    def _noise(self) -> list[tuple[nn.Parameter, Tensor]]:
        """A draw of N(0, S⁻¹): L⁻ᵀ z with S = L Lᵀ."""
        z = self._normal(self._own["prior_mean"].shape, self.precision)
        factor = torch.linalg.cholesky(self.precision)
        draw = torch.linalg.solve_triangular(factor.mT, z.unsqueeze(1), upper=True).squeeze(1)
        return [(self.params[name], e) for name, e in self._shaped(draw).items()]

    def _derivatives(
        self, data: tuple[Inputs, Tensor], head: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient and the Hessian of the summed nll at the present weights."""
        g = self._flat(gradient(self.model, data, self.likelihood, head=head))
        if self.hessian == "ggn":
            h = dense_curvature(self.model, data, self.likelihood, head=head).matrix
        else:
            h = self._exact_hessian(data[0], data[1], head)
        return g, h.to(g.dtype)

    def _exact_hessian(self, inputs: Inputs, labels: Tensor, head: Any) -> Tensor:
        params = list(self.params.values())
        with differentiating(self.model):
            f = forward(self.model, inputs)
            mask = head_mask(None if head is None else tuple(head), f.shape[1], f.device)
            nll = self.likelihood.nll(self.likelihood.mask(f, mask), labels).sum()
            kind: Any = {"allow_unused": True, "materialize_grads": True}
            first = torch.autograd.grad(nll, params, create_graph=True, **kind)
            flat = torch.cat([g.flatten() for g in first])
            lines = [
                torch.cat([
                    x.flatten() for x in torch.autograd.grad(g, params, retain_graph=True, **kind)
                ])
                if g.requires_grad else torch.zeros_like(flat)
                for g in flat
            ]  # fmt: skip
        matrix = torch.stack(lines).detach()
        return 0.5 * (matrix + matrix.T)

    def _flat(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values[name].detach().flatten() for name in self.shapes])

    def _shaped(self, flat: Tensor) -> Params:
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()])
        return {n: x.reshape(s) for (n, s), x in zip(self.shapes.items(), parts, strict=True)}


def _require_same(shapes: Mapping[str, torch.Size], mean: Mapping[str, Tensor]) -> None:
    if {n: tuple(s) for n, s in shapes.items()} != {n: tuple(m.shape) for n, m in mean.items()}:
        raise StaleAnchorError(
            f"the prior holds {list(mean)[:5]}, the model {list(shapes)[:5]}; expected the same "
            "names and shapes"
        )


def _matrix(curvature: Curvature, shapes: Mapping[str, torch.Size]) -> Tensor:
    """(P, P) over the parameters in this order, from a curvature of any structure."""
    if isinstance(curvature, Diagonal):
        return torch.cat([curvature.values[n].flatten() for n in shapes]).diag()
    if isinstance(curvature, Dense) and list(curvature.shapes) == list(shapes):
        return curvature.matrix
    like = curvature.diagonal()
    columns = []
    for name in shapes:
        for i in range(like[name].numel()):
            unit = {n: torch.zeros_like(like[n]) for n in shapes}
            unit[name].view(-1)[i] = 1.0
            column = curvature.mv(unit)
            columns.append(torch.cat([column[n].flatten() for n in shapes]))
    return torch.stack(columns, dim=1)

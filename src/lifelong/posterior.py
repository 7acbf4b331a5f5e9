r"""``Posterior``: a Gaussian over the weights, N(mean, precision⁻¹).

Laplace's method at a minimum: precision = curvature of the data + prior precision. It is what
``identify`` sees (leverage), what FROMP's kernel is built from, and, as a prior, online Laplace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .curvature import Curvature, Dense
from .data import BATCH_SIZE, Data, Head
from .likelihoods import Likelihood
from .models import Params, parameters, snapshot
from .prior import Prior
from .recall import Pass, fit_curvature, variance
from .recipe import Estimator, Recipe
from .terms import Regulariser, WeightTerm


@dataclass(frozen=True, eq=False)
class Posterior:
    """N(mean, (curvature + prior_precision I)⁻¹), in nats of the data that curvature sums over.

    Raises ValueError where prior_precision is not positive.
    """

    mean: Params
    curvature: Curvature
    prior_precision: float

    def __post_init__(self) -> None:
        if not self.prior_precision > 0:
            raise ValueError(
                f"prior_precision must be positive, got {self.prior_precision}: without it the "
                "weights that the data do not see have infinite variance"
            )

    @classmethod
    def laplace(
        cls,
        model: torch.nn.Module,
        data: Data,
        likelihood: Likelihood,
        *,
        prior_precision: float,
        structure: Literal["diagonal", "dense"] = "diagonal",
        estimator: Estimator = "exact",
        head: Head | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Posterior:
        """Laplace's method at the model's present weights.

        Raises ValueError for another structure; else as ``diagonal_curvature``.
        """
        if structure not in ("diagonal", "dense"):
            raise ValueError(f"structure must be 'diagonal' or 'dense', got {structure!r}")
        recipe = Recipe(structure=structure, estimator=estimator)
        over = Pass(model, data, likelihood, head, generator, batch_size)
        return cls(snapshot(parameters(model)), fit_curvature(recipe, over), prior_precision)

    def variance(self) -> Params:
        """The marginal variance of each weight: 1 / (diag G + delta), or diag of the inverse."""
        if isinstance(self.curvature, Dense):
            eye = torch.eye(len(self.curvature.matrix), dtype=self.curvature.matrix.dtype)
            inverse = torch.linalg.inv(self.curvature.matrix + self.prior_precision * eye)
            return Dense(inverse, self.curvature.shapes).diagonal()
        return variance(self.curvature, self.prior_precision)

    def sample(self, generator: torch.Generator | None = None) -> Params:
        """One draw of the weights."""
        noise = {
            n: torch.randn(m.shape, generator=generator, dtype=m.dtype).to(m.device)
            for n, m in self.mean.items()
        }
        if isinstance(self.curvature, Dense):
            matrix = self.curvature.matrix
            eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            factor = torch.linalg.cholesky(matrix + self.prior_precision * eye)
            flat = torch.cat([noise[n].flatten() for n in self.curvature.shapes])
            draw = torch.linalg.solve_triangular(factor.mT, flat.unsqueeze(1), upper=True)
            parts = draw.squeeze(1).split([s.numel() for s in self.curvature.shapes.values()])
            steps = {
                n: part.reshape(shape)
                for (n, shape), part in zip(self.curvature.shapes.items(), parts, strict=True)
            }
        else:
            sd = self.variance()
            steps = {n: noise[n] * sd[n].sqrt() for n in noise}
        return {n: self.mean[n] + steps[n] for n in self.mean}

    def as_prior(self, likelihood: Likelihood) -> Prior:
        """-log N(theta; mean, precision⁻¹) up to a constant: online Laplace's prior."""
        structure = "dense" if isinstance(self.curvature, Dense) else "diagonal"
        recipe = Recipe("online_laplace", structure=structure, gradient="anchored")
        pulled = {n: -self.prior_precision * m for n, m in self.mean.items()}
        terms = (Regulariser(self.prior_precision), WeightTerm(self.mean, pulled, self.curvature))
        return Prior(likelihood, recipe, terms, num_tasks=1)

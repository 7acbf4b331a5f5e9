"""``gaussian_posterior``: what a variational optimiser knows, as a ``Posterior``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import Diagonal
from ..hooks import accumulator
from ..models import parameters
from ..posterior import Posterior
from .base import Variational


def gaussian_posterior(optimizer: torch.optim.Optimizer, model: nn.Module) -> Posterior:
    r"""The Gaussian that the optimiser holds, in nats, with no pass over data.

        posterior = gaussian_posterior(optimizer, model)
        prior = posterior.as_prior(Categorical())      # tomorrow's, for any optimiser
        IVON(model.named_parameters(), ..., prior=posterior)   # or for a variational one

    Parameters that never had a gradient have the precision of their prior alone. The posterior's
    ``prior_precision`` is the number that training began with; all precision above it, also that
    of yesterday, is in ``curvature``.

    An optimiser from elsewhere is accepted by what it offers: each group of ``param_groups`` has
    ``ess``, ``weight_decay`` and ``hess``, a flat vector over the group's parameters in their
    order, as the public interface of ``ivon.IVON`` does; q then has precision
    ess (hess + weight_decay), and its mean is in the model, outside of any sampling.

    Raises TypeError where these are missing; ValueError where they do not fit the model, where the
    optimiser does not hold every trainable parameter, where groups differ in ess · weight_decay,
    or where that is 0; RuntimeError inside of ``sampled_params``.
    """
    names = {id(p): name for name, p in parameters(model).items()}
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    strange = sum(id(p) not in names for p in held)
    left = sorted(set(names.values()) - {names.get(id(p)) for p in held})
    if strange or left:
        raise ValueError(
            f"the optimiser holds {strange} parameters that the model has not, and lacks "
            f"{left[:5]}; expected the trainable parameters of this model"
        )
    if isinstance(optimizer, Variational):
        optimizer.require_mean()
        return optimizer.gaussian(names)
    return _foreign(optimizer, names)


def _foreign(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Posterior:
    mean: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    precisions: list[float] = []
    for number, group in enumerate(optimizer.param_groups):
        params = [p for p in group["params"] if p.requires_grad]
        hess = _flat_hessian(group, number, optimizer, sum(p.numel() for p in params))
        precisions.append(float(group["ess"]) * float(group["weight_decay"]))
        for p, h in zip(params, hess.split([p.numel() for p in params]), strict=True):
            dtype = accumulator(p.dtype)
            mean[names[id(p)]] = p.detach().to(dtype, copy=True)
            values[names[id(p)]] = float(group["ess"]) * h.to(dtype).reshape(p.shape)
    if len(set(precisions)) > 1:
        raise ValueError(
            f"the groups have different prior precisions, ess · weight_decay: {precisions}; "
            "expected one for all"
        )
    return Posterior(mean, Diagonal(values), precisions[0])


def _flat_hessian(group: dict[str, Any], number: int, optimizer: Any, size: int) -> Tensor:
    missing = [key for key in ("ess", "weight_decay", "hess") if group.get(key) is None]
    if missing:
        raise TypeError(
            f"{type(optimizer).__name__} holds no Gaussian that can be read: group {number} of "
            f"its param_groups lacks {missing}. Expected VON, VOGN, IVON or Vadam of this library, "
            "or groups with ess, weight_decay and a flat hess; after another optimiser use "
            "Posterior.laplace"
        )
    hess = torch.as_tensor(group["hess"]).detach().flatten()
    if hess.numel() != size:
        raise ValueError(
            f"group {number} has {size} weights, but its hess has {hess.numel()} entries; "
            "expected one for each, in the order of the parameters"
        )
    return hess

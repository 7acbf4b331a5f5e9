"""Parameters of which each process holds a part: the ``DTensor`` of FSDP2 (``fully_shard``).

A quadratic in the weights is a sum over parameters, so each rank computes its own part of it and of
its slope, and one number is summed. Everything that needs whole parameters says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StaleAnchorError
from .models import unwrapped


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor; torch.distributed.tensor need not be there to tell."""
    return hasattr(x, "placements") and hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is. Gradients flow back."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """All of a DTensor, on every rank, which all must ask; any other tensor as it is."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def like(x: Tensor, p: Any) -> Tensor:
    """``x``, the same on every rank, sharded as the parameter ``p`` is; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def load_whole(replica: nn.Module, model: nn.Module) -> nn.Module:
    """``replica`` with the weights and buffers of ``model``, gathered on every rank, which all must
    call: what a prior is updated at, since curvature and strengths need whole parameters.

    replica: the same network, not sharded. Either may come in its wrapper. Raises StaleAnchorError
    where names or shapes differ; the replica is then unchanged.
    """
    theirs, mine = (
        {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
        for inner in (unwrapped(model), unwrapped(replica))
    )
    differing = sorted(theirs.keys() ^ mine.keys())
    differing += [n for n in mine if n in theirs and mine[n].shape != theirs[n].shape]
    if differing:
        raise StaleAnchorError(
            f"the replica is another network: {differing[:5]} differ; build it as the model was, "
            "without fully_shard"
        )
    with torch.no_grad():
        for name, value in theirs.items():
            mine[name].copy_(whole(value))
    return replica


def require_alike(params: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all are sharded in one way, or none is."""
    ways = {(p.device_mesh, p.placements) if is_sharded(p) else None for p in params.values()}  # type: ignore[attr-defined]
    if len(ways) > 1:
        some = {n: is_sharded(p) for n, p in params.items()}
        plain = [n for n, sharded in some.items() if not sharded]
        raise ValueError(
            "expected all parameters sharded over one mesh in one way"
            + (f", got plain ones among them: {plain[:5]}" if plain else "")
            + ". From a forward to the backward pass the root of FSDP2 has whole ones: ask the "
            "prior first, prior(model) and then model(x), or use prior.loss; and call fully_shard "
            "on the model itself, after its parts"
        )


def over_ranks(value: Tensor, params: Iterable[Any]) -> Tensor:
    """The sum of what each rank has computed of its part of the parameters; its gradient is that of
    ``value`` alone, which is the whole one for that part."""
    p = next(iter(params))
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    kinds = [Partial() if placed.is_shard() else Replicate() for placed in p.placements]
    total = DTensor.from_local(value.detach(), p.device_mesh, kinds).full_tensor()
    return value + (total - value.detach())

r"""``nn.MultiheadAttention`` taken apart into layers that hooks can see.

Its forward multiplies by its packed weights without calling a layer. ``attend`` computes the same
from a projection (a layer that shares the packed weight and bias) and the module's ``out_proj``,
with the batch first whatever the module's layout:

    q, k, v = rows of W x + b,    f = out_proj(softmax(q kᵀ / sqrt(d) + masks) v).

``hooks`` swaps it in for a recorded forward pass, and out again where the outputs should differ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupedLinear(nn.Module):
    """G linear layers of the same size side by side: (B, G, L, I) -> (B, G, L, O).

    The weight is (G * O, I) and the bias (G * O,), the groups one after another.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, groups: int) -> None:
        super().__init__()
        self.weight, self.bias, self.groups = weight, bias, groups

    def forward(self, a: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, (self.groups, -1))
        z = torch.einsum("bgli,goi->bglo", a, weight)
        return z if self.bias is None else z + self.bias.view(self.groups, 1, -1)


class InProjection(nn.Module):
    """Queries, keys and values from one packed weight (3 E, E); for self-attention in one product.

    ``joint`` and ``apart`` share that weight; a call runs one of them.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        weight: Any = module.in_proj_weight
        bias: Any = module.in_proj_bias
        self.joint = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
        self.joint.weight, self.joint.bias = weight, bias
        self.apart = GroupedLinear(weight, bias, 3)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(B, Lq, E), (B, Lk, E), (B, Lk, E) -> the same shapes."""
        if query is key and key is value:
            return self.joint(query).chunk(3, dim=-1)
        longest = max(x.shape[1] for x in (query, key, value))
        padded = [F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (query, key, value)]
        q, k, v = self.apart(torch.stack(padded, dim=1)).unbind(1)
        return q[:, : query.shape[1]], k[:, : key.shape[1]], v[:, : value.shape[1]]


def can_attend(module: nn.Module) -> bool:
    """Whether ``attend`` covers it: the plain class, packed plain weights, a forward of its own."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(module)
        and type(module.in_proj_weight) is nn.Parameter
        and not (module.training and module.dropout > 0)
    )


def attend(
    module: nn.MultiheadAttention,
    project: InProjection,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The module's forward (see ``nn.MultiheadAttention``), by ``project`` and ``out_proj``.

    ``is_causal`` only hints that ``attn_mask`` is causal: the mask is applied as it is.
    """
    if query.dim() != 3 or any(x.is_nested for x in (query, key, value)):
        return nn.MultiheadAttention.forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask,
            average_attn_weights, is_causal,
        )  # fmt: skip
    if not module.batch_first:
        query, key, value = _transposed(query, key, value)
    b, heads, targets = len(query), module.num_heads, query.shape[1]
    q, k, v = project(query, key, value)
    k, v = _extended(module, k, module.bias_k), _extended(module, v, module.bias_v)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, d)
    mask = _merged(attn_mask, key_padding_mask, (b, heads, targets, key.shape[1]), q.dtype)
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[2] - key.shape[1]))
    weights = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        out = weights @ v
        if average_attn_weights:
            weights = weights.mean(1)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    out = module.out_proj(out.transpose(1, 2).flatten(2))
    return (out if module.batch_first else out.transpose(0, 1)), weights


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Batch first; what was one tensor stays one."""
    found = {id(x): x.transpose(0, 1) for x in (query, key, value)}
    return found[id(query)], found[id(key)], found[id(value)]


def _extended(module: nn.MultiheadAttention, x: Tensor, bias: Tensor | None) -> Tensor:
    """Keys or values with the learned one and the zero one behind them, where the module has."""
    if bias is not None:
        x = torch.cat([x, bias.expand(len(x), 1, -1)], dim=1)
    return F.pad(x, (0, 0, 0, 1)) if module.add_zero_attn else x


def _merged(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Tensor | None:
    """One mask to add to the scores, broadcasting to (B, H, targets, sources); True masks out."""
    b, heads, targets, sources = shape
    total = None
    if attn_mask is not None:
        total = _additive(attn_mask, dtype)
        if total.dim() == 3:
            total = total.reshape(b, heads, targets, sources)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype).reshape(b, 1, 1, sources)
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)

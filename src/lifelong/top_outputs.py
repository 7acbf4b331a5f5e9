r"""Soft labels of many classes: the k largest outputs of each item, and one number for the others.

    f_c as it is for the k largest c of those that compete, elsewhere
    f_rest = log( sum_{other c} e^{f_c} / (C - k) )

so that softmax(f) keeps the probabilities of the k, and spreads what is left, m, evenly over the
others. A distribution p* becomes one p with

    KL(p* || p) = m (log(C - k) - H(p* within the others)) <= m log(C - k)      nats
    sum_c |p*_c - p_c| <= 2 m

and k = C, or k = C - 1, keeps it whole. 4 + 8 k bytes an item in place of 4 C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .models import Unread

_NONE = -1e4  # where no other output competes


@dataclass(frozen=True, eq=False, repr=False)
class TopOutputs(Unread):
    """Outputs (M, C) of which k are kept: values (M, k), index (M, k) int32, rest (M,).

    ``top[index]`` are rows as tensors (B, C); width: C.
    """

    values: Tensor
    index: Tensor
    rest: Tensor
    width: int

    @classmethod
    def of(cls, f: Tensor, k: int, mask: Tensor | None = None) -> TopOutputs:
        """f (M, C); mask (M, C) bool: the outputs that compete, of which the largest are kept.

        Outputs that do not compete count as ``rest``: nobody asks for them under this mask. Raises
        ValueError for k < 1.
        """
        if k < 1:
            raise ValueError(f"at least one output of each item must be kept, got k={k}")
        width = f.shape[1]
        competing = f if mask is None else f.masked_fill(~mask, -torch.inf)
        values, index = competing.topk(min(k, width), dim=1)
        others = competing.scatter(1, index, -torch.inf)
        count = (others > -torch.inf).sum(1)
        rest = others.double().logsumexp(1) - count.clamp(min=1).double().log()
        rest = rest.nan_to_num(nan=_NONE, posinf=_NONE, neginf=_NONE).to(f.dtype)
        values = torch.where(values > -torch.inf, values, rest.unsqueeze(1))  # heads below k
        return cls(values, index.to(torch.int32), rest, width)

    def __repr__(self) -> str:
        return f"TopOutputs({len(self):,} rows, {self.k} of {self.width} outputs)"

    def __len__(self) -> int:
        return len(self.rest)

    @property
    def k(self) -> int:
        """Outputs that are kept of each item."""
        return self.values.shape[1]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.width))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.columns.values())

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        some = self.select(index)
        full = some.rest.unsqueeze(1).expand(-1, self.width).contiguous()
        return full.scatter_(1, some.index.long(), some.values)

    def select(self, index: Tensor | slice) -> TopOutputs:
        return replace(
            self, values=self.values[index], index=self.index[index], rest=self.rest[index]
        )

    def like(self, f: Tensor, mask: Tensor | None = None) -> TopOutputs:
        """Other outputs, of which as many are kept."""
        return TopOutputs.of(f, self.k, mask)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> TopOutputs:
        return replace(
            self,
            values=self.values.to(device=device, dtype=dtype),
            index=self.index.to(device=device),
            rest=self.rest.to(device=device, dtype=dtype),
        )

    def join(self, parts: Sequence[Any]) -> TopOutputs:
        """The rows of ``parts``, tensors among them; all keep as many outputs as the one that
        keeps most."""
        k = max(part.k for part in parts if isinstance(part, TopOutputs))
        tops = [
            part if isinstance(part, TopOutputs) and part.k == k
            else TopOutputs.of(part[slice(None)], k)
            for part in parts
        ]  # fmt: skip
        joined = {name: torch.cat([top.columns[name] for top in tops]) for name in tops[0].columns}
        return TopOutputs(**joined, width=tops[0].width)

    # ------------------------------------------------------------------ files

    @property
    def columns(self) -> dict[str, Tensor]:
        """Its tensors, by name."""
        return {"values": self.values, "index": self.index, "rest": self.rest}

    def state_dict(self) -> dict[str, Any]:
        """All by rows, as what drops rows of a file expects; (M, 0, C) holds C alone."""
        return {**self.columns, "width": torch.empty(len(self), 0, self.width, dtype=torch.uint8)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> TopOutputs:
        return cls(state["values"], state["index"], state["rest"], state["width"].shape[2])

    def packed(self) -> Tensor:
        """(M, bytes) uint8: values, rest and index of each row."""
        columns = (self.values, self.rest.unsqueeze(1), self.index)
        return torch.cat([x.contiguous().cpu().view(torch.uint8) for x in columns], dim=1)

    @classmethod
    def unpacked(cls, rows: Tensor, k: int, width: int, dtype: torch.dtype) -> TopOutputs:
        """What ``packed`` made."""
        size = dtype.itemsize
        parts = rows.split([k * size, size, 4 * k], dim=1)
        values, rest = (part.contiguous().view(dtype) for part in parts[:2])
        return cls(values, parts[2].contiguous().view(torch.int32), rest.squeeze(1), width)

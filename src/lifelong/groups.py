r"""Groups: what each customer, hospital or device put into g and G, so that one can leave unseen.

A weight term <g, d> + ½ <d, G d> is a sum over examples. Kept apart for a group k, its share is

    g_k = sum_{i in k} J*ᵀ r_i,   G_k = sum_{i in k} J*ᵀ H_i J*     of its examples not in memory,

and at a new anchor, d away, the share of the same quadratic is g_k + G_k d; G_k stays. To forget
the group, subtract: no example of it is read again. **Cost**: for each group as much as g and G:
2 P floats with a diagonal G, P + P² with a dense one. Source of the accounting: Khan & Swaroop
2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .curvature import Curvature
from .curvature import from_state_dict as curvature_from_state_dict
from .memory import Memory
from .models import Params, move, nbytes


@dataclass(frozen=True, eq=False)
class Share:
    """One group's part of a weight term. count: its examples that are not in memory; gradient,
    curvature: their g_k and G_k, None for 0."""

    count: int
    gradient: Params | None = None
    curvature: Curvature | None = None

    def __add__(self, other: Share) -> Share:
        gradient, curvature = self.gradient, self.curvature
        if gradient is None:
            gradient = other.gradient
        elif other.gradient is not None:
            gradient = {n: v + other.gradient[n] for n, v in gradient.items()}
        if curvature is None:
            curvature = other.curvature
        elif other.curvature is not None:
            curvature = curvature + other.curvature
        return Share(self.count + other.count, gradient, curvature)

    def __mul__(self, factor: float) -> Share:
        """Believed ``factor`` times as much; the count stays."""
        gradient = self.gradient
        return Share(
            self.count,
            None if gradient is None else {n: factor * v for n, v in gradient.items()},
            None if self.curvature is None else self.curvature * factor,
        )

    def __sub__(self, other: Share) -> Share:
        left = self + other * -1.0
        return replace(left, count=self.count - other.count)

    def rebased(self, d: Params) -> Share:
        """The same quadratic seen from an anchor that is d away."""
        if self.curvature is None:
            return self
        slope = self.curvature.mv(d)
        gradient = self.gradient
        if gradient is not None:
            slope = {n: v + gradient[n] for n, v in slope.items()}
        return replace(self, gradient=slope)


@dataclass(frozen=True, eq=False)
class Groups:
    """shares: group -> ``Share``; members: (M, 3) int64, (task, origin, group) of the examples in
    memory, which no share holds."""

    shares: Mapping[int, Share]
    members: Tensor

    @property
    def known(self) -> set[int]:
        """The groups of which anything is left."""
        return set(self.shares) | set(self.members[:, 2].tolist())

    @property
    def num_bytes(self) -> int:
        total = nbytes(self.members)
        for share in self.shares.values():
            curvature = 0 if share.curvature is None else share.curvature.num_bytes
            total += nbytes(share.gradient) + curvature
        return total

    def of(self, memory: Memory) -> Tensor:
        """(M,) the group of each remembered example; -1 for one of no group."""
        table = {(t, i): k for t, i, k in self.members.tolist()}
        pairs = zip(memory.task.tolist(), memory.origin.tolist(), strict=True)
        found = [table.get(pair, -1) for pair in pairs]
        return torch.tensor(found, dtype=torch.int64, device=memory.origin.device)

    def within(self, memory: Memory, groups: set[int]) -> Tensor:
        """(M,) bool: the remembered examples of these groups."""
        belongs = self.of(memory)
        return torch.isin(belongs, torch.tensor(sorted(groups), device=belongs.device))

    def mapped(self, change: Callable[[Share], Share]) -> Groups:
        return replace(self, shares={k: change(share) for k, share in self.shares.items()})

    def held(self, memory: Memory | None) -> Groups:
        """Only the members that the memory still holds."""
        if memory is None:
            return replace(self, members=self.members[:0])
        pairs = set(zip(memory.task.tolist(), memory.origin.tolist(), strict=True))
        kept = [tuple(row[:2]) in pairs for row in self.members.tolist()]
        return replace(self, members=self.members[torch.tensor(kept, dtype=torch.bool)])

    def __add__(self, other: Groups) -> Groups:
        shares = dict(self.shares)
        for k, share in other.shares.items():
            shares[k] = shares[k] + share if k in shares else share
        return Groups(shares, torch.cat([self.members, other.members.to(self.members.device)]))

    def __mul__(self, factor: float) -> Groups:
        return self.mapped(lambda share: share * factor)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Groups:
        def moved(share: Share) -> Share:
            gradient, curvature = share.gradient, share.curvature
            return Share(
                share.count,
                None if gradient is None else move(gradient, device, dtype),
                None if curvature is None else curvature.to(device, dtype),
            )

        return self.mapped(moved)

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and plain values, as ``checkpoint.save`` takes it."""
        shares = [
            {
                "group": k,
                "count": share.count,
                "gradient": share.gradient,
                "curvature": None if share.curvature is None else share.curvature.state_dict(),
            }
            for k, share in self.shares.items()
        ]
        return {"shares": shares, "members": self.members}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Groups:
        shares = {}
        for s in state["shares"]:
            found = s["curvature"]
            curvature = None if found is None else curvature_from_state_dict(found)
            shares[s["group"]] = Share(s["count"], s["gradient"], curvature)
        return cls(shares, state["members"])


NO_MEMBERS = torch.empty(0, 3, dtype=torch.int64)

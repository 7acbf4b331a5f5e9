"""Selection: scores and k in, indices out. Pure, so that each rule can be tested by hand.

FROMP's memory is ``per_class`` over the lambda scores, a random coreset is ``top_k`` over random
keys, and reservoir sampling is the same keys kept over the whole stream: the k largest of
independent uniform keys are a uniform sample, whatever the order in which they come. Therefore
every rule here but ``k_centre`` can be applied to candidates and newcomers over and over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def top_k(
    scores: Tensor,  # (N,)
    k: int,
    *,
    descending: bool = True,
) -> Tensor:  # (min(k, N),) int64, best first
    """Indices of the k largest (or smallest) scores; of equal ones the earlier comes first."""
    _require_size(k)
    return torch.sort(scores, descending=descending, stable=True).indices[:k]


def per_class(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,) int64
    k: int,
    *,
    descending: bool = True,
) -> Tensor:  # (min(k, N),) int64
    """k indices spread evenly over the classes, the best scores of each.

    Every class that occurs gets k // C places; the places that are left over, because C does not
    divide k or a class is small, go to the best of the remaining scores.
    """
    _require_size(k)
    return ranking(scores, labels, descending=descending).first(k)


class Ranking(NamedTuple):
    """What ``top_k`` and ``per_class`` choose from, for every k at once.

    order (N,): the indices, best first; rank (N,): how many of its own class are before each of
    them; None where classes do not matter.
    """

    order: Tensor
    rank: Tensor | None
    num_classes: int

    def first(self, k: int) -> Tensor:
        """(min(k, N),) int64: those within their class's quota first, each group by score."""
        if self.rank is None:
            return self.order[:k]
        within = self.rank < k // self.num_classes
        return torch.cat([self.order[within], self.order[~within]])[:k]


def ranking(scores: Tensor, labels: Tensor | None, *, descending: bool = True) -> Ranking:
    """Of scores (N,), within the classes of labels (N,) where there are some."""
    order = top_k(scores, len(scores), descending=descending)
    if labels is None:
        return Ranking(order, None, 1)
    return Ranking(order, _rank_within(labels[order]), max(1, len(torch.unique(labels))))


def represented(
    kept: Tensor,  # (M,) int64
    every: Tensor,  # (N,) int64
) -> Tensor:  # (M,) float64
    """How many of the N examples each of the M kept ones stands for: N_c / M_c of its own class c.

    For memories drawn at random, as many of each class: with N / M rare classes would count more.
    The examples of classes of which none is kept are shared out in proportion.
    """
    if len(kept) == 0:
        return torch.zeros(0, dtype=torch.float64, device=kept.device)
    classes, index, counts = kept.unique(return_inverse=True, return_counts=True)
    place = torch.searchsorted(classes, every).clamp(max=len(classes) - 1)
    found = torch.bincount(place[classes[place] == every], minlength=len(classes)).double()
    return (found / counts * (len(every) / found.sum()))[index]


def candidates(scores: Tensor, labels: Tensor | None, k: int, *, descending: bool = True) -> Tensor:
    """The indices, in ascending order, among which ``top_k`` or ``per_class`` will find theirs.

    Whatever comes later, nothing else is needed: the quota of a class can only shrink as classes
    come, and an example that takes a place left over has fewer than k better ones before it. One
    of each class stays, so that classes are counted right. At most 2 k + C indices: a pool of
    candidates does not grow with the data.
    """
    _require_size(k)
    order = top_k(scores, len(scores), descending=descending)
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[order[:k]] = True
    if labels is not None:
        quota = max(1, k // max(1, len(torch.unique(labels))))
        keep[order[_rank_within(labels[order]) < quota]] = True
    return keep.nonzero().squeeze(1)


class Bar(NamedTuple):
    """What a newcomer must pass to be among the ``candidates``; higher is better.

    overall: the k-th best of all; classes (C,) ascending; last (C,): the last place within each
    class's quota, or ``overall`` where that is lower, minus infinity for a class whose quota is
    not full. None where classes do not matter.
    """

    overall: Tensor
    classes: Tensor | None
    last: Tensor | None


def bar(scores: Tensor, labels: Tensor | None, k: int, *, descending: bool = True) -> Bar | None:
    """The bar that a pool of candidates sets, or None while it has fewer than k.

    It only rises as the pool grows, so that one of an earlier pool lets some too many pass, and
    none too few.
    """
    if len(scores) < k or k == 0:
        return None
    values = scores if descending else -scores
    overall = values.topk(k).values[-1]
    if labels is None:
        return Bar(overall, None, None)
    classes, index = torch.unique(labels, return_inverse=True)
    order = torch.sort(values, descending=True, stable=True).indices
    at_quota = _rank_within(index[order]) == max(1, k // len(classes)) - 1
    last = torch.full_like(values[: len(classes)], -torch.inf)
    last[index[order[at_quota]]] = values[order[at_quota]].minimum(overall)
    return Bar(overall, classes, last)


def passing(
    scores: Tensor,  # (B,)
    labels: Tensor | None,  # (B,)
    bar: Bar | None,
    *,
    descending: bool = True,
) -> Tensor:  # int64, ascending
    """The newcomers that could be ``candidates`` beside a pool with that bar; all for None.

    Outdone for good is who is no better than the k-th of the pool and, where the quota of its
    class is full, than the last of its class there. Most of a long stream is, and is not sorted.
    """
    if bar is None:
        return torch.arange(len(scores), device=scores.device)
    new = scores if descending else -scores
    if bar.classes is None or bar.last is None or labels is None:
        return (~(new <= bar.overall)).nonzero().squeeze(1)
    at = torch.searchsorted(bar.classes, labels).clamp_(max=len(bar.classes) - 1)
    outdone = (bar.classes[at] == labels) & (new <= bar.last[at])
    return (~outdone).nonzero().squeeze(1)


def k_centre(
    features: Tensor,  # (N, D)
    k: int,
    *,
    start: int = 0,
) -> Tensor:  # (min(k, N),) int64, in the order of choice
    """Greedy k-centre: each next index is the one farthest from those chosen before it.

    Within a factor 2 of the smallest covering radius. Source: Gonzalez 1985; used for coresets
    by Nguyen et al. 2018 (VCL). Cost N k D. Raises ValueError where ``start`` is no index.
    """
    _require_size(k)
    if len(features) == 0 or k == 0:
        return torch.empty(0, dtype=torch.int64)
    if not 0 <= start < len(features):
        raise ValueError(f"start must lie in 0 to {len(features) - 1}, got {start}")
    flat = features.flatten(1)
    chosen = [start]
    distance = (flat - flat[start]).square().sum(1)
    distance[start] = -1.0  # below every copy of it: no index is chosen twice
    while len(chosen) < min(k, len(flat)):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (flat - flat[chosen[-1]]).square().sum(1))
        distance[chosen[-1]] = -1.0
    return torch.tensor(chosen)


def _rank_within(labels: Tensor) -> Tensor:
    """For each position, how many earlier positions hold the same label."""
    order = torch.sort(labels, stable=True).indices
    grouped = labels[order]
    starts = torch.ones_like(grouped, dtype=torch.bool)
    starts[1:] = grouped[1:] != grouped[:-1]
    position = torch.arange(len(labels), device=labels.device)
    first = torch.where(starts, position, 0).cummax(0).values if len(labels) else position
    rank = torch.empty_like(position)
    rank[order] = position - first
    return rank


def _require_size(k: int) -> None:
    if k < 0:
        raise ValueError(f"the number of examples to select must not be negative, got {k}")

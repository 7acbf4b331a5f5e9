r"""Several processes, one past: sums and gathers over the ranks of ``torch.distributed``.

    prior = prior.update(model, shard(mine))   # called on every rank, each with its own data

Curvature, the gradient of the past and losses are sums over examples, so each rank reads its own
and the sums are added up: one message for each. Memory is chosen among all examples, by the same
draws that one process would make, and every rank ends with all of it. The prior is then the one
that a single process would have made of all data in the order of the ranks, to rounding.

Nothing is communicated unless data say that they are a shard: a call on one rank alone, with plain
data, never waits for others. All ranks must make the same calls with shards, in the same order,
with generators in the same state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, None for the default one.

    Raises ValueError where no process group was begun (torchrun, ``init_process_group``). What the
    ranks do together raises ConnectionError where one of them has ended, or does not come within
    the timeout that ``init_process_group`` was given.
    """

    group: Any = None

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "there is no process group; start the program with torchrun and call "
                "torch.distributed.init_process_group() first"
            )

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each summed over the ranks, in one message for each device and dtype; new tensors."""
        with self._telling("a sum"):
            return all_reduce(list(tensors), self.group)

    def objects(self, value: Any) -> list[Any]:
        """What each rank has given, by rank: small picklable values."""
        found: list[Any] = [None] * self.size
        with self._telling("what each has to tell"):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def gather(self, x: Tensor | None) -> Tensor:
        """Rows (n_r, ...) of all ranks, joined in their order; None stands for no rows.

        Raises ValueError where ranks disagree on the shape of a row or its dtype, or none has any.
        """
        kinds = self.objects(None if x is None else (len(x), tuple(x.shape[1:]), x.dtype))
        known = {kind[1:] for kind in kinds if kind is not None}
        if len(known) != 1:
            raise ValueError(
                "expected rows of one shape and dtype on all ranks, got "
                + (str(sorted(map(str, known))) if known else "no rows at all")
            )
        ((shape, dtype),) = known
        counts = [0 if kind is None else kind[0] for kind in kinds]
        device = self._device if x is None else x.device
        padded = torch.zeros((max(counts), *shape), dtype=dtype, device=device)
        if x is not None:
            padded[: len(x)] = x
        sent = padded.flatten().view(torch.uint8)  # backends do not know every dtype, but bytes
        parts = [torch.empty_like(sent) for _ in counts]
        with self._telling("rows"):
            dist.all_gather(parts, sent, group=self.group)
        found = [part.view(dtype).view(padded.shape) for part in parts]
        return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)])

    def gather_each(self, values: Mapping[str, Tensor] | Tensor | None) -> Any:
        """``gather``, of a mapping by its names."""
        names = [v for v in self.objects(_names(values)) if v != ()]
        if not names or names[0] is None:
            return self.gather(values)  # type: ignore[arg-type]
        held: Mapping[str, Tensor] = values or {}  # type: ignore[assignment]
        return {name: self.gather(held.get(name)) for name in names[0]}

    def require_same(self, what: str, value: Any) -> None:
        """Raise ValueError where ``value`` differs between ranks."""
        found = self.objects(value)
        if any(other != found[0] for other in found):
            told = ", ".join(f"{v!r} on rank {r}" for r, v in enumerate(found[:4]))
            raise ValueError(f"expected the same {what} on all ranks, got {told}")

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and _UNANSWERED.search(str(error)) is None:
                raise
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConnectionError(
                f"rank {self.rank} of {self.size} got no answer when it asked for {what}: "
                f"another rank has ended, or waits somewhere else ({first})"
            ) from error

    @property
    def _device(self) -> torch.device:
        cuda = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


# What backends say of a peer that has gone, or is late; NCCL has a type for it.
_UNANSWERED = re.compile(r"gloo/transport|connect|time[d ]*out|broken pipe", re.IGNORECASE)


def _names(values: Mapping[str, Tensor] | Tensor | None) -> tuple[str, ...] | None:
    """() for no rows at all, None for a tensor."""
    if values is None:
        return ()
    return tuple(values) if isinstance(values, Mapping) else None


def all_reduce(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """The sums over all ranks, in one message for each device and dtype; integers travel as int64,
    since backends do not know every dtype."""
    out: list[Tensor] = list(tensors)
    for kind in dict.fromkeys((t.device, t.dtype) for t in tensors):
        index = [i for i, t in enumerate(tensors) if (t.device, t.dtype) == kind]
        flat = torch.cat([tensors[i].flatten() for i in index])
        flat = flat if flat.is_floating_point() or flat.is_complex() else flat.long()
        dist.all_reduce(flat, group=group)
        for i, part in zip(index, flat.split([tensors[i].numel() for i in index]), strict=True):
            out[i] = part.reshape(tensors[i].shape).to(tensors[i].dtype)
    return out

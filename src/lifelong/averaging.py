r"""Whether DistributedDataParallel averages the gradients of a prior over the ranks.

It averages in the first backward pass after a forward pass through it, and in no other: of

    loss(ddp(x)).backward()
    prior(ddp).backward()            # stays on this rank, and the ranks part in silence
    (loss(model(x)) + prior(ddp)).backward()                # the same: nothing went through ddp

A prior that is given the wrapper watches one parameter that its value reaches: how often a gradient
was added to it since the last forward pass. Costs a hook a step, and no communication.
Source: PyTorch's notes on the design of DistributedDataParallel: forward prepares its reducer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.nn.parallel import DistributedDataParallel

from .models import wrappers

_ONE_BACKWARD = (
    "DistributedDataParallel averages one backward pass for each forward pass through it, and the "
    "prior's gradient and the data's came in two: the second would stay on this rank. Expected "
    "one: (loss(ddp(x), y) + prior(ddp) / num_data).backward(), or prior.loss(ddp, x, y, "
    "num_data=...).backward()"
)
_NOTHING_THROUGH = (
    "two backward passes of the prior, and nothing went through DistributedDataParallel between "
    "them: no gradient is averaged over the ranks. Expected the loss of ddp(x), not of the module "
    "inside, and one backward: (loss(ddp(x), y) + prior(ddp) / num_data).backward()"
)


def averaged(value: Tensor, model: nn.Module) -> Tensor:
    """``value``, whose backward raises ValueError where DistributedDataParallel around ``model``
    would not average its gradient, or the data's because of it. Nothing is changed by then but
    gradients.
    """
    if not value.requires_grad or torch.compiler.is_compiling():
        return value
    for wrapper in wrappers(model):
        if (
            isinstance(wrapper, DistributedDataParallel)
            and get_world_size(wrapper.process_group) > 1
        ):
            watch = _WATCHES.get(wrapper)
            if watch is None:
                watch = _WATCHES[wrapper] = _Watch()
                wrapper.register_forward_hook(watch.went_through)
            leaf = next(_leaves(value), None)
            if leaf is not None:
                watch.follow(leaf)
                value.register_hook(watch.prior_comes)
    return value


class _Watch:
    """What happened since the last forward pass through one wrapper.

    passes: backward passes that reached the leaf, of those that are averaged or too late to be.
    prior: whether a prior's gradient was in them.
    """

    def __init__(self) -> None:
        self.passes, self.prior, self.averages = 0, False, True
        self.leaf: Tensor | None = None
        self._followed: Any = None

    def follow(self, leaf: Tensor) -> None:
        if leaf is self.leaf:
            return
        if self._followed is not None:
            self._followed.remove()
        self.leaf, self.passes = leaf, 0
        self._followed = leaf.register_post_accumulate_grad_hook(self._reached)

    def went_through(self, wrapper: DistributedDataParallel, _: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            # Under no_sync() gradients wait for a later pass, which averages them too.
            self.passes, self.prior = 0, False
            self.averages = wrapper.require_backward_grad_sync
            first = next(_tensors(output), None)
            if first is not None:
                first.register_hook(self._data_come)

    def prior_comes(self, _: Tensor) -> None:
        # With zero gradients after one pass it is the first of a new step, which is averaged later.
        if self.passes > 1:
            raise ValueError(_NOTHING_THROUGH if self.prior else _ONE_BACKWARD)
        if self.passes == 1 and self.leaf is not None and _is_set(self.leaf.grad):
            raise ValueError(_ONE_BACKWARD)
        self.prior = True

    def _data_come(self, _: Tensor) -> None:
        if self.prior and self.passes:
            raise ValueError(_ONE_BACKWARD)

    def _reached(self, _: Tensor) -> None:
        self.passes += self.averages


_WATCHES: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()


def _is_set(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The parameters that a value depends on, the nearest first."""
    nodes, seen = deque([value.grad_fn]), set()
    while nodes:
        node = nodes.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        nodes.extend(following for following, _ in node.next_functions)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those with a gradient, of what a model returns."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)

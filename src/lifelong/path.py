r"""The path integral of Synaptic Intelligence: curvature read off the training itself.

omega_j = -sum_steps g_j Delta theta_j with g the gradient of the data's loss alone, then
Omega_j = omega_j / (Delta_j² + xi) over the whole task, and the term is c sum_j Omega_j d_j².
Source: Zenke et al. 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .curvature import Diagonal
from .models import Params, parameters, snapshot


class PathIntegral:
    """Watches an optimiser while one task is learned; a context manager.

    model, optimizer: what is trained. prior: the prior whose gradient is in ``p.grad`` beside
    the data's and is taken out of it, since omega is of the data alone; num_data: what the prior
    was divided by in the loss. omega is kept in nats: the loss is a mean over num_data.
    The gradient is taken as backward leaves it, before any clipping: the path is that of the loss.
    scaler: the ``GradScaler`` whose scaled loss backward was called on, so that its scale is taken
    out again; without it omega is as many times too large.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        prior: Callable[[nn.Module], Tensor] | None = None,
        num_data: int = 1,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._prior, self._num_data = prior, num_data
        self._start = snapshot(parameters(model))
        self._before = self._start
        self._slope: Params = {}
        self.omega = {n: torch.zeros_like(p) for n, p in self._start.items()}
        self._handles: list[Any] = []

    def __enter__(self) -> PathIntegral:
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        for n, p in parameters(self._model).items():
            self._handles.append(p.register_post_accumulate_grad_hook(self._keeper(n)))
        return self

    def _keeper(self, name: str) -> Callable[[Tensor], None]:
        def keep(p: Tensor) -> None:
            if p.grad is not None:
                self._slope[name] = p.grad.detach().clone()

        return keep

    def keep(self) -> None:
        """Take ``p.grad`` as it is now for what backward left: where it was added up over
        processes afterwards, and not yet unscaled or clipped."""
        for n, p in parameters(self._model).items():
            self._keeper(n)(p)

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def curvature(self, damping: float = 0.1, *, clip: bool = True) -> Diagonal:
        """G = 2 num_data omega / (Delta² + damping): ½ <d, G d> is SI's term with c = 1, in nats.

        clip: negative entries become 0, without which the term is not bounded below; published
        codes differ here. Raises ValueError for a damping that is not positive.
        """
        if not damping > 0:
            raise ValueError(f"the path damping must be positive, got {damping}")
        params = parameters(self._model)
        values = {}
        for n, omega in self.omega.items():
            moved = params[n].detach() - self._start[n]
            values[n] = 2 * self._num_data * omega / (moved.square() + damping)
        return Diagonal({n: v.clamp(min=0) for n, v in values.items()} if clip else values)

    def state_dict(self) -> dict[str, Params]:
        return {"start": self._start, "omega": self.omega}

    def load_state_dict(self, state: dict[str, Params]) -> None:
        self._start, self.omega = state["start"], state["omega"]

    def _before_step(self, *_: Any) -> None:
        params = parameters(self._model)
        self._before = snapshot(params)
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        # No gradient: an unused head, or zeroed without a backward pass since.
        self._slope = {
            n: torch.zeros_like(p)
            if p.grad is None or n not in self._slope
            else self._slope[n] / scale
            for n, p in params.items()
        }
        if self._prior is None:
            return
        with torch.enable_grad():
            value = self._prior(self._model)
        if not value.requires_grad:
            return
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for n, grad in zip(params, grads, strict=True):
            if grad is not None:
                self._slope[n] = self._slope[n] - grad / self._num_data

    def _after_step(self, *_: Any) -> None:
        for n, p in parameters(self._model).items():
            self.omega[n] = self.omega[n] - self._slope[n] * (p.detach() - self._before[n])
        self._slope = {}

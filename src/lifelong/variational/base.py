"""What the variational optimisers share: names, a generator of their own, sampling, resuming."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..hooks import accumulator
from ..models import parameters
from ..posterior import Posterior

ParamsOrGroups = Iterable[Any]  # parameters, (name, parameter) pairs, or dicts with "params"


class Variational(torch.optim.Optimizer):
    """An optimiser that holds a Gaussian over the weights; its mean is in the model.

    generator: where its noise comes from, so that the global random state is not touched; by
    default a new one on the CPU, seeded with the rank. A generator may live on another device than
    the parameters: the noise is drawn there and moved. ranks: over which passes are averaged;
    without them a process steps alone.
    """

    def __init__(
        self,
        params: ParamsOrGroups,
        defaults: dict[str, Any],
        *,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        groups, self.names = _split_names(params)
        super().__init__(groups, defaults)
        self.generator = generator or torch.Generator().manual_seed(
            0 if ranks is None else ranks.rank
        )
        self.ranks = ranks
        self._weight = 0.0  # of the passes since the last step
        self._sampling = False

    # ------------------------------------------------------------------ for the subclasses

    def gaussian(self, names: Mapping[int, str]) -> Posterior:
        """The posterior, with id(parameter) -> name; ``gaussian_posterior`` is the way in."""
        raise NotImplementedError  # each kind of Gaussian has its own

    def require_mean(self) -> None:
        """Raise RuntimeError where the weights are a sample."""
        if self._sampling:
            raise RuntimeError("the weights are a sample: leave sampled_params first")

    def _trainable(self) -> Iterator[tuple[torch.nn.Parameter, dict[str, Any]]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield p, group

    def _normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Standard normal noise, in float32 or better on the device of ``like``."""
        noise = torch.randn(
            shape,
            generator=self.generator,
            dtype=accumulator(like.dtype),
            device=self.generator.device,
        )
        return noise.to(like.device)

    def _mean(self, p: Tensor) -> Tensor:
        """m in float32 or better: of a shorter parameter a copy is kept, so that small steps add.

        The copy is made again where the parameter was changed from outside.
        """
        if accumulator(p.dtype) == p.dtype:
            return p.detach()
        master = self.state[p].get("mean")
        if master is None or not torch.equal(master.to(p.dtype), p.detach()):
            master = self.state[p]["mean"] = p.detach().to(accumulator(p.dtype))
        return master

    @torch.no_grad()
    def _move(self, p: Tensor, value: Tensor) -> None:
        """The mean becomes ``value``."""
        if accumulator(p.dtype) != p.dtype:
            self.state[p]["mean"] = value.clone()
        p.copy_(value)

    @contextmanager
    def _perturbed(self, noise: list[tuple[torch.nn.Parameter, Tensor]]) -> Iterator[None]:
        """The weights are mean + noise inside, and bit for bit what they were after."""
        if self._sampling:
            raise RuntimeError(
                "sampled_params inside of sampled_params: the weights are a sample already; "
                "leave the first context before you enter the next"
            )
        kept = [(p, p.detach().clone()) for p, _ in noise]
        with torch.no_grad():
            for p, e in noise:
                p.copy_(self._mean(p) + e)
        self._sampling = True
        try:
            yield
        finally:
            self._sampling = False
            with torch.no_grad():
                for p, value in kept:
                    p.copy_(value)

    def _require_passes(self, how: str) -> None:
        if self._sampling:
            raise RuntimeError("step() inside of sampled_params; leave the context first")
        if any(p.grad is not None for p, _ in self._trainable()):
            raise RuntimeError(
                "there are gradients that were taken outside of sampled_params, at the mean; "
                f"expected {how} before step(). zero_grad() drops them"
            )
        if self._weight == 0 and self.ranks is None:
            raise RuntimeError(f"step() without a pass over data: expected {how} before it")

    # ------------------------------------------------------------------ resuming

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError: what is held by parameter would not be that of the copied ones."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled; make a new one for the copied "
            "model, and load_state_dict(optimizer.state_dict())"
        )

    def state_dict(self) -> dict[str, Any]:
        """Also the generator's state, and passes that wait for their step: a resumed run is equal.

        Raises RuntimeError inside of ``sampled_params``.
        """
        if self._sampling:
            raise RuntimeError("the weights are a sample: leave sampled_params before you save")
        own = {"generator": self.generator.get_state(), "weight": self._weight}
        return {**super().state_dict(), **own, "kind": type(self).__name__}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state again, each tensor in the precision that it was saved in.

        Raises RuntimeError inside of ``sampled_params``, ValueError for the state of another kind
        of optimiser.
        """
        if self._sampling:
            raise RuntimeError("the weights are a sample: leave sampled_params before you load")
        own = type(self).__name__
        if not {"generator", "weight", "state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"expected the state of {own}, with a generator; got the keys {sorted(state_dict)}"
            )
        kind = state_dict.get("kind", own)  # files from before it was written have none
        if kind != own:
            raise ValueError(
                f"expected the state of {own}, got that of {kind}, whose numbers mean something "
                f"else; pass prior=gaussian_posterior(optimizer, model) to a new {own}"
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        # torch has cast the state to the dtype of the parameters.
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][key] = value.detach().to(p.device, copy=True)
        self.generator.set_state(state_dict["generator"].cpu())
        self._weight = float(state_dict["weight"])


def require_held(model: nn.Module, held: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the model's trainable parameters are others than ``held``."""
    changed = sorted(parameters(model).keys() ^ held.keys())
    if changed:
        raise ValueError(
            f"parameters were frozen or freed since the optimiser was made: {changed[:5]}; make a "
            "new one, with prior=gaussian_posterior(optimizer, model) taken before"
        )


def positive(**values: float) -> None:
    """Raise ValueError for a value that is not positive and finite."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _split_names(params: ParamsOrGroups) -> tuple[list[Any], dict[int, str]]:
    """Parameters or groups as torch takes them, and id(parameter) -> name where names came."""
    names: dict[int, str] = {}

    def bare(item: Any) -> Any:
        if isinstance(item, dict):
            inner = item["params"]
            return {**item, "params": [bare(p) for p in _several_of(inner)]}
        if isinstance(item, tuple) and len(item) == 2:
            names[id(item[1])] = item[0]
            return item[1]
        return item

    return [bare(item) for item in _several_of(params)], names


def _several_of(params: Any) -> Iterable[Any]:
    return [params] if isinstance(params, Tensor) else params

"""What the library asks of a model: outputs of shape (B, C) and named parameters.

A model is any ``nn.Module``. A tensor of inputs is passed as it is; a dict of tensors is passed
by keyword, as Hugging Face models expect; an output with ``.logits`` (or a dict with "logits") is
unwrapped. Parameters travel as ``dict[str, Tensor]``, keyed as in ``named_parameters()``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import NonFiniteError, StaleAnchorError


class Unread(ABC):
    """Rows (M, ...) that become tensors when they are asked for, such as inputs on a disk.

    ``rows[index]`` reads; ``rows.select(index)`` are those rows unread.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: Tensor | slice) -> Any: ...

    @abstractmethod
    def select(self, index: Tensor | slice) -> Unread: ...

    @abstractmethod
    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Unread:
        """Rows that are on that device, in that floating dtype, once they are read."""

    @abstractmethod
    def join(self, parts: Sequence[Any]) -> Unread:
        """The rows of ``parts`` one after another, unread; this is one of them, others may be read
        ones."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of all rows, as a memory budget counts them."""


Inputs = Tensor | Mapping[str, Tensor]  # or ``Unread`` rows of one or the other
Params = dict[str, Tensor]
ParamFilter = Callable[[str, nn.Parameter], bool]
Result = TypeVar("Result")


def logits(output: Any) -> Tensor:
    """The (B, C) tensor inside a model's output; raises TypeError where there is none."""
    if not isinstance(output, Tensor):
        inner = output.get("logits") if isinstance(output, Mapping) else None
        output = inner if inner is not None else getattr(output, "logits", None)
    if not isinstance(output, Tensor):
        raise TypeError("the model must return a tensor, or something with a tensor in .logits")
    if output.ndim == 1:
        raise ValueError(
            f"the model returned shape {tuple(output.shape)}; expected (B, C): "
            "end the model with nn.Unflatten(-1, (-1, 1)) or keep the last dimension"
        )
    return output


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's outputs f (B, C) on a tensor or on a dict of tensors."""
    inputs = read(inputs)
    return logits(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def forward_at(model: nn.Module, params: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """f (B, C) at other weights; the model's own stay where they are. Its gradients are taken
    inside of ``at``."""
    inputs = read(inputs)
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    return logits(functional_call(model, dict(params), args, kwargs))


def at(
    model: nn.Module, params: Mapping[str, Tensor], work: Callable[[nn.Module], Result]
) -> Result:
    """``work(model)`` with other weights in the model, whose own stay where they are.

    For work that takes gradients: activation checkpointing computes a part of the forward pass
    again in the backward pass, and would then find the model's own weights after ``forward_at``.
    """
    state = {f"model.{name}": value for name, value in params.items()}
    return functional_call(_Work(model, work), state, ())


class _Work(nn.Module):
    """A function of a model as a module, whose forward pass it is."""

    def __init__(self, model: nn.Module, work: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model, self.work = model, work

    def forward(self) -> Any:
        return self.work(self.model)


def parameters(
    model: nn.Module, param_filter: ParamFilter | None = None
) -> dict[str, nn.Parameter]:
    """The trainable parameters by name: those with ``requires_grad`` that the filter keeps."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (param_filter is None or param_filter(name, p))
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The module whose parameters have the user's names: inside of DistributedDataParallel,
    DataParallel, what ``torch.compile`` returns and what Lightning's Fabric sets up, one in another
    or not. Accelerate prepares a model as one of these."""
    *_, inner = _from_outside(model)
    return inner


def wrappers(model: nn.Module) -> list[nn.Module]:
    """What ``unwrapped`` takes off, the outermost first."""
    *found, _ = _from_outside(model)
    return found


def _from_outside(model: nn.Module) -> Iterator[nn.Module]:
    while True:
        yield model
        wrapper = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        name = "module" if wrapper or _of_fabric(model) else "_orig_mod"
        inner = getattr(model, name, None)
        if not isinstance(inner, nn.Module):
            return
        model = inner


def _of_fabric(model: nn.Module) -> bool:
    """Told by where its class is from, since Lightning takes seconds to import."""
    return type(model).__module__.startswith(("lightning.fabric", "lightning_fabric"))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def snapshot(params: Mapping[str, Tensor]) -> Params:
    """A detached copy: the anchor theta*."""
    return {name: p.detach().clone() for name, p in params.items()}


def match(model: nn.Module, anchor: Mapping[str, Tensor]) -> Params:
    """The model's parameters that ``anchor`` names, in its order.

    Raises StaleAnchorError where a name is missing or a shape differs, listing what differs.
    """
    current = dict(model.named_parameters())
    missing = [name for name in anchor if name not in current]
    resized = [
        f"{name}: {tuple(anchor[name].shape)} -> {tuple(current[name].shape)}"
        for name in anchor
        if name in current and current[name].shape != anchor[name].shape
    ]
    if missing or resized:
        parts = []
        if missing:
            new = [name for name in current if name not in anchor]
            parts.append(f"missing from the model: {missing[:5]} (new in it: {new[:5]})")
        if resized:
            parts.append(f"resized: {resized[:5]}")
        raise StaleAnchorError(
            "the prior was made for other parameters; " + "; ".join(parts) + ". "
            "For a head that grew call prior.grow(model); otherwise give the model back its "
            "names and shapes, or start from a fresh prior"
        )
    return {name: current[name] for name in anchor}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode restored after, also when an error is raised."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def move(
    value: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """A tensor or a mapping of tensors on a device; only floating tensors change dtype."""
    if isinstance(value, Mapping):
        return {key: move(v, device, dtype) for key, v in value.items()}
    if isinstance(value, Unread):
        return value.to(device, dtype)
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def take(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """Rows of a tensor, or of each tensor of a dict; indices count from 0, never from the end."""
    if isinstance(inputs, Mapping):
        return {key: _rows_of(value, index) for key, value in inputs.items()}
    return _rows_of(inputs, index)


def select(inputs: Any, index: Tensor | slice) -> Any:
    """As ``take``, but of ``Unread`` rows nothing is read."""
    return inputs.select(index) if isinstance(inputs, Unread) else take(inputs, index)


def read(inputs: Any) -> Any:
    """``inputs`` as tensors: read, where they are not."""
    return inputs[slice(None)] if isinstance(inputs, Unread) else inputs


def _rows_of(value: Tensor, index: Tensor | slice) -> Tensor:
    if isinstance(value, Unread):
        return value[index]
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.device == value.device:
        return value.index_select(0, index)  # copies whole rows: half the time of value[index]
    return value[index]


def concat(parts: list[Inputs]) -> Inputs:
    """Rows of several inputs, one after another; all tensors or all dicts with the same keys."""
    first = parts[0]
    for part in parts:
        if isinstance(part, Unread):
            return first if len(parts) == 1 else part.join(parts)  # type: ignore[return-value]
    if isinstance(first, Mapping):
        return {key: torch.cat([part[key] for part in parts]) for key in first}  # type: ignore[index]
    return torch.cat(parts)  # type: ignore[arg-type]


def rows(inputs: Inputs) -> int:
    """How many examples: the size of the first dimension."""
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def nbytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of a mapping; None is 0."""
    if value is None:
        return 0
    if isinstance(value, Mapping):
        return sum(nbytes(v) for v in value.values())
    if isinstance(value, Unread):
        return value.num_bytes
    return value.numel() * value.element_size()


def widen(model: nn.Module, name: str, num_outputs: int) -> None:
    """Give the linear layer ``name`` (as in ``get_submodule``) more outputs, in place.

    The old rows keep their weights; the new ones start as a fresh ``nn.Linear``. Then call
    ``prior.grow(model)`` and hand the model's parameters to the optimiser again.
    Raises TypeError where the layer is no ``nn.Linear``, ValueError where it would shrink.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"expected {name!r} to be nn.Linear, got {type(layer).__name__}")
    if num_outputs < layer.out_features:
        raise ValueError(
            f"{name!r} has {layer.out_features} outputs; it can grow, not shrink to {num_outputs}"
        )
    weight = layer.weight
    wider = nn.Linear(
        layer.in_features,
        num_outputs,
        bias=layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        wider.weight[: layer.out_features] = weight
        if layer.bias is not None:
            wider.bias[: layer.out_features] = layer.bias
    wider.train(layer.training)
    model.set_submodule(name, wider)


def require_finite(value: Tensor, what: str) -> None:
    """Raise NonFiniteError naming ``what`` where a value is NaN or infinite."""
    # A sum is one pass, and finite only if all is; where it overflows, look at each number.
    if not math.isfinite(float(value.detach().sum())) and not torch.isfinite(value).all():
        raise NonFiniteError(
            f"{what} is NaN or infinite; lower the learning rate, clip the gradient, or look at "
            "the inputs of this batch. Nothing was changed"
        )


@lru_cache
def multiplies_bfloat16(device: str = "cpu") -> bool:
    """Whether a type of device has units for bfloat16, so that its products are the faster ones."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return device == "cpu" and ("amx_bf16" in flags or "avx512_bf16" in flags)

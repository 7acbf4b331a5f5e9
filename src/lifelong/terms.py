r"""Terms: the three ways in which a prior carries the past, and the regulariser. All in nats.

    R(theta)                              Regulariser    what was believed before any data
    <g, d> + ½ <d, G d>                   WeightTerm     examples that are not kept
    sum_i soft_i D(f*_i, f_i) + hard_i l  MemoryTerm     examples kept with their beliefs or labels
    ½ sum_c Dm_cᵀ K_c⁻¹ Dm_c              KernelTerm     the same, coupled by a GP (FROMP)

with theta* the anchor, d = theta - theta*, f* the outputs there, Dm the change of the mean
outputs. EWC is a WeightTerm with g = 0, a K-prior a MemoryTerm beside a Regulariser, FROMP a
KernelTerm alone, gradient reconstruction the first three together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .curvature import Curvature, Diagonal
from .data import Head
from .divergences import KL, Divergence
from .jacobians import kernel
from .likelihoods import Likelihood
from .memory import Memory
from .models import Inputs, Params, evaluating, match, move, nbytes, parameters


class Term(Protocol):
    """A part of a prior: nats as a function of the model, and a multiple of itself."""

    def __mul__(self, factor: float) -> Any: ...

    @property
    def num_bytes(self) -> int: ...


class WeightSpaceTerm(Term, Protocol):
    """A term that needs the weights alone."""

    def __call__(self, model: nn.Module) -> Tensor: ...


class FunctionSpaceTerm(Term, Protocol):
    """A term that needs outputs at remembered inputs; ``Prior`` shares the forward pass."""

    memory: Memory

    def draw(self, n: int | None, generator: torch.Generator | None) -> Any:
        """An unbiased sample of about n items, with ``.inputs``."""
        ...

    def value(self, f: Tensor, drawn: Any, likelihood: Likelihood) -> Tensor:
        """Nats, from the outputs ``f`` at ``drawn.inputs``."""
        ...


@dataclass(frozen=True)
class Regulariser:
    r"""R(theta) = ½ precision ‖theta - mean‖², a Gaussian prior; ``mean`` None is 0.

    In nats, up to the constant log-normaliser. Covers the trainable parameters of the model.
    Raises ValueError for a negative precision.
    """

    precision: float = 0.0
    mean: Params | None = None

    def __post_init__(self) -> None:
        if not self.precision >= 0:
            raise ValueError(f"precision must not be negative, got {self.precision}")

    def __call__(self, model: nn.Module) -> Tensor:
        params = parameters(model) if self.mean is None else match(model, self.mean)
        if self.precision == 0:
            return _zero(params)
        return 0.5 * self.precision * sum(self._gap(n, p).square().sum() for n, p in params.items())

    def gradient(self, params: Mapping[str, Tensor]) -> Params:
        """nabla R: precision (theta - mean)."""
        return {n: self.precision * self._gap(n, p.detach()) for n, p in params.items()}

    def __mul__(self, factor: float) -> Regulariser:
        return replace(self, precision=self.precision * factor)

    __rmul__ = __mul__

    @property
    def num_bytes(self) -> int:
        return nbytes(self.mean)

    def _gap(self, name: str, value: Tensor) -> Tensor:
        return value if self.mean is None else value - self.mean[name]


class _DiagonalQuadratic(torch.autograd.Function):
    """<d, g + ½ G d> and its gradient in three passes over the weights instead of six each."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, anchor: Tensor, g: Tensor | None, curvature: Tensor) -> Tensor:
        ctx.save_for_backward(p, anchor, g, curvature)
        d = p - anchor
        half = curvature * d * 0.5 if g is None else torch.addcmul(g, curvature, d, value=0.5)
        return torch.dot(d.flatten(), half.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # differentiable itself
        p, anchor, g, curvature = ctx.saved_tensors
        d = p - anchor
        slope = curvature * d if g is None else torch.addcmul(g, curvature, d)
        return grad * slope, None, None, None


@dataclass(frozen=True)
class WeightTerm:
    r"""<g, d> + ½ <d, G d>,  d = theta - anchor: the examples that were not kept, in nats.

    anchor: theta*; gradient: g, or None for 0; curvature: G, or None for 0.
    Raises StaleAnchorError where the model's names or shapes are no longer the anchor's.
    """

    anchor: Params
    gradient: Params | None = None
    curvature: Curvature | None = None

    def __call__(self, model: nn.Module) -> Tensor:
        params = match(model, self.anchor)
        if isinstance(self.curvature, Diagonal):
            g = self.gradient or {}
            return sum(
                (
                    _DiagonalQuadratic.apply(p, self.anchor[n], g.get(n), self.curvature.values[n])
                    for n, p in params.items()
                ),
                start=_zero(params),
            )
        d = {n: p - self.anchor[n] for n, p in params.items()}
        value = _zero(params)
        if self.gradient is not None:
            value = value + sum((self.gradient[n] * d[n]).sum() for n in d)
        if self.curvature is not None:
            value = value + 0.5 * self.curvature.quad(d)
        return value

    def slope(self, params: Mapping[str, Tensor]) -> Params:
        """Its gradient g + G d at other weights."""
        d = {n: params[n].detach() - a for n, a in self.anchor.items()}
        slope = {n: torch.zeros_like(v) for n, v in d.items()}
        if self.curvature is not None:
            slope = self.curvature.mv(d)
        if self.gradient is not None:
            slope = {n: slope[n] + self.gradient[n] for n in slope}
        return slope

    def __mul__(self, factor: float) -> WeightTerm:
        gradient = self.gradient
        return replace(
            self,
            gradient=None if gradient is None else {n: factor * g for n, g in gradient.items()},
            curvature=None if self.curvature is None else self.curvature * factor,
        )

    __rmul__ = __mul__

    @property
    def num_bytes(self) -> int:
        curvature = 0 if self.curvature is None else self.curvature.num_bytes
        return nbytes(self.anchor) + nbytes(self.gradient) + curvature


@dataclass(frozen=True)
class MemoryTerm:
    r"""sum_i soft_i D(f*_i, f(x_i)) + hard_i l(y_i, f(x_i)) over the memory, in nats."""

    memory: Memory
    divergence: Divergence = KL()

    def draw(self, n: int | None, generator: torch.Generator | None = None) -> Memory:
        return self.memory.draw(n, generator)

    def value(self, f: Tensor, drawn: Memory, likelihood: Likelihood) -> Tensor:
        """f (B, C): outputs at the drawn inputs."""
        reference = drawn.reference.to(f.dtype)
        table = self.memory.head_masks
        if table is not None:
            mask = table[drawn.head]
            f, reference = likelihood.mask(f, mask), likelihood.mask(reference, mask)
        value = f.new_zeros(())
        if self.has_soft:
            distance = self.divergence(likelihood, reference, f)
            value = value + (drawn.soft_weight * distance).sum()
        if self.has_hard:
            value = value + (drawn.hard_weight * likelihood.nll(f, drawn.labels)).sum()
        return value

    # Asked once for the whole memory, so that a pure replay pays for no divergence.
    @cached_property
    def has_soft(self) -> bool:
        return bool((self.memory.soft_weight != 0).any())

    @cached_property
    def has_hard(self) -> bool:
        return bool((self.memory.hard_weight != 0).any())

    def __mul__(self, factor: float) -> MemoryTerm:
        return replace(self, memory=self.memory.scaled(factor))

    __rmul__ = __mul__

    @property
    def num_bytes(self) -> int:
        return self.memory.num_bytes


@dataclass(frozen=True)
class Block:
    """Remembered examples that a kernel couples: rows start..stop of the memory.

    head: the outputs that compete there; mean (M, H): the mean outputs m* at the anchor, one
    column for each of the head; precision (H, M, M): K_c⁻¹, or None for the identity.
    """

    start: int
    stop: int
    head: Head | None
    mean: Tensor
    precision: Tensor | None

    def value(self, f: Tensor, likelihood: Likelihood) -> Tensor:
        """½ sum_c Dm_cᵀ K_c⁻¹ Dm_c in nats; f (M, C)."""
        gap = likelihood.mean(columns(f, self.head)) - self.mean.to(f.dtype)
        if self.precision is None:
            return 0.5 * gap.square().sum()
        coupled = torch.einsum("cmn,nc->mc", self.precision.to(f.dtype), gap)
        return 0.5 * (gap * coupled).sum()


@dataclass(frozen=True)
class KernelTerm:
    r"""strength · ½ sum_blocks sum_c (m_c - m*_c)ᵀ K_c⁻¹ (m_c - m*_c): FROMP's functional prior.

    m_c: the mean output of class c (a softmax probability) at the block's inputs;
    K_c = A_c Sigma A_cᵀ + jitter I with A_c its Jacobian at the anchor and
    Sigma = (curvature + precision)⁻¹ the Laplace covariance of the weights. One independent
    Gaussian for each class, since over all classes K is singular (probabilities sum to 1).
    The gradient is one vector-Jacobian product of this scalar.

    In a mini-batch whole blocks are drawn, at least one: a kernel couples its block, so single
    rows of it would not give an unbiased estimate with a positive value.
    Source: Pan et al. 2020, eq. 9 to 11.
    """

    memory: Memory
    blocks: tuple[Block, ...]
    strength: float = 1.0

    def draw(self, n: int | None, generator: torch.Generator | None = None) -> Drawn:
        count = len(self.blocks)
        if n is None or n >= len(self.memory) or count <= 1:
            return Drawn(self.memory.inputs, self.blocks, 1.0)
        wanted = max(1, min(count, n * count // len(self.memory)))
        chosen = torch.randperm(count, generator=generator)[:wanted].tolist()
        blocks = tuple(self.blocks[i] for i in chosen)
        rows = torch.cat([torch.arange(b.start, b.stop) for b in blocks])
        return Drawn(self.memory[rows].inputs, blocks, count / wanted)

    def value(self, f: Tensor, drawn: Drawn, likelihood: Likelihood) -> Tensor:
        sizes = [block.stop - block.start for block in drawn.blocks]
        parts = zip(drawn.blocks, f.split(sizes), strict=True)
        total = sum((b.value(part, likelihood) for b, part in parts), start=f.new_zeros(()))
        return self.strength * drawn.scale * total

    def __mul__(self, factor: float) -> KernelTerm:
        return replace(self, strength=self.strength * factor)

    __rmul__ = __mul__

    @property
    def num_bytes(self) -> int:
        blocks = sum(nbytes(b.mean) + nbytes(b.precision) for b in self.blocks)
        return self.memory.num_bytes + blocks


@dataclass(frozen=True)
class Drawn:
    """Whole blocks of a ``KernelTerm``: their inputs in order, and the factor that unbiases."""

    inputs: Inputs
    blocks: tuple[Block, ...]
    scale: float


def columns(f: Tensor, head: Head | None) -> Tensor:
    """The outputs of a head alone, (B, H); all of them for None."""
    return f if head is None else f[:, list(head)]


def kernel_term(
    model: nn.Module,
    memory: Memory,
    likelihood: Likelihood,
    *,
    variance: Params | None,
    jitter: float,
    strength: float,
) -> KernelTerm:
    """A ``KernelTerm`` at the model's present weights: one block for each task in the memory.

    variance: the diagonal of Sigma, or None for K = I (FROMP-L2). Cost: M² P for each block.
    Raises ValueError where a kernel is not positive definite, with a jitter that would do.
    """
    order = torch.sort(memory.task, stable=True).indices
    memory = memory[order].refresh(model)
    blocks = []
    tasks, counts = torch.unique_consecutive(memory.task, return_counts=True)
    start = 0
    for task, count in zip(tasks.tolist(), counts.tolist(), strict=True):
        rows = memory[slice(start, start + count)]
        heads = {memory.heads[int(h)] for h in rows.head.unique()}
        if len(heads) > 1:
            raise ValueError(f"task {task} has examples of several heads {heads}; give each a task")
        head = heads.pop()
        mean = likelihood.mean(columns(rows.reference, head))
        precision = None
        if variance is not None:
            mask = rows.mask
            with evaluating(model):
                k = kernel(
                    model,
                    rows.inputs,
                    variance,
                    likelihood=likelihood,
                    mask=None if mask is None else mask[0],
                )
            precision = _inverse(k if head is None else k[list(head)], jitter)
        blocks.append(Block(start, start + count, head, mean, precision))
        start += count
    return KernelTerm(memory, tuple(blocks), strength)


def _inverse(k: Tensor, jitter: float) -> Tensor:
    """(K + jitter I)⁻¹ for each class by Cholesky: (H, M, M), in float64 inside.

    The jitter is never below the rounding error of K in its own dtype, which can make a float32
    kernel of near copies indefinite.
    """
    eye = torch.eye(k.shape[-1], dtype=torch.float64, device=k.device)
    rounding = torch.finfo(k.dtype).eps * k.diagonal(dim1=-2, dim2=-1).sum(-1).double()
    jitters = rounding.clamp(min=jitter)[:, None, None]
    factor, info = torch.linalg.cholesky_ex(k.double() + jitters * eye)
    if bool((info != 0).any()):
        lowest = float(torch.linalg.eigvalsh(k.double()).min())
        raise ValueError(
            f"the memory kernel is not positive definite with jitter={jitter:g}; "
            f"its smallest eigenvalue is {lowest:.3g}, so jitter={2 * abs(lowest):.1g} would do"
        )
    return torch.cholesky_inverse(factor).to(k.dtype)


def _zero(params: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(params.values()), torch.zeros(()))
    return torch.zeros((), dtype=first.dtype, device=first.device)


def to(term: Any, device: Any = None, dtype: torch.dtype | None = None) -> Any:
    """A term on another device or in another floating dtype."""
    if isinstance(term, Regulariser):
        return replace(term, mean=None if term.mean is None else move(term.mean, device, dtype))
    if isinstance(term, WeightTerm):
        gradient, curvature = term.gradient, term.curvature
        return replace(
            term,
            anchor=move(term.anchor, device, dtype),
            gradient=None if gradient is None else move(gradient, device, dtype),
            curvature=None if curvature is None else curvature.to(device, dtype),
        )
    if isinstance(term, MemoryTerm):
        return replace(term, memory=term.memory.to(device, dtype))
    if isinstance(term, KernelTerm):
        blocks = tuple(
            replace(
                b,
                mean=move(b.mean, device, dtype),
                precision=None if b.precision is None else move(b.precision, device, dtype),
            )
            for b in term.blocks
        )
        return replace(term, memory=term.memory.to(device, dtype), blocks=blocks)
    raise TypeError(f"cannot move a term of type {type(term).__name__}")

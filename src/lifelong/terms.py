r"""Terms: the three ways in which a prior carries the past, and the regulariser. All in nats.

    R(theta)                              Regulariser    what was believed before any data
    <g, d> + ½ <d, G d>                   WeightTerm     examples that are not kept
    sum_i soft_i D(f*_i, f_i) + hard_i l  MemoryTerm     examples kept with their beliefs or labels
    ½ sum_c Dm_cᵀ K_c⁻¹ Dm_c              KernelTerm     the same, coupled by a GP (FROMP)

with theta* the anchor, d = theta - theta*, f* the outputs there, Dm the change of the mean
outputs. EWC is a WeightTerm with g = 0, a K-prior a MemoryTerm beside a Regulariser, FROMP a
KernelTerm alone, gradient reconstruction the first three together.

A term of the user's own is any ``WeightSpaceTerm``, a belief beside R (``is_own``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import divergences
from .curvature import BlockDiagonal, Curvature, Diagonal, Kronecker
from .curvature import from_state_dict as curvature_from_state_dict
from .curvature.block_diagonal import is_rounded
from .data import Head
from .divergences import KL, Divergence
from .groups import Groups
from .jacobians import kernel
from .likelihoods import Likelihood
from .memory import Memory, Sample
from .models import Inputs, Params, evaluating, match, move, nbytes, parameters, read, take
from .named import named, unnamed
from .sharded import is_sharded, like, local, over_ranks, require_alike, whole


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


@dataclass(frozen=True, eq=False)
class Regulariser:
    r"""R(theta) = ½ precision ‖theta - mean‖², a Gaussian prior; ``mean`` None is 0.

    In nats, up to the constant log-normaliser. Covers the parameters that ``mean`` names; for None
    the trainable ones of the model.
    Raises ValueError for a precision that is negative, NaN or infinite.
    """

    precision: float = 0.0
    mean: Params | None = None

    def __post_init__(self) -> None:
        if not (self.precision >= 0 and math.isfinite(self.precision)):
            raise ValueError(f"precision must be finite and not negative, got {self.precision}")

    def __call__(self, model: nn.Module) -> Tensor:
        params = parameters(model) if self.mean is None else match(model, self.mean)
        if self.precision == 0:
            return _zero(params)
        mean = {n: local(m) for n, m in (self.mean or {}).items()}
        return quadratic({n: Part(mean.get(n), None, self.precision) for n in params}, params)

    def sharded_like(self, params: Mapping[str, Tensor]) -> Regulariser:
        """With the mean sharded as the parameters of these names are."""
        mean = self.mean
        return (
            self
            if mean is None
            else replace(self, mean={n: like(m, params[n]) for n, m in mean.items()})
        )

    def whole(self) -> Regulariser:
        """With all of the mean on every rank."""
        if self.mean is None:
            return self
        return replace(self, mean={n: whole(m) for n, m in self.mean.items()})

    def gradient(self, params: Mapping[str, Tensor]) -> Params:
        """nabla R: precision (theta - mean), and 0 of what R does not cover."""
        return {n: self.precision * self._gap(n, p.detach()) for n, p in params.items()}

    def __mul__(self, factor: float) -> Regulariser:
        return replace(self, precision=self.precision * factor)

    __rmul__ = __mul__

    @property
    def num_bytes(self) -> int:
        return nbytes(self.mean)

    def _gap(self, name: str, value: Tensor) -> Tensor:
        if self.mean is None:
            return value
        return value - self.mean[name] if name in self.mean else torch.zeros_like(value)


class Part(NamedTuple):
    """<g, d> + ½ <d, G d> of one parameter, d = theta - anchor; None is 0, a number G is G I."""

    anchor: Tensor | None
    gradient: Tensor | None
    curvature: Tensor | float | None

    def gap(self, p: Tensor) -> Tensor:
        d = p if self.anchor is None else p - self.anchor
        return d.to(self.curvature.dtype) if isinstance(self.curvature, Tensor) else d

    def slope(self, d: Tensor) -> tuple[Tensor, float]:
        """g + G d, as a tensor times a number: an isotropic G costs no pass over the weights."""
        if self.curvature is None:
            return (torch.zeros_like(d) if self.gradient is None else self.gradient), 1.0
        if isinstance(self.curvature, Tensor):
            if self.gradient is None:
                return self.curvature * d, 1.0
            return torch.addcmul(self.gradient, self.curvature, d), 1.0
        if self.gradient is None:
            return d, self.curvature
        return torch.add(self.gradient, d, alpha=self.curvature), 1.0


class _Quadratic(torch.autograd.Function):
    """The sum of ``Part`` over parameters, and ½ <d, G d> of a curvature that is not diagonal, in
    few passes over the weights, and no more in backward.

    A step of a small network is bound by such passes: autograd's own would be a dozen, and one
    more product with G.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: Mapping[str, Part], curvature: Curvature | None, *params: Tensor
    ) -> Tensor:
        ctx.parts, ctx.curvature = parts, curvature
        ctx.save_for_backward(*params)
        gaps = [part.gap(p) for part, p in zip(parts.values(), params, strict=True)]
        ctx.slopes = _slopes(parts, curvature, gaps)
        twice = params[0].new_zeros(())
        for part, d, (slope, factor) in zip(parts.values(), gaps, ctx.slopes, strict=True):
            # <d, g + ½ G d> = ½ <d, slope> + ½ <d, g>
            twice = torch.add(twice, _dot(d, slope), alpha=factor)
            if part.gradient is not None:
                twice = twice + _dot(d, part.gradient)
        return 0.5 * twice

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # differentiable itself
        params, slopes = ctx.saved_tensors, ctx.slopes
        if torch.is_grad_enabled():  # create_graph: as functions of the parameters
            gaps = [part.gap(p) for part, p in zip(ctx.parts.values(), params, strict=True)]
            slopes = _slopes(ctx.parts, ctx.curvature, gaps)
        grads = ((factor * grad) * slope for slope, factor in slopes)
        return None, None, *(g.to(p.dtype) for g, p in zip(grads, params, strict=True))


def _slopes(
    parts: Mapping[str, Part], curvature: Curvature | None, gaps: Sequence[Tensor]
) -> list[tuple[Tensor, float]]:
    """g + G d of each parameter, as a tensor times a number."""
    if curvature is None:
        return [part.slope(d) for part, d in zip(parts.values(), gaps, strict=True)]
    products = curvature.mv(dict(zip(parts, gaps, strict=True)))
    found = []
    for (name, part), d in zip(parts.items(), gaps, strict=True):
        slope = products[name].to(d.dtype)
        if part.gradient is not None or part.curvature is not None:
            more, factor = part.slope(d)
            slope = torch.add(slope, more, alpha=factor)
        found.append((slope, 1.0))
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten().to(b.dtype), b.flatten())


def quadratic(
    parts: Mapping[str, Part],
    params: Mapping[str, Tensor],
    curvature: Curvature | None = None,
    constant: float = 0.0,
) -> Tensor:
    """The sum of ``parts`` at the parameters of the same names, ½ <d, G d> of a curvature of all of
    them, and a constant, in nats; differentiable twice.

    Of sharded parameters the parts are of this rank's shards, and the sum is over all ranks.
    Raises ValueError for parameters of which some are sharded, or in different ways, for a
    curvature that cannot be, and for parts of another sharding.
    """
    if not params:
        return _zero(params)
    chosen = {n: parts[n] for n in params}
    mine: Mapping[str, Tensor] = params
    if any(is_sharded(p) for p in params.values()):
        require_alike(params)
        if curvature is not None:
            raise ValueError(
                "a curvature of whole layers cannot be used with sharded parameters; expected "
                'structure="diagonal"'
            )
        mine = {n: local(p) for n, p in params.items()}
    for name, part in chosen.items():
        if part.anchor is not None and part.anchor.shape != mine[name].shape:
            raise ValueError(
                f"prior and model are not sharded alike ({name}: {tuple(part.anchor.shape)} and "
                f"{tuple(mine[name].shape)}); call prior.sharded_like(model), or prior.whole()"
            )
    value = _Quadratic.apply(chosen, curvature, *mine.values())
    return over_ranks(value + constant if constant else value, params.values())  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class WeightTerm:
    r"""<g, d> + ½ <d, G d>,  d = theta - anchor: the examples that were not kept, in nats.

    anchor: theta*; gradient: g, or None for 0; curvature: G, or None for 0; groups: the shares of
    g and G that can be forgotten unseen (``groups.py``); they take no part in the value.
    Raises StaleAnchorError where the model's names or shapes are no longer the anchor's.
    """

    anchor: Params
    gradient: Params | None = None
    curvature: Curvature | None = None
    groups: Groups | None = None

    def __call__(self, model: nn.Module) -> Tensor:
        return self.value(match(model, self.anchor), self.parts)

    def value(self, params: Params, parts: Mapping[str, Part], constant: float = 0.0) -> Tensor:
        """``parts``, and the curvature that is not diagonal, at these parameters."""
        diagonal = isinstance(self.curvature, Diagonal)  # which is in the parts
        return quadratic(parts, params, None if diagonal else self.curvature, constant)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The quadratic by parameter, of this rank's shards where they are sharded; a curvature
        that is not diagonal is not in it."""
        g = self.gradient or {}
        values = self.curvature.values if isinstance(self.curvature, Diagonal) else {}

        def own(x: Tensor | None) -> Tensor | None:
            return None if x is None else local(x)

        return {
            n: Part(local(a), own(g.get(n)), own(values.get(n))) for n, a in self.anchor.items()
        }

    def sharded_like(self, params: Mapping[str, Tensor]) -> WeightTerm:
        """Anchor, g and a diagonal G sharded as the parameters of these names are.

        Raises ValueError for another G.
        """
        if not isinstance(self.curvature, Diagonal | None):
            raise ValueError(
                f"a {type(self.curvature).__name__} curvature cannot be sharded; expected "
                'structure="diagonal"'
            )
        return self._each(lambda name, x: like(x, params[name]))

    def whole(self) -> WeightTerm:
        """With all of anchor, g and G on every rank."""
        return self._each(lambda _, x: whole(x))

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> WeightTerm:
        def of(values: Params | None) -> Params | None:
            return None if values is None else {n: change(n, x) for n, x in values.items()}

        curvature = self.curvature
        if isinstance(curvature, Diagonal):
            curvature = Diagonal(of(curvature.values))  # type: ignore[arg-type]
        return replace(
            self, anchor=of(self.anchor), gradient=of(self.gradient), curvature=curvature
        )

    def rounded(self, dtype: torch.dtype) -> WeightTerm:
        """With the Kronecker factors of G in ``dtype``, for training; itself where G has none."""
        if not isinstance(self.curvature, BlockDiagonal | Kronecker):
            return self
        return replace(self, curvature=self.curvature.rounded(dtype))

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
            groups=None if self.groups is None else self.groups * factor,
        )

    __rmul__ = __mul__

    @property
    def num_bytes(self) -> int:
        curvature = 0 if self.curvature is None else self.curvature.num_bytes
        groups = 0 if self.groups is None else self.groups.num_bytes
        return nbytes(self.anchor) + nbytes(self.gradient) + curvature + groups


@dataclass(frozen=True, eq=False)
class Completed:
    """A regulariser and a weight term in one quadratic round the anchor a:

        R(theta) = R(a) + <delta (a - m), d> + ½ delta <d, d>.

    Saves passes over the weights, all of g where that is minus R's gradient (EWC, K-priors).
    """

    regulariser: Regulariser
    weight: WeightTerm

    def __call__(self, model: nn.Module) -> Tensor:
        params, anchor = parameters(model), self.weight.anchor
        # A regulariser round 0 covers every trainable parameter, also those without an anchor.
        if params.keys() != anchor.keys() or any(
            params[n].shape != anchor[n].shape for n in anchor
        ):
            return self.regulariser(model) + self.weight(model)
        return self.weight.value({n: params[n] for n in anchor}, self.parts, self.constant)

    @cached_property
    def parts(self) -> dict[str, Part]:
        parts, delta = {}, self.regulariser.precision
        slope = {n: local(x) for n, x in self.regulariser.gradient(self.weight.anchor).items()}
        for n, part in self.weight.parts.items():
            g = slope[n] if part.gradient is None else part.gradient + slope[n]
            curvature = delta if part.curvature is None else part.curvature + delta
            parts[n] = Part(part.anchor, g if bool(g.any()) else None, curvature)
        return parts

    @cached_property
    def constant(self) -> float:
        """R(a), of this rank's shards."""
        gaps = (local(self.regulariser._gap(n, a)).double() for n, a in self.weight.anchor.items())
        return 0.5 * self.regulariser.precision * sum(float(gap.square().sum()) for gap in gaps)


def is_own(term: Any) -> bool:
    """Whether it is a term of the user's own. Nothing of the data is in it, so that it stays as it
    is, like R, whatever is learned, forgotten or believed less."""
    return not isinstance(term, (Regulariser, WeightTerm, MemoryTerm, KernelTerm))


def is_belief(term: Any) -> bool:
    """Whether nothing of the data is in it: R, and the user's own."""
    return isinstance(term, Regulariser) or is_own(term)


def belief_gradient(term: Any, model: nn.Module, params: Mapping[str, Tensor]) -> Params:
    """∇ of R or of a term of the user's own at the model's weights."""
    if isinstance(term, Regulariser):
        return term.gradient(params)
    with torch.enable_grad():
        value = term(model)
        if not value.requires_grad:
            return {n: torch.zeros_like(p) for n, p in params.items()}
        found = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
    return dict(zip(params, found, strict=True))


def complete(terms: Iterable[Any]) -> list[Callable[[nn.Module], Tensor]]:
    """The weight-space terms among ``terms``, a regulariser and a weight term as one."""
    held: list[Any] = [t for t in terms if not isinstance(t, (MemoryTerm, KernelTerm))]
    regulariser = next((t for t in held if isinstance(t, Regulariser) and t.precision), None)
    weight = next((t for t in held if isinstance(t, WeightTerm)), None)
    if regulariser is None or weight is None:
        return held
    if regulariser.mean is not None and regulariser.mean.keys() != weight.anchor.keys():
        return held
    held.remove(regulariser)  # once: in p + p the same term occurs twice
    held.remove(weight)
    return [Completed(regulariser, weight), *held]


@dataclass(frozen=True, eq=False)
class MemoryTerm:
    r"""sum_i soft_i D(f*_i, f(x_i)) + hard_i l(y_i, f(x_i)) over the memory, in nats."""

    memory: Memory
    divergence: Divergence = field(default_factory=KL)

    def draw(self, n: int | None, generator: torch.Generator | None = None) -> Memory | Sample:
        return self.memory.sample(n, generator)

    def num_drawn(self, n: int | None) -> int:
        """How many items ``draw`` gives."""
        return len(self.memory) if n is None else min(len(self.memory), n)

    def value(
        self,
        f: Tensor,
        drawn: Memory | Sample,
        likelihood: Likelihood,
        reference: Tensor | None = None,
    ) -> Tensor:
        """f (B, C): outputs at the drawn inputs; reference (B, C): f*, the stored ones for None."""
        said: Tensor = read(drawn.reference) if reference is None else reference
        said = said.to(f.dtype)
        table = self.memory.head_masks
        if table is not None:
            mask = table[drawn.head]
            f, said = likelihood.mask(f, mask), likelihood.mask(said, mask)
        values = []
        if self.has_soft:
            distance = self.divergence(likelihood, said, f)
            values.append(torch.dot(drawn.soft_weight.to(distance.dtype), distance))
        if self.has_hard:
            nll = likelihood.nll(f, drawn.labels)
            values.append(torch.dot(drawn.hard_weight.to(nll.dtype), nll))
        return sum(values[1:], start=values[0]) if values else f.new_zeros(())

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


class _Mahalanobis(torch.autograd.Function):
    """½ sum_c Dm_cᵀ K_c⁻¹ Dm_c: gap (M, C), precision (C, M, M), symmetric.

    Its gradient K_c⁻¹ Dm_c is at hand after the forward pass, so the kernels are read once a step.
    """

    @staticmethod
    def forward(ctx: Any, gap: Tensor, precision: Tensor) -> Tensor:
        coupled = _couple(precision, gap)
        ctx.save_for_backward(gap, precision, coupled)
        return 0.5 * (gap * coupled).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # differentiable itself
        gap, precision, coupled = ctx.saved_tensors
        return grad * (_couple(precision, gap) if torch.is_grad_enabled() else coupled), None


def _couple(precision: Tensor, gap: Tensor) -> Tensor:
    """K_c⁻¹ Dm_c for each class, (M, C)."""
    # As Dm_cᵀ K_c⁻¹, the same by symmetry: a third of the time of einsum's matrix times vector.
    return torch.bmm(gap.T.unsqueeze(1), precision).squeeze(1).T


@dataclass(frozen=True, eq=False)
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
        return _Mahalanobis.apply(gap, self.precision.to(f.dtype))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
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

    def num_drawn(self, n: int | None) -> int:
        """How many items ``draw`` gives, on average where blocks differ in size."""
        return round(len(self.memory) * self._wanted(n) / max(1, len(self.blocks)))

    def _wanted(self, n: int | None) -> int:
        """Blocks that are drawn for about n items: whole ones, at least one."""
        count = len(self.blocks)
        if n is None or n >= len(self.memory) or count <= 1:
            return count
        return max(1, min(count, n * count // len(self.memory)))

    def draw(self, n: int | None, generator: torch.Generator | None = None) -> Drawn:
        count, wanted = len(self.blocks), self._wanted(n)
        if wanted == count:
            return Drawn(self.memory.inputs, self.blocks, 1.0)
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


@dataclass(frozen=True, eq=False)
class Drawn:
    """Whole blocks of a ``KernelTerm``: their inputs in order, and the factor that unbiases."""

    inputs: Inputs
    blocks: tuple[Block, ...]
    scale: float

    def __len__(self) -> int:
        return sum(block.stop - block.start for block in self.blocks)

    def part(self, rank: int, size: int) -> Drawn:
        """Every ``size``-th block, as ``Memory.part``: a kernel couples its block."""
        ends = list(accumulate(b.stop - b.start for b in self.blocks))
        mine = range(rank, len(ends), size)
        rows = [torch.arange(ends[i - 1] if i else 0, ends[i]) for i in mine]
        index = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
        blocks = tuple(self.blocks[i] for i in mine)
        return Drawn(take(self.inputs, index), blocks, self.scale * size)


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
        mean = likelihood.mean(columns(rows.outputs, head))
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
            groups=None if term.groups is None else term.groups.to(device, dtype),
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
    return term.to(device, dtype) if hasattr(term, "to") else term


def term_state(term: Any) -> dict[str, Any]:
    """Nested dict of tensors and plain values, as ``checkpoint.save`` takes it.

    Of a term of the user's own only the name of its class: whoever loads it gives it again.
    Raises TypeError for what ``rounded`` gives.
    """
    if isinstance(term, WeightTerm) and is_rounded(term.curvature):
        raise TypeError(
            "a rounded prior (Prior.rounded) is for training and not to be kept; save the prior "
            "that it was made of"
        )
    if isinstance(term, Regulariser):
        return {"name": "Regulariser", "precision": term.precision, "mean": term.mean}
    if isinstance(term, WeightTerm):
        curvature = None if term.curvature is None else term.curvature.state_dict()
        return {
            "name": "WeightTerm",
            "anchor": term.anchor,
            "gradient": term.gradient,
            "curvature": curvature,
            "groups": None if term.groups is None else term.groups.state_dict(),
        }
    if isinstance(term, MemoryTerm):
        return {
            "name": "MemoryTerm",
            "memory": term.memory.state_dict(),
            "divergence": named(term.divergence),
        }
    if isinstance(term, KernelTerm):
        blocks = [
            {**vars(b), "head": None if b.head is None else list(b.head)} for b in term.blocks
        ]
        return {
            "name": "KernelTerm",
            "memory": term.memory.state_dict(),
            "blocks": blocks,
            "strength": term.strength,
        }
    return {"name": "own", "kind": type(term).__name__}


def terms_from_states(
    states: Sequence[Mapping[str, Any]], own: Sequence[Any] = ()
) -> tuple[Any, ...]:
    """The terms that ``term_state`` was taken of; own: those of the user's own, in their order.

    Raises ValueError for one that is not known, and where ``own`` are not those that were saved.
    """
    saved = [state["kind"] for state in states if state["name"] == "own"]
    given = [type(term).__name__ for term in own]
    if saved != given:
        raise ValueError(
            f"expected the terms of the user's own that were there when it was saved, own="
            f"[{', '.join(saved)}], got [{', '.join(given)}]: a file holds no code"
        )
    rest = iter(own)
    return tuple(next(rest) if s["name"] == "own" else term_from_state(s) for s in states)


def term_from_state(state: Mapping[str, Any]) -> Any:
    """The term that ``term_state`` was taken of; ValueError for one that is not known."""
    name = state["name"]
    if name == "Regulariser":
        return Regulariser(state["precision"], state["mean"])
    if name == "WeightTerm":
        curvature, groups = state["curvature"], state["groups"]
        return WeightTerm(
            state["anchor"],
            state["gradient"],
            None if curvature is None else curvature_from_state_dict(curvature),
            None if groups is None else Groups.from_state_dict(groups),
        )
    if name == "MemoryTerm":
        divergence = unnamed(divergences, state["divergence"])
        return MemoryTerm(Memory.from_state_dict(state["memory"]), divergence)
    if name == "KernelTerm":
        blocks = tuple(
            Block(**{**b, "head": None if b["head"] is None else tuple(b["head"])})
            for b in state["blocks"]
        )
        return KernelTerm(Memory.from_state_dict(state["memory"]), blocks, state["strength"])
    raise ValueError(f"unknown term {name!r}; a newer version may have written this file")

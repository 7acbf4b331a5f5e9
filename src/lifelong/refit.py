r"""Refit: from the anchor to the minimum of what the data and the past say.

    theta = argmin sum_i l(y_i, f(x_i)) + prior(theta)     in nats

Every adaptation is a change of the prior and this: add data (pass them), remove them
(``prior.forget``), change the regulariser (``prior.replace``), change the model
(``prior.transfer``). It starts at the model's present weights, which for an adaptation are the
anchor, already near the end, so that it takes few steps; and second-order ones where the
objective is convex:

    newton  H from the GGN of all examples where the weights are few (it is the Hessian of a
            model whose outputs are affine in its weights); otherwise conjugate gradients on
            Hessian products, which stop where the curvature turns negative
    lbfgs   full batch; for networks
    adam    mini-batches; for networks with more data than a full pass a step can afford

The objective is one function of the weights: all is read in eval mode, without dropout and with
the running statistics of normalisation layers as they are. Training with augmentation or in
training mode is ``Learner.fit``, or a loop of one's own with ``prior.loss``.
Sources: Khan & Swaroop 2021 (start at the old solution); Nocedal & Wright 2006 (7.1, 7.2);
Hager & Zhang 2005 (the line search near a minimum).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .curvature import Diagonal, dense_curvature
from .data import (
    BATCH_SIZE,
    Batch,
    Data,
    Examples,
    Head,
    as_data,
    batches,
    head_mask,
    head_of,
    num_examples,
    require_repeatable,
)
from .divergences import KL, Logit
from .errors import NonFiniteError, NotConvergedError
from .hooks import upcast
from .likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from .memory import Memory
from .models import concat, evaluating, forward, move, parameters, require_finite, rows, take
from .prior import Prior
from .recall import by_head
from .removal import indefinite
from .terms import KernelTerm, MemoryTerm, Regulariser, WeightTerm

Method = Literal["auto", "newton", "lbfgs", "adam"]

_DENSE = 1024  # weights, up to which Newton's matrix is formed
_FULL_BATCH = 20_000  # examples, up to which "auto" takes L-BFGS for a network
_HISTORY = 20  # pairs of L-BFGS
_IDLE = 10  # steps, or trials of a line search, without progress
_INNER = 250  # Hessian products in one Newton step
_STEPS = {"newton": 50, "lbfgs": 500}
_EPOCHS = 20  # of Adam
_REMOVAL = 10  # steps after a removal from a network


@dataclass(frozen=True)
class Refit:
    """What a refit came to and what it cost.

    method: the one that was used. iterations: steps taken. gradients: backpropagated examples:
    each example counts once for each gradient, each Hessian product, and each column of a factor
    of its Hessian (C of them); value-only passes count 0. passes: over all data and memory, of
    gradients and products together. seconds: of wall clock. value: of the objective at the end,
    nats. gradient_norm: ‖gradient‖ there, nats; relative_norm: beside the sum of the norms of its
    parts (data, regulariser, quadratic, memory), which cancel at a minimum, and of the value over
    1 + ‖weights‖. converged: whether that is within the tolerance, or no step changes the weights
    any more.
    """

    method: str
    iterations: int
    gradients: int
    passes: float
    seconds: float
    gradient_norm: float
    relative_norm: float
    value: float
    converged: bool


def refit(
    model: nn.Module,
    prior: Prior,
    data: Data | None = None,
    *,
    method: Method = "auto",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    head: Head | None = None,
    batch_size: int = BATCH_SIZE,
    lr: float = 1e-3,
    minibatch: int = 64,
    generator: torch.Generator | None = None,
) -> Refit:
    r"""Minimise sum_i l(y_i, f(x_i)) + prior(theta), nats, from the model's present weights, in
    place.

    data: new examples, under ``head`` (by default the one that they carry); None for the past
    alone. method: "auto" takes Newton where the objective is shown to be convex (``is_convex``),
    else L-BFGS up to 20,000 examples of data and memory, else Adam. tolerance: of the relative
    norm of the gradient (see ``Refit``); by default 4e-10 in float64 and 7e-5 in float32.
    max_iterations: steps; by default 50 (newton), 500 (lbfgs) or 20 epochs (adam). batch_size:
    of passes, which decides no number. lr, minibatch, generator: of Adam, whose rate falls to 0
    along a cosine; by default a generator of seed 0.

    A refit that ends before it has converged is usable, and says so. Raises ValueError or
    TypeError for labels that do not fit, NotRepeatableError for data that two passes read
    differently, NonFiniteError where the objective is NaN or infinite, NotConvergedError where it
    did not fall, StaleAnchorError for a model that the prior does not know: the weights are then
    as they were. ``.grad``, modes and the global random state are left alone.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    for name, count in (("max_iterations", max_iterations), ("minibatch", minibatch)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    for name, number in (("tolerance", tolerance), ("lr", lr)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}")
    start = time.perf_counter()
    if data is not None:
        require_repeatable(data)
    objective = _Objective(model, prior, data, _head(data, head), batch_size)
    if not objective.params:
        raise ValueError("the model has no trainable parameters; set requires_grad on some")
    enough: float = tolerance or torch.finfo(objective.dtype).eps ** 0.6
    before = objective.weights()
    try:
        with evaluating(model), torch.enable_grad():
            if method == "auto":
                method = _choice(objective)
            if method == "adam":
                generator = generator or torch.Generator().manual_seed(0)
                descent = _adam(objective, max_iterations, lr, minibatch, generator, enough)
            else:
                direction = _newton_direction if method == "newton" else _lbfgs_direction
                steps = max_iterations or _STEPS[method]
                descent = _descend(objective, direction(objective), steps, enough)
    except BaseException:
        objective.move_to(before)
        raise
    return Refit(
        method=method,
        iterations=descent.iterations,
        gradients=objective.gradients,
        passes=objective.gradients / max(1, objective.size),
        seconds=time.perf_counter() - start,
        gradient_norm=descent.point.norm,
        relative_norm=descent.point.relative,
        value=descent.point.value,
        converged=descent.converged,
    )


def is_convex(model: nn.Module, prior: Prior, data: Data | None = None) -> bool:
    """Whether sum l + prior is shown to be convex in the trainable parameters. Never wrongly True
    for a likelihood of the library, whichever inputs are read along one path of the model's code;
    False where it cannot be shown.

    The outputs must be affine in the weights (read off autograd's graph of one batch: a linear
    model, or a frozen body with a linear head), so that each l and divergence, convex in the
    outputs, is convex in them; weights of items and curvatures must not be negative (of a block
    of more than 1,024 weights as far as Lanczos sees: ``removal.indefinite``).
    """
    objective = _Objective(model, prior, data, None, BATCH_SIZE)
    with evaluating(model), torch.enable_grad():
        return objective.convex()


def steps_of_removal(
    model: nn.Module, prior: Prior, method: Method = "auto", max_iterations: int | None = None
) -> tuple[Method, int | None]:
    """(method, max_iterations) of the refit after a removal, where nobody chose them.

    What was removed leaves g by its gradient at the anchor, -<J*ᵀ r, d>, which for a network holds
    near the anchor alone and is not bounded below: a refit to the end leads the weights away
    along all that the memory does not see. A few steps of L-BFGS take what can be trusted; where
    the objective is convex the end is right, and nothing changes.
    """
    if method != "auto" or max_iterations is not None or is_convex(model, prior):
        return method, max_iterations
    return "lbfgs", _REMOVAL


def _head(data: Data | None, head: Head | None) -> Head | None:
    return None if data is None else head_of(data, head)


# -------------------------------------------------------------------- the objective


@dataclass(frozen=True, eq=False)
class _Point:
    """Weights (P,), value and gradient there; scale: what the gradient is to be small beside."""

    weights: Tensor
    value: float
    gradient: Tensor
    scale: float

    @property
    def norm(self) -> float:
        return float(self.gradient.norm())

    @property
    def relative(self) -> float:
        return self.norm / self.scale if self.scale else 0.0


@dataclass(frozen=True)
class _Descent:
    point: _Point
    iterations: int
    converged: bool


class _Objective:
    """sum l + prior as a function of flat weights (P,), a batch at a time; counts what it costs."""

    def __init__(
        self, model: nn.Module, prior: Prior, data: Any, head: Any, batch_size: int
    ) -> None:
        self.model, self.prior, self.head = model, prior, head
        self.data = None if data is None else as_data(data)
        self.batch_size = batch_size
        named = parameters(model)
        self.names, self.params = list(named), list(named.values())
        self.gradients = 0
        self._size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def size(self) -> int:
        """Examples in one pass over data and memory."""
        if self._size is None:
            self._size = sum(count for _, count, _ in self._parts())
        return self._size

    def weights(self) -> Tensor:
        return self._flat(p.detach() for p in self.params)

    @torch.no_grad()
    def move_to(self, weights: Tensor) -> None:
        for p, value in zip(self.params, self._split(weights), strict=True):
            p.copy_(value)

    def at(self, weights: Tensor) -> _Point:
        """Value and gradient, one backward pass over everything; moves the model there."""
        self.move_to(weights)
        value, scale = 0.0, 0.0
        gradient = torch.zeros_like(weights)
        kinds: dict[str, Tensor] = {}
        for kind, count, nats in self._parts():
            part = nats()
            grads = self._grads(part)
            self.gradients += count
            value += float(part.detach())
            kinds[kind] = kinds[kind] + grads if kind in kinds else grads
        for kind in kinds:
            gradient = gradient + kinds[kind]
            scale += float(kinds[kind].norm())
        # A part that is alone cancels with nothing: the gradient that would undo its value.
        scale += abs(value) / (1.0 + float(weights.norm()))
        return _Point(weights, value, gradient, scale)

    def hessian_product(self, v: Tensor) -> Tensor:
        """H v at the present weights, by differentiating twice."""
        total = torch.zeros_like(v)
        for _, count, nats in self._parts():
            grads = self._grads(nats(), create_graph=True)
            self.gradients += count
            if grads.requires_grad:
                total = total + self._grads(grads @ v)
        return total

    def dense(self) -> Tensor:
        """H (P, P) of a convex objective whose memories have the likelihood's own Hessian."""
        total = self._weight_space_hessian()
        held = [t.memory for t in self.prior.terms if isinstance(t, MemoryTerm) and len(t.memory)]
        for group, head in (pair for memory in held for pair in by_head(memory)):
            weights = group.soft_weight + group.hard_weight
            total = total + self._ggn((group.inputs, group.labels), head, weights, len(group))
        if self.data is not None:
            total = total + self._ggn(self.data, self.head, None, self._data_size)
        return total

    def _ggn(self, data: Any, head: Any, weights: Tensor | None, count: int) -> Tensor:
        G = dense_curvature(
            self.model,
            data,
            self.prior.likelihood,
            head=head,
            weights=weights,
            batch_size=self.batch_size,
        )
        outputs = len(head) if head is not None else self._outputs
        self.gradients += count * outputs
        return G.reordered(dict.fromkeys(self.names)).matrix.to(self.dtype)

    def _weight_space_hessian(self) -> Tensor:
        """Constant: of the regulariser and the quadratics, over the trainable parameters."""
        start, positions = 0, {}
        for n, p in zip(self.names, self.params, strict=True):
            positions[n] = torch.arange(start, start + p.numel(), device=p.device)
            start += p.numel()
        H = torch.zeros(start, start, dtype=self.dtype, device=self.params[0].device)
        for term in self.prior.terms:
            if isinstance(term, Regulariser):
                covered = positions if term.mean is None else term.mean
                index = torch.cat([positions[n] for n in covered if n in positions])
                H[index, index] += term.precision
            elif isinstance(term, WeightTerm) and term.curvature is not None:
                G = term.curvature.dense()
                index = torch.cat(
                    [
                        positions.get(n, H.new_full((s.numel(),), -1).long())
                        for n, s in G.shapes.items()
                    ]
                )
                known = index >= 0  # others are frozen by now
                matrix = G.matrix.to(H)[known][:, known]
                H[index[known][:, None], index[known]] += matrix
        return H

    # ---- parts: (kind, how many examples are backpropagated, nats)

    def _parts(self) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
        if self.data is not None:
            for batch in batches(self.data, self.batch_size):
                yield "data", len(batch.labels), lambda b=batch: self._nll(b)
        for term in self.prior.terms:
            if isinstance(term, MemoryTerm):
                for i in range(0, len(term.memory), self.batch_size):
                    part = term.memory[slice(i, i + self.batch_size)]
                    yield "memory", len(part), lambda t=term, m=part: self._of_memory(t, m)
            elif isinstance(term, KernelTerm) and len(term.memory):
                drawn = term.draw(None)
                yield "memory", len(term.memory), lambda t=term, d=drawn: self._of_memory(t, d)
            elif not isinstance(term, KernelTerm):
                # Each alone: their gradients cancel at a minimum, and ``scale`` is that of each.
                yield type(term).__name__, 0, lambda t=term: t(self.model)

    def _nll(self, batch: Any) -> Tensor:
        batch = batch.to(self.params[0].device)
        likelihood = self.prior.likelihood
        f = upcast(forward(self.model, batch.inputs))
        require_finite(f, "an output of the model")
        mask = head_mask(self.head, f.shape[1], f.device)
        likelihood.validate(f.detach(), batch.labels, mask)
        return likelihood.nll(likelihood.mask(f, mask), batch.labels).sum()

    def _of_memory(self, term: Any, drawn: Any) -> Tensor:
        part = replace(term, memory=drawn) if isinstance(drawn, Memory) else term
        f = forward(self.model, drawn.inputs)
        return self.prior._function_space(f, [(part, drawn)])

    # ---- flat vectors

    def _grads(self, value: Tensor, create_graph: bool = False) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(self.weights())
        grads = torch.autograd.grad(
            value, self.params, create_graph=create_graph, materialize_grads=True
        )
        return self._flat(grads)

    def _flat(self, parts: Any) -> Tensor:
        return torch.cat([part.flatten() for part in parts])

    def _split(self, x: Tensor) -> list[Tensor]:
        parts = x.split([p.numel() for p in self.params])
        return [part.reshape(p.shape) for part, p in zip(parts, self.params, strict=True)]

    # ---- what kind of objective

    @property
    def _data_size(self) -> int:
        return 0 if self.data is None else num_examples(self.data)

    @property
    def _outputs(self) -> int:
        f = self.probe()
        return 1 if f is None else f.shape[1]

    def probe(self) -> Tensor | None:
        """Outputs at a few of the inputs that occur, with their graph; None where none do."""
        inputs: Any = None
        if self.data is not None:
            inputs = next(iter(batches(self.data, 8))).inputs
        else:
            held = [t for t in self.prior.terms if isinstance(t, (MemoryTerm, KernelTerm))]
            inputs = next((t.memory.inputs for t in held if len(t.memory)), None)
            inputs = None if inputs is None else take(inputs, slice(0, min(8, rows(inputs))))
        if inputs is None:
            return None
        return forward(self.model, move(inputs, self.params[0].device))

    def convex(self) -> bool:
        # A subclass may be anything.
        if type(self.prior.likelihood) not in (Bernoulli, Categorical, Gaussian, Poisson):
            return False
        return self.is_affine() and all(_is_convex_term(t) for t in self.prior.terms)

    def is_affine(self) -> bool:
        f = self.probe()
        return f is None or (_is_affine(f) and self._is_straight())

    @torch.no_grad()
    def _is_straight(self) -> bool:
        """Whether f(w) - 2 f(w + d) + f(w + 2d) = 0: the graph of f shows no masks and indices that
        depend on the weights, nor what was detached from them."""
        before, generator = self.weights(), torch.Generator().manual_seed(0)
        d = torch.randn(len(before), generator=generator, dtype=torch.float64).to(before)
        d = d * (1.0 + before.abs())
        found = []
        try:
            for step in range(3):
                self.move_to(before + step * d)
                f = self.probe()
                if f is None:
                    return True
                found.append(f.double())
        finally:
            self.move_to(before)
        bend = (found[0] - 2 * found[1] + found[2]).norm()
        size = sum(float(f.norm()) for f in found)
        return bool(bend <= torch.finfo(self.dtype).eps ** 0.5 * size)


def _is_convex_term(term: Any) -> bool:
    """In the outputs, or for a term of the weights in these."""
    if isinstance(term, MemoryTerm):
        weights = (term.memory.soft_weight, term.memory.hard_weight)
        if any(bool((w < 0).any()) for w in weights):
            return False
        return type(term.divergence) in (KL, Logit) or not term.has_soft
    if isinstance(term, WeightTerm) and isinstance(term.curvature, Diagonal):  # SI's may be clipped
        return all(bool((v >= 0).all()) for v in term.curvature.values.values())
    if isinstance(term, WeightTerm) and term.curvature is not None:
        return not indefinite(term.curvature)
    return isinstance(term, (Regulariser, WeightTerm))


def _has_closed_form(prior: Prior) -> bool:
    """Whether the Hessian of each memory in the outputs is that of the likelihood."""
    return all(
        not isinstance(t, MemoryTerm)
        or not t.has_soft
        or (isinstance(t.divergence, KL) and t.divergence.temperature == 1)
        for t in prior.terms
    )


# Operations by the name of their node in autograd's graph. Jointly linear in all arguments:
# fmt: off
_LINEAR = frozenset((
    "AccumulateGrad", "Add", "Alias", "AsStrided", "Cat", "Clone", "Diagonal", "Embedding",
    "Expand", "Gather", "Index", "IndexSelect", "MaskedFill", "Mean", "Neg", "Permute",
    "Repeat", "ReshapeAlias", "Rsub", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze",
    "Stack", "Sub", "Sum", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze",
    "View",
))
# fmt: on
# linear in each of these arguments, as long as one of them alone depends on the weights:
_PRODUCTS: dict[str, tuple[int, ...]] = {
    "Mul": (0, 1),
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Mv": (0, 1),
    "Dot": (0, 1),
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Baddbmm": (1, 2),
    "Linear": (0, 1),
    "Convolution": (0, 1),
}


def _is_affine(f: Tensor) -> bool:
    """Whether autograd's graph from the parameters to f is affine; an unknown operation is not."""
    if f.grad_fn is None:
        return True  # no trainable parameter has a part in it, or it is one
    seen, todo = set(), [f.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
        parents = [parent for parent, _ in node.next_functions]
        if name == "Div":
            if len(parents) > 1 and parents[1] is not None:
                return False
        elif name in _PRODUCTS:
            at = [i for i in _PRODUCTS[name] if i < len(parents) and parents[i] is not None]
            if len(at) > 1:
                return False
        elif name not in _LINEAR:
            return False
        todo += [parent for parent in parents if parent is not None]
    return True


def _choice(objective: _Objective) -> Literal["newton", "lbfgs", "adam"]:
    if objective.convex():
        return "newton"
    return "lbfgs" if objective.size <= _FULL_BATCH else "adam"


# -------------------------------------------------------------------- descent

Direction = Callable[[_Point, "_Point | None"], Tensor]  # at a point, after another


def _descend(objective: _Objective, direction: Direction, steps: int, tolerance: float) -> _Descent:
    """Steps along descent directions, each with a line search, until the gradient is small."""
    point, last = objective.at(objective.weights()), None
    if not math.isfinite(point.value) or not bool(torch.isfinite(point.gradient).all()):
        raise NonFiniteError(
            f"the objective is {point.value} where the refit begins, or its gradient is not "
            "finite; look at the inputs and at the model's weights. Nothing was changed"
        )
    lowest, idle, longest = math.inf, 0, 0.0
    for iteration in range(steps):
        if point.relative <= tolerance:
            return _Descent(point, iteration, True)
        # Values that fall by rounding alone, and a gradient that falls no more: the end, too.
        fell = last is None or last.value - point.value > _rounding(objective, point)
        idle = 0 if fell or point.norm < 0.99 * lowest else idle + 1
        lowest = min(lowest, point.norm)
        d = direction(point, last)
        # No number between here and there: as near as this dtype comes to the minimum.
        longest = max(longest, float(point.weights.norm()))
        at_end = float(d.norm()) <= 8 * torch.finfo(objective.dtype).eps * longest
        found = None if at_end or idle >= _IDLE else _line_search(objective, point, d)
        if found is None:
            objective.move_to(point.weights)
            rounding = math.sqrt(torch.finfo(objective.dtype).eps)
            return _Descent(point, iteration, at_end or point.relative <= rounding)
        last, point = point, found
    return _Descent(point, steps, point.relative <= tolerance)


def _line_search(objective: _Objective, point: _Point, d: Tensor) -> _Point | None:
    """A point along d with the Wolfe conditions, by bisection and doubling; None where there is
    none. Near a minimum, where values differ by rounding alone, slopes decide (Hager & Zhang)."""
    slope = float(point.gradient @ d)
    if not slope < 0:
        return None
    few, much = 1e-4, 0.9
    rounding, unclear = _rounding(objective, point), 0
    low, high, t = 0.0, math.inf, 1.0
    best: _Point | None = None
    for _ in range(40):
        trial = objective.at(point.weights + t * d)
        new_slope = float(trial.gradient @ d)
        finite = math.isfinite(trial.value) and math.isfinite(new_slope)
        falls = finite and trial.value <= point.value + few * t * slope
        level = finite and trial.value <= point.value + rounding
        if not falls and not (level and new_slope <= (2 * few - 1) * slope):
            high = t
        elif new_slope < much * slope:
            low, best = t, trial
        else:
            return trial
        t = 2 * low if math.isinf(high) else (low + high) / 2
        unclear += finite and abs(trial.value - point.value) <= rounding
        if unclear > _IDLE or high - low < 1e-12:
            break
    if best is not None:  # fell, though less than it could
        objective.move_to(best.weights)
    return best


def _rounding(objective: _Objective, point: _Point) -> float:
    """A difference of values that says nothing, nats."""
    eps = torch.finfo(objective.dtype).eps
    return 10 * eps * max(1.0, abs(point.value)) * max(1, objective.size) ** 0.5


def _newton_direction(objective: _Objective) -> Direction:
    """-H⁻¹ g, by Cholesky or by conjugate gradients."""
    with_matrix = (
        sum(p.numel() for p in objective.params) <= _DENSE
        and _has_closed_form(objective.prior)
        and objective.convex()
    )
    factor: list[Tensor] = []

    def dense(point: _Point, last: _Point | None) -> Tensor:
        # A matrix of a step ago will do while it takes nine tenths of the gradient away: it costs
        # as much as C gradients.
        if not factor or last is None or point.norm > 0.1 * last.norm:
            factor[:] = [_cholesky(objective.dense())]
        g = point.gradient.double()
        return -torch.cholesky_solve(g.unsqueeze(1), factor[0]).squeeze(1).to(objective.dtype)

    def iterative(point: _Point, last: _Point | None) -> Tensor:
        # Looser far from the end: the steps there are short of the minimum anyway.
        forcing = min(0.1, math.sqrt(point.relative))
        return _conjugate_gradients(objective.hessian_product, -point.gradient, forcing)

    return dense if with_matrix else iterative


def _cholesky(H: Tensor) -> Tensor:
    """The factor of H, in float64; of a singular one (softmax without a regulariser) with the
    least damping that lets it be factored, which leaves its null space alone."""
    require_finite(H, "the Hessian of the objective")
    H = 0.5 * (H + H.mT).double()
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    size = max(float(H.diagonal().abs().max()), torch.finfo(H.dtype).tiny)
    damping = 1e-13 * size
    while True:
        factor, info = torch.linalg.cholesky_ex(H + damping * eye)
        if int(info) == 0:
            return factor
        damping *= 10


def _conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, forcing: float) -> Tensor:
    """x with H x = b, up to forcing ‖b‖; stops where the curvature along a direction is not
    positive, with what it has (b itself at first), which is a descent direction in any case."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), float(b @ b)
    enough = forcing**2 * rr
    for i in range(_INNER):
        Hp = product(p)
        curvature = float(p @ Hp)
        if not curvature > 1e-14 * float(p @ p):
            return b if i == 0 else x
        alpha = rr / curvature
        x = x + alpha * p
        r = r - alpha * Hp
        before, rr = rr, float(r @ r)
        if rr <= enough:
            break
        p = r + (rr / before) * p
    return x


def _lbfgs_direction(objective: _Objective) -> Direction:
    """-B g with the inverse Hessian that the last steps show."""
    steps: list[tuple[Tensor, Tensor, float]] = []

    def direction(point: _Point, last: _Point | None) -> Tensor:
        if last is not None:
            s, y = point.weights - last.weights, point.gradient - last.gradient
            sy = float(s @ y)
            if sy > 1e-10 * float(s.norm() * y.norm()):
                steps.append((s, y, 1 / sy))
                del steps[:-_HISTORY]
        q, kept = point.gradient.clone(), []
        for s, y, rho in reversed(steps):
            a = rho * float(s @ q)
            kept.append(a)
            q = q - a * y
        if steps:
            _, y, rho = steps[-1]
            q = q / (rho * float(y @ y))
        else:  # a hundredth of the weights, or of 1: the line search doubles it where it may
            q = q * (0.01 * max(1.0, float(point.weights.norm())) / point.norm)
        for (s, y, rho), a in zip(steps, reversed(kept), strict=True):
            q = q + (a - rho * float(y @ q)) * s
        return -q

    return direction


def _adam(
    objective: _Objective,
    steps: int | None,
    lr: float,
    size: int,
    generator: torch.Generator,
    tolerance: float,
) -> _Descent:
    """Mini-batches of data and memory alike; the rate falls along a cosine."""
    first = objective.at(objective.weights())
    model, prior, data = objective.model, objective.prior, objective.data
    count = objective._data_size
    memory = objective.size - count
    steps = steps or _EPOCHS * max(1, math.ceil((count or memory) / size))
    grads = [p.grad for p in objective.params]
    optimizer = torch.optim.Adam(objective.params, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = None if data is None else _minibatches(data, size, generator)
    try:
        for _ in range(steps):
            if stream is None:
                drawn = min(size, memory)
                loss = prior(model, batch_size=size, generator=generator) / max(1, memory)
            else:
                batch = next(stream).to(objective.params[0].device)
                drawn = len(batch.labels) + min(size, memory)
                loss = prior.loss(
                    model,
                    batch.inputs,
                    batch.labels,
                    num_data=count,
                    head=objective.head,
                    batch_size=size,
                    generator=generator,
                )
            objective.gradients += drawn
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    f"the loss became {loss.item()}; lower lr ({lr:g}). The weights are as they "
                    "were"
                )
            for p, g in zip(
                objective.params, objective._split(objective._grads(loss)), strict=True
            ):
                p.grad = g
            optimizer.step()
            schedule.step()
    finally:
        for p, g in zip(objective.params, grads, strict=True):
            p.grad = g
    last = objective.at(objective.weights())
    if not last.value <= first.value:
        raise NotConvergedError(
            f"the objective went from {first.value:.6g} to {last.value:.6g} nats; lower lr "
            f"({lr:g}) or raise max_iterations ({steps}). The weights are as they were"
        )
    return _Descent(last, steps, last.relative <= tolerance)


def _minibatches(data: Any, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Without end: all examples in a new order, again and again."""
    if not isinstance(data, Examples):  # a random example needs all of them at hand
        parts = list(batches(data))
        data = Examples(concat([b.inputs for b in parts]), torch.cat([b.labels for b in parts]))
    while True:
        for index in torch.randperm(len(data), generator=generator).split(size):
            yield data.batch(index)

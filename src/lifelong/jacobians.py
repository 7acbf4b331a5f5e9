r"""Products with the Jacobian J = df/dtheta of each example, without forming it where it is large.

f is (B, C), theta the named parameters, v a direction in output space, (B, C). One backward pass
gives g = dv.f/dz at the output z of every layer; with the layer's input a, the per-example
gradient of a weight is a sum of outer products over positions l (time steps, pixels, uses):

    (J_nᵀ v_n)_oi = sum_l g_nlo a_nli.

Three methods fall out, for K directions at once: sums of squares over examples (diagonal
curvature), norms under a diagonal covariance (leverage), and Gram matrices (FROMP's kernels).
Forward hooks record a and z for Linear, Conv1d and Conv2d; any other parameter goes through
``torch.func``, or one example at a time. Which way a parameter takes is decided by a probe: the
hook-made gradients of a few examples must agree with autograd's.

Every function runs the model in the mode it is in and leaves its ``.grad``, ``requires_grad``,
hooks and the global random state as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from .data import BATCH_SIZE, Data, batches, head_mask, head_of
from .errors import NotRepeatableError
from .likelihoods import Likelihood
from .models import (
    Inputs,
    ParamFilter,
    Params,
    forward,
    logits,
    match,
    move,
    parameters,
    require_finite,
    rows,
    take,
)

ParamChoice = Sequence[str] | ParamFilter | None

WORKING_SET = 64 * 2**20  # bytes of per-example quantities held at once
_CHUNK = 8 * 2**20  # bytes of them in one matrix product
_PROBE_ROWS = 8


# --- public functions ---------------------------------------------------------------------------


def gradient(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    head: Sequence[int] | None = None,
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
    params: ParamChoice = None,
    batch_size: int = BATCH_SIZE,
) -> Params:
    """sum_i w_i J_iᵀ r_i in nats: the gradient of the data's summed nll. One backward a batch.

    weights: (N,) by position, default 1; exclude: (K,) ids left out; head: classes that compete,
    default those of the data; params: names or a filter, default all that are trainable. Sums
    are kept in float32 or better.

    Raises ValueError and TypeError for labels that do not fit, NonFiniteError for outputs that
    are NaN or infinite.
    """
    chosen = choose(model, params)
    total = {name: torch.zeros_like(p, dtype=accumulator(p.dtype)) for name, p in chosen.items()}
    with preserved_rng(model), torch.enable_grad():
        for batch in weighted_batches(model, data, head, weights, exclude, batch_size):
            f = forward(model, batch.inputs)
            y, mask = checked(likelihood, f, batch)
            with torch.no_grad():
                r = residual(likelihood, upcast(f), y, mask) * batch.weights.unsqueeze(1)
            parts = _grad(f, list(chosen.values()), r.to(f.dtype))
            for name, part in zip(chosen, parts, strict=True):
                total[name] += part.detach()
    return total


def per_example_jacobian(
    model: nn.Module, inputs: Inputs, *, params: ParamChoice = None
) -> dict[str, Tensor]:
    """df_nc/dtheta of each example: name -> (B, C, *shape). For small models: all of it is held.

    Raises NotRepeatableError where the model is random or couples the examples of a batch.
    """
    engine = Engine(model, choose(model, params))
    with preserved_rng(model), torch.enable_grad():
        inputs = move(inputs, engine.device)
        require_independent(model, inputs)
        parts: list[dict[str, Tensor]] = []
        for piece in engine.pieces(inputs, whole=True):
            trace = engine.trace(take(inputs, piece))
            v = _basis(trace.f)
            parts.append({name: part.rows() for name, part in trace.pull(v).items()})
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    return {name: value.transpose(0, 1).contiguous() for name, value in joined.items()}


def leverage(
    model: nn.Module,
    inputs: Inputs,
    likelihood: Likelihood,
    variance: Params,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """diag(J Sigma Jᵀ) over the outputs, Sigma = diag(variance): (B, C).

    The variance of each output under the Gaussian posterior N(theta, Sigma), in output units
    squared. Outputs outside of ``mask`` (C,) get 0. Never forms B x P for Linear layers:
    sum_oi g_o² sigma_oi a_i² = (g² sigma) . a².

    Raises StaleAnchorError where the variance has names or shapes that the model has not, and
    NotRepeatableError where the model is random or couples the examples of a batch.
    """
    engine = Engine(model, choose_like(model, variance))
    out: list[Tensor] = []
    with preserved_rng(model), torch.enable_grad():
        inputs = move(inputs, engine.device)
        require_independent(model, inputs)
        for piece in engine.pieces(inputs):
            trace = engine.trace(take(inputs, piece))
            likelihood.mask(trace.f.detach(), mask)  # raises where no mask is possible
            v, used = _used(_basis(trace.f), mask)
            part = torch.zeros(trace.f.shape, dtype=v.dtype, device=v.device)
            for name, factor in trace.pull(v).items():
                part[:, used] += factor.norms(variance[name].to(v.device)).T
            out.append(part)
    return torch.cat(out)


def kernel(
    model: nn.Module,
    inputs: Inputs,
    variance: Params,
    *,
    likelihood: Likelihood | None = None,
    mask: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """K_c = A_c Sigma A_cᵀ between M examples, one matrix for each output c: (C, M, M).

    Sigma = diag(variance). A_c (M, P) holds the gradients of output c, or of the likelihood's
    mean where one is given (the probability of class c under ``mask``: A = Lambda J, FROMP,
    Pan et al. 2020, section 2). Outputs outside of ``mask`` (C,) have a matrix of zeros, so that
    the first index is always the output. blocks: (M,) labels; examples of different blocks (tasks)
    have covariance 0, and it is not computed. M x P is never held at once.

    Raises StaleAnchorError where the variance has names or shapes that the model has not, and
    NotRepeatableError where the model is random or couples the examples of a batch.
    """
    engine = Engine(model, choose_like(model, variance))
    m = rows(inputs)
    if blocks is not None and blocks.shape != (m,):
        raise ValueError(
            f"expected one block label for each of the {m} examples, got shape "
            f"{tuple(blocks.shape)}"
        )
    groups = [torch.arange(m)] if blocks is None else _groups(blocks)
    with preserved_rng(model), torch.enable_grad():
        inputs = move(inputs, engine.device)
        require_independent(model, inputs)
        parts = [
            _kernel(engine, inputs if len(index) == m else take(inputs, index), variance,
                    likelihood, mask)
            for index in groups
        ]  # fmt: skip
    if len(groups) == 1:
        return parts[0]
    out = parts[0].new_zeros(parts[0].shape[0], m, m)
    for index, part in zip(groups, parts, strict=True):
        at = index.to(out.device)
        out[:, at.unsqueeze(1), at] = part
    return out


# --- choosing parameters, reading data ----------------------------------------------------------


def choose(model: nn.Module, params: ParamChoice = None) -> dict[str, nn.Parameter]:
    """The trainable parameters that are named, or that a filter keeps; all by default.

    Raises ValueError for a name that is unknown or frozen, or where nothing is left.
    """
    if params is None or callable(params):
        chosen = parameters(model, params)
    else:
        every = parameters(model)
        unknown = [name for name in params if name not in every]
        if unknown:
            raise ValueError(
                f"no trainable parameters of these names: {unknown[:5]}; "
                f"the model has {list(every)[:5]}, ..."
            )
        chosen = {name: every[name] for name in every if name in set(params)}
    if not chosen:
        raise ValueError("no trainable parameter is left; set requires_grad, or widen the filter")
    return chosen


def choose_like(model: nn.Module, anchor: Params) -> dict[str, nn.Parameter]:
    """The model's parameters under the names of ``anchor``; StaleAnchorError where they differ."""
    match(model, anchor)
    return choose(model, list(anchor))


class WeightedBatch(NamedTuple):
    """A batch on the model's device, rows of weight 0 left out."""

    inputs: Inputs
    labels: Tensor
    weights: Tensor  # (B,)
    mask: Tensor | None  # (C,) bool; filled by ``checked``
    head: tuple[int, ...] | None
    number: int


def weighted_batches(
    model: nn.Module,
    data: Data,
    head: Sequence[int] | None,
    weights: Tensor | None,
    exclude: Tensor | None,
    batch_size: int,
) -> Iterator[WeightedBatch]:
    """The data in order, each example with its weight; ``exclude`` and weight 0 are skipped."""
    some = next(model.parameters())
    classes = head_of(data, head)
    start = 0
    for number, batch in enumerate(batches(data, batch_size)):
        n = len(batch.labels)
        if weights is None:
            w = torch.ones(n, dtype=accumulator(some.dtype))
        else:
            if weights.ndim != 1 or len(weights) < start + n:
                raise ValueError(
                    "expected one weight for each example, (N,), got shape "
                    f"{tuple(weights.shape)} for at least {start + n} examples"
                )
            w = weights[start : start + n].detach()
        start += n
        keep = w != 0
        if exclude is not None:
            keep = keep & ~torch.isin(batch.ids, exclude.to(batch.ids.device)).to(w.device)
        inputs, labels = batch.inputs, batch.labels
        if not bool(keep.all()):
            index = keep.nonzero().squeeze(1)
            if len(index) == 0:
                continue
            inputs, labels, w = take(inputs, index), labels[index], w[index]
        device = some.device
        yield WeightedBatch(
            move(inputs, device), labels.to(device), w.to(device), None, classes, number
        )
    if weights is not None and len(weights) != start:
        raise ValueError(f"expected {start} weights, one for each example, got {len(weights)}")


def checked(
    likelihood: Likelihood, f: Tensor, batch: WeightedBatch
) -> tuple[Tensor, Tensor | None]:
    """Labels and head mask of a batch whose outputs are finite and whose labels fit."""
    if f.ndim != 2:
        raise ValueError(f"expected outputs of shape (B, C), got {tuple(f.shape)}")
    require_finite(f, f"an output of the model in batch {batch.number}")
    mask = head_mask(batch.head, f.shape[1], f.device)
    likelihood.validate(f.detach(), batch.labels, mask)
    return batch.labels, mask


def residual(likelihood: Likelihood, f: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """dl/df under the head's mask: exactly 0 on the outputs that the head leaves out."""
    r = likelihood.residual(likelihood.mask(f.detach(), mask), y)
    return r if mask is None else r * mask


# --- guards -------------------------------------------------------------------------------------


@contextmanager
def preserved_rng(model: nn.Module) -> Iterator[None]:
    """The global random states (CPU, and the model's device) are restored after."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def require_deterministic_mode(model: nn.Module) -> None:
    """Raise NotRepeatableError where dropout or BatchNorm is in training mode."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if dropout or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise NotRepeatableError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode, where an "
                "example's output is random or depends on its batch; expected evaluation mode. "
                "Call model.eval() first, or use `with lifelong.models.evaluating(model):`"
            )


def require_independent(model: nn.Module, inputs: Inputs) -> None:
    """Raise NotRepeatableError where an output is random, or depends on the rest of its batch."""
    require_deterministic_mode(model)
    few = take(inputs, slice(0, _PROBE_ROWS))
    n = rows(few)
    with torch.no_grad():
        first, again = forward(model, few), forward(model, few)
        if not _close(first, again):
            raise NotRepeatableError(
                "two forward passes of the same inputs differ: the model is random; expected the "
                "same outputs. Call model.eval(), or take the randomness out of its forward"
            )
        half = n // 2
        if half and first.shape[:1] == (n,):
            pieces = (take(few, slice(0, half)), take(few, slice(half, n)))
            split = torch.cat([forward(model, piece) for piece in pieces])
            if not _close(first, split):
                raise NotRepeatableError(
                    "an example's output depends on the other examples of its batch; expected "
                    "independent examples. Call model.eval(), or replace the layers that mix "
                    "examples (batch statistics) by ones that do not (GroupNorm, LayerNorm)"
                )


def _close(x: Tensor, y: Tensor) -> bool:
    """Equal to about half of the digits; NaN and infinity are left to a later, clearer check."""
    x, y = torch.nan_to_num(upcast(x)), torch.nan_to_num(upcast(y))
    if x.shape != y.shape:
        return False
    tolerance = math.sqrt(torch.finfo(x.dtype).eps)
    return bool((x - y).abs().max() <= tolerance * (1 + x.abs().max()))


# --- per-example gradients of one parameter -----------------------------------------------------


@dataclass(frozen=True)
class Outer:
    """Gradients of a weight at one position: g_o a_i, never multiplied out."""

    g: Tensor  # (K, B, O)
    a: Tensor  # (B, I)

    def rows(self) -> Tensor:
        """(K, B, O, I)."""
        return self.g.unsqueeze(-1) * self.a.unsqueeze(-2)

    def square_sum(self, w: Tensor) -> Tensor:
        """sum_kn w_n (gradient_kn)²: (O, I)."""
        s = self.g.square().sum(0) * w.unsqueeze(1)
        return s.T @ self.a.square()

    def norms(self, variance: Tensor) -> Tensor:
        """sum_p variance_p (gradient_kn)_p²: (K, B)."""
        return ((self.g.square() @ variance) * self.a.square()).sum(-1)

    def kernel(self, variance: Tensor) -> Tensor:
        """(K, B, B): sum_oi g_mo g_no variance_oi a_mi a_ni; the sum over i serves all K.

        Rows m are taken a few at a time against n < end: half of the products, by symmetry.
        """
        m, width = self.a.shape
        out = self.a.new_zeros(len(self.g), m, m)
        step = max(1, min(m, _CHUNK // (4 * m * (width + len(variance)) + 1)))
        for start in range(0, m, step):
            end = min(m, start + step)
            pairs = self.a[start:end].unsqueeze(1) * self.a[:end]  # (rows, end, I)
            shared = pairs @ variance.T  # (rows, end, O)
            for k, g in enumerate(self.g):
                scaled = shared * g[:end]
                out[k, start:end, :end] = (scaled @ g[start:end].unsqueeze(-1)).squeeze(-1)
        lower = out.tril()
        return lower + lower.tril(-1).mT


@dataclass(frozen=True)
class Positions:
    """Gradients of a weight summed over positions l: sum_l g_lo a_li, in G groups of channels."""

    g: Tensor  # (K, B, G, L, O)
    a: Callable[[slice], Tensor]  # examples -> (b, G, L, I)
    shape: torch.Size  # of the parameter

    def _chunks(self) -> Iterator[slice]:
        """Examples whose inputs and gradients stay in the cache."""
        count, n, _, positions, width = self.g.shape
        size = self.shape.numel()
        cost = count * size + positions * size // width  # floats per example
        step = max(1, _CHUNK // (4 * cost + 1))
        return (slice(i, min(n, i + step)) for i in range(0, n, step))

    def _rows(self, part: slice) -> Tensor:
        """(b, G, K * O, I) of some examples: one matrix product each."""
        g = self.g[:, part].permute(1, 2, 0, 4, 3)  # (b, G, K, O, L)
        return g.reshape(*g.shape[:2], -1, g.shape[-1]) @ self.a(part)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Examples and their gradients (b, K, *shape), in chunks that fit the working set."""
        count = len(self.g)
        for part in self._chunks():
            x = self._rows(part)
            b, groups, _, width = x.shape
            x = x.reshape(b, groups, count, -1, width).transpose(1, 2)
            yield part, x.reshape(b, count, *self.shape)

    def rows(self) -> Tensor:
        return torch.cat([x.transpose(0, 1) for _, x in self._parts()], dim=1)

    def square_sum(self, w: Tensor) -> Tensor:
        count, _, groups = self.g.shape[:3]
        total = torch.zeros((), dtype=w.dtype, device=w.device)
        for part in self._chunks():
            x = self._rows(part).square_()
            total = total + torch.tensordot(w[part], x, dims=1)  # (G, K * O, I)
        return total.reshape(groups, count, -1, total.shape[-1]).sum(1).reshape(self.shape)

    def norms(self, variance: Tensor) -> Tensor:
        parts = [(x.square() * variance).flatten(2).sum(-1).T for _, x in self._parts()]
        return torch.cat(parts, dim=1)

    def kernel(self, variance: Tensor) -> Tensor:
        count, m = self.g.shape[:2]
        return _gram(self.rows().reshape(count, m, -1), variance.flatten())


@dataclass(frozen=True)
class Rows:
    """Gradients of a parameter as they are: biases, and whatever no hook handles."""

    values: Tensor  # (K, B, *shape)

    def rows(self) -> Tensor:
        return self.values

    def square_sum(self, w: Tensor) -> Tensor:
        return torch.tensordot(w, self.values.square().sum(0), dims=1)

    def norms(self, variance: Tensor) -> Tensor:
        return (self.values.square() * variance).flatten(2).sum(-1)

    def kernel(self, variance: Tensor) -> Tensor:
        return _gram(self.values.flatten(2), variance.flatten())


Factor = Outer | Positions | Rows


def _gram(x: Tensor, variance: Tensor) -> Tensor:
    """(K, M, P), (P,) -> (K, M, M)."""
    return (x * variance) @ x.mT


# --- recording a forward pass -------------------------------------------------------------------


class Use(NamedTuple):
    """One call of a layer."""

    module: nn.Module
    a: Tensor  # its input, detached
    edge: GradientEdge  # where its output's gradient arrives, also after in-place operations
    shape: torch.Size  # of its output


_HOOKED: dict[Any, type[nn.Module]] = {
    layer.forward: layer for layer in (nn.Linear, nn.Conv1d, nn.Conv2d)
}


@contextmanager
def _recording(model: nn.Module, wanted: set[int], uses: list[Use]) -> Iterator[None]:
    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        a = args[0] if args else kwargs.get("input")
        if isinstance(a, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            uses.append(Use(module, a.detach(), get_gradient_edge(output), output.shape))

    handles = []
    try:
        for module in model.modules():
            own = {id(p) for p in module.parameters(recurse=False)}
            if type(module).forward in _HOOKED and own & wanted:
                handles.append(module.register_forward_hook(record, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


Signature = tuple[Any, ...]


class Plan(NamedTuple):
    """How each parameter's gradients are made, as the probe found."""

    hooked: frozenset[str]
    functional: frozenset[str]  # by torch.func
    looped: frozenset[str]  # one example at a time
    floats: int  # per example and direction, of gradients at the layers' outputs
    inputs: int  # floats per example, of unfolded inputs


@dataclass
class Engine:
    """Traces forward passes of a model and pulls output directions back to its parameters."""

    model: nn.Module
    params: dict[str, nn.Parameter]
    plans: dict[Signature, Plan] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @cached_property
    def names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.params.items()}

    def trace(self, inputs: Inputs) -> Trace:
        """One forward pass, its layers recorded; probed where its layout was not met before."""
        trace = self._record(inputs)
        plan = self.plans.get(trace.signature)
        if plan is None:
            plan = self._probe(inputs, trace)
            self.plans[trace.signature] = plan
        trace.plan = plan
        return trace

    def pieces(
        self, inputs: Inputs, directions: int | None = None, whole: bool = False
    ) -> Iterator[slice]:
        """Slices of a batch whose per-example quantities fit the working set.

        directions: how many will be pulled back, default C; whole: all gradients will be held.
        """
        n = rows(inputs)
        first = self.trace(take(inputs, slice(0, _PROBE_ROWS)))
        plan = first.plan
        k = directions if directions is not None else first.f.shape[1]
        held = self.params if whole else plan.functional | plan.looped
        generic = sum(self.params[name].numel() for name in held)
        cost = 4 * (k * (plan.floats + generic) + plan.inputs)
        step = max(1, min(n, WORKING_SET // (cost + 1)))
        return (slice(i, min(n, i + step)) for i in range(0, n, step))

    def _record(self, inputs: Inputs) -> Trace:
        uses: list[Use] = []
        with _recording(self.model, set(self.names), uses):
            f = forward(self.model, inputs)
        if f.ndim != 2:
            raise ValueError(f"expected outputs of shape (B, C), got {tuple(f.shape)}")
        return Trace(self, inputs, f, uses)

    def _probe(self, inputs: Inputs, trace: Trace) -> Plan:
        """Compare per-example gradients with autograd's on a few examples, in one random direction.

        Only every second example has a direction for autograd, so that a layer whose first
        dimension is not the batch (sequence-first) is found out, too.
        """
        few = take(inputs, slice(0, _PROBE_ROWS))
        probe = self._record(few)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(1, *probe.f.shape, generator=generator, dtype=torch.float64)
        v = v.to(probe.f.device, probe.f.dtype)
        some = torch.arange(len(probe.f), device=v.device) % 2 == 0
        truth = dict(
            zip(
                self.params,
                _grad(probe.f, list(self.params.values()), v[0] * some.unsqueeze(1)),
                strict=True,
            )
        )
        low = any(x.dtype in _LOW for x in (probe.f, *(use.a for use in probe.uses)))

        def agrees(name: str, values: Tensor) -> bool:
            return _agree(values[0, some].sum(0), truth[name], low)

        hooked: set[str] = set()
        if probe.signature == trace.signature:
            probe.plan = Plan(frozenset(probe.hookable), frozenset(), frozenset(), 0, 0)
            hooked = {n for n, part in probe.pull(v).items() if agrees(n, part.rows())}
        rest = [name for name in self.params if name not in hooked]
        functional: set[str] = set()
        if rest and all(type(p) is nn.Parameter for p in self.model.parameters()):
            # A sharded (DTensor) parameter would give wrong values here without an error.
            try:
                values = self.functional_rows(few, v, rest)
            except Exception:  # whatever torch.func cannot trace; the loop below can
                values = {}
            functional = {name for name, value in values.items() if agrees(name, value)}
        batch = len(trace.f)
        used = {id(use) for name in hooked for use, _ in trace.uses_of[name]}
        kept = [use for use in trace.uses if id(use) in used]
        return Plan(
            frozenset(hooked),
            frozenset(functional),
            frozenset(rest) - functional,
            sum(use.shape.numel() for use in kept) // batch,
            sum(_unfolded_numel(use) for use in kept) // batch,
        )

    def functional_rows(self, inputs: Inputs, v: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """name -> (K, B, *shape) by torch.func, the model run on batches of one."""
        chosen = {name: self.params[name].detach() for name in names}
        fixed = {
            name: p.detach() for name, p in self.model.named_parameters() if name not in chosen
        }

        def one(x: Any, u: Tensor) -> dict[str, Tensor]:
            def outputs(theta: Params) -> Tensor:
                state = {**fixed, **theta}
                if isinstance(x, Tensor):
                    args, kwargs = (x.unsqueeze(0),), {}
                else:
                    args, kwargs = (), {key: value.unsqueeze(0) for key, value in x.items()}
                return logits(torch.func.functional_call(self.model, state, args, kwargs))[0]

            pull = torch.func.vjp(outputs, chosen)[1]
            return torch.func.vmap(lambda direction: pull(direction)[0])(u)

        plain = inputs if isinstance(inputs, Tensor) else dict(inputs)
        values = torch.func.vmap(one, in_dims=(0, 1))(plain, v)
        return {name: upcast(value.detach()).transpose(0, 1) for name, value in values.items()}

    def looped_rows(self, inputs: Inputs, v: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """name -> (K, B, *shape), by one backward pass for each example and direction."""
        names = list(names)
        chosen = [self.params[name] for name in names]
        out = {
            name: torch.empty(*v.shape[:2], *p.shape, dtype=accumulator(p.dtype), device=p.device)
            for name, p in zip(names, chosen, strict=True)
        }
        for n in range(v.shape[1]):
            f = forward(self.model, take(inputs, slice(n, n + 1)))
            for k in range(v.shape[0]):
                parts = _grad(f, chosen, v[k, n : n + 1].to(f.dtype))
                for name, part in zip(names, parts, strict=True):
                    out[name][k, n] = part.detach()
        return out


class Trace:
    """One recorded forward pass: outputs f (B, C) and the uses of its layers."""

    def __init__(self, engine: Engine, inputs: Inputs, f: Tensor, uses: list[Use]) -> None:
        self.engine = engine
        self.inputs = inputs
        self.f = f
        self.uses = uses
        self.plan: Plan = Plan(frozenset(), frozenset(), frozenset(engine.params), 0, 0)

    @cached_property
    def signature(self) -> Signature:
        """What was called in which layout, free of the batch size where the batch comes first."""
        b = len(self.f)
        return tuple(
            (id(use.module), use.a.shape[1:], use.shape[1:], divmod(use.shape[0], b))
            for use in self.uses
        )

    @cached_property
    def uses_of(self) -> dict[str, list[tuple[Use, str]]]:
        """Parameter -> the calls it took part in, and as what ("weight" or "bias")."""
        out: dict[str, list[tuple[Use, str]]] = {}
        for use in self.uses:
            for role, p in use.module.named_parameters(recurse=False):
                name = self.engine.names.get(id(p))
                if name is not None:
                    out.setdefault(name, []).append((use, role))
        return out

    @cached_property
    def hookable(self) -> list[str]:
        """Parameters all of whose recorded uses have a layout that the formulas cover."""
        b = len(self.f)

        def fits(use: Use) -> bool:
            ndim = {nn.Linear: None, nn.Conv1d: 3, nn.Conv2d: 4}[_kind(use.module)]
            ranked = use.a.ndim >= 2 if ndim is None else use.a.ndim == ndim
            return ranked and use.shape[0] > 0 and use.shape[0] % b == 0

        return [
            name
            for name, uses in self.uses_of.items()
            if all(fits(use) for use, _ in uses)
            and len({role for _, role in uses}) == 1
            and len({_groups_of(use.module) for use, _ in uses}) == 1
        ]

    def pull(self, v: Tensor, names: frozenset[str] | None = None) -> dict[str, Factor]:
        """Jᵀ v for each example and direction: v is (K, B, C); each factor has K and B first."""
        plan, engine = self.plan, self.engine
        v = v.to(self.f.dtype)
        keep = frozenset(engine.params) if names is None else names
        out: dict[str, Factor] = {}
        hooked = plan.hooked & keep
        if hooked:
            out.update(self._hooked(v, hooked))
        if plan.functional & keep:
            values = engine.functional_rows(self.inputs, v, sorted(plan.functional & keep))
            out.update({name: Rows(value) for name, value in values.items()})
        if plan.looped & keep:
            values = engine.looped_rows(self.inputs, v, sorted(plan.looped & keep))
            out.update({name: Rows(value) for name, value in values.items()})
        return {name: out[name] for name in engine.params if name in out}

    def _hooked(self, v: Tensor, names: frozenset[str]) -> dict[str, Factor]:
        b = len(self.f)
        pairs = {name: self.uses_of[name] for name in self.engine.params if name in names}
        needed = {id(use): use for uses in pairs.values() for use, _ in uses}
        grads = _pull_back(self.f, [use.edge for use in needed.values()], v)
        at = {
            key: _output_gradient(use.module, upcast(g), b)
            for (key, use), g in zip(needed.items(), grads, strict=True)
        }
        out: dict[str, Factor] = {}
        for name, uses in pairs.items():
            shape = self.engine.params[name].shape
            g = _cat([at[id(use)] for use, _ in uses], dim=-2)  # (K, B, G, L, O)
            if uses[0][1] == "bias":
                out[name] = Rows(g.sum(-2).flatten(2))
            elif g.shape[2:4] == (1, 1) and len(shape) == 2:
                a = upcast(uses[0][0].a).reshape(b, -1)
                out[name] = Outer(g[:, :, 0, 0], a)
            else:
                out[name] = Positions(g, _input_reader([use for use, _ in uses], b), shape)
        return out


def _input_reader(uses: list[Use], b: int) -> Callable[[slice], Tensor]:
    """Examples -> (b, G, L, I), unfolded when asked for, so that a chunk is held at a time."""
    return lambda part: _cat([_layer_input(use, b, part) for use in uses], dim=-2)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _kind(module: nn.Module) -> type[nn.Module]:
    return _HOOKED[type(module).forward]


def _groups_of(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


def _output_gradient(module: nn.Module, g: Tensor, b: int) -> Tensor:
    """(K, b * r, ...) -> (K, b, G, L, O), positions L running over r, time steps or pixels."""
    count, groups = len(g), _groups_of(module)
    if _kind(module) is nn.Linear:
        return g.reshape(count, b, 1, -1, g.shape[-1])
    r = g.shape[1] // b
    g = g.reshape(count, b, r, groups, g.shape[2] // groups, -1)
    if r == 1:
        return g[:, :, 0].transpose(-1, -2)
    return g.permute(0, 1, 3, 2, 5, 4).reshape(count, b, groups, -1, g.shape[4])


def _layer_input(use: Use, b: int, part: slice) -> Tensor:
    """Some examples' input, as (n, G, L, I) in the order of ``_output_gradient``."""
    r = use.shape[0] // b
    a = upcast(use.a[part.start * r : part.stop * r])
    n = part.stop - part.start
    module = use.module
    if _kind(module) is nn.Linear:
        return a.reshape(n, 1, -1, a.shape[-1])
    x = _unfold(module, a)  # (n * r, G * I, L)
    groups = _groups_of(module)
    x = x.reshape(n, r, groups, x.shape[1] // groups, x.shape[2])
    if r == 1:
        return x[:, 0].transpose(-1, -2)
    return x.permute(0, 2, 1, 4, 3).reshape(n, groups, -1, x.shape[3])


def _unfold(module: Any, a: Tensor) -> Tensor:
    """Patches of a convolution's input: (n, I * kernel, L). Conv1d is a Conv2d of height 1."""
    kernel_size, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module.padding, str):
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        sides = [(0, 0) if module.padding == "valid" else (t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in module.padding]
    pad = [side for pair in reversed(sides) for side in pair]
    if any(pad):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, pad, mode=mode)
    if a.ndim == 3:
        a = a.unsqueeze(2)
        kernel_size, stride, dilation = (1, *kernel_size), (1, *stride), (1, *dilation)
    # A strided view copied once: the same numbers as F.unfold, several times faster on a CPU.
    n, channels, *size = a.shape
    out = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(size, kernel_size, stride, dilation, strict=True)
    ]
    n_, c_, h_, w_ = a.stride()
    patches = a.as_strided(
        (n, channels, *kernel_size, *out),
        (n_, c_, h_ * dilation[0], w_ * dilation[1], h_ * stride[0], w_ * stride[1]),
        a.storage_offset(),
    )
    return patches.reshape(n, -1, out[0] * out[1])


def _unfolded_numel(use: Use) -> int:
    if _kind(use.module) is nn.Linear:
        return use.a.numel()
    weight: Any = use.module.weight
    return weight[0].numel() * _groups_of(use.module) * use.shape.numel() // use.shape[1]


# --- autograd -----------------------------------------------------------------------------------

_LOW = (torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32 for shorter types: squares and sums of many terms need the digits."""
    return torch.float32 if dtype in _LOW else dtype


def upcast(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


def _grad(f: Tensor, params: list, v: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        f, params, v, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _pull_back(f: Tensor, edges: list[GradientEdge], v: Tensor) -> list[Tensor]:
    """Gradients of v_k . f at each edge: (K, *shape of the edge's tensor)."""
    each = [
        torch.autograd.grad(f, edges, direction, retain_graph=True, materialize_grads=True,
                            allow_unused=True)
        for direction in v
    ]  # fmt: skip
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _agree(x: Tensor, truth: Tensor, low: bool) -> bool:
    tolerance = 3e-2 if low else 1e-8 if truth.dtype == torch.float64 else 1e-3
    gap = (x - truth.detach()).norm()
    return bool(gap <= tolerance * truth.norm() + torch.finfo(torch.float32).tiny)


def _basis(f: Tensor) -> Tensor:
    """The C unit directions: (C, B, C)."""
    eye = torch.eye(f.shape[1], dtype=accumulator(f.dtype), device=f.device)
    return eye.unsqueeze(1).expand(-1, len(f), -1)


def _used(v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The directions of the outputs in the mask, and their indices."""
    count = v.shape[0]
    if mask is None:
        return v, torch.arange(count, device=v.device)
    if mask.shape != (count,):
        raise ValueError(f"expected a mask of shape ({count},), got {tuple(mask.shape)}")
    index = mask.to(v.device).nonzero().squeeze(1)
    return v[index], index


# --- kernels ------------------------------------------------------------------------------------


def _groups(blocks: Tensor) -> list[Tensor]:
    return [(blocks == label).nonzero().squeeze(1) for label in blocks.unique()]


def _mean_directions(f: Tensor, likelihood: Likelihood | None, mask: Tensor | None) -> Tensor:
    """dh_c/df for h the likelihood's mean under the mask, or h = f: (C, B, C)."""
    if likelihood is None:
        return _basis(f)
    f = upcast(f.detach()).requires_grad_()
    h = likelihood.mean(likelihood.mask(f, mask))
    return torch.stack([_grad(h[:, c].sum(), [f], None)[0] for c in range(h.shape[1])])  # type: ignore[arg-type]


def _kernel(
    engine: Engine,
    inputs: Inputs,
    variance: Params,
    likelihood: Likelihood | None,
    mask: Tensor | None,
) -> Tensor:
    trace = engine.trace(inputs)
    require_finite(trace.f, "an output of the model")
    m, count = trace.f.shape
    v, used = _used(_mean_directions(trace.f, likelihood, mask), mask)
    sigma = {name: variance[name].to(v.device, v.dtype) for name in engine.params}
    out = v.new_zeros(count, m, m)
    outer: dict[str, list[Outer]] = {}
    # A few classes at a time, so that the gradients at all layers fit the working set.
    step = max(1, WORKING_SET // (4 * m * trace.plan.floats + 1))
    for start in range(0, len(v), step):
        at = used[start : start + step]
        for name, factor in trace.pull(v[start : start + step], trace.plan.hooked).items():
            if isinstance(factor, Outer):
                outer.setdefault(name, []).append(factor)
            else:
                out[at] += factor.kernel(sigma[name])
    for name, factors in outer.items():
        joined = Outer(torch.cat([factor.g for factor in factors]), factors[0].a)
        out[used] += joined.kernel(sigma[name])
    generic = trace.plan.functional | trace.plan.looped
    if generic:
        _add_generic_kernel(out, trace, v, used, generic, sigma)
    return out


def _add_generic_kernel(
    out: Tensor, trace: Trace, v: Tensor, used: Tensor, names: frozenset[str], sigma: Params
) -> None:
    """Blocks of examples against blocks: two of them are held, whatever the parameters' size."""
    engine, m = trace.engine, v.shape[1]
    size = sum(engine.params[name].numel() for name in names)
    step = max(1, min(m, WORKING_SET // (4 * size * len(v) + 1)))
    parts = [slice(i, min(m, i + step)) for i in range(0, m, step)]

    def gradients(part: slice) -> dict[str, Tensor]:
        piece = Trace(engine, take(trace.inputs, part), trace.f[part], [])
        piece.plan = trace.plan._replace(hooked=frozenset())
        return {name: x.rows().flatten(2) for name, x in piece.pull(v[:, part]).items()}

    for i, left in enumerate(parts):
        x = gradients(left)
        for right in parts[: i + 1]:
            y = x if right == left else gradients(right)
            gram = sum((x[n] * sigma[n].flatten()) @ y[n].mT for n in x)
            for k, c in enumerate(used.tolist()):
                out[c, left, right] += gram[k]  # type: ignore[index]
                if right != left:
                    out[c, right, left] += gram[k].T  # type: ignore[index]

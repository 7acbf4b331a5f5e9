r"""Per-example gradients by forward hooks: the engine under ``jacobians``.

One backward pass of an output direction gives g = dv.f/dz at the output z of every layer; with the
layer's input a, the per-example gradient of a weight is a sum of outer products over positions l
(time steps, pixels, uses):

    (J_nᵀ v_n)_oi = sum_l g_nlo a_nli.

It is kept in that form (``Outer``, ``Positions``), or multiplied out (``Rows``). Hooks record a and
z for Linear, Conv1d, Conv2d, and for the normalising layers, whose weight multiplies their
normalised input element by element. An embedding's a is one-hot, so that its gradient has few rows
(``Lookup``), also where an output layer shares its weight (``Tied``). Attention runs as the layers
that it is made of (``attention``). Any other parameter goes through ``torch.func``, or one example
at a time. Which way a parameter takes is decided by a probe: the hook-made gradients of a few
examples must agree with autograd's of the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from .attention import GroupedLinear, InProjection, attend, can_attend
from .models import Inputs, Params, forward, logits, rows, take

WORKING_SET = 64 * 2**20  # bytes of per-example quantities held at once
PROBE_ROWS = 8
_CHUNK = 8 * 2**20  # bytes of them in one matrix product
_BLOCK = 128  # examples in one matrix product of squares


# --- per-example gradients of one parameter -----------------------------------------------------


@dataclass(frozen=True)
class Outer:
    """Gradients of a weight at one position: g_o a_i, never multiplied out."""

    g: Tensor  # (K, B, O)
    a: Tensor  # (B, I)

    def rows(self) -> Tensor:
        """(K, B, O, I)."""
        return self.g.unsqueeze(-1) * self.a.unsqueeze(-2)

    def total(self, w: Tensor) -> Tensor:
        """sum_n w_n gradient_kn: (K, O, I)."""
        return (self.g * w.unsqueeze(1)).mT @ self.a

    def square_sum(self, w: Tensor) -> Tensor:
        """sum_kn w_n (gradient_kn)²: (O, I)."""
        s = _weighted_squares(self.g, w).T
        blocks = zip(s.split(_BLOCK, 1), self.a.split(_BLOCK), strict=True)
        first, a = next(blocks)
        out = first @ a.square().to(s.dtype)
        for part, a in blocks:  # the squares of a stay in the cache
            out.addmm_(part, a.square().to(s.dtype))
        return out

    def norms(self, variance: Tensor) -> Tensor:
        """sum_p variance_p (gradient_kn)_p²: (K, B)."""
        return ((self.g.square() @ variance.to(self.g.dtype)) * self.a.square()).sum(-1)

    def kernel(self, variance: Tensor) -> Tensor:
        """(K, B, B): sum_oi g_mo g_no variance_oi a_mi a_ni; the sum over i serves all K.

        Rows m are taken a few at a time against n < end: half of the products, by symmetry.
        """
        m, width = self.a.shape
        out = self.g.new_zeros(len(self.g), m, m)
        step = max(1, min(m, _CHUNK // (4 * m * (width + len(variance)) + 1)))
        for start in range(0, m, step):
            end = min(m, start + step)
            pairs = self.a[start:end].unsqueeze(1) * self.a[:end]  # (rows, end, I)
            shared = pairs @ variance.T.to(pairs.dtype)  # (rows, end, O)
            for k, g in enumerate(self.g):
                scaled = shared * g[:end]
                out[k, start:end, :end] = (scaled @ g[start:end].unsqueeze(-1)).squeeze(-1)
        lower = out.tril()
        return lower + lower.tril(-1).mT

    def at(self, n: Tensor, o: Tensor) -> Tensor:
        """Row o_u of the gradient of example n_u: (K, U, I)."""
        return self.g[:, n, o].unsqueeze(-1) * self.a[n]

    def against(self, o: Tensor, x: Tensor) -> Tensor:
        """<row o_u of the gradient of every example, x_u> for x (K, U, I): (K, B, U)."""
        return self.g[:, :, o] * (self.a @ x.mT)


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

    def total(self, w: Tensor) -> Tensor:
        return torch.stack([torch.tensordot(w[part], x, 1) for part, x in self._parts()]).sum(0)

    def square_sum(self, w: Tensor) -> Tensor:
        count, _, groups = self.g.shape[:3]
        total, w = self.g.new_zeros(()), w.to(self.g.dtype)
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

    def at(self, n: Tensor, o: Tensor) -> Tensor:
        """Row o_u of the gradient of example n_u, n ascending, in one group: (K, U, I)."""
        found = []
        for part in self._chunks():
            here = (n >= part.start) & (n < part.stop)
            example = n[here]
            g = self.g[:, example, 0].gather(
                -1, o[here].view(1, -1, 1, 1).expand(len(self.g), -1, self.g.shape[3], 1)
            )  # (K, U, L, 1)
            found.append((g.mT @ self.a(part)[example - part.start, 0]).squeeze(-2))
        return torch.cat(found, dim=1)

    def against(self, o: Tensor, x: Tensor) -> Tensor:
        """<row o_u of the gradient of every example, x_u> for x (K, U, I): (K, B, U)."""
        out = [
            (self.g[:, m, 0][..., o] * (self.a(slice(m, m + 1))[0, 0] @ x.mT)).sum(1)
            for m in range(self.g.shape[1])
        ]
        return torch.stack(out, dim=1)


@dataclass(frozen=True)
class Rows:
    """Gradients of a parameter as they are: biases, and whatever no hook handles."""

    values: Tensor  # (K, B, *shape)

    def rows(self) -> Tensor:
        return self.values

    def total(self, w: Tensor) -> Tensor:
        return torch.stack([torch.tensordot(w, x, 1) for x in self.values])

    def square_sum(self, w: Tensor) -> Tensor:
        return _weighted_squares(self.values, w).sum(0)

    def norms(self, variance: Tensor) -> Tensor:
        return (self.values.square() * variance).flatten(2).sum(-1)

    def kernel(self, variance: Tensor) -> Tensor:
        return _gram(self.values.flatten(2), variance.flatten())


@dataclass(frozen=True)
class Lookup:
    """Gradients of an embedding: g_l in row ids_l, 0 in all rows that an example does not look up.

    Held once for each example n_u and row v_u that meet: s_u (``entries``), never as one-hot.
    """

    g: Tensor  # (K, B, L, D)
    ids: Tensor  # (B, L)
    shape: torch.Size  # of the parameter, (V, D)

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """n (U,) ascending, v (U,) and s (K, U, D): an example that looks up twice has the sum."""
        b, height = len(self.ids), self.shape[0]
        keys = torch.arange(b, device=self.ids.device).unsqueeze(1) * height + self.ids
        found, place = keys.flatten().unique(return_inverse=True)
        s = self.g.new_zeros(len(self.g), len(found), self.shape[1])
        s.index_add_(1, place, self.g.flatten(1, 2))
        return found // height, found % height, s

    def rows(self) -> Tensor:
        n, v, s = self.entries
        out = s.new_zeros(*self.g.shape[:2], *self.shape)
        out[:, n, v] = s
        return out

    def total(self, w: Tensor) -> Tensor:
        n, v, s = self.entries
        out = s.new_zeros(len(s), *self.shape)
        return out.index_add_(1, v, s * w.to(s.dtype)[n].unsqueeze(1))

    def square_sum(self, w: Tensor) -> Tensor:
        n, v, s = self.entries
        return s.new_zeros(self.shape).index_add_(0, v, _weighted_squares(s, w[n]))

    def norms(self, variance: Tensor) -> Tensor:
        n, v, s = self.entries
        out = s.new_zeros(self.g.shape[:2])
        return out.index_add_(1, n, (s.square() * variance.to(s.dtype)[v]).sum(-1))

    def kernel(self, variance: Tensor) -> Tensor:
        """Pairs of entries in the same row; some entries at a time against all."""
        n, v, s = self.entries
        count, m = self.g.shape[:2]
        out = s.new_zeros(count, m, m)
        step = max(1, _CHUNK // (4 * count * len(v) + 1))
        for start in range(0, len(v), step):
            part = slice(start, start + step)
            pairs = (s[:, part] * variance.to(s.dtype)[v[part]]) @ s.mT  # (K, U', U)
            pairs = pairs * (v[part].unsqueeze(1) == v)
            columns = s.new_zeros(count, pairs.shape[1], m).index_add_(2, n, pairs)
            out.index_add_(1, n[part], columns)
        return out


@dataclass(frozen=True)
class Tied:
    """Gradients of an embedding whose weight is also that of a linear layer: their sum.

    (lookup + dense)² needs the dense gradient only in the rows that an example looks up.
    """

    lookup: Lookup
    dense: Outer | Positions

    def rows(self) -> Tensor:
        return self.lookup.rows() + self.dense.rows()

    def total(self, w: Tensor) -> Tensor:
        return self.lookup.total(w) + self.dense.total(w)

    def square_sum(self, w: Tensor) -> Tensor:
        n, v, s = self.lookup.entries
        both = 2 * (s * self.dense.at(n, v)).sum(0) * w.to(s.dtype)[n].unsqueeze(1)
        out = self.lookup.square_sum(w) + self.dense.square_sum(w)
        return out.index_add_(0, v, both)

    def norms(self, variance: Tensor) -> Tensor:
        n, v, s = self.lookup.entries
        both = 2 * (s * self.dense.at(n, v) * variance.to(s.dtype)[v]).sum(-1)
        out = self.lookup.norms(variance) + self.dense.norms(variance)
        return out.index_add_(1, n, both)

    def kernel(self, variance: Tensor) -> Tensor:
        n, v, s = self.lookup.entries
        against = self.dense.against(v, s * variance.to(s.dtype)[v])  # (K, B, U)
        both = s.new_zeros(*self.lookup.g.shape[:2], len(self.lookup.ids))
        both.index_add_(2, n, against)
        return self.lookup.kernel(variance) + self.dense.kernel(variance) + both + both.mT


Factor = Outer | Positions | Rows | Lookup | Tied


def _weighted_squares(x: Tensor, w: Tensor) -> Tensor:
    """sum_k w_n x_kn²: (K, B, ...) -> (B, ...)."""
    squares = x[0].square() if len(x) == 1 else x.square().sum(0)
    return squares.mul_(w.to(x.dtype).view(-1, *[1] * (x.ndim - 2)))


def _gram(x: Tensor, variance: Tensor) -> Tensor:
    """(K, M, P), (P,) -> (K, M, M)."""
    return (x * variance.to(x.dtype)) @ x.mT


# --- recording a forward pass -------------------------------------------------------------------


class Use(NamedTuple):
    """One call of a layer."""

    module: nn.Module
    a: Tensor  # its input, detached, the batch first
    edge: GradientEdge  # where its output's gradient arrives, also after in-place operations
    shape: torch.Size  # of its output, the batch first
    second: bool  # the batch was the second dimension: (L, B, ...)


# Keyed by the forward itself: a subclass with another forward is another layer.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, *_BATCH_NORMS)
_SEQUENCES = (nn.Linear, nn.LayerNorm, nn.Embedding)  # take (L, B, ...) as well as (B, L, ...)
_HOOKED: dict[Any, type[nn.Module]] = {
    layer.forward: layer
    for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, GroupedLinear, *_NORMS)
}


@dataclass
class Layouts:
    """Which layers read (L, B, ...), asked only where the sizes do not tell."""

    found: dict[int, bool] | None = None  # id(module) -> the batch comes second
    asked: bool = False

    def second(self, module: nn.Module) -> bool:
        """The first dimension is taken where nothing is known; a wrong guess fails the probe."""
        self.asked = True
        return (self.found or {}).get(id(module), False)

    def find(self, model: nn.Module, inputs: Inputs) -> None:
        """The batch is the dimension that grows when examples are added: two small passes."""
        shapes: list[dict[int, torch.Size]] = []
        modules = [m for m in model.modules() if type(m).forward in _HOOKED]
        for n in (2, 3):
            seen: dict[int, torch.Size] = {}

            def see(module: nn.Module, _: Any, output: Any, seen: Any = seen) -> None:
                seen[id(module)] = output.shape

            handles = [m.register_forward_hook(see) for m in modules]
            try:
                with torch.no_grad():
                    forward(model, take(inputs, torch.zeros(n, dtype=torch.int64)))
            finally:
                for handle in handles:
                    handle.remove()
            shapes.append(seen)
        self.found = {
            key: len(shape) > 2 and shape[1] != shapes[1][key][1]
            for key, shape in shapes[0].items()
            if key in shapes[1]
        }


@contextmanager
def _recording(
    model: nn.Module,
    wanted: set[int],
    uses: list[Use],
    b: int,
    projections: dict[nn.MultiheadAttention, InProjection],
    layouts: Layouts,
) -> Iterator[None]:
    """Calls of hooked layers on b examples go to ``uses``; attention runs by its projection."""

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        a = args[0] if args else kwargs.get("input")
        if isinstance(a, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            a, shape = a.detach(), output.shape
            second = _kind(module) in _SEQUENCES and len(shape) > 2 and shape[1] == b != 0
            if second and shape[0] % b == 0:  # both dimensions fit
                second = layouts.second(module)
            if second:
                a = a.transpose(0, 1)
                shape = torch.Size((shape[1], shape[0], *shape[2:]))
            uses.append(Use(module, a, get_gradient_edge(output), shape, second))

    handles = []
    try:
        for module, project in projections.items():
            module.forward = partial(attend, module, project)
        for module in (*model.modules(), *(m for p in projections.values() for m in p.modules())):
            own = {id(p) for p in module.parameters(recurse=False)}
            if type(module).forward in _HOOKED and own & wanted:
                handles.append(module.register_forward_hook(record, prepend=True, with_kwargs=True))
        yield
    finally:
        for module in projections:
            vars(module).pop("forward", None)
        for handle in handles:
            handle.remove()


Signature = tuple[Any, ...]


class Plan(NamedTuple):
    """How each parameter's gradients are made, as the probe found."""

    hooked: frozenset[str]
    functional: frozenset[str]  # by torch.func
    looped: frozenset[str]  # one example at a time
    absent: frozenset[str]  # not in the graph: exactly 0
    outputs: int = 0  # C
    floats: int = 0  # per example and direction, of gradients at the layers' outputs
    inputs: int = 0  # floats per example, of unfolded inputs


@dataclass
class Engine:
    """Traces forward passes of a model and pulls output directions back to its parameters."""

    model: nn.Module
    params: dict[str, nn.Parameter]
    plans: dict[Signature, Plan] = field(default_factory=dict)
    whole: bool = False  # attention runs as the model has it
    layouts: Layouts = field(default_factory=Layouts)

    @cached_property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @cached_property
    def names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.params.items()}

    @cached_property
    def projections(self) -> dict[nn.MultiheadAttention, InProjection]:
        """The attentions to take apart: those with a parameter that is asked for."""
        wanted = self.names.keys()
        return {
            module: InProjection(module)
            for module in self.model.modules()
            if isinstance(module, nn.MultiheadAttention)
            and can_attend(module)
            and any(id(p) in wanted for p in module.parameters())
        }

    def trace(self, inputs: Inputs) -> Trace:
        """One forward pass, its layers recorded; probed where its layout was not met before."""
        trace = self._record(inputs)
        plan = self.plans.get(trace.signature)
        if plan is None:
            few = take(inputs, slice(0, PROBE_ROWS))
            plain = forward(self.model, few)
            if self.projections and not self._same(few, plain):
                self.whole, self.plans = True, {}
                trace = self._record(inputs)
            plan = self._probe(few, plain, trace)
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
        if not self.plans:
            self.trace(take(inputs, slice(0, PROBE_ROWS)))
        cost = 4 * max(self._floats(plan, directions, whole) for plan in self.plans.values())
        step = max(1, min(n, WORKING_SET // (cost + 1)))
        return (slice(i, min(n, i + step)) for i in range(0, n, step))

    def _floats(self, plan: Plan, directions: int | None, whole: bool) -> int:
        """Numbers held for an example: gradients at the layers, rows of J, unfolded inputs."""
        held = self.params if whole else plan.functional | plan.looped
        size = sum(self.params[name].numel() for name in held)
        k = plan.outputs if directions is None else directions
        return k * (plan.outputs + plan.floats + size) + plan.inputs

    def _record(self, inputs: Inputs) -> Trace:
        uses: list[Use] = []
        projections = {} if self.whole else self.projections
        wanted = set(self.names)
        with _recording(self.model, wanted, uses, rows(inputs), projections, self.layouts):
            f = forward(self.model, inputs)
        if self.layouts.asked and self.layouts.found is None:
            self.layouts.find(self.model, inputs)
            return self._record(inputs)
        if f.ndim != 2:
            raise ValueError(f"expected outputs of shape (B, C), got {tuple(f.shape)}")
        return Trace(self, inputs, f, uses)

    def _same(self, few: Inputs, plain: Tensor) -> bool:
        """Whether a recorded forward pass, attention taken apart, gives the model's outputs."""
        f = self._record(few).f.detach()
        finite = torch.isfinite(plain.detach())
        kept, truth = f[finite], plain.detach()[finite]
        return f.shape == plain.shape and _agree(kept, truth, truth.dtype in _LOW)

    def _probe(self, few: Inputs, plain: Tensor, trace: Trace) -> Plan:
        """Compare per-example gradients with autograd's on a few examples, in one random direction.

        plain: the model's outputs on them, nothing recorded and nothing swapped.

        Only every second example has a direction for autograd, so that a layer whose first
        dimension is not the batch is found out, too, where it was taken for the batch.
        """
        probe = self._record(few)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(1, *probe.f.shape, generator=generator, dtype=torch.float64)
        v = v.to(probe.f.device, probe.f.dtype)
        some = torch.arange(len(probe.f), device=v.device) % 2 == 0
        truth = dict(
            zip(
                self.params,
                output_vjp(plain, list(self.params.values()), v[0] * some.unsqueeze(1)),
                strict=True,
            )
        )
        low = any(x.dtype in _LOW for x in (probe.f, *(use.a for use in probe.uses)))

        def agrees(name: str, factor: Factor) -> bool:
            return _agree(factor.total(some.to(accumulator(v.dtype)))[0], truth[name], low)

        hooked: set[str] = set()
        if probe.signature == trace.signature:
            none: frozenset[str] = frozenset()
            probe.plan = Plan(frozenset(probe.hookable), none, none, none)
            hooked = {n for n, factor in probe.pull(v).items() if agrees(n, factor)}
        rest = [name for name in self.params if name in trace.reached and name not in hooked]
        functional: set[str] = set()
        if rest and all(type(p) is nn.Parameter for p in self.model.parameters()):
            # A sharded (DTensor) parameter would give wrong values here without an error.
            try:
                values = self.functional_rows(few, v, rest)
            except Exception:  # whatever torch.func cannot trace; the loop below can
                values = {}
            functional = {name for name, value in values.items() if agrees(name, Rows(value))}
        batch = len(trace.f)
        used = {id(use) for name in hooked for use, _ in trace.uses_of[name]}
        kept = [use for use in trace.uses if id(use) in used]
        return Plan(
            frozenset(hooked),
            frozenset(functional),
            frozenset(rest) - functional,
            frozenset(self.params) - trace.reached.keys(),
            trace.f.shape[1],
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
                parts = output_vjp(f, chosen, v[k, n : n + 1].to(f.dtype))
                for name, part in zip(names, parts, strict=True):
                    out[name][k, n] = part
        return out


class Trace:
    """One recorded forward pass: outputs f (B, C) and the uses of its layers."""

    def __init__(self, engine: Engine, inputs: Inputs, f: Tensor, uses: list[Use]) -> None:
        self.engine = engine
        self.inputs = inputs
        self.f = f
        self.uses = uses
        none: frozenset[str] = frozenset()
        self.plan = Plan(none, none, frozenset(engine.params), none)

    @cached_property
    def signature(self) -> Signature:
        """What was called in which layout, free of the batch size where the batch comes first."""
        b = len(self.f)
        layout = tuple(
            (id(use.module), use.a.shape[1:], use.shape[1:], divmod(use.shape[0], b), use.second)
            for use in self.uses
        )
        return layout, tuple(sorted(self.reached.items()))

    @cached_property
    def reached(self) -> dict[str, int]:
        """Parameter -> how often f's graph leads to it; the others' gradients are exactly 0.

        A use that no hook sees changes the number, and so the signature. A node of Python may hide
        a graph of its own (checkpointing), so it is taken to lead to all.
        """
        names = self.engine.names
        found: dict[str, int] = {}
        seen: set[Any] = set()
        stack = [self.f.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                return dict.fromkeys(self.engine.params, 0)
            for upstream, _ in node.next_functions:
                name = names.get(id(getattr(upstream, "variable", None)))
                if name is None:
                    stack.append(upstream)
                else:
                    found[name] = found.get(name, 0) + 1
        return found

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
            module: Any = use.module
            kind = _kind(module)
            if kind in (nn.Conv1d, nn.Conv2d):
                ranked = use.a.ndim == (3 if kind is nn.Conv1d else 4)
            elif kind is nn.LayerNorm:
                ranked = use.a.ndim > len(module.normalized_shape)
            elif kind is nn.Embedding:
                ranked = not module.scale_grad_by_freq
            else:
                ranked = use.a.ndim >= 2
            if kind in _BATCH_NORMS:
                ranked = ranked and not module.training and module.running_mean is not None
            return ranked and use.shape[0] > 0 and use.shape[0] % b == 0

        def joined(uses: list[tuple[Use, str]]) -> bool:
            """One kind of layer, or an embedding and linear layers."""
            kinds = {(_kind(use.module), _groups_of(use.module)) for use, _ in uses}
            pair = {(nn.Embedding, 1), (nn.Linear, 1)}
            return len({role for _, role in uses}) == 1 and (len(kinds) == 1 or kinds == pair)

        return [
            name
            for name, uses in self.uses_of.items()
            if all(fits(use) for use, _ in uses) and joined(uses)
        ]

    def pull(self, v: Tensor, names: frozenset[str] | None = None) -> dict[str, Factor]:
        """Jᵀ v for each example and direction: v is (K, B, C). Parameters not in the graph lack."""
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

    def rows(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v of every parameter, multiplied out: name -> (K, B, *shape)."""
        factors = self.pull(v)
        count = v.shape[:2]
        return {
            name: factors[name].rows()
            if name in factors
            else torch.zeros(*count, *p.shape, dtype=accumulator(p.dtype), device=p.device)
            for name, p in self.engine.params.items()
        }

    def _hooked(self, v: Tensor, names: frozenset[str]) -> dict[str, Factor]:
        b = len(self.f)
        pairs = {name: self.uses_of[name] for name in self.engine.params if name in names}
        needed = {id(use): use for uses in pairs.values() for use, _ in uses}
        grads = _pull_back(self.f, [use.edge for use in needed.values()], v)
        at = {
            key: _output_gradient(use.module, upcast(g.transpose(1, 2) if use.second else g), b)
            for (key, use), g in zip(needed.items(), grads, strict=True)
        }
        out: dict[str, Factor] = {}
        for name, uses in pairs.items():
            shape = self.engine.params[name].shape
            lookups = [use for use, _ in uses if _kind(use.module) is nn.Embedding]
            others = [use for use, _ in uses if _kind(use.module) is not nn.Embedding]
            if not lookups:
                out[name] = _factor(others, uses[0][1], at, b, shape)
            elif not others:
                out[name] = _lookup(lookups, at, b, shape)
            else:
                dense: Any = _factor(others, "weight", at, b, shape)
                out[name] = Tied(_lookup(lookups, at, b, shape), dense)
        return out


def _lookup(uses: list[Use], at: dict[int, Tensor], b: int, shape: torch.Size) -> Lookup:
    """An embedding's uses; the row of ``padding_idx`` takes no gradient."""
    grads, ids = [], []
    for use in uses:
        each = use.a.reshape(b, -1)
        g = at[id(use)][:, :, 0]  # (K, B, L, D)
        module: Any = use.module
        if module.padding_idx is not None:
            g = g * (each != module.padding_idx).unsqueeze(-1)
        grads.append(g)
        ids.append(each)
    return Lookup(_cat(grads, dim=2), _cat(ids, dim=1), shape)


def _factor(
    uses: list[Use], role: str, at: dict[int, Tensor], b: int, shape: torch.Size
) -> Outer | Positions | Rows:
    """The gradients of one parameter, whose uses are of one kind."""
    count = len(at[id(uses[0])])
    g = _cat([at[id(use)] for use in uses], dim=-2)  # (K, B, G, L, O)
    if role == "bias":
        values = g[..., 0, :] if g.shape[-2] == 1 else g.sum(-2)
        return Rows(values.reshape(count, b, *shape))
    if _kind(uses[0].module) in _NORMS:
        a = _input_reader(uses, b)(slice(0, b))
        return Rows((g * a).sum(-2).reshape(count, b, *shape))
    if g.shape[2:4] == (1, 1) and len(shape) == 2:
        return Outer(g[:, :, 0, 0], upcast(uses[0].a).reshape(b, -1))
    return Positions(g, _input_reader(uses, b), shape)


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
    if _kind(module) in (nn.Linear, nn.Embedding):
        return g.reshape(count, b, 1, -1, g.shape[-1])
    if _kind(module) is GroupedLinear:
        g = g.reshape(count, b, -1, *g.shape[2:])  # (K, b, r, G, L, O)
        return g.transpose(2, 3).flatten(3, 4)
    if isinstance(module, nn.LayerNorm):
        return g.reshape(count, b, 1, -1, math.prod(module.normalized_shape))
    r = g.shape[1] // b
    g = g.reshape(count, b, r, groups, g.shape[2] // groups, -1)
    if r == 1:
        return g[:, :, 0].transpose(-1, -2)
    return g.permute(0, 1, 3, 2, 5, 4).reshape(count, b, groups, -1, g.shape[4])


def _layer_input(use: Use, b: int, part: slice) -> Tensor:
    """Some examples' input, as (n, G, L, I) in the order of ``_output_gradient``.

    A normalising layer multiplies its normalised input by the weight, element by element.
    """
    r = use.shape[0] // b
    a = upcast(use.a[part.start * r : part.stop * r])
    n = part.stop - part.start
    module = use.module
    if _kind(module) is nn.Linear:
        return a.reshape(n, 1, -1, a.shape[-1])
    if _kind(module) is GroupedLinear:
        return a.reshape(n, r, *a.shape[1:]).transpose(1, 2).flatten(2, 3)
    if isinstance(module, nn.LayerNorm):
        a = F.layer_norm(a, module.normalized_shape, eps=module.eps)
        return a.reshape(n, 1, -1, math.prod(module.normalized_shape))
    if isinstance(module, nn.GroupNorm):
        x = F.group_norm(a, module.num_groups, eps=module.eps).reshape(*a.shape[:2], -1)
    elif isinstance(module, _BATCH_NORMS):
        mean, var = module.running_mean, module.running_var
        x = F.batch_norm(a, mean, var, eps=module.eps).reshape(*a.shape[:2], -1)
    else:
        x = unfold(module, a)  # (n * r, G * I, L)
    groups = _groups_of(module)
    x = x.reshape(n, r, groups, x.shape[1] // groups, x.shape[2])
    if r == 1:
        return x[:, 0].transpose(-1, -2)
    return x.permute(0, 2, 1, 4, 3).reshape(n, groups, -1, x.shape[3])


def unfold(module: Any, a: Tensor) -> Tensor:
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
    if _kind(use.module) not in (nn.Conv1d, nn.Conv2d):
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


def output_vjp(f: Tensor, params: list, v: Tensor | None, again: bool = True) -> list[Tensor]:
    """d(v . f)/dparams, zeros where f does not depend on them; ``again``: f is used after."""
    if not f.requires_grad:
        return [torch.zeros_like(p) for p in params]
    parts = torch.autograd.grad(
        f, params, v, retain_graph=again, allow_unused=True, materialize_grads=True
    )
    return [part.detach().to_dense() if part.is_sparse else part.detach() for part in parts]


def _pull_back(f: Tensor, edges: list[GradientEdge], v: Tensor) -> list[Tensor]:
    """Gradients of v_k . f at each edge: (K, *shape of the edge's tensor)."""
    each = [
        torch.autograd.grad(f, edges, direction, retain_graph=True, materialize_grads=True,
                            allow_unused=True)
        for direction in v
    ]  # fmt: skip
    if len(each) == 1:
        return [part.unsqueeze(0) for part in each[0]]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _agree(x: Tensor, truth: Tensor, low: bool) -> bool:
    tolerance = 3e-2 if low else 1e-8 if truth.dtype == torch.float64 else 1e-3
    gap = (x - truth).norm()
    return bool(gap <= tolerance * truth.norm() + torch.finfo(torch.float32).tiny)

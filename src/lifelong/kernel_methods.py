r"""K-priors of kernel machines: Gaussian process regression, kernel GLMs, support vector machines.

A kernel machine is f(x) = sum_i k(x, x_i) alpha_i in the space H of the kernel, the minimiser of

    sum_i l(y_i, f(x_i)) + ½ delta ‖f‖²_H.

It is stationary where delta alpha_i = -r_i, r_i the residual of example i (a subgradient of l): a
coefficient *is* its example's share of the gradient of the past. So the machine alone knows its
K-prior, without a label: with f*_i = f*(x_i) and D the Bregman divergence of l,

    K(f) = ½ delta ‖f‖²_H + sum_i [r_i (f_i - f*_i) + D(f*_i, f_i)]
         = ½ delta ‖f - f*‖²_H + sum_i D(f*_i, f_i) + ½ delta ‖f*‖²_H,

which is the objective of all the past, at every f, up to a constant. From it fall out

    Gaussian(noise_sd)              GP regression: delta = 1, k its covariance
    Bernoulli, Categorical, Poisson kernel GLMs; the mode of a GP with that likelihood
    Hinge                           the support vector machine with C = 1 / delta

and the four adaptations: a new example is a row (f*(x), its residual there); a forgotten one is a
row less; R is a term of its own; and the rows say what the function is to be at the inputs, by
whatever kernel. Each edit is followed by a refit from the anchor, which makes the next one.

Examples that are not kept leave their gradient and their curvature, projected on the span of those
that are (``KernelPrior.memorise``). Everything is in float64; matrices are (M C, M C), so a memory
holds some thousands.
Sources: Khan & Swaroop 2021 (K-priors); Schölkopf et al. 2001 (representer theorem); Rasmussen &
Williams 2006, section 3.4 (Newton in function space); Bertsekas 1982 (projected Newton).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checkpoint, kernels, likelihoods
from .data import Data, Examples, batches
from .kernels import Kernel
from .likelihoods import Gaussian, Likelihood, require_hessian
from .models import concat, nbytes, require_finite
from .named import named, unnamed
from .predictive import Predictive, linearised

_LIMIT = 2 * 2**30  # bytes of one matrix
_EPS = torch.finfo(torch.float64).eps
_KNOWN = (kernels.RBF, kernels.Linear, kernels.Polynomial)  # positive semi-definite by themselves
_RANK = 1e-12  # of the largest eigenvalue: below it a direction of the memory is taken for none


# -------------------------------------------------------------------- the loss of an SVM


@dataclass(frozen=True)
class Hinge:
    """l = sum_c max(0, 1 - y_c f_c), y in {-1, 1}; r = -y where y f < 1, else 0.

    Labels are (B,) or (B, C), of -1 and 1 or of 0 and 1. Each column is a machine of its own: one
    column per class, 1 for that class and -1 for the others, is one-vs-rest, and the largest
    output wins. It is no likelihood: its value is a loss that is added to nats, and there are no
    error bars. Source: Cortes & Vapnik 1995.
    """

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """(B, C), (B,) or (B, C) -> (B,)."""
        return F.relu(1 - self.signs(f, y) * f).sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """The subgradient: (B, C), (B,) or (B, C) -> (B, C)."""
        y = self.signs(f, y)
        return torch.where(y * f < 1, -y, 0.0)

    def signs(self, f: Tensor, y: Tensor) -> Tensor:
        """Labels as -1 and 1 in the shape of ``f``. Raises ValueError for any others."""
        if f.ndim == 2 and f.shape[1] == 1 and y.shape == f.shape[:1]:
            y = y.unsqueeze(1)
        if y.shape != f.shape:
            raise ValueError(
                f"labels of shape {tuple(y.shape)} do not fit outputs of shape {tuple(f.shape)}: "
                "expected one column for each output (one-vs-rest), or (B,) for a single one"
            )
        y = y.to(f.dtype)
        if not ((y == 1) | (y == -1)).all() and not ((y == 1) | (y == 0)).all():
            raise ValueError(
                f"labels of a hinge loss are -1 and 1, or 0 and 1; got {y.unique()[:5].tolist()}"
            )
        return torch.where(y > 0, 1.0, -1.0).to(f.dtype)

    def validate(self, f: Tensor, y: Tensor) -> None:
        """Raises ValueError where ``y`` cannot be labels of ``f``."""
        self.signs(f, y)

    def known(self, outputs: Tensor, residuals: Tensor) -> Tensor:
        """The labels that beliefs imply: support vectors by their residual, -a y, the others by
        their output, since they lie on the right side."""
        return torch.where(residuals != 0, -residuals.sign(), outputs.sign())


# -------------------------------------------------------------------- a function


@dataclass(frozen=True, eq=False)
class KernelMachine:
    """f(x) = sum_i k(x, x_i) alpha_i: inputs (N, ...), coefficients (N, C), None where N is 0.

    likelihood: what the outputs mean (or ``Hinge``); precision: delta of ½ delta ‖f‖²_H.
    """

    kernel: Kernel
    inputs: Tensor | None
    coefficients: Tensor
    likelihood: Likelihood | Hinge
    precision: float = 1.0

    def __call__(self, inputs: Tensor) -> Tensor:
        """f at the inputs, before the likelihood's link: (B, ...) -> (B, C) in float64.

        Raises ValueError for a kernel that does not return (B, N), NonFiniteError for NaN.
        """
        inputs = _exact(inputs)
        if self.inputs is None:
            return self.coefficients.new_zeros(len(inputs), self.coefficients.shape[1])
        return _between(self.kernel, inputs, self.inputs) @ self.coefficients

    @property
    def squared_norm(self) -> Tensor:
        """‖f‖²_H = sum_c alpha_cᵀ K alpha_c."""
        if self.inputs is None:
            return self.coefficients.new_zeros(())
        k = _between(self.kernel, self.inputs, self.inputs)
        return (self.coefficients * (k @ self.coefficients)).sum()

    @property
    def support(self) -> KernelMachine:
        """The same function by those examples alone whose coefficients are not 0."""
        used = (self.coefficients != 0).any(1)
        if self.inputs is None or not bool(used.any()):
            return replace(self, inputs=None, coefficients=self.coefficients[:0])
        return replace(self, inputs=self.inputs[used], coefficients=self.coefficients[used])


# -------------------------------------------------------------------- what is remembered


@dataclass(frozen=True, eq=False)
class Beliefs:
    """Examples as a K-prior keeps them: inputs (M, ...), ids (M,), outputs f* and residuals r at
    the anchor (M, C), and the kernel between the inputs, gram (M, M)."""

    inputs: Tensor
    ids: Tensor
    outputs: Tensor
    residuals: Tensor
    gram: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor) -> Beliefs:
        """Some of them, by a (M,) mask or by indices."""
        columns = (self.inputs, self.ids, self.outputs, self.residuals)
        return Beliefs(*(c[index] for c in columns), gram=self.gram[index][:, index])


@dataclass(frozen=True)
class Cost:
    """What a change cost: Newton steps (the most of any output), gradients (examples whose loss
    was differentiated, each time anew), entries of kernel matrices computed, seconds."""

    iterations: int = 0
    gradients: int = 0
    kernel_entries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class KernelPrior:
    r"""What the past says of a function, in nats; ``machine`` is the function it was learned as.

        P(f) = ½ delta ‖f‖² + sum_kept [⟨r_i, d_i⟩ + D(f*_i, f_i)] + ⟨g, d⟩ + ½ ⟨d, G d⟩,

    d = f - f* at the remembered inputs. ``update``, ``forget``, ``replace``, ``transfer`` and
    ``memorise`` each return a new one at its own minimum, and leave this one as it is.

    kernel: ``RBF``, ``Linear``, ``Polynomial`` of ``lifelong.kernels``, or any function of inputs
        (N, ...), (M, ...) to (N, M). likelihood: or ``Hinge``. precision: delta; for a GP 1, for an
        SVM 1 / C. num_outputs: C, which share the kernel.
    beliefs: of the examples that are kept, None for none. gradient (M, C), curvature (M C, M C):
        g and G, what is left of the others. num_data: how many have been learned.
    radius: minima within this distance of f*, in the norm of H, are those of *all* examples; inf
        where all are kept, negative where nothing is certain. cost: of the last change.

    Raises ValueError where precision is not positive and finite or num_outputs below 1, TypeError
    for what is no likelihood, or one without a Hessian.
    """

    kernel: Kernel
    likelihood: Likelihood | Hinge
    precision: float = 1.0
    num_outputs: int = 1
    beliefs: Beliefs | None = None
    gradient: Tensor | None = None
    curvature: Tensor | None = None
    num_data: int = 0
    next_id: int = 0
    radius: float = math.inf
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        if not (self.precision > 0 and math.isfinite(self.precision)):
            raise ValueError(f"precision must be positive and finite, got {self.precision}")
        if self.num_outputs < 1:
            raise ValueError(f"num_outputs must be at least 1, got {self.num_outputs}")
        if not isinstance(self.likelihood, Hinge):
            require_hessian(self.likelihood, "a kernel machine")

    def __repr__(self) -> str:
        return (
            f"KernelPrior({self.kernel!r}, {self.likelihood!r}, precision={self.precision:g}, "
            f"{self.num_data:,} examples, {len(self):,} remembered)"
        )

    def __len__(self) -> int:
        """How many examples are remembered."""
        return 0 if self.beliefs is None else len(self.beliefs)

    # ---------------------------------------------------------------- value

    @property
    def machine(self) -> KernelMachine:
        """f*, the anchor: alpha = -(r + g) / delta on the remembered inputs."""
        inputs = None if self.beliefs is None else self.beliefs.inputs
        return KernelMachine(
            self.kernel, inputs, self._coefficients, self.likelihood, self.precision
        )

    @property
    def certified(self) -> bool:
        """Whether f* is known to be what training on all examples would have given.

        True where all are kept; for a ``Hinge`` also where f has moved too little since for those
        that were dropped to reach the margin. False says that it is not known.
        """
        return self.radius >= 0

    @property
    def num_bytes(self) -> int:
        """What must be stored: inputs, ids, outputs, residuals, g and G; not the kernel matrix."""
        b = self.beliefs
        kept = () if b is None else (b.inputs, b.ids, b.outputs, b.residuals)
        return sum(nbytes(t) for t in (*kept, self.gradient, self.curvature))

    def __call__(self, machine: KernelMachine) -> Tensor:
        """P(f) in nats, a scalar with a gradient in the machine's coefficients.

        At the anchor it is ½ delta ‖f*‖²_H. Raises ValueError for another kernel or number of
        outputs.
        """
        outputs = machine.coefficients.shape[1]
        if machine.kernel != self.kernel or outputs != self.num_outputs:
            raise ValueError(
                f"the prior is of functions with {self.num_outputs} outputs by {self.kernel}, got "
                f"one with {outputs} by {machine.kernel}; call prior.transfer(kernel=...) first"
            )
        value = 0.5 * self.precision * machine.squared_norm
        return value if self.beliefs is None else value + self._past(machine(self.beliefs.inputs))

    def _past(self, f: Tensor) -> Tensor:
        """P without its regulariser, from the outputs (M, C) at the remembered inputs."""
        b, loss = self._known, self.likelihood
        d = f - b.outputs
        if isinstance(loss, Hinge):  # its Bregman divergence, with the linear part put back
            y = loss.known(b.outputs, b.residuals)
            value = (loss.nll(f, y) - loss.nll(b.outputs, y)).sum()
        else:
            value = loss.kl(b.outputs, f).sum() + (b.residuals * d).sum()
        if self.gradient is not None:
            value = value + (self.gradient * d).sum()
        if self.curvature is not None:
            value = value + 0.5 * d.flatten() @ self.curvature @ d.flatten()
        return value

    # ---------------------------------------------------------------- change

    @torch.no_grad()
    def update(self, data: Data, *, ids: Tensor | None = None) -> KernelPrior:
        """Learn more examples: all that is remembered and these.

        data: as everywhere, with inputs that are one tensor. ids: (N,) by which to forget them
        later; by default those of ``Examples``, else counted on from the last.
        Raises ValueError for labels that do not fit, ids that are remembered, a memory beyond 2 GiB
        and a kernel that is not positive semi-definite; TypeError for inputs that are not tensors;
        NonFiniteError; RuntimeError where the minimum is not reached.
        """
        began = time.perf_counter()
        x, y, new_ids = _read(data, ids, self.next_id)
        old = self.beliefs
        if len(new_ids) != len(x):
            raise ValueError(f"expected one id for each of {len(x)} examples, got {len(new_ids)}")
        known = new_ids if old is None else torch.cat([old.ids, new_ids])
        if len(known.unique()) < len(known):
            raise ValueError(
                "some ids occur already, so nothing could tell these examples apart when one is to "
                "be forgotten; pass ids=... of their own"
            )
        self._require_size(len(known))
        gram = cross = _between(self.kernel, x, x)
        if not isinstance(self.kernel, _KNOWN):
            _require_positive(gram)
        entries = len(x) * len(known)
        if old is not None:
            cross = _between(self.kernel, x, old.inputs)
            gram = torch.cat([torch.cat([old.gram, cross.T], 1), torch.cat([cross, gram], 1)])
        f = x.new_zeros(len(x), self.num_outputs, dtype=torch.float64)
        if old is not None:
            f = cross @ self._coefficients
        self.likelihood.validate(f, y)
        r = self.likelihood.residual(f, y).double()
        if old is None:
            beliefs = Beliefs(x, new_ids, f, r, gram)
        else:
            beliefs = Beliefs(
                torch.cat([old.inputs, x]),
                known,
                torch.cat([old.outputs, f]),
                torch.cat([old.residuals, r]),
                gram,
            )
        start = torch.cat([self._coefficients, torch.zeros_like(f)])
        extra = len(x) * self.num_outputs
        edited = replace(
            self,
            beliefs=beliefs,
            gradient=None if self.gradient is None else F.pad(self.gradient, (0, 0, 0, len(x))),
            curvature=None
            if self.curvature is None
            else F.pad(self.curvature, (0, extra, 0, extra)),
            num_data=self.num_data + len(x),
            next_id=max(self.next_id, int(new_ids.max()) + 1),
        )
        after = edited._minimum(start, Cost(kernel_entries=entries), began, changed=len(x))
        return after._away(start, gram)

    @torch.no_grad()
    def forget(self, ids: Tensor | list[int], data: Data | None = None) -> KernelPrior:
        """Unlearn examples: as if they had never been there. Their rows are gone from the result.

        ids: of remembered examples, which needs neither their inputs nor their labels. Of those
        that are not remembered, ``data`` gives inputs and labels (``Examples`` with these ids; it
        may hold others too): their share leaves g and G, as far as the memory spans them.
        The ids of dropped examples are not stored: one that was given again names the new example.
        Raises ValueError for ids that are neither remembered nor in the data, for all that are
        remembered while g and G carry others, where G would turn indefinite, and for dropped
        support vectors, whose share is not known; RuntimeError as ``update``.
        """
        began = time.perf_counter()
        wanted = torch.as_tensor(ids, dtype=torch.int64).reshape(-1).unique()
        empty = wanted[:0]
        gone = torch.isin(self._ids, wanted)
        others = wanted[~torch.isin(wanted, self._ids)]
        given = empty if data is None else _read(data, None, 0)[2]
        missing = others[~torch.isin(others, given)]
        if len(missing):
            raise ValueError(
                f"ids {missing[:10].tolist()} are not remembered and not in the data; pass data "
                "with the examples that were dropped, or leave these ids out"
            )
        left = max(0, self.num_data - len(wanted))
        carried = self.gradient is not None or self.curvature is not None
        if carried and bool(gone.all()) and left:
            raise ValueError(
                f"no remembered example would be left, and what is known of the {left:,} others is "
                "said at these inputs; keep one of them, pass data with the others to forget them "
                "too, or learn anew from the data that stay"
            )
        edited, entries = self, 0
        if data is not None and len(others):
            edited, entries = self._without(data, others)
        edited = edited._kept(~gone, carry=False)
        # Where nothing is left, nothing that was dropped is in it any more.
        edited = replace(edited, num_data=left, radius=self.radius if left else math.inf)
        if self.beliefs is None:
            return edited
        start = self._coefficients
        after = edited._minimum(
            start[~gone], Cost(kernel_entries=entries), began, changed=int(gone.sum())
        )
        return after._away(start, self.beliefs.gram, at=~gone)

    @torch.no_grad()
    def replace(
        self, *, precision: float | None = None, likelihood: Gaussian | None = None
    ) -> KernelPrior:
        """Another regulariser: delta (an SVM's 1 / C), or the noise of a ``Gaussian``.

        As if it had been that from the start. Raises ValueError for a precision that is not
        positive, and for a likelihood of another kind, in which the past has no residuals.
        """
        began = time.perf_counter()
        edited = replace(self, precision=self.precision if precision is None else precision)
        if likelihood is not None:
            if not (isinstance(likelihood, Gaussian) and isinstance(self.likelihood, Gaussian)):
                raise ValueError(
                    f"the past was learned with {self.likelihood}; expected Gaussian noise in "
                    f"place of Gaussian noise, got {likelihood}; learn anew for another loss"
                )
            # r = (f - y) / sigma²: all that is of the data counts by its precision.
            ratio = (self.likelihood.noise_sd / likelihood.noise_sd) ** 2
            b = self.beliefs
            edited = replace(
                edited,
                likelihood=likelihood,
                beliefs=None if b is None else replace(b, residuals=ratio * b.residuals),
                gradient=None if self.gradient is None else ratio * self.gradient,
                curvature=None if self.curvature is None else ratio * self.curvature,
            )
        if self.beliefs is None:
            return edited
        start = self._coefficients
        return edited._minimum(start, Cost(), began)._away(start, self.beliefs.gram)

    @torch.no_grad()
    def transfer(
        self, *, kernel: Kernel | None = None, features: Callable[[Tensor], Tensor] | None = None
    ) -> KernelPrior:
        """Another kernel, or other features of the same inputs: features (M, ...) -> (M, ...).

        The beliefs move unchanged: what the function says at the inputs, and the residuals there.
        g and G move as functions of the outputs, an approximation. The new function starts with a
        regulariser of its own; the inputs are replaced by their features, for good.
        Raises as ``update``, and ValueError for features that change how many inputs there are.
        """
        began = time.perf_counter()
        kernel = self.kernel if kernel is None else kernel
        b = self.beliefs
        if b is None:
            return replace(self, kernel=kernel)
        # A copy: a view of some columns would keep the others.
        inputs = b.inputs if features is None else _exact(features(b.inputs)).clone()
        if len(inputs) != len(b):
            raise ValueError(f"features made {len(inputs)} inputs of {len(b)}, expected as many")
        gram = _between(kernel, inputs, inputs)
        if not isinstance(kernel, _KNOWN):
            _require_positive(gram)
        edited = replace(
            self,
            kernel=kernel,
            beliefs=replace(b, inputs=inputs, gram=gram),
            radius=self.radius if self.radius == math.inf else -math.inf,
        )
        return edited._minimum(self._coefficients, Cost(kernel_entries=len(b) ** 2), began)

    @torch.no_grad()
    def memorise(
        self, size: int | None = None, *, ids: Tensor | list[int] | None = None
    ) -> KernelPrior:
        """Remember ``size`` examples only (a memory that is smaller stays as it is), or those ids.

        The others leave their gradient and curvature, with f at their inputs read off the memory:
        f_dropped ≈ K_dm K_mm⁺ f_m. So f* becomes its projection on the span of what is kept. Exact
        where that spans the dropped ones, for Gaussian likelihoods at any f, for others to second
        order; and for a ``Hinge`` within ``radius``, if all support vectors are kept.

        size keeps, for likelihoods, the examples that explain most of the curvature of the others,
        one after another (pivoted Cholesky of H^½ K H^½); for a ``Hinge`` support vectors first,
        then those whose margin is nearest. A larger memory holds a smaller one.
        Raises ValueError for a size below 1, for ids that are not remembered, and unless exactly
        one of both is given.
        """
        if (size is None) == (ids is None):
            raise ValueError("say either how many examples to remember, or which ids")
        b = self.beliefs
        if ids is not None:
            wanted = torch.as_tensor(ids, dtype=torch.int64).reshape(-1)
            missing = wanted[~torch.isin(wanted, self._ids)]
            if len(missing) or not len(wanted):
                raise ValueError(
                    f"ids {missing[:10].tolist()} are not remembered; expected some that are"
                )
            keep = torch.isin(self._ids, wanted)
        elif size is not None and size < 1:
            raise ValueError(f"expected to remember at least 1 example, got {size}")
        else:
            keep = torch.zeros(len(self), dtype=torch.bool)
            keep[self._order(size)] = True  # type: ignore[arg-type]  # one of both was given
        if b is None or bool(keep.all()):
            return self
        radius = self.radius
        if isinstance(self.likelihood, Hinge):
            radius = min(radius, float(self._slack[~keep].min()))
        else:
            radius = -math.inf
        return replace(self._kept(keep, carry=True), radius=radius)

    # ---------------------------------------------------------------- the minimum

    def _minimum(
        self, start: Tensor, cost: Cost, began: float, *, changed: int | None = None
    ) -> KernelPrior:
        """The same function of f, up to a constant, told from its minimum: a new anchor.

        start: coefficients to begin with; changed: how many rows came or went, None for all.
        """
        if self.beliefs is None:
            return replace(self, cost=replace(cost, seconds=time.perf_counter() - began))
        b = self.beliefs
        if isinstance(self.likelihood, Hinge):
            r, steps, evaluations = self._quadratic_programme(changed)
            g = self.gradient
            alpha = -(r if g is None else r + g) / self.precision
            f = b.gram @ alpha
        else:
            alpha, steps, evaluations = self._newton(start)
            f = b.gram @ alpha
            g = self._carried(f)
            # Stationarity decides r, not the likelihood: what Newton's method left of the gradient
            # becomes a change of the labels in their last digits, and the anchor is exact.
            r = -self.precision * alpha - (0.0 if g is None else g)
        cost = replace(
            cost,
            iterations=steps,
            gradients=evaluations * len(b),
            seconds=time.perf_counter() - began,
        )
        beliefs = replace(b, outputs=f, residuals=r)
        return replace(self, beliefs=beliefs, gradient=g, cost=cost)

    def _newton(
        self, alpha: Tensor, *, tolerance: float = 1e-12, max_iterations: int = 200
    ) -> tuple[Tensor, int, int]:
        """Newton's method on e(alpha) = delta alpha + dP/df(K alpha), the gradient's coefficients.

        Its Jacobian delta I + W K has no inverse of K and no eigenvalue below delta, so copies of a
        point and singular kernels do no harm. Steps are halved until ‖e‖_H falls.
        """
        k, delta = self._known.gram, self.precision

        def gradient(alpha: Tensor) -> tuple[Tensor, float, float]:
            slope = self._slope(k @ alpha)
            e = delta * alpha + slope
            return e, _norm(k, e), _norm(k, slope)

        e, size, scale = gradient(alpha)
        evaluations = 1
        # From exp(f) too large Newton's method comes down by 1 a step: perhaps 0 is nearer.
        if not float((k @ alpha).abs().max()) < 30:
            zero = torch.zeros_like(alpha)
            other = gradient(zero)
            evaluations += 1
            if not size <= other[1]:
                alpha, (e, size, scale) = zero, other
        for step in range(max_iterations):
            w = self._bend(k @ alpha)
            # Large coefficients cancel in K alpha, and leave it known to eps |K| |alpha| only.
            blur = _EPS * (w.abs() @ (k.abs() @ alpha.abs()).flatten()).reshape(e.shape)
            rounding = _norm(k.abs(), blur)
            if size <= tolerance * scale + rounding:
                return alpha, step, evaluations
            change = torch.linalg.solve(self._system(w), e.flatten()).reshape(e.shape)
            length, close = 1.0, size <= 1e-7 * scale + 100 * rounding
            while length > (0.5 if close else 1e-9):
                moved = alpha - length * change
                e_new, new, scale_new = gradient(moved)
                evaluations += 1
                if new <= (1 - 1e-4 * length) * size:
                    alpha, e, size, scale = moved, e_new, new, scale_new
                    break
                length /= 2
            else:
                if close:
                    return alpha, step, evaluations
                break
        raise RuntimeError(
            f"the gradient's norm stopped at {size:.2g}, beside parts of {scale:.2g}; raise the "
            "precision, or look for outputs that overflow (counts, kernels of a high degree)"
        )

    def _quadratic_programme(self, changed: int | None) -> tuple[Tensor, int, int]:
        """The residuals -a y at the minimum of a hinge prior, by its dual, output by output:

        min_a ½ ‖sum_i (a_i y_i - g_i) k(., x_i)‖²_H / delta - sum_i a_i,   0 <= a <= 1.
        """
        b, delta = self._known, self.precision
        signs = Hinge().known(b.outputs, b.residuals)
        found, steps, evaluations = [], 0, 0
        few = 0 if changed is None or 4 * changed > len(b) else 10 + 2 * changed
        for c in range(self.num_outputs):
            y, r = signs[:, c], b.residuals[:, c]
            linear = torch.ones_like(y)
            if self.gradient is not None:
                linear = linear + y * (b.gram @ self.gradient[:, c]) / delta
            q = y.unsqueeze(1) * b.gram * y / delta
            a, own = _minimise_in_box(q, linear, r.abs(), few)
            found.append(-a * y)
            steps, evaluations = max(steps, own), max(evaluations, own + 1)
        return torch.stack(found, 1), steps, evaluations

    def _slope(self, f: Tensor) -> Tensor:
        """dP/df without the regulariser, of a likelihood: (M, C)."""
        b, likelihood = self._known, self._smooth
        slope = likelihood.residual(f, likelihood.mean(b.outputs)) + b.residuals
        g = self._carried(f)
        return slope if g is None else slope + g

    def _carried(self, f: Tensor) -> Tensor | None:
        """g + G d."""
        if self.curvature is None:
            return self.gradient
        d = f - self._known.outputs
        bent = (self.curvature @ d.flatten()).reshape(d.shape)
        return bent if self.gradient is None else self.gradient + bent

    def _bend(self, f: Tensor) -> Tensor:
        """W: the likelihoods' Hessians and G, (M C, M C)."""
        w = torch.block_diag(*self._smooth.hessian(f))
        return w if self.curvature is None else w + self.curvature

    def _system(self, w: Tensor) -> Tensor:
        """delta I + W K, (M C, M C)."""
        k, c = self._known.gram, self.num_outputs
        product = torch.einsum("apd,pn->and", w.reshape(-1, len(k), c), k).reshape(w.shape)
        return product + self.precision * torch.eye(len(w), dtype=w.dtype, device=w.device)

    def _away(self, start: Tensor, gram: Tensor, at: Tensor | None = None) -> KernelPrior:
        """This prior, its radius shorter by how far its f* lies from the function ``start``.

        start: coefficients on the rows of ``gram``; at: which of those rows are still there.
        """
        if not math.isfinite(self.radius):
            return self
        change = -start
        change[slice(None) if at is None else at] += self._coefficients
        return replace(self, radius=self.radius - _norm(gram, change))

    # ---------------------------------------------------------------- what is left of the others

    def _kept(self, keep: Tensor, *, carry: bool) -> KernelPrior:
        """Some of the remembered examples. carry: the others leave their gradient and curvature,
        beside what g and G say already; else they are gone."""
        b = self.beliefs
        if b is None or bool(keep.all()):
            return self
        kept = b.rows(keep)
        if not len(kept):
            return replace(self, beliefs=None, gradient=None, curvature=None)
        g, w = self.gradient, self.curvature
        if carry:
            dropped = (~keep).unsqueeze(1) * b.residuals
            if bool(dropped.any()):
                g = dropped if g is None else g + dropped
            if not isinstance(self.likelihood, Hinge):
                h = (~keep).reshape(-1, 1, 1) * self.likelihood.hessian(b.outputs)
                w = torch.block_diag(*h) if w is None else w + torch.block_diag(*h)
        if g is not None or w is not None:
            spanned = torch.zeros(len(b), len(kept), dtype=b.gram.dtype, device=b.gram.device)
            spanned[keep] = torch.eye(len(kept), dtype=b.gram.dtype, device=b.gram.device)
            spanned[~keep] = _spanned(b.gram[~keep][:, keep], kept.gram)
            g = None if g is None else spanned.T @ g
            w = None if w is None else _seen(w, spanned, self.num_outputs)
        return replace(self, beliefs=kept, gradient=g, curvature=w)

    def _without(self, data: Data, ids: Tensor) -> tuple[KernelPrior, int]:
        """g and G without examples that are not remembered, and the kernel entries it took."""
        x, y, known = _read(data, None, 0)
        chosen = torch.isin(known, ids)
        x, y = x[chosen], y[chosen]
        if isinstance(self.likelihood, Hinge):
            if self.gradient is None:
                return self, 0  # no support vectors were dropped, and the others left nothing
            raise ValueError(
                "support vectors were dropped, and nothing tells how much each of them left; "
                "forget them while they are remembered, or learn anew from the data that stay"
            )
        b, w = self.beliefs, self.curvature
        if b is None or w is None:
            raise ValueError(
                f"ids {ids[:10].tolist()} were never learned: nothing was dropped from the memory"
            )
        cross = _between(self.kernel, x, b.inputs)
        f = cross @ self._coefficients
        self.likelihood.validate(f, y)
        spanned = _spanned(cross, b.gram)
        r = spanned.T @ self.likelihood.residual(f, y)
        h = _seen(torch.block_diag(*self.likelihood.hessian(f)), spanned, self.num_outputs)
        left = w - h
        # Only on functions of H: a memory with more points than its span is wide has other values.
        root = _root(b.gram, self.num_outputs)
        before, after = (torch.linalg.eigvalsh(root @ v @ root) for v in (w, left))
        if float(after[0]) < -1e-8 * float(before[-1]):
            raise ValueError(
                "without these examples the curvature would be indefinite: they were not learned, "
                "were forgotten before, or f has moved since they were dropped; learn anew from "
                "the data that stay"
            )
        g = -r if self.gradient is None else self.gradient - r
        return replace(self, gradient=g, curvature=left), cross.numel()

    @property
    def _slack(self) -> Tensor:
        """How far f may move in H before a row's hinge is felt: (y f - 1) / sqrt k(x, x), the
        least of its outputs; -inf for support vectors. (M,)"""
        b = self._known
        margin = Hinge().known(b.outputs, b.residuals) * b.outputs - 1
        slack = margin / b.gram.diagonal().clamp(min=_EPS).sqrt().unsqueeze(1)
        return torch.where(b.residuals != 0, -math.inf, slack).amin(1)

    def _order(self, size: int) -> Tensor:
        """The ``size`` remembered examples that are the last to be dropped."""
        if self.beliefs is None:
            return torch.empty(0, dtype=torch.int64)
        if isinstance(self.likelihood, Hinge):
            return torch.sort(self._slack, stable=True).indices[:size]
        b = self.beliefs
        root = self.likelihood.hessian_trace(b.outputs).sqrt()
        return _pivots(root.unsqueeze(1) * b.gram * root, size)

    # ---------------------------------------------------------------- small things

    @property
    def _known(self) -> Beliefs:
        return self.beliefs  # type: ignore[return-value]  # asked only where there are some

    @property
    def _smooth(self) -> Likelihood:
        return self.likelihood  # type: ignore[return-value]  # asked only where it is no Hinge

    @property
    def _ids(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64) if self.beliefs is None else self.beliefs.ids

    @property
    def _coefficients(self) -> Tensor:
        """alpha of the anchor: (M, C)."""
        b = self.beliefs
        if b is None:
            return torch.zeros(0, self.num_outputs, dtype=torch.float64)
        return -(b.residuals if self.gradient is None else b.residuals + self.gradient) / (
            self.precision
        )

    def _require_size(self, size: int) -> None:
        if 8 * (size * self.num_outputs) ** 2 > _LIMIT:
            raise ValueError(
                f"{size:,} examples and {self.num_outputs} outputs make a matrix beyond "
                f"{_LIMIT / 2**30:.0f} GiB; call prior.memorise(size) first: "
                f"{int((_LIMIT / 8) ** 0.5) // self.num_outputs:,} examples fit"
            )

    # ---------------------------------------------------------------- error bars

    @torch.no_grad()
    def posterior(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """f as a Gaussian process: mean (B, C) and covariance (B, C, C) at each input.

            f*(x),    (k(x, x) - k_xm W (delta I + K W)⁻¹ k_mx) / delta,    W = H + G

        Exact for Gaussian likelihoods, else Laplace's. Raises TypeError for a ``Hinge``.
        """
        if isinstance(self.likelihood, Hinge):
            raise TypeError(
                "a hinge loss is no likelihood, so nothing says how uncertain f is; take "
                "Bernoulli() for error bars"
            )
        x, c = _exact(inputs), self.num_outputs
        prior = _diagonal(self.kernel, x).reshape(-1, 1, 1) * torch.eye(c, dtype=torch.float64)
        b = self.beliefs
        if b is None:
            return prior.new_zeros(len(x), c), prior / self.precision
        cross = _between(self.kernel, x, b.inputs)
        w = self._bend(b.outputs)
        inner = torch.linalg.solve(self._system(w), w).reshape(len(b), c, len(b), c)
        known = torch.einsum("bm,mcnd,bn->bcd", cross, inner, cross)
        return cross @ self._coefficients, (prior - known) / self.precision

    def predict(self, inputs: Tensor) -> Predictive:
        """The law of a new label at each input. Raises TypeError for a ``Hinge``."""
        f, covariance = self.posterior(inputs)
        return linearised(f, covariance, self.likelihood)  # type: ignore[arg-type]

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file, atomically; ``KernelPrior.load`` reads it.

        Raises TypeError for a kernel or likelihood that is not the library's, and so has no name;
        OSError where the folder cannot be written; an old file is then left as it was.
        """
        return checkpoint.save(path, self.state_dict(), kind="kernel prior")

    @classmethod
    def load(cls, path: str | Path) -> KernelPrior:
        """What ``save`` wrote, on the CPU. Raises FileNotFoundError, CheckpointError."""
        return cls.from_state_dict(checkpoint.load(path, kind="kernel prior"))

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and plain values, as ``checkpoint.save`` takes it."""
        for value, module in ((self.kernel, kernels), (self.likelihood, likelihoods)):
            if type(value).__module__ != module.__name__ and not isinstance(value, Hinge):
                raise TypeError(
                    f"{value!r} cannot be saved: a file holds names and numbers only; expected one "
                    f"of {module.__name__}"
                )
        b = self.beliefs
        names = ("inputs", "ids", "outputs", "residuals")
        return {
            "kernel": named(self.kernel),
            "likelihood": named(self.likelihood),
            "precision": self.precision,
            "num_outputs": self.num_outputs,
            "beliefs": None if b is None else {n: getattr(b, n) for n in names},
            "gradient": self.gradient,
            "curvature": self.curvature,
            "num_data": self.num_data,
            "next_id": self.next_id,
            "radius": self.radius,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> KernelPrior:
        """Raises KeyError for a missing entry, ValueError for a kernel that is not known."""
        kernel, known = unnamed(kernels, state["kernel"]), state["beliefs"]
        hinge = state["likelihood"]["name"] == "Hinge"
        beliefs = None
        if known is not None:
            beliefs = Beliefs(**known, gram=_between(kernel, known["inputs"], known["inputs"]))
        return cls(
            kernel=kernel,
            likelihood=Hinge() if hinge else unnamed(likelihoods, state["likelihood"]),
            beliefs=beliefs,
            **{
                name: state[name]
                for name in (
                    "precision", "num_outputs", "gradient", "curvature", "num_data", "next_id",
                    "radius",
                )
            },
        )  # fmt: skip


def _read(data: Data, ids: Tensor | None, next_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in float64, labels and ids of all the data."""
    parts = list(batches(data))
    x, y = concat([part.inputs for part in parts]), torch.cat([part.labels for part in parts])
    if not isinstance(x, Tensor):
        raise TypeError("a kernel reads one tensor of inputs, got a dict; stack what it needs")
    if ids is not None:
        own = torch.as_tensor(ids, dtype=torch.int64).reshape(-1).clone()
    elif isinstance(data, Examples):
        own = torch.cat([part.ids for part in parts])
    else:
        own = next_id + torch.arange(len(x))
    return _exact(x), y, own


def _exact(inputs: Tensor) -> Tensor:
    """Floating inputs in float64; a kernel of one's own may read others. NonFiniteError for NaN."""
    inputs = torch.as_tensor(inputs)
    if not inputs.is_floating_point():
        return inputs
    require_finite(inputs, "an input")
    return inputs.detach().double()


def _between(kernel: Kernel, x: Tensor, others: Tensor) -> Tensor:
    """k(x, x') in float64, checked: (N, M)."""
    k = kernel(x, others)
    if k.shape != (len(x), len(others)):
        raise ValueError(
            f"the kernel made {tuple(k.shape)} of {len(x)} and {len(others)} inputs, expected "
            f"({len(x)}, {len(others)})"
        )
    require_finite(k, "the kernel")
    return k.double()


def _diagonal(kernel: Kernel, x: Tensor, step: int = 64) -> Tensor:
    """k(x, x) of each input, (N,)."""
    return torch.cat([_between(kernel, part, part).diagonal() for part in x.split(step)])


def _require_positive(gram: Tensor) -> None:
    """Raise ValueError where it is not symmetric, or has an eigenvalue below 0."""
    size = float(gram.abs().max())
    if not torch.allclose(gram, gram.T, rtol=0, atol=1e-8 * size):
        raise ValueError("the kernel is not symmetric: expected k(x, x') = k(x', x)")
    lowest = float(torch.linalg.eigvalsh(gram)[0])
    if lowest < -1e-8 * size * len(gram):
        raise ValueError(
            f"the kernel is not positive semi-definite between these inputs (its matrix has the "
            f"eigenvalue {lowest:.3g}), so it is no kernel of a space of functions"
        )


def _norm(k: Tensor, coefficients: Tensor) -> float:
    """‖sum_i k(., x_i) e_i‖_H."""
    return float((coefficients * (k @ coefficients)).sum().clamp(min=0).sqrt())


def _spanned(cross: Tensor, gram: Tensor) -> Tensor:
    """K_dm K_mm⁺: outputs at dropped inputs as combinations of those in memory, (D, M)."""
    return cross @ torch.linalg.pinv(gram, rtol=_RANK, hermitian=True)


def _root(gram: Tensor, c: int) -> Tensor:
    """The symmetric root of K ⊗ I, (M C, M C)."""
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return torch.kron(root, torch.eye(c, dtype=gram.dtype, device=gram.device))


def _seen(w: Tensor, spanned: Tensor, c: int) -> Tensor:
    """(T ⊗ I)ᵀ W (T ⊗ I): a curvature in the outputs of the memory, T (N, M) from ``_spanned``."""
    n, m = spanned.shape
    w = torch.einsum("nk,ncpd,pl->kcld", spanned, w.reshape(n, c, n, c), spanned)
    return w.reshape(m * c, m * c)


def _pivots(a: Tensor, size: int) -> Tensor:
    """The first pivots of a pivoted Cholesky factor: each the largest of what is left of the
    diagonal, given those before it."""
    left, rows, chosen = a.diagonal().clone(), a.new_zeros(0, len(a)), []
    for _ in range(min(size, len(a))):
        pivot = int(left.argmax())
        row = (a[pivot] - rows[:, pivot] @ rows) / left[pivot].clamp(min=_EPS).sqrt()
        if float(left[pivot]) > _EPS * float(a.diagonal().max()):
            rows = torch.cat([rows, row.unsqueeze(0)])
            left = (left - row.square()).clamp(min=0)
        left[pivot] = -1.0  # below what the others have left: none is chosen twice
        left[chosen] = -1.0
        chosen.append(pivot)
    return torch.tensor(chosen)


def _minimise_in_box(q: Tensor, b: Tensor, a: Tensor, few: int = 0) -> tuple[Tensor, int]:
    """min ½ aᵀ Q a - bᵀ a over 0 <= a <= 1, Q positive semi-definite: (a, systems solved).

    First ``few`` steps from the bounds that are active in ``a``, one after another, which are
    enough after a small change, and small systems; else by an interior point, which tells nearly
    all bounds at once. The end is told by the duality gap, which is a sum of terms that are not
    negative, so that no digit cancels; ½ delta ‖f - f'‖²_H is below it. Raises RuntimeError where
    the gap stays above what rounding explains.
    """
    box = _Box(q, b)
    a, steps = box.active_set(a.clamp(0, 1), few)
    if not box.done(a):
        inner, more = box.interior()
        polished, last = box.active_set(inner, 100)
        steps += more + last
        a = min(a, inner, polished, key=box.gap)
    if box.gap(a) > 1e4 * box.rounding(a):
        raise RuntimeError(
            f"the duality gap stopped at {box.gap(a):.2g} nats; raise the precision (a softer "
            "margin), or scale the inputs"
        )
    return a, steps


class _Box:
    """½ aᵀ Q a - bᵀ a over 0 <= a <= 1, s = Q a - b its slope."""

    def __init__(self, q: Tensor, b: Tensor) -> None:
        self.q, self.b = q, b
        self.size = q.diagonal().clamp(min=_EPS)
        self.ridge = len(q) * _EPS * self.size.max()

    def gap(self, a: Tensor) -> float:
        """sum_i (1 - a_i) (-s_i)⁺ + a_i s_i⁺."""
        s = self.q @ a - self.b
        return float(((1 - a) * F.relu(-s) + a * F.relu(s)).sum())

    def rounding(self, a: Tensor) -> float:
        """What is left of the gap where s is 0 but for rounding."""
        return 4 * _EPS * float((self.q.abs() @ a + self.b.abs()).sum())

    def done(self, a: Tensor) -> bool:
        return self.gap(a) <= self.rounding(a)

    def active_set(self, a: Tensor, max_steps: int) -> tuple[Tensor, int]:
        """The primal active set method from a feasible a: (a, steps); the value never rises.

        Those inside their bounds are solved for, up to the first bound that is met; when none is,
        the one that wants to leave its bound most is let go.
        """
        free, solved = (a > 0) & (a < 1), False
        for step in range(max_steps):
            s = self.q @ a - self.b
            if self.done(a):
                return a, step
            if solved or not bool(free.any()):
                pull = torch.where(free, 0.0, torch.where(a <= 0, -s, s) / self.size.sqrt())
                free = free.clone()
                free[pull.argmax()] = True
            inner = self.q[free][:, free]
            inner = inner + self.ridge * torch.eye(len(inner), dtype=a.dtype, device=a.device)
            d = torch.zeros_like(a)
            d[free] = -torch.linalg.solve(inner, s[free])
            room = torch.where(d < 0, a / -d, torch.where(d > 0, (1 - a) / d, math.inf))
            length = min(1.0, float(room.min()))
            met = free & (room <= length)
            a = torch.where(met, (d > 0).to(a.dtype), a + length * d).clamp(0, 1)
            free, solved = free & ~met, length == 1.0
        return a, max_steps

    def interior(self, max_iterations: int = 100) -> tuple[Tensor, int]:
        """Mehrotra's predictor and corrector, from the middle: (a, steps).

        z and w multiply a >= 0 and v = 1 - a >= 0; s = z - w throughout. Q + z / a + w / v is
        positive definite whatever Q. Source: Nocedal & Wright 2006, algorithm 16.4.
        """
        a = torch.full_like(self.b, 0.5)
        v, s = 1 - a, self.q @ a - self.b
        margin = s.abs().mean().clamp(min=1.0)
        z, w = F.relu(s) + margin, F.relu(-s) + margin
        step = 0
        while step < max_iterations:
            mu = (a @ z + v @ w) / (2 * len(a))
            if 2 * len(a) * float(mu) <= self.rounding(a):
                break
            factor, info = torch.linalg.cholesky_ex(self.q + torch.diag(z / a + w / v))
            if int(info):
                break
            lost = self.q @ a - self.b - z + w  # 0 but for rounding
            da, dz, dw = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a)
            centre, length = 0.0, 1.0
            for last in (False, True):
                low, high = centre - a * z - da * dz, centre - v * w + da * dw
                right = (low / a - high / v - lost).unsqueeze(1)
                da = torch.cholesky_solve(right, factor).squeeze(1)
                dz, dw = (low - z * da) / a, (high + w * da) / v
                length = min(_reach(a, da), _reach(v, -da), _reach(z, dz), _reach(w, dw))
                if not last:
                    ahead = (a + length * da) @ (z + length * dz)
                    ahead = ahead + (v - length * da) @ (w + length * dw)
                    centre = float((ahead / (2 * len(a) * mu)) ** 3 * mu)
            length = min(1.0, 0.995 * length)
            a, v, z, w = a + length * da, v - length * da, z + length * dz, w + length * dw
            step += 1
        # Beyond their multipliers lies the bound.
        a = torch.where(a < z * _EPS**0.25 / self.size, 0.0, a)
        return torch.where(v < w * _EPS**0.25 / self.size, 1.0, a).clamp(0, 1), step


def _reach(x: Tensor, change: Tensor) -> float:
    """The largest step, up to 1 / 0.995, that leaves x positive."""
    ratio = torch.where(change < 0, -x / change, math.inf)
    return min(1 / 0.995, float(ratio.min()))

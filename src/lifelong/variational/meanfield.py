r"""Diagonal Gaussians: IVON, Vadam, VOGN. One state, three ways to read the curvature.

q = N(m, 1 / precision), precision = ess · h + p0, all by element. ``ess`` (effective sample size)
is the number of examples that the mean loss stands for, h the curvature of the mean loss, and the
prior is N(m0, 1 / p0): N(0, 1 / (ess · weight_decay)), or yesterday's posterior. With
delta = p0 / ess, "weight decay" is delta (m - m0), by element.

What a step sees are weighted means over the sampled passes since the last step, of the gradient g
and of a statistic s:

    IVON   s = noise · g      E[ess (h + delta) s] = E_q[diagonal of the Hessian] (Stein)
    Vadam  s = g²             of the mini-batch's mean gradient
    VOGN   s = mean_i g_i²    of the examples' gradients

Sources: Khan et al. 2018 (Vadam; VON and VOGN in its section 3), Osawa et al. 2019 (VOGN on large
networks), Lin, Schmidt & Khan 2020 (the term that keeps h + delta > 0), Shen et al. 2024 (IVON).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import Diagonal
from ..data import head_mask
from ..distributed import Ranks
from ..errors import StaleAnchorError
from ..hooks import Engine, accumulator, upcast
from ..jacobians import differentiating, require_deterministic_mode, residual
from ..likelihoods import Likelihood
from ..models import Inputs, move, parameters, require_finite, rows, take
from ..posterior import Posterior
from .base import ParamsOrGroups, Variational, positive, require_held


class MeanField(Variational):
    """What the diagonal ones share: the prior, sampling, accumulating, several ranks."""

    def __init__(
        self,
        params: ParamsOrGroups,
        defaults: dict[str, Any],
        *,
        prior: Posterior | None,
        generator: torch.Generator | None,
        ranks: Ranks | None,
    ) -> None:
        super().__init__(params, defaults, generator=generator, ranks=ranks)
        for group in self.param_groups:
            positive(ess=group["ess"])
            if not (group["weight_decay"] >= 0 and math.isfinite(group["weight_decay"])):
                raise ValueError(
                    "weight_decay must be finite and not negative, got "
                    f"{group['weight_decay']}; it is the prior's precision / ess"
                )
        if prior is not None:
            self._believe(prior)

    def _believe(self, prior: Posterior) -> None:
        """The prior of the parameters that it names; the others keep N(0, 1/(ess weight_decay))."""
        by_name = {self.names.get(id(p)): p for p, _ in self._trainable()}
        if set(by_name) == {None}:
            raise ValueError(
                "a prior holds its tensors by name, but the parameters came without names; "
                "pass model.named_parameters()"
            )
        missing = [name for name in prior.mean if name not in by_name]
        resized = [
            name for name, m in prior.mean.items()
            if name in by_name and by_name[name].shape != m.shape
        ]  # fmt: skip
        if missing or resized:
            raise StaleAnchorError(
                "the prior was made for other parameters: missing here "
                f"{missing[:5]}, resized {resized[:5]}; expected the same names and shapes"
            )
        for name, g in prior.curvature.diagonal().items():
            if not bool((g + prior.prior_precision > 0).all()):
                raise ValueError(f"the prior's precision of {name} is not positive everywhere")
            p = by_name[name]
            kind: Any = {"device": p.device, "dtype": accumulator(p.dtype), "copy": True}
            self.state[p]["prior_mean"] = prior.mean[name].detach().to(**kind)
            self.state[p]["prior_precision"] = g.detach().to(**kind) + prior.prior_precision
            self.state[p]["prior_base"] = float(prior.prior_precision)

    # ------------------------------------------------------------------ the Gaussian

    def _prior(self, p: Tensor, group: Mapping[str, Any]) -> tuple[Any, Any]:
        """m0 and p0: tensors of the parameter's shape, or numbers."""
        state = self.state[p]
        if "prior_precision" in state:
            return state["prior_mean"], state["prior_precision"]
        return 0.0, group["ess"] * group["weight_decay"]

    def _filled(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The parameter's state, made where it is met for the first time."""
        state = self.state[p]
        if "hess" not in state:
            dtype = accumulator(p.dtype)
            state["step"] = 0
            state["momentum"] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            state["hess"] = torch.full_like(p, group["hess_init"], dtype=dtype, requires_grad=False)
        return state

    def precision(self, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        """ess · h + p0 of a parameter and its group, in nats; 1 / precision is the variance."""
        return group["ess"] * self._filled(p, group)["hess"] + self._prior(p, group)[1]

    def gaussian(self, names: Mapping[int, str]) -> Posterior:
        held = list(self._trainable())
        bases = [self.state[p].get("prior_base", g["ess"] * g["weight_decay"]) for p, g in held]
        base = min(bases)
        values = {}
        for p, group in held:
            state = self._filled(p, group)
            if state["step"] == 0:  # never trained: h is where it was set, and tells nothing
                precision = self._prior(p, group)[1] + torch.zeros_like(state["hess"])
            else:
                precision = self.precision(p, group)
            values[names[id(p)]] = precision - base
        mean = {names[id(p)]: self._mean(p).clone() for p, _ in held}
        return Posterior(mean, Diagonal(values), base)

    # ------------------------------------------------------------------ passes

    @contextmanager
    def sampled_params(self, train: bool = False, weight: float = 1.0) -> Iterator[None]:
        """The weights are a draw from q inside, and the mean again after, also after an error.

        train: the gradients found inside are taken in, for the next ``step``; ``.grad`` is empty
        before and after. Clip gradients inside. Several passes before a step are averaged, with
        ``weight``: of micro-batches, pass the number of examples, and do not divide the losses.
        A parameter without a gradient in one of them counts as 0 there; without any it is left as
        it is, with its h, momentum and mean.

        Raises RuntimeError where contexts are nested, or nothing was differentiated; ValueError
        for a weight that is not positive.
        """
        if train:
            positive(weight=weight)
        with torch.no_grad():
            noise = [
                (p, self._normal(p.shape, p) * self.precision(p, group).rsqrt())
                for p, group in self._trainable()
            ]
        if train and not self._sampling:
            _clear(p for p, _ in noise)
        with self._perturbed(noise):
            try:
                yield
                if train:
                    self._collect(noise, weight)
            finally:
                if train:
                    _clear(p for p, _ in noise)

    @torch.no_grad()
    def _collect(self, noise: list[tuple[nn.Parameter, Tensor]], weight: float) -> None:
        found = [(p, e, p.grad) for p, e in noise if p.grad is not None]
        if not found:
            raise RuntimeError(
                "sampled_params(train=True) ended without a gradient; expected loss.backward() "
                "inside of it"
            )
        for p, e, grad in found:
            g = upcast(grad.to_dense() if grad.is_sparse else grad)
            self._add(p, g, self._statistic(g, e), weight)
        self._weight += weight

    def _add(self, p: Tensor, grad: Tensor, statistic: Tensor, weight: float) -> None:
        state = self.state[p]
        if "grad_sum" not in state:
            state["grad_sum"] = torch.zeros_like(state["hess"])
            state["statistic_sum"] = torch.zeros_like(state["hess"])
        state["grad_sum"].add_(grad, alpha=weight)
        state["statistic_sum"].add_(statistic, alpha=weight)

    def _statistic(self, grad: Tensor, noise: Tensor) -> Tensor:
        """What a pass tells of the curvature, summed over passes."""
        raise NotImplementedError  # noise times gradient, or squares: the method's own

    # ------------------------------------------------------------------ steps

    _HOW = "`with optimizer.sampled_params(train=True): loss.backward()`"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from the passes since the last one; returns the closure's mean loss, or None.

        closure: clears gradients, computes the loss and its gradients; it is called
        ``mc_samples`` times, each at weights of its own. With ``ranks`` the means are over the
        passes of all ranks.

        Raises RuntimeError without a sampled pass, inside of ``sampled_params``, or where
        gradients were taken at the mean; NonFiniteError where a mean is NaN or infinite: then the
        passes are dropped, and nothing else is changed.
        """
        loss = None
        if closure is not None:
            losses = []
            for _ in range(self.param_groups[0]["mc_samples"]):
                with self.sampled_params(train=True), torch.enable_grad():
                    losses.append(closure())
            loss = sum(losses) / len(losses)
        self._require_passes(self._HOW)
        with torch.no_grad():
            found = self._means()
            if found:
                sums = torch.stack([(g.sum() + s.sum()).cpu() for _, _, g, s in found])
                require_finite(sums, "a gradient of the sampled passes")
            for p, group, grad, statistic in found:
                self._update(p, grad, statistic, group, self._filled(p, group))
        return loss

    def _means(self) -> list[tuple[nn.Parameter, dict[str, Any], Tensor, Tensor]]:
        """(parameter, group, mean gradient, mean statistic) of those that had a gradient."""
        held = list(self._trainable())
        sums: list[tuple[Tensor, Tensor] | None] = []
        for p, group in held:
            state = self._filled(p, group)
            g, s = state.pop("grad_sum", None), state.pop("statistic_sum", None)
            sums.append(None if g is None or s is None else (g, s))
        weight, self._weight = self._weight, 0.0
        if self.ranks is not None:
            weight, sums = self._over_ranks(self.ranks, held, sums, weight)
            if weight == 0:
                raise RuntimeError(f"step() without a pass on any rank: expected {self._HOW}")
        return [
            (p, group, pair[0] / weight, pair[1] / weight)
            for (p, group), pair in zip(held, sums, strict=True)
            if pair is not None
        ]

    def _over_ranks(
        self,
        ranks: Ranks,
        held: list[tuple[nn.Parameter, dict[str, Any]]],
        sums: list[tuple[Tensor, Tensor] | None],
        weight: float,
    ) -> tuple[float, list[tuple[Tensor, Tensor] | None]]:
        """The sums of all ranks; a parameter takes part where it had a gradient on any of them."""
        like = [self.state[p]["hess"] for p, _ in held]
        parts: list[Tensor] = []
        for h, pair in zip(like, sums, strict=True):
            zero = torch.zeros_like(h)
            g, s = pair or (zero, zero)
            parts += [g, s, h.new_tensor([weight, float(pair is not None)])]
        parts = ranks.sum(parts)
        out: list[tuple[Tensor, Tensor] | None] = []
        for i in range(len(held)):
            g, s, told = parts[3 * i : 3 * i + 3]
            out.append((g, s) if float(told[1]) > 0 else None)
        return float(parts[2][0]), out

    def _update(
        self, p: Tensor, grad: Tensor, statistic: Tensor, group: Mapping[str, Any], state: Any
    ) -> None:
        """One parameter's step, from the means over the passes."""
        raise NotImplementedError  # the method's own


class IVON(MeanField):
    r"""Improved variational online Newton (Shen et al. 2024): the cost of Adam, any loss.

    A step, from the mean gradient ĝ and the mean of noise · gradient, s, of the sampled passes:

        g ← beta1 g + (1 - beta1) ĝ
        f = ess (h + delta) s
        h ← beta2 h + (1 - beta2) f + ½ (1 - beta2)² (h - f)² / (h + delta)
        m ← m - lr' clip((g / (1 - beta1^t) + delta (m - m0)) / (h + delta), ±clip_radius)

    with lr' = lr (hess_init + weight_decay) where ``rescale_lr``, so that the first steps are
    those of gradient descent with rate lr. The last term of h makes h + delta a square that has
    no zero: it stays positive. h is not debiased: after T steps beta2^T of ``hess_init`` is in it,
    as if data had told it. Where the posterior is tomorrow's prior, choose beta2^T small.

    The loss is a mean over examples, ``ess`` times it is in nats. t counts a parameter's own
    steps, so that a head which joins late is debiased from there. ``mc_samples`` is for
    ``step(closure)`` only; a plain loop enters ``sampled_params`` as often as it wants.

    Raises ValueError for values that are out of range, and for a prior without names to match;
    StaleAnchorError where its names or shapes are not those of the parameters.
    """

    def __init__(
        self,
        params: ParamsOrGroups,
        lr: float = 0.1,
        *,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        clip_radius: float = math.inf,
        rescale_lr: bool = True,
        prior: Posterior | None = None,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        _check(lr, beta1, beta2, mc_samples)
        positive(hess_init=hess_init)
        if not clip_radius > 0:
            raise ValueError(f"clip_radius must be positive, or inf for none, got {clip_radius}")
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "mc_samples": mc_samples,
            "clip_radius": clip_radius,
            "rescale_lr": rescale_lr,
        }
        super().__init__(params, defaults, prior=prior, generator=generator, ranks=ranks)

    def _statistic(self, grad: Tensor, noise: Tensor) -> Tensor:
        return noise * grad

    def _update(
        self, p: Tensor, grad: Tensor, statistic: Tensor, group: Mapping[str, Any], state: Any
    ) -> None:
        ess, beta1, c = group["ess"], group["beta1"], 1 - group["beta2"]
        m0, p0 = self._prior(p, group)
        delta, m, h = p0 / ess, self._mean(p), state["hess"]
        state["step"] += 1
        state["momentum"].lerp_(grad, 1 - beta1)
        a = h + delta
        gap = h - ess * a * statistic  # h - f
        h.sub_(gap, alpha=c).add_(gap.square_().div_(a), alpha=0.5 * c**2)
        slope = state["momentum"] / (1 - beta1 ** state["step"]) + delta * (m - m0)
        step = slope.div_(h + delta)
        if math.isfinite(group["clip_radius"]):
            step.clamp_(-group["clip_radius"], group["clip_radius"])
        scale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
        self._move(p, torch.sub(m, step, alpha=group["lr"] * scale))


class Vadam(MeanField):
    r"""Adam with weights drawn from N(m, 1 / (ess s + p0)) (Khan et al. 2018).

        g ← beta1 g + (1 - beta1) (ĝ + delta (m - m0))
        s ← beta2 s + (1 - beta2) mean of ĝ²
        m ← m - lr (g / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + delta)

    ĝ² is the square of a mini-batch's mean gradient, which is about 1/B of the curvature: the
    larger the batch, the wider q. VOGN and IVON do not have this fault. ``prior_precision`` is p0
    in nats, of the prior N(0, 1 / p0) of parameters that ``prior`` does not name; q starts with
    precision ``precision_init``, by default p0, as the authors corrected it.

    Raises as ``IVON``.
    """

    def __init__(
        self,
        params: ParamsOrGroups,
        lr: float = 1e-3,
        *,
        ess: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        prior_precision: float = 1.0,
        precision_init: float | None = None,
        mc_samples: int = 1,
        prior: Posterior | None = None,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        _check(lr, beta1, beta2, mc_samples)
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": _hess_init(precision_init, prior_precision, ess),
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": prior_precision / ess,
            "mc_samples": mc_samples,
        }
        super().__init__(params, defaults, prior=prior, generator=generator, ranks=ranks)

    def _statistic(self, grad: Tensor, noise: Tensor) -> Tensor:
        return grad.square()

    def _update(
        self, p: Tensor, grad: Tensor, statistic: Tensor, group: Mapping[str, Any], state: Any
    ) -> None:
        m0, p0 = self._prior(p, group)
        delta, m = p0 / group["ess"], self._mean(p)
        state["step"] += 1
        state["momentum"].lerp_(grad + delta * (m - m0), 1 - group["beta1"])
        state["hess"].lerp_(statistic, 1 - group["beta2"])
        first = state["momentum"] / (1 - group["beta1"] ** state["step"])
        second = state["hess"] / (1 - group["beta2"] ** state["step"])
        self._move(p, m - group["lr"] * first / (second.sqrt() + delta))


class VOGN(MeanField):
    r"""Variational online Gauss-Newton (Khan et al. 2018; Osawa et al. 2019), for any likelihood.

        s ← beta2 s + (1 - beta2) mean_i g_i²
        g ← beta1 g + ĝ + delta (m - m0)
        m ← m - lr g / (s + delta + damping)

    with g_i the gradient of example i at the sampled weights, as ``jacobians`` makes it, so that
    regression works as classification does. The square of an example's gradient is the empirical
    Fisher; it is no more than the source has.

        optimizer = VOGN(model, Gaussian(0.1), ess=len(train))
        for x, y in loader:
            optimizer.observe(x, y)
            optimizer.step()

    Momentum is a plain sum, as published: the effective rate is lr / (1 - beta1). ``ess`` above
    the number of examples is the published factor for data augmentation. The published tempering
    of the prior during warm-up is left out. ``damping`` is in the step only, not in q.

    Raises as ``IVON``.
    """

    _HOW = "`optimizer.observe(inputs, labels)`"

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        lr: float = 1e-3,
        *,
        ess: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        prior_precision: float = 1.0,
        precision_init: float | None = None,
        damping: float = 0.0,
        mc_samples: int = 1,
        prior: Posterior | None = None,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        _check(lr, beta1, beta2, mc_samples)
        if not (damping >= 0 and math.isfinite(damping)):
            raise ValueError(f"damping must be finite and not negative, got {damping}")
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": _hess_init(precision_init, prior_precision, ess),
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": prior_precision / ess,
            "damping": damping,
            "mc_samples": mc_samples,
        }
        chosen = parameters(model)
        super().__init__(chosen.items(), defaults, prior=prior, generator=generator, ranks=ranks)
        self.likelihood = likelihood
        self._engine = Engine(model, chosen)

    @contextmanager
    def sampled_params(self, train: bool = False, weight: float = 1.0) -> Iterator[None]:
        """The weights are a draw from q inside. Raises TypeError for train: see ``observe``."""
        if train:
            raise TypeError(
                "VOGN needs the gradient of each example, which loss.backward() does not keep; "
                "call optimizer.observe(inputs, labels)"
            )
        with super().sampled_params():
            yield

    def observe(
        self,
        inputs: Inputs,
        labels: Tensor,
        *,
        head: Sequence[int] | None = None,
        weight: float | None = None,
    ) -> Tensor:
        """``mc_samples`` passes over a batch, for the next ``step``; the mean nll, in nats.

        weight: of this batch among those before the step, by default the number of its examples.

        Raises ValueError where parameters were frozen or freed since the optimiser was made;
        ValueError and TypeError for labels that do not fit; NotRepeatableError where dropout or
        BatchNorm is in training mode; NonFiniteError for outputs that are NaN or infinite.
        """
        engine, model = self._engine, self._engine.model
        require_held(model, engine.params)
        require_deterministic_mode(model)
        inputs, labels = move(inputs, engine.device), labels.to(engine.device)
        n = rows(inputs)
        weight = float(n) if weight is None else weight
        positive(weight=weight)
        nll = torch.zeros((), dtype=torch.float64)
        sums: dict[str, list[Tensor]] = {}  # added to the state once all went well
        for _ in range(self.param_groups[0]["mc_samples"]):
            with super().sampled_params(), differentiating(model):
                for part in engine.pieces(inputs, 1):
                    nll += self._read(take(inputs, part), labels[part], head, sums)
        for name, (grad, square) in sums.items():
            self._add(engine.params[name], grad, square, weight / n)
        self._weight += weight * self.param_groups[0]["mc_samples"]
        return nll / (n * self.param_groups[0]["mc_samples"])

    def _read(
        self,
        inputs: Inputs,
        labels: Tensor,
        head: Sequence[int] | None,
        sums: dict[str, list[Tensor]],
    ) -> Tensor:
        """Add the sums of the examples' gradients and squares to ``sums``; the summed nll."""
        trace = self._engine.trace(inputs)
        with torch.no_grad():
            f = upcast(trace.f.detach())
            require_finite(f, "the model's output")
            mask = head_mask(None if head is None else tuple(head), f.shape[1], f.device)
            self.likelihood.validate(f, labels, mask)
            v = residual(self.likelihood, f, labels, mask).unsqueeze(0)
            nll = self.likelihood.nll(self.likelihood.mask(f, mask), labels).sum()
        one = torch.ones(len(f), dtype=f.dtype, device=f.device)
        for name, factor in trace.pull(v).items():
            new = [factor.total(one)[0], factor.square_sum(one)]
            old = sums.get(name, (0.0, 0.0))
            sums[name] = [b + a for a, b in zip(old, new, strict=True)]
        return nll.cpu().double()

    def _update(
        self, p: Tensor, grad: Tensor, statistic: Tensor, group: Mapping[str, Any], state: Any
    ) -> None:
        m0, p0 = self._prior(p, group)
        delta, m = p0 / group["ess"], self._mean(p)
        state["step"] += 1
        state["hess"].lerp_(statistic, 1 - group["beta2"])
        state["momentum"].mul_(group["beta1"]).add_(grad + delta * (m - m0))
        scale = state["hess"] + delta + group["damping"]
        self._move(p, m - group["lr"] * state["momentum"] / scale)


def _clear(params: Iterator[nn.Parameter]) -> None:
    for p in params:
        p.grad = None


def _check(lr: float, beta1: float, beta2: float, mc_samples: int) -> None:
    if not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be finite and not negative, got {lr}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    if mc_samples < 1:
        raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")


def _hess_init(precision_init: float | None, prior_precision: float, ess: float) -> float:
    """h with ess h + p0 = precision_init."""
    positive(ess=ess, prior_precision=prior_precision)
    if precision_init is None:
        return 0.0
    if not (precision_init >= prior_precision and math.isfinite(precision_init)):
        raise ValueError(
            f"precision_init must be finite and at least prior_precision={prior_precision}, "
            f"got {precision_init}"
        )
    return (precision_init - prior_precision) / ess

r"""Likelihoods: what an output means, in nats.

Every likelihood here is an exponential family in its natural parameter, the model's raw output
``f`` (logits, log-rate, mean): with log-partition ``A`` and sufficient statistic ``t(y)``

    l(y, f) = A(f) - <t(y), f> + const(y),      residual  r = dl/df = A'(f) - t(y),
    H = d2l/df2 = A''(f)  (free of y),          KL(p(.|f*) || p(.|f)) = Bregman divergence of A.

So three familiar losses are one formula: cross-entropy is ``Categorical``, the squared error is
``Gaussian``, logistic loss is ``Bernoulli``. Labels may be soft (the mean of a distribution over
labels), because ``l`` is linear in ``t(y)``.

Shapes: ``f`` is (B, C); ``y`` is (B,) of class indices, or (B, C); a nll is (B,), in nats.
Source: Khan & Swaroop 2021, section 2 (canonical losses); McCullagh & Nelder 1989.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F


@runtime_checkable
class Likelihood(Protocol):
    """What the rest of the library asks of a likelihood; see the module's formula for symbols."""

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """-log p(y | f) of each example in nats: (B, C), (B,) or (B, C) -> (B,)."""
        ...

    def mean(self, f: Tensor) -> Tensor:
        """E[t(y) | f], the soft label: (B, C) -> (B, C)."""
        ...

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """r = dl/df: (B, C), (B,) or (B, C) -> (B, C)."""
        ...

    def hessian(self, f: Tensor) -> Tensor:
        """H = d2l/df2: (B, C) -> (B, C, C)."""
        ...

    def hessian_factor(self, f: Tensor) -> Tensor:
        """S with S Sᵀ = H: (B, C) -> (B, C, K). Exact curvature needs K backward passes."""
        ...

    def hessian_trace(self, f: Tensor) -> Tensor:
        """tr H, the lambda score of Pan 2020: (B, C) -> (B,)."""
        ...

    def kl(self, f_ref: Tensor, f: Tensor) -> Tensor:
        """KL(p(. | f_ref) || p(. | f)) in nats: (B, C), (B, C) -> (B,). Zero and flat at f_ref."""
        ...

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One label for each example, drawn from p(. | f)."""
        ...

    def validate(self, f: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Raise ValueError or TypeError where ``y`` cannot be a label of ``f``."""
        ...

    def mask(self, f: Tensor, mask: Tensor | None) -> Tensor:
        """Outputs outside of ``mask`` (B, C) or (C,) get probability 0; None leaves ``f``."""
        ...


def require_likelihood(likelihood: object) -> None:
    """Raise TypeError for what is no likelihood, such as a class without its parentheses.

    One of the user's own need not have all: the empirical Fisher asks for the residual alone, a
    predictive for the mean and the Hessian.
    """
    known = hasattr(likelihood, "residual") or hasattr(likelihood, "mean")
    if isinstance(likelihood, type) or not known:
        raise TypeError(
            f"expected a likelihood such as Categorical(), got {likelihood!r}"
            + ("; add the parentheses" if isinstance(likelihood, type) else "")
        )


def require_hessian(likelihood: object, purpose: str) -> None:
    """Raise TypeError where a likelihood of the user's own has no Hessian, or is none."""
    require_likelihood(likelihood)
    if not callable(getattr(likelihood, "hessian", None)):
        raise TypeError(
            f"{type(likelihood).__name__} has no hessian, which {purpose} needs; give it "
            "hessian(f), (B, C) -> (B, C, C), and hessian_factor(f), a root of it"
        )


def _beside(f: Tensor, generator: torch.Generator | None) -> Tensor:
    """``f`` on the generator's device: one CPU generator can serve a model anywhere."""
    return f if generator is None else f.to(generator.device)


def _no_mask(f: Tensor, mask: Tensor | None, name: str) -> Tensor:
    if mask is not None:
        raise ValueError(
            f"a head (a set of classes) was given, but {name} has no classes to choose from; "
            "use Categorical, or leave the head out"
        )
    return f


def _same_shape(f: Tensor, y: Tensor) -> Tensor:
    """``y`` in the shape of ``f``; a (B,) label of a one-output model becomes (B, 1)."""
    if y.shape == f.shape:
        return y.to(f.dtype)
    if f.ndim == 2 and f.shape[1] == 1 and y.shape == f.shape[:1]:
        return y.to(f.dtype).unsqueeze(1)
    raise ValueError(
        f"labels of shape {tuple(y.shape)} do not fit outputs of shape {tuple(f.shape)}: "
        "expected the same shape, or (B,) labels for a model with one output"
    )


def _finite_labels(y: Tensor) -> None:
    if not torch.isfinite(y).all():
        raise ValueError("labels hold NaN or infinite values; drop or mend those examples first")


@dataclass(frozen=True)
class Categorical:
    r"""One of C classes; ``f`` are logits, p = softmax(f).

    l = logsumexp(f) - f_y,   r = p - onehot(y),   H = diag(p) - p pᵀ,
    S = [sqrt(p_c) (e_c - p)]_c: the gradients of -log p_c, weighted by how likely c is, which is
    why the exact Fisher and the GGN are the same matrix.
    """

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        if y.ndim == 1:
            return F.cross_entropy(f, y, reduction="none")
        return -(y.to(f.dtype) * F.log_softmax(f, dim=-1)).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return F.softmax(f, dim=-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        if y.ndim == 1:
            y = F.one_hot(y, f.shape[-1])
        return self.mean(f) - y.to(f.dtype)

    def hessian(self, f: Tensor) -> Tensor:
        p = self.mean(f)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    def hessian_factor(self, f: Tensor) -> Tensor:
        p = self.mean(f)
        root = p.sqrt().unsqueeze(-2)  # (B, 1, K)
        return torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * root

    def hessian_trace(self, f: Tensor) -> Tensor:
        # Down the columns of fᵀ: on a CPU a softmax along rows of few classes is 7 times slower.
        p = F.softmax(f.mT, dim=-2)
        return (p * (1 - p)).sum(-2)

    def kl(self, f_ref: Tensor, f: Tensor) -> Tensor:
        log_ref, log_p = F.log_softmax(f_ref, dim=-1), F.log_softmax(f, dim=-1)
        return (log_ref.exp() * (log_ref - log_p)).sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        p = self.mean(_beside(f, generator))
        return torch.multinomial(p, 1, generator=generator).squeeze(-1).to(f.device)

    def validate(self, f: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        if f.ndim != 2:
            raise ValueError(f"expected logits of shape (B, C), got {tuple(f.shape)}")
        if y.ndim == 2:
            if y.shape != f.shape or not y.is_floating_point():
                raise ValueError(
                    f"soft labels must be floating point of shape {tuple(f.shape)}, "
                    f"got {y.dtype} of shape {tuple(y.shape)}"
                )
            _finite_labels(y)
            if y.numel() and (y.min() < 0 or ((y.sum(-1) - 1).abs() > 1e-2).any()):
                raise ValueError("soft labels must be probabilities: not negative, rows of sum 1")
            if mask is not None and bool((y.masked_fill(mask, 0) != 0).any()):
                raise ValueError(
                    "soft labels lie outside of the head given for these examples; "
                    "pass the head that holds them"
                )
            return
        if y.shape != f.shape[:1]:
            raise ValueError(
                f"expected one label for each of the {f.shape[0]} examples, "
                f"got labels of shape {tuple(y.shape)}"
            )
        if y.dtype != torch.int64:
            raise TypeError(
                f"class labels must be int64, got {y.dtype}; convert them with y.long()"
            )
        if y.numel() == 0:
            return
        low, high = (int(end) for end in y.aminmax())
        if low < 0 or high >= f.shape[1]:
            raise ValueError(
                f"labels run from {low} to {high}, but the model has {f.shape[1]} outputs "
                f"(classes 0 to {f.shape[1] - 1}); grow the head or relabel the data"
            )
        if mask is not None:
            inside = mask[y] if mask.ndim == 1 else mask.gather(1, y.unsqueeze(1)).squeeze(1)
            if not bool(inside.all()):
                outside = sorted(set(y[~inside].tolist()))
                raise ValueError(
                    f"labels {outside[:10]} lie outside of the head "
                    "given for these examples; pass the head that holds them"
                )

    def mask(self, f: Tensor, mask: Tensor | None) -> Tensor:
        # Half of the lowest finite number: softmax gives exactly 0, and sums stay finite.
        return f if mask is None else f.masked_fill(~mask, torch.finfo(f.dtype).min / 2)


@dataclass(frozen=True)
class NextTokens:
    r"""The L next tokens of a text, each one of V; ``f`` (B, L V) are logits, ``y`` (B, L) tokens.

    l = sum_t l_categorical(y_t, f_t) in nats of the whole text, over tokens whose label is not
    -100. One text is one example: its tokens share their inputs. They are independent given those,
    so that labels drawn for all tokens at once give an unbiased estimate of
    sum_t J_tᵀ H_t J_t by one backward pass ("mc").

    Its Hessian has (L V)² numbers for a text, and a root of it L V columns: ``hessian`` and
    ``hessian_factor`` raise TypeError, and with them exact curvature. "mc" and "empirical" need
    neither. Memories of outputs would hold L V numbers for a text, so
    ``lifelong.integrations.transformers``, which makes a model's outputs flat, allows a prior of
    the weights alone.
    """

    vocabulary: int

    def __post_init__(self) -> None:
        if self.vocabulary < 2:
            raise ValueError(f"a vocabulary has at least 2 tokens, got {self.vocabulary}")

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(self._tokens(f), y.flatten(), reduction="none", ignore_index=-100)
        return each.view(y.shape).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return F.softmax(self._tokens(f), dim=-1).view(f.shape)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        r, y = F.softmax(self._tokens(f), dim=-1), y.flatten()
        counted = (y != -100).to(r.dtype).unsqueeze(1)
        r.scatter_add_(1, y.clamp(min=0).unsqueeze(1), -torch.ones_like(counted))
        return (r * counted).view(f.shape)

    def hessian(self, f: Tensor) -> Tensor:
        raise TypeError(
            f"the Hessian of a text in its {f.shape[-1]} outputs is too large to be formed; pass "
            "estimator='mc' (unbiased) or 'empirical' for its curvature"
        )

    def hessian_factor(self, f: Tensor) -> Tensor:
        return self.hessian(f)

    def hessian_trace(self, f: Tensor) -> Tensor:
        return Categorical().hessian_trace(self._tokens(f)).view(len(f), -1).sum(-1)

    def kl(self, f_ref: Tensor, f: Tensor) -> Tensor:
        return Categorical().kl(self._tokens(f_ref), self._tokens(f)).view(len(f), -1).sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return Categorical().sample(self._tokens(f), generator).view(len(f), -1)

    def validate(self, f: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        _no_mask(f, mask, "NextTokens")
        if f.ndim != 2 or y.ndim != 2 or f.shape != (len(y), y.shape[1] * self.vocabulary):
            raise ValueError(
                f"expected tokens (B, L) and logits (B, L * {self.vocabulary}), got "
                f"{tuple(y.shape)} and {tuple(f.shape)}"
            )
        if y.dtype != torch.int64:
            raise TypeError(f"tokens must be int64, got {y.dtype}; convert them with y.long()")
        wrong = (y != -100) & ((y < 0) | (y >= self.vocabulary))
        if bool(wrong.any()):
            raise ValueError(
                f"tokens lie outside of 0 to {self.vocabulary - 1} (and -100, which is not "
                f"predicted): {y[wrong][:5].tolist()}"
            )

    def mask(self, f: Tensor, mask: Tensor | None) -> Tensor:
        return _no_mask(f, mask, "NextTokens")

    def _tokens(self, f: Tensor) -> Tensor:
        """(B, L V) -> (B L, V)."""
        return f.reshape(-1, self.vocabulary)


@dataclass(frozen=True)
class Bernoulli:
    r"""Each output is a yes or no; ``f`` are logits, p = sigmoid(f); sums over the outputs.

    l = sum_c softplus(f_c) - y_c f_c,   r = p - y,   H = diag(p (1 - p)).
    """

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        y = _same_shape(f, y)
        return F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return torch.sigmoid(f)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return self.mean(f) - _same_shape(f, y)

    def hessian(self, f: Tensor) -> Tensor:
        return torch.diag_embed(self._variance(f))

    def hessian_factor(self, f: Tensor) -> Tensor:
        return torch.diag_embed(self._variance(f).sqrt())

    def hessian_trace(self, f: Tensor) -> Tensor:
        return self._variance(f).sum(-1)

    def kl(self, f_ref: Tensor, f: Tensor) -> Tensor:
        p = torch.sigmoid(f_ref)
        yes = F.logsigmoid(f_ref) - F.logsigmoid(f)
        no = F.logsigmoid(-f_ref) - F.logsigmoid(-f)
        return (p * yes + (1 - p) * no).sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(_beside(f, generator)), generator=generator).to(f.device)

    def validate(self, f: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        _no_mask(f, mask, "Bernoulli")
        y = _same_shape(f, y)
        _finite_labels(y)
        if y.numel() and (float(y.min()) < 0 or float(y.max()) > 1):
            raise ValueError(
                f"Bernoulli labels must lie in [0, 1], got {float(y.min()):g} to {float(y.max()):g}"
            )

    def mask(self, f: Tensor, mask: Tensor | None) -> Tensor:
        return _no_mask(f, mask, "Bernoulli")

    def _variance(self, f: Tensor) -> Tensor:
        return torch.sigmoid(f) * torch.sigmoid(-f)


@dataclass(frozen=True)
class Gaussian:
    r"""Real-valued outputs with independent noise of standard deviation ``noise_sd``.

    l = sum_c (y_c - f_c)² / (2 noise_sd²) + log(noise_sd) + log(2 pi) / 2,
    r = (f - y) / noise_sd²,   H = I / noise_sd².

    Raises ValueError where ``noise_sd`` is not positive and finite.
    """

    noise_sd: float = 1.0

    def __post_init__(self) -> None:
        if not (self.noise_sd > 0 and math.isfinite(self.noise_sd)):
            raise ValueError(f"noise_sd must be positive and finite, got {self.noise_sd}")

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        constant = math.log(self.noise_sd) + 0.5 * math.log(2 * math.pi)
        return (0.5 * self._precision * (_same_shape(f, y) - f).square() + constant).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return f

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return self._precision * (f - _same_shape(f, y))

    def hessian(self, f: Tensor) -> Tensor:
        return torch.diag_embed(torch.full_like(f, self._precision))

    def hessian_factor(self, f: Tensor) -> Tensor:
        return torch.diag_embed(torch.full_like(f, 1 / self.noise_sd))

    def hessian_trace(self, f: Tensor) -> Tensor:
        return torch.full_like(f[..., 0], f.shape[-1] * self._precision)

    def kl(self, f_ref: Tensor, f: Tensor) -> Tensor:
        return 0.5 * self._precision * (f - f_ref).square().sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        beside = _beside(f, generator)
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=beside.device)
        return f + self.noise_sd * noise.to(f.device)

    def validate(self, f: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        _no_mask(f, mask, "Gaussian")
        _finite_labels(_same_shape(f, y))

    def mask(self, f: Tensor, mask: Tensor | None) -> Tensor:
        return _no_mask(f, mask, "Gaussian")

    @property
    def _precision(self) -> float:
        return self.noise_sd**-2


@dataclass(frozen=True)
class Poisson:
    r"""Counts; ``f`` are log-rates; sums over the outputs.

    l = sum_c exp(f_c) - y_c f_c + log(y_c!),   r = exp(f) - y,   H = diag(exp(f)).
    """

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        y = _same_shape(f, y)
        return (f.exp() - y * f + torch.lgamma(y + 1)).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return f.exp()

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() - _same_shape(f, y)

    def hessian(self, f: Tensor) -> Tensor:
        return torch.diag_embed(f.exp())

    def hessian_factor(self, f: Tensor) -> Tensor:
        return torch.diag_embed((0.5 * f).exp())

    def hessian_trace(self, f: Tensor) -> Tensor:
        return f.exp().sum(-1)

    def kl(self, f_ref: Tensor, f: Tensor) -> Tensor:
        gap = f - f_ref
        return (f_ref.exp() * (torch.expm1(gap) - gap)).sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(_beside(f, generator).exp(), generator=generator).to(f.device)

    def validate(self, f: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        _no_mask(f, mask, "Poisson")
        y = _same_shape(f, y)
        _finite_labels(y)
        if y.numel() and float(y.min()) < 0:
            raise ValueError(f"counts must not be negative, got {float(y.min()):g}")

    def mask(self, f: Tensor, mask: Tensor | None) -> Tensor:
        return _no_mask(f, mask, "Poisson")

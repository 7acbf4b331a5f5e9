r"""Laws: what every prior must do, as functions that return a relative error in float64.

The accounting rule: every past example's gradient at the anchor is carried exactly once, and so
is its curvature. From it follow

    gradient_at_anchor, curvature_at_anchor    any network, any split, converged or not
    add, partial_memory                        prior + new data = batch retraining
    remove, change_regulariser, transfer_*     the other three adaptations
    adapted                                    several of them in a row
    gaussian_process                           a full memory is a GP on all data

and beside it ``blended``, ``identical``, ``unbiased``, ``fused``, ``round_trip``,
``deterministic`` and ``untouched``. A term or a preset of one's own is tested by giving it to
them. Everything is compared with exact minimisers and dense Jacobians (``reference.py``), on the
small models of ``cases.py``. Sources: Khan & Swaroop 2021; Daxberger et al. 2023.
"""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoint
from ..data import Examples, head_mask
from ..likelihoods import Likelihood
from ..models import forward, parameters, snapshot
from ..path import PathIntegral
from ..prior import Prior
from ..recipe import Gradient, Recipe, Structure
from ..refit import refit
from ..terms import FunctionSpaceTerm, KernelTerm, MemoryTerm, Regulariser
from .cases import Case, First, Split, build
from .reference import flatten, ggn, jacobian, minimise

TOLERANCE = 1e-12  # of the gradient's norm in nats at a minimum


# -------------------------------------------------------------------- helpers


def nats(likelihood: Likelihood, model: nn.Module, *data: Examples) -> Tensor:
    """sum l(y, f) over some tasks, each under its own head."""
    total = next(model.parameters()).new_zeros(())
    for task in data:
        inputs, labels, _ = task.batch(slice(None))
        f = forward(model, inputs)
        f = likelihood.mask(f, head_mask(task.head, f.shape[1], f.device))
        total = total + likelihood.nll(f, labels).sum()
    return total


def slope(model: nn.Module, value: Tensor) -> Tensor:
    """The gradient of a value in the trainable parameters, flat (P,)."""
    params = list(parameters(model).values())
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in params])
    grads = torch.autograd.grad(value, params, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def weights(model: nn.Module) -> Tensor:
    """The trainable parameters, flat (P,)."""
    return torch.cat([p.detach().flatten() for p in parameters(model).values()])


def moved(model: nn.Module, *, by: float = 0.3, seed: int = 0) -> nn.Module:
    """A copy at other weights: a normal step of that standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    other = deepcopy(model)
    with torch.no_grad():
        for p in parameters(other).values():
            step = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_(step.to(p.dtype), alpha=by)
    return other


def distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖; ‖a - b‖ where b is 0."""
    gap, size = float((a - b).norm()), float(b.norm())
    return gap / size if size else gap


def minimum(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> nn.Module:
    """A copy of the model at a minimum of ``loss``: a few LBFGS steps, then Newton's."""
    fitted = deepcopy(model)
    minimise(fitted, lambda: loss(fitted), tolerance=TOLERANCE, max_iter=10)
    return fitted


def retrained(case: Case, model: nn.Module, regulariser: Regulariser, *data: Examples) -> nn.Module:
    """Batch training: a minimum of sum l + R over all of ``data``, from weights of its own."""
    start = moved(model, by=1.0, seed=91)
    return minimum(start, lambda m: nats(case.likelihood, m, *data) + regulariser(m))


def law_prior(
    likelihood: Likelihood,
    *,
    structure: Structure = "dense",
    gradient: Gradient = "stored",
    precision: float = 0.5,
) -> Prior:
    """The exact prior of the accounting rule, which has seen nothing yet."""
    recipe = Recipe("law", structure=structure, gradient=gradient, memory=None)
    return Prior(likelihood, recipe, (Regulariser(precision),) if precision else ())


def learn(
    prior: Prior, case: Case, *, tasks: int, split: Split | None = None, seed: int = 0
) -> tuple[nn.Module, Prior]:
    """(model, prior) after some tasks, each fitted to a minimum of sum l + prior.

    split: what is kept of each task; by default the prior's own recipe chooses. A prior that needs
    the path of training gets a few steps of gradient descent to watch.
    """
    model = case.make_model(seed)
    for task, data in enumerate(case.data[:tasks]):
        now = prior = prior.prepare(model, data)
        path = None
        if prior.recipe.structure == "path":
            path = _watched(model, prior, data)
        model = minimum(model, lambda m, d=data, p=now: nats(case.likelihood, m, d) + p(m))
        generator = torch.Generator().manual_seed(seed + task)
        if split is None:
            prior = prior.update(model, data, path=path, generator=generator)
        else:
            prior = prior.recall(model, data, split.remember(case, model, task, seed), path=path)
    return model, prior


def _watched(model: nn.Module, prior: Prior, data: Examples) -> PathIntegral:
    optimizer = torch.optim.SGD(parameters(model).values(), lr=1e-2)
    with PathIntegral(model, optimizer, prior, len(data)) as path:
        for _ in range(20):
            optimizer.zero_grad()
            inputs, labels, _ = data.batch(slice(None))
            loss = prior.loss(model, inputs, labels, num_data=len(data), head=data.head)
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    return path


def _regulariser(prior: Prior) -> Regulariser:
    return prior.regulariser or Regulariser()


# -------------------------------------------------------------------- 1 at the anchor


def gradient_at_anchor(
    case: Case, split: Split, *, tasks: int = 1, prior: Prior | None = None, seed: int = 0
) -> float:
    r"""Law 1: grad prior_t(theta_t) = grad(sum_new l + prior_(t-1))(theta_t), prior_0 = R.

    At random weights theta_t, so no anchor is converged; the worst of the tasks.
    """
    prior = prior or law_prior(case.likelihood, structure="diagonal")
    worst = 0.0
    for task in range(tasks):
        model, data = case.make_model(seed + task), case.data[task]
        truth = slope(model, nats(case.likelihood, model, data) + prior(model))
        prior = prior.recall(model, data, split.remember(case, model, task, seed))
        worst = max(worst, distance(slope(model, prior(model)), truth))
    return worst


def curvature_at_anchor(case: Case, split: Split, *, seed: int = 0) -> float:
    r"""Law 1, second half: the Hessian of the prior at theta* is the GGN of the past + R's.

    Any network where nothing is replayed; a replayed example brings its own Hessian, which is its
    GGN for a linear model.
    """
    model, data = case.make_model(seed), case.data[0]
    prior = law_prior(case.likelihood)
    prior = prior.recall(model, data, split.remember(case, model, 0, seed))
    truth = ggn(model, data, case.likelihood)
    truth = truth + _regulariser(prior).precision * torch.eye(len(truth), dtype=truth.dtype)
    return distance(hessian(model, prior(model)), truth)


def hessian(model: nn.Module, value: Tensor) -> Tensor:
    """The Hessian of a value in the trainable parameters: (P, P)."""
    params = list(parameters(model).values())
    first = torch.autograd.grad(value, params, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in first])
    rows_ = [
        torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in flat
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows_])


def gradient_at_minimum(prior: Prior, case: Case, *, seed: int = 0) -> float:
    r"""Law 1 for a preset, after one task that was learned to a minimum.

    There both gradients are 0 up to rounding, so their distance is measured against the gradient
    of the data at other weights. A prior that waits for the next task (LwF) is shown it.
    """
    model, after = learn(prior, case, tasks=1, seed=seed)
    truth = nats(case.likelihood, model, case.data[0]) + _regulariser(prior)(model)
    after = after.prepare(model, case.data[1])
    other = moved(model, seed=seed)
    size = slope(other, nats(case.likelihood, other, case.data[0])).norm()
    return float((slope(model, after(model)) - slope(model, truth)).norm() / size)


# -------------------------------------------------------------------- 2, 7, 8 add data


def add(
    prior: Prior, case: Case, *, tasks: int = 2, split: Split | None = None, seed: int = 0
) -> float:
    """Laws 2, 7 and 8: learning tasks in a row under the prior = learning all of them at once."""
    model, _ = learn(prior, case, tasks=tasks, split=split, seed=seed)
    batch = retrained(case, model, _regulariser(prior), *case.data[:tasks])
    return distance(weights(model), weights(batch))


def add_at_any_anchor(case: Case, split: Split, *, seed: int = 0) -> float:
    """Law 2 with a first task that was never fitted: the stored gradient knows it."""
    anchor = case.make_model(seed)
    prior = law_prior(case.likelihood)
    after = prior.recall(anchor, case.data[0], split.remember(case, anchor, 0, seed))
    model = minimum(anchor, lambda m: nats(case.likelihood, m, case.data[1]) + after(m))
    batch = retrained(case, model, _regulariser(prior), *case.data[:2])
    return distance(weights(model), weights(batch))


def partial_memory(
    case: Case, parts: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0), *, seeds: int = 3
) -> list[float]:
    r"""Law 2'': the error of ``add`` for each part of the past that is remembered.

    The others are in g and G. The mean over some random choices of what is remembered.
    """
    prior = law_prior(case.likelihood)
    return [
        sum(add(prior, case, split=Split("part", memory=part), seed=s) for s in range(seeds))
        / seeds
        for part in parts
    ]


# -------------------------------------------------------------------- 3 remove data


def remove(
    prior: Prior,
    case: Case,
    *,
    task: int = 0,
    tasks: int = 1,
    count: int = 4,
    split: Split | None = None,
    seed: int = 0,
) -> float:
    """Law 3: forget ``count`` examples and refit = retraining without them."""
    model, after = learn(prior, case, tasks=tasks, split=split, seed=seed)
    data = case.data[task]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + 17))
    after = after.forget(model, data[order[:count]], task=task)
    refit = minimum(model, after)
    others = [d for index, d in enumerate(case.data[:tasks]) if index != task]
    batch = retrained(case, model, _regulariser(prior), data[order[count:]], *others)
    return distance(weights(refit), weights(batch))


def remove_at_anchor(case: Case, split: Split, *, count: int = 4, seed: int = 0) -> float:
    """Law 3 at the anchor, for any network: forgetting takes away exactly sum_forgotten J*ᵀ r."""
    anchor, data = case.make_model(seed), case.data[0]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + 17))
    prior = law_prior(case.likelihood, structure="diagonal")
    after = prior.recall(anchor, data, split.remember(case, anchor, 0, seed))
    after = after.forget(anchor, data[order[:count]])
    rest = nats(case.likelihood, anchor, data[order[count:]])
    truth = slope(anchor, rest + prior(anchor))
    return distance(slope(anchor, after(anchor)), truth)


# -------------------------------------------------------------------- 4 change the regulariser


def change_regulariser(
    prior: Prior,
    case: Case,
    *,
    precision: float = 2.0,
    tasks: int = 1,
    split: Split | None = None,
    seed: int = 0,
) -> float:
    """Law 4: replace R and refit = retraining under the new R."""
    model, after = learn(prior, case, tasks=tasks, split=split, seed=seed)
    mean = {n: torch.full_like(p, 0.2) for n, p in snapshot(parameters(model)).items()}
    regulariser = Regulariser(precision, mean)
    refit = minimum(model, after.replace(regulariser=regulariser))
    batch = retrained(case, model, regulariser, *case.data[:tasks])
    return distance(weights(refit), weights(batch))


# -------------------------------------------------------------------- 5 change the model


def transfer_gradient(
    prior: Prior, case: Case, *, keep: int = 2, split: Split | None = None, seed: int = 0
) -> float:
    """Law 5 for linear models that are remembered whole: with features dropped, the prior's
    gradient is that of all the past at every weight, not at the anchor alone."""
    smaller, after, _ = _transferred(prior, case, keep, split, seed)
    truth = nats(case.likelihood, smaller, case.data[0]) + _regulariser(prior)(smaller)
    return distance(slope(smaller, after(smaller)), slope(smaller, truth))


def transfer_refit(
    prior: Prior, case: Case, *, keep: int = 2, split: Split | None = None, seed: int = 0
) -> float:
    """Law 5: refit the smaller model under the transferred prior = training it on the past."""
    smaller, after, _ = _transferred(prior, case, keep, split, seed)
    refit = minimum(smaller, after)
    batch = retrained(case, smaller, _regulariser(prior), case.data[0])
    return distance(weights(refit), weights(batch))


def _transferred(
    prior: Prior, case: Case, keep: int, split: Split | None, seed: int
) -> tuple[nn.Module, Prior, nn.Module]:
    model, after = learn(prior, case, tasks=1, split=split, seed=seed)
    outputs, has_bias = len(model.weight), model.bias is not None  # type: ignore[arg-type]
    smaller = build(lambda: First(keep, outputs, bias=has_bias))(seed + 1)
    return smaller, after.transfer(smaller), model


# -------------------------------------------------------------------- 3 to 5 in a row


Kind = Literal["add", "remove", "relabel", "regularise", "transfer"]


def adapted(
    prior: Prior, case: Case, kinds: Sequence[Kind], *, rebase: bool = True, seed: int = 0
) -> float:
    """Laws 2 to 5 by ``refit``, one after the other: a linear model that learned the first task,
    then the changes in the order of ``kinds``, each from where the last one ended, against batch
    training of the last model on the data that are left, under the last regulariser.

    add: the next task; remove: four examples of the first; relabel: three of them get another
    label; regularise: another precision and mean; transfer: one feature fewer.
    """
    features, outputs = _width(case), len(case.make_model(0).weight)  # type: ignore[arg-type]
    model = build(lambda: First(features, outputs))(seed)
    left = [case.data[0]]
    refit(model, prior, left[0])
    prior = prior.update(model, left[0])
    tasks, removed, regularised = 1, 0, 0
    regulariser = _regulariser(prior)
    for kind in kinds:
        new: Examples | None = None
        if kind == "add":
            new = case.data[tasks]
            tasks += 1
        elif kind in ("remove", "relabel"):
            removed += 1
            left[0], gone = _parted(left[0], 4 if kind == "remove" else 3, seed + removed)
            prior = prior.forget(model, gone, task=0)
            if kind == "relabel":
                new = replace(gone, labels=_other_labels(case.likelihood, gone.labels, outputs))
        elif kind == "regularise":
            regularised += 1
            names = snapshot(parameters(model))
            mean = {n: torch.full_like(p, 0.1 * regularised) for n, p in names.items()}
            regulariser = Regulariser(0.8 + regularised, mean)
            prior = prior.replace(regulariser=regulariser)
        else:
            features -= 1
            smaller = build(lambda n=features: First(n, outputs))(seed + features)
            prior = prior.transfer(smaller)
            model, regulariser = smaller, _regulariser(prior)
        refit(model, prior, new)
        if new is not None:
            left.append(new)
            prior = prior.update(model, new)
        elif rebase:
            prior = prior.rebase(model)
    batch = retrained(case, model, regulariser, *left)
    return distance(weights(model), weights(batch))


def add_after_remove(prior: Prior, case: Case, *, count: int = 4, seed: int = 0) -> float:
    """Laws 2 and 3: examples that leave and come again leave no trace."""
    model = case.make_model(seed)
    refit(model, prior, case.data[0])
    before = weights(model)
    after = prior.update(model, case.data[0])
    _, gone = _parted(case.data[0], count, seed)
    after = after.forget(model, gone)
    refit(model, after)
    if not distance(weights(model), before) > 1e-4:
        return float("inf")  # nothing left, so nothing is shown
    after = after.rebase(model)
    refit(model, after, gone)
    return distance(weights(model), before)


def transfer_by_labels(
    case: Case, other: nn.Module, *, prior: Prior | None = None, seed: int = 0, **how: Any
) -> float:
    """Law 5 for any change of a linear model that is remembered whole: where g cannot follow,
    true labels carry it, and the transferred prior is the objective on all the past."""
    prior = prior or law_prior(case.likelihood)
    _, after = learn(prior, case, tasks=1, seed=seed)
    after = after.transfer(other, allow_unmatched=True, **how)
    batch = retrained(case, other, _regulariser(prior), case.data[0])
    refit(other, after)
    return distance(weights(other), weights(batch))


def drop_classes(
    prior: Prior, case: Case, kept: tuple[int, ...], *, task: int = 0, seed: int = 0
) -> float:
    """Law 5 for outputs that are dropped: as if their examples had never been, and the others had
    had the outputs ``kept`` alone, in that order, to choose from."""
    model, after = learn(prior, case, tasks=1, seed=seed)
    features, data = _width(case), case.data[task]
    smaller = build(lambda: nn.Linear(features, len(kept)))(seed + 1)
    after = after.transfer(smaller, classes=kept, previous=model)
    refit(smaller, after)
    labels = data.labels
    if labels.ndim == 1 and not labels.is_floating_point():
        index = torch.isin(labels, torch.tensor(kept)).nonzero().squeeze(1)
        data = data[index]
        labels = torch.tensor([kept.index(int(c)) for c in data.labels])
    else:
        labels = labels[:, list(kept)]
    head = None if data.head is None else tuple(kept.index(c) for c in data.head if c in kept)
    batch = retrained(case, smaller, _regulariser(prior), replace(data, labels=labels, head=head))
    return distance(weights(smaller), weights(batch))


def _width(case: Case) -> int:
    return case.data[0].inputs.shape[1]  # type: ignore[union-attr]


def _parted(data: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """(the others, ``count`` examples at random)."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + 17))
    return data[order[count:]], data[order[:count]]


def _other_labels(likelihood: Likelihood, labels: Tensor, outputs: int) -> Tensor:
    if not labels.is_floating_point():
        return (labels + 1) % outputs
    return 1 - labels if type(likelihood).__name__ == "Bernoulli" else labels + 1


# -------------------------------------------------------------------- 6 blended labels


def blended(case: Case, *, blend: float = 0.3, seed: int = 0) -> float:
    r"""Law 6: one term of (1 - b) soft + b true = two terms, and = one nll of the mixed label.

    Values are compared with the two terms, gradients with both: up to a constant,
    (1 - b) KL(p* ‖ p) + b l(y, f) = l((1 - b) E[t | f*] + b t(y), f) for an exponential family.
    """
    anchor = case.make_model(seed)
    items = Split("all").remember(case, anchor, 0, seed)
    assert items is not None
    model = moved(anchor, seed=seed + 1)
    one = Prior(case.likelihood, terms=(MemoryTerm(items.weighted(1 - blend, blend)),))
    soft = MemoryTerm(items.weighted(1 - blend, 0.0))
    two = Prior(case.likelihood, terms=(soft, MemoryTerm(items.weighted(0.0, blend))))
    mask = items.mask
    f, reference = forward(model, items.inputs), items.outputs
    f, reference = (case.likelihood.mask(v, mask) for v in (f, reference))
    # t(y) is what the residual subtracts: E[t | f] - t(y), up to the noise of a Gaussian.
    scale = case.likelihood.hessian(torch.zeros_like(f[:1]))[0, 0, 0]
    unit = scale if type(case.likelihood).__name__ == "Gaussian" else torch.ones_like(scale)
    true = case.likelihood.mean(f) - case.likelihood.residual(f, items.labels) / unit
    mixed = (1 - blend) * case.likelihood.mean(reference) + blend * true
    label = case.likelihood.nll(f, mixed.detach()).sum()
    ours = slope(model, one(model))
    return max(
        identical(one, two, model),
        distance(ours, slope(model, two(model))),
        distance(ours, slope(model, label)),
    )


# -------------------------------------------------------------------- 9 Gaussian process


def gaussian_process(
    prior: Prior, case: Case, *, tasks: int = 2, split: Split | None = None, seed: int = 0
) -> float:
    r"""Law 9: for a linear-Gaussian model, the predictions after some tasks are those of a GP:

        m(x) = k(x, X) (k(X, X) + sigma² I)⁻¹ y,   k(x, x') = phi(x)ᵀ phi(x') / delta

    on all the data, with phi(x) = J(x) and delta the precision of R.
    """
    model, _ = learn(prior, case, tasks=tasks, split=split, seed=seed)
    x = torch.cat([task.batch(slice(None)).inputs for task in case.data[:tasks]])  # type: ignore[misc]
    y = torch.cat([task.labels for task in case.data[:tasks]])
    generator = torch.Generator().manual_seed(seed + 5)
    new = torch.randn(7, x.shape[1], generator=generator, dtype=torch.float64)
    features, at = (flatten(jacobian(model, v)).flatten(0, 1) for v in (x, new))
    delta = _regulariser(prior).precision
    noise = 1 / case.likelihood.hessian(torch.zeros(1, 1, dtype=torch.float64))
    k = features @ features.T / delta
    gram = k + noise.squeeze() * torch.eye(len(k), dtype=k.dtype)
    mean = at @ features.T / delta @ torch.linalg.solve(gram, y.flatten())
    return distance(forward(model, new).detach().flatten(), mean)


# -------------------------------------------------------------------- 10 identities


def identical(a: Prior, b: Prior, model: nn.Module, *, constant: bool = False) -> float:
    """Values and gradients of two priors at a few weights round those of the model, beside the
    largest of them there. constant: the values may differ by one constant."""
    points = [moved(model, by=by, seed=seed) for seed, by in enumerate((0.0, 0.1, 0.5))]
    values = torch.stack([torch.stack([a(m).detach(), b(m).detach()]) for m in points])
    slopes = torch.stack([torch.stack([slope(m, a(m)), slope(m, b(m))]) for m in points])
    if constant:
        values = values - values[0]
    gaps = [(v[:, 0] - v[:, 1]).abs().max() / v.abs().max().clamp(min=1) for v in (values, slopes)]
    return float(max(gaps))


# -------------------------------------------------------------------- 11 unbiased


def unbiased(
    term: FunctionSpaceTerm, model: nn.Module, likelihood: Likelihood, batch_size: int
) -> float:
    """Law 11: the mean over all equally likely mini-batches = the full value and gradient.

    Draws until each possible one was seen. A ``KernelTerm`` draws whole blocks. Of the others
    ``batch_size`` must divide the number of items, so that all draws are equally likely; raises
    ValueError elsewhere, and where not all were seen.
    """
    size = len(term.memory)
    if isinstance(term, KernelTerm):
        count = len(term.blocks)
        possible = math.comb(count, max(1, min(count, batch_size * count // size)))
    elif size % batch_size:
        raise ValueError(f"{batch_size} items a batch do not divide {size}; use unbiased_z")
    else:
        possible = (size // batch_size) ** batch_size
    generator = torch.Generator().manual_seed(0)
    seen: dict[Any, tuple[Tensor, Tensor]] = {}
    for _ in range(100 * possible):
        drawn = term.draw(batch_size, generator)
        key = _key(drawn.inputs)
        if key not in seen:
            value = term.value(forward(model, drawn.inputs), drawn, likelihood)
            seen[key] = (value.detach(), slope(model, value))
        if len(seen) == possible:
            break
    else:
        raise ValueError(f"{100 * possible} draws gave {len(seen)} of {possible} mini-batches")
    whole = term.draw(None, None)
    full = term.value(forward(model, whole.inputs), whole, likelihood)
    value = torch.stack([v for v, _ in seen.values()]).mean()
    gradient = torch.stack([g for _, g in seen.values()]).mean(0)
    return max(distance(value, full.detach()), distance(gradient, slope(model, full)))


def unbiased_z(prior: Prior, model: nn.Module, batch_size: int, *, draws: int = 300) -> float:
    """Law 11 for any size: |z| of the mean estimate against the full value, and of the gradient's
    component along a fixed direction; the larger. Above 5 an estimate is biased."""
    generator = torch.Generator().manual_seed(1)
    size = len(weights(model))
    direction = torch.randn(size, generator=generator, dtype=torch.float64)

    def both(n: int | None) -> Tensor:
        value = prior(model, batch_size=n, generator=generator)
        return torch.stack([value.detach().double(), direction @ slope(model, value).double()])

    estimates, truth = torch.stack([both(batch_size) for _ in range(draws)]), both(None)
    gap = (estimates.mean(0) - truth).abs()
    error = estimates.std(0) / draws**0.5
    return float((gap / error.clamp(min=1e-12 * truth.abs().max().clamp(min=1.0))).max())


def _key(inputs: Any) -> tuple[Any, ...]:
    """Which examples were drawn, in whatever order: the rows of their inputs."""
    return tuple(sorted(map(tuple, inputs.flatten(1).tolist())))


def fused(
    prior: Prior, model: nn.Module, data: Examples, *, batch_size: int | None = None
) -> float:
    """``prior.loss`` in one forward = ``nll.mean() + prior(model) / num_data`` in two."""
    inputs, labels, _ = data.batch(slice(None))
    n = len(data)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    one = prior.loss(
        model, inputs, labels, num_data=n, head=data.head, batch_size=batch_size, generator=draws()
    )
    mean = nats(prior.likelihood, model, data) / n
    two = mean + prior(model, batch_size=batch_size, generator=draws()) / n
    value = distance(one.detach(), two.detach())
    return max(value, distance(slope(model, one), slope(model, two)))


# -------------------------------------------------------------------- 12 values and side effects


def round_trip(prior: Prior, model: nn.Module, folder: str | Path) -> None:
    """Law 12: a saved and loaded, a pickled and a copied prior give the same bits; a prior that
    went to float32 and back has what float32 holds. Raises AssertionError."""
    file = checkpoint.save(Path(folder) / "prior.safetensors", prior.state_dict(), kind="prior")
    state = checkpoint.load(file, kind="prior")
    copies = {
        "saved and loaded": Prior.from_state_dict(state),
        "pickled": pickle.loads(pickle.dumps(prior)),
        "deep copied": deepcopy(prior),
        "moved to its own device": prior.to("cpu"),
    }
    for by in (0.0, 0.3):
        at = moved(model, by=by)
        value, gradient = prior(at), slope(at, prior(at))
        for how, other in copies.items():
            same = torch.equal(other(at), value) and torch.equal(slope(at, other(at)), gradient)
            assert same, f"the {how} prior differs"
        there = prior.to(dtype=torch.float32)
        low = deepcopy(at).float()
        assert there(low).dtype == torch.float32, "a float32 prior of a float32 model is not"
        back = there.to(dtype=torch.float64)
        again = prior.to(dtype=torch.float32).to(dtype=torch.float64)
        assert torch.equal(back(at), again(at)), "to() gives other bits when repeated"
        lost = (slope(at, back(at)) - gradient).norm() / gradient.norm().clamp(min=1)
        assert lost < 1e-3, "float32 lost more than digits"
    same = Prior.from_state_dict(state)
    assert (same.recipe, same.likelihood, same.heads) == (
        prior.recipe,
        prior.likelihood,
        prior.heads,
    )
    assert (same.num_data, same.num_tasks) == (prior.num_data, prior.num_tasks)
    assert same.num_bytes == prior.num_bytes


def deterministic(make: Callable[[torch.Generator], Prior], model: nn.Module) -> None:
    """Law 12: the same seed gives the same bits. Raises AssertionError."""
    a, b = (make(torch.Generator().manual_seed(11)) for _ in range(2))
    at = moved(model, by=0.1)
    assert torch.equal(a(at), b(at)), "the same seed gave another value"
    assert torch.equal(slope(at, a(at)), slope(at, b(at))), "the same seed gave another gradient"


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Law 12: what runs inside leaves the model and the random states as they were.

    Compares each module's mode, weights, buffers, requires_grad, .grad (the same tensor with the
    same bits), hooks, and the random states of torch, numpy and Python; also where an error is
    raised inside. Raises AssertionError naming what changed.
    """
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        changed = [key for key in before if not _same(before[key], after[key])]
        assert not changed, f"left changed: {', '.join(changed)}"


def _state(model: nn.Module) -> dict[str, Any]:
    named = dict(model.named_parameters())
    numpy_state: Any = np.random.get_state()
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "parameters": {n: p.detach().clone() for n, p in named.items()},
        "identity of parameters": {n: id(p) for n, p in named.items()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "requires_grad": {n: p.requires_grad for n, p in named.items()},
        "identity of .grad": {n: id(p.grad) for n, p in named.items()},
        ".grad": {n: None if p.grad is None else p.grad.clone() for n, p in named.items()},
        "hooks": {
            f"{n}.{attribute}": list(hooks)
            for n, m in model.named_modules()
            for attribute, hooks in vars(m).items()
            if "hooks" in attribute and hasattr(hooks, "keys")
        },
        "parameter hooks": {n: list(p._backward_hooks or ()) for n, p in named.items()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "torch's random state": torch.get_rng_state(),
        "numpy's random state": numpy_state[1],
        "Python's random state": random.getstate(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b

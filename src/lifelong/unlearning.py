r"""Unlearning, and an audit of it: what the model gives away of the data that should be gone.

    unlearn     prior.forget, refit from the present weights, and the prior seen from there
    audit       beside the model before, and one retrained without the data
    lira        membership inference by likelihood ratio (Carlini et al. 2022), beside a threshold
    Shadows     the models it needs, trained as one stack

The yardstick is a model that never saw the data. Distance in function space says whether the two
are the same model to whoever can only ask it; a membership attack says whether an example can be
told from one that was never there. **An attack is a lower bound**: what it does not find, another
may. Sources: Khan & Swaroop 2021; Nickl et al. 2023 (the step); Yeom et al. 2018 (the threshold);
Carlini et al. 2022 (LiRA); DeLong et al. 1988 (the error of an AUC).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from . import recall
from .data import BATCH_SIZE, Data, Examples, Head, batches, head_mask, head_of, num_examples
from .likelihoods import Bernoulli, Categorical, Likelihood
from .memory import Memory
from .metrics import Evaluation, evaluate
from .models import (
    Params,
    device_of,
    evaluating,
    forward,
    logits,
    parameters,
    require_finite,
    snapshot,
)
from .prior import Prior
from .refit import Method, Refit, refit, steps_of_removal
from .removal import OnIndefinite, Removal
from .terms import is_belief

# --- unlearn --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unlearned:
    """prior: without the examples, seen from the new weights. removal: what was taken out.
    refit: how the weights followed, None where only the step was taken. forgetting: seconds of
    taking out; seconds: of everything."""

    prior: Prior
    removal: Removal
    refit: Refit | None
    forgetting: float
    seconds: float


def unlearn(
    model: nn.Module,
    prior: Prior,
    data: Data | None = None,
    *,
    ids: Tensor | None = None,
    where: Callable[[Memory], Tensor] | None = None,
    task: int | None = None,
    groups: Tensor | Sequence[int] | None = None,
    head: Head | None = None,
    on_indefinite: OnIndefinite = "raise",
    retained: Data | None = None,
    step: bool = False,
    method: Method | None = "auto",
    max_iterations: int | None = None,
    tolerance: float | None = None,
    lr: float = 1e-3,
    minibatch: int = 64,
    generator: torch.Generator | None = None,
    batch_size: int = BATCH_SIZE,
) -> Unlearned:
    """Forget the examples and refit ``model``, in place, from where it is: the anchor.

    Which examples, and on_indefinite: as ``Prior.forget``. method, max_iterations, tolerance, lr,
    minibatch: as ``refit``; by default Newton where the problem is convex, which ends at the
    minimum that retraining ends at, if the memory holds all examples (or the model is linear and
    Gaussian), and ten steps of L-BFGS for a network (``refit.steps_of_removal`` says why).
    step: start with one Newton step on the prior that is left, in the curvature of its weight term
    and its regulariser, theta - (G + delta I)⁻¹ nabla prior: at a minimum the first-order removal
    (G + delta I)⁻¹ sum_removed J*ᵀ r of ``sensitivity.removal``. One backward pass.
    method None: no more than that. Exact for a linear-Gaussian model with a dense G; with a
    diagonal one it wrecks a network (``docs/unlearning.md``).
    retained: data, under ``head``, to refit on in place of what memory and quadratic say of the
    past: slower, exact where convex.

    The returned prior is rebased to the new weights, so that the old ones, which knew the
    examples, are in it no longer. Raises as ``Prior.forget`` and ``refit``, and ValueError for a
    step without curvature or precision; the model is then as it was. A clipped curvature is told
    in ``removal.clipped``, without a warning.
    """
    start = time.perf_counter()
    found = prior._removal(
        model,
        data,
        task=task,
        ids=ids,
        where=where,
        groups=groups,
        head=head,
        on_indefinite=on_indefinite,
        batch_size=batch_size,
    )
    left = prior._without(found)
    forgetting = time.perf_counter() - start
    objective = left
    if retained is not None:
        kept = tuple(t for t in left.terms if is_belief(t))
        objective = replace(left, terms=kept)
    before = snapshot(parameters(model))
    done = None
    try:
        if step:
            _step(model, left)
        if method is not None:
            if retained is None:
                method, max_iterations = steps_of_removal(model, left, method, max_iterations)
            done = refit(
                model,
                objective,
                retained,
                head=head,
                method=method,
                max_iterations=max_iterations,
                tolerance=tolerance,
                lr=lr,
                minibatch=minibatch,
                generator=generator,
                batch_size=batch_size,
            )
        after = left.rebase(model, batch_size=batch_size)
    except BaseException:
        with torch.no_grad():
            for name, p in parameters(model).items():
                p.copy_(before[name])
        raise
    return Unlearned(after, found, done, forgetting, time.perf_counter() - start)


def _step(model: nn.Module, prior: Prior) -> None:
    """theta - (G + delta I)⁻¹ nabla prior(theta)."""
    regulariser = prior.regulariser
    delta = 0.0 if regulariser is None else regulariser.precision
    curvature = recall.total_curvature(prior.terms)
    if curvature is None or not delta > 0:
        raise ValueError(
            "a Newton step needs the curvature of a weight term and the precision of a "
            "regulariser; use a prior with structure= and precision=, or step=False"
        )
    params = parameters(model)
    with evaluating(model), torch.enable_grad():
        value = prior(model)
        grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
    slope = dict(zip(params, grads, strict=True))
    d = curvature.inverse_mv(slope, delta)
    with torch.no_grad():
        for name, p in params.items():
            require_finite(d[name], f"the step of {name}")
            p -= d[name].to(p.dtype)


# --- membership inference -------------------------------------------------------------------------


def confidence(
    model: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    head: Head | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """(N,) float64: the logit-scaled confidence in each true label, log p_y - log (1 - p_y).

    Carlini's scale, on which the scores of many models are close to normal; the loss falls as it
    rises. For labels that are no single class: minus the nll.
    """
    parts = []
    with evaluating(model), torch.no_grad():
        for f, y, mask in _outputs(model, data, likelihood, head, batch_size):
            parts.append(_confidence(likelihood, f, y, mask))
    return torch.cat(parts)


def _outputs(
    model: nn.Module, data: Data, likelihood: Likelihood, head: Head | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    head = head_of(data, head)
    for batch in batches(data, batch_size):
        batch = batch.to(device_of(model))
        f = forward(model, batch.inputs)
        require_finite(f, "an output of the model")
        mask = head_mask(head, f.shape[1], f.device)
        likelihood.validate(f, batch.labels, mask)
        yield f.double(), batch.labels, mask


def _confidence(likelihood: Likelihood, f: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    f = likelihood.mask(f, mask)
    if isinstance(likelihood, Categorical) and y.ndim == 1:
        true = f.gather(1, y.unsqueeze(1))
        others = f.scatter(1, y.unsqueeze(1), -math.inf).logsumexp(1)
        return true.squeeze(1) - others
    if isinstance(likelihood, Bernoulli) and f.shape[1] == 1:
        return ((2 * y.reshape(-1) - 1) * f.squeeze(1)).double()
    return -likelihood.nll(f, y)


@dataclass(frozen=True)
class Attack:
    """How well scores tell members from others: 0.5 of AUC is chance.

    auc: the chance that a member scores higher, ties counted half; auc_error: its standard error
    (DeLong). tpr: members above the threshold that at most ``fpr`` of the others exceed;
    tpr_error: binomial, the threshold taken as given. members, others: how many.
    """

    auc: float
    auc_error: float
    tpr: float
    tpr_error: float
    fpr: float
    members: int
    others: int


def attack(members: Tensor, others: Tensor, *, fpr: float = 0.01) -> Attack:
    """The attack that calls those with the highest scores members; (M,) and (O,) scores.

    With minus the loss or the ``confidence`` of one model as scores it is the threshold on the
    loss (Yeom et al. 2018). Raises ValueError for fewer than two of either, NaN scores, or fpr
    outside of (0, 1).
    """
    if not 0 < fpr < 1:
        raise ValueError(f"fpr must lie in (0, 1), got {fpr}")
    members, others = members.double().flatten().cpu(), others.double().flatten().cpu()
    if len(members) < 2 or len(others) < 2:
        raise ValueError(
            f"an attack compares at least two members and two others, got {len(members)} and "
            f"{len(others)}"
        )
    if bool(members.isnan().any()) or bool(others.isnan().any()):
        raise ValueError("a score is NaN; look at the model's outputs")
    beaten, beating = _placements(members, others), 1 - _placements(others, members)
    variance = beaten.var() / len(members) + beating.var() / len(others)
    threshold = others.sort(descending=True).values[int(fpr * len(others))]
    tpr = float((members > threshold).double().mean())
    return Attack(
        auc=float(beaten.mean()),
        auc_error=float(variance.sqrt()),
        tpr=tpr,
        tpr_error=math.sqrt(tpr * (1 - tpr) / len(members)),
        fpr=fpr,
        members=len(members),
        others=len(others),
    )


def _placements(a: Tensor, b: Tensor) -> Tensor:
    """For each of a, the part of b that is below it, ties counted half."""
    ordered = b.sort().values
    below = torch.searchsorted(ordered, a) + torch.searchsorted(ordered, a, right=True)
    return below.double() / (2 * len(b))


def lira(
    target: Tensor,  # (N,)
    shadows: Tensor,  # (S, N)
    inside: Tensor,  # (S, N) bool
    *,
    online: bool = True,
    pooled: bool | None = None,
) -> Tensor:
    r"""(N,) scores of the likelihood-ratio attack, higher for members (Carlini et al. 2022).

        online   log N(t; mu_in, s_in²) - log N(t; mu_out, s_out²)
        offline  (t - mu_out) / s_out

    target: the attacked model's ``confidence`` in N examples; shadows: that of S models in the
    same; inside: which of them learned which. mu and s for each example, over the models that
    learned it and those that did not; the offline form needs the latter alone, so its shadows can
    be trained before the examples are known. pooled: one s_in and one s_out for all examples,
    about each one's own mean; by default so below 32 models of a kind, where a variance of its
    own is too rough. The paper's s is over all examples at once there; within is narrower.

    Raises ValueError for shapes that differ and where an example has fewer than two models of a
    kind that is needed.
    """
    if shadows.ndim != 2 or shadows.shape != inside.shape or target.shape != shadows.shape[1:]:
        raise ValueError(
            "expected target (N,), shadows (S, N) and inside (S, N), got "
            f"{tuple(target.shape)}, {tuple(shadows.shape)} and {tuple(inside.shape)}"
        )
    target = target.double()
    shadows, inside = shadows.to(target), inside.to(target.device, torch.bool)
    out_mean, out_scale = _fits(shadows, ~inside, pooled, "did not learn")
    z_out = (target - out_mean) / out_scale
    if not online:
        return z_out
    in_mean, in_scale = _fits(shadows, inside, pooled, "learned")
    z_in = (target - in_mean) / in_scale
    return 0.5 * (z_out.square() - z_in.square()) + out_scale.log() - in_scale.log()


_ENOUGH = 32  # models of a kind, for a variance of one example's own


def _fits(scores: Tensor, chosen: Tensor, pooled: bool | None, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (N,) of each column's chosen rows."""
    count = chosen.sum(0)
    fewest = int(count.min()) if count.numel() else 0
    if fewest < 2:
        raise ValueError(
            f"some example has {fewest} shadow models that {kind} it; at least 2 are needed, and "
            "16 or more are usual"
        )
    mean = torch.where(chosen, scores, 0.0).sum(0) / count
    squares = torch.where(chosen, scores - mean, 0.0).square()
    if pooled if pooled is not None else fewest < _ENOUGH:
        variance = (squares.sum() / (count - 1).sum()).expand_as(mean)
    else:
        variance = squares.sum(0) / (count - 1)
    return mean, variance.sqrt().clamp(min=1e-12)


def halves(num_shadows: int, num_examples: int, generator: torch.Generator | None = None) -> Tensor:
    """(S, N) bool: each example in exactly half of the S models, drawn at random.

    Raises ValueError for an odd or non-positive number of models.
    """
    if num_shadows < 2 or num_shadows % 2:
        raise ValueError(f"halves need an even number of models, got {num_shadows}")
    order = torch.rand(num_shadows, num_examples, generator=generator).argsort(0)
    return order < num_shadows // 2


@dataclass(frozen=True, eq=False)
class Shadows:
    """S trained models of one architecture. model: whose code they share; params: name ->
    (S, ...) weights, buffers too; inside: (S, N) bool, what each learned of the N examples."""

    model: nn.Module
    params: Params
    inside: Tensor

    def __len__(self) -> int:
        return len(self.inside)

    def confidence(
        self,
        data: Data,
        likelihood: Likelihood,
        *,
        head: Head | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Tensor:
        """(S, N) float64: ``confidence`` of each model in each of these examples."""
        head = head_of(data, head)
        parts = []
        with evaluating(self.model), torch.no_grad():
            for batch in batches(data, batch_size):
                batch = batch.to(device_of(self.model))
                f = vmap(self._apply, in_dims=(0, None))(self.params, batch.inputs)
                mask = head_mask(head, f.shape[-1], f.device)
                likelihood.validate(f[0], batch.labels, mask)
                flat = f.double().flatten(0, 1)
                y = batch.labels.repeat(len(f), *[1] * (batch.labels.ndim - 1))
                parts.append(_confidence(likelihood, flat, y, mask).reshape(len(f), -1))
        return torch.cat(parts, dim=1)

    def take(self, index: int) -> nn.Module:
        """One of the models, a copy of its own."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                value.copy_(self.params[name][index])
        return model

    def _apply(self, params: Params, inputs: Any) -> Tensor:
        if isinstance(inputs, Mapping):
            return logits(functional_call(self.model, params, (), dict(inputs)))
        return logits(functional_call(self.model, params, (inputs,)))


def train_shadows(
    make_model: Callable[[int], nn.Module],
    data: Examples,
    likelihood: Likelihood,
    inside: Tensor,  # (S, N) bool
    *,
    epochs: int = 20,
    minibatch: int = 64,
    lr: float = 1e-3,
    precision: float = 0.0,
    generator: torch.Generator | None = None,
) -> Shadows:
    """S models trained side by side, each on its own part of the data: Adam on
    mean nll + ½ precision ‖theta‖² / n, the rate falling along a cosine.

    make_model: seed -> a model, called with 0 to S - 1; all of one architecture, and one whose
    code ``torch.func.vmap`` can take (no batch normalisation in training mode: models are read in
    eval mode here). inside: which examples each learns, ``halves`` for instance. A step is one
    batched product for all models, so that small ones cost little more than one. Train them as
    the attacked model was trained: an attack is as strong as its shadows are alike.

    Raises ValueError for an ``inside`` of another shape or a model without examples, and
    NonFiniteError where a loss is NaN or infinite.
    """
    if inside.ndim != 2 or inside.shape[1] != len(data) or not bool(inside.any(1).all()):
        raise ValueError(
            f"inside must be (S, {len(data)}) bool with examples in each row, got shape "
            f"{tuple(inside.shape)}"
        )
    inside = inside.bool().cpu()
    models = [make_model(seed) for seed in range(len(inside))]
    stack, device = _stacked(models), device_of(models[0])
    names = [n for n, p in models[0].named_parameters() if p.requires_grad]
    shadows = Shadows(models[0], stack, inside)
    mask = head_mask(data.head, _width(models[0], data), device)
    sizes = inside.sum(1)
    steps = -(-int(sizes.max()) // minibatch)
    trained = [stack[n].requires_grad_() for n in names]
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)

    def loss(params: Params, inputs: Any, labels: Tensor, size: Tensor) -> Tensor:
        f = likelihood.mask(shadows._apply(params, inputs), mask)
        weights = sum(params[n].square().sum() for n in names)
        return likelihood.nll(f, labels).mean() + 0.5 * precision * weights / size

    with evaluating(models[0]), torch.enable_grad():
        for _ in range(epochs):
            keys = torch.rand(inside.shape, generator=generator) + 2.0 * ~inside
            order = keys.argsort(1)  # each row: its own examples in a random order first
            for step in range(steps):
                # A model with fewer examples goes on with its first ones.
                place = (step * minibatch + torch.arange(minibatch)) % sizes.unsqueeze(1)
                index = order.gather(1, place)
                batch = data.batch(index.flatten()).to(device)
                inputs = _unflatten(batch.inputs, index.shape)
                y = batch.labels.unflatten(0, index.shape)
                total = vmap(loss)(stack, inputs, y, sizes.to(device)).sum()
                require_finite(total, "the loss of a shadow model")
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                schedule.step()
    for value in trained:
        value.requires_grad_(False).grad = None
    return shadows


def _stacked(models: Sequence[nn.Module]) -> Params:
    first = {n for n, _ in (*models[0].named_parameters(), *models[0].named_buffers())}
    states = [dict((*m.named_parameters(), *m.named_buffers())) for m in models]
    return {n: torch.stack([s[n].detach() for s in states]).clone() for n in sorted(first)}


def _width(model: nn.Module, data: Examples) -> int:
    with evaluating(model), torch.no_grad():
        return forward(model, data.batch(slice(0, 1)).to(device_of(model)).inputs).shape[1]


def _unflatten(inputs: Any, shape: torch.Size) -> Any:
    if isinstance(inputs, Mapping):
        return {key: value.unflatten(0, shape) for key, value in inputs.items()}
    return inputs.unflatten(0, shape)


# --- audit ----------------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """What LiRA needs of the shadows: confidences (S, N) in some examples, and who learned which.

    members: of the removed examples; others: of those that were never learned.
    """

    members: Tensor
    members_inside: Tensor
    others: Tensor
    others_inside: Tensor


@dataclass(frozen=True)
class Distance:
    """Between the unlearned and the retrained model, on one set: mean KL in nats from the
    retrained to the unlearned and back, and the part of the examples whose label differs (NaN
    where outputs are no classes)."""

    kl_retrained_unlearned: float
    kl_unlearned_retrained: float
    disagreement: float


def distance(
    unlearned: nn.Module,
    retrained: nn.Module,
    data: Data,
    likelihood: Likelihood,
    *,
    head: Head | None = None,
    batch_size: int = BATCH_SIZE,
) -> Distance:
    """How far two models are from each other on these inputs; labels are not used."""
    forth = back = differ = 0.0
    count = 0
    with evaluating(unlearned), evaluating(retrained), torch.no_grad():
        pairs = zip(
            _outputs(unlearned, data, likelihood, head, batch_size),
            _outputs(retrained, data, likelihood, head, batch_size),
            strict=True,
        )
        for (f, _, mask), (ref, _, _) in pairs:
            f, ref = likelihood.mask(f, mask), likelihood.mask(ref, mask)
            forth += float(likelihood.kl(ref, f).sum())
            back += float(likelihood.kl(f, ref).sum())
            if isinstance(likelihood, Categorical):
                differ += float((f.argmax(1) != ref.argmax(1)).sum())
            elif isinstance(likelihood, Bernoulli):
                differ += float(((f > 0) != (ref > 0)).double().mean(1).sum())
            else:
                differ = math.nan
            count += len(f)
    return Distance(forth / count, back / count, differ / count)


@dataclass(frozen=True)
class Audit:
    """Figures about an unlearning; ``to_dict`` makes plain values of them for a certificate.

    sizes: how many examples each set has. quality: set -> model -> ``Evaluation``, the sets
    "removed", "kept", "test", the models "before", "unlearned", "retrained". distances: set ->
    ``Distance`` to the retrained model; empty where there is none. attacks: model -> name of the
    attack -> ``Attack``; none where an attack has too few examples. seconds: of "unlearning",
    "retraining", as they were told.
    """

    sizes: Mapping[str, int]
    quality: Mapping[str, Mapping[str, Evaluation]]
    distances: Mapping[str, Distance]
    attacks: Mapping[str, Mapping[str, Attack]]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values; NaN becomes None, so that it is valid json."""
        return _plain(asdict(self))

    @property
    def gap(self) -> dict[str, float]:
        """AUC on the unlearned model minus that on the retrained, for each attack."""
        reference = self.attacks.get("retrained", {})
        unlearned = self.attacks["unlearned"]
        return {n: unlearned[n].auc - a.auc for n, a in reference.items()}

    @property
    def speedup(self) -> float:
        """Retraining's seconds over unlearning's; NaN where one was not told or both are 0."""
        slow, fast = (self.seconds.get(n, math.nan) for n in ("retraining", "unlearning"))
        if fast == 0:
            return math.inf if slow > 0 else math.nan
        return slow / fast


def audit(
    before: nn.Module,
    after: nn.Module,
    retrained: nn.Module | None = None,
    *,
    likelihood: Likelihood,
    removed: Data,
    kept: Data,
    test: Data,
    others: Data | None = None,
    evidence: Evidence | None = None,
    seconds: Mapping[str, float] | None = None,
    fpr: float = 0.01,
    head: Head | None = None,
    batch_size: int = BATCH_SIZE,
) -> Audit:
    """Compare the unlearned model (``after``) with the one ``before`` and one ``retrained``.

    others: examples that no model ever learned, against which the attacks tell the removed; by
    default ``test``. Draw them alike: for a removed class, held-out examples of that class.
    evidence: of shadow models, for LiRA online and offline; without it there is the threshold on
    the confidence alone. retrained: without the removed data; None leaves the comparison out, and
    the certificate says so. Reads every model in eval mode and changes none. With fewer than two
    removed examples or two others there are no attacks, which rank the ones among the others.

    Raises as ``evaluate``; ValueError for evidence about other numbers of examples.
    """
    models = {"before": before, "unlearned": after}
    if retrained is not None:
        models["retrained"] = retrained
    sets = {"removed": removed, "kept": kept, "test": test}
    others = test if others is None else others
    quality = {
        place: {
            name: evaluate(model, data, likelihood, head=head, batch_size=batch_size)
            for name, model in models.items()
        }
        for place, data in sets.items()
    }
    distances = {}
    if retrained is not None:
        distances = {
            place: distance(after, retrained, data, likelihood, head=head, batch_size=batch_size)
            for place, data in sets.items()
        }
    sizes = {place: num_examples(data) for place, data in {**sets, "others": others}.items()}
    attacks: dict[str, dict[str, Attack]] = {name: {} for name in models}
    enough = min(sizes["removed"], sizes["others"]) >= 2
    for name, model in models.items() if enough else ():
        m, o = (
            confidence(model, data, likelihood, head=head, batch_size=batch_size)
            for data in (removed, others)
        )
        attacks[name] = {"threshold": attack(m, o, fpr=fpr)}
        if evidence is not None:
            for form, online in (("lira online", True), ("lira offline", False)):
                scores = lira(
                    torch.cat([m, o]),
                    torch.cat([evidence.members, evidence.others], dim=1),
                    torch.cat([evidence.members_inside, evidence.others_inside], dim=1),
                    online=online,
                )
                attacks[name][form] = attack(scores[: len(m)], scores[len(m) :], fpr=fpr)
    return Audit(sizes, quality, distances, attacks, dict(seconds or {}))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

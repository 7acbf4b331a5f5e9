r"""Presets: the published methods, each as a recipe. A preset returns a ``Prior`` that has seen
nothing yet; ``prior.update(model, data)`` after each task does the rest.

All strengths are in nats of the past data, so 1 is Bayes' rule wherever a method has a Bayesian
reading. The published codes mean five different things by lambda; ``docs/units.md`` converts.
``memory`` is a number of examples, bytes ("20MB") or ``Fidelity(0.95)``, see ``budget.py``.
``strength="auto"`` is for curvatures that are fitted to data: ewc, online_ewc, online_laplace and
gradient_reconstruction, whose default it is. The items of a memory have their weights from the
numbers of examples (1, or N/M), SI's path integral is a fall of the loss itself, and FROMP's K is a
covariance: there "auto" is refused.
Where a preset departs from its released code, its docstring says so and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from .budget import Given
from .divergences import KL, Logit
from .likelihoods import Likelihood
from .prior import Prior
from .recipe import Auto, Compact, Estimator, Fitted, Gradient, Recipe, require_strength
from .terms import Regulariser


def _prior(likelihood: Likelihood, recipe: Recipe, precision: float = 0.0) -> Prior:
    return Prior(likelihood, recipe, (Regulariser(precision),) if precision else ())


def finetune(likelihood: Likelihood) -> Prior:
    """No memory of the past at all: what every method must beat."""
    return _prior(likelihood, Recipe("finetune", gradient="none"))


def weight_decay(likelihood: Likelihood, *, precision: float = 1.0) -> Prior:
    """½ precision ‖theta‖² at all times; the past leaves no trace. precision in nats."""
    return _prior(likelihood, Recipe("weight_decay", gradient="none"), precision)


def ewc(
    likelihood: Likelihood,
    *,
    strength: float | Auto = 1.0,
    online: bool = False,
    discount: float = 1.0,
    estimator: Estimator = "exact",
    curvature_examples: int | None = None,
    equal_tasks: bool = False,
    precision: float = 0.0,
) -> Prior:
    r"""Elastic weight consolidation: strength · ½ sum_s <theta - theta_s, F_s (theta - theta_s)>.

    online=False keeps one anchor per task, as Kirkpatrick et al. 2017; their sum is one quadratic
    with a gradient at the newest weights, so it costs no more than one. online=True keeps the
    newest anchor alone, F <- discount F + F_new (Schwarz et al. 2018; Huszár 2018), which is what
    Laplace's method gives.

    strength="auto" finds it for each task: F, at weights that are sure of their data, says next to
    nothing (``lifelong.strength``). curvature_examples: of how many examples F is estimated, here
    and in other presets; None reads all.

    Departs from most released codes: F is the sum over examples of per-example quantities, exact
    over all labels by default, not the square of a mini-batch's mean gradient, so ``strength`` does
    not change with the batch size; outputs outside of a task's head have exactly none.
    """
    if not online and discount != 1:
        raise ValueError("discount belongs to online EWC; pass online=True or leave it at 1")
    gradient: Gradient = "anchored" if online else "carried"
    recipe = Recipe(
        "ewc",
        structure="diagonal",
        estimator=estimator,
        curvature_examples=curvature_examples,
        strength=strength,
        equal_tasks=equal_tasks,
        discount=discount if online else 1.0,
        gradient=gradient,
    )
    return _prior(likelihood, recipe, precision)


def online_laplace(
    likelihood: Likelihood,
    *,
    structure: Fitted = "diagonal",
    strength: float | Auto = 1.0,
    discount: float = 1.0,
    estimator: Estimator = "exact",
    precision: float = 1.0,
) -> Prior:
    r"""The Laplace posterior N(theta*, (precision I + GGN)⁻¹) as the next prior (Ritter 2018).

    With structure="diagonal" and precision=0 it is ``ewc(online=True)``. Exact for a Gaussian
    likelihood and a linear model with structure="dense". With
    "kronecker" the sum over tasks is exact: one product is kept for each (see docs/curvature.md).
    strength="auto" finds it for each task, as ``ewc``.
    """
    recipe = Recipe(
        "online_laplace",
        structure=structure,
        estimator=estimator,
        strength=strength,
        discount=discount,
        gradient="anchored",
    )
    return _prior(likelihood, recipe, precision)


def si(
    likelihood: Likelihood,
    *,
    strength: float = 1.0,
    damping: float = 0.1,
    precision: float = 0.0,
) -> Prior:
    r"""Synaptic intelligence (Zenke 2017): strength · sum_j Omega_j d_j², Omega from the path.

    ``strength`` is the paper's c where tasks are equally large, ``damping`` its xi. Needs a
    ``PathIntegral`` round the training (the learner makes one). Departs from the released code:
    Omega is clipped at 0, since the term would not be bounded below otherwise.
    """
    recipe = Recipe(
        "si", structure="path", strength=strength, path_damping=damping, gradient="anchored"
    )
    return _prior(likelihood, recipe, precision)


def kprior(
    likelihood: Likelihood,
    *,
    precision: float = 1e-2,
    memory: Given | None = 200,
    population: bool = False,
    strength: float = 1.0,
    score: str = "lambda",
    top_outputs: int | None = None,
) -> Prior:
    r"""Knowledge-adaptation prior (Khan & Swaroop 2021):

        strength sum_memory KL(p* ‖ p) + ½ precision ‖theta - theta*‖².

    memory: examples per task, those with the largest lambda; None keeps all, which makes the
    prior exact for GLMs; 0 leaves weight decay round theta*. population: an item stands for N/M
    examples instead of for itself. Departs from the released code: any likelihood, soft labels
    detached, strength in nats.
    """
    require_strength("strength", strength)
    recipe = Recipe(
        "kprior",
        gradient="stationary",
        memory=memory,
        score=score,
        population=population,
        soft=strength,
        top_outputs=top_outputs,
    )
    return _prior(likelihood, recipe, precision)


def compact_memory(
    likelihood: Likelihood,
    *,
    precision: float = 1e-2,
    memory: int = 20,
    total: bool = False,
    method: Compact = "closed_form",
    damping: float = 1e-4,
    iterations: int = 10,
    strength: float = 1.0,
) -> Prior:
    r"""Compact memory (continual logistic regression, NeurIPS 2025), for a linear head:

        strength sum_k w_k KL(p*_k ‖ p_k) + ½ precision ‖theta - theta*‖²  at learned vectors u_k.

    The model is ``nn.Linear`` on frozen features (``lifelong.compact.features``). memory: vectors
    for each task, or in ``total``; after a task old and new ones are learned again together, so
    that their curvature is that of all examples so far, at any class. method: "closed_form" solves
    that in one go; "em" is as published, with eps = ``damping`` and its ``iterations``, and is
    for heads without a bias. Departs from the released code: the likelihood may be any, examples
    of the new task are not clipped in p, and the old memory is read at the new weights.
    Not in ``PRESETS``, which any network can take.
    """
    require_strength("strength", strength)
    recipe = Recipe(
        "compact_memory",
        gradient="stationary",
        memory=memory,
        total=total,
        score="random",
        soft=strength,
        compact=method,
        compact_damping=damping,
        compact_iterations=iterations,
    )
    return _prior(likelihood, recipe, precision)


def fromp(
    likelihood: Likelihood,
    *,
    memory: Given = 200,
    strength: float | None = None,
    prior_precision: float = 1e-3,
    jitter: float = 1e-6,
    kernel: Literal["gp", "identity"] = "gp",
    score: str = "lambda",
    descending: bool = True,
    estimator: Estimator = "exact",
    curvature_examples: int | None = None,
) -> Prior:
    r"""Functional regularisation of memorable past (Pan et al. 2020):

        strength · ½ sum_tasks sum_c (m_c - m*_c)ᵀ K_c⁻¹ (m_c - m*_c).

    memory: examples per task, spread over its classes, those with the largest lambda
    (score="random": FRORP; descending=False: the least memorable). kernel="identity": FROMP-L2.
    prior_precision: delta of the covariance (F + delta)⁻¹ that builds K.

    ``strength`` is in nats, and 1 is the functional prior as Bayes' rule has it. The released code
    is far stronger: its tau divides the mean loss, so strength = tau N with tau from 0.5 to 10.
    None, the default, is tau = 1: strength = N, the mean number of examples of a task so far.
    Departs from that code: the gradient is one vector-Jacobian product of the scalar, not a
    Jacobian for each class and task; jitter is never below the rounding error of K; the places
    that classes leave over are filled.
    """
    if strength is not None:
        require_strength("strength", strength)
    recipe = Recipe(
        "fromp",
        structure="diagonal" if kernel == "gp" else None,
        estimator=estimator,
        curvature_examples=curvature_examples,
        gradient="none",
        memory=memory,
        score=score,
        descending=descending,
        population=strength is None,
        soft=1.0 if strength is None else strength,
        kernel=kernel,
        kernel_precision=prior_precision,
        jitter=jitter,
    )
    return _prior(likelihood, recipe)


def gradient_reconstruction(
    likelihood: Likelihood,
    *,
    memory: Given | None = 200,
    weight: bool = True,
    function: bool = True,
    replay: float = 0.0,
    blend: float = 0.0,
    population: bool = True,
    strength: float | Auto = "auto",
    margin: float = 1.0,
    structure: Fitted = "diagonal",
    gradient: Gradient = "stationary",
    precision: float = 0.0,
    score: str = "random",
    temperature: float = 1.0,
    estimator: Estimator = "exact",
    curvature_examples: int | None = None,
    equal_tasks: bool = False,
    total: bool = False,
    ask: bool = False,
    top_outputs: int | None = None,
) -> Prior:
    r"""Weights, functions and replay in one prior (EWC+FR+Replay; Daxberger et al. 2023):

        strength ½ <d, G d> + w sum_M1 KL(p* ‖ p) + w sum_M2 l(y, f),   G of the examples not kept.

    strength: "auto" finds it for each task from its data (``lifelong.strength``); it is 1 where 1
    is exact; ``Prior.strengths`` tells. margin: multiplies what was found; ValueError where the
    strength was given. weight, function: leave out a part. replay: this fraction of the memory is
    kept by its true label (M2), the rest by soft labels (M1). blend: every item mixes, (1 - blend)
    soft and blend true. gradient: "stored" also keeps g, which is exact at anchors that are no
    minimum and costs one more pass. population: an item stands for w = N / M examples of its task;
    False counts every past example's curvature exactly once (w = 1). The two agree where all is
    kept. With a small memory and a diagonal G, w = 1 leaves nearly everything to G, which a
    diagonal carries badly, and it forgets more.
    equal_tasks: each task counts as much as the one at hand, whatever its size (see ``Recipe``).
    total: the memory is one for all tasks, drawn as in ``experience_replay``, not each task's.
    ask: soft labels of augmented items are those of the old weights at the augmented input.

    Departs from the released code: exact curvature under the task's own head (there the empirical
    Fisher looks at the wrong outputs from task 2 on), sums instead of means, so no strength has to
    be tuned for each memory size, and at the anchor the replayed examples' own gradient is
    subtracted, so that the whole prior is flat there.
    """
    if not 0 <= blend <= 1:
        raise ValueError(f"blend must lie in [0, 1], got {blend}")
    if replay and blend:
        raise ValueError("replay splits the memory and blend mixes labels; give one of them")
    if not function:
        soft, hard, fraction = 0.0, (1.0 if replay or blend else 0.0), 0.0
    else:
        soft, hard, fraction = 1.0 - blend, blend, replay
    recipe = Recipe(
        "gradient_reconstruction",
        structure=structure if weight else None,
        estimator=estimator,
        curvature_examples=curvature_examples,
        strength=strength,
        margin=margin,
        equal_tasks=equal_tasks,
        gradient=gradient,
        memory=memory if soft or hard or fraction else 0,
        total=total,
        score=score,
        population=population,
        soft=soft,
        hard=hard,
        replay_fraction=fraction,
        divergence=KL(temperature),
        ask=ask and soft > 0,
        top_outputs=top_outputs,
    )
    return _prior(likelihood, recipe, precision)


def recommended(
    likelihood: Likelihood,
    *,
    memory: Given | None = 200,
    structure: Fitted = "kronecker",
    margin: float = 1.0,
    precision: float = 0.0,
    total: bool = False,
    top_outputs: int | None = None,
) -> Prior:
    r"""What to take where nothing is known yet: ``gradient_reconstruction`` with nothing to tune.

        c ½ <d, G d> + N_new / M sum_memory KL(p* ‖ p)   for each past task, at the newest weights.

    Chosen by the tables of ``lifelong bench`` on held-out training data (docs/which-prior.md). Its
    parts, and why each is as it is:

    - items drawn at random, as many of each class: scores that favour hard examples lose as soon as
      an item has to stand for many;
    - soft labels, asked for again after each task: true labels, or half of each, were no better on
      classes that keep coming and worse where all tasks share their outputs;
    - in training with augmentation, the soft label of a changed item is what the old weights say of
      that very input (``Recipe.ask``), so that the term is still flat there. What it brings on
      digits is small: from -0.1 to +0.4 points in single runs;
    - G, of the examples that are not kept, sees to what a small memory does not. It has Kronecker
      factors, which were no worse than a diagonal on any stream here and better on most. Its
      strength c is found for each task (``lifelong.strength``). It is exact, over at most 2,000
      examples of a task, so that a convolutional network's update costs a minute, not an hour;
      labels drawn from the model are cheaper still, and too noisy for a task of a hundred;
    - past tasks count as much as the one at hand, whatever their sizes (``equal_tasks``): a large
      task then leaves a small one room to be learned. Where all are of one size this is
      ``gradient_reconstruction`` as it is by default, but for the sample that G is of.

    memory: examples of each task, or bytes, or a fidelity (``budget``). structure: "diagonal" keeps
    less, costs less where bfloat16 is no faster (``Prior.rounded``), and lets each example be
    forgotten exactly, where Kronecker factors of all less those of some may turn indefinite
    (``Prior.forget``: on_indefinite="clip"). margin: multiplies c; 3 or 4 keeps permuted digits
    better, by half a point. total: one memory for all
    tasks, which the first ones fill alone; tasks then count by their sizes. top_outputs: of many
    classes the so many largest outputs of each soft label (``Recipe``).
    """
    prior = gradient_reconstruction(
        likelihood,
        memory=memory,
        structure=structure,
        margin=margin,
        curvature_examples=2_000,
        equal_tasks=not total,
        total=total,
        ask=True,
        precision=precision,
        top_outputs=top_outputs,
    )
    return replace(prior, recipe=replace(prior.recipe, name="recommended"))


def lwf(likelihood: Likelihood, *, strength: float = 1.0, temperature: float = 2.0) -> Prior:
    r"""Learning without forgetting (Li & Hoiem 2016): T² KL_T(p* ‖ p) on the *current* inputs.

    Call ``prior = prior.prepare(model, data)`` before each task (the learner does). Departs from
    the paper: one softmax over all old classes instead of one for each old head.
    """
    require_strength("strength", strength)
    recipe = Recipe(
        "lwf", gradient="none", distil=strength, divergence=KL(temperature, rescale=True)
    )
    return _prior(likelihood, recipe)


def experience_replay(
    likelihood: Likelihood,
    *,
    memory: Given = 1000,
    strength: float = 1.0,
    balanced: bool = False,
    total: bool = True,
    equal_tasks: bool = False,
) -> Prior:
    r"""Replay of true labels: strength · (N / M) sum_memory l(y, f), N all past examples.

    memory: examples in all, by reservoir sampling (Rolnick 2019) or ``balanced`` over classes, each
    then with its own N / M, so that a rare class counts no more than it occurred;
    total=False keeps that many of each task. Departs from online replay: the reservoir is drawn
    once a task has been learned, with the same law.
    """
    require_strength("strength", strength)
    recipe = Recipe(
        "experience_replay",
        gradient="none",
        memory=memory,
        total=total,
        score="random",
        per_class=balanced,
        population=True,
        soft=0.0,
        equal_tasks=equal_tasks,
        hard=strength,
    )
    return _prior(likelihood, recipe)


def der(
    likelihood: Likelihood, *, memory: Given = 1000, alpha: float = 0.1, total: bool = True
) -> Prior:
    r"""Dark experience replay (Buzzega 2020): alpha · (N / M) sum_memory ½ ‖f - f*‖².

    f* are the logits when an example was memorised, never refreshed; memory as in
    ``experience_replay``. The paper's alpha multiplies a mean over items and C logits without the
    ½, beside a mean loss, so alpha here = 2 alpha_paper / C · N_new / N, with N_new the size of the
    new task. Departs from it: f* is taken after the task, not in passing.
    """
    return derpp(likelihood, memory=memory, alpha=alpha, beta=0.0, total=total)


def derpp(
    likelihood: Likelihood,
    *,
    memory: Given = 1000,
    alpha: float = 0.1,
    beta: float = 0.5,
    total: bool = True,
) -> Prior:
    r"""DER++ (Buzzega 2020): (N / M) sum_memory alpha ½ ‖f - f*‖² + beta l(y, f).

    Departs from the paper: both parts share one forward pass over the same items, where it draws
    two batches; else as ``der``.
    """
    require_strength("alpha", alpha)
    require_strength("beta", beta)
    recipe = Recipe(
        "derpp" if beta else "der",
        gradient="none",
        memory=memory,
        total=total,
        score="random",
        per_class=False,
        population=True,
        soft=alpha,
        hard=beta,
        divergence=Logit(),
        refresh=False,
    )
    return _prior(likelihood, recipe)


def joint(likelihood: Likelihood, *, precision: float = 0.0) -> Prior:
    """Everything is kept and replayed: batch training, the yardstick of what memory can give.

    In a plain loop it is a replay of all past examples; the learner trains afresh on their union
    for each task.
    """
    recipe = Recipe(
        "joint",
        gradient="none",
        memory=None,
        per_class=False,
        soft=0.0,
        hard=1.0,
        reference="joint",
    )
    return _prior(likelihood, recipe, precision)


def separate(likelihood: Likelihood, *, precision: float = 0.0) -> Prior:
    """A fresh model for each task: no forgetting, no transfer. For the learner alone."""
    recipe = Recipe("separate", gradient="none", reference="separate")
    return _prior(likelihood, recipe, precision)


def online_ewc(
    likelihood: Likelihood,
    *,
    strength: float | Auto = 1.0,
    discount: float = 1.0,
    precision: float = 0.0,
) -> Prior:
    """``ewc(online=True)`` under its own name."""
    prior = ewc(likelihood, strength=strength, online=True, discount=discount, precision=precision)
    return replace(prior, recipe=replace(prior.recipe, name="online_ewc"))


PRESETS: Mapping[str, Callable[..., Prior]] = MappingProxyType(
    {
        preset.__name__: preset
        for preset in (
            finetune,
            weight_decay,
            ewc,
            online_ewc,
            si,
            online_laplace,
            kprior,
            fromp,
            gradient_reconstruction,
            recommended,
            lwf,
            experience_replay,
            der,
            derpp,
            joint,
            separate,
        )
    }
)
